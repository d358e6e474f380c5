"""Two processes give the losses, gradients, weights and metrics of one: under DistributedDataParallel and FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import parallel_cases
import pytest
import torch
from filelock import FileLock

import yojo

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "examples" / "accelerate"
EXACT = (*parallel_cases.CASES, "idle", "head", "skips")
# What two processes run, by how they work together: of what needs no sharding to go wrong a part, and all of it soaks.
RUNS = {
    "fsdp2": (*parallel_cases.CASES, *parallel_cases.MORE),
    "ddp": ("lora isolated 2", "full isolated 1", "idle", "skips", "whole lora", "stock"),
    "ddp, all": (*parallel_cases.CASES, *parallel_cases.MORE, "stock"),
}


def each(*names, of="case"):
    """Every run that has all of the names; with each of them as the argument `of`, unless that is None."""
    pairs = [
        (run, name) for run, has in RUNS.items() for name in names if (name in has if of else set(names) <= set(has))
    ]
    marks = {run: [pytest.mark.soak] * (run == "ddp, all") for run in RUNS}
    if of is None:
        runs = [pytest.param(run, marks=marks[run]) for run in dict.fromkeys(run for run, _ in pairs)]
        return pytest.mark.parametrize("together", runs, indirect=True)
    params = [pytest.param(run, name, id=f"{run}-{name}", marks=marks[run]) for run, name in pairs]
    return pytest.mark.parametrize(f"together, {of}", params, indirect=["together"])


@pytest.fixture(scope="session")
def once(tmp_path_factory):
    """Function (name, make) -> what `make(folder)` leaves in its results.pt, made once for all workers and all tests."""
    base, loaded = tmp_path_factory.getbasetemp(), {}
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def load(name, make):
        folder = shared / f"parallel {name}"
        if name not in loaded:
            with FileLock(f"{folder}.lock"):
                if (folder / "failed").is_file():
                    pytest.fail((folder / "failed").read_text())
                if not (folder / "done").is_file():
                    folder.mkdir(exist_ok=True)
                    (folder / "failed").write_text(f"{name} failed in a test before, which says why")
                    make(folder)
                    (folder / "failed").rename(folder / "done")
            loaded[name] = torch.load(folder / "results.pt", weights_only=False)
        return loaded[name]

    return load


@pytest.fixture()
def alone(once, accelerate_state):
    def make(folder):
        torch.save(parallel_cases.run_cases(1, folder), folder / "results.pt")

    return once("one", make)


@pytest.fixture()
def together(request, once):
    """What two processes found, started by `accelerate launch` with the configuration that is shipped."""
    kind = request.param.partition(",")[0]

    def make(folder):
        command = "launch --num_processes 2 --mixed_precision no --main_process_port 0 --config_file".split()
        arguments = [str(CONFIGS / f"{kind}.yaml"), str(ROOT / "tests" / "parallel_cases.py"), str(folder)]
        subprocess.run(
            [sys.executable, "-m", "accelerate.commands.accelerate_cli", *command, *arguments, *RUNS[request.param]],
            check=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            timeout=900,
        )

    found = once(request.param, make)
    sharded = {"FSDPEmbedding", "FSDPQwen3VLTextDecoderLayer"} if kind == "fsdp2" else set()
    for result in found.values():  # that it was FSDP, and that the vision tower's layers are no units
        assert result["units"] >= sharded and bool(result["units"]) == bool(sharded)
        assert not any("Vision" in name for name in result["units"])
    return found


@each(*EXACT)
def test_losses_gradients_and_weights_are_those_of_one_process(alone, together, case):
    one, two = alone[case], together[case]
    assert two["losses"] == pytest.approx(one["losses"], rel=2e-6)
    assert two["norms"] == pytest.approx(one["norms"], rel=1e-3)
    assert set(two["gradients"]) == set(one["gradients"]) and set(two["weights"]) == set(one["weights"])
    # Sums over rows and processes round in another order; the last bias has no gradient but rounding.
    largest = max(gradient.abs().max() for gradient in one["gradients"].values())
    for name, gradient in one["gradients"].items():
        error = (two["gradients"][name] - gradient).abs().max()
        assert error <= max(2e-6 * gradient.abs().max(), torch.finfo(torch.float32).eps * largest), name
    for name, weight in one["weights"].items():  # which moved by up to 3e-3
        assert (two["weights"][name] - weight).abs().max() <= 2e-6, name


@each(*EXACT)
def test_metrics_and_predictions_are_those_of_one_process(alone, together, case):
    one, two = alone[case], together[case]
    assert len(one["metrics"]) == len(two["metrics"]) >= 2
    for expected, found in zip(one["metrics"], two["metrics"], strict=True):
        assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    if case in parallel_cases.CASES:
        assert sum("eval_loss" in line for line in two["metrics"]) == 2
        assert len(two["predictions"]) == 2 and two["predictions"][0].shape == (5, 7)
        torch.testing.assert_close(two["predictions"], one["predictions"], rtol=0, atol=2e-5)


@each("lora isolated 2", "full isolated 1")
def test_what_two_processes_save_scores_as_it_did(together, case):
    loaded = yojo.RewardModel.from_pretrained(together[case]["saved"])
    found = loaded.score_many(parallel_cases.held_out_examples())
    for scores, expected in zip(found, together[case]["predictions"][-1], strict=True):
        torch.testing.assert_close(scores, expected[: len(scores)], rtol=0, atol=5e-6)
        assert expected[len(scores) :].isneginf().all()


@each(*parallel_cases.CASES, "idle", of=None)
def test_shares_were_as_unequal_as_they_can_be(alone, together):
    """Otherwise the tests above would show little."""
    batches = [pair for case in parallel_cases.CASES for pair in zip(*together[case]["shares"], strict=True)]
    assert any(rows[0] != rows[1] for rows in (tuple(share[0] for share in pair) for pair in batches))
    assert any(samples[0] != samples[1] for samples in (tuple(share[1] for share in pair) for pair in batches))
    assert all(share[2] == max(rows for rows, _, _ in pair) for pair in batches for share in pair)
    assert [[share[1] for share in shares] for shares in together["idle"]["shares"]] == [[1, 1], [1, 0]]
    assert {share[1] for shares in alone["idle"]["shares"] for share in shares} == {1, 2}


@each("skips", of=None)
def test_bad_records_are_counted_and_listed_by_whichever_process_has_them(alone, together):
    for result in (alone["skips"], together["skips"]):
        lines = [json.loads(line) for line in result["skipped"]]
        assert sorted(line["index"] for line in lines) == [5, 7]  # once each, in two epochs
        assert any("more than max_length=180" in line["reason"] for line in lines)
        assert any("image 0" in line["reason"] for line in lines)
        assert [line["skipped"] for line in result["metrics"]] == [2.0, 2.0]
    samples = [[share[1] for share in shares] for shares in together["skips"]["shares"]]
    assert [sum(pair) for pair in zip(*samples, strict=True)] == [6, 6]


@each("bf16", "lora comparative 1", of=None)
def test_head_scores_and_losses_are_float32_in_mixed_precision(alone, together):
    assert together["bf16"]["types"] == {(torch.float32,) * 4}
    assert together["bf16"]["losses"] == pytest.approx(alone["bf16"]["losses"], rel=2e-2)
    assert together["bf16"]["losses"] == pytest.approx(together["lora comparative 1"]["losses"][:1], rel=2e-2)


@each("whole lora", "whole full")
def test_a_resumed_run_is_the_uninterrupted_one(together, case):
    whole, resumed = together[case], together[case.replace("whole", "resumed")]
    assert resumed["losses"] == whole["losses"] and len(whole["losses"]) == 2
    assert whole["weights"].keys() == resumed["weights"].keys()
    for name, weight in whole["weights"].items():
        assert torch.equal(resumed["weights"][name], weight), name


@each("stock", of=None)
def test_without_a_trainer_two_halves_give_the_gradient_of_the_whole_batch(together):
    """DistributedDataParallel alone: equal halves make equal means."""
    found = together["stock"]
    assert found["patched once"] and found["whole"].keys() == found["halves"].keys()
    # The last bias shifts all scores alike, so its gradient is zero but for the rounding of the others.
    rounding = 8 * torch.finfo(torch.float32).eps * max(g.abs().max() for g in found["whole"].values())
    for name, gradient in found["whole"].items():
        error = (found["halves"][name] - gradient).abs().max()
        assert error <= max(1e-4 * gradient.abs().max(), rounding), (name, error, rounding)

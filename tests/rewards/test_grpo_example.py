"""The comparison of the paper in small, examples/grpo/comparison: a short run is exact and repeatable; its measures and its report say what they say."""

import importlib
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import yojo
from yojo.demo import digits
from yojo.demo.backbone import build_model, build_processor

pytest.importorskip("trl")
FOLDER = Path(__file__).parents[2] / "examples" / "grpo" / "comparison"
SHORT = {"steps": 2, "prompts": 2, "group": 3, "every": 2, "logging": 1, "images": 2, "samples": 2}
MODULES = ("captioner", "measures", "report", "reward_models", "train")
FILES = {"--train_data": "train", "--eval_data": "held_out"}  # of a folder of digits


def random_reward_model(**options):
    model, processor = build_model(1), build_processor()
    yojo.patch(model, processor, head_dim=16, **options)
    with torch.no_grad():
        for parameter in model.score.parameters():
            parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    return yojo.RewardModel(model, processor)


@pytest.fixture(scope="module")
def example():
    """Function (name) -> a module of examples/grpo, which import each other by their bare names, as scripts do."""
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path.remove(str(FOLDER))
    for name in (*MODULES, "group_sizes"):
        sys.modules.pop(name, None)


def module(name):
    """A fixture of the name: the module."""
    return pytest.fixture(lambda example: example(name), scope="module", name=name)


captioner, measures, report, reward_models, train = map(module, MODULES)


@pytest.fixture(scope="module")
def policy(captioner, tmp_path_factory):
    """A captioner as it begins, untrained: it says anything."""
    folder = tmp_path_factory.mktemp("policy")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captioner.pretrain, "caption_accuracy", lambda *given: 0.0)  # of which nothing is asked here
        patch.setattr(captioner.pretrain, "BATCH_SIZE", 2)
        captioner.make(folder, steps=1)
    return folder


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    """A reward model of random weights in comparative mode: its scores depend on image, text, company and order."""
    folder = tmp_path_factory.mktemp("judge")
    random_reward_model(mode="comparative").save_pretrained(folder)
    return folder


@pytest.fixture()
def fast(monkeypatch, train):
    """Four held-out images instead of 360."""
    load = digits.load_digits_split
    monkeypatch.setattr(digits, "load_digits_split", lambda: (load()[0], load()[1][:4]))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_two_runs_of_a_seed_are_equal_to_the_bit_and_leave_the_reward_model_as_it_was(
    train, policy, judge, fast, tmp_path
):
    settings = train.Settings("judge", str(judge), seed=3, **SHORT)
    weights = {file.name: file.read_bytes() for file in judge.iterdir()}
    notes = [train.run(settings, policy, tmp_path / f"{name}.jsonl", quiet=True) for name in "ab"]
    first, second = ((tmp_path / f"{name}.jsonl").read_bytes() for name in "ab")
    assert first == second
    assert notes[0]["checksum"] == notes[1]["checksum"] == train.Judged(str(judge), 3, 3).checksum()
    assert {file.name: file.read_bytes() for file in judge.iterdir()} == weights
    lines = [json.loads(line) for line in first.splitlines()]
    assert [(line["step"], line["kind"]) for line in lines] == [(0, "eval"), (1, "train"), (2, "eval"), (2, "train")]
    trained = [line for line in lines if line["kind"] == "train"]
    # At the first step the policy is the reference; one step at this rate moves it.
    assert trained[0]["kl"] == 0.0 and trained[1]["kl"] > 0.0
    assert all(line["spread"] > 0 for line in trained)
    other = train.run(train.Settings("judge", str(judge), seed=4, **SHORT), policy, tmp_path / "c.jsonl", quiet=True)
    assert other["checksum"] == notes[0]["checksum"] and (tmp_path / "c.jsonl").read_bytes() != first


def test_a_run_with_the_true_answer(train, report, policy, fast, tmp_path):
    train.run(train.Settings("truth", **SHORT), policy, tmp_path / "truth-seed0.jsonl", quiet=True)
    runs = report.read(tmp_path)
    assert set(runs) == {("truth", 0)}
    for lines in runs.values():
        for line in lines:
            if line["kind"] == "eval":
                assert line["true_wins"] == line["proxy_wins"]
            else:
                assert line["reward"] == pytest.approx(line["accuracy"])
                assert line["useless"] == line["settled"]
    assert "| true answer |" in report.table(runs)
    report.plot(runs, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_a_whole_run_is_kept_and_a_run_that_was_cut_begins_anew(train, policy, fast, tmp_path, monkeypatch):
    out, settings = tmp_path / "run.jsonl", train.Settings("truth", **SHORT)
    with monkeypatch.context() as patch:

        def killed(*given):
            raise KeyboardInterrupt

        patch.setattr(train.measures, "groups", killed)
        with pytest.raises(KeyboardInterrupt):
            train.run(settings, policy, out, quiet=True)
    assert not out.exists() and not out.with_suffix(".json").exists()
    assert (tmp_path / "run.jsonl.writing").read_text().count("\n") == 1  # the evaluation in front
    note = train.run(settings, policy, out, quiet=True)
    written = out.stat().st_mtime_ns
    assert train.run(settings, policy, out, quiet=True) == note and out.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match="other settings"):
        train.run(train.Settings("truth", seed=1, **SHORT), policy, out, quiet=True)


def test_a_reward_model_that_changes_stops_the_run(train, policy, judge, fast, tmp_path, monkeypatch):
    reward = train.Judged(str(judge), 0, 3)
    monkeypatch.setattr(train, "Judged", lambda *given: reward)

    def touched(settings, policy, own, write, folder):
        with torch.no_grad():
            next(own.judge.model.parameters()).view(-1)[0] += 1e-7

    monkeypatch.setattr(train, "_train", touched)
    with pytest.raises(RuntimeError, match="changed"):
        train.run(train.Settings("judge", str(judge), **SHORT), policy, tmp_path / "run.jsonl", quiet=True)
    assert not (tmp_path / "run.jsonl").exists()


def test_the_reward_of_trls_rows_is_the_judges_score_of_the_group(train, judge):
    """As TRL hands rows over: prompts as messages that hold the image, completions as messages, rows of two groups mixed."""
    reward = train.Judged(str(judge), 5, 3)
    (one, _), (two, _) = digits.load_digits_split()[1][:2]
    texts = ["it is a 3.", "this is an eight", "7", "it is a 2.", "five.", "four and five."]
    images = [one, two, one, two, one, two]
    prompts = [
        [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": digits.PROMPT}]}]
        for image in images
    ]
    completions = [[{"role": "assistant", "content": text}] for text in texts]
    found = reward(prompts, completions, image=images, label=[3] * 6, place=[0, 1] * 3)
    for n, image in enumerate((one, two)):
        own = texts[n::2]
        orders = list(itertools.permutations(range(3)))
        scored = {
            order: reward.judge.score(digits.PROMPT, [own[place] for place in order], images=[image]).tolist()
            for order in orders
        }
        # One of the orders, the same for all three.
        fits = [
            order
            for order, scores in scored.items()
            if found[n::2] == pytest.approx([scores[order.index(place)] for place in range(3)], abs=2e-6)
        ]
        assert len(fits) == 1, (found[n::2], scored)
    isolated = train.Judged(f"{judge}#isolated", 5, 3)
    found = isolated(prompts, completions, image=images, label=[3] * 6, place=[0, 1] * 3)
    for n, image in enumerate((one, two)):
        wanted = isolated.judge.score(digits.PROMPT, texts[n::2], images=[image]).tolist()
        assert found[n::2] == pytest.approx(wanted, abs=2e-6)


def test_the_multi_response_model_goes_on_from_the_weights_of_the_single_response_one(reward_models, tmp_path):
    saved = random_reward_model(**reward_models.SINGLE)
    saved.save_pretrained(tmp_path / "start")
    reward_models._restarted(tmp_path / "start", tmp_path / "multi", reward_models.MULTI)
    found = yojo.RewardModel.from_pretrained(tmp_path / "multi")
    assert (found.config.mode, found.config.loss) == ("comparative", "best")
    assert (saved.config.mode, saved.config.loss) == ("isolated", "bradley_terry")
    image = digits.load_digits_split()[1][0][0]
    for responses in (["it is a 3."], ["it is a 3.", "eight."]):
        one, other = (model.score(digits.PROMPT, responses, images=[image]) for model in (saved, found))
        assert torch.equal(one[:1], other[:1])  # the first response sees none before it
    assert not torch.equal(one, other)


def test_the_reward_models_see_as_many_steps_and_two_of_them_one_file(reward_models, tmp_path, monkeypatch):
    calls = []

    def command(name, *words):
        words = list(map(str, words))
        calls.append((name, words))
        if name == "train":
            folder = Path(words[words.index("--output_dir") + 1])
            folder.mkdir(exist_ok=True)
            (folder / "trainer_state.json").write_text("{}")
        if name == "eval":
            (tmp_path / "preferences").mkdir()
            judges = [{"name": name, "figures": {"official": {"best_of_n": 0.5}}} for name in reward_models.JUDGES]
            (tmp_path / "preferences" / "report.json").write_text(json.dumps({"judges": judges}))

    monkeypatch.setattr(reward_models, "_yojo", command)
    monkeypatch.setattr(reward_models, "_restarted", lambda saved, out, options: None)
    made = reward_models.make(tmp_path, seed=4)
    assert made == dict.fromkeys(("single", "multi", "multi-4", "wide"), 0.5)
    assert [name for name, _ in calls] == ["demo", *["train"] * 4, "eval"]
    start, single, multi, wide = (
        dict(zip(words[::2], words[1::2], strict=True)) for name, words in calls if name == "train"
    )
    for options in (start, single, multi):
        assert options["--train_data"] == str(tmp_path / "digits/train.jsonl")
    assert single["--model"] == start["--output_dir"] and multi["--model"] == f"{start['--output_dir']}-multi"
    own = ("--model", "--output_dir", "--mode", "--loss", "--max_responses")
    assert {k: v for k, v in single.items() if k not in own} == {k: v for k, v in multi.items() if k not in own}
    assert single["--max_responses"] == "2" and "--max_responses" not in multi
    data = {name: str(tmp_path / f"digits-wide/{file}.jsonl") for name, file in FILES.items()}
    assert wide == multi | data | {"--output_dir": str(tmp_path / "wide")}
    with open(data["--train_data"]) as file:
        records = [json.loads(line) for line in file]
    assert len(records) == 4311 and all(sorted(one["rankings"]) == [1] + [2] * 7 for one in records)
    (tmp_path / "digits").mkdir()
    (tmp_path / "digits" / "held_out.jsonl").write_text("")
    assert reward_models.make(tmp_path, seed=4) == made and len(calls) == 6  # all is there
    with pytest.raises(ValueError, match="other settings"):
        reward_models.make(tmp_path, seed=5)


# What stands for Python in compare.sh: writes down what it was asked; fails where FAIL stands in it.
STUB = """#!/usr/bin/env bash
echo "$(basename "$1") ${*:2}" >>"$CALLS"
[ -z "${FAIL:-}" ] || [[ "$*" != *"$FAIL"* ]] || { echo "it failed" >&2 && exit 1; }
"""


@pytest.fixture()
def script(tmp_path):
    """Function (arguments) -> (exit status, what was called, standard error) of compare.sh with a stub for Python."""
    (tmp_path / "stub").write_text(STUB)
    (tmp_path / "stub").chmod(0o755)

    def run(*arguments, fail=""):
        calls = tmp_path / "calls"
        calls.write_text("")
        environment = os.environ | {"PYTHON": "./stub", "CALLS": str(calls), "FAIL": fail, "JOBS": "1"}
        command = [str(FOLDER / "compare.sh"), *map(str, arguments)]
        ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
        return ended.returncode, calls.read_text().splitlines(), ended.stderr

    return run


def test_the_script_makes_everything_for_every_seed(script):
    code, calls, error = script("out", 0, 7)
    assert code == 0, error
    assert calls[:3] == ["captioner.py policy", "reward_models.py seed0 --seed 0", "reward_models.py seed7 --seed 7"]
    assert calls[3:8] == [
        "train.py results/truth-seed0.jsonl --policy policy --seed 0 --reward truth",
        "train.py results/single-seed0.jsonl --policy policy --seed 0 --reward judge --judge seed0/single",
        "train.py results/multi-seed0.jsonl --policy policy --seed 0 --reward judge --judge seed0/multi",
        "train.py results/multi-4-seed0.jsonl --policy policy --seed 0 --reward judge --judge seed0/multi#permutations=4",
        "train.py results/wide-seed0.jsonl --policy policy --seed 0 --reward judge --judge seed0/wide",
    ]
    assert len(calls) == 14 and calls[-1] == "report.py results --plot grpo.png"


def test_the_script_stops_where_something_fails(script):
    code, calls, error = script("out", 0, fail="single-seed0")
    assert code != 0 and "it failed" in error and len(calls) == 4
    code, calls, error = script("out", 0, fail="reward_models")
    assert code != 0 and len(calls) == 2
    code, calls, error = script("out", "one")
    assert code == 2 and "got 'one'" in error and calls == []


def test_a_caption_is_right_that_names_the_digit_and_no_other(captioner):
    assert captioner.is_right("it is a 3.", 3) and captioner.is_right("three, 3", 3)
    assert not captioner.is_right("it is a 3 or a 5.", 3) and not captioner.is_right("it is", 3)


def test_a_captioner_of_other_settings_is_refused(captioner, policy, tmp_path):
    assert captioner.make(policy, steps=1)["greedy"] == 0.0
    with pytest.raises(ValueError, match="other settings"):
        captioner.make(policy, steps=2)
    with pytest.raises(FileNotFoundError, match="captioner.py"):
        captioner.load(tmp_path)


def test_captions_are_drawn_from_a_seed_of_their_own(captioner, policy):
    model, processor = captioner.load(policy)
    images = [image for image, _ in digits.load_digits_split()[1][:3]]
    state = torch.random.get_rng_state()
    drawn = captioner.sample(model, processor, images, 2, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [len(group) for group in drawn] == [2, 2, 2]
    assert drawn == captioner.sample(model, processor, images, 2, seed=1)
    assert drawn != captioner.sample(model, processor, images, 2, seed=2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"reward": "length"}, "one of truth, judge"),
        ({"reward": "judge"}, "must name a judge"),
        ({"reward": "truth", "judge": "length"}, "none for another"),
        ({"reward": "truth", "group": 1}, "at least 2"),
        ({"reward": "truth", "steps": 0}, "steps must be at least 1"),
    ],
)
def test_wrong_settings(train, options, message):
    with pytest.raises(ValueError, match=message):
        train.Settings(**options)


def test_wrong_arguments_of_the_command(train, policy, tmp_path, capsys):
    out = str(tmp_path / "run.jsonl")
    for arguments, message in (
        ([out, "--policy", str(tmp_path / "none"), "--reward", "truth"], "holds no captioner"),
        ([out, "--policy", str(policy), "--reward", "judge", "--judge", str(tmp_path / "none")], "none"),
        ([out, "--policy", str(policy), "--reward", "truth", "--group", "1"], "at least 2"),
    ):
        with pytest.raises(SystemExit) as ended:
            train.main(arguments)
        assert ended.value.code == 2 and message in capsys.readouterr().err


def test_what_rewards_are_worth_within_groups(measures):
    found = measures.groups(
        [[1.0, 0.0, 0.0], [2.0, 2.0, 2.0], [5.0, 4.0, 3.0], [1.0, None, 0.0]],
        [[True, False, False], [True, True, False], [False, False, False], [False, True, True]],
    )
    assert found["accuracy"] == pytest.approx(5 / 12)
    assert found["useless"] == 1 / 4 and found["settled"] == 1 / 4
    # Group 1: two pairs won; group 2: two ties; group 3 has none; group 4: one pair, lost, and one reward that is not there.
    assert found["pairs"] == 5 and found["pairwise"] == pytest.approx((2 + 1 + 0) / 5)
    assert found["best"] == pytest.approx((1 + 2 / 3 + 0) / 3)
    spreads = [(2 / 9) ** 0.5, 0.0, (2 / 3) ** 0.5, 0.5]
    assert found["spread"] == pytest.approx(sum(spreads) / 4)
    settled = measures.groups([[0.0, 1.0]], [[True, True]])
    assert settled["pairs"] == 0 and settled["pairwise"] is None and settled["best"] is None


def test_pairs_in_order_of_groups_of_a_size(example):
    from yojo.judges import load_judge

    images, labels = zip(*digits.load_digits_split()[1][:2], strict=True)
    # The longer caption has the higher score: it is the right one in the first half of each list, the wrong one in the second.
    captions = [[f"it is a {d}", f"{(d + 1) % 10}", f"{d}", f"it is a {(d + 1) % 10}"] for d in labels]
    pairwise = example("group_sizes").pairwise
    found = pairwise(load_judge("length"), images, labels, captions, 2, 0)
    assert found == {"size": 2, "pairs": 4, "pairwise": 0.5}
    first = [texts[:2] for texts in captions]
    assert pairwise(load_judge("length"), images, labels, first, 2, 0) == {"size": 2, "pairs": 2, "pairwise": 1.0}


def test_wins_need_no_scores_that_mean_the_same_in_two_groups(measures):
    ours, theirs = [[1.0, 2.0], [101.0, 100.0]], [[0.0, 1.0], [100.0, 103.0]]
    assert measures.win_rate(ours, theirs) == pytest.approx((3.5 / 4 + 1.5 / 4) / 2)
    moved = [[value - 1000 for value in group] for group in (ours[1], theirs[1])]
    assert measures.win_rate([ours[0], moved[0]], [theirs[0], moved[1]]) == measures.win_rate(ours, theirs)


def test_over_optimisation_is_a_proxy_that_rises_where_the_truth_falls(measures):
    assert measures.over_optimisation([0.5, 0.6, 0.7], [0.5, 0.7, 0.6]) == {"fall": pytest.approx(0.1), "apart": 0.5}
    # Both fell: worse, but not for the reward's sake.
    assert measures.over_optimisation([0.5, 0.6, 0.5], [0.5, 0.7, 0.6]) == {"fall": 0.0, "apart": 0.0}
    assert measures.over_optimisation([0.5, 0.6, 0.7], [0.5, 0.6, 0.7]) == {"fall": 0.0, "apart": 0.0}
    # The first of two peaks counts.
    assert measures.over_optimisation([0.5, 0.9, 0.8], [0.7, 0.7, 0.6])["fall"] == pytest.approx(0.1)
    assert measures.setback([0.5, 0.7, 0.6, 0.4, 0.9]) == pytest.approx(0.3 / 4)
    with pytest.raises(ValueError, match="same evaluations"):
        measures.over_optimisation([0.5], [0.5, 0.6])


def test_a_report_refuses_runs_of_different_settings(report, tmp_path):
    with pytest.raises(ValueError, match="no whole run"):
        report.read(tmp_path)
    for seed, steps in ((0, 2), (1, 3)):
        (tmp_path / f"truth-seed{seed}.jsonl").write_text("")
        (tmp_path / f"truth-seed{seed}.json").write_text(json.dumps({"settings": {"seed": seed, "steps": steps}}))
    with pytest.raises(ValueError, match="other settings"):
        report.read(tmp_path)

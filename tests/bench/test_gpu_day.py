"""A day on a GPU, without one: the clock, going on, what is kept, and what is written into the repository."""

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import day_plugin, gpu_day, lines, smoke, tiles
from bench.gpu_day import Step
from bench.pretended_driver import pretended
from yojo_kernels import gluon_attention, tuning
from yojo_kernels.tuning import Tile

ROOT = Path(__file__).parents[2]
TESTS = """
import os, time, pytest
@pytest.fixture(autouse=True, scope="module")
def shared(request):
    yield
    if os.environ.get("LATE"): assert False, "shared is taken down"
@pytest.fixture(autouse=True)
def late(request):
    if os.environ.get("LATE"): request.config.pluginmanager.get_plugin("yojo-day").deadline = 0.0
def test_a(): pass
def test_b(): assert False, "b is wrong"
def test_c(): pytest.skip("c is missing")
def test_d():
    if os.environ.get("SLOW"):
        open(os.environ["SLOW"], "w").close()
        time.sleep(600)
def test_e(): pass
def test_f():
    if os.environ.get("CRASH"): os.abort()
    if os.environ.get("UNUSABLE"):
        from bench import day_plugin
        day_plugin._usable = lambda: False
        assert False, "an illegal access"
def test_g(): pass
"""


@pytest.fixture()
def day(monkeypatch, tmp_path):
    """Function (steps, minutes) -> exit status of a call, on a GPU that only the summary speaks of."""
    about = {"gpu": "NVIDIA Test", "driver": "1", "torch": "2", "triton": "3", "transformers": "5", "python": "3"}
    monkeypatch.setattr(gpu_day, "_machine", lambda: about)
    monkeypatch.setattr(gpu_day, "MARGIN", 0.5)
    monkeypatch.setattr(gpu_day, "LEAST", 0.5)
    monkeypatch.setattr(gpu_day, "WORKERS", 2)
    # A worker of pytest-xdist tells its children that they are workers, too.
    for name in [name for name in os.environ if name.startswith("PYTEST_")]:
        monkeypatch.delenv(name)

    def call(steps, *more, minutes=60.0):
        monkeypatch.setattr(gpu_day, "STEPS", tuple(steps))
        monkeypatch.setattr(gpu_day, "TUNED_FROM", steps[-1].name)
        return gpu_day.main(["--folder", str(tmp_path / "day"), "--minutes", str(minutes), "--commit", "abc", *more])

    return call


def suite(tmp_path):
    path = tmp_path / "test_some.py"
    path.write_text(TESTS)
    return Step("some tests", "whether they pass", "suite", (str(path), "-c", os.devnull, "--rootdir", str(tmp_path)))


def ended(tmp_path):
    found = lines.outcomes(tmp_path / "day/tests.jsonl", "some tests")
    return {test.rpartition("_")[2]: outcome for test, outcome in found.items()}


def test_a_call_ends_in_time_and_the_next_goes_on(day, tmp_path, monkeypatch, capsys):
    steps = [suite(tmp_path)]
    running = tmp_path / "test_d is running"
    monkeypatch.setenv("SLOW", str(running))
    with monkeypatch.context() as patch:
        patch.setattr(gpu_day.Day, "left", lambda self: 0.0 if running.exists() else 1000.0)
        patch.setattr(gpu_day, "has", lambda module: module != "xdist")
        assert day(steps) == gpu_day.MORE
    first = ended(tmp_path)
    assert "d" not in first and first["a"] == "passed" and first["b"] == "failed" and first["c"] == "skipped"
    monkeypatch.delenv("SLOW")
    assert day(steps) == 1
    assert ended(tmp_path) == {**first, "d": "passed", "e": "passed", "f": "passed", "g": "passed"}
    written = lines.read(tmp_path / "day/tests.jsonl")
    assert sum(line["test"].endswith("test_a") and line["outcome"] == "begun" for line in written) == 1  # not run again
    printed = capsys.readouterr().out
    assert "test_b: failed (AssertionError: b is wrong" in printed
    assert day(steps) == 1 and len(lines.read(tmp_path / "day/tests.jsonl")) == len(written)  # nothing left to run
    assert day(steps, "--again", "some tests") == 1 and len(ended(tmp_path)) == 7


class Patience(dict):
    """`gpu_day.HANG` that is short once something hangs; until then it is there whatever time a machine takes.

    Args:
        hangs: function () -> whether it does.
        seconds: that nothing may move then.
    """

    def __init__(self, hangs, seconds=0.5):
        super().__init__(gpu_day.HANG)
        self.hangs, self.seconds = hangs, seconds

    def get(self, kind, default):
        return self.seconds if self.hangs() else math.inf


def hangs(monkeypatch, path):
    """A check that is begun and never ends."""
    script = f"import time; open({str(path)!r}, 'a').write('{{\"check\": \"slow\"}}\\n'); time.sleep(600)"
    monkeypatch.setattr(gpu_day.Day, "command", lambda self, step: [sys.executable, "-c", script])


@pytest.mark.parametrize("late", [True, False])
def test_a_check_that_is_begun_shortly_before_the_end_is_tried_again(day, tmp_path, monkeypatch, late):
    path = tmp_path / "day/smoke.jsonl"
    hangs(monkeypatch, path)
    monkeypatch.setattr(gpu_day, "RETRIED", 60.0 if late else 0.0)
    monkeypatch.setattr(gpu_day.Day, "left", lambda self: 0.0 if path.is_file() and path.read_text() else 1000.0)
    assert day([Step("smoke", "whether it is right", "smoke")]) == gpu_day.MORE
    assert list(smoke.read(path)) == ([] if late else ["slow"])


def test_a_check_that_hangs_has_failed_and_costs_no_call(day, tmp_path, monkeypatch):
    path = tmp_path / "day/smoke.jsonl"
    hangs(monkeypatch, path)
    monkeypatch.setattr(gpu_day, "HANG", Patience(lambda: path.is_file() and path.read_text()))
    monkeypatch.setattr(gpu_day, "RESTARTS", 2)
    assert day([Step("smoke", "whether it is right", "smoke")]) == 1
    assert smoke.read(path)["slow"]["error"] == "the process ended, or was ended, within this check"
    assert "slow" in (tmp_path / "day/summary.md").read_text()


@pytest.mark.parametrize("workers", [pytest.param(True, marks=pytest.mark.soak), False])
def test_a_test_that_hangs_has_failed_and_the_others_run(day, tmp_path, monkeypatch, workers):
    monkeypatch.setenv("SLOW", str(tmp_path / "running"))
    monkeypatch.setattr(gpu_day, "has", lambda module: module != "xdist" or workers)
    file = tmp_path / "day/tests.jsonl"

    def hangs():
        left = set()
        for line in lines.read(file) if file.is_file() else ():
            (left.add if line["outcome"] == "begun" else left.discard)(line["test"].rpartition("_")[2])
        return left == {"d"}

    monkeypatch.setattr(gpu_day, "HANG", Patience(hangs))
    assert day([suite(tmp_path)]) == 1
    assert ended(tmp_path) == {"b": "failed", "c": "skipped", "d": "failed"} | dict.fromkeys("aefg", "passed")


@pytest.mark.parametrize("how", ["CRASH", "UNUSABLE"])
@pytest.mark.parametrize("workers", [pytest.param(True, marks=pytest.mark.soak), False])
def test_what_ends_the_process_ends_one_test(day, tmp_path, monkeypatch, workers, how):
    monkeypatch.setattr(gpu_day, "has", lambda module: module != "xdist" or workers)
    monkeypatch.setenv(how, "1")
    assert day([suite(tmp_path)]) == 1
    assert ended(tmp_path)["f"] in ("failed", "given up") and ended(tmp_path)["g"] == "passed"
    if how == "UNUSABLE":  # and the process was left, once
        log = (tmp_path / "day/log.txt").read_text()
        assert ("crashed" if workers else f"ended with status {day_plugin.UNUSABLE}: going on") in log


@pytest.mark.parametrize("workers", [pytest.param(True, marks=pytest.mark.soak), False])
def test_no_test_is_begun_behind_the_end(day, tmp_path, monkeypatch, workers):
    """The deadline passes within the first test of each process."""
    monkeypatch.setattr(gpu_day, "has", lambda module: module != "xdist" or workers)
    monkeypatch.setenv("LATE", "1")
    assert day([suite(tmp_path)]) == gpu_day.MORE
    first = lines.read(tmp_path / "day/tests.jsonl")
    ran = {line["test"] for line in first if line["outcome"] == "begun"}
    left = [line for line in first if line["outcome"] == "left"]
    assert len(ran) == 1 + workers and len(ran | {line["test"] for line in left}) == len(ran) + len(left) == 7
    assert sum("shared is taken down" in line.get("words", "") for line in left) == len(ran)  # once in each process
    monkeypatch.delenv("LATE")
    assert day([suite(tmp_path)]) == 1 and len(ended(tmp_path)) == 7
    begun = [line["test"] for line in lines.read(tmp_path / "day/tests.jsonl") if line["outcome"] == "begun"]
    assert len(begun) == len(set(begun)) == 7
    log = (tmp_path / "day/log.txt").read_text()
    assert ("-n 2" in log) == workers
    assert "INTERNALERROR" not in log and "Traceback" not in log


def test_results_of_two_machines_or_codes_are_not_mixed(day, tmp_path, capsys):
    steps = [Step("nothing", "nothing", "suite", (str(tmp_path), "-c", os.devnull))]
    day(steps)
    assert gpu_day.main(["--folder", str(tmp_path / "day"), "--commit", "other"]) == 2
    assert "commit 'abc', this call of 'other'" in capsys.readouterr().err


def test_no_gpu_is_an_error(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_day.main(["--folder", str(tmp_path / "day")]) == 2 and "finds none" in capsys.readouterr().err
    assert gpu_day.main(["--write", str(tmp_path)]) == 2 and "not the folder of a day" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        gpu_day.main(["--minutes", "0"])


def test_the_real_steps_collect_what_they_name():
    """Every path and option of a step's command is known to pytest, with a GPU that torch only says is there."""
    steps = [step for step in gpu_day.STEPS if step.kind in ("suite", "bench")]
    assert all((ROOT / argument).exists() for step in steps for argument in step.arguments if "/" in argument[:6])
    assert len({step.name for step in gpu_day.STEPS}) == len(gpu_day.STEPS)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    paths = sorted({a for step in steps for a in step.arguments if a.startswith(("bench/", "tests/"))} - {"tests/gpu"})
    for own, more in ((["tests/gpu"], []), ([p for p in paths if p.startswith("bench")], ["--device", "cuda"])):
        command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "-p", "bench.pretended_gpu", "-p", "no:cacheprovider", *own, *more]  # fmt: skip
        done = subprocess.run(
            command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout[-2000:]
        files = {path for path in paths if path.startswith(own[0].partition("/")[0])}
        assert all(f"{path}: " in done.stdout or f"{path}::" in done.stdout for path in files)


@pytest.mark.parametrize(
    "names", [["host"], pytest.param(["smoke", "suite head", "host", "tune 64"], marks=pytest.mark.soak)]
)
def test_a_dry_run_goes_through_the_steps_on_the_pretended_driver(tmp_path, capsys, names):
    folder = tmp_path / "day"
    command = [sys.executable, "-m", "bench.gpu_day", "--dry-run", "--minutes", "60", "--folder", str(folder)]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(
        [*command, "--steps", *names],
        cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    log = (folder / "log.txt").read_text()
    assert done.returncode == 0, done.stdout + done.stderr + log
    checks = smoke.read(folder / "smoke.jsonl").values()
    assert bool(checks) == ("smoke" in names) and all(line["ok"] for line in checks) and "FAIL" not in log
    assert [line["head_dim"] for line in tiles.read(folder / "tiles.jsonl")] == [64] * ("tune 64" in names)
    assert ("tests/gpu/test_head_loss.py" in log) == ("suite head" in names) and "bench/test_host.py" in log
    assert gpu_day.main(["--list", "--folder", str(folder)]) == 0
    page = capsys.readouterr().out
    assert (folder / "summary.md").read_text() in page and "Nothing failed" in page
    rows = {row.split(" | ")[0].strip("| "): row.split(" | ") for row in page.splitlines() if row.startswith("| ")}
    assert all((rows[step.name][2] == "done") == (step.name in names) for step in gpu_day.STEPS)
    assert gpu_day.main(["--write", str(folder)]) == 2  # nothing in it was measured


def test_a_dry_run_of_what_collects_nothing_fails(day, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_day.Day, "_process", lambda self, step: 5)
    assert day([suite(tmp_path)], "--dry-run") == 1
    assert "| some tests | whether they pass | failed |" in (tmp_path / "day/summary.md").read_text()


def test_a_missing_pytest_is_named(tmp_path):
    """In a process that cannot import it, as on a bare image; what the error offers instead runs there."""
    code = """
import sys
sys.modules["pytest"] = None
from bench import gpu_day, smoke
assert gpu_day.main(["--dry-run"]) == 2 and gpu_day.main(["--list"]) == 0 and smoke.main(["--list"]) == 0
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.startswith("error: suites, tuning and benchmarks need pytest,") and not os.listdir(tmp_path)
    assert "tune 64" in done.stdout and "loss soft" in done.stdout


def test_benchmarks_are_skipped_until_their_package_is_there(day, tmp_path, monkeypatch, capsys):
    path = tmp_path / "test_bench.py"
    path.write_text("def test_a(): pass")
    bench = Step("figures", "how fast", "bench", (str(path), "-c", os.devnull, "--rootdir", str(tmp_path)))
    steps = [bench, suite(tmp_path)]
    with monkeypatch.context() as patch:
        patch.setattr(gpu_day, "has", lambda module: module not in ("xdist", "pytest_benchmark"))
        assert day(steps) == 1
        assert "pip install pytest-benchmark" in capsys.readouterr().out
    assert "| figures | how fast | skipped: needs pytest-benchmark |" in (tmp_path / "day/summary.md").read_text()
    assert len(ended(tmp_path)) == 7  # the step behind it
    monkeypatch.setattr(gpu_day.Day, "_process", lambda self, step: 0)
    assert day(steps) == 1 and "| figures | how fast | done |" in (tmp_path / "day/summary.md").read_text()


# ---- lines that a kill cut ----


def test_what_a_kill_cut_is_left_out_and_not_continued(tmp_path):
    path = tmp_path / "some.jsonl"
    assert lines.read(path) == []
    for number in range(3):
        lines.append(path, {"number": number, "name": "é"})
    whole = path.read_bytes()
    start = whole[:-1].rfind(b"\n") + 1
    for size in range(start, len(whole)):
        path.write_bytes(whole[:size])
        kept = 3 if size == len(whole) - 1 else 2
        assert len(lines.read(path)) == kept
        lines.append(path, {"number": 9})
        assert [line["number"] for line in lines.read(path)] == [*range(kept), 9]
        assert path.read_bytes().count(b"\n") == kept + 1
    path.write_text('{"number": 0}\n{"number"\n{"number": 2}\n')
    with pytest.raises(ValueError, match=r"some\.jsonl:2: Expecting ':'"):
        lines.read(path)
    path.write_text('{"number"\n')  # has its newline: no kill
    with pytest.raises(ValueError, match=r"some\.jsonl:1: "):
        lines.read(path)


def test_a_day_goes_on_behind_lines_that_were_cut(day, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu_day, "has", lambda module: module != "xdist")
    folder = tmp_path / "day"
    folder.mkdir()
    about = {"step": "some tests", "test": "test_some.py::test_a"}
    begun, ended_so = (json.dumps(about | {"outcome": outcome}) for outcome in ("begun", "passed"))
    (folder / "tests.jsonl").write_text(f"{begun}\n{ended_so[:-5]}")
    (folder / "smoke.jsonl").write_text('{"check": "loss be')
    (folder / "tiles.jsonl").write_text('{"kernel": "forw')
    assert smoke.read(folder / "smoke.jsonl") == {} and tiles.read(folder / "tiles.jsonl") == []
    assert day([suite(tmp_path)]) == 1 and len(ended(tmp_path)) == 7
    text = (folder / "tests.jsonl").read_text()
    assert text.count(begun) == 2  # it was run again
    (folder / "tests.jsonl").write_text(text.replace("{", "", 1))
    capsys.readouterr()
    assert day([suite(tmp_path)]) == 2 and "tests.jsonl:1: " in capsys.readouterr().err


# ---- what is written into the repository ----


def tile_line(kernel, tile, milliseconds, dim=128, in_use=False):
    about = {"kernel": kernel, "chip": 90, "dtype": "bfloat16", "head_dim": dim, "tile": list(tile), "in_use": in_use}
    about["rows"] = ["short", "long"][: len(milliseconds or (0, 0))]
    return about | ({"milliseconds": milliseconds} if milliseconds else {"error": "wrong"})


def test_the_fastest_tiles_that_may_be_used_are_chosen(tmp_path):
    path = tmp_path / "tiles.jsonl"
    used = tuning.TILES["forward", 16, 90][128]
    timed = [
        tile_line("forward", used, [1.0, 2.0], in_use=True),
        tile_line("forward", (64, 16, 4, 1), [0.5, 1.0]),
        tile_line("forward", (64, 16, 4, 2), [0.8, 1.5]),
        tile_line("forward", (64, 16, 4, 3), None),
        tile_line("query_grad", tuning.TILES["query_grad", 16, 90][128], [1.0, 1.0], in_use=True),
        tile_line("query_grad", (64, 16, 4, 1), [0.99, 0.99]),  # noise
        tile_line("key_grad", (64, 16, 4, 1), [0.1, 0.1]),  # nothing to compare with
        tile_line("key_grad", tuning.TILES["key_grad", 16, 90][128], [1.0], in_use=True),  # other rows
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in timed))
    (best,) = tiles.chosen(path)
    assert best.tile == Tile(64, 16, 4, 1) and best.used == used and best.gain == pytest.approx(2)
    (second,) = tiles.chosen(path, allowed=lambda one: one.tile.num_stages > 1)
    assert second.tile == Tile(64, 16, 4, 2) and second.gain == pytest.approx((2 / 1.2) ** 0.5)
    source = (ROOT / "yojo_kernels/tuning.py").read_text()
    namespace = {}
    exec(compile(tiles.written_into(source, [best]), "tuning.py", "exec"), namespace)
    expected = {key: dict(entry) for key, entry in tuning.TILES.items()}
    expected["forward", 16, 90][128] = best.tile
    assert namespace["TILES"] == expected
    with pytest.raises(ValueError, match="edit it by hand"):
        tiles.written_into("", [best])


def test_every_table_of_tensor_cores_can_be_written():
    source = (ROOT / "yojo_kernels/tuning.py").read_text()
    for (kernel, bits, chip), entry in tuning.TILES.items():
        if bits == 16:
            for dim, tile in entry.items():
                assert (
                    tiles.written_into(source, [tiles.Chosen(kernel, chip, "bfloat16", dim, tile, tile, 1.0)]) == source
                )


def test_results_tiles_and_docs_are_written(day, tmp_path, monkeypatch, capsys):
    root = tmp_path / "repository"
    for name in ("yojo_kernels/tuning.py", "README.md"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, root / name)
    folder = tmp_path / "day"
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"dry": False, "steps": {}}))
    line = json.loads((ROOT / "bench/results/cpu.jsonl").read_text().splitlines()[0])
    line |= {"gpu": "NVIDIA Test", "cpu": None, "driver": "1.2", "commit": "abc+tiles"}
    (folder / "nvidia-test.jsonl").write_text(json.dumps(line) + "\n" + json.dumps(line)[:40])  # the second was cut
    used = tuning.TILES["forward", 16, 90][128]
    rows = [tile_line("forward", used, [1.0], in_use=True), tile_line("forward", (64, 16, 4, 1), [0.5])]
    (folder / "tiles.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(tiles, "passes_the_gate", lambda choice: True)
    monkeypatch.setattr("bench.savings.count", lambda: None)
    printed = "\n".join(gpu_day.write(folder, root))
    assert "forward 128 on sm_90 is (64, 16, 4, 1)" in printed and "--record" in printed
    assert json.loads((root / "bench/results/nvidia-test.jsonl").read_text()) == line
    assert "NVIDIA Test" in (root / "docs/benchmarks.md").read_text()
    assert "128: Tile(64, 16, 4, 1)" in (root / "yojo_kernels/tuning.py").read_text()
    gpu_day.write(folder, root)  # once more changes nothing
    assert len((root / "bench/results/nvidia-test.jsonl").read_text().splitlines()) == 1


# ---- smoke ----


def test_a_wrong_kernel_is_seen(monkeypatch, tmp_path, capsys):
    place = smoke.Place(torch.device("cpu"), scale=20)
    real = smoke.multi_response_attention

    def wrong(query, key, value, layout, *, impl, return_lse=False, **options):
        output, lse = real(query, key, value, layout, impl="reference", return_lse=True, **options)
        if impl == "triton":
            output = output + 1e-2 * output.abs().max()
        return (output, lse) if return_lse else output

    monkeypatch.setattr(smoke, "multi_response_attention", wrong)
    only = ["--only", "attention float32, 8:2 heads of 64", "--json", str(tmp_path / "smoke.jsonl")]
    assert smoke.main(only, place) == 1
    assert "FAIL" in capsys.readouterr().out
    calls = []
    monkeypatch.setattr(smoke, "multi_response_attention", lambda *a, **o: calls.append(1))
    assert smoke.main(only, place) == 1 and not calls  # known already
    (tmp_path / "smoke.jsonl").write_text('{"check": "attention float32, 8:2 heads of 64"}\n')
    assert smoke.main(only, place) == 1 and not calls and "ended" in capsys.readouterr().out


def test_launches_that_disagree_are_seen(monkeypatch, capsys):
    place, drawn = smoke.Place(torch.device("cpu"), scale=20), iter(range(100))
    real = smoke.listwise_loss
    monkeypatch.setattr(
        smoke, "listwise_loss", lambda *a, impl, **o: real(*a, impl="reference", **o) + 1e-9 * next(drawn) * a[0].sum()
    )
    assert smoke.main(["--only", "loss soft"], place) == 1
    assert "do not agree to the bit" in capsys.readouterr().out


def test_every_check_belongs_to_one_step_of_the_day(monkeypatch):
    monkeypatch.setattr(smoke, "_has_gluon", lambda *some: True)
    names = [one.name for one in smoke.checks(smoke.Place(torch.device("cuda")))]
    chosen = [step.arguments[1:] for step in gpu_day.STEPS if step.kind == "smoke"]
    assert len(chosen) == 2
    for name in names:
        assert sum(name.startswith(own) for own in chosen) == 1, name


def test_the_gluon_forward_is_checked_where_it_can_run(monkeypatch):
    def listed(place):
        return [one.name for one in smoke.checks(place) if one.name.startswith("gluon")]

    there = smoke.Place(torch.device("cpu"), compares=False)
    assert listed(there) == []
    both = [f"gluon attention bfloat16, 8:2 heads of {dim}" for dim in (128, 64)]
    with pretended():
        assert listed(there) == (both if gluon_attention.MISSING is None else [])
        monkeypatch.setattr(gluon_attention, "MISSING", "Triton has it not")
        assert listed(there) == []
    monkeypatch.setattr(gluon_attention, "MISSING", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for capability, expected in (((8, 0), []), ((9, 0), both), ((10, 0), [])):
        monkeypatch.setattr(tuning, "capability", lambda device, found=capability: found)
        assert listed(smoke.Place(torch.device("cuda"))) == expected


def test_it_is_gluon_that_such_a_check_runs(monkeypatch):
    ran, real = [], smoke.multi_response_attention

    def attention(*arguments, impl, **options):
        ran.append(impl)
        return real(*arguments, impl="reference", **options)

    monkeypatch.setattr(smoke, "multi_response_attention", attention)
    check = smoke._attention(torch.bfloat16, 64, (8, 2), impl="gluon")
    assert smoke.attempt(check, smoke.Place(torch.device("cpu"), scale=20))["ok"]
    assert ran == ["gluon", "gluon", "reference", "reference"]

"""A borrowed GPU, used well: all that is to be learnt on one, in the order of what it is worth, in pieces of a few minutes.

    python -m bench.gpu_day --minutes 9 [--folder gpu-day]     # again and again, until it says that all is done
    python -m bench.gpu_day --list                             # the steps, and how far each is
    python -m bench.gpu_day --write gpu-day                    # results, tiles and docs into the repository

Everything lies in one folder: `state.json` (the machine, the code, the steps), `smoke.jsonl` (one row through every kernel),
`tests.jsonl` (every test that ended), `tiles.jsonl` (every tile that was timed), result lines of the benchmarks in a file
named like the GPU, `log.txt`, and `summary.md`, written anew by each call. A call ends after the given
minutes, within a step where it must; the next one goes on behind the last test, check or tile that ended. Steps behind the tuning are
measured with the tiles that it found; `--write` puts them into `yojo_kernels/tuning.py`.

The status is 0 when all steps are done, 75 when there is more to do, 1 when something failed, 2 for what cannot be run.
Benchmarks are skipped where pytest-benchmark is missing, and made up for by a call that finds it.
"""

import argparse
import dataclasses
import datetime
import importlib.util
import json
import math
import os
import pathlib
import shutil
import subprocess
import sys
import time

from bench import lines, smoke, tiles

ROOT = pathlib.Path(__file__).parents[1]
MORE = 75  # exit status: to be continued
HUNG = "hung"  # what a step's process gives in place of an exit status, see `HANG`
MARGIN = 30.0  # seconds before the end within which nothing new is begun
LEAST = 20.0  # seconds that a step is worth beginning for
# Seconds without a new line after which a check, a tile or a test is ended, and has failed; by kind of step. A test of a
# suite compiles kernels for tens of rows.
HANG = {"smoke": 150.0, "tune": 150.0, "suite": 400.0}
RETRIED = 60.0  # seconds: what was begun so shortly before a call's end is tried again by the next
RESTARTS = 20  # of one step in one call, where errors leave the GPU unusable
BENCHMARK = "pytest-benchmark"  # the package without which bench steps are skipped
SKIPPED = "skipped"  # their status begins so then
WORKERS = max(1, min(14, (os.cpu_count() or 1) - 2))


@dataclasses.dataclass(frozen=True)
class Step:
    """A piece of the day.

    Attributes:
        name: unique.
        learnt: what one knows after it.
        kind: "smoke", "suite" (tests in several processes), "tune" or "bench".
        arguments: of its command.
        minutes: about how long it takes; for planning only.
    """

    name: str
    learnt: str
    kind: str
    arguments: tuple[str, ...] = ()
    minutes: float = 2.0


STEPS = (
    Step("smoke", "whether every kernel computes what it should", "smoke", ("--only", *smoke.KINDS), 2),
    Step("peak", "the rate of a matrix product, the ceiling of all else", "bench", ("bench/test_attention.py", "-k", "test_matmul"), 0.5),
    Step("suite attention", "whether the attention kernels are right on thousands of rows", "suite", ("tests/gpu/test_attention.py",), 6),
    Step("suite head", "whether value head and losses are right", "suite", ("tests/gpu/test_head_loss.py",), 4),
    Step("suite rest", "whether whole models, graphs and fused layers are right", "suite", ("tests/gpu", "--ignore=tests/gpu/test_attention.py", "--ignore=tests/gpu/test_head_loss.py", "--ignore=tests/gpu/test_gluon.py"), 5),
    Step("tune 128", "the fastest tiles for head dim 128", "tune", ("--head-dims", "128"), 8),
    Step("gluon", "whether the Gluon forward computes what it should, or hangs", "smoke", ("--only", smoke.GLUON), 1),
    Step("kernels quick", "attention against its peers on two rows", "bench", ("bench/test_attention.py", "--quick"), 3),
    Step("score quick", "whole passes against all other ways, few points", "bench", ("bench/test_score.py", "--quick"), 4),
    Step("head", "value head and losses against plain PyTorch", "bench", ("bench/test_head_loss.py",), 3),
    Step("host", "what each call costs the host, launches included", "bench", ("bench/test_host.py",), 1),
    Step("tune 256", "the fastest tiles for head dim 256", "tune", ("--head-dims", "256"), 8),
    Step("tune 64", "the fastest tiles for head dim 64", "tune", ("--head-dims", "64"), 8),
    Step("suite gluon", "whether the Gluon forward is right on thousands of rows", "suite", ("tests/gpu/test_gluon.py",), 3),
    Step("kernels", "attention against its peers on all rows", "bench", ("bench/test_attention.py",), 8),
    Step("score", "whole passes against all other ways", "bench", ("bench/test_score.py",), 15),
    Step("train", "a training step against the released loop", "bench", ("bench/test_train.py",), 8),
    Step("forward", "what each measure against waste contributes", "bench", ("bench/test_forward.py",), 5),
    Step("breakdown", "where the time of a pass goes", "bench", ("bench/test_breakdown.py",), 3),
)  # fmt: skip
TUNED_FROM = "kernels quick"  # this step and all behind it use the tiles found


class Refused(Exception):
    """What cannot be run as asked, in words for whoever asked."""


class Day:
    """The folder of a day, and the clock of a call.

    Args:
        folder: where everything lies; made if it is missing.
        minutes: after which the call ends.
        dry: kernels are launched into nothing, tests and benchmarks only collected: no GPU is needed.
    """

    def __init__(self, folder, minutes, commit=None, dry=False):
        self.folder = pathlib.Path(folder).resolve()
        self.end = time.time() + 60 * minutes
        self.dry = dry
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state = self._state(commit)

    def path(self, name):
        return self.folder / name

    def left(self):
        """Seconds until the call ends."""
        return self.end - time.time()

    def _state(self, commit):
        about = {"dry": True, "gpu": None} if self.dry else {"dry": False, **_machine()}
        about["commit"] = commit or _commit()
        if not self.path("state.json").is_file():
            return {**about, "date": datetime.date.today().isoformat(), "steps": {}}
        state = json.loads(self.path("state.json").read_text())
        for name in ("dry", "gpu", "commit"):
            if state[name] != about[name]:
                raise Refused(
                    f"{self.folder} is of {name} {state[name]!r}, this call of {about[name]!r}: results of both do not "
                    "belong together; give another --folder"
                )
        return state

    def save(self):
        """Write state and summary, each whole or not at all."""
        for name, text in (("state.json", json.dumps(self.state, indent=1)), ("summary.md", summary(self))):
            new = self.path(name + ".new")
            new.write_text(text)
            new.replace(self.path(name))

    def log(self, text):
        with open(self.path("log.txt"), "a") as file:
            file.write(text)

    def run(self, step):
        """Begin a step, or go on with it; whether it is done now."""
        entry = self.state["steps"].setdefault(step.name, {"seconds": 0.0, "status": "begun"})
        start = time.time()
        try:
            entry["status"] = self._attempts(step)
        finally:
            entry["seconds"] = round(entry["seconds"] + time.time() - start, 1)
            self.save()
        return entry["status"] != "begun"

    def _attempts(self, step):
        if step.kind == "bench" and not has("pytest_benchmark"):
            return f"{SKIPPED}: needs {BENCHMARK}"
        for _ in range(RESTARTS):
            if self.left() < LEAST:
                return "begun"
            known = self.path("known.jsonl")
            shutil.copy(self.path("tests.jsonl"), known) if self.path("tests.jsonl").is_file() else known.write_text("")
            before = lines.read(self.path("tests.jsonl"))
            status = self._process(step)
            known.unlink()
            if status is None:
                self._take_back(step)
                return "begun"  # stopped by the clock
            new = lines.read(self.path("tests.jsonl"))[len(before) :]
            if status == HUNG:
                self._give_up(step, new)
            if any(line["outcome"] == "left" for line in new):
                return "begun"
            # 5: pytest had nothing left to run; in a dry run, where nothing is ever run, nothing to begin with
            if status == 0 or (status == 5 and step.kind != "smoke" and not self.dry):
                return "failed" if self.failures(step) else "done"
            moved = bool(new) or step.kind in ("smoke", "tune")
            if status in (1, 2, 4) or not moved:
                return "failed"
            self.log(f"\n[{step.name} ended with status {status}: going on behind what ended it]\n")
        return "failed"

    def _take_back(self, step):
        """Have a check or tile that was begun shortly before the end of a call tried again by the next."""
        path = self._lines_of(step)
        if step.kind not in ("smoke", "tune") or time.time() - _changed(path) > RETRIED:
            return
        found = lines.read(path)
        if found and not {"ok", "milliseconds", "error"} & set(found[-1]):
            path.write_text("".join(json.dumps(line) + "\n" for line in found[:-1]))

    def _give_up(self, step, new):
        """Note the tests that hung as failed; a check or tile that was begun and never ended is read so."""
        ended = {line["test"] for line in new if line["outcome"] != "begun"}
        for test in dict.fromkeys(line["test"] for line in new if line["test"] not in ended):
            words = f"nothing ended within {HANG[step.kind]:g} seconds"
            lines.append(
                self.path("tests.jsonl"), {"step": step.name, "test": test, "outcome": "failed", "words": words}
            )

    def _lines_of(self, step):
        """The file that a step adds to as it goes."""
        return self.path({"smoke": "smoke.jsonl", "tune": "tiles.jsonl"}.get(step.kind, "tests.jsonl"))

    def _process(self, step):
        """Exit status of the command of a step; None where the clock ended it, `HUNG` where nothing moved any more."""
        command, environment = self.command(step), self.environment(step)
        self.log(f"\n\n===== {step.name}: {' '.join(command)}\n")
        with open(self.path("log.txt"), "a") as file:
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
            start, path = time.time(), self._lines_of(step)
            try:
                while process.poll() is None and self.left() > 0:
                    time.sleep(0.2)
                    if time.time() - max(start, _changed(path)) > HANG.get(step.kind, math.inf):
                        return HUNG
                return process.poll()
            finally:
                _end(process)

    def command(self, step):
        """What runs a step, as a list of arguments."""
        python = sys.executable
        if step.kind == "smoke":
            chosen = ("--pretended", "--only", "attention bfloat16, 8:2 heads of 128", "loss best") if self.dry else step.arguments  # fmt: skip
            return [python, "-m", "bench.smoke", "--json", str(self.path("smoke.jsonl")), *chosen]
        if step.kind == "tune":
            dry = ("--pretended", "--kernels", "forward", "--most", "1") if self.dry else ()
            return [
                python,
                "-m",
                "bench.tune_attention",
                "--json",
                str(self.path("tiles.jsonl")),
                *step.arguments,
                *dry,
            ]
        pytest = [python, "-m", "pytest", "-p", "bench.day_plugin", "-p", "no:cacheprovider", "-q", *step.arguments]
        if self.dry:
            return [*pytest, "-p", "bench.pretended_gpu", "--collect-only"] + ["--device", "cuda"] * (
                step.kind == "bench"
            )
        if step.kind == "suite":
            return [*pytest, *(("-n", str(WORKERS), "--dist", "worksteal") if has("xdist") else ())]
        tuned = self.path("tiles.jsonl")
        late = [s.name for s in STEPS].index(step.name) >= [s.name for s in STEPS].index(TUNED_FROM)
        chosen = ("--tiles", str(tuned)) if late and tuned.is_file() else ()
        commit = self.state["commit"] + ("+tiles" if chosen and tiles.chosen(tuned) else "")
        return [
            *pytest,
            "--benchmark-only",
            "--device",
            "cuda",
            "--results",
            str(self.folder),
            "--commit",
            commit,
            *chosen,
        ]

    def environment(self, step):
        return os.environ | {
            "PYTHONPATH": str(ROOT),
            "TRITON_CACHE_DIR": os.environ.get("TRITON_CACHE_DIR", str(ROOT / ".kernels")),
            "YOJO_DAY_STEP": step.name,
            "YOJO_DAY_TESTS": str(self.path("tests.jsonl")),
            "YOJO_DAY_KNOWN": str(self.path("known.jsonl")),
            "YOJO_DAY_DEADLINE": str(self.end - MARGIN),
        }

    def failures(self, step):
        """What failed in a step: lines for people."""
        if step.kind == "smoke":
            return [smoke.described(line) for line in self._checks(step) if not line["ok"]]
        found = lines.outcomes(self.path("tests.jsonl"), step.name)
        words = {
            line["test"]: line.get("words", "")
            for line in lines.read(self.path("tests.jsonl"))
            if line["step"] == step.name
        }
        return [
            f"{test}: {outcome} {_error(words[test])}".strip()
            for test, outcome in found.items()
            if outcome in ("failed", "given up")
        ]

    def _checks(self, step):
        """Lines of the checks of a step."""
        found = smoke.read(self.path("smoke.jsonl")).values()
        return [line for line in found if line["check"].startswith(step.arguments[1:] or ("",))]

    def counts(self, step):
        """How many tests, checks or tiles of a step have ended, by what came of them."""
        if step.kind == "smoke":
            found = ["ok" if line["ok"] else "failed" for line in self._checks(step)]
        elif step.kind == "tune":
            dim = int(step.arguments[1])
            tried = [line for line in tiles.read(self.path("tiles.jsonl")) if line["head_dim"] == dim]
            found = ["timed" if "milliseconds" in line else "not to be had" for line in tried]
        else:
            found = list(lines.outcomes(self.path("tests.jsonl"), step.name).values())
        return {word: found.count(word) for word in dict.fromkeys(found)}


def has(module):
    """Whether a module can be imported."""
    return importlib.util.find_spec(module) is not None


def _error(words):
    """The line of a failure that says most."""
    found = [line for line in words.splitlines() if line.startswith("E ")] or words.splitlines()
    return f"({found[0].removeprefix('E ').strip()[:200]})" if found else ""


def _changed(path):
    """When a file was last added to, seconds since 1970; 0 for one that is not there."""
    return path.stat().st_mtime if path.is_file() else 0.0


def _end(process):
    """End a process and all that it started, if it has not ended."""
    if process.poll() is None:
        os.killpg(process.pid, 15)
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            pass
    try:
        os.killpg(process.pid, 9)
    except ProcessLookupError:
        pass
    process.wait()


def _machine():
    import torch

    if not torch.cuda.is_available():
        raise Refused("a day is spent on a GPU, and torch finds none (--dry-run goes through the steps without one)")
    from bench.conftest import provenance

    about = provenance(torch.device("cuda"))
    return {name: about[name] for name in ("gpu", "driver", "torch", "triton", "transformers")} | {
        "python": sys.version.split()[0]
    }


def _commit():
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip() or "unknown"
    except OSError:  # no git
        return "unknown"


def summary(day):
    """The day in a page: what failed first, then every step, then the tiles that were found."""
    state = day.state
    about = ", ".join(f"{name} {state[name]}" for name in ("gpu", "driver", "torch", "triton", "transformers", "commit", "date") if state.get(name))  # fmt: skip
    parts = ["# A day on a GPU" + (" that is not there" if state["dry"] else ""), about]
    failed = [
        f"- {step.name}: {words}" for step in STEPS if step.name in state["steps"] for words in day.failures(step)
    ]
    parts.append("\n".join(["## Failed", "", *failed]) if failed else "Nothing failed so far.")
    rows = ["| step | what one knows after it | status | seconds | ended |", "| --- | --- | --- | --- | --- |"]
    for step in STEPS:
        entry = state["steps"].get(step.name, {"status": "not begun", "seconds": ""})
        counts = ", ".join(f"{count} {word}" for word, count in day.counts(step).items())
        rows.append(f"| {step.name} | {step.learnt} | {entry['status']} | {entry['seconds']} | {counts} |")
    parts.append("\n".join(rows))
    found = tiles.chosen(day.path("tiles.jsonl"))
    if found:
        rows = ["| kernel | head dim | in use | fastest | times as fast |", "| --- | --- | --- | --- | --- |"]
        rows += [f"| {c.kernel} | {c.head_dim} | {tuple(c.used)} | {tuple(c.tile)} | {c.gain:.3f} |" for c in found]
        parts.append("\n".join(["## Tiles", "", *rows]))
    return "\n\n".join(parts) + "\n"


def write(folder, root=ROOT):
    """Put what a day gave into the repository; lines that say what was done.

    Args:
        folder: of the day.
        root: of the repository: `bench/results`, `yojo_kernels/tuning.py` and the docs in it are written.

    Raises:
        Refused: a dry run, or no day at all.
    """
    from bench import report, schema

    folder, root = pathlib.Path(folder), pathlib.Path(root)
    if not (folder / "state.json").is_file():
        raise Refused(f"{folder} holds no state.json: it is not the folder of a day")
    if json.loads((folder / "state.json").read_text())["dry"]:
        raise Refused(f"{folder} is of a dry run: nothing in it was measured")
    done = []
    for path in sorted(
        set(folder.glob("*.jsonl")) - {folder / f"{name}.jsonl" for name in ("smoke", "tests", "tiles", "known")}
    ):
        target = root / "bench" / "results" / path.name
        target.parent.mkdir(parents=True, exist_ok=True)
        results = schema.read(*(one for one in (target, path) if one.is_file()))
        new = target.with_suffix(".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in results))
        new.replace(target)
        done.append(f"{target}: {len(results)} result lines")
    found = tiles.chosen(folder / "tiles.jsonl", allowed=tiles.passes_the_gate)
    if found:
        path = root / "yojo_kernels" / "tuning.py"
        path.write_text(tiles.written_into(path.read_text(), found))
        done += [f"{path}: {c.kernel} {c.head_dim} on sm_{c.chip} is {tuple(c.tile)} now, {c.gain:.2f}x" for c in found]
        done.append("tiles changed: run `make kernels ARGS=--record` and the tests, and commit spills.json with them")
    places = [
        "--results",
        str(root / "bench/results"),
        "--docs",
        str(root / "docs"),
        "--readme",
        str(root / "README.md"),
    ]
    if report.main(places):
        raise Refused("the report could not be written, see above")
    return done


def main(argv=None):
    """Run what is left of the day; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_day", description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=9.0, help="end after so many (default 9)")
    parser.add_argument("--folder", default="gpu-day", help="where everything lies (default gpu-day)")
    parser.add_argument("--commit", help="of the code; by default what git says")
    parser.add_argument("--steps", nargs="+", metavar="STEP", choices=[s.name for s in STEPS], help="only these")
    parser.add_argument(
        "--again",
        nargs="+",
        metavar="STEP",
        default=(),
        choices=[s.name for s in STEPS],
        help="forget what these gave before",
    )
    parser.add_argument("--list", action="store_true", help="print the steps and how far each is")
    parser.add_argument("--write", metavar="FOLDER", help="put results, tiles and docs of a day into the repository")
    parser.add_argument("--dry-run", action="store_true", help="without a GPU: kernels are compiled and launched into nothing, tests collected")  # fmt: skip
    options = parser.parse_args(argv)
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0, got {options.minutes:g}")
    try:
        if options.write:
            print("\n".join(write(options.write)))
            return 0
        if options.list:
            path = pathlib.Path(options.folder, "summary.md")
            steps = "\n".join(f"{s.name:<16} {s.minutes:>4g} min  {s.learnt}" for s in STEPS)
            print(path.read_text() if path.is_file() else steps)
            return 0
        if not has("pytest"):
            raise Refused(
                "suites, tuning and benchmarks need pytest, which is not installed: python -m pip install pytest "
                f"{BENCHMARK} (python -m bench.smoke runs without them)"
            )
        day = Day(options.folder, options.minutes, options.commit, options.dry_run)
        day.save()  # before anything runs: what of the folder cannot be read is an error now
    except (Refused, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    chosen = [step for step in STEPS if options.steps is None or step.name in options.steps]
    for step in STEPS:
        if step.name in options.again:
            forget(day, step)
    for step in chosen:
        if day.state["steps"].get(step.name, {}).get("status") in ("done", "failed"):
            continue
        if day.left() < MARGIN + LEAST or not day.run(step):
            break
        print(f"{step.name}: {day.state['steps'][step.name]['status']}", flush=True)
    day.save()
    print(summary(day))
    states = [day.state["steps"].get(step.name, {}).get("status", "not begun") for step in chosen]
    if "failed" in states:
        print("something failed: summary.md and log.txt say what")
    if any(state.startswith(SKIPPED) for state in states):
        print(f"steps were skipped: python -m pip install {BENCHMARK}, and the next call runs them")
    if any(state in ("not begun", "begun") for state in states):
        return MORE
    return int("failed" in states)


def forget(day, step):
    """As if a step had never been begun."""
    day.state["steps"].pop(step.name, None)
    if step.kind == "smoke":
        day.path("smoke.jsonl").unlink(missing_ok=True)
    elif step.kind == "tune":
        dim = int(step.arguments[1])
        keep = [line for line in lines.read(day.path("tiles.jsonl")) if line["head_dim"] != dim]
        day.path("tiles.jsonl").write_text("".join(json.dumps(line) + "\n" for line in keep))
    else:
        keep = [line for line in lines.read(day.path("tests.jsonl")) if line["step"] != step.name]
        day.path("tests.jsonl").write_text("".join(json.dumps(line) + "\n" for line in keep))


if __name__ == "__main__":
    sys.exit(main())

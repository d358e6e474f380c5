"""What the tests notice: faults put into the code one by one, and the tests of their area run on each.

    python tests/mutants.py list                          the faults: area, number, file and line, change
    python tests/mutants.py run --out results.jsonl       go on where results.jsonl ends; a line a fault
    python tests/mutants.py run --out s.jsonl --soak --among results.jsonl    survivors, with the tests that soak
    python tests/mutants.py run --out s.jsonl --also tests/training/test_parallel.py --among results.jsonl
    python tests/mutants.py report results.jsonl          the share that is caught, by area

`tests/mutants.jsonl` has the results of the last run, `tests/mutants.json` the reasons of those that no test can see.

Faults are those that people make: a bound off by one, a comparison that lets equals through, a condition turned round, a sign,
a statement or a keyword left out, nothing returned. From all of an area's the ones with the smallest hashes are taken, so that
the choice is nobody's, and the same wherever the code is the same. A fault counts as caught if a test fails, cannot be
collected, or runs ten times as long as all of them do. Tests are those that `make test` runs, in copies of the tree, one
process a core, forked from one that has torch and transformers loaded.
"""

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from faults import Fault, changed, compiles, faults_of

ROOT = Path(__file__).parents[1]
A_FAULT_S = 900  # the longest run of an area's tests takes a tenth of it
DID_NOT_RUN = 70


@dataclasses.dataclass(frozen=True)
class Area:
    """Code and the tests that are to notice faults in it.

    Attributes:
        files: globs.
        tests: files of tests in the order in which they run; those below tests/interpreted and tests/pretended have a process
            of their own, as in `make test`.
        count: how many faults are tried.
        least: the share that must be caught.
    """

    files: tuple
    tests: tuple
    count: int = 12
    least: float = 0.85


# Not all of the file: whatever is changed in a kernel is compiled anew, minutes of it.
COMPILED = (
    "tests/kernels/test_aot.py::test_too_much_shared_memory_and_missing_tensor_cores_are_seen",
    "tests/kernels/test_aot.py::test_the_small_kernels_do_too",
)
RANDOM_ROWS = "tests/interpreted/test_attention.py::test_results_are_as_exact_as_the_reference"
INTERPRETED_ATTENTION = ("tests/interpreted/test_attention.py", "tests/interpreted/test_eager.py")
AREAS = {
    "layout": Area(
        ("yojo_kernels/layout.py",),
        (
            "tests/kernels/test_layout.py",
            "tests/kernels/test_kernels.py",
            "tests/kernels/test_segments.py",
            "tests/kernels/test_query_rows.py",
            "tests/patching/test_tables.py",
            "tests/inputs/test_packing.py",
            "tests/patching/test_pooling.py",
            "tests/bench/test_report.py",
            "tests/pretended/test_waits.py",
            RANDOM_ROWS,
            "tests/interpreted/test_attention.py::test_layers_share_their_tables_under_a_compiler",
            "tests/interpreted/test_attention.py::test_compiles_once_for_all_lengths",
        ),
        least=0.9,
    ),
    "tiles": Area(
        ("yojo_kernels/tiles.py", "yojo_kernels/tables.py"),
        (
            "tests/kernels/test_tiles.py",
            "tests/kernels/test_layout.py",
            "tests/kernels/test_kernel_model.py",
            "tests/kernels/test_kernels.py",
            "tests/patching/test_tables.py",
            "tests/patching/test_graphs.py",
            RANDOM_ROWS,
            "tests/interpreted/test_graphs.py",
        ),
        least=0.9,
    ),
    "attention": Area(
        ("yojo_kernels/attention*.py",),
        (
            "tests/kernels/test_dispatch.py",
            *INTERPRETED_ATTENTION,
            "tests/interpreted/test_model.py",
            "tests/kernels/test_kernels.py",
            "tests/kernels/test_strides.py",
            "tests/kernels/test_eager.py",
            "tests/kernels/test_apart.py",
            "tests/kernels/test_counting.py",
            *COMPILED,
        ),
        count=18,
        least=0.9,
    ),
    "segments": Area(
        ("yojo_kernels/segments.py", "yojo_kernels/causal.py"),
        (
            "tests/kernels/test_segments.py",
            "tests/kernels/test_kernels.py",
            "tests/kernels/test_query_rows.py",
            "tests/kernels/test_dispatch.py",
            "tests/kernels/test_strides.py",
            "tests/patching/test_families.py",
            "tests/patching/test_patch.py",
        ),
        least=0.9,
    ),
    "head": Area(
        ("yojo_kernels/head.py",),
        (
            "tests/kernels/test_dispatch.py",
            "tests/interpreted/test_head_loss.py",
            "tests/kernels/test_kernels.py",
            "tests/kernels/test_strides.py",
            "tests/kernels/test_eager.py",
            "tests/kernels/test_counting.py",
            "tests/interpreted/test_eager.py",
            *COMPILED,
            "tests/kernels/test_kernel_model.py",
        ),
        least=0.9,
    ),
    "loss": Area(
        ("yojo_kernels/loss.py",),
        (
            "tests/kernels/test_dispatch.py",
            "tests/interpreted/test_head_loss.py",
            "tests/kernels/test_kernels.py",
            "tests/kernels/test_strides.py",
            "tests/kernels/test_eager.py",
            "tests/interpreted/test_eager.py",
            *COMPILED,
        ),
        least=0.9,
    ),
    "packing": Area(
        ("yojo/inputs/packing.py",),
        (
            "tests/inputs/test_packing.py",
            "tests/inputs/test_prompts.py",
            "tests/inputs/test_plain.py",
            "tests/inputs/test_images.py",
            "tests/test_reward_model.py",
            "tests/patching/test_tables.py",
            "tests/patching/test_families.py",
            "tests/inputs/test_processors.py",
            "tests/inputs/test_turns.py",
            "tests/training/test_trainer.py",
        ),
    ),
    "prompts": Area(
        ("yojo/inputs/prompts.py", "yojo/inputs/placeholders.py", "yojo/inputs/decoded.py"),
        (
            "tests/inputs/test_decoded.py",
            "tests/inputs/test_prompts.py",
            "tests/inputs/test_messages.py",
            "tests/inputs/test_turns.py",
            "tests/inputs/test_packing.py",
            "tests/inputs/test_mr2rm.py",
            "tests/inputs/test_images.py",
            "tests/inputs/test_videos.py",
            "tests/inputs/test_processors.py",
            "tests/inputs/test_real_processors.py",
            "tests/inputs/test_plain.py",
        ),
    ),
    "families": Area(
        ("yojo/families/*.py", "yojo/patching/positions.py", "yojo/patching/joining.py", "yojo/patching/sharing.py"),
        (
            "tests/families/test_rows.py",
            "tests/test_stored_scores.py",
            "tests/patching/test_families.py",
            "tests/patching/test_media.py",
            "tests/patching/test_sharing.py",
            "tests/patching/test_last_layer.py",
            "tests/inputs/test_processors.py",
            "tests/inputs/test_real_processors.py",
            "tests/inputs/test_packing.py",
            "tests/costs/test_flops.py",
            "tests/converting/test_released.py",
            "tests/saving/test_stock.py",
        ),
        count=14,
    ),
    "patch": Area(
        (
            "yojo/patching/patch.py",
            "yojo/patching/forward.py",
            "yojo/patching/separator.py",
            "yojo/patching/pooling.py",
        ),
        (
            "tests/patching/test_patch.py",
            "tests/patching/test_pooling.py",
            "tests/patching/test_tables.py",
            "tests/patching/test_pickle.py",
            "tests/patching/test_families.py",
            "tests/patching/test_devices.py",
            "tests/patching/test_last_layer.py",
            "tests/patching/test_versions.py",
            "tests/patching/test_probe.py",
            "tests/patching/test_fuse.py",
            "tests/converting/test_export.py",
            "tests/test_reward_model.py",
            "tests/saving/test_checkpoint.py",
            "tests/training/test_training.py",
            "tests/pretended/test_scoring.py",
        ),
    ),
    "batches": Area(
        ("yojo/training/batches.py",),
        (
            "tests/training/test_batches.py",
            "tests/training/test_trainer.py",
            "tests/training/test_bad_records.py",
            "tests/training/test_training.py",
            "tests/training/test_resume.py",
            "tests/training/test_recipe.py",
        ),
    ),
    "evaluation": Area(
        ("yojo/evaluation/a*.py", "yojo/evaluation/run.py", "yojo/evaluation/given.py", "yojo/inputs/orders.py"),
        (
            "tests/evaluation/test_run.py",
            "tests/inputs/test_packed_orders.py",
            "tests/evaluation/test_evaluate.py",
            "tests/evaluation/test_generative_judges.py",
        ),
        count=16,
    ),
    "figures": Area(
        (
            "yojo/evaluation/figures.py",
            "yojo/evaluation/metrics.py",
            "yojo/evaluation/orders.py",
            "yojo/evaluation/statistics.py",
            "yojo/evaluation/calibration.py",
        ),
        (
            "tests/evaluation/test_metrics.py",
            "tests/evaluation/test_orders.py",
            "tests/evaluation/test_statistics.py",
            "tests/evaluation/test_calibration.py",
            "tests/evaluation/test_order_report.py",
            "tests/evaluation/test_evaluate.py",
        ),
        count=16,
    ),
    "rankings": Area(
        ("yojo/rankings/[gkqrsv]*.py",),
        (
            "tests/rankings/test_scores.py",
            "tests/rankings/test_ranking.py",
            "tests/rankings/test_vote_graphs.py",
            "tests/rankings/test_file.py",
            "tests/rankings/test_reading.py",
            "tests/cli/test_rank_command.py",
        ),
    ),
    "rewards": Area(
        ("yojo/rewards/[acgmrw]*.py", "yojo/rewards/normalize.py", "yojo/rewards/s[ch]*.py", "yojo/rewards/th*.py"),
        (
            "tests/rewards/test_scorer.py",
            "tests/rewards/test_group.py",
            "tests/rewards/test_collator.py",
            "tests/rewards/test_collator_memory.py",
            "tests/rewards/test_shared_backbone.py",
            "tests/rewards/test_trl.py",
        ),
        count=24,
    ),
    "serving": Area(
        ("yojo/serving/[abefgirw]*.py", "yojo/serving/compatible.py", "yojo/serving/media.py"),
        (
            "tests/serving/test_fair.py",
            "tests/serving/test_engine.py",
            "tests/serving/test_workers.py",
            "tests/serving/test_body.py",
            "tests/serving/test_fetching.py",
            "tests/serving/test_serving_media.py",
            "tests/serving/test_serving_endpoints.py",
            "tests/serving/test_malformed.py",
        ),
        count=24,
    ),
    "resume": Area(
        ("yojo/training/resume.py",),
        (
            "tests/training/test_resume.py",
            "tests/saving/test_saved_base.py",
            "tests/training/test_recipe.py",
            "tests/training/test_trainer.py",
            "tests/training/test_bad_records.py",
        ),
    ),
}

# Faults that no test of results can see, and why; by number. What else survives is a hole in the tests.
REASONS = json.loads((Path(__file__).parent / "mutants.json").read_text())
# Not code whose faults a test of results could see; by function.
LEFT_OUT = {"yojo_kernels/layout.py": ("Layout.__repr__", "Layout.plot")}


def sources_of(area):
    """dict: file of an area, as a path from the root -> its bytes."""
    files = {path.relative_to(ROOT).as_posix() for glob in AREAS[area].files for path in ROOT.glob(glob)}
    return {file: (ROOT / file).read_bytes() for file in sorted(files)}


def chosen(area):
    """The faults that are tried in an area: list of `Fault`, in the files' order."""
    sources = sources_of(area)
    found = (fault for file, source in sources.items() for fault in faults_of(area, file, source))
    faults = [f for f in found if f.function not in LEFT_OUT.get(f.file, ())]
    compiled = (f.number for f in sorted(faults, key=lambda f: f.number) if compiles(f, sources[f.file]))
    taken = set(itertools.islice(compiled, AREAS[area].count))
    return [f for f in faults if f.number in taken]


def sound(area):
    """No fault at all: the area's tests must pass, or whatever they catch says nothing."""
    return Fault(area, "tests/mutants.py", 1, (0, 0), "", "", "", f"none-{area}")


def portions(tests):
    """Tests by the process they need: list of (environment, files), in order."""
    parts = []
    for test in tests:
        kind = test.split("/")[1] if test.split("/")[1] in ("interpreted", "pretended") else "main"
        if not parts or parts[-1][0] != kind:
            parts.append((kind, []))
        parts[-1][1].append(test)
    return parts


def try_fault(tree, fault, soak, also, ready):
    """Run an area's tests on a fault: dict of what came of it."""
    target = Path(tree) / fault.file
    original = target.read_bytes()
    started, result, by = time.time(), "survived", ""
    try:
        target.write_bytes(changed(fault, original))
        for kind, files in portions((*AREAS[fault.area].tests, *also)):
            code, by = ready["interpreted" if kind == "interpreted" else "main"].run(files, soak)
            if code in (DID_NOT_RUN, 4):  # 4: pytest does not know what it is asked for
                raise RuntimeError(f"the tests of {fault.area} did not run: {Path(f'{tree}.log').read_text()[-2000:]}")
            if code not in (0, 5):
                result = "timeout" if code == -1 else "caught"
                break
    finally:
        target.write_bytes(original)
    return {
        "number": fault.number,
        "area": fault.area,
        "where": f"{fault.file}:{fault.line} {fault.function}",
        "change": f"{fault.old} -> {fault.new}",
        "result": result,
        "by": by,
        "seconds": round(time.time() - started, 1),
    }


def _forked(tree, files, soak):
    """Tests in a forked process: (exit code, or -1 for one that took too long; the first test that failed)."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
        log = os.open(f"{tree}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = DID_NOT_RUN
        try:
            os.chdir(tree)
            sys.path[:] = [tree, *(p for p in sys.path if Path(p or ".").resolve() not in (ROOT, ROOT / "tests"))]
            os.environ.update(PYTHONPATH=tree, PYTHONDONTWRITEBYTECODE="1", OMP_NUM_THREADS="1")
            sys.dont_write_bytecode = True
            import pytest

            class First:
                def pytest_runtest_logreport(self, report):
                    if report.failed:
                        os.write(write, report.nodeid.encode()[:500])

                def pytest_collectreport(self, report):
                    if report.failed:
                        os.write(write, b"collection")

            marks = ["-m", "soak or not soak"] if soak else []
            plugins = [w for p in ("xdist", "cacheprovider", "randomly") for w in ("-p", f"no:{p}")]
            code = int(pytest.main(["-x", *plugins, *marks, *files], plugins=[First()]))
        finally:
            os._exit(code)
    os.close(write)
    until = time.time() + A_FAULT_S
    while time.time() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            code = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.1)
    else:
        code = -1
    try:
        os.killpg(pid, signal.SIGKILL)  # what the tests started, too
    except ProcessLookupError:
        pass
    if code == -1:
        os.waitpid(pid, 0)
    by = os.read(read, 500).decode(errors="replace") if code else ""
    os.close(read)
    return code, by


class Ready:
    """A process that has loaded what tests load, but for the code that faults are put into, and forks to run tests.

    Triton decides when it is imported whether kernels are interpreted, so there is one process for each.
    """

    def __init__(self, tree, interprets):
        self.ends, theirs = multiprocessing.Pipe()
        self.process = multiprocessing.get_context("fork").Process(target=self._serve, args=(theirs, tree, interprets))
        self.process.start()

    def run(self, *request):
        """What `_forked` gives."""
        self.ends.send(request)
        return self.ends.recv()

    def end(self):
        self.ends.send(None)
        self.process.join()

    @staticmethod
    def _serve(ends, tree, interprets):
        if interprets:
            os.environ["TRITON_INTERPRET"] = "1"
        import peft  # noqa: F401
        import pytest  # noqa: F401
        import torch
        import transformers.trainer  # noqa: F401
        from transformers import Qwen3VLForConditionalGeneration  # noqa: F401

        torch.set_num_threads(1)
        if any(name.split(".")[0] in ("yojo", "yojo_kernels") for name in sys.modules):
            raise RuntimeError("what the faults are put into is loaded already")
        while (request := ends.recv()) is not None:
            ends.send(_forked(tree, *request))


def work(tree, numbers, out, soak, also):
    """One worker: tries faults from a list that all workers share, a line of JSON each."""
    faults = {f.number: f for area in AREAS for f in (sound(area), *chosen(area))}
    ready = {kind: Ready(tree, kind == "interpreted") for kind in ("main", "interpreted")}
    for number in numbers:
        claim = Path(f"{out}.claims") / number
        try:
            claim.touch(exist_ok=False)
        except FileExistsError:
            continue
        line = try_fault(tree, faults[number], soak, also, ready)
        with open(out, "a") as file:
            file.write(json.dumps(line) + "\n")
        print(
            line["result"], line["area"], line["where"], line["change"], f"{line['seconds']} s", line["by"], flush=True
        )
    for process in ready.values():
        process.end()


def run(arguments):
    done = {line["number"] for line in _lines(arguments.out)}
    faults = [f for area in arguments.area or AREAS for f in chosen(area)]
    if arguments.among:
        among = {line["number"] for line in _lines(arguments.among) if line["result"] == "survived"} - REASONS.keys()
        faults = [f for f in faults if f.number in among]
    numbers = [f.number for f in faults if f.number not in done]
    print(f"{len(faults)} faults, {len(numbers)} to try", flush=True)
    first = [sound(area).number for area in dict.fromkeys(f.area for f in faults)]
    numbers = [number for number in first if number not in done] + numbers
    shutil.rmtree(f"{arguments.out}.claims", ignore_errors=True)
    Path(f"{arguments.out}.claims").mkdir()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        workers = []
        for worker in range(arguments.workers):
            tree = Path(folder) / f"tree{worker}"
            listed = subprocess.run(
                ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, check=True, capture_output=True, text=True
            ).stdout.splitlines()
            for name in listed:
                if (ROOT / name).is_file() and not (ROOT / name).is_symlink():
                    (tree / name).parent.mkdir(parents=True, exist_ok=True)
                    shutil.copy2(ROOT / name, tree / name)
            command = [
                sys.executable,
                __file__,
                "work",
                str(tree),
                arguments.out,
                *(["--soak"] if arguments.soak else []),
                *(f"--also={test}" for test in arguments.also),
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
            environment.pop("PYTHONPATH", None)
            workers.append(subprocess.Popen(command, stdin=subprocess.PIPE, text=True, cwd=folder, env=environment))
        for worker in workers:
            worker.stdin.write("\n".join(numbers))
            worker.stdin.close()
        codes = [worker.wait() for worker in workers]
    shutil.rmtree(f"{arguments.out}.claims", ignore_errors=True)
    return max(*codes, 1 if report(arguments.out) else 0)


def report(path):
    """Print the share that is caught, by area, and what survived without a reason: the areas where too little is caught."""
    lines = {line["number"]: line for line in _lines(path)}
    lacking = []
    for area, spec in AREAS.items():
        without = lines.pop(f"none-{area}", None)
        if without is not None and without["result"] != "survived":
            print(f"{area:10} has tests that fail without a fault: {without['by']}")
            lacking.append(area)
            continue
        own = [line for line in lines.values() if line["area"] == area]
        counted = [line for line in own if line["result"] != "survived" or line["number"] not in REASONS]
        if counted:
            caught = sum(line["result"] != "survived" for line in counted)
            reasons = f", {len(own) - len(counted)} with a reason" if len(own) > len(counted) else ""
            print(
                f"{area:10} {caught:3} of {len(counted):3}  {caught / len(counted):.2f}  (at least {spec.least}){reasons}"
            )
            lacking += [area] * (caught < spec.least * len(counted))
    for number, line in lines.items():
        if line["result"] == "survived" and number not in REASONS:
            print(f"survived {number} {line['where']}: {line['change']}")
    return lacking


def _lines(path):
    path = Path(path)
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list")
    sys.path[:] = [
        entry for entry in sys.path if Path(entry or ".").resolve() != ROOT / "tests"
    ]  # has a folder `kernels`
    runner = commands.add_parser("run")
    runner.add_argument("--out", required=True, help="file of results, a line of JSON a fault")
    runner.add_argument("--area", action="append", choices=AREAS)
    runner.add_argument("--soak", action="store_true", help="with the tests that `make test` leaves to `make soak`")
    runner.add_argument("--also", action="append", default=[], help="tests to run behind those of the area")
    runner.add_argument("--among", help="results: only what survived there without a reason is tried")
    runner.add_argument("--workers", type=int, default=os.cpu_count())
    reporter = commands.add_parser("report")
    reporter.add_argument("results")
    worker = commands.add_parser("work")
    worker.add_argument("tree")
    worker.add_argument("out")
    worker.add_argument("--soak", action="store_true")
    worker.add_argument("--also", action="append", default=[])
    arguments = parser.parse_args()
    if arguments.command == "list":
        for area in AREAS:
            for f in chosen(area):
                print(f"{area:10} {f.number} {f.file}:{f.line} {f.function}: {f.old!r} -> {f.new!r}")
    elif arguments.command == "run":
        arguments.out = str(Path(arguments.out).resolve())
        sys.exit(run(arguments))
    elif arguments.command == "report":
        sys.exit(1 if report(arguments.results) else 0)
    else:
        work(arguments.tree, sys.stdin.read().split(), arguments.out, arguments.soak, arguments.also)


if __name__ == "__main__":
    main()

"""A scoring job that is killed at any moment, as often as one likes: in the end every row has its scores once."""

import multiprocessing
import os
import random
import signal
import time

import pytest
from scoring_cases import Constants, candidates, check, children_of, is_alive, lines_in, picture, run, until, write

from yojo.scoring import parts

SECONDS = 0.002  # that a row takes


def start(path, out, options, answers=None):
    """A process that scores; it is forked, which costs next to nothing."""
    process = multiprocessing.get_context("fork").Process(target=_score, args=(path, out, options, answers))
    process.start()
    return process


def _score(path, out, options, answers=None):
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os._exit(run(path, out, Constants(SECONDS, answers=answers), **options).exit_code)


def finished(path, out, rng, options, kills, between=lambda: None):
    """Start runs and kill them, so many, at random moments; the exit code of the one that ends by itself then."""
    killed = 0
    while True:
        process = start(path, out, options)
        if killed < kills:
            time.sleep(rng.random() * 0.35)
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode in (0, 1, -signal.SIGKILL)
        if killed == kills:
            return process.exitcode
        killed += 1
        between()


def kill_and_finish(tmp_path, seed, kills):
    rng = random.Random(seed)
    images = tmp_path / "images" if rng.random() < 0.7 else None
    records = candidates(rng.randrange(40, 150), images, seed)
    path = write(tmp_path / "in.jsonl", records)
    out = tmp_path / rng.choice(["out", "o.jsonl", "o.parquet"])
    options = {"workers": rng.choice([0, 0, 1, 2]), "parquet": rng.random() < 0.3}

    def meddle():
        """Between two runs the input grows, in front too, and an image comes and goes."""
        if rng.random() < 0.5:
            more = candidates(rng.randrange(1, 20), images, rng.randrange(1000))
            at = rng.choice([0, len(records) // 2, len(records)])
            records[at:at] = more
            write(path, records)

    finished(path, out, rng, options, kills, meddle)
    check(out, records, path)
    if images is None:
        return
    # An image that is not there makes bad rows of those that show it, until it is back.
    gone = [n for n, record in enumerate(records) if record["image"].endswith("/0.png")]
    (images / "0.png").unlink()
    new = {"id": "new", "prompt": "and now?", "responses": ["x"], "image": records[gone[0]]["image"]}
    write(path, [*records, new])
    code = finished(path, out, rng, options, 1)
    assert code == 1
    picture(images, 0)
    code = finished(path, out, rng, options, 1)
    assert code == 0
    check(out, [*records, new], path)


@pytest.mark.parametrize("seed", range(3))
def test_killed_jobs_lose_and_repeat_nothing(tmp_path, seed):
    kill_and_finish(tmp_path, seed, kills=3)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(100, 115))
def test_killed_jobs_lose_and_repeat_nothing_however_often(tmp_path, seed):
    kill_and_finish(tmp_path, seed, kills=5)


def test_shards_that_are_killed(tmp_path):
    rng, records = random.Random(7), candidates(120)
    path = write(tmp_path / "in.jsonl", records)
    for kill in (True, False):
        processes = [start(path, tmp_path / "out", {"shard": (n, 2)}) for n in range(2)]
        if kill:
            time.sleep(0.15)
            os.kill(processes[rng.randrange(2)].pid, signal.SIGKILL)
        for process in processes:
            process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    check(tmp_path / "out", records, path)


def test_an_interrupted_run_gives_its_part_a_name_and_leaves_no_process(tmp_path):
    records = candidates(1200)  # more than wait for the judge
    path = write(tmp_path / "in.jsonl", records)
    process = start(
        path, tmp_path / "out", {"workers": 2}, answers=3
    )  # however late it is interrupted, it is in the middle
    written = until(lambda: lines_in(tmp_path / "out"))
    children = children_of(process.pid)
    os.kill(process.pid, signal.SIGINT)
    process.join()
    assert written and len(children) >= 2
    assert until(lambda: not any(map(is_alive, children)))
    assert list((tmp_path / "out").glob("scores-*"))
    written = lines_in(tmp_path / "out")
    assert run(path, tmp_path / "out").kept == written > 0
    check(tmp_path / "out", records, path)


# ---- at every step ----


def _die_at(step, half):
    """From here on the process kills itself at a step: a call that changes files, or (half) in the middle of a write."""
    count = [0]

    def counted(function, is_write=False):
        def call(*args):
            count[0] += 1
            if count[0] == step:
                if is_write and half:
                    function(args[0][: len(args[0]) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args)

        return call

    for name in ("rename", "replace", "unlink", "fsync"):
        setattr(os, name, counted(getattr(os, name)))
    before = parts.Part.add

    def add(self, lines):
        self.file = _Writes(self.file, counted)
        self.add = lambda lines: before(self, lines)
        return before(self, lines)

    parts.Part.add = add


class _Writes:
    """A file whose writes are steps."""

    def __init__(self, file, counted):
        self.file, self.write = file, counted(self._write, is_write=True)

    def _write(self, data):
        self.file.write(data)
        self.file.flush()

    def __getattr__(self, name):
        return getattr(self.file, name)


def _score_until(path, out, step, half, options):
    _die_at(step, half)
    _score(path, out, options)


def die_at_step(tmp_path, step, half, name, parquet):
    records = candidates(8, tmp_path / "images")
    records[3] = records[3] | {"responses": []}
    path = write(tmp_path / "in.jsonl", records)
    options = {"parquet": parquet}
    process = multiprocessing.get_context("fork").Process(
        target=_score_until, args=(path, tmp_path / name, step, half, options)
    )
    process.start()
    process.join()
    run(path, tmp_path / name, **options)
    check(tmp_path / name, records, path, bad=[3])
    return process.exitcode == -signal.SIGKILL


STEPS = 30
PLACES = [("out", False), ("out", True), ("o.jsonl", False), ("o.parquet", False)]


@pytest.mark.parametrize("seed", range(10))
def test_killed_at_a_step(tmp_path, seed):
    rng = random.Random(seed)
    assert die_at_step(tmp_path, rng.randrange(1, 17), rng.random() < 0.5, *rng.choice(PLACES))


@pytest.mark.soak
@pytest.mark.parametrize("name, parquet", PLACES)
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("step", range(1, STEPS))
def test_killed_at_every_step(tmp_path, step, half, name, parquet):
    killed = die_at_step(tmp_path, step, half, name, parquet)
    assert killed or step > 16

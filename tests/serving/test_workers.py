"""Workers as processes: they answer, die, hang, are begun anew, and never outlive their server."""

import asyncio
import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.serving.serving_cases import run
from tests.serving.worker_cases import Told
from yojo.serving.workers import ENDED, FAILED, LOST, READY, Role, Worker, WorkerLost

ROOT = Path(__file__).parents[2]


class Watched(Worker):
    """A worker whose states are kept."""

    def __init__(self, *args, **options):
        self.states = []
        super().__init__(Role("told", Told, args), changed=self._note, **options)

    def _note(self):
        self.states.append(self.state)

    async def until(self, state, count=1):
        while self.states.count(state) < count:
            await asyncio.sleep(0.005)


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_a_life():
    async def go():
        worker = Watched("a", 1)
        worker.start()
        await worker.until(READY)
        assert worker.hello == {"pid": worker.pid, "args": ("a", 1)} and worker.pid != os.getpid()
        # Many at once, in the order they came; a signal that the server gets is not its own.
        found = await asyncio.gather(*(worker.call(("say", n)) for n in range(20)))
        assert found == [(n, True) for n in range(20)]
        assert await asyncio.gather(worker.call(("later", 1)), worker.call(("later", 2))) == [1, 2]
        large = os.urandom(5_000_000)
        assert (await worker.call(("say", large)))[0] == large
        with pytest.raises(RuntimeError, match="KeyError: 'no'"):
            await worker.call(("raise", "no"))
        # kill -9: what it had is lost, and it is begun anew.
        pid, tasks = worker.pid, [asyncio.ensure_future(worker.call(("sleep", 60))) for _ in range(3)]
        await asyncio.sleep(0)
        os.kill(pid, signal.SIGKILL)
        for task in tasks:
            with pytest.raises(WorkerLost, match="SIGKILL"):
                await task
        assert worker.state == LOST
        with pytest.raises(WorkerLost):
            await worker.call(("say", 1))
        await worker.until(READY, 2)
        assert worker.pid != pid and worker.restarts == 1 and (await worker.call(("say", 2)))[0] == 2
        with pytest.raises(WorkerLost, match="exit code 3"):
            await worker.call(("exit", 3))
        await worker.until(READY, 3)
        # One that hangs is ended.
        pid = worker.pid
        with pytest.raises(WorkerLost, match="hangs"):
            await worker.call(("sleep", 60), 0.05)
        assert worker.state == LOST  # at once: what it had is tried again, and not on it
        await worker.until(READY, 4)
        assert not is_alive(pid)
        pid = worker.pid
        waits = asyncio.ensure_future(worker.call(("sleep", 0.2)))
        await asyncio.sleep(0)
        await worker.stop()
        assert await waits == (0.2, True)  # what it was at it finishes
        assert worker.state == ENDED and not is_alive(pid)

    run(go)


async def told_more_than_it_takes(timeout):
    """A worker whose process is stopped, and the task of a call that is more than a pipe holds."""
    worker = Watched()
    worker.start()
    await worker.until(READY)
    os.kill(worker.pid, signal.SIGSTOP)
    return worker, asyncio.ensure_future(worker.call(("say", bytes(5_000_000)), timeout))


def test_one_that_hangs_is_ended_even_where_it_takes_nothing():
    async def go():
        worker, call = await told_more_than_it_takes(0.1)
        pid = worker.pid
        with pytest.raises(WorkerLost, match="hangs"):
            await call
        await worker.until(LOST)
        await worker.until(READY, 2)
        assert worker.pid != pid and (await worker.call(("say", 1)))[0] == 1
        await worker.stop()

    run(go)


def test_one_that_takes_nothing_does_not_hold_up_the_end():
    async def go():
        worker, call = await told_more_than_it_takes(600)
        pid = worker.pid
        await asyncio.sleep(0.1)
        await asyncio.wait_for(worker.stop(), 30)
        with pytest.raises(WorkerLost):
            await call
        assert worker.state == ENDED and not is_alive(pid)

    run(go)


def test_one_that_no_process_can_be_begun_for_is_begun_later(monkeypatch):
    def full(self, *_):
        raise OSError(errno.EMFILE, "Too many open files")

    async def go():
        worker = Watched()
        worker.start()
        await worker.until(READY)
        with monkeypatch.context() as patched:
            patched.setattr(multiprocessing.context.SpawnContext, "Pipe", full)
            worker.kill()
            await worker.until(LOST, 2)
            assert "Too many open files" in worker.why
        await worker.until(READY, 2)
        assert (await worker.call(("say", 1)))[0] == 1
        await worker.stop()

    run(go)


@pytest.mark.parametrize("in_process", [True, False])
def test_one_that_cannot_begin_says_why(in_process):
    async def go():
        worker = Watched("fail", in_process=in_process)
        worker.start()
        await worker.until(FAILED)
        assert worker.why == "there is no such model" and worker.restarts == 0
        with pytest.raises(WorkerLost, match="failed"):
            await worker.call(("say", 1))
        await worker.stop()

    run(go)


SERVER = """
import asyncio
from tests.serving.worker_cases import Told
from yojo.serving.workers import Role, Worker

async def go():
    worker = Worker(Role("told", Told))
    worker.start()
    while worker.hello is None:
        await asyncio.sleep(0.01)
    print(worker.pid, flush=True)
    await worker.call(("sleep", 600))

if __name__ == "__main__":
    asyncio.run(go())
"""


def test_none_outlives_its_server(tmp_path):
    (tmp_path / "server.py").write_text(SERVER)
    command, env = [sys.executable, tmp_path / "server.py"], {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as server:
        pid = int(server.stdout.readline())
        assert is_alive(pid)
        server.kill()
    until = time.monotonic() + 60
    while is_alive(pid):
        assert time.monotonic() < until
        time.sleep(0.05)

"""Workers: processes that prepare requests or score rows, watched by the server, and begun anew when they are lost."""

import asyncio
import concurrent.futures
import contextlib
import dataclasses
import functools
import gc
import itertools
import logging
import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import typing

import anyio

from yojo.serving.errors import ApiError

logger = logging.getLogger(__name__)

STARTING, READY, LOST, FAILED, ENDED = "starting", "ready", "lost", "failed", "ended"
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0  # seconds before a worker is begun anew; doubled each time it does not get ready


LONGEST_END = 3.0  # seconds that a worker has to end by itself


class WorkerLost(Exception):
    """The worker died, or was ended, while it had this to do."""


class Failed(Exception):
    """A worker cannot begin: the message says why."""


@dataclasses.dataclass(frozen=True)
class Role:
    """What a worker does.

    Attributes:
        name: for logs and metrics, such as "scoring cuda:0".
        make: function of `args` that makes the handler, in the worker. A handler has `hello()`, what the server is told once it
            is there; `begin(ident, data)` and `rest()`, which yield (ident, result or exception) of what is done.
        args: tuple; what has to be known only when the worker begins may be a function of no arguments (called here).
        setup: function that a process of its own calls first, or None.
        nice: added to the process's niceness: what prepares leaves the cores to what scores.
    """

    name: str
    make: typing.Callable
    args: tuple | typing.Callable = ()
    setup: typing.Callable | None = None
    nice: int = 0

    def arguments(self):
        return self.args() if callable(self.args) else self.args


class Worker:
    """One worker, seen from the server's event loop.

    Args:
        role: `Role`.
        in_process: run it in a thread of this process: for tests, and where a process is there already.
        changed: function called, in the event loop, whenever `state` has changed.

    Attributes:
        state: one of "starting", "ready", "lost" (about to be begun anew), "failed" (it said why it cannot begin), "ended".
        hello: what the handler said, once ready.
        why: why it is lost or has failed.
        restarts: how often it was begun anew.
    """

    def __init__(self, role, in_process=False, changed=lambda: None):
        self.role, self.in_process, self._changed = role, in_process, changed
        self.state, self.hello, self.why, self.restarts = STARTING, None, None, 0
        self._link, self._task, self._waiting, self._numbers = None, None, {}, itertools.count()

    @property
    def pid(self):
        """Of its process; None without one."""
        return getattr(self._link, "pid", None)

    @property
    def busy(self):
        """How much it has to do."""
        return len(self._waiting)

    def start(self):
        """Begin, and keep it up until `stop`; returns at once."""
        self._task = asyncio.get_running_loop().create_task(self._keep_up())

    async def stop(self):
        """End it; what it has to do is lost."""
        self._set(ENDED)
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task
        if self._link is not None:
            await self._link.close()
        self._lose("the server ends")

    async def call(self, data, timeout=None):
        """Have something done.

        Args:
            data: what the handler's `begin` takes; it must pickle.
            timeout: seconds, after which the worker is taken to hang and ended.

        Returns:
            what the handler gave.

        Raises:
            WorkerLost: the worker died meanwhile, hangs, or is not ready.
            Whatever the handler gave that is an exception.
        """
        if self.state != READY:
            raise WorkerLost(f"{self.role.name} is {self.state}")
        ident, link = next(self._numbers), self._link
        future = self._waiting[ident] = asyncio.get_running_loop().create_future()
        try:
            with anyio.fail_after(timeout):  # one that hangs reads nothing, either
                await link.send((ident, data))
                return await future
        except TimeoutError:
            logger.error("%s has not answered within %g s: it is ended", self.role.name, timeout)
            link.kill()
            if link is self._link and self.state == READY:
                # Now, and not when its end is heard of: what it had is tried again, and not on it.
                self._set(LOST, "it hangs")
            raise WorkerLost(f"{self.role.name} hangs") from None
        except OSError:  # it died before it was told; how, whoever listens hears
            raise WorkerLost(f"{self.role.name}: {await asyncio.shield(link.ended)}") from None
        finally:
            self._waiting.pop(ident, None)

    def kill(self):
        """End its process at once, as an accident would; it is begun anew."""
        self._link.kill()

    def _set(self, state, why=None):
        if self.state != ENDED:
            self.state, self.why = state, why
            self._changed()

    def _lose(self, why):
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(WorkerLost(f"{self.role.name}: {why}"))
                future.exception()  # it may be that nobody waits any more

    async def _keep_up(self):
        pause = FIRST_PAUSE
        while True:
            self._set(STARTING)
            self._link = (_Thread if self.in_process else _Process)(self.role, self._heard)
            try:
                await self._link.begin()
                self.hello = await self._link.hello
            except Failed as error:
                await self._link.close()
                self._set(FAILED, str(error))
                return
            except WorkerLost as error:
                self._set(LOST, str(error))
            else:
                pause = FIRST_PAUSE
                self._set(READY)
                why = await asyncio.shield(self._link.ended)  # others wait for it, too
                self._set(LOST, why)
                self._lose(why)
            logger.error("%s is lost (%s); beginning it anew", self.role.name, self.why)
            await self._link.close()
            await asyncio.sleep(pause)
            pause = min(LONGEST_PAUSE, pause * 2)
            self.restarts += 1

    def _heard(self, ident, found):
        future = self._waiting.get(ident)
        if future is not None and not future.done():
            if isinstance(found, BaseException):
                future.set_exception(found)
            else:
                future.set_result(found)


class _Link:
    """How a worker is spoken to: `hello` and `ended` are futures, of what it said first and of how it ended."""

    def __init__(self, role, heard):
        self.role, self.heard, self.loop = role, heard, asyncio.get_running_loop()
        self.hello, self.ended = self.loop.create_future(), self.loop.create_future()

    def _tell(self, function, *args):
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(function, *args)

    def _on_message(self, kind, *said):
        if kind == "done":
            self.heard(*said)
        elif kind == "hello" and not self.hello.done():
            self.hello.set_result(said[0])
        elif kind == "failed" and not self.hello.done():
            self.hello.set_exception(Failed(said[0]))

    def _on_end(self, why):
        if not self.hello.done():
            self.hello.set_exception(WorkerLost(why))
            self.hello.exception()
        if not self.ended.done():
            self.ended.set_result(why)


class _Process(_Link):
    """A worker in a process of its own."""

    closed, process = False, None

    async def begin(self):
        self.sender = concurrent.futures.ThreadPoolExecutor(1, f"yojo to {self.role.name}")
        try:
            context = multiprocessing.get_context("spawn")
            self.pipe, there = context.Pipe()
            self.process = context.Process(
                target=_run, args=(there, self.role.make, self.role.setup, self.role.nice), daemon=True
            )
            await self.loop.run_in_executor(self.sender, self._start, there)
            threading.Thread(target=self._listen, name=f"yojo from {self.role.name}", daemon=True).start()
        except (OSError, RuntimeError) as error:  # no descriptors, processes, threads or memory left, for now
            raise WorkerLost(f"no process can be begun: {error}") from None

    def _start(self, there):
        self.process.start()
        there.close()
        try:
            self.pipe.send(self.role.arguments())
        except OSError:
            pass  # it has died already; who listens hears of it

    @property
    def pid(self):
        return None if self.process is None else self.process.pid

    async def send(self, message):
        await self.loop.run_in_executor(self.sender, self._send, message)

    def _send(self, message):
        self.pipe.send_bytes(pickle.dumps(message, pickle.HIGHEST_PROTOCOL))

    def _listen(self):
        try:
            while True:
                self._tell(self._on_message, *pickle.loads(self.pipe.recv_bytes()))
        except (EOFError, OSError):
            pass
        self.process.join(5.0)
        code = self.process.exitcode
        how = "it closed its pipe" if code is None else f"exit code {code}" if code >= 0 else _signal(-code)
        self._tell(self._on_end, how)

    def kill(self):
        with contextlib.suppress(ValueError, AttributeError):
            self.process.kill()

    async def close(self):
        if self.closed:
            return
        self.closed = True
        if self.pid is not None:
            # What is being sent to one that takes nothing would never be done: it is in front of what `_end` says.
            killing = self.loop.call_later(LONGEST_END, self.kill)
            await self.loop.run_in_executor(self.sender, self._end)
            killing.cancel()
        self.sender.shutdown(wait=False)

    def _end(self):
        """Let it end by itself, which leaves nothing of it behind; one that does not is killed."""
        with contextlib.suppress(OSError):
            self._send(None)
        self.process.join(LONGEST_END)
        self.kill()
        self.process.join()


def _signal(number):
    try:
        return f"signal {signal.Signals(number).name}"
    except ValueError:
        return f"signal {number}"


def keep_what_is_loaded():
    """Have the collector pass over what is here already: it stays, and each full look at all modules takes a tenth of a second."""
    gc.collect()
    gc.freeze()


def _run(pipe, make, setup, nice):
    """A worker's process: it ends with its server, and by no signal that the server is sent."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    os.nice(nice)
    if setup is not None:
        setup()
    args = pipe.recv()

    def made(*args):
        handler = make(*args)
        keep_what_is_loaded()
        return handler

    jobs, lock = queue.SimpleQueue(), threading.Lock()

    def say(*message):
        data = pickle.dumps(message, pickle.HIGHEST_PROTOCOL)
        with lock:
            pipe.send_bytes(data)

    def listen():
        with contextlib.suppress(EOFError, OSError):
            while (message := pickle.loads(pipe.recv_bytes())) is not None:
                jobs.put(message)
        jobs.put(_Ended)
        time.sleep(LONGEST_END)  # for what it is at; nobody wants it any more
        os._exit(0)

    threading.Thread(target=listen, daemon=True).start()
    with contextlib.suppress(_Ended, BrokenPipeError):
        _serve(made, args, jobs.get, say)


class _Thread(_Link):
    """A worker in a thread."""

    pid = None

    async def begin(self):
        self.jobs = queue.SimpleQueue()
        threading.Thread(target=self._work, name=f"yojo {self.role.name}", daemon=True).start()

    def _work(self):
        why = "it has ended"
        try:
            say = functools.partial(self._tell, self._on_message)
            _serve(self.role.make, self.role.arguments(), self.jobs.get, say)
        except _Ended:
            pass
        except BaseException as error:  # as of a process, it ends with it
            why = type(error).__name__
        self._tell(self._on_end, why)

    async def send(self, message):
        self.jobs.put(message)

    def kill(self):
        self.jobs.put(_Ended)

    async def close(self):
        self.kill()


class _Ended(Exception):
    """A thread's worker is to end."""


def _serve(make, args, take, say):
    """A worker's life: make the handler, say hello, do what comes."""
    try:
        handler = make(*args)
        say("hello", handler.hello())
    except (TypeError, ValueError, OSError, ImportError, Failed) as error:
        say("failed", f"{error}")
        return
    while True:
        try:
            message = take(False)
        except queue.Empty:
            for done in handler.rest():
                say("done", *_that_pickles(*done))
            message = take()
        if message is _Ended:
            raise _Ended
        for done in handler.begin(*message):
            say("done", *_that_pickles(*done))
        del message


def _that_pickles(ident, found):
    if isinstance(found, BaseException) and not isinstance(found, ApiError):
        return ident, RuntimeError(f"{type(found).__name__}: {found}")
    return ident, found

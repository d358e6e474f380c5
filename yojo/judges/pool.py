"""A few threads that wait for others' answers: they never hold up a program's end."""

import collections
import os
import queue
import threading
import weakref

from yojo.judges.client import Stop, Stopped


class Pool:
    """Threads that do what they are given, in the order in which they are given it.

    Args:
        size: threads, at most; one more is started whenever something is given and fewer are there.

    Attributes:
        stop: `yojo.judges.client.Stop`, for what is done.
    """

    def __init__(self, size):
        self.size, self.stop = size, Stop()
        self._given, self._done, self._threads = queue.SimpleQueue(), queue.SimpleQueue(), []

    def give(self, tag, function, *args):
        """Have `function(*args)` done."""
        self._given.put((tag, function, args))
        if len(self._threads) < self.size:
            # A daemon: at the end of a program nobody waits for the answer of a server.
            self._threads.append(threading.Thread(target=self._work, name="yojo requests", daemon=True))
            self._threads[-1].start()

    def take(self):
        """(tag, what the function returned, None) or (tag, None, what it raised) of whatever is done next; waits for it."""
        return self._done.get()

    def close(self):
        """End it: what is under way is stopped, what is left is not done, and nobody is waited for."""
        self.stop.set()
        for _ in self._threads:
            self._given.put(None)

    def _work(self):
        while (job := self._given.get()) is not None:
            if self.stop.is_set():
                continue
            tag, function, args = job
            try:
                self._done.put((tag, function(*args), None))
            except Stopped:
                continue
            except BaseException as error:  # raised by whoever takes it
                self._done.put((tag, None, error))


_hands = weakref.WeakSet()


def _renew():
    """In a forked process, where none of the threads is."""
    for hands in list(_hands):
        hands._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


class Hands:
    """Threads that are there as long as there is something to do, for what is waited for elsewhere (in an event loop).

    Args:
        size: threads, at most.
    """

    def __init__(self, size):
        self.size = size
        self._begin()
        _hands.add(self)

    def _begin(self):
        self._lock, self._given, self._at_work = threading.Lock(), collections.deque(), 0

    def give(self, function):
        """Have `function()` done, which must not raise, behind what was given before."""
        with self._lock:
            if self._at_work < self.size:
                threading.Thread(target=self._work, name="yojo requests", daemon=True).start()
                self._at_work += 1
            self._given.append(function)

    def _work(self):
        while True:
            with self._lock:
                if not self._given:
                    self._at_work -= 1
                    return
                function = self._given.popleft()
            function()
            del function  # what it holds is large

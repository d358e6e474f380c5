"""A few threads that wait for others' answers: what they find comes back to one, and they never hold up a program's end."""

import queue
import threading

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

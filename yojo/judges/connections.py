"""Connections to a server that are kept for the next request, and not used again once the server has closed them."""

import collections
import contextlib
import select
import time
import weakref

LONGEST_IDLE = 60.0  # seconds; what lies between may forget without a word a connection that nobody uses


class Connections:
    """Open connections that nothing is under way on. For any number of threads: a deque needs no lock, which a fork could break.

    Args:
        most: that are kept.
    """

    def __init__(self, most):
        self._idle = collections.deque()
        self.most = most
        # Whoever forgets a client leaves no open sockets behind.
        weakref.finalize(self, _close, self._idle)

    def __len__(self):
        return len(self._idle)

    def take(self, way):
        """A connection that goes this way and is open as far as can be seen; or None.

        Args:
            way: whatever `give` was given.
        """
        while True:
            try:
                found, since, connection = self._idle.pop()  # the one that was used last
            except IndexError:
                return None
            if found == way and time.monotonic() - since <= LONGEST_IDLE and not _has_something(connection.sock):
                return connection
            connection.close()

    def give(self, way, connection):
        """Keep an open `http.client.HTTPConnection` whose last reply was read to its end."""
        self._idle.append((way, time.monotonic(), connection))
        while len(self._idle) > self.most:
            with contextlib.suppress(IndexError):
                self._idle.popleft()[2].close()

    def close(self):
        """Close all of them."""
        _close(self._idle)


def _close(idle):
    while True:
        try:
            _, _, connection = idle.popleft()
        except IndexError:
            return
        connection.close()


def _has_something(sock):
    """Whether something is to be read where nobody has asked: the end of the connection, mostly."""
    poll = select.poll()
    poll.register(sock, select.POLLIN | select.POLLPRI)
    return bool(poll.poll(0))

"""Turns of an event loop: where many requests have something to do at the same time, each loop does it for one."""

import asyncio
import collections


class Pace:
    """What takes a millisecond for each of a row's requests, and would otherwise be done for all of them before anything else.

    Replies of a row come at the same time, and so does what their clients ask next: in one turn of the event loop all of it would
    stand in front of /health, three times over. Callers go on in the order in which they came, one each turn.
    """

    def __init__(self):
        self._waiting = collections.deque()

    async def turn(self):
        """Wait for a turn of one's own."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._waiting.append(future)
        if len(self._waiting) == 1:
            loop.call_soon(self._next, loop)
        await future

    def _next(self, loop):
        # The one that goes on stays in front until the next turn, so that who comes meanwhile does not begin another round.
        while self._waiting and self._waiting[0].done():
            self._waiting.popleft()
        if self._waiting:
            self._waiting[0].set_result(None)
            loop.call_soon(self._next, loop)

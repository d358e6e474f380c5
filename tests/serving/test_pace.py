"""Turns of an event loop: one caller each, in order, whoever leaves."""

import asyncio

from tests.serving.serving_cases import run
from yojo.serving.pace import Pace


def test_one_each_turn_in_order():
    async def go():
        pace, seen, turns = Pace(), [], []

        async def caller(name):
            await pace.turn()
            seen.append((name, len(turns)))
            if name == 3:  # who comes meanwhile comes last
                tasks.append(asyncio.ensure_future(caller(10)))

        async def clock():
            while True:
                turns.append(None)
                await asyncio.sleep(0)

        watch, tasks = asyncio.ensure_future(clock()), [asyncio.ensure_future(caller(n)) for n in range(10)]
        await asyncio.sleep(0)
        tasks[5].cancel()
        while len(seen) < 10:
            await asyncio.sleep(0)
        watch.cancel()
        names, times = zip(*seen, strict=True)
        assert names == (0, 1, 2, 3, 4, 6, 7, 8, 9, 10)
        assert len(set(times)) == len(times)
        # And again, once nobody has waited for a while.
        await asyncio.sleep(0.01)
        await asyncio.wait_for(pace.turn(), 60)
        assert not pace._waiting or pace._waiting[0].done()

    run(go)

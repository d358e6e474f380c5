"""`FairQueue`: what many clients wait for, taken in turns by what it costs, not by who asks most."""

import collections
import heapq
import itertools

SHARE = 4  # of what is left free: so many times as much may one client hold


def too_much(more, held, free):
    """Whether there is no room for more of a client that holds some already; one that holds nothing may take all that is free."""
    return more > free or (held > 0 and held + more > SHARE * free)


class FairQueue:
    """Items of many clients, in the order of start-time fair queueing.

    Each client's items come in the order in which they were put. Between clients that wait at the same time, the work taken
    (tokens) is shared out evenly, whatever number of requests each has there; a client that has been away saves nothing up.

    P. Goyal, H. Vin, H. Cheng, "Start-time fair queueing", SIGCOMM 1996.
    """

    def __init__(self):
        self._heap, self._number = [], itertools.count()
        self._now, self._finish = 0.0, {}  # virtual time, and when each client's last item ends
        self._held = collections.Counter()  # client -> items

    def __len__(self):
        return sum(self._held.values())

    def first(self):
        """The item whose turn it is; there has to be one."""
        return self._heap[0][3]

    def put(self, client, cost, item):
        """Add an item of a client, which costs so much."""
        start = max(self._now, self._finish.get(client, 0.0))
        self._finish[client] = start + cost
        if len(self._finish) > 2 * len(self._held) + 1000:  # of clients that are gone
            self._finish = {one: end for one, end in self._finish.items() if end > self._now}
        self._add(start, client, item)

    def put_first(self, client, item):
        """Add an item in front of all others: it has been taken before, and its cost is paid."""
        self._add(self._now - 1.0, client, item)

    def take(self, fits=lambda item: True, look=64):
        """Take the next item that fits, of the first ones; None where there is none.

        Args:
            fits: function of an item -> bool; those that do not fit keep their place.
            look: how many items are asked.
        """
        kept, found = [], None
        while self._heap and len(kept) < look:
            entry = heapq.heappop(self._heap)
            if fits(entry[3]):
                found = entry
                break
            kept.append(entry)
        for entry in kept:
            heapq.heappush(self._heap, entry)
        if found is None:
            return None
        start, _, client, item = found
        self._now = max(self._now, start)
        self._leave(client)
        return item

    def remove(self, item):
        """Take an item out; False where it is not there."""
        for place, (_, _, client, held) in enumerate(self._heap):
            if held is item:
                self._heap[place] = self._heap[-1]
                self._heap.pop()
                heapq.heapify(self._heap)
                self._leave(client)
                return True
        return False

    def __iter__(self):
        return (item for _, _, _, item in sorted(self._heap))

    def _add(self, start, client, item):
        self._held[client] += 1
        heapq.heappush(self._heap, (start, next(self._number), client, item))

    def _leave(self, client):
        self._held[client] -= 1
        if not self._held[client]:
            del self._held[client]
            if self._finish.get(client, 0.0) <= self._now:
                self._finish.pop(client, None)
        if not self._heap:  # nobody is owed anything
            self._now, self._finish = 0.0, {}

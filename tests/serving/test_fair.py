"""The queue that many clients share: turns by cost, nothing lost, nobody kept waiting by who asks most."""

import collections
import random

from yojo.serving.fair import FairQueue


def drained(queue, **options):
    found = []
    while (item := queue.take(**options)) is not None:
        found.append(item)
    return found


def filled(*entries):
    queue = FairQueue()
    for client, cost, item in entries:
        queue.put(client, cost, item)
    return queue


def test_one_clients_items_keep_their_order():
    assert drained(filled(*[("a", 5, n) for n in range(10)])) == list(range(10))


def test_clients_take_turns():
    queue = filled(*[("many", 10, f"m{n}") for n in range(6)], ("one", 10, "o0"), ("two", 10, "t0"))
    assert drained(queue) == ["m0", "o0", "t0", "m1", "m2", "m3", "m4", "m5"]


def test_turns_go_by_cost():
    queue = filled(*[("long", 40, f"l{n}") for n in range(3)], *[("short", 10, f"s{n}") for n in range(6)])
    order = drained(queue)
    assert order.index("l1") > order.index("s3")  # four short ones for each long one
    assert order.index("l1") < order.index("s5")


def test_who_was_away_saves_nothing_up():
    queue = filled(*[("a", 10, f"a{n}") for n in range(4)])
    taken = [queue.take() for _ in range(3)]
    queue.put("b", 10, "b0")
    queue.put("b", 10, "b1")
    assert taken + drained(queue) == ["a0", "a1", "a2", "b0", "a3", "b1"]


def test_what_does_not_fit_keeps_its_place():
    queue = filled(("a", 9, 9), ("a", 2, 2), ("b", 3, 3))
    assert queue.take(fits=lambda item: item < 4) == 3
    assert queue.take(fits=lambda item: item < 1) is None
    assert drained(queue) == [9, 2]


def test_no_more_than_so_many_are_looked_at():
    queue = filled(*[("a", 9, 9) for _ in range(5)], ("a", 1, 1))
    assert queue.take(fits=lambda item: item == 1, look=5) is None and len(queue) == 6
    assert queue.take(fits=lambda item: item == 1, look=6) == 1


def test_the_first_place():
    queue = filled(("a", 1, "a"), ("b", 1, "b"))
    queue.put_first("c", "again")
    assert drained(queue) == ["again", "a", "b"]


def test_removal():
    items = [object() for _ in range(5)]
    queue = filled(*[("a", 1, item) for item in items])
    assert queue.remove(items[2]) and not queue.remove(items[2]) and not queue.remove(object())
    assert list(queue) == [items[0], items[1], items[3], items[4]] == drained(queue)


def test_nothing_is_lost_and_work_is_shared_out():
    """Against any sequence of puts, takes and removals; busy clients are never apart by more than two of the largest items."""
    random_ = random.Random(0)
    queue, there, served = FairQueue(), [], collections.Counter()
    for n in range(4000):
        action = random_.random()
        if action < 0.5 or len(there) < 60:
            item = (random_.choice("abc"), random_.randint(1, 20), n)
            there.append(item)
            queue.put(item[0], item[1], item)
        elif action < 0.95:
            item = queue.take()
            there.remove(item)
            served[item[0]] += item[1]
        else:
            item = random_.choice(there)
            there.remove(item)
            assert queue.remove(item)
        assert len(queue) == len(there)
    assert sorted(drained(queue)) == sorted(there) and not queue._finish
    assert max(served.values()) - min(served.values()) <= 0.1 * max(served.values())

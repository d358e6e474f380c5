"""Workers: results in order and to the bit, errors as they would be here, no process left behind, however it ends."""

import dataclasses
import gc
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from scoring_cases import children_of, is_alive, until

from yojo.inputs import feeding, windows
from yojo.inputs.feeding import WorkerTraceback, fed


@dataclasses.dataclass
class Made:
    number: int
    small: torch.Tensor
    large: torch.Tensor
    half: torch.Tensor
    pid: int


def make(number):
    time.sleep(random.Random(number).random() * 0.01)
    large = torch.full((600, 600), float(number))  # of which a worker makes shared memory
    return Made(number, torch.arange(number), large, torch.ones(3, dtype=torch.bfloat16), os.getpid())


def fail_at_five(number):
    if number == 5:
        raise KeyError("five")
    return number


class Unpicklable(ValueError):
    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def raise_unpicklable(number):
    raise Unpicklable("this", "that")


def big(number):
    return os.getpid(), b"x" * 50_000


def interrupt(number):
    os.kill(os.getpid(), signal.SIGINT)
    return number


def die(number):
    if number == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return number


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers):
    found = list(fed(make, range(30), workers))
    for n, one in enumerate(found):
        assert one.number == n and torch.equal(one.small, torch.arange(n)) and one.half.dtype == torch.bfloat16
        assert torch.equal(one.large, torch.full((600, 600), float(n)))
        one.small += 1  # they can be written to
        one.large += 1
    pids = {one.pid for one in found}
    assert len(pids) == max(workers, 1) and (os.getpid() in pids) == (workers == 0)


def test_where_shared_memory_is_short_it_goes_through_the_pipe(monkeypatch):
    monkeypatch.setattr(feeding, "_fits", lambda size, workers: False)
    found = list(fed(make, range(6), 1))
    assert [one.large[0, 0].item() for one in found] == [0, 1, 2, 3, 4, 5]
    assert not any(one.large.is_shared() for one in found)


def test_items_are_taken_some_ahead_and_no_more():
    taken = []

    def items():
        for n in range(1000):
            taken.append(n)
            yield n

    stream = fed(abs, items(), 2)
    assert next(stream) == 0
    most = feeding.ITEMS + (2 * feeding.AHEAD + 2) * feeding.CHUNK
    assert until(lambda: len(taken) >= most)
    time.sleep(0.1)  # in which more would be taken
    assert 256 < len(taken) == most
    stream.close()


def test_what_waits_is_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(feeding, "ROOM", 20 << 20)
    taken = []
    stream = fed(make, (taken.append(n) or n for n in range(1000)), 1)
    next(stream)
    # Each has 1.4 MB: 3 chunks of them wait, beside the one that is read from, one in the thread, and what the worker has.
    most = (3 + 1 + 1 + feeding.AHEAD) * feeding.CHUNK
    assert until(lambda: len(taken) >= most)
    time.sleep(0.1)  # in which more would be taken
    assert len(taken) == most
    stream.close()


@pytest.mark.parametrize("workers", [0, 2])
def test_an_exception_is_the_one_that_was_raised(workers):
    stream, found = fed(fail_at_five, range(30), workers), []
    with pytest.raises(KeyError, match="five") as caught:
        found.extend(stream)
    if workers:
        assert isinstance(caught.value.__cause__, WorkerTraceback) and "fail_at_five" in str(caught.value.__cause__)
    with pytest.raises(ValueError, match="this that"):
        list(fed(raise_unpicklable, range(3), workers))


def test_what_the_items_raise_is_raised():
    def items():
        yield 1
        raise ValueError("the items end badly")

    with pytest.raises(ValueError, match="the items end badly"):
        list(fed(abs, items(), 2))


def test_a_worker_that_dies_is_an_error():
    with pytest.raises(ChildProcessError, match="a worker has died .* fewer workers"):
        list(fed(die, range(100), 1))


def test_no_worker_is_left_behind_and_no_random_number_drawn():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    stream = fed(make, range(100), 2)
    pids = {next(stream).pid for _ in range(12)}
    stream.close()
    assert len(pids) == 2 and torch.equal(torch.get_rng_state(), before)
    assert until(lambda: not any(os.path.exists(f"/proc/{pid}") for pid in pids))


def test_workers_of_a_process_that_is_killed_end(tmp_path):
    # What they have made is more than a pipe holds: they wait to hand it over, to nobody.
    def feed(there):
        stream = fed(big, range(1000), 2)
        there.send({next(stream)[0] for _ in range(12)})
        time.sleep(600)

    context = multiprocessing.get_context("fork")
    here, there = context.Pipe()
    process = context.Process(target=feed, args=(there,))
    process.start()
    pids = here.recv()
    time.sleep(0.3)
    process.kill()
    process.join()
    assert len(pids) == 2 and until(lambda: not any(map(is_alive, pids)))


def test_workers_leave_an_interrupt_to_who_reads():
    assert list(fed(interrupt, range(8), 2)) == list(range(8))


@pytest.mark.parametrize("count", [0, 3, 20])  # the first are taken while the loader is made
def test_no_worker_is_left_behind_where_an_exception_is_kept(count):
    def items():
        yield from range(count)
        raise KeyError("an input that ends early")

    gc.collect()
    before = set(children_of(os.getpid()))
    with pytest.raises(KeyError) as kept:
        list(fed(make, items(), 2))
    assert (
        kept.value is not None and set(children_of(os.getpid())) <= before
    )  # one of another test may have gone meanwhile


def test_a_negative_number_of_workers():
    with pytest.raises(ValueError, match="workers must be 0 or more, got -1"):
        list(fed(abs, [1], -1))


# ---- windows ----


def rows(sizes, budget, weights=None):
    weight = (lambda n: weights[n]) if weights else (lambda n: 0)
    return list(windows.rows(range(len(sizes)), lambda: budget, lambda n: sizes[n], weight))


def test_rows_hold_like_lengths_within_the_budget():
    rng = random.Random(0)
    sizes = [rng.choice([10, 100, 1000]) + rng.randrange(5) for _ in range(500)]
    found = rows(sizes, 2048)
    assert sorted(n for row in found for n in row) == list(range(500))
    assert all(sum(sizes[n] for n in row) <= 2048 for row in found)
    assert all(row == sorted(row) for row in found)
    spread = sum(max(sizes[n] for n in row) - min(sizes[n] for n in row) for row in found) / len(found)
    plain = [range(n, n + 5) for n in range(0, 500, 5)]
    assert spread < 0.5 * sum(max(sizes[n] for n in row) - min(sizes[n] for n in row) for row in plain) / len(plain)


def test_the_one_that_has_waited_longest_is_in_the_next_row():
    rng = random.Random(1)
    sizes, left = [rng.randrange(1, 300) for _ in range(400)], list(range(400))
    for row in rows(sizes, 512):
        assert row[0] == left[0]
        left = [n for n in left if n not in row]


def test_a_window_is_bounded_in_items_tokens_and_bytes():
    held, most = [0], [0]

    def items(count, size):
        for _ in range(count):
            held[0] += 1
            most[0] = max(most[0], held[0])
            yield size

    for size, budget, weight, limit in ((1, 10**6, 0, 256), (100, 1000, 0, 80), (1, 10**6, 1 << 26, 4)):
        held[0] = most[0] = 0
        for row in windows.rows(items(1000, size), lambda b=budget: b, lambda n: n, lambda n, w=weight: w):
            held[0] -= len(row)
        assert most[0] == limit


def test_what_is_too_long_has_a_row_of_its_own():
    assert rows([5, 900, 5, 6], 100) == [[0], [1], [2, 3]]
    assert rows([], 100) == []

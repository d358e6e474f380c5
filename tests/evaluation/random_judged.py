"""Judged items for tests: random ones, with ties, and what must change nothing."""

import dataclasses

import numpy as np

from yojo.evaluation.judged import Judged
from yojo.evaluation.orders import balanced_orders


def judged(scores, orders=None, number=0, rankings=None, question=None, lengths=None, **more):
    """An item; `scores` are [K, N], orders all turns of 0, 1, ... where not given."""
    scores = None if scores is None else np.array(scores, dtype=np.float64)
    count = len(rankings) if rankings is not None else scores.shape[1]
    if orders is None:
        orders = [tuple(np.roll(np.arange(count), -k)) for k in range(1 if scores is None else len(scores))]
    return Judged(
        number=number,
        id=f"item {number}",
        question=question or f"question {number}",
        group=more.pop("group", "all"),
        rankings=tuple(rankings or range(1, count + 1)),
        lengths=tuple(lengths or range(1, count + 1)),
        orders=[tuple(int(n) for n in order) for order in orders],
        scores=scores,
        **more,
    )


def random_items(seed, size=30, ties=True, orders=None, counts=(2, 3, 4)):
    """Items of random numbers of responses and orders, asked in balanced orders."""
    rng = np.random.default_rng(seed)
    items = []
    for number in range(size):
        count = int(rng.choice(counts))
        asked = balanced_orders(count, orders or int(rng.integers(2, 3 if count == 2 else 7)), seed, number)
        scores = rng.normal(size=(1, count)) + rng.normal(size=(len(asked), count))
        rankings = [int(rank) for rank in rng.integers(1, count + 1, count)]
        lengths = [int(length) for length in rng.integers(1, 6, count)]
        items.append(judged(np.round(scores) if ties else scores, asked, number, rankings, f"q{number // 2}", lengths))
    return items


def responses_renamed(item, rng):
    """The same item with its responses in another order of the record."""
    new = rng.permutation(len(item.rankings))  # new[n] is the former number of response n
    number = {int(former): n for n, former in enumerate(new)}
    return dataclasses.replace(
        item,
        rankings=tuple(item.rankings[n] for n in new),
        lengths=tuple(item.lengths[n] for n in new),
        orders=[tuple(number[response] for response in order) for order in item.orders],
        scores=item.scores[:, new],
    )


def orders_shuffled(item, rng):
    new = rng.permutation(len(item.orders))
    return dataclasses.replace(item, orders=[item.orders[k] for k in new], scores=item.scores[new])

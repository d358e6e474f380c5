"""What official metrics are made of: the credit of one item in every order it was judged in, and means by group.

A refused item (`scores` None) is wrong and stays in the denominator. Every order is a verdict of its own; an item's credit is
the mean over its orders.
"""

import math

import numpy as np


def shared(scores, best):
    """Share of the highest scores that belong to a best response: half credit for a tie of two."""
    top = scores == scores.max()
    return float((top & best).sum() / top.sum())


def strict(scores, best):
    """1 where every best response has a higher score than every other one: a tie is wrong."""
    return float(scores[best].min() > scores[~best].max())


def inverse(scores, best):
    """1 / number of the highest scores where a best response has one of them, else 0."""
    top = scores == scores.max()
    return float((top & best).any() / top.sum())


def checked(judged):
    """The items as a list.

    Raises:
        ValueError: no items, scores of another shape than [orders, responses], or scores that are NaN.
    """
    judged = list(judged)
    if not judged:
        raise ValueError("judged is empty: official figures need at least one item")
    for item in judged:
        if item.scores is None:
            continue
        shape = (len(item.orders), len(item.rankings))
        if np.shape(item.scores) != shape or not shape[0]:
            raise ValueError(
                f"item {item.number} ({item.id}): scores must be [orders, responses] = {list(shape)} with at least one "
                f"order, got {list(np.shape(item.scores))}"
            )
        if np.isnan(item.scores).any():
            raise ValueError(
                f"item {item.number} ({item.id}): a score is NaN: a judge that failed refuses (scores None)"
            )
    return judged


def credit(item, rule=shared):
    """Mean over an item's orders of `rule(scores, best)`; 0 where the judge refused."""
    if item.scores is None:
        return 0.0
    return float(np.mean([rule(np.asarray(scores), item.best) for scores in item.scores]))


def accuracy(judged, rule=shared):
    """Mean credit of items."""
    return float(np.mean([credit(item, rule) for item in judged]))


def by(judged, key):
    """dict key(item) -> its items, in the order met."""
    parts = {}
    for item in judged:
        parts.setdefault(key(item), []).append(item)
    return parts


def by_group(judged, figure=accuracy, prefix="group"):
    """dict "group/NAME" -> figure of the items of that group."""
    return {f"{prefix}/{name}": figure(items) for name, items in by(judged, lambda item: item.group).items()}


def together(items):
    """Verdicts of several items that count as one: the k-th order of each, until all begin anew together.

    Args:
        items: list of `Judged`, with scores.

    Returns:
        list of lists, one [N] array for each item.
    """
    orders = math.lcm(*(len(item.scores) for item in items))
    return [[np.asarray(item.scores[k % len(item.scores)]) for item in items] for k in range(orders)]

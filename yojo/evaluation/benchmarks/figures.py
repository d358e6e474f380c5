"""What official metrics are made of: the credit of an item in every order it was judged in, and means by group.

A refused item (`scores` None) is wrong and stays in the denominator. Every order is a verdict of its own; an item's
credit is the mean over its orders.
"""

import math

import numpy as np


def shared(scores, best):
    """Share of the highest scores that belong to a best response: half credit for a tie of two.

    Args:
        scores: [K, N] float, one row an order.
        best: [N] bool, the responses of the best rank.

    Returns:
        [K] float in [0, 1].
    """
    top = scores == scores.max(axis=1, keepdims=True)
    return (top & best).sum(axis=1) / top.sum(axis=1)


def strict(scores, best):
    """1 where every best response has a higher score than every other one, else 0: a tie is wrong. As `shared`."""
    return (margins(scores, best) > 0).astype(np.float64)


def inverse(scores, best):
    """1 / number of the highest scores where a best response has one of them, else 0. As `shared`."""
    top = scores == scores.max(axis=1, keepdims=True)
    return (top & best).any(axis=1) / top.sum(axis=1)


def margins(scores, best):
    """[K] float, the worst score of a best response minus the best score of the others."""
    return scores[:, best].min(axis=1) - scores[:, ~best].max(axis=1)


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
            raise ValueError(f"item {item.number} ({item.id}): a score is NaN: of a judge that failed, scores are None")
    return judged


def verdicts(item, rule=shared):
    """[K] float, `rule` of an item's scores in each order; one 0 where the judge refused."""
    return np.zeros(1) if item.scores is None else rule(np.asarray(item.scores), item.best)


def credit(item, rule=shared):
    """Mean of an item's verdicts."""
    return float(verdicts(item, rule).mean())


def accuracy(judged, of=credit):
    """Mean credit of items, as `of(item)` gives it."""
    return float(np.mean([of(item) for item in judged]))


def accuracies(judged, of=credit):
    """dict: "accuracy", the mean credit of all items, and "group/NAME", that of each group."""
    credits, groups = [], {}
    for item in judged:
        credits.append(of(item))
        groups.setdefault(item.group, []).append(credits[-1])
    return {
        "accuracy": float(np.mean(credits)),
        **{f"group/{name}": float(np.mean(values)) for name, values in groups.items()},
    }


def by(judged, key):
    """dict key(item) -> its items, in the order met."""
    parts = {}
    for item in judged:
        parts.setdefault(key(item), []).append(item)
    return parts


def together(*each):
    """Verdicts of several items that count as one.

    Args:
        each: sequences, the values of one item in each of its orders.

    Returns:
        list of tuples: the k-th value of every item, until all begin anew together.
    """
    return [tuple(values[k % len(values)] for values in each) for k in range(math.lcm(*map(len, each)))]

"""The responses of an example in other orders, and scores put back into the order of the example."""

import dataclasses
import operator

import torch


def checked_orders(orders, count):
    """Orders of `count` responses, as a list of tuples of ints.

    Args:
        orders: K sequences of 0..count-1: `order[place]` is the response that stands at that place.
        count: N responses.

    Raises:
        TypeError, ValueError: no orders, or one that does not have every response once.
    """
    try:
        found = [tuple(map(operator.index, order)) for order in orders]
    except TypeError as error:
        raise TypeError(f"orders must be a list of tuples of ints, got {orders!r}") from error
    if not found or any(sorted(order) != list(range(count)) for order in found):
        raise ValueError(f"orders must be at least one order of the responses 0..{count - 1}, got {orders!r}")
    return found


def ordered(example, order):
    """An example with its responses, and their rankings, in another order.

    Args:
        example: `yojo.Example` with N responses.
        order: tuple of 0..N-1: `order[place]` is the response that stands at that place.
    """
    rankings = None if example.rankings is None else [example.rankings[n] for n in order]
    return dataclasses.replace(example, responses=[example.responses[n] for n in order], rankings=rankings)


def put_back(scores, orders):
    """Scores of an example in K orders -> [K, N], response by response as the example has them.

    Args:
        scores: K tensors [N], each in its own order.
        orders: K tuples.

    Returns:
        [K, N] tensor.
    """
    found = torch.empty(len(orders), len(orders[0]), dtype=scores[0].dtype)
    for row, order, values in zip(found, orders, scores, strict=True):
        row[list(order)] = values
    return found

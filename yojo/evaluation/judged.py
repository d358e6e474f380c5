"""`Judged`: one item of a benchmark with what a judge said of it, in every order in which it was asked."""

import dataclasses
import math
import typing

import numpy as np


@dataclasses.dataclass(frozen=True)
class Judged:
    """One item with the scores of one judge.

    Attributes:
        number: place of the item in the benchmark, from 0.
        id: the record's own id; several items may have the same.
        question: what the item asks; items of one question share it, and the bootstrap draws questions, not items.
        group: the part of the benchmark that the item is of.
        rankings: N ints, 1 = best, ties allowed, in the order of the record.
        lengths: N ints, characters of each response.
        orders: K tuples, `orders[k][place]` is the response (its number in the record) that stood at that place.
        scores: [K, N] float64, `scores[k, n]` is that of response n of the record in order k; higher is better. None where
            the judge refused.
        refused: why there are no scores, or None.
        tokens: (prompt, responses) that a reward model sees in one order, or None.
        tags: dict name -> value, further parts of the benchmark.
        info: dict, what the official metric needs beside these.
    """

    number: int
    id: str
    question: str
    group: str
    rankings: typing.Sequence
    lengths: typing.Sequence
    orders: typing.Sequence
    scores: np.ndarray | None
    refused: str | None = None
    tokens: tuple | None = None
    tags: typing.Mapping = dataclasses.field(default_factory=dict)
    info: typing.Mapping = dataclasses.field(default_factory=dict)

    @property
    def best(self):
        """The responses of the best rank, [N] bool."""
        ranks = np.asarray(self.rankings)
        return ranks == ranks.min()

    @property
    def mean(self):
        """Each response's score averaged over the orders, [N] float64; None where the judge refused.

        The sum is the exact one, rounded: responses with the same scores in other orders tie.
        """
        if self.scores is None:
            return None
        return np.array([math.fsum(column) / len(self.scores) for column in self.scores.T.tolist()])

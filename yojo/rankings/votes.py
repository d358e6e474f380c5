"""Votes of one question: `Vote`, and `Tally`, all votes of a question as arrays."""

import dataclasses
import functools
import math
import numbers

import numpy as np

from yojo.rankings.graphs import classes, reachable

WINNERS = ("first", "second", "tie", "abstain")
TIES = ("half", "drop")
_SHARES = {"first": 1.0, "second": 0.0, "tie": 0.5, "abstain": math.nan}


@dataclasses.dataclass(frozen=True)
class Vote:
    """What one annotator says of two items.

    Attributes:
        first, second: names of the items, two different strings.
        winner: "first", "second", "tie" or "abstain".
        annotator: name of who voted, or None.
        weight: how many votes this one is, above 0.

    Raises:
        TypeError, ValueError: anything else.
    """

    first: str
    second: str
    winner: str
    annotator: str | None = None
    weight: float = 1.0

    def __post_init__(self):
        for name in ("first", "second"):
            value = getattr(self, name)
            if not isinstance(value, str) or not value.strip():
                raise TypeError(f"{name} must be the name of an item, a string that is not empty, got {value!r}")
        if self.first == self.second:
            raise ValueError(f"a vote of {self.first!r} against itself says nothing: leave it out")
        if self.winner not in WINNERS:
            raise ValueError(f"winner must be one of {', '.join(WINNERS)}, got {self.winner!r}")
        if self.annotator is not None and not isinstance(self.annotator, str):
            raise TypeError(f"annotator must be a string or None, got {self.annotator!r}")
        if not isinstance(self.weight, numbers.Real) or isinstance(self.weight, bool):
            raise TypeError(f"weight must be a number, got {self.weight!r}")
        if not (math.isfinite(self.weight) and self.weight > 0):
            raise ValueError(
                f"weight must be finite and above 0, got {self.weight!r}: leave out votes that do not count"
            )


@dataclasses.dataclass(frozen=True, eq=False)
class Tally:
    """Votes of one question as arrays, in an order that neither the order of the votes nor the names of items change.

    Attributes:
        items: N names; numbers below are places in it.
        first, second: [M] int64, numbers of the two items of each vote, first < second.
        share: [M] float64, what the first item has of the vote: 1, 0, 0.5 for a tie, NaN for an abstention.
        weight: [M] float64.
        annotator: [M] int64, numbers of names in `annotators`; -1 where none is named.
        annotators: names, sorted.
        ties: "half": a tie is half a vote for either item. "drop": it says nothing, as an abstention does.
    """

    items: tuple
    first: np.ndarray
    second: np.ndarray
    share: np.ndarray
    weight: np.ndarray
    annotator: np.ndarray
    annotators: tuple
    ties: str = "half"

    @classmethod
    def of(cls, votes, ties="half"):
        """Count votes.

        Args:
            votes: sequence of `Vote`, at least one.
            ties: "half" or "drop".

        Raises:
            TypeError, ValueError: no votes, or something else among them.
        """
        votes = list(votes)
        if not votes:
            raise ValueError("votes is empty: a question needs at least one vote")
        for place, vote in enumerate(votes):
            if not isinstance(vote, Vote):
                raise TypeError(f"votes must be yojo.rankings.Vote, got {type(vote).__name__} at {place}")
        names = sorted({name for vote in votes for name in (vote.first, vote.second)})
        annotators = tuple(sorted({vote.annotator for vote in votes if vote.annotator is not None}))
        number, of_annotator = _places(names), _places(annotators) | {None: -1}
        made = cls(
            tuple(names),
            np.array([number[vote.first] for vote in votes]),
            np.array([number[vote.second] for vote in votes]),
            np.array([_SHARES[vote.winner] for vote in votes]),
            np.array([float(vote.weight) for vote in votes]),
            np.array([of_annotator[vote.annotator] for vote in votes]),
            annotators,
            ties,
        )
        made = made._sorted()
        return made._reordered(made.classes)._sorted()

    def _sorted(self):
        """Votes with the lower number first, in the order of numbers."""
        swapped = self.first > self.second
        first, second = np.where(swapped, self.second, self.first), np.where(swapped, self.first, self.second)
        share = np.where(swapped, 1 - self.share, self.share)
        order = np.lexsort((self.annotator, self.weight, share, second, first))
        made = dataclasses.replace(self, first=first, second=second, share=share)
        return made.take(order)

    def _reordered(self, keys):
        order = np.argsort(keys, kind="stable")
        place = np.argsort(order)
        items = tuple(self.items[i] for i in order)
        return dataclasses.replace(self, items=items, first=place[self.first], second=place[self.second])

    def take(self, votes):
        """A tally of some of the votes, which may be there several times.

        Args:
            votes: [K] int64, their numbers.
        """
        arrays = {name: getattr(self, name)[votes] for name in ("first", "second", "share", "weight", "annotator")}
        return dataclasses.replace(self, **arrays)

    def only(self, items):
        """A tally of the votes between some items.

        Args:
            items: [K] int64, their numbers, ascending.
        """
        place = np.full(len(self.items), -1)
        place[items] = np.arange(len(items))
        kept = self.take(np.flatnonzero((place[self.first] >= 0) & (place[self.second] >= 0)))
        names = tuple(self.items[i] for i in items)
        return dataclasses.replace(kept, items=names, first=place[kept.first], second=place[kept.second])

    @property
    def is_tie(self):
        """[M] bool."""
        return self.share == 0.5

    @property
    def is_abstention(self):
        """[M] bool."""
        return np.isnan(self.share)

    @functools.cached_property
    def decided(self):
        """[N, N] float64: weight of the votes for the item of the row against that of the column, without ties."""
        return self._sum(self.share == 1, self.share == 0)

    @functools.cached_property
    def tied(self):
        """[N, N] float64, symmetric: weight of the ties between two items, however they count."""
        return self._sum(self.is_tie, self.is_tie)

    @functools.cached_property
    def wins(self):
        """[N, N] float64: as `decided`, with half a vote for either item of a tie where ties count."""
        return self.decided + self.tied / 2 if self.ties == "half" else self.decided

    @functools.cached_property
    def counts(self):
        """[N, N] float64, symmetric: weight of the votes between two items that count."""
        return self.wins + self.wins.T

    @functools.cached_property
    def classes(self):
        """[N] int64: see `yojo.rankings.graphs.classes`."""
        return classes(np.stack([self.decided, self.tied], axis=-1))

    @functools.cached_property
    def components(self):
        """List of [K] int64: numbers of the items of each connected part of the graph of comparisons, largest first."""
        together = reachable(self.counts > 0)
        np.fill_diagonal(together, True)
        parts = {tuple(np.flatnonzero(row)) for row in together}
        return [np.array(part) for part in sorted(parts, key=lambda part: (-len(part), part))]

    def _sum(self, for_first, for_second):
        count = len(self.items)
        places = np.concatenate(
            [(self.first * count + self.second)[for_first], (self.second * count + self.first)[for_second]]
        )
        weights = np.concatenate([self.weight[for_first], self.weight[for_second]])
        return np.bincount(places, weights, minlength=count**2).reshape(count, count)


def _places(names):
    return {name: place for place, name in enumerate(names)}

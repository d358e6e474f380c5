"""Several sources as one, and draws of responses: what training makes of records."""

import bisect
import dataclasses
import fractions
import itertools
import math
import random

# ---- several sources ----


class Mixture:
    """Several datasets as one, each seen `weight` times per epoch.

    A weight of 0.5 shows one half of a dataset in one epoch and the other half in the next; 2 shows it twice. Every
    dataset is an endless stream of seeded shuffles, and each epoch takes the next k of it, k being w * n, rounded, for n
    records at weight w, and at least 1: all epochs are of one length. Indices are global: over all datasets, one behind
    the other.

    Args:
        datasets: what has `len` and `[i]`, such as `Records`.
        weights: one number above 0 each; 1 by default.

    Raises:
        ValueError: no datasets, an empty one, or weights that do not fit.
    """

    def __init__(self, datasets, weights=None):
        self.datasets = list(datasets)
        if not self.datasets:
            raise ValueError("no datasets: a mixture needs at least one")
        weights = [1] * len(self.datasets) if weights is None else list(weights)
        if len(weights) != len(self.datasets):
            raise ValueError(f"{len(weights)} weights for {len(self.datasets)} datasets: one each is needed")
        for weight in weights:
            if isinstance(weight, bool) or not isinstance(weight, (int, float)) or not 0 < weight < math.inf:
                raise ValueError(f"a weight must be a number above 0, got {weight!r}; leave a dataset out instead of 0")
        self.weights = weights
        self._sizes = [len(dataset) for dataset in self.datasets]
        if not all(self._sizes):
            raise ValueError(f"dataset {self._sizes.index(0)} of the mixture is empty")
        self._ends = list(itertools.accumulate(self._sizes))

    def __len__(self):
        """Records seen in an epoch."""
        return sum(map(self._per_epoch, range(len(self.datasets))))

    @property
    def total(self):
        """Records of all datasets, each counted once."""
        return self._ends[-1]

    def __getitem__(self, index):
        """The record with a global index, one that `order` gives."""
        source, at = self.locate(index)
        return self.datasets[source][at]

    def locate(self, index):
        """Which record a global index means.

        Args:
            index: at least 0 and below `total`.

        Returns:
            (number of the dataset, index in it).

        Raises:
            IndexError: there is no such record.
        """
        if not 0 <= index < self._ends[-1]:
            raise IndexError(f"record {index} of {self._ends[-1]}")
        source = bisect.bisect_right(self._ends, index)
        return source, index - (self._ends[source] - self._sizes[source])

    def order(self, epoch, seed):
        """Global indices of an epoch, shuffled: the same list in every process and Python version.

        Args:
            epoch: int from 0.
            seed: int.
        """
        if epoch < 0:
            raise ValueError(f"epoch must be 0 or more, got {epoch}")
        indices = []
        for source, size in enumerate(self._sizes):
            count = self._per_epoch(source)
            start, stop = epoch * count, (epoch + 1) * count
            first = self._ends[source] - size
            for turn in range(start // size, -(-stop // size)):
                shuffle = list(range(first, first + size))
                random.Random(f"{seed}/{source}/{turn}").shuffle(shuffle)
                indices += shuffle[max(start - turn * size, 0) : stop - turn * size]
        random.Random(f"{seed}/{epoch}").shuffle(indices)
        return indices

    def _per_epoch(self, source):
        share = fractions.Fraction(str(self.weights[source])) * self._sizes[source]  # exact: 0.1 is a tenth
        return max(1, math.floor(share + fractions.Fraction(1, 2)))


# ---- draws ----


def draw_responses(example, rng, *, count=None, shuffle=True):
    """Which of an example's responses to take, and in which order.

    With a count, two of them have different ranks where the example has any such two and the count allows it: pairs for
    a single-response baseline are always pairs to learn from.

    Args:
        example: `Example`.
        rng: `random.Random`.
        count: how many at most; None for all.
        shuffle: in a random order, or in the given one.

    Returns:
        list of places in `example.responses`.

    Raises:
        ValueError: a count below 1.
    """
    have = len(example.responses)
    if count is not None and count < 1:
        raise ValueError(f"{example.name}: count must be at least 1, got {count}")
    chosen = list(range(have))
    if count is not None and count < have:
        rankings = example.rankings
        pairs = [(i, j) for j in range(have) for i in range(j) if rankings[i] != rankings[j]] if rankings else []
        chosen = list(rng.choice(pairs)) if pairs and count > 1 else []
        rest = [i for i in range(have) if i not in chosen]
        chosen = sorted(chosen + rng.sample(rest, count - len(chosen)))
    if shuffle:
        rng.shuffle(chosen)
    return chosen


def take_responses(example, places):
    """The same example with its responses, and their ranks, at these places, in this order.

    Of fewer responses, ranks are closed up ([1, 3] becomes [1, 2]) and targets made to sum to 1 again.

    Args:
        example: `Example`.
        places: places in `example.responses`, as `draw_responses` gives them.

    Returns:
        `Example`.
    """
    rankings = example.rankings
    if rankings is not None:
        kept = [rankings[i] for i in places]
        if len(places) < len(rankings):
            if min(rankings) < 1:  # targets: ranks begin at 1, and of two targets that sum to 1 one is smaller
                total = sum(kept)
                kept = [value / total if total else 1 / len(kept) for value in kept]
            else:
                levels = sorted(set(kept))
                kept = [levels.index(rank) + 1 for rank in kept]
        rankings = kept
    return dataclasses.replace(example, responses=[example.responses[i] for i in places], rankings=rankings)

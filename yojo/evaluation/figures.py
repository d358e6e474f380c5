"""What a judge reaches on a benchmark: figures with their intervals, over all items, by group, and beside another judge."""

import dataclasses
import math
import typing

import numpy as np

from yojo.evaluation import metrics, statistics
from yojo.evaluation.lengths import length_bias

DRAWS = 2000


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A figure and how sure it is.

    Attributes:
        value: float; NaN where there is none.
        low, high: ends of its 95 % interval, by the bootstrap over questions, or Wilson's where all items are right or all
            wrong; NaN where one question is all there is.
        count: items (pairs, for the pairwise figures; questions, for ACC+) that it is of.
    """

    value: float
    low: float
    high: float
    count: float

    def to_dict(self):
        """The same for JSON: None for NaN."""
        return {name: _or_none(value) for name, value in vars(self).items()}


@dataclasses.dataclass(frozen=True)
class Values:
    """One number for each item, averaged over the orders in which the judge was asked.

    An item that the judge refused is wrong: 0 right of its responses, and of its pairs. It has no tau and no NDCG.

    Attributes:
        top1: [I] float64, right with half credit for ties (`yojo.evaluation.metrics.best_of_n`).
        strict: [I], a tie of right and wrong at the top is wrong.
        tied: [I], share of the orders with such a tie.
        pairs: ([I] right pairs, half for ties; [I] pairs).
        pairs_strict: the same, ties wrong.
        kendall: [I], NaN where there is none.
        ndcg: [I], NaN where there is none.
        averaged: [I], top1 of the scores' means over the orders.
        averaged_pairs: as pairs, of the scores' means.
    """

    top1: np.ndarray
    strict: np.ndarray
    tied: np.ndarray
    pairs: tuple
    pairs_strict: tuple
    kendall: np.ndarray
    ndcg: np.ndarray
    averaged: np.ndarray
    averaged_pairs: tuple

    @classmethod
    def of(cls, judged):
        """From a list of `Judged`."""
        rows = np.array([_of_item(one) for one in judged], dtype=np.float64).reshape(len(judged), 10).T
        top1, strict, tied, half, right, count, kendall, ndcg, averaged, averaged_half = rows
        return cls(top1, strict, tied, (half, count), (right, count), kendall, ndcg, averaged, (averaged_half, count))


def _of_item(one):
    better = np.asarray(one.rankings)[:, None] < np.asarray(one.rankings)[None, :]
    count = float(better.sum())
    if one.scores is None:
        return 0, 0, 0, 0, 0, count, math.nan, math.nan, 0, 0
    top1, strict, tied, half, right, kendall, ndcg = ([] for _ in range(7))
    for scores in one.scores:
        won, equal, _ = metrics.pairs(scores, one.rankings)
        top1.append(metrics.best_of_n(scores, one.rankings))
        strict.append(metrics.top1_strict(scores, one.rankings))
        tied.append(metrics.is_tied(scores, one.rankings))
        half.append(won + equal / 2)
        right.append(won)
        kendall.append(metrics.kendall_tau(scores, one.rankings))
        ndcg.append(metrics.ndcg(scores, one.rankings))
    won, equal, _ = metrics.pairs(one.mean, one.rankings)
    averaged = metrics.best_of_n(one.mean, one.rankings)
    means = [np.mean(values) for values in (top1, strict, tied, half, right)]
    return *means, count, _mean(kendall), _mean(ndcg), averaged, won + equal / 2


def _mean(values):
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a judge reaches on a benchmark.

    Attributes:
        items, questions, refused: numbers of them.
        official: dict name -> float, as the benchmark's own script counts.
        headline: `Estimate` of the official figure that is quoted; its interval where one could be had.
        estimates: dict name -> `Estimate`: top1, top1_strict, tied, macro, pairwise, pairwise_strict, kendall_tau, ndcg, acc_plus,
            averaged (top1 of the mean over the orders), averaged_pairwise.
        groups: dict group -> dict name -> `Estimate`: top1, top1_strict, tied.
        tags: dict tag -> dict value -> the same.
        error: standard error of top1, by questions.
        smallest: smallest difference of top1 from a fixed number that this many questions show, with 80 % power at 5 %; NaN
            where no two questions differ.
        length: `yojo.evaluation.lengths.LengthBias`.
    """

    items: int
    questions: int
    refused: int
    official: typing.Mapping
    headline: Estimate
    estimates: typing.Mapping
    groups: typing.Mapping
    tags: typing.Mapping
    error: float
    smallest: float
    length: object


def figures(judged, benchmark=None, draws=DRAWS, seed=0, intervals=True, values=None):
    """Count what a judge reaches.

    Args:
        judged: list of `Judged`, not empty.
        benchmark: `yojo.evaluation.benchmarks.Benchmark`, whose official figures are counted; or None.
        draws: of the bootstrap.
        seed: of the bootstrap.
        intervals: False: none are counted, and nothing is drawn.
        values: `Values` of them, where they have been counted already.

    Returns:
        `Figures`.

    Raises:
        ArithmeticError: groups times their counts do not add up to the whole.
    """
    values = values or Values.of(judged)
    questions = [one.question for one in judged]
    groups = [one.group for one in judged]

    def interval(numbers, own, by=None):
        if not intervals:
            return math.nan, math.nan
        low, high = statistics.bootstrap(numbers, own, by, draws, seed)
        if low == high and (all_alike := _all_or_none(numbers)) is not None and len(set(own)) > 1:
            # Where no item differs there is nothing to draw from; what is beyond the sample is not known to be alike.
            return statistics.wilson(all_alike * len(set(own)), len(set(own)))
        return low, high

    def estimate(numbers, some=None, by=None):
        pick = slice(None) if some is None else some
        own = [questions[n] for n in (range(len(judged)) if some is None else some)]
        if isinstance(numbers, tuple):
            numbers = tuple(part[pick] for part in numbers)
            known = None
        else:
            numbers = numbers[pick]
            known = ~np.isnan(numbers)
        if known is not None and not known.all():
            own = [question for question, is_known in zip(own, known, strict=True) if is_known]
            numbers = numbers[known]
        found = statistics.table(numbers, ["all"] * len(own) if by is None else by)
        low, high = interval(numbers, own, by) if own else (math.nan, math.nan)
        return Estimate(found.micro if by is None else found.macro, low, high, found.count)

    whole = statistics.table(values.top1, groups)
    statistics.check_parts((whole.micro, whole.count), list(whole.groups.values()))
    estimates = {
        "top1": estimate(values.top1),
        "top1_strict": estimate(values.strict),
        "tied": estimate(values.tied),
        "macro": estimate(values.top1, by=groups),
        "pairwise": estimate(values.pairs),
        "pairwise_strict": estimate(values.pairs_strict),
        "kendall_tau": estimate(values.kendall),
        "ndcg": estimate(values.ndcg),
        "acc_plus": _acc_plus(values.strict, questions, interval),
        "averaged": estimate(values.averaged),
        "averaged_pairwise": estimate(values.averaged_pairs),
    }

    def part(names, name):
        some = [n for n, own in enumerate(names) if own == name]
        pairs = (("top1", values.top1), ("top1_strict", values.strict), ("tied", values.tied))
        return {key: estimate(numbers, some) for key, numbers in pairs}

    tags = {}
    for tag in sorted({tag for one in judged for tag in one.tags}):
        names = [str(one.tags.get(tag, "")) for one in judged]
        tags[tag] = {name: part(names, name) for name in sorted(set(names))}
    error = statistics.standard_error(values.top1, questions)
    official = {} if benchmark is None else dict(benchmark.official(judged))
    return Figures(
        items=len(judged),
        questions=len(set(questions)),
        refused=sum(one.scores is None for one in judged),
        official=official,
        headline=_headline(
            judged, benchmark, official, estimates, min(draws, OFFICIAL_DRAWS) if intervals else 0, seed
        ),
        estimates=estimates,
        groups={name: part(groups, name) for name in sorted(set(groups))},
        tags=tags,
        error=error,
        smallest=statistics.smallest_difference(error) if error > 0 else math.nan,
        length=length_bias(judged),
    )


def _all_or_none(numbers):
    """1 where everything is right, 0 where nothing is, else None."""
    right, count = numbers if isinstance(numbers, tuple) else (numbers, np.ones(len(numbers)))
    return 1 if (right == count).all() else 0 if not right.any() else None


def _acc_plus(strict, questions, interval):
    """Of questions, all of whose items are right in every order."""
    names, right = statistics.all_right(strict, questions)
    low, high = interval(right, names)
    return Estimate(statistics.acc_plus(strict, questions), low, high, float(len(names)))


OFFICIAL_DRAWS = 400  # of the official figure, which is counted anew for each


def _headline(judged, benchmark, official, estimates, draws, seed):
    """The official figure with an interval: that of the mean it is equal to, or by counting it anew for every draw."""
    if benchmark is None:
        return estimates["top1"]
    value = official[benchmark.headline]
    for name in ("top1", "macro", "top1_strict"):
        if abs(estimates[name].value - value) < 1e-12:
            return dataclasses.replace(estimates[name], value=value)

    def counted(some):
        return benchmark.official([judged[n] for n in some])[benchmark.headline]

    questions, groups = [one.question for one in judged], [one.group for one in judged]
    ends = statistics.bootstrap_statistic(counted, questions, groups, draws, seed) if draws else (math.nan, math.nan)
    return Estimate(value, *ends, float(len(judged)))


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two judges on the same items.

    Attributes:
        first, second: their names.
        items: that both have been asked about.
        difference: `yojo.evaluation.statistics.Difference` of top1, first minus second.
        mcnemar: `yojo.evaluation.statistics.McNemar`, over items in the first of their orders, as a single run sees them; a tie
            at the top is wrong.
        agreement: `yojo.evaluation.statistics.Agreement`.
        smallest: smallest difference that these questions show, with 80 % power at 5 %.
    """

    first: str
    second: str
    items: int
    difference: object
    mcnemar: object
    agreement: object
    smallest: float


def compare(first, second, names=("first", "second"), draws=DRAWS, seed=0, values=None):
    """Compare two judges on the items that both have been asked about.

    Args:
        first, second: lists of `Judged` of the same benchmark.
        names: of the judges.
        draws, seed: of the bootstrap.
        values: (`Values` of first, of second), where they have been counted already.

    Returns:
        `Comparison`.

    Raises:
        ValueError: no common item.
    """
    places = {one.number: place for place, one in enumerate(second)}
    common = [(place, places[one.number]) for place, one in enumerate(first) if one.number in places]
    if not common:
        raise ValueError(f"{names[0]} and {names[1]} have no item in common")
    ours, theirs = map(list, zip(*common, strict=True))
    a, b = [first[n] for n in ours], [second[n] for n in theirs]
    own, other = values or (Values.of(first), Values.of(second))
    top1, top1_other = own.top1[ours], other.top1[theirs]
    questions = [one.question for one in a]
    error = statistics.standard_error(top1 - top1_other, questions)
    return Comparison(
        first=names[0],
        second=names[1],
        items=len(common),
        difference=statistics.paired_bootstrap(top1, top1_other, questions, None, draws, seed),
        mcnemar=statistics.mcnemar(_first_right(a), _first_right(b)),
        agreement=statistics.agreement(a, b),
        smallest=statistics.smallest_difference(error) if error > 0 else math.nan,
    )


def _first_right(judged):
    """[I] bool: right in the first order, a tie at the top is wrong."""
    return np.array(
        [one.scores is not None and metrics.top1_strict(one.scores[0], one.rankings) == 1 for one in judged]
    )


def misses(judged, count=20):
    """Items that the judge has most wrong: by how much, on average over the orders, a worse response is above the best one.

    Margins are in units of the judge's own spread, the median over items of the standard deviation of an item's mean scores,
    where it is not 0.

    Args:
        judged: list of `Judged`.
        count: int, of items at most.

    Returns:
        list of (Judged, margin, number of the response that is above), worst first.
    """
    found = []
    for one in judged:
        if one.scores is None or one.best.all():
            continue
        mean, best = one.mean, one.best
        chosen = int(np.flatnonzero(~best)[np.argmax(mean[~best])])
        margin = float(mean[chosen] - mean[best].max())
        if margin > 0:
            found.append((one, margin, chosen))
    spreads = [one.mean.std() for one in judged if one.scores is not None and len(one.rankings) > 1]
    unit = float(np.median(spreads)) if spreads else 0.0
    found.sort(key=lambda miss: (-miss[1], miss[0].number))
    return [(one, margin / unit if unit else margin, chosen) for one, margin, chosen in found[:count]]


def _or_none(value):
    return None if isinstance(value, float) and not math.isfinite(value) else value

"""Means over items and how sure they are: tables, bootstrap by questions, two judges compared.

Values are [I] numbers, one for each item, or a tuple (numerator, denominator) of [I] numbers each, whose sums are divided: right
pairs and pairs, say. Items of one question are drawn together, for they are no separate evidence. The mean is *micro*, over
all items, or where groups are given *macro*: the mean of the groups' means, each group with the same weight.
"""

import dataclasses
import math
import typing
from statistics import NormalDist

import numpy as np

from yojo.evaluation.metrics import kendall_tau, top1_strict

CELLS = 2**21  # numbers of a bootstrap that are held at a time

# ---- tables ----


@dataclasses.dataclass(frozen=True)
class Table:
    """Means of a benchmark and of its groups.

    Attributes:
        micro: mean over items (sum of numerators over sum of denominators); NaN where there are none.
        macro: mean of the means of the groups that have one.
        count: number of items, or the sum of denominators.
        groups: dict name -> (mean, count), sorted by name; (NaN, 0) for a group whose denominators are all 0.
    """

    micro: float
    macro: float
    count: float
    groups: typing.Mapping


def table(values, groups):
    """Means of a benchmark and of its groups.

    Args:
        values: [I] numbers, or a tuple (numerator, denominator) of [I] numbers.
        groups: I strings.

    Returns:
        Table.

    Raises:
        ValueError: values that are not finite, negative denominators, lengths that differ.
    """
    numerator, denominator = _fraction(values)
    names, group = _codes("groups", groups, len(numerator))
    sums, counts = (np.bincount(group, weights, minlength=len(names)) for weights in (numerator, denominator))
    means = np.divide(sums, counts, out=np.full(len(names), np.nan), where=counts > 0)
    known, total = means[counts > 0], denominator.sum()
    return Table(
        micro=float(numerator.sum() / total) if total else math.nan,
        macro=float(known.mean()) if len(known) else math.nan,
        count=float(total),
        groups={name: (float(mean), float(count)) for name, mean, count in zip(names, means, counts, strict=True)},
    )


def check_parts(whole, parts):
    """Check that parts times their counts add up to the whole, as they must if each item is in one part.

    Args:
        whole: (value, count).
        parts: list of (value, count); a part of count 0 may have any value.

    Raises:
        ArithmeticError: they do not; the message has both numbers.
    """
    value, count = whole
    parts = [(part, size) for part, size in parts if size]
    for what, found, expected in (
        ("counts", math.fsum(size for _, size in parts), count),
        ("values times counts", math.fsum(part * size for part, size in parts), value * count if count else 0.0),
    ):
        if not abs(found - expected) <= 1e-9 * max(1.0, abs(expected)):
            raise ArithmeticError(f"{what} of the parts add up to {found}, those of the whole are {expected}")


def acc_plus(values, questions):
    """Share of questions whose items are all right.

    Args:
        values: [I] numbers, 1 = right; less is not.
        questions: I strings.

    Returns:
        float in [0, 1]; NaN where there are no items.

    Raises:
        ValueError: values that are not finite, lengths that differ.
    """
    _, right = all_right(values, questions)
    return float(right.mean()) if len(right) else math.nan


def all_right(values, questions):
    """Which questions have all their items right.

    Args:
        values: [I] numbers, 1 = right; less is not.
        questions: I strings.

    Returns:
        (names, right): Q different questions, sorted, and [Q] float64, 1 where all items are right, else 0.

    Raises:
        ValueError: values that are not finite, lengths that differ.
    """
    values, _ = _fraction(np.asarray(values))
    names, question = _codes("questions", questions, len(values))
    wrong = np.bincount(question, values < 1, minlength=len(names))
    return names, (wrong == 0).astype(np.float64)


# ---- how sure ----


def resamples(values, questions, groups=None, draws=2000, seed=0):
    """The mean of samples in which questions are drawn with replacement, each with all its items.

    With groups, questions are drawn among those that occur in the same groups, so that no group is ever empty; a group of a
    single question is always the same. Items whose denominator is 0 are left out: they are no part of the mean.

    Args:
        values: [I] numbers, or a tuple (numerator, denominator) of [I] numbers.
        questions: I strings.
        groups: I strings for the macro mean, None for the micro mean.
        draws: int.
        seed: int; the same seed gives the same numbers, in whatever order the items come.

    Returns:
        [draws] float64; NaN where there are no items.

    Raises:
        ValueError: values that are not finite, negative denominators, lengths that differ, fewer than one draw.
    """
    strata, groups = _strata(_fraction(values), questions, groups)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    rng, sums = np.random.default_rng(seed), np.zeros((draws, groups, 2))
    for present, clusters in strata:
        flat = clusters.reshape(len(clusters), -1)
        step = max(1, CELLS // flat.size)
        for start in range(0, draws, step):
            size = min(step, draws - start)
            drawn = flat[rng.integers(len(flat), size=(size, len(flat)))].sum(axis=1)
            sums[start : start + size][:, present] += drawn.reshape(size, *clusters.shape[1:])
    return _mean_of_groups(sums) if groups else np.full(draws, np.nan)


def bootstrap(values, questions, groups=None, draws=2000, seed=0, level=0.95):
    """Percentile interval of a mean by the bootstrap over questions (`resamples`).

    Args:
        values: [I] numbers, or a tuple (numerator, denominator) of [I] numbers.
        questions: I strings.
        groups: I strings for the macro mean, None for the micro mean.
        draws: int.
        seed: int.
        level: float in (0, 1).

    Returns:
        (low, high), floats; NaN where questions are drawn from one alone, which tells nothing of others.

    Raises:
        ValueError: as in `resamples`; `level` outside (0, 1).
    """
    strata, _ = _strata(_fraction(values), questions, groups)
    found = resamples(values, questions, groups, draws, seed)
    return _interval(found if any(len(clusters) > 1 for _, clusters in strata) else found * np.nan, level)


def bootstrap_statistic(statistic, questions, groups=None, draws=2000, seed=0, level=0.95):
    """Percentile interval of any statistic of items, by the bootstrap over questions. Slow: it is computed once a draw.

    Args:
        statistic: function of [M] ints, the numbers of items drawn, those drawn twice twice -> float.
        questions: I strings, one for each item.
        groups: I strings, within which questions are drawn, or None.
        draws: int.
        seed: int.
        level: float in (0, 1).

    Returns:
        (low, high), floats; NaN where questions are drawn from one alone.

    Raises:
        ValueError: a statistic that is NaN for some draw; else as in `bootstrap`.
    """
    questions = [str(question) for question in questions]
    strata, _ = _strata((np.ones(len(questions)), np.ones(len(questions))), questions, groups, clusters_alone=True)
    if draws < 1:
        raise ValueError(f"draws must be at least 1, got {draws}")
    of_question = {}
    for number, question in enumerate(questions):
        of_question.setdefault(question, []).append(number)
    members = [[np.array(of_question[name]) for name in names] for names in strata]
    rng, found = np.random.default_rng(seed), np.full(draws, np.nan)
    if not any(len(clusters) > 1 for clusters in members):
        return _interval(found, level)
    for draw in range(draws):
        drawn = [clusters[n] for clusters in members for n in rng.integers(len(clusters), size=len(clusters))]
        found[draw] = statistic(np.concatenate(drawn))
    if np.isnan(found).any():
        raise ValueError(
            f"statistic is NaN for {np.isnan(found).sum()} of {draws} draws: it must be defined for any sample"
        )
    return _interval(found, level)


def standard_error(values, questions, groups=None):
    """Standard error of a mean whose items come in questions (the linearised, cluster-robust one).

    With D the sum of denominators, r the mean, and for question q the residual u_q = (its numerators - r its denominators) / D
    (with groups: the mean over groups of that), questions of the same groups in stratum s: the root of the sum over s of
    Q_s / (Q_s - 1) times the sum over its questions of (u_q - mean of u in s)^2. A stratum of one question adds nothing.

    Args:
        values: [I] numbers, or a tuple (numerator, denominator) of [I] numbers. For two judges on the same items: the
            differences.
        questions: I strings.
        groups: I strings for the macro mean, None for the micro mean.

    Returns:
        float >= 0; NaN where no stratum has two questions.

    Raises:
        ValueError: as in `resamples`.
    """
    strata, groups = _strata(_fraction(values), questions, groups)
    if not any(len(clusters) > 1 for _, clusters in strata):
        return math.nan
    totals = np.zeros((groups, 2))
    for present, clusters in strata:
        totals[present] += clusters.sum(axis=0)
    rates, variance = totals[:, 0] / totals[:, 1], 0.0
    for present, clusters in strata:
        residual = (clusters[:, :, 0] - rates[present] * clusters[:, :, 1]) / totals[present, 1]
        residual = residual.sum(axis=1) / groups
        if len(residual) > 1:
            variance += len(residual) * residual.var(ddof=1)
    return math.sqrt(variance)


def smallest_difference(se, power=0.8, alpha=0.05):
    """Smallest difference from a fixed number that a sample shows with probability `power`.

    (z(1 - alpha / 2) + z(power)) se, of the two-sided test that the estimate is normal. For two judges on the same items take
    the standard error of their differences, `standard_error(a - b, ...)`.

    Args:
        se: float, standard error.
        power: float in (0, 1).
        alpha: float in (0, 1), the level of the test.

    Returns:
        float, in units of `se`.

    Raises:
        ValueError: an argument out of its range.
    """
    for name, value in (("power", power), ("alpha", alpha)):
        _check_share(name, value)
    if se < 0:
        raise ValueError(f"se must be a standard error, 0 or more, got {se}")
    normal = NormalDist()
    return (normal.inv_cdf(1 - alpha / 2) + normal.inv_cdf(power)) * se


def wilson(right, count, level=0.95):
    """Wilson's interval of a share.

    Args:
        right: float in [0, count].
        count: float.
        level: float in (0, 1).

    Returns:
        (low, high), floats; (0, 1) where `count` is 0.

    Raises:
        ValueError: `right` outside [0, count], `level` outside (0, 1).
    """
    _check_share("level", level)
    if not 0 <= right <= count * (1 + 1e-12):
        raise ValueError(f"right must be between 0 and count={count}, got {right}")
    if not count:
        return 0.0, 1.0
    count, share = float(count), min(1.0, float(right / count))
    z2 = NormalDist().inv_cdf(0.5 + level / 2) ** 2
    middle = share + z2 / (2 * count)
    half = math.sqrt(z2 * (share * (1 - share) / count + z2 / (4 * count * count)))
    scale = 1 + z2 / count
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


# ---- two judges ----


@dataclasses.dataclass(frozen=True)
class McNemar:
    """Items on which two judges differ.

    Attributes:
        only_a: items that only the first judge has right.
        only_b: items that only the second judge has right.
        p: exact two-sided p of the hypothesis that either is as likely.
    """

    only_a: int
    only_b: int
    p: float


def mcnemar(right_a, right_b):
    """McNemar's exact test: of the items on which two judges differ, is either right more often than by chance?

    p = min(1, 2 P(X <= min(only_a, only_b))) for X binomial of only_a + only_b and 1/2. Items of one question count as
    separate evidence; `paired_bootstrap` counts questions.

    Args:
        right_a, right_b: [I] bools, whether each judge has the item right.

    Returns:
        McNemar.

    Raises:
        TypeError: what is no bools; half a point for a tie is no right or wrong.
        ValueError: lengths that differ.
    """
    right = []
    for name, given in (("right_a", right_a), ("right_b", right_b)):
        given = np.asarray(given)
        if given.dtype != bool and given.size:
            raise TypeError(f"{name} must be bools, got {given.dtype}: say what a tie is, with `== 1` for one")
        right.append(given.astype(bool))
    first, second = right
    if first.shape != second.shape or first.ndim != 1:
        raise ValueError(f"right_a and right_b must be of the same items, got {first.shape} and {second.shape}")
    only_a, only_b = int((first & ~second).sum()), int((second & ~first).sum())
    count = only_a + only_b
    term = tail = 1
    for k in range(min(only_a, only_b)):
        term = term * (count - k) // (k + 1)
        tail += term
    return McNemar(only_a, only_b, min(1.0, 2 * tail / 2**count))


@dataclasses.dataclass(frozen=True)
class Difference:
    """How much higher the first judge's mean is.

    Attributes:
        value: first minus second.
        low: lower end of its interval.
        high: upper end.
        p: two-sided p of the hypothesis that there is no difference.
    """

    value: float
    low: float
    high: float
    p: float


def paired_bootstrap(a, b, questions, groups=None, draws=2000, seed=0, level=0.95):
    """Difference of two judges' means on the same items, with the interval of the bootstrap over questions.

    With d the differences of the draws (`resamples`): p = min(1, 2 min(1 + #(d <= 0), 1 + #(d >= 0)) / (draws + 1)).

    Args:
        a, b: [I] numbers, or tuples (numerator, denominator) with the same denominators.
        questions: I strings.
        groups: I strings for macro means, None for micro means.
        draws: int.
        seed: int.
        level: float in (0, 1).

    Returns:
        Difference; all NaN where there are no items, its interval and p NaN as in `bootstrap`.

    Raises:
        ValueError: lengths or denominators that differ; else as in `bootstrap`.
    """
    (first, weights), (second, others) = _fraction(a), _fraction(b)
    if first.shape != second.shape or not np.array_equal(weights, others):
        raise ValueError(
            "a and b must be of the same items with the same denominators: compare what both judges scored"
        )
    values = first - second, weights
    found = resamples(values, questions, groups, draws, seed)
    low, high = bootstrap(values, questions, groups, draws, seed, level)
    means = table(values, ["all"] * len(first) if groups is None else groups)
    rounded = np.round(found, 12)  # sums that cancel leave some 1e-17
    tail = min((rounded <= 0).sum(), (rounded >= 0).sum())
    p = math.nan if math.isnan(low) else min(1.0, float(2 * (1 + tail) / (draws + 1)))
    return Difference(means.micro if groups is None else means.macro, low, high, p)


@dataclasses.dataclass(frozen=True)
class Agreement:
    """How far two judges say the same.

    Attributes:
        items: number of items compared.
        left_out: items that one of them refused, or with one response.
        same_choice: share of items with the same top choice. Where scores tie at the top, one lot decides for both: sets A and
            B of highest scores agree with probability #(A and B) / #(A or B).
        kappa: Cohen's kappa of being right: (p - e) / (1 - e) with p the share of items that both have right or both wrong
            and e that expected of independent judges with their shares. A tie at the top of right and wrong is wrong. It is
            over right and wrong, for two responses too, because the number of a response means nothing from item to item.
        kendall: mean over the items that have one of Kendall's tau-b between their scores.
    """

    items: int
    left_out: int
    same_choice: float
    kappa: float
    kendall: float


def agreement(a, b):
    """How far two judges say the same of the same items, by their scores averaged over orders.

    Args:
        a, b: lists of `Judged` of the same items.

    Returns:
        Agreement; NaN where nothing can be computed.

    Raises:
        ValueError: lists of different items.
    """
    a, b = list(a), list(b)
    names = [[(item.number, item.id, len(item.rankings)) for item in items] for items in (a, b)]
    if names[0] != names[1]:
        raise ValueError("a and b must be of the same items in the same sequence: compare what both judges were asked")
    pairs = [
        (one, one.mean, other.mean)
        for one, other in zip(a, b, strict=True)
        if one.scores is not None and other.scores is not None and len(one.rankings) > 1
    ]
    same, right, taus = [], [], []
    for item, first, second in pairs:
        tops = first == first.max(), second == second.max()
        same.append((tops[0] & tops[1]).sum() / (tops[0] | tops[1]).sum())
        right.append([top1_strict(scores, item.rankings) for scores in (first, second)])
        taus.append(kendall_tau(first, -second))
    return Agreement(len(pairs), len(a) - len(pairs), _mean(same), _kappa(right), _mean(taus))


def _kappa(right):
    if not right:
        return math.nan
    first, second = np.transpose(right)
    by_chance = first.mean() * second.mean() + (1 - first.mean()) * (1 - second.mean())
    return float(((first == second).mean() - by_chance) / (1 - by_chance)) if by_chance < 1 else math.nan


# ---- shared ----


def _fraction(values):
    """(numerator, denominator), [I] float64 each."""
    pair = isinstance(values, tuple) and len(values) == 2 and np.ndim(values[0]) == 1
    numerator = np.asarray(values[0] if pair else values, dtype=np.float64)
    denominator = np.asarray(values[1], dtype=np.float64) if pair else np.ones(numerator.shape)
    if numerator.ndim != 1 or numerator.shape != denominator.shape:
        raise ValueError(
            "values must be [I] numbers or a tuple (numerator, denominator) of such, got shapes "
            f"{numerator.shape} and {denominator.shape}"
        )
    wrong = np.flatnonzero(~(np.isfinite(numerator) & np.isfinite(denominator) & (denominator >= 0)))
    if len(wrong):
        raise ValueError(
            f"values must be finite and denominators 0 or more, got {numerator[wrong[0]]} over {denominator[wrong[0]]} at "
            f"{wrong[0]}: leave out items that have no value"
        )
    return numerator, denominator


def _codes(name, names, count):
    """(sorted different names, [I] ints: which of them)."""
    names = [str(one) for one in names]
    if len(names) != count:
        raise ValueError(f"{name} must have one for each of the {count} items, got {len(names)}")
    different = sorted(set(names))
    number = {one: at for at, one in enumerate(different)}
    return different, np.array([number[one] for one in names], dtype=np.int64)


def _strata(fraction, questions, groups, clusters_alone=False):
    """Sums of each question, by the sets of groups that questions occur in.

    Returns:
        (list of (present [P] ints: numbers of the groups, sums [Q, P, 2] of questions by group), number of groups); nothing
        in it depends on the order of items. With `clusters_alone` the list holds lists of the questions' names instead.
    """
    numerator, denominator = fraction
    question_names, question = _codes("questions", questions, len(numerator))
    _, group = _codes("groups", ["all"] * len(numerator) if groups is None else groups, len(numerator))
    kept = np.flatnonzero(denominator > 0)
    kept = kept[np.lexsort((numerator[kept], denominator[kept], group[kept], question[kept]))]
    present_groups, group = np.unique(group[kept], return_inverse=True)
    numerator, denominator, question = numerator[kept], denominator[kept], question[kept]
    members = {}
    for one, of in sorted(set(zip(question.tolist(), group.tolist(), strict=True))):
        members.setdefault(one, []).append(of)
    strata = {}
    for one, of in members.items():
        strata.setdefault(tuple(of), []).append(one)
    if clusters_alone:
        return [[question_names[one] for one in strata[of]] for of in sorted(strata)], len(present_groups)
    found = []
    for of in sorted(strata):
        row, column = np.full(len(question_names), -1), np.full(len(present_groups), -1)
        row[strata[of]], column[list(of)] = np.arange(len(strata[of])), np.arange(len(of))
        inside = row[question] >= 0
        sums = np.zeros((len(strata[of]), len(of), 2))
        where = row[question[inside]], column[group[inside]]
        np.add.at(sums, where, np.stack([numerator[inside], denominator[inside]], axis=1))
        found.append((np.array(of), sums))
    return found, len(present_groups)


def _mean_of_groups(sums):
    return (sums[..., 0] / sums[..., 1]).mean(axis=-1)


def _interval(found, level):
    _check_share("level", level)
    low, high = np.quantile(found, [0.5 - level / 2, 0.5 + level / 2])
    return float(low), float(high)


def _check_share(name, value):
    if not 0 < value < 1:
        raise ValueError(f"{name} must be between 0 and 1, got {value}")


def _mean(values):
    values = [value for value in values if not math.isnan(value)]
    return float(np.mean(values)) if values else math.nan

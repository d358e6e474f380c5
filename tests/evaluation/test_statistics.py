"""Means and how sure they are, against every resample there is, against scipy, and by hand."""

import dataclasses
import itertools
import math
import subprocess
import sys
import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_judged import judged, random_items, responses_renamed
from scipy.stats import binomtest, chisquare, kendalltau, norm
from sklearn.metrics import cohen_kappa_score

from yojo.evaluation import statistics as module
from yojo.evaluation.lengths import length_bias
from yojo.evaluation.metrics import best_of_n, top1_strict
from yojo.evaluation.statistics import (
    CELLS,
    acc_plus,
    agreement,
    bootstrap,
    bootstrap_statistic,
    check_parts,
    mcnemar,
    paired_bootstrap,
    resamples,
    smallest_difference,
    standard_error,
    table,
    wilson,
)

# ---- tables ----


def test_table_by_hand():
    made = table([1, 0, 0.5, 1], ["b", "a", "b", "b"])
    assert made.micro == 2.5 / 4 and made.macro == pytest.approx(2.5 / 3 / 2) and made.count == 4
    assert list(made.groups.items()) == [("a", (0, 1)), ("b", (pytest.approx(2.5 / 3), 3))]
    # Right pairs of all pairs; a group without pairs has no mean, and is no part of the macro mean.
    made = table(([1, 3, 0, 0], [2, 3, 1, 0]), ["a", "a", "b", "c"])
    assert (made.micro, made.macro, made.count) == (4 / 6, 0.4, 6)
    assert made.groups["a"] == (0.8, 5) and made.groups["b"] == (0, 1)
    assert math.isnan(made.groups["c"][0]) and made.groups["c"][1] == 0
    empty = table([], [])
    assert math.isnan(empty.micro) and math.isnan(empty.macro) and empty.count == 0 and empty.groups == {}


def test_parts_add_up():
    made = table([1, 0, 0.5, 1, 0.1], ["b", "a", "b", "b", "c"])
    check_parts((made.micro, made.count), made.groups.values())
    check_parts((math.nan, 0), [(math.nan, 0)])
    check_parts((0.5, 2), iter([(0, 1), (1, 1), (math.nan, 0)]))
    with pytest.raises(ArithmeticError, match=r"counts of the parts add up to 3.0, those of the whole are 2"):
        check_parts((0.5, 2), [(0, 1), (1, 2)])
    with pytest.raises(ArithmeticError, match=r"values times counts of the parts add up to 1.0, .* whole are 1.2"):
        check_parts((0.6, 2), [(0, 1), (1, 1)])
    with pytest.raises(ArithmeticError, match="nan"):
        check_parts((0.5, 2), [(math.nan, 1), (1, 1)])


def test_acc_plus():
    assert acc_plus([1, 1, 0, 1, 0.5], ["a", "b", "a", "b", "c"]) == pytest.approx(1 / 3)
    assert acc_plus([True, True, False], ["a", "b", "b"]) == 0.5
    assert math.isnan(acc_plus([], []))


# ---- bootstrap ----

NUMERATOR = [1.0, 0, 2, 1, 3, 0, 1]
DENOMINATOR = [1.0, 2, 2, 1, 4, 1, 0]
QUESTIONS = ["b", "a", "b", "c", "c", "d", "e"]  # e has nothing to count
GROUPS = ["x", "x", "x", "y", "y", "y", "y"]


def every_resample(questions, groups=None):
    """Counter: mean -> in how many of all equally likely resamples, drawing within each group's questions."""
    found = Counter()
    strata = [questions] if groups is None else [
        [q for q in questions if GROUPS[QUESTIONS.index(q)] == group] for group in groups
    ]  # fmt: skip
    for drawn in itertools.product(*(itertools.product(stratum, repeat=len(stratum)) for stratum in strata)):
        rates = []
        for stratum in drawn:
            items = [n for question in stratum for n, other in enumerate(QUESTIONS) if other == question]
            rates.append(sum(NUMERATOR[n] for n in items) / sum(DENOMINATOR[n] for n in items))
        found[round(float(np.mean(rates)), 9)] += 1
    return found


@pytest.mark.parametrize("groups, expected", [(None, every_resample("abcd")), (GROUPS, every_resample("abcd", "xy"))])
def test_draws_are_all_resamples_equally_often(groups, expected):
    draws = 20000
    found = Counter(np.round(resamples((NUMERATOR, DENOMINATOR), QUESTIONS, groups, draws, seed=1), 9).tolist())
    assert set(found) == set(expected)
    total = sum(expected.values())
    assert total == (256 if groups is None else 16)
    means = sorted(expected)
    assert chisquare([found[m] for m in means], [expected[m] * draws / total for m in means]).pvalue > 0.001
    # The interval's ends are the quantiles of all resamples, up to what is left of chance at so many draws.
    low, high = bootstrap((NUMERATOR, DENOMINATOR), QUESTIONS, groups, draws, seed=1)
    everything = np.repeat(means, [expected[mean] for mean in means])
    for end, share in ((low, 0.025), (high, 0.975)):
        error = 4 * math.sqrt(share * (1 - share) / draws)
        nearest = np.quantile(everything, [share - error, share + error], method="inverted_cdf")
        assert nearest[0] - 1e-9 <= end <= nearest[1] + 1e-9


def test_a_statistic_is_drawn_as_a_mean_is():
    numerator, denominator = np.array(NUMERATOR), np.array(DENOMINATOR)
    seen = Counter()

    def mean(items):
        seen[tuple(sorted(items))] += 1
        return numerator[items].sum() / denominator[items].sum()

    questions, draws = QUESTIONS[:6], 4000
    low, high = bootstrap_statistic(mean, questions, draws=draws, seed=3)
    assert (low, high) == pytest.approx(bootstrap((NUMERATOR[:6], DENOMINATOR[:6]), questions, draws=20000), abs=0.02)
    assert sum(seen.values()) == draws and len(seen) == 35  # sets of 4 of 4, with repetition
    assert seen[1, 1, 1, 1] / draws == pytest.approx(1 / 256, abs=4 * math.sqrt(1 / 256 / draws))
    low, high = bootstrap_statistic(lambda items: (items < 3).mean(), questions, GROUPS[:6], 500)
    assert 0.3 < low < high < 0.8
    with pytest.raises(ValueError, match="statistic is NaN for 50 of 50 draws"):
        bootstrap_statistic(lambda items: math.nan, questions, draws=50)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), grouped=st.booleans())
def test_the_sequence_of_items_does_not_count(seed, grouped):
    rng = np.random.default_rng(seed)
    values, weights = rng.random(40), rng.integers(0, 4, 40).astype(float)
    questions = [f"q{n}" for n in rng.integers(0, 15, 40)]
    groups = [f"g{n}" for n in rng.integers(0, 3, 40)] if grouped else None  # a question may be of several groups
    for given_values in (values, (values * weights, weights)):
        expected = resamples(given_values, questions, groups, 100, seed)
        assert np.isfinite(expected).all()
        assert np.array_equal(expected, resamples(given_values, questions, groups, 100, seed))
        assert not np.array_equal(expected, resamples(given_values, questions, groups, 100, seed + 1))
        new = rng.permutation(40)
        moved = tuple(part[new] for part in given_values) if isinstance(given_values, tuple) else given_values[new]
        others = [questions[n] for n in new], groups and [groups[n] for n in new]
        assert np.array_equal(expected, resamples(moved, *others, 100, seed))
        assert standard_error(moved, *others) == pytest.approx(standard_error(given_values, questions, groups))


def test_a_question_of_several_groups_is_drawn_once():
    # Two groups that are the same: the macro mean is that of one of them, whatever is drawn.
    values, questions = [1.0, 0, 0.5, 0.2], list("abcd")
    both = resamples(values * 2, questions * 2, ["x"] * 4 + ["y"] * 4, 500)
    assert np.allclose(both, resamples(values, questions, ["x"] * 4, 500), atol=1e-15)


def test_many_items_are_fast_and_chunks_do_not_count(monkeypatch):
    rng = np.random.default_rng(0)
    values, questions = rng.random(5000), [f"q{n}" for n in range(5000)]
    start = time.process_time()
    low, high = bootstrap(values, questions)
    assert time.process_time() - start < 1
    assert high - low == pytest.approx(2 * 1.96 * values.std() / math.sqrt(5000), rel=0.1)
    assert CELLS == 2**21  # of 8 bytes
    found = resamples(values[:50], questions[:50], draws=300)
    monkeypatch.setattr(module, "CELLS", 400)
    assert np.array_equal(found, resamples(values[:50], questions[:50], draws=300))


def test_the_interval_holds_the_truth():
    rng, held = np.random.default_rng(0), 0
    for _ in range(300):
        shift = rng.normal(0, 0.3, 80)  # items of a question are alike
        questions = np.repeat(np.arange(80), 3)
        values = shift[questions] + rng.normal(0, 0.1, 240)
        low, high = bootstrap(values, questions, draws=400)
        held += low <= 0 <= high
        assert standard_error(values, questions) == pytest.approx((high - low) / 3.92, rel=0.25)
    assert 0.9 < held / 300 <= 0.985


def test_one_question_tells_nothing_of_others():
    assert all(map(math.isnan, bootstrap([1, 0], ["a", "a"])))
    assert all(map(math.isnan, bootstrap([1, 0], ["a", "b"], ["x", "y"])))
    assert all(map(math.isnan, bootstrap([], [])))
    assert all(map(math.isnan, bootstrap(([0.0], [0.0]), ["a"])))
    assert all(map(math.isnan, bootstrap_statistic(len, ["a", "a"])))
    assert math.isnan(standard_error([1, 0], ["a", "a"])) and math.isnan(standard_error([], []))
    # A group of one question stands still beside one of two.
    assert set(resamples([1, 1, 0], ["a", "b", "c"], ["x", "y", "y"], 200)) == {0.5, 0.75, 1}


# ---- standard errors ----


def test_standard_error_by_hand():
    values = [1.0, 0, 1, 1, 0]
    assert standard_error(values, list("abcde")) == pytest.approx(np.std(values, ddof=1) / math.sqrt(5))
    # Questions a (1, 1), b (0): residuals 2/3 and -2/3 of three items, 2 questions.
    assert standard_error([1, 1, 0], list("aab")) == pytest.approx(math.sqrt(2 * 2 * (2 / 9) ** 2))
    # Two groups are independent: half of each.
    one, other = [1.0, 0, 0, 0.5], [0.3, 0.1, 0.9]
    expected = math.sqrt(np.var(one, ddof=1) / 4 + np.var(other, ddof=1) / 3) / 2
    assert standard_error(one + other, list("abcdefg"), list("xxxxyyy")) == pytest.approx(expected)
    # A ratio of sums, by its linearisation.
    top, below = np.array([1.0, 3, 2, 0]), np.array([2.0, 3, 5, 1])
    residual = (top - below * 6 / 11) / 11
    assert standard_error((top, below), list("abcd")) == pytest.approx(math.sqrt(4 / 3 * (residual**2).sum()))


def test_smallest_difference():
    assert smallest_difference(0.01) == pytest.approx(0.01 * (norm.ppf(0.975) + norm.ppf(0.8)))
    assert smallest_difference(0.01) == pytest.approx(0.028016, abs=1e-6)
    se, rng = 0.02, np.random.default_rng(0)  # the power is as promised
    estimates = rng.normal(smallest_difference(se, 0.9, 0.01), se, 20000)
    assert (abs(estimates) > norm.ppf(0.995) * se).mean() == pytest.approx(0.9, abs=0.01)
    for arguments in ({"power": 1}, {"alpha": 0}):
        with pytest.raises(ValueError, match="must be between 0 and 1"):
            smallest_difference(0.1, **arguments)
    with pytest.raises(ValueError, match="se must be"):
        smallest_difference(-1)


@pytest.mark.parametrize("right, count", [(0, 10), (3, 10), (10, 10), (499, 1000), (1, 1)])
def test_wilson(right, count):
    for level in (0.9, 0.95):
        expected = binomtest(right, count).proportion_ci(level, "wilson")
        assert wilson(right, count, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_wilson_of_nothing():
    assert wilson(0, 0) == (0, 1)
    with pytest.raises(ValueError, match="right must be between 0 and count=2, got 3"):
        wilson(3, 2)


# ---- two judges ----


@pytest.mark.parametrize("only_a, only_b", [(0, 0), (1, 0), (5, 5), (2, 9), (40, 61), (0, 20), (900, 700)])
def test_mcnemar_is_the_binomial_test(only_a, only_b):
    right_a = [True] * only_a + [False] * only_b + [True, False, True]
    right_b = [False] * only_a + [True] * only_b + [True, False, True]
    found = mcnemar(right_a, np.array(right_b))
    assert (found.only_a, found.only_b) == (only_a, only_b)
    count = only_a + only_b
    assert found.p == pytest.approx(binomtest(only_a, count).pvalue if count else 1, rel=1e-9)
    assert mcnemar(right_b, right_a).p == found.p
    if 0 < count < 12:  # every way in which coins may fall, as uneven or more
        uneven = [
            abs(2 * sum(coins) - count) >= abs(only_a - only_b) for coins in itertools.product((0, 1), repeat=count)
        ]
        assert found.p == pytest.approx(np.mean(uneven))


def test_mcnemar_wants_right_or_wrong():
    with pytest.raises(TypeError, match="right_b must be bools, got float64: say what a tie is"):
        mcnemar([True], [0.5])
    with pytest.raises(ValueError, match="of the same items"):
        mcnemar([True], [True, False])
    assert mcnemar([], []).p == 1


def test_paired_bootstrap():
    rng = np.random.default_rng(0)
    ability = rng.random(400)
    a, b = (ability + rng.normal(0, 0.05, 400) for _ in range(2))
    questions = [f"q{n // 2}" for n in range(400)]
    found = paired_bootstrap(a + 0.01, b, questions, seed=1)
    assert found.value == pytest.approx(a.mean() + 0.01 - b.mean())
    se = standard_error(a - b, questions)
    assert (found.low, found.high) == pytest.approx((found.value - 1.96 * se, found.value + 1.96 * se), abs=se / 4)
    assert found.p == pytest.approx(2 * norm.sf(abs(found.value) / se), abs=0.03)
    alone = bootstrap(a, questions)
    assert found.high - found.low < (alone[1] - alone[0]) / 3  # what both judges share is no uncertainty
    back = paired_bootstrap(b, a + 0.01, questions, seed=1)
    assert (back.value, back.low, back.high, back.p) == pytest.approx((-found.value, -found.high, -found.low, found.p))
    assert dataclasses.astuple(paired_bootstrap(a, a, questions)) == (0, 0, 0, 1)
    assert paired_bootstrap(a + 1, a, questions, draws=999).p == pytest.approx(2 / 1000)


def test_paired_bootstrap_of_groups_and_pairs():
    a, b = ([2.0, 1, 0, 3], [2.0, 2, 1, 3]), ([1.0, 1, 1, 0], [2.0, 2, 1, 3])
    found = paired_bootstrap(a, b, list("abcd"), list("xxyy"), draws=500)
    assert found.value == pytest.approx(((3 - 2) / 4 + (3 - 1) / 4) / 2)
    assert found.value == pytest.approx(table(a, list("xxyy")).macro - table(b, list("xxyy")).macro)
    with pytest.raises(ValueError, match="with the same denominators"):
        paired_bootstrap(a, (b[0], [2.0, 2, 1, 4]), list("abcd"))
    with pytest.raises(ValueError, match="of the same items"):
        paired_bootstrap([1, 2], [1], list("ab"))
    one = paired_bootstrap([1.0], [0.0], ["a"])
    assert one.value == 1 and math.isnan(one.low) and math.isnan(one.p)


def test_agreement_by_hand():
    a = [judged([[2, 1]]), judged([[1, 1, 0]]), judged([[1, 2]]), judged([[1]]), judged(None, rankings=[1, 2])]
    b = [judged([[5, 1]]), judged([[0, 3, 0]]), judged([[2, 1]]), judged([[1]]), judged([[1, 2]])]
    found = agreement(a, b)
    assert (found.items, found.left_out) == (3, 2)
    assert found.same_choice == pytest.approx((1 + 0.5 + 0) / 3)
    # a is right, wrong by its tie, wrong; b right, wrong, right: 2 of 3 alike, 1/3 2/3 + 2/3 1/3 by chance.
    assert found.kappa == pytest.approx((2 / 3 - 4 / 9) / (1 - 4 / 9))
    assert found.kendall == pytest.approx(np.mean([1, kendalltau([1, 1, 0], [0, 3, 0]).statistic, -1]))
    with pytest.raises(ValueError, match="same items in the same sequence"):
        agreement(a, b[1:])


def test_agreement_against_sklearn():
    items, others = random_items(1, 80), random_items(1, 80)
    rng = np.random.default_rng(0)
    others = [dataclasses.replace(item, scores=item.scores + rng.normal(0, 1, item.scores.shape)) for item in others]
    found = agreement(items, others)
    right = [[top1_strict(item.mean, item.rankings) for item in judge] for judge in (items, others)]
    assert found.kappa == pytest.approx(cohen_kappa_score(*right)) and 0.1 < found.kappa < 0.9
    back = agreement(others, items)
    assert dataclasses.astuple(back) == pytest.approx(dataclasses.astuple(found))
    own = agreement(items, items)
    assert (own.same_choice, own.kappa, own.kendall) == pytest.approx((1, 1, 1))
    # Responses may be in another order of the record; scores may be scaled.
    seeds = range(80)
    renamed = [
        [responses_renamed(item, np.random.default_rng(seed)) for item, seed in zip(judge, seeds, strict=True)]
        for judge in ([dataclasses.replace(item, scores=item.scores * 8) for item in items], others)
    ]
    assert dataclasses.astuple(agreement(*renamed)) == pytest.approx(dataclasses.astuple(found))
    nothing = agreement([], [])
    assert nothing.items == 0 and math.isnan(nothing.kappa) and math.isnan(nothing.same_choice)


# ---- length ----


def test_length_bias_by_hand():
    items = [
        judged([[3, 2, 1]], rankings=[1, 2, 2], lengths=[10, 20, 10]),  # decided: 0-1 (1 longer), 0-2 (equal)
        judged([[1, 1]], rankings=[2, 1], lengths=[5, 9]),  # a tie
        judged([[1, 4]], rankings=[2, 1], lengths=[5, 9]),  # the longer one, rightly
        judged([[1, 4]], rankings=[1, 1], lengths=[5, 9]),  # not decided
        judged([[1]]),
        judged(None, rankings=[1, 2]),
    ]
    found = length_bias(items)
    assert (found.items, found.left_out, found.pairs, found.equal) == (4, 2, 3, 1)
    assert found.judge == pytest.approx((0 + 0.5 + 1) / 3) and found.labels == pytest.approx(2 / 3)
    first = kendalltau([3, 2, 1], [10, 20, 10]).statistic
    assert found.kendall == pytest.approx((first + 1 + 1) / 3)
    assert math.isnan(length_bias([]).judge)


def test_length_bias_of_judges_that_count_characters():
    rng = np.random.default_rng(0)
    items = random_items(2, 60)
    for sign in (1, -1):
        longest = [
            dataclasses.replace(item, scores=sign * np.array([item.lengths] * len(item.orders))) for item in items
        ]
        found = length_bias(longest)
        assert found.kendall == pytest.approx(sign) and found.judge == (sign + 1) / 2 and 0.3 < found.labels < 0.7
    found = length_bias(items)
    renamed = [responses_renamed(dataclasses.replace(item, scores=item.scores * 4), rng) for item in items]
    assert dataclasses.astuple(length_bias(renamed)) == pytest.approx(dataclasses.astuple(found))
    labels = [dataclasses.replace(item, scores=-np.array([item.rankings] * len(item.orders))) for item in items]
    assert length_bias(labels).judge == length_bias(labels).labels
    assert np.mean([best_of_n(item.mean, item.rankings) for item in labels]) == 1


# ---- what is refused ----


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: table([1, math.nan], ["a", "a"]), "values must be finite .* got nan over 1.0 at 1: leave out"),
        (lambda: table(([1.0], [-1.0]), ["a"]), "denominators 0 or more, got 1.0 over -1.0 at 0"),
        (lambda: table([[1, 0]], ["a"]), r"got shapes \(1, 2\)"),
        (lambda: table(([1.0], [1.0, 2.0]), ["a"]), r"got shapes \(1,\) and \(2,\)"),
        (lambda: table([1, 0], ["a"]), "groups must have one for each of the 2 items, got 1"),
        (lambda: bootstrap([1, 0], ["a"]), "questions must have one for each of the 2 items, got 1"),
        (lambda: bootstrap([1, 0], ["a", "b"], draws=0), "draws must be at least 1, got 0"),
        (lambda: bootstrap([1, 0], ["a", "b"], level=95), "level must be between 0 and 1, got 95"),
        (lambda: bootstrap_statistic(len, ["a", "b"], draws=0), "draws must be at least 1, got 0"),
        (lambda: acc_plus([1, math.inf], ["a", "b"]), "values must be finite"),
    ],
)
def test_what_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_importing_loads_nothing_heavy():
    code = f"import sys, {module.__name__}; print([n for n in ('torch', 'scipy', 'matplotlib') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

"""Balanced orders by counting, and measures of order bias against enumeration and cases worked out by hand."""

import dataclasses
import itertools
import math
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from random_judged import judged, orders_shuffled, random_items, responses_renamed
from scipy.stats import kendalltau

from yojo.evaluation import orders as module
from yojo.evaluation.orders import (
    any_flip,
    balanced_orders,
    cost,
    exposure,
    first_place_agreement,
    flip_rate,
    global_inconsistency,
    kendall_between,
    max_change,
    pairwise_instability,
    possible,
    score_by_place,
    spread,
    spread_between,
)

RANK_MEASURES = (
    flip_rate, any_flip, first_place_agreement, kendall_between, pairwise_instability, global_inconsistency
)  # fmt: skip
MEASURES = (*RANK_MEASURES, spread, spread_between, max_change)


# ---- balanced orders ----


def stands(orders):
    """Counter: (response, place) -> in how many orders it stands there."""
    return Counter((response, place) for order in orders for place, response in enumerate(order))


@settings(max_examples=60, deadline=None)
@given(count=st.integers(1, 6), data=st.data(), seed=st.integers(-(2**70), 2**70), start=st.integers(0, 10**6))
def test_orders_are_balanced(count, data, seed, start):
    number = data.draw(st.integers(1, min(possible(count), 30)))
    run = count // math.gcd(count, number)
    items = [balanced_orders(count, number, seed, start + item) for item in range(run)]
    for orders in items:
        assert len(set(orders)) == len(orders) == number
        assert all(sorted(order) == list(range(count)) for order in orders)
        found = [stands(orders)[response, place] for response in range(count) for place in range(count)]
        assert set(found) <= {number // count, -(-number // count)}
    together = stands(itertools.chain(*items))
    assert len(together) == count * count and set(together.values()) == {run * number // count}


@pytest.mark.parametrize("count", [2, 4, 6, 8])
def test_of_two_responses_either_stands_first_equally_often(count):
    for number, orders in itertools.product(range(7), (2, count)):
        found = balanced_orders(count, orders, 3, number)
        assert {order[::-1] for order in found} == set(found)
        before = Counter(pair for order in found for pair in itertools.combinations(order, 2))
        assert len(before) == count * (count - 1) and set(before.values()) == {orders // 2}
    behind = Counter(pair for order in found for pair in itertools.pairwise(order))
    assert len(behind) == count * (count - 1) and set(behind.values()) == {
        1
    }  # each directly behind each other one once


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_all_orders_there_are(count):
    for seed in range(5):
        assert set(balanced_orders(count, possible(count), seed, seed)) == set(itertools.permutations(range(count)))


def test_one_order_for_each_item_puts_every_response_first_equally_often():
    for seed in range(10):
        first = Counter(balanced_orders(4, 1, seed, item)[0][0] for item in range(100))
        assert first == {0: 25, 1: 25, 2: 25, 3: 25}
    for orders in (4, 8, 24):  # so does the first of many orders
        assert first == Counter(balanced_orders(4, orders, 0, item)[0][0] for item in range(100))


def test_orders_differ_by_seed_and_where_they_may_by_item():
    assert len({tuple(balanced_orders(5, 2, seed, 0)) for seed in range(50)}) > 40
    assert len({frozenset(balanced_orders(5, 5, 0, item)) for item in range(50)}) > 15  # of 24 squares
    assert len({tuple(sorted(balanced_orders(40, 3, seed, 1))) for seed in range(20)}) == 20
    # Every square is as likely as another.
    seen = Counter(frozenset(balanced_orders(4, 4, 0, item)) for item in range(1200))
    assert len(seen) == 6 and all(150 < times < 250 for times in seen.values())


def test_orders_are_the_same_in_every_process_and_version():
    # Figures that no later version may change: scores are kept by the order they were given in.
    code = "from yojo.evaluation.orders import balanced_orders as b; print(b(4, 5, 0, 1), b(3, 2, 7, 5))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == f"{balanced_orders(4, 5, 0, 1)} {balanced_orders(3, 2, 7, 5)}" == PINNED


PINNED = "[(1, 0, 3, 2), (0, 2, 1, 3), (2, 3, 0, 1), (3, 1, 2, 0), (3, 0, 2, 1)] [(1, 2, 0), (2, 0, 1)]"


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((3, 7, 0, 0), ValueError, r"orders=7, and 3 responses have 6 orders: ask for min\(orders, possible\(3\)\)"),
        ((1, 2, 0, 0), ValueError, "orders=2, and 1 responses have 1 orders"),
        ((0, 1, 0, 0), ValueError, "count must be at least 1, got 0"),
        ((2, 0, 0, 0), ValueError, "orders must be at least 1, got 0"),
        ((2, 1, 0, -1), ValueError, "number must be at least 0, got -1"),
        ((2, 1, "0", 0), TypeError, "seed must be an int, got '0'"),
        ((2, True, 0, 0), TypeError, "orders must be an int, got True"),
        ((2.0, 1, 0, 0), TypeError, "count must be an int, got 2.0"),
    ],
)
def test_orders_that_cannot_be(arguments, error, message):
    with pytest.raises(error, match=message):
        balanced_orders(*arguments)


# ---- measures by hand ----

# Two responses; the first order puts 0 first, the second puts 1 first.
FAITHFUL = judged([[2.0, 1.0], [2.0, 1.0]])
FIRST = judged([[1.0, 0.0], [0.0, 1.0]])  # whoever stands first
TIED = judged([[1.0, 1.0], [1.0, 1.0]])
HALF = judged([[1.0, 1.0], [2.0, 1.0]])  # a lot in the first order


@pytest.mark.parametrize(
    "measure, faithful, first, tied, half",
    [
        (flip_rate, 0, 1, 0, 0.5),
        (any_flip, 0, 1, 0, 0.5),
        (first_place_agreement, 1, 0.5, 1, 1),
        (kendall_between, 1, -1, math.nan, math.nan),
        (pairwise_instability, 0, 1, 0, 0.5),
        (global_inconsistency, 0, 0.5, 0.5, 0.25),
        (spread, 0, 0.5, 0, 0.25),
        (spread_between, 0.5, 0, 0, 0.25),
        (max_change, 0, 1, 0, 1),
    ],
)
def test_two_responses_by_hand(measure, faithful, first, tied, half):
    found = measure([FAITHFUL, FIRST, TIED, HALF])
    assert found == pytest.approx([faithful, first, tied, half], nan_ok=True)


def test_three_orders_by_hand():
    # Orders 012, 120, 201; choices 0, 0, 2.
    item = judged([[3.0, 2.0, 1.0], [3.0, 1.0, 2.0], [1.0, 2.0, 3.0]])
    assert flip_rate([item]) == pytest.approx([2 / 3]) and any_flip([item]) == [1]
    assert first_place_agreement([item]) == pytest.approx([2 / 3])
    assert kendall_between([item]) == pytest.approx([(1 / 3 - 1 - 1 / 3) / 3])
    # 0 over 1 in two, 0 over 2 in two, 1 over 2 in one of three orders: the ranking 0 2 1 or 0 1 2 errs by 1/3 in each.
    assert global_inconsistency([item]) == pytest.approx([1 / 3])
    assert pairwise_instability([item]) == [1]  # each pair stands in three ways and is seen to go either way
    assert exposure([item])[3] == pytest.approx([2 / 3 - 1 / 3, -1 / 3, 1 / 3 - 1 / 3])
    assert max_change([item]) == [2]
    assert spread([item]) == pytest.approx([(math.sqrt(8 / 9) + math.sqrt(2 / 9) + math.sqrt(2 / 3)) / 3])


def test_exposure_by_number_of_responses():
    first = judged([[2.0, 1.0, 0.0], [0.0, 2.0, 1.0], [1.0, 0.0, 2.0]])
    found = exposure([FIRST, FAITHFUL, first, TIED])
    assert list(found) == [2, 3]
    assert found[2] == pytest.approx([(1 + 0.5 + 0.5) / 3 - 0.5, 0.5 - 2 / 3])
    assert found[3] == pytest.approx([2 / 3, -1 / 3, -1 / 3])
    by_place = score_by_place([FIRST, FAITHFUL, first])
    assert by_place[2] == pytest.approx([0.25, -0.25]) and by_place[3] == pytest.approx([1, 0, -1])
    # An item of many orders weighs as much as one of few.
    twice = judged([[1.0, 0.0], [0.0, 1.0]] * 2, [(0, 1), (1, 0)] * 2)
    assert exposure([twice, FAITHFUL])[2] == pytest.approx([0.25, -0.25])


def test_one_order_has_an_exposure_alone():
    once = judged([[2.0, 1.0]], [(1, 0)])
    assert exposure([once])[2] == pytest.approx([-0.5, 0.5])
    assert all(np.isnan(measure([once])).all() for measure in MEASURES if measure is not spread_between)
    assert spread_between([once]) == [0.5]


def test_what_has_no_measure():
    refused = judged(None, rankings=[1, 2], refused="too long")
    alone = judged([[1.0], [2.0]], [(0,), (0,)])
    for measure in MEASURES:
        assert np.isnan(measure([refused, alone])).all() and measure([]).shape == (0,)
        assert np.isfinite(measure([refused, FIRST, alone])).tolist() == [False, True, False]
    assert exposure([refused, alone]) == {} == score_by_place([])


# ---- measures against enumeration ----


def slow_flips(item):
    """flip_rate and any_flip, over every way in which the lot of ties may fall."""
    count, orders = len(item.rankings), len(item.orders)
    rates = []
    for priority in itertools.permutations(range(count)):
        chosen = [max(range(count), key=lambda n, row=row: (row[n], priority[n])) for row in item.scores]
        pairs = list(itertools.combinations(range(orders), 2))
        rates.append((sum(chosen[k] != chosen[j] for k, j in pairs) / len(pairs), len(set(chosen)) > 1))
    return np.mean(rates, axis=0)


def slow_disagreement(item):
    count, scores = len(item.rankings), item.scores
    win = [[np.mean((scores[:, a] > scores[:, b]) + (scores[:, a] == scores[:, b]) / 2) for b in range(count)]
           for a in range(count)]  # fmt: skip
    return min(
        np.mean([win[b][a] for a, b in itertools.combinations(ranking, 2)])
        for ranking in itertools.permutations(range(count))
    )


def slow_instability(item, parts):
    count, differences = len(item.rankings), []
    for a, b in itertools.combinations(range(count), 2):
        seen = {}
        for order, scores in zip(item.orders, item.scores, strict=True):
            where = tuple(order.index(response) * parts // count for response in (a, b))
            seen.setdefault(where, []).append(0.5 + np.sign(scores[a] - scores[b]) / 2)
        rates = [np.mean(values) for values in seen.values()]
        if len(rates) > 1:
            differences.append(max(rates) - min(rates))
    return np.mean(differences) if differences else math.nan


@pytest.mark.parametrize("ties", [True, False])
def test_measures_against_enumeration(ties):
    items = random_items(3, 50, ties) + random_items(4, 8, ties, counts=(5,), orders=7)
    flips, some = np.transpose([slow_flips(item) for item in items])
    assert flip_rate(items) == pytest.approx(flips) and any_flip(items) == pytest.approx(some)
    assert global_inconsistency(items) == pytest.approx([slow_disagreement(item) for item in items])
    taus = [[kendalltau(*pair).statistic for pair in itertools.combinations(item.scores, 2)] for item in items]
    taus = [np.nanmean(values) if np.isfinite(values).any() else math.nan for values in taus]
    assert kendall_between(items) == pytest.approx(taus, nan_ok=True) and np.isfinite(taus).sum() > 50
    for parts in (2, 3, 4):
        expected = [slow_instability(item, parts) for item in items]
        assert pairwise_instability(items, parts) == pytest.approx(expected, nan_ok=True)


def test_majorities_that_go_round():
    # 0 over 1, 1 over 2, 2 over 0, each in two of three orders: any ranking errs on one of them by 2/3, on two by 1/3.
    item = judged([[3.0, 2.0, 1.0], [1.0, 3.0, 2.0], [2.0, 1.0, 3.0]])
    assert global_inconsistency([item]) == pytest.approx([(2 / 3 + 1 / 3 + 1 / 3) / 3])


# ---- what must change nothing ----


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_names_and_sequence_do_not_count(seed):
    rng = np.random.default_rng(seed)
    items = random_items(seed, 12)
    other = [orders_shuffled(responses_renamed(item, rng), rng) for item in items]
    sequence = rng.permutation(len(items))
    for measure in MEASURES:
        assert measure(other) == pytest.approx(measure(items), nan_ok=True)
        assert np.array_equal(measure([items[n] for n in sequence]), measure(items)[sequence], equal_nan=True)
    for measure in (exposure, score_by_place):
        assert {count: pytest.approx(values) for count, values in measure(items).items()} == measure(other)
        assert all(abs(values.sum()) < 1e-12 for values in measure(items).values())
    scaled = [dataclasses.replace(item, scores=item.scores * 4) for item in items]
    assert all(np.array_equal(measure(scaled), measure(items), equal_nan=True) for measure in RANK_MEASURES)
    assert all(measure(scaled) == pytest.approx(4 * measure(items)) for measure in (spread, spread_between, max_change))


def test_a_judge_that_does_not_see_orders():
    rng = np.random.default_rng(0)
    items = []
    for item in random_items(5, 40):
        items.append(dataclasses.replace(item, scores=np.repeat(rng.normal(size=(1, len(item.rankings))),
                                                                len(item.orders), axis=0)))  # fmt: skip
    for measure in (flip_rate, any_flip, pairwise_instability, global_inconsistency, spread, max_change):
        assert np.all(measure(items) == 0)  # exactly
    assert kendall_between(items) == pytest.approx(1) and np.all(first_place_agreement(items) == 1)
    assert all(np.all(values == 0) for values in score_by_place(items).values())


def test_what_is_no_judged_item():
    nan = judged([[1.0, math.nan], [1.0, 2.0]])
    shape = dataclasses.replace(FIRST, scores=np.zeros((3, 2)))
    order = dataclasses.replace(FIRST, orders=[(0, 1), (1, 1)])
    for measure in (*MEASURES, exposure, score_by_place):
        for item, message in ((nan, "must be finite"), (shape, r"\[2, 2\] here"), (order, "every response once")):
            with pytest.raises(ValueError, match=f"item 'item 0': .*{message}"):
                measure([FIRST, item])
    with pytest.raises(ValueError, match="parts must be at least 2"):
        pairwise_instability([FIRST], 1)


# ---- cost ----


def test_cost():
    assert cost(1000, [10, 20, 30], orders=6) == {
        "one_order": 1060,
        "isolated": 1060,
        "permutations": 1000 + 6 * 60,
        "separate_orders": 6 * 1060,
        "separate_responses": 3060,
    }
    for arguments, error, message in (
        ((10, [], 1), ValueError, "response_tokens must have a number for each response"),
        ((10, [1, -1], 1), ValueError, "response_tokens must be at least 0, got -1"),
        ((10.5, [1], 1), TypeError, "prompt_tokens must be an int"),
        ((10, [1], 0), ValueError, "orders must be at least 1"),
    ):
        with pytest.raises(error, match=message):
            cost(*arguments)


def test_importing_loads_nothing_heavy():
    code = f"import sys, {module.__name__}; print([n for n in ('torch', 'scipy', 'matplotlib') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

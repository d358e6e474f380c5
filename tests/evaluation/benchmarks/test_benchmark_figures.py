"""Official figures: by hand from chosen scores, and closed forms of judges that look at place, length or nothing."""

import math
import random

import numpy as np
import pytest
from benchmark_cases import CASES, coin, cyclic, first_place, judged, longest, made, said
from hypothesis import given, settings
from hypothesis import strategies as st
from pytest import approx

from yojo.evaluation import benchmarks

REFUSED = None


def official(name, folder, scores):
    """Official figures of a benchmark's made-up items with the given scores, [N] or [K, N] each, or REFUSED."""
    items = made(name, folder)
    entries = [items.light(i) for i in range(len(items))]
    assert len(entries) == len(scores)
    found = [
        said(entry, [0] * len(entry.rankings), refused=True) if given is REFUSED else said(entry, given)
        for entry, given in zip(entries, scores, strict=True)
    ]
    return benchmarks.get(name).official(found)


# ---- by hand ----


def test_vl_rewardbench(tmp_path):
    figures = official("vl-rewardbench", tmp_path, [
        [[1, 0], [1, 0]],  # hallucination, first better: 1
        [[1, 0], [0, 1]],  # hallucination, first better: right in one of two orders, 1/2
        [[0, 1], [0, 0]],  # hallucination, second better: right, then a tie, 3/4
        [[1, 0], [1, 0]],  # reasoning, second better: 0
        REFUSED,  # reasoning: 0
        [2, 1],  # general, first better: 1
        [0, 0],  # general: a tie, 1/2
    ])  # fmt: skip
    assert figures == approx({
        "accuracy": 3.75 / 7, "macro_accuracy": (0.75 + 0 + 0.75) / 3, "group/hallucination": 0.75,
        "group/reasoning": 0.0, "group/general": 0.75,
    })  # fmt: skip


def test_multimodal_rewardbench(tmp_path):
    figures = official("multimodal-rewardbench", tmp_path, [[0, 1], [0, 1], [1, 0], [1, 1], REFUSED])
    # Right, wrong, right, a tie, a refusal.
    assert figures == approx({
        "accuracy": 2.5 / 5, "group/open_generation/correctness_task": 1.0, "group/reasoning/math": 0.0,
        "group/reasoning/coding": 1.0, "group/reasoning": 0.5, "group/safety/bias": 0.5, "group/safety/toxicity": 0.0,
        "group/safety": 0.25,
    })  # fmt: skip


def test_mm_rlhf_rewardbench(tmp_path):
    scores = [[[1, 0], [1, 0]], [[1, 0], [0, 1]], [[1, 1], [1, 0]], [[1, 0], [1, 0]], [[2, 0], [3, 0]]]
    # ACC: 1, 1/2, 1/2 (a tie is wrong), 1, 1. ACC+: id q1 in its first order only, q2 in its second only, q3 in both.
    assert official("mm-rlhf-rewardbench", tmp_path, scores) == approx({
        "accuracy": 4 / 5, "accuracy_plus": (0.5 + 0.5 + 1) / 3, "group/mcq": 0.75, "group/long": 0.5,
        "group/video": 1.0, "group_plus/mcq": 0.5, "group_plus/long": 0.5, "group_plus/video": 1.0,
    })  # fmt: skip
    scores[4] = REFUSED
    figures = official("mm-rlhf-rewardbench", tmp_path, scores)
    assert figures["accuracy"] == approx(3 / 5) and figures["accuracy_plus"] == approx((0.5 + 0.5 + 0) / 3)
    scores[0] = [1, 0]  # one order, which meets both of the other item's
    assert official("mm-rlhf-rewardbench", tmp_path, scores)["group_plus/mcq"] == 0.5
    # Right in another order each: ACC 1/2 and ACC+ 0, since no order has both right.
    scores[:2] = [[1, 0], [0, 1]], [[0, 1], [1, 0]]
    figures = official("mm-rlhf-rewardbench", tmp_path, scores)
    assert (figures["group/mcq"], figures["group_plus/mcq"]) == (0.5, 0.0)


def test_videorewardbench(tmp_path):
    figures = official("videorewardbench", tmp_path, [[1, 0], [0, 1], [1, 1]])
    assert figures == approx({"accuracy": 0.5, "group/knowledge": 1.0, "group/safety": 0.25})


@pytest.mark.parametrize("name", ["mr2bench-image", "mr2bench-video"])
def test_mr2bench(name, tmp_path):
    scores = [
        # Ranks 3 1 2 2 4: all 9 pairs that are ranked differently are right; tau-b = 9 / sqrt(9 * 10).
        [1, 5, 3, 2, 0],
        # Ranks 1 2 3 4, all scores equal: 1/4, 3 of 6 pairs, tau 0.
        [0, 0, 0, 0],
        # Ranks 2 1 1. First order: a best one is highest, 1 of 2 pairs, tau 0. Second: none, 0 of 2, tau
        # -2 / sqrt(2 * 2).
        [[1, 2, 0], [1, 0, 0]],
    ]
    tau = 9 / math.sqrt(90)
    figures = official(name, tmp_path, scores)
    expected = {"best_of_n": 1.75 / 3, "pairwise": 12.5 / 17, "kendall_tau": (tau + 0 - 0.5) / 3}
    assert figures == approx(expected | {
        "group/all": expected["best_of_n"], "pairwise/all": expected["pairwise"],
        "kendall_tau/all": expected["kendall_tau"],
    })  # fmt: skip
    scores[1] = REFUSED
    figures = official(name, tmp_path, scores)
    assert figures["best_of_n"] == approx(1.5 / 3) and figures["pairwise"] == approx(9.5 / 17)
    assert figures["kendall_tau"] == approx((tau - 1 - 0.5) / 3)


def test_judgebench(tmp_path):
    scores = [
        [[1, 0], [1, 1]],  # right and a tie: right
        [[1, 0], [0, 1]],  # right and wrong: not right
        [[0, 1], [0, 2]],  # right twice
        REFUSED,
    ]
    figures = official("judgebench", tmp_path, scores)
    assert figures == approx({
        "accuracy": 0.5, "group/knowledge": 0.5, "group/reasoning": 0.0, "group/coding": 1.0, "split/gpt": 2 / 3,
        "split/claude": 0.0,
    })  # fmt: skip
    reasoning = {
        0.0: ([0, 1], [1, 1], [[1, 1], [0, 1]], [[0, 0], [0, 0]], [[1, 0], [0, 1], [0, 1]]),
        1.0: ([1, 0], [[1, 0], [1, 0], [0, 1]]),  # one order: that verdict; three: the majority
    }
    for right, cases in reasoning.items():
        for scores[1] in cases:
            assert official("judgebench", tmp_path, scores)["group/reasoning"] == right


def test_rewardbench2(tmp_path):
    scores = [
        [4, 1, 2, 3],  # Math: 1
        [2, 2, 2, 0],  # Math: the chosen one among three highest, 1/3
        [[1, 1, 0, 0], [0, 1, 0, 0]],  # Focus: 1/2, then 0
        [2, 1, 0],  # reference 0: margin 1
        [3, 2, 1.5, 1, 0],  # tied 0, three are correct: margin 0.5, spread 1.5
        [1, 1, 0],  # reference 1: margin 0, not accurate
        [5, 4.5, 1, 2],  # tied 1, two are correct: margin 2.5, spread 0.5
    ]
    margin = (math.tanh(0.5 / 1.5 - 1) + math.tanh(0 / 0.5 - 1)) / 2
    ties = 0.30 * 1 + 0.30 * 0.5 + 0.20 * 0.5 + 0.20 * 0 + 0.01 * margin
    figures = official("rewardbench2", tmp_path, scores)
    assert figures == approx({
        "average": (2 / 3 + 0.25 + ties) / 3, "group/Math": 2 / 3, "group/Focus": 0.25, "group/Ties": ties,
        "ties/reference_accuracy": 0.5, "ties/tied_accuracy": 1.0, "ties/preferred": 0.5, "ties/preferred_hard": 0.0,
        "ties/margin": margin,
    })  # fmt: skip
    # A refusal is as wrong as can be: prompt 1 has no accurate tied record, no margin, and -1 in the last term.
    scores[6] = REFUSED
    margin = (math.tanh(0.5 / 1.5 - 1) - 1) / 2
    assert official("rewardbench2", tmp_path, scores)["group/Ties"] == approx(0.30 * 0.5 + 0.30 * 0.5 + 0.01 * margin)
    # No spread: x / 0 is a tanh of 1, 0 / 0 counts 0.
    scores[5:] = [[1, 0, 0], [2, 2, 0, 1]]
    assert official("rewardbench2", tmp_path, scores)["ties/margin"] == approx((math.tanh(0.5 / 1.5 - 1) + 1) / 2)
    scores[5:] = [[1, 0, 0], [2, 2, 0, 2]]
    assert official("rewardbench2", tmp_path, scores)["ties/margin"] == approx(math.tanh(0.5 / 1.5 - 1) / 2)


def test_ties_without_a_pair_have_no_score(tmp_path):
    items = made("rewardbench2", tmp_path)
    found = judged(items, longest)
    score = benchmarks.get("rewardbench2").official
    figures = score([found[0], found[3], found[6]])  # reference 0 and tied 1
    assert math.isnan(figures["group/Ties"]) and figures["average"] == figures["group/Math"] == 1
    assert (figures["ties/reference_accuracy"], figures["ties/tied_accuracy"]) == (0, 1)
    assert math.isnan(score(found[3:4])["average"])


def test_mmrb2(tmp_path):
    figures = official("mmrb2", tmp_path, [[[1, 0], [0, 1]], [1, 0], [[1, 1], [1, 0]]])
    assert figures == approx({"accuracy": (0.5 + 1 + 0.25) / 3, "group/all": 1.75 / 3})


def test_preferences(tmp_path):
    figures = official("preferences", tmp_path, [[0, 1, 2], [0, 1]])  # ranks 2 1 3: the worst one is highest; 2 1
    assert figures["best_of_n"] == 0.5 and (figures["group/x"], figures["group/y"]) == (0, 1)
    assert figures["pairwise"] == approx((1 + 1) / (3 + 1)) and figures["kendall_tau"] == approx((-1 / 3 + 1) / 2)


# ---- closed forms ----

LONGEST_WINS = {  # whose answer is the longest, read off the records
    "vl-rewardbench": {"accuracy": 3 / 7, "macro_accuracy": (2 / 3 + 0 + 1 / 2) / 3},
    "multimodal-rewardbench": {"accuracy": 3 / 5},
    "mm-rlhf-rewardbench": {"accuracy": 4 / 5, "accuracy_plus": 2 / 3},
    "videorewardbench": {"accuracy": 2 / 3},
    "mr2bench-image": {"best_of_n": 2 / 3},
    "mr2bench-image-2": {"best_of_n": 1 / 2},
    "mr2bench-image-4": {"best_of_n": 1 / 2},
    "judgebench": {"accuracy": 3 / 4},
    "judgebench-gpt": {"accuracy": 2 / 3},
    "judgebench-claude": {"accuracy": 1.0},
    "mmrb2": {"accuracy": 2 / 3},
    "preferences": {"best_of_n": 1 / 2},
    # Lengths of the tied answers: 3 against 5 and 1; 3, 4, 6 against 2, 1; 9 against 3, 1; 11, 13 against 2, 1.
    "rewardbench2": {
        "group/Math": 1 / 2, "group/Focus": 0.0,
        "group/Ties": 0.30 + 0.15 + 0.10 + 0.10 + 0.005 * (math.tanh(-2 / 3 - 1) + math.tanh(6 / 2 - 1)),
    },
}  # fmt: skip
for count in ("", "-2", "-4"):
    LONGEST_WINS[f"mr2bench-video{count}"] = LONGEST_WINS[f"mr2bench-image{count}"]


def ranked(name):
    """Rankings of a benchmark's records, for those that rank many responses."""
    return [record.get("ranks", record.get("rankings")) for record in CASES[name][0]]


def of_one_place(name):
    """Figures of a judge that likes the first place, every response standing once in every place."""
    if name.startswith("judgebench"):
        return {"accuracy": 0.0}  # one verdict right, one wrong
    if name == "rewardbench2":
        # One chosen of four. Ties: a reference answer leads in 1 of 3 orders; three of five correct ones, and two
        # of four, stand before all wrong ones in one order only, and then margin 1 is not above the spread of 2, or 1.
        return {
            "group/Math": 1 / 4, "group/Focus": 1 / 4, "ties/reference_accuracy": 1 / 3,
            "ties/tied_accuracy": (1 / 5 + 1 / 4) / 2, "ties/preferred": 0.0, "ties/preferred_hard": 0.0,
        }  # fmt: skip
    if "mr2bench" in name or name == "preferences":
        # Response i stands before j in N - d of the N orders, where j follows i by d places around the circle.
        before = [
            (len(ranks) - (j - i) % len(ranks)) / len(ranks)
            for ranks in ranked(name)
            for i in range(len(ranks))
            for j in range(len(ranks))
            if ranks[i] < ranks[j]
        ]
        return {
            "best_of_n": np.mean([ranks.count(1) / len(ranks) for ranks in ranked(name)]),
            "pairwise": np.mean(before),
        }
    more = {"mm-rlhf-rewardbench": {"accuracy_plus": 0.5}, "vl-rewardbench": {"macro_accuracy": 0.5}}
    return {"accuracy": 0.5} | more.get(name, {})


def of_chance(name):
    """Figures of a judge whose scores are all equal."""
    if name.startswith("judgebench") or name == "mm-rlhf-rewardbench":
        return {"accuracy": 0.0}  # a tie agrees with no label; a tie is wrong
    if name == "rewardbench2":
        return {"average": (1 / 4 + 1 / 4 + 0) / 3, "group/Ties": 0.0}
    if "mr2bench" in name or name == "preferences":
        best = np.mean([ranks.count(1) / len(ranks) for ranks in ranked(name)])
        return {"best_of_n": best, "pairwise": 0.5, "kendall_tau": 0.0}
    return {"accuracy": 0.5}


@pytest.mark.parametrize("name", CASES)
def test_judges_that_look_at_length_place_or_nothing(name, tmp_path):
    items = made(name, tmp_path)
    benchmark = items.benchmark
    for judge, expected in ((longest, LONGEST_WINS[name]), (first_place, of_one_place(name)), (coin, of_chance(name))):
        figures = benchmark.official(judged(items, judge))
        assert {key: figures[key] for key in expected} == approx(expected, abs=1e-12), judge.__name__
        assert benchmark.headline in figures
        assert {f"group/{group}" for group in items.group_counts} <= set(figures)
        assert all(isinstance(value, float) for value in figures.values())


@pytest.mark.parametrize("name", CASES)
def test_one_order_of_a_judge_without_a_place_is_enough(name, tmp_path):
    items = made(name, tmp_path)
    one = benchmarks.get(name).official(judged(items, longest, lambda count: [tuple(range(count))]))
    assert one == approx(benchmarks.get(name).official(judged(items, longest)), abs=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_who_refuses_everything_gets_nothing(name, tmp_path):
    items = made(name, tmp_path)
    figures = benchmarks.get(name).official(judged(items, longest, refuse=range(len(items))))
    least = {"kendall_tau": -1.0, "ties/margin": -1.0, "group/Ties": -0.01, "average": -0.01 / 3}
    for key, value in figures.items():
        assert value == approx(least.get("kendall_tau" if key.startswith("kendall_tau/") else key, 0.0))


# ---- against the definitions, item by item ----


def naive_ties(records):
    """The Ties formula in plain loops; records: dict (kind, prompt) -> (correct scores, wrong scores), one order."""

    def accurate(kind):
        found = [min(good) > max(bad) for (k, _), (good, bad) in records.items() if k == kind]
        return sum(found) / len(found)

    terms = []
    for prompt in {number for _, number in records}:
        good, bad = records["tied", prompt]
        reference, wrong = records["ref", prompt]
        spread, margin = max(good) - min(good), min(good) - max(bad)
        hard = min(margin, min(reference) - max(wrong))
        if spread:
            term = math.tanh(hard / spread - 1)
        else:
            term = 0.0 if hard == 0 else math.copysign(1, hard)
        terms.append((margin > spread, hard > spread, term))
    preferred, preferred_hard, term = (sum(column) / len(terms) for column in zip(*terms, strict=True))
    return 0.30 * accurate("tied") + 0.30 * accurate("ref") + 0.20 * preferred + 0.20 * preferred_hard + 0.01 * term


def test_ties_against_plain_loops(tmp_path):
    drawn = random.Random(0)
    items = made("rewardbench2", tmp_path)
    entries = [items.light(i) for i in range(3, 7)]
    for _ in range(200):
        orders = drawn.choice([1, 2, 3])
        scores = [[[drawn.randint(0, 4) for _ in entry.rankings] for _ in range(orders)] for entry in entries]
        figures = benchmarks.get("rewardbench2").official([said(e, s) for e, s in zip(entries, scores, strict=True)])
        expected = []
        for k in range(orders):
            records = {
                (e.info["kind"], e.info["prompt"]): tuple(
                    [value for value, rank in zip(s[k], e.rankings, strict=True) if (rank == 1) == good]
                    for good in (True, False)
                )
                for e, s in zip(entries, scores, strict=True)
            }
            expected.append(naive_ties(records))
        assert figures["group/Ties"] == approx(sum(expected) / orders, abs=1e-12)


def test_kendall_tau_of_places_against_scipy(tmp_path):
    from scipy.stats import kendalltau

    figures = benchmarks.get("mr2bench-image").official(judged(made("mr2bench-image", tmp_path), first_place))
    expected = []
    for ranks in ranked("mr2bench-image"):
        size = len(ranks)
        taus = [
            kendalltau([-((r - shift) % size) for r in range(size)], [-rank for rank in ranks]) for shift in range(size)
        ]
        expected.append(np.mean([tau.statistic for tau in taus]))
    assert figures["kendall_tau"] == approx(np.mean(expected))


# ---- what changes nothing ----


@pytest.mark.parametrize("name", CASES)
def test_scale_and_zero_of_scores_change_nothing(name, tmp_path):
    items = made(name, tmp_path)
    entries = [items.light(i) for i in range(len(items))]
    score = benchmarks.get(name).official

    @given(data=st.data(), scale=st.sampled_from([0.25, 2.0, 8.0]), zero=st.integers(-9, 9))
    @settings(max_examples=15, deadline=None)
    def same(data, scale, zero):
        orders = data.draw(st.integers(1, 3))
        sizes = [orders * len(entry.rankings) for entry in entries]
        values = [data.draw(st.lists(st.integers(0, 3), min_size=size, max_size=size)) for size in sizes]
        drawn = [np.reshape(numbers, (orders, -1)) for numbers in values]
        figures = score([said(e, s) for e, s in zip(entries, drawn, strict=True)])
        moved = score([said(e, s * scale + zero) for e, s in zip(entries, drawn, strict=True)])
        assert moved == approx(figures, abs=1e-12)
        turned = score([said(e, s[::-1]) for e, s in zip(entries, drawn, strict=True)])  # which order comes first
        assert turned == approx(figures, abs=1e-12)
        for key, value in figures.items():
            assert -1 <= value <= 1 if "tau" in key or key == "ties/margin" else -0.0101 <= value <= 1.0101, key

    same()


# ---- as a bootstrap calls it ----


@pytest.mark.parametrize("name", CASES)
def test_an_item_given_twice_counts_twice(name, tmp_path):
    items = made(name, tmp_path)
    found = judged(items, longest)
    score = benchmarks.get(name).official
    assert score([*found, *found]) == approx(score(found), abs=1e-12)
    assert score(found[::-1]) == approx(score(found), abs=1e-12)


def test_questions_drawn_twice_weigh_twice(tmp_path):
    rlhf = judged(made("mm-rlhf-rewardbench", tmp_path), longest)  # ACC+: q1 wrong, q2 and q3 right
    assert benchmarks.get("mm-rlhf-rewardbench").official([*rlhf, *rlhf[:2]])["accuracy_plus"] == approx(2 / 4)
    ties = judged(made("rewardbench2", tmp_path), longest)[3:]  # preferred: prompt 0 not, prompt 1 yes
    assert benchmarks.get("rewardbench2").official([*ties, *ties[:2]])["ties/preferred"] == approx(1 / 3)


@pytest.mark.parametrize("name", CASES)
def test_figures_need_items_and_numbers(name, tmp_path):
    items = made(name, tmp_path)
    score = benchmarks.get(name).official
    with pytest.raises(ValueError, match="at least one item"):
        score([])
    entry = items.light(0)
    size = len(entry.rankings)
    with pytest.raises(
        ValueError, match=rf"item 0 .*must be \[orders, responses\] = \[1, {size}\].*got \[1, {size + 1}\]"
    ):
        score([said(entry, [0.0] * (size + 1), orders=cyclic(size)[:1])])
    with pytest.raises(ValueError, match="a score is NaN"):
        score([said(entry, [float("nan")] * size)])

"""Ranking metrics against scipy, and against cases worked out by hand."""

import math
import random

import numpy as np
import pytest
from scipy.stats import kendalltau
from sklearn.metrics import ndcg_score

from yojo.evaluation.metrics import best_of_n, is_tied, kendall_tau, ndcg, pairs, ranking_metrics, top1_strict


@pytest.mark.parametrize(
    "scores, rankings, expected",
    [
        ([3.0, 2.0, 1.0], [1, 2, 3], 1.0),
        ([1.0, 2.0, 3.0], [1, 2, 3], 0.0),
        ([2.0, 2.0, 1.0], [1, 2, 2], 0.5),  # chosen by lot among two, one of them the best
        ([2.0, 2.0, 2.0], [1, 2, 2], 1 / 3),
        ([2.0, 1.0, 3.0], [1, 2, 1], 1.0),  # either of two bests will do
        ([2.0, 2.0, 1.0], [1, 1, 2], 1.0),
        ([5.0], [1], 1.0),
        ([0.5, 1.5], [3, 2], 1.0),  # the best rank that is there
    ],
)
def test_best_of_n(scores, rankings, expected):
    assert best_of_n(scores, rankings) == pytest.approx(expected)
    assert top1_strict(scores, rankings) == (expected == 1) and is_tied(scores, rankings) == (expected not in (0, 1))


@pytest.mark.parametrize(
    "scores, rankings, expected",
    [
        ([3.0, 2.0, 1.0], [1, 2, 3], (3, 0, 3)),
        ([1.0, 2.0, 3.0], [1, 2, 3], (0, 0, 3)),
        ([2.0, 2.0, 1.0], [1, 2, 3], (2, 1, 3)),
        ([1.0, 5.0, 2.0], [1, 1, 2], (1, 0, 2)),  # equal ranks are no pair
        ([1.0, 2.0], [1, 1], (0, 0, 0)),
        ([1.0], [1], (0, 0, 0)),
    ],
)
def test_pairs(scores, rankings, expected):
    assert pairs(scores, rankings) == expected


def test_kendall_tau_is_that_of_scipy():
    rng = random.Random(0)
    compared = 0
    for _ in range(200):
        count = rng.randrange(2, 9)
        scores = [rng.choice((-1.5, 0.0, 0.25, 2.0, rng.random())) for _ in range(count)]  # ties among them
        rankings = [rng.randrange(1, 5) for _ in range(count)]
        expected = kendalltau(scores, [-rank for rank in rankings]).statistic
        found = kendall_tau(scores, rankings)
        assert math.isnan(found) if math.isnan(expected) else found == pytest.approx(expected)
        compared += not math.isnan(expected)
    assert 100 < compared < 200


def random_samples(seed, size):
    rng = random.Random(seed)
    for _ in range(size):
        count = rng.randrange(1, 9)
        yield (
            [rng.choice((-1.5, 0.0, 0.25, 2.0, rng.random())) for _ in range(count)],
            [rng.randrange(1, 5) for _ in range(count)],
        )


def test_ndcg_is_that_of_sklearn():
    compared = 0
    for scores, rankings in random_samples(1, 200):
        found = ndcg(scores, rankings)
        gains = [2 ** len({other for other in rankings if other > rank}) - 1 for rank in rankings]
        if any(gains):
            assert found == pytest.approx(ndcg_score([gains], [scores]))
            compared += 1
        else:
            assert math.isnan(found)
    assert 100 < compared < 200


def test_ndcg_by_hand():
    assert ndcg([2, 1, 0], [1, 2, 3]) == 1
    # Gains 3, 1, 0 in the order of the ranks; here they come as 1, 3, 0.
    assert ndcg([1, 2, 0], [1, 2, 3]) == pytest.approx((1 + 3 / math.log2(3)) / (3 + 1 / math.log2(3)))
    assert ndcg([0, 0], [7, 3]) == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert math.isnan(ndcg([1, 0], [2, 2])) and math.isnan(ndcg([1], [1]))


def test_responses_may_stand_anywhere_and_scores_be_scaled():
    rng = np.random.default_rng(0)
    for scores, rankings in random_samples(2, 100):
        other = rng.permutation(len(scores))
        for metric in (best_of_n, top1_strict, is_tied, pairs, kendall_tau, ndcg):
            moved = metric(8 * np.array(scores)[other], 2 * np.array(rankings)[other])
            assert moved == pytest.approx(metric(scores, rankings), nan_ok=True)


def test_metrics_of_many_samples():
    samples = [
        ([2.0, 1.0, 0.0], [1, 2, 3]),  # all right; the best stands first
        ([0.0, 1.0], [1, 2]),  # all wrong; first again
        ([1.0, 1.0, 3.0], [2, 1, 3]),  # the worst on top, the others tied; second
        ([4.0, 0.0], [1, 1]),  # all ranked alike: tells nothing of the order
        ([6.0], [1]),  # alone
    ]
    metrics = ranking_metrics(samples)
    assert metrics["best_of_n"] == pytest.approx(1 / 3)
    assert metrics["pairwise"] == pytest.approx((3 + 0 + 0.5) / (3 + 1 + 3))
    third = kendalltau(samples[2][0], [-rank for rank in samples[2][1]]).statistic
    assert metrics["kendall_tau"] == pytest.approx((1 - 1 + third) / 3)
    assert metrics["score_mean"] == pytest.approx((3 + 1 + 5 + 4 + 6) / 11)
    spreads = [(2 / 3) ** 0.5, 0.5, (8 / 9) ** 0.5, 2.0]
    assert metrics["score_spread"] == pytest.approx(sum(spreads) / 4)
    assert metrics["best_at_1"] == 0.5 and metrics["best_at_2"] == 0.0
    assert set(metrics) == {
        "best_of_n", "pairwise", "kendall_tau", "score_mean", "score_spread", "best_at_1", "best_at_2"
    }  # fmt: skip


def test_a_best_that_is_shared_stands_nowhere():
    metrics = ranking_metrics([([1.0, 2.0, 0.0], [1, 1, 2]), ([0.0, 1.0], [2, 1])])
    assert "best_at_1" not in metrics and metrics["best_at_2"] == 1.0 and metrics["best_of_n"] == 1.0


def test_what_cannot_be_computed_is_left_out():
    assert ranking_metrics([]) == {}
    assert ranking_metrics([([3.0], [1]), ([5.0], [1])]) == {"score_mean": 4.0}
    assert "kendall_tau" not in ranking_metrics([([1.0, 1.0], [1, 2])])

"""Each method against what it is by definition: direct maximisation, normal equations, brute force, hand computation."""

import itertools
import sys

import choix
import numpy as np
import pytest
import scipy.optimize
from rank_cases import by_name, clear_votes, random_votes, tally_of

from yojo.rankings import METHODS, Vote
from yojo.rankings.kemeny import always_above, kemeny
from yojo.rankings.scores import (
    annotators_rankings,
    borda,
    bradley_terry,
    elo,
    elo_ratings,
    hodge_rank,
    plackett_luce,
    rank_centrality,
    ranks_of,
)


def most_likely(wins, prior):
    """Log strengths, 0 on average, that maximise the posterior of Bradley and Terry; of N + 1 items, the last average."""

    def loss(strengths):
        difference = strengths[:, None] - np.append(strengths, 0)[None, :]
        whole = np.column_stack([wins, np.full(len(wins), prior / 2)])  # half of the prior is won, half is lost
        return (whole * np.logaddexp(0, -difference)).sum() + prior / 2 * np.logaddexp(0, strengths).sum()

    found = scipy.optimize.minimize(loss, np.zeros(len(wins)), method="BFGS", options={"gtol": 1e-9}).x
    return found - found.mean()


@pytest.mark.parametrize("prior", [0.1, 1.0])
@pytest.mark.parametrize("method", [bradley_terry, plackett_luce])
@pytest.mark.parametrize("seed", range(4))
def test_strengths_are_the_most_likely(seed, method, prior):
    votes = [Vote(v.first, v.second, v.winner, None, 1 + i % 3) for i, v in enumerate(random_votes(seed, coverage=0.5))]
    tally, _ = tally_of(votes)
    want = most_likely(tally.wins, prior)
    assert np.abs(method(tally, prior=prior) - want).max() < 1e-5  # what differences of the likelihood can find


@pytest.mark.parametrize("method", [bradley_terry, plackett_luce])
@pytest.mark.parametrize("seed", range(3))
def test_strengths_are_those_of_choix(seed, method):
    tally, _ = tally_of(random_votes(seed, 7, coverage=0.5, per_pair=3))
    wins = np.pad(tally.wins, (0, 1))
    wins[7, :7] = wins[:7, 7] = 0.5  # the average item of the prior
    want = choix.ilsr_pairwise_dense(wins, tol=1e-13, max_iter=10_000)[:7]
    assert np.abs(method(tally) - (want - want.mean())).max() < 1e-9


@pytest.mark.parametrize("method", [bradley_terry, plackett_luce])
@pytest.mark.parametrize("times", [1, 1000])
@pytest.mark.parametrize("prior", [1, 0.01, 1e-6])
def test_extreme_votes_have_an_estimate(method, times, prior):
    """Clear votes and a small prior: strengths far apart, where the likelihood is flat."""
    votes = [Vote(v.first, v.second, "first", "x", times) for v in clear_votes([f"m{i:02}" for i in range(19)])]
    tally, place = tally_of(votes)
    scores = method(tally, prior=prior)
    assert ranks_of(scores)[[place[f"m{i:02}"] for i in range(19)]].tolist() == list(range(1, 20))
    mirrored = scores[[place[f"m{18 - i:02}"] for i in range(19)]]
    if method is bradley_terry:
        assert scores[[place[f"m{i:02}"] for i in range(19)]] == pytest.approx(-mirrored, rel=1e-7, abs=1e-7)


def test_two_items_in_closed_form():
    votes = [Vote("a", "b", "first")] * 3 + [Vote("a", "b", "second")]
    assert by_name(bradley_terry, votes, prior=0)["a"] == pytest.approx(np.log(3) / 2)
    assert by_name(plackett_luce, votes, prior=0)["b"] == pytest.approx(-np.log(3) / 2)


@pytest.mark.parametrize("method", [bradley_terry, plackett_luce, rank_centrality])
def test_without_a_prior_whoever_never_loses_has_no_strength(method):
    tally, _ = tally_of(clear_votes("abc"))
    with pytest.raises(ValueError, match="prior=0: some items have never lost"):
        method(tally, prior=0)
    with pytest.raises(ValueError, match="prior must be a finite number of votes, 0 or more, got -1"):
        method(tally, prior=-1)
    with pytest.raises(TypeError, match="prior must be a number of votes, got 'a'"):
        method(tally, prior="a")


def test_rankings_of_annotators_are_rankings():
    whole = [Vote(*pair, "first", "x") for pair in itertools.combinations("abcd", 2)]
    cycle = [Vote("a", "b", "first", "y"), Vote("b", "c", "first", "y"), Vote("c", "a", "first", "y")]
    part = [Vote("a", "b", "first", "z"), Vote("b", "c", "first", "z")]
    tie = [Vote("a", "d", "tie", "x")]
    tally, place = tally_of(whole + cycle + part + tie)
    wins, rankings = annotators_rankings(tally)
    assert rankings == [(tuple(place[name] for name in "abcd"), 1.0)]
    assert wins.sum() == 6 and wins[place["a"], place["d"]] == 0.5


def test_rankings_weigh_what_their_votes_do():
    votes = [Vote(*pair, "first", "x", weight) for pair, weight in (("ab", 1), ("bc", 2), ("ac", 6))]
    wins, ((_, weight),) = annotators_rankings(tally_of(votes)[0])
    assert weight == 3 and not wins.any()


def test_plackett_luce_of_whole_rankings_is_that_of_choix():
    orders = ["abcd", "abdc", "bacd", "dcba", "cadb", "acbd"]
    votes = [Vote(*pair, "first", f"x{k}") for k, o in enumerate(orders) for pair in itertools.combinations(o, 2)]
    want = choix.ilsr_rankings(
        4, [["abcd".index(name) for name in order] for order in orders], tol=1e-12, max_iter=1000
    )
    assert list(by_name(plackett_luce, votes, prior=0).values()) == pytest.approx(list(want - want.mean()), abs=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_potentials_solve_the_normal_equations(seed):
    tally, _ = tally_of(random_votes(seed, 6, coverage=0.4, per_pair=3))
    rows, values, weights = [], [], []
    for i, j in itertools.combinations(range(6), 2):
        if tally.counts[i, j]:
            rows.append(np.eye(6)[i] - np.eye(6)[j])
            values.append((tally.wins[i, j] - tally.wins[j, i]) / tally.counts[i, j])
            weights.append(np.sqrt(tally.counts[i, j]))
    weighted = np.array(rows) * np.array(weights)[:, None]
    want = np.linalg.lstsq(weighted, np.array(values) * weights, rcond=None)[0]  # of least norm: 0 on average
    assert np.abs(hodge_rank(tally) - want).max() < 1e-12


@pytest.mark.parametrize("prior", [0.5, 1.0])
@pytest.mark.parametrize("seed", range(3))
def test_the_walk_comes_to_rest(seed, prior):
    tally, _ = tally_of(random_votes(seed, 5, coverage=0.5))
    count, walk = 5, np.zeros((5, 5))
    for i, j in itertools.permutations(range(count), 2):
        if tally.counts[i, j]:  # from i to j at the share of votes that j has won
            walk[i, j] = (tally.wins[j, i] + prior) / (tally.counts[i, j] + 2 * prior) / count
    walk += np.diag(1 - walk.sum(axis=1))
    rest = np.full(count, 1 / count)
    for _ in range(3000):
        rest = rest @ walk
    want = np.log(rest)
    assert np.abs(rank_centrality(tally, prior=prior) - (want - want.mean())).max() < 1e-9


def test_borda_by_hand():
    votes = [
        Vote("a", "b", "first"),
        Vote("a", "b", "tie"),
        Vote("c", "a", "second", weight=2),
        Vote("b", "c", "abstain"),
    ]
    assert by_name(borda, votes) == {"a": 3.5 / 4, "b": 0.5 / 2, "c": 0.0}


def test_elo_by_hand():
    tally, place = tally_of([Vote("a", "b", "first"), Vote("b", "c", "tie")])
    number = {frozenset(pair): k for k, pair in enumerate(zip(tally.first, tally.second, strict=True))}
    ab, bc = number[frozenset((place["a"], place["b"]))], number[frozenset((place["b"], place["c"]))]
    one, other = elo_ratings(tally, [[ab, bc], [bc, ab]], 32)
    expected = 1 / (1 + 10 ** ((1000 - 984) / 400))  # of b, 984 after it has lost, against c
    assert one[place["a"]] == 1016 and other[place["c"]] == 1000  # who ties with an equal keeps his rating
    assert one[place["b"]] == pytest.approx(984 + 32 * (0.5 - expected))
    assert one[place["c"]] == pytest.approx(1000 - 32 * (0.5 - expected))
    assert one[place["c"]] < 1000 and other[place["b"]] == 984


def test_elo_is_the_mean_of_its_orders():
    votes = random_votes(1, 4)
    tally, _ = tally_of(votes)
    assert len(set(tally.classes)) == 4
    rng = np.random.default_rng(5)
    want = elo_ratings(tally, [rng.permutation(len(votes)) for _ in range(7)], 8.0).mean(axis=0)
    assert (elo(tally, step=8.0, orders=7, seed=5) == want).all()
    assert (elo(tally, orders=7, seed=6) != elo(tally, orders=7, seed=5)).any()
    for options, message in [({"step": 0}, "step must be above 0"), ({"orders": 0}, "orders must be at least 1")]:
        with pytest.raises(ValueError, match=message):
            elo(tally, **options)


def best_orders(wins):
    costs = {
        order: sum(wins[j, i] for i, j in itertools.combinations(order, 2))
        for order in itertools.permutations(range(len(wins)))
    }
    least = min(costs.values())
    return [order for order, cost in costs.items() if cost < least + 1e-9]


@pytest.mark.parametrize("count, per_pair", [(2, 1), (3, 1), (4, 2), (5, 1), (5, 3), (6, 2)])
@pytest.mark.parametrize("seed", range(4))
def test_kemeny_against_all_orders(seed, count, per_pair):
    tally, _ = tally_of(random_votes(seed, count, per_pair, coverage=0.7))
    orders = best_orders(tally.wins)
    want = np.ones((count, count), dtype=bool)
    for order in orders:
        place = np.argsort(order)
        want &= place[:, None] < place[None, :]
    assert (always_above(tally.wins) == want).all()
    assert (kemeny(tally) == want.sum(axis=1) - want.sum(axis=0)).all()


def test_kemeny_refuses_what_it_cannot_do_exactly():
    tally, _ = tally_of(clear_votes([f"m{i:02}" for i in range(21)]))
    with pytest.raises(ValueError, match="at most 20 items, got 21"):
        kemeny(tally)
    tally, _ = tally_of(clear_votes([f"m{i:02}" for i in range(20)]))
    assert sorted(ranks_of(kemeny(tally)).tolist()) == list(range(1, 21))


@pytest.mark.parametrize("method, module", [("rank_centrality", "choix"), ("kemeny", "scipy.optimize")])
def test_what_is_missing_is_named(monkeypatch, method, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"{method} needs {module.partition('.')[0]}: pip install 'yojo.eval.'"):
        by_name(METHODS[method], clear_votes("abc"))
    for other in METHODS.keys() - {"rank_centrality", "kemeny"}:
        by_name(METHODS[other], clear_votes("abc"))


@pytest.mark.parametrize("method", METHODS)
def test_clear_votes_are_ranked_clearly(method):
    scores = by_name(METHODS[method], clear_votes("dbac", per_pair=2))
    assert sorted(scores, key=scores.get, reverse=True) == list("dbac")


def test_scores_that_are_as_good_as_equal_tie():
    assert ranks_of(np.array([1.0, 2.0, 1.0 + 1e-12, 3.0])).tolist() == [3, 2, 3, 1]
    assert ranks_of(np.array([1000.0, 1000.0 + 1e-5, 1001.0])).tolist() == [2, 2, 1]
    assert ranks_of(np.array([0.1, 0.1001])).tolist() == [2, 1]

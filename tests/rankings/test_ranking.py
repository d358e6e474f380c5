"""`aggregate`: what a ranking says of the votes, whatever their order and the names of the items."""

import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rank_cases import clear_votes, flipped, random_votes, tally_of

from yojo.rankings import METHODS, Vote, aggregate, quality
from yojo.rankings.votes import Tally

CYCLE = [Vote("a", "b", "first"), Vote("b", "c", "first"), Vote("c", "a", "first")]


def ranks(ranking):
    return dict(zip(ranking.items, ranking.ranks.tolist(), strict=True))


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=12, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_order_and_names_decide_nothing(method, seed, data):
    options = {"orders": 10} if method == "elo" else {}
    votes = random_votes(seed, 6, coverage=0.6, annotators=2)
    once = aggregate(votes, method, draws=3, **options)
    turned = data.draw(st.lists(st.booleans(), min_size=len(votes), max_size=len(votes)))
    names = dict(zip("abcdef", data.draw(st.permutations(["z", "é", "1", "a", "M b", "f"])), strict=True))
    again = []
    for vote, turn in zip(votes, turned, strict=True):
        pair = (names[vote.first], names[vote.second])
        pair, winner = (pair[::-1], flipped(vote.winner)) if turn else (pair, vote.winner)
        again.append(Vote(*pair, winner, vote.annotator, vote.weight))
    other = aggregate(data.draw(st.permutations(again)), method, draws=3, **options)
    at = [other.items.index(names[name]) for name in once.items]
    told_apart = len(set(Tally.of(votes).classes)) == 6  # who is not may change places with his equal in a draw
    if told_apart or method != "elo":
        assert other.ranks[at].tolist() == once.ranks.tolist()
        assert other.scores[at] == pytest.approx(once.scores, abs=1e-9)
    assert (other.curl, other.feedback) == (pytest.approx(once.curl), pytest.approx(once.feedback))
    assert other.majority == once.majority and other.annotators == once.annotators
    if told_apart:
        assert (other.draws[:, at] == once.draws).all()


@pytest.mark.parametrize("method", METHODS)
def test_equals_tie(method):
    """A cycle, two pairs of equals below it (of two names each way round), nobody of whom votes tell apart."""
    votes = [vote for vote in CYCLE for _ in range(3)]
    votes += [Vote(high, low, "first") for high in "abc" for low in "pqxy"]
    votes += [Vote(high, low, "first") for high in "px" for low in "qy"]
    found = aggregate(votes, method, draws=0)
    assert ranks(found) == {"a": 1, "b": 1, "c": 1, "p": 2, "x": 2, "q": 3, "y": 3}
    assert found.best == ("a", "b", "c") and found.majority.condorcet is None


def test_ranks_are_dense():
    votes = [Vote("a", low, "first") for low in "bcd"] + [Vote(high, "d", "first") for high in "bc"]
    assert ranks(aggregate(votes + [Vote("b", "c", "tie")], draws=0)) == {"a": 1, "b": 2, "c": 2, "d": 3}


def test_votes_that_connect_nothing_are_refused_or_marked():
    votes = [*clear_votes("ba"), *clear_votes("xyz"), Vote("a", "x", "abstain"), Vote("m", "a", "abstain")]
    with pytest.raises(ValueError, match=r"6 items into 3 components \(x, y, z \| a, b \| m\)") as error:
        aggregate(votes)
    assert "disconnected='mark'" in str(error.value)
    found = aggregate(votes, disconnected="mark", draws=10)
    assert found.components == (("x", "y", "z"), ("a", "b"), ("m",)) and not found.connected and found.best is None
    assert ranks(found) == {"a": 2, "b": 1, "m": 1, "x": 1, "y": 2, "z": 3}
    assert found.label_stability([0, 1]) is None and found.best_stability is None and found.majority.condorcet is None
    made = json.loads(json.dumps(found.to_dict()))
    assert made["items"] is None and made["ranks"] is None and made["scores"] is None and not made["connected"]
    assert [part["items"] for part in made["components"]] == [["x", "y", "z"], ["b", "a"], ["m"]]
    assert [part["ranks"] for part in made["components"]] == [[1, 2, 3], [1, 2], [1]]


def test_a_tie_connects_unless_it_is_dropped():
    votes = [Vote("a", "b", "first"), Vote("b", "c", "tie")]
    assert aggregate(votes, draws=0).connected
    with pytest.raises(ValueError, match="2 components"):
        aggregate(votes, ties="drop", draws=0)


@pytest.mark.parametrize("method", ["bradley_terry", "hodge_rank", "rank_centrality", "borda", "elo"])
def test_ties_count_half_or_nothing(method):
    votes = [Vote("a", "b", "first")] + [Vote("a", "b", "tie")] * 9
    half, dropped = aggregate(votes, method, draws=0), aggregate(votes, method, ties="drop", draws=0)
    assert dropped.scores[0] - dropped.scores[1] > half.scores[0] - half.scores[1] > 0
    assert (half.ties, dropped.ties) == (9, 9)


def test_curl():
    assert aggregate(CYCLE, draws=0).curl == pytest.approx(1)
    # Margins 1 (a-b), 1 (b-c), 1 (a-c): the potentials 2/3, 0, -2/3 leave 1/3, 1/3 and -1/3 of them.
    assert aggregate(clear_votes("abc"), draws=0).curl == pytest.approx(3 * (1 / 9) / 3)
    # Three votes on one pair of a cycle: of its margins, 3 in all, each pair keeps a part as large as its votes are few, which
    # is 3/7, 9/7 and 9/7.
    heavy = aggregate([CYCLE[0], CYCLE[0], *CYCLE], draws=0)
    assert heavy.curl == pytest.approx((3 * (3 / 7) ** 2 + 2 * (9 / 7) ** 2) / 5)
    assert aggregate([Vote("a", "b", "tie")], draws=0).curl is None
    path = [Vote("a", "b", "first"), Vote("b", "c", "first"), Vote("x", "y", "first")]
    assert aggregate(path, disconnected="mark", draws=0).curl == pytest.approx(0)


def test_feedback_and_majority_by_hand():
    votes = clear_votes("abc", per_pair=3) + [Vote("c", "a", "first", weight=2), Vote("b", "c", "tie")]
    found = aggregate(votes, draws=0)
    assert ranks(found) == {"a": 1, "b": 2, "c": 3}
    assert found.feedback == pytest.approx(2 / 11)
    assert found.majority == quality.Majority(pairs=3, agree=3, tied=0, condorcet=True) and found.majority.share == 1
    tally, place = tally_of(votes)
    ranking = np.empty(3, dtype=int)
    ranking[[place[name] for name in "abc"]] = 2, 1, 2
    assert quality.majority(tally, ranking) == quality.Majority(pairs=3, agree=1, tied=1, condorcet=False)
    assert quality.feedback(tally, ranking) == pytest.approx(3 / 11)


@pytest.mark.parametrize(
    "votes, condorcet",
    [
        (clear_votes("abc"), True),
        ([Vote("a", "b", "first"), Vote("b", "c", "first")], None),  # a and c were not compared
        ([Vote("a", "b", "first")] * 3 + [Vote("a", "c", "tie"), Vote("b", "c", "first")], False),
        (CYCLE, None),  # nobody is the best one
    ],
)
def test_condorcet_winners(votes, condorcet):
    assert aggregate(votes, draws=0).majority.condorcet is condorcet


def test_annotators():
    votes = [
        *[Vote(*pair, "first", "good") for pair in itertools.combinations("abc", 2)],
        *[Vote(*pair, "first", "fine") for pair in itertools.combinations("abc", 2)],
        Vote("a", "b", "second", "bad"),
        Vote("a", "c", "tie", "bad"),
        Vote("a", "b", "abstain", "none"),
    ]
    found = aggregate(votes, draws=0).annotators
    assert list(found) == ["bad", "fine", "good", "none"]
    assert found["bad"] == {"votes": 2, "ties": 1, "abstentions": 0, "agreement": 0.0}
    assert found["good"]["agreement"] == 1.0 and found["none"]["agreement"] is None


def test_stability_against_drawing_by_hand():
    votes = random_votes(3, 4, per_pair=3)
    found = aggregate(votes, "borda", draws=40, seed=7)
    tally, _ = tally_of(votes)
    rng, kept, best = np.random.default_rng(7), np.zeros(4), 0
    for _ in range(40):
        drawn = [rng.integers(len(votes), size=len(votes))]
        again = [votes_of(tally, k) for k in np.sort(drawn[0])]
        marked = aggregate(again, "borda", disconnected="mark", draws=0)
        if marked.items != found.items or not marked.connected:
            continue
        better = (marked.ranks[None, :] < marked.ranks[:, None]).sum(axis=1)
        kept += better == (found.ranks[None, :] < found.ranks[:, None]).sum(axis=1)
        best += marked.best == found.best
    assert found.stability.tolist() == (kept / 40).tolist() and found.best_stability == best / 40
    assert 0 < found.best_stability < 1


def votes_of(tally, k):
    winner = {1.0: "first", 0.0: "second", 0.5: "tie"}[tally.share[k]]
    return Vote(tally.items[tally.first[k]], tally.items[tally.second[k]], winner, None, tally.weight[k])


def test_many_clear_votes_are_stable_and_few_are_not():
    sure = aggregate(clear_votes("abc", per_pair=30), draws=50)
    assert sure.stability.tolist() == [1, 1, 1] and sure.best_stability == 1 and sure.unconnected_draws == 0
    few = aggregate([Vote("a", "b", "first"), Vote("b", "c", "first")], draws=200)
    # Half of the draws have one of the two votes twice, and leave an item out.
    assert (
        few.unconnected_draws == pytest.approx(100, abs=30)
        and few.best_stability == (200 - few.unconnected_draws) / 200
    )
    none = aggregate(clear_votes("abc"), draws=0)
    assert np.isnan(none.stability).all() and none.best_stability is None and none.label_stability([0, 1]) is None
    assert "stability" not in none.to_dict()


def test_label_stability_is_of_the_best_of_some():
    found = aggregate(random_votes(5, 5, per_pair=3), draws=100)
    some = np.flatnonzero(found.ranks > 1)[:3]
    top = some[np.argmin(found.ranks[some])]
    if (found.ranks[some] == found.ranks[top]).sum() > 1:
        pytest.fail("take another seed: the best of these tie")
    others = [i for i in some if i != top]
    want = np.mean([row.all() and all(row[top] < row[i] for i in others) for row in found.draws])
    assert found.label_stability(some) == found.label_stability(some[::-1]) == want and 0 < want < 1


def test_seeds():
    votes = random_votes(2, 6)
    assert [len(aggregate(clear_votes("ab"), way).draws) for way in ("borda", "kemeny", "elo")] == [200, 20, 20]
    one, same, other = (aggregate(votes, draws=20, seed=seed).draws for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"method": "borda_count"}, ValueError, "method must be one of bradley_terry, .*got 'borda_count'"),
        ({"prior": 1.0, "method": "borda"}, TypeError, "borda has no option 'prior'; it has none"),
        ({"steps": 1}, TypeError, "bradley_terry has no option 'steps'; it has prior"),
        ({"ties": "win"}, ValueError, "ties must be one of half, drop, got 'win'"),
        ({"disconnected": "ignore"}, ValueError, "disconnected must be one of refuse, mark"),
        ({"draws": -1}, ValueError, "draws must be at least 0, got -1"),
        ({"draws": 1.5}, TypeError, "draws must be an int, got 1.5"),
        ({"seed": -1}, ValueError, "seed must be at least 0"),
        ({"method": "pged", "denoise_ensemble": 1}, TypeError, "denoise_ensemble must be a bool, got 1"),
        ({"votes": []}, ValueError, "votes is empty"),
        ({"votes": [("a", "b", "first")]}, TypeError, "votes must be yojo.rankings.Vote, got tuple at 0"),
    ],
)
def test_mistakes_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        aggregate(**{"votes": clear_votes("ab")} | arguments)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        (("a", "a", "first"), ValueError, "a vote of 'a' against itself"),
        (("a", "b", "a"), ValueError, "winner must be one of first, second, tie, abstain, got 'a'"),
        ((1, "b", "first"), TypeError, "first must be the name of an item, a string that is not empty, got 1"),
        (("a", " ", "first"), TypeError, "second must be the name of an item"),
        (("a", "b", "first", 3), TypeError, "annotator must be a string or None, got 3"),
        (("a", "b", "first", None, 0), ValueError, "weight must be finite and above 0, got 0"),
        (("a", "b", "first", None, float("nan")), ValueError, "weight must be finite"),
        (("a", "b", "first", None, "2"), TypeError, "weight must be a number, got '2'"),
    ],
)
def test_votes_that_say_nothing(arguments, error, message):
    with pytest.raises(error, match=message):
        Vote(*arguments)

"""What a judge wrote -> scores: one verdict of the asked form, at the end, or none at all."""

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from yojo.judges.parsing import Unparsable, labels_of, verdict

ABC = ["A", "B", "C"]


def test_labels():
    assert labels_of(1) == ["A"] and labels_of(26)[-1] == "Z" and labels_of(27)[:2] == ["1", "2"]
    assert len(set(labels_of(64))) == 64


@pytest.mark.parametrize(
    "reply, scores",
    [
        ("Ranking: A > B > C", [2, 1, 0]),
        ("Ranking: C > A = B", [0.5, 0.5, 2]),
        ("Ranking: B=C>A", [0, 1.5, 1.5]),
        ("Ranking: A = B = C", [1, 1, 1]),
        ("Some words.\n\nRanking: C > B > A\n\n", [0, 1, 2]),
        ("**Ranking:** C > B > A", [0, 1, 2]),
        ("`ranking : C > B > A`  ", [0, 1, 2]),
        ("Ranking: A > C = B\nSo, once more:\nRanking: A > B = C", [2, 0.5, 0.5]),  # which says the same
        ("<think>Ranking: A > B > C, or\nRanking: B > A > C?</think>\nRanking: C > B > A", [0, 1, 2]),
        ("A writes:\n```\nRanking: A > B > C\n```\nwhich is none of its business.\nRanking: C > B > A", [0, 1, 2]),
        ("A writes\n> Ranking: A > B > C\nRanking: C > B > A", [0, 1, 2]),
    ],
)
def test_rankings(reply, scores):
    assert verdict(reply, "listwise", ABC) == scores


@pytest.mark.parametrize(
    "reply, message",
    [
        ("", "there is no line"),
        ("C is best.", 'there is no line "Ranking: ..."'),
        ("My ranking is: C > B > A", "there is no line"),
        ("Verdict: A", "there is no line"),
        ("Ranking: A > B > C\nI hope this helps!", "is not the last one"),
        ("Ranking: A > B > C\nRanking: C > B > A", "2 lines .* say different things"),
        ("Ranking: A > B\nRanking: A > B > C", "2 lines .* say different things"),
        ("Ranking: A > B", "the label C is missing"),
        ("Ranking: A > B > C > A", "the label A stands there twice"),
        ("Ranking: A > B > C > D", "'D' is none of the labels A, B, C"),
        ("Ranking: a > b > c", "'a' is none of the labels"),
        ("Ranking: A > B > C.", "'C.' is none of the labels"),
        ("Ranking: A > B < C", "'B < C' is none of the labels"),
        ("Ranking:", "'' is none of the labels"),
        ("Ranking: A >> B > C", "'' is none of the labels"),
        ("Ranking: [C] > [A] > [B]", r"'\[C\]' is none of the labels"),
        ('"Ranking: A > B > C"', "there is no line"),
        ("> Ranking: A > B > C", "there is no line"),
        ("```\nRanking: A > B > C\n```", "there is no line"),
        ("Ranking: C > B > A\n```\nRanking: A > B > C\n```", "is not the last one"),
        ("```\nRanking: A > B > C", "there is no line"),
        ("Ranking: A > B > C</think>", "there is no line"),
        ("<think>Well:\nRanking: A > B > C", "its thoughts have no end"),
    ],
)
def test_no_ranking(reply, message):
    with pytest.raises(Unparsable, match=message):
        verdict(reply, "listwise", ABC)


@given(st.lists(st.integers(1, 6), min_size=1, max_size=40), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_scores_are_wins_and_half_ties(ranks, rng):
    labels = labels_of(len(ranks))
    groups = [[n for n, rank in enumerate(ranks) if rank == one] for one in sorted(set(ranks))]
    for group in groups:
        rng.shuffle(group)
    text = " > ".join(" = ".join(labels[n] for n in group) for group in groups)
    wins = [
        sum((a < b) + 0.5 * (a == b) for m, b in enumerate(ranks) if m != n) for n, a in enumerate(ranks)
    ]  # fmt: skip
    assert verdict(f"Ranking: {text}", "listwise", labels) == wins


def test_all_rankings_of_three_have_scores_of_their_own():
    found = {tuple(verdict(f"Ranking: {' > '.join(p)}", "listwise", ABC)) for p in itertools.permutations(ABC)}
    assert found == set(itertools.permutations([0, 1, 2]))


@pytest.mark.parametrize(
    "reply, score", [("Verdict: A", 1), ("so\nVerdict: B", 0), ("**Verdict: tie**", 0.5), ("verdict: TIE", 0.5)]
)
def test_pairs(reply, score):
    assert verdict(reply, "pairwise") == score


@pytest.mark.parametrize(
    "reply", ["Verdict: C", "Verdict: a", "Verdict: A or B", "Verdict:", "Verdict: Tie!", "Verdict: ATIE", "A"]
)
def test_no_verdict(reply):
    with pytest.raises(Unparsable):
        verdict(reply, "pairwise")


@pytest.mark.parametrize(
    "reply, score",
    [("Score: 7", 7), ("Score: 1", 1), ("Score: 10/10", 10), ("x\nScore: 7.5", 7.5), ("Score: 7\nScore: 7.0", 7)],
)
def test_numbers(reply, score):
    assert verdict(reply, "pointwise") == score


@pytest.mark.parametrize(
    "text", ["0", "11", "0.99", "10.1", "-3", "7/100", "7 of 10", "seven", "1e1", "٣", "nan", "", "100", "7/10/10"]
)
def test_no_number(text):
    with pytest.raises(Unparsable, match="the score must be a number from 1 to 10"):
        verdict(f"Score: {text}", "pointwise")


def test_noise_is_a_verdict_only_where_it_ranks_all():
    rng, good = random.Random(0), 0
    for _ in range(6000):
        text = "".join(rng.choice("ABC>=") for _ in range(rng.randrange(4, 7)))
        try:
            found = verdict(f"Ranking: {text}", "listwise", ABC)
        except Unparsable:
            continue
        plain, good = text.replace(" ", ""), good + 1
        assert sorted(plain[::2]) == ABC and set(plain[1::2]) <= set(">=") and len(plain) == 5
        assert sum(found) == 3  # of three pairs
    assert good > 10

"""Two processes, groups split over them: every completion gets its whole group's reward, and where one fails, both stop."""

import itertools
import os
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("trl")

import reward_processes
import trl_cases
from reward_processes import DEADLINE, GROUP, table
from trl_cases import expected

from yojo.demo import digits

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """Function case -> what the two processes found; one start of both runs all cases."""
    folder = tmp_path_factory.mktemp("processes")
    # Threads of a hung judge are left behind: nothing may wait for them when the program ends.
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        + [str(ROOT / "tests" / "reward_processes.py"), str(folder), *reward_processes.CASES],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return lambda case: [torch.load(folder / f"{case}-{rank}.pt", weights_only=False) for rank in (0, 1)]


def near(rewards):
    return pytest.approx(rewards, abs=2e-6)


@pytest.mark.parametrize("case", ["split", "whole", "split, awaited", "split, RLOO", "split, one backbone"])
def test_trl_gets_the_reward_of_each_whole_group(found, case):
    both = found(case)
    assert len(both[0]["calls"]) == len(both[1]["calls"]) >= 1
    split = False
    for calls in zip(*(one["calls"] for one in both), strict=True):
        prompts, completions, images, rewards = (sum((list(call[n]) for call in calls), []) for n in range(4))
        assert rewards == near(expected(trl_cases.reward_model(), prompts, completions, images))
        split = split or len(calls[0][0]) % GROUP > 0
    assert split == case.startswith("split")
    # What the trainers go by: all rows in the order of processes, the same in both.
    assert both[0]["rewards"] == both[1]["rewards"] == torch.tensor(rewards).tolist()
    assert both[0]["scores"] == rewards
    # The mean over the two processes, each of its own groups; of three groups the first process has two.
    first = -(-len(rewards) // GROUP // 2) * GROUP
    owned = [statistics.mean(rewards[:first]), statistics.mean(rewards[first:])]
    assert both[0]["logs"][-1]["yojo/score"] == pytest.approx(statistics.mean(owned), abs=2e-6)
    assert both[0]["unchanged"] and both[1]["unchanged"]


def test_a_split_group_is_judged_in_one_pass(found):
    """In comparative mode each response sees those before it: halves judged apart would have other scores."""
    both = found("split, comparative")
    (calls,) = zip(*(one["calls"] for one in both), strict=True)
    prompts, completions, images, rewards = (sum((list(call[n]) for call in calls), []) for n in range(4))
    judge = trl_cases.reward_model("comparative")
    for start in range(0, len(rewards), GROUP):
        rows = range(start, start + GROUP)
        texts = [completions[n][0]["content"] for n in rows]
        distinct = list(dict.fromkeys(texts))
        matching = [
            order
            for order in itertools.permutations(distinct)
            if [rewards[n] for n in rows] == near(_by_text(judge, order, images[start], texts))
        ]
        assert len(matching) == 1


def _by_text(judge, order, image, texts):
    scores = judge.score(digits.PROMPT, list(order), images=[image]).tolist()
    return [scores[order.index(text)] for text in texts]


@pytest.mark.parametrize("case, rank", [("raises", 1), ("hangs", 0)])
def test_where_one_judge_fails_training_stops_in_both(found, case, rank):
    both = found(case)
    own = {
        "raises": "RewardError: the judge was asked 1 times and gave no scores: OSError: the line is down",
        "hangs": f"RewardError: the judge gave no scores of 2 groups within the deadline of {DEADLINE:g} s",
    }[case]
    assert both[rank]["error"] == own
    assert both[1 - rank]["error"] == f"RewardError: process {rank} has no rewards: {own}"
    for one in both:
        assert one["step"] == 0


@pytest.mark.parametrize("case", ["uneven", "uneven, awaited", "one has none"])
def test_rows_dealt_out_anyhow(found, case):
    rows = table()
    both = found(case)
    for call in zip(*both, strict=True):
        assert [error for error, _ in call] == [None, None]
        rewards = sum((found for _, found in call), [])
        assert len(rewards) == len(rows)
        assert rewards == near(_alone(rows))


def _alone(rows):
    """The reward of each row, from `judge.score` of whole groups; the judge's mode is isolated."""
    scores, judge = {}, trl_cases.reward_model()
    for prompt, picture in {(prompt, image.tobytes()): image for prompt, _, image in rows}.items():
        texts = sorted(text for asked, text, image in rows if (asked, image.tobytes()) == prompt)
        for text, score in zip(texts, judge.score(prompt[0], texts, images=[picture]).tolist(), strict=True):
            scores[(*prompt, text)] = score
    return [scores[prompt, image.tobytes(), text] for prompt, text, image in rows]


@pytest.mark.parametrize(
    "case, rank, error",
    [
        ("one raises", 1, "RewardError: the judge was asked 1 times and gave no scores: OSError: the line is down"),
        ("one hangs", 0, "within the deadline of 2 s"),
        ("one gives NaN", 1, "is nan, which is no reward"),
        ("one gives too few", 1, "the judge gave 1 scores for 4 responses"),
    ],
)
def test_where_one_judge_fails_no_process_has_a_reward(found, case, rank, error):
    both = found(case)
    for own, other in zip(both[rank], both[1 - rank], strict=True):
        assert own[1] is None and other[1] is None
        assert error in own[0] and f"process {rank} has no rewards" in other[0] and error in other[0]


def test_an_incomplete_group_is_an_error_in_both(found):
    for ((error, rewards),) in found("incomplete"):
        assert rewards is None and error.startswith("ValueError: an incomplete group: ")
        assert "process 0" in error and "groups of 4" in error


def test_a_process_that_does_not_come_is_waited_for_no_longer_than_it_may_be_late(found):
    (error, seconds), (other, _) = found("late")
    assert error is not None and other is None
    assert 2.5 < seconds < 60  # the deadline and the margin; torch's own limit is half an hour

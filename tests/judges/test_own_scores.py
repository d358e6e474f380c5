"""A judge that changes another's scores in a `score_many` of its own is asked there, whatever else it has inherited."""

import pytest
import torch

import yojo
from tests import reward_cases
from yojo.evaluation.answers import answers
from yojo.evaluation.asking import Asked
from yojo.judges.judge import answers_through
from yojo.rewards import GroupReward
from yojo.scoring.rows import Row
from yojo.scoring.stream import encoder_of, scored

PROMPT, TEXTS = "Which digit is shown?", ["It is a 3.", "It is a 5."]


class Streams:
    """A judge with requests under way, whose scores are the lengths of responses."""

    def score_many(self, examples):
        return [[float(len(text)) for text in example.responses] for example in examples]

    def score_each(self, examples, errors="raise"):
        for place, example in enumerate(examples):
            yield place, torch.tensor(self.score_many([example])[0])


class HandsOn:
    """A judge that turns another's scores round, and has all else of it."""

    def __init__(self, judge):
        self.judge = judge

    def __getattr__(self, name):
        return getattr(self.judge, name)

    def score_many(self, examples):
        return [-torch.as_tensor(scores) for scores in self.judge.score_many(examples)]


class Inherits(yojo.RewardModel):
    """The same, of a class below."""

    def score_many(self, examples, *args, **kwargs):
        return [-scores for scores in super().score_many(examples, *args, **kwargs)]


def replaced():
    """The same, with the method put into one object."""
    judge = demo()
    judge.score_many = HandsOn(demo()).score_many
    return judge


def demo(kind=yojo.RewardModel):
    judge = reward_cases.demo_judge()
    return kind(judge.model, judge.processor)


def example():
    return yojo.Example(PROMPT, TEXTS, images=[reward_cases.pictures()[0]])


@pytest.mark.parametrize(
    "make, plain",
    [(lambda: HandsOn(demo()), demo), (lambda: demo(Inherits), demo), (replaced, demo)]
    + [(lambda: HandsOn(Streams()), Streams)],
    ids=["a model's", "inherited", "replaced", "a stream's"],
)
def test_its_scores_are_its_own_wherever_it_is_asked(make, plain):
    judge, (right,) = make(), plain().score_many([example()])
    right = -torch.as_tensor(right)
    assert right.abs().min() > 0.01  # so that a score that was not turned round is far off
    found = GroupReward(judge, group_size=2, order="given")([PROMPT] * 2, TEXTS, image=list(example().images) * 2)
    assert found == pytest.approx(right.tolist(), abs=2e-6)
    assert encoder_of(judge) is None
    (result,) = scored(judge, [Row(0, ready=example())])
    torch.testing.assert_close(result.scores, right, atol=2e-6, rtol=0)
    (answer,) = answers(judge, [Asked(0, "one", orders=[(0, 1)], ready=example())])
    torch.testing.assert_close(torch.as_tensor(answer.scores[0]), right, atol=2e-6, rtol=0)


def test_what_is_a_judges_own_is_used():
    class Below(Streams):
        def score_each(self, examples, errors="raise"):
            yield from super().score_each(examples, errors)

    class Beside(yojo.RewardModel):
        def score_many(self, examples):
            raise AssertionError("not asked")

        def score_encoded(self, *args):
            return super().score_encoded(*args)

    for kind, method in ((Streams, "score_each"), (Below, "score_each"), (Beside, "score_encoded")):
        assert answers_through(object.__new__(kind), method)
    assert answers_through(demo(), "score_encoded") and not answers_through(demo(), "score_each")
    assert len(GroupReward(demo(Beside), group_size=2)([PROMPT] * 2, TEXTS)) == 2

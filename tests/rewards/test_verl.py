"""verl: its own reward loop, where it is installed; what the adapter reads of a row, and the actor, here without Ray."""

import asyncio
import time
import types

import framework_cases
import pytest
import torch

from tests.collator_cases import LONG, Clock
from tests.reward_cases import Hashed, Watched, picture
from yojo.rewards import RewardError
from yojo.rewards.verl import Judging, Settings, YojoRewardManager


def test_in_its_own_reward_loop():
    framework_cases.run("verl")


class Tokenizer:
    """Ids are characters."""

    eos_token_id = 0

    def decode(self, ids, skip_special_tokens):
        return "".join(chr(n) for n in ids if n)


def manager(train=2, validation=2, response_length=5):
    """A manager without Ray and verl's configuration."""
    made = object.__new__(YojoRewardManager)
    made.tokenizer, made.response_length = Tokenizer(), response_length
    made.sizes = {"train": train, "validation": validation}
    return made


def read(text, prompt=("What?",), ended=True, made=None, **own):
    ids = [*map(ord, text), *([0] if ended else [])]
    padded = torch.tensor([*ids, *[0] * 3])
    mask = torch.tensor([1] * (2 + len(ids)) + [0] * 3)
    messages = [{"role": "user", "content": content} for content in prompt]
    batch = {"responses": padded, "attention_mask": mask}
    return (made or manager())._read(batch, {"uid": "u", "raw_prompt": messages, "__num_turns__": 2} | own)


def test_what_is_read_of_a_row():
    assert read("abc") == (("u", None), [{"role": "user", "content": "What?"}], "abc", False, 2)
    assert read("abc", global_steps=7)[0] == ("u", 7)
    assert read("", ended=False)[2:4] == ("", False)


def test_a_rollout_is_truncated_that_fills_its_length_and_does_not_end():
    assert [read(text, ended=ended)[3] for text, ended in (("abcde", False), ("abcd", True), ("abcd", False))] == [
        True,
        False,
        False,
    ]


def test_groups_of_validation_are_told_by_the_split_of_a_row():
    made = manager(train=8, validation=1)
    assert read("a", made=made, extra_info={"split": "train"})[4] == 8
    assert read("a", made=made, extra_info={"split": "test"})[4] == 1
    with pytest.raises(ValueError, match="rollout.n is 8 and rollout.val_kwargs.n 1, and nothing says"):
        read("a", made=made, extra_info={"index": 3})


def test_turns():
    with pytest.raises(ValueError, match="a rollout of 4 turns"):
        read("a", __num_turns__=4)


# ---- the actor ----


def actor(judge, clock=None, **found):
    made = Judging(Settings.read({"judge": "length"} | found))
    made.scorer.judge = judge
    if clock is not None:
        made.collator._clock = clock
    return made


async def lost(made, clock):
    """Once a sample waits, the deadline of its group passes."""
    end = time.monotonic() + LONG
    while not made.metrics()["yojo_collator_samples_waiting"]:
        assert time.monotonic() < end
        await asyncio.sleep(0.001)
    clock.now += made.collator.deadline + 1
    made.collator.expire()


def submitted(made, *samples):
    """The rewards of samples that come at once; an error in place of a reward."""

    async def all_of_them():
        return await asyncio.gather(*(made.submit(*sample) for sample in samples), return_exceptions=True)

    try:
        return asyncio.run(all_of_them())
    finally:
        made.collator.close()


def sample(key, text, image=None, size=2, truncated=False):
    content = [{"type": "text", "text": "What <image>?"}]
    content = content if image is None else [{"type": "image", "image": image}, *content]
    return key, [{"role": "user", "content": content}], text, truncated, size


def test_one_question_about_two_pictures_is_two_groups():
    judge, red, blue = Watched(), picture("red"), picture("blue")
    samples = [sample(f"{image.getpixel((0, 0))}", text, image) for text in ("a", "bb") for image in (red, blue)]
    rewards = submitted(actor(judge, order="given"), *samples)
    assert [round(reward) for reward in rewards] == [1, 1, 2, 2]
    assert sorted(len(example.responses) for examples in judge.seen for example in examples) == [2, 2]


def test_a_uid_with_another_picture_is_an_error():
    clock = Clock()
    made = actor(Hashed(), clock)

    async def two():
        tasks = [
            asyncio.ensure_future(made.submit(*sample("u", *one)))
            for one in (("a", picture("red")), ("b", picture("blue")))
        ]
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        await lost(made, clock)
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asyncio.run(two())
    made.collator.close()
    assert sorted(type(one).__name__ for one in found) == ["RewardError", "ValueError"]


def test_what_is_lost_is_an_error_of_the_others_or_scored_without():
    clock = Clock()

    async def one_that_is_lost(made):
        one, _ = await asyncio.gather(made.submit(*sample("u", "abc")), lost(made, clock), return_exceptions=True)
        whole = await asyncio.gather(*(made.submit(*sample("v", text)) for text in ("a", "abc")))
        made.collator.close()
        return one, whole

    error, whole = asyncio.run(one_that_is_lost(actor(Watched(), clock, deadline=10)))
    assert isinstance(error, RewardError) and "1 of 2 samples came within deadline=10 s" in str(error)
    assert [round(reward) for reward in whole] == [1, 3]  # the judge has not failed
    reward, whole = asyncio.run(one_that_is_lost(actor(Watched(), clock, incomplete="score")))
    assert reward == 3.0 and [round(reward) for reward in whole] == [1, 3]


def test_a_judge_that_failed_has_failed_for_all_that_come_behind():
    class Odd:
        calls = 0

        def score_many(self, examples):
            self.calls += 1
            return [[float("nan")] * len(example.responses) for example in examples]

    made = actor(Odd())

    async def two_groups():
        first = await asyncio.gather(*(made.submit(*sample("u", text)) for text in "ab"), return_exceptions=True)
        second = await asyncio.gather(made.submit(*sample("v", "a")), return_exceptions=True)
        return first, second

    first, (behind,) = asyncio.run(two_groups())
    made.collator.close()
    assert all(isinstance(error, RewardError) and "nan" in str(error) for error in first)
    assert isinstance(behind, RewardError) and "the judge failed before" in str(behind) and made.scorer.judge.calls == 1


def test_a_sample_without_a_reward_is_an_error():
    found = submitted(actor(Watched()), sample("u", " "), sample("u", ""))
    assert all(isinstance(error, RewardError) and "set a number" in str(error) for error in found)


def test_truncated_ones_and_tags_that_are_text():
    judge = Watched()
    assert submitted(actor(judge, truncated=-3), sample("u", "ab"), sample("u", "c", truncated=True)) == [2.0, -3.0]
    assert judge.seen[0][0].literal_tags


def test_a_process_that_does_not_answer_is_an_error(monkeypatch):
    ray = pytest.importorskip("ray")
    monkeypatch.setattr("yojo.rewards.verl._MARGIN", -1.0)

    class Silent:
        @staticmethod
        async def remote(*_):
            await asyncio.sleep(60)

    class Dead:
        @staticmethod
        async def remote(*_):
            raise ray.exceptions.RayActorError()

    made, row = manager(), types.SimpleNamespace(batch={}, non_tensor_batch={})
    made.settings = Settings("length", deadline=0.55, scoring_deadline=0.55)
    monkeypatch.setattr(made, "_read", lambda batch, own: ())
    for remote, match in ((Silent, "it may wait for a GPU"), (Dead, "the process with the judge has ended")):
        made.judge = types.SimpleNamespace(submit=remote)
        with pytest.raises(RewardError, match=match):
            asyncio.run(made.run_single([row]))
    with pytest.raises(ValueError, match="a rollout of 2 sequences"):
        asyncio.run(made.run_single([row, row]))


@pytest.mark.parametrize(
    "found, match",
    [
        ({"judge": "length", "sead": 1}, "yojo has sead; it takes"),
        ({"judge": "length", "normalize": "mean"}, "normalize must be one of"),
        ({"judge": "length", "truncated": "none"}, "truncated='none': verl has no sample without a reward"),
        ({}, "judge must be the name of a judge, got None"),
    ],
)
def test_settings(found, match):
    with pytest.raises(ValueError, match=match):
        Settings.read(found)

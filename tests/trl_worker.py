"""TRL's asynchronous rollout worker with completions that are given: vLLM, which would generate them, is no part of scoring."""

import asyncio

from trl.experimental.async_grpo.async_rollout_worker import RolloutGroup, TrainingSequence, _AsyncRolloutLoop

from yojo.demo import digits


def group(number, texts):
    """What the worker's generation leaves to be scored: completions of one prompt, with the columns of its row."""
    image, _ = digits.load_digits_split()[0][number]
    question = [{"role": "user", "content": digits.PROMPT}]
    sequences = [TrainingSequence([1, 2, 3], [0, 1, 1], [0.0, -1.0, -1.0], rollout_id=(number,)) for _ in texts]
    return RolloutGroup(
        prompts=[question] * len(texts),
        reward_kwargs={"image": [image] * len(texts), "digit": [number] * len(texts)},
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        completions_ids=[[5, 6, 7]] * len(texts),
        completions_sequences=[[sequence] for sequence in sequences],
        tool_call_counts=[0] * len(texts),
        tool_failure_counts=[0] * len(texts),
        model_version=0,
        group_id=number,
        env_rewards=[],
        rollout_rewards=[],
    )


class ScoringLoop(_AsyncRolloutLoop):
    """TRL's loops as they are, but for generation: the rows of the dataset hold the completions, `texts`."""

    async def _run_loops(self, stop_event):  # without the HTTP session to vLLM
        await asyncio.gather(
            asyncio.create_task(self._generate_loop(stop_event)), asyncio.create_task(self._score_loop(stop_event))
        )

    async def _generate_loop(self, stop_event):
        for row in self.dataset:
            await self._groups_to_score.put(group(row["number"], row["texts"]))
        await self._groups_to_score.put(None)


class FailsAfter:
    """A judge that scores some calls as another does, and then raises."""

    def __init__(self, judge, calls):
        self.judge, self.left = judge, calls

    def score_many(self, examples):
        self.left -= 1
        if self.left < 0:
            raise OSError("the line is down")
        return self.judge.score_many(examples)

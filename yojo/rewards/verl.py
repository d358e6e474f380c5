"""verl: a manager for its reward loop, which scores whole groups although verl hands over one rollout at a time."""

import asyncio
import dataclasses
import inspect

from yojo.inputs.digests import digest
from yojo.judges.loading import has_model, load_judge
from yojo.rewards.collator import GroupCollator
from yojo.rewards.parts import taken
from yojo.rewards.scorer import GroupScorer, RewardError

_WAITING = 100_000  # samples that may wait in the actor at once; Ray's 1000 would hold back what completes the groups
_MARGIN = 600.0  # seconds to start the actor and load the judge


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is set under `reward.reward_kwargs.yojo`.

    Attributes:
        judge: name of the judge, see `yojo.judges.load_judge`.
        num_gpus: of the actor with the judge; None: 1 if the judge has a model and the cluster a GPU, else 0.
        deadline, scoring_deadline, incomplete: as for `yojo.rewards.collator.GroupCollator`.
        scorer: dict of the other settings, as for `yojo.rewards.GroupScorer`.
    """

    judge: str
    num_gpus: float | None = None
    deadline: float = 600.0
    scoring_deadline: float = 600.0
    incomplete: str = "fail"
    scorer: dict = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, found):
        """Of a dict; a ValueError names what is not known, or would not reach verl as it is."""
        own = {field.name for field in dataclasses.fields(cls)} - {"scorer"}
        others = set(inspect.signature(GroupScorer).parameters) - {"judge", "deadline"}
        if unknown := sorted(set(found) - own - others):
            raise ValueError(
                f"reward.reward_kwargs.yojo has {', '.join(unknown)}; it takes {', '.join(sorted(own | others))}"
            )
        if not isinstance(found.get("judge"), str):
            raise ValueError(f"reward.reward_kwargs.yojo.judge must be the name of a judge, got {found.get('judge')!r}")
        scorer = {name: value for name, value in found.items() if name in others}
        for treatment in ("empty", "truncated", "forged"):
            if scorer.get(treatment) == "none":
                raise ValueError(f"{treatment}='none': verl has no sample without a reward; say 'lowest', or a number")
        GroupScorer(load_judge("length"), **scorer)  # whose values are checked here, not in the actor
        return cls(scorer=scorer, **{name: value for name, value in found.items() if name in own})


class Judging:
    """What lives in the actor that all reward workers share: the judge, once, and the rollouts that wait for their group.

    An error of the judge is that of every rollout from then on: verl drops the groups that fail and goes on with those that are
    left, so it would go on without a word.
    """

    def __init__(self, settings):
        judge = load_judge(settings.judge, device="cuda" if settings.num_gpus and has_model(settings.judge) else None)
        self.scorer = GroupScorer(judge, deadline=settings.scoring_deadline, **settings.scorer)
        self.collator = GroupCollator(
            self._score,
            deadline=settings.deadline,
            scoring_deadline=settings.scoring_deadline,
            incomplete=settings.incomplete,
            max_waiting=_WAITING,
        )
        self.failed = None

    async def submit(self, key, prompt, completion, truncated, group_size):
        """float: the reward of one rollout, once its group is whole and scored.

        Raises:
            RewardError: the judge failed, now or before; the group is not whole at its deadline; there is no reward to give.
            TypeError, ValueError, OSError: as for `GroupCollator.add`.
        """
        if self.failed is not None:
            raise RewardError(f"the judge failed before, and the run goes on without it: {self.failed}")
        add = self.collator.add  # which reads images
        future = await asyncio.to_thread(
            add, key, prompt, completion, truncated=truncated, group_size=group_size, literal_tags=True
        )
        found = await asyncio.wrap_future(future)
        if found.reward is None:
            raise RewardError(
                f"nothing of the group of {key!r} can be judged ({found.treated}), and verl wants a reward: set a number"
            )
        return found.reward

    def metrics(self):
        """dict of `GroupCollator.metrics`."""
        return self.collator.metrics()

    def _score(self, groups):
        try:
            return self.scorer.score(groups)
        except Exception as error:
            self.failed = f"{type(error).__name__}: {error}"
            raise


class YojoRewardManager:
    """A manager for verl's reward loop: rollouts of a prompt, told by their `uid`, are judged together.

    verl gives each rollout to any of its `reward.num_workers` workers. So the judge and the waiting rollouts live in one actor of
    Ray, by a name that all workers know, made by the first that comes. A group has `rollout.n` rollouts, in validation
    `rollout.val_kwargs.n`; where they differ, `extra_info.split` of a row has to say "train" or something else, for verl does
    not. Images and videos are those of `raw_prompt`. A rollout that uses tools, and several turns, are errors.

    An error is never a reward. verl's V1 trainer logs it and drops the group; once the judge has failed all rollouts do, and
    the trainer, left without any, raises a RuntimeError (in asynchronous mode it asks for rollouts on and on, and logs the error
    each time). Its older trainer raises at once.

    Args:
        config, tokenizer, compute_score, reward_router_address, reward_model_tokenizer: what verl hands over.

    Raises:
        ValueError: settings that do not fit, or with which verl would not ask this manager.
    """

    def __init__(self, config, tokenizer, compute_score=None, reward_router_address=None, reward_model_tokenizer=None):
        import ray
        from omegaconf import OmegaConf

        if config.reward.reward_model.enable:
            raise ValueError(
                "reward.reward_model.enable is set: verl would ask its own reward model, and not this manager"
            )
        if config.reward.custom_reward_function.path is not None:
            raise ValueError(
                "reward.custom_reward_function.path is set, and this manager would never call the function"
            )
        found = OmegaConf.select(config, "reward.reward_kwargs.yojo") or {}
        self.settings = Settings.read(OmegaConf.to_container(found, resolve=True) if found else {})
        self.tokenizer, rollout = tokenizer, config.actor_rollout_ref.rollout
        self.sizes = {"train": int(rollout.n), "validation": int(rollout.val_kwargs.n)}
        self.response_length = int(rollout.response_length)
        num_gpus = self.settings.num_gpus
        if num_gpus is None:
            num_gpus = int(has_model(self.settings.judge) and ray.cluster_resources().get("GPU", 0) > 0)
        settings = dataclasses.replace(self.settings, num_gpus=num_gpus)
        name = f"yojo-judge-{digest(dataclasses.asdict(settings))}"  # workers with other settings have another judge
        options = {"name": name, "get_if_exists": True, "num_gpus": num_gpus, "max_concurrency": _WAITING}
        self.judge = ray.remote(Judging).options(**options).remote(settings)

    @classmethod
    def assemble_rm_scores(cls, data, scores):
        """As verl's own managers do it."""
        from verl.experimental.reward_loop.reward_manager.base import RewardManagerBase

        return RewardManagerBase.assemble_rm_scores(data, scores)

    async def run_single(self, data):
        """The reward of one rollout.

        Args:
            data: `verl.DataProto` of one row.

        Returns:
            dict: `reward_score`, a float, and `reward_extra_info`, {"score": the same}.

        Raises:
            RewardError, TypeError, ValueError: there is no reward.
        """
        from ray.exceptions import RayActorError

        if len(data) != 1:
            raise ValueError(
                f"a rollout of {len(data)} sequences: there is no one prompt that the group's completions share"
            )
        row = data[0]
        sample = await asyncio.to_thread(self._read, row.batch, row.non_tensor_batch)
        wait = self.settings.deadline + self.settings.scoring_deadline + _MARGIN
        try:
            reward = await asyncio.wait_for(self.judge.submit.remote(*sample), wait)
        except RayActorError as error:
            raise RewardError(f"the process with the judge has ended: {error}") from error
        except asyncio.TimeoutError:
            raise RewardError(
                f"no answer of the judge's process in {wait:g} s: it may wait for a GPU (num_gpus={self.settings.num_gpus}), of "
                "which verl's own workers must leave one"
            ) from None
        return {"reward_score": reward, "reward_extra_info": {"score": reward}}

    def _read(self, batch, own):
        """(key, prompt, completion, truncated, group size) of a row."""
        if (turns := int(own.get("__num_turns__", 2))) > 2:
            raise ValueError(f"a rollout of {turns} turns: there is no one prompt that the group's completions share")
        responses = batch["responses"]
        count = int(batch["attention_mask"][-len(responses) :].sum())
        ids = responses[:count].tolist()
        truncated = count >= self.response_length and ids[-1] != self.tokenizer.eos_token_id
        key = [str(own["uid"]), None if own.get("global_steps") is None else int(own["global_steps"])]
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return tuple(key), taken(own["raw_prompt"]), text, truncated, self._size(own)

    def _size(self, own):
        if self.sizes["train"] == self.sizes["validation"]:
            return self.sizes["train"]
        split = (own.get("extra_info") or {}).get("split")
        if split is None:
            raise ValueError(
                f"rollout.n is {self.sizes['train']} and rollout.val_kwargs.n {self.sizes['validation']}, and nothing says which of "
                "them a row is of: make them equal, or give each row extra_info.split, 'train' or another"
            )
        return self.sizes["train" if split == "train" else "validation"]

"""NeMo-RL: an environment whose rewards are a judge's, of whole groups."""

from yojo.judges.loading import has_model, load_judge
from yojo.rewards.group import GroupReward
from yojo.rewards.parts import taken

# What a chat template writes around turns, by the families that NeMo-RL trains.
_MARKS = ("<|im_start|>", "<|start_header_id|>", "<start_of_turn>", "<|turn>", "[INST]", "<|begin_of_text|>")


class YojoEnvironment:
    """An environment of one turn: a judge scores the completions of each prompt together, and the episode ends.

    NeMo-RL's synchronous rollouts hand over all completions of a step at once. Its asynchronous ones (`vllm_cfg.async_engine`)
    hand over one at a time and wait for it, in fewer threads than there are completions, so that a group would never be whole:
    that is an error. Groups are those of the prompt and the content of its images; the prompt is `prompt` of a completion's metadata
    (`extra_env_info`), where that has one, or the messages in front of the completion. NeMo-RL's processors of text put a chat
    template into those, which is an error, since a judge has its own: let yours keep the messages in `extra_env_info`.

    Args:
        config: dict, the environment's entry under `env`. `judge`: its name (see `yojo.judges.load_judge`); `group_size`:
            `grpo.num_generations_per_prompt`, and for an environment of validation `grpo.val_num_generations_per_prompt`; all
            others as for `yojo.rewards.GroupScorer`.

    Raises:
        TypeError, ValueError: an entry that does not fit the above.
    """

    def __init__(self, config):
        import torch

        options = dict(config)
        judge, size = options.pop("judge", None), options.pop("group_size", None)
        if not isinstance(judge, str) or not isinstance(size, int):
            raise ValueError(f"env: judge and group_size must be a name and an int, got {judge!r} and {size!r}")
        for treatment in ("empty", "truncated", "forged"):
            if options.get(treatment) == "none":
                raise ValueError(
                    f"{treatment}='none': NeMo-RL has no sample without a reward; say 'lowest', or a number"
                )
        if options.get("truncated", "score") != "score":
            raise ValueError("truncated: NeMo-RL does not tell an environment what is truncated")
        judge = load_judge(judge, device="cuda" if torch.cuda.is_available() and has_model(judge) else None)
        self.reward = GroupReward(judge, group_size=size, gather=False, **options)
        self.measured = {}

    def step(self, message_log_batch, metadata):
        """The rewards of a batch.

        Args:
            message_log_batch: list of B conversations, lists of dicts with `role` and `content`; the last turn is the completion.
            metadata: list of B dicts, or None.

        Returns:
            `nemo_rl.environments.interfaces.EnvironmentReturn`: empty observations, the metadata, no stop strings, rewards [B]
            float32, all terminated, and the completions as answers.

        Raises:
            RewardError, TypeError, ValueError: there are no rewards, as for `yojo.GroupReward`.
        """
        import torch
        from nemo_rl.environments.interfaces import EnvironmentReturn

        count = len(message_log_batch)
        if count == 1 and self.reward.group_size > 1:
            raise ValueError(
                f"one completion, and groups of {self.reward.group_size}: asynchronous rollouts hand over one at a time; set "
                "vllm_cfg.async_engine to false. An environment of validation has a group_size of its own"
            )
        prompts, completions = [], []
        for place, (log, info) in enumerate(zip(message_log_batch, metadata, strict=True)):
            try:
                prompts.append(_prompt(log, info))
            except ValueError as error:
                raise ValueError(f"row {place}: {error}") from None
            completions.append(log[-1]["content"])
        rewards = self.reward(prompts, completions, log_metric=lambda name, value: self.measured.update({name: value}))
        if None in rewards:
            raise ValueError(
                f"row {rewards.index(None)}: nothing of its group can be judged, and NeMo-RL wants a reward: set a number"
            )
        return EnvironmentReturn(
            observations=[{"role": "environment", "content": ""}] * count,
            metadata=metadata,
            next_stop_strings=[None] * count,
            rewards=torch.tensor(rewards, dtype=torch.float32),
            terminateds=torch.ones(count, dtype=torch.bool),
            answers=completions,
        )

    def global_post_process_and_metrics(self, batch):
        """(batch as it is, dict: name -> number of what was measured of the last step's rewards)."""
        return batch, dict(self.measured)

    def shutdown(self):
        """Nothing is left to be ended: Ray ends the actor."""


def register(name="yojo", num_gpus=0):
    """Tell NeMo-RL of the environment; for `examples/run_vlm_grpo.py`, which knows one name alone, as "vlm".

    Args:
        name: of the environment, another's is taken over.
        num_gpus: of its actor; the judge's model goes there, or to the CPU.
    """
    import ray
    from nemo_rl.distributed.ray_actor_environment_registry import ACTOR_ENVIRONMENT_REGISTRY
    from nemo_rl.distributed.virtual_cluster import PY_EXECUTABLES
    from nemo_rl.environments.utils import ENV_REGISTRY

    globals()["YojoActor"] = ray.remote(num_gpus=num_gpus)(YojoEnvironment)
    ENV_REGISTRY[name] = {"actor_class_fqn": f"{__name__}.YojoActor"}
    ACTOR_ENVIRONMENT_REGISTRY[f"{__name__}.YojoActor"] = PY_EXECUTABLES.SYSTEM


def _prompt(log, info):
    """The messages, or the string, that a conversation's completion answers."""
    if len(log) < 2 or log[-1]["role"] != "assistant" or not isinstance(log[-1]["content"], str):
        raise ValueError("the messages must end with the assistant's completion, a string")
    if any(turn["role"] == "environment" for turn in log):
        raise ValueError("an environment has spoken: there is no one prompt that the group's completions share")
    prompt = (info or {}).get("prompt")
    if prompt is None:
        prompt = log[:-1]
        texts = (turn["content"] for turn in prompt if isinstance(turn["content"], str))
        if any(mark in text for text in texts for mark in _MARKS):
            raise ValueError(
                "a chat template has been put into the prompt, and the judge has its own: let the data processor keep the "
                "messages in extra_env_info['prompt']"
            )
    return prompt if isinstance(prompt, str) else taken(prompt)

"""verl's own reward loop, on a Ray of its own: workers, data and how an agent loop asks for a reward, with a YOJO judge behind.

Run by tests/rewards/test_verl.py in a process of its own, with the folder of tests/frameworks/verl.txt.
"""

import asyncio
import copy
import random
import types
from pathlib import Path

import hydra
import pytest
import ray
import torch
from omegaconf import open_dict
from verl import DataProto
from verl.experimental.agent_loop.agent_loop import AgentLoopMetrics, AgentLoopOutput, AgentLoopWorker
from verl.experimental.reward_loop import RewardLoopManager
from verl.trainer.ppo.reward import load_reward_manager
from verl.utils.dataset.rl_dataset import RLHFDataset

from yojo.demo import digits
from yojo.demo.backbone import load_backbone
from yojo.rewards import RewardError
from yojo.rewards.verl import YojoRewardManager

EXAMPLE = Path(__file__).parents[2] / "examples" / "grpo" / "verl_reward.py"
N = 3


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """(the policy's tokenizer, its folder)."""
    folder = tmp_path_factory.mktemp("policy")
    made = load_backbone()[1].tokenizer
    made.save_pretrained(folder)
    return made, folder


@pytest.fixture(scope="module")
def judge(make_reward_model, tmp_path_factory):
    """(folder, reward model), whose scores depend on no order."""
    folder = tmp_path_factory.mktemp("judge") / "reward-model"
    made = make_reward_model(layers=1, mode="isolated")
    made.save_pretrained(folder)
    return folder, made


def configured(tokenizer, judge, *more, n=N, validation=N):
    """verl's own configuration, with the command line of examples/grpo/verl_reward.py."""
    import verl

    folder = Path(verl.__file__).parent / "trainer" / "config"
    options = [
        f"actor_rollout_ref.model.path={tokenizer[1]}",
        f"actor_rollout_ref.rollout.n={n}",
        f"actor_rollout_ref.rollout.val_kwargs.n={validation}",
        "actor_rollout_ref.rollout.name=vllm",
        "actor_rollout_ref.rollout.response_length=12",
        "reward.num_workers=2",
        "reward.reward_manager.source=importlib",
        "reward.reward_manager.module.path=pkg://yojo.rewards.verl",
        "reward.reward_manager.name=YojoRewardManager",
        f"+reward.reward_kwargs.yojo.judge={judge}",
        "+reward.reward_kwargs.yojo.deadline=60",
    ]
    with hydra.initialize_config_dir(config_dir=str(folder), version_base=None):
        return hydra.compose("ppo_trainer", [*options, *more])


def agent_loop(handles):
    """What of verl's agent loop a reward is asked through: its own method, and the handles of the reward workers."""
    return types.SimpleNamespace(
        reward_loop_worker_handles=handles,
        _compute_multi_modal_inputs=lambda output, ids: {},
        _compute_position_ids=lambda ids, mask, *_: mask.cumsum(-1) - 1,
        _get_mm_processor_kwargs=lambda audios: {},
    )


def here(manager):
    """An agent loop with a manager in this process in place of the workers, which take long to start."""
    return agent_loop([types.SimpleNamespace(compute_score=types.SimpleNamespace(remote=manager.run_single))])


def rollout(text, tokenizer, truncated=False, turns=2):
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = (ids * 12)[:12] if truncated else [*ids, tokenizer.eos_token_id]
    return AgentLoopOutput(
        prompt_ids=[5, 6],
        response_ids=ids,
        response_mask=[1] * len(ids),
        num_turns=turns,
        metrics=AgentLoopMetrics(),
        mm_processor_kwargs={},
        extra_fields={},
    )


def dataset_row(content, images):
    """A row's messages, as verl's own dataset makes them of a column of messages and one of images."""
    own = types.SimpleNamespace(image_key="images", video_key="videos", audio_key="audios", processor=object())
    row = {"prompt": [{"role": "user", "content": content}], "images": images}
    return RLHFDataset._build_messages(own, row, "prompt")


def asked(loop, samples):
    """Rewards of (uid, messages, output, extra) through verl's own code; an error in place of a reward."""

    async def ask():
        jobs = []
        for uid, messages, output, extra in samples:
            kwargs = {"uid": uid, "raw_prompt": messages, "extra_info": extra, "global_steps": 1, "session_id": 0}
            kwargs |= {"reward_model": {"ground_truth": "7"}}
            jobs.append(AgentLoopWorker._compute_score(loop, [output], kwargs))
        return await asyncio.gather(*jobs, return_exceptions=True)

    errors = asyncio.run(ask())
    return [error or output.reward_score for error, (_, _, output, _) in zip(errors, samples, strict=True)]


def made(tokenizer, count, size=N):
    """(samples, groups): rollouts of one question about several pictures, mixed; the texts and the picture of each uid."""
    rng, groups, samples = random.Random(0), {}, []
    for n, (image, _) in enumerate(digits.load_digits_split()[1][:count]):
        texts = [tokenizer.decode(tokenizer(digits.caption(rng.randrange(10), rng))["input_ids"]) for _ in range(size)]
        groups[f"uid {n}"] = texts, image
        messages = dataset_row(f"<image>{digits.PROMPT}", [image])
        samples += [(f"uid {n}", copy.deepcopy(messages), rollout(text, tokenizer), {}) for text in texts]
    rng.shuffle(samples)
    return samples, groups


def test_rewards_are_the_judges_scores_of_whole_groups_whichever_worker_is_asked(tokenizer, judge):
    workers = RewardLoopManager(configured(tokenizer, judge[0])).reward_loop_worker_handles
    assert len(workers) == 2
    samples, groups = made(tokenizer[0], count=4)
    rewards = asked(agent_loop(workers), samples)
    for uid, (texts, image) in groups.items():
        scores = dict(zip(texts, judge[1].score(digits.PROMPT, texts, images=[image]).tolist(), strict=True))
        own = [(s, r) for s, r in zip(samples, rewards, strict=True) if s[0] == uid]
        assert len(own) == N
        for (_, _, output, _), reward in own:
            text = tokenizer[0].decode(output.response_ids, skip_special_tokens=True)
            assert reward == pytest.approx(scores[text], abs=2e-6)
            assert output.extra_fields["reward_extra_info"] == {"score": reward}
    for worker in workers:
        ray.kill(worker)


def test_errors_come_through_ray_as_what_they_are(tokenizer, tmp_path):
    config = configured(tokenizer, "length", "+reward.reward_kwargs.yojo.truncated=raise")
    loop = here(YojoRewardManager(config, tokenizer[0]))
    samples, _ = made(tokenizer[0], count=1)
    samples[0] = (*samples[0][:2], rollout("one", tokenizer[0], truncated=True), {})
    for found in asked(loop, samples):
        assert isinstance(found, RewardError) and "truncated='raise'" in str(found)
    (behind,) = asked(loop, [("another uid", *samples[0][1:])])
    assert isinstance(behind, RewardError) and "the judge failed before" in str(behind)
    loop = here(YojoRewardManager(configured(tokenizer, tmp_path), tokenizer[0]))  # an empty folder
    (error, *_) = asked(loop, samples)
    assert isinstance(error, RewardError) and "the process with the judge has ended" in str(error)
    assert str(tmp_path) in str(error)


def test_settings_are_checked_before_anything_is_asked(tokenizer):
    def manager(*more, change=lambda config: None):
        config = configured(tokenizer, "length", *more)
        with open_dict(config):
            change(config)
        return YojoRewardManager(config, tokenizer[0])

    with pytest.raises(ValueError, match="yojo has sead; it takes"):
        manager("+reward.reward_kwargs.yojo.sead=1")
    with pytest.raises(ValueError, match="normalize must be one of"):
        manager("+reward.reward_kwargs.yojo.normalize=mean")
    with pytest.raises(ValueError, match="empty='none': verl has no sample without a reward"):
        manager("+reward.reward_kwargs.yojo.empty=none")
    with pytest.raises(ValueError, match="judge must be the name of a judge, got None"):
        manager(change=lambda config: config.reward.reward_kwargs.yojo.pop("judge"))
    with pytest.raises(ValueError, match="reward_model.enable is set"):
        manager("reward.reward_model.enable=True")
    with pytest.raises(ValueError, match="custom_reward_function.path is set"):
        manager("reward.custom_reward_function.path=reward.py")


def test_scores_are_put_where_verls_own_managers_put_them():
    batch = {
        "prompts": torch.zeros(2, 3, dtype=torch.long),
        "responses": torch.ones(2, 4, dtype=torch.long),
        "attention_mask": torch.tensor([[1, 1, 1, 1, 1, 0, 0], [0, 1, 1, 1, 1, 1, 1]]),
    }
    found = YojoRewardManager.assemble_rm_scores(DataProto.from_dict(batch), [0.5, -2.0])
    assert found.tolist() == [[0, 0.5, 0, 0], [0, 0, 0, -2.0]]


def test_the_example_adds_to_the_judges_reward(tokenizer):
    config = configured(tokenizer, "length", n=2, validation=2)
    with open_dict(config):
        config.reward.reward_manager.module.path = str(EXAMPLE)
        config.reward.reward_manager.name = "JudgedAndCorrect"
    manager = load_reward_manager(config, tokenizer[0], reward_router_address=None, reward_model_tokenizer=None)
    messages = dataset_row("Which digit is shown?", [])
    samples = [("uid", messages, rollout(text, tokenizer[0]), {}) for text in ("It is a 7", "It is a 3")]
    assert asked(here(manager), samples) == pytest.approx([9.1, 9.0])
    assert samples[0][2].extra_fields["reward_extra_info"] == {"score": 9.0, "acc": 1.0}

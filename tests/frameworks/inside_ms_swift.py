"""ms-swift's own GRPO trainer, a tiny policy that sees images, and a YOJO reward model in both of its ways in.

Run by tests/rewards/test_swift.py in a process of its own, with the folder of tests/frameworks/ms_swift.txt.
"""

import functools
import json
import math
from pathlib import Path

import pytest
import swift.rewards
import torch
import transformers
from swift.arguments import RLHFArguments
from swift.pipelines import rlhf_main
from swift.rlhf_trainers import GRPOTrainer
from swift.template.templates.qwen import Qwen2VLTemplate

import yojo
from tests.reward_cases import Failing
from yojo.demo import digits
from yojo.demo.backbone import load_backbone
from yojo.rewards import RewardError
from yojo.rewards.swift import AsyncSwiftReward, SwiftReward

PLUGIN = Path(__file__).parents[2] / "examples" / "grpo" / "swift_plugin.py"
SIZE = 4


def whole(processor):
    """A processor with its video part, without which transformers' own `from_pretrained` reads none."""
    parts = processor.image_processor, processor.tokenizer, transformers.Qwen3VLVideoProcessor()
    return transformers.Qwen3VLProcessor(*parts, chat_template=processor.chat_template)


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """Folder of the demonstration's captioner, with a whole processor beside it."""
    folder = tmp_path_factory.mktemp("policy")
    model, processor = load_backbone()
    model.save_pretrained(folder)
    whole(processor).save_pretrained(folder)
    # ms-swift's template knows the id of the released tokenizer's token alone.
    Qwen2VLTemplate.image_token_id = model.config.image_token_id
    return folder


@pytest.fixture(scope="module")
def judge(make_reward_model, tmp_path_factory):
    """(folder, reward model): a whole one, whose scores depend on no order."""
    folder = tmp_path_factory.mktemp("judge") / "reward-model"
    made = make_reward_model(
        layers=1, mode="isolated"
    )  # a group's place in its row is worth 8e-7 here, in all layers 2.3e-6
    reward_model = yojo.RewardModel(made.model, whole(made.processor))
    reward_model.save_pretrained(folder)
    return folder, reward_model


@pytest.fixture()
def train(policy, tmp_path, monkeypatch):
    """Function (options of ms-swift) -> the samples and the rewards of each step, as its trainer has them."""
    images = [tmp_path / f"{n}.png" for n in range(6)]
    for path, (image, _) in zip(images, digits.load_digits_split()[0], strict=False):
        image.save(path)
    steps, score = [], GRPOTrainer._score_completions

    def watched(self, samples):
        samples = score(self, samples)
        steps.append((samples, self._rewards_per_func.clone()))
        return samples

    monkeypatch.setattr(GRPOTrainer, "_score_completions", watched)

    def run(prompts=(digits.PROMPT,), **options):
        rows = [
            {"messages": [{"role": "user", "content": prompts[n % len(prompts)]}], "images": [str(path)]}
            for n, path in enumerate(images)
        ]
        (tmp_path / "prompts.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        options = {"max_steps": 2, "per_device_train_batch_size": 2 * SIZE, "eval_strategy": "no"} | options
        arguments = RLHFArguments(
            rlhf_type="grpo",
            model=str(policy),
            model_type="qwen3_vl",
            dataset=[str(tmp_path / "prompts.jsonl")],
            output_dir=str(tmp_path / "out"),
            num_generations=SIZE,
            gradient_accumulation_steps=1,
            max_completion_length=12,
            temperature=1.5,
            torch_dtype="float32",
            tuner_type="lora",
            report_to=["none"],
            logging_steps=1,
            save_strategy="no",
            use_hf=True,
            dataloader_num_workers=0,
            dataset_num_proc=1,
            use_cpu=True,
            **options,
        )
        found = rlhf_main(arguments)
        return steps, found

    return run


def expected(reward_model, samples):
    """Rewards of samples by the judge's own `score`, of each group by itself."""
    groups = {}
    for n, sample in enumerate(samples):
        groups.setdefault((sample.images[0]["path"], json.dumps(sample.messages[:-1])), []).append(n)
    assert all(len(members) == SIZE for members in groups.values())
    found = [None] * len(samples)
    for (path, _), members in groups.items():
        prompt = samples[members[0]].messages[:-1]
        texts = [samples[n].messages[-1]["content"] for n in members]
        for n, score in zip(members, reward_model.score(prompt, texts, images=[path]).tolist(), strict=True):
            found[n] = score
    return found, groups


def test_both_ways_in_give_the_judges_scores_to_the_trainer(train, judge, monkeypatch):
    folder, reward_model = judge
    monkeypatch.setenv("YOJO_JUDGE", str(folder))
    monkeypatch.setenv("YOJO_GROUP_SIZE", str(SIZE))
    steps, found = train(
        [f"<image>{digits.PROMPT}", digits.PROMPT],  # without a tag the image stands in front, too
        external_plugins=[str(PLUGIN)],
        reward_funcs=["yojo"],
        reward_model=[str(folder)],
        reward_model_type=["qwen3_vl"],
        reward_model_plugin=["yojo"],
    )
    assert len(steps) == 2
    for samples, rewards in steps:
        wanted, groups = expected(reward_model, samples)
        assert len(groups) == 2 and rewards.shape == (2 * SIZE, 2)
        assert len(set(wanted)) > 2
        for column in rewards.T.tolist():
            assert column == pytest.approx(wanted, abs=2e-6)
    logged = [entry for entry in found["log_history"] if "rewards/SwiftReward/mean" in entry]
    for entry, (_, rewards) in zip(logged, steps, strict=True):
        assert entry["rewards/SwiftReward/mean"] == pytest.approx(rewards[:, 0].mean().item(), abs=2e-6)


def test_one_question_about_two_pictures_is_two_groups_though_their_prompt_id_is_one(train, judge, monkeypatch):
    _, reward_model = judge
    monkeypatch.setitem(swift.rewards.orms, "awaited", functools.partial(AsyncSwiftReward, judge=reward_model))
    steps, _ = train(reward_funcs=["awaited"], max_steps=1)
    for samples, rewards in steps:
        wanted, groups = expected(reward_model, samples)
        assert rewards[:, 0].tolist() == pytest.approx(wanted, abs=2e-6)
        assert len(groups) == 2 and len({sample.prompt_id for sample in samples}) == 1


def test_an_error_of_the_judge_ends_the_training(train, monkeypatch):
    monkeypatch.setattr("yojo.rewards.scorer.PAUSE", 0.0)
    monkeypatch.setitem(swift.rewards.orms, "failing", functools.partial(SwiftReward, judge=Failing()))
    with pytest.raises(RewardError, match="the line is down"):
        train(reward_funcs=["failing"])


def test_what_is_none_would_be_reward_0():
    """Why "none" is refused: what ms-swift makes of it."""
    from swift.rl_core.advantage import compute_advantages

    rewards = torch.tensor([[math.nan], [-3.0]])
    found = compute_advantages(rewards, torch.ones(1), 2, "grpo", "none", False, 0.0, None)
    assert found[1].tolist() == [0.0, -3.0]

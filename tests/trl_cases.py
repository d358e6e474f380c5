"""TRL's trainers on the demonstration's digits: a policy with LoRA on the tiny backbone, prompts with images, seconds a run."""

import copy
import functools
import hashlib

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import GRPOConfig, GRPOTrainer

import yojo
from yojo.demo import digits
from yojo.demo.backbone import load_backbone
from yojo.demo.reward import LORA_TARGETS, load_reward_model
from yojo.patching.modes import set_mode

GROUP = 4  # completions of a prompt


def lora(**options):
    return LoraConfig(**({"r": 4, "lora_alpha": 8, "target_modules": LORA_TARGETS} | options))


@functools.cache
def backbone():
    """(stock backbone, its processor); tests copy the model before they change anything."""
    return load_backbone()


def make_policy(seed=0, config=None):
    """A policy of its own: LoRA on a backbone that nothing else uses."""
    model = copy.deepcopy(backbone()[0])
    torch.manual_seed(seed)
    return get_peft_model(model, config or lora())


@functools.cache
def reward_model(mode="isolated"):
    """The trained reward model that ships with the demonstration; nothing may change it (see `checksum`).

    In mode "isolated" no score depends on the order of the completions.
    """
    model = load_reward_model()
    set_mode(model.model, mode)
    return yojo.RewardModel(model.model, model.processor)


def checksum(model):
    """Text that tells any change of a model's tensors, or of whether they take gradients or of the training mode."""
    state = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted({**dict(model.named_parameters()), **dict(model.named_buffers())}.items()):
        state.update(f"{name} {tensor.dtype} {tensor.requires_grad}".encode())
        state.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
    state.update(repr([name for name, module in model.named_modules() if module.training]).encode())
    return state.hexdigest()


def dataset(count=16, start=0, **columns):
    """Prompts as chat messages, each with an image of a digit in the column `image`."""
    samples = digits.load_digits_split()[0][start : start + count]
    question = [{"role": "user", "content": digits.PROMPT}]
    return Dataset.from_list(
        [{"prompt": question, "image": image, "digit": digit} | columns for image, digit in samples]
    )


def make_trainer(folder, policy, reward, *, kind=GRPOTrainer, config=GRPOConfig, data=None, eval_data=None, **options):
    """A trainer of TRL with two groups of four completions a step, on the CPU."""
    settings = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 2 * GROUP,
        "num_generations": GROUP,
        "max_completion_length": 8,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    return kind(
        policy,
        reward_funcs=reward,
        args=config(**(settings | options)),
        train_dataset=dataset() if data is None else data,
        eval_dataset=eval_data,
        processing_class=copy.deepcopy(backbone()[1]),
    )


class Watched:
    """A reward that notes what the trainer hands it and what it gets.

    Attributes:
        calls: list of (prompts, completions, images, rewards).
    """

    def __init__(self, reward):
        self.reward, self.calls = reward, []
        self.__name__ = reward.__name__

    def __call__(self, prompts, completions, **columns):
        rewards = self.reward(prompts, completions, **columns)
        self.calls.append((prompts, completions, columns["image"], rewards))
        return rewards


def expected(judge, prompts, completions, images):
    """Rewards of rows whose groups stand one behind the other: `judge.score` of each group, in the order of its rows."""
    found = []
    for start in range(0, len(prompts), GROUP):
        rows = range(start, start + GROUP)
        assert all(prompts[n] == prompts[start] and images[n].tobytes() == images[start].tobytes() for n in rows)
        texts = [completions[n][0]["content"] for n in rows]
        found += judge.score(prompts[start], texts, images=[images[start]]).tolist()
    return found

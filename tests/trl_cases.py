"""TRL's trainers on the demonstration's digits: a policy with LoRA on the tiny backbone, prompts with images, seconds a run."""

import copy
import functools
import hashlib

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from reward_cases import of_order_one

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
    """The trained reward model that ships with the demonstration, with scores of about one rather than ten.

    Nothing may change it (see `checksum`). In mode "isolated" no score depends on the order of the completions.
    """
    model = load_reward_model()
    set_mode(model.model, mode)
    return of_order_one(yojo.RewardModel(model.model, model.processor))


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


def make_trainer(folder, policy, reward, *, kind="GRPO", data=None, eval_data=None, **options):
    """A trainer of TRL, of the kind "GRPO" or "RLOO", with two groups of four completions a step, on the CPU."""
    import trl

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
    return getattr(trl, f"{kind}Trainer")(
        policy,
        reward_funcs=reward,
        args=getattr(trl, f"{kind}Config")(**(settings | options)),
        train_dataset=dataset() if data is None else data,
        eval_dataset=eval_data,
        processing_class=copy.deepcopy(backbone()[1]),
    )


class Noted:
    """A reward that notes what the trainer hands it and what it gets.

    Attributes:
        calls: list of (prompts, completions, images, rewards, token ids of the completions).
    """

    def __init__(self, reward):
        self.reward, self.calls = reward, []
        self.__name__ = reward.__name__

    def __call__(self, prompts, completions, completion_ids, **columns):
        rewards = self.reward(prompts, completions, completion_ids, **columns)
        self.calls.append((prompts, completions, columns["image"], rewards, completion_ids))
        return rewards


class NotedAwaited(Noted):
    """The same of a reward that is awaited."""

    async def __call__(self, prompts, completions, completion_ids, **columns):
        rewards = await self.reward(prompts, completions, completion_ids, **columns)
        self.calls.append((prompts, completions, columns["image"], rewards, completion_ids))
        return rewards


def expected(judge, prompts, completions, images, size=GROUP):
    """Rewards of rows whose groups stand one behind the other: `judge.score` of each, with its texts as the rows have them.

    The prompt is the one the dataset was made with, whatever the trainer makes of it.
    """
    found = []
    for start in range(0, len(prompts), size):
        rows = range(start, start + size)
        assert all(images[n].tobytes() == images[start].tobytes() for n in rows)
        texts = [completions[n][0]["content"] for n in rows]
        found += judge.score(digits.PROMPT, texts, images=[images[start]]).tolist()
    return found


def logged(trainer, without=("seconds", "step_time", "runtime", "per_second")):
    """What a trainer has logged at each step: list of dicts, without how long things took."""
    return [
        {name: value for name, value in entry.items() if not name.endswith(without)}
        for entry in trainer.state.log_history
        if "train_runtime" not in entry
    ]


def trained_weights(model):
    """dict: name -> weight that takes gradients, as it is now."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

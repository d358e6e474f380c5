"""`RewardTrainingArguments`: transformers' arguments, and what training a reward model needs besides."""

import dataclasses
import os

import torch
from transformers import TrainingArguments

from yojo.config import YojoConfig
from yojo.training import adapters
from yojo.training.options import RewardOptions

# Arguments of transformers that cannot mean anything here: the one value each may have, and why.
_MEANINGLESS = {
    "label_smoothing_factor": (
        0.0,
        "rankings are no class labels; graded targets with loss='soft' say how sure they are",
    ),
    "train_sampling_strategy": ("random", "examples of any length are packed into rows, and are shuffled every epoch"),
    "auto_find_batch_size": (False, "memory depends on row_tokens, not on the batch size: lower row_tokens instead"),
    "batch_eval_metrics": (False, "the ranking metrics are those of the whole evaluation set"),
    "include_num_input_tokens_seen": ("no", "a batch is several packed rows, whose tokens are not counted"),
}
YOJO_FIELDS = tuple(field.name for field in dataclasses.fields(YojoConfig))


@dataclasses.dataclass
class RewardTrainingArguments(RewardOptions, TrainingArguments):
    """transformers' `TrainingArguments`, and what training a reward model needs besides.

    Defaults that differ from transformers': learning_rate 1e-4, gradient checkpointing, bf16 on GPUs, logging_steps 10,
    two loader workers, DDP without a search for unused parameters, losses that are NaN shown as such. A global batch is
    per_device_train_batch_size x processes x gradient_accumulation_steps examples, as ever, but a process packs its examples
    into as many rows of at most row_tokens tokens as it takes, one forward and backward after the other: memory depends on
    row_tokens, not on the batch size.

    Its fields are those of `yojo.training.options.RewardOptions`, and transformers'.
    """

    def __post_init__(self):
        self._check()
        if self.global_batch_size is not None:
            self.per_device_train_batch_size = self._per_device()
        if self.bf16 is None:
            self.bf16 = (
                torch.cuda.is_available() and torch.cuda.is_bf16_supported() and not self.fp16 and not self.use_cpu
            )
        # Newer transformers call it activation checkpointing, and warn of the old name.
        new = hasattr(self, "activation_checkpointing")
        chosen = self.gradient_checkpointing
        if chosen is None:
            chosen = True if not new or self.activation_checkpointing is None else self.activation_checkpointing
        if new:
            self.activation_checkpointing, self.gradient_checkpointing = chosen, None
        else:
            self.gradient_checkpointing = chosen
        if self.label_names is None:
            self.label_names = ["rankings"]
        super().__post_init__()

    def _check(self):
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: a data set of examples has no columns")
        for name, (only, why) in _MEANINGLESS.items():
            value = getattr(self, name, only)
            if getattr(value, "value", value) not in (only, False):
                raise ValueError(f"{name} must be {only!r}: {why}")
        if self.tune is not None and self.tune not in adapters.TUNE:
            raise ValueError(f"tune must be one of {', '.join(adapters.TUNE)} or None, got {self.tune!r}")
        for name, least in (("row_tokens", 1), ("lora_r", 1), ("global_batch_size", 1), ("max_length", 1)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}")
        if self.max_responses is not None and self.max_responses < 2:
            raise ValueError(
                f"max_responses must be at least 2, got {self.max_responses}: one response is not compared"
            )
        if not self.center_scores >= 0:
            raise ValueError(f"center_scores must not be negative, got {self.center_scores}")
        YojoConfig.from_dict(self.yojo_options())

    def _per_device(self):
        world = int(os.environ.get("WORLD_SIZE", 1))
        micro = world * self.gradient_accumulation_steps
        if self.global_batch_size % micro:
            raise ValueError(
                f"global_batch_size {self.global_batch_size} cannot be shared by {world} processes x "
                f"{self.gradient_accumulation_steps} gradient_accumulation_steps: take a multiple of {micro}"
            )
        return self.global_batch_size // micro

    def yojo_options(self):
        """dict: the fields of `YojoConfig` that are set."""
        return {name: getattr(self, name) for name in YOJO_FIELDS if getattr(self, name) is not None}

    @property
    def order_seed(self):
        """The seed of the orders of examples and responses."""
        return self.seed if self.data_seed is None else self.data_seed

"""`RewardTrainingArguments`: transformers' arguments, and what training a reward model needs besides."""

import dataclasses
import os

import torch
from transformers import TrainingArguments

from yojo.config import YojoConfig
from yojo.training import adapters

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
class RewardTrainingArguments(TrainingArguments):
    """transformers' `TrainingArguments`, and what training a reward model needs besides.

    Defaults that differ from transformers': learning_rate 1e-4, gradient checkpointing, bf16 on GPUs, logging_steps 10,
    two loader workers, DDP without a search for unused parameters, losses that are NaN shown as such. A global batch is per_device_train_batch_size x
    processes x gradient_accumulation_steps examples, as ever, but a process packs its examples into as many rows of at
    most row_tokens tokens as it takes, one forward and backward after the other: memory depends on row_tokens, not on the
    batch size.

    Attributes:
        global_batch_size: examples of an optimizer step over all processes and accumulation steps;
            per_device_train_batch_size then follows from it. None: the other way round.
        row_tokens: token budget of a packed row; a single example may be longer.
        max_length: the most tokens an example may take, or None. A longer one is an error, or skipped with skip_bad.
        skip_bad: leave out examples that cannot be read or encoded; each is counted, logged with its reason, and listed in
            output_dir/skipped.jsonl.
        shuffle_responses: draw a new order of the responses for each example and epoch (from data_seed, or seed).
            Evaluation draws one order for good.
        max_responses: take at most so many of an example's responses, others in every epoch, or None for all. With 2,
            mode="isolated" and loss="bradley_terry" it trains the single-response baseline on pairs.
        center_scores: weight of the penalty (mean of a sample's scores)^2, averaged over samples, that keeps scores around
            0, which most losses leave free; 0 for none. For two responses a quarter of TRL's
            center_rewards_coefficient means the same.
        head_learning_rate: of the value head's weights; None: learning_rate.
        tune: "lora" (with the value head), "full" (decoder, embedding and value head) or "head" (the value head alone);
            None leaves requires_grad as the model has it. A `peft_config` given to the trainer goes before it.
        lora_r, lora_alpha, lora_dropout: of LoRA, the paper's by default.
        lora_targets: PEFT's target_modules, names separated by commas or a regular expression; None: attention and MLP
            projections of the decoder.
        mode, permutations, head, head_dim, activation, pooling, scale_scores, loss, separator, format, turn: fields
            of `YojoConfig` for a model that is not patched yet; None: their defaults.
    """

    learning_rate: float = dataclasses.field(default=1e-4, metadata={"help": "Peak learning rate."})
    logging_steps: float = dataclasses.field(default=10, metadata={"help": "Steps between two lines of the log."})
    bf16: bool | None = dataclasses.field(
        default=None, metadata={"help": "bfloat16 mixed precision; on GPUs that have it, by default."}
    )
    gradient_checkpointing: bool | None = dataclasses.field(
        default=None, metadata={"help": "Compute activations again in the backward, to save memory; on by default."}
    )
    logging_nan_inf_filter: bool = dataclasses.field(
        default=False, metadata={"help": "Leave NaN and infinite losses out of the logged mean; they are shown."}
    )
    dataloader_num_workers: int = dataclasses.field(
        default=2, metadata={"help": "Processes that read, encode and pack examples ahead of the training loop."}
    )
    ddp_find_unused_parameters: bool | None = dataclasses.field(
        default=False, metadata={"help": "Let DDP look for parameters without gradients; the defaults have none."}
    )
    remove_unused_columns: bool | None = dataclasses.field(
        default=False, metadata={"help": "Has no meaning for examples; must be false."}
    )
    global_batch_size: int | None = dataclasses.field(
        default=None,
        metadata={"help": "Examples of an optimizer step over all processes; sets per_device_train_batch_size."},
    )
    row_tokens: int = dataclasses.field(
        default=16384, metadata={"help": "Token budget of a packed row: what memory depends on."}
    )
    max_length: int | None = dataclasses.field(
        default=24576, metadata={"help": "The most tokens of an example; a longer one is an error (or skipped)."}
    )
    skip_bad: bool = dataclasses.field(
        default=False, metadata={"help": "Leave out examples that cannot be used; they are counted and listed."}
    )
    shuffle_responses: bool = dataclasses.field(
        default=True, metadata={"help": "Another order of the responses in every epoch."}
    )
    max_responses: int | None = dataclasses.field(
        default=None, metadata={"help": "Take at most so many responses of an example; 2 trains on pairs."}
    )
    center_scores: float = dataclasses.field(
        default=0.0, metadata={"help": "Weight of the penalty that keeps a sample's mean score at 0."}
    )
    head_learning_rate: float | None = dataclasses.field(
        default=None, metadata={"help": "Learning rate of the value head, if another than of the rest."}
    )
    tune: str | None = dataclasses.field(
        default="lora", metadata={"help": "What is trained besides the value head: lora, full or head (nothing)."}
    )
    lora_r: int = dataclasses.field(default=128, metadata={"help": "Rank of LoRA."})
    lora_alpha: float = dataclasses.field(default=16, metadata={"help": "Alpha of LoRA."})
    lora_dropout: float = dataclasses.field(default=0.05, metadata={"help": "Dropout of LoRA."})
    lora_targets: str | None = dataclasses.field(
        default=None,
        metadata={"help": "Modules LoRA adapts: names with commas, or a regular expression; by family if left out."},
    )
    mode: str | None = dataclasses.field(default=None, metadata={"help": "comparative (default) or isolated."})
    permutations: int | None = dataclasses.field(default=None, metadata={"help": "Orders scored as branches (1)."})
    head: str | None = dataclasses.field(default=None, metadata={"help": "Value head: mlp (default) or linear."})
    head_dim: int | None = dataclasses.field(default=None, metadata={"help": "Width of the mlp head (1024)."})
    activation: str | None = dataclasses.field(default=None, metadata={"help": "Of the mlp head (silu)."})
    pooling: str | None = dataclasses.field(default=None, metadata={"help": "What a score is read from (separator)."})
    scale_scores: bool | None = dataclasses.field(
        default=None, metadata={"help": "Divide scores by the square root of the hidden size (true)."}
    )
    loss: str | None = dataclasses.field(
        default=None, metadata={"help": "best (default), plackett_luce, bradley_terry or soft."}
    )
    separator: str | None = dataclasses.field(default=None, metadata={"help": "The token that closes a response."})
    format: str | None = dataclasses.field(default=None, metadata={"help": "Text format: yojo (default) or mr2rm."})
    turn: str | None = dataclasses.field(
        default=None,
        metadata={"help": "What stands between prompt and response: template (default) or generation_prompt."},
    )

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

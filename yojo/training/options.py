"""The options of `yojo train` that are ours, as dataclasses that load nothing: help is quick."""

import dataclasses
import json


@dataclasses.dataclass
class RunArguments:
    """What `yojo train` trains, and on what.

    Attributes:
        model: folder or hub name of a Hugging Face model with a language-model head; or of a reward model that YOJO
            saved, to go on from.
        train_data: files to train on (see `yojo.data.load`).
        train_weights: how many times each of them is seen in an epoch; 1 for all by default.
        eval_data: files to evaluate on.
        eval_fraction: share of the training data held out for evaluation instead, drawn with the data's seed.
        data_format, columns, image_root, allow_urls, keep_tied, close_gaps, literal_tags, ignore_columns: as
            `yojo.data.load` takes them.
        dtype: of the backbone: bfloat16, float16 or float32. By default bfloat16 on GPUs, float32 on CPUs and for
            tune=full.
        quantize: 4bit or 8bit: the frozen backbone through bitsandbytes (QLoRA).
        attn_implementation: of the parts that YOJO leaves alone (vision tower); sdpa by default.
        processor_options: keyword arguments of the processor, such as {"max_pixels": 1003520}; of a reward model that is
            trained further, too.
        check_base: of a reward model that is an adapter: refuse a base model with other weights than it was trained on.
        plots: draw training.png from the log, where matplotlib is installed.
    """

    model: str = dataclasses.field(metadata={"help": "Folder or hub name of the model to train."})
    train_data: list[str] = dataclasses.field(metadata={"help": "Preference files to train on."})
    train_weights: list[float] | None = dataclasses.field(
        default=None, metadata={"help": "How many times an epoch sees each file, in the order of train_data."}
    )
    eval_data: list[str] | None = dataclasses.field(default=None, metadata={"help": "Files to evaluate on."})
    eval_fraction: float = dataclasses.field(default=0.0, metadata={"help": "Share of train_data held out instead."})
    data_format: str = dataclasses.field(default="auto", metadata={"help": "Format of the files; found by columns."})
    columns: str | None = dataclasses.field(
        default=None, metadata={"help": "Column map of other files: prompt=question,responses=answers."}
    )
    image_root: str | None = dataclasses.field(default=None, metadata={"help": "What image paths are relative to."})
    allow_urls: bool = dataclasses.field(default=False, metadata={"help": "Fetch images given by URL."})
    keep_tied: bool = dataclasses.field(default=False, metadata={"help": "Take records whose responses all tie."})
    close_gaps: bool = dataclasses.field(default=False, metadata={"help": "Close gaps in rankings (1, 3 -> 1, 2)."})
    literal_tags: bool = dataclasses.field(
        default=False, metadata={"help": "<image> and <video> in prompts are characters, not places."}
    )
    ignore_columns: list[str] | None = dataclasses.field(
        default=None, metadata={"help": "Columns to leave out knowingly."}
    )
    dtype: str | None = dataclasses.field(default=None, metadata={"help": "bfloat16, float16 or float32."})
    quantize: str | None = dataclasses.field(default=None, metadata={"help": "4bit or 8bit, through bitsandbytes."})
    attn_implementation: str | None = dataclasses.field(default=None, metadata={"help": "sdpa by default."})
    processor_options: str | None = dataclasses.field(
        default=None, metadata={"help": 'JSON of keyword arguments of the processor: {"max_pixels": 1003520}.'}
    )
    check_base: bool = dataclasses.field(
        default=True, metadata={"help": "Refuse a base model with other weights than a saved adapter was trained on."}
    )
    plots: bool = dataclasses.field(default=True, metadata={"help": "Draw training.png."})

    def __post_init__(self):
        for name, choices in (("dtype", ("bfloat16", "float16", "float32")), ("quantize", ("4bit", "8bit"))):
            if getattr(self, name) not in (None, *choices):
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        if not 0 <= self.eval_fraction < 1:
            raise ValueError(f"eval_fraction must be at least 0 and less than 1, got {self.eval_fraction}")
        if self.eval_fraction and self.eval_data:
            raise ValueError("eval_data and eval_fraction are both given: take one")
        self.options_of_processor()
        if self.train_weights is not None and len(self.train_weights) != len(self.train_data):
            raise ValueError(f"{len(self.train_weights)} train_weights for {len(self.train_data)} train_data files")

    def column_map(self):
        """dict: native field -> column of the files; None where there is no map."""
        if self.columns is None:
            return None
        pairs = [pair.partition("=") for pair in self.columns.split(",")]
        wrong = [field for field, equals, column in pairs if not (field and equals and column)]
        if wrong:
            raise ValueError(f"columns must be field=column pairs with commas between, got {self.columns!r}")
        return {field.strip(): column.strip() for field, _, column in pairs}

    def options_of_processor(self):
        """dict: the processor's keyword arguments."""
        try:
            options = json.loads(self.processor_options or "{}")
        except ValueError as error:
            raise ValueError(f"processor_options must be JSON, got {self.processor_options!r}: {error}") from error
        if not isinstance(options, dict):
            raise ValueError(f'processor_options must be an object such as {{"max_pixels": 1003520}}, got {options!r}')
        return options


@dataclasses.dataclass
class RewardOptions:
    """What `RewardTrainingArguments` adds to transformers' `TrainingArguments`, and where its defaults differ.

    Attributes:
        learning_rate: the highest one of the schedule.
        logging_steps: steps between two lines of the log.
        bf16: bfloat16 mixed precision. None: on GPUs that have it.
        gradient_checkpointing: compute activations again in the backward, to save memory. None: yes.
        logging_nan_inf_filter: leave NaN and infinite losses out of the logged mean.
        dataloader_num_workers: processes that read, encode and pack examples ahead of the training loop.
        ddp_find_unused_parameters: let DDP look for parameters without gradients, of which the defaults have none.
        remove_unused_columns: must be False: examples have no columns.
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

"""`yojo train`: a configuration file and flags -> a trained reward model in a folder."""

import argparse
import dataclasses
import difflib
import json
import os
import sys
import time
from pathlib import Path

from transformers import HfArgumentParser

from yojo import data
from yojo.config import YojoConfig
from yojo.files.saved import CONFIG_FILE, local_folder, read_description
from yojo.inputs.processors import load_processor
from yojo.saving.load import load_pretrained
from yojo.training.adapters import trained_summary
from yojo.training.arguments import RewardTrainingArguments
from yojo.training.curves import draw
from yojo.training.options import RunArguments
from yojo.training.resume import checkpoints
from yojo.training.trainer import RewardTrainer

RUN_KEYS = {"config", "flags", "command", "cwd"}  # of run.json


class Parser(HfArgumentParser):
    """One flag for every field; a mistake is a ValueError that names the nearest one."""

    def __init__(self):
        super().__init__(
            (RunArguments, RewardTrainingArguments),
            prog="yojo train",
            description="Train a reward model. Every option can stand in --config FILE.yaml, and be overridden here.",
            allow_abbrev=False,
            formatter_class=argparse.HelpFormatter,
        )
        optional = {
            field.name
            for cls in (RunArguments, RewardTrainingArguments)
            for field in dataclasses.fields(cls)
            if field.type == bool | None
        }
        for action in self._actions:
            if action.dest in optional and action.nargs is None:
                action.nargs, action.const = "?", True  # --bf16 by itself, as transformers' own flags

    def error(self, message):
        raise ValueError(message)


def parse(argv):
    """(RunArguments, RewardTrainingArguments, chosen) of `yojo train`'s arguments.

    Args:
        argv: list of strings; `--config FILE.yaml` (or .json, such as the `run.json` of an earlier run) among them stands
            for the options in that file, which others on the line override.

    Returns:
        the two dataclasses, and a dict of what was chosen in file and flags, as strings.

    Raises:
        ValueError: an unknown option (the nearest known ones are named), a value of the wrong type, a missing file.
    """
    argv, config = _split_equals(argv), {}
    if "--config" in argv:
        at = argv.index("--config")
        if at + 1 == len(argv):
            raise ValueError("--config needs a file")
        if "--config" in argv[at + 1 :]:
            raise ValueError("--config is given twice: one file holds the options, flags override them")
        config = read_config(argv[at + 1])
        del argv[at : at + 2]
        if RUN_KEYS <= set(config):  # a run.json
            config, argv = config["config"], [*config["flags"], *argv]
    parser = Parser()
    known = {field.name for cls in (RunArguments, RewardTrainingArguments) for field in dataclasses.fields(cls)}
    for name in config:
        if name not in known:
            raise ValueError(f"unknown option {name!r} in the configuration file{_nearest(name, known)}")
    given = []
    for name, value in config.items():
        given += _as_flags(name, value)
    names = {option for action in parser._actions for option in action.option_strings}
    for word in argv:
        if word.startswith("--") and word.partition("=")[0] not in names:
            raise ValueError(f"unknown option {word.partition('=')[0]}{_nearest(word[2:].replace('-', '_'), known)}")
    run, arguments = parser.parse_args_into_dataclasses(given + argv, look_for_args_file=False)
    return run, arguments, {"config": config, "flags": argv}


def _split_equals(argv):
    return [part for word in argv for part in (word.split("=", 1) if word.startswith("--config=") else [word])]


def read_config(path):
    """The options of a YAML or JSON file, a dict."""
    import yaml

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"no such configuration file: {path}")
    try:
        config = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must hold options as `name: value` lines, got {type(config).__name__}")
    return config


def _as_flags(name, value):
    # Through the parser, as flags are: YAML reads 1e-4 as text, and types are the fields' affair.
    if value is None:
        return []
    if value is False and name.endswith("_strategy"):
        value = "no"  # which YAML takes for false
    if isinstance(value, bool):
        return [f"--{name}", str(value).lower()]
    if isinstance(value, dict):
        if name == "columns":
            return [f"--{name}", ",".join(f"{field}={column}" for field, column in value.items())]
        return [f"--{name}", json.dumps(value)]
    if isinstance(value, list):
        return [f"--{name}", *map(str, value)] if value else []
    return [f"--{name}", str(value)]


def _nearest(name, known):
    near = difflib.get_close_matches(name, known, 3)
    return f"; did you mean {' or '.join(near)}?" if near else "; `yojo train --help` lists them"


# ---- model ----


def load_model(run, arguments):
    """The model to train and its processor, not patched unless it is a reward model already."""
    import torch

    processor_options = run.options_of_processor()
    cuda = torch.cuda.is_available() and not arguments.use_cpu
    name = run.dtype or ("bfloat16" if cuda and arguments.tune != "full" else "float32")
    options = {"dtype": getattr(torch, name)}
    if run.attn_implementation is not None:
        options["attn_implementation"] = run.attn_implementation
    if run.quantize is not None:
        options["quantization_config"] = _quantization(run, arguments, options["dtype"])
        if cuda:
            options["device_map"] = {"": arguments.device}
    if _is_reward_model(run.model):
        saved = YojoConfig.from_saved(read_description(local_folder(run.model))["config"]).to_dict()
        for option, value in arguments.yojo_options().items():
            if value != saved[option]:
                raise ValueError(
                    f"{run.model} was saved with {option}={saved[option]!r}: it cannot be trained further with "
                    f"{option}={value!r}; leave the option out, or start from its base model"
                )
        return load_pretrained(
            run.model, trainable=True, check_base=run.check_base, processor_options=processor_options, **options
        )
    processor = load_processor(run.model, **processor_options)
    return _model_class(run.model).from_pretrained(run.model, **options), processor


def _is_reward_model(path):
    """Whether a folder, or a repository of the hub, holds a reward model that YOJO saved: its head must not be lost."""
    if Path(path).exists():
        return (Path(path) / CONFIG_FILE).is_file()
    from huggingface_hub import hf_hub_download

    try:
        return bool(hf_hub_download(str(path), CONFIG_FILE))
    except (OSError, ValueError):  # no such file there; or no such repository, which loading the model will say
        return False


def _quantization(run, arguments, dtype):
    import importlib.util

    if arguments.tune != "lora":
        raise ValueError(
            f"a quantized backbone is trained through adapters alone: tune must be lora (QLoRA), got {arguments.tune}"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError("quantize needs bitsandbytes: pip install 'yojo[quantize]'")
    from transformers import BitsAndBytesConfig

    if run.quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _model_class(path):
    import transformers

    config = transformers.AutoConfig.from_pretrained(path)
    images = type(config) in transformers.AutoModelForImageTextToText._model_mapping
    return transformers.AutoModelForImageTextToText if images else transformers.AutoModelForCausalLM


# ---- data ----


class Subset:
    """Some of the examples of a map-style data set."""

    def __init__(self, dataset, places):
        self.dataset, self.places = dataset, places

    def __len__(self):
        return len(self.places)

    def __getitem__(self, place):
        return self.dataset[self.places[place]]


def load_data(run, seed):
    """(training set, evaluation set or None)."""
    options = {
        "format": run.data_format,
        "columns": run.column_map(),
        "image_root": run.image_root,
        "allow_urls": run.allow_urls,
        "keep_tied": run.keep_tied,
        "close_gaps": run.close_gaps,
        "literal_tags": run.literal_tags,
        "ignore_columns": run.ignore_columns or (),
    }
    train = [data.load(path, **options) for path in run.train_data]
    if run.eval_data:
        held_out = {Path(path).stem: data.load(path, **options) for path in run.eval_data}
        if len(held_out) < len(run.eval_data):
            raise ValueError(f"eval_data files need different names, got {', '.join(run.eval_data)}")
        evaluation = next(iter(held_out.values())) if len(held_out) == 1 else held_out
    else:
        evaluation = None
    if run.eval_fraction:
        train, evaluation = _hold_out(train, run.eval_fraction, seed)
    if len(train) == 1 and run.train_weights is None:
        return train[0], evaluation
    return data.Mixture(train, run.train_weights), evaluation


def _hold_out(datasets, fraction, seed):
    """Each data set less a share of it, and those shares together."""
    import random

    kept, held = [], []
    for n, dataset in enumerate(datasets):
        places = list(range(len(dataset)))
        random.Random(f"{seed}:hold out:{n}").shuffle(places)
        count = max(1, round(fraction * len(places)))
        if count >= len(places):
            raise ValueError(f"eval_fraction {fraction} leaves nothing to train on of {len(places)} examples")
        held.append(Subset(dataset, sorted(places[:count])))
        kept.append(Subset(dataset, sorted(places[count:])))
    return kept, held[0] if len(held) == 1 else data.Mixture(held)


# ---- the run ----


def train(argv):
    """What `yojo train` does; returns the trainer.

    Args:
        argv: list of strings, see `parse`.
    """
    run, arguments, chosen = parse(argv)
    if arguments.eval_strategy == "no" and (run.eval_data or run.eval_fraction) and not _named("eval_strategy", chosen):
        arguments = dataclasses.replace(arguments, eval_strategy="epoch")
    resume = _resume_from(arguments)
    import transformers

    main = arguments.process_index == 0
    if not main:
        transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    training_set, evaluation_set = load_data(run, arguments.order_seed)
    transformers.set_seed(arguments.seed)  # of the value head and of LoRA
    model, processor = load_model(run, arguments)
    provenance = {
        "data": ", ".join(Path(path).name for path in run.train_data),
        "train_weights": run.train_weights,
        "train_examples": len(training_set),
        "eval_data": run.eval_data and ", ".join(Path(path).name for path in run.eval_data),
        "seed": arguments.seed,
        "data_seed": arguments.order_seed,
        "global_batch_size": arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size,
        "learning_rate": arguments.learning_rate,
        "tune": arguments.tune,
    }
    provenance = {name: value for name, value in provenance.items() if value is not None}
    trainer = RewardTrainer(model, arguments, training_set, evaluation_set, processor, provenance=provenance)
    if main:
        _print_settings(trainer, run, training_set, evaluation_set)
        _record(Path(arguments.output_dir), chosen)
    started = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume)
    metrics = _last_evaluation(trainer) if evaluation_set is not None else {}
    trainer.provenance["steps"] = trainer.state.global_step
    trainer.provenance["metrics"] = {
        name: value for name, value in metrics.items() if not name.endswith(("_per_second", "_runtime"))
    }
    trainer.save_model()
    trainer.save_state()
    if main:
        _finish(trainer, run, metrics, time.perf_counter() - started)
    return trainer


def _last_evaluation(trainer):
    """Metrics of the trained model: those of the evaluation at the last step, or made now."""
    lines = [line for line in trainer.state.log_history if line["step"] == trainer.state.global_step]
    made = {name: value for line in lines for name, value in line.items() if name.startswith("eval_")}
    return made if made and not trainer.args.load_best_model_at_end else trainer.evaluate()


def _named(option, chosen):
    return option in chosen["config"] or any(
        word.partition("=")[0].replace("-", "_") == f"__{option}" for word in chosen["flags"]
    )


def _resume_from(arguments):
    found = checkpoints(arguments.output_dir)
    wanted = arguments.resume_from_checkpoint
    if wanted is None:
        if found:
            raise ValueError(
                f"{arguments.output_dir} holds {found[-1].name} of another run: pass --resume_from_checkpoint last to go on "
                "from it, or another --output_dir"
            )
        return None
    if str(wanted).lower() in ("false", "no"):
        raise ValueError("resume_from_checkpoint is a folder, or last; leave it out to begin a run")
    if str(wanted).lower() in ("last", "true"):
        if not found:
            raise ValueError(f"{arguments.output_dir} holds no checkpoint to resume from")
        return str(found[-1])
    if not Path(wanted).is_dir():
        raise ValueError(f"no such checkpoint: {wanted}")
    return wanted


def _record(folder, chosen):
    """Write what was chosen, so that the run can be repeated from its own folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({**chosen, "command": sys.argv, "cwd": os.getcwd()}, indent=2) + "\n")


def _print_settings(trainer, run, training_set, evaluation_set):
    from rich.console import Console
    from rich.table import Table

    arguments, config = trainer.args, trainer.collator.config
    batch = arguments.train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    steps = -(-len(training_set) // batch)
    evaluation = evaluation_set.values() if isinstance(evaluation_set, dict) else [evaluation_set]
    rows = {
        "model": f"{run.model}" + (f", {run.quantize}" if run.quantize else ""),
        "trained": f"{arguments.tune or 'as given'}: {trained_summary(trainer.model)}",
        "scores": f"{config.mode} mode, pooling {config.pooling}, {config.head} head, loss {config.loss}",
        "data": f"{len(training_set):,} examples to train on, "
        + (f"{sum(map(len, evaluation)):,} to evaluate on" if evaluation_set is not None else "none to evaluate on"),
        "global batch": f"{batch} = {arguments.train_batch_size} x {arguments.world_size} processes x "
        f"{arguments.gradient_accumulation_steps} accumulated; rows of up to {arguments.row_tokens:,} tokens",
        "length": f"{arguments.num_train_epochs:g} epochs of {steps:,} steps"
        if arguments.max_steps < 0
        else f"{arguments.max_steps:,} steps",
        "optimizer": f"{getattr(arguments.optim, 'value', arguments.optim)}, learning rate {arguments.learning_rate:g}"
        + (f" (head {arguments.head_learning_rate:g})" if arguments.head_learning_rate is not None else "")
        + f", {getattr(arguments.lr_scheduler_type, 'value', arguments.lr_scheduler_type)}, clip {arguments.max_grad_norm:g}",
        "precision": f"{str(next(trainer.model.parameters()).dtype).removeprefix('torch.')} weights"
        + (", bf16 autocast" if arguments.bf16 else ", fp16 autocast" if arguments.fp16 else ""),
        "seeds": f"{arguments.seed}, orders {arguments.order_seed}",
        "device": f"{arguments.device}",
        "output": f"{arguments.output_dir}",
    }
    if trainer.args.tune == "lora":
        lora = trainer.model.peft_config[trainer.model.active_adapter]
        rows["trained"] = (
            f"LoRA r {lora.r}, alpha {lora.lora_alpha:g}, dropout {lora.lora_dropout:g}: {trained_summary(trainer.model)}"
        )
    table = Table(show_header=False, box=None)
    for name, value in rows.items():
        table.add_row(name, value)
    Console(stderr=True).print(table)


def _finish(trainer, run, metrics, seconds):
    from rich.console import Console

    console = Console(stderr=True, soft_wrap=True, highlight=False)
    folder = Path(trainer.args.output_dir)
    if run.plots:
        try:
            console.print(f"curves: {draw(trainer.state.log_history, folder / 'training.png')}")
        except ImportError:
            console.print("no curves: matplotlib is not installed")
    if trainer.skipped:
        console.print(f"skipped: {len(trainer.skipped)} examples, listed in {folder / 'skipped.jsonl'}")
    accuracy = {name: value for name, value in metrics.items() if name.endswith(("best_of_n", "pairwise"))}
    shown = ", ".join(f"{name.removeprefix('eval_')} {value:.1%}" for name, value in accuracy.items())
    console.print(f"trained in {seconds:.0f} s{': ' + shown if shown else ''}")
    console.print(f"reward model: {folder}; score with `yojo score IMAGE --model {folder} --prompt ... --response ...`")

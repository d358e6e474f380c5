"""`yojo train`."""

import dataclasses

import typer

from yojo.cli.quiet import quiet_transformers
from yojo.cli.shared import fail
from yojo.training.options import RewardOptions, RunArguments

_USAGE = """Usage: yojo train --config FILE.yaml [--OPTION VALUE ...]

Train a reward model. Every option can stand in the file, as `name: value`, and be overridden here.

  --config FILE   YAML or JSON; the run.json of an earlier run repeats it
  --help          This text
  --help-all      This text, and all of transformers' TrainingArguments
"""
# What most runs set of the 100 options of transformers.
_OFTEN = (
    *("output_dir", "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps"),
    *("lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm", "optim", "seed", "data_seed"),
    *("eval_strategy", "eval_steps", "save_strategy", "save_steps", "save_total_limit", "resume_from_checkpoint"),
    *("load_best_model_at_end", "report_to", "push_to_hub", "use_cpu"),
)


def train(context: typer.Context):
    """Train a reward model: yojo train --config FILE.yaml [--OPTION VALUE ...]; --help lists the options."""
    if "--help-all" in context.args:
        from yojo.training import recipe

        recipe.Parser().print_help()
        return
    if "--help" in context.args or "-h" in context.args:
        typer.echo(usage())
        return
    if not context.args:
        fail("nothing to train: yojo train --config FILE.yaml, or --model, --train_data and --output_dir; see --help")
    quiet_transformers()
    from yojo.training import recipe

    try:
        recipe.train(context.args)
    except (TypeError, ValueError, OSError, ImportError) as error:
        fail(str(error))


def usage():
    """Our own options, without loading transformers, whose options are named alone."""
    lines = [_USAGE]
    for title, options in (("What to train, and on what", RunArguments), ("How to train it", RewardOptions)):
        lines += [f"{title}:", *map(_line, dataclasses.fields(options)), ""]
    lines += ["Of transformers' TrainingArguments, among others (--help-all has them all):"]
    return "\n".join([*lines, *_wrapped(_OFTEN)])


def _line(field):
    default = "" if field.default in (dataclasses.MISSING, None) else f" [{field.default}]"
    required = " (required)" if field.default is dataclasses.MISSING else ""
    return f"  --{field.name:<28} {field.metadata['help']}{default}{required}"


def _wrapped(names, width=100):
    import textwrap

    return textwrap.wrap(", ".join(f"--{name}" for name in names), width, initial_indent="  ", subsequent_indent="  ")

"""What is trained of a backbone: LoRA on its decoder, all of it, or nothing but the value head."""

import dataclasses
import re

import torch

from yojo.patching.state import patched_base

TUNE = ("lora", "full", "head")


NO_TARGETS = ("gate", "router")  # of mixtures of experts: who routes tokens is left as it is


def lora_targets(model):
    """The attention and MLP projections of the text decoder, as PEFT's `target_modules`.

    Whatever the family calls them; vision tower, connector and vocabulary projection are not among them.

    Args:
        model: a patched model.

    Returns:
        A regular expression that matches their full names.
    """
    base = patched_base(model, "lora_targets")
    decoder = base.get_decoder()
    prefix = next(name for name, module in base.named_modules() if module is decoder)
    names = {
        name.rpartition(".")[2]
        for name, module in decoder.named_modules()
        if isinstance(module, torch.nn.Linear) and ".layers." in f".{name}"
    }
    names = sorted(names - set(NO_TARGETS))
    if not names:
        raise ValueError(f"{type(base).__name__} has no linear layers in its decoder for LoRA to adapt")
    return rf"(.*\.)?{re.escape(prefix)}\.(.*\.)?layers\..*\.({'|'.join(names)})"


def lora_config(model, *, r=128, alpha=16, dropout=0.05, targets=None):
    """A PEFT `LoraConfig` for a reward model, the paper's by default.

    Args:
        model: a patched model.
        r, alpha, dropout: of LoRA.
        targets: PEFT's `target_modules`; the decoder's projections by default (see `lora_targets`).

    Returns:
        `peft.LoraConfig` that trains and saves the value head (`score`), and with it the separator's embedding.
    """
    from peft import LoraConfig

    return LoraConfig(
        r=r,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=lora_targets(model) if targets is None else targets,
        modules_to_save=["score"],
    )


def check_config(config):
    """Refuse a PEFT config that would leave the value head untrained, or unsaved.

    Args:
        config: a PEFT config.

    Raises:
        ValueError: its modules_to_save lack "score".
    """
    if "score" not in (getattr(config, "modules_to_save", None) or ()):
        raise ValueError(
            "the PEFT config does not train the value head: add modules_to_save=['score'], or take "
            "yojo.training.adapters.lora_config(model)"
        )


def check_existing(model, args):
    """Refuse arguments that ask for something else than to train the adapter a model has.

    Args:
        model: a PEFT model.
        args: `RewardTrainingArguments`; LoRA's settings at their defaults ask for nothing.
    """
    if args.tune not in ("lora", None):
        raise ValueError(
            f"the model has an adapter, and tune={args.tune!r} would not train it: leave tune out to train the adapter "
            "further, or merge it first (yojo merge)"
        )
    defaults = {field.name: field.default for field in dataclasses.fields(args)}
    config = model.peft_config[model.active_adapter]
    for name, key in (("lora_r", "r"), ("lora_alpha", "lora_alpha"), ("lora_dropout", "lora_dropout")):
        wanted, has = getattr(args, name), getattr(config, key, None)
        if wanted not in (defaults[name], has):
            raise ValueError(f"{name} is {wanted}, but the model has an adapter already, with {has}: leave {name} out")
    if args.lora_targets is not None:
        raise ValueError("lora_targets is given, but the model has an adapter already: leave it out")


def choose_trained(model, tune):
    """Set `requires_grad` for training without adapters.

    Args:
        model: a patched model.
        tune: "full", decoder, embedding and value head, not the vision tower nor a vocabulary projection of its own,
            which no score depends on; or "head", the value head alone. The separator's embedding stays as it is then,
            since its gradient would have to come down through all of the backbone.
    """
    base = patched_base(model, "choose_trained")
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    if tune == "full":
        for module in (base.get_decoder(), base.get_input_embeddings()):
            for parameter in module.parameters():
                if not parameter.is_floating_point():
                    raise ValueError("a quantized backbone cannot be trained in full: tune='lora' adapts it (QLoRA)")
                parameter.requires_grad_(True)
    elif tune != "head":
        raise ValueError(f"tune must be one of {', '.join(TUNE)}, got {tune!r}")
    for name, parameter in base.score.named_parameters():
        parameter.requires_grad_(tune == "full" or name != "separator_delta")


def trained_summary(model):
    """One line: how many weights are trained, of how many.

    Args:
        model: any torch module.

    Returns:
        str.
    """
    counts = [(p.numel(), p.requires_grad) for p in model.parameters()]
    trained, total = sum(n for n, grad in counts if grad), sum(n for n, _ in counts)
    return f"{trained:,} of {total:,} weights ({trained / total:.2%})"

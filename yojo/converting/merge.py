"""Adapters merged into full models."""

import logging
from pathlib import Path

import torch

from yojo.files.saved import (
    local_folder,
    read_description,
)
from yojo.reward_model import RewardModel
from yojo.saving.load import Checks, load_described
from yojo.saving.save import save_pretrained

logger = logging.getLogger(__name__)


def merge(path, out, *, base_model=None, device=None, check_base=True, check_files=True):
    """Make a full model out of a saved adapter: the same scores within rounding, and no adapter needed to load it.

    Weights are merged in float32 and then cast to the dtype the model was saved in. A quantized base model is
    dequantized first, since the adapter was trained on what the quantized weights stand for.

    Args:
        path: folder or hub name of a reward model that `save_pretrained` wrote with an adapter.
        out: folder for the full model.
        base_model: where the base model lies, if not where it was when the adapter was saved.
        device: where to merge; the CPU by default.
        check_base, check_files: as for `load_pretrained`.

    Returns:
        The merged `yojo.RewardModel`.

    Raises:
        ValueError: a folder that holds no adapter, or none that fits (see `load_pretrained`).
    """
    reward_model = merged(path, base_model=base_model, device=device, check_base=check_base, check_files=check_files)
    save_pretrained(reward_model, out, provenance={"merged from": Path(path).name})
    return reward_model


def merged(path, *, base_model=None, device=None, check_base=True, check_files=True):
    """What `merge` saves, in memory alone."""
    path = local_folder(path)
    description = read_description(path)
    if not description["adapter"]:
        raise ValueError(f"{path} holds a full model already: there is no adapter to merge")
    quantized = description.get("quantization")

    def prepare(base):
        if not quantized:
            return base
        logger.warning("the base model is dequantized from %s to be merged", quantized.get("quant_method"))
        return base.dequantize().float()

    checks = Checks(check_base, check_files)
    model, processor = load_described(
        path, description, base_model, torch.float32, device, None, {}, prepare, checks=checks
    )
    base = model.merge_and_unload(safe_merge=True)
    dtype = getattr(torch, description["dtype"])
    for name, parameter in base.named_parameters():
        if not name.startswith("score.") and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(True)
    for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
        config.dtype = dtype
    return RewardModel(base.eval(), processor)

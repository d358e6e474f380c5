"""Checkpoints of transformers' own Trainer, and `model.save_pretrained`, of a patched model: its head and settings found again.

Such a folder is a plain model's, with the value head among the weights (`score.*`) and the settings in config.json
(`yojo`). transformers loads the model and leaves the head out; a patch that began anew would score at random.
"""

import json
from pathlib import Path

# ---- loading ----
from yojo.files.whole import loaded_whole
from yojo.inputs.processors import load_processor
from yojo.patching.patch import patch


def is_checkpoint(path):
    """Whether a folder is a checkpoint of a patched model, with a model and not an adapter alone."""
    try:
        return isinstance(json.loads((Path(path) / "config.json").read_text()).get("yojo"), dict)
    except (OSError, ValueError, AttributeError):
        return False


@loaded_whole()
def load(path, *, dtype=None, device=None, fuse=None, probe=True, processor_options=None, **kwargs):
    """(patched model in eval mode, processor) of a checkpoint of a patched model that has its processor beside it."""
    import transformers

    settings = json.loads((Path(path) / "config.json").read_text())
    name = next(iter(settings.get("architectures") or ()), None)
    # FSDP makes a class of its own and puts its name before transformers'.
    model_class = getattr(transformers, name or "", None) or getattr(
        transformers, (name or "").removeprefix("FSDP"), None
    )
    if model_class is None:
        raise ValueError(f"{path}: config.json names the model class {name}, which transformers lacks")
    try:
        processor = load_processor(path, **(processor_options or {}))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is a checkpoint of a patched model without its processor ({error}): load the model with transformers, "
            "yojo.patch(model, processor) with the processor it was trained with, and save it with "
            "RewardModel(model, processor).save_pretrained"
        ) from error
    model = model_class.from_pretrained(path, dtype=dtype or "auto", **kwargs)
    patch(model, processor, fuse=fuse, probe=probe)
    if device is not None:
        model.to(device)
    return model.eval(), processor

"""Score N candidate responses to one multimodal prompt in one forward pass of a Hugging Face model."""

import importlib

__version__ = "0.1.0"

# Public name -> the module it lives in; loaded on first use, since torch and transformers take seconds.
_HOMES = {
    "Collator": "yojo.inputs.packing",
    "Example": "yojo.inputs.example",
    "RewardModel": "yojo.reward_model",
    "RewardTrainer": "yojo.training.trainer",
    "RewardTrainingArguments": "yojo.training.arguments",
    "Video": "yojo.inputs.videos",
    "YojoConfig": "yojo.config",
    "patch": "yojo.patching.patch",
    "unpatch": "yojo.patching.patch",
}

__all__ = [*_HOMES, "__version__", "data"]


def __getattr__(name):
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name == "data":
        return importlib.import_module("yojo.data")
    raise AttributeError(f"module 'yojo' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOMES})

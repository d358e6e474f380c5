"""Score N candidate responses to one multimodal prompt in one forward pass of a Hugging Face model."""

import importlib

from yojo.config import YojoConfig

# Imported here rather than on first use because the module has the function's name: once `yojo.patch` is loaded by
# anyone, it would hide the function. The module itself is light; transformers' modeling code is loaded when it is run.
from yojo.patch import patch, unpatch

__version__ = "0.1.0"

__all__ = [
    "Collator",
    "Example",
    "RewardModel",
    "RewardTrainer",
    "RewardTrainingArguments",
    "Video",
    "YojoConfig",
    "__version__",
    "data",
    "patch",
    "unpatch",
]

_HOMES = {
    "Collator": "yojo.packing",
    "Example": "yojo.packing",
    "RewardModel": "yojo.model",
    "RewardTrainer": "yojo.train",
    "RewardTrainingArguments": "yojo.arguments",
    "Video": "yojo.videos",
}


def __getattr__(name):
    # Loaded on first use: transformers' modeling code takes seconds, and `import yojo` should not.
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name == "data":
        return importlib.import_module("yojo.data")
    raise AttributeError(f"module 'yojo' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOMES})

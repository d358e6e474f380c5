"""Score N candidate responses to one multimodal prompt in one forward pass of a Hugging Face model."""

import importlib
import importlib.abc
import importlib.machinery
import sys
import types

__version__ = "0.1.0"

# Public name -> the module it lives in; loaded on first use, since torch and transformers take seconds.
_HOMES = {
    "Collator": "yojo.inputs.packing",
    "Example": "yojo.inputs.example",
    "GroupReward": "yojo.rewards.group",
    "RemoteJudge": "yojo.judges.remote",
    "RewardModel": "yojo.reward_model",
    "RewardTrainer": "yojo.training.trainer",
    "RewardTrainingArguments": "yojo.training.arguments",
    "Video": "yojo.inputs.videos",
    "YojoConfig": "yojo.config",
    "evaluate": "yojo.evaluation.evaluate",
    "order_bias": "yojo.evaluation.listed",
    "patch": "yojo.patching.patch",
    "score_file": "yojo.scoring.file",
    "unpatch": "yojo.patching.patch",
}

# Modules of before there were rooms -> where their names are now, so that `yojo.flops.scoring_flops`,
# `from yojo.adapters import lora_targets` and pickles of old runs (training_args.bin) go on working.
_MOVED = {
    "adapters": ("training.adapters", "saving.parts"),
    "arguments": ("training.arguments",),
    "batches": ("training.batches",),
    "checking": ("data.checking",),
    "checkpoint": (
        "saving.save",
        "saving.load",
        "saving.parts",
        "converting.merge",
        "converting.released",
        "files.saved",
        "files.folders",
    ),
    "columns": ("data.columns",),
    "curves": ("training.curves",),
    "dates": ("patching.dates",),
    "export": ("converting.export",),
    "families": ("families.family", "patching.decoders", "patching.joining", "patching.positions"),
    "fingerprints": ("patching.fingerprints",),
    "flops": ("costs.flops",),
    "fuse": ("patching.fuse", "patching.layers"),
    "graphs": ("patching.graphs",),
    "images": ("inputs.images",),
    "media": ("patching.media",),
    "messages": ("inputs.messages",),
    "metrics": ("evaluation.metrics",),
    "model": ("patching.forward", "patching.head", "patching.readings", "reward_model"),
    "mr2rm": ("inputs.mr2rm",),
    "packing": ("inputs.packing", "inputs.example"),
    "plain": ("inputs.plain",),
    "pooling": ("patching.pooling",),
    "processors": ("inputs.processors",),
    "profiling": ("costs.profiling",),
    "prompts": ("inputs.prompts", "inputs.placeholders"),
    "readers": ("data.readers",),
    "recipe": ("training.recipe", "training.options"),
    "released": ("converting.released",),
    "resume": ("training.resume",),
    "saved": ("files.saved",),
    "sources": ("data.sources", "data.fields"),
    "stock": ("saving.stock", "patching.recorded"),
    "train": ("training.trainer",),
    "turns": ("inputs.turns",),
    "versions": ("patching.versions",),
    "videos": ("inputs.videos",),
    "vision": ("costs.vision",),
}

__all__ = [*_HOMES, "__version__", "data", "judges", "rankings", "rewards"]


def __getattr__(name):
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    if name in ("data", "judges", "rankings", "rewards") or name in _MOVED:
        return importlib.import_module(f"yojo.{name}")
    raise AttributeError(f"module 'yojo' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOMES})


def former(module, name):
    """What a module of before had under a name; a room of the same name asks for what has moved out of it."""
    # What asks a module what it is (inspect, pickle, doctest) must not load it for that.
    for home in () if name.startswith("__") else _MOVED[module.partition(".")[2]]:
        found = importlib.import_module(f"yojo.{home}")
        if hasattr(found, name):
            return getattr(found, name)
    raise AttributeError(f"module {module!r} has no attribute {name!r}")


class _Moved(types.ModuleType):
    """A module of before: has what its successors have."""

    def __getattr__(self, name):
        return former(self.__name__, name)


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds modules by the names they had."""

    def find_spec(self, fullname, path=None, target=None):
        package, _, name = fullname.partition(".")
        if package == "yojo" and name in _MOVED:
            return importlib.machinery.ModuleSpec(fullname, self)
        return None

    def create_module(self, spec):
        return _Moved(spec.name)

    def exec_module(self, module):
        """There is nothing to run: names are looked up when they are asked for."""


sys.meta_path.append(_Finder())

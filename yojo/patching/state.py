"""What a patched model carries, and the questions that everyone asks of a model: is it patched, what is inside its wrappers."""

import dataclasses
import datetime
import typing

import torch

from yojo.config import YojoConfig
from yojo.patching import ropes
from yojo.patching.attention import register
from yojo.patching.eval_mode import EvalMode
from yojo.patching.fuse import Fusion
from yojo.patching.recorded import Recorded


@dataclasses.dataclass
class Patch:
    """What a patched model carries as `model.yojo`: its settings, and what `unpatch` needs.

    Attributes:
        config: the `YojoConfig`.
        separator_id: token id of the separator, or None when no processor was given.
        stock_attention: the attention implementation the model had before.
        stock_forward: the instance's own `forward` before, where something else had set one; else None.
        stock_vocabulary: rows of the embedding before it was resized; None if it was not.
        stock_row: the embedding of an existing row that became the separator's; None if there is none.
        set_vocab_size: whether resizing gave the model an attribute `vocab_size` that it did not have.
        whole_last_layer: why the last layer computes rows that nobody reads; None where it does not. Setting it to
            some text makes it compute them all, for comparison.
        fusion: how the decoder layers are fused.
        date: the `datetime.date` that the chat template prints for good (see `yojo.patching.dates`); None where it prints none, or
            no processor was given yet.
        weights: samples of the backbone's weights as they were patched (see `yojo.patching.fingerprints`).
        came_with: what a checkpoint of a patched model said of it (see `yojo.stock`), or None.
        rope: where the frequencies of the model's rope depend on the length of a pass; None where they do not.
        eval_mode: keeps the model in eval mode while threads score with it.
    """

    config: YojoConfig
    separator_id: int | None
    stock_attention: str
    stock_forward: typing.Any = None
    stock_vocabulary: int | None = None
    stock_row: torch.Tensor | None = None
    set_vocab_size: bool = False
    whole_last_layer: str | None = None
    fusion: Fusion | None = dataclasses.field(default=None, repr=False)
    date: datetime.date | None = None
    weights: dict = dataclasses.field(default_factory=dict, repr=False)
    came_with: Recorded | None = dataclasses.field(default=None, repr=False)
    rope: ropes.Switch | None = None
    eval_mode: EvalMode = dataclasses.field(default_factory=EvalMode, repr=False)

    def __setstate__(self, state):
        self.__dict__.update(state)
        register(self.stock_attention)  # a process that only unpickles the model has not patched any

    @property
    def fuse(self):
        """The `fuse` the model is patched with."""
        return self.fusion.fuse

    @property
    def graphs(self):
        """The `graphs` the model is patched with."""
        return 0 if self.fusion.graphs is None else self.fusion.graphs.limit


def unwrap(model):
    """The transformers model inside torch.compile, DistributedDataParallel and PEFT wrappers."""
    while True:
        if hasattr(model, "_orig_mod"):
            model = model._orig_mod
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            model = model.get_base_model()
        else:
            return model


def is_patched(model):
    """Whether this (unwrapped) model carries a patch."""
    return isinstance(getattr(model, "yojo", None), Patch)


def patched_base(model, caller):
    """The unwrapped model, or a ValueError that tells `caller`'s user to patch it first."""
    base = unwrap(model)
    if not is_patched(base):
        raise ValueError(f"{caller} needs a patched model: call yojo.patch(model, processor) first")
    return base


def tokenizer_of(processor):
    """The tokenizer of a processor; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def separator_id_of(tokenizer, separator):
    """The id of the separator token, or None where the tokenizer lacks it."""
    return tokenizer.get_vocab().get(separator)

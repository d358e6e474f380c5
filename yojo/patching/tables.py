"""Tile tables that the collator makes: on the CPU, in a loader's worker or beside the pass of the row before.

Made on a GPU they are some hundred small kernels in front of a row's first layer. Which ones a model will ask for follows
from facts about its attention layers and its device, gathered in the process that holds the model; what is not foreseen is
made when it is asked for.
"""

import dataclasses
import os
import weakref

import torch

from yojo.patching import decoders, devices
from yojo_kernels import AttentionCall, choose_attention

SMALL_HEAD_DIM = 64  # one that kernels take wherever they run


@dataclasses.dataclass(frozen=True)
class Asking:
    """What of an attention layer decides about its tables.

    Attributes:
        head_dim, num_heads, num_key_heads: as its attention function gets them.
        window: sliding window, or None.
        capped: whether scores have a soft cap.
        causal: whether the kernels also run rows that are causal as they stand.
    """

    head_dim: int
    num_heads: int
    num_key_heads: int
    window: int | None
    capped: bool = False
    causal: bool = True


@dataclasses.dataclass(frozen=True)
class Facts:
    """What decides which tables a model asks for.

    Attributes:
        machine: the `tuning.Machine` it runs on.
        dtype: of queries, keys and values.
        layers: `Asking`s, each kind once.
        trains: whether any weight asks for gradients.
    """

    machine: "tuning.Machine"  # noqa: F821 - what asks devices loads more of torch than importing yojo may
    dtype: torch.dtype
    layers: tuple[Asking, ...]
    trains: bool

    def keys(self, layout, gradients=False):
        """list of the tables that a pass over this row asks for, without gradients or with them."""
        from yojo_kernels.tables import tables_for

        found, gradients = {}, gradients and self.trains
        for layer in self.layers:
            if layout.causal and layer.window is None and not layer.causal:
                continue
            heads = layer.num_heads, layer.num_key_heads
            facts = layer.head_dim, *heads, layer.window, gradients, layer.capped
            keys = tables_for(layout, self.machine, self.dtype, *facts)
            found.update(dict.fromkeys(key for key in keys if key is not None))
        return list(found)


def facts_of(attentions, device, dtype, trains=False):
    """The `Facts` of a decoder's attention modules; None where they do not run in the kernels.

    Args:
        attentions: the modules, see `yojo.patching.decoders.attention_modules`; or a function that finds them.
        device: what they run on.
        dtype: of queries, keys and values.
        trains: whether any weight asks for gradients.
    """
    if choose_attention(AttentionCall(device, dtype, SMALL_HEAD_DIM, num_samples=2))[0] != "triton":
        return None
    from yojo_kernels import tuning

    layers = []
    for layer in map(asking, attentions() if callable(attentions) else attentions):
        names = [
            choose_attention(AttentionCall(device, dtype, layer.head_dim, causal, num_samples=2, gradients=trains))[0]
            for causal in (False, True)
        ]
        if names[0] == "triton":
            layers.append(dataclasses.replace(layer, causal=names[1] == "triton"))
    if not layers:
        return None
    return Facts(tuning.machine_of(device), dtype, tuple(dict.fromkeys(layers)), trains)


def asking(module):
    """The `Asking` of one of a decoder's attention modules."""
    config = module.config
    heads = config.num_attention_heads
    head_dim = getattr(module, "qk_head_dim", None) or getattr(module, "head_dim", None)
    groups = getattr(module, "num_key_value_groups", None) or heads // getattr(config, "num_key_value_heads", heads)
    own = getattr(module, "sliding_window", getattr(config, "sliding_window", None))
    capped = bool(getattr(module, "attn_logit_softcapping", None))
    return Asking(head_dim or config.hidden_size // heads, heads, heads // groups, own, capped)


class Tables:
    """Makes the tables of a model's rows; holds no weights, so that a loader's worker can carry it.

    Where the model is known it is asked where it is; elsewhere (in another process, or behind pickle) what was last seen
    holds.

    Args:
        base: the patched model, unwrapped.
    """

    def __init__(self, base):
        self.__setstate__({"facts": None, "dtype": None})
        self.follow(base)
        self.look()

    def __getstate__(self):
        self.look()
        return {"facts": self.facts, "dtype": self.dtype}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._base = self._process = self._seen = None

    def follow(self, base):
        """Say which model it is for, in the process that holds the model."""
        if self._process != os.getpid() or self._base() is not base:
            self._base, self._process, self._seen = weakref.ref(base), os.getpid(), None

    def look(self, dtype=None):
        """Gather the facts anew where the model has moved; to be called before a loader starts its workers.

        Args:
            dtype: from now on the dtype of the model's passes, where autocast will set another than its weights have.
        """
        self.dtype = dtype or self.dtype
        base = self._base() if self._process == os.getpid() else None
        if base is not None and (seen := self._runs_in(base)) != self._seen:
            trains = any(parameter.requires_grad for parameter in base.parameters())
            self.facts, self._seen = facts_of(lambda: decoders.attention_modules(base), *seen, trains), seen

    def _runs_in(self, base):
        """(device, dtype) of the model's attention."""
        weight = devices.embedding_of(base).weight
        kind = weight.device.type
        if self.dtype is None and kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind):
            return weight.device, torch.get_autocast_dtype(kind)
        return weight.device, self.dtype or weight.dtype

    def make(self, layout, gradients=False):
        """Make the tables that a pass over the row will ask for.

        Args:
            layout: `Layout`, on the CPU.
            gradients: whether the row may be trained on.
        """
        self.look()
        if self.facts is not None:
            layout.make_tables(self.facts.keys(layout, gradients))

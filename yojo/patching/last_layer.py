"""The last decoder layer for the rows that are read: keys and values for every token, all else for those rows alone.

Nothing reads the other rows of the last layer, so their queries, attention output and MLP are never needed. The layer
runs its own forward twice: on all tokens as far as its attention, which keeps keys and values and stops it there, and
on the rows that are read, whose queries then meet those keys and values. Norms, projections and rotary embeddings stay
the family's own code.
"""

import dataclasses
import functools

import torch

from yojo import families
from yojo.patching import fuse, graphs, methods
from yojo_kernels import Layout

# More rows than this share of the row, and queries without a kernel of their own cost more than the layer saves.
LARGEST_SHARE = 1 / 4
# Fewer FLOPs than this of the layer's MLP in the rows that nobody reads, and running it twice costs more than it saves.
FEWEST_FLOPS = 2**27

# Forward hooks that can do without an attention output that is never made: transformers' own recorders of hidden
# states and attentions, which are not listening here, those of `yojo profile`, which are called all the same, and around
# the whole layer, FSDP's.
_HARMLESS_HOOKS = ("transformers.utils.output_capturing", "yojo.costs.profiling")
_HARMLESS_AROUND = (*_HARMLESS_HOOKS, "torch.distributed")


@dataclasses.dataclass(frozen=True, eq=False)
class ReadRows:
    """Which rows of the final hidden states a pass reads; travels to the last layer as the keyword `read_rows`.

    Attributes:
        rows: [M] int64, those of the first sample first and so on.
        counts: S ints, how many of them belong to each sample.
    """

    rows: torch.Tensor
    counts: tuple[int, ...]


class Stop(Exception):
    """Ends the layer's first run at its attention."""


class KeysWanted:
    """Stands for the layout in the layer's first run: the attention function gives it keys and values of all tokens."""

    def __init__(self, device):
        self.device = device

    def take(self, key, value):
        """Keep key and value, [1, Hkv, T, D], and stop the layer."""
        self.key, self.value = key, value
        raise Stop


@dataclasses.dataclass(frozen=True, eq=False)
class Reading:
    """Stands for the layout in the layer's second run: M queries, and the keys and values they meet.

    Attributes:
        layout: the `Layout` of the row.
        read: the `ReadRows`.
        key: [1, Hkv, T, D].
        value: [1, Hkv, T, D].
    """

    layout: Layout
    read: ReadRows
    key: torch.Tensor
    value: torch.Tensor

    @property
    def device(self):
        """Where the tensors lie."""
        return self.layout.device


def install(base):
    """Give the last decoder layer of a model a forward that obeys `read_rows`.

    Returns:
        None, or why it cannot be done, in which case nothing is changed.
    """
    decoder = base.get_decoder()
    if not _is_token_wise(decoder):
        return f"{decoder.config.model_type} decoders are not known to treat every token of a layer alone but for its attention"
    layer = last_layer(base)
    if methods.on(layer) not in (None, fuse.layer_forward):
        return "something else has replaced the forward of the last layer"
    deepstack = getattr(getattr(base.config, "vision_config", None), "deepstack_visual_indexes", None) or ()
    if len(deepstack) >= len(decoder.layers):
        return "vision features are added behind the last layer"
    methods.put(layer, "forward", forward)
    return None


def remove(base):
    """Undo `install`, where it did anything."""
    if _is_token_wise(base.get_decoder()):
        layer = last_layer(base)
        if methods.on(layer) is forward:
            del layer.forward  # `yojo.fuse` puts its own back where it is to stay


def _is_token_wise(decoder):
    known = families.decoder_of(decoder.config)
    return known is not None and known.token_wise


def last_layer(base):
    """The last layer of a model's decoder."""
    return base.get_decoder().layers[-1]


def applies(base, num_read, num_tokens):
    """Whether the last layer of a patched model computes so few rows alone, in a row of so many tokens."""
    if base.yojo.whole_last_layer is not None or num_read > LARGEST_SHARE * num_tokens:
        return False
    config = base.get_decoder().config
    return 6 * config.hidden_size * config.intermediate_size * (num_tokens - num_read) >= FEWEST_FLOPS


def request(base, rows, counts, layout):
    """The keyword arguments that make the last layer compute these rows alone; none where it had better not.

    The layer may still run on all rows: the number of rows of the final hidden states says which it was.

    Args:
        base: the patched model.
        rows: [M] int64, the rows to read, sample by sample.
        counts: S ints, how many of them belong to each sample; those of a row's filling have none.
        layout: `Layout` of the packed row.
    """
    if torch.compiler.is_compiling() or not applies(base, rows.shape[0], layout.num_tokens):
        return {}
    if _is_watched(last_layer(base)):
        return {}
    filling = (0,) * (layout.num_samples - len(counts))
    return {"read_rows": ReadRows(rows, (*counts, *filling))}


def forward(self, hidden_states, *args, read_rows=None, **kwargs):
    """The forward of a patched last layer: the class's own, for all rows or for those that are read.

    Args:
        hidden_states: [1, T, H].
        *args: what the decoder hands its layers by position.
        read_rows: `ReadRows`, or None for all rows.
        **kwargs: what the decoder hands its layers, `layout` among it.

    Returns:
        [1, M, H] with read_rows, else what the layer returns.
    """
    if read_rows is None or torch.compiler.is_compiling() or args or not _is_known(kwargs, hidden_states.shape[1]):
        whole = fuse.layer_forward if "yojo_fusion" in self.__dict__ else type(self).forward
        return whole(self, hidden_states, *args, **kwargs)
    hidden_states = graphs.settled(hidden_states)
    if _own_forward(self) is not type(self).forward and self.gradient_checkpointing and self.training:
        # transformers checkpoints inside the class's forward: both runs belong into one checkpoint.
        run = functools.partial(_two_runs, self, read_rows=read_rows, **kwargs)
        return self._gradient_checkpointing_func(run, hidden_states)
    return _two_runs(self, hidden_states, read_rows=read_rows, **kwargs)


def _two_runs(self, hidden_states, *, read_rows, layout, **kwargs):
    own, wanted, rows = _own_forward(self), KeysWanted(layout.device), read_rows.rows
    if "yojo_fusion" in self.__dict__ and self.yojo_fusion.of_pass(layout) == "liger":
        own = fuse.run_liger
    try:
        own(self, hidden_states, layout=wanted, **kwargs)
    except Stop:
        reading = Reading(layout, read_rows, wanted.key, wanted.value)
    else:
        raise RuntimeError(f"{type(self).__name__} did not call its attention function with the layout it was given")
    if kwargs.get("position_ids") is not None:
        kwargs["position_ids"] = kwargs["position_ids"][..., rows]
    kwargs["position_embeddings"] = tuple(part[..., rows, :] for part in kwargs["position_embeddings"])
    return own(self, hidden_states[:, rows], layout=reading, **kwargs)


def _own_forward(layer):
    """The class's forward without the gradient checkpointing that transformers puts around it."""
    function = type(layer).forward
    while function.__code__.co_name == "forward_with_checkpointing":
        function = function.__wrapped__
    return function


def _is_known(kwargs, num_tokens):
    """Whether the layer is called as expected, with nothing per token but what is known to be."""
    embeddings, ids = kwargs.get("position_embeddings"), kwargs.get("position_ids")
    return (
        isinstance(kwargs.get("layout"), Layout)
        and kwargs.get("past_key_values") is None
        and isinstance(embeddings, tuple)
        and all(isinstance(part, torch.Tensor) and part.shape[-2] == num_tokens for part in embeddings)
        and (ids is None or ids.shape[-1] == num_tokens)
        and not any(
            isinstance(value, (torch.Tensor, tuple, list, dict))
            for name, value in kwargs.items()
            if name not in ("position_embeddings", "position_ids", "attention_mask")
        )
    )


def _is_watched(layer):
    """Whether hooks wait for what the layer's submodules return, or move their weights about."""
    for module in layer.modules():
        harmless = _HARMLESS_AROUND if module is layer else _HARMLESS_HOOKS
        hooks = (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
        if hasattr(module, "_hf_hook") or not all(_module_of(hook).startswith(harmless) for hook in hooks):
            return True
    return False


def _module_of(hook):
    return getattr(hook, "__module__", None) or type(hook).__module__

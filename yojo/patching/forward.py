"""The patched forward, its value head and output, and `RewardModel`."""

import dataclasses
import functools
import inspect
import types

import torch
from transformers.utils import ModelOutput

from yojo import families
from yojo.patching import last_layer, media, methods, separator
from yojo.patching import pooling as poolings
from yojo.patching.readings import Separators
from yojo_kernels import listwise_loss


@dataclasses.dataclass
class RewardOutput(ModelOutput):
    """What a patched model returns for a batch of responses.

    Attributes:
        loss: float32 scalar, the mean over samples; None without rankings.
        scores: [S, Nmax] float32, one row per sample, responses in the caller's order, -inf where there is none.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None


def scoring_forward(self, *args, layout=None, separators=None, placeholders=None, rankings=None, **kwargs):
    """The forward of a patched model.

    Args:
        *args: the model's own inputs by position.
        layout: `Layout` of a packed row, from `yojo.Collator`; None for ordinary inputs.
        separators: `Separators` of the packed row, from `yojo.Collator`.
        placeholders: `Placeholders` of a packed row with images, from `yojo.Collator`; without them the model finds
            the placeholders itself, for which it waits for the device.
        rankings: [S, Nmax], 1 = best, -1 where there is no response (float targets for the loss "soft").
        **kwargs: the model's own inputs: input_ids [1, T], position_ids, vision tensors, ... And `num_items_in_batch`,
            an int or a scalar tensor: how many samples the loss is a mean over, where these here are a part of a larger
            batch (several rows, accumulated gradients, several processes); the samples given here by default.

    Returns:
        `RewardOutput` for a packed row, or for ordinary [B, L] inputs that contain separators; otherwise whatever
        the model returns.
    """
    if layout is not None:
        return _score_packed(self, layout, separators, placeholders, rankings, args, kwargs)
    is_separator = _separators_in(self, args, kwargs)
    if is_separator is not None:
        return _score_plain(self, is_separator, rankings, args, kwargs)
    if rankings is not None:
        raise ValueError(
            "rankings are given but nothing to score: the inputs hold neither a layout (yojo.Collator makes one) nor "
            f"separator tokens {self.yojo.config.separator!r}"
        )
    stock = self.yojo.stock_forward
    return type(self).forward(self, *args, **kwargs) if stock is None else stock(*args, **kwargs)


NEW_ARGUMENTS = ("layout", "separators", "placeholders", "rankings")


@functools.cache
def scoring_forward_of(cls):
    """`scoring_forward` under the signature of the model class's own forward.

    Trainer keeps the columns it finds in that signature, and generate() checks arguments against it.
    """
    function = type(scoring_forward)(
        scoring_forward.__code__, scoring_forward.__globals__, "scoring_forward", scoring_forward.__defaults__
    )
    function.__kwdefaults__ = scoring_forward.__kwdefaults__
    function.__doc__ = scoring_forward.__doc__
    own = inspect.signature(cls.forward)
    extra = [inspect.signature(scoring_forward).parameters[name] for name in NEW_ARGUMENTS]
    parameters = list(own.parameters.values())
    at = len(parameters) - 1 if parameters[-1].kind is inspect.Parameter.VAR_KEYWORD else len(parameters)
    function.__signature__ = own.replace(parameters=parameters[:at] + extra + parameters[at:])
    return function


def install(base):
    """Give a model `scoring_forward`: as a bound method, which accelerate wraps and unwraps, and pickled as one."""
    base.forward = bound_forward(base)
    methods.put(base, "__reduce_ex__", _reduced)


def remove(base):
    """Undo `install`."""
    del base.forward
    for module in base.modules():
        module.__dict__.pop("__reduce_ex__", None)


def bound_forward(base):
    """`scoring_forward` as a method of one model."""
    return types.MethodType(scoring_forward_of(type(base)), base)


def _reduced(base, protocol):
    for module in base.modules():
        if module is not base and _records(module):
            methods.put(module, "__reduce_ex__", _reduced_part)
    made, arguments, state, *rest = _without_recorders(base, protocol)
    if methods.on(base) is scoring_forward_of(type(base)):
        state = {**state, "forward": _PickledForward(base)}
    return made, arguments, state, *rest


def _reduced_part(module, protocol):
    made, arguments, state, *rest = _without_recorders(module, protocol)
    return made, arguments, {name: value for name, value in state.items() if name != "__reduce_ex__"}, *rest


# Once it has been asked for hidden states, as many vision towers are for an image, a model of transformers carries hooks that
# record them: local functions, which do not pickle. A model without them gets them again at the next such pass.

_RECORDED = "_output_capturing_hooks_installed"


def _without_recorders(module, protocol):
    made, arguments, state, *rest = type(module).__reduce_ex__(module, protocol)
    hooks = module._forward_hooks
    kept = type(hooks)((key, hook) for key, hook in list(hooks.items()) if not _is_recorder(hook))
    state = {name: value for name, value in state.items() if name != _RECORDED}
    return made, arguments, {**state, "_forward_hooks": kept}, *rest


def _records(module):
    return _RECORDED in vars(module) or any(map(_is_recorder, list(module._forward_hooks.values())))


def _is_recorder(hook):
    return getattr(hook, "__module__", None) == "transformers.utils.output_capturing"


class _PickledForward:
    """Stands for the forward while a model is pickled: Python would look the method up on a model that is not there yet."""

    def __init__(self, base):
        self.base = base

    def __reduce__(self):
        return bound_forward, (self.base,)


def _score_packed(self, layout, separators, placeholders, rankings, args, kwargs):
    if args:
        raise TypeError("a packed batch is passed by name: model(**batch)")
    if separators is None:
        raise TypeError("layout is given without separators: pass the whole batch of yojo.Collator, model(**batch)")
    pooling = self.yojo.config.pooling
    if separators.pooling != pooling:
        raise ValueError(
            f"the batch was made for pooling={separators.pooling!r}, the model is patched with pooling={pooling!r}: "
            "make it with a yojo.Collator of this model"
        )
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    num_items = kwargs.pop("num_items_in_batch", None)
    for name in ("labels", "past_key_values", "inputs_embeds", "attention_mask"):
        if name in kwargs:
            raise ValueError(f"{name} has no meaning for a packed row of responses; leave it out")
    input_ids = kwargs["input_ids"]
    device = input_ids.device  # a blocking copy would wait until the device has done all it was given before
    layout, separators = layout.to(device, non_blocking=True), separators.to(device, non_blocking=True)
    # A 4-D mask is handed down as it is, so no L x L mask is ever built. Every layer reads the layout instead; one
    # that did not would turn the scores into NaN, or be caught by the attention function.
    mask = torch.full((1, 1, 1, 1), float("nan"), dtype=self.dtype, device=input_ids.device)
    rows = separators.read
    few = last_layer.request(self, rows, separators.read_counts, layout)
    if placeholders is not None:
        placeholders = placeholders.to(device, non_blocking=True)
    inputs = {**kwargs, "attention_mask": mask, **few}
    row_graphs = self.yojo.fusion.graphs
    if row_graphs is None or torch.compiler.is_compiling():  # a compiler gets no context to break its graph in
        hidden = _fused_hidden_states(self, layout, inputs, placeholders)
    else:
        with row_graphs.row(layout) as layout:
            hidden = _fused_hidden_states(self, layout, inputs, placeholders)
    if hidden.shape[0] != layout.num_tokens:  # the rows that are read, and no others
        rows = torch.arange(rows.shape[0], device=rows.device)
    if hidden.device != rows.device:  # a model over several devices ends on another than it began
        rows, separators = rows.to(hidden.device), separators.to(hidden.device)
    readings = self.score(hidden, rows, separators.lengths).view(separators.weights.shape)
    scores = (readings * separators.weights).sum(dim=1)
    return _output(self, scores, separators, rankings, num_items)


def _separators_in(self, args, kwargs):
    """[B, L] bool, where ordinary inputs hold separators; None where this is not a batch to score."""
    separator_id = self.yojo.separator_id
    input_ids = args[0] if args else kwargs.get("input_ids")
    if separator_id is None or not isinstance(input_ids, torch.Tensor) or input_ids.ndim != 2:
        return None
    # generate() passes a cache, language-model training passes labels: neither should wait for the device here.
    if kwargs.get("past_key_values") is not None or kwargs.get("labels") is not None:
        return None
    is_separator = input_ids == separator_id
    return is_separator if bool(is_separator.any()) else None


def _score_plain(self, is_separator, rankings, args, kwargs):
    config = self.yojo.config
    if config.format == "mr2rm":
        raise ValueError(
            "ordinary [B, L] inputs do not say where a row of format='mr2rm' ends, and its last response has no "
            "separator behind it: use yojo.Collator"
        )
    if config.mode != "comparative" or config.permutations != 1:
        raise ValueError(
            f"ordinary [B, L] inputs with separators are scored in comparative mode only, and the model is patched "
            f"with mode={config.mode!r}, permutations={config.permutations}: use yojo.Collator, which packs them"
        )
    if config.pooling not in poolings.BY_END:
        raise ValueError(
            f"pooling={config.pooling!r} reads a response from its first token on, and ordinary [B, L] inputs do not "
            f"say where the first one begins: use yojo.Collator, or {' or '.join(map(repr, poolings.BY_END))}"
        )
    if self.yojo.rope is not None:
        self.yojo.rope.check(is_separator.shape[1], "the batch", "its longest row")
    kwargs = {name: value for name, value in kwargs.items() if value is not None}
    num_items = kwargs.pop("num_items_in_batch", None)
    if args:
        names = list(inspect.signature(type(self).forward).parameters)[1:]
        kwargs.update(zip(names, args, strict=False))
    if bool((~is_separator.any(dim=1)).any()):
        raise ValueError(
            f"row {int((~is_separator.any(dim=1)).nonzero()[0])} of the batch holds no separator "
            f"{config.separator!r}: every response must be closed by one"
        )
    if config.pooling == "last":
        _check_no_response_is_empty(is_separator, config.separator)
    length = is_separator.shape[1]
    rows = [(b * length + found.nonzero()[:, 0]).tolist() for b, found in enumerate(is_separator)]
    spans = [[[(None, at)] for at in row] for row in rows]
    separators = Separators.build(spans, config.pooling, device=is_separator.device)
    if rankings is not None:
        _check_plain_rankings(rankings, rows, config.loss)
    hidden = _hidden_states(self, kwargs).flatten(0, 1)
    scores = self.score(hidden, separators.read)
    return _output(self, scores, separators, rankings, num_items)


def _check_no_response_is_empty(is_separator, separator):
    """A separator right behind another one, or at the row's start, leaves no token for the pooling "last" to read."""
    behind = torch.nn.functional.pad(is_separator[:, :-1], (1, 0), value=True)
    empty = (is_separator & behind).nonzero().tolist()
    if empty:
        raise ValueError(
            f"row {empty[0][0]} of the batch holds an empty response: nothing stands before the separator "
            f"{separator!r} at place {empty[0][1]}, and pooling='last' reads the token before it"
        )


def _check_plain_rankings(rankings, rows, loss):
    if rankings.ndim != 2 or rankings.shape[0] != len(rows):
        raise ValueError(f"rankings must have shape [{len(rows)}, responses], got {list(rankings.shape)}")
    for row, (given, found) in enumerate(zip(rankings.tolist(), rows, strict=True)):
        ranked = [rank >= 0 if loss == "soft" else rank >= 1 for rank in given]
        if ranked != [True] * len(found) + [False] * (len(given) - len(found)):
            raise ValueError(
                f"row {row} holds {len(found)} separators but its rankings are {given}: one rank from 1 (best) per "
                "response, then -1 up to the width of the batch"
            )


def _fused_hidden_states(self, layout, inputs, placeholders):
    """[T, H], or [R, H] where the last layer computed just the rows that are read."""
    layout = self.yojo.fusion.begin(layout)
    hidden = _hidden_states(self, {**inputs, "layout": layout}, placeholders)[0]
    self.yojo.fusion.end(layout)
    return hidden


def _hidden_states(self, inputs, placeholders=None):
    """Final hidden states of the backbone alone: no vocabulary logits, no list of every layer's states."""
    inputs = {name: value for name, value in inputs.items() if name != "logits_to_keep"}
    inputs.update(use_cache=False, output_hidden_states=False, output_attentions=False, return_dict=True)
    if not torch.compiler.is_compiling():  # the embedding may have been resized or wrapped since
        separator.install(self)
    family = families.family_of(self.config)
    if placeholders is None or media.is_watched(self):
        return self.base_model(**media.whole({**inputs, "placeholders": placeholders}, family))[0]
    backbone, inputs = media.embed(self, inputs, placeholders, family)
    return backbone(**inputs)[0]


def _output(self, scores, separators, rankings, num_items=None):
    loss = None
    if rankings is not None:
        if rankings.ndim != 2 or rankings.shape[0] != separators.num_samples or rankings.shape[1] < separators.width:
            raise ValueError(
                f"rankings must have shape [{separators.num_samples}, {separators.width}], samples by responses, got "
                f"{list(rankings.shape)}"
            )
        flat = rankings.to(scores.device, non_blocking=True)[:, : separators.width].flatten()[separators.cells]
        kind = self.yojo.config.loss
        if num_items is None:
            loss = listwise_loss(scores, flat, separators.offsets, kind=kind)
        else:
            loss = listwise_loss(scores, flat, separators.offsets, kind=kind, reduction="sum") / num_items
    table = scores.new_full((separators.num_samples * separators.width,), float("-inf"))
    table = table.scatter(0, separators.cells, scores)
    return RewardOutput(loss=loss, scores=table.view(separators.num_samples, separators.width))

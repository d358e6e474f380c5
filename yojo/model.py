"""The patched forward, its value head and output, and `RewardModel`."""

import dataclasses
import functools
import inspect
import logging
import math
import types

import torch
from transformers.utils import ModelOutput

from yojo import devices, families, graphs, last_layer, media, methods, separator
from yojo import pooling as poolings
from yojo.eval_mode import Modules
from yojo.patch import unwrap
from yojo_kernels import listwise_loss, score_head

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class RewardOutput(ModelOutput):
    """What a patched model returns for a batch of responses.

    Attributes:
        loss: float32 scalar, the mean over samples; None without rankings.
        scores: [S, Nmax] float32, one row per sample, responses in the caller's order, -inf where there is none.
    """

    loss: torch.Tensor | None = None
    scores: torch.Tensor | None = None


class ScoreHead(torch.nn.Module):
    """The value head: final hidden states, pooled -> one float32 score per reading.

    Its weights are plain parameters rather than Linear layers, so that neither quantisation nor
    `LoraConfig(target_modules="all-linear")` takes hold of them. With them lives `separator_delta` [H], what training
    adds to the separator's embedding (see `yojo.separator`).
    """

    def __init__(self, hidden_size, config):
        super().__init__()
        width = poolings.width(config.pooling, hidden_size)
        if config.head == "mlp":
            self.weight1 = torch.nn.Parameter(torch.empty(config.head_dim, width))
            self.bias1 = torch.nn.Parameter(torch.zeros(config.head_dim))
            torch.nn.init.normal_(self.weight1, std=0.01)
            width = config.head_dim
        else:
            self.weight1 = self.bias1 = None
        self.weight2 = torch.nn.Parameter(torch.empty(1, width))
        self.bias2 = torch.nn.Parameter(torch.zeros(1))
        torch.nn.init.normal_(self.weight2, std=0.01)
        self.separator_delta = torch.nn.Parameter(torch.zeros(hidden_size))
        self.pooling = config.pooling
        self.activation = config.activation
        self.scale = math.sqrt(hidden_size) if config.scale_scores else 1.0

    def forward(self, hidden, rows, lengths=None):
        """Score every reading: hidden [T, H], rows [R] int64 and lengths as `Separators` has them -> [Q] float32.

        With a pooling that reads one row, R = Q and the head gathers the rows itself.
        """
        if self.pooling not in poolings.ONE_ROW:
            hidden = poolings.pool(hidden, rows, self.pooling, lengths)
            rows = torch.arange(hidden.shape[0], device=hidden.device)
        return score_head(
            hidden,
            rows,
            self.weight1,
            self.bias1,
            self.weight2,
            self.bias2,
            activation=self.activation,
            scale=self.scale,
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Separators:
    """Where the scores of a batch are read, and whose they are.

    Attributes:
        rows: [M, K] int64, row of each response's separator in every branch that holds it.
        weights: [M, K] float32, the weight of each reading in the response's score; they sum to 1 over K.
        cells: [M] int64, index of each response in the flattened [S, Nmax] scores.
        offsets: [S + 1] int32, sample s owns the responses offsets[s]:offsets[s + 1].
        width: Nmax, the most responses any sample has.
        read_counts: S ints, how many of the rows that are read belong to each sample; known without asking the device.
        pooling: the pooling that tokens and lengths are for.
        tokens: [R] int64, the rows of response tokens that the pooling reads, reading after reading; None for the
            pooling "separator", which reads rows.
        lengths: [M * K] int64, how many of them belong to each reading; None unless the pooling is "response_mean".
    """

    rows: torch.Tensor
    weights: torch.Tensor
    cells: torch.Tensor
    offsets: torch.Tensor
    width: int
    read_counts: tuple[int, ...]
    pooling: str = "separator"
    tokens: torch.Tensor | None = None
    lengths: torch.Tensor | None = None

    @staticmethod
    def build(spans, pooling="separator", device=None):
        """From where the responses stand.

        Args:
            spans: per sample and response a list of (row of its first token, row of its separator), one pair for each
                branch that holds it; the first may be None for the poolings of `yojo.pooling.BY_END`.
            pooling: as in `YojoConfig`.
            device: where the tensors go.
        """
        counts = [len(sample) for sample in spans]
        flat = [response for sample in spans for response in sample]
        most = max(map(len, flat))
        width = max(counts)
        cells = [s * width + n for s, count in enumerate(counts) for n in range(count)]
        # A response that fewer branches hold fills the table up with its first reading, which then weighs nothing.
        full = [[response + response[:1] * (most - len(response)) for response in sample] for sample in spans]
        read = [[poolings.rows_read(pooling, *span) for response in sample for span in response] for sample in full]
        readings = [rows for sample in read for rows in sample]
        tokens = lengths = None
        if pooling != "separator":
            tokens = torch.tensor([row for rows in readings for row in rows], device=device)
            if pooling == "response_mean":
                lengths = torch.tensor([len(rows) for rows in readings], device=device)
        return Separators(
            rows=torch.tensor([[row for _, row in response] for sample in full for response in sample], device=device),
            weights=torch.tensor(
                [[1.0 / len(response)] * len(response) + [0.0] * (most - len(response)) for response in flat],
                device=device,
            ),
            cells=torch.tensor(cells, device=device),
            offsets=torch.tensor([0, *counts], device=device).cumsum(0).to(torch.int32),
            width=width,
            read_counts=tuple(sum(map(len, sample)) for sample in read),
            pooling=pooling,
            tokens=tokens,
            lengths=lengths,
        )

    @property
    def read(self):
        """[R] int64: every row of the final hidden states that is read; one may appear several times."""
        return self.rows.flatten() if self.tokens is None else self.tokens

    @property
    def num_samples(self):
        """S, the samples of the batch."""
        return self.offsets.shape[0] - 1

    def to(self, device, non_blocking=False):
        """The same on another device (itself if it is there already)."""
        device = torch.device(device)
        if self.rows.device == device:
            return self
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """The same in page-locked memory; DataLoader(pin_memory=True) calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function):
        names = ["rows", "weights", "cells", "offsets"]
        names += [name for name in ("tokens", "lengths") if getattr(self, name) is not None]
        return dataclasses.replace(self, **{name: function(getattr(self, name)) for name in names})


def scoring_forward(self, *args, layout=None, separators=None, placeholders=None, rankings=None, **kwargs):
    """The forward of a patched model.

    Args:
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
    if placeholders is None or media.is_watched(self):
        return self.base_model(**inputs)[0]
    backbone, inputs = media.embed(self, inputs, placeholders, families.family_of(self.config))
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


def _named_scores(encoded, scores, dtype):
    """The scores of each example, from the table of a batch; a warning names those that are not finite."""
    scores = [row[: len(item.responses)].clone() for row, item in zip(scores, encoded, strict=True)]
    for row, item in zip(scores, encoded, strict=True):
        if broken := (~row.isfinite()).nonzero()[:, 0].tolist():
            logger.warning(
                "%s: the scores of responses %s are not finite (%s): hidden states overflow in %s, or weights are not "
                "finite; bfloat16 and float32 reach further than float16",
                item.name,
                ", ".join(map(str, broken)),
                ", ".join(str(row[n].item()) for n in broken),
                str(dtype).removeprefix("torch."),
            )
    return scores


class RewardModel:
    """A patched model and its processor, ready to score, from any number of threads.

    A model that is in training mode is put into eval mode while any thread scores with it, and back behind the last. Train
    it meanwhile and the training passes run without dropout; where training mode is set under a pass that scores, that
    pass raises a RuntimeError rather than returning a score with dropout in it.

    Args:
        model: a model that `yojo.patch` has patched, bare or wrapped by PEFT.
        processor: its processor, or its tokenizer for a text-only model.
        max_length: the most tokens one example may take (see `yojo.Collator`), or None.

    Example:
        >>> reward_model = yojo.RewardModel.from_pretrained("my-reward-model")
        >>> reward_model.score("Which digit is shown?", ["It is a 7.", "It is a 2."], images=["seven.png"])
        tensor([ 1.3, -0.8])
    """

    def __init__(self, model, processor, max_length=None):
        from yojo.packing import Collator

        self.collator = Collator(processor, model, max_length)
        self.model = model
        self.processor = processor

    @property
    def config(self):
        """The `YojoConfig` the model is patched with."""
        return self.collator.config

    def score(self, prompt, responses, images=None, videos=None, *, tools=None, literal_tags=False):
        """Score the responses to one prompt in one forward pass.

        Args:
            prompt: string or chat messages (see `yojo.Example`).
            responses: N strings.
            images, videos: lists, or None.
            tools: list of dicts for the chat template, or None.
            literal_tags: `<image>` and `<video>` in the prompt are text, not places.

        Returns:
            [N] float32 on the CPU, in the order of responses; higher is better.

        Raises:
            TypeError, ValueError: an input that cannot be scored; the message names it.
        """
        from yojo.packing import Example

        example = Example(prompt, responses, images=images, videos=videos, tools=tools, literal_tags=literal_tags)
        return self.score_many([example])[0]

    def score_many(self, examples, progress=False, token_budget=8192):
        """Score many examples, several in one forward pass where they fit.

        Rankings are not looked at. A response whose states overflow has a score that is not finite, and changes no other
        response's but those that see it (later ones, in comparative mode); a warning names it.

        Args:
            examples: iterable of `yojo.Example`.
            progress: show a progress bar.
            token_budget: packed rows are filled up to this many tokens; an example that is longer by itself gets a
                row of its own.

        Returns:
            list of [N] float32 tensors on the CPU, in the order of examples.
        """
        from tqdm.auto import tqdm

        if token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, got {token_budget}")
        total = len(examples) if hasattr(examples, "__len__") else None
        scores, row, tokens, modules = [], [], 0, Modules()
        base = unwrap(self.model)
        ahead = devices.input_device(base).type != "cpu"
        with tqdm(total=total, disable=not progress, desc="scoring", unit="example") as bar:
            under_way = []  # functions that wait for the scores of a row

            def begin(row):
                """Begin a row, then wait for the one before: a device has work while the next row is encoded."""
                under_way.append(self._begin_row(row, modules))
                end(all_but=1 if ahead else 0)

            def end(all_but=0):
                while len(under_way) > all_but:
                    found = under_way.pop(0)()
                    scores.extend(found)
                    bar.update(len(found))

            for place, example in enumerate(examples):
                encoded = self.collator.encode(example, place, rankings=False)
                size = encoded.num_tokens(self.config)
                if row and tokens + size > token_budget:
                    begin(row)
                    row, tokens = [], 0
                row.append(encoded)
                tokens += size
            if row:
                begin(row)
            end()
        return scores

    def _score_row(self, encoded):
        return self._begin_row(encoded)()

    def _begin_row(self, encoded, modules=None):
        """Hand a row to the device, in parts where it must be; returns a function that waits for its scores.

        `modules`: the `Modules` of the rows before.
        """
        from yojo.packing import pack_in_parts

        parts = [self._score_batch(some, batch, modules) for some, batch in pack_in_parts(self._pack, encoded)]
        return lambda: [scores for part in parts for scores in part()]

    def _pack(self, encoded):
        base, multiple = unwrap(self.model), None
        if limit := base.yojo.graphs:
            tokens = sum(item.num_tokens(self.config) for item in encoded)
            multiple = graphs.BUCKET if graphs.bucket_of(tokens, limit) else None
        self.collator.tables.follow(base)
        return self.collator.pack(encoded, pad_to_multiple_of=multiple)

    def _score_batch(self, encoded, batch, modules=None):
        """Begin the pass over a batch; returns a function that waits for its scores, one tensor per example."""
        base = unwrap(self.model)
        device = devices.input_device(base)
        batch = {name: devices.sent(value, device) for name, value in batch.items()}
        with base.yojo.eval_mode.of(self.model, modules), torch.inference_mode():
            scores = devices.fetched(self.model(**batch).scores.float())
        return lambda: _named_scores(encoded, scores(), base.dtype)

    def save_pretrained(self, path, **options):
        """Write everything that changes a score into a folder; see `yojo.checkpoint.save_pretrained`."""
        from yojo.checkpoint import save_pretrained

        save_pretrained(self, path, **options)

    def push_to_hub(self, repo_id, private=None, token=None, commit_message=None, **options):
        """Save and upload to the hub; see `yojo.checkpoint.push_to_hub`."""
        from yojo.checkpoint import push_to_hub

        return push_to_hub(self, repo_id, private=private, token=token, commit_message=commit_message, **options)

    @classmethod
    def from_pretrained(cls, path, **kwargs):
        """Load what `save_pretrained` wrote; see `yojo.checkpoint.load_pretrained` for the arguments."""
        from yojo.checkpoint import load_pretrained

        return cls(*load_pretrained(path, **kwargs))

"""How many floating-point operations a pass takes, counted from lengths and shapes: nothing is run."""

import bisect
import dataclasses

import torch

from yojo import families
from yojo.config import YojoConfig
from yojo.costs import vision
from yojo.inputs.packing import orders
from yojo.patching import decoders, last_layer, media, pooling
from yojo.patching.state import is_patched, unwrap
from yojo_kernels.layout import count_visible

MODES = ("single", "comparative", "isolated")


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of a pass by part of the model; a multiplication and its addition are two.

    Norms, softmax, activations, rotary embeddings and the loss are not counted, as is usual: they are no matrix
    products.

    Attributes:
        vision: the vision tower and what joins it to the decoder.
        attention: scores and values of the decoder's attention, without its projections.
        projections: query, key, value and output projections of the decoder's attention.
        mlp: the decoder's feed-forward layers; of a mixture of experts, its router and the experts a token is sent to.
        head: the value head.
    """

    vision: int = 0
    attention: int = 0
    projections: int = 0
    mlp: int = 0
    head: int = 0

    @property
    def total(self):
        """All parts together."""
        return sum(self.to_dict().values())

    def to_dict(self):
        """The parts as a plain dict."""
        return dataclasses.asdict(self)

    def __add__(self, other):
        return Flops(**{part: count + getattr(other, part) for part, count in self.to_dict().items()})


def batch_flops(model, batch, *, single=False, dense=False, training=False):
    """FLOPs of the backbone and value head for one batch of `yojo.Collator`.

    Args:
        model: the patched model, bare or wrapped (adapters are counted); it may lie on the meta device.
        batch: what `yojo.Collator` returns. Of its tensors only shapes, image grids, separators and blocks are read.
        single: count one stock pass per response of the batch instead of the packed row.
        dense: count every (query, key) pair of a sample, as `impl="reference"` and a masked SDPA compute them (and as
            torch's FlopCounterMode counts them), rather than those the mask rule makes visible.
        training: count the backward pass too; see `scoring_flops`.

    Returns:
        `Flops`.

    Raises:
        ValueError: vision tensors of a family whose tower is not known to `yojo.families`; single passes of several
            examples with images, as a joined batch does not say whose image is whose.

    Example:
        >>> batch = collator([example])
        >>> batch_flops(model, batch, single=True).total / batch_flops(model, batch).total  # what one pass saves
    """
    if "layout" not in batch or "separators" not in batch:
        raise ValueError("batch has no layout and separators: pass what yojo.Collator returns")
    layout, separators = batch["layout"], batch["separators"]
    base = unwrap(model)
    if single or media.is_watched(base):  # pictures are seen as often as they stand in the row
        batch = media.whole(batch, families.family_of(base.config))
    rows = vision.rows_of_tensors(base.config, batch)
    passes = 1
    if single:
        if rows is not None and separators.num_samples > 1:
            raise ValueError(
                f"single passes of a batch of {separators.num_samples} examples with images cannot be counted together: "
                "count a batch of each example by itself, and add"
            )
        samples, readings = _single_samples(layout, separators), separators.rows.shape[0]
        passes = readings
        return _count(model, samples, readings, rows, passes, dense, training)
    reads = _places_in_samples(layout, separators.read.tolist())
    return _count(model, _packed_samples(layout), separators.rows.numel(), rows, passes, dense, training, reads)


def scoring_flops(
    model, prompt_tokens, response_tokens, *, mode=None, permutations=None, images=(), dense=False, training=False
):
    """FLOPs of scoring N responses to one prompt, from numbers alone.

    Args:
        model: a patched or a stock model, bare or wrapped; it may lie on the meta device (weights are not read). A
            stock model is counted with the value head that `YojoConfig()` would give it.
        prompt_tokens: P >= 0, tokens of the prompt, its image tokens among them.
        response_tokens: N ints, tokens of each response; the separator behind each is added.
        mode: "comparative", "isolated", or "single", one stock pass per response; the model's own by default.
        permutations: orders of a comparative pass; the model's own by default.
        images: (frames, height, width) of every image, tile, crop or video, in patches of the vision tower: an image
            of 1024 x 1024 pixels is (1, 64, 64) in patches of 16, and 5 tiles of 448 x 448 are (5, 32, 32) in
            patches of 14. Where image tokens see each other in both directions, each grid counts as one image.
            Molmo2's pooled patches are taken to be 2 x 2.
        dense: count all (query, key) pairs; see `batch_flops`.
        training: count a training step without the optimizer. A matrix product costs one product more for the
            gradient of its input and one for that of its weight; attention 2.5 times its forward. Frozen weights have
            no gradient of their own, and what lies below the first trainable weight no backward at all. With gradient
            checkpointing the checkpointed layers run forward once more.

    Returns:
        `Flops`.

    Raises:
        ValueError: no or negative tokens, an unknown mode, more image tokens than the prompt has, images of a family
            whose vision tower is not known to `yojo.families`.

    Example:
        >>> counts = [scoring_flops(model, 2000, [100] * 16, mode=mode).total for mode in ("single", "isolated")]
        >>> counts[0] / counts[1]  # what one pass saves at N = 16
    """
    base = unwrap(model)
    config = base.yojo.config if is_patched(base) else YojoConfig()
    mode = config.mode if mode is None else mode
    if mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if permutations is None:
        permutations = config.permutations if mode == "comparative" else 1
    lengths = [_tokens(count, "response_tokens", 1) + 1 for count in response_tokens]
    if not lengths:
        raise ValueError("response_tokens is empty: give the tokens of each response, such as [100] * 4")
    prompt = _tokens(prompt_tokens, "prompt_tokens", 0)
    rows = vision.rows_of_grids(base.config, images) if len(images) else None
    tokens = [vision.rows_of_grids(base.config, [grid]).merged for grid in images]
    if sum(tokens) > prompt:
        raise ValueError(f"the images take {sum(tokens)} tokens, but prompt_tokens is {prompt}: it counts them too")
    family = families.family_of(base.config)
    blocks = () if family.blocks is None else family.blocks.sizes(prompt, tokens)
    if mode == "single":
        samples = [(prompt, [length], blocks) for length in lengths]
        return _count(model, samples, len(lengths), rows, len(lengths), dense, training)
    # Checks permutations against the mode, too.
    settings = dataclasses.replace(config, mode=mode, permutations=permutations)
    found = [[length] for length in lengths]  # lengths of the responses of each branch
    if mode == "comparative":
        found = [[lengths[n] for n in order] for order in orders(len(lengths), settings)]
    reads = []
    for branch in found:
        start = prompt
        for length in branch:
            reads += [(0, place) for place in pooling.rows_read(config.pooling, start, start + length - 1)]
            start += length
    samples = [(prompt, [sum(branch) for branch in found], blocks)]
    return _count(model, samples, sum(map(len, found)), rows, 1, dense, training, reads)


# ---- samples: (prompt tokens, tokens of each branch, sizes of the prompt's bidirectional blocks) ----


def _packed_samples(layout):
    blocks = [()] * layout.num_samples
    if layout.block is not None:
        block = layout.block.cpu()
        starts = [start for start, _ in layout.sample_spans()]
        for s, (start, prompt) in enumerate(zip(starts, layout.prompt_lengths, strict=True)):
            ids = block[start : start + prompt]
            blocks[s] = tuple(ids[ids >= 0].unique(return_counts=True)[1].tolist())
    return list(zip(layout.prompt_lengths, layout.branch_lengths, blocks, strict=True))


def _single_samples(layout, separators):
    """A sample for every response: its prompt, and the response up to its separator as the only branch."""
    rows = separators.rows[:, 0].tolist()  # the first branch holds the responses in their own order
    offsets = separators.offsets.tolist()
    singles = []
    for s, (prompt, _, blocks) in enumerate(_packed_samples(layout)[: separators.num_samples]):
        last = layout.sample_spans()[s][0] + prompt - 1
        for row in rows[offsets[s] : offsets[s + 1]]:
            singles.append((prompt, [row - last], blocks))
            last = row
    return singles


def _places_in_samples(layout, rows):
    """(sample, how many tokens of prompt and own branch come before it) of each row."""
    segments = []  # (first row, sample, tokens before)
    for s, (start, _) in enumerate(layout.sample_spans()):
        segments.append((start, s, 0))
        row = start + layout.prompt_lengths[s]
        for length in layout.branch_lengths[s]:
            segments.append((row, s, layout.prompt_lengths[s]))
            row += length
    starts = [start for start, _, _ in segments]
    places = []
    for row in rows:
        start, s, before = segments[bisect.bisect_right(starts, row) - 1]
        places.append((s, before + row - start))
    return places


def _tokens(value, name, least):
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be whole numbers, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return value


# ---- the model, as products per row ----


@dataclasses.dataclass(frozen=True)
class _Product:
    """A matrix product with weights.

    Attributes:
        part: field of `Flops`.
        rows: "tokens" of the decoder, or a field of `vision.Rows`.
        flops: of one row.
        layer: index of its decoder layer; None in the vision tower.
        trains: its weight has a gradient.
        makes: "query" or "key" (and value) for what the decoder's attention reads; None for all else.
    """

    part: str
    rows: str
    flops: float
    layer: int | None
    trains: bool
    makes: str | None = None


@dataclasses.dataclass(frozen=True)
class _Attention:
    """Scores and values of one attention layer: `flops` per (query, key) pair, over `pairs` (see `_pairs_of`)."""

    part: str
    pairs: object
    flops: int
    layer: int | None


def _count(model, samples, readings, rows, passes, dense, training, reads=None):
    """Sum over the layers.

    `rows` are the images of one pass, of which there are `passes`; `reads` names the tokens whose final hidden states
    are read, (sample, place among prompt and own branch), where the last layer may compute them alone.
    """
    base = unwrap(model)
    tokens = sum(prompt + sum(branches) for prompt, branches, _ in samples)
    layers = _decoder(base)
    if rows is not None:
        layers = _tower(base) + layers
    lowest = _lowest_trained(base, layers) if training else None
    recomputed = training and any(getattr(module, "gradient_checkpointing", False) for module in base.modules())
    if reads is not None and not (is_patched(base) and last_layer.applies(base, len(reads), tokens)):
        reads = None
    last = max(layer.layer for layer in layers if layer.layer is not None)
    known = {}  # pairs by window: most layers share them
    parts = dict.fromkeys(Flops.__dataclass_fields__, 0)
    for layer in layers:
        unused = 0  # rows that are computed and never used: no backward comes to them
        of_reads = reads is not None and layer.layer == last
        if isinstance(layer, _Product):
            count = tokens if layer.rows == "tokens" else getattr(rows, layer.rows) * passes
            if of_reads:  # see yojo.patching.last_layer: keys of all tokens, all else of the rows that are read
                count, unused = {"query": (len(reads), tokens), "key": (tokens, len(reads))}.get(
                    layer.makes, (len(reads), 0)
                )
        elif of_reads:
            count = sum(_keys_of(place, samples[s], layer.pairs, dense) for s, place in reads)
        else:
            if layer.pairs not in known:
                known[layer.pairs] = _pairs_of(layer, samples, rows, passes, dense)
            count = known[layer.pairs]
        times = _times(layer, training, lowest, recomputed)
        parts[layer.part] += layer.flops * (count * times + unused * (1 + (recomputed and times > 1)))
    # The head is trained, whatever else is; the gradient of its input is counted even where nothing below wants it.
    parts["head"] = _head(base) * readings * (3 if training else 1)
    return Flops(**{part: round(count) for part, count in parts.items()})


def _pairs_of(layer, samples, rows, passes, dense):
    if layer.layer is None:
        name = "row_pairs" if layer.pairs == "frame_pairs" and dense else layer.pairs
        return getattr(rows, name) * passes
    if dense:
        return sum((prompt + sum(branches)) ** 2 for prompt, branches, _ in samples)
    return sum(count_visible(prompt, branches, layer.pairs, blocks) for prompt, branches, blocks in samples)


def _keys_of(place, sample, window, dense):
    """Keys that the query at a place of prompt and own branch meets."""
    prompt, branches, _ = sample
    if dense:
        return prompt + sum(branches)
    return place + 1 if window is None else min(place + 1, window)


def _times(layer, training, lowest, recomputed):
    """How often a layer's forward is paid for."""
    if not training:
        return 1
    place = -1 if layer.layer is None else layer.layer
    reached = lowest is not None and place >= lowest
    if not reached:
        return 1
    if isinstance(layer, _Attention):
        return 1 + 2.5 + recomputed
    return 1 + layer.trains + (layer.rows != "pixels") + recomputed  # pixels have no gradient


def _lowest_trained(base, layers):
    """The decoder layer from which backward runs, -1 for the vision tower; None where the head alone is trained."""
    places = [-1 if layer.layer is None else layer.layer for layer in layers if getattr(layer, "trains", False)]
    delta = getattr(getattr(base, "score", None), "separator_delta", None)
    embedded = [*base.get_input_embeddings().parameters(), *([] if delta is None else [delta])]
    if any(parameter.requires_grad for parameter in embedded):
        places.append(0)
    return min(places, default=None)


def _decoder(base):
    text_config = base.config.get_text_config()
    decoder = base.get_decoder()
    attention_modules = set(decoders.attention_modules(base))
    attention = {name: module for name, module in decoder.named_modules() if module in attention_modules}
    prefixes = tuple(f"{name}." for name in attention)
    products = []
    for name, _, flops, trains in _matrices(decoder, text_config):
        part = "projections" if name.startswith(prefixes) else "mlp"
        makes = None
        if part == "projections":
            inside = name.removeprefix(next(prefix for prefix in prefixes if name.startswith(prefix)))
            makes = {"q_proj": "query", "k_proj": "key", "v_proj": "key"}.get(inside.partition(".")[0])
        products.append(_Product(part, "tokens", flops, _layer_index(name), trains, makes))
    for name, module in attention.items():
        products.append(_decoder_attention(module, text_config, _layer_index(name)))
    return products


def _decoder_attention(module, config, layer):
    values = _output_projection(module).in_features  # heads x value dim
    scores = values
    if hasattr(module, "qk_head_dim"):  # multi-head latent attention: values narrower than keys
        scores = config.num_attention_heads * module.qk_head_dim
    return _Attention("attention", _window(module, config), 2 * (scores + values), layer)


def _window(module, config):
    types = getattr(config, "layer_types", None)
    if types and types[module.layer_idx] != "sliding_attention":
        return None
    return getattr(module, "sliding_window", getattr(config, "sliding_window", None))


def _tower(base):
    """Everything of the backbone that is not its decoder."""
    facts = vision.tower_of(base.config)
    decoder = base.get_decoder()
    backbone = base.base_model
    inside = next(name for name, module in backbone.named_modules() if module is decoder)
    found = []
    for name, module, flops, trains in _matrices(backbone, None, skip=decoder, names=facts.matrices):
        usual = "pixels" if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d) else "patches"
        kind = next((kind for part, kind in facts.rows.items() if part in name), usual)
        found.append(_Product("vision", kind, flops, None, trains))
    index = 0
    for name, module in backbone.named_modules():
        if name == inside or name.startswith(f"{inside}.") or not _is_vision_attention(module):
            continue
        width = _output_projection(module).in_features
        pairs = next((kind for part, kind in facts.rows.items() if part in f"{name}.k_proj"), None)
        if pairs is None:
            pairs = "window_pairs" if vision.sees_windows(base.config, index) else "frame_pairs"
            index += 1
        found.append(_Attention("vision", pairs, 4 * width, None))
    return found


def _is_vision_attention(module):
    children = dict(module.named_children())
    return "qkv" in children or "q_proj" in children


def _output_projection(attention):
    """The last of an attention module's linear layers; its input is heads x head dim."""
    return [child for child in attention.children() if hasattr(child, "in_features")][-1]


def _layer_index(name):
    return next((int(piece) for piece in name.split(".") if piece.isdigit()), 0)


def _matrices(root, config, skip=None, names=()):
    """(name, module, FLOPs of one row, has a gradient) of every matrix that rows are multiplied with.

    Linear layers (quantised ones and adapters too), convolutions whose kernels do not overlap, routers and experts of
    a mixture, and parameters called by name.
    """
    for name, module in _running(root, skip):
        children = list(module.children())
        if isinstance(module, torch.nn.Conv2d | torch.nn.Conv3d):
            yield name, module, 2 * module.weight.numel(), module.weight.requires_grad
        elif hasattr(module, "in_features") and not children:
            trains = any(parameter.requires_grad for parameter in module.parameters(recurse=False))
            yield name, module, 2 * module.in_features * module.out_features, trains
        elif not isinstance(module, torch.nn.Embedding):
            for key, parameter in module.named_parameters(recurse=False):
                share = 1 if key in names else _share_of_tokens(module, key, parameter, config)
                if share:
                    yield f"{name}.{key}", module, 2 * parameter.numel() * share, parameter.requires_grad


def _share_of_tokens(module, key, parameter, config):
    """Which part of a parameter a token of the decoder is multiplied with: experts in use, routers; 0 for others."""
    if config is None or not hasattr(module, "num_experts"):
        return 0
    if parameter.ndim == 2 and key == "weight":
        return 1
    if parameter.ndim != 3:
        return 0
    active = getattr(config, "num_experts_per_tok", None)
    if not active:
        raise ValueError(
            f"{type(module).__name__} is a mixture of experts, but {type(config).__name__} has no num_experts_per_tok "
            "that says how many of them see a token"
        )
    return active / parameter.shape[0]


def _running(module, skip, prefix=""):
    """(name, module) of everything that runs: of PEFT's wrappers, the base layer and the active adapters."""
    if module is skip:
        return
    yield prefix, module
    wraps = hasattr(module, "base_layer") or hasattr(module, "original_module")
    active = getattr(module, "active_adapters", []) if wraps else []
    off = wraps and (module.disable_adapters or getattr(module, "merged", False))
    replaced = hasattr(module, "original_module") and not off
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if not wraps or name == "base_layer" or (name == "original_module" and not replaced):
            yield from _running(child, skip, path)
        elif not off and isinstance(child, torch.nn.ModuleDict):
            for key in (key for key in active if key in child):
                yield from _running(child[key], skip, f"{path}.{key}")


def _head(base):
    hidden = base.config.get_text_config().hidden_size
    config = base.yojo.config if is_patched(base) else YojoConfig()
    inputs = pooling.width(config.pooling, hidden)
    return 2 * inputs if config.head == "linear" else 2 * config.head_dim * (inputs + 1)

"""`patch` turns a Hugging Face model into a reward model in place, `unpatch` undoes it."""

import functools
import logging

import torch

from yojo import families
from yojo.config import YojoConfig
from yojo.patching import dates, decoders, devices, fingerprints, forward, last_layer, media, recorded, ropes
from yojo.patching import fuse as fusing
from yojo.patching import graphs as row_graphs
from yojo.patching import probe as probing
from yojo.patching import separator as separators
from yojo.patching.attention import (
    common_implementation,
    mark_sliding,
    packed_attention,
    register,
    set_implementation,
)
from yojo.patching.head import ScoreHead
from yojo.patching.state import Patch, is_patched, separator_id_of, tokenizer_of, unwrap

logger = logging.getLogger(__name__)


def patch(model, processor=None, *, fuse=None, graphs=None, probe=True, **options):
    """Turn a vision-language (or text-only) model into a reward model, in place.

    A model that was loaded from a checkpoint of a patched one (its `config.yojo` says so) gets the head and the settings
    back that it was saved with; to begin anew, `del model.config.yojo` first.

    Afterwards `model(**batch)` with a batch of `yojo.Collator` returns `.scores` [S, Nmax] and, when rankings are
    there, `.loss`. Ordinary inputs go through the model as before, `generate()` included. Patch before the
    optimizer is made, since a value head named `score` (float32) and possibly one row of the embedding are added.

    Args:
        model: a `transformers` model with a language-model head (`...ForConditionalGeneration`, `...ForCausalLM`),
            bare or wrapped by PEFT, DistributedDataParallel or torch.compile.
        processor: its processor, or its tokenizer for a text-only model. The separator token is taken from it, or
            added to it and to the model's embedding, starting from the mean embedding: so it does with every fresh
            model that is patched with this processor, or with a copy of it, while a token that the tokenizer came with
            keeps its row. Without a processor, packed batches are still scored, but ordinary [B, L] inputs with
            separators are not recognised.
        fuse: how the decoder layers run while a packed row is scored; scores agree within the precision's error, and
            ordinary inputs never notice. It is no field of the config and is not saved.
            "auto" (None on a model not patched yet) fuses on CUDA devices, by Liger-Kernel where it is installed and
            has the family, else by torch.compile, and runs the layers as they are where that fails;
            "liger", RMSNorm, rotary embedding and gated MLP by Liger-Kernel (CUDA);
            "compile", torch.compile of the decoder layers, one graph for all layers of a kind whatever the lengths;
            the first pass with and without gradients runs as it is;
            "none", the layers as they are.
            None on a patched model leaves it as it is, another value switches it.
        graphs: rows of up to so many tokens are replayed from CUDA graphs while they are only scored (no gradients):
            short rows spend more time on launching kernels than on running them. 0, or None on a model not patched yet,
            for none. `yojo.RewardModel` fills such rows up to a multiple of 256 tokens, which is what graphs need; with
            `yojo.Collator` it is `pad_to_multiple_of=256`. The first row of a length runs as it is, the second one is
            captured. Layers with adapters that are not merged, with hooks or in training mode run as they are, and so
            does a row whose capture fails (a warning says why); where "auto" would compile, rows that graphs take are
            replayed instead. Like fuse it is not saved.
        probe: a model whose family is not listed in `yojo.families` is tried first: a packed row of a few random tokens
            must give what the model's own forward gives, or the model is refused. It costs about one short forward and
            leaves no trace. False skips it.
        **options: fields of `YojoConfig`.

    Returns:
        The same model object.

    Raises:
        TypeError: not a transformers model.
        ValueError: an unknown option or value, a model that cannot be patched (the reason is named), a model that
            was patched before with other options, a `fuse` that this model cannot have, a checkpoint of a patched model
            that was saved with other options, or whose head cannot be found, an adapter with a value head of its own.

    Example:
        >>> model = yojo.patch(model, processor, mode="isolated")
    """
    return _patch(model, processor, fuse, graphs, probe, options)


def patch_loaded(model, processor, *, fuse=None, probe=True, **options):
    """As `patch`, for a model whose head and separator's row follow from a file, whatever its config.yojo says."""
    return _patch(model, processor, fuse, None, probe, options, loading=True)


def _patch(model, processor, fuse, graphs, probe, options, loading=False):
    config = YojoConfig.from_dict(options)
    if fuse is not None:
        fusing.check_choice(fuse)
    if graphs is not None:
        row_graphs.check_limit(graphs)
    if not isinstance(probe, bool):
        raise TypeError(f"probe must be a bool, got {probe!r}")
    base = unwrap(model)
    if is_patched(base):
        differing = {name: value for name, value in options.items() if getattr(base.yojo.config, name) != value}
        if differing:
            raise ValueError(
                f"the model is patched already, with {_named(base.yojo.config, differing)}, and cannot be patched "
                f"again with {_named(config, differing)}: call yojo.unpatch(model) first"
            )
        if processor is not None and base.yojo.separator_id is None:
            _add_separator(base, processor, base.yojo)
            base.config.yojo = recorded.record(base.yojo)
        if processor is not None:
            dates.agree(base.yojo, processor)
        wanted = (fuse or base.yojo.fuse, base.yojo.graphs if graphs is None else graphs)
        if wanted != (base.yojo.fuse, base.yojo.graphs):
            _replan_layers(base, *wanted)
        return model
    modules = _check_model(base)
    came_with = None if loading else recorded.recorded(base, options)
    config = config if came_with is None else came_with.config
    device = devices.output_device(base)
    fusion = fusing.plan(base, modules, fuse or "auto", graphs or 0)

    own = common_implementation(modules)
    rope = ropes.switch_of(base)
    if probe and probing.is_needed(base):
        probing.check(base, modules, rope, functools.partial(packed_attention, base, modules))
    state = Patch(config=config, separator_id=None, stock_attention=own, fusion=fusion, came_with=came_with, rope=rope)
    state.weights = fingerprints.take(fingerprints.tensors_of(base))
    state.date = None if came_with is None else came_with.date
    if rope is not None:
        logger.warning(
            "examples of more than %d positions will be refused: beyond them this model's rope (%s) changes its "
            "frequencies for a whole row",
            rope.limit,
            rope.kind,
        )
    if processor is not None:
        _add_separator(base, processor, state, loading)
        dates.agree(state, processor)
    set_implementation(base, modules, register(own))
    mark_sliding(base, modules)
    fusion.install()
    base.score = ScoreHead(base.config.get_text_config().hidden_size, config).to(device)
    if came_with is not None:
        came_with.put_into(base.score)
    state.stock_forward = base.__dict__.get("forward")
    forward.install(base)
    state.whole_last_layer = last_layer.install(base)
    media.install(base, families.family_of(base.config))
    base.yojo = state
    base.config.yojo = recorded.record(state)
    separators.install(base)
    return model


def unpatch(model):
    """Undo `patch`: head, forward, attention and the separator's embedding are as before.

    The separator stays in the processor's tokenizer, where it does no harm: tokenizers cannot forget a token.

    Args:
        model: a patched model, bare or wrapped; one that is not patched is returned as it is.

    Returns:
        The same model object.
    """
    base = unwrap(model)
    if not is_patched(base):
        return model
    state = base.yojo
    set_implementation(base, decoders.attention_modules(base), state.stock_attention)
    last_layer.remove(base)
    media.remove(base)
    separators.remove(base)
    state.fusion.remove()
    for module in decoders.attention_modules(base):
        module.__dict__.pop(decoders.SLIDES, None)
    if state.stock_row is not None:
        with torch.no_grad():
            base.get_input_embeddings().weight[state.separator_id] = state.stock_row
    if state.stock_vocabulary is not None:
        base.resize_token_embeddings(state.stock_vocabulary)
        if state.set_vocab_size:
            base.__dict__.pop("vocab_size", None)
    del base.score, base.yojo, base.config.yojo
    forward.remove(base)
    if state.stock_forward is not None:
        base.forward = state.stock_forward
    return model


def _replan_layers(base, fuse, graphs):
    last_layer.remove(base)
    try:
        fusion = fusing.plan(base, decoders.attention_modules(base), fuse, graphs)
        base.yojo.fusion.remove()
        base.yojo.fusion = fusion
    finally:
        base.yojo.fusion.install()
        base.yojo.whole_last_layer = last_layer.install(base)


# ---- separator ----


# Among the settings that a tokenizer is saved and copied with: the token that `patch` has added to it. A model that has not
# been patched never saw this token, whatever its embedding has in that row.
ADDED = "yojo_separator"


def _add_separator(base, processor, state, loading=False):
    """Give tokenizer and model the separator, starting its embedding from the mean of the tokenizer's others.

    A row that is there already is taken as it is only where somebody may have trained or reserved it: the tokenizer came
    with the token, or the model was saved as a patched one (its config says so), or (`loading`) it follows from a file.
    """
    tokenizer = tokenizer_of(processor)
    if not hasattr(tokenizer, "get_vocab"):
        raise TypeError(f"processor must be a processor or a tokenizer, got {type(processor).__name__}")
    separator = state.config.separator
    known = separator_id_of(tokenizer, separator)
    embedding = base.get_input_embeddings()
    rows = embedding.weight.shape[0]
    trained = state.came_with is not None and state.came_with.check_separator(known, tokenizer, rows)
    ours = getattr(tokenizer, "init_kwargs", {}).get(ADDED) == separator
    if known is not None and known < rows and (trained or loading or not ours):
        state.separator_id = known
        if loading:  # the file's row goes there
            state.stock_row = embedding.weight[known].detach().clone()
        return
    if not isinstance(embedding, torch.nn.Embedding):
        raise ValueError(
            f"the separator {separator!r} must be added to the embedding, which {type(embedding).__name__} wraps: "
            "call yojo.patch before PEFT wraps the model"
        )
    needed = len(tokenizer) if known is None else known
    resized = (embedding, base.get_output_embeddings()) if needed >= rows else (embedding,)
    if any(map(devices.is_offloaded, resized)):
        raise ValueError(
            f"the separator {separator!r} must be written into the embedding, which is offloaded: give the embeddings of "
            "input and output devices of their own in device_map ('cpu' will do)"
        )
    outputs = base.get_output_embeddings().weight.shape[0]
    if needed >= rows and outputs != rows:
        raise ValueError(
            f"{type(base).__name__} has {rows} input and {outputs} output embeddings, which transformers cannot resize "
            f"together, and no spare row for the separator {separator!r} (id {needed})"
        )
    if known is None:
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(separator, special=True, normalized=False)], special_tokens=True)
        tokenizer.init_kwargs[ADDED] = separator
    state.separator_id = separator_id_of(tokenizer, separator)
    if trained:
        return
    # Sorted: the order of a tokenizer's vocabulary is another one each time, and so would be the mean's last bits.
    used = sorted(i for i in tokenizer.get_vocab().values() if i != state.separator_id and i < rows)
    with torch.no_grad():
        mean = embedding.weight[torch.tensor(used, device=embedding.weight.device)].float().mean(0)
    if state.separator_id >= rows:
        state.stock_vocabulary = rows
        state.set_vocab_size = "vocab_size" not in base.__dict__
        base.resize_token_embeddings(state.separator_id + 1, mean_resizing=False)
    else:
        state.stock_row = embedding.weight[state.separator_id].detach().clone()
    weight = base.get_input_embeddings().weight
    with torch.no_grad():
        weight[state.separator_id] = mean.to(weight.dtype)


# ---- checks ----


def _check_model(base):
    """The decoder's attention modules, or an error that says why the model cannot be patched."""
    from transformers import PreTrainedModel

    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(base).__name__}")
    name = type(base).__name__
    if hasattr(base, "score"):
        raise ValueError(f"{name} has a submodule named `score` already; load the class with a language-model head")
    modules = decoders.attention_modules(base)
    if base.base_model is base or base.get_output_embeddings() is None:
        raise ValueError(
            f"{name} has no language-model head: load the model with AutoModelForImageTextToText, or with "
            "AutoModelForCausalLM for a text-only one"
        )
    return modules


def _named(config, names):
    return ", ".join(f"{name}={getattr(config, name)!r}" for name in names)

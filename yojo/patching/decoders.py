"""The attention modules of a model's text decoder, or why multi-response attention cannot serve it."""

import inspect
import sys

from yojo import families

LAYER_TYPES = ("full_attention", "sliding_attention")
SLIDES = "yojo_slides"  # attribute of a patched model's attention modules: whether the layer has a sliding window


def attention_modules(model):
    """The self-attention modules of the text decoder, in layer order.

    Args:
        model: a `transformers.PreTrainedModel` with a language-model head.

    Returns:
        list of modules, one per decoder layer.

    Raises:
        ValueError: a decoder that multi-response attention cannot serve, with the reason.
    """
    name = type(model).__name__
    decoder = model.get_decoder()
    text_config = model.config.get_text_config()
    layer_types = getattr(text_config, "layer_types", None) or []
    foreign = sorted(set(layer_types) - set(LAYER_TYPES))
    if foreign:
        raise ValueError(
            f"{name} has layers of type {', '.join(foreign)}: only softmax attention (full or sliding) can keep the "
            "branches of a packed row apart"
        )
    if not getattr(decoder, "_supports_attention_backend", False):
        raise ValueError(
            f"{name}: {type(decoder).__name__} does not use transformers' attention interface "
            "(`_supports_attention_backend`), so its attention cannot be replaced"
        )
    modules = attentions_in(decoder)
    layers = getattr(text_config, "num_hidden_layers", len(modules))
    if not modules or len(modules) != layers:
        raise ValueError(
            f"{name} has {layers} decoder layers but {len(modules)} softmax attention modules: hybrid decoders "
            "(linear attention, state-space layers, cross-attention) cannot be patched"
        )
    for module in modules:
        # PaliGemma declares its layers bidirectional and restores causality behind the prompt with its mask.
        if not module.is_causal and not families.family_of(model.config).has_prefix:
            raise ValueError(f"{name}: layer {module.layer_idx} attends in both directions; a decoder must be causal")
        if getattr(module, "sinks", None) is not None:
            raise ValueError(f"{name}: layer {module.layer_idx} has attention sinks, which are not supported")
    if not families.is_known(model.config) and _builds_block_masks(model, decoder):
        raise ValueError(
            f"{name} ({model.config.model_type}) builds its masks from token types or blocks of tokens, and how is not "
            "known to yojo/families/; scoring it as plainly causal would be wrong"
        )
    return modules


def attentions_in(decoder):
    """The modules of a decoder, or of one of its layers, that are softmax attention by what they have."""
    return [
        module
        for module in decoder.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal") and hasattr(module, "config")
    ]


def _builds_block_masks(model, decoder):
    for cls in {type(model.base_model), type(decoder)}:
        try:
            source = inspect.getsource(sys.modules[cls.__module__])
        except (OSError, TypeError, KeyError):
            continue
        if any(word in source for word in ("block_sequence_ids", "or_mask_function", "create_chunked_causal_mask")):
            return True
    return False

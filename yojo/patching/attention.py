"""The attention function of a patched model, and how it is registered with transformers."""

import contextlib
import functools
import sys

import torch

from yojo.patching import decoders, last_layer
from yojo_kernels import multi_response_attention

PREFIX = "yojo_"  # registered under the stock implementation's own name behind it: code that looks for "flash" finds it


# ---- attention ----


def attend(module, query, key, value, attention_mask, *, stock, layout=None, **kwargs):
    """The attention function registered with transformers: packed rows go to `multi_response_attention`.

    Args:
        module: the model's attention module.
        query: [B, Hq, T, D]. B is 1 with a layout.
        key, value: [B, Hkv, T, D].
        attention_mask: whatever the model made; ignored with a layout.
        stock: name of the implementation that runs when there is no layout.
        layout: `Layout` of the packed row, or what stands for it in the last layer (see `yojo.patching.last_layer`), or None
            for ordinary inputs.
        **kwargs: what the model hands its attention function: scaling, dropout, sliding_window, softcap, ...

    Returns:
        (output [B, T, Hq, D], None).
    """
    if layout is None:
        if attention_mask is not None and attention_mask.shape == (1, 1, 1, 1) and query.shape[2] > 1:
            raise RuntimeError(
                f"the layout of the packed row did not reach {type(module).__name__}: the model does not hand keyword "
                "arguments down to its attention, so it cannot be patched"
            )
        stock_attention = _stock_attention(module, stock)
        return stock_attention(query=query, key=key, value=value, attention_mask=attention_mask, **kwargs)
    given = kwargs.get
    if given("dropout"):
        raise ValueError(
            f"attention dropout {kwargs['dropout']} is not supported: set attention_dropout=0.0 in the text config"
        )
    if given("s_aux") is not None or given("position_bias") is not None:
        name = "s_aux" if given("s_aux") is not None else "position_bias"
        raise ValueError(f"{type(module).__name__} uses {name} in its attention, which is not supported")
    window = given("sliding_window")
    if window is None and getattr(module, decoders.SLIDES, False):
        raise RuntimeError(f"{type(module).__name__}, layer {module.layer_idx}, slides but did not say its window")
    if torch.is_autocast_enabled(query.device.type):
        # Norms and rotary embeddings leave queries and keys in float32; stock attention casts them just so.
        dtype = torch.get_autocast_dtype(query.device.type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    options = {"scale": given("scaling"), "window": window, "softcap": given("softcap"), "heads_first": True}
    filled = query.shape[-1] - value.shape[-1]
    if filled > 0:  # multi-head latent attention: narrower values, filled up and cut off again
        value = torch.nn.functional.pad(value, (0, filled))
    if isinstance(layout, last_layer.KeysWanted):
        layout.take(key, value)
    if isinstance(layout, last_layer.Reading):
        key, value = layout.key, layout.value
        options |= {"query_rows": layout.read.rows, "query_counts": layout.read.counts}
        layout = layout.layout
    output = multi_response_attention(query, key, value, layout, **options)
    return (output[..., :-filled] if filled > 0 else output), None


def _stock_attention(module, stock):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    if stock == "eager":  # every modeling file has its own
        return functools.partial(sys.modules[type(module).__module__].eager_attention_forward, module)
    if stock in ("sdpa", "flex_attention"):
        return functools.partial(ALL_ATTENTION_FUNCTIONS[stock], module)
    # Flash attention reads the implementation's name from module.config and would load a kernel of our name.
    return functools.partial(ALL_ATTENTION_FUNCTIONS[stock], _Named(module, stock))


class _Named:
    """An attention module seen under the stock implementation's name."""

    def __init__(self, module, stock):
        self._module = module
        self.config = _Named.Config(module.config, stock)

    def __getattr__(self, name):
        return getattr(self._module, name)

    class Config:
        def __init__(self, config, stock):
            self._config, self._attn_implementation = config, stock

        def __getattr__(self, name):
            return getattr(self._config, name)


def register(stock):
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    name = PREFIX + stock
    if stock not in ALL_MASK_ATTENTION_FUNCTIONS:
        raise ValueError(
            f"attention implementation {stock!r} has no mask function in transformers; load the model with "
            "attn_implementation='sdpa'"
        )
    if name not in ALL_ATTENTION_FUNCTIONS:
        ALL_ATTENTION_FUNCTIONS.register(name, functools.partial(attend, stock=stock))
        # Without a mask function of the same name, transformers makes no mask at all for ordinary inputs.
        ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[stock])
    return name


def common_implementation(modules):
    names = {module.config._attn_implementation for module in modules}
    if len(names) != 1:
        raise ValueError(f"the decoder's layers have different attention implementations: {sorted(map(str, names))}")
    # Ours where the config is a copy of a patched model's.
    return (names.pop() or "eager").removeprefix(PREFIX)


def set_implementation(base, modules, name):
    text_configs = {id(module.config): module.config for module in modules}
    others = {
        id(module): module.config
        for module in base.modules()
        if hasattr(module, "config") and id(module.config) not in text_configs and hasattr(module.config, "model_type")
    }
    before = {key: config._attn_implementation for key, config in others.items()}
    for config in text_configs.values():
        config._attn_implementation = name
    for module in modules:
        if module.config._attn_implementation != name:
            raise RuntimeError(f"{type(base).__name__} did not take the attention implementation {name!r}")
    for key, config in others.items():
        if config._attn_implementation != before[key]:
            raise RuntimeError(
                f"{type(base).__name__}: setting the decoder's attention changed {type(config).__name__}"
            )


@contextlib.contextmanager
def packed_attention(base, modules):
    """Within it, the attention of a model that is not patched takes packed rows."""
    stock = common_implementation(modules)
    set_implementation(base, modules, register(stock))
    mark_sliding(base, modules)
    try:
        yield
    finally:
        set_implementation(base, modules, stock)
        for module in modules:
            module.__dict__.pop(decoders.SLIDES, None)


def mark_sliding(base, modules):
    # `attend` must not look it up by the layer's index: each layer would be compiled anew.
    layer_types = getattr(base.config.get_text_config(), "layer_types", None)
    for module in modules:
        setattr(module, decoders.SLIDES, bool(layer_types) and layer_types[module.layer_idx] == "sliding_attention")

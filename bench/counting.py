"""FLOPs of a call as torch counts them, whatever its version: older ones refuse grouped heads, or have no formula."""

import importlib
import importlib.util

import torch
from torch.utils.flop_counter import FlopCounterMode, flop_registry

aten = torch.ops.aten
FORWARD = (
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
BACKWARD = (
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward,
)


def flop_counter():
    """A `FlopCounterMode` that knows every attention of torch's own, with as many heads of keys as there may be.

    As in torch, every pair of queries and keys counts, masked or not, and a backward computes the scores once more.
    """
    return FlopCounterMode(display=False, custom_mapping=_formulas())


def forward_flops(query, key, value, *_, out_shape=None, **__):
    """FLOPs of attention; query [B, Hq, Tq, D], key [B, Hkv, Tk, D], value [B, Hkv, Tk, Dv] as shapes.

    Raises:
        ValueError: shapes that are no attention.
    """
    pairs, dim, value_dim = _sizes(query, key, value)
    return 2 * pairs * (dim + value_dim)  # scores; their product with the values


def backward_flops(grad, query, key, value, *_, out_shape=None, **__):
    """FLOPs of its backward; shapes as in `forward_flops`, grad [B, Hq, Tq, Dv]."""
    pairs, dim, value_dim = _sizes(query, key, value)
    if tuple(grad) != (*query[:3], value_dim):
        raise ValueError(f"the gradient of the output has shape {list(grad)}, expected {[*query[:3], value_dim]}")
    return 2 * pairs * (3 * dim + 2 * value_dim)  # scores, gradients of queries and keys; of scores and values


def _sizes(query, key, value):
    """(query, key) pairs of all heads, head dims of keys and of values."""
    (batch, heads, queries, dim), (_, kv_heads, keys, _), value_dim = query, key, value[-1]
    expected = (batch, kv_heads, keys, dim), (batch, kv_heads, keys, value_dim)
    if (tuple(key), tuple(value)) != expected or heads % kv_heads:
        raise ValueError(f"no attention: query {list(query)}, key {list(key)}, value {list(value)}")
    return batch * heads * queries * keys, dim, value_dim


def varlen_forward_flops(query, key, value, query_offsets, key_offsets, *_, out_val=None, **__):
    """FLOPs of `torch.nn.attention.varlen`; query [Tq, Hq, D], key and value [Tk, Hkv, D], offsets of the sequences."""
    return sum(forward_flops(*shapes) for shapes in _sequences(query, key, value, query_offsets, key_offsets))


def varlen_backward_flops(grad, query, key, value, output, lse, query_offsets, key_offsets, *_, out_val=None, **__):
    """FLOPs of its backward."""
    sequences = _sequences(query, key, value, query_offsets, key_offsets)
    return sum(backward_flops((*q[:3], v[-1]), q, k, v) for q, k, v in sequences)


def _sequences(query, key, value, query_offsets, key_offsets):
    """Shapes of each sequence, as `forward_flops` takes them."""
    key_offsets = query_offsets if key_offsets is None else key_offsets
    for lengths in zip(query_offsets.diff().tolist(), key_offsets.diff().tolist(), strict=True):
        yield tuple(
            (1, tensor.shape[1], length, tensor.shape[2])
            for tensor, length in zip((query, key, value), (lengths[0], lengths[1], lengths[1]), strict=True)
        )


def _formulas():
    formulas = dict.fromkeys(FORWARD, forward_flops) | dict.fromkeys(BACKWARD, backward_flops)
    if importlib.util.find_spec("torch.nn.attention.varlen") is not None:
        importlib.import_module("torch.nn.attention.varlen")  # registers its operators; in newer versions formulas, too
        varlen = {"_varlen_attn": varlen_forward_flops, "_varlen_attn_backward": varlen_backward_flops}
        own = {getattr(torch.ops.torch_attn, name): formula for name, formula in varlen.items()}
        formulas |= {operator: formula for operator, formula in own.items() if operator not in flop_registry}
    return formulas


# These look at the values of offsets, and so are handed tensors in place of shapes.
varlen_forward_flops._get_raw = varlen_backward_flops._get_raw = True

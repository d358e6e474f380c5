"""Rows that are causal as they stand (`layout.causal`), computed by attention kernels that others maintain.

Comparative mode without blocks and windows is ordinary causal attention over packed sequences. The functions take the
checked arguments of `yojo_kernels.multi_response_attention` and return (output [T, Hq, D], None): no log-sum-exp.

They multiply keys of the same tile that are not yet seen by 0: a value that is not finite may make NaN of the outputs of
tokens before it, in its own sample.
"""

import functools
import importlib
import importlib.util
import inspect
import logging

import torch
import torch.nn.functional as F

from yojo_kernels import tuning
from yojo_kernels.segments import with_positive_scale

log = logging.getLogger(__name__)

DTYPES = (torch.bfloat16, torch.float16)


@functools.cache
def flash_function(capability):
    """(varlen function, name) of the flash attention installed for a compute capability, or None.

    FlashAttention-3 runs on Hopper alone and is a package of its own, `flash_attn_interface`; FlashAttention-2 is
    `flash_attn`. A package that does not load (it was built for another torch, say), or that is too old for a
    deterministic backward and a soft cap, counts as absent; the log says so.
    """
    packages = [("flash_attn_interface", "FlashAttention-3")] if capability == (9, 0) else []
    for package, name in [*packages, ("flash_attn", "FlashAttention-2")]:
        try:
            function = importlib.import_module(package).flash_attn_varlen_func
            missing = {"deterministic", "softcap"} - set(inspect.signature(function).parameters)
        except ModuleNotFoundError:
            continue
        except Exception as error:  # noqa: BLE001 - whatever a broken build raises, there is our own kernel
            log.warning("%s (%s) is installed and does not load: %s", name, package, error)
            continue
        if not missing:
            return function, name
        log.warning("%s (%s) is installed and too old: it does not take %s", name, package, ", ".join(sorted(missing)))
    return None


def flash(query, key, value, layout, *, scale, window=None, softcap=None):
    """Flash attention; its backward in the deterministic form, as our own kernels' is."""
    function, _ = flash_function(tuning.capability(query.device))
    longest = longest_sample(layout)
    query, scale = with_positive_scale(query, scale)
    output = function(
        query,
        key,
        value,
        cu_seqlens_q=layout.sample_offsets,
        cu_seqlens_k=layout.sample_offsets,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        deterministic=True,
        softcap=softcap or 0.0,
    )
    # Early versions of FlashAttention-3 return the log-sum-exp beside the output.
    return (output[0] if isinstance(output, tuple) else output), None


def varlen(query, key, value, layout, *, scale, window=None, softcap=None):
    """torch.nn.attention.varlen: FlashAttention-2 inside torch. Its backward adds atomically."""
    offsets, longest = layout.sample_offsets, longest_sample(layout)
    query, scale = with_positive_scale(query, scale)
    return torch_varlen(query, key, value, offsets, offsets, longest, longest, scale=scale), None


def sdpa(query, key, value, layout, *, scale, window=None, softcap=None):
    """torch's scaled_dot_product_attention over a row of one sample. Its backward adds atomically."""
    query, scale = with_positive_scale(query, scale)
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in (query, key, value))
    output = F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return output[0].transpose(0, 1), None


def longest_sample(layout):
    """Tokens of the longest sample, known without asking the device."""
    return max(stop - start for start, stop in layout.sample_spans())


def torch_varlen(query, key, value, query_offsets, key_offsets, longest_query, longest_key, *, scale):
    """Causal `torch.nn.attention.varlen.varlen_attn`, aligned at the bottom right; where `has_torch_varlen` says so."""
    from torch.nn.attention.varlen import varlen_attn

    # The kernel always took grouped heads; asking for them by name came later.
    grouped = {"enable_gqa": query.shape[1] != key.shape[1]} if "enable_gqa" in _varlen_parameters() else {}
    return varlen_attn(query, key, value, query_offsets, key_offsets, longest_query, longest_key,
                       scale=scale, window_size=(-1, 0), **grouped)  # fmt: skip


def has_torch_varlen():
    """Whether torch has a varlen_attn that takes a scale (torch 2.11 and later)."""
    return {"scale", "window_size"} <= _varlen_parameters()


@functools.cache
def _varlen_parameters():
    if importlib.util.find_spec("torch.nn.attention.varlen") is None:
        return set()
    from torch.nn.attention.varlen import varlen_attn

    return set(inspect.signature(varlen_attn).parameters)

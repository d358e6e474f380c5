"""Norms, rotary embeddings and gated MLPs through Liger-Kernel's autograd functions; imported when they first run.

Liger-Kernel's own way to fuse a model rebinds names in transformers' modules, for every model in the process. Here its
functions are called from the forwards that `yojo.fuse` puts on the modules of one model. What they cannot compute as
the model would (mixed dtypes, float64, partial rotary embeddings) is left to the model.
"""

import functools
import types

import torch
from liger_kernel.ops.geglu import LigerGELUMulFunction
from liger_kernel.ops.rms_norm import LigerRMSNormFunction
from liger_kernel.ops.rope import LigerRopeFunction
from liger_kernel.ops.swiglu import LigerSiLUMulFunction

from yojo.patching.layers import ACTIVATIONS, NORMS
from yojo_kernels.launch import DTYPES

ROTARY = "apply_rotary_pos_emb"


def norm(module, x):
    """RMSNorm of x [..., H]."""
    if not _same_dtype(x, module.weight):
        return type(module).forward(module, x)
    offset, casting = NORMS[type(module).__name__]
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    # Not in place: the gradient that comes in may be that of the residual stream as well.
    return LigerRMSNormFunction.apply(x, module.weight, eps, offset, casting, False)


def mlp(module, x):
    """down_proj(act_fn(gate_proj(x)) * up_proj(x)) for x [..., H]."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    if not _same_dtype(gate, up):
        return module.down_proj(module.act_fn(gate) * up)
    return module.down_proj(GATED[ACTIVATIONS[type(module.act_fn).__name__]].apply(gate, up))


@functools.cache
def with_rotary(forward):
    """An attention forward whose rotary embedding is Liger's.

    The function is looked up among the globals of the forward's module, so that this is the same code with globals of
    its own; a forward that does not look it up there is returned as it is.
    """
    if ROTARY not in forward.__code__.co_names or ROTARY not in forward.__globals__:
        return forward
    own = {**forward.__globals__, ROTARY: functools.partial(rotary, forward.__globals__[ROTARY])}
    fused = types.FunctionType(forward.__code__, own, forward.__name__, forward.__defaults__, forward.__closure__)
    fused.__kwdefaults__ = forward.__kwdefaults__
    return fused


def rotary(stock, query, key, cos, sin, unsqueeze_dim=1):
    """Rotated query [B, Hq, T, D] and key [B, Hkv, T, D]; cos and sin are [B or 1, T, D].

    Works in place, in what the projections or norms before it gave, which nobody else reads.
    """
    whole = cos.ndim == 3 and cos.shape[-1] == query.shape[-1] and unsqueeze_dim == 1
    if not whole or not _same_dtype(query, key, cos, sin):
        return stock(query, key, cos, sin, unsqueeze_dim=unsqueeze_dim)
    return LigerRopeFunction.apply(query, key, cos, sin)


def _same_dtype(first, *others):
    return first.dtype in DTYPES and all(tensor.dtype == first.dtype for tensor in others)


# Liger's gated functions write their gradients over the activations they saved, unseen by autograd: a second backward
# through the same graph would be wrong without a word.


class _SiLUMul(LigerSiLUMulFunction):
    @staticmethod
    def backward(ctx, grad):
        _only_once(ctx)
        return LigerSiLUMulFunction.backward(ctx, grad)


class _GELUMul(LigerGELUMulFunction):
    @staticmethod
    def backward(ctx, grad):
        _only_once(ctx)
        return LigerGELUMulFunction.backward(ctx, grad)


def _only_once(ctx):
    if getattr(ctx, "backward_ran", False):
        raise RuntimeError(
            "Liger-Kernel's MLP can run backward once per forward (retain_graph=True cannot be honoured): patch with "
            "fuse='compile' or fuse='none'"
        )
    ctx.backward_ran = True


GATED: dict[str, type[torch.autograd.Function]] = {"silu": _SiLUMul, "gelu": _GELUMul}

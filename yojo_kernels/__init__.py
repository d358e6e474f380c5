"""Operations on packed multi-response rows: attention, value head and loss; tensors in, tensors out."""

import contextlib
import logging
import math
import typing

import torch

from yojo_kernels import reference, segments
from yojo_kernels.layout import Layout, fits

__all__ = ["Layout", "implementations", "listwise_loss", "multi_response_attention", "score_head"]

log = logging.getLogger(__name__)

IMPLEMENTATIONS = ("auto", "reference", "triton")
ATTENTION_IMPLEMENTATIONS = (*IMPLEMENTATIONS, "gluon")
LOSS_KINDS = ("best", "plackett_luce", "bradley_terry", "soft")
REDUCTIONS = ("mean", "sum", "none")


def implementations(device=None):
    """Which implementation `impl="auto"` runs for each operation, and why.

    Args:
        device: where the tensors are; by default the first CUDA device, or the CPU where there is none.

    Returns:
        dict: operation name -> (implementation, reason), both str. Attention has a second entry for rows that are
        causal as they stand (bfloat16 of head dim 128; comparative mode without blocks and windows).
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    usual = AttentionCall(device, torch.bfloat16, 128)
    name, reason = choose_attention(usual)
    other = _kernels("gluon_attention")
    if not isinstance(other, str) and other.obstacle(device, usual.dtype, usual.head_dim) is None:
        reason += "; impl='gluon' could run, but no GPU has measured it yet"
    return {
        "multi_response_attention": (name, reason),
        "multi_response_attention, causal rows": choose_attention(usual._replace(causal=True)),
        "score_head": choose("head", device, torch.bfloat16, torch.float32),
        "listwise_loss": choose("loss", device, torch.float32),
    }


def choose(module, device, *dtypes):
    """(implementation, reason) of `score_head` ("head") and `listwise_loss` ("loss") under impl="auto"."""
    kernels = _kernels(module)
    if isinstance(kernels, str):
        return "reference", f"plain PyTorch; {kernels}"
    if kernels.launch.INTERPRETED:
        return "reference", "plain PyTorch; the Triton kernel is interpreted here: ask for it with impl='triton'"
    reason = kernels.obstacle(device, *dtypes)
    if reason is not None:
        return "reference", f"plain PyTorch; the Triton kernel cannot run: {reason}"
    return "triton", "the Triton kernel"


class AttentionCall(typing.NamedTuple):
    """What `choose_attention` looks at.

    Attributes:
        device, dtype, head_dim: of the query.
        causal: whether the row is known to be causal as it stands: `layout.causal`, and no window. Under torch.compile
            it never is, so that one graph serves all layouts.
        num_samples: samples of the row.
        lse: whether the log-sum-exp is wanted.
        softcap: whether there is a soft cap.
        gradients: whether a backward may follow.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    causal: bool = False
    num_samples: int = 1
    lse: bool = False
    softcap: bool = False
    gradients: bool = False


def choose_attention(call):
    """(implementation, reason) of attention under impl="auto": the one place where this is decided.

    - "segments" on CPUs: torch's scaled_dot_product_attention for prompts and branches apart.
    - "reference" where neither that nor the Triton kernel can run.
    - "flash" for causal rows where flash attention is installed.
    - "varlen" or "sdpa", torch's own, for causal rows that are only scored, where `tuning.CAUSAL` says that they were
      measured to be faster: their backward does not give the same bits twice.
    - "triton" for everything else. "gluon" is never chosen: no GPU has measured it yet.
    """
    if segments.takes(call):
        return "segments", "torch's scaled_dot_product_attention, prompts and branches apart: the device is a CPU"
    kernels = _kernels("attention")
    if isinstance(kernels, str):
        return "reference", f"plain PyTorch; {kernels}"
    if kernels.launch.INTERPRETED:
        return "reference", "plain PyTorch; the Triton kernel is interpreted here: ask for it with impl='triton'"
    reason = kernels.obstacle(call.device, call.dtype, call.head_dim)
    if reason is not None:
        return "reference", f"plain PyTorch; the Triton kernel cannot run: {reason}"
    if not call.causal:
        return "triton", "the Triton kernel"
    from yojo_kernels import causal, tuning  # they load as much of torch as the kernels do

    if call.lse:
        return "triton", "the Triton kernel: the log-sum-exp is wanted, of which flash attention has no gradient"
    if call.dtype not in causal.DTYPES or call.head_dim % 8:
        return "triton", "the Triton kernel: flash attention takes 16-bit types and head dims that are multiples of 8"
    found = causal.flash_function(tuning.capability(call.device))
    if found is not None:
        return "flash", f"{found[1]}: the row is causal as it stands"
    faster = tuning.CAUSAL.get((tuning.chip_of(call.device), tuning.padded(call.head_dim)))
    if faster is None:
        return "triton", "the Triton kernel: flash attention is not installed, and torch's own was not measured faster"
    if call.gradients or call.softcap:
        return "triton", "the Triton kernel: torch's own attention has no deterministic backward and no soft cap"
    if faster == "varlen" and causal.has_torch_varlen():
        return "varlen", "torch's varlen attention: the row is causal as it stands, and it was measured to be faster"
    if call.num_samples == 1:
        return "sdpa", "torch's SDPA: the row is causal as it stands, and it was measured to be faster"
    return "triton", "the Triton kernel: torch's SDPA takes rows of one sample"


def _kernels(module):
    """A module of kernels, or why it cannot be had: Triton has no wheels for some systems."""
    try:
        # Imports by name: torch.compile follows those, and not importlib's functions.
        if module == "attention":
            from yojo_kernels import attention as kernels
        elif module == "gluon_attention":
            from yojo_kernels import gluon_attention as kernels
        elif module == "head":
            from yojo_kernels import head as kernels
        else:
            from yojo_kernels import loss as kernels
    except ImportError as error:
        return f"the Triton kernel cannot be imported: {error}"
    return kernels


def multi_response_attention(
    query,
    key,
    value,
    layout,
    *,
    scale=None,
    window=None,
    softcap=None,
    return_lse=False,
    query_rows=None,
    query_counts=None,
    heads_first=False,
    impl="auto",
):
    """Attention over a packed row in which every query sees its prompt and its own branch, never another branch.

    output[q] = sum over visible k of softmax_k(s(q, k)) value[k], with s(q, k) = scale * query[q] . key[k], or
    softcap * tanh(s / softcap) where a soft cap is given. Visible is what `layout.visible(window)` says.

    Args:
        query: [T, Hq, D] float.
        key: [T, Hkv, D], same dtype and device; Hq must be a multiple of Hkv (grouped-query heads share a key head).
        value: [T, Hkv, D].
        layout: `Layout` of T tokens on the same device.
        scale: factor on the dot products, 1 / sqrt(D) by default.
        window: sliding window in logical positions (>= 1), or None.
        softcap: soft cap of the scores (> 0), or None.
        return_lse: also return the log-sum-exp of each query's visible scores.
        query_rows: [M] int64, the rows of the tokens that ask, each in 0 <= row < T, in any order, also several times;
            query is then [M, Hq, D]. None = all T in order. For few queries: PyTorch computes them, in float32.
        query_counts: S ints, how many of the queries belong to each sample, where query_rows names those of the first
            sample first and so on. Each sample is then computed alone; without them every query meets all T keys.
        heads_first: the tensors are as attention functions of transformers get them: query [1, Hq, T, D] ([1, Hq, M, D]
            with query_rows), key and value [1, Hkv, T, D].
        impl: "reference", "triton", "gluon" or "auto"; picks the execution, never the meaning. "gluon" is a second
            forward kernel, for Hopper, 16-bit types and head dims 64 and 128, that "auto" does not choose: no GPU has
            measured it yet.

    What is not finite stays with those who see it: a NaN or an infinity in the query, key, value or gradient of the output
    of one token changes the outputs and gradients of no token but those that the mask connects with it. (Flash attention
    and torch's own, which may run rows that are causal as they stand on GPUs, keep samples apart, but not the earlier
    tokens of the sample: impl="triton" does.)

    Returns:
        [T, Hq, D] ([M, Hq, D] with query_rows) in the dtype of query; with return_lse the pair (output, lse [T, Hq]
        float32, or float64 for float64 inputs). A token that sees nothing gets output 0 and lse -inf. With heads_first
        both have a first dimension of 1 more, the output is [1, T, Hq, D].

    Raises:
        TypeError: an argument of the wrong type, or dtypes that differ.
        ValueError: shapes, devices or options that do not fit; an `impl` that cannot run here; rows out of range or
            outside their sample (looked at only where that costs no device synchronisation, that is on the CPU).
    """
    if heads_first:
        if (
            impl == "auto"
            and query_rows is None
            and query_counts is None
            and softcap is None
            and not return_lse
            and not torch.compiler.is_compiling()
        ):
            output = segments.whole_row(query, key, value, layout, scale, window)
            if output is not None:
                return output
        result = multi_response_attention(
            _tokens_first("query", query),
            _tokens_first("key", key),
            _tokens_first("value", value),
            layout,
            scale=scale,
            window=window,
            softcap=softcap,
            return_lse=return_lse,
            query_rows=query_rows,
            query_counts=query_counts,
            impl=impl,
        )
        return (result[0][None], result[1][None]) if return_lse else result[None]
    _check_impl(impl, ATTENTION_IMPLEMENTATIONS)
    if not fits(query, key, value, layout):
        _check_attention(query, key, value, layout, query_rows is not None)
    if scale is not None:
        _check_number("scale", scale)
    if softcap is not None:
        _check_number("softcap", softcap)
    if window is not None and (not isinstance(window, int) or isinstance(window, bool)):
        raise TypeError(f"window must be an int, or None for no window, got {type(window).__name__}")
    if window is not None and not 1 <= window < 2**31:
        raise ValueError(f"window must be at least 1 and below 2**31, or None for no window, got {window}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap must be above 0, or None for no cap, got {softcap}")
    if scale is None:
        scale = 1.0 / math.sqrt(query.shape[2])
    if query_rows is not None or query_counts is not None:
        _check_query_rows(query, layout, query_rows, query_counts, impl)
        output, lse = _rows_implementation(impl, query, query_counts, return_lse, softcap)(
            query, key, value, layout, query_rows, query_counts, scale=scale, window=window, softcap=softcap
        )
        return (output, lse) if return_lse else output
    if impl == "auto":
        compiling = torch.compiler.is_compiling()
        call = AttentionCall(
            device=query.device,
            dtype=query.dtype,
            head_dim=query.shape[2],
            causal=not compiling and layout.causal and window is None,
            num_samples=1 if compiling else layout.num_samples,
            lse=return_lse,
            softcap=softcap is not None,
            gradients=torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad),
        )
        name, reason = choose_attention(call)
        if not compiling:
            log.debug("multi_response_attention: %s (%s)", name, reason)
        run = _attention_implementation(name)
    elif impl in ("triton", "gluon"):
        module, about = (
            "attention" if impl == "triton" else "gluon_attention",
            (query.device, query.dtype, query.shape[2]),
        )
        run = _triton(module, "multi_response_attention", *about, impl=impl).multi_response_attention
    else:
        run = _attention_implementation(impl)
    with _without_autocast(query.device.type):
        output, lse = run(query, key, value, layout, scale=scale, window=window, softcap=softcap)
    return (output, lse) if return_lse else output


def _tokens_first(name, tensor):
    """[T, H, D] of [1, H, T, D]."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.ndim != 4 or tensor.shape[0] != 1:
        raise ValueError(
            f"{name} must have shape [1, heads, tokens, head dim] with heads_first, got {list(tensor.shape)}: a packed "
            "row is one row"
        )
    return tensor[0].transpose(0, 1)


_AS_IT_IS = contextlib.nullcontext()


def _without_autocast(device_type):
    """The dtype of the query is that of the computation: torch's own products would be cast, and the kernels' are not."""
    if device_type not in ("cpu", "cuda") or not torch.is_autocast_enabled(device_type):
        return _AS_IT_IS
    return torch.autocast(device_type, enabled=False)


def score_head(hidden, rows, weight1, bias1, weight2, bias2, *, activation="silu", scale=1.0, impl="auto"):
    """Read the given rows of the hidden states and turn each into one score.

    score = (activation(hidden[row] weight1^T + bias1) weight2^T + bias2) / scale, computed in float32 whatever the
    dtype of hidden, autocast or not.

    Args:
        hidden: [T, H] float, final hidden states of a packed row.
        rows: [M] int64, rows to read, each in 0 <= row < T; a row may appear several times.
        weight1: [K, H], or None for a linear head (activation is then unused).
        bias1: [K], or None for no bias.
        weight2: [1, K]; [1, H] for a linear head.
        bias2: [1], or None for no bias.
        activation: "silu", "gelu", "relu", "selu" or "tanh".
        scale: the score is divided by this; above 0.
        impl: "reference", "triton" or "auto"; picks the execution, never the meaning.

    Returns:
        [M] float32 (float64 when hidden or weight2 is float64).

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: shapes or devices that do not fit, an unknown activation, a row out of range (looked at only where
            that costs no device synchronisation, that is on the CPU; on a GPU the kernel gives such a row the score
            NaN), an `impl` that cannot run here.
    """
    _check_float("hidden", hidden, 2, "[tokens, hidden]")
    _check_integers("rows", rows, hidden.device)
    _check_float("weight2", weight2, 2, "[1, inputs]")
    inputs = hidden.shape[1]
    if weight1 is not None:
        _check_float("weight1", weight1, 2, "[K, hidden]")
        if weight1.shape[1] != inputs:
            raise ValueError(f"weight1 must have shape [K, {inputs}] to fit hidden, got {list(weight1.shape)}")
        inputs = weight1.shape[0]
        if activation not in reference.ACTIVATIONS:
            raise ValueError(f"activation must be one of {', '.join(reference.ACTIVATIONS)}, got {activation!r}")
    elif bias1 is not None:
        raise ValueError("bias1 needs weight1: a linear head has weight2 and bias2 alone")
    if weight2.shape != (1, inputs):
        raise ValueError(f"weight2 must have shape [1, {inputs}], got {list(weight2.shape)}")
    for name, bias, size in (("bias1", bias1, inputs), ("bias2", bias2, 1)):
        if bias is not None:
            _check_float(name, bias, 1, "[outputs]")
            if bias.shape[0] != size:
                raise ValueError(f"{name} must have shape [{size}], got {list(bias.shape)}")
    for name, tensor in (("weight1", weight1), ("bias1", bias1), ("weight2", weight2), ("bias2", bias2)):
        if tensor is not None and tensor.device != hidden.device:
            raise ValueError(f"{name} must be on the device of hidden, {hidden.device}, got {tensor.device}")
    if not scale > 0:
        raise ValueError(f"scale must be above 0, got {scale}")
    if _can_look_at(rows) and rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= hidden.shape[0]):
        raise ValueError(f"rows must lie in 0 <= row < {hidden.shape[0]}, got {int(rows.min())} to {int(rows.max())}")
    _check_impl(impl)
    dtypes = [tensor.dtype for tensor in (hidden, weight1, bias1, weight2, bias2) if tensor is not None]
    module = _pick(impl, "head", "score_head", hidden.device, *dtypes)
    return module.score_head(hidden, rows, weight1, bias1, weight2, bias2, activation=activation, scale=scale)


def listwise_loss(scores, rankings, offsets, *, kind="best", reduction="mean", impl="auto"):
    """The loss of ranking the responses of each sample by their scores.

    With s the scores and r the ranks (1 = best) of one sample:

    - best: -(1/k) sum over the k responses tied for best of log softmax(s).
    - plackett_luce: -log likelihood of the whole ranking, sum over i of log sum_{j: r_j >= r_i} exp(s_j) - s_i
      (ties by Breslow's rule: each member of a tied group is drawn from all not yet ranked, its group included).
    - bradley_terry: mean over the pairs with r_i < r_j of softplus(s_j - s_i); 0 if there is none.
    - soft: -sum of target * log softmax(s); rankings is then the target.

    Args:
        scores: [M] float.
        rankings: [M] int64, 1 = best, ties allowed; for "soft" float [M], at least 0 and 1 in sum over each sample,
            constants: no gradient flows to them.
        offsets: [S + 1] int32, ascending from 0 to M; sample s owns scores[offsets[s]:offsets[s + 1]].
        kind: "best", "plackett_luce", "bradley_terry" or "soft".
        reduction: "mean" or "sum" over the samples, or "none".
        impl: "reference", "triton" or "auto"; picks the execution, never the meaning.

    Returns:
        A float32 scalar, or [S] for reduction "none" (float64 for float64 scores). A sample of one response has
        loss 0 and gradient 0 for every kind.

    Raises:
        TypeError: an argument of the wrong type or dtype.
        ValueError: unknown kind or reduction, shapes that do not fit; and, looked at only where that costs no device
            synchronisation (on the CPU): offsets that do not ascend from 0 to M, a sample without responses,
            rankings below 1, targets that are negative or do not sum to 1. On a GPU the kernel gives such a sample the
            loss NaN.
    """
    if kind not in LOSS_KINDS:
        raise ValueError(f"kind must be one of {', '.join(LOSS_KINDS)}, got {kind!r}")
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    _check_float("scores", scores, 1, "[responses]")
    _check_integers("offsets", offsets, scores.device)
    if offsets.shape[0] < 2:
        raise ValueError(f"offsets must have one entry more than there are samples, at least 2, got {len(offsets)}")
    if kind == "soft":
        _check_float("rankings (the targets of kind 'soft')", rankings, 1, "[responses]")
        if rankings.device != scores.device:
            raise ValueError(f"rankings must be on the device of scores, {scores.device}, got {rankings.device}")
    else:
        _check_integers("rankings", rankings, scores.device)
    if rankings.shape != scores.shape:
        raise ValueError(f"rankings must have the shape of scores, {list(scores.shape)}, got {list(rankings.shape)}")
    if rankings.requires_grad:
        raise ValueError("rankings (the targets of kind 'soft') are constants of the loss: pass rankings.detach()")
    if _can_look_at(offsets):
        lengths = offsets[1:] - offsets[:-1]
        if int(offsets[0]) != 0 or int(offsets[-1]) != scores.shape[0] or bool((lengths < 0).any()):
            raise ValueError(f"offsets must ascend from 0 to {scores.shape[0]}, got {offsets.tolist()}")
        if bool((lengths == 0).any()):
            raise ValueError(f"sample {int((lengths == 0).nonzero()[0])} has no responses")
        _check_rankings(rankings, lengths, kind)
    _check_impl(impl)
    dtypes = [tensor.dtype for tensor in (scores, rankings) if tensor.dtype.is_floating_point]
    module = _pick(impl, "loss", "listwise_loss", scores.device, *dtypes)
    return module.listwise_loss(scores, rankings, offsets, kind=kind, reduction=reduction)


def _check_rankings(rankings, lengths, kind):
    if kind != "soft":
        if int(rankings.min()) < 1:
            raise ValueError(f"rankings must be 1 (best) or more, got {int(rankings.min())}")
        return
    sums = torch.stack([target.sum() for target in rankings.detach().double().split(lengths.tolist())])
    if bool((rankings < 0).any()):
        raise ValueError(f"targets of kind 'soft' must be at least 0, got {float(rankings.min())}")
    if bool(((sums - 1).abs() > 1e-3).any()):
        sample = int((sums - 1).abs().argmax())
        raise ValueError(
            f"targets of kind 'soft' must sum to 1 in every sample; sample {sample}: {float(sums[sample])}"
        )


def _can_look_at(tensor):
    """Whether reading values costs no synchronisation and breaks no graph."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling()


def _check_attention(query, key, value, layout, of_rows):
    """Raise what is wrong with tensors and layout; with of_rows, query is that of some rows."""
    tokens, of_tokens = (key, "key") if of_rows else (query, "query")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_float(name, tensor, 3, "[tokens, heads, head dim]")
        if tensor.dtype != query.dtype:
            raise TypeError(f"{name} must have the dtype of query, {query.dtype}, got {tensor.dtype}")
        if tensor.device != query.device:
            raise ValueError(f"{name} must be on the device of query, {query.device}, got {tensor.device}")
        if tensor.shape[0] != tokens.shape[0] and (name != "query" or not of_rows):
            raise ValueError(f"{name} must have the {tokens.shape[0]} tokens of {of_tokens}, got {tensor.shape[0]}")
        if tensor.shape[2] != query.shape[2]:
            raise ValueError(f"{name} must have the head dim of query, {query.shape[2]}, got {tensor.shape[2]}")
    if key.shape[1] != value.shape[1]:
        raise ValueError(f"key and value must have the same heads, got {key.shape[1]} and {value.shape[1]}")
    if key.shape[1] == 0 or query.shape[1] % key.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of key heads, got {query.shape[1]} and {key.shape[1]} "
            "(grouped-query attention shares each key head among Hq / Hkv query heads)"
        )
    if not isinstance(layout, Layout):
        raise TypeError(f"layout must be a Layout (see Layout.build), got {type(layout).__name__}")
    if layout.num_tokens != tokens.shape[0]:
        raise ValueError(f"layout describes {layout.num_tokens} tokens, {of_tokens} has {tokens.shape[0]}")
    if layout.device != query.device:
        raise ValueError(f"layout is on {layout.device}, query on {query.device}: move it with layout.to(device)")
    if query.shape[2] == 0:
        raise ValueError("query, key and value must have a head dim of at least 1, got 0")


def _check_number(name, number):
    if not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number or None, got {type(number).__name__}")
    if not torch.compiler.is_compiling() and not math.isfinite(number):
        raise ValueError(f"{name} must be finite, got {number}")


def _check_float(name, tensor, ndim, meaning):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if not tensor.dtype.is_floating_point:
        raise TypeError(f"{name} must be a floating-point tensor, got {tensor.dtype}")
    if tensor.ndim != ndim:
        raise ValueError(f"{name} must have {ndim} dimensions {meaning}, got shape {list(tensor.shape)}")


def _check_integers(name, tensor, device):
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be an int32 or int64 tensor, got {tensor.dtype}")
    if tensor.ndim != 1:
        raise ValueError(f"{name} must have 1 dimension, got shape {list(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must be on {device}, got {tensor.device}")


def _check_query_rows(query, layout, rows, counts, impl):
    if rows is None:
        raise ValueError("query_counts says how query_rows are shared among the samples: give query_rows, too")
    _check_integers("query_rows", rows, query.device)
    if rows.shape[0] != query.shape[0]:
        raise ValueError(f"query_rows must name the row of each of the {query.shape[0]} queries, got {rows.shape[0]}")
    if impl in ("triton", "gluon"):
        raise ValueError(f"impl={impl!r} cannot run query_rows: there is no kernel for them; use 'auto' or 'reference'")
    if _can_look_at(rows) and rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= layout.num_tokens):
        raise ValueError(
            f"query_rows must lie in 0 <= row < {layout.num_tokens}, got {int(rows.min())} to {int(rows.max())}"
        )
    if counts is None:
        return
    if not isinstance(counts, (tuple, list)) or not all(isinstance(count, int) and count >= 0 for count in counts):
        raise TypeError(f"query_counts must be a list of ints, 0 or more, or None, got {counts!r}")
    if len(counts) != layout.num_samples or sum(counts) != rows.shape[0]:
        raise ValueError(
            f"query_counts must share {rows.shape[0]} queries among {layout.num_samples} samples, got {list(counts)}"
        )
    if _can_look_at(rows):
        for s, (own, (start, stop)) in enumerate(zip(rows.split(list(counts)), layout.sample_spans(), strict=True)):
            if own.numel() and (int(own.min()) < start or int(own.max()) >= stop):
                raise ValueError(
                    f"query_rows of sample {s} must lie in {start} <= row < {stop}, got {int(own.min())} to "
                    f"{int(own.max())}"
                )


def _rows_implementation(impl, query, counts, lse, softcap):
    call = AttentionCall(query.device, query.dtype, query.shape[2], lse=lse, softcap=softcap is not None)
    here = impl == "auto" and counts is not None and segments.takes(call)
    return (segments if here else reference).attention_of_rows


def _attention_implementation(name):
    """The function of an implementation that is known to run here."""
    if name == "triton":
        return _kernels("attention").multi_response_attention
    if name in ("reference", "segments"):
        return (reference if name == "reference" else segments).multi_response_attention
    from yojo_kernels import causal

    return getattr(causal, name)


def _pick(impl, module, name, device, *dtypes):
    """The module that computes score_head or listwise_loss: `reference`, or the kernels."""
    if impl == "auto":
        impl, reason = choose(module, device, *dtypes)
        if not torch.compiler.is_compiling():
            log.debug("%s: %s (%s)", name, impl, reason)
    return reference if impl == "reference" else _triton(module, name, device, *dtypes)


def _triton(module, name, *arguments, impl="triton"):
    """The module of the kernels, or the error of impl="triton" or "gluon" where they cannot run."""
    kernels = _kernels(module)
    reason = kernels if isinstance(kernels, str) else kernels.obstacle(*arguments)
    if reason is not None:
        raise ValueError(f"impl={impl!r} cannot run {name}: {reason}; use 'auto' or 'reference'")
    return kernels


def _check_impl(impl, known=IMPLEMENTATIONS):
    if impl not in known:
        raise ValueError(f"impl must be one of {', '.join(known)}, got {impl!r}")

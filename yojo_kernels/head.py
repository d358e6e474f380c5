"""The value head in Triton: gather of the rows, two linear layers and the activation between, forward and backward.

Forward, one launch: a program owns BLOCK_K hidden units of BLOCK_M readings. The last one of a reading to finish adds
up, first to last, what each gave to the score, so that every launch gives the same bits.

Backward, two launches: the first clears the gradient of the hidden states and adds up the gradients of readings of the
same row, the second has programs that own a tile of weight1's gradient (and its share of the small ones) and programs
that own a tile of the gradient of the rows that were read. Nothing is added atomically.

With bfloat16 hidden states the products are computed on tensor cores and are exact: a float32 weight is the sum of three
bfloat16 numbers. Other types are multiplied in plain float32.
"""

import torch
import triton
import triton.language as tl
from torch.utils.flop_counter import register_flop_formula

from yojo_kernels import eager, launch, tuning

FILL = 8192  # entries that one program clears


# ---- pieces of the kernels ----


@triton.jit
def _expm1(x):
    # exp(x) - 1 loses small x to cancellation: there its series.
    series = x * (1 + x / 2 * (1 + x / 3 * (1 + x / 4 * (1 + x / 5 * (1 + x / 6 * (1 + x / 7 * (1 + x / 8)))))))
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(tl.minimum(x, 0.0)) - 1)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    """The activation of x, and its derivative there."""
    if ACTIVATION == "silu":
        s = 1 / (1 + tl.exp(-x))
        value, slope = x * s, s * (1 + x * (1 - s))
    elif ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        value, slope = x * below, below + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACTIVATION == "relu":
        value, slope = tl.where(x <= 0, 0.0, x), tl.where(x <= 0, 0.0, 1.0)
    elif ACTIVATION == "selu":
        fall = 1.7580993408473766 * _expm1(x)
        value = tl.where(x <= 0, fall, 1.0507009873554805 * x)
        slope = tl.where(x <= 0, fall + 1.7580993408473766, 1.0507009873554805)
    else:
        tl.static_assert(ACTIVATION == "tanh")
        decay = _expm1(-2 * tl.abs(x))
        size = -decay / (2 + decay)
        value = tl.where(x < 0, -size, size)
        slope = 1 - size * size
    return value, slope


@triton.jit
def _bfloat16_dot(a, b, acc, EMULATED: tl.constexpr):
    if EMULATED:  # the interpreter has no product of bfloat16
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        acc = tl.dot(a, b, acc)
    return acc


@triton.jit
def _dot(a, b, acc, TERMS: tl.constexpr, EMULATED: tl.constexpr):
    """acc + a b. TERMS = 0: in float32. Otherwise b is bfloat16, and a is taken as the sum of so many bfloat16 terms."""
    if TERMS == 0:
        acc = tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee")
    else:
        a = a.to(tl.float32)
        high = a.to(tl.bfloat16)
        part = tl.zeros_like(acc)
        if TERMS > 1:
            rest = a - high.to(tl.float32)
            middle = rest.to(tl.bfloat16)
            if TERMS > 2:
                part = _bfloat16_dot((rest - middle.to(tl.float32)).to(tl.bfloat16), b, part, EMULATED)
            part = _bfloat16_dot(middle, b, part, EMULATED)
        # Sums of their own, small ones first: tensor cores cut off what float32 additions round.
        acc += _bfloat16_dot(high, b, part, EMULATED)
    return acc


# ---- forward ----


@triton.jit(do_not_specialize=["num_readings", "num_tokens"])
def head_forward_kernel(hidden, rows, weight1, bias1, weight2, bias2, scores, pre, partials, arrived,
                        stride_hidden, stride_weight, num_readings, num_tokens, scale,
                        H, K,
                        HAS_BIAS1: tl.constexpr, HAS_BIAS2: tl.constexpr, SAVE: tl.constexpr,
                        ACTIVATION: tl.constexpr, TERMS: tl.constexpr, EMULATED: tl.constexpr,
                        BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """Scores of BLOCK_M readings by the last of their programs; pre [M, K] is kept for the backward with SAVE."""
    num_k = tl.cdiv(K, BLOCK_K)
    tile_k, tile_m = tl.program_id(0) % num_k, tl.program_id(0) // num_k
    offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tile_k * BLOCK_K + tl.arange(0, BLOCK_K)
    offs_h = tl.arange(0, BLOCK_H)
    inside = offs_m < num_readings
    row = tl.load(rows + offs_m, mask=inside, other=0).to(tl.int64)
    known = inside & (row >= 0) & (row < num_tokens)
    x_rows = hidden + row[:, None] * stride_hidden + offs_h[None, :]
    w_rows = weight1 + offs_k[:, None].to(tl.int64) * stride_weight + offs_h[None, :]
    acc = tl.zeros([BLOCK_K, BLOCK_M], tl.float32)
    for h in range(0, H, BLOCK_H):
        w = tl.load(w_rows + h, mask=(offs_k < K)[:, None] & (h + offs_h < H)[None, :], other=0.0)
        x = tl.load(x_rows + h, mask=known[:, None] & (h + offs_h < H)[None, :], other=0.0)
        acc = _dot(w, tl.trans(x), acc, TERMS, EMULATED)
    if HAS_BIAS1:
        acc += tl.load(bias1 + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)[:, None]
    if SAVE:
        at = pre + offs_m[None, :].to(tl.int64) * K + offs_k[:, None]
        tl.store(at, acc, mask=inside[None, :] & (offs_k < K)[:, None])
    value, _ = _activate(acc, ACTIVATION)
    w2 = tl.load(weight2 + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    # Beyond K the activation is multiplied by 0, and is finite: it is that of 0.
    tl.store(partials + tile_k * num_readings + offs_m, tl.sum(value * w2[:, None], 0), mask=inside)
    tl.debug_barrier()  # all threads have stored before one of them reports
    before = tl.atomic_add(arrived + tile_m, 1, sem="acq_rel")
    tl.debug_barrier()
    if before == num_k - 1:
        total = tl.zeros([BLOCK_M], tl.float32)
        for k in range(0, num_k):
            total += tl.load(partials + k * num_readings + offs_m, mask=inside, other=0.0, cache_modifier=".cg")
        if HAS_BIAS2:
            total += tl.load(bias2).to(tl.float32)
        tl.store(scores + offs_m, tl.where(known, total / scale, float("nan")), mask=inside)


@triton.jit(do_not_specialize=["num_readings", "num_tokens"])
def linear_forward_kernel(hidden, rows, weight2, bias2, scores, stride_hidden, num_readings, num_tokens, scale, H,
                          HAS_BIAS2: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """Scores of BLOCK_M readings of a linear head."""
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_h = tl.arange(0, BLOCK_H)
    inside = offs_m < num_readings
    row = tl.load(rows + offs_m, mask=inside, other=0).to(tl.int64)
    known = inside & (row >= 0) & (row < num_tokens)
    x_rows = hidden + row[:, None] * stride_hidden + offs_h[None, :]
    acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for h in range(0, H, BLOCK_H):
        w = tl.load(weight2 + h + offs_h, mask=h + offs_h < H, other=0.0).to(tl.float32)
        x = tl.load(x_rows + h, mask=known[:, None] & (h + offs_h < H)[None, :], other=0.0).to(tl.float32)
        acc += x * w[None, :]
    total = tl.sum(acc, 1)
    if HAS_BIAS2:
        total += tl.load(bias2).to(tl.float32)
    tl.store(scores + offs_m, tl.where(known, total / scale, float("nan")), mask=inside)


# ---- backward ----


@triton.jit(do_not_specialize=["num_readings", "stride_grad", "num_merging", "num_entries"])
def head_merge_kernel(grad_scores, rows, merged, grad_bias2, grad_hidden,
                      num_readings, stride_grad, num_merging, num_entries, scale,
                      BLOCK_M: tl.constexpr, FILL: tl.constexpr):  # fmt: skip
    """Clears the gradient of the hidden states, and adds up the gradients of readings of the same row.

    merged [M]: for each reading, the sum over all readings of its row, divided by scale.
    """
    program = tl.program_id(0)
    if program >= num_merging:
        at = (program - num_merging).to(tl.int64) * FILL + tl.arange(0, FILL)
        tl.store(grad_hidden + at, tl.zeros([FILL], grad_hidden.dtype.element_ty), mask=at < num_entries)
        return
    offs_m = program * BLOCK_M + tl.arange(0, BLOCK_M)
    row = tl.load(rows + offs_m, mask=offs_m < num_readings, other=-1)
    total = tl.zeros([BLOCK_M], tl.float32)
    overall = tl.zeros([BLOCK_M], tl.float32)
    for n in range(0, num_readings, BLOCK_M):
        offs_n = n + tl.arange(0, BLOCK_M)
        other = tl.load(rows + offs_n, mask=offs_n < num_readings, other=-2)
        grad = tl.load(grad_scores + offs_n.to(tl.int64) * stride_grad, mask=offs_n < num_readings, other=0.0).to(tl.float32)  # fmt: skip
        total += tl.sum(tl.where(row[:, None] == other[None, :], grad[None, :], 0.0), 1)
        overall += grad
    tl.store(merged + offs_m, total / scale, mask=offs_m < num_readings)
    if program == 0:
        tl.store(grad_bias2, (tl.sum(overall, 0) / scale).to(grad_bias2.dtype.element_ty))


@triton.jit
def _weight_grads(program, grad_scores, hidden, rows, weight2, pre, grad_weight1, grad_bias1, grad_weight2,
                  stride_hidden, num_readings, num_tokens, stride_grad, scale, H, K,
                  HAS_BIAS1: tl.constexpr, ACTIVATION: tl.constexpr, TERMS: tl.constexpr, EMULATED: tl.constexpr,
                  BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """A tile [BLOCK_K, BLOCK_H] of weight1's gradient; those of the first column also bias1's and weight2's."""
    num_h = tl.cdiv(H, BLOCK_H)
    offs_h = (program % num_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_k = (program // num_h) * BLOCK_K + tl.arange(0, BLOCK_K)
    w2 = tl.load(weight2 + offs_k, mask=offs_k < K, other=0.0).to(tl.float32)
    acc = tl.zeros([BLOCK_K, BLOCK_H], tl.float32)
    acc_b = tl.zeros([BLOCK_K], tl.float32)
    acc_w = tl.zeros([BLOCK_K], tl.float32)
    for m in range(0, num_readings, BLOCK_M):
        offs_m = m + tl.arange(0, BLOCK_M)
        inside = offs_m < num_readings
        row = tl.load(rows + offs_m, mask=inside, other=0).to(tl.int64)
        known = inside & (row >= 0) & (row < num_tokens)
        z = tl.load(
            pre + offs_m[:, None].to(tl.int64) * K + offs_k[None, :],
            mask=inside[:, None] & (offs_k < K)[None, :], other=0.0,
        )  # fmt: skip
        grad = tl.load(grad_scores + offs_m.to(tl.int64) * stride_grad, mask=inside, other=0.0).to(tl.float32) / scale
        value, slope = _activate(tl.trans(z), ACTIVATION)  # [BLOCK_K, BLOCK_M]
        dz = grad[None, :] * w2[:, None] * slope
        x = tl.load(
            hidden + row[:, None] * stride_hidden + offs_h[None, :],
            mask=known[:, None] & (offs_h < H)[None, :], other=0.0,
        )  # fmt: skip
        acc = _dot(dz, x, acc, TERMS, EMULATED)
        acc_b += tl.sum(dz, 1)
        acc_w += tl.sum(grad[None, :] * value, 1)
    at = grad_weight1 + offs_k[:, None].to(tl.int64) * H + offs_h[None, :]
    tl.store(at, acc.to(grad_weight1.dtype.element_ty), mask=(offs_k < K)[:, None] & (offs_h < H)[None, :])
    if program % num_h == 0:
        if HAS_BIAS1:
            tl.store(grad_bias1 + offs_k, acc_b.to(grad_bias1.dtype.element_ty), mask=offs_k < K)
        tl.store(grad_weight2 + offs_k, acc_w.to(grad_weight2.dtype.element_ty), mask=offs_k < K)


@triton.jit
def _row_grads(program, rows, weight1, weight2, pre, merged, grad_hidden,
               stride_weight, num_readings, num_tokens, H, K,
               ACTIVATION: tl.constexpr, PRECISION: tl.constexpr,
               BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """A tile [BLOCK_M, BLOCK_H] of the gradient of the rows that were read."""
    num_h = tl.cdiv(H, BLOCK_H)
    offs_h = (program % num_h) * BLOCK_H + tl.arange(0, BLOCK_H)
    offs_m = (program // num_h) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K)
    inside = offs_m < num_readings
    row = tl.load(rows + offs_m, mask=inside, other=0).to(tl.int64)
    known = inside & (row >= 0) & (row < num_tokens)
    grad = tl.load(merged + offs_m, mask=inside, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
    for k in range(0, K, BLOCK_K):
        z = tl.load(
            pre + offs_m[:, None].to(tl.int64) * K + k + offs_k[None, :],
            mask=inside[:, None] & (k + offs_k < K)[None, :], other=0.0,
        )  # fmt: skip
        w2 = tl.load(weight2 + k + offs_k, mask=k + offs_k < K, other=0.0).to(tl.float32)
        _, slope = _activate(z, ACTIVATION)
        # Readings of one row have the same z, so that their gradients add up, and all of them store the same numbers.
        dz = grad[:, None] * w2[None, :] * slope
        w = tl.load(
            weight1 + (k + offs_k)[:, None].to(tl.int64) * stride_weight + offs_h[None, :],
            mask=(k + offs_k < K)[:, None] & (offs_h < H)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(dz, w.to(tl.float32), acc, input_precision=PRECISION)
    at = grad_hidden + row[:, None] * H + offs_h[None, :]
    tl.store(at, acc.to(grad_hidden.dtype.element_ty), mask=known[:, None] & (offs_h < H)[None, :])


@triton.jit(do_not_specialize=["num_readings", "num_tokens", "stride_grad", "num_weight_programs"])
def head_backward_kernel(grad_scores, hidden, rows, weight1, weight2, pre, merged,
                         grad_hidden, grad_weight1, grad_bias1, grad_weight2,
                         stride_hidden, stride_weight, num_readings, num_tokens, stride_grad, num_weight_programs, scale,
                         H, K,
                         HAS_BIAS1: tl.constexpr, ACTIVATION: tl.constexpr,
                         TERMS: tl.constexpr, EMULATED: tl.constexpr, PRECISION: tl.constexpr,
                         BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """The first num_weight_programs own a tile of weight1's gradient each, the others one of the rows'.

    grad_hidden and grad_weight1 are contiguous; pre [M, K] is what the forward kept.
    """
    program = tl.program_id(0)
    if program < num_weight_programs:
        _weight_grads(program, grad_scores, hidden, rows, weight2, pre, grad_weight1, grad_bias1, grad_weight2,
                      stride_hidden, num_readings, num_tokens, stride_grad, scale, H, K,
                      HAS_BIAS1, ACTIVATION, TERMS, EMULATED, BLOCK_M, BLOCK_K, BLOCK_H)  # fmt: skip
    else:
        _row_grads(program - num_weight_programs, rows, weight1, weight2, pre, merged, grad_hidden,
                   stride_weight, num_readings, num_tokens, H, K,
                   ACTIVATION, PRECISION, BLOCK_M, BLOCK_K, BLOCK_H)  # fmt: skip


@triton.jit(do_not_specialize=["num_readings", "num_tokens", "stride_grad", "num_weight_programs"])
def linear_backward_kernel(grad_scores, hidden, rows, weight2, merged, grad_hidden, grad_weight2,
                           stride_hidden, num_readings, num_tokens, stride_grad, num_weight_programs, scale, H,
                           BLOCK_M: tl.constexpr, BLOCK_H: tl.constexpr):  # fmt: skip
    """The same for a linear head: BLOCK_H entries of weight2's gradient, or a tile of the gradient of the rows read."""
    num_h = tl.cdiv(H, BLOCK_H)
    program = tl.program_id(0)
    if program < num_weight_programs:
        offs_h = program * BLOCK_H + tl.arange(0, BLOCK_H)
        acc = tl.zeros([BLOCK_M, BLOCK_H], tl.float32)
        for m in range(0, num_readings, BLOCK_M):
            offs_m = m + tl.arange(0, BLOCK_M)
            inside = offs_m < num_readings
            row = tl.load(rows + offs_m, mask=inside, other=0).to(tl.int64)
            known = inside & (row >= 0) & (row < num_tokens)
            grad = (
                tl.load(grad_scores + offs_m.to(tl.int64) * stride_grad, mask=inside, other=0.0).to(tl.float32) / scale
            )
            x = tl.load(
                hidden + row[:, None] * stride_hidden + offs_h[None, :],
                mask=known[:, None] & (offs_h < H)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            acc += grad[:, None] * x
        tl.store(grad_weight2 + offs_h, tl.sum(acc, 0).to(grad_weight2.dtype.element_ty), mask=offs_h < H)
    else:
        program -= num_weight_programs
        tile_h, tile_m = program % num_h, program // num_h
        offs_h = tile_h * BLOCK_H + tl.arange(0, BLOCK_H)
        offs_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = offs_m < num_readings
        row = tl.load(rows + offs_m, mask=inside, other=0).to(tl.int64)
        known = inside & (row >= 0) & (row < num_tokens)
        grad = tl.load(merged + offs_m, mask=inside, other=0.0)
        w = tl.load(weight2 + offs_h, mask=offs_h < H, other=0.0).to(tl.float32)
        at = grad_hidden + row[:, None] * H + offs_h[None, :]
        tl.store(at, (grad[:, None] * w[None, :]).to(grad_hidden.dtype.element_ty), mask=known[:, None] & (offs_h < H)[None, :])  # fmt: skip


# ---- operators ----

obstacle = launch.obstacle  # takes the device and every floating-point dtype


def score_head(hidden, rows, weight1, bias1, weight2, bias2, *, activation, scale):
    """As `yojo_kernels.score_head`, arguments checked; returns [M] float32. A row out of range gives NaN."""
    tensors = (hidden, weight1, bias1, weight2, bias2)
    save = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
    scores, _ = _score_head(
        hidden, rows, weight1, bias1, weight2, bias2, activation, float(scale), save and weight1 is not None
    )
    return scores


def terms(hidden_dtype, weight_dtype):
    """(bfloat16 terms of a weight, of a gradient) that the products are computed with; (0, 0) for float32."""
    if hidden_dtype != torch.bfloat16 or weight_dtype == torch.float16:
        return 0, 0
    return (3, 3) if weight_dtype == torch.float32 else (1, 2)


def precision(hidden_dtype):
    """How the gradient of the hidden states is multiplied: bfloat16 ones need no more than 16 bits of their factors."""
    return "bf16x3" if hidden_dtype == torch.bfloat16 and not launch.INTERPRETED else "ieee"


def _side_by_side(tensor):
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


@eager.operator("score_head", watched=6)
def _score_head(
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weight1: torch.Tensor | None,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    activation: str,
    scale: float,
    save: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight1, weight2, rows = map(_side_by_side, (hidden, weight1, weight2, rows))
    num_readings, (num_tokens, size) = rows.shape[0], hidden.shape
    width = 0 if weight1 is None else weight1.shape[0]
    new = dict(dtype=torch.float32, device=hidden.device)
    scores = torch.empty(num_readings, **new)
    pre = torch.empty((num_readings if save else 0, width), **new)
    if num_readings == 0:
        return scores, pre
    with launch.on(hidden.device):
        if weight1 is None:
            tile = tuning.head("linear_forward", num_readings, hidden.device)
            linear_forward_kernel[(triton.cdiv(num_readings, tile.block_m),)](
                hidden, rows, weight2, weight2 if bias2 is None else bias2, scores,
                hidden.stride(0), num_readings, num_tokens, scale, size,
                HAS_BIAS2=bias2 is not None, BLOCK_M=tile.block_m, BLOCK_H=tile.block_h,
                num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
            return scores, pre
        tile = tuning.head("head_forward", num_readings, hidden.device, terms(hidden.dtype, weight1.dtype)[0] > 0)
        tiles_m, tiles_k = triton.cdiv(num_readings, tile.block_m), triton.cdiv(width, tile.block_k)
        partials = torch.empty((tiles_k, num_readings), **new)
        arrived = torch.zeros(tiles_m, dtype=torch.int32, device=hidden.device)
        head_forward_kernel[(tiles_m * tiles_k,)](
            hidden, rows, weight1, weight2 if bias1 is None else bias1, weight2, weight2 if bias2 is None else bias2,
            scores, pre, partials, arrived,
            hidden.stride(0), weight1.stride(0), num_readings, num_tokens, scale, size, width,
            HAS_BIAS1=bias1 is not None, HAS_BIAS2=bias2 is not None, SAVE=save,
            **constants(tile, activation), TERMS=terms(hidden.dtype, weight1.dtype)[0],
        )  # fmt: skip
    return scores, pre


def constants(tile, activation):
    """What the kernels of an mlp head are compiled for, launch options included."""
    return {
        "ACTIVATION": activation,
        "EMULATED": launch.INTERPRETED,
        "BLOCK_M": tile.block_m,
        "BLOCK_K": tile.block_k,
        "BLOCK_H": tile.block_h,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


@_score_head.register_fake
def _(hidden, rows, weight1, bias1, weight2, bias2, activation, scale, save):
    width = 0 if weight1 is None else weight1.shape[0]
    scores = hidden.new_empty(rows.shape[0], dtype=torch.float32)
    return scores, hidden.new_empty((rows.shape[0] if save else 0, width), dtype=torch.float32)


@eager.operator("score_head_backward", watched=8)
def _score_head_backward(
    grad_scores: torch.Tensor,
    hidden: torch.Tensor,
    rows: torch.Tensor,
    weight1: torch.Tensor | None,
    bias1: torch.Tensor | None,
    weight2: torch.Tensor,
    bias2: torch.Tensor | None,
    pre: torch.Tensor,
    activation: str,
    scale: float,
    need_hidden: bool,
    need_weights: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    hidden, weight1, weight2, rows = map(_side_by_side, (hidden, weight1, weight2, rows))
    num_readings, (num_tokens, size) = rows.shape[0], hidden.shape
    gradients = _new_gradients(hidden, weight1, bias1, weight2, bias2, need_hidden, need_weights)
    grad_hidden, grad_weight1, grad_bias1, grad_weight2, grad_bias2 = gradients
    if num_readings == 0:
        return tuple(gradient.zero_() for gradient in gradients)
    merged = torch.empty(num_readings, dtype=torch.float32, device=hidden.device)
    tile = tuning.head("head_merge", num_readings, hidden.device)
    num_merging = triton.cdiv(num_readings, tile.block_m)
    num_filling = triton.cdiv(grad_hidden.numel(), FILL)
    with launch.on(hidden.device):
        head_merge_kernel[(num_merging + num_filling,)](
            grad_scores, rows, merged, grad_bias2, grad_hidden,
            num_readings, grad_scores.stride(0), num_merging, grad_hidden.numel(), scale,
            BLOCK_M=tile.block_m, FILL=FILL, num_warps=tile.num_warps,
        )  # fmt: skip
        kind = "linear_backward" if weight1 is None else "head_backward"
        tensor_cores = weight1 is not None and terms(hidden.dtype, weight1.dtype)[0] > 0
        tile = tuning.head(kind, num_readings, hidden.device, tensor_cores)
        tiles_h = triton.cdiv(size, tile.block_h)
        num_row_programs = tiles_h * triton.cdiv(num_readings, tile.block_m) if need_hidden else 0
        if weight1 is None:
            num_weight_programs = tiles_h if need_weights else 0
            linear_backward_kernel[(num_weight_programs + num_row_programs,)](
                grad_scores, hidden, rows, weight2, merged, grad_hidden, grad_weight2,
                hidden.stride(0), num_readings, num_tokens, grad_scores.stride(0), num_weight_programs, scale, size,
                BLOCK_M=tile.block_m, BLOCK_H=tile.block_h, num_warps=tile.num_warps, num_stages=tile.num_stages,
            )  # fmt: skip
            return gradients
        num_weight_programs = tiles_h * triton.cdiv(weight1.shape[0], tile.block_k) if need_weights else 0
        head_backward_kernel[(num_weight_programs + num_row_programs,)](
            grad_scores, hidden, rows, weight1, weight2, pre, merged,
            grad_hidden, grad_weight1, grad_bias1, grad_weight2,
            hidden.stride(0), weight1.stride(0), num_readings, num_tokens, grad_scores.stride(0), num_weight_programs,
            scale, size, weight1.shape[0],
            HAS_BIAS1=bias1 is not None, PRECISION=precision(hidden.dtype),
            **constants(tile, activation), TERMS=terms(hidden.dtype, weight1.dtype)[1],
        )  # fmt: skip
    return gradients


def _new_gradients(hidden, weight1, bias1, weight2, bias2, need_hidden, need_weights):
    """Room for each gradient, contiguous; without entries for what is not needed or not there."""

    def room(tensor, needed):
        shape = (0,) if tensor is None or not needed else tensor.shape
        like = hidden if tensor is None else tensor
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    # The scalar is always computed: it costs nothing, and its kernel is the one that is always launched.
    grad_bias2 = torch.empty(1, dtype=hidden.dtype if bias2 is None else bias2.dtype, device=hidden.device)
    return (
        room(hidden, need_hidden),
        *(room(weight, need_weights) for weight in (weight1, bias1, weight2)),
        grad_bias2,
    )


@_score_head_backward.register_fake
def _(grad_scores, hidden, rows, weight1, bias1, weight2, bias2, pre, activation, scale, need_hidden, need_weights):
    return _new_gradients(hidden, weight1, bias1, weight2, bias2, need_hidden, need_weights)


def _save(ctx, inputs, output):
    hidden, rows, weight1, bias1, weight2, bias2, activation, scale, _ = inputs
    ctx.save_for_backward(hidden, rows, weight1, bias1, weight2, bias2, output[1])
    ctx.options = (activation, scale)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_scores, _):
    none = (None,) * 9
    if grad_scores is None:
        return none
    needed = ctx.needs_input_grad
    need_hidden, need_weights = needed[0], needed[2] or needed[3] or needed[4] or needed[5]
    saved = ctx.saved_tensors
    gradients = _score_head_backward(grad_scores, *saved, *ctx.options, need_hidden, need_weights)
    wanted = [gradient if needed[i] else None for i, gradient in zip((0, 2, 3, 4, 5), gradients, strict=True)]
    return wanted[0], None, *wanted[1:], None, None, None


_score_head.register_autograd(_backward, setup_context=_save)


# ---- floating-point operations ----


@register_flop_formula(torch.ops.yojo.score_head)
def _forward_flops(hidden, rows, weight1, bias1, weight2, *rest, out_shape=None, **kwargs):
    return 2 * rows[0] * weight2[1] * (1 if weight1 is None else 1 + weight1[1])


@register_flop_formula(torch.ops.yojo.score_head_backward)
def _backward_flops(grad_scores, hidden, rows, weight1, bias1, weight2, bias2, pre, activation, scale, need_hidden,
                    need_weights, out_shape=None, **kwargs):  # fmt: skip
    return (need_hidden + need_weights) * _forward_flops(hidden, rows, weight1, bias1, weight2)

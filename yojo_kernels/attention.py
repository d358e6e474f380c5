"""Multi-response attention in Triton: the torch operators around the kernels, and what they cost."""

import weakref

import torch
from torch.utils.flop_counter import register_flop_formula
from torch.utils.weak import WeakTensorKeyDictionary

from yojo_kernels import eager, launch, tuning
from yojo_kernels.attention_backward import key_grad_kernel, query_grad_kernel, sum_kernel
from yojo_kernels.attention_forward import forward_kernel
from yojo_kernels.layout import visible_to
from yojo_kernels.segments import with_positive_scale
from yojo_kernels.tables import tables_for

MAX_HEAD_DIM = 256
SUM_WARPS, SUM_ENTRIES = 8, 4096  # warps of a program that adds up pieces, and entries that it owns


def obstacle(device, dtype, head_dim):
    """Why the kernels cannot run on such tensors, as half a sentence; None where they can."""
    if head_dim > MAX_HEAD_DIM:
        return f"it takes head dims up to {MAX_HEAD_DIM}, not {head_dim}"
    return launch.obstacle(device, dtype)


def multi_response_attention(query, key, value, layout, *, scale, window=None, softcap=None):
    """As `yojo_kernels.multi_response_attention`, arguments checked; returns (output [T, Hq, D], lse [T, Hq])."""
    tables = tables_of(query, key, value, layout, window, softcap)
    output, lse = attention(
        query, key, value, layout.sample, layout.branch, layout.bounds, layout.position, layout.block, *tables,
        float(scale), window or 0, softcap or 0.0,
    )  # fmt: skip
    return output, lse.t()


def tables_of(query, key, value, layout, window, softcap, forward="forward"):
    """The tables a call asks for: query tiles of the forward (of this kernel) and of the backward, key tiles, their sums.

    The last three are None where no backward will follow.
    """
    gradients = torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)
    machine, heads = tuning.machine_of(query.device), (query.shape[1], key.shape[1])
    of_forward, of_queries, of_keys = tables_for(
        layout, machine, query.dtype, query.shape[2], *heads, window, gradients, bool(softcap), forward
    )
    if not gradients:
        return layout.table(of_forward), None, None, None
    return layout.table(of_forward), layout.table(of_queries), *layout.table(of_keys)


FARTHEST_ROWS = 2**31 // 512  # entries from row to row, so that they count to 32 bits within any tile


def _rows_apart(tensor):
    """The tensor as the kernels read it: entries of a row side by side; a copy only where they are not."""
    return tensor if tensor.stride(2) == 1 and tensor.stride(0) < FARTHEST_ROWS else tensor.contiguous()


def constants(head_dim, tile, block=None, window=0, softcap=0.0):
    """What the kernels are compiled for, launch options included. Nothing here may change from batch to batch."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_D": tuning.padded(head_dim),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "PRECISION": "ieee",
        "HAS_BLOCKS": block is not None,
        "HAS_WINDOW": window > 0,
        "HAS_SOFTCAP": softcap > 0,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
    }


def reloads(dtype, head_dim):
    """Whether the kernel of query gradients reads its own rows again at every step."""
    return dtype == torch.float32 and head_dim > 128


def key_passes(dtype, head_dim):
    """Which gradients each launch of the kernel of key gradients makes, those of keys, those of values: constants.

    Above a head dim of 128 the sums of both, of as many keys as fill the tensor cores, do not fit into registers: each
    has a launch of its own, at the price of making the scores once more.
    """
    passes = ((False, True), (True, False)) if dtype.itemsize == 2 and head_dim > 128 else ((True, True),)
    return [{"OF_KEYS": of_keys, "OF_VALUES": of_values} for of_keys, of_values in passes]


def sum_constants(head_dim, tile):
    """What the kernel that adds up the pieces of a tile is compiled for, besides which gradients."""
    dim = tuning.padded(head_dim)
    rows = min(tile.block_n, SUM_ENTRIES // dim)
    return {"HEAD_DIM": head_dim, "BLOCK_D": dim, "BLOCK_N": tile.block_n, "ROWS": rows, "num_warps": SUM_WARPS}


def _forward(query, key, value, bounds, position, block, tiles, scale, window, softcap):
    query, key, value = map(_rows_apart, (query, key, value))
    num_tokens, num_heads, head_dim = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=query.device)
    tile = tuning.attention("forward", head_dim, query.dtype, query.device)
    query, scale = with_positive_scale(query, scale)
    pack = tuning.packed_on(num_heads // key.shape[1], tile.block_m)
    assert tiles.shape[0] * (tile.block_m // pack) >= num_tokens, "a table of larger tiles"
    strides, unit = launch.strides(query, key, value, output)
    with launch.on(query.device):
        forward_kernel[(tiles.shape[0] * (num_heads // pack),)](
            query, key, value, output, lse, tiles, bounds, position, position if block is None else block,
            *strides, num_tokens, num_heads // pack, num_heads // key.shape[1] // pack, window, scale, softcap,
            PACK=pack, UNIT=unit, **constants(head_dim, tile, block, window, softcap),
        )  # fmt: skip
    return output, lse


@eager.operator("attention_backward", watched=7)
def attention_backward(
    grad_output: torch.Tensor,
    grad_lse: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    output: torch.Tensor,
    lse: torch.Tensor,
    sample: torch.Tensor,
    branch: torch.Tensor,
    bounds: torch.Tensor,
    position: torch.Tensor,
    block: torch.Tensor | None,
    query_grad_tiles: torch.Tensor,
    key_grad_items: torch.Tensor,
    key_grad_sums: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    query, key, value, grad_output = map(_rows_apart, (query, key, value, grad_output))
    num_tokens, num_heads, head_dim = query.shape
    num_key_heads, group = key.shape[1], query.shape[1] // key.shape[1]
    # Not empty_like: a query that is a view of one fused projection would get its gaps, too.
    grad_query, grad_key, grad_value = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) for tensor in (query, key, value)
    )
    stats = torch.empty((num_heads, num_tokens, 2), dtype=torch.float32, device=query.device)
    ids = (bounds, position, position if block is None else block)
    by_query = tuning.attention("query_grad", head_dim, query.dtype, query.device, softcap > 0)
    by_key = tuning.attention("key_grad", head_dim, query.dtype, query.device, softcap > 0)
    assert query_grad_tiles.shape[0] * by_query.block_m >= num_tokens, "a table of larger tiles of queries"
    tiles_of_keys = key_grad_items.shape[0] - key_grad_sums.shape[0]  # beside the pieces that there is room for
    assert tiles_of_keys * by_key.block_n >= num_tokens, "a table of larger tiles of keys"
    num_slots, passes = 2 * key_grad_sums.shape[0], key_passes(query.dtype, head_dim)
    pieces = torch.empty(
        (num_key_heads, num_slots, 2 // len(passes), by_key.block_n, tuning.padded(head_dim)),
        dtype=torch.float32, device=query.device,
    )  # fmt: skip
    adding = sum_constants(head_dim, by_key)
    strides, unit = launch.strides(query, key, value, output, grad_output, grad_query)
    with launch.on(query.device):
        query_grad_kernel[(query_grad_tiles.shape[0] * num_heads,)](
            query, key, value, output, grad_output, lse, lse if grad_lse is None else grad_lse, grad_query, stats,
            query_grad_tiles, *ids,
            *strides, *((0, 0) if grad_lse is None else reversed(grad_lse.stride())),
            num_tokens, num_heads, group, window, 0, scale, softcap,
            HAS_LSE_GRAD=grad_lse is not None, RELOAD=reloads(query.dtype, head_dim), UNIT=unit,
            **constants(head_dim, by_query, block, window, softcap),
        )  # fmt: skip
        strides, unit = launch.strides(query, key, value, grad_output, grad_key, grad_value)
        for gradients in passes:
            key_grad_kernel[(key_grad_items.shape[0] * num_key_heads,)](
                query, key, value, grad_output, stats, grad_key, grad_value, pieces, key_grad_items, *ids,
                *strides, num_tokens, num_key_heads, group, num_slots, window, scale, softcap,
                UNIT=unit, **gradients, **constants(head_dim, by_key, block, window, softcap),
            )  # fmt: skip
            sum_kernel[(key_grad_sums.shape[0] * (by_key.block_n // adding["ROWS"]) * num_key_heads,)](
                grad_key, grad_value, pieces, key_grad_sums, *strides[-4:], num_key_heads, num_slots,
                **gradients, **adding,
            )  # fmt: skip
    return grad_query, grad_key, grad_value


@attention_backward.register_fake
def _(grad_output, grad_lse, query, key, value, output, lse, sample, branch, bounds, position, block, query_grad_tiles,
      key_grad_items, key_grad_sums, scale, window, softcap):  # fmt: skip
    return tuple(tensor.new_empty(tensor.shape) for tensor in (query, key, value))


def _save(ctx, inputs, output):
    *tensors, scale, window, softcap = inputs
    query, key, value, sample, branch, bounds, position, block, _, *backward_tables = tensors
    ctx.save_for_backward(query, key, value, *output, sample, branch, bounds, position, block, *backward_tables)
    ctx.options = (scale, window, softcap)
    ctx.set_materialize_grads(False)


def _backward(ctx, grad_output, grad_lse):
    none = (None,) * 12
    if grad_output is None and grad_lse is None:
        return None, None, None, *none
    query, key, value, output, lse, *rest = ctx.saved_tensors
    if grad_output is None:
        grad_output = torch.zeros_like(output)
    gradients = attention_backward(grad_output, grad_lse, query, key, value, output, lse, *rest, *ctx.options)
    return *gradients, *none


# ---- floating-point operations ----

_pairs_of = WeakTensorKeyDictionary()  # sample tensor of a layout -> {window: (weak position and block, pairs)}


def visible_pairs(sample, branch, position, block, window):
    """How many (query, key) pairs are visible in a row: an int. Asks the device; for counting, not for running."""
    if type(sample) is not torch.Tensor or sample.device.type == "meta":
        return sample.shape[0] * (sample.shape[0] + 1) // 2  # no values to look at: one causal sequence
    known = _pairs_of.setdefault(sample, {})
    of_position, of_block, pairs = known.get(window, (lambda: None, lambda: None, None))
    if of_position() is not position or of_block() is not block:
        pairs = _count_pairs(sample.cpu(), branch.cpu(), position.cpu(), block, window)
        known[window] = weakref.ref(position), weakref.ref(block) if block is not None else lambda: None, pairs
    return pairs


def _count_pairs(sample, branch, position, block, window):
    block = None if block is None else block.cpu()
    total, start = 0, 0
    for length in sample.unique_consecutive(return_counts=True)[1].tolist():
        rows = slice(start, start + length)
        start += length
        if block is None and not window:
            _, segments = branch[rows].unique_consecutive(return_counts=True)
            prompt = int((branch[rows] < 0).sum())
            total += int((segments * (segments + 1) // 2).sum()) + prompt * (length - prompt)
            continue
        for first in range(0, length, 1024):
            queries = torch.arange(first, min(first + 1024, length))
            block_of = None if block is None else block[rows]
            total += int(visible_to(queries, sample[rows], branch[rows], position[rows], block_of, window).sum())
    return total


def _forward_flops(query, key, value, sample, branch, bounds, position, block, *rest, out_val=None, **kwargs):
    window = rest[-2]
    return 4 * query.shape[1] * query.shape[2] * visible_pairs(sample, branch, position, block, window)


@register_flop_formula(torch.ops.yojo.attention_backward, get_raw=True)
def _backward_flops(grad_output, grad_lse, query, key, value, output, lse, sample, branch, bounds, position, block, *rest, out_val=None, **kwargs):  # fmt: skip
    # Five matrix products per pair: scores, dP, dQ, dK, dV (the second recomputation of the scores is not counted).
    window = rest[-2]
    return 10 * query.shape[1] * query.shape[2] * visible_pairs(sample, branch, position, block, window)


# ---- the operators of the forward ----


def forward_operator(name, run):
    """The operator `torch.ops.yojo.NAME` of a kernel of the forward, with gradients, shapes and cost.

    Args:
        name: of the operator.
        run: function of query, key, value, bounds, position, block, tiles, scale, window and softcap that launches it;
            returns output and log-sum-exp.
    """

    @eager.operator(name, watched=3)
    def attention(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sample: torch.Tensor,
        branch: torch.Tensor,
        bounds: torch.Tensor,
        position: torch.Tensor,
        block: torch.Tensor | None,
        tiles: torch.Tensor,
        query_grad_tiles: torch.Tensor | None,
        key_grad_items: torch.Tensor | None,
        key_grad_sums: torch.Tensor | None,
        scale: float,
        window: int,
        softcap: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return run(query, key, value, bounds, position, block, tiles, scale, window, softcap)

    @attention.register_fake
    def _(query, *others):
        return query.new_empty(query.shape), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)

    attention.register_autograd(_backward, setup_context=_save)
    register_flop_formula(getattr(torch.ops.yojo, name), get_raw=True)(_forward_flops)
    return attention


attention = forward_operator("attention", _forward)

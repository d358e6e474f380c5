"""Multi-response attention with the Gluon forward for Hopper: its torch operator. The backward is Triton's.

No GPU has run it yet, so it is never chosen by itself: ask for it with impl="gluon".
"""

import torch
import triton

from yojo_kernels import attention, launch, tuning
from yojo_kernels.segments import with_positive_scale

try:
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    from yojo_kernels import gluon_forward

    MISSING = None
except (ImportError, AttributeError, TypeError) as error:
    MISSING = f"Triton {triton.__version__} has not the Gluon it is written in ({error}): it needs 3.6, 3.7 or 3.8"

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = (64, 128)
ALIGNMENT = 16  # bytes; of the tensors, and of what lies from row to row and from head to head


def obstacle_in(dtype, head_dim):
    """Why the kernel cannot be compiled for a dtype and a head dim, as half a sentence; None where it can."""
    if MISSING is not None:
        return MISSING
    if dtype not in DTYPES:
        return f"it takes bfloat16 or float16, not {str(dtype).removeprefix('torch.')}"
    if head_dim not in HEAD_DIMS:
        return f"it takes head dims {' and '.join(map(str, HEAD_DIMS))}, not {head_dim}"
    return None


def obstacle(device, dtype, head_dim):
    """Why the kernel cannot run on such tensors, as half a sentence; None where it can."""
    reason = obstacle_in(dtype, head_dim)
    if reason is not None:
        return reason
    if launch.INTERPRETED:
        return "kernels are interpreted (TRITON_INTERPRET=1), which Gluon's cannot be"
    reason = launch.obstacle(device, dtype)
    if reason is None and device.type == "cuda" and tuning.capability(device)[0] != 9:
        major, minor = tuning.capability(device)
        reason = f"it needs a Hopper GPU (compute capability 9.0), not {major}.{minor}"
    return reason


def multi_response_attention(query, key, value, layout, *, scale, window=None, softcap=None):
    """As `yojo_kernels.attention.multi_response_attention`."""
    tables = attention.tables_of(query, key, value, layout, window, softcap, "gluon_forward")
    output, lse = gluon_attention(
        query, key, value, layout.sample, layout.branch, layout.bounds, layout.position, layout.block, *tables,
        float(scale), window or 0, softcap or 0.0,
    )  # fmt: skip
    return output, lse.t()


def copyable(tensor):
    """The tensor [rows, heads, D] as the tensor memory accelerator reads it: a copy only where it cannot.

    Each entry lies beside the next, rows and heads a multiple of `ALIGNMENT` apart, and not on one another.
    """
    size = tensor.element_size()
    strides = [tensor.stride(i) for i in range(2) if tensor.shape[i] > 1]
    apart = all(stride > 0 and stride * size % ALIGNMENT == 0 for stride in strides)
    near = tensor.stride(0) < attention.FARTHEST_ROWS
    if tensor.stride(2) == 1 and apart and near and tensor.data_ptr() % ALIGNMENT == 0:
        return tensor
    return tensor.clone(memory_format=torch.contiguous_format)


def descriptor(tensor, rows):
    """What copies `rows` rows of one head of a tensor [T, heads, D] at a time; made for each launch, on the host.

    Made on the device, it would cost each program about a microsecond before its first copy, and scratch memory.
    """
    num_rows, num_heads, head_dim = tensor.shape
    # A stride over one row or one head means nothing, and may be anything.
    by_row = tensor.stride(0) if num_rows > 1 else head_dim * num_heads
    by_head = tensor.stride(1) if num_heads > 1 else head_dim
    return TensorDescriptor(
        tensor, [num_heads, num_rows, head_dim], [by_head, by_row, 1], [1, rows, head_dim], shared_layout(tensor.dtype)
    )


def shared_layout(dtype):
    """How rows lie in shared memory: swizzled, as matrix instructions read them."""
    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=8 * dtype.itemsize, rank=3)


def constants(head_dim, tile, block=None, window=0, softcap=0.0):
    """What the kernel is compiled for, launch options included; num_warps is that of one warp group."""
    return {
        "HEAD_DIM": head_dim,
        "BLOCK_N": tile.block_n,
        "STAGES": tile.num_stages,
        "HAS_BLOCKS": block is not None,
        "HAS_WINDOW": window > 0,
        "HAS_SOFTCAP": softcap > 0,
        "num_warps": tile.num_warps,
    }


def constants_again(head_dim, tile, block=None, window=0, softcap=0.0):
    """What the kernel behind it is compiled for."""
    features = constants(head_dim, tile, block, window, softcap)
    del features["BLOCK_N"], features["STAGES"]
    return features | {"BLOCK_M": tile.block_m, "HEADS": gluon_forward.HEADS, "PRECISION": "ieee"}


def _forward(query, key, value, bounds, position, block, tiles, scale, window, softcap):
    num_tokens, num_heads, head_dim = query.shape
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    lse = torch.empty((num_heads, num_tokens), dtype=torch.float32, device=query.device)
    if output.numel() == 0:
        return output, lse
    query, scale = with_positive_scale(query, scale)
    query, key, value = map(copyable, (query, key, value))
    tile = tuning.attention("gluon_forward", head_dim, query.dtype, query.device)
    group = num_heads // key.shape[1]
    ids = (bounds, position, position if block is None else block)
    numbers = (num_tokens, num_heads, group, window, scale, softcap)
    options = (head_dim, tile, block, window, softcap)
    strides, unit = launch.strides(query, key, value, output)
    with launch.on(query.device):
        gluon_forward.gluon_forward_kernel[(tiles.shape[0] * num_heads,)](
            descriptor(query, gluon_forward.GROUP_M.value), descriptor(key, tile.block_n),
            descriptor(value, tile.block_n), output, lse, tiles, *ids, output.stride(0), *numbers,
            **constants(*options),
        )  # fmt: skip
        gluon_forward.gluon_again_kernel[(tiles.shape[0], triton.cdiv(num_heads, gluon_forward.HEADS))](
            query, key, value, output, lse, tiles, *ids, *strides, *numbers, UNIT=unit, **constants_again(*options),
        )  # fmt: skip
    return output, lse


gluon_attention = attention.forward_operator("gluon_attention", _forward)

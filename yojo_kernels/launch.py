"""Where Triton kernels can run, and what their launchers share."""

import contextlib
import functools
import math

import torch
import triton
import triton.language as tl

from yojo_kernels import tuning

DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@triton.jit
def _nothing():
    pass


INTERPRETED = not isinstance(_nothing, triton.runtime.JITFunction)  # TRITON_INTERPRET=1 was set before


def obstacle(device, *dtypes):
    """Why the kernels cannot run on tensors like these, as half a sentence; None where they can."""
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f"it takes bfloat16, float16 or float32, not {str(dtype).removeprefix('torch.')}"
    if device.type == tuning.GPU and torch.version.hip is None and tuning.capability(device) >= (8, 0):
        return None
    if device.type == "cpu" and INTERPRETED:
        return None
    return f"it needs an NVIDIA GPU of compute capability 8.0 or more, not {device} (TRITON_INTERPRET=1 emulates one)"


LARGEST_UNIT = 16  # entries; no load of a thread is wider than 16 bytes

_constant = functools.lru_cache(maxsize=1024)(tl.constexpr)


def strides(*tensors):
    """The strides of [rows, heads, head dim] tensors as the attention kernels take them, and their unit.

    What belongs to the model is a constant that a kernel is compiled for: the entries from row to row, and from head to
    head where a row holds all heads. In storage with the heads first, heads lie as far apart as the row is long: these
    are arguments, so that no length needs a compilation of its own.

    Returns:
        A list, of each tensor in turn the stride over rows and that over heads (0 where there is one head); and the
        largest power of two up to `LARGEST_UNIT` that divides them all, for the kernels' `UNIT`.
    """
    found, unit = [], LARGEST_UNIT
    for tensor in tensors:
        by_row, by_head, _ = tensor.stride()
        if tensor.shape[1] == 1:
            by_head = 0
        unit = math.gcd(unit, by_row, by_head)
        if INTERPRETED:
            found += by_row, by_head
        else:
            found += _constant(by_row), _constant(by_head) if by_head < by_row or not by_head else by_head
    return found, unit


_HERE = contextlib.nullcontext()


def on(device):
    """Triton launches on the current device, whichever its tensors are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)

"""Where Triton kernels can run, and what their launchers share."""

import contextlib

import torch
import triton

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


_HERE = contextlib.nullcontext()


def on(device):
    """Triton launches on the current device, whichever its tensors are on."""
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        return _HERE
    return torch.cuda.device(device)

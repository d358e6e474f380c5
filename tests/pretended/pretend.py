"""A GPU that is not there: tensors that say they are on one and are computed on the CPU, with every wait noted.

Inside `with Pretend() as device:`, `tensor.to(device.name)` and factory functions with `device=device.name` give such
tensors. What would make the host wait for a real GPU (reading a value, a shape that depends on values, a blocking copy)
is noted in `device.waits`, with the place in the code that asked for it; mixing devices in one operation is an error, as
it is on a real one. Importing this registers the device with torch for the whole process.
"""

import collections
import os
import sys

import torch
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten

# Results whose shape, or Python value, only the device knows.
_WAITS = {
    aten._local_scalar_dense,
    aten._unique2,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
    aten.masked_scatter_backward,  # selects by the mask
    aten.masked_select,
    aten.nonzero,
    aten.unique_consecutive,
    aten.unique_dim,
}
_INDEXING = {aten.index, aten._unsafe_index, aten.index_put, aten.index_put_, aten._unsafe_index_put, aten._index_put_impl_}  # fmt: skip
_COPIES = {aten._to_copy, aten.copy, aten.copy_}
_NOT_THE_CALLER = (os.path.dirname(torch.__file__), __file__)


class _Module:
    """What torch asks of a device's module."""

    @staticmethod
    def is_available():
        return True

    @staticmethod
    def is_initialized():
        return True

    @staticmethod
    def device_count():
        return 1

    @staticmethod
    def current_device():
        return 0

    @staticmethod
    def _is_in_bad_fork():
        return False

    @staticmethod
    def manual_seed_all(seed):
        pass

    @staticmethod
    def get_amp_supported_dtype():
        return [torch.float16, torch.bfloat16]


backend_registration._setup_privateuseone_for_python_backend("pretend", backend_module=_Module())
_DEVICE = torch.device("pretend", 0)


class OnDevice(torch.Tensor):
    """A tensor on the pretended device: a shell around the one on the CPU that holds the values."""

    @staticmethod
    def __new__(cls, inner):
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=_DEVICE,
        )  # fmt: skip

    def __init__(self, inner):
        self.inner = inner

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"OnDevice({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        raise RuntimeError(f"{function} on the pretended device outside `with Pretend()`")


class Pretend(TorchDispatchMode):
    """See above.

    Attributes:
        name: the device's.
        waits: Counter of (operation, "file function" of the caller).
    """

    name = "pretend"

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()

    def __enter__(self):
        # torch.tensor(..., device=...) then makes its tensor on the CPU and copies it, where we see it.
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        torch._C._set_only_lift_cpu_tensors(self._before)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        here = [isinstance(tensor, OnDevice) for tensor in tensors]
        packet, device = function.overloadpacket, kwargs.get("device")
        if packet is aten.copy_:
            to_device = here[0]
        else:
            to_device = any(here) if device is None else torch.device(device).type == self.name
        if self._waits(packet, args, kwargs, tensors, here, to_device):
            self.waits[str(packet).removeprefix("aten."), _caller()] += 1
        elif any(here) and packet not in _COPIES | _INDEXING:
            for tensor, on_device in zip(tensors, here, strict=True):
                if not on_device and tensor.ndim:
                    raise RuntimeError(f"{function}: tensors on {_DEVICE} and on the CPU in one operation")
        result = function(*tree_map(_inner, args), **tree_map(_inner, kwargs))
        if to_device:
            result = tree_map(lambda x: OnDevice(x) if isinstance(x, torch.Tensor) else x, result)
        return return_and_correct_aliasing(function, args, kwargs, result)

    def _waits(self, packet, args, kwargs, tensors, here, to_device):
        if packet in _COPIES:
            non_blocking = kwargs.get("non_blocking") or (packet is not aten._to_copy and len(args) > 2 and args[2])
            return here[-1] != to_device and not non_blocking
        if not any(here):
            return False
        if packet is aten.repeat_interleave:
            return kwargs.get("output_size") is None
        if packet in _INDEXING:
            indices = [index for index in args[1] if index is not None]
            if not all(isinstance(index, OnDevice) for index in indices):
                return True  # they are copied
            masks = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
            filled = len(indices) == 1 and len(args) > 2 and args[2].numel() == 1 and not here[-1]  # masked_fill
            return masks and not filled
        return packet in _WAITS


def _inner(x):
    if isinstance(x, OnDevice):
        return x.inner
    return torch.device("cpu") if isinstance(x, torch.device) else x


def _caller():
    frame = sys._getframe(2)
    while frame is not None:
        code = frame.f_code
        if not code.co_filename.startswith(_NOT_THE_CALLER):
            return f"{os.path.basename(code.co_filename)} {code.co_name}"
        frame = frame.f_back
    return "backward"

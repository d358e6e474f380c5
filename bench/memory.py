"""What a piece of code allocates, seen on the CPU: every tensor that is alive at a time, and the largest one."""

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Watch(TorchDispatchMode):
    """A context that follows the memory of all tensors made within it.

    Attributes:
        peak: the most bytes of them that were alive at a time.
        largest: (bytes, operation) of the largest.
    """

    def __init__(self):
        super().__init__()
        self.alive = {}
        self.peak, self.largest = 0, (0, None)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        with self:  # an operation made of others, as inference mode hands them down whole
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        result = function(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        self.alive = {key: value for key, value in self.alive.items() if not value[0].expired()}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive and storage._cdata not in given:
                    self.alive[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    self.largest = max(self.largest, (storage.nbytes(), str(function)))
        self.peak = max(self.peak, sum(size for _, size in self.alive.values()))
        return result

"""Torch operators whose kernels are called directly where nothing between the caller and them would see the call.

The dispatcher takes most of the host's time of a small operator. It is needed by whatever looks at calls or changes what
they mean: torch.compile, dispatch and function modes (fake tensors, counters of FLOPs), functorch's transforms, tracers,
profilers, subclasses of tensors. Plain tensors in plain eager mode have none of them.
"""

import functools

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_include, _exclude = torch._C._dispatch_tls_local_include_set, torch._C._dispatch_tls_local_exclude_set
_keys = torch._C._dispatch_keys
_has_torch_function, _any_requires_grad = torch._C._has_torch_function, torch._C._any_requires_grad
_profiling, _compiled_frame = torch.autograd._profiler_enabled, torch._C._dynamo.eval_frame.get_eval_frame_callback


def _bits(*names):
    """Bits that dispatch keys have in `raw_repr()` of a key set."""
    bits = 0
    for name in names:
        bits |= torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)).raw_repr()
    return bits


# Beyond what each thread has from the start: a mode, a transform or a tracer adds its own key.
_UNUSUAL_STATE = ~_bits("BackendSelect", "ADInplaceOrView")
# Beyond what a tensor in memory has: one that is negated or conjugated when it is read, zero without memory, fake,
# batched, wrapped or on another kind of device has a key of its own.
_UNUSUAL_TENSOR = ~_bits("CPU", "CUDA", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA", "ADInplaceOrView")
_AUTOGRAD = _bits("AutogradCPU") & ~_bits("CPU")


_PLAIN = frozenset((Tensor, Parameter, type(None), bool, int, float, str))


def passes_by(arguments, watched):
    """Whether a call means the same, and is seen by the same, without the dispatcher.

    Args:
        arguments: tuple, the arguments of the call.
        watched: how many of them, from the first one on, may be tensors that are not what lies in their memory. The
            others are integers, and no tensor of integers is negated or made zero as it is read.
    """
    if (
        _include().raw_repr() & _UNUSUAL_STATE
        or _has_torch_function(arguments)
        or _profiling()
        or _compiled_frame() is not None  # an eager piece of a compiled function: what it calls would be compiled alone
        or forward_ad._current_level >= 0
        or not _PLAIN.issuperset(map(type, arguments))
    ):
        return False
    for argument in arguments[:watched]:
        if argument is not None and _keys(argument).raw_repr() & _UNUSUAL_TENSOR:
            return False
    return True


class Operator:
    """A torch operator `torch.ops.yojo.NAME`, and a function that calls it, or its body where `passes_by` allows it.

    Attributes:
        watched: see `passes_by`.
        body: the function that computes it.
        registered: what `torch.library.custom_op` made of it.
    """

    def __init__(self, name, watched, body):
        self.watched, self.body = watched, body
        self.registered = torch.library.custom_op(f"yojo::{name}", body, mutates_args=())
        self.register_fake = self.registered.register_fake
        self._dispatched = getattr(torch.ops.yojo, name)
        self._function = None

    def register_autograd(self, backward, *, setup_context):
        """As `torch.library.register_autograd`, for direct calls, too."""
        self.registered.register_autograd(backward, setup_context=setup_context)
        body = self.body

        class Function(torch.autograd.Function):
            @staticmethod
            def forward(ctx, *arguments):
                output = body(*arguments)
                setup_context(ctx, arguments, output)
                return output

        Function.backward = staticmethod(backward)
        self._function = Function

    def __call__(self, *arguments):
        if torch.compiler.is_compiling() or not passes_by(arguments, self.watched):
            return self._dispatched(*arguments)
        if not (torch.is_grad_enabled() and _any_requires_grad(*arguments)):
            return self.body(*arguments)
        if self._function is None or _exclude().raw_repr() & _AUTOGRAD:
            return self._dispatched(*arguments)  # which records nothing within another operator, or no derivative
        return self._function.apply(*arguments)


def operator(name, watched):
    """Decorator that makes a function the body of the operator `torch.ops.yojo.NAME`; for `watched` see `passes_by`."""
    return functools.partial(Operator, name, watched)

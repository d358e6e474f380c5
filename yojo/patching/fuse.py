"""Decoder layers that run fused while a packed row is scored: Liger-Kernel's kernels, or regional `torch.compile`."""

import contextlib
import copy
import dataclasses
import functools
import importlib.util
import logging
import threading
import types
import weakref

import torch

from yojo.patching import methods
from yojo.patching.decoders import SLIDES
from yojo.patching.graphs import RowGraphs
from yojo.patching.layers import ACTIVATIONS, ATTENTIONS, MLPS, NORMS
from yojo_kernels import Layout

logger = logging.getLogger(__name__)

CHOICES = ("auto", "none", "liger", "compile")


BACKEND = "inductor"  # of torch.compile


def check_choice(fuse):
    """A ValueError for what cannot be the option `fuse`."""
    if fuse not in CHOICES:
        raise ValueError(f"fuse must be one of {', '.join(CHOICES)}, got {fuse!r}")


def implementation(device=None):
    """What fuse="auto" runs the decoder layers of a family with that Liger-Kernel has, and why.

    Args:
        device: where the model is; by default the first CUDA device, or the CPU where there is none.

    Returns:
        ("liger", "compile" or "none", the reason), both str.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return _automatic(device, None if _has_liger() else NO_LIGER)


NO_LIGER = "liger-kernel is not installed"


def _has_liger():
    return importlib.util.find_spec("liger_kernel") is not None


def _automatic(device, liger_obstacle):
    if device.type != "cuda":
        return "none", f"layers are fused on CUDA devices, and on {device.type} only when asked for"
    if liger_obstacle is None:
        return "liger", "Liger-Kernel's norms, rotary embeddings and MLPs"
    return "compile", f"torch.compile of each decoder layer; {liger_obstacle}"


class Fusion:
    """How the decoder layers of one model run in a scoring pass.

    A pass is what happens between `begin` and `end`. The decision is made once for all its layers and kept with the
    pass's layout, which gradient checkpointing hands to the recomputed layers as well.

    Attributes:
        fuse: "auto", "none", "liger" or "compile", as asked for.
        layers: the decoder layers.
        obstacle: why the layers cannot be fused at all; None where they can.
        liger_obstacle: why Liger-Kernel cannot fuse them; None where it can.
    """

    def __init__(self, fuse, layers, obstacle, liger_obstacle):
        self.fuse = fuse
        self.layers = layers
        self.obstacle = obstacle
        self.liger_obstacle = liger_obstacle
        self.compiled = {}  # (forward, whether the layer slides, grad and inference mode) -> compiled forward
        self.last = {}  # what a pass depends on beside its row -> layout of the last such pass, with what it asked for
        self.graphs = None  # `yojo.patching.graphs.RowGraphs` that replay the layers of short rows, or None
        self.failure = None  # why torch.compile gave up, under "auto"
        self._passes = weakref.WeakKeyDictionary()  # layout of a pass -> _Pass

    def __getstate__(self):
        # What has been compiled, and what a pass has seen, belongs to this process and these weights.
        return {**self.__dict__, "compiled": {}, "last": {}, "_passes": None}

    def __setstate__(self, state):
        self.__dict__.update(state, _passes=weakref.WeakKeyDictionary())

    def __deepcopy__(self, memo):
        # Compiled code takes any layer of its kind, those of a copy in the same process, too.
        memo[id(self)] = twin = Fusion.__new__(Fusion)
        twin.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        twin.compiled, twin.last = dict(self.compiled), dict(self.last)
        return twin

    def choose(self, device):
        """("none", "liger" or "compile", the reason) for layers on this device.

        Raises:
            ValueError: "liger" or "compile" was asked for and cannot run here.
        """
        if self.fuse == "none":
            return "none", "as asked for"
        obstacle = self.obstacle
        if obstacle is None and any("_hf_hook" in layer.__dict__ for layer in self.layers):
            obstacle = "accelerate's hooks move its layers between devices"
        if obstacle is not None:
            if self.fuse == "auto":
                return "none", obstacle
            raise ValueError(f"fuse={self.fuse!r} cannot fuse this model's layers: {obstacle}; use fuse='none'")
        if self.fuse == "auto":
            how, reason = _automatic(device, self.liger_obstacle)
            return ("none", self.failure) if how == "compile" and self.failure else (how, reason)
        if self.fuse == "liger" and device.type != "cuda" and not _interpreted():
            raise ValueError(
                f"fuse='liger' needs the model on a CUDA device, it is on {device}: move it there, or use fuse='auto'"
            )
        return self.fuse, "as asked for"

    def begin(self, layout):
        """The layout of a pass over a row: the row's own, made for one pass, with the decision about its layers."""
        if torch.compiler.is_compiling():  # whoever compiles the whole model fuses it, too
            return layout.for_one_pass()
        how, reason = self.choose(layout.device)
        if how == "compile" and self.graphs is not None and self.graphs.takes_this_pass():
            how, reason = "none", "short rows are replayed from CUDA graphs"  # only under "auto", see `plan`
        mode = None
        if how == "compile":
            mode = _mode(layout.device)
            if mode not in self.last:
                how, reason = "none", "the first pass of its kind shows which tables the compiled layers will need"
        # Looked at no earlier than now: layers that are recomputed ask for tables in the pass's backward.
        layout = layout.for_one_pass(self.last[mode].tables_of_pass if mode in self.last else ())
        if how == "compile":
            _mark_row(layout)
        logger.debug("decoder layers: %s (%s)", how, reason)
        self._passes[layout] = _Pass(how, mode)
        return layout

    def end(self, layout):
        """Remember the pass: the next one of its kind makes the tables it asked for before its first layer."""
        this = None if torch.compiler.is_compiling() else self._passes.get(layout)
        if this is not None and this.mode is not None:
            self.last[this.mode] = layout

    def of_pass(self, layout):
        """What the layers of this pass run with: "none", "liger" or "compile"."""
        this = self._passes.get(layout)
        return "none" if this is None else this.how

    def compiled_forward(self, layer, forward):
        """The compiled `forward`, one for all layers of a kind."""
        slides = any(getattr(child, SLIDES, False) for child in layer.children())
        key = (forward, slides, torch.is_grad_enabled(), torch.is_inference_mode_enabled())
        if key not in self.compiled:
            # torch.compile keeps its graphs, and counts them, by code object: each kind gets its own.
            self.compiled[key] = torch.compile(_copy(forward), backend=BACKEND, fullgraph=True)
        return self.compiled[key]

    def install(self):
        """Give the layers, and for Liger-Kernel what is in them, forwards that know of passes."""
        self.remove()
        if self.obstacle is not None or (self.fuse == "none" and self.graphs is None):
            return
        for layer in self.layers:
            layer.yojo_fusion = self
            methods.put(layer, "forward", layer_forward)
            if self.fuse in ("none", "compile") or self.liger_obstacle is not None:
                continue
            for module in layer.modules():
                function = liger_forward(module)
                if function is not None:
                    methods.put(module, "forward", function)

    def remove(self):
        """Undo `install`, and what an earlier one did to the same layers."""
        for layer in self.layers:
            layer.__dict__.pop("yojo_fusion", None)
            for module in layer.modules():
                if _is_ours(module):
                    del module.forward

    def give_up(self, error):
        """Note that torch.compile cannot do it: from here on the layers run unfused, where that is for us to decide."""
        if self.fuse == "compile":
            raise RuntimeError("fuse='compile' failed, use fuse='auto' or fuse='none' for this model") from error
        self.failure = f"torch.compile failed on this model: {type(error).__name__}"
        logger.warning("decoder layers run unfused: torch.compile failed with %s: %s", type(error).__name__, error)


@dataclasses.dataclass(frozen=True)
class _Pass:
    how: str
    mode: tuple | None  # key of `Fusion.last`, for a pass that runs compiled or shows what is needed for it


def _mode(device):
    autocast = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None
    return device, torch.is_grad_enabled(), autocast


def _interpreted():
    from yojo_kernels.launch import INTERPRETED  # with Triton, which not every system has

    return INTERPRETED


# ---- which layers, and what they consist of ----


def plan(base, attentions, fuse, graphs=0):
    """How the decoder layers of a model are to be fused; changes nothing yet.

    Args:
        base: the transformers model, without wrappers.
        attentions: the attention modules of its decoder.
        fuse: "auto", "none", "liger" or "compile".
        graphs: rows of up to so many tokens are replayed from CUDA graphs; 0 for none.

    Returns:
        `Fusion`.

    Raises:
        ValueError: an unknown choice, or one that this model or this installation cannot have.
    """
    check_choice(fuse)
    layers, obstacle = _layers(base, attentions)
    liger_obstacle = _liger_obstacle(layers) if _has_liger() else NO_LIGER
    if fuse in ("liger", "compile") and obstacle is not None:
        raise ValueError(f"fuse={fuse!r} cannot fuse {type(base).__name__}: {obstacle}; use fuse='none'")
    if fuse == "liger" and liger_obstacle is not None:
        hint = "pip install 'yojo[liger]', or use" if liger_obstacle is NO_LIGER else "use"
        raise ValueError(f"fuse='liger' cannot fuse {type(base).__name__}: {liger_obstacle}; {hint} fuse='compile'")
    if graphs and fuse == "compile":
        raise ValueError(f"graphs={graphs} cannot replay layers that fuse='compile' runs: use fuse='auto' or 'liger'")
    if graphs and obstacle is not None:
        raise ValueError(f"graphs={graphs} cannot replay the layers of {type(base).__name__}: {obstacle}; use graphs=0")
    fusion = Fusion(fuse, layers, obstacle, liger_obstacle)
    fusion.graphs = RowGraphs(layers, graphs) if graphs else None
    return fusion


def _layers(base, attentions):
    """(decoder layers in order, why they cannot be fused or None)."""
    attentions = {id(module) for module in attentions}
    layers = [m for m in base.get_decoder().modules() if any(id(child) in attentions for child in m.children())]
    if len(layers) != len(attentions):
        return layers, f"{len(attentions)} attention modules stand in {len(layers)} layers"
    for layer in layers:
        for module in layer.modules():
            if "forward" in module.__dict__ and not _is_ours(module):
                return layers, f"something else has replaced the forward of {type(module).__name__}"
    return layers, None


def _liger_obstacle(layers):
    for layer in layers:
        found = {function: 0 for function in (norm_forward, mlp_forward, attention_forward)}
        for module in layer.modules():
            function = liger_forward(module)
            if function is not None:
                found[function] += 1
            elif type(module).__name__.endswith("Norm"):
                return f"Liger-Kernel has no {type(module).__name__}"
        if found[norm_forward] < 2 or found[mlp_forward] != 1 or found[attention_forward] != 1:
            return f"Liger-Kernel does not have all parts of {type(layer).__name__}"
    return None


def liger_forward(module):
    """The forward that runs a module with Liger-Kernel (see `liger_on`), a function of the module; None for none."""
    name = type(module).__name__
    if not type(module).__module__.startswith("transformers.models."):
        return None
    if name in NORMS:
        return norm_forward
    if name in MLPS and type(module.act_fn).__name__ in ACTIVATIONS:
        return mlp_forward
    return attention_forward if name in ATTENTIONS else None


def _is_ours(module):
    ours = (layer_forward, norm_forward, mlp_forward, attention_forward)
    return methods.on(module) in ours


# ---- the forwards, instance methods of the layers and of what is in them ----


def layer_forward(self, *args, **kwargs):
    """The forward of a decoder layer: fused in a scoring pass, its own otherwise."""
    layout = kwargs.get("layout")
    kwargs.pop("read_rows", None)  # for the last layer alone: a graph of all layers should not depend on it
    how, fusion = "none", getattr(self, "yojo_fusion", None)
    if layout is not None and not torch.compiler.is_compiling() and fusion is not None:
        how = fusion.of_pass(layout)
        if how != "compile" and fusion.graphs is not None and fusion.graphs.active():
            return fusion.graphs.run(self, run_liger if how == "liger" else type(self).forward, *args, **kwargs)
    if how == "none":
        return type(self).forward(self, *args, **kwargs)
    run = functools.partial(run_liger if how == "liger" else _run_compiled, self, **kwargs)
    # The class's forward checkpoints what is below it. Recomputing must take the same way, so this stands below, too.
    if _checkpoints(type(self)) and self.gradient_checkpointing and self.training:
        return self._gradient_checkpointing_func(run, *args)
    return run(*args)


def norm_forward(self, hidden_states):
    """The forward of an RMSNorm: Liger's inside a layer that runs with it, its own otherwise."""
    if not _in_liger():
        return type(self).forward(self, hidden_states)
    from yojo.patching import liger

    return liger.norm(self, hidden_states)


def mlp_forward(self, x):
    """The forward of a gated MLP: as for norms."""
    if not _in_liger():
        return type(self).forward(self, x)
    from yojo.patching import liger

    return liger.mlp(self, x)


def attention_forward(self, *args, **kwargs):
    """The forward of an attention module, whose rotary embedding is Liger's inside a layer that runs with it."""
    forward = type(self).forward
    if _in_liger():
        from yojo.patching import liger

        forward = liger.with_rotary(forward)
    return forward(self, *args, **kwargs)


_thread = threading.local()


def _in_liger():
    return not torch.compiler.is_compiling() and getattr(_thread, "liger", False)


@contextlib.contextmanager
def liger_on(device):
    """While open, modules that have been given `liger_forward` run with Liger-Kernel, in this thread."""
    from yojo_kernels import launch

    _thread.liger = True
    try:
        with launch.on(device):
            yield
    finally:
        _thread.liger = False


def run_liger(layer, *args, **kwargs):
    """The forward of a layer that runs with Liger-Kernel's parts, below gradient checkpointing."""
    with liger_on(kwargs["layout"].device):
        return _inner_forward(type(layer))(layer, *args, **kwargs)


def _run_compiled(layer, *args, **kwargs):
    from torch._dynamo.exc import TorchDynamoException

    fusion, forward = layer.yojo_fusion, _inner_forward(type(layer))
    if fusion.failure is None:
        _mark(kwargs["layout"].num_tokens, args, kwargs)
        try:
            return fusion.compiled_forward(layer, forward)(layer, *args, **kwargs)
        except TorchDynamoException as error:
            fusion.give_up(error)
    return forward(layer, *args, **kwargs)


WRAPPER = "forward_with_checkpointing"  # transformers lays it over the forward of every decoder layer class


def _checkpoints(layer_class):
    return layer_class.forward.__code__.co_name == WRAPPER


@functools.cache
def _inner_forward(layer_class):
    """The forward below transformers' gradient checkpointing."""
    forward = layer_class.forward
    while forward.__code__.co_name == WRAPPER:
        forward = forward.__wrapped__
    return forward


def _copy(function):
    """The same function with a code object of its own."""
    twin = types.FunctionType(
        function.__code__.replace(),
        function.__globals__,
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    twin.__kwdefaults__ = function.__kwdefaults__
    return twin


# ---- sizes that vary ----


def _mark_row(layout):
    """Tell torch.compile what varies from row to row: the tokens, and the tables' lengths, which may be 0 and 1, too."""
    for field in dataclasses.fields(Layout):
        value = getattr(layout, field.name)
        if isinstance(value, torch.Tensor) and value.shape[-1] == layout.num_tokens:
            torch._dynamo.maybe_mark_dynamic(value, value.ndim - 1)
    for tables in layout._tables_of_pass.values():
        for table in (tables,) if isinstance(tables, torch.Tensor) else tables:
            torch._dynamo.decorators.mark_unbacked(table, 0)


def _mark(tokens, args, kwargs):
    """Likewise for what a layer is given beside the layout: [..., T, D] floats and [..., T] integers."""
    for tensor in torch.utils._pytree.tree_leaves((args, kwargs)):
        if isinstance(tensor, torch.Tensor):
            dim = tensor.ndim - (2 if tensor.dtype.is_floating_point else 1)
            if dim >= 0 and tensor.shape[dim] == tokens:
                torch._dynamo.maybe_mark_dynamic(tensor, dim)

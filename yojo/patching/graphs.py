"""CUDA graphs of the decoder layers for short rows, whose time goes into launching kernels rather than running them.

A row whose length is a bucket (a multiple of `BUCKET` tokens, up to a limit: `Collator(pad_to_multiple_of=...)` fills
rows up) runs as it is the first time, is captured the second time and replayed from then on. Layers between whose calls
nothing looks at the hidden states stand in one graph: all of them in a row of text; in models that add image features to
the first layers' outputs, each of those apart and all others together. What stands between runs as before.

What a layer hands on is therefore a tensor that computes itself no sooner than it is looked at (`_Handed`): a pass that
looks where no other has looked gets what it would have got, and its layers are captured apart from then on.

What a layer reads beside the hidden states, the layout and its tile tables among it, lies in one set of tensors a bucket,
which every pass fills anew. A pass on another stream waits for the last one's end before it does.

Memory is bounded: per bucket two tensors of hidden states and the tensors that the layers share, and one pool for what a
layer needs while it runs, as large as the longest row asks for.
"""

import contextlib
import dataclasses
import functools
import logging
import sys
import threading

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from yojo.patching import decoders, tables
from yojo_kernels import Layout

logger = logging.getLogger(__name__)

BUCKET = 256  # tokens
SPARE_TILES = 64  # empty tiles at the end of each table: a row may have so many samples more than the one captured
ATTEMPTS = 2  # rows of a kind whose capture failed so often run as they are for good
CAPTURING_PASSES = 16  # of one kind of row, at most: more of them mean that every pass is another


def check_limit(limit):
    """A ValueError or TypeError for what cannot be the option `graphs`."""
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"graphs must be a number of tokens, 0 for none, got {limit!r}")
    if limit != 0 and limit < BUCKET:
        raise ValueError(f"graphs must be 0 (none) or at least {BUCKET}, the shortest row of a graph, got {limit}")


def bucket_of(num_tokens, limit):
    """The length that a row of so many tokens is filled up to; None where it is too long for a graph."""
    length = -(-num_tokens // BUCKET) * BUCKET
    return length if length <= limit else None


class RowGraphs:
    """The graphs of one model, and the pass that runs through them.

    Args:
        layers: the decoder layers, in order.
        limit: rows of at most so many tokens are replayed.
        capture: function (call) -> function that replays it; CUDA graphs by default.
    """

    def __init__(self, layers, limit, capture=None):
        self.limit = limit
        self.layers = list(layers)
        self._begin(capture)

    def _begin(self, capture=None):
        self.capture = capture or self._cuda_graph
        self.places = {layer: place for place, layer in enumerate(self.layers)}
        self.frames = {}
        self.plain = None  # (module, name, child) of every part of the layers when the first row was seen
        self.facts = None  # ((device, dtype), `yojo.patching.tables.Facts`) of the layers
        self.pool = self.stream = None  # of the captures
        self.end = None  # event at the end of the last pass
        self.busy = threading.Lock()
        self.frame = None
        self.thread = None  # the one whose pass is in `row`
        self.warned = False

    def __getstate__(self):
        # Graphs hold the addresses of one model's weights: a copy of the model, here or elsewhere, starts without any.
        return {"layers": self.layers, "limit": self.limit}

    def __setstate__(self, state):
        self.__dict__.update(state)
        self._begin()

    @contextlib.contextmanager
    def row(self, layout):
        """Within it, layers called through `run` are captured or replayed, where this row can be; gives its layout."""
        if not self._takes(layout) or not self.busy.acquire(blocking=False):
            yield layout
            return
        self.thread = threading.get_ident()
        try:
            # What flash attention would be told of the lengths of a causal row stayed in the graph: kernels only.
            layout = layout.sharing_tables(causal=False)
            if self.plain is not None and not self._unchanged():
                self._forget()  # other weights, or hooks: captured anew
            if self.plain is None:
                self.plain = _parts(self.layers) or None
            if self.plain is None:
                yield layout
                return
            key = layout.num_tokens, layout.block is not None, _autocast_dtype(layout.device), self._tables(layout)
            frame = self.frames.get(key) or _Frame(len(self.layers) - 1)
            self._follow(layout.device)
            try:
                if frame.begin(layout):
                    self.frame = frame
                yield layout
                frame.finish(layout)
                self.frames[key] = frame
            finally:
                if frame.failure is not None:
                    self._note(frame)
                frame.leave()
                self._mark_end(layout.device)
        finally:
            self.frame = self.thread = None
            self.busy.release()

    def takes_this_pass(self):
        """Whether the pass that this thread is in is one of those that graphs are for, its first one included."""
        return self.thread == threading.get_ident()

    def active(self):
        """Whether the layers of the pass that this thread is in are to be called through `run`."""
        return self.frame is not None and self.takes_this_pass()

    def run(self, layer, forward, hidden, **kwargs):
        """What `forward(layer, hidden, **kwargs)` gives, from a graph."""
        call = _Call(self.places[layer], functools.partial(forward, layer), kwargs)
        return self.frame.run(call, hidden, self.capture)

    def _takes(self, layout):
        tokens = layout.num_tokens
        on_device = layout.device.type == "cuda" or self.capture != self._cuda_graph
        short = tokens <= self.limit and tokens % BUCKET == 0
        return on_device and short and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def _unchanged(self):
        """Whether the layers still are made of the same modules and weights, in eval mode and without hooks."""
        return all(
            owner._modules.get(name) is child
            and not (child._forward_hooks or child._forward_pre_hooks or child.training)
            for owner, name, child in self.plain["modules"]
        ) and all(
            owner._parameters.get(name) is parameter and parameter.data_ptr() == at
            for owner, name, parameter, at in self.plain["parameters"]
        )

    def _tables(self, layout):
        """Which tables the row's layers ask for, as far as it can be foreseen: rows with others have other graphs."""
        weight = next((parameter for _, _, parameter, _ in self.plain["parameters"]), None)
        if weight is None:
            return ()
        seen = layout.device, _autocast_dtype(layout.device) or weight.dtype
        if self.facts is None or self.facts[0] != seen:
            modules = [module for layer in self.layers for module in decoders.attentions_in(layer)]
            self.facts = seen, tables.facts_of(modules, *seen)
        facts = self.facts[1]
        return () if facts is None else tuple(facts.keys(layout))

    def _forget(self):
        if self.end is not None:
            self.end.synchronize()  # what the graphs read and write may be in use on another stream
        self.frames, self.plain, self.pool = {}, None, None

    def _note(self, frame):
        """Note that a capture has failed: the next one shares nothing with it."""
        self.pool = self.stream = None
        logger.log(
            logging.DEBUG if self.warned else logging.WARNING,
            "decoder layers ran as they are in a row of %d tokens: capturing them in a CUDA graph failed with %s",
            frame.num_tokens,
            frame.failure,
        )
        self.warned = True

    # ---- the device ----

    def _cuda_graph(self, call):
        device = self.frame.layout.device
        with torch.cuda.device(device):
            if self.pool is None:
                self.pool, self.stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
            graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
            random = torch.cuda.default_generators[torch.cuda.current_device()]
            random_before = random.clone_state()
            try:
                # "thread_local": what other threads do meanwhile (a loader's that pins memory, another model) is allowed.
                with torch.cuda.graph(graph, self.pool, self.stream, capture_error_mode="thread_local"):
                    call()
            except BaseException:
                # A capture that fails at its end leaves stream, random numbers and allocator as they are within one.
                random.graphsafe_set_state(random_before)
                with contextlib.suppress(RuntimeError):  # it has been ended after all
                    torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self.pool)
                raise
            finally:
                torch.cuda.set_stream(before)
        return graph.replay

    def _follow(self, device):
        """Let this thread's stream wait for the end of the last pass, which may have run on another."""
        if self.end is not None:
            torch.cuda.current_stream(device).wait_event(self.end)

    def _mark_end(self, device):
        if device.type == "cuda":
            with torch.cuda.device(device):
                self.end = self.end or torch.cuda.Event()
                self.end.record()


def settled(hidden):
    """The hidden states themselves, where a layer has handed on what is yet to be computed."""
    return hidden.settle() if isinstance(hidden, _Handed) else hidden


def _parts(layers):
    """Modules and weights of the layers; an empty dict where Python code runs in them that a graph would leave out."""
    modules, parameters = [], []
    for layer in layers:
        for owner in layer.modules():
            if owner._forward_hooks or owner._forward_pre_hooks or hasattr(owner, "active_adapters") or owner.training:
                return {}
            modules += [(owner, name, child) for name, child in owner._modules.items() if child is not None]
            parameters += [(owner, name, p, p.data_ptr()) for name, p in owner._parameters.items() if p is not None]
    return {"modules": modules, "parameters": parameters}


@dataclasses.dataclass
class _Call:
    """One call of a layer.

    Attributes:
        place: the layer's.
        forward: function of the hidden states and the arguments.
        kwargs: the arguments as the model gave them.
        own: likewise, with the graphs' own tensors.
        signature: which of the graphs' tensors those are, and all that is no tensor.
        handed: what stands for the result.
    """

    place: int
    forward: functools.partial
    kwargs: dict
    own: dict | None = None
    signature: tuple = ()
    handed: torch.Tensor | None = None


class _Handed(torch.Tensor):
    """What a layer hands on: hidden states that nobody may ever look at but the next layer.

    Any operation on them finds them computed.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, like, frame, place):
        return torch.Tensor._make_wrapper_subclass(
            cls, like.shape, strides=like.stride(), dtype=like.dtype, device=like.device
        )

    def __init__(self, like, frame, place):
        self.frame, self.place = frame, place
        self.states = None  # the hidden states, once they are computed
        self.side = None  # which of the frame's two tensors they are, if any

    def settle(self):
        """The hidden states, [1, T, H]."""
        return self.frame.settle(self)

    def data_ptr(self):
        return self.settle().data_ptr()

    def tolist(self):
        return self.settle().tolist()

    def __repr__(self):
        return f"_Handed(layer {self.place})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args, kwargs = tree_map_only(_Handed, settled, (args, kwargs or {}))
        return function(*args, **kwargs)


class _Frame:
    """Rows of one kind: the tensors that their graphs read and write, and the graphs.

    In the first pass layers run as they are, and it is noted behind which of them the hidden states are looked at
    (`ends`): a graph ends there. A pass that looks elsewhere adds to them.

    Args:
        last: place of the last layer.
    """

    def __init__(self, last):
        self.last = last
        self.ends = {last}
        self.seen = False
        self.unfit = None  # why rows of this kind run as they are
        self.failures = self.capturing = 0  # passes
        self.tables = ()  # name and settings of the tile tables that the layers ask for
        self._clear()
        self.leave()

    def _clear(self):
        self.graphs = {}  # places and signatures of the calls -> (function that replays them, side of their source)
        self.rooms = {}  # what a tensor among the layers' arguments is like -> the graphs' own ones
        self.hidden = None  # two tensors; a graph reads one and writes the other
        self.layout = None

    # ---- a pass ----

    def begin(self, layout):
        """Fill in the layout of a pass; False where its layers are not to be called through `run`."""
        self.leave()
        self.num_tokens = layout.num_tokens
        if not self.seen:
            return True
        if self.unfit is not None:
            self._drop()
            return False
        tables = {key: layout._tiles(*key) for key in self.tables}
        if self.layout is None:
            self.layout = _roomy(layout, tables)
        return _fill(self.layout, layout, tables)

    def finish(self, layout):
        """Note what the first pass has shown."""
        if not self.seen:
            self.tables = [key for key in layout._tables if key[0] == "query_tiles"]
            self.seen = True
        if self.capturing > CAPTURING_PASSES:
            self.unfit = "every pass calls the layers with something else"

    def leave(self):
        """Let go of all that belongs to one pass."""
        self.waiting, self.start = [], None  # calls of one graph to be, and the hidden states that the first one gets
        self.handed = None  # what the last call handed on
        self.holds = [None, None]  # whose hidden states the two tensors hold
        self.given = {}  # id of an argument -> (the argument, the graphs' own)
        self.taken = {}  # as `rooms` -> how many of them are in use
        self.known = []  # calls whose arguments have been shared
        self.captures = False
        self.failure = None  # why a capture has failed in this pass: the layers behind it run as they are

    def run(self, call, hidden, capture):
        """What the call hands on."""
        if not self.seen:
            return self._watch(call, hidden)
        if not self.waiting or hidden is not self.handed:
            self._compute()
            hidden = settled(hidden)
            if self.failure is not None or not self._has_room_for(hidden):
                return call.forward(hidden, **call.kwargs)
            self.start = hidden
        self._share(call)
        self.capture = capture
        call.handed = self.handed = _Handed(self.start, self, call.place)
        self.waiting.append(call)
        if call.place in self.ends:
            self._compute()
        return self.handed.states if call.place == self.last else self.handed

    def settle(self, handed):
        """The hidden states that `handed` stands for.

        Raises:
            RuntimeError: there is something else in their place by now.
        """
        if not self.seen:
            if handed is self.handed:
                self.ends.add(handed.place)
            else:
                self.unfit = f"the hidden states behind layer {handed.place} are kept beyond the next one"
            return handed.states
        for number, call in enumerate(self.waiting):
            if call.handed is handed:
                self.ends.add(handed.place)
                rest = self.waiting[number + 1 :]
                del self.waiting[number + 1 :]
                self._compute()
                self.waiting, self.start = rest, handed.states
                break
        if handed.states is None or (handed.side is not None and self.holds[handed.side] is not handed):
            self.unfit = f"the hidden states behind layer {handed.place} are kept beyond the next one"
            raise RuntimeError(
                f"{self.unfit}, which CUDA graphs have overwritten: rows of {self.num_tokens} tokens run without them from "
                "now on; score the row again, or patch the model with graphs=0"
            )
        return handed.states

    def _watch(self, call, hidden):
        """Run a call of the first pass, and see who looks at its result."""
        if isinstance(hidden, _Handed):
            if hidden is not self.handed:
                self.unfit = f"the hidden states behind layer {hidden.place} are kept beyond the next one"
            hidden = hidden.states
        output = call.forward(hidden, **call.kwargs)
        if not isinstance(output, torch.Tensor) or (output.shape, output.dtype) != (hidden.shape, hidden.dtype):
            self.unfit = f"layer {call.place} does not give hidden states like those it takes"
            return output
        self.handed = _Handed(output, self, call.place)
        self.handed.states = output
        return output if call.place == self.last else self.handed

    def _has_room_for(self, hidden):
        if self.hidden is None and hidden.device == self.layout.device:
            self.hidden = [_room_for(hidden), _room_for(hidden)]
        room = hidden if self.hidden is None else self.hidden[0]
        return hidden.device == self.layout.device and (hidden.shape, hidden.dtype) == (room.shape, room.dtype)

    def _share(self, call):
        """Replace every tensor among the arguments by the graphs' own, filled in once a pass."""
        for other in self.known:
            if call.kwargs.keys() == other.kwargs.keys() and all(
                value is other.kwargs[name] for name, value in call.kwargs.items()
            ):
                call.own, call.signature = other.own, other.signature
                return
        leaves, form = tree_flatten(call.kwargs, is_leaf=lambda leaf: isinstance(leaf, Layout))
        signature = [form]
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Layout):
                leaves[i] = self.layout
            elif isinstance(leaf, torch.Tensor):
                leaves[i] = self._filled(settled(leaf))
            signature.append(id(leaves[i]) if leaves[i] is not leaf else leaf)
        call.own, call.signature = tree_unflatten(leaves, form), tuple(signature)
        self.known.append(call)

    def _filled(self, tensor):
        """The graphs' own tensor for this one: the first of its kind in a pass, the second, ..."""
        if id(tensor) not in self.given:
            kind = tensor.shape, tensor.dtype, tensor.device
            rooms, number = self.rooms.setdefault(kind, []), self.taken.get(kind, 0)
            if number == len(rooms):
                rooms.append(_room_for(tensor))
            rooms[number].copy_(tensor)
            self.taken[kind] = number + 1
            self.given[id(tensor)] = tensor, rooms[number]
        return self.given[id(tensor)][1]

    def _compute(self):
        """Replay the calls that wait, captured before where that has not been done."""
        if not self.waiting:
            return
        calls, hidden = self.waiting, self.start
        self.waiting, self.start = [], None
        key = tuple((call.place, call.signature) for call in calls)
        if self.failure is not None or (key not in self.graphs and not self._captured(key, calls, hidden)):
            for call in calls:
                hidden = call.forward(hidden, **call.kwargs)
            calls[-1].handed.states = hidden
            return
        replay, side = self.graphs[key]
        if hidden is not self.hidden[side]:
            self.holds[side] = None
            self.hidden[side].copy_(hidden)
        replay()
        handed = calls[-1].handed
        handed.states, handed.side = self.hidden[1 - side], 1 - side
        self.holds[1 - side] = handed

    def _captured(self, key, calls, hidden):
        """Whether the calls could be captured; where not, nothing of this kind of row is kept."""
        side = 1 if hidden is self.hidden[1] else 0
        source, target = self.hidden[side], self.hidden[1 - side]
        steps = [(call.forward, call.own) for call in calls]

        def run():
            with _no_autocast_cache():
                states = source
                for forward, own in steps:
                    states = forward(states, **own)
                target.copy_(states)

        self.capturing += not self.captures
        self.captures, around = True, sys.exc_info()[1]
        try:
            self.graphs[key] = self.capture(run), side
        except BaseException as error:
            self._failed(error, around)
            for cause in _chain(error, around):
                if not isinstance(cause, Exception):
                    raise cause from None
            return False
        return True

    def _failed(self, error, around):
        """Note why a capture has failed."""
        # The end of a capture that went wrong says no more than that; what went wrong stands before it.
        *_, error = _chain(error, around)
        self.failure = f"{type(error).__name__}: {error}"
        self.failures += 1
        if self.failures == ATTEMPTS:
            self.unfit = self.failure
        self._drop()

    def _drop(self):
        """Let go of the graphs and their tensors."""
        if self.layout is not None and self.layout.device.type == "cuda":
            torch.cuda.synchronize(self.layout.device)  # they may be in use on another stream than they were made on
        self._clear()


def _chain(error, around):
    """An error, the one that was being handled when it was raised, ...; not `around`, which was handled before."""
    yield error
    while (error := error.__context__) is not None and error is not around:
        yield error


def _autocast_dtype(device):
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


@contextlib.contextmanager
def _no_autocast_cache():
    """Within it, autocast keeps no casts of weights: they would lie in a graph's memory, or a graph would read those of
    a pass that is over."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


# What the graphs read is filled anew under torch.inference_mode and under torch.no_grad; a tensor made in the first could
# not be filled in the second.


@torch.inference_mode(False)
def _room_for(tensor):
    return torch.empty_like(tensor)


@torch.inference_mode(False)
def _roomy(layout, tables):
    """A copy of a layout whose tables have room for rows of more samples."""
    roomy = layout._with(torch.clone)
    for key, table in tables.items():
        roomy._tables[key] = torch.nn.functional.pad(table, (0, 0, 0, SPARE_TILES))
    return roomy


def _fill(own, layout, tables):
    """Fill the graphs' layout from another of as many tokens; False where its tables are too small."""
    if any(table.shape[0] > own._tables[key].shape[0] for key, table in tables.items()):
        return False
    for key, table in tables.items():
        own._tables[key][: len(table)].copy_(table)
        own._tables[key][len(table) :].zero_()  # empty tiles
    for name in ("sample", "branch", "position", "bounds", "block", "block_span"):
        if getattr(own, name) is not None:
            getattr(own, name).copy_(getattr(layout, name))
    return True

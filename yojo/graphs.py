"""CUDA graphs of the decoder layers for short rows, whose time goes into launching kernels rather than running them.

A row whose length is a bucket (a multiple of `BUCKET` tokens, up to a limit: `Collator(pad_to_multiple_of=...)` fills
rows up) runs as it is the first time, is captured layer by layer the second time and replayed from then on. What a
layer reads beside the hidden states, the layout and its tile tables among it, lies in one set of tensors a bucket, which
every pass fills anew. All that stands between the layers, image features among it, runs as before.

Memory is bounded: per bucket two tensors of hidden states and the tensors that the layers share, and one pool for what a
layer needs while it runs, as large as the longest row asks for.
"""

import contextlib
import dataclasses
import functools
import threading

import torch
from torch.utils._pytree import tree_flatten, tree_unflatten

from yojo_kernels import Layout

BUCKET = 256  # tokens
SPARE_TILES = 64  # empty tiles at the end of each table: a row may have so many samples more than the one captured


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
        self.frames = {}
        self.plain = None  # (module, name, child) of every part of the layers when the first graph was captured
        self.pool = None
        self.busy = threading.Lock()
        self.frame = None
        self.thread = None  # the one whose pass is in `row`

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
            if self.plain is not None and not self._unchanged():
                self.frames, self.plain, self.pool = {}, None, None  # other weights, or hooks: captured anew
            # What flash attention would be told of the lengths of a causal row stayed in the graph: kernels only.
            layout = dataclasses.replace(layout, causal=False)
            key = layout.num_tokens, layout.block is not None, _autocast_dtype(layout.device)
            frame = self.frames.get(key)
            if frame is None:  # the first row of its kind runs as it is, and shows which tables it needs
                yield layout
                self.frames[key] = _Frame([name for name in layout._tables if name[0] == "query_tiles"])
                return
            if self.plain is None:
                self.plain = _parts(self.layers) or None
            if self.plain and frame.begin(layout):
                self.frame = frame
            yield layout
        finally:
            self.frame = self.thread = None
            self.busy.release()

    def takes_this_pass(self):
        """Whether the pass that this thread is in is one of those that graphs are for, its first one included."""
        return self.thread == threading.get_ident()

    def active(self):
        """Whether the layers of the pass that this thread is in are captured or replayed."""
        return self.frame is not None and self.takes_this_pass()

    def run(self, layer, forward, hidden, **kwargs):
        """What `forward(layer, hidden, **kwargs)` gives, from a graph."""
        return self.frame.run(self.layers.index(layer), functools.partial(forward, layer), hidden, kwargs, self.capture)

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

    def _cuda_graph(self, call):
        if self.pool is None:
            self.pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            call()
        return graph.replay


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


class _Frame:
    """Rows of one length: the tensors that their graphs read and write, and the graphs of the layers."""

    def __init__(self, tables):
        self.tables = tables  # name and settings of the tile tables that the layers ask for
        self.graphs = {}  # place of the layer -> function that replays it
        self.shared = {}  # place of a tensor among a layer's arguments -> (the graphs' tensor, what it was filled from)
        self.hidden = None  # two tensors; a layer reads one and writes the other
        self.layout = None

    def begin(self, layout):
        """Fill in the layout of a pass; False where it does not fit."""
        self.shared = {place: (tensor, None) for place, (tensor, _) in self.shared.items()}
        tables = {key: layout._tiles(*key) for key in self.tables}
        if self.layout is None:
            self.layout = _roomy(layout, tables)
        return _fill(self.layout, layout, tables)

    def run(self, place, forward, hidden, kwargs, capture):
        if self.hidden is None:
            self.hidden = [_room_for(hidden), _room_for(hidden)]
        source, target = self.hidden[place % 2], self.hidden[(place + 1) % 2]
        if hidden is not source:
            source.copy_(hidden)
        kwargs = self._share(kwargs)
        if place not in self.graphs:

            def call():
                target.copy_(forward(source, **kwargs))

            self.graphs[place] = capture(call)
        self.graphs[place]()
        return target

    def _share(self, kwargs):
        """The arguments with every tensor replaced by the graphs' own, filled in once a pass."""
        leaves, form = tree_flatten(kwargs, is_leaf=lambda leaf: isinstance(leaf, Layout))
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Layout):
                leaves[i] = self.layout
            elif isinstance(leaf, torch.Tensor):
                key = (form, i, leaf.shape, leaf.dtype)
                own, filled_from = self.shared.get(key, (None, None))
                if own is None:
                    own = _room_for(leaf)
                if filled_from is not leaf:
                    own.copy_(leaf)
                self.shared[key] = (own, leaf)
                leaves[i] = own
        return tree_unflatten(leaves, form)


def _autocast_dtype(device):
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


# What the graphs read is filled anew under torch.inference_mode and under torch.no_grad; a tensor made in the first could
# not be filled in the second.


@torch.inference_mode(False)
def _room_for(tensor):
    return torch.empty_like(tensor)


@torch.inference_mode(False)
def _roomy(layout, tables):
    """A copy of a layout whose tables have room for rows of more samples."""
    copies = {
        field.name: value.clone()
        for field in dataclasses.fields(layout)
        if isinstance(value := getattr(layout, field.name), torch.Tensor)
    }
    tables = {key: torch.nn.functional.pad(table, (0, 0, 0, SPARE_TILES)) for key, table in tables.items()}
    return dataclasses.replace(layout, **copies, _tables=tables, _tables_of_pass=None)


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

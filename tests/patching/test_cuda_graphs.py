"""Captures of `yojo.patching.graphs` on a CUDA device that is not there: what torch is asked for, and what a failure leaves.

The device keeps the state that a capture changes (stream, random numbers, where memory is allocated from), and as torch
does, it leaves it changed where a capture fails at its end. Whether real captures fare so is seen in tests/gpu.
"""

import contextlib
import copy
import logging
import types

import pytest
import torch
from test_graphs import Decoder, Layer, passes, row_of

from yojo.patching import graphs
from yojo.patching.graphs import RowGraphs

INDEX = 3  # of the device of the rows; another one is the current one


class Generator:
    def __init__(self):
        self.state = "eager"

    def clone_state(self):
        return copy.copy(self)

    def graphsafe_set_state(self, other):
        self.state = other.state


class Device:
    """A CUDA device as `yojo.patching.graphs` sees it.

    Attributes:
        log: what streams and events were asked for, in order.
        captures: pool, stream and mode of each that was begun.
        fails: "begin", "end" -> what captures raise there.
        allocating: pairs of a device and the pool that its memory comes from.
    """

    def __init__(self):
        self.log, self.fails = [], {}
        self.index, self.capturing, self.pools, self.captures = 0, False, 0, []
        self.generators = [Generator() for _ in range(INDEX + 1)]
        self.allocating = set()
        self.stream = self.stream_of("default")

    def stream_of(self, name):
        stream = types.SimpleNamespace(name=name)
        stream.wait_event = lambda event: self.log.append(("wait", name, event))
        return stream

    def state(self):
        generators = [generator.state for generator in self.generators]
        return self.index, self.stream, generators, set(self.allocating), self.capturing

    def install(self, monkeypatch):
        def event():
            one = types.SimpleNamespace()
            one.record = lambda: self.log.append(("record", self.index, self.stream.name, one))
            one.synchronize = lambda: self.log.append(("synchronize", one))
            return one

        def handle():
            self.pools += 1
            return (0, self.pools)

        def end_allocate(index, pool):
            if (index, pool) not in self.allocating:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            self.allocating.remove((index, pool))

        monkeypatch.setattr(torch.cuda, "device", self._device)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.index)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: self.stream)
        monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: setattr(self, "stream", stream))
        monkeypatch.setattr(torch.cuda, "Stream", lambda: self.stream_of(f"capture {self.pools}"))
        monkeypatch.setattr(torch.cuda, "Event", event)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: types.SimpleNamespace(replay=self.call))
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", handle)
        monkeypatch.setattr(torch.cuda, "graph", self._graph)
        monkeypatch.setattr(torch.cuda, "default_generators", self.generators)
        monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", end_allocate, raising=False)

    @contextlib.contextmanager
    def _device(self, device):
        before, self.index = self.index, INDEX
        try:
            yield
        finally:
            self.index = before

    @contextlib.contextmanager
    def _graph(self, graph, pool, stream, capture_error_mode="global"):
        """As `torch.cuda.graph`: an error at the end takes the place of what went wrong, and nothing is restored."""
        before, self.stream = self.stream, stream
        if "begin" in self.fails:
            raise copy.copy(self.fails["begin"])
        self.captures.append((pool, stream.name, capture_error_mode))
        self.allocating.add((self.index, pool))
        self.generators[self.index].state = "in a graph"
        self.capturing = True
        try:
            yield
        finally:
            self.capturing = False
            if "end" in self.fails:
                raise copy.copy(self.fails["end"])
            self.generators[self.index].state = "eager"
            self.allocating.remove((self.index, pool))
            self.stream = before


class OnDevice(RowGraphs):
    """Graphs of rows on the CPU that take them for rows on the device."""

    def __init__(self, layers, limit, device):
        def capture(call):
            device.call = call
            return self._cuda_graph(call)

        super().__init__(layers, limit, capture)

    def _mark_end(self, device):
        super()._mark_end(torch.device("cuda", INDEX))

    def _follow(self, device):
        super()._follow(torch.device("cuda", INDEX))


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(graphs, "BUCKET", 4)


@pytest.fixture()
def device(monkeypatch):
    device = Device()
    device.install(monkeypatch)
    return device


def decoder_on(device):
    decoder = Decoder()
    decoder.graphs = OnDevice(decoder.layers, 16, device)
    return decoder


def test_captures_allow_other_threads_and_share_one_pool_and_stream(device):
    """As torch asks of captures that share a pool: one stream for all of them."""
    decoder, before = decoder_on(device), device.state()
    passes(decoder, 4, 8)
    passes(decoder, 3, 12)
    assert device.captures == [((0, 1), "capture 1", "thread_local")] * 2
    assert device.state() == before and device.stream is before[1]


class Culprit(Layer):
    """A layer that no graph may hold."""

    def forward(self, hidden, **kwargs):
        if self.device.capturing:
            raise copy.copy(self.error)
        return super().forward(hidden, **kwargs)


BEGIN, END = {"begin": RuntimeError("the beginning of it")}, {"end": RuntimeError("the end of it")}
FAILURES = {
    "within": ({}, ValueError("the culprit"), "ValueError: the culprit"),
    "within and so at the end": (END, ValueError("the culprit"), "ValueError: the culprit"),
    "at the end": (END, None, "RuntimeError: the end of it"),
    "at the beginning": (BEGIN, None, "RuntimeError: the beginning of it"),
}


@pytest.mark.parametrize("where", FAILURES)
def test_a_capture_that_fails_leaves_the_device_as_it_was(where, device, caplog):
    decoder, before = decoder_on(device), device.state()
    passes(decoder, 2, 12)
    assert len(device.captures) == 1
    device.fails, error, named = FAILURES[where]
    if error is not None:
        decoder.layers[2].__class__, decoder.layers[2].device, decoder.layers[2].error = Culprit, device, error
    with caplog.at_level(logging.WARNING):
        passes(decoder, 2, 8)
    assert device.state() == before and device.stream is before[1]
    (record,) = caplog.records
    assert record.getMessage().endswith(f"in a CUDA graph failed with {named}")
    assert decoder.graphs.pool is decoder.graphs.stream is None  # the next one shares nothing with it
    device.fails, decoder.layers[2].__class__ = {}, Layer
    tried, pools = len(device.captures), device.pools
    passes(decoder, 2, 8)
    assert device.captures[tried:] == [((0, pools + 1), f"capture {pools + 1}", "thread_local")]
    assert device.state() == before


@pytest.mark.parametrize("fails", [{}, END], ids=["within", "and at the end"])
@pytest.mark.parametrize("error", [ValueError("the culprit"), KeyboardInterrupt()], ids=repr)
def test_the_error_of_a_capture_is_the_original_one(error, fails, device):
    """`_cuda_graph` itself hands it on, with nothing of the clearing up in its place."""
    decoder, before = decoder_on(device), device.state()
    decoder.graphs.frame = types.SimpleNamespace(layout=row_of(8)[0])
    device.fails = fails

    def call():
        raise error

    with pytest.raises(BaseException) as caught:
        decoder.graphs.capture(call)
    found = caught.value
    assert found is error or (fails and str(found) == "the end of it" and found.__context__ is error)
    assert device.state() == before and device.stream is before[1]


INTERRUPTS = {
    "within": ({}, KeyboardInterrupt()),
    "within, and an error at the end": (END, KeyboardInterrupt()),
    "at the end": ({"end": KeyboardInterrupt()}, None),
    "at the end, behind an error within": ({"end": KeyboardInterrupt()}, ValueError("the culprit")),
}


@pytest.mark.parametrize("where", INTERRUPTS)
def test_an_interrupt_while_a_row_is_captured_leaves_the_device_as_it_was(where, device):
    """Torch raises an error of its own in place of an interrupt where the capture cannot end: it is an interrupt still."""
    decoder, before = decoder_on(device), device.state()
    passes(decoder, 1, 8)
    device.fails, error = INTERRUPTS[where]
    if error is not None:
        decoder.layers[2].__class__, decoder.layers[2].device, decoder.layers[2].error = Culprit, device, error
    with pytest.raises(KeyboardInterrupt):
        decoder(*row_of(8))
    assert device.state() == before and not decoder.graphs.busy.locked()
    assert device.log[-1][0] == "record"  # what the pass has filled in may be in use on its stream


def test_a_pass_on_another_stream_waits_before_anything_is_filled(device, monkeypatch):
    decoder, fill, room = decoder_on(device), graphs._fill, graphs._Frame._filled
    monkeypatch.setattr(graphs, "_fill", lambda *some: device.log.append("fill") or fill(*some))
    monkeypatch.setattr(graphs._Frame, "_filled", lambda *some: device.log.append("fill") or room(*some))
    passes(decoder, 3, 8)
    (kind, index, name, event) = device.log[-1]
    assert (kind, index, name) == ("record", INDEX, "default")
    for name in ("another", "default", "another"):
        device.stream, device.log[:] = device.stream_of(name), []
        decoder(*row_of(8))
        first, *filled, last = device.log
        assert first == ("wait", name, event) and last == ("record", INDEX, name, event)  # one event for all passes
        assert filled and set(filled) == {"fill"}
    assert len(device.captures) == 1
    device.log.clear()
    with pytest.raises(ZeroDivisionError):
        decoder(*row_of(8), between={1: lambda hidden: hidden / (1 // 0)})
    assert device.log[0] == ("wait", "another", event) and device.log[-1] == ("record", INDEX, "another", event)


def test_graphs_of_other_weights_are_let_go_when_the_last_pass_is_over(device):
    decoder = decoder_on(device)
    passes(decoder, 3, 8)
    frame, event = next(iter(decoder.graphs.frames.values())), device.log[-1][-1]
    event.synchronize = lambda: device.log.append(("synchronize", frame in decoder.graphs.frames.values()))
    decoder.layers[1].weight = torch.nn.Parameter(torch.tensor([3.0]))
    device.log.clear()
    passes(decoder, 2, 8)
    assert device.log[:2] == [("synchronize", True), ("wait", "default", event)]
    assert [pool for pool, *_ in device.captures] == [(0, 1), (0, 2)]

"""Graphs of a decoder of a few sums, with a capture that runs the calls again instead of replaying them.

A graph reads the tensors of its bucket alone, and so does a call that is run again: what is not filled in anew shows. What
lies between the layers, streams, failures and what is kept of a pass is seen here; real models in tests/interpreted.
"""

import logging
import pickle
import threading

import pytest
import tiny
import torch
from family_cases import parametrize_families, patched, rows_of, samples_of

import yojo
from yojo.patching import graphs
from yojo.patching.graphs import RowGraphs, settled
from yojo_kernels import Layout


@pytest.fixture(autouse=True)
def small_buckets(monkeypatch):
    monkeypatch.setattr(graphs, "BUCKET", 4)


class Layer(torch.nn.Module):
    """hidden * weight + sum of what it is given, where the layout's samples stand among it."""

    def __init__(self, weight):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([weight]))

    def forward(self, hidden, layout, positions, flag=True):
        return hidden * self.weight + positions[0] * positions[1] + layout.sample[None, :, None] * (1 if flag else 2)


class Recorder:
    """A capture that counts, and fails where it is told to."""

    def __init__(self, fails=()):
        self.captured, self.replayed, self.tried, self.fails = 0, 0, 0, fails

    def __call__(self, call):
        self.tried += 1
        if self.tried in self.fails:
            try:
                raise ValueError("the culprit")
            except ValueError:
                raise RuntimeError("end of the capture")  # noqa: B904 - as torch's context raises it
        self.captured += 1

        def replay():
            self.replayed += 1
            call()

        return replay


class Decoder:
    """A model: layers, what it does to hidden states between them, and one pass of it."""

    def __init__(self, count=5, **options):
        self.layers = [Layer(1.0 + n / 8) for n in range(count)]
        for layer in self.layers:
            layer.eval()
        self.recorder = Recorder(**options)
        self.graphs = RowGraphs(self.layers, 16, self.recorder)

    def call(self, layer, hidden, **kwargs):
        if self.graphs.active():
            return self.graphs.run(layer, type(layer).forward, hidden, **kwargs)
        return type(layer).forward(layer, settled(hidden), **kwargs)

    def plain(self, *arguments, **options):
        """What a pass without graphs gives."""
        own, self.graphs = self.graphs, RowGraphs(self.layers, 0, self.recorder)
        try:
            return self(*arguments, **options)
        finally:
            self.graphs = own

    @torch.no_grad()
    def __call__(self, layout, hidden, between=None, positions=None):
        """The final hidden states; `between`: place -> function of what stands behind that layer."""
        rows = torch.arange(layout.num_tokens, dtype=torch.float32)[None, :, None]
        positions = positions or [(rows, hidden.sum() * 0 + 2)] * len(self.layers)
        with self.graphs.row(layout) as layout:
            for place, layer in enumerate(self.layers):
                hidden = self.call(layer, hidden, layout=layout, positions=positions[place])
                if between and place in between:
                    hidden = between[place](hidden)
        return hidden * 1.0


def row_of(*lengths, seed=0):
    layout = Layout.build(list(lengths), [[]] * len(lengths))
    return layout, torch.randn(1, layout.num_tokens, 3, generator=torch.Generator().manual_seed(seed))


def passes(decoder, count, *lengths, start=0, **options):
    """Several passes, each the same to the bit as without graphs."""
    for seed in range(start, start + count):
        row = row_of(*lengths, seed=seed)
        assert torch.equal(decoder(*row, **options), decoder.plain(*row, **options)), seed


ADD = {"a sum": lambda h: h + 1, "in place": lambda h: h.add_(1), "rows": lambda h: h.index_add(1, torch.tensor([2]), torch.ones(1, 1, 3))}  # fmt: skip


def test_layers_that_nothing_stands_between_are_one_graph():
    decoder = Decoder()
    passes(decoder, 4, 5, 3)
    assert decoder.recorder.captured == 1 and decoder.recorder.replayed == 3
    passes(decoder, 2, 3, 5)  # another row of as many tokens
    assert decoder.recorder.captured == 1
    passes(decoder, 2, 12)
    assert decoder.recorder.captured == 2  # another bucket
    passes(decoder, 3, 7)  # no bucket
    assert decoder.recorder.captured == 2 and len(decoder.graphs.frames) == 2


@pytest.mark.parametrize("what", ADD)
def test_a_graph_ends_where_hidden_states_are_looked_at(what):
    decoder = Decoder()
    passes(decoder, 4, 8, between={0: ADD[what], 1: ADD[what]})
    assert decoder.recorder.captured == 3  # layer 0; 1; 2 to 4


@pytest.mark.parametrize("what", ADD)
def test_a_pass_that_looks_elsewhere_is_right_and_splits_the_graph(what):
    """Text first, then rows with images: Qwen3-VL adds features behind its first layers."""
    decoder = Decoder()
    passes(decoder, 3, 8)
    assert decoder.recorder.captured == 1
    passes(decoder, 2, 8, between={1: ADD[what]})
    assert decoder.recorder.captured == 3  # 0 to 1; 2 to 4
    passes(decoder, 2, 8)
    passes(decoder, 2, 8, between={1: ADD[what]})
    assert decoder.recorder.captured == 3


def test_what_alternates_from_layer_to_layer_has_tensors_of_its_own():
    """Gemma 3: layers that slide have other rotary embeddings, of the same shape."""
    decoder = Decoder()
    for seed in range(4):
        layout, hidden = row_of(8, seed=seed)
        local, whole = [(torch.randn(1, 8, 1) + n, torch.randn(1, 8, 1)) for n in range(2)]
        positions = [local, whole, local, local, whole]
        expected = decoder.plain(layout, hidden, positions=positions)
        assert torch.equal(decoder(layout, hidden, positions=positions), expected)
    assert decoder.recorder.captured == 1
    layout, hidden = row_of(8, seed=9)
    positions = [whole, local, local, whole, whole]  # the same tensors in other places: another graph
    expected = decoder.plain(layout, hidden, positions=positions)
    assert torch.equal(decoder(layout, hidden, positions=positions), expected)
    assert decoder.recorder.captured == 2


def test_passes_that_are_all_different_are_not_captured_for_ever(monkeypatch):
    monkeypatch.setattr(graphs, "CAPTURING_PASSES", 3)
    decoder = Decoder(count=1)
    for seed in range(8):
        layout, hidden = row_of(8, seed=seed)
        with torch.no_grad(), decoder.graphs.row(layout) as layout:
            call = {"layout": layout, "positions": (hidden, hidden), "flag": f"{seed}"}
            got = decoder.call(decoder.layers[0], hidden, **call)
        assert torch.equal(got, decoder.layers[0](hidden, **call))
    assert decoder.recorder.captured == 4


def test_hidden_states_that_are_kept_are_never_read_from_a_graph():
    """A model that looks at all layers' states in the end runs as it is, and one that begins to is told so."""
    decoder, kept = Decoder(), []

    def keep(hidden):
        kept.append(hidden)
        return hidden

    def add_up(hidden):
        return hidden + sum(one * 1 for one in kept)

    def clear(hidden):
        kept.clear()
        return hidden

    for seed in range(3):
        row = row_of(8, seed=seed)
        expected = decoder.plain(*row, between={0: keep, 2: add_up, 4: clear})
        assert torch.equal(decoder(*row, between={0: keep, 2: add_up, 4: clear}), expected)
    assert decoder.recorder.captured == 0

    decoder = Decoder()
    passes(decoder, 2, 8)
    row = row_of(8)
    expected = decoder.plain(*row, between={0: keep, 2: add_up, 4: clear})
    assert torch.equal(decoder(*row, between={0: keep, 2: add_up, 4: clear}), expected)  # nothing was overwritten yet
    passes(decoder, 2, 8)
    with pytest.raises(RuntimeError, match="behind layer 0 are kept beyond the next one"):
        decoder(*row, between={0: keep, 2: ADD["a sum"], 3: ADD["a sum"], 4: add_up})
    kept.clear()
    assert torch.equal(decoder(*row, between={0: keep, 3: add_up, 4: clear}), decoder.plain(*row, between={0: keep, 3: add_up, 4: clear}))  # fmt: skip


@pytest.mark.parametrize("between", [None, {0: ADD["a sum"], 2: ADD["a sum"]}], ids=["one graph", "three"])
@pytest.mark.parametrize("fails", [(1,), (2,), (1, 2), (1, 2, 3)], ids=str)
def test_a_failed_capture_leaves_nothing_and_the_layers_run_as_they_are(fails, between, caplog):
    decoder = Decoder(fails=fails)
    with caplog.at_level(logging.WARNING):
        for seed in range(6):
            row = row_of(8, seed=seed)
            before = decoder.recorder.tried
            assert torch.equal(decoder(*row, between=between), decoder.plain(*row, between=between))
            (frame,) = decoder.graphs.frames.values()
            if set(range(before + 1, decoder.recorder.tried + 1)) & set(fails):
                assert not frame.graphs and not frame.rooms and frame.hidden is frame.layout is None
                assert decoder.recorder.tried == max(before + 1, *(n for n in fails if n <= decoder.recorder.tried))
    graphs_a_pass = 3 if between else 1
    gave_up = len([n for n in fails if n <= decoder.recorder.tried]) >= graphs.ATTEMPTS
    assert (frame.unfit is not None) == gave_up and bool(frame.graphs) != gave_up
    assert gave_up or len(frame.graphs) == graphs_a_pass
    reached = [n for n in fails if n <= decoder.recorder.tried]
    assert len(caplog.records) == (1 if reached else 0)  # once, whatever comes
    assert all(
        "8 tokens" in record.message and "ValueError: the culprit" in record.message for record in caplog.records
    )


def test_an_interrupted_capture_is_an_interrupt():
    decoder = Decoder()
    passes(decoder, 1, 8)

    def interrupted(call):
        raise KeyboardInterrupt

    decoder.graphs.capture = interrupted
    with pytest.raises(KeyboardInterrupt):
        decoder(*row_of(8))
    (frame,) = decoder.graphs.frames.values()
    assert not frame.graphs and not decoder.graphs.busy.locked() and not decoder.graphs.active()
    decoder.graphs.capture = decoder.recorder
    passes(decoder, 2, 8)
    assert decoder.recorder.captured == 1


def test_an_error_of_a_layer_is_the_layers():
    decoder = Decoder()
    passes(decoder, 2, 8)
    row = row_of(8)
    with pytest.raises(ZeroDivisionError):
        decoder(*row, between={1: lambda hidden: hidden / (1 // 0)})
    passes(decoder, 2, 8)


def test_layers_that_give_something_else_run_as_they_are():
    class Halving(Layer):
        def forward(self, hidden, **kwargs):
            return super().forward(hidden, **kwargs).half()

    decoder = Decoder()
    decoder.layers[2].__class__ = Halving
    passes(decoder, 3, 8)
    assert decoder.recorder.captured == 0


def test_a_pass_waits_for_the_last_ones_end_before_anything_is_filled(monkeypatch):
    """Two streams: buffers that a replay still reads are not filled by the next pass."""
    decoder, order = Decoder(), []
    fill, room = graphs._fill, graphs._Frame._filled
    monkeypatch.setattr(decoder.graphs, "_follow", lambda device: order.append("wait"))
    monkeypatch.setattr(decoder.graphs, "_mark_end", lambda device: order.append("end"))
    monkeypatch.setattr(graphs, "_fill", lambda *some: order.append("fill") or fill(*some))
    monkeypatch.setattr(graphs._Frame, "_filled", lambda *some: order.append("fill") or room(*some))
    decoder(*row_of(8))
    del order[:]
    for _ in range(2):
        decoder(*row_of(8))
        assert order[0] == "wait" and order[-1] == "end" and set(order[1:-1]) == {"fill"}
        del order[:]
    with pytest.raises(ZeroDivisionError):
        decoder(*row_of(8), between={1: lambda hidden: hidden / (1 // 0)})
    assert order[0] == "wait" and order[-1] == "end"


def test_a_second_thread_runs_as_it_is():
    decoder, inside, leave, found = Decoder(), threading.Event(), threading.Event(), []
    passes(decoder, 2, 8)
    row = row_of(8, seed=3)
    expected = decoder.plain(*row)

    def other():
        inside.wait(60)
        found.append(decoder(*row))
        leave.set()

    thread = threading.Thread(target=other)
    thread.start()

    def meanwhile(hidden):
        inside.set()
        assert leave.wait(60)
        return hidden

    replayed = decoder.recorder.replayed
    assert torch.equal(decoder(*row, between={1: meanwhile}), expected)
    thread.join()
    assert torch.equal(found[0], expected) and decoder.recorder.replayed == replayed + 1


def test_autocast_keeps_no_casts_of_weights_in_a_graph():
    decoder, seen = Decoder(), []
    call = Layer.forward

    class Watched(Layer):
        def forward(self, *arguments, **keywords):
            seen.append(torch.is_autocast_cache_enabled())
            return call(self, *arguments, **keywords)

    decoder.layers[1].__class__ = Watched
    with torch.autocast("cpu", dtype=torch.bfloat16):
        decoder(*row_of(8))
        decoder(*row_of(8))
        assert seen == [True, False] and torch.is_autocast_cache_enabled()


def test_what_is_handed_on_is_a_tensor_to_all_who_ask():
    decoder, seen = Decoder(), {}

    def look(hidden):
        seen.update(shape=hidden.shape, dtype=hidden.dtype, device=hidden.device, kind=isinstance(hidden, torch.Tensor))
        seen["touched"] = bool(decoder.graphs.frame and decoder.graphs.frame.ends - {4})
        return hidden

    passes(decoder, 3, 8, between={1: look})
    assert seen == {"shape": (1, 8, 3), "dtype": torch.float32, "device": torch.device("cpu"), "kind": True, "touched": False}  # fmt: skip
    assert decoder.recorder.captured == 1  # shapes and types are no secret

    def values(hidden):
        assert hidden.data_ptr() and hidden.tolist() == hidden.clone().tolist()
        return hidden

    passes(decoder, 2, 8, between={1: values})
    assert decoder.recorder.captured == 3


def test_a_copy_begins_without_graphs():
    decoder = Decoder()
    passes(decoder, 2, 8)
    decoder.graphs.capture = None
    twin = pickle.loads(pickle.dumps(decoder.graphs))
    assert twin.limit == 16 and len(twin.layers) == 5 and not twin.frames and twin.plain is None


@parametrize_families
@torch.no_grad()
def test_every_family_scores_the_same(family, monkeypatch):
    """Rows of the same lengths: without kernels, attention on a CPU goes by them."""
    model, collator = patched(family, mode="isolated")
    names = rows_of(family)[0]
    batch = collator.pack([collator.from_processed(*samples_of(family)[name]) for name in names], pad_to_multiple_of=64)
    other = {name: value * 0.5 if name.startswith("pixel_values") else value for name, value in batch.items()}
    ids, first = other["input_ids"], len(tiny.SPECIAL)
    words = (ids >= first) & (ids < tiny.VOCABULARY)
    other["input_ids"] = torch.where(words, first + (ids - first + 1) % tiny.WORDS, ids)
    expected = [model(**row).scores for row in (batch, other)]
    assert not torch.equal(*expected)
    monkeypatch.setattr(graphs, "BUCKET", 64)
    tokens = batch["input_ids"].shape[1]
    yojo.patch(model, graphs=tokens)
    recorder = model.yojo.fusion.graphs.capture = Recorder()
    for row in (0, 1, 0, 1, 1):
        assert torch.equal(model(**(batch, other)[row]).scores, expected[row])
    (frame,) = model.yojo.fusion.graphs.frames.values()
    assert frame.unfit is None and frame.graphs and recorder.captured == len(frame.graphs)
    layers = len(model.yojo.fusion.graphs.layers)
    whole = hasattr(model.get_decoder(), "_deepstack_process")
    assert recorder.captured == 1 or (whole and recorder.captured <= layers)

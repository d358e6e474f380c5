"""Layout: what the mask rule says, token by token, and which arguments it refuses."""

import copy
import dataclasses
import pickle
import random

import pytest
import torch

from yojo_kernels import Layout


def rule(layout_arguments, window=None, blocks=None, positions=None):
    """The mask rule once more, in plain loops over (sample, branch, position) of every token."""
    prompts, branches = layout_arguments
    tokens = []
    for s, (prompt, lengths) in enumerate(zip(prompts, branches, strict=True)):
        tokens += [(s, None, i) for i in range(prompt)]
        for b, length in enumerate(lengths):
            tokens += [(s, b, prompt + i) for i in range(length)]
    size = len(tokens)
    expected = torch.zeros(size, size, dtype=torch.bool)
    for q, (q_sample, q_branch, q_position) in enumerate(tokens):
        for k, (k_sample, k_branch, k_position) in enumerate(tokens):
            if positions is not None:
                q_position, k_position = positions[q], positions[k]
            same_block = blocks is not None and blocks[q] == blocks[k] != -1
            expected[q, k] = (
                q_sample == k_sample
                and k_branch in (None, q_branch)
                and (k <= q or same_block)
                and (window is None or q_position - k_position < window)
            )
    return expected


def random_case(rng):
    samples = rng.randint(1, 4)
    prompts = [rng.randint(0, 7) for _ in range(samples)]
    branches = [[rng.randint(1, 5) for _ in range(rng.randint(0 if p else 1, 4))] for p in prompts]
    return prompts, branches


@pytest.mark.parametrize("seed", range(60))
def test_visible_is_the_mask_rule(seed):
    rng = random.Random(seed)
    prompts, branches = random_case(rng)
    size = sum(prompts) + sum(map(sum, branches))
    window = rng.choice([None, 1, 2, 5])
    blocks = rng.choice([None, [rng.choice([-1, -1, 0, 1]) for _ in range(size)]])
    layout = Layout.build(prompts, branches, bidirectional=blocks)
    assert torch.equal(layout.visible(window), rule((prompts, branches), window, blocks))
    for start, stop in layout.sample_spans():
        assert torch.equal(layout.visible(window, (start, stop)), layout.visible(window)[start:stop, start:stop])


def test_positions_go_on_from_the_prompt_in_every_branch():
    layout = Layout.build([2, 3], [[3, 2], [1]])
    assert layout.position.tolist() == [0, 1, 2, 3, 4, 2, 3, 0, 1, 2, 3]
    assert layout.sample.tolist() == [0] * 7 + [1] * 4
    assert layout.branch.tolist() == [-1, -1, 0, 0, 0, 1, 1, -1, -1, -1, 0]
    assert layout.num_samples == 2 and layout.num_tokens == 11
    assert repr(layout) == "Layout(11 tokens, 2 samples, 3 branches, cpu)"


def test_a_window_below_one_is_refused():
    with pytest.raises(ValueError, match="window must be at least 1, or None for no window, got 0"):
        Layout.build([2], [[1]]).visible(0)


@pytest.mark.parametrize("seed", range(8))
def test_spans_of_blocks_are_those_found_by_looking(seed):
    """First and last row of the tokens with a token's segment and block, and of the run of such that it stands in."""
    rng = random.Random(seed)
    prompts = [rng.randint(0, 9) for _ in range(3)]
    branches = [[rng.randint(1, 7) for _ in range(rng.randint(1, 3))] for _ in prompts]
    size = sum(prompts) + sum(map(sum, branches))
    block = [rng.choice([-1, 0, 1, 7]) for _ in range(size)] if seed % 2 else [rng.choice([2, 4])] * size
    row = Layout.build(prompts, branches, bidirectional=block)
    segment = list(zip(row.sample.tolist(), row.branch.tolist(), strict=True))
    for token, spans in enumerate(row.block_span.T.tolist()):
        like = [n for n in range(size) if (segment[n], block[n]) == (segment[token], block[token])]
        if block[token] < 0:
            like = [token]
        first = last = token
        while first - 1 in like:
            first -= 1
        while last + 1 in like:
            last += 1
        assert spans == [min(like), max(like), first, last]


def test_the_largest_positions_differ_by_what_32_bits_hold():
    row = Layout.build([1], [[2]], positions=[-(2**30), 0, 2**30])
    assert row.position.tolist() == [-(2**30), 0, 2**30] and row.position.dtype == torch.int32


def test_given_positions_decide_the_window():
    positions = [0, 10, 11, 30]
    layout = Layout.build([2], [[2]], positions=positions)
    assert torch.equal(layout.visible(2), rule(([2], [[2]]), 2, positions=positions))


def test_a_layout_moves_pickles_and_pins(monkeypatch):
    layout = Layout.build([2], [[1, 2]], bidirectional=[0, 0, -1, -1, -1])
    assert layout.to("cpu") is layout
    assert layout.to("meta").device.type == "meta"
    assert torch.equal(pickle.loads(pickle.dumps(layout)).visible(), layout.visible())
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    torch.utils.data._utils.pin_memory.pin_memory({"layout": layout})
    assert len(pinned) == 1  # of all fields


@pytest.mark.parametrize("blocks", [False, True])
@pytest.mark.parametrize("window", [None, 5])
def test_one_copy_moves_everything(monkeypatch, blocks, window):
    """Fields and tables of both widths, each where kernels may read 16 bytes at once; pinned memory is moved as it is."""
    ids = [0, 0, 1, 1, 1, *[-1] * 58] if blocks else None
    layout = Layout.build([20, 3], [[5, 1, 30], [4]], bidirectional=ids)
    layout.query_tiles(16, 8, window)
    layout.key_tiles(16, 8, 4, window)
    copies = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: copies.append(tensor.clone()) or copies[-1])
    pinned = layout.pin_memory()
    check_is_copy(pinned, layout)
    assert len(copies) == 1
    there = pinned._map(lambda tensor: copies.append(tensor.clone()) or copies[-1])
    check_is_copy(there, layout)
    assert len(copies) == 2 and copies[0].shape == copies[1].shape
    pinned.position[0] = 7  # of the pinned memory, too
    assert pinned._map(torch.clone).position[0] == 7 != layout.position[0] == there.position[0]
    key = next(key for key in pinned._tables if key[0] == "query_tiles")
    pinned._tables[key] = pinned._tables[key] + 1  # another table in its place
    check_is_copy(pinned._map(torch.clone), pinned)
    pinned.query_tiles(32, 8, window)  # made since: all is put together anew
    check_is_copy(pinned._map(torch.clone), pinned)
    other = dataclasses.replace(pinned, position=pinned.position + 1)
    check_is_copy(other._map(torch.clone), other)
    check_is_copy(pickle.loads(pickle.dumps(pinned)), pinned)
    assert len(pickle.dumps(pinned)) < 1.1 * len(pickle.dumps(layout)) + 2000  # no buffer is written once a view


def check_is_copy(copy, layout):
    """Fails unless all fields and tables are equal, and lie apart at multiples of 16 bytes."""
    assert copy._fields().keys() == layout._fields().keys() and copy._tables.keys() == layout._tables.keys()
    own, theirs = ([*one._fields().values(), *_flat(one._tables.values())] for one in (copy, layout))
    for one, other in zip(own, theirs, strict=True):
        assert one.dtype == other.dtype and one.is_contiguous() and torch.equal(one, other)
        assert one.data_ptr() % 16 == 0 and one.data_ptr() != other.data_ptr()


def _flat(tables):
    return [tensor for table in tables for tensor in (table if isinstance(table, tuple) else (table,))]


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (([-1], [[2]]), {}, ValueError, "prompt_lengths must hold integers >= 0, got -1"),
        (([1], [[0]]), {}, ValueError, "branch_lengths must hold integers >= 1, got 0"),
        ((3, [[2]]), {}, TypeError, "prompt_lengths must be a list of integers, got 3"),
        (([3], [2]), {}, TypeError, "branch_lengths must be a list of lists of integers, got 2"),
        (([1], [[2]]), {"bidirectional": [0, -2, -1]}, ValueError, "bidirectional must lie between -1 and .*, got -2"),
        (([1], [[2]]), {"bidirectional": [0, 2**31, -1]}, ValueError, "bidirectional must lie between -1 and"),
        (([1], [[2]]), {"positions": [0, 1, 2**32]}, ValueError, "positions must lie between .*, got 4294967296"),
        (([1], [[2]]), {"positions": [0, 1, 2**30 + 1]}, ValueError, "positions must lie between"),
        (([1], [[2]]), {"positions": [-(2**30) - 1, 0, 1]}, ValueError, "positions must lie between"),
        (([1], [[2]]), {"positions": [None] * 3}, TypeError, "positions must hold integers"),
        (([1], [[2]]), {"positions": [1j] * 3}, TypeError, "positions must hold integers"),
        (([1.5], [[2]]), {}, TypeError, "prompt_lengths must hold integers, got 1.5"),
        (([1, 2], [[2]]), {}, ValueError, "names 2 samples and branch_lengths 1"),
        (([0], [[]]), {}, ValueError, "no token"),
        (([], []), {}, ValueError, "no token"),
        (([1], [[2]]), {"bidirectional": [0, 0]}, ValueError, r"bidirectional must have shape \[3\]"),
        (([1], [[2]]), {"bidirectional": [0.0, 0.0, 0.0]}, TypeError, "bidirectional must hold integers"),
        (([1], [[2]]), {"positions": [[0, 1, 2]]}, ValueError, r"positions must have shape \[3\]"),
    ],
)
def test_what_cannot_be_laid_out_is_refused(arguments, options, error, message):
    with pytest.raises(error, match=message):
        Layout.build(*arguments, **options)


# ---- several devices, several streams ----


def test_layers_of_one_device_share_the_layout_that_is_moved_there(monkeypatch):
    """Hooks of a model that is spread over devices move it for every layer: copied once, and tables made once."""
    layout = Layout.build([20], [[5, 1, 30]])
    there = layout.to("meta")
    assert layout.to("meta") is there and layout.to(torch.device("meta")) is there and there is not layout
    table = there.query_tiles(16, 8)
    monkeypatch.setattr(torch.ops.yojo, "query_tiles", None)  # nothing is made anew
    assert layout.to("meta").query_tiles(16, 8) is table and table.device.type == "meta"


def test_a_layout_elsewhere_is_of_its_own_pass_and_is_not_pickled():
    layout = Layout.build([20], [[5, 1, 30]])
    one, other = layout.for_one_pass(), layout.for_one_pass()
    assert one.to("meta") is one.to("meta") and one.to("meta") is not other.to("meta") is not layout.to("meta")
    one.to("meta").query_tiles(16, 8)
    assert one.to("meta").tables_of_pass == (("query_tiles", (16, 8, 0)),) and other.to("meta").tables_of_pass == ()
    layout.query_tiles(16, 8)
    again = pickle.loads(pickle.dumps(layout))
    assert again._twins == {} and set(again._tables) == set(layout._tables) and set(layout._twins)


class Stream:
    """What a layout asks of a stream; one of them is current."""

    current = None

    def __init__(self, number):
        self.cuda_stream, self.waited_for = number, []

    def record_event(self):
        return f"event of {self.cuda_stream}"

    def wait_event(self, event):
        self.waited_for.append(event)


@pytest.fixture()
def streams(monkeypatch):
    """Two streams of a GPU that is not there; a layout on the CPU says it is on it."""
    made = Stream(7), Stream(8)
    monkeypatch.setattr(Stream, "current", made[0])
    monkeypatch.setattr(Layout, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream.current)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda i: Stream.current.cuda_stream, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    kept = []
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, stream: kept.append((tensor, stream)))
    return *made, kept


@pytest.mark.parametrize("window", [None, 5])
def test_a_table_of_another_stream_is_waited_for(streams, window):
    first, second, kept = streams
    layout = Layout.build([20], [[5, 1, 30]])
    table = layout.query_tiles(16, 8, window)
    assert layout.query_tiles(16, 8, window) is table and first.waited_for == second.waited_for == kept == []
    Stream.current = second
    assert layout.query_tiles(16, 8, window) is table
    assert set(second.waited_for) == {"event of 7"} and (id(table), second) in [(id(one), to) for one, to in kept]
    second.waited_for.clear()
    tables = layout.key_tiles(16, 8, 4, window)  # made here; with a window from positions that the other stream sorted
    assert set(second.waited_for) == ({"event of 7"} if window else set())
    kept.clear()
    Stream.current = first
    assert layout.key_tiles(16, 8, 4, window)[0] is tables[0]
    assert first.waited_for == ["event of 8"] and {id(one) for one, _ in kept} == set(map(id, tables))


def test_a_copy_of_a_table_is_made_behind_it_and_capture_waits_for_nothing(streams, monkeypatch):
    _, second, _ = streams
    layout = Layout.build([20], [[5, 1, 30]])
    layout.query_tiles(16, 8)
    Stream.current = second
    layout.to("meta")
    assert second.waited_for == ["event of 7"]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    layout.query_tiles(16, 8)
    assert second.waited_for == ["event of 7"]


def test_a_layout_that_was_moved_on_another_stream_is_waited_for(streams, monkeypatch):
    _, second, kept = streams
    layout = Layout.build([20], [[5, 1, 30]])
    layout.query_tiles(16, 8)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor.clone())
    there = layout.to("cuda:1")
    assert layout.to("cuda:1") is there and not second.waited_for
    Stream.current = second
    assert layout.to("cuda:1") is there and second.waited_for == ["event of 7"]
    held = [id(tensor) for tensor, stream in kept if stream is second]
    assert {id(there.sample), id(there.bounds), id(there.position)} <= set(held)
    table = there.query_tiles(16, 8)  # copied with it, on the first stream
    assert second.waited_for == ["event of 7"] * 2 and (id(table), second) in [(id(one), to) for one, to in kept]


def test_a_copy_within_a_capture_is_not_kept(streams, monkeypatch):
    layout = Layout.build([20], [[5, 1, 30]])
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *_, **__: tensor.clone())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert layout.to("cuda:1") is not layout.to("cuda:1") and not layout._twins


def test_who_replaces_a_field_gets_tables_of_the_new_one():
    layout = Layout.build([20], [[5, 1, 30]])
    table = layout.query_tiles(16, 8, window=5)
    other = dataclasses.replace(layout, position=3 * layout.position)
    expected = Layout.build([20], [[5, 1, 30]], positions=3 * layout.position).query_tiles(16, 8, window=5)
    assert torch.equal(other.query_tiles(16, 8, window=5), expected) and not torch.equal(expected, table)
    assert layout.sharing_tables(causal=True).query_tiles(16, 8, window=5) is table


def test_a_copy_has_the_tables_and_makes_its_own():
    layout = Layout.build([20], [[5, 1, 30]])
    table = layout.query_tiles(16, 8)
    other = copy.copy(layout)
    assert other.query_tiles(16, 8) is table
    other.query_tiles(16, 16)
    assert len(other._tables) == 2 and len(layout._tables) == 1

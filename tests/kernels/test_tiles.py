"""Tile tables: walked as the kernels walk them, they lead to every visible pair once and to no row for nothing."""

import pickle
import random

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from yojo_kernels import Layout
from yojo_kernels import tiles as tile_tables

# ---- random rows ----


def random_blocks(rng, size):
    """Block ids: contiguous runs (as images have), or scattered over the row."""
    if rng.random() < 0.5:
        return [rng.choice([-1, -1, 0, 1, 5]) for _ in range(size)]
    blocks, at = [-1] * size, rng.randint(0, 9)
    while at < size:
        length = rng.randint(1, 25)
        blocks[at : at + length] = [at] * len(blocks[at : at + length])
        at += length + rng.randint(0, 9)
    return blocks


def random_positions(rng, size):
    """Logical positions out of order, or with steps of 0 to 3 and a few jumps back, as images and videos have."""
    if rng.random() < 0.4:
        return [rng.randint(-size, size) for _ in range(size)]
    positions, at = [], 0
    for _ in range(size):
        positions.append(at)
        at += rng.randint(0, 3) if rng.random() < 0.95 else -rng.randint(1, 20)
    return positions


def random_case(seed):
    """A layout of at most some 200 tokens, and what its tables are made for."""
    rng = random.Random(seed)
    prompts = [rng.choice([0, 1, rng.randint(0, 12), rng.randint(0, 60)]) for _ in range(rng.randint(1, 4))]
    branches = []
    for prompt in prompts:
        # A sample may be a prompt alone, and even hold no token at all.
        count = rng.choice([0, 1, 2, rng.randint(0, 9)])
        longest = rng.choice([1, 3, 20]) if prompt else rng.choice([1, 5, 40])
        branches.append([rng.randint(1, longest) for _ in range(count)])
    if not sum(prompts) + sum(map(sum, branches)):
        branches[-1] = [rng.randint(1, 30)]
    size = sum(prompts) + sum(map(sum, branches))
    blocks = random_blocks(rng, size) if rng.random() < 0.4 else None
    positions = random_positions(rng, size) if rng.random() < 0.4 else None
    return {
        "layout": Layout.build(prompts, branches, bidirectional=blocks, positions=positions),
        "window": rng.choice([None, None, 1, 5, 17, 10**6]),
        "block_m": rng.choice([1, 3, 4, 8, 16, 64, 300]),
        "block_n": rng.choice([1, 3, 4, 8, 16, 64, 300]),
        "extra": rng.choice([1, 2, 5, 66]),
        "shortest": rng.choice([1, 1, 2, 16]),
        "group": rng.choice([1, 1, 2, 3, 8]),
    }


# Rows at the limits of the tables' sizes: nothing but short prompts and branches, rows shorter than a tile, samples
# without a token at either end.
EXTREMES = [
    ([1] * 150, [[]] * 150),
    ([0] * 70, [[1]] * 70),
    ([1] * 60, [[1, 1]] * 60),
    ([0], [[1] * 200]),
    ([7], [[1] * 100]),
    ([1], [[]]),
    ([0, 0, 3, 0, 0], [[], [], [2, 1], [], []]),
    ([9, 9, 9], [[8], [8], [8]]),
    ([16, 32], [[16, 16], [16]]),
    ([17, 33], [[17, 17], [17]]),
]


def extreme_cases():
    for number, (prompts, branches) in enumerate(EXTREMES):
        rng = random.Random(number)
        for block_m, block_n in ((1, 1), (8, 8), (16, 8), (128, 64), (64, 128)):
            yield {
                "layout": Layout.build(prompts, branches),
                "window": rng.choice([None, 1, 3]),
                "block_m": block_m,
                "block_n": block_n,
                "extra": rng.choice([1, 3, 66]),
                "shortest": 1,
                "group": rng.choice([1, 4]),
            }


def block_cases():
    """A block that ends, or begins, at every place within a tile; steps of 1 to 8 keys."""
    for length in range(1, 19):
        blocks = [-1] * 3 + [0] * length + [-1] * (length + 14)
        for block_n in (1, 2, 8):
            yield {
                "layout": Layout.build([length + 9], [[3, length + 5]], bidirectional=blocks),
                "window": None,
                "block_m": 16 if block_n == 8 else 4,
                "block_n": block_n,
                "extra": 2,
                "shortest": 1,
                "group": 1,
            }


CASES = {f"random-{seed}": (lambda seed=seed: random_case(seed)) for seed in range(400)}
CASES |= {f"extreme-{n}": (lambda case=case: case) for n, case in enumerate(extreme_cases())}
CASES |= {f"block-{n}": (lambda case=case: case) for n, case in enumerate(block_cases())}


# ---- the kernels' walk ----


class Row:
    """The tensors of a layout as NumPy arrays, its mask, and those the kernels lay over border steps ([T, T])."""

    def __init__(self, layout, window):
        self.size = layout.num_tokens
        self.sample, self.branch, self.segment = layout.sample.numpy(), layout.branch.numpy(), layout.bounds[0].numpy()
        self.plain = window is None and layout.block is None
        self.visible = layout.visible(window).numpy()
        q, k = np.arange(self.size)[:, None], np.arange(self.size)
        own_start, own_end, heard_end = layout.bounds.numpy()
        block = np.full(self.size, -1) if layout.block is None else layout.block.numpy()
        position = layout.position.numpy()
        together = (block[q] == block[k]) & (block[k] >= 0)
        within = position[q] - position[k] < (window or np.inf)
        self.prompt_mask = ((k <= q) | (together & (k < own_end[q]))) & within
        self.branch_mask = self.prompt_mask & (k >= own_start[q])
        self.key_mask = ((k <= q) & (q < heard_end[k])) | (together & (q >= own_start[k]) & (q < own_end[k]))
        self.key_mask &= within


def walk(lo, end, first, behind, size, piece=None):
    """(start, stop, full) of the steps of a run, in order; of those numbered from piece[0] to piece[1]."""
    for step in range(*(piece or (0, -(-(end - lo) // size)))):
        start = lo + step * size
        yield start, min(start + size, end), first <= step < behind


def check_walk(steps, run, size, plain, visible, mask, visits):
    """Every step of a run: inside it, seen as a whole if full, and else of some use; pairs it takes up are counted.

    visible, mask and visits are [rows of the tile, T], T being the side that the steps are on.
    """
    for start, stop, full in steps:
        assert run[0] <= start < stop <= run[1]
        seen = visible[:, start:stop]
        if full:
            assert seen.all(), "a step without a mask holds a pair that is not visible"
        elif plain:
            assert seen.any(), "a step is visited for nothing"
            assert stop < start + size or not seen.all(), "a mask is laid over a step that needs none"
        visits[:, start:stop] += True if full else mask[:, start:stop]


def used_tiles(table):
    """The rows of a table that own something; all others are zero and stand behind."""
    used = table[:, 1] > table[:, 0]
    assert not table[~used].any()
    assert used[: used.sum()].all()
    return table[: used.sum()].tolist()


@pytest.mark.parametrize("name", CASES)
def test_query_tiles_lead_to_every_visible_pair_once(name):
    case = CASES[name]()
    layout, block_m, block_n = case["layout"], case["block_m"], case["block_n"]
    row = Row(layout, case["window"])
    table = layout.query_tiles(block_m, block_n, case["window"]).numpy()
    assert table.shape == (layout.num_tokens // block_m + layout.num_samples, tile_tables.QUERY_COLUMNS)
    owners, visits = np.zeros(row.size, int), np.zeros((row.size, row.size), int)
    weights = []
    for start, end, *columns in used_tiles(table):
        rows = slice(start, end)
        assert end - start <= block_m
        assert row.sample[start] == row.sample[end - 1]
        owners[rows] += 1
        weights.append(0)
        heard = {-1, *row.branch[rows].tolist()}
        for own, run in enumerate((columns[:4], columns[4:])):
            lo, stop = run[:2]
            # The hole: rows between the prompt and the branches of the tile's queries are in neither run.
            assert lo <= stop
            assert set(row.sample[lo:stop].tolist()) <= {row.sample[start].item()}
            assert set(row.branch[lo:stop].tolist()) <= ((heard - {-1}) if own else {-1})
            steps = list(walk(*run, block_n))
            weights[-1] += len(steps)

            mask = row.branch_mask if own else row.prompt_mask
            check_walk(steps, run, block_n, row.plain, row.visible[rows], mask[rows], visits[rows])
    assert (owners == 1).all()
    assert np.array_equal(visits, row.visible)
    assert weights == sorted(weights, reverse=True)


@pytest.mark.parametrize("name", CASES)
def test_key_tiles_lead_to_every_visible_pair_once(name, monkeypatch):
    case = CASES[name]()
    monkeypatch.setattr(tile_tables, "SHORTEST_PIECE", case["shortest"])
    layout, block_m, block_n, group = case["layout"], case["block_m"], case["block_n"], case["group"]
    row = Row(layout, case["window"])
    tables = layout.key_tiles(block_m, block_n, case["extra"], case["window"], group)
    items, sums = (table.numpy() for table in tables)
    most = layout.num_tokens // block_n + 2 * layout.num_samples
    extra = min(case["extra"], -(-most * -(-layout.num_tokens // block_m) * group // case["shortest"]))
    assert items.shape == (most + extra, tile_tables.KEY_COLUMNS)
    assert sums.shape == (extra, 4)
    # Every head of the group visits what the keys see, each by itself.
    owners, visits = np.zeros(row.size, int), np.zeros((group, row.size, row.size), int)
    tiles, weights = {}, []
    for start, end, lo, stop, first, behind, from_step, to_step, slot in used_tiles(items):
        assert end - start <= block_n
        assert len(set(row.sample[start:end].tolist())) == 1
        assert len(set((row.branch[start:end] < 0).tolist())) == 1
        assert from_step < to_step
        weights.append(to_step - from_step)
        tiles.setdefault((start, end, lo, stop, first, behind), []).append((from_step, to_step, slot))
        assert set(row.sample[lo:stop].tolist()) == {row.sample[start].item()}
        if row.branch[start] >= 0:  # a branch is heard by itself alone
            assert set(row.segment[lo:stop].tolist()) <= set(row.segment[start:end].tolist())
        steps = -(-(stop - lo) // block_m)
        for member in range(group):
            of_member = [min(max(step - member * steps, 0), steps) for step in (from_step, to_step)]
            sides = [matrix[:, start:end].T for matrix in (row.visible, row.key_mask, visits[member])]
            check_walk(walk(lo, stop, first, behind, block_m, of_member), (lo, stop), block_m, row.plain, *sides)
    for start, end, *_ in tiles:
        owners[start:end] += 1
    assert (owners == 1).all()
    assert all(np.array_equal(of_head, row.visible) for of_head in visits)
    assert weights == sorted(weights, reverse=True)
    check_pieces(tiles, sums, block_m, extra, case["shortest"], group)


def check_pieces(tiles, sums, block_m, extra, shortest, group):
    """Pieces partition the steps of their tile, and the slots of a split tile's pieces lie side by side."""
    counts = {tile: -(-(tile[3] - tile[2]) // block_m) * group for tile in tiles}
    longest = max(shortest, -(-sum(counts.values()) // extra))
    slots, expected = [], {}
    for tile, pieces in tiles.items():
        pieces.sort()
        edges = [0] + [to_step for _, to_step, _ in pieces]
        assert edges[:-1] == [from_step for from_step, _, _ in pieces] and edges[-1] == counts[tile]
        assert max(to_step - from_step for from_step, to_step, _ in pieces) <= longest
        own = [slot for _, _, slot in pieces]
        if len(pieces) == 1:
            assert own == [-1]
        else:
            assert counts[tile] > longest
            assert own == list(range(own[0], own[0] + len(own)))
            slots += own
            expected[tile[:2]] = (own[0], len(own))
    assert len(set(slots)) == len(slots) and all(0 <= slot < 2 * extra for slot in slots)
    listed = [tuple(entry) for entry in sums.tolist() if entry[3]]
    assert len(listed) == len(expected)
    assert {(start, end): (slot, count) for start, end, slot, count in listed} == expected


def test_the_cases_reach_what_they_are_for(monkeypatch):
    """Full steps, full steps in the middle of a run, split tiles with full steps: else the checks above say little."""
    found = dict.fromkeys(["full", "windowed full", "block full", "split", "split full", "split by head", "hole"], 0)
    for name in CASES:
        case = CASES[name]()
        monkeypatch.setattr(tile_tables, "SHORTEST_PIECE", case["shortest"])
        layout, window = case["layout"], case["window"]
        tiles = layout.query_tiles(case["block_m"], case["block_n"], window).numpy()
        full = (tiles[:, [5, 9]] - tiles[:, [4, 8]]).sum()
        found["full"] += full > 0
        found["windowed full"] += (tiles[:, [4, 8]] > 0).any() and full > 0
        found["block full"] += layout.block is not None and full > 0
        found["hole"] += ((tiles[:, 6] > tiles[:, 3]) & (tiles[:, 3] > tiles[:, 2])).any()
        items = layout.key_tiles(case["block_m"], case["block_n"], case["extra"], window, case["group"])[0].numpy()
        split = items[(items[:, 8] >= 0) & (items[:, 1] > items[:, 0])]
        found["split"] += len(split) > 0
        steps = -((split[:, 2] - split[:, 3]) // case["block_m"])
        found["split by head"] += (split[:, 6] // steps < (split[:, 7] - 1) // steps).any()  # a piece of several heads
        found["split full"] += (split[:, 5] > split[:, 4]).any()
    assert min(found.values()) >= 20, found


def test_long_rows_are_split_by_the_default_rule():
    layout = Layout.build([3000, 100], [[200] * 10, [50] * 4])
    items, sums = layout.key_tiles(64, 64, 66)
    weights = (items[:, 7] - items[:, 6]).tolist()
    assert sums[:, 3].any() and max(weights) == -(-sum(weights) // 66) > tile_tables.SHORTEST_PIECE
    short = Layout.build([100], [[200]]).key_tiles(64, 64, 1000)
    assert not short[1][:, 3].any()  # no tile has more than SHORTEST_PIECE steps


def test_pieces_of_short_rows_keep_all_processors_busy():
    """A prompt of 256 and 4 responses of 100, 32 heads on 8: no piece is longer than what falls to one of 132."""
    layout = Layout.build([256], [[100] * 4])
    items, sums = layout.key_tiles(64, 128, 66, group=4)
    steps = items[:, 7] - items[:, 6]
    assert 132 <= 8 * (steps > 0).sum() <= 2 * 132  # programs of 8 key heads
    assert steps.max() <= tile_tables.SHORTEST_PIECE <= -(-8 * steps.sum() // 132)
    assert sums.shape[0] < 66  # bounded by the row's size


def test_a_block_needs_no_mask_inside():
    """An image whose tokens see each other: its tiles are full, above the diagonal as well."""
    layout = Layout.build([96], [[16]], bidirectional=[-1] * 16 + [0] * 64 + [-1] * 32)
    tiles = {row[0]: row for row in used_tiles(layout.query_tiles(16, 16).numpy())}
    items = {row[0]: row for row in used_tiles(layout.key_tiles(16, 16, 1)[0].numpy())}
    for start in range(16, 80, 16):
        assert tiles[start][2:6] == [0, 80, 0, 5]  # all keys up to the block's end, every step of them full
        assert items[start][2:6] == [16, 112, 0, 6]  # all queries from the block's start on
    assert tiles[0][2:6] == [0, 16, 0, 0]


def test_a_picture_shows_full_border_and_skipped_tiles(tmp_path):
    from PIL import Image

    from yojo_kernels import picture

    layout = Layout.build([20], [[9, 14]], bidirectional=[0] * 7 + [-1] * 36)
    layout.plot(tmp_path / "layout.png", block_m=8, block_n=4, window=30)
    assert min(Image.open(tmp_path / "layout.png").size) > 500
    classes, shares = picture._classes(layout, torch.arange(43), 8, 4, 30)
    visible = layout.visible(30).numpy()
    full, border = classes == picture.FULL, (classes == picture.VISIBLE) | (classes == picture.MASKED)
    assert visible[full].all() and not visible[classes == picture.SKIPPED].any()
    assert ((classes == picture.VISIBLE) == (visible & ~full)).all()
    assert np.allclose(shares[:2], (full.mean(), border.mean())) and min(shares) > 0
    Layout.build([3000], [[40] * 30]).plot(tmp_path / "long.png")
    with pytest.raises(ValueError, match="block_n must be at least 1, got 0"):
        layout.plot(tmp_path / "x.png", block_n=0)


# ---- tables as tensors ----

SETTINGS = [(16, 8, None), (8, 16, 5)]


def build():
    return Layout.build([20, 0, 9], [[5, 1, 30], [4], []], bidirectional=[0] * 12 + [-1] * 57)


def all_tables(layout):
    for block_m, block_n, window in SETTINGS:
        yield layout.query_tiles(block_m, block_n, window)
        yield from layout.key_tiles(block_m, block_n, 4, window)


def test_tables_are_made_once():
    layout = build()
    assert all(once is twice for once, twice in zip(all_tables(layout), all_tables(layout), strict=True))
    others = [layout.query_tiles(16, 16), layout.query_tiles(16, 8), layout.query_tiles(16, 8, 5)]
    assert len({id(table) for table in others}) == 3
    assert layout.key_tiles(16, 8, 4)[0] is not layout.key_tiles(16, 8, 5)[0]


def test_tables_move_with_their_layout(monkeypatch):
    layout = build()
    tables = list(all_tables(layout))
    assert all(table.dtype == torch.int32 and table.is_contiguous() for table in tables)
    for name in ("query_tiles", "key_tiles", "position_extremes"):  # nothing is made anew from here on
        monkeypatch.setattr(torch.ops.yojo, name, None)
    copy = pickle.loads(pickle.dumps(layout))
    assert len(copy._tables) == len(layout._tables) == 2 * len(SETTINGS) + 1  # and the searchable positions
    assert all(torch.equal(one, other) for one, other in zip(all_tables(copy), tables, strict=True))
    moved = list(all_tables(layout.to("meta")))
    assert [table.shape for table in moved] == [table.shape for table in tables]
    assert {table.device.type for table in moved} == {"meta"}
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self: pinned.append(self) or self)
    list(all_tables(layout.pin_memory()))
    assert len(pinned) == 1


def arguments(layout, *settings):
    return (
        layout.sample_offsets,
        layout.prompt_ends,
        layout.segment_offsets,
        layout.position,
        layout.block_span,
        torch.ops.yojo.position_extremes(layout.segment_offsets, layout.position) if settings[-1] else None,
        *settings,
    )


@pytest.mark.parametrize("window", [0, 5])
@pytest.mark.parametrize("blocks", [False, True])
def test_operators_are_well_formed(window, blocks):
    layout = build() if blocks else Layout.build([20], [[5, 1, 30]])
    for operator, settings in (
        (torch.ops.yojo.query_tiles, (16, 8, window)),
        (torch.ops.yojo.key_tiles, (8, 16, 4, 2, window)),
    ):
        given = arguments(layout, *settings)
        torch.library.opcheck(operator.default, given)
        made = operator(*given)
        with FakeTensorMode() as mode:
            fake = [a if not isinstance(a, torch.Tensor) else mode.from_tensor(a) for a in given]
            promised = operator(*fake)
        made, promised = ((t,) if isinstance(t, torch.Tensor) else t for t in (made, promised))
        assert [(t.shape, t.dtype, t.stride()) for t in made] == [(t.shape, t.dtype, t.stride()) for t in promised]


def test_a_layout_that_moves_within_a_pass_leaves_its_tables_behind():
    """Layers of one model may lie on several devices."""
    torch._dynamo.reset()
    layout = build().for_one_pass()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(layout):
        return layout.query_tiles(16, 8, 5) + 0

    function(layout)
    assert {table.device.type for table in layout._tables_of_pass.values()} == {"cpu"}
    assert layout.to("meta")._tables_of_pass == {} and build().to("meta")._tables_of_pass is None


def test_a_pass_knows_which_tables_it_asked_for_and_another_makes_them_at_once():
    layout = build()
    first = layout.for_one_pass()
    assert first.tables_of_pass == () == layout.tables_of_pass
    tiles, items = first.query_tiles(16, 8, 5), first.key_tiles(8, 16, 4)
    assert first.tables_of_pass == (("query_tiles", (16, 8, 5)), ("key_tiles", (8, 16, 4, 1, 0)))
    again = layout.for_one_pass()
    assert again.query_tiles(16, 8, 5) is tiles and again.tables_of_pass == first.tables_of_pass[:1]  # kept, and noted
    other = build().for_one_pass(first.tables_of_pass)
    assert other.tables_of_pass == first.tables_of_pass
    made = other._tables_of_pass
    assert torch.equal(made["query_tiles", (16, 8, 5)], tiles)
    assert all(map(torch.equal, made["key_tiles", (8, 16, 4, 1, 0)], items))


def test_tables_are_made_inside_a_compiled_graph():
    torch._dynamo.reset()
    layout = build()

    @torch.compile(backend="aot_eager", fullgraph=True)
    def function(layout):
        return layout.query_tiles(16, 8, 5) + 0, layout.key_tiles(8, 16, 4, 5)[0] + 0

    tiles, items = function(layout)
    assert not layout._tables  # a graph's own tensors are not kept
    assert torch.equal(tiles, layout.query_tiles(16, 8, 5))
    assert torch.equal(items, layout.key_tiles(8, 16, 4, 5)[0])

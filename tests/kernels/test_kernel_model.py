"""The model of the attention kernels: steps from machine code, programs on multiprocessors, predictions that are to hold."""

import dataclasses
import itertools
import json
import random
import re

import pytest
import torch
import triton

from bench import model, sass
from bench.attention_peers import SHAPES, mix, one
from yojo_kernels import Layout, attention, tuning

# ---- machine code ----

ZERO = "/*00*/ MUFU.EX2 R1, R1 ;"  # before the loop: counts for nothing
QK = "/*10*/ HGMMA.64x64x16.F32.BF16 R88, gdesc[UR8], R88 ;"
PV = "/*20*/ HGMMA.64x128x16.F32.BF16 R24, R120, gdesc[UR8].tnspB, R24, gsb0 ;"
WAIT = "/*30*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
PENDING = "/*30*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;"
EXP = "/*40*/ MUFU.EX2 R1, R1 ;"
ADD = "/*50*/ FADD R1, R1, R2 ;"
COPY = "/*60*/ LDGSTS.E.BYPASS.128 [R179], desc[UR14][R40.64], P2 ;"
NOTHING = "/*70*/ @!PT LDS RZ, [RZ] ;"


def branch(to, condition="@P0 "):
    return f"/*80*/ {condition}BRA `(.L_x_{to}) ;"


def step(*body, before=(ZERO,), after=("/*90*/ EXIT ;",), warps=8):
    return sass.step_of([*before, ".L_x_0:", *body, branch(0), *after], warps, 128, 100 * 1024)


def test_resources_of_a_loop_by_hand():
    found = step(QK, QK, WAIT, EXP, EXP, ADD, ADD, ADD, PV, COPY, NOTHING)
    assert found.tensor == 2 * (32 + 32 + 64)  # N / 2 clocks, two warp groups
    # A of 64 x 16 and B of N x 16, two bytes each, 128 bytes a clock; 16 bytes of each of 256 lanes are copied
    assert found.shared == 2 * ((16 + 16) * 2 + 32) + 256 * 16 / 128
    assert found.mufu == 2 * 8 * 32 / 16
    assert found.issue == 12 * 8 / 4
    assert (found.apart, found.waits) == (32, 1)  # two exponentials take longer than five instructions
    assert (found.border, found.loops) == (0, 2 - 1)
    assert (found.registers, found.resident) == (128, 2)


def test_what_stands_apart_from_products():
    assert step(QK, WAIT, EXP, *[ADD] * 20, PV).apart == 21 * 2  # more instructions than exponentials
    assert (
        step(QK, WAIT, ADD, PV, EXP, QK, WAIT, ADD, ADD).apart == 2 + 16 + 2 * 3
    )  # the last goes on to the loop's start
    assert step(QK, WAIT, ADD, PV, EXP, QK, WAIT, ADD, ADD).waits == 2
    found = step(QK, PENDING, EXP, PV)
    assert (found.apart, found.waits) == (16, 0)  # a product is still running, and exponentials hold up the next
    assert step(QK, WAIT, *[ADD] * 4, PV, *[ADD] * 9).apart == 4 * 2  # beside a product: hidden


def test_a_mask_under_a_branch_makes_the_border_step():
    mask = [ADD] * 30
    inline = step(QK, WAIT, branch(1), *mask, ".L_x_1:", EXP, PV)
    assert (inline.border, inline.loops, inline.apart) == (30 * 2, 1, 16)
    assert inline.issue == 6 * 2
    # The same with the mask behind the loop, and a branch back into it.
    after = ("/*90*/ EXIT ;", ".L_x_2:", *mask, branch(1, ""))
    outside = step(QK, WAIT, branch(2), ".L_x_1:", EXP, PV, after=after)
    assert dataclasses.replace(outside, border=0) == dataclasses.replace(inline, border=0)
    assert outside.border == 31 * 2  # and the branch


def test_two_loops_are_a_full_and_a_border_step():
    first = [".L_x_0:", QK, WAIT, EXP, PV, branch(0)]
    second = [".L_x_1:", QK, WAIT, EXP, *[ADD] * 10, PV, branch(1)]
    for code in (first + second, second + first):
        found = sass.step_of([ZERO, *code, "/*90*/ EXIT ;"], 8, 128, 1024)
        assert (found.loops, found.border, found.issue, found.tensor) == (2, 20, 10, 192)
    # Within a loop over query heads, and beside a loop that multiplies nothing.
    other = [".L_x_8:", ADD, ADD, branch(8)]
    nested = [".L_x_9:", ADD, *first, *other, *second, branch(9)]
    inside = sass.step_of([ZERO, *nested, "/*90*/ EXIT ;"], 8, 128, 1024)
    assert inside == found


def test_machine_code_that_the_model_cannot_read():
    with pytest.raises(ValueError, match="0 innermost loops with HGMMA"):
        step(ADD, "/*10*/ HMMA.16816.F32.BF16 R4, R4, R6, R8 ;")
    with pytest.raises(ValueError, match="tensor memory accelerator"):
        step(QK, "/*10*/ UTMALDG.2D [UR8], [UR4], desc[UR6] ;")
    three = [line for i in range(3) for line in (f".L_x_{i}:", QK, branch(i))]
    with pytest.raises(ValueError, match="3 innermost loops with HGMMA, 1 or 2 are steps"):
        sass.step_of([*three, "/*90*/ EXIT ;"], 8, 128, 1024)


# Clocks of a step as they were read by hand off eight loops, of which the constants were made: kernel, head dim and tile,
# (tensor, shared, apart, waits), clocks. The last one by hand leaves out one product's operands.
BY_HAND = [
    ("forward 128 128x64", (1024, 1024, 544, 1), 1800, 0.03),
    ("forward 128 128x128", (2048, 1792, 1056, 1), 3350, 0.03),
    ("forward 64 128x64", (512, 512, 544, 1), 1250, 0.03),
    ("forward 256 128x32", (1024, 1280, 436, 1), 1950, 0.03),
    ("query_grad 128 128x64", (1536, 1536, 654, 2), 2700, 0.03),
    ("key_grad 128 32x128", (1024, 1168, 346, 2), 1900, 0.03),
    ("key_grad 256 16x64", (768, 2576, 180, 2), 3160, 0.03),
    ("query_grad 256 64x32", (1280, 2944, 366, 2), 3400, 0.11),
]


def a_step(tensor=1024, shared=1024, apart=544, waits=1, mufu=544, issue=718, border=0, loops=1, resident=1):
    return sass.Step(tensor, shared, mufu, issue, apart, waits, border, loops, 128, resident)


@pytest.mark.parametrize("name, parts, expected, within", BY_HAND, ids=[row[0] for row in BY_HAND])
def test_the_clocks_of_a_step_are_those_read_by_hand(name, parts, expected, within):
    full, border = model.clocks(a_step(*parts, border=100))
    assert full == pytest.approx(expected, rel=within) and border == full + 100


def test_programs_that_share_a_multiprocessor_fill_gaps_and_no_more():
    alone, two, many = (model.clocks(a_step(resident=count))[0] for count in (1, 2, 10**6))
    assert alone > two > many and many == pytest.approx(1024, abs=1)
    assert two == (alone + 1024) / 2


# ---- programs ----


def test_the_schedule_by_hand():
    assert model.schedule([3, 3, 2, 2], 2) == 5
    assert model.schedule([5, 1, 1, 1, 1], 2) == 5
    assert model.schedule([1, 1, 1, 1, 5], 2) == 7  # the heaviest last
    assert model.schedule([4, 2], 3) == 4
    assert model.schedule([7], 1) == 7 and model.schedule([1, 2, 3], 1) == 6


def test_the_schedule_is_within_what_any_can_be():
    rng = random.Random(0)
    for _ in range(50):
        costs = [rng.randint(1, 100) for _ in range(rng.randint(1, 60))]
        slots = rng.randint(1, 12)
        span = model.schedule(costs, slots)
        assert max(max(costs), sum(costs) / slots) <= span <= sum(costs) / slots + max(costs)
        assert span >= model.schedule(costs, slots + 1)
        ends = [0] * slots  # the same without a heap
        for cost in costs:
            ends[ends.index(min(ends))] += cost
        assert span == max(ends)


LAYOUTS = [([40], [[7, 9, 30]]), ([0, 65], [[20], []]), ([17, 5, 90], [[1] * 9, [33], [12, 50]]), ([200], [[64, 64]])]


@pytest.mark.parametrize("prompts, responses", LAYOUTS)
def test_steps_of_query_tiles_are_those_that_a_program_takes(prompts, responses):
    layout = Layout.build(prompts, responses)
    for block_m, block_n in ((16, 16), (32, 16), (16, 32)):
        table = layout.query_tiles(block_m, block_n)
        full, border = model.query_steps(table, block_n)
        for tile, tile_full, tile_border in zip(table.tolist(), full.tolist(), border.tolist(), strict=True):
            steps = []
            for lo, end, first, behind in (tile[2:6], tile[6:10]):
                steps += [first <= i < behind for i, _ in enumerate(range(lo, end, block_n))]
            assert (tile_full, tile_border) == (steps.count(True), steps.count(False))


@pytest.mark.parametrize("prompts, responses", LAYOUTS)
def test_steps_of_key_items_are_those_of_the_mask(prompts, responses):
    """Every visible pair lies in a step, as often as there are query heads, and full steps see all of it."""
    group, layout = 4, Layout.build(prompts, responses)
    visible = layout.visible()
    pairs = int(visible.sum())
    for block_m, block_n, extra in ((16, 16, 1), (16, 32, 40), (32, 16, 400)):
        items, _ = layout.key_tiles(block_m, block_n, extra, group=group)
        full, border = model.key_steps(items, block_m)
        for item, *counted in zip(items.tolist(), full.tolist(), border.tolist(), strict=True):
            lo, end, first, behind, from_step, to_step, _ = item[2:]
            whole = [first <= step % -((lo - end) // block_m) < behind for step in range(from_step, to_step)]
            assert counted == [whole.count(True), whole.count(False)]
        assert (full >= 0).all() and (border >= 0).all()
        assert int((full + border).sum()) * block_m * block_n >= pairs * group >= int(full.sum()) * block_m
        tiles = {tuple(item[:6]): 0 for item in items.tolist() if item[1] > item[0]}
        for item, steps in zip(items.tolist(), (full + border).tolist(), strict=True):
            if item[1] > item[0]:
                tiles[tuple(item[:6])] += steps
        for (_, _, lo, end, *_), steps in tiles.items():
            assert steps == -((lo - end) // block_m) * group  # the pieces of a tile are all of it


# ---- predictions ----


@pytest.fixture()
def fixed(monkeypatch):
    """Steps that do not depend on the kernels: `a_step` for all, with a border."""
    monkeypatch.setattr(model, "step_of", lambda *_: a_step(border=300))
    monkeypatch.setattr(model, "tiles_of", lambda *_: dict.fromkeys(model.KERNELS, tuning.Tile(128, 64, 8, 3)))
    return monkeypatch


def test_a_prediction_by_hand(fixed):
    """A prompt of one tile and a response of one token: all programs run at once, the longest is what it takes."""
    found = model.predict(one(128, 1, 1, heads=2, kv_heads=2))
    full, border = model.clocks(a_step(border=300))
    # The prompt's tile: 2 border steps. The response's: 2 full steps over the prompt, 1 border step.
    clocks = max(2 * border, 2 * full + border) + 3000
    run = found.runs["forward"]
    assert run.microseconds == pytest.approx(clocks / 1.65e3 / 0.93)
    assert run.programs == 2 * (129 // 128 + 1) and run.computed == 2 * 5 * 128 * 64
    pairs = 128 * 129 // 2 + 129
    assert found.pairs == pairs and found.visible == pairs / (5 * 128 * 64)
    assert found.tflops("forward") == pytest.approx(4 * 2 * 128 * pairs / run.microseconds / 1e6)
    backward = sum(found.runs[kernel].microseconds for kernel in ("query_grad", "key_grad", "sum"))
    assert found.microseconds("backward") == pytest.approx(backward)
    assert found.tflops("backward") == pytest.approx(10 * 2 * 128 * pairs / backward / 1e6)


def test_a_tile_of_packed_heads_holds_fewer_tokens(fixed):
    """Two heads of a group in a tile of 64 tokens: three tiles, and what a response of one token computes is halved."""
    assert tuning.packed_heads(2, 128) == 2
    run = model.predict(one(128, 1, 1, heads=2, kv_heads=1)).runs["forward"]
    full, border = model.clocks(a_step(border=300))
    assert run.programs == 129 // 64 + 1 and run.computed == (1 + 2 + 3) * 128 * 64
    assert run.microseconds == pytest.approx((2 * full + border + 3000) / 1.65e3 / 0.93)


def test_two_launches_for_keys_and_values_are_both_counted(fixed):
    together, apart = (model.predict(one(512, 4, 64, head_dim=dim)).runs for dim in (128, 256))
    assert apart["key_grad"].programs == 2 * together["key_grad"].programs
    assert apart["key_grad"].microseconds == pytest.approx(2 * together["key_grad"].microseconds)
    assert apart["key_grad"].balance == pytest.approx(together["key_grad"].balance)
    assert apart["query_grad"] == together["query_grad"]


def test_more_takes_longer_and_nothing_beats_the_hardware(fixed):
    shapes = [one(512, 4, 64), one(2048, 4, 64), one(2048, 16, 64), one(4096, 16, 64), mix(12000)]
    times = [[model.predict(shape).microseconds(way) for shape in shapes[:4]] for way in ("forward", "backward")]
    assert all(earlier < later for row in times for earlier, later in itertools.pairwise(row))
    heads = [model.predict(one(512, 4, 64, heads=count)).microseconds("forward") for count in (8, 64, 512)]
    assert heads[0] < heads[1] < heads[2]
    for shape in shapes:
        found = model.predict(shape)
        assert 0 < found.visible < 1
        assert all(0 < run.balance <= 1 for run in found.runs.values())
        assert found.tflops("forward") < 132 * 4096 * 1.65e9 / 1e12
    before = model.predict(shapes[1])
    fixed.setattr(model, "step_of", lambda *_: a_step(border=300, apart=600))
    after = model.predict(shapes[1])
    assert all(after.runs[kernel].microseconds > before.runs[kernel].microseconds for kernel in model.KERNELS)
    fixed.setattr(model, "step_of", lambda *_: a_step(border=300, loops=2))
    assert model.predict(shapes[1]).microseconds("forward") > before.microseconds("forward")


def test_what_cannot_be_predicted_is_refused(fixed, capsys):
    shape = one(64, 2, 8)
    for device in ("NVIDIA A100-SXM4-80GB", "NVIDIA H100 PCIe", "cpu"):
        with pytest.raises(ValueError, match=f"there are no sourced constants for {device}"):
            model.predict(shape, device=device)
    with pytest.raises(ValueError, match="torch.float32 do not multiply on tensor cores"):
        model.predict(shape, torch.float32)
    for arguments, words in [
        (["--device", "NVIDIA L4"], "no sourced constants for NVIDIA L4"),
        (["--row", "12+"], "a row is like 16384, 2048[+]4x100 or mix"),
        (["--row", "64", "--tile", "sum=1x2x3x4"], "a tile is like forward=128x64x8x3"),
    ]:
        assert model.main(arguments) == 2
        assert re.search(words, capsys.readouterr().err)


def test_the_command_prints_a_line_for_each_row(fixed, capsys):
    assert model.main(["--row", "64", "64+2x8", "mix(3000)", "--head-dim", "64", "128", "--heads", "4:2"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "predicted, not measured" in printed[1] and len(printed) == 2 + 3 * 2
    assert printed[3].startswith("64+2x8, 4:2 heads of 64") and printed[6].startswith("64+2x8, 4:2 heads of 128")
    assert model.main(["--constants"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == len(model.CONSTANTS) and all(source for _, _, source in model.CONSTANTS.values())


LONG = [shape for shape in SHAPES["cuda"] if len(shape.prompts) == 1 and shape.prompts[0] >= 8192]
AT_64 = [shape for shape in LONG if shape.head_dim == 64]
AT_128 = [shape for shape in LONG if shape.head_dim == 128]
AT_256 = [shape for shape in LONG if shape.head_dim == 256]


@pytest.mark.parametrize(
    "shapes, direction, least",
    [(AT_64, "backward", 300), (AT_128, "forward", 480), (AT_128, "backward", 340), (AT_256, "backward", 250)],
    ids=["backward 64", "forward 128", "backward 128", "backward 256"],
)
def test_the_predicted_rate_of_long_rows_holds(shapes, direction, least):
    """TFLOP/s of visible area; not of mixes, whose samples are short."""
    assert len(shapes) >= 1 and min(model.predict(shape).tflops(direction) for shape in shapes) >= least


def test_key_gradients_of_a_short_row_are_balanced():
    assert model.predict(one(256, 4, 100)).runs["key_grad"].balance >= 0.7


# ---- the record ----


def test_the_record_is_of_the_tables_tiles_and_these_kernels():
    names = {
        model.name_of(kernel, torch.bfloat16, head_dim, tile)
        for head_dim in model.HEAD_DIMS
        for kernel, tile in model.launches(torch.bfloat16, head_dim, model.tiles_of(torch.bfloat16, head_dim))
    }
    assert set(model.recorded()) == names


def test_no_kernel_waits_for_each_product():
    """The compiler lets products run one by one where it cannot follow their registers: far more waits, no warning."""
    waits = {name: step.waits for name, step in model.recorded().items()}
    assert waits and {name: count for name, count in waits.items() if count > 2} == {}


@pytest.mark.parametrize("kernel", model.KERNELS)
def test_the_record_is_what_the_compiler_gives(kernel):
    if json.loads(model.RECORD.read_text())["triton"] != triton.__version__:
        pytest.skip("the record was written with another Triton")
    tile = tuning.tile(kernel, 128, torch.bfloat16, 90)
    recorded = model.recorded()[model.name_of(kernel, torch.bfloat16, 128, tile)]
    assert sass.compiled(kernel, torch.bfloat16, 128, tile) == recorded


def test_a_stale_record_is_refused(tmp_path, monkeypatch, capsys):
    stale = json.loads(model.RECORD.read_text()) | {"sources": "0" * 64}
    monkeypatch.setattr(model, "RECORD", tmp_path / "cycles.json")
    model.RECORD.write_text(json.dumps(stale))
    model.recorded.cache_clear(), model.step_of.cache_clear()
    try:
        with pytest.raises(ValueError, match="made from other kernels: run python -m bench.model --record"):
            model.predict(one(64, 2, 8))
        assert model.main(["--row", "64"]) == 2 and "--record" in capsys.readouterr().err
    finally:
        model.recorded.cache_clear(), model.step_of.cache_clear()


def test_comments_do_not_make_a_record_stale(tmp_path, monkeypatch):
    for name in model.SOURCES:
        (tmp_path / name).write_text("# why\n\nx = 1\n")
    monkeypatch.setattr(attention, "__file__", str(tmp_path / "attention.py"))
    first = model.sources()
    (tmp_path / model.SOURCES[0]).write_text("x = 1\n    # another\n")
    assert model.sources() == first
    (tmp_path / model.SOURCES[0]).write_text("x = 2\n")
    assert model.sources() != first

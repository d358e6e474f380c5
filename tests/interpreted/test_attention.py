"""The attention kernels, interpreted, against the reference: values and every gradient, on hundreds of random rows."""

import pytest
import torch
from attention_cases import check, check_apart, random_case, run

from yojo_kernels import Layout, attention, launch, multi_response_attention, tiles, tuning

TILES = (
    tuning.Tile(16, 16, 1, 1),
    tuning.Tile(32, 16, 1, 1),
    tuning.Tile(16, 32, 1, 1),
    tuning.Tile(64, 64, 1, 1),
)


@pytest.fixture(autouse=True)
def poison():
    """Uninitialised memory is NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_these_tests_run_the_kernels():
    assert launch.INTERPRETED
    assert torch.empty(3).isnan().all()


LONG_ROWS = [(torch.float32, n, 30) for n in range(15)] + [(torch.float16, n, 30) for n in range(0, 15, 2)]


@pytest.mark.parametrize(
    "dtype, seeds, longest",
    [(torch.float32, n, 13) for n in range(5)]
    + [(torch.float16, n, 13) for n in (5, 6)]
    + [pytest.param(*rows, marks=[pytest.mark.soak] * (place > 0)) for place, rows in enumerate(LONG_ROWS)],
)
def test_results_are_as_exact_as_the_reference(dtype, seeds, longest, monkeypatch):
    monkeypatch.setattr(tiles, "SHORTEST_PIECE", 2)
    for seed in range(10 * seeds, 10 * seeds + 10):
        tile = TILES[seed % len(TILES)]
        with tuning.forced(forward=tile, query_grad=tile, key_grad=TILES[(seed + 1) % len(TILES)]):
            check(attention.multi_response_attention, random_case(seed, longest), dtype)


@pytest.mark.parametrize("dim", [16, 64, 72, 80, 96, 128, 256])
def test_head_dims(dim):
    check(attention.multi_response_attention, random_case(7, head_dims=(dim,)), torch.float32)


def test_above_128_keys_and_values_take_a_launch_each():
    assert len(attention.key_passes(torch.float16, 136)) == 2 > len(attention.key_passes(torch.float16, 128))
    check(attention.multi_response_attention, random_case(5, longest=12, head_dims=(136,)), torch.float16)


@pytest.mark.parametrize("seed", range(4))
def test_two_launches_give_what_one_gives(seed, monkeypatch):
    """To the bit, with tiles in pieces and values that are not finite, too."""
    monkeypatch.setattr(tiles, "SHORTEST_PIECE", 2)
    case = random_case(seed, longest=25)
    case["tensors"][seed][0, 0, 0] = float("inf")
    one = run(attention.multi_response_attention, case, torch.float32)
    each = [{"OF_KEYS": False, "OF_VALUES": True}, {"OF_KEYS": True, "OF_VALUES": False}]
    monkeypatch.setattr(attention, "key_passes", lambda dtype, head_dim: each)
    two = run(attention.multi_response_attention, case, torch.float32)
    assert all(torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, two, strict=True))


def test_many_heads_share_one():
    case = random_case(3)
    q, k, v, grad, grad_lse = case["tensors"]
    size, dim = q.shape[0], q.shape[2]
    case["tensors"] = [torch.randn(size, 7, dim), k[:, :1], v[:, :1], torch.randn(size, 7, dim), torch.randn(size, 7)]
    check(attention.multi_response_attention, case, torch.float32)


@pytest.mark.parametrize("group, packed", [(3, 3), (7, 7), (16, 8)])
def test_heads_that_share_a_key_head_lie_in_one_tile(group, packed):
    """Groups that do not divide the tile among them: the last rows of each tile then hold nothing."""
    case = random_case(group, longest=12, head_dims=(16,), heads=((2, group),))
    with tuning.forced(forward=tuning.Tile(128, 16, 1, 1)):
        assert tuning.packed_heads(group, 128) == packed
        check(attention.multi_response_attention, case, torch.float32)


def test_a_head_is_the_same_to_the_bit_whatever_is_packed_beside_it():
    row = Layout.build([37, 5], [[20, 9, 3], [14]])
    q, k, v = (torch.randn(row.num_tokens, heads, 16) for heads in (8, 2, 2))
    order = [2, 3, 0, 1, 5, 4, 7, 6]  # within the groups of 4
    with tuning.forced(forward=tuning.Tile(64, 16, 1, 1)):
        output, lse = multi_response_attention(q, k, v, row, return_lse=True, impl="triton")
        moved, moved_lse = multi_response_attention(q[:, order], k, v, row, return_lse=True, impl="triton")
        assert torch.equal(output[:, order], moved) and torch.equal(lse[:, order], moved_lse)
        with tuning.forced(packed=1):
            alone, alone_lse = multi_response_attention(q, k, v, row, return_lse=True, impl="triton")
    assert torch.allclose(alone, output, atol=1e-6) and torch.allclose(alone_lse, lse, atol=1e-6)
    assert {key[1][0] for key in row._tables if key[0] == "query_tiles"} == {16, 64}  # tokens of a tile


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_a_scale_of_zero_is_the_mean_of_what_is_seen(softcap):
    row = Layout.build([20], [[7, 30]])
    q, k, v = (torch.randn(57, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    got = multi_response_attention(q, k, v, row, scale=0.0, softcap=softcap, impl="triton")
    visible = row.visible().float()
    mean = (visible / visible.sum(1, keepdim=True)) @ v.detach()[:, 0]
    assert torch.allclose(got, mean[:, None].expand(-1, 2, -1), atol=1e-6)
    grads = torch.autograd.grad(got.sum(), (q, k, v))
    assert not grads[0].any() and not grads[1].any() and grads[2].isfinite().all()


def test_inputs_may_be_views_of_one_projection():
    case = random_case(5, longest=14)
    case["options"] = {"scale": 0.3, "window": None, "softcap": None}
    size = case["layout"].num_tokens
    fused = torch.randn(size, 4 + 2 + 2, 16, dtype=torch.float32)
    views = [fused[:, :4], fused[:, 4:6], fused[:, 6:]]
    heads_first = [view.transpose(0, 1).contiguous().transpose(0, 1) for view in views]
    grads = [torch.randn(size, 4, 16), torch.randn(size, 4)]
    case["tensors"] = [*views, *grads]
    expected = run(
        attention.multi_response_attention, {**case, "tensors": [*(v.clone() for v in views), *grads]}, torch.float32
    )
    for inputs in (views, heads_first):
        got = run(attention.multi_response_attention, {**case, "tensors": [*inputs, *grads]}, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_nan_in_one_sample_stays_there():
    row = Layout.build([9, 21, 5], [[3], [7, 30], [20]])
    tensors = [torch.randn(95, heads, 16) for heads in (2, 1, 1, 2)]
    clean = run(attention.multi_response_attention, {"layout": row, "options": {"scale": 0.25}, "tensors": [*tensors, torch.randn(95, 2)]}, torch.float32)  # fmt: skip
    for tensor in tensors:
        tensor[12:70] = float("nan")
    dirty = run(attention.multi_response_attention, {"layout": row, "options": {"scale": 0.25}, "tensors": [*tensors, torch.zeros(95, 2)]}, torch.float32)  # fmt: skip
    outside = torch.cat([torch.arange(12), torch.arange(70, 95)])
    assert torch.equal(clean[0][outside], dirty[0][outside]) and torch.equal(clean[1][outside], dirty[1][outside])
    assert all(grad[outside].isfinite().all() for grad in dirty[2:])
    assert dirty[0][12:70].isnan().all()


def test_launches_agree_to_the_bit(monkeypatch):
    monkeypatch.setattr(tiles, "SHORTEST_PIECE", 2)
    case = random_case(11)
    first, second = (run(attention.multi_response_attention, case, torch.float32) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("seed", [0, 1, 4])
def test_registered_as_torch_expects(seed):
    case = random_case(seed, longest=12)
    q, k, v = (tensor.float().requires_grad_() for tensor in case["tensors"][:3])
    row = case["layout"]
    tables = (row.query_tiles(16, 16), row.query_tiles(16, 16), *row.key_tiles(16, 16, 4))
    ids = (row.sample, row.branch, row.bounds, row.position, row.block)
    torch.library.opcheck(torch.ops.yojo.attention, (q, k, v, *ids, *tables, 0.3, 0, 0.0))


@pytest.fixture()
def large_tiles(monkeypatch):
    """A quarter of the steps, where what is computed is not what a test is about."""
    monkeypatch.setattr(tuning, "INTERPRETER", tuning.Tile(32, 32, 1, 1))


def test_compiles_once_for_all_lengths(large_tiles):
    compiled = []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def attend(q, k, v, row):
        return multi_response_attention(q, k, v, row, window=9, impl="triton")

    # No size of the first row equals another by chance: torch would compile for rows in which the two agree.
    for prompts, branches in (
        ([20, 3, 2, 6], [[5, 6], [4], [3], [2, 1]]),
        ([31, 4], [[5, 6, 9], [2]]),
    ):
        row = Layout.build(prompts, branches)._map(torch.clone)  # as one that was moved: all of it in one buffer
        q, k, v = (torch.randn(row.num_tokens, heads, 16, requires_grad=True) for heads in (14, 7, 7))
        expected = multi_response_attention(q, k, v, row, window=9, impl="triton")
        got = attend(q, k, v, row)
        assert torch.equal(got, expected)
        a = torch.autograd.grad(got.sum(), (q, k, v))
        b = torch.autograd.grad(expected.sum(), (q, k, v))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert len(compiled) == 1


@pytest.mark.parametrize("training", [pytest.param(False, marks=pytest.mark.soak), True])
def test_layers_share_their_tables_under_a_compiler(training):
    graphs = []

    def backend(graph, _):
        graphs.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def two_layers(q, k, v, row):
        row = row.for_one_pass()
        q = multi_response_attention(q, k, v, row, window=9, impl="triton")
        return multi_response_attention(q, k, v, row, window=9, impl="triton")

    for prompts, branches in (([20, 3, 2, 6], [[5, 6], [4], [3], [2, 1]]), ([31, 4], [[5, 6, 9], [2]])):
        row = Layout.build(prompts, branches)
        q, k, v = (torch.randn(row.num_tokens, heads, 16, requires_grad=training) for heads in (14, 7, 7))
        row.query_tiles(16, 16, 5)  # what a layout happens to hold makes no difference
        got = two_layers(q, k, v, row)
        expected = multi_response_attention(q, k, v, row, window=9, impl="triton")
        assert torch.equal(got, multi_response_attention(expected, k, v, row, window=9, impl="triton"))
    (nodes,) = graphs
    made = [sum(name in node for node in nodes) for name in ("position_extremes", "query_tiles", "key_tiles")]
    assert made == [1, 1, int(training)] and sum("attention" in node for node in nodes) == 2


def test_flops_are_those_of_the_visible_pairs():
    from torch.utils.flop_counter import FlopCounterMode

    for blocks, window in ((None, None), ([0] * 8 + [-1] * 30, None), (None, 4)):
        row = Layout.build([10, 3], [[8, 5], [12]], bidirectional=blocks)
        q, k, v = (torch.randn(38, heads, 16, requires_grad=True) for heads in (4, 2, 2))
        with FlopCounterMode(display=False) as counter:
            multi_response_attention(q, k, v, row, window=window, impl="triton").sum().backward()
        assert counter.get_total_flops() == 14 * 4 * 16 * int(row.visible(window).sum())


def test_flops_are_counted_anew_for_other_blocks():
    import dataclasses

    row = Layout.build([10], [[8, 5]], bidirectional=[0] * 8 + [-1] * 15)
    arguments = (row.sample, row.branch, row.position)
    assert attention.visible_pairs(*arguments, row.block, 0) == int(row.visible().sum())
    plain = dataclasses.replace(row, block=None)
    assert attention.visible_pairs(*arguments, None, 0) == int(plain.visible().sum()) < int(row.visible().sum())


def test_what_cannot_run_is_refused():
    row = Layout.build([4], [[2]])
    with pytest.raises(ValueError, match="takes bfloat16, float16 or float32, not float64"):
        multi_response_attention(*[torch.zeros(6, 1, 16, dtype=torch.float64)] * 3, row, impl="triton")
    with pytest.raises(ValueError, match="head dims up to 256, not 264"):
        multi_response_attention(*[torch.zeros(6, 1, 264)] * 3, row, impl="triton")


@pytest.mark.parametrize("compiled", [False, True])
def test_a_layout_made_and_scored_under_inference_mode_can_be_trained_on(compiled):
    def attend(q, k, v, row):
        return multi_response_attention(q, k, v, row, window=7, impl="triton")

    q, k, v = (torch.randn(31, heads, 16, requires_grad=True) for heads in (4, 2, 2))
    with torch.inference_mode():
        row = Layout.build([13], [[9, 9]], positions=torch.arange(31, dtype=torch.int32))
        layer = torch.compile(attend, backend="eager", fullgraph=True) if compiled else attend
        expected = layer(q, k, v, row.for_one_pass())
    output = attend(q, k, v, row)
    output.sum().backward()
    assert torch.equal(output, expected) and all(tensor.grad.isfinite().all() for tensor in (q, k, v))
    assert not any(table.is_inference() for kept in row._tables.values() for table in kept)


def test_keys_at_minus_infinity_count_for_nothing():
    """Whole steps of them, before and behind others: NaN only where the reference has it."""
    row = Layout.build([70], [[20, 9]])
    q, k, v = torch.rand(99, 2, 16), torch.randn(99, 1, 16), torch.randn(99, 1, 16)
    k[:40] = float("-inf")
    got = multi_response_attention(q, k, v, row, return_lse=True, impl="triton")
    expected = multi_response_attention(q, k, v, row, return_lse=True, impl="reference")
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one[40:].isnan(), other[40:].isnan()) and not one[40:].isnan().any()
        assert torch.allclose(one[40:], other[40:], atol=1e-5)


def test_only_the_rows_of_the_sample_are_read():
    """Padding of the last tile, gaps between heads and rows: all NaN, none of it used."""
    row = Layout.build([19], [[7, 4]])
    room = torch.full((row.num_tokens + 8, 6, 40), float("nan"))
    views = [room[4:-4, heads, 3:23] for heads in (slice(0, 2), slice(2, 3), slice(4, 5))]
    for view in views:
        view.copy_(torch.randn(view.shape))
    clean = [view.clone().requires_grad_() for view in views]
    views = [view.detach().requires_grad_() for view in views]
    got, expected = (multi_response_attention(*inputs, row, impl="triton") for inputs in (views, clean))
    assert torch.equal(got, expected) and got.isfinite().all()
    grads = [torch.autograd.grad(output.square().sum(), inputs) for output, inputs in ((got, views), (expected, clean))]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_what_is_not_finite_stays_with_those_who_see_it(seed, monkeypatch):
    monkeypatch.setattr(tiles, "SHORTEST_PIECE", 1)  # tiles of keys whose queries are split into pieces, too
    tile = tuning.Tile(16, 16, 1, 1)
    with tuning.forced(forward=tuning.Tile(32, 16, 1, 1), query_grad=tile, key_grad=tile):  # two heads in a tile
        case = random_case(seed, longest=14, head_dims=(16, 20), heads=((1, 1), (1, 2)))
        check_apart(attention.multi_response_attention, case, torch.float32, 1e-4, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_with_a_window_nothing_is_heard_behind_the_last_query_that_sees(dtype):
    """Keys' queries end within a step, where the mask alone tells a window's: rows behind it are read as the last one is."""
    generator = torch.Generator().manual_seed(0)
    row = Layout.build([0], [[60]])
    size = 4 if dtype == torch.float16 else 30  # exp(score - lse) of a row that is not seen overflows
    q = torch.ones(60, 1, 16)
    k = -(size + torch.rand(60, 1, 16, generator=generator))
    v, grad = torch.randn(2, 60, 1, 16, generator=generator)
    case = {"layout": row, "options": {"scale": 0.25, "window": 5, "softcap": None}}
    case["tensors"] = [tensor.double() for tensor in (q, k, v, grad, torch.zeros(60, 1))]
    check(attention.multi_response_attention, case, dtype)


def test_with_a_window_what_is_not_finite_stays_with_those_who_see_it():
    """In the last rows of a tile's queries and the first ones behind them."""
    row = Layout.build([9], [[20, 12]])
    for broken in (13, 19, 20, 28, 31, 36):
        generator = torch.Generator().manual_seed(broken)
        inputs = [torch.randn(41, 1, 16, generator=generator).requires_grad_() for _ in range(3)]
        grad = torch.randn(41, 1, 16, generator=generator)

        def gradients(inputs, grad=grad):
            output, _ = attention.multi_response_attention(*inputs, row, scale=0.25, window=5)
            return torch.autograd.grad(output, inputs, grad)

        clean = gradients(inputs)
        poisoned = [inputs[0].detach().clone().requires_grad_(), *inputs[1:]]
        poisoned[0].data[broken] = float("nan")
        heard = row.visible(5)[broken]
        for got, before in zip(gradients(poisoned)[1:], clean[1:], strict=True):
            assert got[heard].isnan().all() and torch.allclose(got[~heard], before[~heard], atol=1e-5)


@pytest.mark.parametrize("scale", [-1e-46, *(pytest.param(s, marks=pytest.mark.soak) for s in (1e-46, 1e-300))])
def test_a_scale_that_float32_does_not_hold_is_none(scale):
    case = random_case(3, head_dims=(16,))
    case["options"] = {"scale": scale, "window": None, "softcap": None}
    check(attention.multi_response_attention, case, torch.float32)


@pytest.mark.parametrize("kernel, of", [("query_grad", "queries"), ("key_grad", "keys")])
def test_a_backward_with_smaller_tiles_than_its_tables_is_refused(kernel, of):
    """Tables are made by the forward: other tiles since would leave rows without gradients."""
    row = Layout.build([40], [[30, 20]])
    inputs = [torch.randn(90, 1, 16, requires_grad=True) for _ in range(3)]
    with tuning.forced(**{kernel: tuning.Tile(64, 64, 1, 1)}):
        output = multi_response_attention(*inputs, row, impl="triton")
    with pytest.raises(AssertionError, match=f"larger tiles of {of}"):
        output.sum().backward()

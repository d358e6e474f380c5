"""Attention segment by segment, which runs on CPUs, against the reference: values and every gradient."""

import dataclasses
import math

import pytest
import torch
from attention_cases import random_case, rounding, run

from yojo_kernels import AttentionCall, Layout, causal, choose_attention, multi_response_attention, reference, segments

CPU = torch.device("cpu")


def compare(case, function=segments.multi_response_attention, dtype=torch.float64, bound=1e-13):
    """Largest differences to the reference relative to the largest entry, output and gradients of q, k and v."""
    case["options"]["softcap"] = None

    def without_lse(*args, **options):
        output, _ = function(*args, **options)
        return output, output.sum(-1)  # `run` wants a second result

    def reference_without_lse(*args, **options):
        output, _ = reference.multi_response_attention(*args, **options)
        return output, output.sum(-1)

    got, expected = run(without_lse, case, dtype), run(reference_without_lse, case, dtype)
    for name, one, other in zip(("output", "", "grad q", "grad k", "grad v"), got, expected, strict=True):
        assert (one - other).abs().max() <= bound * other.abs().max().clamp(min=1), name


def heads_first(tensor):
    """[1, H, T, D] of [T, H, D], as models hand it to attention."""
    return tensor.transpose(0, 1)[None]


@pytest.fixture()
def apart(monkeypatch):
    """No sample is so short that one call computes all of it, as most are in these tests."""
    monkeypatch.setattr(segments, "SPARED", float("-inf"))


@pytest.mark.parametrize("seed", range(60))
def test_it_is_the_reference(seed, apart):
    compare(random_case(seed))


@pytest.mark.parametrize("seed", range(60))
def test_short_samples_in_one_call_are_the_reference(seed):
    compare(random_case(seed))


@pytest.mark.parametrize("masks", [0, 20_000])  # bytes of masks that are kept; others are made in every layer
@pytest.mark.parametrize("seed", range(0, 60, 4))
def test_branches_in_several_calls(seed, masks, apart, monkeypatch):
    monkeypatch.setattr(segments, "GATHER_BYTES", 20_000)
    monkeypatch.setattr(segments, "MASK_BYTES", masks)
    compare(random_case(seed))


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2e-6), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)])
@pytest.mark.parametrize("seed", range(8))
def test_other_precisions(seed, dtype, bound):
    compare(random_case(seed), dtype=dtype, bound=bound)


@pytest.mark.parametrize("prompts, branches", [([5], [[]]), ([0], [[4]]), ([3, 4], [[], [2, 2]]), ([6], [[3, 3, 3]])])
def test_rows_with_empty_parts(prompts, branches):
    layout = Layout.build(prompts, branches)
    generator = torch.Generator().manual_seed(0)
    tensors = [
        torch.randn(layout.num_tokens, heads, 8, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)
    ]
    output, lse = segments.multi_response_attention(*tensors, layout, scale=0.3)
    assert lse is None
    expected, _ = reference.multi_response_attention(*tensors, layout, scale=0.3)
    assert (output - expected).abs().max() <= 1e-14


@pytest.fixture()
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def test_two_calls_agree_to_the_bit(two_threads):
    layout = Layout.build([600], [[100] * 4])
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(layout.num_tokens, heads, 32, generator=generator).requires_grad_() for heads in (4, 2, 2)]
    grad = torch.randn(layout.num_tokens, 4, 32, generator=generator)
    results = []
    for _ in range(4):
        output = multi_response_attention(*tensors, layout)
        results.append([output, *torch.autograd.grad(output, tensors, grad)])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


@pytest.mark.parametrize("scale", [0.0, -0.7])
@pytest.mark.parametrize("seed", range(4))
def test_scales_that_are_not_positive(seed, scale):
    case = random_case(seed)
    case["options"]["scale"] = scale
    compare(case)


@pytest.mark.parametrize("scale", [0.0, -0.7, 0.7])
def test_causal_rows_take_any_scale(scale):
    layout = Layout.build([9], [[6]])
    generator = torch.Generator().manual_seed(0)
    query, key, value = (
        torch.randn(15, heads, 8, generator=generator, dtype=torch.float64, requires_grad=True) for heads in (4, 2, 2)
    )
    output, _ = causal.sdpa(query, key, value, layout, scale=scale)
    expected, _ = reference.multi_response_attention(query, key, value, layout, scale=scale)
    assert (output - expected).abs().max() <= 1e-13
    for got, exact in zip(
        *(torch.autograd.grad(o.square().sum(), (query, key, value)) for o in (output, expected)), strict=True
    ):
        assert (got - exact).abs().max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(12))
def test_the_rows_that_are_read(seed, dtype):
    """Values and gradients, sample by sample; in float32 at least."""
    case = random_case(seed)
    case["options"]["softcap"] = None
    layout = case["layout"]
    rows = torch.cat([torch.tensor([stop - 1, start, stop - 1]) for start, stop in layout.sample_spans()[::2]])
    counts = [3 * (s % 2 == 0) for s in range(layout.num_samples)]
    grad = case["tensors"][3][rows].to(dtype)
    results = []
    for module in (segments, reference):
        leaves = [tensor.to(dtype).requires_grad_() for tensor in case["tensors"][:3]]
        query = leaves[0][rows]
        output, _ = module.attention_of_rows(query, *leaves[1:], layout, rows, counts, **case["options"])
        assert output.dtype == dtype
        results.append([output, *torch.autograd.grad(output, leaves, grad)])
    for name, one, other in zip(("output", "grad q", "grad k", "grad v"), *results, strict=True):
        bound = {torch.float64: 1e-13, torch.float32: 5e-6, torch.bfloat16: 1e-2}[dtype]
        assert (one - other).abs().max() <= bound * other.abs().max().clamp(min=1), name


def test_the_public_function_reads_rows_here(monkeypatch):
    layout, rows = Layout.build([6, 2], [[3, 3], [4]]), torch.tensor([8, 11, 17])
    query, key, value = (torch.randn(18, heads, 8) for heads in (4, 2, 2))
    chosen = {"query_rows": rows, "query_counts": (2, 1)}
    expected = multi_response_attention(query[rows], key, value, layout, impl="reference", **chosen)
    monkeypatch.setattr(reference, "attention_of_rows", None)
    assert (multi_response_attention(query[rows], key, value, layout, **chosen) - expected).abs().max() <= 1e-6


def test_products_beyond_float32_stay_with_their_pair():
    """Finite queries and keys of branches that do not see each other, in one call and for rows that are read."""
    layout = Layout.build([2], [[2, 2]])
    query, key, value = (torch.ones(6, 1, 8) for _ in range(3))
    expected, _ = segments.multi_response_attention(query, key, value, layout, scale=0.3)
    query[2:4], key[4:] = 1e25, 1e25
    output, _ = segments.multi_response_attention(query, key, value, layout, scale=0.3)
    assert torch.equal(output[:4], expected[:4])  # all see equal values
    rows = torch.tensor([3, 1])
    output, _ = segments.attention_of_rows(query[rows], key, value, layout, rows, [2], scale=0.3)
    assert torch.equal(output, expected[rows])


@pytest.mark.parametrize("window", [None, 3])
def test_a_row_is_planned_once(window, monkeypatch):
    layout = Layout.build([6, 5], [[3, 3], [4]])
    tensors = [torch.randn(21, heads, 8) for heads in (4, 2, 2)]
    with torch.inference_mode():
        first, _ = segments.multi_response_attention(*tensors, layout, scale=0.3, window=window)
    for name in ("_plan", "_visible", "_added"):
        monkeypatch.setattr(segments, name, None)
    leaves = [tensor.requires_grad_() for tensor in tensors]
    second, _ = segments.multi_response_attention(*leaves, layout, scale=0.3, window=window)
    assert torch.equal(first, second)
    second.sum().backward()  # what was planned while scoring may be trained on
    third, _ = segments.multi_response_attention(*tensors, layout.for_one_pass(), scale=0.3, window=window)
    assert torch.equal(first, third)
    for other in (layout.to("meta"), dataclasses.replace(layout, position=layout.position + 1)):
        assert layout._plans and other._plans == {}


def test_company_changes_no_bit_of_a_sample():
    """What is called for a sample is decided by its own lengths."""
    generator = torch.Generator().manual_seed(0)
    alone = Layout.build([30], [[9, 9, 4]])
    tensors = [torch.randn(52, heads, 32, generator=generator) for heads in (4, 2, 2)]
    more = [torch.randn(700, heads, 32, generator=generator) for heads in (4, 2, 2)]
    together = Layout.build([30, 500], [[9, 9, 4], [100, 100]])
    expected, _ = segments.multi_response_attention(*tensors, alone, scale=0.3)
    both = [torch.cat(pair) for pair in zip(tensors, more, strict=True)]
    output, _ = segments.multi_response_attention(*both, together, scale=0.3)
    assert torch.equal(output[:52], expected)
    assert torch.equal(segments.whole_row(*map(heads_first, tensors), alone, 0.3, None)[0], expected)


def test_branches_of_very_different_lengths_do_not_fill_each_other_up():
    rows = [slice(0, 100), *(slice(100 + n, 101 + n) for n in range(50)), slice(150, 210)]
    groups = [sorted(group) for group in segments._groups(rows, prompt=10, token_bytes=8)]
    assert groups == [[0, 51], list(range(1, 51))]


def test_it_runs_on_cpus_where_it_can():
    call = AttentionCall(CPU, torch.float32, 64)
    for is_causal in (False, True):
        assert choose_attention(call._replace(causal=is_causal))[0] == "segments"
    for changes in ({"lse": True}, {"softcap": True}):
        assert choose_attention(call._replace(**changes))[0] == "reference"
    assert not segments.takes(call._replace(device=torch.device("cuda", 0)))


def test_lengths_are_not_compiled_in():
    """Under torch.compile it is the reference, of which one graph serves all layouts."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(lambda q, k, v, layout: multi_response_attention(q, k, v, layout), backend=backend)
    for branches in ([3, 4], [2, 5], [1, 1, 5]):
        layout = Layout.build([6], [branches])
        tensors = [torch.randn(13, heads, 8) for heads in (4, 2, 2)]
        expected = multi_response_attention(*tensors, layout)
        assert (compiled(*tensors, layout) - expected).abs().max() <= 1e-6
    assert graphs and not any("scaled_dot_product" in str(graph.graph) for graph in graphs)


@pytest.mark.parametrize(
    "dtype, large, gradient", [(torch.float32, 1e18, 1e22), (torch.float64, 1e150, 1e180), (torch.bfloat16, 1e18, 1e22)]
)
@pytest.mark.parametrize("prompts, branches", [([3], [[4, 4]]), ([3], [[4]]), ([30], [[20, 15]])])
def test_gradients_times_values_nobody_sees_may_be_beyond_the_dtype(dtype, large, gradient, prompts, branches):
    layout = Layout.build(prompts, branches)
    generator = torch.Generator().manual_seed(0)
    query, key, value, grad = (
        torch.randn(layout.num_tokens, heads, 16, generator=generator).to(dtype) for heads in (4, 2, 2, 4)
    )
    sizes = []  # of what is summed up: no sum holds both a large value and a large gradient
    for first, place, number in ((value, -1, large), (grad, 3, gradient)):
        before = first[place].clone()
        first[place] = number
        case = {"layout": layout, "options": {"scale": 0.25, "window": None, "softcap": None}}
        sizes.append(rounding({**case, "tensors": [query, key, value, grad, torch.zeros(layout.num_tokens, 4)]}, dtype))
        first[place] = before
    value[-1], grad[3] = large, gradient  # row 3 does not see the last one
    found = []
    for impl in ("auto", "reference"):
        inputs = [tensor.clone().requires_grad_() for tensor in (query, key, value)]
        multi_response_attention(*inputs, layout, impl=impl).backward(grad)
        found.append([tensor.grad for tensor in inputs])
    for ours, exact, *units in zip(*found, *(size[2:] for size in sizes), strict=True):
        assert ours.isfinite().all()
        unit = max(units) * torch.finfo(dtype).eps / torch.finfo(torch.float32).eps
        assert (ours - exact).abs().max() <= unit


def test_autocast_does_not_narrow_what_it_is_given():
    layout = Layout.build([3], [[4, 4]])
    query, key, value = (torch.randn(11, heads, 16) for heads in (4, 2, 2))
    value[4] = 1e5  # beyond float16
    for impl in ("auto", "reference"):
        expected = multi_response_attention(query, key, value, layout, impl=impl)
        with torch.autocast("cpu", torch.float16):
            assert torch.equal(multi_response_attention(query, key, value, layout, impl=impl), expected)


def test_a_layout_that_was_written_to_is_planned_anew():
    layout = Layout.build([9], [[4, 4]])
    inputs = [torch.randn(17, heads, 16) for heads in (4, 2, 2)]
    same = [heads_first(tensor) for tensor in inputs]
    multi_response_attention(*inputs, layout, window=2)
    assert segments.whole_row(*same, layout, 0.25, 2) is not None
    layout.position.mul_(3)
    expected = multi_response_attention(*inputs, layout, window=2, impl="reference")
    assert torch.allclose(multi_response_attention(*inputs, layout, window=2), expected, atol=1e-6)
    assert torch.allclose(segments.whole_row(*same, layout, 0.25, 2)[0], expected, atol=1e-6)


# ---- heads first, as models hand them ----


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("seed", range(12))
def test_heads_may_come_first(seed, impl, dtype):
    """To the bit, scored and trained; also stored heads first, not only viewed so."""
    case = random_case(seed)
    tensors, grad, layout = [t.to(dtype) for t in case["tensors"][:3]], case["tensors"][3].to(dtype), case["layout"]
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    expected, lse = multi_response_attention(*leaves, layout, return_lse=True, impl=impl, **case["options"])
    for stored in (heads_first, lambda tensor: heads_first(tensor).contiguous()):
        output, lse_here = multi_response_attention(
            *map(stored, leaves), layout, return_lse=True, heads_first=True, impl=impl, **case["options"]
        )
        assert output.shape == (1, *expected.shape) and torch.equal(output[0], expected)
        assert torch.equal(lse_here[0], lse)
    options = {**case["options"], "impl": impl}
    expected = multi_response_attention(*leaves, layout, **options)
    gradients = torch.autograd.grad(expected, leaves, grad)
    output = multi_response_attention(*map(heads_first, leaves), layout, heads_first=True, **options)
    assert torch.equal(output[0], expected)
    for one, other in zip(torch.autograd.grad(output[0], leaves, grad), gradients, strict=True):
        assert torch.equal(one, other)
    for stored in (heads_first, lambda tensor: heads_first(tensor).contiguous()):
        scored = multi_response_attention(*map(stored, tensors), layout, heads_first=True, **options)
        assert torch.equal(scored[0], expected)
    rows = torch.tensor([layout.num_tokens - 1, 0])
    chosen = multi_response_attention(tensors[0][rows], *tensors[1:], layout, query_rows=rows, **options)
    inputs = map(heads_first, (tensors[0][rows], *tensors[1:]))
    output = multi_response_attention(*inputs, layout, query_rows=rows, heads_first=True, **options)
    assert torch.equal(output[0], chosen)


ONE_CALL = [([4], [[9]]), ([4], [[3, 6]]), ([13], [[]]), ([0], [[13]])]


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("prompts, branches", ONE_CALL)
def test_a_short_row_that_is_scored_takes_the_shortest_way(prompts, branches, window):
    layout = Layout.build(prompts, branches)
    tensors = [torch.randn(13, heads, 16) for heads in (4, 2, 2)]
    exact = multi_response_attention(*tensors, layout, window=window, impl="reference")
    inputs = [heads_first(tensor) for tensor in tensors]
    segments.whole_row(*inputs, layout, 0.25, 2 if window is None else None)  # other calls over the same row
    output = segments.whole_row(*inputs, layout, 0.25, window)
    assert (output[0] - exact).abs().max() <= 1e-6
    with torch.inference_mode():
        assert torch.equal(segments.whole_row(*inputs, layout, 0.25, window), output)
    with torch.autocast("cpu", torch.bfloat16):
        assert segments.whole_row(*inputs, layout, 0.25, window) is None
        expected = multi_response_attention(*tensors, layout, window=window)
        assert torch.equal(multi_response_attention(*inputs, layout, window=window, heads_first=True)[0], expected)
    inputs[1].requires_grad_()
    assert segments.whole_row(*inputs, layout, 0.25, window) is None
    with torch.no_grad():
        assert torch.equal(segments.whole_row(*inputs, layout, 0.25, window), output)


@pytest.mark.parametrize("prompts, branches", ONE_CALL)
@pytest.mark.parametrize(
    "place, poison", [*((n, float(bad)) for n in range(3) for bad in ("nan", "inf")), (0, 1e25), (1, 1e25), (0, 1e15)]
)
def test_on_the_shortest_way_what_is_not_finite_stays_with_those_who_see_it(prompts, branches, place, poison):
    layout = Layout.build(prompts, branches)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(13, heads, 16, generator=generator) for heads in (4, 2, 2)]
    scale = 1e12 if poison == 1e15 else 0.25
    assert segments.whole_row(*map(heads_first, tensors), layout, scale, None) is not None
    tensors[place][5, :, 3] = poison
    if poison in (1e15, 1e25):
        tensors[1 - place][5, :, 3] = poison  # their product, or that times the scale, is beyond float32
    assert segments.whole_row(*map(heads_first, tensors), layout, scale, None) is None
    expected = multi_response_attention(*tensors, layout, scale=scale, impl="reference")
    output = multi_response_attention(*map(heads_first, tensors), layout, scale=scale, heads_first=True)
    assert torch.allclose(output[0], expected, rtol=1e-5, atol=1e-6, equal_nan=True)
    if not math.isfinite(poison):
        visible = layout.visible()[:, 5] if place else torch.arange(13) == 5
        assert torch.equal(output[0].isfinite().all(-1).all(-1), ~visible)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"query": torch.zeros(13, 4, 16)}, ValueError, r"query must have shape \[1, heads, tokens, head dim\]"),
        ({"key": torch.zeros(2, 2, 13, 16)}, ValueError, "key must have shape .* a packed row is one row"),
        ({"value": None}, TypeError, "value must be a tensor, got NoneType"),
        (
            {name: torch.zeros(2, 2, 13, 16) for name in ("query", "key", "value")},
            ValueError,
            "a packed row is one row",
        ),
        ({"key": torch.zeros(1, 2, 12, 16)}, ValueError, "key must have the 13 tokens of query, got 12"),
        ({"value": torch.zeros(1, 1, 13, 16)}, ValueError, "key and value must have the same heads, got 2 and 1"),
        ({"key": torch.zeros(1, 2, 13, 16).half()}, TypeError, "key must have the dtype of query"),
        ({"query": torch.zeros(1, 3, 13, 16)}, ValueError, "query heads must be a multiple of key heads"),
        ({"layout": None}, TypeError, "layout must be a Layout"),
        ({"layout": Layout.build([12], [[]])}, ValueError, "layout describes 12 tokens, query has 13"),
        ({"layout": Layout.build([13], [[]]).to("meta")}, ValueError, "layout is on meta, query on cpu"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": True}, TypeError, "window must be an int"),
        ({"scale": float("nan")}, ValueError, "scale must be finite"),
        ({"scale": "x"}, TypeError, "scale must be a number"),
        ({"softcap": -1.0}, ValueError, "softcap must be above 0"),
        ({"impl": "cuda"}, ValueError, "impl must be one of"),
        ({"query_counts": [1]}, ValueError, "query_counts says how query_rows"),
    ],
)
def test_heads_first_is_refused_what_tokens_first_is(changes, error, message):
    arguments = {"query": torch.zeros(1, 4, 13, 16), "layout": Layout.build([13], [[]]), "scale": 0.25}
    arguments |= {name: torch.zeros(1, 2, 13, 16) for name in ("key", "value")} | changes
    with pytest.raises(error, match=message):
        multi_response_attention(**arguments, heads_first=True)


# ---- plans: bounds of memory and time, which no result shows ----


def plan_of(prompts, branches, width=64):
    ((_, calls),) = segments._plan(Layout.build(prompts, branches), None, torch.float32, width, 512)
    return [(len(call.runs), call.mask is not None) for call in calls]


def test_calls_of_their_own_are_made_where_they_spare_something(monkeypatch):
    assert plan_of([8], [[3, 3]]) == [(1, True)]  # the whole sample, masked
    assert plan_of([1000], [[300] * 4]) == [(1, False), (4, True)]  # its prompt, and all branches at once
    monkeypatch.setattr(segments, "SPARED", float("-inf"))
    assert plan_of([8], [[3, 3]]) == [(1, False), (2, True)]


def test_masks_are_kept_while_there_is_room(monkeypatch):
    monkeypatch.setattr(segments, "SPARED", float("-inf"))
    monkeypatch.setattr(segments, "MASK_BYTES", 2 * 3 * 11 * 4)
    assert plan_of([8], [[3, 3]]) == [(1, False), (2, True)]
    monkeypatch.setattr(segments, "MASK_BYTES", 3 * 11 * 4 - 1)
    assert plan_of([8], [[3, 3]]) == [(1, False), (2, False)]


def test_branches_of_a_call_are_at_most_twice_as_long_as_each_other(monkeypatch):
    def groups(*lengths):
        ends = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
        return list(segments._groups([slice(*pair) for pair in zip(ends, ends[1:], strict=False)], 5, 10))

    assert groups(8, 4, 8) == [[0, 2, 1]] and groups(9, 4, 9) == [[0, 2], [1]]
    monkeypatch.setattr(segments, "GATHER_BYTES", 2 * (5 + 8) * 10)
    assert groups(8, 8, 8, 4) == [[0, 1], [2, 3]]


def test_rows_whose_mask_is_too_large_are_left_to_the_reference(monkeypatch):
    row = Layout.build([12], [[8]])
    monkeypatch.setattr(segments, "MASK_BYTES", 4 * 3 * 20)
    monkeypatch.setattr(reference, "attention_of_rows", lambda *args, **options: "the reference")
    inputs = [torch.randn(rows, 1, 4) for rows in (3, 20, 20)]
    few = segments.attention_of_rows(*inputs, row, torch.tensor([1, 5, 19]), [3], scale=0.5)
    assert few[0].shape == (3, 1, 4)
    inputs[0] = torch.randn(4, 1, 4)
    assert segments.attention_of_rows(*inputs, row, torch.tensor([1, 5, 19, 2]), [4], scale=0.5) == "the reference"

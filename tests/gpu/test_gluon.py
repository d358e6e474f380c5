"""The Gluon forward on a Hopper GPU: as exact as the reference, the same bits at every launch, NaN kept apart."""

import pytest
import torch
from attention_cases import check, check_apart, random_case

from yojo_kernels import Layout, gluon_attention, multi_response_attention

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def possible():
    """Skips where there is no Gluon or no Hopper; where there are both and it cannot run, tests fail."""
    if gluon_attention.MISSING is not None:
        pytest.skip(gluon_attention.MISSING)
    if torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("the Gluon forward is for Hopper GPUs (compute capability 9.0)")


def on_gpu(case):
    return {
        **case,
        "layout": case["layout"].to("cuda"),
        "tensors": [tensor.cuda() for tensor in case["tensors"]],
    }


@pytest.mark.parametrize("dtype", gluon_attention.DTYPES)
@pytest.mark.parametrize("longest", [30, 400])
@pytest.mark.parametrize("seeds", range(4))
def test_results_are_as_exact_as_the_reference(dtype, longest, seeds, poison):
    for seed in range(25 * seeds, 25 * seeds + 25):
        case = random_case(seed, longest, head_dims=gluon_attention.HEAD_DIMS, heads=((2, 2), (1, 3)))
        check(gluon_attention.multi_response_attention, on_gpu(case), dtype)


@pytest.mark.parametrize("dtype", gluon_attention.DTYPES)
def test_what_is_not_finite_stays_with_those_who_see_it(dtype, poison):
    for seed in range(10):
        case = random_case(seed, 250, head_dims=gluon_attention.HEAD_DIMS, heads=((1, 2),))
        check_apart(gluon_attention.multi_response_attention, on_gpu(case), dtype, 2e-2, seed)


def row_of(prompts, branches, dim, heads=(8, 2)):
    layout = Layout.build(prompts, branches, device="cuda")
    make = lambda h: torch.randn(layout.num_tokens, h, dim, dtype=torch.bfloat16, device="cuda")  # noqa: E731
    return layout, [make(heads[0]), make(heads[1]), make(heads[1])]


@pytest.mark.parametrize("dim", gluon_attention.HEAD_DIMS)
def test_a_thousand_launches_agree_to_the_bit(dim):
    layout, inputs = row_of([5000, 300], [[200] * 7, [31, 64, 129]], dim)
    first = multi_response_attention(*inputs, layout, return_lse=True, impl="gluon")
    for _ in range(1000):
        results = multi_response_attention(*inputs, layout, return_lse=True, impl="gluon")
        assert all(map(torch.equal, results, first))


@pytest.mark.parametrize("dim", gluon_attention.HEAD_DIMS)
def test_long_rows_are_as_the_triton_kernel_has_them(dim):
    layout, inputs = row_of([40_000, 1_000], [[500] * 16, [333] * 3], dim, heads=(4, 1))
    (ours, ours_lse), (theirs, theirs_lse) = (
        multi_response_attention(*inputs, layout, return_lse=True, impl=impl) for impl in ("gluon", "triton")
    )
    assert torch.allclose(ours_lse, theirs_lse, atol=1e-3, rtol=1e-4)
    error, size = (ours.float() - theirs.float()).square().mean().sqrt(), theirs.float().square().mean().sqrt()
    assert error <= 2 * torch.finfo(torch.bfloat16).eps * size


@pytest.mark.parametrize("dim", gluon_attention.HEAD_DIMS)
def test_heads_first_storage(dim):
    layout, inputs = row_of([700], [[90] * 5], dim)
    heads_first = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in inputs]
    got, expected = (multi_response_attention(*each, layout, impl="gluon") for each in (heads_first, inputs))
    assert torch.equal(got, expected)


def test_a_graph_can_hold_it():
    layout, inputs = row_of([700], [[90] * 5], 128)
    expected = multi_response_attention(*inputs, layout, impl="gluon")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = multi_response_attention(*inputs, layout, impl="gluon")
    output.zero_()
    graph.replay()
    assert torch.equal(output, expected)

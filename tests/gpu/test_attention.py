"""The attention kernels on a GPU: exact on thousands of random rows, the same bits at every launch, long rows."""

import pytest
import torch
from attention_cases import check, random_case

from yojo_kernels import Layout, attention, multi_response_attention


def on_gpu(case):
    return {
        **case,
        "layout": case["layout"].to("cuda"),
        "tensors": [tensor.cuda() for tensor in case["tensors"]],
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("longest", [30, 200, 700])
def test_results_are_as_exact_as_the_reference(dtype, longest):
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills uninitialised memory with NaN
    try:
        for seed in range(400):
            case = on_gpu(random_case(seed, longest, head_dims=(16, 64, 72, 80, 96, 128, 256)))
            check(attention.multi_response_attention, case, dtype)
    finally:
        torch.use_deterministic_algorithms(False)


def row_of(prompts, branches, heads=(8, 2), dim=128, dtype=torch.bfloat16):
    layout = Layout.build(prompts, branches, device="cuda")
    make = lambda h: torch.randn(layout.num_tokens, h, dim, dtype=dtype, device="cuda", requires_grad=True)  # noqa: E731
    return layout, [make(heads[0]), make(heads[1]), make(heads[1])]


def test_a_thousand_launches_agree_to_the_bit():
    layout, inputs = row_of([5000, 300], [[200] * 7, [31, 64, 129]])
    grad = first = None
    for _ in range(1000):
        output, lse = multi_response_attention(*inputs, layout, return_lse=True, impl="triton")
        grad = torch.randn_like(output) if grad is None else grad
        results = [output, lse, *torch.autograd.grad(output, inputs, grad)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


def test_a_row_of_100_000_tokens():
    layout, inputs = row_of([90_000, 1_000], [[500] * 16, [333] * 3], heads=(4, 1))
    output = multi_response_attention(*inputs, layout, impl="triton")
    output.sum().backward()
    assert output.isfinite().all() and all(tensor.grad.isfinite().all() for tensor in inputs)
    # The last branch of the first sample, computed alone: its prompt and itself.
    rows = torch.cat([torch.arange(90_000), torch.arange(97_500, 98_000)]).cuda()
    alone = torch.nn.functional.scaled_dot_product_attention(
        *(tensor[rows].transpose(0, 1)[None] for tensor in inputs), is_causal=True, enable_gqa=True
    )[0].transpose(0, 1)
    assert torch.allclose(output[97_500:98_000], alone[-500:], atol=2e-2, rtol=2e-2)


def test_a_graph_replays_what_was_captured():
    layout, inputs = row_of([700], [[50, 80, 20]])
    expected = multi_response_attention(*inputs, layout, impl="triton")
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = multi_response_attention(*inputs, layout, impl="triton")
    captured.detach().zero_()
    graph.replay()
    assert torch.equal(captured, expected)

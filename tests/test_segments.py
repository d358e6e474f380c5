"""Attention segment by segment, which runs on CPUs, against the reference: values and every gradient."""

import dataclasses

import pytest
import torch
from attention_cases import random_case, run

from yojo_kernels import AttentionCall, Layout, choose_attention, multi_response_attention, reference, segments

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


@pytest.mark.parametrize("seed", range(60))
def test_it_is_the_reference(seed):
    compare(random_case(seed))


@pytest.mark.parametrize("seed", range(0, 60, 4))
def test_branches_in_several_calls(seed, monkeypatch):
    monkeypatch.setattr(segments, "GATHER_BYTES", 20_000)
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


def test_two_calls_agree_to_the_bit():
    case = random_case(3)
    layout, tensors = case["layout"], [tensor.float().requires_grad_() for tensor in case["tensors"][:3]]
    results = []
    for _ in range(2):
        output = multi_response_attention(*tensors, layout)
        results.append([output, *torch.autograd.grad(output.sum(), tensors)])
    assert all(torch.equal(one, other) for one, other in zip(*results, strict=True))


def test_it_runs_on_cpus_where_it_can():
    call = AttentionCall(CPU, torch.float32, 64)
    for causal in (False, True):
        assert choose_attention(dataclasses.replace(call, causal=causal))[0] == "segments"
    for changes in ({"lse": True}, {"softcap": True}):
        assert choose_attention(dataclasses.replace(call, **changes))[0] == "reference"
    assert not segments.takes(dataclasses.replace(call, device=torch.device("cuda", 0)))


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

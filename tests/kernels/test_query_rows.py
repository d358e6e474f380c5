"""Attention for the queries of some rows alone: the rows of the whole, with the same gradients."""

import pytest
import torch
from attention_cases import random_case

from yojo_kernels import Layout, multi_response_attention, reference


def some_rows(layout, seed):
    """Rows sample by sample, out of order and some twice, one sample without any; and how many each sample has."""
    generator = torch.Generator().manual_seed(seed)
    counts = [(seed + 2 * s) % 4 for s in range(layout.num_samples)]
    counts[0] = max(counts[0], 1)
    rows = [
        torch.randint(start, stop, (count,), generator=generator)
        for (start, stop), count in zip(layout.sample_spans(), counts, strict=True)
    ]
    return torch.cat(rows), counts


@pytest.mark.parametrize("budget", [reference.CHUNK_BYTES, 3000, 1])
@pytest.mark.parametrize("seed", range(16))
def test_they_are_the_rows_of_the_whole(seed, budget, monkeypatch):
    monkeypatch.setattr(reference, "CHUNK_BYTES", budget)  # the small ones: few heads, or few queries, at a time
    case = random_case(seed)
    layout = case["layout"]
    rows, counts = some_rows(layout, seed)
    whole = [tensor.clone().requires_grad_() for tensor in case["tensors"][:3]]
    few = [tensor.clone().requires_grad_() for tensor in case["tensors"][:3]]
    grads = [tensor[rows] for tensor in case["tensors"][3:]]
    expected = [t[rows] for t in multi_response_attention(*whole, layout, return_lse=True, **case["options"])]
    expected_grads = torch.autograd.grad(expected, whole, grads)
    for own_counts in (counts, None):
        options = case["options"] | {"query_rows": rows, "query_counts": own_counts, "return_lse": True}
        got = multi_response_attention(few[0][rows], *few[1:], layout, **options)
        for one, other in zip(got, expected, strict=True):
            assert one.shape == other.shape
            assert torch.equal(one.isinf(), other.isinf())
            assert torch.allclose(one, other, rtol=0, atol=1e-12)
        for one, other in zip(torch.autograd.grad(got, few, grads), expected_grads, strict=True):
            assert torch.allclose(one, other, rtol=0, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_inputs_are_computed_in_float32_under_autocast_too(dtype):
    case = random_case(3, longest=60)
    layout, rows = case["layout"], torch.arange(0, case["layout"].num_tokens, 5)
    rounded = [tensor.to(dtype) for tensor in case["tensors"][:3]]
    exact = multi_response_attention(*[tensor.double() for tensor in rounded], layout)[rows]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = multi_response_attention(rounded[0][rows], *rounded[1:], layout, query_rows=rows)
    assert got.dtype == dtype
    # Half a unit in the last place for the only rounding there is, to the output.
    assert ((got.double() - exact).abs() <= torch.finfo(dtype).eps / 2 * exact.abs() * 1.01 + 1e-6).all()


def test_what_one_sample_asks_no_other_is_looked_at():
    layout = Layout.build([3, 2], [[2], [2, 2]])
    query, key, value = (torch.randn(11, 2, 8) for _ in range(3))
    key[5:], value[5:] = float("nan"), float("nan")
    output = multi_response_attention(
        query[[4, 3]], key, value, layout, query_rows=torch.tensor([4, 3]), query_counts=(2, 0)
    )
    assert output.isfinite().all()


def test_no_queries_at_all():
    layout = Layout.build([3], [[2]])
    key = torch.randn(5, 2, 8)
    for counts in (None, [0]):
        none = torch.zeros(0, dtype=torch.int64)
        output, lse = multi_response_attention(
            key[:0].repeat(1, 2, 1), key, key, layout, query_rows=none, query_counts=counts, return_lse=True
        )
        assert output.shape == (0, 4, 8) and lse.shape == (0, 4)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"query_rows": torch.tensor([1, 2, 3])}, ValueError, "name the row of each of the 2 queries, got 3"),
        ({"query_rows": torch.tensor([1.0, 2.0])}, TypeError, "query_rows must be an int32 or int64 tensor"),
        ({"query_rows": [1, 2]}, TypeError, "query_rows must be a tensor"),
        ({"query_rows": torch.tensor([1, 11])}, ValueError, "must lie in 0 <= row < 11, got 1 to 11"),
        ({"query_rows": torch.tensor([-1, 1])}, ValueError, "must lie in 0 <= row < 11, got -1 to 1"),
        ({"query_counts": [1]}, ValueError, r"share 2 queries among 2 samples, got \[1\]"),
        ({"query_counts": [2, 1]}, ValueError, r"share 2 queries among 2 samples, got \[2, 1\]"),
        ({"query_counts": [1.0, 1]}, TypeError, "query_counts must be a list of ints"),
        ({"query_counts": [3, -1]}, TypeError, "query_counts must be a list of ints"),
        ({"query_counts": [2, 0]}, ValueError, "query_rows of sample 0 must lie in 0 <= row < 5, got 4 to 6"),
        ({"impl": "triton"}, ValueError, "impl='triton' cannot run query_rows"),
        ({"layout": Layout.build([3], [[2]])}, ValueError, "layout describes 5 tokens, key has 11"),
        ({"value": torch.zeros(9, 2, 8)}, ValueError, "value must have the 11 tokens of key, got 9"),
    ],
)
def test_arguments_that_do_not_fit(changes, error, message):
    layout = Layout.build([3, 2], [[2], [2, 2]])
    arguments = {"query": torch.zeros(2, 4, 8), "key": torch.zeros(11, 2, 8), "value": torch.zeros(11, 2, 8)}
    arguments |= {"layout": layout, "query_rows": torch.tensor([4, 6]), "query_counts": [1, 1]} | changes
    with pytest.raises(error, match=message):
        multi_response_attention(**arguments)


def test_counts_alone_are_refused():
    layout = Layout.build([3], [[2]])
    tensors = [torch.zeros(5, 2, 8)] * 3
    with pytest.raises(ValueError, match="give query_rows, too"):
        multi_response_attention(*tensors, layout, query_counts=[5])

"""What is not finite stays with the tokens that see it: branches and samples stand for themselves, in every implementation."""

import pytest
import torch
from attention_cases import check_apart, random_case

from yojo_kernels import Layout, listwise_loss, multi_response_attention, reference, segments


def of_all_rows(counted):
    """Attention of the reference by rows, as if every token were read in the last layer."""

    def attend(query, key, value, layout, **options):
        counts = [stop - start for start, stop in layout.sample_spans()] if counted else None
        rows = torch.arange(layout.num_tokens)
        return reference.attention_of_rows(query, key, value, layout, rows, counts, **options)

    return attend


def causal_as_it_stands(case):
    """The same tokens in one branch per sample, without blocks: comparative mode."""
    layout = case["layout"]
    branches = [[sum(lengths)] if lengths else [] for lengths in layout.branch_lengths]
    return {**case, "layout": Layout.build(layout.prompt_lengths, branches)}


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("comparative", [False, True])
@pytest.mark.parametrize(
    "attend", [reference.multi_response_attention, of_all_rows(True), of_all_rows(False)], ids=["whole", "rows", "row"]
)
def test_in_the_reference(attend, comparative, seed):
    case = random_case(seed)
    check_apart(attend, causal_as_it_stands(case) if comparative else case, torch.float64, 1e-12, seed)


def of_all_rows_here(query, key, value, layout, **options):
    counts = [stop - start for start, stop in layout.sample_spans()]
    return segments.attention_of_rows(query, key, value, layout, torch.arange(layout.num_tokens), counts, **options)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("comparative", [False, True])
@pytest.mark.parametrize("spared", [segments.SPARED, float("-inf"), None], ids=["one call", "apart", "rows"])
def test_segment_by_segment(comparative, spared, seed, monkeypatch):
    case = random_case(seed)
    case["options"]["softcap"] = None
    if spared is not None:
        monkeypatch.setattr(segments, "SPARED", spared)
    check_apart(
        of_all_rows_here if spared is None else segments.multi_response_attention,
        causal_as_it_stands(case) if comparative else case,
        torch.float64,
        1e-12,
        seed,
    )


@pytest.mark.parametrize("seed", range(4))
def test_without_looking_at_values_first(seed, monkeypatch):
    """As on a GPU and under a compiler, where nothing waits for the values."""
    monkeypatch.setattr(reference, "_is_asked", lambda tensor: False)
    check_apart(reference.multi_response_attention, random_case(seed), torch.float64, 1e-12, seed)


def test_under_a_compiler():
    torch._dynamo.reset()

    def attend(query, key, value, layout, **options):
        return multi_response_attention(query, key, value, layout, return_lse=True, impl="reference", **options)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True, dynamic=True)
    case = random_case(3)
    check_apart(compiled, case, torch.float64, 1e-12)


def test_products_beyond_float16_stay_with_their_pair():
    """Finite queries and keys whose product is not: a pair that sees each other, and one that does not."""
    layout = Layout.build([2], [[2, 2]])
    tensors = [torch.ones(6, 1, 8, dtype=torch.float16) for _ in range(4)]
    tensors[0][3], tensors[1][3] = 60000.0, 60000.0
    query, key, value = (tensor.requires_grad_() for tensor in tensors[:3])
    for implementation in (reference, segments):
        output, _ = implementation.multi_response_attention(query, key, value, layout, scale=0.3)
        assert output[[0, 1, 2, 4, 5]].isfinite().all()
        for grad in torch.autograd.grad(output, (query, key, value), tensors[3]):
            assert grad[4:].isfinite().all()  # the other branch


@pytest.mark.parametrize("implementation", [reference, segments])
@pytest.mark.parametrize("lengths", [([3], [[2, 2]]), ([40], [[30, 50, 9]])])
def test_products_beyond_float16_are_scaled_before_they_are_rounded(implementation, lengths):
    layout, generator = Layout.build(*lengths), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(layout.num_tokens, 2, 64, generator=generator).to(torch.float16) for _ in range(3))
    query, key = 100 * query, 100 * key  # products of some 80,000 and, of the largest, 250,000
    output, _ = implementation.multi_response_attention(query, key, value, layout, scale=1e-5)
    exact, _ = reference.multi_response_attention(query.double(), key.double(), value.double(), layout, scale=1e-5)
    assert (query.double() @ key.double().mT).abs().max() > 65504
    assert torch.allclose(output.double(), exact, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("scale", [0.0, 5e-324, 0.05, -0.3, 2.0])
def test_gradients_in_float16_are_those_of_float64(scale):
    """Of small queries and large keys, too, whose gradients are beyond neither number."""
    layout, generator = Layout.build([20], [[9, 7]]), torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(36, 2, 16, generator=generator).to(torch.float16) for _ in range(4))
    q, k = q * 1e-3, k * 1e3
    found = []
    for dtype in (torch.float16, torch.float64):
        inputs = [tensor.to(dtype).requires_grad_() for tensor in (q, k, v)]
        output, _ = reference.multi_response_attention(*inputs, layout, scale=scale)
        found.append([output, *torch.autograd.grad(output, inputs, grad.to(dtype))])
    for got, exact in zip(*found, strict=True):
        assert (got.double() - exact).norm() <= 1e-2 * exact.norm() + 1e-12


@pytest.mark.parametrize("kind", ["best", "plackett_luce", "bradley_terry", "soft"])
@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
def test_a_loss_of_one_sample_leaves_the_others_theirs(kind, poison):
    scores = torch.tensor([0.3, -1.0, 2.0, 0.5, 1.5, 0.2])
    ranks = torch.tensor([1, 2, 1, 2, 3, 1]) if kind != "soft" else torch.tensor([0.5, 0.5, 0.2, 0.3, 0.5, 1.0])
    offsets = torch.tensor([0, 2, 5, 6], dtype=torch.int32)

    def losses(broken):
        given = scores.clone()
        given[3] = poison if broken else given[3]
        given.requires_grad_()
        loss = listwise_loss(given, ranks, offsets, kind=kind, reduction="none", impl="reference")
        return loss.detach(), torch.autograd.grad(loss.sum(), given)[0]

    (clean, clean_grad), (loss, grad) = losses(False), losses(True)
    others, its_own = [0, 1, 5], [2, 3, 4]
    assert torch.equal(loss[[0, 2]], clean[[0, 2]]) and torch.equal(grad[others], clean_grad[others])
    assert poison == poison or not (loss[1].isfinite() or grad[its_own].isfinite().all())


def test_a_worst_response_at_minus_infinity_has_no_weight():
    scores = torch.tensor([0.3, float("-inf"), 1.0])
    loss = listwise_loss(scores, torch.tensor([1, 2, 2]), torch.tensor([0, 3], dtype=torch.int32), impl="reference")
    expected = listwise_loss(scores[[0, 2]], torch.tensor([1, 2]), torch.tensor([0, 2], dtype=torch.int32))
    assert torch.equal(loss, expected)

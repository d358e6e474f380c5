"""The kernels of the value head and the losses on a GPU: exact, the same bits at every launch, graphs, no waiting."""

import pytest
import torch
from head_cases import ACTIVATIONS, KINDS, check_head, check_loss, compare, head_case, loss_case, run_head, run_loss

from yojo_kernels import head, listwise_loss, loss, reference, score_head

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poison")]


def on_gpu(case):
    moved = {name: case[name].cuda() for name in ("rows", "grad")}
    return {**case, **moved, "tensors": [t if t is None else t.cuda() for t in case["tensors"]]}


def qwen_case(readings, tokens=4096, size=2560, width=1024, dtype=torch.bfloat16, weight_dtype=torch.float32):
    """The sizes of a value head on a 4B backbone."""
    make = lambda *shape: torch.randn(*shape, device="cuda")  # noqa: E731
    weights = [make(width, size) / size**0.5, make(width) * 0.1, make(1, width) / width**0.5, make(1)]
    return {
        "tensors": [make(tokens, size).to(dtype), *(w.to(weight_dtype) for w in weights)],
        "rows": torch.randint(tokens, (readings,), device="cuda"),
        "grad": make(readings),
        "options": {"activation": "silu", "scale": size**0.5},
    }


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_head_is_as_exact_as_the_reference(dtype, weights):
    for seed in range(60):
        check_head(head.score_head, on_gpu(head_case(seed, dtype, weights, most=700, widest=300)))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("readings", [1, 4, 33, 512])
def test_head_of_a_4b_backbone(readings, activation):
    case = qwen_case(readings)
    case["options"]["activation"] = activation
    check_head(head.score_head, case)


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16])
def test_tens_of_thousands_of_readings(weights):
    case = qwen_case(40_000, tokens=30_000, size=512, width=256, weight_dtype=weights)
    check_head(head.score_head, case)
    linear = {**case, "tensors": [case["tensors"][0], None, None, torch.randn(1, 512, device="cuda"), None]}
    check_head(head.score_head, linear)


def test_a_thousand_launches_of_the_head_agree_to_the_bit():
    """Programs finish in another order every time; the order of additions does not change."""
    case = qwen_case(200, tokens=150)
    first = run_head(head.score_head, case)
    for _ in range(1000):
        again = run_head(head.score_head, case)
        assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_as_exact_as_the_reference(kind):
    for reduction in ("mean", "sum", "none"):
        for seed in range(40):
            for spread in (1.0, 1e4, 1e-4):
                case = loss_case(seed, kind, most=90, samples=12, spread=spread)
                check_loss(loss.listwise_loss, *(t.cuda() for t in case), kind, reduction)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_4096_responses(kind):
    lengths = [1, 4096, 2, 1000]
    scores = torch.randn(sum(lengths), device="cuda")
    rankings = torch.randint(1, 300, scores.shape, device="cuda")
    if kind == "soft":
        rankings = torch.cat([part.softmax(0) for part in torch.randn(scores.shape, device="cuda").split(lengths)])
    offsets = torch.tensor([0, *lengths], device="cuda").cumsum(0).int()
    exact = run_loss(reference.listwise_loss, scores, rankings, offsets, kind, "none", torch.float64)
    peer = run_loss(reference.listwise_loss, scores, rankings, offsets, kind, "none")
    ours = run_loss(loss.listwise_loss, scores, rankings, offsets, kind, "none")
    for name, one, other, truth in zip(("loss", "grad"), ours, peer, exact, strict=True):
        compare(name, one, other, truth, truth.abs().max())
    first = run_loss(loss.listwise_loss, scores, rankings, offsets, kind, "mean")
    for _ in range(200):
        again = run_loss(loss.listwise_loss, scores, rankings, offsets, kind, "mean")
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_thousands_of_samples(kind):
    scores = torch.randn(4 * 8192, device="cuda")
    rankings = torch.randint(1, 5, scores.shape, device="cuda")
    if kind == "soft":
        rankings = scores.view(-1, 4).softmax(1).flatten()
    offsets = torch.arange(0, 4 * 8192 + 1, 4, device="cuda")
    values, _ = run_loss(loss.listwise_loss, scores, rankings, offsets, kind, "none")
    total, _ = run_loss(loss.listwise_loss, scores, rankings, offsets, kind, "sum")
    assert torch.allclose(values.double().sum(), total.double(), rtol=1e-5)
    few = slice(0, 400)
    check_loss(loss.listwise_loss, scores[few], rankings[few], offsets[:101], kind, "none")


def step(case, rankings, offsets):
    tensors = [t.detach().requires_grad_() for t in case["tensors"]]
    scores = score_head(tensors[0], case["rows"], *tensors[1:], **case["options"])
    value = listwise_loss(scores, rankings, offsets, kind="plackett_luce")
    return [value.detach(), *torch.autograd.grad(value, tensors)]


def ranked(readings):
    rankings = torch.arange(1, 5, device="cuda").repeat(readings // 4)
    return rankings, torch.arange(0, readings + 1, 4, device="cuda", dtype=torch.int32)


def test_head_and_loss_never_wait_for_the_device():
    case, (rankings, offsets) = qwen_case(32), ranked(32)
    step(case, rankings, offsets)  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(case, rankings, offsets)
        losses = listwise_loss(case["grad"].requires_grad_(), rankings, offsets, reduction="none")
        losses.backward(torch.ones_like(losses))
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_graph_of_head_and_loss_replays():
    case, (rankings, offsets) = qwen_case(32), ranked(32)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        expected = step(case, rankings, offsets)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(case, rankings, offsets)
    for _ in range(3):
        for tensor in captured:
            tensor.zero_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))


def test_bad_values_are_not_a_number_on_a_gpu():
    hidden, weight = torch.randn(5, 64, device="cuda"), torch.randn(1, 64, device="cuda")
    scores = score_head(hidden, torch.tensor([2, 5, -1], device="cuda"), None, None, weight, None)
    assert scores.isnan().tolist() == [False, True, True]
    value = listwise_loss(
        scores[:1].expand(2), torch.tensor([0, 1], device="cuda"), torch.tensor([0, 2], device="cuda")
    )
    assert value.isnan()


def test_compiles_into_one_graph_with_inductor():
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, dynamic=True)
    def value(hidden, rows, weight1, bias1, weight2, bias2, rankings, offsets):
        scores = score_head(hidden, rows, weight1, bias1, weight2, bias2)
        return listwise_loss(scores, rankings, offsets, kind="plackett_luce")

    with torch._dynamo.config.patch(error_on_recompile=True):
        for readings, tokens in ((8, 300), (20, 411), (32, 257)):
            case, (rankings, offsets) = qwen_case(readings, tokens=tokens), ranked(readings)
            tensors = [t.detach().requires_grad_() for t in case["tensors"]]
            got = value(tensors[0], case["rows"], *tensors[1:], rankings, offsets)
            case["options"]["scale"] = 1.0
            expected, *grads = step(case, rankings, offsets)
            assert torch.equal(got, expected)
            assert all(map(torch.equal, torch.autograd.grad(got, tensors), grads))


def test_ranks_beyond_32_bits():
    scores, offsets = torch.tensor([5.0, 0.0, 1.0], device="cuda"), torch.tensor([0, 3], device="cuda")
    value = listwise_loss(scores, torch.tensor([2**40, 1, 2**35], device="cuda"), offsets)
    assert value.item() == pytest.approx(-scores.cpu().log_softmax(0)[1].item(), rel=1e-6)

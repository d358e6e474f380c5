"""The kernels of the value head and the losses, interpreted, against the reference: values and every gradient."""

import pytest
import torch
from head_cases import ACTIVATIONS, KINDS, check_head, check_loss, head_case, loss_case, run_head, run_loss

from yojo_kernels import head, launch, listwise_loss, loss, reference, score_head

pytestmark = pytest.mark.usefixtures("poison")


def test_the_interpreter_runs():
    assert launch.INTERPRETED and torch.empty(3).isnan().all()


# ---- value head ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("seeds", range(4))
def test_head_is_as_exact_as_the_reference(dtype, seeds):
    for seed in range(10 * seeds, 10 * seeds + 10):
        check_head(head.score_head, head_case(seed, dtype))


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16, torch.float16])
def test_bfloat16_hidden_states_lose_nothing(weights):
    """Products of bfloat16 terms: the scores must be exact to float32 all the same."""
    for seed in range(15):
        check_head(head.score_head, head_case(seed, torch.bfloat16, weights), cut=True)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1e-3, 1.0, 30.0])
def test_every_activation_near_zero_and_far_away(activation, scale):
    case = head_case(3)
    case["tensors"] = [torch.randn(20, 24) * scale, torch.randn(40, 24), None, torch.randn(1, 40), None]
    case["rows"], case["grad"] = torch.arange(20), torch.randn(20)
    case["options"]["activation"] = activation
    check_head(head.score_head, case)


def test_activations_are_those_of_torch():
    """To a float32 unit of each single value, the smallest ones too, and the slopes where they change."""
    x = torch.cat([torch.logspace(-6, 1.4, 80), -torch.logspace(-6, 1.4, 80), torch.zeros(1)])
    one = torch.ones(1, 1)
    for name in ACTIVATIONS:
        hidden = x[:, None].clone().requires_grad_()
        scores = score_head(hidden, torch.arange(len(x)), one, None, one, None, activation=name, impl="triton")
        (grad,) = torch.autograd.grad(scores.sum(), hidden)
        exact = x.double().requires_grad_()
        values = reference.ACTIVATIONS[name](exact)
        (slopes,) = torch.autograd.grad(values.sum(), exact)
        lost = 3e-7 if name == "gelu" else 1e-9  # 1 + erf cancels far below 0, in torch as well
        assert torch.allclose(scores.double(), values, rtol=1e-6, atol=lost), name
        assert torch.allclose(grad[:, 0].double(), slopes, rtol=1e-6, atol=3e-7), name


def test_rows_read_twice_share_one_gradient():
    hidden, rows = torch.randn(9, 20), torch.tensor([4, 2, 4] + [8] * 40 + [4])
    mlp = [torch.randn(30, 20), torch.randn(30), torch.randn(1, 30), torch.randn(1)]
    for layers in (mlp, [None, None, torch.randn(1, 20), None]):
        options = {"activation": "silu", "scale": 1.0}
        case = {"tensors": [hidden, *layers], "rows": rows, "grad": torch.randn(len(rows)), "options": options}
        check_head(head.score_head, case)
        grad = run_head(head.score_head, case)["grad hidden"]
        assert grad[[0, 1, 3, 5, 6, 7]].abs().max() == 0 and grad[[2, 4, 8]].abs().sum(1).min() > 0


def test_strided_hidden_states_and_gradients_and_int32_rows():
    case = head_case(8)
    hidden, *weights = case["tensors"]
    wide = torch.full((hidden.shape[0], 2 * hidden.shape[1] + 3), float("nan"))
    wide[:, 2 : 2 + hidden.shape[1]] = hidden
    view = wide[:, 2 : 2 + hidden.shape[1]].requires_grad_()
    columns = hidden.t().contiguous().t().requires_grad_()  # the wrong way round: copied
    expected = torch.autograd.grad(score_head(hidden.requires_grad_(), case["rows"], *weights, impl="triton").sum(), hidden)  # fmt: skip
    for inputs in (view, columns):
        scores = score_head(inputs, case["rows"].int(), *weights, impl="triton")
        got = torch.autograd.grad(scores.sum(), inputs)  # the gradient of a sum has stride 0
        assert torch.equal(got[0], expected[0])


def test_only_what_is_asked_for_is_computed():
    case = head_case(12)
    hidden, *weights = case["tensors"]
    assert weights[0] is not None
    full = run_head(head.score_head, case)
    for wanted in (["grad hidden"], ["grad weight2"], ["grad weight1", "grad hidden"]):
        names = [name for name in full if name != "scores"]
        tensors = dict(zip(names, [t for t in case["tensors"] if t is not None], strict=True))
        leaves = {name: t.detach().requires_grad_(name in wanted) for name, t in tensors.items()}
        inputs = iter(leaves.values())
        arguments = [None if t is None else next(inputs) for t in case["tensors"]]
        head.score_head(arguments[0], case["rows"], *arguments[1:], **case["options"]).backward(case["grad"])
        for name, leaf in leaves.items():
            assert (leaf.grad is None) == (name not in wanted)
            assert name not in wanted or torch.equal(leaf.grad, full[name])


def test_launches_agree_to_the_bit_and_gradients_accumulate():
    case = head_case(5, most=200)
    first, second = (run_head(head.score_head, case) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    hidden, *weights = (t if t is None else t.detach().requires_grad_() for t in case["tensors"])
    for _ in range(2):
        head.score_head(hidden, case["rows"], *weights, **case["options"]).backward(case["grad"])
    assert torch.allclose(hidden.grad, 2 * first["grad hidden"]) and torch.equal(weights[2].grad, 2 * first["grad weight2"])  # fmt: skip


def test_a_row_out_of_range_is_never_silent():
    hidden, weight = torch.randn(5, 8), torch.randn(1, 8)
    mlp = [torch.randn(12, 8), torch.randn(12), torch.randn(1, 12), torch.randn(1)]
    for layers in (mlp, [None, None, weight, None]):
        with pytest.raises(ValueError, match="rows must lie in 0 <= row < 5"):
            score_head(hidden, torch.tensor([0, 5]), *layers, impl="triton")
        scores = head.score_head(hidden, torch.tensor([2, 5, -1, 0]), *layers, activation="silu", scale=1.0)
        assert scores.isnan().tolist() == [False, True, True, False]


def test_no_readings():
    hidden = torch.randn(5, 8, requires_grad=True)
    weight = torch.randn(1, 8, requires_grad=True)
    scores = score_head(hidden, torch.empty(0, dtype=torch.int64), None, None, weight, None, impl="triton")
    scores.sum().backward()
    assert scores.shape == (0,) and not hidden.grad.any() and not weight.grad.any()


def test_what_the_kernels_cannot_take_is_refused():
    hidden, weight = torch.randn(5, 8), torch.randn(1, 8)
    rows = torch.tensor([0])
    for arguments in ((hidden.double(), weight), (hidden, weight.double())):
        with pytest.raises(
            ValueError, match="cannot run score_head: it takes bfloat16, float16 or float32, not float64"
        ):
            score_head(arguments[0], rows, None, None, arguments[1], None, impl="triton")
    with pytest.raises(
        ValueError, match="cannot run listwise_loss: it takes bfloat16, float16 or float32, not float64"
    ):
        listwise_loss(torch.zeros(2).double(), torch.tensor([1, 2]), torch.tensor([0, 2]), impl="triton")


@pytest.mark.parametrize("linear", [False, True])
def test_head_is_registered_as_torch_expects(linear):
    case = head_case(2)
    mlp = [torch.randn(12, 8), torch.randn(12), torch.randn(1, 12), torch.randn(1)]
    layers = [None, None, torch.randn(1, 8), None] if linear else mlp
    tensors = [t if t is None else t.requires_grad_() for t in (torch.randn(9, 8), *layers)]
    rows = torch.tensor([3, 3, 8])
    torch.library.opcheck(torch.ops.yojo.score_head, (tensors[0], rows, *tensors[1:], "silu", 2.0, not linear))
    scores, pre = torch.ops.yojo.score_head(tensors[0], rows, *tensors[1:], "silu", 2.0, not linear)
    detached = [t if t is None else t.detach() for t in tensors]
    torch.library.opcheck(
        torch.ops.yojo.score_head_backward,
        (torch.ones(3), detached[0], rows, *detached[1:], pre.detach(), "silu", 2.0, True, True),
    )
    assert case and scores.shape == (3,)


def test_flops_are_counted():
    from torch.utils.flop_counter import FlopCounterMode

    hidden, mlp = torch.randn(9, 8, requires_grad=True), [torch.randn(12, 8), None, torch.randn(1, 12), None]
    with FlopCounterMode(display=False) as counter:
        scores = score_head(hidden, torch.tensor([1, 2, 3]), *mlp, impl="triton")
    assert counter.get_total_flops() == 2 * 3 * 12 * (8 + 1)
    with FlopCounterMode(display=False) as counter:
        scores.sum().backward()
    assert counter.get_total_flops() == 2 * 3 * 12 * (8 + 1)  # the hidden states alone ask for a gradient


# ---- losses ----


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_as_exact_as_the_reference(kind, reduction):
    for seed in range(12):
        check_loss(loss.listwise_loss, *loss_case(seed, kind), kind, reduction)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_of_extreme_scores(kind):
    for seed in range(6):
        check_loss(loss.listwise_loss, *loss_case(seed, kind, spread=1e4), kind, "none")
        check_loss(loss.listwise_loss, *loss_case(seed, kind, spread=1e-4), kind, "none")


@pytest.mark.parametrize("kind, most", [("best", 4096), ("soft", 4096), ("plackett_luce", 150), ("bradley_terry", 150)])
def test_losses_of_large_samples(kind, most):
    scores, rankings, _ = loss_case(0, kind, most=2, samples=1)
    generator = torch.Generator().manual_seed(1)
    scores = torch.randn(most + 3, generator=generator)
    rankings = torch.randint(1, 50, (most + 3,), generator=generator)
    if kind == "soft":
        rankings = torch.cat([scores.new_ones(1), torch.randn(most, generator=generator).softmax(0), torch.tensor([0.3, 0.7])])  # fmt: skip
    check_loss(loss.listwise_loss, scores, rankings, torch.tensor([0, 1, most + 1, most + 3]), kind, "mean")


def test_many_samples_are_summed_once_each():
    count = loss.SUM_BLOCK + 20  # the last program adds them in several steps
    scores, rankings = torch.randn(2 * count), torch.randint(1, 3, (2 * count,))
    offsets = torch.arange(0, 2 * count + 1, 2)
    check_loss(loss.listwise_loss, scores, rankings, offsets, "best", "sum")
    check_loss(loss.listwise_loss, scores, rankings, offsets, "best", "mean")


def test_ranks_beyond_32_bits():
    scores, rankings, offsets = torch.tensor([5.0, 0.0, 1.0]), torch.tensor([2**40, 1, 2**35]), torch.tensor([0, 3])
    for kind in ("best", "plackett_luce", "bradley_terry"):
        check_loss(loss.listwise_loss, scores, rankings, offsets, kind, "mean")


def test_half_precision_scores_get_half_precision_gradients():
    scores, rankings, offsets = loss_case(3, "best")
    half = scores.half().requires_grad_()
    value = listwise_loss(half, rankings, offsets, impl="triton")
    value.backward()
    assert value.dtype == torch.float32 and half.grad.dtype == torch.float16
    expected = run_loss(reference.listwise_loss, scores.half(), rankings, offsets, "best", "mean", torch.float64)[1]
    assert (half.grad.double() - expected).abs().max() < 2**-11


@pytest.mark.parametrize(
    "kind, rankings, offsets",
    [
        ("best", [1, 0, 2], [0, 1, 3]),
        ("plackett_luce", [1, 1, -1], [0, 1, 3]),
        ("bradley_terry", [1, 0, 1], [0, 1, 3]),
        ("soft", [1.0, 0.5, 0.2], [0, 1, 3]),
        ("soft", [1.0, 1.5, -0.5], [0, 1, 3]),
        ("best", [1, 1, 2], [0, 3, 3]),
        ("best", [1, 1, 2], [0, 1, 7]),
    ],
)
def test_a_bad_sample_is_never_silent(kind, rankings, offsets):
    """Nobody looks at values on a GPU, so the kernel itself says NaN."""
    scores, rankings, offsets = torch.zeros(3), torch.tensor(rankings), torch.tensor(offsets)
    losses, grads = torch.ops.yojo.listwise_loss(scores, rankings, offsets, kind, "none")
    assert not losses[0].isnan() and losses[1].isnan()
    assert torch.ops.yojo.listwise_loss(scores, rankings, offsets, kind, "mean")[0].isnan()
    with pytest.raises(ValueError):
        listwise_loss(scores, rankings, offsets, kind=kind, impl="triton")


def test_a_score_that_is_no_number_spoils_its_sample_alone():
    for kind in KINDS:
        scores, rankings, offsets = torch.randn(9), torch.tensor([1, 2, 3] * 3), torch.tensor([0, 3, 6, 9])
        if kind == "soft":
            rankings = torch.tensor([0.2, 0.3, 0.5] * 3)
        scores[4] = float("nan")
        losses, grads = torch.ops.yojo.listwise_loss(scores, rankings, offsets, kind, "none")
        assert losses.isnan().tolist() == [False, True, False], kind
        assert grads[[0, 1, 2, 6, 7, 8]].isfinite().all() and grads[4].isnan()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_loss_is_registered_as_torch_expects(kind, reduction):
    scores, rankings, offsets = loss_case(1, kind)
    torch.library.opcheck(torch.ops.yojo.listwise_loss, (scores.requires_grad_(), rankings, offsets, kind, reduction))


@pytest.mark.parametrize("kind", KINDS)
def test_loss_launches_agree_to_the_bit(kind):
    case = loss_case(7, kind)
    first, second = (run_loss(loss.listwise_loss, *case, kind, "mean") for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_head_and_loss_compile_into_one_graph_for_all_sizes():
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def step(hidden, rows, weight1, bias1, weight2, bias2, rankings, offsets):
        scores = score_head(hidden, rows, weight1, bias1, weight2, bias2, impl="triton")
        return listwise_loss(scores, rankings, offsets, kind="plackett_luce", impl="triton")

    weights = [torch.randn(12, 8), torch.randn(12), torch.randn(1, 12), torch.randn(1)]
    for tokens, lengths in ((30, [3, 4]), (55, [2, 6, 9]), (21, [5, 2])):
        hidden = torch.randn(tokens, 8, requires_grad=True)
        rows = torch.randint(tokens, (sum(lengths),))
        rankings, offsets = torch.randint(1, 4, (sum(lengths),)), torch.tensor([0, *lengths]).cumsum(0)
        value = step(hidden, rows, *weights, rankings, offsets)
        expected = listwise_loss(score_head(hidden, rows, *weights, impl="triton"), rankings, offsets, kind="plackett_luce", impl="triton")  # fmt: skip
        assert torch.equal(value, expected)
        assert torch.equal(*(torch.autograd.grad(x, hidden)[0] for x in (value, expected)))
    assert len(graphs) == 1

"""The reference operations against independent computations in float64, their gradients, and their checks."""

import math
import random

import pytest
import torch
import torch.nn.functional as F

from yojo_kernels import Layout, implementations, listwise_loss, multi_response_attention, reference, score_head


def attention_inputs(layout, heads=(4, 2), dim=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = layout.num_tokens
    make = lambda h: torch.randn(shape, h, dim, generator=generator, dtype=torch.float64).to(dtype)  # noqa: E731
    return [make(heads[0]), make(heads[1]), make(heads[1])]


def loop_attention(query, key, value, visible, scale, softcap=None):
    """One query and head at a time, over just the keys it sees."""
    tokens, heads, _ = query.shape
    group = heads // key.shape[1]
    output = torch.zeros_like(query)
    lse = torch.full((tokens, heads), -math.inf, dtype=query.dtype)
    for t in range(tokens):
        for h in range(heads):
            keys = visible[t].nonzero()[:, 0]
            if len(keys) == 0:
                continue
            scores = key[keys, h // group] @ query[t, h] * scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            lse[t, h] = torch.logsumexp(scores, 0)
            output[t, h] = (scores - lse[t, h]).exp() @ value[keys, h // group]
    return output, lse


@pytest.mark.parametrize("seed", range(12))
def test_attention_is_softmax_over_visible_keys(seed):
    rng = random.Random(seed)
    prompts = [rng.randint(0, 5) for _ in range(rng.randint(1, 3))]
    branches = [[rng.randint(1, 4) for _ in range(rng.randint(1, 3))] for _ in prompts]
    size = sum(prompts) + sum(map(sum, branches))
    blocks = rng.choice([None, [rng.choice([-1, 0, 1]) for _ in range(size)]])
    layout = Layout.build(prompts, branches, bidirectional=blocks)
    window, softcap, heads = rng.choice([None, 3]), rng.choice([None, 2.0]), rng.choice([(4, 4), (4, 2), (3, 1)])
    query, key, value = attention_inputs(layout, heads, seed=seed)
    output, lse = multi_response_attention(
        query, key, value, layout, scale=0.3, window=window, softcap=softcap, return_lse=True
    )
    expected, expected_lse = loop_attention(query, key, value, layout.visible(window), 0.3, softcap)
    assert torch.allclose(output, expected, rtol=0, atol=1e-12)
    assert torch.allclose(lse, expected_lse, rtol=0, atol=1e-12)


def test_attention_gradients():
    layout = Layout.build([2, 0], [[2, 1], [2]], bidirectional=[0, 0, -1, -1, -1, -1, -1])
    inputs = [tensor.requires_grad_() for tensor in attention_inputs(layout, (2, 1), dim=4)]

    def call(*inputs):
        return multi_response_attention(*inputs, layout, window=3, softcap=1.5, return_lse=True)

    assert torch.autograd.gradcheck(call, inputs)


def test_a_query_that_sees_nothing_gets_zero_and_gives_no_gradient():
    visible = torch.tensor([[True, False, False], [False, False, False], [True, False, True]])
    inputs = [torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    output, lse = reference.masked_attention(*inputs, visible, scale=0.5)
    assert output[1].abs().max() == 0 and (lse[1] == -math.inf).all()
    output.sum().backward()
    assert all(tensor.grad.isfinite().all() for tensor in inputs)
    assert inputs[0].grad[1].abs().max() == 0 and inputs[1].grad[1].abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_in_lower_precision(dtype):
    layout = Layout.build([9], [[5, 3]])
    exact = attention_inputs(layout)
    output = multi_response_attention(*[tensor.to(dtype) for tensor in exact], layout)
    assert output.dtype == dtype
    error = (output.double() - multi_response_attention(*exact, layout)).abs().max()
    # Inputs of order 1 are rounded once (eps), then products and weights again: a few eps.
    assert error < 8 * torch.finfo(dtype).eps


def test_attention_takes_views_without_copies_and_never_mixes_samples():
    layout = Layout.build([3, 2], [[2], [2, 2]])
    query, key, value = attention_inputs(layout)
    whole = multi_response_attention(query, key, value, layout)
    first = multi_response_attention(query[:5], key[:5], value[:5], Layout.build([3], [[2]]))
    strided = [tensor.transpose(0, 1).contiguous().transpose(0, 1) for tensor in (query, key, value)]
    assert torch.allclose(whole[:5], first, rtol=0, atol=1e-14)
    assert torch.allclose(multi_response_attention(*strided, layout), whole, rtol=0, atol=1e-14)
    key[5:], value[5:] = float("nan"), float("nan")
    assert multi_response_attention(query, key, value, layout)[:5].isfinite().all()


def head_weights(hidden=6, width=5, linear=False, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    make = lambda *shape: torch.randn(*shape, generator=generator, dtype=dtype)  # noqa: E731
    return (
        (None, None, make(1, hidden), make(1))
        if linear
        else (make(width, hidden), make(width), make(1, width), make(1))
    )


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu", "selu", "tanh"])
def test_score_head_is_the_two_layer_head(activation):
    hidden, rows = torch.randn(7, 6, dtype=torch.float64), torch.tensor([3, 0, 3])
    weight1, bias1, weight2, bias2 = head_weights()
    scores = score_head(hidden, rows, weight1, bias1, weight2, bias2, activation=activation, scale=2.0)
    act = {"silu": lambda x: x * x.sigmoid(), "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))}
    act |= {"relu": lambda x: x.clamp(min=0), "tanh": torch.tanh, "selu": torch.selu}
    for score, row in zip(scores, rows, strict=True):
        expected = (weight2[0] @ act[activation](weight1 @ hidden[row] + bias1) + bias2[0]) / 2.0
        assert torch.allclose(score, expected, rtol=0, atol=1e-13)


def test_score_head_linear_gradients_dtype_and_autocast():
    hidden, rows = torch.randn(7, 6, dtype=torch.float64, requires_grad=True), torch.tensor([3, 0, 3])
    weights = [tensor.requires_grad_() for tensor in head_weights()]
    assert torch.autograd.gradcheck(lambda *a: score_head(a[0], rows, *a[1:], activation="tanh"), [hidden, *weights])
    _, _, weight2, bias2 = head_weights(linear=True)
    linear = score_head(hidden, rows, None, None, weight2, bias2, scale=3.0)
    assert torch.allclose(linear, (hidden[rows] @ weight2[0] + bias2) / 3.0, rtol=0, atol=1e-14)
    half = [None if w is None else w.float() for w in head_weights()]
    plain = score_head(hidden.bfloat16(), rows, *half)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = score_head(hidden.bfloat16(), rows, *half)
    assert plain.dtype == torch.float32 and torch.equal(plain, cast)


SCORES = torch.tensor([0.3, -1.2, 2.0, 0.7, 0.7, -0.1], dtype=torch.float64)
OFFSETS = torch.tensor([0, 3, 4, 6], dtype=torch.int32)  # samples of 3, 1 and 2 responses


def by_hand(kind, scores, ranks):
    n = len(scores)
    log_softmax = [s - math.log(sum(math.exp(t) for t in scores)) for s in scores]
    if kind == "best":
        best = [i for i in range(n) if ranks[i] == min(ranks)]
        return -sum(log_softmax[i] for i in best) / len(best)
    if kind == "soft":
        return -sum(r * v for r, v in zip(ranks, log_softmax, strict=True))
    if kind == "plackett_luce":
        total = 0.0
        for i in range(n):
            total += math.log(sum(math.exp(scores[j]) for j in range(n) if ranks[j] >= ranks[i])) - scores[i]
        return total
    pairs = [(i, j) for i in range(n) for j in range(n) if ranks[i] < ranks[j]]
    return sum(math.log1p(math.exp(scores[j] - scores[i])) for i, j in pairs) / len(pairs) if pairs else 0.0


@pytest.mark.parametrize("kind", ["best", "plackett_luce", "bradley_terry", "soft"])
@pytest.mark.parametrize("ranks", [[2, 1, 3, 1, 1, 2], [1, 1, 2, 5, 1, 1], [1, 1, 1, 1, 2, 1]])
def test_loss_by_hand(kind, ranks):
    rankings = torch.tensor(ranks)
    if kind == "soft":
        rankings = torch.cat([t / t.sum() for t in rankings.double().split([3, 1, 2])])
    losses = listwise_loss(SCORES, rankings, OFFSETS, kind=kind, reduction="none")
    expected = [
        by_hand(kind, s.tolist(), r.tolist())
        for s, r in zip(SCORES.split([3, 1, 2]), rankings.split([3, 1, 2]), strict=True)
    ]
    assert losses.tolist() == pytest.approx(expected, abs=1e-12)
    assert losses[1].abs() < 1e-15  # one response alone
    mean = listwise_loss(SCORES, rankings, OFFSETS, kind=kind)
    total = listwise_loss(SCORES, rankings, OFFSETS, kind=kind, reduction="sum")
    assert mean.item() == pytest.approx(sum(expected) / 3) and total.item() == pytest.approx(sum(expected))
    assert torch.autograd.gradcheck(
        lambda s: listwise_loss(s, rankings, OFFSETS, kind=kind, reduction="none"), [SCORES.clone().requires_grad_()]
    )


@pytest.mark.parametrize("kind", ["best", "plackett_luce", "bradley_terry", "soft"])
def test_loss_of_extreme_scores_is_finite(kind):
    scores = torch.tensor([1e4, -1e4, 0.0], requires_grad=True)
    rankings = torch.tensor([0.0, 1.0, 0.0]) if kind == "soft" else torch.tensor([2, 1, 3])
    loss = listwise_loss(scores, rankings, torch.tensor([0, 3], dtype=torch.int32), kind=kind)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite() and scores.grad.isfinite().all()


def test_ties_share_the_best_loss():
    scores = torch.tensor([1.0, 2.0, 3.0])
    loss = listwise_loss(scores, torch.tensor([1, 1, 2]), torch.tensor([0, 3], dtype=torch.int32))
    assert loss.item() == pytest.approx(-F.log_softmax(scores, 0)[:2].mean().item(), rel=1e-6)


LAYOUT = Layout.build([3], [[2, 2]])
Q, K = torch.zeros(7, 4, 8), torch.zeros(7, 2, 8)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"query": Q[None]}, ValueError, r"query must have 3 dimensions \[tokens, heads, head dim\]"),
        ({"query": Q.long()}, TypeError, "query must be a floating-point tensor"),
        ({"key": [1]}, TypeError, "key must be a tensor, got list"),
        ({"key": K.half()}, TypeError, "key must have the dtype of query"),
        ({"key": K[:6]}, ValueError, "key must have the 7 tokens of query, got 6"),
        ({"value": K[:, :1]}, ValueError, "key and value must have the same heads, got 2 and 1"),
        ({"value": K[..., :4]}, ValueError, "value must have the head dim of query, 8, got 4"),
        ({"query": Q[:, :3]}, ValueError, "query heads must be a multiple of key heads, got 3 and 2"),
        ({"layout": None}, TypeError, "layout must be a Layout"),
        ({"layout": Layout.build([3], [[2]])}, ValueError, "layout describes 5 tokens, query has 7"),
        ({"layout": LAYOUT.to("meta")}, ValueError, "layout is on meta, query on cpu"),
        ({"window": 0}, ValueError, "window must be at least 1"),
        ({"window": 2**31}, ValueError, "window must be at least 1 and below 2\\*\\*31"),
        ({"window": True}, TypeError, "window must be an int, or None for no window, got bool"),
        ({"scale": "x"}, TypeError, "scale must be a number or None, got str"),
        ({"scale": math.nan}, ValueError, "scale must be finite, got nan"),
        ({"softcap": math.inf}, ValueError, "softcap must be finite, got inf"),
        ({name: Q[..., :0] for name in ("query", "key", "value")}, ValueError, "a head dim of at least 1"),
        ({"window": 2.5}, TypeError, "window must be an int, or None for no window, got float"),
        ({"softcap": 0.0}, ValueError, "softcap must be above 0"),
        ({"impl": "cuda"}, ValueError, "impl must be one of auto, reference, triton, gluon, got 'cuda'"),
        ({"impl": "triton"}, ValueError, "impl='triton' cannot run multi_response_attention"),
    ],
)
def test_attention_refuses(changes, error, message):
    arguments = {"query": Q, "key": K, "value": K, "layout": LAYOUT} | changes
    with pytest.raises(error, match=message):
        multi_response_attention(**arguments)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"rows": torch.tensor([7])}, ValueError, "rows must lie in 0 <= row < 7, got 7 to 7"),
        ({"rows": torch.tensor([-1])}, ValueError, "rows must lie in 0 <= row < 7, got -1"),
        ({"rows": torch.tensor([0.0])}, TypeError, "rows must be an int32 or int64 tensor"),
        ({"weight1": torch.zeros(5, 4)}, ValueError, r"weight1 must have shape \[K, 6\]"),
        ({"weight2": torch.zeros(1, 6)}, ValueError, r"weight2 must have shape \[1, 5\]"),
        ({"bias1": torch.zeros(4)}, ValueError, r"bias1 must have shape \[5\]"),
        ({"weight1": None}, ValueError, "bias1 needs weight1"),
        ({"activation": "swish"}, ValueError, "activation must be one of silu"),
        ({"scale": 0.0}, ValueError, "scale must be above 0"),
        ({"impl": "triton"}, ValueError, "impl='triton' cannot run score_head"),
    ],
)
def test_score_head_refuses(changes, error, message):
    names = ("weight1", "bias1", "weight2", "bias2")
    arguments = dict(zip(names, head_weights(dtype=torch.float32), strict=True))
    arguments |= {"hidden": torch.zeros(7, 6), "rows": torch.tensor([0])} | changes
    with pytest.raises(error, match=message):
        score_head(**arguments)


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"kind": "hinge"}, ValueError, "kind must be one of best"),
        ({"reduction": "max"}, ValueError, "reduction must be one of mean"),
        ({"rankings": torch.tensor([1, 2])}, ValueError, "rankings must have the shape of scores"),
        ({"rankings": torch.tensor([1.0, 2.0, 3.0])}, TypeError, "rankings must be an int32 or int64 tensor"),
        ({"rankings": torch.tensor([0, 1, 2])}, ValueError, r"rankings must be 1 \(best\) or more, got 0"),
        ({"offsets": torch.tensor([0, 2])}, ValueError, r"offsets must ascend from 0 to 3, got \[0, 2\]"),
        ({"offsets": torch.tensor([0, 2, 1, 3])}, ValueError, "offsets must ascend"),
        ({"offsets": torch.tensor([0, 2, 2, 3])}, ValueError, "sample 1 has no responses"),
        ({"offsets": torch.tensor([0])}, ValueError, "offsets must have one entry more"),
        ({"kind": "soft"}, TypeError, "targets of kind 'soft'"),
        ({"kind": "soft", "rankings": torch.tensor([0.5, 0.2, 0.2])}, ValueError, "must sum to 1 in every sample"),
        ({"kind": "soft", "rankings": torch.tensor([1.5, -0.5, 0.0])}, ValueError, "must be at least 0"),
    ],
)
def test_loss_refuses(changes, error, message):
    arguments = {"scores": torch.zeros(3), "rankings": torch.tensor([1, 2, 3]), "offsets": torch.tensor([0, 3])}
    with pytest.raises(error, match=message):
        listwise_loss(**(arguments | changes))


def test_implementations_are_named_with_a_reason():
    table = implementations()
    attention = ("multi_response_attention", "multi_response_attention, causal rows")
    assert list(table) == [*attention, "score_head", "listwise_loss"]
    expected = dict.fromkeys(table, "reference") | dict.fromkeys(attention, "segments")
    assert {name: implementation for name, (implementation, reason) in table.items() if reason} == expected

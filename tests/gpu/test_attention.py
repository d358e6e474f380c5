"""The attention kernels on a GPU: exact on thousands of random rows, the same bits at every launch, long rows."""

import pytest
import torch
from attention_cases import check, random_case

import yojo
from yojo.patching import attention as patched_attention
from yojo_kernels import Layout, attention, multi_response_attention

pytestmark = pytest.mark.gpu
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
HEAD_DIMS = (16, 64, 72, 80, 96, 128, 256)


def on_gpu(case):
    return {
        **case,
        "layout": case["layout"].to("cuda"),
        "tensors": [tensor.cuda() for tensor in case["tensors"]],
    }


# Every ratio of heads, head dim and set of options is a compilation of seconds: many rows, but few of these.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("longest", [30, 250])
@pytest.mark.parametrize("seeds", range(20))
def test_results_are_as_exact_as_the_reference(dtype, longest, seeds, poison):
    for seed in range(25 * seeds, 25 * seeds + 25):
        case = random_case(seed, longest, head_dims=(64, 128), heads=((2, 2), (1, 3)))
        check(attention.multi_response_attention, on_gpu(case), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", HEAD_DIMS)
@pytest.mark.parametrize("group", [1, 8])
def test_every_head_dim(dtype, dim, group, poison):
    for seed in range(5):
        case = random_case(seed, 250, head_dims=(dim,), heads=((1, group),))
        check(attention.multi_response_attention, on_gpu(case), dtype)


def row_of(prompts, branches, heads=(8, 2), dim=128, dtype=torch.bfloat16, blocks=None):
    layout = Layout.build(prompts, branches, bidirectional=blocks, device="cuda")
    make = lambda h: torch.randn(layout.num_tokens, h, dim, dtype=dtype, device="cuda", requires_grad=True)  # noqa: E731
    return layout, [make(heads[0]), make(heads[1]), make(heads[1])]


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_thousand_launches_agree_to_the_bit(dim):
    layout, inputs = row_of([5000, 300], [[200] * 7, [31, 64, 129]], dim=dim)
    grad = first = None
    for _ in range(1000):
        output, lse = multi_response_attention(*inputs, layout, return_lse=True, impl="triton")
        grad = torch.randn_like(output) if grad is None else grad
        results = [output, lse, *torch.autograd.grad(output, inputs, grad)]
        first = first or results
        assert all(torch.equal(a, b) for a, b in zip(results, first, strict=True))


def test_a_row_of_100_000_tokens():
    layout, inputs = row_of([90_000, 1_000], [[500] * 16, [333] * 3], heads=(4, 1))
    own = slice(97_500, 98_000)  # the last branch of the first sample
    with torch.no_grad():
        # Over so many random keys every output is nearly 0: the prompt's end and the branch's own keys stand out.
        for rows in (slice(89_000, 90_000), own):
            inputs[2][rows] += 4
            inputs[1][rows] += 0.5 * torch.randn(128, dtype=torch.bfloat16, device="cuda")
    grad = torch.zeros(layout.num_tokens, 4, 128, dtype=torch.bfloat16, device="cuda")
    grad[own] = torch.randn(500, 4, 128, device="cuda").bfloat16()
    output = multi_response_attention(*inputs, layout, impl="triton")
    grads = torch.autograd.grad(output, inputs, grad)
    # The branch computed alone, in float64, from the prompt and itself.
    rows = torch.cat([torch.arange(90_000), torch.arange(97_500, 98_000)]).cuda()
    q = inputs[0].detach()[own].double().requires_grad_()
    k, v = (tensor.detach()[rows, 0].double().requires_grad_() for tensor in inputs[1:])
    scores = torch.einsum("qhd,kd->hqk", q, k) * 128**-0.5
    seen = torch.ones(500, 90_500, dtype=torch.bool, device="cuda").tril(90_000)
    alone = (scores.masked_fill(~seen, float("-inf")).softmax(-1) @ v).transpose(0, 1)
    expected = torch.autograd.grad(alone, (q, k, v), grad[own].double())
    got = grads[0][own], grads[1][rows, 0], grads[2][rows, 0]
    for name, one, other in zip(("output", "q", "k", "v"), (output[own], *got), (alone, *expected), strict=True):
        for part in (slice(0, 1_000), slice(-1_000, None)):  # of keys: the prompt's start; its end and the branch
            error = (one[part] - other[part]).norm() / other[part].norm()
            assert error <= 2e-2, f"{name}: relative error {error:.1e}"
    others = torch.ones(layout.num_tokens, dtype=torch.bool, device="cuda")
    others[rows] = False
    assert all(not tensor[others].any() for tensor in grads)


def test_offsets_beyond_32_bits():
    """Rows so far apart that the last begins beyond 2^31 entries, forward and backward."""
    layout = Layout.build([400], [[120, 100]], device="cuda")
    room = torch.empty(layout.num_tokens, attention.FARTHEST_ROWS - 16, dtype=torch.bfloat16, device="cuda")
    assert (layout.num_tokens - 1) * room.stride(0) > 2**31
    inputs = [room[:, at : at + 2 * 64].unflatten(1, (2, 64)) for at in (0, 1000, 2000, 3000)]
    for tensor in inputs:
        tensor.copy_(torch.randn(tensor.shape))
    results = []
    for copied in (False, True):
        q, k, v, grad = (tensor.clone() if copied else tensor for tensor in inputs)
        q, k, v = (tensor.detach().requires_grad_() for tensor in (q, k, v))
        output = multi_response_attention(q, k, v, layout, impl="triton")
        results.append([output, *torch.autograd.grad(output, (q, k, v), grad)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_memory_grows_with_tokens_alone():
    peaks = []
    for size in (8_000, 16_000, 32_000):
        layout, inputs = row_of([size], [[size // 8] * 8], heads=(4, 2))
        multi_response_attention(*inputs, layout, impl="triton").sum().backward()  # compiles, makes the tables
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        multi_response_attention(*inputs, layout, impl="triton").sum().backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del inputs
    # The workspace of split tiles does not grow: what comes on top of it doubles with the tokens. A mask, even of bits,
    # would make it four times as much.
    assert peaks[2] - peaks[1] <= 2.2 * (peaks[1] - peaks[0])


@pytest.mark.parametrize("blocks", [None, [0] * 300 + [-1] * 550])
def test_nothing_waits_for_the_device(blocks):
    layout, inputs = row_of([700], [[50, 80, 20]], blocks=blocks)
    grad = torch.randn_like(inputs[0])
    for window in (None, 100):  # compiles the kernels
        multi_response_attention(*inputs, layout, window=window, impl="triton").backward(grad)
    fresh = Layout.build([700], [[50, 80, 20]], bidirectional=blocks, device="cuda")
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for window in (None, 100):
            multi_response_attention(*inputs, fresh, window=window, impl="triton").backward(grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("tables_made_before", [True, False])
def test_a_graph_replays_what_was_captured(tables_made_before):
    layout, inputs = row_of([700], [[50, 80, 20]])
    grad = torch.randn_like(inputs[0])

    def step(layout):
        output = multi_response_attention(*inputs, layout, impl="triton")
        return [output.detach(), *torch.autograd.grad(output, inputs, grad)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what a capture needs first: everything compiled and allocated once
        expected = step(layout)
    torch.cuda.current_stream().wait_stream(side)
    used = layout if tables_made_before else Layout.build([700], [[50, 80, 20]], device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(used)
    assert bool(used._tables) == tables_made_before
    for tensor in captured:
        tensor.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
    # Outside the graph its layout still works: tables made during a capture are not kept.
    assert all(torch.equal(a, b) for a, b in zip(step(used), expected, strict=True))


def test_compiles_once_for_all_lengths_with_inductor():
    torch._dynamo.reset()
    attend = torch.compile(
        lambda q, k, v, row: multi_response_attention(q * 2, k, v, row), fullgraph=True, dynamic=True
    )
    with torch._dynamo.config.patch(error_on_recompile=True):
        for prompts, branches in (([200, 30, 20, 60], [[5, 6], [4], [3], [2, 1]]), ([310, 40], [[50, 6, 9], [2]])):
            layout, inputs = row_of(prompts, branches, heads=(14, 7))
            expected = multi_response_attention(inputs[0] * 2, *inputs[1:], layout, impl="triton")
            got = attend(*inputs, layout)
            assert torch.equal(got, expected)
            a, b = (torch.autograd.grad(output.sum(), inputs) for output in (got, expected))
            assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_on_the_second_device_too():
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU only")
    layout, inputs = row_of([100], [[20, 30]])
    there = [tensor.detach().to("cuda:1") for tensor in inputs]
    output = multi_response_attention(*there, layout.to("cuda:1"), impl="triton")
    assert torch.equal(output.cpu(), multi_response_attention(*inputs, layout, impl="triton").cpu())


def test_causal_rows_agree_whoever_computes_them():
    """impl="auto" may send them to flash attention; torch's own are there to be chosen once they are measured."""
    from yojo_kernels import causal

    layout, inputs = row_of([700, 90], [[150], [33]])
    exact = multi_response_attention(*(tensor.double() for tensor in inputs), layout, impl="reference")
    allowed = 2 * (multi_response_attention(*inputs, layout, impl="reference") - exact).norm()
    assert (multi_response_attention(*inputs, layout) - exact).norm() <= allowed
    if causal.has_torch_varlen():
        assert (causal.varlen(*inputs, layout, scale=128**-0.5)[0] - exact).norm() <= allowed


# ---- a whole model ----


@pytest.mark.parametrize("options", [{"mode": "comparative"}, {"mode": "isolated"}, {"permutations": 2}], ids=str)
def test_a_patched_qwen3_vl_in_bfloat16_scores_as_with_the_reference(make_reward_model, examples, monkeypatch, options):
    """Against float64 of the reference, the kernels are off by at most twice what the reference in bfloat16 is.

    A few scores are a draw of luck: the head reads every row of the batch, not the separators alone.
    """
    reward_model = make_reward_model(**options)
    reward_model.model.yojo.whole_last_layer = "all rows are compared"
    reward_model.model.cuda()
    batch = {name: value.to("cuda") for name, value in reward_model.collator(examples).items()}
    rows = torch.arange(batch["input_ids"].shape[1], device="cuda")
    hidden = []
    reward_model.model.score.register_forward_pre_hook(lambda head, arguments: hidden.append(arguments[0]))

    def scores(dtype, impl):
        def attend(*arguments, **keywords):
            return multi_response_attention(*arguments, impl=impl, **keywords)

        for parameter in reward_model.model.parameters():  # not the buffers: rotary frequencies stay as they are
            parameter.data = parameter.data.to(dtype)
        reward_model.model.score.to(torch.promote_types(dtype, torch.float32))
        inputs = {
            name: value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value
            for name, value in batch.items()
        }
        with monkeypatch.context() as patch, torch.inference_mode():
            patch.setattr(patched_attention, "multi_response_attention", attend)
            assert reward_model.model(**inputs).scores.isfinite().any(dim=1).all()
            return reward_model.model.score(hidden[-1], rows).double()

    for parameter in reward_model.model.parameters():
        parameter.data = parameter.data.to(torch.bfloat16)  # the same rounded weights for all
    exact = scores(torch.float64, "reference")
    peer = scores(torch.bfloat16, "reference")
    ours = scores(torch.bfloat16, "triton")
    error, allowed = ((one - exact).square().mean().sqrt() for one in (ours, peer))
    assert error <= 2 * allowed


def test_a_patched_model_uses_the_kernels(make_reward_model, examples, monkeypatch):
    from yojo_kernels import implementations

    assert implementations()["multi_response_attention"][0] == "triton"
    reward_model = make_reward_model(mode="isolated")
    reward_model.model.yojo.whole_last_layer = "all layers are counted"
    reward_model.model.cuda()
    launched = []
    real = attention.multi_response_attention
    monkeypatch.setattr(
        patched_attention, "multi_response_attention", lambda *a, **o: launched.append(1) or real(*a, **o)
    )
    assert isinstance(reward_model, yojo.RewardModel) and len(reward_model.score_many(examples)) == len(examples)
    assert len(launched) == reward_model.model.config.get_text_config().num_hidden_layers

"""A patched model whose attention runs in the kernels, interpreted: scores and gradients as with the reference."""

import functools

import pytest
import torch

import yojo
from yojo.patching import attention as patched_attention
from yojo_kernels import attention, launch, multi_response_attention

MODES = [{"mode": "comparative"}, {"mode": "isolated"}, {"mode": "comparative", "permutations": 2}]


@pytest.mark.parametrize("options", MODES, ids=lambda options: "-".join(map(str, options.values())))
def test_a_patched_model_scores_and_trains_as_with_the_reference(make_reward_model, samples, monkeypatch, options):
    prompts = ["Which digit?", "And here?"]
    examples = [
        yojo.Example(prompt, ["one", "it is a two", "3"][: 3 - i], images=[samples[i][0]], rankings=[2, 1, 3][: 3 - i])
        for i, prompt in enumerate(prompts)
    ]
    model = make_reward_model(layers=2, **options)
    model.model.yojo.whole_last_layer = "all layers run in the kernels"
    batch = model.collator(examples)
    results = []
    for impl in ("reference", "triton"):
        calls = []

        def attend(*arguments, impl=impl, calls=calls, **keywords):
            calls.append(impl)
            return multi_response_attention(*arguments, impl=impl, **keywords)

        monkeypatch.setattr(patched_attention, "multi_response_attention", attend)
        model.model.zero_grad()
        output = model.model(**batch)
        output.loss.backward()
        assert len(calls) == model.model.config.get_text_config().num_hidden_layers
        grads = {name: p.grad.clone() for name, p in model.model.named_parameters() if p.grad is not None}
        results.append((output.scores.detach(), grads))
    (scores, grads), (scores_there, grads_there) = results
    assert torch.allclose(scores, scores_there, rtol=0, atol=2e-6)
    assert grads.keys() == grads_there.keys() and any("q_proj" in name for name in grads)
    for name, grad in grads.items():
        assert (grad - grads_there[name]).norm() <= 1e-4 * grad.norm() + 1e-7, name
    tables = [name for name, _ in batch["layout"]._tables]  # made once, shared by all layers and heads
    assert sorted(tables) == ["key_tiles", "query_tiles"]


@pytest.mark.parametrize("options", MODES, ids=lambda options: "-".join(map(str, options.values())))
@torch.no_grad()
def test_flops_of_a_pass_through_the_kernels(make_reward_model, samples, monkeypatch, options):
    """The operator says how many pairs it computes: those that are visible."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from yojo.costs.flops import batch_flops

    monkeypatch.setattr(
        patched_attention,
        "multi_response_attention",
        functools.partial(multi_response_attention, impl="triton"),
    )
    assert attention and launch.INTERPRETED  # formulas are known before the counter is made, which copies them
    model = make_reward_model(layers=2, **options)
    model.model.yojo.whole_last_layer = "all layers run in the kernels"
    example = yojo.Example("Which digit?", ["one", "it is a two", "3"], images=[samples[0][0]])
    batch = model.collator([example, yojo.Example("And here?", ["a", "it is a b"])])
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # which the counter sees, on a CPU
        model.model(**batch)
    assert batch_flops(model.model, batch).total == counter.get_total_flops()

"""Fused decoder layers on a GPU: scores and gradients as with the layers as they are, and no graph for another length."""

import importlib.util

import pytest
import torch
from family_cases import patched
from fuse_cases import batches_of, check_training, pair, text_row

from yojo.patching import fuse

pytestmark = pytest.mark.gpu

liger = pytest.param(
    "liger", marks=pytest.mark.skipif(importlib.util.find_spec("liger_kernel") is None, reason="needs liger-kernel")
)


def to_gpu(batch):
    return {name: value.to("cuda") for name, value in batch.items()}


@pytest.mark.parametrize("how", ["compile", liger])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "gemma3", "molmo2"])
def test_fused_layers_score_and_train_as_they_are(family, how):
    model, plain, collator = pair(family, how)
    model.cuda(), plain.cuda()
    batches = [to_gpu(batch) for batch in batches_of(family, collator)]
    for batch in [batches[0], *batches]:
        check_training(model, plain, batch, tolerance=1e-4)


@pytest.mark.parametrize("how", ["compile", liger])
def test_bfloat16_is_as_exact_as_unfused(how):
    model, plain, collator = pair("qwen3", how)
    batches = [text_row(collator, [60 + i, 9], [[4, 9, 3 + i], [2, 5, 5]]) for i in range(8)]
    with torch.no_grad():
        exact = [plain.double()(**batch).scores for batch in batches]
        errors = []
        for network in (model, plain):
            network.to("cuda", torch.bfloat16)
            moved = [to_gpu(batch) for batch in [batches[0], *batches]]
            scores = [network(**batch).scores.cpu() for batch in moved][1:]
            errors.append(sum((s - e).square().mean() for s, e in zip(scores, exact, strict=True)).sqrt())
    assert 0 < errors[0] <= 1.5 * errors[1]


def test_one_graph_whatever_the_lengths(monkeypatch):
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    monkeypatch.setattr(fuse, "BACKEND", counter)
    model, _, collator = pair("gemma3_text", "compile")
    model.cuda()
    rows = ([9], [[3]]), ([9], [[3]]), ([300, 40], [[90, 70], [4, 9, 30]]), ([5, 600], [[2], [70, 20, 9]])
    with torch.no_grad():
        for row in rows:
            assert model(**to_gpu(text_row(collator, *row))).scores.isfinite().any()
    assert counter.frame_count == 2  # sliding layers, and the others


def test_auto_fuses_here():
    model, collator = patched("llama")
    how = "compile" if importlib.util.find_spec("liger_kernel") is None else "liger"
    assert fuse.implementation()[0] == model.yojo.fusion.choose(torch.device("cuda"))[0] == how
    batch = text_row(collator, [9], [[3]])
    expected = model(**batch).scores
    model.cuda()
    for _ in range(2):
        assert (model(**to_gpu(batch)).scores.cpu() - expected).abs().max() <= 1e-5

"""The patched model on a GPU scores as it does on the CPU."""

import concurrent.futures

import pytest
import torch
import transformers

import yojo
from yojo.config import CHOICES
from yojo.patching import last_layer, versions
from yojo.patching.pooling import pool

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("mode", ["comparative", "isolated"])
def test_float32_scores_equal_the_cpus(make_reward_model, examples, mode):
    reward_model = make_reward_model(mode=mode)
    expected = reward_model.score_many(examples)
    reward_model.model.cuda()
    for got, scores in zip(reward_model.score_many(examples), expected, strict=True):
        assert got.device.type == "cpu" and (got - scores).abs().max() <= 1e-5


def test_bfloat16_scores_are_near_and_repeat_to_the_bit(make_reward_model, examples, tmp_path):
    make_reward_model(mode="isolated").save_pretrained(tmp_path)
    exact = yojo.RewardModel.from_pretrained(tmp_path)
    half = yojo.RewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16, device="cuda")
    first, second = half.score_many(examples), half.score_many(examples)
    assert all(map(torch.equal, first, second))
    on_cpu = yojo.RewardModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    error = max((a - b).abs().max() for a, b in zip(first, exact.score_many(examples), strict=True))
    error_on_cpu = max(
        (a - b).abs().max() for a, b in zip(on_cpu.score_many(examples), exact.score_many(examples), strict=True)
    )
    assert error <= 2 * error_on_cpu  # no worse than twice what the same precision costs elsewhere


def test_pinned_batches_of_a_loader_arrive_whole(make_reward_model, examples):
    reward_model = make_reward_model(mode="isolated")
    expected = reward_model.model(**reward_model.collator(examples)).scores
    loader = torch.utils.data.DataLoader(
        examples, batch_size=5, collate_fn=reward_model.collator, pin_memory=True, num_workers=1
    )
    reward_model.model.cuda()
    (batch,) = list(loader)
    assert batch["input_ids"].is_pinned() and batch["layout"].sample.is_pinned()
    assert batch["separators"].rows.is_pinned()
    batch = {name: value.to("cuda", non_blocking=True) for name, value in batch.items()}
    scores = reward_model.model(**batch).scores.cpu()
    finite = expected.isfinite()
    assert torch.equal(finite, scores.isfinite()) and (scores - expected)[finite].abs().max() <= 1e-5


@pytest.mark.parametrize("ranked", [False, True])
def test_tables_of_the_collator_are_those_the_gpu_makes(make_reward_model, examples, ranked):
    """And a pass asks for no others."""
    reward_model = make_reward_model(mode="isolated", fuse="none")
    reward_model.model.yojo.whole_last_layer = "all layers run in the kernels"
    reward_model.model.cuda()
    collator = reward_model.collator
    batch = collator.pack([collator.encode(one, rankings=ranked) for one in examples])
    batch = {name: value.to("cuda") for name, value in batch.items()}
    made = dict(batch["layout"]._tables)
    assert {name for name, _ in made} == ({"query_tiles", "key_tiles"} if ranked else {"query_tiles"})
    with torch.set_grad_enabled(ranked):
        reward_model.model(**batch)
    assert set(batch["layout"]._tables) == set(made)
    batch["layout"]._tables.clear()
    for key, table in made.items():
        anew = batch["layout"].table(key)
        for one, other in zip(*((t,) if isinstance(t, torch.Tensor) else t for t in (table, anew)), strict=True):
            assert torch.equal(one, other)


def test_scores_of_many_rows_are_those_of_each(make_reward_model, examples):
    """One row ahead of the device, from one thread and from several."""
    reward_model = make_reward_model(mode="isolated")
    reward_model.model.cuda()
    expected = [reward_model.score_many([example])[0] for example in examples]
    torch.cuda.set_sync_debug_mode(
        "error"
    )  # waiting for an event, which the scores of a row are waited for by, is none
    try:
        found = reward_model.score_many(examples, token_budget=1)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, found, expected))
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for found in pool.map(lambda _: reward_model.score_many(examples, token_budget=1), range(8)):
            assert all(map(torch.equal, found, expected))


def test_a_layout_left_on_the_cpu_is_moved(make_reward_model, examples):
    """Trainer moves tensors and leaves other objects where they are."""
    reward_model = make_reward_model()
    reward_model.model.cuda()
    batch = reward_model.collator(examples)
    moved = {name: value.cuda() if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    assert reward_model.model(**moved).loss.isfinite()


def test_training_step_under_autocast(make_reward_model, examples):
    reward_model = make_reward_model(loss="plackett_luce")
    reward_model.model.cuda().train()
    reward_model.model.gradient_checkpointing_enable()
    batch = {name: value.to("cuda") for name, value in reward_model.collator(examples).items()}
    with torch.autocast("cuda", dtype=torch.bfloat16):
        output = reward_model.model(**batch)
    assert output.scores.dtype == torch.float32
    output.loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in reward_model.model.parameters())
    assert reward_model.model.score.weight1.grad.abs().max() > 0


@pytest.mark.parametrize("pooling", CHOICES["pooling"])
def test_poolings_equal_the_cpus_wait_for_nothing_and_repeat_to_the_bit(make_reward_model, examples, pooling):
    separators = make_reward_model(permutations=2, pooling=pooling).collator(examples)["separators"]
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(int(separators.read.max()) + 1, 96, generator=generator).bfloat16()
    expected = pool(hidden, separators.read, pooling, separators.lengths)
    weight = torch.randn(expected.shape, generator=generator)

    def run(hidden, separators, weight):
        hidden = hidden.clone().requires_grad_()
        pooled = pool(hidden, separators.read, pooling, separators.lengths)
        (pooled * weight).sum().backward()
        return pooled.detach(), hidden.grad

    moved = [x.to("cuda") for x in (hidden, separators, weight)]
    first = run(*moved)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = run(*moved)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(map(torch.equal, first, second))
    pooled, gradient = run(hidden, separators, weight)
    assert torch.equal(first[0].cpu(), pooled) and torch.equal(pooled, expected)
    assert (first[1].cpu().float() - gradient.float()).abs().max() <= 2**-7 * gradient.abs().max()


@pytest.mark.parametrize("share", [0, 1])
@pytest.mark.parametrize("layout_on", ["cpu", "cuda"])
@pytest.mark.parametrize("mode", ["comparative", "isolated"])
@pytest.mark.parametrize("images", [False, True])
def test_nothing_waits_between_a_batch_and_its_scores(
    make_reward_model, examples, images, mode, layout_on, share, monkeypatch
):
    """Qwen3-VL, rows of text alone and with images; the last layer for all rows and for those that are read."""
    if images and not versions.places_features():
        pytest.skip(f"transformers {transformers.__version__} places image features itself, and waits (5.18: never)")
    monkeypatch.setattr(last_layer, "LARGEST_SHARE", share)
    monkeypatch.setattr(last_layer, "FEWEST_FLOPS", 0)
    reward_model = make_reward_model(mode=mode)
    reward_model.model.cuda()
    row = examples if images else [example for example in examples if not example.images]

    def arrived():
        """A batch nobody has seen yet, so that its tables are to be made; Trainer leaves layouts on the CPU."""
        batch = reward_model.collator(row)
        stays = {name for name, value in batch.items() if not isinstance(value, torch.Tensor)}
        stays = stays if layout_on == "cpu" else set()
        return {name: value if name in stays else value.to("cuda") for name, value in batch.items()}

    def run(batch):
        with torch.inference_mode():
            return reward_model.model(**batch)

    for _ in range(3):  # kernels are compiled, libraries initialised
        expected = run(arrived()).scores
    batch = arrived()
    torch.cuda.set_sync_debug_mode("error")
    try:
        output = run(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(output.scores, expected) and output.loss.isfinite()


def test_the_last_layer_for_the_rows_that_are_read(make_reward_model, examples, monkeypatch):
    monkeypatch.setattr(last_layer, "LARGEST_SHARE", 1)
    monkeypatch.setattr(last_layer, "FEWEST_FLOPS", 0)
    reward_model = make_reward_model(mode="isolated", fuse="none")
    model = reward_model.model.cuda()
    batch = {name: value.to("cuda") for name, value in reward_model.collator(examples).items()}
    results = []
    for reason in (None, "for comparison"):
        model.yojo.whole_last_layer = reason
        model.zero_grad()
        output = model(**batch)
        output.loss.backward()
        grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.scores.detach(), grads))
    (scores, grads), (expected, expected_grads) = results
    finite = expected.isfinite()
    assert (scores - expected)[finite].abs().max() <= 1e-5 and grads.keys() == expected_grads.keys()
    largest = max(float(gradient.abs().max()) for gradient in expected_grads.values())
    for name, gradient in grads.items():
        bound = max(1e-3 * float(expected_grads[name].abs().max()), 1e-5 * largest)
        assert (gradient - expected_grads[name]).abs().max() <= bound, name

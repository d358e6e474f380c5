"""Scoring N responses to one image prompt: one pass of YOJO against N single passes, on the demonstration's model."""

import random

import pytest
import torch

import yojo
from bench.timing import figures
from yojo.demo import digits
from yojo.demo.backbone import load_backbone
from yojo.demo.run import single_inputs, single_scores

COUNTS = (1, 2, 4, 8, 16)
VARIANTS = {"single": "isolated", "yojo_comparative": "comparative", "yojo_isolated": "isolated"}


@pytest.fixture(scope="module")
def models(device):
    """mode -> `RewardModel` on the device."""
    made = {}
    for mode in ("comparative", "isolated"):
        model, processor = load_backbone()
        made[mode] = yojo.RewardModel(yojo.patch(model.to(device).eval(), processor, mode=mode), processor)
    return made


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_score(benchmark, models, device, record, variant, count):
    reward_model = models[VARIANTS[variant]]
    rng = random.Random(count)
    image, _ = digits.load_digits_split()[1][0]
    responses = [digits.caption(rng.randrange(10), rng) for _ in range(count)]
    example = yojo.Example(digits.PROMPT, responses, images=[image])
    batch = {name: value.to(device) for name, value in reward_model.collator([example]).items()}
    singles = [
        {name: value.to(device) for name, value in one.items()} for one in single_inputs(models["isolated"], example)
    ]

    @torch.inference_mode()
    def packed():
        return reward_model.model(**batch).scores[0]

    call = packed if variant != "single" else lambda: single_scores(reward_model, singles)
    # Nothing wrong is ever timed: one pass must give what N passes give.
    if variant != "yojo_comparative":
        assert (packed() - single_scores(models["isolated"], singles)).abs().max() <= 1e-4
    assert call().isfinite().all()

    def timed():
        scores = call()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return scores

    benchmark.group = f"{count} responses"
    benchmark.pedantic(timed, rounds=20, warmup_rounds=3)
    times = benchmark.stats.stats.data
    layout = batch["layout"]
    record(
        bench="score",
        variant=variant,
        impl="reference",
        fuse="none",
        mode=VARIANTS[variant],
        model="demo",
        dtype="float32",
        responses=count,
        prompt_tokens=layout.prompt_lengths[0],
        response_tokens=sum(layout.branch_lengths[0]) / count,
        **figures(times),
        **{"pass": "forward"},
    )

"""VL-RewardBench: 1,250 pairs about an image, in three groups of very different size and difficulty."""

import re

import numpy as np

from yojo.evaluation.benchmarks import benchmark, figures

GROUPS = {
    "RLAIF": "hallucination", "RLHF": "hallucination", "hallucination": "hallucination",
    "mathverse": "reasoning", "mmmu": "reasoning",
    "wildvision": "general",
}  # fmt: skip


def parse(record):
    """A record -> `Parsed`; the id up to its first `_` or `-` tells the group, "general" where it says nothing."""
    responses = benchmark.texts(record, "response")
    ranking = benchmark.present(record, "human_ranking")
    if not isinstance(ranking, (list, tuple)):
        raise ValueError(f"human_ranking must be a list, got {type(ranking).__name__}")
    if len(responses) != 2:
        raise ValueError(f"response must hold two answers, got {len(responses)}")
    if list(ranking) not in ([0, 1], [1, 0]):
        raise ValueError(
            f"human_ranking must be [0, 1] (the first is better) or [1, 0]: there are no ties, got {ranking}"
        )
    name = benchmark.name_of(record, "id") or benchmark.text(record, "id")
    return benchmark.Parsed(
        prompt=benchmark.text(record, "query"), responses=responses, rankings=[int(place) + 1 for place in ranking],
        images=benchmark.images(record, "image"), id=name, question=name,
        group=GROUPS.get(re.split("[_-]", name)[0], "general"),
        tags=benchmark.tags_of(record, "query_source"),
    )  # fmt: skip


def official(judged):
    """accuracy over all items, macro_accuracy over the groups, and each group's."""
    found = figures.accuracies(figures.checked(judged))
    return {**found, "macro_accuracy": float(np.mean([found[key] for key in found if key != "accuracy"]))}


BENCHMARKS = (
    benchmark.Benchmark(
        name="vl-rewardbench",
        title="VL-RewardBench",
        paper="https://arxiv.org/abs/2411.17451",
        hub="MMInstruction/VL-RewardBench",
        patterns=("data/test-*",),
        split="test",
        counts={"general": 183, "hallucination": 749, "reasoning": 318},
        fields=("id", "query", "response", "image", "human_ranking"),
        optional=("query_source",),
        confirmed=True,
        headline="accuracy",
        notes="Micro and macro averages differ much: three of five items are of the group hallucination. The authors' "
        "script takes answers without a verdict out of the denominator; here a refusal is wrong. Equal scores get"
        " half credit.",
        published={
            "Molmo2-4B RM": 82.2, "Qwen3-VL-4B RM": 63.3, "GPT-5 as judge": 75.0, "Skywork-VL-Reward 7B": 69.0,
            "IXC-2.5-Reward 7B": 70.0,
        },
        parse=parse,
        official=official,
    ),
)  # fmt: skip

"""Multimodal RewardBench: pairs about an image in six categories, two of them halved."""

from yojo.evaluation.benchmarks import benchmark, figures

# Category -> (beginning of the ID, lower case; sub-score where it begins so; sub-score of the others).
HALVES = {"reasoning": ("math", "math", "coding"), "safety": ("pairs", "bias", "toxicity")}
RANKS = {"Output1": (1, 2), "Output2": (2, 1)}


def parse(record):
    """A record -> `Parsed`; the group is the category, "reasoning/math" and the like for those that are halved."""
    name = benchmark.name_of(record, "ID") or benchmark.text(record, "ID")
    category = benchmark.text(record, "Category")
    group = category
    if category in HALVES:
        beginning, there, other = HALVES[category]
        group = f"{category}/{there if name.lower().startswith(beginning) else other}"
    return benchmark.Parsed(
        prompt=benchmark.text(record, "Text"),
        responses=[benchmark.text(record, "Output1"), benchmark.text(record, "Output2")],
        rankings=benchmark.labelled(record, "Better", RANKS),
        images=benchmark.images(record, "Image"),
        id=name, question=name, group=group, tags={"category": category},
    )  # fmt: skip


def official(judged):
    """accuracy over all items, and each group's; those of the halved categories as a whole beside their halves."""
    judged = figures.checked(judged)
    halved = figures.by(judged, lambda item: item.group.split("/")[0])
    whole = {f"group/{name}": figures.accuracy(items) for name, items in halved.items() if name in HALVES}
    return figures.accuracies(judged) | whole


BENCHMARKS = (
    benchmark.Benchmark(
        name="multimodal-rewardbench",
        title="Multimodal RewardBench",
        paper="https://arxiv.org/abs/2502.14191",
        hub=None,
        patterns=(),
        split="all_data.json",
        counts={},
        fields=("ID", "Text", "Image", "Output1", "Output2", "Better", "Category"),
        confirmed=True,
        headline="accuracy",
        notes="Its images are downloaded by scripts/0_download_data.py of "
        "github.com/facebookresearch/multimodal_rewardbench, which writes data/all_data.json; paths start beside "
        "it. The paper has 5,000 items; those on Hateful Memes are not public. The authors' script flips a coin "
        "where there is no verdict; here equal scores get half credit and a refusal is wrong.",
        published={
            "Molmo2-4B RM": 73.2, "Qwen3-VL-4B RM": 71.2, "GPT-5 as judge": 64.6, "Skywork-VL-Reward 7B": 74.2,
            "IXC-2.5-Reward 7B": 66.6,
        },
        parse=parse,
        official=official,
    ),
)  # fmt: skip

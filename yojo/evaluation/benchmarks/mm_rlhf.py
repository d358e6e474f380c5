"""MM-RLHF-RewardBench: 170 pairs about an image or a video; several share an id, and all of those must be right."""

import collections

import numpy as np

from yojo.evaluation.benchmarks import benchmark, figures

# The group is the first of these that the path of the image, else of the video, contains.
GROUPS = ("mcq", "long", "short", "safety", "video")
FRAMES = 32


def parse(record):
    """A record -> `Parsed`; chosen is the first response, always."""
    there = [medium for medium in ("image", "video") if benchmark.holds(record, medium)]
    if len(there) != 1:
        said = (
            "both image and video"
            if there
            else f"neither image nor video; the record has {', '.join(map(str, record))}"
        )
        raise ValueError(f"{said}: a record of this benchmark has one of them")
    (medium,) = there
    name = benchmark.name_of(record, "id") or benchmark.text(record, "id")
    path = _path(record[medium])
    return benchmark.Parsed(
        prompt=benchmark.text(record, "prompt"),
        responses=[benchmark.text(record, "chosen"), benchmark.text(record, "rejected")],
        rankings=[1, 2], **{f"{medium}s": [record[medium]]}, frames=FRAMES, id=name, question=name,
        group=next((group for group in GROUPS if group in path), "other"),
    )  # fmt: skip


def _path(source):
    if isinstance(source, dict):
        source = source.get("path")
    return source if isinstance(source, str) else ""


def all_right(judged):
    """ACC+: the share of ids of which every item is right, in the same order of each; the mean over the orders.

    Args:
        judged: list of `Judged`. Where all items of an id are given m times, the id counts m times.

    Returns:
        float in [0, 1].
    """
    right = weight = 0.0
    for items in figures.by(judged, lambda item: item.id).values():
        times = max(collections.Counter(item.number for item in items).values())
        orders = figures.together(*(figures.verdicts(item, figures.strict) for item in items))
        right += times * float(np.mean([all(order) for order in orders]))
        weight += times
    return right / weight


def _credit(item):
    return figures.credit(item, figures.strict)


def official(judged):
    """accuracy (ACC, a tie is wrong) and accuracy_plus (ACC+), of all and by group.

    An id of which an item is in a group counts in that group's ACC+, where all its items must be right, as for all.
    """
    judged = figures.checked(judged)
    found = figures.accuracies(judged, _credit) | {"accuracy_plus": all_right(judged)}
    for group, items in figures.by(judged, lambda item: item.group).items():
        ids = {item.id for item in items}
        found[f"group_plus/{group}"] = all_right([item for item in judged if item.id in ids])
    return found


BENCHMARKS = (
    benchmark.Benchmark(
        name="mm-rlhf-rewardbench",
        title="MM-RLHF-RewardBench",
        paper="https://arxiv.org/abs/2502.10391",
        hub="yifanzhang114/MM-RLHF-RewardBench",
        patterns=("mm_reward_bench.jsonl", "images/*"),
        split="mm_reward_bench.jsonl",
        counts={benchmark.ALL: 170},
        fields=("id", "prompt", "chosen", "rejected"),
        optional=("image", "video"),
        confirmed=True,
        headline="accuracy",
        notes="Chosen is always the first response: a judge that sees one order only is rewarded for liking the first. "
        "Equal scores are wrong. A folder of frames is shown as 32 evenly spaced ones, as in the authors' code; "
        "one with fewer, whole. The group is told by the path of the image or video ('other' where it names "
        "none).",
        published={
            "Molmo2-4B RM": 92.4, "Qwen3-VL-4B RM": 84.7, "GPT-5 as judge": 71.8, "Skywork-VL-Reward 7B": 72.4,
            "IXC-2.5-Reward 7B": 71.2,
        },
        parse=parse,
        official=official,
    ),
)  # fmt: skip

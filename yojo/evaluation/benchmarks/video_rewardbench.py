"""VideoRewardBench: 1,563 pairs about a video, in five categories."""

from yojo.evaluation.benchmarks import benchmark, figures


def parse(record):
    """A record, its columns mapped -> `Parsed`."""
    return benchmark.Parsed(
        prompt=benchmark.text(record, "prompt"),
        responses=[benchmark.text(record, "chosen"), benchmark.text(record, "rejected")],
        rankings=[1, 2],
        videos=benchmark.videos(record, "video"),
        fps=record.get("fps"),
        id=benchmark.name_of(record, "id"),
        question=benchmark.name_of(record, "question"),
        group=benchmark.name_of(record, "group") or benchmark.ALL,
    )


def official(judged):
    """accuracy over all items, and each group's."""
    return figures.accuracies(figures.checked(judged))


BENCHMARKS = (
    benchmark.Benchmark(
        name="videorewardbench",
        title="VideoRewardBench",
        paper="https://arxiv.org/abs/2509.00484",
        hub="Dragonriser/VideoRewardBench",
        patterns=(),
        split="test",
        counts={benchmark.ALL: 1563},
        fields=("prompt", "chosen", "rejected", "video"),
        optional=("id", "question", "group", "fps"),
        confirmed=False,
        headline="accuracy",
        notes="Published: 1,563 items on 1,482 videos: long-form perception 283, short-form perception 413, knowledge "
        "238, reasoning 278, safety 351. The layout of its files is not confirmed: map the columns, the category "
        "as group. Equal scores get half credit.",
        published={
            "Molmo2-4B RM": 66.3, "Qwen3-VL-4B RM": 64.9, "GPT-5 as judge": 68.2, "Skywork-VL-Reward 7B": 62.9,
            "IXC-2.5-Reward 7B": 57.1,
        },
        parse=parse,
        official=official,
    ),
)  # fmt: skip

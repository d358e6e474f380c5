"""JudgeBench: 620 pairs of answers to hard questions, one of them correct; a judge sees each pair in both orders."""

import functools

import numpy as np

from yojo.evaluation.benchmarks import benchmark, figures

# Beginning of the source -> group.
GROUPS = {
    "mmlu-pro": "knowledge",
    "livebench-reasoning": "reasoning",
    "livebench-math": "math",
    "livecodebench": "coding",
}
RANKS = {"A>B": (1, 2), "B>A": (2, 1)}
COUNTS = {
    "gpt": {"knowledge": 154, "reasoning": 98, "math": 56, "coding": 42},
    "claude": {"knowledge": 154, "reasoning": 51, "math": 34, "coding": 31},
}  # fmt: skip


def parse(split, record):
    """A record -> `Parsed`.

    Args:
        split: "gpt" or "claude", whose answers the record must hold; None = either's.
        record: dict.
    """
    name = benchmark.name_of(record, "pair_id") or benchmark.text(record, "pair_id")
    source = benchmark.text(record, "source")
    model = benchmark.name_of(record, "response_model")
    own = next((word for word in COUNTS if model and word in model), None)
    if split and model and own != split:
        raise ValueError(
            f"response_model is {model!r}, which is not of the split {split}: open judgebench-{own or '...'}, or "
            "judgebench for both"
        )
    asked = benchmark.name_of(record, "original_id")
    return benchmark.Parsed(
        prompt=benchmark.text(record, "question"),
        responses=[benchmark.text(record, "response_A"), benchmark.text(record, "response_B")],
        rankings=benchmark.labelled(record, "label", RANKS), literal_tags=True, id=name,
        question=name if asked is None else f"{source}/{asked}",
        group=next((group for beginning, group in GROUPS.items() if source.startswith(beginning)), source),
        tags={"source": source, **({"split": split or own} if split or own else {})},
    )  # fmt: skip


def agreed(item):
    """1 where an item's verdicts together agree with the label: more orders prefer the better answer than the other.

    With two orders that is the paper's rule: one verdict right and one a tie is right, one right and one wrong is not.
    With one order (a judge to which order says nothing) it is that verdict. Equal scores are a tie; a refusal is wrong.
    """
    if item.scores is None:
        return 0.0
    better, worse = (np.asarray(item.scores)[:, mask].ravel() for mask in (item.best, ~item.best))
    return float(np.sign(better - worse).sum() > 0)


def official(judged):
    """accuracy over all items, each group's, and split/gpt, split/claude where the split is known."""
    judged = figures.checked(judged)
    splits = figures.by([item for item in judged if "split" in item.tags], lambda item: item.tags["split"])
    return {
        **figures.accuracies(judged, agreed),
        **{f"split/{name}": figures.accuracy(items, agreed) for name, items in splits.items()},
    }


def _variant(split):
    counts = COUNTS[split] if split else {g: sum(each[g] for each in COUNTS.values()) for g in GROUPS.values()}
    return benchmark.Benchmark(
        name="judgebench" + (f"-{split}" if split else ""),
        title="JudgeBench" + (f" ({split} split)" if split else ""),
        paper="https://arxiv.org/abs/2410.12784",
        hub="ScalerLab/JudgeBench",
        patterns=(f"*{split}*",) if split else ("*gpt*", "*claude*"),
        split=split or "gpt, claude",
        counts=counts,
        fields=("pair_id", "question", "response_A", "response_B", "label", "source"),
        optional=("original_id", "response_model"),
        confirmed=True,
        headline="accuracy",
        notes="Text only. An item is right when its verdicts together (both orders) agree with the label, so a judge "
        "that only looks at places gets 0. One released pair (claude split) holds the same answer twice: it "
        "cannot be judged, and skip_bad leaves it out.",
        parse=functools.partial(parse, split),
        official=official,
    )


BENCHMARKS = tuple(map(_variant, (None, *COUNTS)))

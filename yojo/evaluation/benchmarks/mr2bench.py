"""MR2Bench-Image and MR2Bench-Video: whole rankings of many responses, and variants with two or four of them."""

import functools

import numpy as np

from yojo.evaluation import metrics
from yojo.evaluation.benchmarks import benchmark, figures


def parse(count, medium, record):
    """A record, its columns mapped -> `Parsed`.

    Args:
        count: how many responses it must have; None = two or more.
        medium: "image" or "video".
        record: dict.
    """
    responses = benchmark.texts(record, "responses")
    if count is not None and len(responses) != count:
        raise ValueError(f"{len(responses)} responses, this variant has {count}: is another one meant?")
    rankings = benchmark.present(record, "rankings")
    if not isinstance(rankings, (list, tuple)):
        raise ValueError(f"rankings must be a list of ranks, 1 = best, got {type(rankings).__name__}")
    found = benchmark.images(record, medium) if medium == "image" else benchmark.videos(record, medium)
    return benchmark.Parsed(
        prompt=benchmark.text(record, "prompt"), responses=responses, rankings=list(rankings),
        fps=record.get("fps"), id=benchmark.name_of(record, "id"), question=benchmark.name_of(record, "question"),
        group=benchmark.name_of(record, "group") or benchmark.ALL, **{f"{medium}s": found},
    )  # fmt: skip


def official(judged):
    """best_of_n, pairwise (of all pairs ranked differently, equal scores count half), kendall_tau (tau-b, in [-1, 1]).

    Each is the mean over an item's orders. kendall_tau of equal scores is 0, as a coin's; of a refusal -1, as where all
    pairs are wrong.
    """
    judged = figures.checked(judged)
    measured = [(item.group, *_measured(item)) for item in judged]
    found = _figures(measured)
    for group in dict.fromkeys(item.group for item in judged):
        of_group = _figures([each for each in measured if each[0] == group])
        found[f"group/{group}"] = of_group["best_of_n"]
        found |= {f"{key}/{group}": of_group[key] for key in ("pairwise", "kendall_tau")}
    return found


def _measured(item):
    """(best-of-n credit, pairs that are right, pairs, tau), means over the item's orders."""
    ranks = np.asarray(item.rankings)
    count = float((ranks[:, None] < ranks[None, :]).sum())
    if item.scores is None:
        return 0.0, 0.0, count, -1.0
    right = [won + tied / 2 for won, tied, _ in (metrics.pairs(scores, ranks) for scores in item.scores)]
    taus = np.nan_to_num([metrics.kendall_tau(scores, ranks) for scores in item.scores])
    return figures.credit(item), float(np.mean(right)), count, float(np.mean(taus))


def _figures(measured):
    _, best, right, count, taus = zip(*measured, strict=True)
    return {"best_of_n": float(np.mean(best)), "pairwise": sum(right) / sum(count), "kendall_tau": float(np.mean(taus))}


# Those of MR2Bench-Image are all multiples of 1/240, as an accuracy over 240 items would be and a mean tau would not.
PUBLISHED = {
    "image": {
        "Molmo2-4B RM": 62.5, "Qwen3-VL-4B RM": 58.8, "GPT-5 as judge": 87.1, "Skywork-VL-Reward 7B": 52.9,
        "IXC-2.5-Reward 7B": 55.0,
    },
    "video": {
        "Molmo2-4B RM": 50.7, "Qwen3-VL-4B RM": 47.5, "GPT-5 as judge": 50.1, "Skywork-VL-Reward 7B": 46.7,
        "IXC-2.5-Reward 7B": 48.7,
    },
}  # fmt: skip


def _variant(medium, count):
    return benchmark.Benchmark(
        name=f"mr2bench-{medium}" + ("" if count is None else f"-{count}"),
        title=f"MR2Bench-{medium.title()}" + ("" if count is None else f", {count} responses"),
        paper="https://arxiv.org/abs/2604.10966",
        hub="yinuoy/MR2Bench",
        patterns=(),
        split="test",
        counts={},
        fields=("prompt", "responses", "rankings", medium),
        optional=("id", "question", "group", *(("fps",) if medium == "video" else ())),
        confirmed=False,
        headline="best_of_n",
        notes="The layout of its files (JSON, under 1,000 records) is not confirmed: map the columns, and name the "
        "file of the variant that is meant. The paper reports one figure for it, which one is not confirmed: best-of-4 "
        "accuracy fits, so the published figures stand with the variant of 4 responses. Equal scores share the credit. "
        "kendall_tau is in [-1, 1].",
        published=PUBLISHED[medium] if count == 4 else {},
        parse=functools.partial(parse, count, medium),
        official=official,
    )


BENCHMARKS = tuple(_variant(medium, count) for medium in ("image", "video") for count in (None, 2, 4))

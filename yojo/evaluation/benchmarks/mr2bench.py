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
    """best_of_n, pairwise (over all pairs ranked differently, equal scores count half) and kendall_tau (tau-b, in [-1, 1]).

    Each is the mean over an item's orders. kendall_tau of equal scores is 0, as a coin's; of a refusal -1, as all pairs wrong.
    """
    judged = figures.checked(judged)
    groups = figures.by(judged, lambda item: item.group)
    figured = _figures(judged)
    for name, items in groups.items():
        of_group = _figures(items)
        figured[f"group/{name}"] = of_group["best_of_n"]
        figured |= {f"{key}/{name}": of_group[key] for key in ("pairwise", "kendall_tau")}
    return figured


def _figures(judged):
    right = count = 0.0
    taus = []
    for item in judged:
        ranks = np.asarray(item.rankings)
        count += float((ranks[:, None] < ranks[None, :]).sum())
        if item.scores is None:
            taus.append(-1.0)
            continue
        counts = [metrics.pairs(scores, ranks) for scores in item.scores]
        right += float(np.mean([won + tied / 2 for won, tied, _ in counts]))
        taus.append(float(np.mean(np.nan_to_num([metrics.kendall_tau(scores, ranks) for scores in item.scores]))))
    return {"best_of_n": figures.accuracy(judged), "pairwise": right / count, "kendall_tau": float(np.mean(taus))}


# The released figures of MR2Bench-Image are all a whole number of 240, and those of best-of-4 accuracy would be.
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
        notes="The layout of its files (JSON, under 1,000 records) is not confirmed: map the columns. The paper reports one "
        "figure for it and does not say here which; best-of-4 accuracy fits, and the published figures stand with the "
        "variant of 4 responses for that reason. Equal scores share the credit. kendall_tau is in [-1, 1].",
        published=PUBLISHED[medium] if count == 4 else {},
        parse=functools.partial(parse, count, medium),
        official=official,
    )


BENCHMARKS = tuple(_variant(medium, count) for medium in ("image", "video") for count in (None, 2, 4))

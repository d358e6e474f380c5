"""RewardBench 2: one correct answer among four in five subsets, and Ties, where many answers are correct."""

import numpy as np

from yojo.evaluation.benchmarks import benchmark, figures

TIES = "ties"
KINDS = ("ref", "tied")


def parse(record):
    """A record -> `Parsed`; the chosen answers come first and share rank 1, the rejected ones share rank 2."""
    chosen, rejected = benchmark.texts(record, "chosen"), benchmark.texts(record, "rejected")
    if not chosen or not rejected:
        raise ValueError(
            f"at least one chosen and one rejected answer are needed, got {len(chosen)} and {len(rejected)}"
        )
    for name, count in (("num_correct", len(chosen)), ("total_completions", len(chosen) + len(rejected))):
        if record.get(name) is not None and record[name] != count:
            raise ValueError(f"{name} is {record[name]}, but the record holds {count}")
    name = benchmark.name_of(record, "id") or benchmark.text(record, "id")
    subset = benchmark.text(record, "subset")
    info, question = {}, name
    if subset.lower() == TIES:
        kind, colon, number = name.partition(":")
        if kind not in KINDS or not colon or not number.isdigit():
            raise ValueError(f"the id of a Ties record must be 'ref:NUMBER' or 'tied:NUMBER', got {name!r}")
        if kind == "tied" and len(chosen) < 2:
            raise ValueError("a tied record needs two or more chosen answers: the formula compares them; it has one")
        info, question = {"kind": kind, "prompt": int(number)}, f"ties:{int(number)}"
    return benchmark.Parsed(
        prompt=benchmark.text(record, "prompt"), responses=[*chosen, *rejected],
        rankings=[1] * len(chosen) + [2] * len(rejected), literal_tags=True, id=name, question=question,
        group=subset, info=info,
    )  # fmt: skip


def ties(judged):
    """The score of the Ties subset and what it is made of.

    A prompt stands twice in it: as a reference, with one correct answer, and tied, with several. margin is the worst
    correct score minus the best wrong one, spread the best minus the worst correct score of the tied record:

        .30 share of tied records with margin > 0         + .30 share of reference records with margin > 0
        + .20 share of prompts with tied margin > spread  + .20 share with min(reference margin, tied margin) > spread
        + .01 mean of tanh(min(reference margin, tied margin) / spread - 1), 0 where that is 0 / 0

    so that it may leave [0, 1] by .01. Each order of the answers is a verdict of its own; a refusal is as wrong as can
    be (-1 in the last term).

    Args:
        judged: list of `Judged` with `info["kind"]` and `info["prompt"]`.

    Returns:
        dict: score, NaN where no prompt has both records; and its parts that can be computed.
    """
    records = {
        kind: figures.by([item for item in judged if item.info["kind"] == kind], lambda item: item.info["prompt"])
        for kind in KINDS
    }
    parts = {}
    for name, kind in (("reference", "ref"), ("tied", "tied")):
        items = [item for prompt in records[kind].values() for item in prompt]
        if items:
            parts[f"{name}_accuracy"] = figures.accuracy(items, lambda item: figures.credit(item, figures.strict))
    both = [pair for prompt in records["ref"] for pair in _pairs(records, prompt)]
    if not both:
        return {"score": float("nan"), **parts}
    means = np.mean([_terms(*pair) for pair in both], axis=0)
    parts |= dict(zip(("preferred", "preferred_hard", "margin"), map(float, means), strict=True))
    score = (
        0.30 * parts["tied_accuracy"]
        + 0.30 * parts["reference_accuracy"]
        + 0.20 * parts["preferred"]
        + 0.20 * parts["preferred_hard"]
        + 0.01 * parts["margin"]
    )
    return {"score": score, **parts}


def _pairs(records, prompt):
    """(reference, tied) of one prompt; several where a bootstrap has drawn it several times."""
    return zip(records["ref"][prompt], records["tied"].get(prompt, []), strict=False)


def _terms(reference, tied):
    """[3]: tied margin above spread, the same with the reference, tanh term; means over the orders of the two."""
    if reference.scores is None or tied.scores is None:
        return np.array([0.0, 0.0, -1.0])
    spreads = np.ptp(np.asarray(tied.scores)[:, tied.best], axis=1)
    orders = figures.together(
        figures.verdicts(reference, figures.margins), figures.verdicts(tied, figures.margins), spreads
    )
    of_reference, margin, spread = map(np.array, zip(*orders, strict=True))
    hard = np.minimum(of_reference, margin)
    with np.errstate(divide="ignore", invalid="ignore"):
        term = np.nan_to_num(np.tanh(hard / spread - 1), nan=0.0)
    return np.array([(margin > spread).mean(), (hard > spread).mean(), term.mean()])


def _credit(item):
    return figures.credit(item, figures.inverse)


def official(judged):
    """average over the subsets, each subset's score, and the parts of that of Ties."""
    judged = figures.checked(judged)
    scores = {}
    for subset, items in figures.by(judged, lambda item: item.group).items():
        if subset.lower() == TIES:
            of_ties = ties(items)
            scores[f"group/{subset}"] = of_ties.pop("score")
            scores |= {f"ties/{name}": value for name, value in of_ties.items()}
        else:
            scores[f"group/{subset}"] = figures.accuracy(items, _credit)
    subsets = [value for key, value in scores.items() if key.startswith("group/") and not np.isnan(value)]
    return {"average": float(np.mean(subsets)) if subsets else float("nan"), **scores}


BENCHMARKS = (
    benchmark.Benchmark(
        name="rewardbench2",
        title="RewardBench 2",
        paper="https://arxiv.org/abs/2506.01937",
        hub="allenai/reward-bench-2",
        patterns=("data/test-*",),
        split="test",
        counts={"Factuality": 475, "Focus": 495, "Math": 183, "Precise IF": 160, "Safety": 450, "Ties": 102},
        fields=("id", "prompt", "chosen", "rejected", "subset"),
        optional=("num_correct", "total_completions"),
        confirmed=True,
        headline="average",
        notes="Text only. The chosen answer stands first: a judge that sees one order only is rewarded for liking the "
        "first. Equal scores: 1 / number of the highest, where the chosen answer is among them. Ties has a "
        "formula of its own; where no prompt of it has both its records it has no score (NaN), and the average is"
        " over the other subsets.",
        parse=parse,
        official=official,
    ),
)

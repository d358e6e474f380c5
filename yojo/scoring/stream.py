"""Rows made ready -> their scores, as they come: reward models through packed rows, others by the handful or as they ask."""

import contextlib
import dataclasses
import functools
import itertools

import torch

from yojo.judges.judge import Refusal, answers_through, checked_scores

BATCH = 64  # examples that a judge is given at a time


@dataclasses.dataclass(frozen=True)
class Result:
    """What became of a `yojo.scoring.rows.Row`.

    Attributes:
        row: `Row`.
        scores: [N] float32 on the CPU, finite; None where there is an error.
        error: what is wrong with the row, or None.
        tokens: in packed rows; 0 where nobody counts them.
        filled: tokens of padding, its share.
    """

    row: object
    scores: torch.Tensor | None
    error: str | None = None
    tokens: int = 0
    filled: float = 0.0


def encoder_of(judge):
    """What makes examples ready for a judge, in a worker: function (example, number of the row), or None."""
    return functools.partial(judge.collator.encode, rankings=False) if answers_through(judge, "score_encoded") else None


def scored(judge, rows, token_budget=8192):
    """Score rows.

    Args:
        judge: anything with `score_many`; one with `score_encoded` (a `yojo.RewardModel`) gets what `encoder_of` made, and
            one with `score_each` the rows as it asks for them.
        rows: iterable of `Row`, all of them ready.
        token_budget: of a packed row.

    Yields:
        `Result`, in any order.
    """
    if answers_through(judge, "score_encoded"):
        yield from _through_model(judge, rows, token_budget)
    elif answers_through(judge, "score_each"):
        yield from _through_requests(judge, rows)
    else:
        yield from _through_judge(judge, rows)


def _through_model(model, rows, token_budget):
    waiting = {}  # by place in the stream

    def ready():
        for place, row in enumerate(rows):
            # What is ready is large, and the model's from here on.
            waiting[place] = dataclasses.replace(row, ready=None)
            yield row.ready

    with contextlib.closing(model.score_encoded(ready(), token_budget, errors="return")) as stream:
        for found in stream:
            error = None if found.error is None else _said(found.error, found.encoded.name)
            yield _result(waiting.pop(found.place), found.scores, error, found.tokens, found.filled)


def _through_requests(judge, rows):
    waiting = {}  # by place in the stream

    def examples():
        for place, row in enumerate(rows):
            waiting[place] = row
            yield row.ready

    with contextlib.closing(judge.score_each(examples(), errors="return")) as stream:
        for place, found in stream:
            row = waiting.pop(place)
            if isinstance(found, Exception):
                yield Result(row, None, _said(found, row.ready.name))
            else:
                yield _result(row, *checked_scores([row.ready], [found]))
    if waiting:
        name = type(judge).__name__
        raise ValueError(
            f"{name}.score_each gave nothing for {len(waiting)} examples ({next(iter(waiting.values())).id}, ...)"
        )


def _through_judge(judge, rows):
    rows = iter(rows)
    while batch := list(itertools.islice(rows, BATCH)):
        yield from _judged(judge, batch)


def _judged(judge, batch):
    examples = [row.ready for row in batch]
    try:
        found = judge.score_many(examples)
    except (TypeError, ValueError) as error:
        if len(batch) == 1:
            yield Result(batch[0], None, _said(error, examples[0].name))
            return
        for row in batch:  # whose it is
            yield from _judged(judge, [row])
        return
    for row, scores in zip(batch, checked_scores(examples, found), strict=True):
        yield _result(row, scores)


def _result(row, scores, error=None, tokens=0, filled=0.0):
    if isinstance(scores, Refusal):
        return Result(row, None, str(scores), tokens, filled)
    if error is None and (broken := (~scores.isfinite()).nonzero()[:, 0].tolist()):
        values = ", ".join(str(scores[n].item()) for n in broken)
        error = f"the scores of responses {', '.join(map(str, broken))} are not finite ({values})"
    return Result(row, None if error else scores, error, tokens, filled)


def _said(error, name):
    return str(error).removeprefix(f"{name}: ") or type(error).__name__

"""Items made ready -> what a judge says of them, as it comes: every item by itself, so that no score depends on company."""

import contextlib
import dataclasses
import itertools
import logging

import numpy as np
import torch

from yojo.inputs.orders import ordered, put_back
from yojo.judges.judge import Refusal, answers_through, checked_scores

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a judge has said of an item.

    Attributes:
        asked: `yojo.evaluation.asking.Asked`, less what was made ready.
        scores: [K, N] float32 array, response by response as the record has them; None where there are none.
        refused: why the judge gave no verdict, or None.
        error: why the item could not be scored, or None.
        tokens: (prompt, responses) of one order, or None where nobody counts them.
    """

    asked: object
    scores: np.ndarray | None = None
    refused: str | None = None
    error: str | None = None
    tokens: tuple | None = None


def encoder_of(judge):
    """What makes an example ready for a judge: function (example, orders, number) -> list of `Encoded`; or None."""
    return getattr(judge, "encode_orders", None) if answers_through(judge, "score_encoded") else None


def answers(judge, stream):
    """Ask a judge.

    A reward model gets a packed row for each item, with all orders of its responses behind one prompt; a judge with
    `score_each` gets a stream of examples, any other those of one item at a time. So which examples a judge sees together
    follows from the item alone.

    Args:
        judge: anything with `score_many`.
        stream: iterable of `Asked`, all of them ready.

    Yields:
        `Answer`, in any order.
    """
    stream = iter(stream)
    if encoder_of(judge) is not None:
        yield from _of_rows(judge, stream)
    elif answers_through(judge, "score_each"):
        yield from _of_stream(judge, stream)
    else:
        yield from (_of_item(judge, asked) for asked in stream)


def _light(asked):
    return dataclasses.replace(asked, ready=None)


def _of_item(judge, asked):
    examples = [ordered(asked.ready, order) for order in asked.orders]
    try:
        found = checked_scores(examples, judge.score_many(examples))
    except (TypeError, ValueError) as error:
        return Answer(_light(asked), error=_said(error, examples[0].name))
    return _answer(asked, found)


def _answer(asked, found):
    """From what a judge gave for each order: scores, a `Refusal`, or what is wrong with the example."""
    for one in found:
        if isinstance(one, str):
            return Answer(_light(asked), error=one)
    for k, one in enumerate(found):
        if isinstance(one, Refusal):
            return Answer(_light(asked), refused=f"order {k}: {one.reason}" if len(found) > 1 else one.reason)
    return _finite(asked, put_back(found, asked.orders))


def _finite(asked, scores):
    scores = scores.numpy()
    broken = sorted(set(np.nonzero(~np.isfinite(scores))[1].tolist()))
    if broken:
        values = ", ".join(dict.fromkeys(map(str, scores[~np.isfinite(scores)].tolist())))
        numbers = ", ".join(map(str, broken))
        return Answer(_light(asked), error=f"the scores of responses {numbers} are not finite ({values})")
    return Answer(_light(asked), scores)


def _said(error, name):
    return (str(error) or type(error).__name__).removeprefix(f"{name}: ")


def _of_stream(judge, stream):
    # number -> (asked, what each order gave so far); place in the stream -> (number, order, example)
    waiting, owners = {}, {}

    def examples():
        places = itertools.count()
        for asked in stream:
            waiting[asked.number] = (_light(asked), [None] * len(asked.orders))
            for k, order in enumerate(asked.orders):
                example = ordered(asked.ready, order)
                owners[next(places)] = (asked.number, k, example)
                yield example

    with contextlib.closing(judge.score_each(examples(), errors="return")) as found:
        for place, one in found:
            if place not in owners:
                raise ValueError(f"the judge's score_each gave something at place {place}, where nothing waits for it")
            number, k, example = owners.pop(place)
            asked, parts = waiting[number]
            parts[k] = _said(one, example.name) if isinstance(one, Exception) else checked_scores([example], [one])[0]
            if all(part is not None for part in parts):
                del waiting[number]
                yield _answer(asked, parts)
    if waiting or next(stream, None) is not None:
        raise ValueError(
            f"the judge's score_each ended, and gave nothing for {len(waiting) or 'the last'} of the items that it read"
        )


def _of_rows(model, stream):
    waiting, owners = {}, []  # number -> (asked, what each row gave so far); place in the stream -> (number, row)

    def rows():
        for asked in stream:
            waiting[asked.number] = (_light(asked), [None] * len(asked.ready))
            for k, encoded in enumerate(asked.ready):
                owners.append((asked.number, k))
                yield encoded

    # With a budget of one token nothing fills a row up that an item has begun.
    with contextlib.closing(model.score_encoded(rows(), token_budget=1, errors="return")) as found:
        for scored in found:
            number, k = owners[scored.place]
            asked, parts = waiting[number]
            parts[k] = scored if scored.error is None else _in_single_orders(model, scored)
            if all(part is not None for part in parts):
                del waiting[number]
                yield _of_parts(model, asked, parts)


def _in_single_orders(model, scored):
    """One order after the other, where memory does not suffice for all of them in a row."""
    encoded = scored.encoded
    if not isinstance(scored.error, MemoryError) or encoded.orders == 1:
        return scored
    logger.warning("%s: out of memory with %d orders in a row: one after the other", encoded.name, encoded.orders)
    found = list(model.score_encoded(encoded.one_by_one(), token_budget=1, errors="return"))
    if failed := [one for one in found if one.error is not None]:
        return failed[0]
    found.sort(key=lambda one: one.place)
    return dataclasses.replace(scored, scores=torch.cat([one.scores for one in found]), error=None)


def _of_parts(model, asked, parts):
    for part in parts:
        if part.error is not None:
            return Answer(asked, error=_said(part.error, part.encoded.name))
    encoded = parts[0].encoded
    tokens = len(encoded.prompt_ids), sum(map(len, encoded.responses)) // encoded.orders
    found = _finite(asked, model.of_orders([part.scores for part in parts], asked.orders))
    return dataclasses.replace(found, tokens=tokens)

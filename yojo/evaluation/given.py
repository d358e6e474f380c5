"""Scores that were made elsewhere, for the items of a benchmark: files of them, matched and checked."""

import collections
import itertools
from pathlib import Path

import numpy as np

from yojo.data.readers import DataError, open_source
from yojo.evaluation.judged import Judged
from yojo.inputs.digests import example_key

LARGEST = 3.4e38  # about float32's, as for judges that are asked here: sums and differences of such scores are finite


def given_scores(path, items):
    """Scores of a judge that somebody else has asked.

    A row has `scores`, N numbers in the order of the record's responses, or K lists of them with `orders`, the K orders in
    which the judge was asked (`order[place]` is the response that stood there); or `refused`, why there are none. It says
    whose they are by `row`, the item's number in the benchmark from 0, or by `id`; where several items have an id, there
    must be as many rows with it, in the order of the items. Rows that `yojo score` and `yojo eval` write are such rows; they
    also hold what tells an item of another version of the benchmark, for which they are refused.

    Args:
        path: .jsonl, .json or .parquet file, or a folder of them.
        items: of `yojo.evaluation.benchmarks.open_benchmark`.

    Returns:
        list of `Judged`, in the order of the benchmark; for every item.

    Raises:
        DataError: a file that cannot be read.
        ValueError: rows of unknown items, items without a row, numbers that do not fit; the message says which.
    """
    light = [items.light(number) for number in range(len(items))]
    numbers = collections.defaultdict(list)
    for item in light:
        numbers[str(item.id)].append(item.number)
    found, met = {}, collections.Counter()
    for reader in open_source(path):
        for at in range(len(reader)):
            where = f"{reader.name}:{reader.line(at)}"
            row = reader.read(at)
            number = _number(row, light, numbers, met, where)
            if number in found:
                raise ValueError(f"{where}: item {number} has scores already: every item needs one row")
            _check_item(row, items, light[number], where)
            found[number] = _judged(row, light[number], where)
    missing = [item for item in light if item.number not in found]
    if missing:
        raise ValueError(
            f"{Path(path).name} has no scores for {len(missing)} of {len(light)} items, the first of them item "
            f"{missing[0].number} ({missing[0].id!r}): a benchmark is evaluated whole"
        )
    return [found[item.number] for item in light]


def _number(row, light, numbers, met, where):
    """Which item a row is of."""
    own = None if row.get("id") is None else str(row["id"])
    if row.get("row") is not None:
        number = row["row"]
        if type(number) is not int or not 0 <= number < len(light):
            raise ValueError(f"{where}: row must be an int from 0 to {len(light) - 1}, got {number!r}")
        return number
    if own is None:
        raise ValueError(f"{where}: neither row nor id says which item it is of; there are {', '.join(row)}")
    if own not in numbers:
        some = ", ".join(repr(one) for one in itertools.islice(numbers, 2))
        raise ValueError(f"{where}: the benchmark has no item {own!r}; its ids are such as {some}")
    met[own] += 1
    if met[own] > len(numbers[own]):
        raise ValueError(f"{where}: there are {met[own]} rows for {own!r}, and {len(numbers[own])} items")
    return numbers[own][met[own] - 1]


def _check_item(row, items, item, where):
    """Rows of `yojo eval` hold the lengths of the responses, and those of `yojo score`, too, a digest of the whole example."""
    is_named = row.get("id") is None or str(row["id"]) in (str(item.id), item.where)
    lengths, key = row.get("lengths"), row.get("key")
    if lengths is not None and list(lengths) != list(item.lengths):
        raise ValueError(
            f"{where}: item {item.number} ({item.id!r}) was scored with responses of {list(lengths)} characters, the "
            f"benchmark's have {list(item.lengths)}: score it again"
        )
    if is_named and lengths is None:
        return
    current = _key(items, item.number) if key is not None else None
    if not is_named and (key is None or key != current):
        raise ValueError(
            f"{where}: row {item.number} of the benchmark is {item.id!r}, the id here is {row['id']!r}: are these scores of "
            "another version of it? leave out id where row alone says which item is meant"
        )
    if current is not None and key != current:
        raise ValueError(
            f"{where}: item {item.number} ({item.id!r}) was scored with another prompt, other responses or other images than "
            "the benchmark has now: score it again"
        )


def _key(items, number):
    """The digest of an item; None where its media are not here, as the judge was elsewhere."""
    try:
        return example_key(items[number].example)
    except (DataError, OSError, TypeError, ValueError):
        return None


def _judged(row, item, where):
    count = len(item.rankings)
    light = dict(
        number=item.number,
        id=item.id,
        question=item.question,
        group=item.group,
        rankings=tuple(item.rankings),
        lengths=tuple(item.lengths),
        tags=dict(item.tags),
        info=dict(item.info),
    )
    if row.get("refused") is not None:
        if row.get("scores") is not None:
            raise ValueError(f"{where}: it has scores and refused, the reason why there are none: one of them is wrong")
        return Judged(**light, orders=(), scores=None, refused=str(row["refused"]))
    scores = row.get("scores")
    if not isinstance(scores, (list, tuple)) or not scores:
        raise ValueError(f"{where}: scores must be a list of {count} numbers, or of such lists, got {scores!r}")
    nested = isinstance(scores[0], (list, tuple))
    lists, orders = list(scores) if nested else [scores], row.get("orders")
    if orders is None:
        if len(lists) > 1:
            raise ValueError(f"{where}: there are scores for {len(lists)} orders, and no orders")
        orders = [list(range(count))]
    if (
        not isinstance(orders, (list, tuple))
        or len(orders) != len(lists)
        or not all(_is_order(order, count) for order in orders)
    ):
        raise ValueError(f"{where}: orders must be {len(lists)} orders of 0..{count - 1}, got {orders!r}")
    for one in lists:
        if not isinstance(one, (list, tuple)) or len(one) != count or not all(map(_is_number, one)):
            raise ValueError(
                f"{where}: scores must be {count} finite numbers, one for each response, of {LARGEST:.1e} at most, got {one!r}"
            )
    return Judged(**light, orders=tuple(map(tuple, orders)), scores=np.array(lists, dtype=np.float64))


def _is_order(order, count):
    return (
        isinstance(order, (list, tuple))
        and all(type(place) is int for place in order)
        and sorted(order) == list(range(count))
    )


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= LARGEST  # NaN is not

"""Examples in memory as the items of a benchmark, and `order_bias`, which needs no labels."""

import dataclasses

from yojo.evaluation.order_report import order_report
from yojo.evaluation.report import mean_cost
from yojo.evaluation.run import judge_items
from yojo.inputs.example import Example


@dataclasses.dataclass(frozen=True)
class ListedItem:
    """An example as an item; see `yojo.evaluation.benchmarks.benchmark.Item`."""

    number: int
    id: str
    example: Example
    group: str = "all"
    tags: dict = dataclasses.field(default_factory=dict)
    info: dict = dataclasses.field(default_factory=dict)

    @property
    def question(self):
        return str(self.number)

    @property
    def where(self):
        return f"example {self.number}"

    @property
    def rankings(self):
        """Those of the example; all alike where it has none."""
        return tuple(self.example.rankings or [1] * len(self.example.responses))

    @property
    def lengths(self):
        return tuple(map(len, self.example.responses))


class Listed:
    """Examples as the items of a benchmark.

    Args:
        examples: iterable of `yojo.Example`.
        name: of the whole.

    Raises:
        TypeError: something else among them.
    """

    def __init__(self, examples, name="examples"):
        self.name, self._items = name, []
        for number, example in enumerate(examples):
            if not isinstance(example, Example):
                raise TypeError(
                    f"examples must be yojo.Example objects, got {type(example).__name__} at place {number}"
                )
            own = number if example.id is None else example.id
            self._items.append(ListedItem(number, str(own), example))

    def __len__(self):
        return len(self._items)

    def __getitem__(self, number):
        return self._items[number]

    light = __getitem__


def order_bias(judge, examples, orders=8, *, seed=0, out=None, workers=0, progress=False, name=None):
    """Measure how far a judge's scores depend on the order of the responses.

    Every example is judged in K balanced orders. Whatever the judge says of itself, it is asked in all of them.

    Args:
        judge: anything with `score_many`.
        examples: iterable of `yojo.Example`, with two responses or more each; rankings are not looked at.
        orders: K, at most: fewer where there are fewer.
        seed: of the orders.
        out: .jsonl file that keeps what was said, as for `yojo.evaluation.run.judge_items`; None: nothing is kept.
        workers: processes that make examples ready.
        progress: show a bar.
        name: of the judge in the report; its class by default.

    Returns:
        `yojo.evaluation.order_report.OrderReport`: flip rate, agreement between orders, exposure by place, what it costs to
        remove; `.lines()`, `.plot(file)`, `.to_dict()`.

    Raises:
        ValueError: examples that cannot be scored; the message names them.

    Example:
        >>> report = yojo.order_bias(reward_model, examples, orders=4)
        >>> print(*report.lines(), sep="\\n")
        order bias of RewardModel over 100 items in 4 orders
        ...
    """
    items = Listed(examples)
    if not len(items):
        raise ValueError("there are no examples: order bias is measured over some")
    found = judge_items(
        judge,
        items,
        out,
        orders=orders,
        seed=seed,
        workers=workers,
        progress=progress,
        label="orders",
        every_order=True,
    )
    if found.bad:
        shown = "; ".join(f"{own}: {reason}" for _, own, reason in found.bad[:5])
        raise ValueError(f"{len(found.bad)} of {len(items)} examples cannot be scored: {shown}")
    return order_report(found.judged, name or type(judge).__name__, mean_cost(found.judged))

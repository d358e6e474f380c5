"""Items of a benchmark made ready for a judge: read, told apart by what they hold, in the orders in which it is asked."""

import dataclasses

from yojo.data.readers import DataError, what_it_says
from yojo.evaluation.orders import balanced_orders, possible
from yojo.inputs.digests import example_key

CHECKED = 16  # items on which a judge that says it is free of order is asked in two


@dataclasses.dataclass(frozen=True)
class Plan:
    """In which orders a judge is asked about each item; the same in every process.

    Attributes:
        orders: K, at most, or None for a judge that is free of order: it is asked once, and twice about `CHECKED` items, in the
            order of the record and in the reverse, to see that it is.
        seed: int.
        items: of the benchmark.
    """

    orders: int | None
    seed: int
    items: int

    def __post_init__(self):
        for name, least in (("orders", 1), ("seed", None)):
            value = getattr(self, name)
            if value is None and name == "orders":
                continue
            if not isinstance(value, int) or isinstance(value, bool) or least is not None and value < least:
                raise ValueError(f"{name} must be an int{'' if least is None else ' of at least 1'}, got {value!r}")

    def of(self, number, count):
        """The orders of item `number`, with `count` responses: list of tuples, `order[place]` is the response there."""
        if self.orders is not None:
            return balanced_orders(count, min(self.orders, possible(count)), self.seed, number)
        given = tuple(range(count))
        return [given, given[::-1]] if count > 1 and self.is_checked(number) else [given]

    def is_checked(self, number):
        """Whether a judge that is free of order is asked twice about an item."""
        return self.orders is None and number % -(-self.items // CHECKED) == 0


@dataclasses.dataclass(frozen=True)
class Asked:
    """An item, made ready.

    Attributes:
        number: place in the benchmark, from 0.
        id: the record's own, or file and line.
        key: digest of what the judge sees of it; None where it cannot be read.
        orders: K tuples.
        ready: what the judge takes (an `Example`, or a list of `Encoded`); None where there is an error, or where it is known.
        error: what is wrong with it, or None.
    """

    number: int
    id: str
    key: str | None = None
    orders: list = dataclasses.field(default_factory=list)
    ready: object = None
    error: str | None = None


class Ask:
    """What a worker does with the number of an item: `Asked`; whatever is wrong with the record is in it.

    Args:
        items: of `yojo.evaluation.benchmarks.open_benchmark`.
        plan: `Plan`.
        encode: function (example, orders, number) -> what the judge takes; None: the `Example` itself.
        known: set of (number, key) of items that have been judged: they are read, and not made ready again.
    """

    def __init__(self, items, plan, encode=None, known=frozenset()):
        self.items, self.plan, self.encode, self.known = items, plan, encode, known

    def __call__(self, number):
        name = str(self.items.light(number).id)
        try:
            item = self.items[number]
            key = example_key(item.example)
        except (DataError, OSError, TypeError, ValueError) as error:
            return Asked(number, name, error=what_it_says(error))
        orders = self.plan.of(number, len(item.example.responses))
        asked = Asked(number, name, key, orders)
        if (number, key) in self.known:
            return asked
        try:
            ready = item.example if self.encode is None else self.encode(item.example, orders, number)
        except (OSError, TypeError, ValueError) as error:
            return dataclasses.replace(asked, error=f"{item.where}: {without_name(error, item.example.name)}")
        return dataclasses.replace(asked, ready=ready)


def without_name(error, name):
    """What an exception says, less the name of the example in front."""
    return what_it_says(error).removeprefix(f"{name}: ")

"""`OrderReport`: how far a judge's scores depend on the order of responses, in numbers, in words and in pictures."""

import dataclasses
import math
import typing

import numpy as np

from yojo.evaluation import orders
from yojo.evaluation.plots import drawn
from yojo.evaluation.statistics import bootstrap

BAR, LINE, OTHER = "#4c78a8", "#1f2328", "#f58518"


@dataclasses.dataclass(frozen=True)
class OrderReport:
    """How far a judge's scores depend on the order of responses; means over items that are NaN where nothing can be computed.

    Attributes:
        judge: its name.
        items: number of items measured, those with two responses and two orders or more.
        refused: number of items that the judge refused.
        left_out: number of other items: one response, or one order.
        orders: (fewest, most) orders of an item.
        balanced: share of items in whose orders every response stands in every place equally often; for others the choices by
            place also tell which responses stood there, unless that evens out over items.
        flip_rate: share of pairs of orders whose top choice differs (`orders.flip_rate`).
        flip_interval: (low, high), its 95 % interval by the bootstrap over questions.
        any_flip: share of items whose orders do not all choose the same (`orders.any_flip`).
        first_place_agreement: mean share of an item's most frequent top choice (`orders.first_place_agreement`).
        kendall: mean Kendall tau-b between two orders of an item (`orders.kendall_between`).
        pairwise_instability: PPI (`orders.pairwise_instability`).
        global_inconsistency: GPI (`orders.global_inconsistency`).
        spread: mean standard deviation of a response's score over orders, in units of the score (`orders.spread`).
        relative_spread: `spread` over the mean standard deviation between an item's responses (`orders.spread_between`).
        max_change: largest change of one response's score between two orders of an item, over all items.
        exposure: dict N -> N floats: share of top choices by place, minus 1/N (`orders.exposure`).
        score_by_place: dict N -> N floats: how much higher a response scores at a place (`orders.score_by_place`).
        item_spreads: one float for each measured item, its `spread`; not in `to_dict`.
        cost: dict of tokens for an item on average, as `orders.cost` gives it, or None.
    """

    judge: str
    items: int
    refused: int
    left_out: int
    orders: tuple
    balanced: float
    flip_rate: float
    flip_interval: tuple
    any_flip: float
    first_place_agreement: float
    kendall: float
    pairwise_instability: float
    global_inconsistency: float
    spread: float
    relative_spread: float
    max_change: float
    exposure: typing.Mapping
    score_by_place: typing.Mapping
    item_spreads: tuple
    cost: typing.Mapping | None = None

    def to_dict(self):
        """dict of what JSON has: NaN is None, keys are strings."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del found["item_spreads"]
        for name in ("exposure", "score_by_place"):
            found[name] = {str(count): list(values) for count, values in found[name].items()}
        return {name: _plain(value) for name, value in found.items()}

    def lines(self):
        """list of str, for people."""
        apart = [
            f"{count:,} {what}" for count, what in ((self.refused, "refused"), (self.left_out, "left out")) if count
        ]
        left = f" ({', '.join(apart)})" if apart else ""
        if not self.items:
            return [f"order bias of {self.judge}: no item has scores in two orders{left}"]
        fewest, most = self.orders
        number = f"{most}" if fewest == most else f"{fewest} to {most}"
        low, high = self.flip_interval
        interval = "" if math.isnan(low) else f" [{low:.1%}, {high:.1%}]"
        relative = "" if math.isnan(self.relative_spread) else f", {self.relative_spread:.1%} of that between responses"
        return [
            f"order bias of {self.judge} over {self.items:,} items in {number} orders{left}",
            f"  two orders choose another response: {self.flip_rate:.1%}{interval}; not all choose the same: "
            f"{self.any_flip:.1%} of items",
            f"  Kendall tau between orders {self.kendall:.3f}, PPI {self.pairwise_instability:.3f}, GPI "
            f"{self.global_inconsistency:.3f}",
            f"  a score's deviation over orders: {self.spread:.4g}{relative}; largest change {self.max_change:.4g}",
            *self._places(),
            f"  {self._cost()}",
        ]

    def _places(self):
        for count, values in self.exposure.items():
            shares = " ".join(f"{value + 1 / count:.1%}" for value in values)
            yield f"  chosen by place, of {count} ({1 / count:.1%} each is fair): {shares}"
        if self.balanced < 1:
            yield (
                f"  only {self.balanced:.1%} of items have every response in every place equally often: choices by place also "
                "tell which responses stood there"
            )

    def _cost(self):
        if self.cost is None:
            return (
                "to remove it: mode isolated reads as many tokens as one order and is the same in all of them; the mean over K "
                "orders in one row reads the responses K times"
            )
        one = self.cost["one_order"]
        times = ", ".join(
            f"{name} {self.cost[key] / one:.1f} times"
            for key, name in (("permutations", "permutations"), ("separate_orders", "a pass for each order"))
        )
        return f"to remove it: isolated reads {self.cost['isolated']:,.0f} tokens an item, as one order does; {times} as many"

    def plot(self, file, format="png"):
        """Draw the choices by place, the scores by place, and how far scores of an item spread.

        Args:
            file: path or binary file object.
            format: str, "png", "svg", "pdf".

        Raises:
            ImportError: matplotlib is missing.
            ValueError: there are no items to draw.
        """
        self._figure().savefig(file, format=format, dpi=110)

    def _figure(self):
        if not self.items:
            raise ValueError("there is nothing to draw: no item has scores in two orders")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(13, 4.2), layout="constrained")
        chosen, scored, spread = figure.subplots(1, 3)
        shares = {count: [value + 1 / count for value in values] for count, values in self.exposure.items()}
        _bars(chosen, shares, {count: 1 / count for count in shares})
        chosen.set(title="top choices by place, and 1/N", ylabel="share of top choices")
        _bars(scored, self.score_by_place, dict.fromkeys(self.score_by_place, 0.0))
        scored.set(title="score by place, minus the response's mean", ylabel="score")
        if not any(map(any, self.score_by_place.values())):
            scored.set_ylim(-1, 1)
        values = np.array(self.item_spreads)
        spread.hist(values, bins=np.linspace(0, values.max() or 1.0, 31), color=BAR)
        spread.axvline(self.spread, color=LINE, linewidth=1, linestyle="--", label=f"mean {self.spread:.3g}")
        if self.relative_spread > 1 / 3:  # else it would be far outside
            between = self.spread / self.relative_spread
            spread.axvline(between, color=OTHER, linewidth=1, linestyle="--", label=f"between responses {between:.3g}")
        if not values.any():
            spread.text(0.5, 0.5, "no score changes", transform=spread.transAxes, ha="center")
        spread.set(title="deviation of scores over orders", xlabel="mean over an item's responses", ylabel="items")
        spread.legend(fontsize=8)
        for axis in (chosen, scored, spread):
            axis.grid(alpha=0.25, axis="y")
            axis.set_axisbelow(True)
            axis.margins(y=0.12)
        figure.suptitle(f"{drawn(self.judge)}: {self.items:,} items, flip rate {self.flip_rate:.1%}")
        return figure


def order_report(items, judge="judge", cost=None):
    """Measure how far a judge's scores depend on the order of responses.

    Args:
        items: list of `Judged`, each in two orders or more, balanced ones (`orders.balanced_orders`).
        judge: str, its name.
        cost: dict as `orders.cost` gives it, of an item on average, or None.

    Returns:
        OrderReport.

    Raises:
        ValueError: scores or orders that do not fit the item, scores that are not finite; the message names the item.
    """
    items = list(items)
    scored = [item for item in items if item.scores is not None]
    measured = [item for item in scored if len(item.rankings) > 1 and len(item.orders) > 1]
    flips, spreads = orders.flip_rate(measured), orders.spread(measured)
    between = _mean(orders.spread_between(measured))
    numbers = [len(item.orders) for item in measured]
    return OrderReport(
        judge=judge,
        items=len(measured),
        refused=len(items) - len(scored),
        left_out=len(scored) - len(measured),
        orders=(min(numbers), max(numbers)) if numbers else (0, 0),
        balanced=_mean(np.array([_balanced(item) for item in measured])),
        flip_rate=_mean(flips),
        flip_interval=bootstrap(flips, [item.question for item in measured]),
        any_flip=_mean(orders.any_flip(measured)),
        first_place_agreement=_mean(orders.first_place_agreement(measured)),
        kendall=_mean(orders.kendall_between(measured)),
        pairwise_instability=_mean(orders.pairwise_instability(measured)),
        global_inconsistency=_mean(orders.global_inconsistency(measured)),
        spread=_mean(spreads),
        relative_spread=_mean(spreads) / between if between else math.nan,
        max_change=float(orders.max_change(measured).max()) if measured else math.nan,
        exposure=_listed(orders.exposure(measured)),
        score_by_place=_listed(orders.score_by_place(measured)),
        item_spreads=tuple(spreads.tolist()),
        cost=cost,
    )


def _mean(values):
    values = values[~np.isnan(values)]
    return float(values.mean()) if len(values) else math.nan


def _balanced(item):
    """1.0 where every response stands in every place equally often, else 0.0."""
    places, count = np.asarray(item.orders), len(item.rankings)
    times = (places[:, :, None] == np.arange(count)).sum(axis=0)
    return float((times * count == len(places)).all())


def _listed(by_place):
    return {count: tuple(values.tolist()) for count, values in by_place.items()}


def _plain(value):
    if isinstance(value, tuple):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value


def _bars(axis, by_place, levels):
    """A bar for each place, items of N responses beside those of another N, with a line at each N's level."""
    start, ticks, labels = 0, [], []
    for count, values in by_place.items():
        at = [start + place for place in range(count)]
        axis.bar(at, values, width=0.75, color=BAR)
        axis.plot([at[0] - 0.5, at[-1] + 0.5], [levels[count]] * 2, color=LINE, linewidth=1, linestyle="--")
        ticks, labels, start = ticks + at, labels + [str(place + 1) for place in range(count)], at[-1] + 2
        if len(by_place) > 1:
            middle, top = (at[0] + at[-1]) / 2, axis.get_xaxis_transform()
            axis.text(middle, 0.98, f"N={count}", transform=top, ha="center", va="top", fontsize=8)
    axis.set_xticks(ticks, labels, fontsize=10 if len(ticks) <= 14 else 7 if len(ticks) <= 30 else 4)
    axis.set_xlabel("place in the row")

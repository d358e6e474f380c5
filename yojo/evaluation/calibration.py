"""How far a judge's scores can be read as probabilities: softmax over an item's responses against which one is best."""

import dataclasses
import hashlib
import math

import numpy as np

from yojo.evaluation.statistics import wilson

PER_BIN = 40  # responses that a bin of the reliability diagram should have
MOST_BINS = 15
LIMITS = 1e-3, 1e3  # of a fitted temperature, in units of the spread of scores within an item


@dataclasses.dataclass(frozen=True)
class Bin:
    """Responses that were given about the same probability.

    Attributes:
        count: how many; those of K orders count 1/K each.
        probability: mean of the probabilities they were given.
        frequency: share of them that are the best one.
        low: lower end of the 95 % Wilson interval of `frequency`, as if responses were independent.
        high: upper end.
    """

    count: float
    probability: float
    frequency: float
    low: float
    high: float


@dataclasses.dataclass(frozen=True)
class Figures:
    """How good probabilities are; lower is better.

    Attributes:
        ece: expected calibration error: over bins, the mean of abs(frequency - mean probability), each bin weighing as
            many responses as it has. A finite sample shows some for perfect probabilities too.
        brier: mean over items of the sum over responses of (probability - target)^2, in [0, 2].
        nll: mean over items of -sum over responses of target log(probability), in nats. The target is 1 for the best response;
            several best ones share it.
    """

    ece: float
    brier: float
    nll: float


@dataclasses.dataclass(frozen=True)
class Calibration:
    """How far a judge's scores can be read as probabilities, from `calibration`; NaN where there are no items.

    Attributes:
        items: number of items looked at.
        refused: number of items that the judge refused.
        alone: number of items left out because they have one response.
        raw: Figures of softmax(scores).
        temperature: T with the least NLL of softmax(scores / T) over all items; NaN where all scores tie.
        at_limit: None; "low" where the NLL falls as far as T does (the scores put every best response first), "high" where it
            falls as far as T rises (the scores say nothing, or the reverse), "none" where all scores tie. T is then no estimate.
        scaled: Figures of softmax(scores / T), with T for each half of the questions fitted on the other half; NaN where there
            are fewer than two questions.
        bins: tuple of `Bin` of the raw probabilities, from the lowest.
        scaled_bins: tuple of `Bin` of the scaled probabilities.
    """

    items: int
    refused: int
    alone: int
    raw: Figures
    temperature: float
    at_limit: str | None
    scaled: Figures
    bins: tuple
    scaled_bins: tuple

    def to_dict(self):
        """dict of what JSON has; what is NaN is None."""
        return _plain(dataclasses.asdict(self))

    def lines(self):
        """list of str, for people."""
        if not self.items:
            return [f"calibration: no items ({self.refused} refused, {self.alone} of one response)"]
        lines = [f"calibration over {self.items:,} items: {_line(self.raw)}"]
        if self.at_limit == "none":
            return [*lines, "all scores of an item tie: there is no temperature"]
        reason = {
            None: "",
            "low": ", the lowest tried: every best response scores highest, and any lower one is better",
            "high": ", the highest tried: the scores do not tell which response is best",
        }
        lines.append(f"temperature {self.temperature:.4g}{reason[self.at_limit]}")
        if not math.isnan(self.scaled.nll):
            lines.append(f"at a temperature fitted on other questions: {_line(self.scaled)}")
        return lines

    def plot(self, file, format="png"):
        """Draw the reliability diagram, before and after temperature.

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
            raise ValueError("there is nothing to draw: no item has scores for two responses or more")
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9.6, 4.6), layout="constrained")
        axes = figure.subplots(1, 2, sharex=True, sharey=True)
        titles = "softmax of the scores", "at a temperature fitted on other questions"
        for axis, title, bins, figures in zip(
            axes, titles, (self.bins, self.scaled_bins), (self.raw, self.scaled), strict=True
        ):
            axis.plot([0, 1], [0, 1], color="#1f2328", linewidth=1, linestyle="--")
            axis.set(title=title, xlabel="probability by the scores", xlim=(-0.02, 1.02), ylim=(-0.02, 1.02))
            axis.set_aspect("equal")
            axis.grid(alpha=0.25)
            if bins:
                probability, frequency = [one.probability for one in bins], [one.frequency for one in bins]
                # A share of 0 or 1 may leave its interval by a rounding.
                down = [max(0.0, one.frequency - one.low) for one in bins]
                up = [max(0.0, one.high - one.frequency) for one in bins]
                axis.errorbar(
                    probability,
                    frequency,
                    [down, up],
                    fmt="o",
                    color="#4c78a8",
                    ecolor="#9db7d5",
                    markersize=4.5,
                    capsize=2,
                )
                note = f"ECE {figures.ece:.3f}\nBrier {figures.brier:.3f}\nNLL {figures.nll:.3f}"
            else:
                note = "too few questions"
            axis.text(0.04, 0.96, note, transform=axis.transAxes, va="top", fontsize=9)
        axes[0].set_ylabel("how often it is the best one")
        return figure


def calibration(items, over="mean", bins=None, seed=0):
    """How far a judge's scores can be read as probabilities.

    Bins hold about equally many responses: of n responses min(15, n / 40) bins, one at least, their edges at the quantiles of
    the probabilities; equal probabilities are never parted.

    Args:
        items: list of `Judged`.
        over: "mean", the softmax of the scores averaged over orders; "orders", of each order's, which weigh 1/K each.
        bins: int, how many bins, or None.
        seed: int, by which questions fall into halves.

    Returns:
        Calibration.

    Raises:
        ValueError: scores that are not finite, another `over`, fewer than one bin.
    """
    if over not in ("mean", "orders"):
        raise ValueError(f'over must be "mean" or "orders", got {over!r}')
    if bins is not None and bins < 1:
        raise ValueError(f"bins must be at least 1, or None, got {bins}")
    items = list(items)
    scored = [item for item in items if item.scores is not None]
    rows = _Rows([item for item in scored if len(item.rankings) > 1], over)
    temperature, at_limit = rows.fit(np.ones(len(rows.weights), dtype=bool))
    raw, raw_bins = rows.figures(1.0, bins)
    scaled, scaled_bins = Figures(math.nan, math.nan, math.nan), ()
    first = rows.half(seed)
    if first.any() and not first.all() and at_limit != "none":
        # What is measured on one half is fitted on the other. A half whose scores all tie has no temperature and needs none.
        on_first, on_second = (rows.fit(half)[0] for half in (first, ~first))
        chosen = np.where(first, on_second, on_first)
        scaled, scaled_bins = rows.figures(np.where(np.isnan(chosen), 1.0, chosen), bins)
    return Calibration(
        items=rows.items,
        refused=len(items) - len(scored),
        alone=len(scored) - rows.items,
        raw=raw,
        temperature=temperature,
        at_limit=at_limit,
        scaled=scaled,
        bins=raw_bins,
        scaled_bins=scaled_bins,
    )


class _Rows:
    """Scores of all items, [R, M]: a row for each item, or each of its orders, filled up with -inf."""

    def __init__(self, items, over):
        self.items = len(items)
        scores, targets, weights, self.questions = [], [], [], []
        for item in items:
            if not np.isfinite(item.scores).all():
                raise ValueError(
                    f"item {item.id!r}: scores must be finite, got {item.scores.tolist()}: refuse it instead"
                )
            rows = item.mean[None] if over == "mean" else item.scores
            scores += list(rows - rows.max(axis=1, keepdims=True))
            targets += [item.best / item.best.sum()] * len(rows)
            weights += [1 / len(rows)] * len(rows)
            self.questions += [str(item.question)] * len(rows)
        width = max(map(len, scores), default=0)
        self.scores, self.targets = np.full((len(scores), width), -np.inf), np.zeros((len(scores), width))
        for row, (one, target) in enumerate(zip(scores, targets, strict=True)):
            self.scores[row, : len(one)], self.targets[row, : len(one)] = one, target
        self.weights, self.there = np.array(weights), np.isfinite(self.scores)

    def log_probabilities(self, temperature):
        """[R, M] float64, -inf where there is no response; `temperature` is a float or [R]."""
        # The highest score is 0: no power overflows, and their sum is 1 or more.
        scaled = self.scores / np.broadcast_to(temperature, self.weights.shape)[:, None]
        return scaled - np.log(np.exp(scaled).sum(axis=1, keepdims=True))

    def nll(self, temperature, rows=slice(None)):
        logs = np.where(self.targets > 0, self.log_probabilities(temperature), 0.0)
        each = -(self.targets * logs).sum(axis=1)
        return float((self.weights * each)[rows].sum() / self.weights[rows].sum())

    def fit(self, rows):
        """(temperature with the least NLL over some rows, None or why it is no estimate)."""
        from scipy.optimize import minimize_scalar

        there = self.there[rows]
        scores = np.where(there, self.scores[rows], 0.0)
        means = scores.sum(axis=1, keepdims=True) / np.maximum(there.sum(axis=1, keepdims=True), 1)
        spread = math.sqrt((((scores - means) * there) ** 2).sum() / max(there.sum(), 1))
        if spread == 0:
            return math.nan, "none"
        # The NLL is convex in 1 / T: it has one minimum, and where that is at a limit no T within has less.
        low, high = (spread * limit for limit in LIMITS)
        found = minimize_scalar(
            lambda log: self.nll(math.exp(log), rows), bounds=(math.log(low), math.log(high)), method="bounded",
            options={"xatol": 1e-7},
        )  # fmt: skip
        for limit, name in ((low, "low"), (high, "high")):
            if self.nll(limit, rows) <= found.fun:
                return limit, name
        return math.exp(found.x), None

    def half(self, seed):
        """[R] bool: rows of the first half of the questions, in an order that depends on their names and the seed alone."""
        names = sorted(set(self.questions), key=lambda name: hashlib.sha256(f"{seed} {name}".encode()).digest())
        first = set(names[: len(names) // 2])
        return np.array([name in first for name in self.questions], dtype=bool)

    def figures(self, temperature, bins):
        """(Figures, tuple of Bin); `temperature` is a float or [R]."""
        if not self.items:
            return Figures(math.nan, math.nan, math.nan), ()
        probabilities = np.exp(self.log_probabilities(temperature))
        brier = (self.weights * ((probabilities - self.targets) ** 2).sum(axis=1)).sum() / self.weights.sum()
        weights = np.broadcast_to(self.weights[:, None], probabilities.shape)[self.there]
        made = _bins(probabilities[self.there], self.targets[self.there], weights, bins)
        error = sum(one.count * abs(one.frequency - one.probability) for one in made) / weights.sum()
        return Figures(float(error), float(brier), self.nll(temperature)), made


def _bins(probabilities, targets, weights, bins):
    """tuple of Bin with about the same weight each; equal probabilities (up to rounding) are in one."""
    probabilities = np.round(probabilities, 12)
    order = np.lexsort((targets, weights, probabilities))
    probabilities, targets, weights = probabilities[order], targets[order], weights[order]
    number = max(1, min(MOST_BINS, int(weights.sum() / PER_BIN + 1e-9))) if bins is None else bins
    values, first = np.unique(probabilities, return_index=True)
    ends = np.append(np.cumsum(weights)[first[1:] - 1], weights.sum())
    middle = (ends + np.append(0.0, ends[:-1])) / 2  # of each value's stretch: that is the bin it goes to
    of_value = np.minimum((middle / weights.sum() * number + 1e-9).astype(int), number - 1)
    of = of_value[np.searchsorted(values, probabilities)]
    made = []
    for one in np.unique(of):
        weight = weights[of == one]
        count = weight.sum()
        probability, frequency = ((weight * what[of == one]).sum() / count for what in (probabilities, targets))
        made.append(
            Bin(float(count), float(probability), float(frequency), *wilson(min(frequency, 1.0) * count, count))
        )
    return tuple(made)


def _line(figures):
    return f"ECE {figures.ece:.3f}, Brier {figures.brier:.3f}, NLL {figures.nll:.3f}"


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return None if isinstance(value, float) and math.isnan(value) else value

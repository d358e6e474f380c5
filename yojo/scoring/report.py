"""Pictures of scores: how they are spread, how far the best is ahead, and whether they follow the length of responses."""

import os
from pathlib import Path

import numpy as np

from yojo.scoring.results import joined

SUFFIXES = (".png", ".svg", ".pdf")
SAMPLE = 100_000  # values that a panel is drawn from; where there are more, they are drawn by lot
_BLUE, _ORANGE, _INK = "#4c78a8", "#f58518", "#1f2328"
_CHUNK = 8192


def report(scores, out, data=None, **options):
    """Draw three panels: scores, margins, and scores against the length of responses.

    Args:
        scores: scores file or folder of a job, or `Scores`.
        out: .png, .svg or .pdf file; one that is there is replaced.
        data: where the scored records lie, if not where the job read them.
        **options: of `yojo.data.load`.

    Returns:
        `pathlib.Path` of the picture.

    Raises:
        ValueError: scores without their records, or another suffix.
        ImportError: matplotlib is missing.
    """
    check_picture(out)
    source, figures = joined(scores, data, **options), Figures()
    for scored in source:
        figures.add(scored.row, scored.fields.responses)
    return figures.draw(out, str(source.scores.path))


def check_picture(path):
    """Raise what would keep `Figures.draw` from writing a file."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"report must be a {', '.join(SUFFIXES)} file, got {path}")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ImportError("a report needs matplotlib: pip install 'yojo[train]'") from error


class Figures:
    """What the panels show, of any number of rows in the same memory: values drawn by lot with a fixed seed.

    Args:
        sample: how many values are kept of each kind.
        seed: of the draw.
    """

    def __init__(self, sample=SAMPLE, seed=0):
        self._sample, self._seed = sample, seed
        self.forget()

    def forget(self):
        """Begin anew."""
        self.rows = self.alone = 0
        self.responses = _Lot(self._sample, 4, self._seed)  # score, length, and both less the mean of the record
        self.margins = _Lot(self._sample, 2, self._seed)  # best less second, best less worst

    def add(self, row, responses):
        """Take in a row of scores and the texts they are of."""
        scores, order = row["scores"], row["order"]
        lengths = list(map(len, responses))
        score, length = sum(scores) / len(scores), sum(lengths) / len(lengths)
        for one, other in zip(scores, lengths, strict=True):
            self.responses.add((one, other, one - score, other - length))
        self.rows += 1
        if len(order) > 1:
            best = scores[order[0]]
            self.margins.add((best - scores[order[1]], best - scores[order[-1]]))
        else:
            self.alone += 1

    def draw(self, out, title):
        """Write the picture; returns its path."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot, ticker

        with pyplot.rc_context({"font.size": 10, "axes.titlesize": 11, "axes.labelsize": 10}):
            figure, axes = pyplot.subplots(1, 3, figsize=(15, 4.8), layout="constrained")
            self._draw_scores(axes[0])
            self._draw_margins(axes[1])
            self._draw_lengths(axes[2], figure)
            for axis in axes:
                axis.spines[["top", "right"]].set_visible(False)
                for side in (axis.xaxis, axis.yaxis):
                    if side.get_scale() == "linear":
                        side.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
            figure.suptitle(self._heading(title), fontsize=12)
            out = Path(out)
            out.parent.mkdir(parents=True, exist_ok=True)
            aside = out.with_name(f".{out.name}.writing{out.suffix}")
            try:
                figure.savefig(aside, dpi=120)
                os.replace(aside, out)
            finally:
                aside.unlink(missing_ok=True)
                pyplot.close(figure)
        return out

    def _heading(self, title):
        title = title if len(title) <= 70 else f"...{title[-67:]}"
        drawn = "" if self.responses.count <= self._sample else f" (drawn from {self._sample:,} by lot)"
        return f"{title}: {self.responses.count:,} responses to {self.rows:,} prompts{drawn}".replace("$", r"\$")

    def _draw_scores(self, axis):
        scores = self.responses.values()[:, 0]
        low, high, beyond = _range(scores)
        axis.hist(np.clip(scores, low, high), _edges(low, high, scores), weights=_shares(scores), color=_BLUE)
        middle = np.median(scores)
        axis.axvline(middle, color=_INK, linewidth=1, linestyle="--", label=f"median {middle:.3g}")
        _finish(axis, "scores", f"score of a response{beyond}", "share of responses in %")
        _legend(axis)

    def _draw_margins(self, axis):
        margins = self.margins.values()
        several = f"{self.rows - self.alone:,} prompts with two responses or more"
        beyond = ""
        if len(margins):
            _, high, beyond = _range(margins.reshape(-1))
            edges = _edges(0.0, high, margins)
            for column, (name, colour) in enumerate((("best - second", _BLUE), ("best - worst", _ORANGE))):
                label = f"{name}, median {np.median(margins[:, column]):.3g}"
                values = np.clip(margins[:, column], 0, high)
                axis.hist(values, edges, weights=_shares(values), color=colour, alpha=0.25)
                axis.hist(
                    values, edges, weights=_shares(values), color=colour, histtype="step", linewidth=1.5, label=label
                )
            _legend(axis)
        else:
            axis.text(0.5, 0.5, "no prompt has two responses", ha="center", va="center", transform=axis.transAxes)
        _finish(axis, f"margins of {several}", f"difference of scores{beyond}", "share of prompts in %")

    def _draw_lengths(self, axis, figure):
        from matplotlib import colormaps, colors, ticker

        score, length, score_within, length_within = self.responses.values().T
        low, high, beyond = _range(score)
        kind = {"xscale": "log"} if length.max() > 20 * max(length.min(), 1) else {}
        blues = colors.ListedColormap(colormaps["Blues"](np.linspace(0.25, 1, 256)))
        cells = axis.hexbin(
            np.maximum(length, 1), np.clip(score, low, high), gridsize=40, mincnt=1, cmap=blues, linewidths=0.1, **kind
        )
        most = cells.get_array().max()
        if kind:  # so many that they do not stand on one another
            decades = np.log10(length.max() / max(length.min(), 1))
            axis.xaxis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if decades < 2.5 else (1,)))
            axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, place: f"{value:,.0f}"))
            axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        cells.set_norm(colors.LogNorm(1, most) if most > 20 else colors.Normalize(0, most))
        whole = {} if most > 20 else {"ticks": ticker.MaxNLocator(5, integer=True)}
        bar = figure.colorbar(cells, ax=axis, pad=0.02, **whole)
        bar.set_label("responses")
        bar.outline.set_visible(False)
        tenths = list(_quartiles(length, score))
        for middle, first, _, third in tenths:
            axis.plot([middle, middle], [first, third], color=_ORANGE, linewidth=1.5)
        if tenths:
            axis.plot([tenth[0] for tenth in tenths], [tenth[2] for tenth in tenths], "o", color=_ORANGE, markersize=5)
            axis.plot([], [], "o-", color=_ORANGE, markersize=5, label="median and quartiles, by tenths")
            _legend(axis)
        over_all, within = spearman(length, score), spearman(length_within, score_within)
        title = (
            "score against length: all equal"
            if np.isnan(over_all)
            else f"score against length: Spearman {over_all:+.2f}"
        )
        title += "" if np.isnan(within) else f", {within:+.2f} within prompts"
        _finish(axis, title, "length of the response in characters", f"score of a response{beyond}", grid="both")


class _Lot:
    """A sample of rows of numbers, each as likely as any other to be in it: the rows with the smallest of random keys."""

    def __init__(self, size, width, seed):
        self._size, self._rng = size, np.random.default_rng(seed)
        self._keys, self._kept, self._new = np.empty(0), np.empty((0, width)), []
        self.count = 0

    def add(self, row):
        self.count += 1
        self._new.append(row)
        if len(self._new) == _CHUNK:
            self._take()

    def _take(self):
        if not self._new:
            return
        keys = np.append(self._keys, self._rng.random(len(self._new)))
        rows = np.append(self._kept, np.array(self._new, float), axis=0)
        if len(keys) > self._size:
            chosen = np.sort(np.argpartition(keys, self._size)[: self._size])
            keys, rows = keys[chosen], rows[chosen]
        self._keys, self._kept, self._new = keys, rows, []

    def values(self):
        self._take()
        return self._kept


def spearman(one, other):
    """Rank correlation of two arrays, equal values sharing their mean rank; NaN where one of them does not vary."""
    one, other = _mean_ranks(one), _mean_ranks(other)
    one, other = one - one.mean(), other - other.mean()
    scale = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / scale) if scale > 0 else float("nan")


def _mean_ranks(values):
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]


def _quartiles(length, score, parts=10):
    """(median length, lower quartile, median, upper quartile of the scores) of each tenth of the responses, by length."""
    order = np.argsort(length, kind="stable")
    cuts = np.unique(np.searchsorted(length[order], np.quantile(length, np.linspace(0, 1, parts + 1)[1:-1])))
    for piece in np.split(order, cuts):
        if len(piece) >= 5:
            yield (max(np.median(length[piece]), 1), *np.quantile(score[piece], (0.25, 0.5, 0.75)))


def _range(values):
    """(lowest, highest, what to say of the rest): all values, unless a few far ones would squeeze all others."""
    low, high = values.min(), values.max()
    first, last = np.quantile(values, (0.001, 0.999))
    room = max(last - first, 1e-12)
    if high - low > 4 * room:
        low, high = max(low, first - room / 2), min(high, last + room / 2)
    beyond = int(((values < low) | (values > high)).sum())
    return low, high, f" (beyond the ends: {beyond:,})" if beyond else ""


def _edges(low, high, values):
    """Edges of the bars of a histogram; of whole numbers each bar has as many."""
    if high <= low:
        return np.linspace(low - 0.5, low + 0.5, 12)
    if high - low >= 12 and (values == np.round(values)).all():
        step = max(1, int(np.ceil((high - low + 1) / 50)))
        return np.arange(np.floor(low), high + step + 1, step) - 0.5
    return np.linspace(low, high, 51)


def _legend(axis):
    """Above what is drawn."""
    bottom, top = axis.get_ylim()
    axis.set_ylim(bottom, top + 0.2 * (top - bottom))
    axis.legend(frameon=False, fontsize=9, loc="upper right")


def _shares(values):
    return np.full(len(values), 100 / len(values))


def _finish(axis, title, across, up, grid="y"):
    axis.set_title(title)
    axis.set_xlabel(across)
    axis.set_ylabel(up)
    axis.grid(alpha=0.25, axis=grid)
    axis.set_axisbelow(True)

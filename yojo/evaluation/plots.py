"""The pictures of a report: accuracy with its intervals beside baselines and published figures, and by group."""

import io
import math

import numpy as np

from yojo.evaluation.tables import one_line

BLUE, ORANGE, INK, GREY = "#4c78a8", "#f58518", "#1f2328", "#8c959f"
COLOURS = (BLUE, ORANGE, "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b")
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "svg.hashsalt": "yojo",  # or ids would differ from run to run
    "svg.fonttype": "path",
    "axes.spines.top": False,
    "axes.spines.right": False,
}
GROUPS = 24  # that a picture shows


def accuracy(report):
    """Best of N of every judge, its interval, baselines and published figures: SVG as a string."""
    rows = [(verdict.name, verdict.figures.headline, BLUE) for verdict in report.judges]
    rows += [(verdict.name, verdict.figures.headline, GREY) for verdict in report.baselines]
    reference = list(report.benchmark["reference"].items())
    figure, axes = _figure(8, 0.9 + 0.34 * (len(rows) + len(reference)))
    for place, (_, found, colour) in enumerate(rows):
        value = 100 * found.value
        if not math.isnan(found.low):
            axes.plot(
                [100 * found.low, 100 * found.high], [place, place], color=colour, linewidth=2, solid_capstyle="butt"
            )
        axes.plot([value], [place], "o", color=colour, markersize=7)
        axes.annotate(
            f"{value:.1f}", (value, place), (0, 7), textcoords="offset points", ha="center", fontsize=9, color=INK
        )
    for place, (_, value) in enumerate(reference, len(rows)):
        axes.plot([value], [place], "D", markerfacecolor="white", markeredgecolor=GREY, markersize=6)
        axes.annotate(
            f"{value:.1f}", (value, place), (0, 7), textcoords="offset points", ha="center", fontsize=9, color=INK
        )
    names = [name for name, _, _ in rows] + [f"{name} (published)" for name, _ in reference]
    axes.set_yticks(range(len(names)), [drawn(name) for name in names])
    axes.set_ylim(len(names) - 0.4, -0.7)
    axes.set_xlim(*_limits([100 * found.value for _, found, _ in rows] + [value for _, value in reference], rows))
    axes.set_xlabel(f"{(report.benchmark['headline'] or 'best of N').replace('_', ' ')}, percent, with 95 % intervals")
    axes.grid(axis="x", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    return _svg(figure)


def _limits(values, rows):
    ends = [*values, *(100 * end for _, found, _ in rows for end in (found.low, found.high) if not math.isnan(end))]
    low, high = min(ends), max(ends)
    room = max(2.0, 0.06 * (high - low))
    return max(-2.0, low - room), min(102.0, high + room)


def groups(report):
    """Best of N by group for every judge: SVG as a string; None where there are no two groups."""
    counts = {}
    for verdict in report.judges:
        for name, found in verdict.figures.groups.items():
            counts[name] = max(counts.get(name, 0), int(found["top1"].count))
    names = sorted(counts, key=lambda name: -counts[name])
    more = len(names) - GROUPS
    names = names[:GROUPS]
    if len(names) < 2:
        return None
    judges = report.judges
    figure, axes = _figure(8, 1.2 + 0.22 * len(names) * (len(judges) + 0.8))
    height = 0.8 / len(judges)
    for n, verdict in enumerate(judges):
        found = [verdict.figures.groups.get(name, {}).get("top1") for name in names]
        places = np.arange(len(names)) - 0.4 + height * (n + 0.5)
        values = [math.nan if one is None else 100 * one.value for one in found]
        axes.barh(places, values, height * 0.9, color=COLOURS[n % len(COLOURS)], label=drawn(verdict.name))
        for place, one in zip(places, found, strict=True):
            if one is not None and not math.isnan(one.low):
                axes.plot([100 * one.low, 100 * one.high], [place, place], color=INK, linewidth=1)
    axes.set_yticks(range(len(names)), [f"{drawn(name)} ({counts[name]:,})" for name in names])
    axes.set_ylim(len(names) - 0.5, -0.5)
    axes.set_xlim(0, 100)
    left = f"; {more} smaller groups are in the table alone" if more > 0 else ""
    axes.set_xlabel(f"best of N, percent, with 95 % intervals{left}")
    axes.grid(axis="x", color="#d0d7de", linewidth=0.6)
    axes.set_axisbelow(True)
    if len(judges) > 1:
        axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(4, len(judges)), fontsize=9)
    return _svg(figure)


def _figure(width, height):
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        return figure, figure.add_subplot()


def _svg(figure):
    import matplotlib

    with matplotlib.rc_context(STYLE):
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
        return file.getvalue()


def drawn(text, limit=40):
    """Text as matplotlib draws it as it stands, cut where it is longer: no formulas between dollar signs."""
    text = one_line(text)
    return (text if len(text) <= limit else f"{text[: limit - 3]}...").replace("$", r"\$")

"""The pictures of the report, drawn from result lines; each carries where, when and with what it was measured."""

import textwrap

from bench import points
from bench.points import VARIANTS, count, digits, point, provenance, seconds
from yojo.costs.profiling import PARTS

COLOURS = {
    "single": "#57606a",
    "single_batch": "#a0a8b0",
    "released": "#cf222e",
    "prefix_cache": "#bf8700",
    "flex": "#8250df",
    "kv_gather": "#bf8700",
    "sdpa": "#57606a",
    "yojo_comparative": "#0969da",
    "yojo_isolated": "#1a7f37",
    "yojo_permuted": "#e16f24",
}
PART_COLOURS = dict(
    zip(
        PARTS,
        ("#8250df", "#1a7f37", "#54aeff", "#0969da", "#bf8700", "#cf222e", "#f0883e", "#a0a8b0"),
        strict=True,
    )
)


def figure_of(width, height):
    """(empty figure, its axis).

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the pictures need matplotlib: pip install 'yojo[demo]'") from error
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis


def save(figure, axis, title, lines, path):
    """Write a picture with its title, and below it what a figure needs beside it to be one."""
    axis.set_title(title, fontsize=11, loc="left")
    caption = textwrap.fill(provenance(lines), int(15 * figure.get_figwidth()))
    figure.supxlabel(caption, x=0.01, ha="left", fontsize=7.5, color="#57606a")
    figure.savefig(path, dpi=120)


# ---- N sweeps ----


def time(scores, places, path):
    """Time against N, both logarithmic; whiskers from the shortest round to the longest."""
    figure, axis = _sweep(places)
    lines = _curves(axis, scores, places, lambda line: line["seconds"], spread=True)
    axis.set_yscale("log", subs=())
    axis.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axis.yaxis.set_major_formatter(lambda value, _: seconds(value))
    axis.set_ylabel("time of scoring all N")
    _finish(figure, axis, f"Time to score N responses: {title_of(scores, places)}", lines, path)


def speedup(scores, places, path):
    """Speed-up over N single passes against N, beside the FLOPs ratios, which computing less alone gives, and y = N."""
    figure, axis = _sweep(places)
    lines = _curves(axis, scores, places, scores.speedup, without=("single", "none"))
    for variant in ("yojo_comparative", "yojo_isolated"):
        found = [(place.responses, scores.flops_ratio(scores.best(place, variant))) for place in places
                 if scores.best(place, variant) is not None]  # fmt: skip
        found = [pair for pair in found if pair[1] is not None]
        if found:
            name = f"FLOPs ratio, {VARIANTS[variant].split()[1]}"
            axis.plot(*zip(*found, strict=True), ":", color=COLOURS[variant], linewidth=2.2, label=name, zorder=2.5)
    counts = [place.responses for place in places]
    axis.plot(counts, counts, "-", color="#d8dce0", linewidth=5, label="y = N", zorder=1)
    axis.axhline(1, color="#57606a", linewidth=0.8, zorder=1)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    axis.set_ylabel("speed-up over N single passes")
    _finish(figure, axis, f"Speed-up: {title_of(scores, places)}", lines, path)


def memory(scores, places, path):
    """Peak memory beyond the weights against N."""
    figure, axis = _sweep(places)
    lines = _curves(axis, scores, places, lambda line: line["peak_bytes"] or None)
    axis.set_yscale("log", base=2)
    axis.yaxis.set_major_formatter(lambda value, _: points.memory(value))
    axis.set_ylabel("peak memory beyond the weights")
    _finish(figure, axis, f"Peak memory: {title_of(scores, places)}", lines, path)


def title_of(scores, places):
    """The model and what stays the same in an N sweep."""
    place = places[0]
    prompt = f"{place.prompt} prompt" if place.prompt else "prompt"
    model = scores.lines[0]["model"]
    return f"{model}, {prompt} of {count(place.prompt_tokens)} tokens, responses of {count(place.response_tokens)}"


def _sweep(places):
    figure, axis = figure_of(10, 5.6)
    axis.set_xscale("log", base=2)
    counts = sorted({place.responses for place in places})
    axis.set_xticks(counts, [str(number) for number in counts])
    axis.set_xlabel("responses N")
    axis.grid(color="#eaeef2")
    axis.set_axisbelow(True)
    return figure, axis


def _curves(axis, scores, places, value, without=None, spread=False):
    """One curve for each way; dashed where layers are fused. Returns the lines that are shown."""
    shown = []
    for one in scores.ways:
        lines = [scores.points[place][one] for place in places if scores.has(place, one)]
        lines = [line for line in lines if value(line) is not None]
        if not lines or one[:2] == without:
            continue
        shown += lines
        fused = one.fuse != "none"
        ours = one.variant.startswith("yojo")
        style = dict(color=COLOURS[one.variant], linestyle="--" if fused else "-", marker="^" if fused else "o",
                     markersize=5, linewidth=1.8 if ours else 1.3, label=scores.names[one], zorder=3 if ours else 2)  # fmt: skip
        x, y = [line["responses"] for line in lines], [value(line) for line in lines]
        if spread:
            below = [line["seconds"] - min(line["seconds_all"]) for line in lines]
            above = [max(line["seconds_all"]) - line["seconds"] for line in lines]
            axis.errorbar(x, y, yerr=[below, above], elinewidth=0.8, capsize=2, **style)
        else:
            axis.plot(x, y, **style)
    return shown


def _finish(figure, axis, title, lines, path):
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False, handlelength=3)
    save(figure, axis, title, lines, path)


# ---- parts of a pass, attention ----


def breakdown(groups, path):
    """Stacked bars: what each part takes of each profiled pass.

    Args:
        groups: {(variant, fuse, point): {part: line}}.
        path: picture file.
    """
    figure, axis = figure_of(10, 2.2 + 0.5 * len(groups))
    lines = [line for parts in groups.values() for line in parts.values()]
    totals = [sum(line["seconds"] for line in parts.values()) for parts in groups.values()]
    unit, name = (1, "seconds") if max(totals) >= 1 else (1e-3, "milliseconds")
    starts = [0.0] * len(groups)
    for part in PARTS:
        widths = [parts[part]["seconds"] / unit if part in parts else 0.0 for parts in groups.values()]
        if not any(widths):
            continue
        axis.barh(range(len(groups)), widths, left=starts, height=0.62, color=PART_COLOURS[part], label=PARTS[part])
        for place, (start, width, total) in enumerate(zip(starts, widths, totals, strict=True)):
            if width * unit > 0.035 * max(totals):
                share = f"{width * unit / total:.0%}"
                axis.text(start + width / 2, place, share, ha="center", va="center", color="white", fontsize=8.5)
        starts = [start + width for start, width in zip(starts, widths, strict=True)]
    names = [f"{variant.removeprefix('yojo_')}, fuse {fuse}\n{place}" for variant, fuse, place in groups]
    axis.set_yticks(range(len(groups)), names, fontsize=8.5)
    axis.invert_yaxis()
    axis.set_xlabel(name)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False)
    save(figure, axis, f"Where the time of one pass goes: {lines[0]['model']}", lines, path)


def attention(shapes, names, peak, title, path):
    """Bars: rates over the visible area of every way, shape by shape.

    Args:
        shapes: {name of a shape: {(variant, impl): line}}.
        names: {(variant, impl): name of a way}, in the order of the bars.
        peak: TFLOP/s of a large matrix product, or None.
        title: of the picture.
        path: picture file.
    """
    figure, axis = figure_of(max(9, 3 + 0.95 * len(shapes)), 5.4)
    lines = [line for shape in shapes.values() for line in shape.values()]
    per, unit = points.rate_unit(lines)
    width = 0.84 / len(names)
    shades = {"flex_tuned": 0.72, "flex_split": 0.45}
    for number, (key, name) in enumerate(names.items()):
        found = [
            (place, shape[key]["tflops"] * per)
            for place, shape in enumerate(shapes.values())
            if key in shape and shape[key]["tflops"]
        ]
        places = [place + (number - (len(names) - 1) / 2) * width for place, _ in found]
        colour, alpha = COLOURS[key[0]], shades.get(key[1], 1)
        axis.bar(places, [value for _, value in found], width * 0.92, color=colour, alpha=alpha, label=name, zorder=2)
    highest = max((line["tflops"] or 0 for line in lines), default=0)
    if peak is not None and peak < 10 * highest:  # further up, it would leave nothing of the bars
        axis.axhline(
            peak * per, color="#cf222e", linewidth=1, linestyle="--", label=f"matrix product, {digits(peak, per)}"
        )
    axis.margins(x=0.01)
    axis.set_xticks(range(len(shapes)), shapes, rotation=40, ha="right", rotation_mode="anchor", fontsize=8.5)
    axis.set_ylabel(f"{unit} of visible area")
    axis.grid(axis="y", color="#eaeef2")
    axis.set_axisbelow(True)
    axis.legend(loc="center left", bbox_to_anchor=(1.01, 0.5), fontsize=8.5, frameon=False)
    save(figure, axis, title, lines, path)


def shape_name(line):
    """Name of an attention line's row and heads, for tables and pictures."""
    sizes = str(point(line))
    whole = float(line["response_tokens"] or 0).is_integer()
    return f"{sizes if whole else 'mix: ' + sizes}; {line['heads']}:{line['kv_heads']} x {line['head_dim']}"

"""Draws a layout: who sees whom, and which tiles of the mask the attention kernel computes, masks and skips."""

import numpy as np
import torch

SKIPPED, MASKED, VISIBLE, FULL = range(4)
COLOURS = ("#ffffff", "#ffe2c4", "#f0883e", "#54aeff")
LABELS = (
    "skipped: never loaded",
    "border tile, hidden by the mask",
    "border tile, visible",
    "full tile: visible as a whole, no mask",
)
MOST_PIXELS = 1500
MOST_LABELS = 24


def plot(layout, path, block_m=128, block_n=64, window=None):
    """See `Layout.plot`."""
    try:
        from matplotlib import patches
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.colors import ListedColormap
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Layout.plot needs matplotlib: pip install matplotlib") from error

    layout = layout.to("cpu")
    rows = torch.linspace(0, layout.num_tokens - 1, min(layout.num_tokens, MOST_PIXELS)).round().to(torch.int64)
    picture, shares = _classes(layout, rows, block_m, block_n, window)
    figure = Figure(figsize=(8, 8.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.add_subplot()
    size = layout.num_tokens
    axis.imshow(
        picture,
        cmap=ListedColormap(COLOURS),
        vmin=SKIPPED,
        vmax=FULL,
        interpolation="nearest",
        extent=(0, size, size, 0),
    )
    names, middles = _segment_names(layout)
    ends = layout.sample_offsets.tolist()
    for edge in layout.segment_offsets.tolist() if len(names) <= MOST_LABELS else ends + layout.prompt_ends.tolist():
        style = {"color": "#57606a", "linewidth": 1.0 if edge in ends else 0.4}
        axis.axhline(edge, **style)
        axis.axvline(edge, **style)
    if len(names) <= MOST_LABELS:
        axis.set_yticks(middles, names, fontsize=8)
        axis.set_xticks(middles, names, fontsize=8, rotation=90)
        axis.tick_params(length=0)
    axis.set_xlabel("keys")
    axis.set_ylabel("queries")
    options = f", window {window}" if window else ""
    axis.set_title(f"{size} tokens, tiles of {block_m} queries x {block_n} keys{options}", fontsize=11)
    handles = [
        patches.Patch(facecolor=colour, edgecolor="#57606a", linewidth=0.5, label=label)
        for colour, label in zip(COLOURS, LABELS, strict=True)
    ]
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=2,
        fontsize=8,
        title="share of all pairs: full {:.1%}, border {:.1%}, skipped {:.1%}".format(*shares),
        title_fontsize=9,
        frameon=False,
    )
    figure.savefig(path, dpi=110, bbox_inches="tight")


def _classes(layout, rows, block_m, block_n, window):
    """([P, P] class of each pair of `rows` [P], (full, border, skipped) shares of all pairs)."""
    visible = layout.visible_among(rows, window).numpy()
    classes = np.full(visible.shape, SKIPPED, dtype=np.uint8)
    rows, full_pairs, border_pairs = rows.numpy(), 0, 0
    for start, end, *runs in layout.query_tiles(block_m, block_n, window).tolist():
        at = slice(*np.searchsorted(rows, (start, end)))
        for lo, stop, first, behind in (runs[:4], runs[4:]):
            full = (lo + first * block_n, lo + behind * block_n)
            full_pairs += (end - start) * (full[1] - full[0])
            border_pairs += (end - start) * (stop - lo - (full[1] - full[0]))
            keys = slice(*np.searchsorted(rows, (lo, stop)))
            classes[at, keys] = np.where(visible[at, keys], VISIBLE, MASKED)
            classes[at, slice(*np.searchsorted(rows, full))] = FULL
    pairs = layout.num_tokens**2
    return classes, (full_pairs / pairs, border_pairs / pairs, 1 - (full_pairs + border_pairs) / pairs)


def _segment_names(layout):
    """Names of the prompts and branches that hold tokens, and the middle row of each."""
    names, middles, row = [], [], 0
    for s, (prompt, branches) in enumerate(zip(layout.prompt_lengths, layout.branch_lengths, strict=True)):
        for name, length in [("prompt", prompt), *((f"branch {b + 1}", n) for b, n in enumerate(branches))]:
            if length:
                names.append(f"{name} of sample {s + 1}" if layout.num_samples > 1 else name)
                middles.append(row + length / 2)
                row += length
    return names, middles

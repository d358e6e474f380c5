"""Pictures of a training run, from the log that transformers' Trainer keeps."""

from pathlib import Path

PANELS = (
    ("loss", ("loss",)),
    ("accuracy", ("best_of_n", "pairwise")),
    ("Kendall tau", ("kendall_tau",)),
    ("scores", ("score_mean", "score_spread")),
    ("gradient norm", ("grad_norm",)),
)


def draw(log, path):
    """Draw loss, accuracies, tau, scores and gradient norm against steps, and accuracy by position.

    Args:
        log: list of dicts, `trainer.state.log_history`.
        path: PNG file.

    Returns:
        The path.

    Raises:
        ImportError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, 3, figsize=(13, 7))
    for axis, (title, names) in zip(axes.flat, PANELS, strict=False):
        for name, colour in zip(names, ("#4c78a8", "#f58518"), strict=False):
            for prefix, style in (("", "-"), ("eval_", "o--")):
                points = [(line["step"], line[prefix + name]) for line in log if prefix + name in line]
                if points:
                    label = (prefix + name).replace("_", " ")
                    axis.plot(*zip(*points, strict=True), style, color=colour, markersize=3.5, label=label)
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.25)
        if axis.lines:
            axis.legend(fontsize=8)
    _by_position(axes.flat[-1], log)
    figure.tight_layout()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _by_position(axis, log):
    """Best-of-N accuracy of the last evaluation (or of training's end), by the place of the best response in the row."""
    prefix = "eval_" if any("eval_best_of_n" in line for line in log) else ""
    start = f"{prefix}best_at_"
    line = next((line for line in reversed(log) if any(name.startswith(start) for name in line)), {})
    found = sorted((int(name.removeprefix(start)), value) for name, value in line.items() if name.startswith(start))
    axis.set_title(f"best-of-N by place of the best ({'evaluation' if prefix else 'training'})")
    axis.set_xlabel("place in the row")
    axis.set_ylim(0, 1)
    axis.grid(alpha=0.25, axis="y")
    if found:
        axis.bar([str(place) for place, _ in found], [value for _, value in found], width=0.6, color="#4c78a8")
        axis.axhline(line[f"{prefix}best_of_n"], color="#1f2328", linewidth=1, linestyle="--")

"""The report on the runs of the comparison: a table with the range over seeds, and a plot."""

import argparse
import json
import re
import statistics
from pathlib import Path

import measures

# The rewards in the order of the table, with their names and colours in it.
NAMES = {
    "truth": "true answer",
    "single": "single-response",
    "multi": "multi-response",
    "multi-4": "multi-response, 4 orders",
    "wide": "multi-response, of groups of 8",
}
COLOURS = {"truth": "#57606a", "single": "#bc4c00", "multi": "#0969da", "multi-4": "#8250df", "wide": "#1a7f37"}
RUN = re.compile(r"(.+)-seed(\d+)")

COLUMNS = {
    "sampled": "right, sampled, %",
    "greedy": "right, greedy, %",
    "true_wins": "true wins, %",
    "proxy_wins": "proxy wins, %",
    "gap": "proxy ahead of the truth, points",
    "kl": "KL, nats a token",
    "distinct": "distinct captions",
    "spread": "spread within groups",
    "useless": "useless groups, %",
    "settled": "settled groups (all right, all wrong), %",
    "pairwise": "pairs in order within groups, %",
    "setback": "setback, points an evaluation",
    "fall": "over-optimisation: fall, points",
    "apart": "over-optimisation: apart, % of steps",
}
UNITS = {"kl": (1, 2), "spread": (1, 2), "distinct": (1, 0)}  # scale and digits; of the others 100 and 1
LAST = 4  # evaluations, and as long a stretch of training, that a figure of the end averages


def read(folder):
    """The runs of a folder.

    Args:
        folder: of files REWARD-seedN.jsonl, each with a .json file beside it.

    Returns:
        dict: (reward, seed) -> list of the run's lines, dicts.

    Raises:
        ValueError: no runs, or runs whose settings differ in more than reward, judge and seed.
    """
    runs, settings = {}, {}
    for path in sorted(Path(folder).glob("*.jsonl")):
        if (found := RUN.fullmatch(path.stem)) is None or not path.with_suffix(".json").is_file():
            continue
        runs[found[1], int(found[2])] = [json.loads(line) for line in path.read_text().splitlines()]
        own = json.loads(path.with_suffix(".json").read_text())["settings"]
        settings[path.name] = {name: value for name, value in own.items() if name not in ("reward", "judge", "seed")}
    if not runs:
        raise ValueError(f"{folder} holds no whole run: REWARD-seedN.jsonl with its .json")
    first = next(iter(settings))
    for name, own in settings.items():
        if own != settings[first]:
            raise ValueError(f"{first} and {name} have other settings: {settings[first]} and {own}")
    return runs


def figures(lines):
    """The figures of a run: of the end, unless they are of the whole.

    Args:
        lines: dicts, as `read` gives them.

    Returns:
        dict: one number for each of `COLUMNS`. Of the last `LAST` evaluations, and of the training since the one before
        them: sampled, greedy, true_wins, proxy_wins, gap (proxy_wins - true_wins), distinct, kl, spread, useless, settled,
        pairwise (pooled over pairs). Of all evaluations: setback, fall, apart.
    """
    evaluated = [line for line in lines if line["kind"] == "eval"]
    end = evaluated[-LAST:]
    since = evaluated[-LAST - 1]["step"] if len(evaluated) > LAST else 0
    trained = [line for line in lines if line["kind"] == "train" and line["step"] > since]
    names = ("sampled", "greedy", "true_wins", "proxy_wins", "distinct")
    made = {name: _mean(line[name] for line in end) for name in names}
    made["gap"] = made["proxy_wins"] - made["true_wins"]
    made |= {name: _mean(line[name] for line in trained) for name in ("kl", "spread", "useless", "settled")}
    pairs = sum(line["pairs"] for line in trained)
    won = sum(line["pairwise"] * line["pairs"] for line in trained if line["pairs"])
    made["pairwise"] = won / pairs if pairs else None
    truth, proxy = [line["sampled"] for line in evaluated], [line["proxy_wins"] for line in evaluated]
    made["setback"] = measures.setback(truth)
    return made | measures.over_optimisation(proxy, truth)


def table(runs):
    """A table in Markdown: rewards by figures, mean over seeds and (lowest to highest)."""
    rewards = [reward for reward in NAMES if any(name == reward for name, _ in runs)]
    rewards += sorted({name for name, _ in runs} - set(NAMES))
    found = {
        reward: [figures(lines) for (name, _), lines in sorted(runs.items()) if name == reward] for reward in rewards
    }
    lines = ["| | " + " | ".join(NAMES.get(reward, reward) for reward in rewards) + " |"]
    lines.append("| --- |" + " ---: |" * len(rewards))
    for column, title in COLUMNS.items():
        cells = [_cell([one[column] for one in found[reward]], column) for reward in rewards]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(runs, path):
    """Draw the runs over training: the mean over seeds of each reward, and the range."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [
        ("eval", "sampled", "right answers of the policy, sampled\n(held-out images)"),
        ("eval", "proxy_wins", "proxy reward: wins over the initial policy\n(held-out images; dashed: true wins)"),
        ("train", "kl", "KL to the initial policy\n(nats a token, training images)"),
        ("train", "pairwise", "pairs of a right and a wrong answer in order\n(within groups in training)"),
        ("train", "useless", "useless groups: all rewards equal\n(training)"),
        ("train", "spread", "spread of the rewards within groups\n(training; each reward's own unit)"),
    ]
    figure, axes = pyplot.subplots(2, 3, figsize=(14, 7.4), sharex=True)
    rewards = [reward for reward in NAMES if any(name == reward for name, _ in runs)]
    for axis, (kind, column, title) in zip(axes.flat, panels, strict=True):
        for reward in rewards:
            _draw(axis, runs, reward, kind, column, "-", NAMES[reward])
            if column == "proxy_wins" and reward != "truth":
                _draw(axis, runs, reward, kind, "true_wins", "--", None)
        axis.set_title(title, fontsize=10)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    seeds = len({seed for _, seed in runs})
    title = f"GRPO on digits; lines: mean over {seeds} seeds; bands: lowest to highest"
    figure.legend(handles, labels, loc="lower center", ncols=len(rewards), frameon=False, title=title)
    figure.tight_layout(rect=(0, 0.075, 1, 1))
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _draw(axis, runs, reward, kind, column, style, label):
    curves = {}
    for (name, _), lines in runs.items():
        if name == reward:
            for line in _windows(lines, column) if kind == "train" else lines:
                if line["kind"] == kind and line[column] is not None:
                    curves.setdefault(line["step"], []).append(line[column])
    steps = sorted(curves)
    colour = COLOURS[reward]
    axis.plot(steps, [_mean(curves[step]) for step in steps], style, color=colour, label=label, linewidth=1.6)
    if style == "-":
        low, high = ([pick(curves[step]) for step in steps] for pick in (min, max))
        axis.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)


def _windows(lines, column, size=4):
    """Lines of training, `size` of them averaged into one."""
    lines = [line for line in lines if line["kind"] == "train"]
    for start in range(0, len(lines), size):
        part = [line for line in lines[start : start + size] if line[column] is not None]
        if part:
            step = _mean(line["step"] for line in lines[start : start + size])
            yield {"kind": "train", "step": step, column: _mean(line[column] for line in part)}


def _mean(values):
    return statistics.fmean(values)


def _cell(values, column):
    values = [value for value in values if value is not None]
    if not values:
        return ""
    scale, digits = UNITS.get(column, (100, 1))
    mean, low, high = (f"{scale * value:.{digits}f}" for value in (_mean(values), min(values), max(values)))
    return f"{mean} ({low} to {high})"


def main(argv=None):
    """Print the table; draw the plot."""
    parser = argparse.ArgumentParser(description="Report on runs of the comparison.")
    parser.add_argument("folder", type=Path, help="of the runs, REWARD-seedN.jsonl")
    parser.add_argument("--plot", type=Path, help="PNG file to draw")
    options = parser.parse_args(argv)
    try:
        runs = read(options.folder)
    except ValueError as error:
        parser.error(str(error))
    print(table(runs))
    if options.plot is not None:
        plot(runs, options.plot)


if __name__ == "__main__":
    main()

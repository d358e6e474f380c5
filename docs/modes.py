"""Draw docs/modes.png, the masks of the three modes, from the layout itself: python docs/modes.py"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.colors import ListedColormap
from matplotlib.patches import Rectangle

from yojo_kernels import Layout

PROMPT, RESPONSES = 6, (3, 4, 3)
COLOURS = ("#ffffff", "#d0d7de", "#54aeff", "#f0883e", "#3fb950")

MODES = {
    "comparative": ([sum(RESPONSES)], [(0, 1, 2)]),
    "isolated": (list(RESPONSES), [(0,), (1,), (2,)]),
    "comparative, permutations=2": ([sum(RESPONSES)] * 2, [(0, 1, 2), (1, 2, 0)]),
}


def draw(axis, title, branch_lengths, orders):
    """One mask: queries down, keys across, coloured by whose key it is; dots where scores are read."""
    layout = Layout.build([PROMPT], [branch_lengths])
    owner = [1] * PROMPT + [2 + n for order in orders for n in order for _ in range(RESPONSES[n])]
    picture = layout.visible().int().numpy() * owner
    axis.imshow(picture, cmap=ListedColormap(COLOURS), vmin=0, vmax=4, interpolation="none")
    size = layout.num_tokens
    axis.set_xticks([x - 0.5 for x in range(size + 1)], minor=True)
    axis.set_yticks([x - 0.5 for x in range(size + 1)], minor=True)
    axis.grid(which="minor", color="#ffffff", linewidth=0.8)
    axis.tick_params(which="both", length=0, labelbottom=False, labelleft=False)
    axis.add_patch(
        Rectangle((-0.5, -0.5), size, size, fill=False, color="#57606a", linewidth=1.2, zorder=5, clip_on=False)
    )
    row = PROMPT
    axis.text(-0.9, PROMPT / 2 - 0.5, "prompt", ha="right", va="center", fontsize=9)
    for order in orders:
        for n in order:
            axis.text(-0.9, row + RESPONSES[n] / 2 - 0.5, f"response {n + 1}", ha="right", va="center", fontsize=9)
            row += RESPONSES[n]
            axis.plot(row - 1, row - 1, "o", color="#24292f", markersize=4)
    for spine in axis.spines.values():
        spine.set_visible(False)
    axis.set_title(title, fontsize=11)


figure, axes = pyplot.subplots(1, 3, figsize=(13, 4.6), width_ratios=[16, 16, 26])
for axis, (title, (lengths, orders)) in zip(axes, MODES.items(), strict=True):
    draw(axis, title, lengths, orders)
figure.text(
    0.5,
    0.02,
    "queries down, keys across; white is not seen; a dot is a separator, where a score is read",
    ha="center",
    fontsize=9,
)
figure.tight_layout(rect=(0, 0.04, 1, 1))
figure.savefig(Path(__file__).parent / "modes.png", dpi=110)

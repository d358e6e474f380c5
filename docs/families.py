"""Write docs/families.md, how far each family's scores are from the stock model's own passes: python docs/families.py

`python docs/families.py --table` measures nothing: it writes what the rows of `yojo/families/` say between the marks of
every file that has them.
"""

import argparse
import datetime
import importlib.metadata
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests")]

import real_processors  # noqa: E402  beside the tests, which hold each figure to its bound

from yojo import families  # noqa: E402

COLUMNS = ("image", "two images", "video file", "frames", "video + image", "text")
MORE = ("wide image", "tall image", "small image", "images in turns", "several turns", "system turn")
MORE += ("video file, 2 fps", "two videos", "frames + image")

ROOT = HERE.parent
BEGIN, END = "<!-- families -->", "<!-- /families -->"
SAID = (
    "family",
    "`model_type`",
    "images",
    "videos",
    "tokens that see each other in both directions",
    "image features",
    "text decoder tested",
    "last layer for the rows that are read",
    "fused by Liger-Kernel",
)
FEATURES = {"replaced": "replace placeholders", "added": "are added to placeholders", None: "placed by the model"}

HEAD = """# Families

What `yojo/families/` says of each:

{table}

How far the scores of `yojo.RewardModel` are from those of the stock model, which sees one response in a pass of its own
(isolated) or all of them one after the other (comparative), on inputs made with the family's processor alone: the
conversation as its template renders it, up to the answer's end, then the separator. Each figure is the largest difference
of a score in float32, over both modes and three responses, relative to the largest score or 1; 1.2e-07 is one unit in the
last place of 1. The token ids are the same throughout{ids}.

The models are tiny, with random weights large enough that every token matters; the processors are the families' own, at
tiny sizes, with tokenizers and templates of the tests (`tests/real_processors.py`), which behave as the released ones do.
Released weights were not used. A video file has {frames} frames, 4 in a second; "frames" are four of them, two seconds apart.

Made by `python docs/families.py` on {date}, commit {commit}: {versions}; on the CPU.
"""


def rows_table():
    """What the rows of `yojo.families` say, as a markdown table between its marks."""
    lines = [f"| {' | '.join(SAID)} |", "| --- " * len(SAID) + "|"]
    for family in families.FAMILIES:
        decoders = [decoder for decoder in families.DECODERS if decoder.model_type in family.decoders]
        cells = (
            family.name,
            _names(family.model_types),
            _yes("image" in family.takes),
            _yes("video" in family.takes),
            "none" if family.blocks is None else family.blocks.says,
            FEATURES[family.features] if family.takes else "",
            _names(family.decoders),
            _yes(all(decoder.token_wise for decoder in decoders)),
            _yes(all(decoder.norms and decoder.mlps and decoder.attentions for decoder in decoders)),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([BEGIN, *lines, END])


def _names(names):
    return ", ".join(f"`{name}`" for name in names)


def _yes(holds):
    return "yes" if holds else "no"


def marked_files():
    """The markdown files of the repository that have the marks."""
    files = (*sorted(ROOT.glob("*.md")), *sorted(HERE.glob("*.md")))
    return [path for path in files if BEGIN in path.read_text()]


def with_table(text):
    """A file's text with the table as it is now between its marks."""
    return re.sub(f"{BEGIN}.*?{END}", lambda found: rows_table(), text, flags=re.DOTALL)


def measured(family, prompt, refused):
    """A cell: the difference, or the number of the reason why there is none."""
    worst, wrong = 0.0, 0
    for mode in ("isolated", "comparative"):
        try:
            ids, difference = real_processors.differences(family, mode, prompt)
        except ValueError as error:
            reason = " ".join(str(error).removeprefix("example 0: ").split())
            return f"refused [{refused.setdefault(reason, len(refused) + 1)}]", 0
        worst, wrong = max(worst, difference), wrong + ids
    return f"{worst:.1e}" + (" (other ids)" if wrong else ""), wrong


def table(names, prompts, refused):
    """(lines of a markdown table, how many responses have other ids)."""
    lines, wrong = [f"| family | {' | '.join(names)} |", "| --- |" + " ---: |" * len(names)], 0
    for family in real_processors.FAMILIES:
        cells = [measured(family, prompts[name], refused) for name in names]
        lines.append(f"| {family} | {' | '.join(text for text, _ in cells)} |")
        wrong += sum(count for _, count in cells)
    return lines, wrong


def versions():
    """The versions of what the figures depend on, in one line."""
    others = ("torchvision", "av", "tokenizers", "pillow")
    found = {"torch": torch.__version__, "transformers": transformers.__version__}
    return ", ".join(f"{name} {version}" for name, version in {**found, **_installed(others)}.items())


def _installed(names):
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    return found


def commit():
    """The commit the figures are of, with a mark where files have changed since."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty=, with changes", "--exclude", "*"],
        cwd=HERE,
        capture_output=True,
        text=True,
    )
    return described.stdout.strip() or "unknown"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", action="store_true", help="measure nothing, write what the rows say")
    if not parser.parse_args().table:
        return measure()
    for path in marked_files():
        path.write_text(with_table(path.read_text()))


def measure():
    """Write the whole file."""
    transformers.utils.logging.set_verbosity_error()
    refused = {}
    with tempfile.TemporaryDirectory() as folder:
        prompts = real_processors.cases(Path(folder))
        first, wrong = table(COLUMNS, prompts, refused)
        second, more_wrong = table(MORE, prompts, refused)
    ids = f", but for {wrong + more_wrong} responses" if wrong + more_wrong else ""
    today = datetime.datetime.now(datetime.UTC).date()
    head = HEAD.format(table=rows_table(), ids=ids, frames=16, date=today, commit=commit(), versions=versions())
    reasons = [f"{number}. {reason}" for reason, number in refused.items()]
    parts = [head, "\n".join(first), "\nThe other inputs of the tests:\n", "\n".join(second)]
    parts += ["\n## What is refused, and why\n", "\n".join(reasons)]
    (HERE / "families.md").write_text("\n".join(parts) + "\n")


if __name__ == "__main__":
    main()

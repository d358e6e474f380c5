"""The report on all result lines: `python -m bench.report` writes docs/benchmarks.md, its pictures and the README's table.

`python -m bench.report --check` writes nothing, and says which of these files the result lines no longer give.
"""

import argparse
import sys
from pathlib import Path

from bench import models, plots, points, savings, schema, sections
from bench.model import DEVICES, predictions
from bench.points import Scores, count, provenance, times
from bench.sections import PICTURES, Page, table

MARKERS = ("<!-- benchmarks -->", "<!-- /benchmarks -->")
NOTHING = "No figure has been measured on a GPU yet."
HEAD = """<!-- Generated from bench/results/*.jsonl by `python -m bench.report`: change nothing here. -->

# Benchmarks

```
pytest bench --benchmark-only      # on a GPU at real sizes, where there is none at small ones on the CPU
make gpu-bench                     # the same on a GPU; adds result lines to bench/results
make bench-compare                 # what became slower, against the lines in bench/results
python -m bench.report             # this page from the result lines
```

`-k` picks benchmarks by name, `--model-shape` the backbone of scoring and training (or `all`), `--quick` few points and
rounds, `--full` every combination instead of the sweeps, `--results FOLDER` where lines go.

## What is compared

| way | what it does |
| --- | --- |
| single passes | N passes of the stock model, one response each, one after the other: what all else is compared with |
| single passes, liger or compile | the same with YOJO's kernels and its fused layers, so that it shows what packing alone gives |
| padded batch | the N single responses as one padded batch |
| released code | what the paper's released code computes: plain causal attention over all responses, logits of the whole vocabulary, every layer's hidden states |
| prefix cache | the prompt once into a KV cache, expanded, then a batch of the N responses on it |
| FlexAttention | isolated mode through FlexAttention on the stock model |
| YOJO comparative | one pass, later responses see earlier ones |
| YOJO isolated | one pass, the scores of N single passes |
| YOJO permuted K | one pass, K orders of the responses (N! where that is fewer), averaged |

"liger" and "compile" say how norms, rotary embeddings and MLPs are fused; nothing is fused where neither is named. The
stock model's attention is SDPA, transformers' default; a prefix cache then attends through a mask. Ways that the stock
model alone can go (released code, prefix cache, FlexAttention) are fused by Liger-Kernel where it is installed.

## How it was measured

- After warm-up, the median of all rounds. The spread, shortest to longest round, stands in the lists of scoring and
  training, as whiskers in the pictures of time, and for all else in the result lines.
- The clock is synchronised with the device. On a GPU the level-2 cache is overwritten before each round.
- One backbone lies in memory, with random weights at the sizes of the named shape; it is patched and unpatched for the
  ways in turn.
- Nothing wrong is timed: before that, scores (of a training step, gradients) must be as near to those of the stock model
  in a higher precision as the stock model's own are, within a factor of about 2.
- Peak memory is the most that tensors take beyond the weights.
- Images, positions and FlexAttention's block mask are prepared beforehand, for every way alike.
- All responses of a prompt have equal length, so the padded batch has no padding to pay for.
- FLOPs are those of what is visible, with the vocabulary's logits for the released code. The FLOPs ratio, those of N
  single passes over those of the way, is what computing less alone gives.
- At N = 1 the padded batch and the single pass are the same computation: what lies between them is noise.
- A ratio above N is possible: stock passes compute their last layer for every token, YOJO for the rows that are read.
- An empty cell was not measured, or did not fit into memory; nothing is estimated but what is called predicted."""


# ---- the page and the README's block ----


def build(lines, saved=None, predicted=()):
    """The page of some result lines, of what `bench.savings.count` counted and `bench.model` predicts: `Page`."""
    page, lines = Page(), points.ordered(lines)
    page.write(HEAD)
    sections.goals_section(page, lines)
    if saved is not None:
        sections.savings_section(page, saved)
    if predicted:
        sections.predicted_section(page, predicted)
    if not lines:
        page.write("## Measured", "Nothing has been measured yet.")
    for machine in points.machines(lines):
        own = [line for line in lines if points.machine(line) == machine]
        machine_section(page, own, machine, predicted if machine in DEVICES else ())
    return page


def machine_section(page, lines, machine, predicted=()):
    """All that was measured on one machine, predictions for it beside it; nothing of what was not measured."""
    by_bench = {name: [line for line in lines if line["bench"] == name] for name in schema.BENCHES}
    parts = [line for line in by_bench["forward"] if line["part"] is not None]
    steps = [line for line in by_bench["forward"] if line["part"] is None]
    page.write(f"## {machine}")
    for model in points.models(by_bench["score"] + by_bench["train"] + parts):
        score, train, profiled = (points.of_model(found, model) for found in (by_bench["score"], by_bench["train"], parts))  # fmt: skip
        words = models.described(model[0])
        page.write(f"### {', '.join(filter(None, model))}", words and words + ".", provenance(score + train + profiled))
        if score:
            sections.scoring_section(page, score, machine, model)
        if train:
            sections.training_section(page, train)
        if profiled:
            sections.breakdown_section(page, profiled, machine, model)
    if steps:
        sections.steps_section(page, steps, lines)
    if by_bench["attention"]:
        sections.attention_section(page, by_bench["attention"], machine, predicted)
    if by_bench["head"] + by_bench["loss"]:
        sections.head_section(page, by_bench["head"] + by_bench["loss"])
    if by_bench["host"]:
        sections.host_section(page, by_bench["host"])
    if by_bench["pipeline"]:
        sections.pipeline_section(page, by_bench["pipeline"])


def page(lines, saved=None, predicted=()):
    """The text of docs/benchmarks.md."""
    return build(lines, saved, predicted).text()


def headline(lines):
    """(machine, model, scores, N sweep) that the README shows; None without score lines."""
    found = []
    for place, machine in enumerate(points.machines(lines)):
        own = [line for line in lines if line["bench"] == "score" and points.machine(line) == machine]
        for model in points.models(own):
            scores = Scores(points.of_model(own, model))
            places = scores.sweep("responses", fewest=1)
            if not any(one.variant.startswith("yojo") for place in places for one in scores.points[place]):
                continue
            rank = own[0]["gpu"] is not None, model[0] == points.HEADLINE_MODEL, len(places), len(own), -place
            found.append((rank, machine, model, scores, places))
    return max(found, key=lambda one: one[0])[1:] if found else None


def readme_block(lines):
    """What stands between the README's markers."""
    best = headline(points.ordered(lines))
    on_gpu = any(line["gpu"] is not None for line in lines)
    if best is None:
        return NOTHING if not on_gpu else "All figures: [docs/benchmarks.md](docs/benchmarks.md)."
    machine, model, scores, places = best
    shown = [line for place in places for line in scores.points[place].values()]
    words = models.described(model[0])
    text = f"Speed-up over N single passes of the stock model: {plots.title_of(scores, places)}"
    text += (f" ({words})." if words else ".") + f" Measured in {model[1]} on {provenance(shown)}."
    blocks = ["" if on_gpu else NOTHING, text, headline_table(scores, places)]
    name = points.slug(machine, *model, "speed-up") + ".png"
    if len(places) > 1 and "speed-up" in sections.pictures_of(scores, places):
        blocks.append(f"![Speed-up against N. {provenance(shown)}](docs/{PICTURES}/{name})")
    blocks.append("All figures, goals reached and missed among them: [docs/benchmarks.md](docs/benchmarks.md).")
    return "\n\n".join(filter(None, blocks))


def headline_table(scores, places):
    """A row for each N, a column for each variant, ours as fused as is fastest, and the FLOPs ratio."""
    columns = [one for one in scores.ways if one.variant == "single" and one.fuse != "none"]
    for variant in ("single_batch", "released", "prefix_cache", "flex", "yojo_comparative", "yojo_isolated"):
        ways = [one for one in scores.ways if one.variant == variant]
        if ways:
            columns.append(min(ways, key=lambda one: _rank(scores, places, one)))
    rows = []
    for place in places:
        lines = [scores.points[place].get(one) for one in columns]
        isolated = scores.best(place, "yojo_isolated")
        single = scores.single(place)
        cells = [times(line and scores.speedup(line)) for line in lines]
        rows.append([count(place.responses), points.seconds(single and single["seconds"]), *cells, times(isolated and scores.flops_ratio(isolated))])  # fmt: skip
    return table(["N", "single passes", *(scores.names[one] for one in columns), "FLOPs ratio, isolated"], rows)


def _rank(scores, places, one):
    """The others as users have them, not fused; then what was measured at the most N; then the fastest at the largest."""
    found = [scores.points[place][one] for place in places if scores.has(place, one)]
    fused = one.fuse != "none" and not one.variant.startswith("yojo")
    return fused, -len(found), found[-1]["seconds"] if found else 0


# ---- files ----


def read_results(folder):
    """The result lines of a folder; none where it is empty or missing.

    Raises:
        ValueError: a line that breaks the schema; file and number are named.
    """
    return schema.read(*sorted(Path(folder).glob("*.jsonl")))


def replaced(text, block, path, markers=MARKERS):
    """A README's text with `block` between the markers.

    Raises:
        ValueError: each marker does not stand in it once, in order.
    """
    start, end = markers
    if text.count(start) != 1 or text.count(end) != 1 or text.index(start) > text.index(end):
        raise ValueError(
            f"{path}: the lines {start} and {end} must stand in it, once each: the table goes between them"
        )
    before, after = text.partition(start)[0], text.partition(end)[2]
    return f"{before}{start}\n{block}\n{end}{after}"


def main(arguments=None):
    """Write the report, or check it; 1 where a file is out of date, 2 where something is wrong with what is read."""
    parser = argparse.ArgumentParser(prog="python -m bench.report", description=__doc__.partition("\n")[0])
    parser.add_argument("--results", default="bench/results", help="folder of result lines")
    parser.add_argument("--docs", default="docs", help="folder of benchmarks.md and its pictures")
    parser.add_argument("--readme", default="README.md", help='file with the markers; "" leaves it alone')
    parser.add_argument("--check", action="store_true", help="write nothing; 1 when a file is out of date")
    options = parser.parse_args(arguments)
    docs = Path(options.docs)
    if not Path(options.results).is_dir():
        print(f"error: there is no folder {options.results}", file=sys.stderr)
        return 2
    try:
        lines = read_results(options.results)
        built = build(lines, savings.count(), predictions())
        texts = {docs / "benchmarks.md": built.text()}
        if options.readme:
            readme = Path(options.readme)
            texts[readme] = replaced(readme.read_text(), readme_block(lines), readme)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    pictures = {docs / PICTURES / name: draw for name, draw in built.pictures.items()}
    if options.check:
        return check(texts, pictures)
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for path in set((docs / PICTURES).glob("*.png")) - set(pictures):
        path.unlink()  # of lines that are no longer there
    for path, draw in pictures.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(path)
    print(f"{len(lines)} result lines -> {', '.join(map(str, texts))}, {len(pictures)} pictures")
    return 0


def check(texts, pictures):
    """Say which files are not what the lines give; 1 when there are any. Of pictures, only whether they are there."""
    stale = [path for path, text in texts.items() if not path.is_file() or path.read_text() != text]
    missing = [path for path in pictures if not path.is_file()]
    for path in stale:
        print(f"{path} is out of date: run python -m bench.report")
    for path in missing:
        print(f"{path} is missing: run python -m bench.report")
    return int(bool(stale or missing))


if __name__ == "__main__":
    sys.exit(main())

"""The sections of the report's page: tables and pictures made from result lines, one function for each kind of line."""

import functools

from bench import goals, models, plots, points, schema
from bench.points import SWEEPS, VARIANTS, Scores, count, digits, memory, percent, point, provenance, ratio, times
from yojo.costs.profiling import PARTS

PICTURES = "benchmarks"  # folder of the pictures, beside the page
STEPS = (
    "logits_and_states",
    "backbone",
    "fused_head",
    "last_rows",
    "fused_layers",
    "graphs",
)  # of bench/test_forward.py
ATTENTION_NAMES = {"flex_tuned": "FlexAttention, tuned", "flex_split": "FlexAttention, split", "flex": "FlexAttention"}
ATTENTION_ORDER = ("yojo_isolated", "yojo_comparative", "flex", "kv_gather", "sdpa")


# ---- Markdown ----


class Page:
    """Blocks of Markdown, and the pictures they link.

    Attributes:
        blocks: of text, in order.
        pictures: {file name: function (path) that draws it}.
    """

    def __init__(self):
        self.blocks, self.pictures = [], {}

    def write(self, *blocks):
        """Add blocks; empty ones are left out."""
        self.blocks += [block for block in blocks if block]

    def picture(self, name, what, lines, draw):
        """Add a picture: `draw(path)` draws `lines`."""
        self.pictures[name] = draw
        self.write(f"![{what}. {provenance(lines)}]({PICTURES}/{name})")

    def text(self):
        """All of it."""
        return "\n\n".join(self.blocks) + "\n"


def table(header, rows, words=1):
    """A Markdown table, its first columns, of words, to the left; "" without rows.

    Columns of figures without a single one are left out, and a table without any such column is "", too.
    """
    kept = [place for place in range(len(header)) if place < words or any(row[place] for row in rows)]
    if not rows or len(header) > words == len(kept):
        return ""
    lines = [header, ["---"] * words + ["---:"] * (len(header) - words), *rows]
    return "\n".join("| " + " | ".join(line[place].replace("|", "\\|") for place in kept) + " |" for line in lines)


def folded(summary, text):
    """Text that is shown on demand; "" for none."""
    return text and f"<details><summary>{summary}</summary>\n\n{text}\n\n</details>"


# ---- goals ----


def goals_section(page, lines):
    """Every goal with what was measured of it, and why some were missed."""
    page.write(
        "## Goals",
        "Measured on GPUs alone, host times apart. A goal about many shapes is held against the worst of them.",
    )
    rows, notes = [], []
    for goal, gpu, found in goals.judged(lines):
        verdict = goals.verdict(goal, found)
        measured = "" if found is None else f"{goal.shown(found.value)} on {gpu} ({found.about})"
        rows.append([goal.what, goal.bound(), measured, verdict])
        if verdict == "MISSED":
            own = [line for line in lines if line["gpu"] == gpu]
            notes += [f"- {goal.what}, on {gpu}: {reason}" for reason in goals.reasons(goal, found, own)]
    page.write(table(["goal", "threshold", "measured", "verdict"], rows, words=4))
    if notes:
        page.write("Where goals were missed:", "\n".join(notes))


# ---- what can be saved ----


def savings_section(page, savings):
    """What one pass saves in FLOPs on the real shapes: counted, nothing is measured.

    `savings`: `bench.savings.Savings`.
    """
    page.write(
        "## What there is to save",
        "FLOPs of N single passes over those of one pass, comparative / isolated, counted by `yojo.costs.flops` from shapes and "
        f"lengths (vision tower included, responses of {savings.each} tokens unless said otherwise): what computing less "
        "gives, and no more than that. The last layer is computed for the rows alone that are read, which can carry the "
        "ratio above N. `yojo.costs.flops.batch_flops` says the same of any batch beforehand.",
    )
    for name, rows in savings.shapes.items():
        page.write(
            f"**{name}**: {models.described(name)}",
            table(["prompt", *(f"N = {count(n)}" for n in savings.counts)], rows),
        )


# ---- what the kernels should do ----


def predicted_section(page, predicted):
    """What `bench.model` predicts of attention: `predicted` are its `Prediction`s. Nothing here is measured."""
    rows = []
    for one in predicted:
        cells = [digits(one.visible)]
        for direction, kernel in (("forward", "forward"), ("backward", "key_grad")):
            cells += [points.seconds(1e-6 * one.microseconds(direction)), digits(one.tflops(direction)), digits(one.runs[kernel].balance)]  # fmt: skip
        rows.append([plots.shape_name({"prompt": None, "samples": None, **one.shape.fields()}), *cells])
    header = ["prompt tokens + N x response tokens; heads x head dim", "visible / computed",
              "forward, predicted", "TFLOP/s, predicted", "balance",
              "backward, predicted", "TFLOP/s, predicted", "balance of key gradients"]  # fmt: skip
    page.write(
        "## Predicted",
        "Isolated attention in bfloat16 on an H100 SXM or an H200, computed by `python -m bench.model` from the kernels' "
        "machine code and the tables of tiles (`--constants` shows what goes in): **no figure of this section was "
        "measured**. TFLOP/s are of visible area; balance is the share of the time that a multiprocessor has work. Where "
        'one of these GPUs was measured, its section sets both side by side ("Prediction against measurement").',
        table(header, rows),
    )


def predicted_beside(lines, direction, predicted):
    """Table of what was predicted for YOJO isolated beside what was measured; "" where nothing was both."""
    rows = []
    for one in predicted:
        fields = one.shape.fields()
        for line in lines:
            ours = (line["variant"], line["impl"], line["dtype"]) == ("yojo_isolated", "triton", "bfloat16")
            if ours and line["tflops"] and all(line[name] == value for name, value in fields.items()):
                rate = one.tflops(direction)
                rows.append([plots.shape_name(line), digits(rate), digits(line["tflops"]), percent(line["tflops"] / rate)])  # fmt: skip
    header = ["prompt tokens + N x response tokens; heads x head dim", "TFLOP/s, predicted", "TFLOP/s, measured",
              "measured / predicted"]  # fmt: skip
    return table(header, rows)


# ---- scoring ----


def scoring_section(page, lines, machine, model):
    """Sweeps, each as tables of all ways, and every line there is."""
    scores = Scores(lines)
    places = scores.sweep("responses")
    if places:
        page.write(f"#### Number of responses: {plots.title_of(scores, places).partition(', ')[2]}")
        for name, draw in pictures_of(scores, places).items():
            draw_all = functools.partial(draw, scores, places)
            shown = [line for place in places for line in scores.points[place].values()]
            page.picture(points.slug(machine, *model, name) + ".png", f"{name.capitalize()} against N", shown, draw_all)
        sweep_tables(page, scores, places, "N", lambda place: count(place.responses))
    for over, title, column in (
        ("prompt_tokens", "Length of the prompt", "prompt tokens"),
        ("response_tokens", "Length of the responses", "response tokens"),
    ):
        if places := scores.sweep(over):
            same = ", ".join(f"{field.replace('_', ' ')} {_same(places, field)}" for field in SWEEPS[over] if _same(places, field))  # fmt: skip
            page.write(f"#### {title}: {same}", least_to_gain(scores, places))
            sweep_tables(page, scores, places, column, functools.partial(_size, over=over))
    per, unit = points.rate_unit(lines)
    rows = [
        [str(place), scores.names[one], points.seconds(line["seconds"]), _spread(line), times(scores.speedup(line)),
         times(scores.flops_ratio(line)), digits(line["flops"], per / 1e12),
         digits(line["flops_counted"], per / 1e12), digits(line["tflops"], per), memory(line["peak_bytes"])]
        for place, found in scores.points.items()
        for one, line in sorted(found.items(), key=lambda pair: scores.ways.index(pair[0]))
    ]  # fmt: skip
    header = ["prompt tokens + N x response tokens", "way", "time", "shortest to longest", "speed-up", "FLOPs ratio",
              f"{unit[0]}FLOPs", f"{unit[0]}FLOPs counted", unit, "peak memory"]  # fmt: skip
    page.write("#### All points", folded(f"{len(rows)} lines", table(header, rows, words=2)))


def pictures_of(scores, places):
    """{name: function} of the pictures of an N sweep for which something was measured."""
    pictures = {"time": plots.time}
    measured = [line for place in places for line in scores.points[place].values()]
    if any(scores.speedup(line) is not None for line in measured if line["variant"] != "single"):
        pictures["speed-up"] = plots.speedup
    if any(line["peak_bytes"] for line in measured):
        pictures["peak memory"] = plots.memory
    return pictures


def _same(places, field):
    value = getattr(places[0], field)
    if field == "samples":
        return "" if value == 1 else str(value)
    return value if isinstance(value, str) else count(value)


def _size(place, over):
    prompt = f", {place.prompt}" if over == "prompt_tokens" and place.prompt else ""
    return count(getattr(place, over)) + prompt


def _spread(line):
    return f"{points.seconds(min(line['seconds_all']))} to {points.seconds(max(line['seconds_all']))}"


def sweep_tables(page, scores, places, column, name):
    """Time, speed-up beside FLOPs ratio, memory and throughput: a row for each point, a column for each way."""

    def time_cell(line):
        gained = scores.speedup(line)
        is_baseline = line is scores.single(point(line))
        return points.seconds(line["seconds"]) + ("" if gained is None or is_baseline else f" ({times(gained)})")

    def share_cell(line):
        gained, possible = scores.speedup(line), scores.flops_ratio(line)
        if gained is None or possible is None or line is scores.single(point(line)):
            return ""
        return f"{times(gained)} / {times(possible)} = {percent(gained / possible)}"

    def rate_cell(line):
        return digits(line["responses"] and line["responses"] / line["seconds"])

    kinds = {
        "Time (speed-up over N single passes)": time_cell,
        "Speed-up / FLOPs ratio = share of the possible saving": share_cell,
        "Peak memory beyond the weights": lambda line: memory(line["peak_bytes"]),
        "Responses per second": rate_cell,
    }
    for title, cell in list(kinds.items())[: 4 if column == "N" else 2]:
        tables = []
        for fused in (False, True):
            ways = [one for one in scores.ways if (one.fuse != "none") == fused]
            if not ways:
                continue
            rows = [
                [name(place), *(cell(scores.points[place][one]) if scores.has(place, one) else "" for one in ways)]
                for place in places
            ]
            tables.append(table([column, *(scores.names[one] for one in ways)], rows))
        if any(tables):
            page.write(f"**{title}**", *tables)


def least_to_gain(scores, places):
    """A sentence on the point of a sweep where one pass has the least to save; "" where none is known."""
    found = [line for place in places if (line := scores.best(place, "yojo_isolated")) and scores.flops_ratio(line)]
    if not found:
        return ""
    line = min(found, key=scores.flops_ratio)
    return (
        f"There is least to gain at {point(line)}: a FLOPs ratio of {times(scores.flops_ratio(line))} in isolated mode, "
        f"and a speed-up of {times(scores.speedup(line))} ({points.way(line)})."
    )


# ---- training, parts and steps of a pass ----


def training_section(page, lines):
    """Samples per second and memory, beside the released loop on the same samples."""
    rows = []
    per, unit = points.rate_unit(lines)
    for group in points.rows_of(lines, goals.per_sample).values():
        released = max((line for line in group if line["variant"] == "released"), key=goals.rate, default=None)
        order = sorted(group, key=lambda line: (list(VARIANTS).index(line["variant"]), line["samples"] or 1, line["fuse"] or ""))  # fmt: skip
        names = points.names_of(points.in_order({points.way(line) for line in group}))
        for line in order:
            rows.append([
                names[points.way(line)], count(line["samples"] or 1), str(point(line)), points.seconds(line["seconds"]), _spread(line),
                digits(goals.rate(line)), times(released and goals.rate(line) / goals.rate(released)),
                memory(line["peak_bytes"]), times(ratio(line, released, "peak_bytes")), digits(line["tflops"], per),
            ])  # fmt: skip
    header = ["way", "samples in a row", "prompt tokens + N x response tokens", "step", "shortest to longest", "samples/s",
              "of the released loop", "peak memory", "of the released loop", unit]  # fmt: skip
    page.write("#### Training step: forward, loss and backward, without the optimizer", table(header, rows))


def breakdown_section(page, lines, machine, model):
    """What each part of a pass takes."""
    groups = points.breakdowns(lines)
    page.write("#### Where the time of one pass goes")
    draw = functools.partial(plots.breakdown, groups)
    page.picture(points.slug(machine, *model, "breakdown") + ".png", "Time of one pass by its parts", lines, draw)
    totals = {key: sum(line["seconds"] for line in parts.values()) for key, parts in groups.items()}
    rows = []
    for part, name in PARTS.items():
        found = {key: parts.get(part) for key, parts in groups.items()}
        rows.append([name, *(line and _part_cell(line, totals[key]) or "" for key, line in found.items())])
    rows.append(["whole pass", *map(points.seconds, totals.values())])
    header = [f"{VARIANTS[variant]}, fuse {fuse}: {place}" for variant, fuse, place in groups]
    page.write(table(["part", *header], [row for row in rows if any(row[1:])]))


def _part_cell(line, total):
    per, unit = points.rate_unit([line])
    rate = f", {digits(line['tflops'], per)} {unit}" if line["tflops"] else ""
    return f"{points.seconds(line['seconds'])}, {percent(line['seconds'] / total)}{rate}"


def steps_section(page, lines, peaks):
    """What each measure against waste gives: a row for each pass, a column for each step of bench/test_forward.py.

    `peaks`: lines of the machine, among them those of matrix products.
    """
    steps = list(dict.fromkeys((line["impl"], line["fuse"] or "none") for line in lines))
    steps.sort(key=lambda step: (_place(step[0]), step))
    rows, memories = [], []
    per, unit = points.rate_unit(lines)
    for (model, _, dtype, *_), group in points.rows_of(lines, _pass_of).items():
        found = {(line["impl"], line["fuse"] or "none"): line for line in group}
        first = next((found[step] for step in steps if step in found and step[0] == STEPS[0]), None)
        cells = []
        for step in steps:
            line = found.get(step)
            gained = first and line and line is not first and f" ({times(first['seconds'] / line['seconds'])})"
            cells.append(line and points.seconds(line["seconds"]) + (gained or "") or "")
        best = min(group, key=lambda line: line["seconds"])
        peak = goals.matmul_peak(peaks, dtype)
        share = peak and best["tflops"] and best["tflops"] / peak
        name = f"{VARIANTS[best['variant']]}, {point(best)}; {model}"
        rows.append([name, *cells, digits(best["tflops"], per), percent(share)])
        memories.append([name, *(memory(found[step]["peak_bytes"]) if step in found else "" for step in steps)])
    names = [step + (f", {fuse}" if fuse != "none" else "") for step, fuse in steps]
    header = ["pass", *names, f"{unit} at best", "of matrix product"]
    page.write(
        "### What each step of a scoring pass brings",
        provenance(lines),
        "Steps follow each other, each with those before it (`bench/test_forward.py`); times over the first step in brackets.",
        table(header, rows),
        folded("Peak memory beyond the weights", table(header[:-2], memories)),
    )


def _place(step):
    return STEPS.index(step) if step in STEPS else len(STEPS)


def _pass_of(line):
    return line["model"] or "", line["variant"], line["dtype"] or "", *point(line)


# ---- attention, head and losses ----


def attention_section(page, lines, machine, predicted=()):
    """Rates of every way to compute attention, forward and backward, and what is prepared once per batch.

    `predicted`: what `bench.model` predicts for this machine.
    """
    ways = [line for line in lines if line["variant"] is not None]
    per, unit = points.rate_unit(lines)
    page.write("### Attention", provenance(lines))
    for direction in schema.PASSES:
        found = [line for line in ways if line["pass"] == direction]
        for dtype in sorted({line["dtype"] or "" for line in found}):
            own = [line for line in found if (line["dtype"] or "") == dtype]
            attention_tables(page, own, machine, direction, dtype, goals.matmul_peak(lines, dtype))
            if beside := predicted_beside(own, direction, predicted):
                page.write("**Prediction against measurement**, YOJO isolated", beside)
    rows = [
        [{"matmul": "matrix product"}.get(line["impl"], line["impl"]), line["dtype"] or "",
         "" if line["prompt_tokens"] is None else plots.shape_name(line), points.seconds(line["seconds"]), digits(line["tflops"], per)]
        for line in sorted((line for line in lines if line["variant"] is None), key=lambda line: (line["impl"], point(line).tokens, str(point(line)), line["head_dim"] or 0))
    ]  # fmt: skip
    if rows:
        rows = table(["what", "dtype", "row", "time", unit], rows, words=3)
        page.write("#### Matrix product, and what is prepared once per batch", rows)


def attention_tables(page, lines, machine, direction, dtype, peak):
    """One direction: a picture, and tables of rates, ratios and memory."""
    keys = sorted(
        {(line["variant"], line["impl"]) for line in lines},
        key=lambda key: (_attention_place(key[0]), key[1] == "gluon", key),
    )
    names = {key: _attention_name(key) for key in keys}
    shapes = {
        plots.shape_name(group[0]): {(line["variant"], line["impl"]): line for line in group}
        for group in points.rows_of(lines, _attention_shape).values()
    }
    per, unit = points.rate_unit(lines)
    title = f"Attention, {direction}, {dtype}: {unit} of visible area"
    page.write(f"#### {title}")
    draw = functools.partial(plots.attention, shapes, names, peak, title)
    page.picture(points.slug(machine, "attention", direction, dtype) + ".png", title, lines, draw)
    rates, ratios, memories = [], [], []
    for name, shape in shapes.items():
        ours = next((shape[key] for key in keys if key[0] == "yojo_isolated" and key in shape), None)
        rates.append([name, *(digits(shape[key]["tflops"], per) if key in shape else "" for key in keys)])
        peers = [None if (line := shape.get(key)) is ours else line for key in keys]
        ratios.append([name, *(times(ratio(line, ours, "seconds")) for line in peers)])
        memories.append([name, *(memory(shape[key]["peak_bytes"]) if key in shape else "" for key in keys)])
    header = ["prompt tokens + N x response tokens; heads x head dim", *names.values()]
    page.write(table(header, rates))
    if shown := table(header, ratios):
        page.write("**Time of the others over that of YOJO isolated** (above 1x: YOJO is faster)", shown)
    page.write(folded("Peak memory beyond the inputs", table(header, memories)))


def _attention_place(variant):
    return ATTENTION_ORDER.index(variant) if variant in ATTENTION_ORDER else len(ATTENTION_ORDER)


def _attention_name(key):
    variant, impl = key
    if variant == "flex":
        return ATTENTION_NAMES.get(impl, impl)
    return VARIANTS[variant] + ("" if impl in ("triton", variant) else f", {impl}")


def _attention_shape(line):
    return line["head_dim"] or 0, *point(line), line["heads"] or 0, line["kv_heads"] or 0


def head_section(page, lines):
    """Head and losses: microseconds, fused and in plain PyTorch, launched and replayed."""
    page.write("### Value head and losses", provenance(lines))
    impls = ("reference", "triton", "reference_graph", "triton_graph")
    titles = {"forward": "Forward", "backward": "Backward", "both": "Forward and backward"}
    for direction in ("both", "forward", "backward"):
        rows = []
        found = [line for line in lines if line["pass"] == direction]
        for (bench, model, _, responses), group in points.rows_of(found, _head_case).items():
            by_impl = {line["impl"]: line for line in group}
            cells = [digits(1e6 * by_impl[impl]["seconds"]) if impl in by_impl else "" for impl in impls]
            launched, graph = (ratio(by_impl.get(f"reference{end}"), by_impl.get(f"triton{end}"), "seconds") for end in ("", "_graph"))  # fmt: skip
            rows.append([f"{bench}, {model}", count(responses), *cells[:2], times(launched), *cells[2:], times(graph)])
        header = ["what", "readings", "PyTorch, us", "Triton, us", "ratio", "PyTorch replayed, us", "Triton replayed, us", "ratio"]  # fmt: skip
        text = table(header, rows)
        page.write(
            text and f"**{titles[direction]}**" if direction == "both" else "",
            text if direction == "both" else folded(titles[direction], text),
        )


def _head_case(line):
    return line["bench"], line["model"] or "", line["dtype"] or "", line["responses"] or 0


def host_section(page, lines):
    """What calls cost the host, beside `x.add(1)`."""
    page.write(
        "### Host time",
        provenance(lines),
        "A call of each operation beside `x.add(1)` of eight numbers, in turns: the fastest of many short batches, without "
        "what is made once a row. Where no GPU is named, kernels are compiled for an H100 and launched into nothing; all else "
        "of a pass, which is on one thread, is computed.",
    )
    titles = {"forward": "scoring", "both": "forward and backward", None: ""}
    rows = []
    for (what, direction), times_of in goals.host_times(lines).items():
        if len(times_of) == 2:
            call, add = sorted(times_of.values(), key=lambda line: line["impl"] == "add")
            cells = [digits(1e6 * line["seconds"]) for line in (call, add)]
            rows.append([what, titles[direction], *cells, times(ratio(call, add, "seconds"))])
    page.write(table(["what", "pass", "us", "x.add(1), us", "ratio"], rows, words=2))


def pipeline_section(page, lines):
    """Whole jobs beside what the model and the preparation of its inputs take by themselves."""
    found = {line["impl"]: line for line in lines}
    per_row = {name: line["seconds"] / line["samples"] for name, line in found.items()}
    alone, preparation = per_row.get("model alone"), per_row.get("preparation alone")
    rows = []
    for name, taken in per_row.items():
        share = ""
        if name.startswith("score_file") and alone and preparation:
            workers = int(name.split()[1])
            share = percent((max(alone, preparation / workers) if workers else alone + preparation) / taken)
        passes = times(taken / per_row["score_file, 1 workers"]) if "score_file, 1 workers" in per_row else ""
        rows.append([name, f"{taken * 1e3:.1f} ms", share, passes])
    first = max(found.values(), key=lambda line: line["samples"])
    page.write(
        "### Files of candidates",
        f"{first['samples']} rows of an image of a million pixels (PNG, JPEG) and {first['responses'] // first['samples']} responses "
        f"each; {models.described(first['model'])}. The model has one core less than the machine. The share is of what the "
        "slower of model and preparation, in as many workers, allows; of both one behind the other without workers. The loop "
        "over transformers, and datasets.map with it, score each row as a padded batch of single passes. "
        + provenance(lines),
        table(["", "time of a row", "share of what is possible", "beside score_file with 1 worker"], rows),
    )

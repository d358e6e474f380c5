"""What YOJO is to reach, as data, and what result lines say of it.

Lines measured on a GPU count alone, but for what calls cost the host. Where a goal is about many shapes, the worst of them is what counts.
"""

import dataclasses
from collections.abc import Callable

from bench import points
from bench.points import HEADLINE_MODEL, VARIANTS, Scores, digits, percent, point, ratio, times
from yojo.costs.profiling import PARTS

# The headline's point: an image prompt of 2k tokens, with room for what a processor puts around the image.
PROMPT, PROMPT_TOKENS, RESPONSE_TOKENS, RESPONSES = "image", (1800, 2300), (90, 110), 4
MOST_RESPONSES = 64  # up to which every N is to give what its FLOPs promise
REPLAYED = 15e-6  # seconds that a head or a loss may take from a graph, where what it has to move allows it
# Bytes per second of the memory of a GPU, as its maker states them; the first whose name is part of the GPU's.
BANDWIDTH = {"GB200": 8e12, "B200": 8e12, "H200": 4.8e12, "H100 NVL": 3.9e12, "H100 PCIe": 2e12, "H100": 3.35e12, "A100-SXM4-80GB": 2.039e12}  # fmt: skip
LONG = 8192  # tokens of a row from which attention and whole passes are held to what the GPU can do


@dataclasses.dataclass(frozen=True)
class Found:
    """What lines say of a goal.

    Attributes:
        value: compared with the threshold.
        about: what it was measured on, and figures that belong beside it.
        complete: whether everything that the goal speaks of was measured; a goal is missed without it, never reached.
        flops_ratio: what computing less alone would gain, where that is to be compared with the threshold.
        place: point of the pass that was timed, where parts of such a pass may say why; and its variant.
    """

    value: float
    about: str
    complete: bool = True
    flops_ratio: float | None = None
    place: points.Point | None = None
    variant: str | None = None


@dataclasses.dataclass(frozen=True)
class Goal:
    """One goal.

    Attributes:
        what: is measured.
        sign: ">=" or "<=".
        threshold: in `unit`.
        unit: "x", " TFLOP/s", " us", " %" or "/N".
        measure: function (lines of one GPU) -> `Found`, or None where it was not measured.
        anywhere: whether lines measured without a GPU count, too.
    """

    what: str
    sign: str
    threshold: float
    unit: str
    measure: Callable
    anywhere: bool = False

    def bound(self):
        """The threshold, in words."""
        return f"{self.sign} {self.threshold:g}{self.unit}"

    def reached(self, value):
        """Whether a value is on the right side."""
        return value >= self.threshold if self.sign == ">=" else value <= self.threshold

    def shown(self, value):
        """A value in words, with as many digits as it takes not to look like a threshold that it misses."""
        words = digits(value)
        if not self.reached(value) and float(words.replace(",", "")) == self.threshold:
            words = f"{value:.6g}"
        return words + self.unit


def verdict(goal, found):
    """ "reached", "MISSED" or "not measured"."""
    if found is None:
        return "not measured"
    if not goal.reached(found.value):
        return "MISSED"
    return "reached" if found.complete else "not measured"


def judged(lines):
    """[(goal, machine or None, `Found` or None)]: a goal once for each it was measured on, or once without any."""
    by_machine = {name: [line for line in lines if points.machine(line) == name] for name in points.machines(lines)}
    rows = []
    for goal in GOALS:
        machines = {name: own for name, own in by_machine.items() if goal.anywhere or own[0]["gpu"] is not None}
        found = [(goal, name, goal.measure(own)) for name, own in machines.items()]
        rows += [row for row in found if row[2] is not None] or [(goal, None, None)]
    return rows


def reasons(goal, found, lines):
    """Sentences on why a goal was missed, from what was measured on the same GPU; [] where nothing is known."""
    sentences = []
    if found.flops_ratio is not None and goal.sign == ">=" and goal.threshold > found.flops_ratio:
        sentences.append(
            f"The FLOPs ratio there is {times(found.flops_ratio)}, below the goal: "
            "computing less cannot give more, what is missing would have to come from computing faster."
        )
    if found.place is not None and (parts := _nearest_breakdown(found, lines)) is not None:
        sentences.append(parts)
    return sentences


def _nearest_breakdown(found, lines):
    """The largest parts of the profiled pass that is closest to the one timed."""
    groups = [(key, parts) for key, parts in points.breakdowns(lines).items() if key[0] == found.variant]
    if not groups:
        return None
    (variant, fuse, place), parts = min(groups, key=lambda group: abs(group[0][2].tokens - found.place.tokens))
    total = sum(line["seconds"] for line in parts.values())
    largest = sorted(parts.values(), key=lambda line: -line["seconds"])[:3]
    words = []
    for line in largest:
        rate = f" at {digits(line['tflops'])} TFLOP/s" if line["tflops"] else ""
        words.append(f"{PARTS.get(line['part'], line['part'])} {percent(line['seconds'] / total)}{rate}")
    return f"Largest parts of a pass of {place} ({VARIANTS[variant]}, fuse {fuse}): {', '.join(words)}."


# ---- scoring ----


def _headline(lines):
    """(scores, N sweep) at the headline's point; (scores, []) where there is none."""
    scores = Scores(
        [
            line
            for line in lines
            if line["bench"] == "score" and (line["model"], line["dtype"]) == (HEADLINE_MODEL, "bfloat16")
            if line["prompt"] == PROMPT
            if PROMPT_TOKENS[0] <= (line["prompt_tokens"] or 0) <= PROMPT_TOKENS[1]
            and RESPONSE_TOKENS[0] <= (line["response_tokens"] or 0) <= RESPONSE_TOKENS[1]
        ]
    )
    return scores, scores.sweep("responses", fewest=1)


def _ours(lines):
    """(scores, our fastest comparative line at the headline's point, or None)."""
    scores, places = _headline(lines)
    found = [scores.best(place, "yojo_comparative") for place in places if place.responses == RESPONSES]
    return scores, (found or [None])[0]


def _name(line):
    return str(points.way(line))


def over_single(lines):
    """Speed-up over N single passes of the stock model."""
    scores, ours = _ours(lines)
    if ours is None or scores.speedup(ours) is None:
        return None
    gained = scores.flops_ratio(ours)
    about = _name(ours)
    about += f"; FLOPs ratio {times(gained)}" if gained is not None else ""
    singles = [line for one, line in scores.points[point(ours)].items() if one.variant == "single"]
    for line in singles:
        if line["fuse"] not in (None, "none"):
            about += f"; over single passes with {line['fuse']} {times(line['seconds'] / ours['seconds'])}"
    return Found(scores.speedup(ours), about, flops_ratio=gained, place=point(ours), variant=ours["variant"])


def share_of_flops_ratio(lines):
    """The least share of the possible saving, over all N."""
    scores, places = _headline(lines)
    found = []
    for place in places:
        ours = scores.best(place, "yojo_comparative")
        if ours is not None and scores.speedup(ours) is not None and scores.flops_ratio(ours) is not None:
            found.append((scores.speedup(ours) / scores.flops_ratio(ours), ours))
    if not found:
        return None
    least, ours = min(found, key=lambda pair: pair[0])
    counts = [line["responses"] for _, line in found]
    about = f"least at N = {ours['responses']}, of N = {min(counts)} to {max(counts)}, {_name(ours)}"
    complete = max(counts) >= MOST_RESPONSES
    return Found(least, about, complete, place=point(ours), variant=ours["variant"])


def over(variant, field):
    """Function lines -> ours against a variant: its seconds over ours, or our peak memory over its."""

    def measure(lines):
        scores, ours = _ours(lines)
        theirs = ours and scores.best(point(ours), variant)
        value = ratio(theirs, ours, field) if field == "seconds" else ratio(ours, theirs, field)
        if value is None:
            return None
        # The parts of a pass say where its time went, and nothing of its memory.
        place = point(ours) if field == "seconds" else None
        return Found(value, _name(ours), place=place, variant=ours["variant"])

    return measure


# ---- attention ----


def _attention(lines, direction):
    """[{(variant, impl): line}] of the shapes that goals speak of: bfloat16, head dim 128, long rows."""
    found = [
        line
        for line in lines
        if line["bench"] == "attention" and line["variant"] and line["pass"] == direction
        if line["dtype"] == "bfloat16" and line["head_dim"] == 128 and point(line).tokens >= LONG
    ]
    shapes = points.rows_of(found, lambda line: (*point(line), line["heads"], line["kv_heads"]))
    return [{(line["variant"], line["impl"]): line for line in shape} for shape in shapes.values()]


def _worst(found, unit, largest=False):
    """`Found` of the worst of some (value, line), with the range of all; None of none."""
    if not found:
        return None
    worst, line = (max if largest else min)(found, key=lambda pair: pair[0])
    values = [value for value, _ in found]
    about = f"worst of {len(found)}, at {point(line)}; {digits(min(values))} to {digits(max(values))}{unit}"
    return Found(worst, about)


def attention_over(peer, direction):
    """Function lines -> a peer's seconds over ours, over the shapes; peer: (variant, impl or None for any)."""

    def measure(lines):
        found = []
        for shape in _attention(lines, direction):
            ours = shape.get(("yojo_isolated", "triton"))
            theirs = [line for key, line in shape.items() if key == peer or (key[0], None) == peer]
            found += [(line["seconds"] / ours["seconds"], ours) for line in theirs if ours is not None]
        return _worst(found, "x")

    return measure


def attention_rate(direction):
    """Function lines -> TFLOP/s of visible area, over the shapes; on an H200 alone, of which the goal speaks."""

    def measure(lines):
        shapes = _attention([line for line in lines if "H200" in line["gpu"]], direction)
        found = [shape.get(("yojo_isolated", "triton")) for shape in shapes]
        return _worst([(line["tflops"], line) for line in found if line and line["tflops"]], " TFLOP/s")

    return measure


def gathered_memory(lines):
    """N times what our forward holds beyond inputs and output, over what the gather of keys and values holds beyond them.

    Rows of one prompt alone, whose N is known: their responses have a whole number of tokens.
    """
    found = []
    for shape in _attention(lines, "forward"):
        ours = shape.get(("yojo_isolated", "triton"))
        for (variant, _), theirs in shape.items():
            if variant != "kv_gather" or ours is None or not float(ours["response_tokens"]).is_integer():
                continue
            output = point(ours).tokens * ours["heads"] * ours["head_dim"] * 2
            if None not in (ours["peak_bytes"], theirs["peak_bytes"]) and theirs["peak_bytes"] > output:
                ours_beyond = max(ours["peak_bytes"] - output, 0)
                found.append((ours["responses"] * ours_beyond / (theirs["peak_bytes"] - output), ours))
    return _worst(found, "/N", largest=True)


# ---- training, head and losses, the whole pass ----


def per_sample(line):
    """What a sample of a training step is: the key under which steps of several samples and of one can be compared."""
    samples = line["samples"] or 1
    sizes = tuple((line[name] or 0) / samples for name in ("prompt_tokens", "responses"))
    return line["model"] or "", line["dtype"] or "", line["prompt"] or "", *sizes, line["response_tokens"] or 0


def rate(line):
    """Samples (or prompts) per second of a line."""
    return (line["samples"] or 1) / line["seconds"]


def training(field):
    """Function lines -> samples/s over those of the released loop, or peak memory over its, of the headline's model.

    Samples/s are those of the fastest row; memory is that of a row of as many samples as the released loop takes at once.
    """

    def measure(lines):
        lines = [line for line in lines if line["bench"] == "train" and line["model"] == HEADLINE_MODEL]
        found = []
        for group in points.rows_of(lines, per_sample).values():
            released = [line for line in group if line["variant"] == "released"]
            ours = [line for line in group if line["variant"] == "yojo_comparative"]
            if not released or not ours:
                continue
            released = max(released, key=rate)
            if field == "seconds":
                best = max(ours, key=rate)
                about = f"samples in a row: {best['samples'] or 1}, {_name(best)}"
                more = ratio(best, released, "peak_bytes")
                about += f", at {times(more)} of the peak memory" if more is not None else ""
                found.append(Found(rate(best) / rate(released), about))
            else:
                same = [line for line in ours if (line["samples"] or 1) == (released["samples"] or 1)]
                values = [(ratio(line, released, "peak_bytes"), line) for line in same]
                values = [pair for pair in values if pair[0] is not None]
                if values:
                    value, line = min(values, key=lambda pair: pair[0])
                    found.append(Found(value, f"samples in a row of both: {line['samples'] or 1}, {_name(line)}"))
        worst = min if field == "seconds" else max
        return worst(found, key=lambda one: one.value, default=None)

    return measure


def _head_and_losses(lines, impl):
    """({readings: head line}, {(kind, readings): loss line}) of an implementation, forward and backward together."""
    found = [line for line in lines if line["pass"] == "both" and line["impl"] == impl]
    heads = {line["responses"]: line for line in found if line["bench"] == "head"}
    return heads, {(line["model"], line["responses"]): line for line in found if line["bench"] == "loss"}


def head_and_loss(lines):
    """Seconds of head + loss in eager PyTorch over ours, launched alike, over readings and losses."""
    (eager_heads, eager_losses), (heads, losses) = (_head_and_losses(lines, impl) for impl in ("reference", "triton"))
    found = []
    for (kind, readings), line in losses.items():
        if (kind, readings) in eager_losses and readings in heads and readings in eager_heads:
            eager = eager_heads[readings]["seconds"] + eager_losses[kind, readings]["seconds"]
            found.append((eager / (heads[readings]["seconds"] + line["seconds"]), readings, kind))
    if not found:
        return None
    value, readings, kind = min(found)
    values = [one[0] for one in found]
    about = f"worst of {len(found)}, at {readings} responses, {kind}; {digits(min(values))} to {digits(max(values))}x"
    return Found(value, about)


def head_bytes(line):
    """Bytes that a value head reads and writes at least, forward and backward, from a line that says its sizes.

    Each is counted once: read are the M rows of hidden states, the weights and the gradient of the scores; written are
    the scores, the gradient of all T rows of hidden states and those of the weights.
    """
    size, width, _ = map(int, line["model"].split("-"))
    rows = (line["prompt_tokens"] + line["responses"]) * size * (2 if line["dtype"] in ("bfloat16", "float16") else 4)
    return rows + 4 * (2 * (width * size + 2 * width + 1) + 2 * line["responses"])


def _allowed(line, peak):
    """(seconds that a replayed head or loss may take, why in words); peak: of the measured matrix product, or None."""
    bandwidth = next((rate for name, rate in BANDWIDTH.items() if name in line["gpu"]), None)
    floors = [(REPLAYED, "")]
    if line["bench"] == "head" and line["prompt_tokens"] and bandwidth:
        moved = head_bytes(line)
        floors.append((1.5 * moved / bandwidth, f"1.5 x {digits(moved / 1e6)} MB at {bandwidth / 1e12:g} TB/s"))
    if line["bench"] == "head" and line["flops"] and peak:
        products = 3 * line["flops"]  # a product of float32 weights is three of bfloat16
        floors.append((1.5 * products / peak / 1e12, f"1.5 x {digits(products / 1e9)} GFLOP at {digits(peak)} TFLOP/s"))
    return max(floors)


def replayed(lines):
    """Head or loss, forward and backward, replayed from a graph: time over what it may take, the worst."""
    heads, losses = _head_and_losses(lines, "triton_graph")
    peak = matmul_peak(lines, "bfloat16")
    found = []
    for line in (*heads.values(), *losses.values()):
        allowed, why = _allowed(line, peak)
        found.append((line["seconds"] / allowed, allowed, why, line))
    if not found:
        return None
    value, allowed, why, line = max(found, key=lambda one: one[0])
    durations = [1e6 * one["seconds"] for *_, one in found]
    about = f"worst of {len(found)}, {line['bench']} of {line['responses']} responses: "
    about += f"{digits(1e6 * line['seconds'])} us, {digits(1e6 * allowed)} us allowed{why and f' ({why})'}; "
    about += f"{digits(min(durations))} to {digits(max(durations))} us"
    return Found(value, about, complete=bool(heads and losses))


def matmul_peak(lines, dtype):
    """TFLOP/s of the measured matrix product of a dtype; None where there is none."""
    found = [line for line in lines if line["bench"] == "attention" and line["impl"] == "matmul"]
    return max((line["tflops"] for line in found if line["dtype"] == dtype and line["tflops"]), default=None)


def share_of_peak(lines):
    """Percent of the measured matmul peak that whole passes of long rows reach with every step: the worst row."""
    steps = [
        line
        for line in lines
        if line["bench"] == "forward" and line["part"] is None and line["tflops"] and point(line).tokens >= LONG
    ]
    found = []
    for (_, variant, *_), group in points.rows_of(steps, lambda line: (line["dtype"], line["variant"], *point(line))).items():  # fmt: skip
        line = max(group, key=lambda line: line["tflops"])
        peak = matmul_peak(lines, line["dtype"])
        if peak is not None:
            found.append((100 * line["tflops"] / peak, line, variant, peak))
    if not found:
        return None
    value, line, variant, peak = min(found, key=lambda one: one[0])
    about = f"worst of {len(found)}, at {point(line)}, {VARIANTS[variant]}, step {line['impl']}; "
    about += f"{digits(line['tflops'])} of {digits(peak)} TFLOP/s"
    return Found(value, about, place=point(line), variant=variant)


# ---- the host ----


def host_times(lines):
    """{(what is called, pass): {"add", or what computed it: line}} of the lines of bench/test_host.py."""
    rows = points.rows_of(
        [line for line in lines if line["bench"] == "host"], lambda line: (line["model"], line["pass"])
    )
    return {key: {line["impl"]: line for line in group} for key, group in rows.items()}


def host(what, direction):
    """Function lines -> seconds that a call takes the host over those of `x.add(1)`, measured in turns."""

    def measure(lines):
        found = host_times(lines).get((what, direction), {})
        value = ratio(found.get("triton"), found.get("add"), "seconds")
        if value is None:
            return None
        driver = "" if found["triton"]["gpu"] else ", kernels launched into nothing"
        return Found(value, f"{digits(1e6 * found['triton']['seconds'])} us{driver}")

    return measure


SCORING = "Scoring, N = 4, image prompt of 2k tokens, responses of 100"
GOALS = (
    Goal(f"{SCORING}: faster than N single passes", ">=", 3.9, "x", over_single),
    Goal("The same at every N to 64: speed-up / FLOPs ratio", ">=", 1, "x", share_of_flops_ratio),
    Goal(f"{SCORING}: faster than the released code", ">=", 1.5, "x", over("released", "seconds")),
    Goal("The same: peak memory / that of the released code", "<=", 0.6, "x", over("released", "peak_bytes")),
    Goal(f"{SCORING}: faster than a prefix cache", ">=", 1.3, "x", over("prefix_cache", "seconds")),
    Goal("Isolated attention, forward: faster than tuned FlexAttention", ">=", 1.5, "x", attention_over(("flex", "flex_tuned"), "forward")),
    Goal("Isolated attention, forward, on H200: rate of visible area", ">=", 450, " TFLOP/s", attention_rate("forward")),
    Goal("Isolated attention, backward: faster than tuned FlexAttention", ">=", 1.5, "x", attention_over(("flex", "flex_tuned"), "backward")),
    Goal("Isolated attention, backward, on H200: rate of visible area", ">=", 300, " TFLOP/s", attention_rate("backward")),
    Goal("Isolated attention, forward: faster than keys gathered + varlen", ">=", 1, "x", attention_over(("kv_gather", None), "forward")),
    Goal("Isolated attention, backward: faster than keys gathered + varlen", ">=", 1, "x", attention_over(("kv_gather", None), "backward")),
    Goal("Isolated attention, forward: memory beyond inputs and output / that of keys gathered", "<=", 1, "/N", gathered_memory),
    Goal("Training step: samples/s / those of the released loop", ">=", 2, "x", training("seconds")),
    Goal("Training step: peak memory / that of the released loop", "<=", 0.5, "x", training("peak_bytes")),
    Goal("Head + loss, forward and backward: faster than PyTorch eager", ">=", 4, "x", head_and_loss),
    Goal("Head, and loss, forward and backward, replayed from a graph: time / 15 us, or / 1.5 x what its bytes and products take at least, where that is longer", "<=", 1, "x", replayed),
    Goal("Whole pass at 8k packed tokens: share of the measured matmul peak", ">=", 60, " %", share_of_peak),
    Goal("Host time of a layer's attention, scoring / that of x.add(1)", "<=", 25, "x", host("attention", "forward"), anywhere=True),
    Goal("Host time of a layer's attention, forward and backward / that of x.add(1)", "<=", 150, "x", host("attention", "both"), anywhere=True),
)  # fmt: skip

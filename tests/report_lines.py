"""Result lines of every kind, made up, and what a report says of them."""

from bench import report, schema, sections

H200 = {"gpu": "NVIDIA H200", "driver": "580.95", "cpu": None, "dtype": "bfloat16"}
H100 = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "575.57", "cpu": None, "dtype": "bfloat16", "commit": "ccc3333"}
CPU = {"gpu": None, "driver": None, "cpu": "AMD EPYC, 2 threads", "dtype": "float32", "triton": None}


# ---- lines of every kind ----


def make(seconds, *, spread=0.01, **fields):
    """A line that keeps to the schema, of a GPU unless `fields` say otherwise."""
    line = dict.fromkeys(schema.FIELDS) | H200
    line |= {"torch": "2.13.0", "triton": "3.7.1", "transformers": "5.23.0", "date": "2026-11-25", "commit": "abc1234"}
    line |= {"seconds": seconds, "seconds_all": [seconds * (1 - spread), seconds, seconds * (1 + spread)]} | fields
    if line["flops"] is not None:
        line["tflops"] = line["flops"] / seconds / 1e12
    assert schema.problems(line) == []
    return line


# variant, fuse -> (which tokens are computed, TFLOP/s)
RATES = {
    ("single", "none"): ("single", 200),
    ("single", "liger"): ("single", 250),
    ("single_batch", "none"): ("single", 280),
    ("single_batch", "liger"): ("single", 330),
    ("released", "none"): ("released", 220),
    ("prefix_cache", "none"): ("packed", 190),
    ("flex", "none"): ("packed", 170),
    ("yojo_comparative", "none"): ("packed", 290),
    ("yojo_comparative", "liger"): ("packed", 380),
    ("yojo_isolated", "none"): ("packed", 280),
    ("yojo_isolated", "liger"): ("packed", 370),
    ("yojo_permuted", "none"): ("permuted", 290),
    ("yojo_permuted", "liger"): ("permuted", 380),
}


def score_lines(place, count, prompt=2048, each=100, kind="image", model="qwen3-vl-4b", slow=1.0):
    """One line for each way to score at one point, as if every token took 8 GFLOP and every pass 1 ms to launch."""
    lines = []
    for (variant, fuse), (tokens, rate) in RATES.items():
        if place is CPU and fuse != "none":
            continue
        packed = prompt + count * each
        number = {"single": count * (prompt + each), "packed": packed, "released": packed * 1.1}
        number["permuted"] = prompt + 2 * count * each
        flops = 8e9 * number[tokens]
        passes = count if variant == "single" else 1
        lines.append(
            make(
                slow * (flops / rate / 1e12 + 1e-3 * passes),
                bench="score",
                variant=variant,
                fuse=fuse,
                impl="sdpa" if not variant.startswith("yojo") and fuse == "none" else "triton",
                model=model,
                prompt=kind,
                prompt_tokens=prompt,
                responses=count,
                response_tokens=each,
                samples=1,
                permutations=2 if variant == "yojo_permuted" else None,
                mode="comparative" if variant in ("released", "yojo_comparative", "yojo_permuted") else "isolated",
                flops=flops,
                flops_counted=None if fuse != "none" else flops * 1.2,
                peak_bytes=None if place is CPU else int(2e5 * number[tokens] / (count if variant == "single" else 1)),
                **place,
                **{"pass": "forward"},
            )
        )
    return lines


def train_lines(place, model="qwen3-vl-4b"):
    """The released loop one sample at a time, ours with 1 and 8 samples in a row."""
    lines = []
    for variant, samples, seconds_, peak in [("released", 1, 0.4, 40), ("yojo_comparative", 1, 0.25, 18),
                                             ("yojo_comparative", 8, 1.28, 60), ("yojo_isolated", 8, 1.6, 61)]:  # fmt: skip
        sizes = {"samples": samples, "responses": 4 * samples, "prompt_tokens": 2048 * samples, "response_tokens": 100}
        lines.append(make(seconds_, bench="train", variant=variant, fuse="liger" if samples > 1 else "none", impl="triton", model=model,
                          prompt="image", peak_bytes=peak * 2**30, flops=6e13 * samples, **sizes, **place, **{"pass": "both"}))  # fmt: skip
    return lines


def breakdown_lines(place, model="qwen3-vl-4b"):
    """Two profiled passes at the headline's point: 50 ms and 40 ms."""
    shares = dict(vision=0.1, attention=0.12, projections=0.2, mlp=0.4, norms=0.08, head=0.01, gaps=0.05, other=0.04)
    lines = []
    for variant, total in (("yojo_comparative", 0.05), ("yojo_isolated", 0.04)):
        for part, share in shares.items():
            flops = 5e12 * share if part in ("vision", "attention", "projections", "mlp", "head") else None
            lines.append(make(total * share, bench="forward", impl="profile", variant=variant, part=part, fuse="none", model=model,
                              prompt="image", prompt_tokens=2048, responses=4, response_tokens=100, flops=flops, **place))  # fmt: skip
    return lines


def step_lines(place, model="Qwen3-VL-4B shape", faster=1.0):
    """Every step of bench/test_forward.py on two rows, each a tenth faster than the one before."""
    lines = []
    for prompt, count, each in ((256, 4, 64), (6144, 16, 128)):
        for number, step in enumerate(sections.STEPS):
            tokens = prompt + count * each
            if step == "graphs" and tokens > 2048:
                continue
            fuse = "liger" if number >= 4 else "none"
            lines.append(make(tokens * 2e-5 * 0.9**number / faster, bench="forward", variant="yojo_isolated", impl=step, fuse=fuse, model=model,
                              prompt_tokens=prompt, responses=count, response_tokens=each, flops=8e9 * tokens, **place, **{"pass": "forward"}))  # fmt: skip
    return lines


def attention_lines(place, tflops=500.0):
    """Every way on four long rows and a short one, forward and backward; the matmul peak; what is prepared."""
    ways = {("yojo_isolated", "triton"): 1.0, ("yojo_comparative", "triton"): 1.02, ("flex", "flex"): 0.5, ("flex", "flex_tuned"): 0.6,
            ("flex", "flex_split"): 0.55, ("kv_gather", "varlen"): 0.8, ("sdpa", "sdpa"): 1.1}  # fmt: skip
    lines = []
    for prompt, count, each, dim in [(2048, 4, 128, 128), (8192, 8, 256, 128), (8192, 64, 64, 128), (32768, 4, 512, 128), (11321, 24, 503.25, 128), (16384, 8, 256, 64)]:  # fmt: skip
        sizes = dict(prompt_tokens=prompt, responses=count, response_tokens=each, head_dim=dim, heads=32, kv_heads=8)
        tokens = prompt + count * each
        output, flops = int(tokens * 32 * dim * 2), 2.0 * 32 * dim * tokens**2
        for direction, part in (("forward", 1.0), ("backward", 0.7)):
            for (variant, impl), speed in ways.items():
                extra = count * (prompt + each) * 4096 if variant == "kv_gather" else tokens * 128
                lines.append(make(flops / (tflops * part * speed * 1e12), bench="attention", variant=variant, impl=impl, flops=flops,
                                  peak_bytes=int(output + extra), **sizes, **place, **{"pass": direction}))  # fmt: skip
        lines.append(make(1e-4, bench="attention", impl="flex_mask", **sizes, **place))
    lines.append(make(2 * 8192**3 / 700e12, bench="attention", impl="matmul", flops=2.0 * 8192**3, **place))
    return lines


def head_lines(place):
    """Head and one loss, launched and replayed, at two numbers of readings."""
    lines = []
    for readings in (4, 512):
        once = 2.0 * readings * 1024 * 2561
        for bench, model, tokens in (("head", "2560-1024-1", 8192), ("loss", "best, samples of 4", None)):
            for impl, us in (("reference", 200), ("triton", 40), ("reference_graph", 60), ("triton_graph", 12)):
                for direction, part, products in (("forward", 0.4, 1), ("backward", 0.6, 2), ("both", 1.0, 3)):
                    lines.append(make(us * part * 1e-6, bench=bench, impl=impl, model=model, prompt_tokens=tokens, responses=readings,
                                      flops=tokens and once * products, **place, **{"pass": direction}))  # fmt: skip
    return lines


def host_lines(place):
    """What calls cost the host: attention 20 and 100 times what `x.add(1)` takes, the layout of a row 80 times, ..."""
    lines = []
    for what, direction, name, times in (
        ("attention", "forward", "triton", 20),
        ("attention", "both", "triton", 100),
        ("layout of a row", None, "triton", 80),
        ("a pass of 36 layers, stock", "forward", "sdpa", 9000),
    ):
        for impl, us in ((name, 1.5 * times), ("add", 1.5)):
            lines.append(make(us * 1e-6, bench="host", impl=impl, model=what, prompt_tokens=96, responses=4, response_tokens=8,
                              **place, **{"pass": direction}))  # fmt: skip
    return lines


def all_lines(place, model="qwen3-vl-4b"):
    """Lines of every kind: sweeps over N, prompt and responses that cross at one point, and a point in none of them."""
    lines = []
    for count in (1, 2, 4, 8, 16, 32, 64):
        lines += score_lines(place, count, model=model)
    for kind, prompt in (("text", 64), ("text", 512), ("image", 1024), ("image", 4096), ("video", 8192)):
        lines += score_lines(place, 4, prompt, kind=kind, model=model)
    for each in (25, 400, 1600):
        lines += score_lines(place, 4, each=each, model=model)
    lines += score_lines(place, 3, 777, 33, "text", model)
    lines += train_lines(place, model) + breakdown_lines(place, model) + step_lines(place, model)
    return lines + attention_lines(place) + head_lines(place) + host_lines(place)


def everything():
    """All kinds of lines of an H200 and a CPU, and the sweeps alone of an H100."""
    h100 = [line for count in (1, 2, 4) for line in score_lines(H100, count)]
    return all_lines(H200) + h100 + all_lines(CPU, "small")


def change(lines, seconds_=None, peak=None, **which):
    """Copies of lines; those with all of `which` take so many times as long, and so much memory."""
    changed = []
    for line in lines:
        if all(line[name] == value for name, value in which.items()):
            line = dict(line)
            if seconds_ is not None:
                line["seconds"] *= seconds_
                line["seconds_all"] = [value * seconds_ for value in line["seconds_all"]]
                line["tflops"] = line["flops"] and line["flops"] / line["seconds"] / 1e12
            if peak is not None:
                line["peak_bytes"] = int(line["peak_bytes"] * peak)
        changed.append(line)
    return changed


# ---- reading a page ----


def section(text, heading):
    """The part of a page below a heading, up to the next of the same or a higher level."""
    level = heading.split()[0]
    found, inside = [], False
    for line in text.splitlines():
        if line.startswith("#") and len(line.split()[0]) <= len(level):
            inside = line == heading
        elif inside:
            found.append(line)
    assert found, f"no {heading!r} in the page"
    return "\n".join(found)


def cell(text, row, column, table=0):
    """A cell of the table'th table that has such a row and such a column, both by their first words."""
    lines = [[word.strip() for word in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    header, found = None, []
    for number, words in enumerate(lines):
        if number + 1 < len(lines) and set("".join(lines[number + 1])) <= set("-: "):
            header = words
        elif words[0] == row and column in header:
            found.append(words[header.index(column)])
    return found[table]


def verdicts(lines):
    """{goal: (measured, verdict)} of a page."""
    rows = [line.strip("|").split(" | ") for line in section(report.page(lines), "## Goals").splitlines() if line[:1] == "|"]  # fmt: skip
    return {row[0].strip(): (row[2].strip(), row[3].strip()) for row in rows[2:]}

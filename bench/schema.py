"""The one schema of all result lines (bench/results/*.jsonl): `python -m bench.schema FILE...` checks files against it."""

import json
import re
import sys

from bench import lines

# field -> (type, may be null)
FIELDS = {
    "bench": (str, False),  # one of BENCHES
    "variant": (str, True),  # one of VARIANTS; null for what is not a way to score (a matrix product, a mask)
    "impl": (str, False),  # what computed it: triton, gluon, reference, flex, flex_tuned, torch_varlen, sdpa, ...
    "fuse": (str, True),
    "pass": (str, True),  # one of PASSES
    "mode": (str, True),  # comparative, isolated
    "permutations": (int, True),  # orders of a permuted pass, N! where that is fewer
    "part": (str, True),  # what of a pass was timed, a key of yojo.costs.profiling.PARTS; null: all of it
    "model": (
        str,
        True,
    ),  # for bench "head" its sizes, for "loss" the kind and the responses of a sample, for "host" what
    "dtype": (str, True),
    "samples": (int, True),  # prompts of the row; of a batch, all its rows are one
    "prompt": (str, True),  # what the prompt is beside words, one of PROMPTS
    "responses": (int, True),  # of all samples of the row
    "prompt_tokens": (int, True),  # of all samples of the row; for bench "head" all its tokens
    "response_tokens": (float, True),  # mean over the responses
    "head_dim": (int, True),
    "heads": (int, True),
    "kv_heads": (int, True),
    "seconds": (float, False),  # median of seconds_all; for bench "host" the least
    "seconds_all": (list, False),
    "flops": (float, True),  # of one call: what is visible, not what an implementation spends
    "flops_counted": (float, True),  # of one call, by torch's FlopCounterMode, to which every pair of a mask counts
    "tflops": (float, True),  # flops / seconds / 1e12
    "peak_bytes": (int, True),  # most memory of tensors during a call, beyond what was there before
    "gpu": (str, True),  # null: measured on a CPU
    "cpu": (str, True),  # its name and threads, where it computed; null beside a GPU
    "driver": (str, True),
    "torch": (str, False),
    "triton": (str, True),
    "transformers": (str, False),
    "commit": (str, True),
    "date": (str, False),  # YYYY-MM-DD
}
BENCHES = ("attention", "head", "loss", "forward", "score", "train", "host", "pipeline")
VARIANTS = (
    "single",
    "single_batch",
    "released",
    "prefix_cache",
    "flex",
    "kv_gather",
    "sdpa",
    "yojo_comparative",
    "yojo_isolated",
    "yojo_permuted",
)
PASSES = ("forward", "backward", "both")
PROMPTS = ("text", "image", "video")
# What a line is about; of two lines that agree in all of these, the later one holds.
IDENTITY = (
    "bench variant impl fuse pass mode permutations part model dtype samples prompt responses prompt_tokens "
    "response_tokens head_dim heads kv_heads gpu cpu"
).split()


def identity(line):
    """What a result line is about, as a tuple: a newer line of the same identity takes its place."""
    return tuple(line[name] for name in IDENTITY)


def latest(lines):
    """The lines without those that a later one replaces, in the order of their first appearance."""
    return list({identity(line): line for line in lines}.values())


def read(*paths):
    """The result lines of some files, the older ones of the same identity left out, and last ones that a kill cut.

    Raises:
        ValueError: a line that is no JSON or breaks the schema; file and number are named.
    """
    whole = []
    for path in paths:
        for number, text in lines.texts(path):
            try:
                line = json.loads(text)
                found = problems(line) if isinstance(line, dict) else ["not an object"]
            except json.JSONDecodeError as error:
                found = [str(error)]
            if found:
                raise ValueError(f"{path}:{number}: {'; '.join(found)}")
            whole.append(line)
    return latest(whole)


def problems(line):
    """What is wrong with a result line (a dict), as a list of sentences; empty when nothing is."""
    found = [f"{name} is missing" for name in FIELDS if name not in line]
    found += [f"{name} is not in the schema" for name in line if name not in FIELDS]
    for name, (kind, may_be_null) in FIELDS.items():
        value = line.get(name)
        if value is None:
            if name in line and not may_be_null:
                found.append(f"{name} is null")
        elif not isinstance(value, (int, float) if kind is float else kind) or isinstance(value, bool):
            found.append(f"{name} is {value!r}, not of type {kind.__name__}")
    if found:
        return found
    closed = {"bench": BENCHES, "variant": (None, *VARIANTS), "pass": (None, *PASSES), "prompt": (None, *PROMPTS)}
    for name, allowed in closed.items():
        if line[name] not in allowed:
            found.append(f"{name} is {line[name]!r}, not one of {', '.join(map(str, allowed))}")
    if not line["seconds_all"] or not min(line["seconds_all"]) <= line["seconds"] <= max(line["seconds_all"]):
        found.append("seconds is not among seconds_all")
    if min(line["seconds_all"], default=0) <= 0:
        found.append("a time is not above 0")
    if line["flops"] is not None and line["tflops"] is None:
        found.append("flops without tflops")
    if line["gpu"] is not None and line["driver"] is None:
        found.append("a GPU without its driver")
    if (line["gpu"] is None) == (line["cpu"] is None):
        found.append("either gpu or cpu says where it was measured")
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", line["date"]):
        found.append(f"date is {line['date']!r}, not YYYY-MM-DD")
    return found


def main(paths):
    """Check files of result lines; 1 when a line is wrong."""
    status = 0
    for path in paths:
        with open(path) as file:
            for number, text in enumerate(file, 1):
                try:
                    found = problems(json.loads(text))
                except json.JSONDecodeError as error:
                    found = [str(error)]
                for problem in found:
                    print(f"{path}:{number}: {problem}")
                    status = 1
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The benchmarks run on a CPU at tiny sizes and write result lines that keep to the schema."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import schema

ROOT = Path(__file__).parents[1]


def run(file, folder):
    """(result lines, what was printed) of a benchmark's file."""
    command = [sys.executable, "-m", "pytest", file, "--benchmark-only", "--results", str(folder)]
    # A worker of pytest-xdist would have pytest-benchmark measure nothing.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    command += ["-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    lines = [json.loads(line) for line in (folder / "cpu.jsonl").read_text().splitlines()]
    assert [schema.problems(line) for line in lines] == [[]] * len(lines)
    return lines, done.stdout


def test_attention_is_measured_against_every_peer(tmp_path):
    lines, printed = run("bench/test_attention.py", tmp_path)
    measured = {(line["variant"], line["impl"], line["pass"]) for line in lines}
    both = [("yojo_isolated", "reference"), ("yojo_comparative", "reference"), ("kv_gather", "sdpa"), ("sdpa", "sdpa")]
    expected = {(*way, direction) for way in both for direction in ("forward", "backward")}
    expected |= {("flex", "flex", "forward"), ("flex", "flex_split", "forward")}
    expected |= {(None, name, None) for name in ("matmul", "flex_mask", "tile_tables", "tile_tables_cpu")}
    assert measured == expected
    (long_row,) = [line for line in lines if line["impl"] == "tile_tables_cpu"]
    assert (
        long_row["responses"] == 1000
        and 63_000 < long_row["prompt_tokens"] + 1000 * long_row["response_tokens"] < 65_000
    )
    assert "yojo_isolated reference forward" in printed


def test_head_and_losses_are_measured(tmp_path):
    lines, _ = run("bench/test_head_loss.py", tmp_path)
    heads = {(line["responses"], line["pass"]) for line in lines if line["bench"] == "head"}
    assert heads == {(count, direction) for count in (4, 16) for direction in ("forward", "backward", "both")}
    assert all(line["flops"] > 0 for line in lines if line["bench"] == "head")
    assert sum(line["bench"] == "loss" for line in lines) == 2 * 4 * 3


def test_a_whole_forward_is_measured_step_by_step(tmp_path):
    lines, _ = run("bench/test_forward.py", tmp_path)
    steps = ("logits_and_states", "backbone", "fused_head", "last_rows", "fused_layers", "graphs")
    measured = [(line["mode"], line["impl"]) for line in lines]
    assert measured == [(mode, step) for mode in ("isolated", "comparative") for step in steps]
    flops = {(line["mode"], line["impl"]): line["flops"] for line in lines}
    for mode in ("isolated", "comparative"):
        assert 0 < flops[mode, "last_rows"] < flops[mode, "fused_head"] == flops[mode, "backbone"]
    assert {line["fuse"] for line in lines} == {"none"}  # on a CPU


@pytest.mark.parametrize(
    "change, problem",
    [
        ({"seconds": None}, "seconds is null"),
        ({"seconds": "1"}, "seconds is '1', not of type float"),
        ({"responses": True}, "responses is True, not of type int"),
        ({"variant": "ours"}, "variant is 'ours'"),
        ({"extra": 1}, "extra is not in the schema"),
        ({"seconds": 3.0}, "seconds is not among seconds_all"),
        ({"seconds_all": [], "seconds": 1.0}, "seconds is not among seconds_all"),
        ({"flops": 1.0, "tflops": None}, "flops without tflops"),
        ({"gpu": "NVIDIA H200", "cpu": None}, "a GPU without its driver"),
        ({"gpu": "NVIDIA H200", "driver": "580.1"}, "either gpu or cpu"),
        ({"cpu": None}, "either gpu or cpu"),
        ({"prompt": "audio"}, "prompt is 'audio'"),
        ({"date": "today"}, "date is 'today'"),
    ],
)
def test_a_wrong_result_line_is_found(tmp_path, capsys, change, problem):
    good = dict.fromkeys(schema.FIELDS) | {
        "bench": "attention",
        "impl": "triton",
        "seconds": 1.5,
        "seconds_all": [1, 2.0],
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "cpu": "a CPU, 2 threads",
        "date": "2026-11-24",
    }
    file = tmp_path / "results.jsonl"
    file.write_text(json.dumps(good) + "\n")
    assert schema.main([file]) == 0
    file.write_text(json.dumps(good) + "\n" + json.dumps(good | change) + "\n{\n")
    assert schema.main([file]) == 1
    printed = capsys.readouterr().out
    assert f"{file}:2: {problem}" in printed and f"{file}:3: " in printed and f"{file}:1: " not in printed


def test_results_in_the_repository_keep_to_the_schema():
    assert schema.main(sorted((ROOT / "bench" / "results").glob("*.jsonl"))) == 0

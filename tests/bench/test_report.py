"""The report on result lines, on lines made up."""

import json
from pathlib import Path

import pytest
import report_lines
from report_lines import (
    CPU,
    H200,
    RATES,
    all_lines,
    breakdown_lines,
    cell,
    change,
    head_lines,
    score_lines,
    section,
    verdicts,
)

from bench import goals, model, report, savings
from bench.attention_peers import one
from bench.points import Scores, digits, memory, seconds, times
from yojo.costs.profiling import PARTS

ROOT = Path(__file__).parents[2]


@pytest.fixture(name="everything", scope="module")
def all_machines():
    """Lines of every kind and three machines."""
    return report_lines.everything()


@pytest.fixture()
def places(tmp_path, monkeypatch):
    """Function (lines) -> arguments of `report.main` for a folder that holds them; what is counted takes long."""
    monkeypatch.setattr(savings, "count", lambda: None)
    monkeypatch.setattr(report, "predictions", list)
    (tmp_path / "results").mkdir()
    readme = tmp_path / "README.md"
    readme.write_text("# Title\n\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\n\nThe end.\n")

    def write(lines):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / "results" / "a.jsonl").write_text(text)
        return ["--results", str(tmp_path / "results"), "--docs", str(tmp_path / "docs"), "--readme", str(readme)]

    return write


# ---- the page ----


def test_every_kind_of_line_has_its_section(everything):
    page = report.page(everything)
    assert page.startswith("<!-- Generated from bench/results/*.jsonl by `python -m bench.report`")
    headings = [line for line in page.splitlines() if line.startswith("#")]
    sweeps = [
        "#### Number of responses: image prompt of 2,048 tokens, responses of 100",
        "#### Length of the prompt: responses 4, response tokens 100",
        "#### Length of the responses: prompt image, prompt tokens 2,048, responses 4",
        "#### All points",
        "#### Training step: forward, loss and backward, without the optimizer",
        "#### Where the time of one pass goes",
    ]
    rest = ["### What each step of a scoring pass brings", "### Attention"]
    kinds = [[f"#### Attention, {direction}, {kind} of visible area" for direction in ("forward", "backward")]
             for kind in ("bfloat16: TFLOP/s", "float32: GFLOP/s")]  # fmt: skip
    last = ["#### Matrix product, and what is prepared once per batch", "### Value head and losses", "### Host time"]
    assert headings == [
        "# Benchmarks", "## What is compared", "## How it was measured", "## Goals",
        "## NVIDIA H100 80GB HBM3", "### qwen3-vl-4b, bfloat16", sweeps[0], sweeps[3],
        "## NVIDIA H200", "### qwen3-vl-4b, bfloat16", *sweeps, *rest, *kinds[0], *last,
        "## AMD EPYC, 2 threads", "### small, float32", *sweeps, *rest, *kinds[1], *last,
    ]  # fmt: skip


def test_a_machine_has_no_section_of_what_was_not_measured_on_it():
    page = report.page(head_lines(H200))
    assert "### Value head" in page and "### Attention" not in page and "### What each step" not in page
    assert "Training step: forward" not in page and "Where the time" not in page and "All points" not in page


def test_numbers_of_the_n_sweep(everything):
    text = section(section(report.page(everything), "## NVIDIA H200"), "#### Number of responses: image prompt of 2,048 tokens, responses of 100")  # fmt: skip
    # 4 stock passes: 4 x 2,148 tokens x 8 GFLOP at 200 TFLOP/s, and 4 x 1 ms; one fused pass: 2,448 tokens at 380, 1 ms.
    single, ours = 4 * 2148 * 8e9 / 200e12 + 4e-3, 2448 * 8e9 / 380e12 + 1e-3
    assert cell(text, "4", "single passes") == f"{1e3 * single:.0f} ms" == "348 ms"
    assert (
        cell(text, "4", "YOJO comparative, liger") == f"{1e3 * ours:.1f} ms ({single / ours:.2f}x)" == "52.5 ms (6.62x)"
    )
    share = single / ours / (4 * 2148 / 2448)
    assert (
        cell(text, "4", "YOJO comparative, liger", 1)
        == f"6.62x / 3.51x = {100 * share:.0f} %"
        == "6.62x / 3.51x = 189 %"
    )
    assert cell(text, "4", "YOJO comparative, liger", 2) == f"{2448 * 2e5 / 2**20:.0f} MiB" == "467 MiB"
    assert cell(text, "4", "YOJO comparative, liger", 3) == f"{4 / ours:.1f}" == "76.1"
    assert "= 100 %" not in text  # the stock passes are not held against themselves
    # 64 responses in 64 passes with fused layers, at 250 TFLOP/s.
    assert cell(text, "64", "single passes, liger") == f"{64 * (2148 * 8e9 / 250e12 + 1e-3):.2f} s (1.25x)"


def test_numbers_of_training_parts_steps_attention_and_head(everything):
    page = section(report.page(everything), "## NVIDIA H200")
    # 8 samples in 1.28 s against one in 0.4 s
    text = section(page, "#### Training step: forward, loss and backward, without the optimizer")
    assert cell(text, "YOJO comparative, liger", "samples/s") == "6.25"
    assert cell(text, "YOJO comparative, liger", "of the released loop") == "2.50x"
    text = section(page, "#### Where the time of one pass goes")
    column = "YOJO comparative, fuse none: 2,048 + 4 x 100, image"
    assert cell(text, "MLP", column) == "20.0 ms, 40.0 %, 100 TFLOP/s"
    assert cell(text, "launch gaps", column) == "2.50 ms, 5.00 %" and cell(text, "whole pass", column) == "50.0 ms"
    text = section(page, "### What each step of a scoring pass brings")
    row = "YOJO isolated, 6,144 + 16 x 128; qwen3-vl-4b"
    assert cell(text, row, "fused_layers, liger") == f"{1e3 * 8192 * 2e-5 * 0.9**4:.0f} ms (1.52x)" == "107 ms (1.52x)"
    assert cell(text, row, "graphs, liger") == ""
    assert cell(text, row, "of matrix product") == f"{100 * 8e9 / 2e-5 / 0.9**4 / 700e12:.1f} %" == "87.1 %"
    text = section(page, "#### Attention, forward, bfloat16: TFLOP/s of visible area")
    row = "8,192 + 8 x 256; 32:8 x 128"
    assert [cell(text, row, "YOJO isolated"), cell(text, row, "FlexAttention, tuned")] == ["500", "300"]
    assert cell(text, row, "FlexAttention, tuned", 1) == "1.67x" and cell(text, row, "dense SDPA", 1) == "0.909x"
    assert cell(text, row, "keys gathered, varlen", 2) == f"{(10240 * 8192 + 8 * 8448 * 4096) / 2**20:.0f} MiB"
    text = section(page, "### Value head and losses")
    assert cell(text, "head, 2560-1024-1", "Triton replayed, us") == "12.0" and cell(text, "head, 2560-1024-1", "ratio") == "5.00x"  # fmt: skip


def test_every_score_line_is_in_a_table_and_what_was_not_measured_is_empty():
    lines = [line for count in (1, 2, 4) for line in score_lines(H200, count)] + score_lines(H200, 3, 777, 33, "text")
    lines = [line for line in lines if (line["variant"], line["responses"]) != ("flex", 2)]
    page = report.page(lines)
    points = section(page, "#### All points")
    assert f"<summary>{len(lines)} lines</summary>" in points
    assert sum(line.startswith("| 777 + 3 x 33, text |") for line in points.splitlines()) == len(RATES)
    assert "777" not in page.replace(points, "")
    assert cell(page, "2", "FlexAttention") == "" and cell(page, "4", "FlexAttention") != ""
    # 3 x 810 tokens take 97.2 ms, and 3 ms to launch; 1 % less and 1 % more
    assert cell(points, "777 + 3 x 33, text", "shortest to longest") == "99.2 ms to 101 ms"


def test_whole_jobs_stand_beside_what_model_and_preparation_allow():
    jobs = {"model alone": 2.0, "preparation alone": 3.0, "score_file, 0 workers": 5.0, "score_file, 1 workers": 4.0}
    jobs |= {"score_file, 2 workers": 2.5, "datasets.map": 4.0}
    lines = [
        report_lines.make(seconds, **CPU, bench="pipeline", impl=name, model="small", samples=n, responses=4 * n)
        for (name, seconds), n in zip(jobs.items(), (20, 20, 20, 20, 20, 10), strict=True)
    ]
    text = report.page(lines)
    assert "20 rows of an image of a million pixels (PNG, JPEG) and 4 responses each" in text
    for row in (
        "score_file, 0 workers | 250.0 ms | 100 % | 1.25x",
        "score_file, 1 workers | 200.0 ms | 75.0 % | 1.00x",
    ):
        assert f"| {row} |" in text
    assert (
        "| score_file, 2 workers | 125.0 ms | 80.0 % | 0.625x |" in text
        and "| datasets.map | 400.0 ms |  | 2.00x |" in text
    )


def test_there_is_no_speedup_without_stock_passes():
    lines = [line for count in (1, 2, 4) for line in score_lines(H200, count)]
    lines = [line for line in lines if (line["variant"], line["fuse"], line["responses"]) != ("single", "none", 2)]
    page = report.page(lines)
    assert (
        cell(page, "2", "YOJO comparative, liger") == "48.3 ms" and cell(page, "2", "single passes, liger") == "139 ms"
    )
    assert cell(page, "2", "YOJO comparative, liger", 1) == "" != cell(page, "4", "YOJO comparative, liger", 1)
    assert cell(report.readme_block(lines), "2", "YOJO comparative, liger") == ""


def test_ways_that_differ_in_nothing_but_what_computes_them_keep_apart():
    lines = [line for count in (1, 4) for line in score_lines(H200, count)]
    lines += [
        line | {"impl": "reference"} for line in lines if (line["variant"], line["fuse"]) == ("yojo_isolated", "none")
    ]
    page = report.page(lines)
    assert cell(page, "4", "YOJO isolated, reference") == cell(page, "4", "YOJO isolated, triton") != ""
    assert cell(page, "4", "YOJO isolated, liger") != ""


def test_where_there_is_least_to_gain_is_said(everything):
    text = section(section(report.page(everything), "## NVIDIA H200"), "#### Length of the prompt: responses 4, response tokens 100")  # fmt: skip
    assert f"least to gain at 64 + 4 x 100, text: a FLOPs ratio of {4 * 164 / 464:.2f}x in isolated mode" in text


def test_each_machine_has_its_own_provenance(everything):
    later = [line | {"commit": "ddd4444", "date": "2026-11-26"} for line in score_lines(H200, 128)]
    page = report.page(everything + later)
    versions = "torch 2.13.0; triton 3.7.1; transformers 5.23.0"
    assert f"\nNVIDIA H100 80GB HBM3; driver 575.57; {versions}; 2026-11-25; commit ccc3333\n" in section(page, "## NVIDIA H100 80GB HBM3")  # fmt: skip
    assert f"\nNVIDIA H200; driver 580.95; {versions}; 2026-11-25, 2026-11-26; commit abc1234, ddd4444\n" in section(page, "## NVIDIA H200")  # fmt: skip
    cpu = section(page, "## AMD EPYC, 2 threads")
    assert "\nAMD EPYC, 2 threads; torch 2.13.0; transformers 5.23.0; 2026-11-25; commit abc1234\n" in cpu
    assert "driver" not in cpu and "triton 3" not in cpu


def test_the_order_of_lines_means_nothing_unless_one_replaces_another(everything, tmp_path):
    assert report.page(everything[::-1]) == report.page(everything)
    assert report.readme_block(everything[::-1]) == report.readme_block(everything)
    old, new = score_lines(H200, 4)[0], score_lines(H200, 4, slow=2.0)[0] | {"commit": "fff6666"}
    (tmp_path / "a.jsonl").write_text(json.dumps(old) + "\n" + json.dumps(new) + "\n")
    page = report.page(report.read_results(tmp_path))
    assert "695 ms" in page and "348 ms" not in page and "abc1234" not in page


def test_nothing_measured_is_a_report_too(tmp_path):
    assert report.read_results(tmp_path) == report.read_results(tmp_path / "missing") == []
    page = report.page([])
    assert page.endswith("## Measured\n\nNothing has been measured yet.\n")
    assert {(measured, verdict) for measured, verdict in verdicts([]).values()} == {("", "not measured")}
    assert len(verdicts([])) == len(goals.GOALS)
    assert report.readme_block([]) == report.NOTHING


@pytest.mark.parametrize(
    "write, value, text",
    [
        (digits, 1234.5, "1,230"), (digits, 999.6, "1,000"), (digits, 123.4, "123"), (digits, 3.9, "3.90"), (digits, 0.0456, "0.0456"),
        (digits, 0, "0"), (digits, None, ""), (digits, 9.996, "10.0"), (times, 3.9, "3.90x"), (times, None, ""), (times, float("inf"), "infx"),
        (seconds, 1.5, "1.50 s"), (seconds, 0.9996, "1.00 s"), (seconds, 0.0123, "12.3 ms"), (seconds, 4.5e-5, "45.0 us"),
        (memory, 3 * 2**30, "3.00 GiB"), (memory, 2**20 * 5.5, "5.50 MiB"), (memory, 2048, "2.00 KiB"), (memory, 0, "0 KiB"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits_and_a_unit(write, value, text):
    assert write(value) == text


# ---- the README, files, pictures ----


def test_the_readme_shows_the_headline(everything):
    block = report.readme_block(everything)
    assert (
        "qwen3-vl-4b, image prompt of 2,048 tokens, responses of 100 (Qwen3VL with 36 layers of width 2,560, random weights). Measured in bfloat16 on NVIDIA H200; driver 580.95"
        in block
    )
    assert report.NOTHING not in block and "(docs/benchmarks.md)" in block
    assert "](docs/benchmarks/nvidia-h200-qwen3-vl-4b-bfloat16-speed-up.png)" in block
    assert (
        cell(block, "4", "YOJO comparative, liger") == "6.62x" and cell(block, "4", "FLOPs ratio, isolated") == "3.51x"
    )
    header = next(line for line in block.splitlines() if line.startswith("| N |"))
    assert header == ("| N | single passes | single passes, liger | padded batch | released code | prefix cache | FlexAttention "
                      "| YOJO comparative, liger | YOJO isolated, liger | FLOPs ratio, isolated |")  # fmt: skip


def test_a_readme_without_gpu_figures_says_so():
    block = report.readme_block(all_lines(CPU, "small"))
    assert (
        block.startswith(report.NOTHING) and "small, image prompt" in block and cell(block, "4", "YOJO isolated") != ""
    )
    assert report.readme_block(head_lines(CPU)) == report.NOTHING


def test_the_report_is_written_with_its_pictures(places, tmp_path):
    from PIL import Image

    options = places(all_lines(H200))
    stale = tmp_path / "docs" / "benchmarks" / "old.png"
    stale.parent.mkdir(parents=True)
    stale.write_bytes(b"")
    assert report.main(options) == 0 and not stale.exists()
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert page == report.page(all_lines(H200))
    pictures = sorted((tmp_path / "docs").glob("benchmarks/*.png"))
    names = ["attention-backward", "attention-forward", "breakdown", "peak-memory", "speed-up", "time"]
    assert len(pictures) == len(names) and all(any(name in path.name for path in pictures) for name in names)
    for path in pictures:
        assert f"](benchmarks/{path.name})" in page
        image = Image.open(path)
        assert image.format == "PNG" and min(image.size) > 300 and len(image.convert("RGB").getcolors(2**20)) > 50
    readme = (tmp_path / "README.md").read_text()
    block = report.readme_block(all_lines(H200))
    assert readme == f"# Title\n\n<!-- benchmarks -->\n{block}\n<!-- /benchmarks -->\n\nThe end.\n"
    assert report.main([*options, "--check"]) == 0  # what was written is what the lines give


def test_check_finds_a_changed_number_and_a_missing_picture(places, tmp_path, capsys):
    lines = [line for count in (1, 4) for line in score_lines(H200, count)]
    options = places(lines)
    assert report.main([*options, "--check"]) == 1  # nothing there yet, and nothing is written
    assert not (tmp_path / "docs").exists() and "old" in (tmp_path / "README.md").read_text()
    assert report.main(options) == 0 and report.main([*options, "--check"]) == 0
    page, readme = tmp_path / "docs" / "benchmarks.md", tmp_path / "README.md"
    picture = next((tmp_path / "docs" / "benchmarks").glob("*time.png"))
    for path, spoil in (
        (page, lambda: page.write_text(page.read_text().replace("52.5 ms", "42.5 ms", 1))),
        (readme, lambda: readme.write_text(readme.read_text().replace("6.62x", "7.62x", 1))),
        (picture, picture.unlink),
    ):
        capsys.readouterr()
        before = path.read_bytes()
        spoil()
        assert report.main([*options, "--check"]) == 1
        printed = capsys.readouterr().out.splitlines()
        assert len(printed) == 1 and printed[0].startswith(f"{path} is ")
        path.write_bytes(before)
    assert report.main([*options, "--check"]) == 0
    places(change(lines, seconds_=3, variant="yojo_isolated"))
    assert report.main([*options, "--check"]) == 1


def test_wrong_files_are_named(places, tmp_path, capsys):
    options = places(head_lines(H200)[:3])
    (tmp_path / "results" / "b.jsonl").write_text(json.dumps(head_lines(H200)[0]) + '\n{"bench": "head"}\n')
    assert report.main(options) == 2
    assert f"error: {tmp_path}/results/b.jsonl:2: variant is missing" in capsys.readouterr().err
    (tmp_path / "results" / "b.jsonl").unlink()
    readme = tmp_path / "README.md"
    for text in ("no markers\n", "<!-- /benchmarks -->\n<!-- benchmarks -->\n", "<!-- benchmarks -->\n" * 2):
        readme.write_text(text)
        assert report.main(options) == 2
        assert f"error: {readme}: the lines <!-- benchmarks --> and <!-- /benchmarks -->" in capsys.readouterr().err
    assert readme.read_text() == text and not (tmp_path / "docs").exists()
    assert report.main([*options[:-1], ""]) == 0 and readme.read_text() == text  # the README is left alone


def test_without_matplotlib_the_report_says_what_is_missing(places, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"the pictures need matplotlib: pip install 'yojo\[demo\]'"):
        report.main(places(breakdown_lines(H200)))


def test_what_there_is_to_save():
    saved = savings.Savings(100, (1, 4), {"a-shape": [["text, 256 tokens", "1.02x", "2.21x / 2.23x"]]})
    text = section(report.page([], saved), "## What there is to save")
    assert "responses of 100 tokens" in text
    assert cell(text, "text, 256 tokens", "N = 4") == "2.21x / 2.23x"
    assert "## What there is to save" not in report.page([])


@pytest.fixture(name="predicted", scope="module")
def all_predictions():
    """A prediction for a row that was measured, and for one that was not: 400 TFLOP/s forward, 300 backward."""
    predicted = []
    for shape in (one(8192, 8, 256), one(512, 4, 64)):
        flops = 4e-6 * shape.heads * shape.head_dim * 1e6
        runs = {"forward": model.Run(320, flops / 400, 0.99, 2 * 10**6 * shape.heads)}
        runs |= {kernel: model.Run(80, flops * 2.5 / 300 / 3, 0.75) for kernel in ("query_grad", "key_grad", "sum")}
        predicted.append(model.Prediction(shape, runs, 10**6))
    return predicted


def test_predictions_are_called_so_and_stand_beside_what_was_measured(everything, predicted):
    page = report.page(everything, predicted=predicted)
    text = section(page, "## Predicted")
    assert "no figure of this section was measured" in text
    row = "512 + 4 x 64; 32:8 x 128"
    assert cell(text, row, "forward, predicted") == f"{4 * 32 * 128 / 400:.1f} us" == "41.0 us"
    assert cell(text, row, "TFLOP/s, predicted") == "400" and cell(text, row, "visible / computed") == "0.500"
    assert cell(text, row, "balance of key gradients") == "0.750"
    header = next(line for line in text.splitlines() if line.startswith("| prompt tokens"))
    assert "measured" not in header  # a prediction never stands in a column of measurements
    h200 = section(page, "## NVIDIA H200")
    for direction, expected, measured in (("forward", 400, 500), ("backward", 300, 350)):
        text = section(h200, f"#### Attention, {direction}, bfloat16: TFLOP/s of visible area")
        row = "8,192 + 8 x 256; 32:8 x 128"
        assert cell(text, row, "TFLOP/s, predicted") == str(expected)
        assert cell(text, row, "TFLOP/s, measured") == str(measured) == cell(text, row, "YOJO isolated")
        assert cell(text, row, "measured / predicted") == f"{100 * measured / expected:.0f} %"
        beside = text.partition("**Prediction against measurement**")[2]
        assert "2,048 + 4 x 128" not in beside and "512 + 4 x 64" not in text  # measured alone, predicted alone


def test_nothing_is_predicted_for_other_machines(everything, predicted):
    own = [line | {"gpu": "NVIDIA A100-SXM4-80GB"} for line in everything if line["gpu"] == H200["gpu"]]
    assert "**Prediction against measurement**" not in report.page(own, predicted=predicted)
    assert "**Prediction against measurement**" in report.page(everything, predicted=predicted)
    assert "## Predicted" not in report.page(own)


def test_docs_and_readme_equal_the_results_in_the_repository(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert report.main(["--check"]) == 0, capsys.readouterr().out


def test_breakdown_lines_name_parts_that_profiles_have():
    assert {line["part"] for line in breakdown_lines(H200)} == set(PARTS)


def test_sweeps_are_found_in_the_lines():
    scores = Scores([line for line in all_lines(H200) if line["bench"] == "score"])
    assert [place.responses for place in scores.sweep("responses")] == [1, 2, 4, 8, 16, 32, 64]
    assert [place.prompt_tokens for place in scores.sweep("prompt_tokens")] == [64, 512, 1024, 2048, 4096, 8192]
    assert [place.response_tokens for place in scores.sweep("response_tokens")] == [25, 100, 400, 1600]
    assert Scores(score_lines(H200, 4)).sweep("responses") == [] != Scores(score_lines(H200, 4)).sweep("responses", 1)

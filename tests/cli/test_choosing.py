"""`yojo best`, `yojo pairs` and `yojo filter`: options reach what they are for, and mistakes are one line."""

import pytest
from chosen_cases import read_rows, write_scores
from data_cases import write_lines
from typer.testing import CliRunner

from yojo.cli import app

RECORDS = [{"ask": "<image>?", "said": ["a", "bb", "c"]}, {"ask": "b", "said": ["d", "e"]}]
OPTIONS = {"columns": {"prompt": "ask", "responses": "said"}, "literal_tags": True}


@pytest.fixture()
def scores(tmp_path):
    source = write_lines(tmp_path / "data.jsonl", RECORDS)
    return write_scores(tmp_path / "s.jsonl", source, [[1, 3, 2], [0, 1]], **OPTIONS)


def call(*words):
    return CliRunner().invoke(app, list(map(str, words)))


@pytest.mark.parametrize(
    "words, key, values",
    [
        (["best"], "completion", ["bb", "e"]),
        (["best", "--top", 2], "rank", [1, 2, 1, 2]),
        (["best", "--by", "ask"], "candidates", [3, 2]),
        (["best", "--messages"], "completion", [[{"role": "assistant", "content": text}] for text in ("bb", "e")]),
        (["pairs"], "rejected", ["a", "d"]),
        (["pairs", "--kind", "all", "--margin", "0.5", "--max-pairs", 2], "chosen", ["bb", "bb", "e"]),
        (["filter", "--min-score", "2"], "ask", ["<image>?"]),
        (["filter", "--top-share", "0.5", "--of", "margin"], "score", [1.0]),
        (["filter", "--min-score", "2", "--responses"], "responses", [["bb", "c"]]),
    ],
)
def test_commands_write_what_was_asked(tmp_path, scores, words, key, values):
    out = tmp_path / "o.jsonl"
    done = call(words[0], scores, "--out", out, *words[1:])
    assert done.exit_code == 0, done.output
    assert [row[key] for row in read_rows(out)] == values
    assert len(done.stderr.splitlines()) == 1 and done.stderr.startswith(f"{out}: {len(values)} ") and not done.stdout
    assert call(words[0], scores, "--out", out, *words[1:]).exit_code == 2
    moved = (tmp_path / "data.jsonl").rename(tmp_path / "moved.jsonl")
    assert call(words[0], scores, "--out", out, "--overwrite", "--data", moved, *words[1:]).exit_code == 0


def test_how_records_are_read_can_be_said(tmp_path, scores):
    (tmp_path / ".s.jsonl.job" / "job.json").unlink()
    words = ["best", scores, "--out", tmp_path / "o.jsonl", "--data", tmp_path / "data.jsonl"]
    done = call(*words)
    assert done.exit_code == 2 and "these columns fit no known format" in done.stderr
    done = call(
        *words, "--map", "prompt=ask", "--map", "responses=said", "--literal-tags", "--report", tmp_path / "o.png"
    )
    assert done.exit_code == 0 and (tmp_path / "o.png").exists(), done.output


@pytest.mark.parametrize(
    "words, message",
    [
        (["filter"], "give min_score or top_share"),
        (["pairs", "--kind", "most"], "kind must be"),
        (["best", "--image-root", "nowhere"], "--image-root is no folder: nowhere"),
        (["best", "--map", "prompt"], "--map must be field=column"),
        (["best", "--report", "o.docx"], "report must be a .png"),
        (["best", "--by", "nothing"], "by names 'nothing'"),
    ],
)
def test_mistakes_are_one_line(tmp_path, scores, words, message):
    done = call(words[0], scores, "--out", tmp_path / "o.jsonl", *words[1:])
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.output
    assert not (tmp_path / "o.jsonl").exists() and done.stderr.startswith("error: ")


def test_a_file_that_is_no_scores_file(tmp_path, scores):
    done = call("best", tmp_path / "data.jsonl", "--out", tmp_path / "o.jsonl", "--data", tmp_path / "data.jsonl")
    assert done.exit_code == 2 and "out" not in done.stderr.split(":")[1], done.stderr
    done = call("best", tmp_path / "nothing.jsonl", "--out", tmp_path / "o.jsonl")
    assert done.exit_code == 2 and "nothing.jsonl: no such file" in done.stderr

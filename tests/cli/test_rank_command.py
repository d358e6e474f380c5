"""`yojo rank`: options reach what they are for, exit codes, and mistakes are one line."""

import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from yojo.cli import app

VOTES = [
    {"qid": q, "model_a": a, "model_b": b, "winner": 0, "judge": who}
    for q in ("x", "y")
    for a, b in ("ab", "ac", "ad", "bc", "bd", "cd")
    for who in ("j", "k")
]
RESPONSES = [{"qid": q, "who": m, "response": f"{m} on {q}", "prompt": q} for q in ("x", "y") for m in "abcd"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def call(*words):
    return CliRunner().invoke(app, ["rank", *map(str, words)])


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture()
def words(tmp_path):
    votes = write(tmp_path / "v.jsonl", VOTES)
    return [votes, "--out", tmp_path / "r.jsonl", "--map", "question=qid", "--label", "0=first", "--draws", 5]


def test_rankings_records_and_report(tmp_path, words):
    responses = write(tmp_path / "answers.jsonl", RESPONSES)
    done = call(
        *words, "--method", "pged", "--no-denoise-ensemble", "--seed", 3, "--variants", 4, "--responses", responses,
        "--map-responses", "question=qid", "--map-responses", "model=who", "--variants-out", tmp_path / "t.jsonl",
        "--json", tmp_path / "report.json",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    rows = read(tmp_path / "r.jsonl")
    assert [row["items"] for row in rows] == [list("abcd")] * 2 and [row["ranks"] for row in rows] == [[1, 2, 3, 4]] * 2
    assert rows[0]["method"] == "pged" and rows[0]["seed"] == 3 and rows[0]["draws"] == 5
    assert rows[0]["options"] == {"denoise_ensemble": False, "ties": "half"}
    records = read(tmp_path / "t.jsonl")
    assert [record["id"] for record in records] == ["x#1", "y#1"]
    for record in records:
        assert [record["models"][record["rankings"].index(rank)] for rank in (1, 2, 3, 4)] == list("abcd")
    assert "2 questions, 4 items: 24 votes, 0 ties and 0 abstentions" in done.stdout
    assert "majorities agreed with: 1.000 of 12 pairs" in done.stdout and "each model in 2 to 2 of them" in done.stdout
    assert "disconnected questions, which have no single ranking: 0\n" in done.stdout
    assert "annotators: 2; the rankings agree with 1.000 to 1.000 of what each has decided" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["questions"] == 2 and report["variants"]["models"]["a"] == [2, 0, 0, 0]
    assert report["condorcet"] == {"yes": 2, "no": 0, "unknown": 0} and report["annotators"]["j"]["votes"] == 12


def test_bad_records_stop_or_are_listed(tmp_path, words):
    write(tmp_path / "v.jsonl", [*VOTES[:3], VOTES[0] | {"winner": "who?"}, VOTES[0] | {"model_b": "a"}, *VOTES[3:]])
    done = call(*words)
    assert done.exit_code == 2 and not (tmp_path / "r.jsonl").exists()
    assert done.stderr.startswith("error: example 'v.jsonl:4': winner is 'who?'") and len(done.stderr.splitlines()) == 1
    done = call(*words, "--skip-bad", "--json", tmp_path / "report.json")
    assert done.exit_code == 1 and len(read(tmp_path / "r.jsonl")) == 2
    assert "bad records, left out: 2" in done.stdout and "v.jsonl:5: a vote of 'a' against itself" in done.stdout
    assert [bad["line"] for bad in json.loads((tmp_path / "report.json").read_text())["bad"]] == [4, 5]


def test_disconnected_questions_are_said(tmp_path, words):
    write(tmp_path / "v.jsonl", [*VOTES, VOTES[0] | {"model_a": "p", "model_b": "q"}])
    done = call(*words)
    assert done.exit_code == 0 and "disconnected questions, which have no single ranking: 1 (x)" in done.stdout
    assert [row["connected"] for row in read(tmp_path / "r.jsonl")] == [False, True]


@pytest.mark.parametrize(
    "more, message",
    [
        (["--method", "best"], "method must be one of"),
        (["--prior", 1, "--method", "elo"], "elo has no option 'prior'; it has step, orders"),
        (["--label", "tie"], "--label must be WORD=first, second, tie or abstain, got 'tie'"),
        (["--label", "0=tie"], "--label gives 0 twice: first and tie"),
        (["--label", "1=model_b"], "labels maps '1' to 'model_b'"),
        (["--map", "question"], "--map must be field=column"),
        (["--map-responses", "question"], "--map-responses must be field=column"),
        (["--variants", 4], "--responses FILE"),
        (["--ties", "win"], "ties must be one of half, drop"),
    ],
)
def test_mistakes_are_one_line(tmp_path, words, more, message):
    done = call(*words, *more)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.output
    assert done.stderr.startswith("error: ") and not (tmp_path / "r.jsonl").exists()


def test_a_word_may_hold_the_sign(tmp_path, words):
    write(tmp_path / "v.jsonl", [VOTES[0] | {"winner": "a==b"}, VOTES[0]])
    done = call(*words, "--label", "a==b=tie")
    assert done.exit_code == 0 and read(tmp_path / "r.jsonl")[0]["ties"] == 1, done.output


def test_help_loads_nothing_heavy():
    code = "import sys\nfrom yojo.cli import app\ntry: app(['rank', '--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'numpy', 'torch', 'scipy', 'choix', 'networkx', 'rich.progress'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]" and "kemeny" in done.stdout

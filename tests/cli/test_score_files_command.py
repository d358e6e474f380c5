"""`yojo score FILE --out`: judges by name, options obeyed or refused by name, what people make of the scores, exit codes."""

import json
import os
import signal
import time

import pytest
import torch
from saved_cases import backbone, patched
from scoring_cases import bad_of, candidates, check, children_of, is_alive, lines_in, lines_of, until, write
from typer.testing import CliRunner

import yojo
from yojo.cli import app


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    backbone().save_pretrained(folder / "base")
    yojo.RewardModel(*patched(folder / "base")).save_pretrained(folder / "rm")
    return folder / "rm"


@pytest.fixture()
def input_(tmp_path):
    return write(tmp_path / "in.jsonl", candidates(30))


def call(*words):
    return CliRunner().invoke(app, [*map(str, words)])


def length(text):
    return float(len(text))


def test_from_candidates_to_the_best_and_to_pairs(input_, tmp_path):
    records, out = candidates(30), tmp_path / "s.jsonl"
    done = call("score", input_, "--model", "length", "--out", out, "--workers", 0, "--report", tmp_path / "r.png")
    assert done.exit_code == 0, done.output
    assert "30 of 30 rows have scores: 30 new" in done.stdout and (tmp_path / "r.png").stat().st_size > 10_000
    check(out, records, input_, score=length)
    assert call("best", out, "--out", tmp_path / "b.jsonl").exit_code == 0
    best = [json.loads(line) for line in (tmp_path / "b.jsonl").read_text().splitlines()]
    assert [row["completion"] for row in best] == [max(record["responses"], key=len) for record in records]
    assert call("pairs", out, "--out", tmp_path / "p.jsonl").exit_code == 0
    pairs = yojo.data.load(tmp_path / "p.jsonl")
    for pair in pairs:
        assert len(pair.responses[0]) > len(pair.responses[1]) and pair.rankings == [1, 2]
    found = call("score", input_, "--model", "length", "--out", out, "--json")
    assert json.loads(found.stdout.splitlines()[-1])["kept"] == 30


def test_a_model_by_its_folder(text_model, input_, tmp_path):
    done = call("score", input_, "--model", text_model, "--out", tmp_path / "s", "--workers", 1, "--parquet")
    assert done.exit_code == 0, done.output
    model = yojo.RewardModel.from_pretrained(text_model)
    lines = lines_of(tmp_path / "s")
    assert len(lines) == 30
    for line in lines:
        record = candidates(30)[line["row"]]
        alone = model.score(record["prompt"], record["responses"])
        assert torch.allclose(torch.tensor(line["scores"]), alone, rtol=0, atol=2e-6)
    with torch.no_grad():
        model.model.score.bias2 += 1e-3
    model.save_pretrained(tmp_path / "other")
    done = call("score", input_, "--model", tmp_path / "other", "--out", tmp_path / "s")
    assert done.exit_code == 2 and "another job, which differs in judge.weights" in done.stderr
    short = call("score", input_, "--model", text_model, "--out", tmp_path / "t", "--max-length", 20)
    assert short.exit_code == 1 and "nothing is cut" in next(iter(bad_of(tmp_path / "t").values()))


def test_the_signal_that_ends_a_run_is_given_back(input_, tmp_path):
    before = signal.getsignal(signal.SIGTERM)
    assert call("score", input_, "--model", "length", "--out", tmp_path / "s", "--workers", 0).exit_code == 0
    assert signal.getsignal(signal.SIGTERM) is before


def test_bad_rows_are_exit_code_1(tmp_path):
    records = candidates(12)
    records[4] = records[4] | {"responses": []}
    done = call(
        "score", write(tmp_path / "in.jsonl", records), "--model", "place", "--out", tmp_path / "s", "--workers", 0
    )
    assert done.exit_code == 1 and "1 rows are bad" in done.stdout
    assert list(bad_of(tmp_path / "s")) == [4]


def test_shards_by_their_number(input_, tmp_path):
    for shard in ("0/2", "1/2"):
        words = ("--model", "random:3", "--out", tmp_path / "s", "--shard", shard, "--workers", 0)
        assert call("score", input_, *words).exit_code == 0
    assert sorted(line["row"] for line in lines_of(tmp_path / "s")) == list(range(30))
    (tmp_path / "one").mkdir()
    assert call("score", input_, "--model", "random:3", "--out", tmp_path / "one.jsonl", "--workers", 0).exit_code == 0
    by_row = {line["row"]: line["scores"] for line in lines_of(tmp_path / "s")}
    assert all(by_row[line["row"]] == line["scores"] for line in lines_of(tmp_path / "one.jsonl"))


FILE = "in.jsonl"
MISTAKES = [
    ((FILE, "--out", "s"), "--model is needed with --out"),
    ((FILE, "--out", "s", "--model", "demo", "--base-model", "b"), "--base-model is given with --model demo"),
    ((FILE, "--model", "length"), "give --prompt and --response"),
    (("--model", "length", "--out", "s"), "--out is given without a FILE"),
    ((FILE, "--model", "length", "--out", "s", "--prompt", "p"), "--prompt is given with --out"),
    ((FILE, "--model", "length", "--shard", "0/2"), "--shard is for files of candidates: say where their scores go"),
    ((FILE, "--model", "length", "--out", "s", "--shard", "3/2"), "--shard is i/n, the i-th of n from 0"),
    ((FILE, "--model", "length", "--out", "s", "--shard", "two"), "got 'two'"),
    ((FILE, "--model", "length", "--out", "s", "--shard", "0/²"), "--shard is i/n, the i-th of n from 0"),
    ((FILE, "--model", "length", "--out", "s.jsonl", "--shard", "0/2"), "shards write into one folder"),
    ((FILE, "--model", "length", "--out", "s", "--workers", "-1"), "workers must be 0 or more"),
    (
        (FILE, "--model", "length", "--out", "s", "--shard", "0/2", "--no-resume"),
        "removes what the other shards have scored",
    ),
    ((FILE, "--model", "length", "--out", "s", "--map", "prompt"), "--map must be field=column"),
    ((FILE, "--model", "length", "--out", "s", "--map", "prompt=ask"), "there is no column 'ask'"),
    ((FILE, "--model", "length", "--out", "s", "--devices", "gpu"), "device='gpu' is no device"),
    ((FILE, "--model", "length", "--out", "s", "--devices", "cuda:99"), "there is no device cuda:99"),
    ((FILE, "--model", "length", "--out", "s", "--device", "cpu", "--devices", "cpu"), "leave one of them out"),
    ((FILE, "--model", "length", "--out", "s", "--device", "cuda:99"), "there is no device cuda:99"),
    ((FILE, "--model", "length", "--out", "s.csv"), "scores are written as .jsonl or .parquet, or into a folder"),
    ((FILE, "--model", "length", "--out", "s", "--ray", "--device", "cpu"), "--ray places its actors itself"),
    ((FILE, "--model", "nowhere/at/all", "--out", "s"), "no such folder: nowhere/at/all"),
    ((FILE, "--model", ".", "--out", "s"), "is no YOJO reward model"),
    ((FILE, "--model", "http://here/v1", "--out", "s"), "an address is of"),
    (("none.jsonl", "--model", "length", "--out", "s"), "none.jsonl: no such file"),
    (("empty.jsonl", "--model", "length", "--out", "s"), "no records: the file is empty"),
    (("odd.jsonl", "--model", "length", "--out", "s"), "these columns fit no known format"),
    ((FILE, "--model", "length", "--out", "theirs"), "holds notes.txt and is not the folder of a scoring job"),
    ((FILE, "--model", "length", "--out", "theirs.jsonl"), "exists and was not written by a scoring job"),
    ((FILE, "--model", "length", "--out", "s", "--report", "r.jsonl"), ".png"),
]


@pytest.mark.parametrize("words, message", MISTAKES, ids=[" ".join(words) for words, _ in MISTAKES])
def test_mistakes_are_one_line(tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / FILE, candidates(3))
    write(tmp_path / "odd.jsonl", [{"ask": "a", "answers": ["b"]}])
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "notes.txt").write_text("x")
    (tmp_path / "theirs.jsonl").write_text("x")
    done = call("score", *words)
    assert done.exit_code == 2 and message in done.stderr and "Traceback" not in done.stderr, done.output
    assert done.stderr.startswith("error: ") and not (tmp_path / "s").exists()


def test_ray_may_stand_without_an_address(input_, tmp_path, monkeypatch):
    from yojo.scoring import file

    seen = []
    monkeypatch.setattr(file, "score_file", lambda *args, ray, **options: seen.append(ray) or 1 / 0)
    for words in (
        ("--ray",),
        ("--ray", "auto"),
        ("--ray", "head:6379"),
        ("--ray", "--workers", "0"),
        ("--ray", input_),
    ):
        call("score", *(() if input_ in words else (input_,)), "--model", "length", "--out", tmp_path / "s", *words)
    assert seen == ["local", "auto", "head:6379", "local", "local"]


def test_devices_are_processes_and_none_is_left(tmp_path):
    """Two processes on the CPU; then they are interrupted, and gone on with."""
    records = candidates(3000)
    path, out = write(tmp_path / "in.jsonl", records), tmp_path / "s.jsonl"
    pid = os.fork()
    if not pid:
        signal.signal(signal.SIGTERM, lambda *_: None)  # behind the run, should that be over so soon
        done = call("score", path, "--model", "length", "--out", out, "--devices", "cpu,cpu", "--workers", 0)
        os._exit(done.exit_code)
    folder, deadline = tmp_path / ".s.jsonl.job", time.monotonic() + 300
    # Of a busy machine one process may be done before the other one begins, or both have begun and written nothing yet.
    begun, written, children = set(), 0, set()
    while not (len(begun) == 2 and written) and time.monotonic() < deadline:
        for pattern in (".scores-*", "scores-*"):  # a short one may have got its name already
            begun.update(path.name.removeprefix(".").removesuffix(".writing") for path in folder.glob(pattern))
        written = lines_in(folder)
        children.update(children_of(pid))
        time.sleep(0.01)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) in (130, 0) and len(children) >= 2
    assert until(lambda: not any(map(is_alive, children)))  # Python's own tracker of processes ends last
    assert len(begun) == 2 and written
    written = lines_in(folder)
    words = ("score", path, "--model", "length", "--out", out, "--workers", 0, "--devices", "cpu,cpu", "--json")
    done = call(*words)
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout.splitlines()[-1])
    assert (found["rows"], found["scored"] + found["kept"], found["out"]) == (3000, 3000, str(out))
    assert found["kept"] == written
    check(out, records, path, score=length)

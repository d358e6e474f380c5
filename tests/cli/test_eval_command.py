"""`yojo eval`: judges by their names on benchmarks, what it prints and writes, what it refuses."""

import json
import random

import pytest
from benchmark_cases import records_of, write, write_media
from typer.testing import CliRunner

from yojo.cli import app
from yojo.evaluation import benchmarks


def call(*words):
    return CliRunner().invoke(app, [*map(str, words)])


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory):
    from yojo.demo import digits

    folder, rng = tmp_path_factory.mktemp("digits"), random.Random(0)
    _, held_out = digits.load_digits_split()
    rows = []
    for n, (image, digit) in enumerate(held_out[:10]):
        image.save(folder / f"{n}.png")
        shown = rng.sample([digit, *rng.sample([other for other in range(10) if other != digit], 3)], 4)
        ranks = [1 if other == digit else 2 for other in shown]
        texts = [digits.caption(other, rng) for other in shown]
        rows.append({"prompt": digits.PROMPT, "image": f"{n}.png", "responses": texts, "rankings": ranks})
    (folder / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder / "held_out.jsonl"


def test_digits_in_all_modes(digits_file, tmp_path):
    judges = ["demo", "isolated=demo#isolated", "permuted=demo#permutations=4", "place"]
    words = [word for judge in judges for word in ("--judge", judge)]
    done = call("eval", "preferences", digits_file, *words, "--out", tmp_path / "out", "--workers", 0)
    assert done.exit_code == 0, done.output
    report = json.loads((tmp_path / "out/report.json").read_text())
    found = {judge["name"]: judge for judge in report["judges"]}
    assert list(found) == ["demo", "isolated", "permuted", "place"]
    for name in ("demo", "isolated", "permuted"):
        assert found[name]["figures"]["estimates"]["top1"]["value"] > 0.9
        assert found[name]["fingerprint"]["judge"]["settings"]["mode"] == (
            "isolated" if name == "isolated" else "comparative"
        )
    assert found["place"]["figures"]["estimates"]["top1"]["value"] == 0.25
    assert (found["isolated"]["orders"], found["demo"]["orders"]) == (None, 4)
    assert found["isolated"]["order"]["flip_rate"] == 0 and found["place"]["order"]["flip_rate"] == 1
    assert 0 < found["permuted"]["order"]["spread"] < found["demo"]["order"]["spread"]
    assert (
        "isolated: fingerprint" in done.stdout
        and "free of order" in done.stdout
        and "to remove it: isolated" in done.stdout
    )


@pytest.fixture()
def data(tmp_path):
    return write(records_of("vl-rewardbench"), write_media(tmp_path))


def test_shards_are_put_together(data, tmp_path):
    words = ("eval", "vl-rewardbench", data, "--partial", "--judge", "random", "--out", tmp_path / "o", "--workers", 0)
    for number in range(2):
        done = call(*words, "--shard", f"{number}/2")
        assert done.exit_code == 0 and done.stdout == f"{tmp_path / 'o'}: the scores of shard {number}/2 are there\n"
    assert call(*words).exit_code == 0
    again = call(*words, "--json")  # nothing is left to ask
    assert json.loads(again.stdout)["judges"] == json.loads((tmp_path / "o/report.json").read_text())["judges"]
    alone = [*words[:-3], tmp_path / "p", "--workers", 0]
    assert call(*alone).exit_code == 0
    assert (tmp_path / "o/random.jsonl").read_bytes() == (tmp_path / "p/random.jsonl").read_bytes()


def test_scores_made_elsewhere_stand_beside_a_judge(data, tmp_path):
    call("eval", "vl-rewardbench", data, "--partial", "--judge", "random:3", "--out", tmp_path / "o", "--workers", 0)
    scores = tmp_path / "o/random-3.jsonl"
    done = call(
        "eval", "vl-rewardbench", data, "--partial", "--judge", "length", "--judge-scores", f"theirs={scores}", "--json"
    )
    found = json.loads(done.stdout)
    assert [judge["name"] for judge in found["judges"]] == ["length", "theirs"]
    assert found["judges"][1]["source"] == str(scores)


def test_bad_records_are_exit_code_1(data, tmp_path):
    (tmp_path / "images/b.png").write_bytes(b"no image")
    words = ("eval", "vl-rewardbench", data, "--partial", "--judge", "demo", "--out", tmp_path / "o", "--workers", 0)
    done = call(*words)
    assert done.exit_code == 1 and "3 items have no scores" in done.stderr and "data.jsonl:2" in done.stderr
    done = call(*words, "--skip-bad")
    assert done.exit_code == 1 and "Accuracy" in done.stdout
    assert not done.stderr or "error" not in done.stderr


def test_records_that_cannot_be_read_are_exit_code_1_too(tmp_path):
    rows = [
        {"prompt": f"q{n}", "responses": ["a", "b"][: 2 - (n == 3)], "rankings": [1, 2][: 2 - (n == 3)]}
        for n in range(5)
    ]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ("eval", "preferences", tmp_path / "d.jsonl", "--judge", "length", "--out", tmp_path / "o")
    done = call(*words)
    assert done.exit_code == 1 and "d.jsonl:4" in done.stderr and "--skip-bad" in done.stderr
    done = call(*words, "--skip-bad")
    assert done.exit_code == 1 and "Accuracy" in done.stdout


def test_the_list_names_every_benchmark():
    text = call("eval", "--list").stdout
    rows = json.loads(call("eval", "--list", "--json").stdout)
    assert [row["name"] for row in rows] == benchmarks.names()
    for row in rows:
        assert f"{row['name']}: {row['title']}" in text
        assert row["hub"] is None or f"https://huggingface.co/datasets/{row['hub']}" in text


def test_a_download_says_how_to_go_on(monkeypatch, tmp_path):
    import huggingface_hub

    calls = []

    def download(repo, **options):
        calls.append((repo, options))
        return str(options["local_dir"])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    done = call("eval", "vl-rewardbench", "--download", tmp_path / "vl", "--revision", "main")
    assert done.exit_code == 0 and f"yojo eval vl-rewardbench {tmp_path / 'vl'} --judge" in done.stdout
    assert calls[0][0] == benchmarks.get("vl-rewardbench").hub and calls[0][1]["revision"] == "main"


@pytest.mark.parametrize(
    ("out", "said"), [((), "is lost: --out FOLDER keeps it"), (("--out", "out"), "is kept, and the same")]
)
def test_a_stopped_run_says_whether_it_kept_anything(out, said, data, tmp_path, monkeypatch):
    def stopped(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("yojo.evaluation.evaluate.evaluate", stopped)
    monkeypatch.chdir(tmp_path)
    result = call("eval", "vl-rewardbench", data, "--judge", "length", *out)
    assert result.exit_code == 130 and f"stopped: what was scored {said}" in result.output


FILE = object()
MISTAKES = [
    ((), "name a benchmark; yojo eval --list shows them"),
    (("vl-rewardbench", FILE), "there is no judge"),
    (("vl-rewardbank", FILE), "did you mean vl-rewardbench"),
    (("vl-rewardbench", "--judge", "length"), "data is missing: where the records of vl-rewardbench lie"),
    (("vl-rewardbank", FILE, "--judge", "length"), "did you mean vl-rewardbench"),
    (("vl-rewardbench", FILE, "--judge", "length"), "general: 183 published, 2 found.*--partial"),
    (("vl-rewardbench", "none.jsonl", "--judge", "length"), "none.jsonl"),
    (("vl-rewardbench", FILE, "--judge", "length", "--judge", "length"), "two judges are called length: name them"),
    (("vl-rewardbench", FILE, "--judge", "a=length", "--judge-scores", "a=no"), "--judge-scores: there is no no"),
    (("vl-rewardbench", FILE, "--partial", "--judge", "length", "--shard", "2/2"), "--shard is i/n"),
    (("vl-rewardbench", FILE, "--partial", "--judge", "length", "--shard", "0/2"), "shards are put together from a folder"),
    (("vl-rewardbench", FILE, "--partial", "--judge", "place", "--orders", "0"), "orders must be an int of at least 1"),
    (("vl-rewardbench", FILE, "--partial", "--judge", "length", "--workers", "-1"), "workers must be 0 or more"),
    (("vl-rewardbench", FILE, "--partial", "--judge", "demo#sideways"), "what stands behind # must be a mode"),
    (("vl-rewardbench", FILE, "--partial", "--judge", "demo#permutations=0"), "permutations must be at least 1"),
    (("vl-rewardbench", FILE, "--partial", "--judge", "demo", "--base-model", "x"), "--base-model is given with --judge demo"),
    (("vl-rewardbench", FILE, "--judge", "length", "--format", "trl"), "format is for preferences only"),
    (("vl-rewardbench", FILE, "--judge", "length", "--revision", "x"), "--revision is for --download"),
    (("vl-rewardbench", FILE, "--judge", "length", "--map", "query"), "--map must be field=column"),
    (("preferences", FILE, "--judge", "length"), "these columns fit no known format"),
]  # fmt: skip


@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_mistakes_are_one_line(words, message, data, tmp_path, monkeypatch):
    import re

    monkeypatch.chdir(tmp_path)
    done = call("eval", *(data if word is FILE else word for word in words))
    assert done.exit_code == 2 and "Traceback" not in done.output
    assert re.search(message, done.stderr), done.stderr

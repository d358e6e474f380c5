"""`yojo data check`: what it counts, what it finds, and how it exits."""

import json
import sys

import pyarrow
import pytest
from data_cases import GOOD, png, write_lines
from PIL import Image
from pyarrow import parquet
from typer.testing import CliRunner

from yojo import data
from yojo.cli import app
from yojo.data import checking


@pytest.fixture()
def mixed(tmp_path):
    """A JSONL file with five good records and six bad ones, each bad in its own way."""
    (tmp_path / "a.png").write_bytes(png((32, 32)))
    (tmp_path / "cut.png").write_bytes(png((64, 64))[:90])
    (tmp_path / "v").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32)).save(tmp_path / "v" / f"{i}.png")
    return write_lines(
        tmp_path / "mixed.jsonl",
        [
            GOOD | {"image": "a.png"},  # 1
            "",
            GOOD | {"image": "no.png"},  # 3, bad
            '{"prompt": ',  # 4, bad
            GOOD | {"responses": ["same", "same", "x"], "rankings": [1, 1, 2]},  # 5: a duplicate and a tie
            GOOD | {"image": "cut.png"},  # 6, bad
            GOOD | {"rankings": [1, 2, 4]},  # 7, bad
            {"prompt": "Which?", "responses": ["a", "b"], "targets": [0.25, 0.75]},  # 8
            GOOD | {"rankings": [1, 1, 1]},  # 9, bad
            GOOD | {"video": "v"},  # 10
            GOOD | {"responses": ["seven", "", "x"]},  # 11, bad
            {"prompt": "Which?" * 50, "responses": [f"{i}" for i in range(10)], "rankings": list(range(1, 11))},  # 12
        ],
    )


def test_what_it_counts(mixed):
    (report,) = checking.check([mixed]).files
    assert (report.records, report.good, report.format) == (11, 5, "yojo")
    assert [bad.line for bad in report.bad] == [3, 4, 6, 7, 9, 11] and {bad.file for bad in report.bad} == {str(mixed)}
    reasons = [bad.reason for bad in report.bad]
    for reason, expected in zip(
        reasons,
        (
            "image 0: no such file",
            "not JSON",
            "image 0: ",
            "rankings [1, 2, 4] have gaps",
            "all 3 resp",
            "response 1 is",
        ),
        strict=True,
    ):
        assert reason.startswith(expected)
    assert "cut.png is not a readable image" in reasons[2]
    assert report.responses == {3: 3, 2: 1, 10: 1} and report.ranks == {3: 2, 2: 1, 10: 1}
    assert (report.ties, report.duplicates, report.targets, report.all_tied) == (1, 1, 1, 0)
    assert (report.images, report.videos, report.untimed, report.missing_media) == (1, 1, 1, 2)
    assert checking.spread(report.prompt_characters) == [6, 12, 300] and report.tokens == []
    assert len(report.response_characters) == 3 * 3 + 2 + 10 and report.longest == ("mixed.jsonl:12", 310)


def test_options_turn_bad_records_into_good_ones(mixed):
    (report,) = checking.check([mixed], keep_tied=True, close_gaps=True).files
    assert [bad.line for bad in report.bad] == [3, 4, 6, 11] and report.all_tied == 1 and report.ties == 2
    assert checking.Report([report]).exit_code() == 1 and checking.Report([report]).exit_code(skip_bad=True) == 0


def test_tokens_are_those_the_collator_packs(tmp_path, make_reward_model):
    reward_model = make_reward_model(mode="isolated")
    (tmp_path / "a.png").write_bytes(png((32, 32)))
    path = write_lines(tmp_path / "a.jsonl", [GOOD, GOOD | {"image": "a.png", "prompt": "Which digit is this?"}])
    (report,) = checking.check([path], processor=reward_model.processor).files
    encoded = [reward_model.collator.encode(example) for example in data.load(path)]
    assert report.tokens == [item.num_tokens(reward_model.config) for item in encoded]
    assert report.longest == ("a.jsonl:2", max(report.tokens))


def test_what_the_processor_refuses_is_bad(tmp_path, make_reward_model):
    path = write_lines(tmp_path / "a.jsonl", [GOOD, GOOD | {"prompt": "Which <|image_pad|>?"}])
    (report,) = checking.check([path], processor=make_reward_model().processor).files
    assert [bad.line for bad in report.bad] == [2] and "contains the placeholder" in report.bad[0].reason
    assert sum(report.responses.values()) == 1  # a bad record is in no count


def test_files_without_a_good_record(tmp_path):
    lines = write_lines(tmp_path / "a.jsonl", ["x", "[1]"])
    empty = tmp_path / "b.jsonl"
    empty.write_bytes(b"")
    good = write_lines(tmp_path / "c.jsonl", [GOOD])
    report = checking.check([lines, empty, good])
    assert [bad.line for bad in report.files[0].bad] == [1, 2] and report.files[0].error is None
    assert report.files[1].error == f"{empty}: no records: the file is empty" and report.unreadable == [report.files[1]]
    assert report.total.records == 3 and report.total.good == 1 and report.exit_code(skip_bad=True) == 1
    assert checking.Report([report.files[0]]).exit_code(skip_bad=True) == 1  # nothing is left
    assert checking.Report([report.files[2]]).exit_code() == 0


def run(*arguments):
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments)])


def test_the_command_lists_every_bad_record(mixed, tmp_path):
    good = tmp_path / "good.parquet"
    parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 3), good)
    result = run(mixed, good, "--json", tmp_path / "out" / "report.json")
    assert result.exit_code == 1
    for line in (3, 4, 6, 7, 9, 11):
        assert f"{mixed}:{line}: " in result.stdout
    assert "8 of 14 records are good, 6 bad\n" in result.stdout
    assert "1 videos are frames without fps or sampling_interval: 4 seconds" in result.stdout
    assert "1 records have soft targets" in result.stdout
    assert "2 / 3 / 10" in result.stdout and "mixed.jsonl:12 (310)" in result.stdout and "total" in result.stdout
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [file["good"] for file in report["files"]] == [5, 3] and report["total"]["responses"]["3"] == 6
    assert report["total"]["prompt_characters"] == [6, 12, 300] and report["total"]["longest"]["length"] == 310
    assert report["total"]["bad"][0] == {
        "file": str(mixed), "line": 3, "reason": report["files"][0]["bad"][0]["reason"]
    }  # fmt: skip
    skipped = run(mixed, "--skip-bad")
    assert skipped.exit_code == 0 and f"{mixed}:11: " in skipped.stdout and "6 bad (skipped)" in skipped.stdout


def test_the_command_on_good_files(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"meta": {"question": "Which?"}, "better": "7", "worse": "2"}] * 2)
    mapped = ["--map", "prompt=meta.question", "--map", "chosen=better", "--map", "rejected=worse"]
    result = run(path, *mapped)
    assert result.exit_code == 0 and "all 2 records are good" in result.stdout and " trl " in result.stdout
    single = write_lines(tmp_path / "b.jsonl", [{"prompt": "Which?", "responses": ["7"]}])
    assert run(single).exit_code == 1 and run(single, "--unranked").exit_code == 0
    named = run(write_lines(tmp_path / "c.jsonl", [GOOD]), "--format", "yojo", "--image-root", tmp_path)
    assert named.exit_code == 0


def test_the_command_counts_tokens_with_a_model(tmp_path, backbone):
    backbone[1].save_pretrained(tmp_path / "model")
    path = write_lines(tmp_path / "a.jsonl", [GOOD])
    result = run(path, "--model", tmp_path / "model", "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    (file,) = json.loads((tmp_path / "report.json").read_text())["files"]
    assert file["tokens"][0] == file["longest"]["length"] > 10


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["missing.jsonl"], "missing.jsonl"),
        (["a.jsonl", "--format", "dpo"], "format must be auto or one of yojo, trl"),
        (["a.jsonl", "--map", "prompt"], "--map must be field=column, such as prompt=question, got 'prompt'"),
        (["a.jsonl", "--map", "prompt=a", "--map", "prompt=b"], "--map gives prompt twice: a and b"),
        (["a.jsonl", "--map", "prompt=txt"], "there is no column 'txt' (mapped to prompt); columns found: a, b"),
        (["a.jsonl"], "these columns fit no known format; columns found: a, b"),
        (["a.jsonl", "--image-root", "nowhere"], "image_root is no folder: nowhere"),
        (["a.jsonl", "--model", "empty"], "empty"),
    ],
)
def test_commands_that_make_no_sense(tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    write_lines(tmp_path / "a.jsonl", [{"a": 1, "b": 2}])
    result = run(*arguments)
    assert result.exit_code == 2 and message in result.output.replace("\n", " ")


def test_it_works_in_a_pipe(mixed):
    import subprocess

    command = [sys.executable, "-m", "yojo.cli", "data", "check", str(mixed)]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1 and result.stdout.isascii() and "\x1b" not in result.stdout
    assert f"{mixed}:4: not JSON" in result.stdout and "Traceback" not in result.stderr


def test_video_files_that_nothing_decodes_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr("yojo.data.checking.decode_video", lambda video, name: False)  # as without PyAV and torchcodec
    (tmp_path / "clip.mkv").write_bytes(b"0" * 64)
    record = {"prompt": "What happens?", "video": "clip.mkv", "responses": ["a", "b"], "rankings": [1, 2]}
    (tmp_path / "t.jsonl").write_text(json.dumps(record) + "\n")
    report = checking.check([tmp_path / "t.jsonl"])
    assert report.total.undecoded == report.to_dict()["total"]["undecoded"] == 1
    assert any(note.startswith("1 video files were not decoded: that needs PyAV") for note in checking.notes(report))

"""Preference data: readers, every format, the checks on records, mixtures and draws of responses."""

import base64
import itertools
import json
import os
import pickle
import random
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import hypothesis
import pyarrow
import pytest
import torch
from data_cases import GOOD, png, write_lines
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet

import yojo
from yojo import data, readers, sources
from yojo.images import load_image


def only(record, **options):
    """The example that one record in memory becomes."""
    return data.load([record], **options)[0]


# ---- readers ----


def test_lines_keep_their_numbers(tmp_path):
    path = write_lines(tmp_path / "train.jsonl", [GOOD, "", "  ", GOOD | {"prompt": "é?"}])
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n") + json.dumps(GOOD).encode())
    records = data.load(path)
    assert len(records) == 3 and records.name == "train.jsonl" and records.path == path and records.format == "yojo"
    assert records.columns == ["prompt", "responses", "rankings"]
    assert [example.id for example in records] == ["train.jsonl:1", "train.jsonl:4", "train.jsonl:5"]
    assert records[-2].prompt == "é?" and records.raw(1)["prompt"] == "é?" and records.where(1) == (str(path), 4)
    assert isinstance(records[0], yojo.Example) and records[0].rankings == [2, 1, 3]
    with pytest.raises(IndexError, match="record 3 of 3"):
        records[3]


def test_a_million_lines_are_not_parsed_at_load(tmp_path, monkeypatch):
    path = tmp_path / "long.jsonl"
    line = json.dumps(GOOD).encode() + b"\n"
    path.write_bytes(line * 1_000_000)
    calls = []
    parse = json.loads
    monkeypatch.setattr(readers.json, "loads", lambda text: calls.append(text) or parse(text))
    records = data.load(path)
    assert len(records) == 1_000_000 and 0 < len(calls) <= 50
    calls.clear()
    assert records[987_654].id == "long.jsonl:987655" and len(calls) == 1


@pytest.mark.parametrize("kind", ["jsonl", "json", "data", "parquet"])
def test_files_of_every_kind(tmp_path, kind):
    rows = [GOOD | {"prompt": f"Which digit? {i}"} for i in range(5)]
    if kind == "jsonl":
        path = write_lines(tmp_path / "a.jsonl", rows)
    elif kind == "parquet":
        path = tmp_path / "a.parquet"
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    else:
        path = tmp_path / "a.json"
        path.write_text(json.dumps({"data": rows, "version": 1} if kind == "data" else rows))
    for records in (data.load(path), pickle.loads(pickle.dumps(data.load(path)))):
        assert [records[i].prompt for i in (4, 0, 2, 1, 3)] == [rows[i]["prompt"] for i in (4, 0, 2, 1, 3)]
        assert records[4].id == f"{path.name}:5" and records.format == "yojo"


def test_a_change_of_the_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.png").write_bytes(png())
    records = data.load(write_lines(tmp_path / "a.jsonl", [GOOD | {"image": "a.png"}]).relative_to(tmp_path))
    records = pickle.loads(pickle.dumps(records))
    monkeypatch.chdir("/")
    assert load_image(records[0].images[0], "image").size == (8, 8)


def test_folders_and_lists_of_shards(tmp_path):
    folder = tmp_path / "data"
    for shard in (10, 9, 1):
        (folder / "train").mkdir(parents=True, exist_ok=True)
        table = pyarrow.Table.from_pylist([GOOD | {"prompt": f"{shard}-{i}"} for i in range(2)])
        parquet.write_table(table, folder / "train" / f"{shard}.parquet")
    (folder / "dataset_infos.json").write_text("{}")
    records = data.load(folder)
    assert [example.prompt for example in records] == ["1-0", "1-1", "9-0", "9-1", "10-0", "10-1"]
    assert records[3].id == "train/9.parquet:2" and records.where(3) == (str(folder / "train" / "9.parquet"), 2)
    paths = [folder / "train" / "10.parquet", write_lines(tmp_path / "more.jsonl", [GOOD])]
    assert [example.id for example in data.load(paths)] == ["10.parquet:1", "10.parquet:2", "more.jsonl:1"]


def test_parquet_is_read_by_row_group(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    rows = [GOOD | {"prompt": f"{i}" * 100} for i in range(9)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    read = []
    original = parquet.ParquetFile.read_row_group
    monkeypatch.setattr(
        parquet.ParquetFile, "read_row_group", lambda self, i, *a, **k: read.append(i) or original(self, i, *a, **k)
    )
    records = data.load(path)
    read.clear()
    for i in (0, 1, 2, 8, 7, 0):
        assert records[i].prompt == rows[i]["prompt"]
    assert read == [2]  # the first group is there since the format was looked for
    monkeypatch.setattr(readers.Parquet, "CACHE_BYTES", 1)
    for i in (3, 0, 3):
        assert records[i].prompt == rows[i]["prompt"]
    assert read == [2, 1, 0, 1]


def test_hub_datasets(tmp_path):
    datasets = pytest.importorskip("datasets")
    rows = [GOOD | {"image": {"bytes": png(), "path": None}}, GOOD | {"image": {"bytes": png()[:40], "path": None}}]
    made = datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())
    records = data.load(made)
    assert records.columns == ["prompt", "responses", "rankings", "image"] and records.path is None
    assert records[0].images[0].size == (8, 8) and records[0].id == "dataset:1"
    with pytest.raises(data.DataError, match=r"example 'dataset:2': cannot be read: "):
        records[1]
    with pytest.raises(TypeError, match=r"choose one, such as dataset\['train'\]"):
        data.load(datasets.DatasetDict(train=made))
    with pytest.raises(TypeError, match="a streamed dataset has no length"):
        data.load(made.to_iterable_dataset())
    with pytest.raises(data.DataError, match="no records: the dataset is empty"):
        data.load(made.select([]))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_forked_workers(tmp_path, kind):
    rows = [GOOD | {"prompt": f"question {i}"} for i in range(12)]
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        write_lines(path, rows)
    else:
        parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    records = data.load(path)
    records[0]  # opens the file before the workers start
    loader = torch.utils.data.DataLoader(
        records, batch_size=4, num_workers=2, collate_fn=list, multiprocessing_context="fork"
    )
    assert [example.prompt for batch in loader for example in batch] == [row["prompt"] for row in rows]


def test_a_worker_hands_on_the_record_that_is_bad(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [GOOD, GOOD | {"responses": ["a", ""], "rankings": [1, 2]}])
    loader = torch.utils.data.DataLoader(
        data.load(path), num_workers=1, collate_fn=list, multiprocessing_context="fork"
    )
    with pytest.raises(data.DataError, match="example 'a.jsonl:2': response 1 is empty"):
        list(loader)


@pytest.mark.parametrize(
    "name, content, message, line",
    [
        ("a.jsonl", b"", r"a\.jsonl: no records: the file is empty", None),
        ("a.jsonl", b"\n \n", r"a\.jsonl: no records: the file is empty", None),
        ("a.json", b"[]", r"a\.json: no records", None),
        ("a.json", b"  ", r"a\.json: no records", None),
        ("a.csv", b"prompt", r"a\.csv: unknown extension '\.csv': \.jsonl, \.json, \.parquet are read", None),
        ("a.parquet", b"PAR1 and so on", r"a\.parquet: not a complete Parquet file: ", None),
        ("a.json", b'[{"prompt": 1},\n {"prompt" 2}]', r"a\.json: line 2: not JSON: .* at column 12", 2),
        ("a.json", b'{"prompt": 1}\n{"prompt": 2}', r"line 2: .*one object a line is JSONL: name it \.jsonl", 2),
        ("a.json", b'{"prompt": 1}', r"must hold a list of records, .* this object has the keys prompt", None),
        ("a.json", b"7", "must hold a list of records, got int 7", None),
        ("a.json", b'["\xff"]', "not UTF-8 at byte 2", None),
        ("a.jsonl", b'\n{"prompt": }\n', r"example 'a\.jsonl:2': not JSON: Expecting value at column 12", 2),
    ],
)
def test_files_that_cannot_be_read(tmp_path, name, content, message, line):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(data.DataError, match=message) as caught:
        data.load(path)
    assert caught.value.file == str(path) and caught.value.line == line


def test_what_is_no_source(tmp_path):
    with pytest.raises(data.DataError, match=r"missing\.jsonl: no such file"):
        data.load(tmp_path / "missing.jsonl")
    with pytest.raises(data.DataError, match=r"the folder holds no \.jsonl, \.json, \.parquet file"):
        data.load(tmp_path)
    with pytest.raises(data.DataError, match="no records: the list is empty"):
        data.load([])
    with pytest.raises(TypeError, match=r"records come from a path, .* got int"):
        data.load(7)
    with pytest.raises(ValueError, match=r"image_root is no folder: nowhere"):
        data.load([GOOD], image_root="nowhere")


def test_truncated_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [GOOD | {"prompt": os.urandom(500).hex()} for _ in range(40)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=10)
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(data.DataError, match=r"a\.parquet: not a complete Parquet file"):
        data.load(path)
    broken = bytearray(whole)
    broken[2 * len(whole) // 4 : 3 * len(whole) // 4] = bytes(len(whole) // 4)  # the third row group
    path.write_bytes(broken)
    records = data.load(path)
    assert records[0].prompt == rows[0]["prompt"]
    with pytest.raises(data.DataError, match=r"example 'a\.parquet:26': row group 2 cannot be read") as caught:
        records[25]
    assert caught.value.line == 26


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"prompt": "x"', r"not JSON: .*; a JSONL line is one whole object"),
        (b"[1, 2]", r"a record must be an object with named fields, got list \[1, 2\]"),
        (b'{"prompt": "\xff"}', "not UTF-8: byte 0xff at byte 13 of the line; save the file as UTF-8"),
        (b"[" * 100_000, "not JSON: "),
    ],
)
def test_lines_that_cannot_be_read(tmp_path, line, message):
    path = tmp_path / "a.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(data.DataError, match=rf"example 'a\.jsonl:3': {message}") as caught:
        data.load(path)[1]
    assert (caught.value.file, caught.value.line) == (str(path), 3)


# ---- formats ----

TURNS = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Which digit?"}]


def said(text):
    return [{"role": "assistant", "content": text}]


def rated(*ratings):
    aspects = ("helpfulness", "honesty", "instruction_following", "truthfulness")
    return {aspect: {"Rating": r, "Rationale": "..."} for aspect, r in zip(aspects, ratings, strict=True)}


ULTRAFEEDBACK = {
    "source": "evol_instruct",
    "instruction": "Which digit?",
    "models": ["a", "b", "c"],
    "completions": [
        {"annotations": rated("4", "5", "3", "N/A"), "model": "a", "response": "seven", "overall_score": 7.5},
        {"annotations": rated("2", "5", "5", "4"), "model": "b", "response": "two", "overall_score": 6.0},
        {"annotations": rated("5", "5", "5", "4"), "model": "c", "response": "one", "overall_score": 8.0},
    ],
    "correct_answers": ["None"],
}
VLFEEDBACK = {
    "id": "LLaVA-Instruct-7",
    "prompt": "Which digit?",
    "img_path": "digit.png",
    "models": ["a", "b"],
    "completions": {  # as a table stores a sequence of objects
        "annotations": [
            {
                "Ethical Considerations": {"Rating": "5", "Rationale": ""},
                "Helpfulness": {"Rating": "3", "Rationale": ""},
                "Visual Faithfulness": {"Rating": "2", "Rationale": ""},
            },
            {
                "Ethical Considerations": {"Rating": "5", "Rationale": ""},
                "Helpfulness": {"Rating": "5", "Rationale": ""},
                "Visual Faithfulness": {"Rating": "4", "Rationale": ""},
            },
        ],
        "model": ["a", "b"],
        "response": ["two", "seven"],
    },
}
CRITIC = (
    "<image>\nGiven an image and a corresponding question, please serve as an unbiased and fair judge to evaluate the "
    "quality of the answers provided by a Large Multimodal Model (LMM). Determine which answer is better and explain "
    "your reasoning with specific details. Your task is provided as follows:\n"
    "Question: [Which digit [0-9]?]\nThe first response: [It is [maybe] a two.]\nThe second response: [A seven.]\nASSISTANT:\n"
)
ARENA = (
    "<image>\n<|User Prompt|>\nWhich digit?\n\n<|The Start of Assistant A's Answer|>\nseven\n"
    "<|The End of Assistant A's Answer|>\n\n<|The Start of Assistant B's Answer|>\ntwo\n"
    "<|The End of Assistant B's Answer|>"
)
LLAVA_BENCH = (
    "<image>\n[Context]\nA digit.\n\n[Question]\nWhich digit?\n\n[Assistant 1]\nseven\n\n[End of Assistant 1]\n\n"
    "[Assistant 2]\ntwo\n\n[End of Assistant 2]\n\n[System]\nRate them."
)
POINTWISE = (
    "<image>\nGiven an image and a corresponding question, please serve as an unbiased and fair judge. Score the response "
    "out of 100. Your task is provided as follows:\nQuestion: [Which digit?]\nThe LMM response: [seven]\nASSISTANT:\n"
)


def critic(human, gpt, **more):
    return {
        "id": "vlfeedback_7",
        "data_source": "vlfeedback",
        "conversations": [{"from": "human", "value": human}, {"from": "gpt", "value": gpt}],
        **more,
    }


RECORDS = {
    "yojo": (GOOD, "yojo", "Which digit?", ["seven", "two", "one"], [2, 1, 3]),
    "question": (
        {"question": "Which digit?", "responses": ["7", "2"], "rankings": [1.0, 1.0], "source": "x"},
        "yojo", "Which digit?", ["7", "2"], [1, 1],
    ),
    "soft": (
        {"prompt": TURNS, "responses": ["7", "2"], "targets": [1, 0]}, "yojo", TURNS, ["7", "2"], [1.0, 0.0],
    ),
    "trl": (
        {"prompt": "Which digit?", "chosen": "7", "rejected": "2"}, "trl", "Which digit?", ["7", "2"], [1, 2],
    ),
    "trl messages": (
        {"prompt": TURNS, "chosen": said("7"), "rejected": said([{"type": "text", "text": "2", "index": None}])},
        "trl", TURNS, ["7", "2"], [1, 2],
    ),
    "trl implicit": (
        {"chosen": [*TURNS, *said("7")], "rejected": [*TURNS, *said("2")]}, "trl", TURNS, ["7", "2"], [1, 2],
    ),
    "ultrafeedback binarized": (
        {"prompt": "Which digit?", "chosen": [*TURNS, *said("7")], "rejected": [*TURNS, *said("2")], "score_chosen": 8.0},
        "trl", TURNS, ["7", "2"], [1, 2],
    ),
    "trl, the prompt twice": (
        {"prompt": TURNS[1:], "chosen": [*TURNS, *said("7")], "rejected": [*TURNS, *said("2")]},
        "trl", TURNS, ["7", "2"], [1, 2],
    ),
    "trl, the prompt in two pieces": (
        {"prompt": TURNS[:1], "chosen": [TURNS[1], *said("7")], "rejected": [TURNS[1], *said("2")]},
        "trl", TURNS, ["7", "2"], [1, 2],
    ),
    "hh-rlhf": (
        {
            "chosen": "\n\nHuman: Hello\n\nAssistant: Yes?\n\nHuman: Which digit?\n\nAssistant: 7",
            "rejected": "\n\nHuman: Hello\n\nAssistant: Yes?\n\nHuman: Which digit?\n\nAssistant: 2",
        },
        "trl",
        [{"role": "user", "content": "Hello"}, *said("Yes?"), {"role": "user", "content": "Which digit?"}],
        ["7", "2"], [1, 2],
    ),
    "rewardbench2": (
        {
            "id": "7", "prompt": "Which digit?", "chosen": ["7"], "rejected": ["2", "1", "0"], "num_correct": 1,
            "num_incorrect": 3, "total_completions": 4, "models": ["a", "b", "c", "d"], "subset": "Factuality",
        },
        "rewardbench2", "Which digit?", ["7", "2", "1", "0"], [1, 2, 2, 2],
    ),
    "nectar": (
        {
            "prompt": "\n\nHuman: Which digit?\n\nAssistant: ",
            "answers": [
                {"answer": "seven", "model": "a", "rank": 1.0},
                {"answer": "two", "model": "b", "rank": 2.0},
                {"answer": "one", "model": "c", "rank": 3.0},
            ],
            "turns": 1, "num_responses": 3, "source": ["sharegpt"], "good_natured": True,
        },
        "nectar", "Which digit?", ["seven", "two", "one"], [1, 2, 3],
    ),
    "nectar turns": (
        {
            "prompt": "\n\nHuman: Hello\n\nAssistant: Yes?\n\nHuman: Which digit?\nHuman: I mean it.\n\nAssistant:",
            "answers": {"answer": ["seven", "two"], "model": ["a", "b"], "rank": [2, 1]},
        },
        "nectar",
        [
            {"role": "user", "content": "Hello"}, *said("Yes?"),
            {"role": "user", "content": "Which digit?\nHuman: I mean it."},
        ],
        ["seven", "two"], [2, 1],
    ),
    # Means 4, 4 and 4.75: an aspect without a rating counts for nothing.
    "ultrafeedback": (ULTRAFEEDBACK, "ultrafeedback", "Which digit?", ["seven", "two", "one"], [2, 2, 1]),
    "vlfeedback": (VLFEEDBACK, "vlfeedback", "Which digit?", ["two", "seven"], [2, 1]),
    "rlaifv": (
        {
            "ds_name": "RLAIF-V", "image": {"bytes": png(), "path": "digit.jpg"}, "question": "Which digit?",
            "chosen": "7", "rejected": "2", "origin_dataset": "mnist", "origin_split": "{}", "idx": "7",
            "image_path": "elsewhere/digit.jpg",
        },
        "rlaifv", "Which digit?", ["7", "2"], [1, 2],
    ),
    "critic": (
        critic(CRITIC, "The second response is better, as it says so.\nThe better response: [second]"),
        "llava_critic", "Which digit [0-9]?", ["It is [maybe] a two.", "A seven."], [2, 1],
    ),
    "critic A": (
        critic(CRITIC, "A better response is a short one. The better response: [A]", image={"bytes": png(), "path": None}),
        "llava_critic", "Which digit [0-9]?", ["It is [maybe] a two.", "A seven."], [1, 2],
    ),
    "critic equal": (
        critic(CRITIC, "Both miss the point. The two responses are equally good."),
        "llava_critic", "Which digit [0-9]?", ["It is [maybe] a two.", "A seven."], [1, 1],
    ),
    "critic arena": (
        critic(ARENA, "My own answer: seven. Assistant A sees it.\n\nMy final verdict is: [[A>>B]]"),
        "llava_critic", "Which digit?", ["seven", "two"], [1, 2],
    ),
    "critic scores": (
        critic(LLAVA_BENCH, "6 8\nAssistant 2 ..."), "llava_critic", "Which digit?", ["seven", "two"], [2, 1],
    ),
    "nemo": (
        {
            "context": TURNS,
            "completions": [{"rank": 1, "completion": said("2")}, {"rank": 0, "completion": said("7")}],
        },
        "nemo_rl", TURNS, ["2", "7"], [2, 1],
    ),
    "nemo string": (
        {
            "context": "Which digit?",
            "completions": [{"rank": 1, "completion": "7"}, {"rank": 2, "completion": "2"}],
            "task_name": "x",
        },
        "nemo_rl", "Which digit?", ["7", "2"], [1, 2],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDS)
def test_formats(name, tmp_path):
    record, format, prompt, responses, rankings = RECORDS[name]
    (tmp_path / "digit.png").write_bytes(png())
    for chosen in ("auto", format):
        records = data.load([record], format=chosen, image_root=tmp_path, keep_tied=True)
        assert records.format == format
        example = records[0]
        assert (example.prompt, example.responses, example.rankings) == (prompt, responses, rankings)
        assert len(example.images) == sum(key in record for key in ("image", "img_path"))


def test_critic_with_one_response(tmp_path):
    record = critic(POINTWISE, "The response is right.\nScore: 95")
    example = only(record, ranked=False)
    assert (example.prompt, example.responses, example.rankings) == ("Which digit?", ["seven"], None)
    with pytest.raises(data.DataError, match="one response only: there is nothing to compare"):
        only(record)
    caption = "<image>\nText Caption: A handwritten seven.\nFrom 0 to 100, how correct is it?"
    assert only(critic(caption, "Final Score: 80"), ranked=False).responses == ["A handwritten seven."]


@pytest.mark.parametrize(
    "record, message",
    [
        (
            critic("<image>\nWhich digit?", "Seven."),
            "conversations hold no LLaVA-Critic judgment: .* begins 'Which digit",
        ),
        (critic(CRITIC, "Hard to say."), "no verdict can be read from the judgment 'Hard to say.'"),
        (critic(ARENA, "[[C]]"), "no verdict can be read"),
        (critic(LLAVA_BENCH, "Both are fine"), "no verdict can be read"),
        ({"conversations": [{"from": "human", "value": "x"}]}, r"has a human turn and a gpt turn, got \['human'\]"),
        ({"conversations": "x"}, "conversations must be a list of objects, got str"),
        (critic(CRITIC, None), "need a string under 'value'"),
    ],
)
def test_critic_records_that_cannot_be_parsed(record, message):
    with pytest.raises(data.DataError, match=f"example 'records:1': .*{message}"):
        only(record)


def ultrafeedback(**changes):
    first = ULTRAFEEDBACK["completions"][0]
    return ULTRAFEEDBACK | {"completions": [first | changes, *ULTRAFEEDBACK["completions"][1:]]}


@pytest.mark.parametrize(
    "record, message",
    [
        (GOOD | {"responses": None}, "responses must be a list of strings, got nothing; the record has prompt, resp"),
        (GOOD | {"responses": "seven"}, "responses must be a list of strings, got str"),
        (GOOD | {"responses": []}, "no responses: at least one is needed"),
        (GOOD | {"responses": ["seven", " ", "x"]}, "response 1 is empty"),
        (GOOD | {"responses": ["seven", "two", 1]}, "response 2 must be a string, got int"),
        (GOOD | {"prompt": None}, "no prompt or question; the record has prompt, responses, rankings"),
        (GOOD | {"prompt": " "}, "the prompt is empty"),
        (GOOD | {"prompt": 7}, "prompt must be a string or a list of chat messages"),
        (GOOD | {"prompt": [{"role": "user"}]}, "a chat message must be a dict with role and content"),
        (GOOD | {"prompt": said("x")}, "ends with an assistant turn"),
        (GOOD | {"rankings": None}, "no rankings: training needs one rank per response, 1 = best"),
        (GOOD | {"rankings": "1, 2, 3"}, "rankings must be a list, got str"),
        (GOOD | {"rankings": [1, 2]}, "2 rankings for 3 responses: one rank per response"),
        (GOOD | {"rankings": [1, 2, "3"]}, "a rank must be a number, got '3' in"),
        (GOOD | {"rankings": [1, 2, True]}, "a rank must be a number, got True in"),
        (GOOD | {"rankings": [1, 2, None]}, "a rank must be a number, got None in"),
        (GOOD | {"rankings": [1, 2, float("nan")]}, "a rank must be a finite number, got nan"),
        (GOOD | {"rankings": [0, 1, 2]}, r"rankings \[0, 1, 2\] must start at 1, .* ranks start at 0 here, add 1"),
        (GOOD | {"rankings": [-1, 1, 2]}, "must start at 1, which is the best$"),
        (GOOD | {"rankings": [1, 2, 4]}, r"rankings \[1, 2, 4\] have gaps: make them \[1, 2, 3\], or .*--close-gaps"),
        (GOOD | {"rankings": [2, 2, 3]}, r"have gaps: make them \[1, 1, 2\]"),
        (GOOD | {"rankings": [1.5, 1.5, 3]}, r"are not whole numbers: make them \[1, 1, 2\]"),
        (GOOD | {"rankings": [1, 1, 1]}, r"all 3 responses are tied .*keep_tied=True \(--keep-tied\)"),
        (GOOD | {"responses": ["seven"], "rankings": [1]}, "one response only: there is nothing to compare"),
        (GOOD | {"targets": [1, 0, 0]}, "both rankings and targets are given"),
        ({"prompt": "x", "responses": ["a", "b"], "targets": [1]}, "1 targets for 2 responses"),
        ({"prompt": "x", "responses": ["a", "b"], "targets": [1, 1]}, "targets must sum to 1, got .* sum to 2"),
        ({"prompt": "x", "responses": ["a", "b"], "targets": [1, -1]}, "a target must be a number from 0 to 1, got -1"),
        (
            {"prompt": "x", "chosen": "a", "rejected": None},
            "rejected must be a string or a list of messages, got nothing",
        ),
        ({"prompt": "x", "chosen": "a", "rejected": said("b")}, "must both be strings or both be lists"),
        ({"chosen": "a", "rejected": "b"}, "no prompt, and chosen and rejected are not two .* transcripts"),
        ({"chosen": said("a"), "rejected": said("b")}, "no prompt: chosen and rejected do not begin with the same"),
        ({"prompt": "x", "chosen": [], "rejected": said("b")}, "chosen is an empty list of messages"),
        ({"prompt": "x", "chosen": [], "rejected": ["a", "b"]}, "chosen is empty: no response has rank 1"),
        (
            {"chosen": [*TURNS, *said("a"), TURNS[1], *said("b")], "rejected": [*TURNS, *said("c")]},
            r"chosen must be one assistant message, got the roles \['assistant', 'user', 'assistant'\]",
        ),
        (
            {"prompt": "Another?", "chosen": [*TURNS, *said("a")], "rejected": [*TURNS, *said("c")]},
            "prompt and chosen disagree",
        ),
        (
            {
                "prompt": [*TURNS, *said("?"), TURNS[1]],
                "chosen": [*TURNS, *said("a")],
                "rejected": [*TURNS, *said("c")],
            },
            "prompt and chosen disagree: they share some messages",
        ),
        ({"prompt": "x", "chosen": said([{"type": "image"}]), "rejected": said("b")}, "chosen must be text alone"),
        ({"prompt": "x", "chosen": ["a"], "rejected": []}, "one response only"),
        ({"prompt": "x", "chosen": ["a", "b"], "rejected": []}, "all 2 responses are tied"),
        ({"prompt": "Which digit?", "answers": [{"answer": "a", "rank": 1}]}, "the prompt is not in the wrapper"),
        ({"prompt": "\n\nHuman: \n\nAssistant:", "answers": [{"answer": "a", "rank": 1}]}, "the prompt is empty"),
        (
            ultrafeedback(annotations=rated("N/A", "N/A", "N/A", "n/a")),
            "completion 0 has no numeric rating in any aspect",
        ),
        (ultrafeedback(annotations=rated("4", "good", "3", "3")), "completion 0: honesty is rated 'good', which is no"),
        (ultrafeedback(annotations=rated("4/5", "3", "3", "3")), "helpfulness is rated '4/5', which is no number"),
        (ultrafeedback(annotations=None), "completion 0 has no annotations to rank it by"),
        (ultrafeedback(response=None), "response 0 must be a string, got NoneType"),
        (ULTRAFEEDBACK | {"completions": []}, "no responses"),
        (VLFEEDBACK | {"completions": {"response": ["a"], "annotations": []}}, "columns of completions have different"),
        ({"context": "x", "completions": [{"rank": 0, "completion": [*TURNS]}]}, "completion 0 must be one assistant"),
        (
            {"context": "x", "completions": [{"completion": "a"}, {"completion": "b"}]},
            "a rank must be a number, got None",
        ),
        (
            {"context": "x", "completions": [{"rank": 0, "completion": "a"}, {"rank": 2, "completion": "b"}]},
            "have gaps",
        ),
        (GOOD | {"fps": 0}, "fps must be a number above 0, got 0"),
        (GOOD | {"sampling_interval": "4"}, "sampling_interval must be a number above 0, got '4'"),
        (GOOD | {"fps": 1, "sampling_interval": 1}, "both fps .* and sampling_interval .* are given"),
    ],
)
def test_records_that_cannot_be_used(tmp_path, record, message):
    path = write_lines(tmp_path / "a.jsonl", ["", record])
    with pytest.raises(data.DataError, match=rf"^example 'a\.jsonl:2': .*({message})") as caught:
        data.load(path, image_root=tmp_path)[0]
    assert (caught.value.file, caught.value.line) == (str(path), 2)
    assert pickle.loads(pickle.dumps(caught.value)).line == 2


@pytest.mark.parametrize("rankings", [[1, 1, 2], [1, 1, 3], [1, 2, 2], [3, 1, 2], [1, 2, 2, 4], [1, 2, 2, 3]])
def test_dense_and_competition_ranks_pass(rankings):
    record = {"prompt": "x", "responses": ["a", "b", "c", "d"][: len(rankings)], "rankings": rankings}
    assert only(record).rankings == rankings


def test_options_on_ranks():
    assert only(GOOD | {"rankings": [2, 2, 7]}, close_gaps=True).rankings == [1, 1, 2]
    assert only(GOOD | {"rankings": [1.5, 1.5, 3]}, close_gaps=True).rankings == [1, 1, 2]
    assert only(GOOD | {"rankings": [1, 1, 1]}, keep_tied=True).rankings == [1, 1, 1]
    for record in ({"prompt": "x", "responses": ["a"]}, GOOD | {"rankings": [1, 1, 1]}):
        assert only(record, ranked=False).rankings == record.get("rankings")
    with pytest.raises(data.DataError, match="have gaps"):
        only(GOOD | {"rankings": [1, 2, 4]}, ranked=False)
    with pytest.raises(data.DataError, match="must start at 1"):
        only(GOOD | {"rankings": [0, 1, 2]}, close_gaps=True)


def test_column_maps():
    record = {"meta": {"question": "Which digit?", "n": [1, 2]}, "dotted.name": ["7", "2"]}
    columns = {"prompt": "meta.question", "responses": "dotted.name", "rankings": "meta.n"}
    records = data.load([record], columns=columns)
    assert records.format == "yojo" and records[0].prompt == "Which digit?" and records[0].rankings == [1, 2]
    pair = {"text": "Which digit?", "better": "7", "worse": "2"}
    mapped = only(pair, columns={"prompt": "text", "chosen": "better", "rejected": "worse"})
    assert mapped.responses == ["7", "2"]
    with pytest.raises(
        data.ColumnError, match=r"no column 'txt' \(mapped to prompt\); columns found: text, better, worse"
    ):
        data.load([pair], columns={"prompt": "txt"})
    with pytest.raises(
        data.ColumnError, match=r"fit no known format; columns found: text, better, worse\n(.|\n)*nectar:"
    ):
        data.load([pair])
    with pytest.raises(ValueError, match="columns maps 'promt', which is no field; fields are .*prompt"):
        data.load([pair], columns={"promt": "text"})
    with pytest.raises(ValueError, match="columns maps 'prompt' to 7, which is no name"):
        data.load([pair], columns={"prompt": 7})
    with pytest.raises(ValueError, match="format must be auto or one of yojo, trl, .* got 'dpo'"):
        data.load([pair], format="dpo")
    with pytest.raises(data.DataError, match="no prompt or question"):  # this record lacks what the others have
        data.load([record, {"meta": None, "dotted.name": ["7", "2"]}], columns=columns)[1]


def test_every_format_says_what_it_needs():
    assert set(sources.COLUMNS) == set(sources.FORMATS)


# ---- images ----


def test_images_in_every_form(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    path = write_lines(
        tmp_path / "a.jsonl",
        [
            GOOD | {"image": "images/a.png"},
            GOOD | {"image": ["images/a.png", "images/a.png"]},
            GOOD | {"images": ["images/a.png"], "image": None},
            GOOD | {"image": "data:image/png;base64," + base64.b64encode(png()).decode()},
            GOOD | {"image": (tmp_path / "images" / "a.png").as_uri()},
            GOOD | {"image": {"path": str(tmp_path / "images" / "a.png"), "bytes": None}},
            GOOD | {"image": ""},
        ],
    )
    records = data.load(path)
    assert [len(example.images) for example in records] == [1, 2, 1, 1, 1, 1, 0]
    assert all(load_image(image, "image").size == (8, 8) for example in records for image in example.images)
    assert records[0].images == [os.path.join(tmp_path, "images", "a.png")]  # a path, not yet read
    picture = Image.new("RGB", (8, 8))
    example = only(GOOD | {"images": [png(), {"bytes": png(), "path": "a.png"}, picture]})
    assert example.images == [png(), png(), picture]
    elsewhere = write_lines(tmp_path / "images" / "b.jsonl", [GOOD | {"image": "../images/a.png"}])
    assert load_image(data.load(elsewhere)[0].images[0], "image").size == (8, 8)
    assert load_image(data.load(elsewhere, image_root=tmp_path / "images")[0].images[0], "image").size == (8, 8)


def test_images_inside_messages(tmp_path, make_reward_model):
    (tmp_path / "a.png").write_bytes(png((32, 32)))
    parts = [
        {"type": "image", "text": None, "image": "a.png"},
        {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64," + base64.b64encode(png((32, 32))).decode()},
        },
        {"type": "image", "text": None},
        {"type": "text", "text": "Which digit?", "image": None},
    ]
    record = GOOD | {"prompt": [{"role": "user", "content": parts}], "images": ["a.png"]}
    example = data.load(write_lines(tmp_path / "a.jsonl", [record]))[0]
    expected = yojo.Example("Which digit?", GOOD["responses"], images=[png((32, 32))] * 3, rankings=[2, 1, 3])
    collator = make_reward_model().collator
    batch, other = collator([example]), collator([expected])
    assert torch.equal(batch["input_ids"], other["input_ids"])
    assert torch.equal(batch["pixel_values"], other["pixel_values"])
    missing = GOOD | {"prompt": [{"role": "user", "content": [{"type": "image", "image": "no.png"}, parts[3]]}]}
    with pytest.raises(data.MediaError, match="an image of the prompt: no such file"):
        data.load(write_lines(tmp_path / "b.jsonl", [missing]))[0]


@pytest.mark.parametrize(
    "image, message",
    [
        ("no.png", r"image 0: no such file: .*no\.png; relative paths start at image_root \(--image-root\), .* here"),
        ("folder", r"image 0: a folder, not an image: .*folder"),
        (
            "https://example.org/a.png",
            r"image 0: https://example\.org/a\.png is a URL: .*allow_urls=True \(--allow-urls\)",
        ),
        ("data:image/png;base64,@@", "image 0: the data URL data:image/png;base64.* cannot be read"),
        ("data:image/png,abc", r".* must be data:image/\.\.\.;base64,"),
        ({"bytes": None, "path": None}, r"image 0 has neither bytes nor path: \['bytes', 'path'\]"),
        ([None], "image 0 is empty"),
        ([""], "image 0 is empty"),
    ],
)
def test_images_that_are_not_there(tmp_path, image, message):
    (tmp_path / "folder").mkdir()
    path = write_lines(tmp_path / "a.jsonl", [GOOD | {"image": image}])
    with pytest.raises(data.MediaError, match=rf"example 'a\.jsonl:1': {message}"):
        data.load(path)[0]


def test_urls_are_fetched_when_allowed(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/a.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(png() if found else b"")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert only(GOOD | {"image": f"{address}/a.png"}, allow_urls=True).images == [png()]
        with pytest.raises(data.MediaError, match="image 0: .*/b.png cannot be fetched: HTTP Error 404"):
            only(GOOD | {"image": f"{address}/b.png"}, allow_urls=True)
    finally:
        server.shutdown()
        server.server_close()


# ---- mixtures ----


@hypothesis.settings(max_examples=60, deadline=None)
@hypothesis.given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    weights=st.lists(st.sampled_from([0.1, 0.25, 0.3, 0.5, 1, 1.5, 2, 3.7]), min_size=4, max_size=4),
    epochs=st.integers(1, 7),
    seed=st.integers(0, 3),
)
def test_every_record_is_seen_as_often_as_its_weight_says(sizes, weights, epochs, seed):
    weights = weights[: len(sizes)]
    mixture = data.Mixture([range(100 * s, 100 * s + size) for s, size in enumerate(sizes)], weights)
    seen = [index for epoch in range(epochs) for index in mixture.order(epoch, seed)]
    start = 0
    for size, weight in zip(sizes, weights, strict=True):
        per_epoch = max(1, int(weight * size + 0.5 + 1e-9))
        counts = {seen.count(index) for index in range(start, start + size)}
        # Never is one record seen twice more than another.
        low = epochs * per_epoch // size
        assert counts <= {low, low + 1} and sum(start <= index < start + size for index in seen) == epochs * per_epoch
        start += size
    assert all(len(mixture) == len(mixture.order(epoch, seed)) for epoch in range(epochs))


def test_halves_and_doubles():
    mixture = data.Mixture([[f"a{i}" for i in range(6)], [f"b{i}" for i in range(4)], ["c0"]], [0.5, 1, 2])
    assert len(mixture) == 3 + 4 + 2
    epochs = [[mixture[i] for i in mixture.order(epoch, 0)] for epoch in range(4)]
    halves = [{name for name in epoch if name[0] == "a"} for epoch in epochs]
    assert len(halves[0]) == 3 and halves[0] | halves[1] == {f"a{i}" for i in range(6)} == halves[2] | halves[3]
    assert halves[0] != halves[2]  # the next round is shuffled anew
    assert all(epoch.count("c0") == 2 for epoch in epochs)
    assert mixture.order(1, 0) == mixture.order(1, 0) != mixture.order(1, 1)
    assert sorted(epochs[0], key=lambda name: name[0]) != epochs[0]  # sources are mixed, not one behind the other
    assert mixture.locate(6) == (1, 0) and mixture[10] == "c0"
    with pytest.raises(IndexError, match="record 11 of 11"):
        mixture[11]


def test_the_order_is_the_same_everywhere():
    # Written down once: other processes, machines and Python versions must come to the same.
    mixture = data.Mixture([range(3), range(2)], [1, 2])
    assert [mixture.order(epoch, 7) for epoch in (0, 1)] == [[1, 4, 3, 2, 4, 0, 3], [4, 0, 3, 3, 2, 4, 1]]


@pytest.mark.parametrize(
    "datasets, weights, message",
    [
        ([], None, "no datasets"),
        ([[1], []], None, "dataset 1 of the mixture is empty"),
        ([[1]], [1, 2], "2 weights for 1 datasets"),
        ([[1]], [0], "a weight must be a number above 0, got 0; leave a dataset out"),
        ([[1]], [float("inf")], "a weight must be a number above 0"),
        ([[1]], ["1"], "a weight must be a number above 0, got '1'"),
    ],
)
def test_mixtures_that_make_no_sense(datasets, weights, message):
    with pytest.raises(ValueError, match=message):
        data.Mixture(datasets, weights)


def test_spawned_workers_and_mixtures_of_files(tmp_path):
    paths = [write_lines(tmp_path / "a.jsonl", [GOOD] * 4), tmp_path / "b.parquet"]
    parquet.write_table(pyarrow.Table.from_pylist([GOOD] * 4), paths[1], row_group_size=3)
    mixture = data.Mixture([data.load(path) for path in paths], [1, 0.5])
    mixture[0], mixture[4]  # opens both files before the worker starts
    loader = torch.utils.data.DataLoader(
        mixture, sampler=mixture.order(0, 0), num_workers=1, collate_fn=list, multiprocessing_context="spawn"
    )
    found = [example.id for (example,) in loader]
    assert len(found) == 6 and found == [mixture[i].id for i in mixture.order(0, 0)]
    with pytest.raises(ValueError, match="epoch must be 0 or more"):
        mixture.order(-1, 0)


# ---- draws ----


def choose(example, count, seed):
    return data.take_responses(example, data.draw_responses(example, random.Random(seed), count=count, shuffle=False))


@hypothesis.settings(deadline=None)
@hypothesis.given(
    rankings=st.lists(st.integers(1, 3), min_size=1, max_size=6), seed=st.integers(0, 99), share=st.floats(0, 1)
)
def test_chosen_responses_can_be_compared(rankings, seed, share):
    example = yojo.Example("x", [str(i) for i in range(len(rankings))], rankings=rankings, id="e")
    count = 1 + round(share * (len(rankings) - 1))
    chosen = choose(example, count, seed)
    assert len(chosen.responses) == count and chosen.id == "e" and chosen.responses == sorted(chosen.responses)
    if count > 1 and len(set(rankings)) > 1:
        assert len(set(chosen.rankings)) > 1
    for (a, rank_a), (b, rank_b) in itertools.combinations(zip(chosen.responses, chosen.rankings, strict=True), 2):
        assert (rank_a < rank_b) == (rankings[int(a)] < rankings[int(b)])
    if count < len(rankings):
        assert sorted(set(chosen.rankings)) == list(range(1, len(set(chosen.rankings)) + 1))
    assert chosen == choose(example, count, seed)


def test_every_pair_that_can_be_compared_is_drawn():
    example = yojo.Example("x", ["a", "b", "c"], rankings=[1, 1, 2])
    drawn = {tuple(choose(example, 2, i).responses) for i in range(50)}
    assert drawn == {("a", "c"), ("b", "c")}
    assert len(choose(yojo.Example("x", ["a", "b"]), 1, 0).responses) == 1
    assert choose(example, 4, 0) == example
    with pytest.raises(ValueError, match="example: count must be at least 1, got 0"):
        choose(example, 0, 0)


def test_chosen_targets_sum_to_one():
    example = yojo.Example("x", ["a", "b", "c"], rankings=[0.5, 0.0, 0.5])
    for i in range(20):
        chosen = choose(example, 2, i)
        assert sorted(chosen.rankings) == [0, 1] and "b" in chosen.responses
    assert choose(example, 3, 0).rankings == [0.5, 0.0, 0.5]
    singles = {choose(example, 1, i).rankings[0] for i in range(20)}
    assert singles == {1.0}


def test_shuffled_responses_keep_their_ranks():
    example = yojo.Example("x", list("abcd"), rankings=[1, 2, 3, 4], images=["a.png"])
    orders = set()
    for i in range(20):
        other = data.take_responses(example, data.draw_responses(example, random.Random(i)))
        assert [("abcd".index(text) + 1) for text in other.responses] == other.rankings and other.images == ["a.png"]
        orders.add(tuple(other.responses))
    assert len(orders) > 5
    unranked = yojo.Example("x", ["a", "b"])
    assert sorted(data.take_responses(unranked, data.draw_responses(unranked, random.Random(0))).responses) == [
        "a",
        "b",
    ]


# ---- what no tokenizer, no parser and no folder should trip over ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"responses": ["a\ud800", "b", "c"]}, r"response 0 holds half of a surrogate pair \(U\+D800\) at character 2"),
        ({"prompt": "\udc00"}, "the prompt holds half of a surrogate pair"),
        ({"prompt": [{"role": "user", "content": [5]}]}, "a content part must be a string or a dict, got 5"),
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "a text part needs a string under 'text'"),
        ({"rankings": [1, 2, 10**400]}, "have gaps"),
        ({"rankings": None, "targets": [1, 0, 10**400]}, "a target must be a number from 0 to 1"),
    ],
)
def test_odd_records_are_bad_ones(change, message):
    with pytest.raises(data.DataError, match=f"example 'records:1': .*{message}"):
        data.load([GOOD | change])[0]


def test_numbers_that_json_does_not_read(tmp_path):
    lines = json.dumps(GOOD) + "\n" + json.dumps(GOOD).replace("3]", "3" * 5000 + "]") + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    records = data.load(tmp_path / "a.jsonl")
    with pytest.raises(data.DataError, match="example 'a.jsonl:2': not JSON: a number has too many digits"):
        records[1]
    (tmp_path / "a.json").write_text(f"[{'3' * 5000}]")
    with pytest.raises(data.DataError, match="a.json: not JSON: a number has too many digits"):
        data.load(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[" * 100000)
    with pytest.raises(data.DataError, match="a.json: not JSON: nested too deeply"):
        data.load(tmp_path / "a.json")


def test_a_reply_without_text():
    record = {"prompt": "x", "chosen": [{"role": "assistant", "content": [{"type": "text"}]}]}
    record["rejected"] = [{"role": "assistant", "content": "b"}]
    with pytest.raises(data.DataError, match="chosen must be text alone"):
        data.load([record])[0]


def test_a_byte_order_mark_on_a_blank_line(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf\n" + json.dumps(GOOD).encode())
    records = data.load(tmp_path / "a.jsonl")
    assert len(records) == 1 and records[0].id == "a.jsonl:2"


def test_a_folder_of_two_kinds_is_refused_and_hidden_files_are_left_out(tmp_path):
    (tmp_path / ".ipynb_checkpoints").mkdir()
    for name in ("a.jsonl", "._a.jsonl", ".ipynb_checkpoints/a.jsonl"):
        write_lines(tmp_path / name, [GOOD])
    assert [example.id for example in data.load(tmp_path)] == ["a.jsonl:1"]
    parquet.write_table(pyarrow.Table.from_pylist([GOOD]), tmp_path / "b.parquet")
    with pytest.raises(data.DataError, match=r"holds .parquet files \(1\) and .jsonl files \(1\): name those"):
        data.load(tmp_path)


def test_a_folder_of_several_splits_is_refused(tmp_path):
    for name in ("train-00000-of-00002.parquet", "train-00001-of-00002.parquet"):
        parquet.write_table(pyarrow.Table.from_pylist([GOOD]), tmp_path / name)
    assert len(data.load(tmp_path)) == 2
    parquet.write_table(pyarrow.Table.from_pylist([GOOD]), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(data.DataError, match=r"holds several splits \(test, train\), which would be read as one"):
        data.load(tmp_path)
    (tmp_path / "more" / "validation").mkdir(parents=True)
    write_lines(tmp_path / "more" / "validation" / "a.jsonl", [GOOD])
    assert len(data.load(tmp_path / "more")) == 1

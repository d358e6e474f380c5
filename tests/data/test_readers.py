"""Files and tables of records: every kind, lazily, and what is wrong with them by line."""

import json
import os
import pickle

import numpy as np
import pyarrow
import pytest
import torch
from data_cases import GOOD, png, write_lines
from pyarrow import parquet

import yojo
from yojo import data
from yojo.data import readers
from yojo.inputs.images import load_image


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
    monkeypatch.setattr(readers.json, "loads", lambda text, **options: calls.append(text) or parse(text, **options))
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


def test_records_from_pandas_and_numpy_are_those_of_lists(tmp_path):
    """Parquet through pandas has arrays for lists and NaN for nothing; a hub data set may be formatted as either."""
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    turns = [{"role": "user", "content": "Which?"}]
    rows = [
        GOOD | {"prompt": turns, "rankings": [2, 1, 3], "system": "Be short.", "fps": 2.0},
        GOOD | {"prompt": turns, "rankings": [1, 2, 3], "system": None, "fps": None},
    ]
    path = tmp_path / "a.parquet"
    pandas.DataFrame(rows).to_parquet(path)
    read = pandas.read_parquet(path).to_dict("records")
    assert isinstance(read[0]["responses"], np.ndarray) and isinstance(read[1]["fps"], float)
    made = datasets.Dataset.from_list(rows)
    expected = list(data.load(rows))
    for source in (read, path, made.with_format("numpy"), made.with_format("torch")):
        for example, other in zip(data.load(source), expected, strict=True):
            assert (example.prompt, example.responses, example.rankings) == (
                other.prompt,
                other.responses,
                other.rankings,
            )
    picture = np.zeros((8, 9, 3), dtype=np.uint8)
    videos = np.zeros((2, 8, 9, 3), dtype=np.uint8)
    example = data.load([GOOD | {"images": [picture], "video": videos, "fps": np.float32(2)}])[0]
    assert example.images[0] is picture and example.videos[0].source is videos and example.videos[0].fps == 2
    lists = np.array([[1, 2], [2, 1]])[0]
    assert data.load([GOOD | {"rankings": lists, "responses": np.array(["a", "b"])}])[0].rankings == [1, 2]


def test_arrow_fills_objects_up_and_pandas_hands_that_on(tmp_path):
    pandas = pytest.importorskip("pandas")
    call = {"name": "f", "arguments": {"city": "Oslo"}}, {"name": "g", "arguments": {"zone": "CET"}}
    said = {"role": "assistant", "tool_calls": [{"function": each} for each in call]}
    rows = [GOOD | {"prompt": [{"role": "user", "content": "a"}, said, {"role": "user", "content": "b"}]}]
    pandas.DataFrame(rows).to_parquet(tmp_path / "a.parquet")
    read = pandas.read_parquet(tmp_path / "a.parquet").to_dict("records")
    assert read[0]["prompt"][1]["tool_calls"][0]["function"]["arguments"]["zone"] is None
    assert data.load(read)[0].prompt == data.load(tmp_path / "a.parquet")[0].prompt == data.load(rows)[0].prompt


def test_pictures_that_a_table_put_into_one_array():
    """numpy's format of a data set stacks pictures of one size; three gray ones are no picture with three channels."""
    array = np.random.default_rng(0).integers(0, 256, (3, 8, 9, 3), dtype=np.uint8)
    for several in (array, array[:1], torch.from_numpy(array)):
        images = data.load([GOOD | {"images": several}])[0].images
        assert len(images) == len(several) and all(map(np.array_equal, images, several))
    assert (
        len(data.load([GOOD | {"images": array[0]}])[0].images)
        == len(data.load([GOOD | {"image": array[..., 0]}])[0].images)
        == 1
    )
    with pytest.raises(data.DataError, match=r"images is an array of shape \[3, 8, 9\], which may be several"):
        data.load([GOOD | {"images": array[..., 0]}])[0]
    assert len(data.load([GOOD | {"videos": array[None]}])[0].videos) == 1
    assert data.load([GOOD | {"images": array[..., 0]}], ignore_columns=["images"])[0].images == []
    with pytest.raises(data.DataError, match="videos is an array of shape"):
        data.load([GOOD | {"videos": np.moveaxis(array, -1, 1)}])[0]


def test_values_that_python_does_not_have():
    loop = []
    loop.append(loop)
    pandas = pytest.importorskip("pandas")
    odd = [
        {"score": np.longdouble(1)},
        {"score": pandas.NA, "system": pandas.NaT},
        {"idx": np.zeros(2, np.longdouble)},
        {"idx": loop},
    ]
    records = data.load([GOOD, *(GOOD | each for each in odd)])
    assert [records[i].rankings for i in range(4)] == [GOOD["rankings"]] * 4
    with pytest.raises(data.DataError, match="example 'records:5': cannot be read: nested too deeply"):
        records[4]


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


def test_nothing_of_a_json_file_is_lost_without_a_word(tmp_path, caplog):
    twice = '{"prompt": "?", "responses": ["a", "b"], "rankings": [1, 2], "prompt": "!"}'
    lines = data.load(write_lines(tmp_path / "a.jsonl", [GOOD, twice]))
    with pytest.raises(data.DataError, match="'a.jsonl:2': not JSON: the key 'prompt' stands twice in one object"):
        lines[1]
    (tmp_path / "b.json").write_text(f"[{twice}]")
    with pytest.raises(data.DataError, match="the key 'prompt' stands twice"):
        data.load(tmp_path / "b.json")
    (tmp_path / "c.json").write_text(json.dumps({"data": [GOOD], "more_data": [GOOD], "version": 1}))
    assert len(data.load(tmp_path / "c.json")) == 1 and "not used beside the records: more_data, version" in caplog.text

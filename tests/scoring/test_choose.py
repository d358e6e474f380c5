"""Best of N and filters: which rows are kept, what they hold, and files that are whole or not there."""

import datetime
import json

import numpy as np
import pytest
from chosen_cases import COLUMNS, read_rows, shown, write_scores
from data_cases import png, write_lines
from PIL import Image

import yojo
from yojo import data
from yojo.inputs.digests import digest
from yojo.scoring import choose, writing

RECORDS = [
    {"id": 1, "prompt": "one", "responses": ["a", "b", "c"], "rankings": [3, 1, 2], "score": 7},
    {"id": 2, "prompt": "two", "responses": ["a", "b", "c"], "completion": "mine"},
    {"id": 3, "prompt": "three", "responses": ["alone"], "targets": [1.0]},
    {"id": 4, "prompt": "four", "responses": ["x", "y", "x "]},
]
SCORES = [[1, 3, 2], [0.5, 0.5, -1], [2.5], [-1, 0, 2]]


@pytest.fixture()
def scores(tmp_path):
    (tmp_path / "in").mkdir()
    source = write_lines(tmp_path / "in" / "data.jsonl", RECORDS)
    return write_scores(tmp_path / "s.jsonl", source, SCORES)


@pytest.fixture(params=["o.jsonl", "o.parquet"])
def out(request, tmp_path):
    return tmp_path / "out" / request.param


def test_the_best_of_each(scores, out):
    done = choose.best(scores, out)
    rows = read_rows(out)
    assert [(row["id"], row["completion"], row["place"], row["score"], row["margin"]) for row in rows] == [
        (1, "b", 1, 3.0, 1.0),
        (2, "a", 0, 0.5, 0.0),  # of equal ones the first
        (3, "alone", 0, 2.5, None),
        (4, "x ", 2, 2.0, 2.0),
    ]
    assert [row["prompt"] for row in rows] == ["one", "two", "three", "four"]
    assert [row["responses"] for row in rows] == [record["responses"] for record in RECORDS]
    assert [row["scores"] for row in rows] == SCORES
    assert rows[0]["rankings"] == [3, 1, 2] and rows[2]["targets"] == [1.0]
    assert rows[0]["original_score"] == 7 and rows[1]["original_completion"] == "mine"
    assert "rank" not in rows[0] and "candidates" not in rows[0]
    assert done.line() == (
        f"{out}: 4 rows of 4 scored records; ties for the best (1), a record's own 'score' is original_score now (1), a "
        "record's own 'completion' is original_completion now (1); prompts are strings"
    )
    assert data.load(out, ranked=False)[3].responses == ["x", "y", "x "]


def test_the_best_few_of_each(scores, out):
    done = choose.best(scores, out, top=2)
    assert [(row["id"], row["rank"], row["completion"], row["margin"]) for row in read_rows(out)] == [
        (1, 1, "b", 1.0), (1, 2, "c", 1.0), (2, 1, "a", 0.0), (2, 2, "b", 1.5), (3, 1, "alone", None), (4, 1, "x ", 2.0),
        (4, 2, "y", 1.0),
    ]  # fmt: skip
    assert done.left_out["responses whose text is there twice"] == 1


FLAT = [
    ("q", "a", 1.0),
    ("r", "b", 5.0),
    ("q", "c", 3.0),
    ("q", "d", 3.0),
    ("r", "b ", 4.0),
    ("q", "a", 2.0),
    ("s", "e", -1.0),
]


@pytest.fixture()
def flat(tmp_path):
    records = [{"prompt": prompt, "responses": [text], "meta": {"of": prompt}} for prompt, text, _ in FLAT]
    source = write_lines(tmp_path / "flat.jsonl", records)
    return write_scores(tmp_path / "s.parquet", source, [[score] for *_, score in FLAT])


@pytest.mark.parametrize("by", ["prompt", "meta.of", ["prompt", "meta"]])
def test_the_best_of_a_group_of_records(flat, out, by):
    done = choose.best(flat, out, by=by)
    rows = read_rows(out)
    assert [(row["prompt"], row["completion"], row["margin"], row["candidates"]) for row in rows] == [
        ("r", "b", 1.0, 2), ("q", "c", 0.0, 4), ("s", "e", None, 1),
    ]  # fmt: skip
    assert done.notes["groups"] == 3 and done.notes["ties for the best of a group"] == 1
    assert done.left_out["records whose group has a better one"] == 4


def test_the_best_few_of_a_group(flat, out):
    choose.best(flat, out, by="prompt", top=3)
    rows = {(row["prompt"], row["rank"]): row["completion"] for row in read_rows(out)}
    assert rows == {("q", 1): "c", ("q", 2): "d", ("q", 3): "a", ("r", 1): "b", ("s", 1): "e"}
    with pytest.raises(ValueError, match="by names 'nothing', and the record has nothing there"):
        choose.best(flat, out, by="nothing", overwrite=True)


def test_groups_are_as_counted_by_hand(tmp_path):
    rng = np.random.default_rng(0)
    records, scores = [], []
    for i in range(200):
        count = int(rng.integers(1, 5))
        records.append({"prompt": f"q{rng.integers(30)}", "responses": [f"{i}.{j}" for j in range(count)]})
        scores.append(rng.integers(0, 6, count).tolist())
    source = write_lines(tmp_path / "d.jsonl", records)
    choose.best(write_scores(tmp_path / "s.jsonl", source, scores), tmp_path / "o.jsonl", by="prompt", top=3)
    found = {(row["prompt"], row["rank"]): row["completion"] for row in read_rows(tmp_path / "o.jsonl")}
    expected = {}
    for prompt in {record["prompt"] for record in records}:
        every = [
            (-score, i, j)
            for i, record in enumerate(records)
            for j, score in enumerate(scores[i])
            if record["prompt"] == prompt
        ]
        expected |= {(prompt, rank): f"{i}.{j}" for rank, (_, i, j) in enumerate(sorted(every)[:3], 1)}
    assert found == expected


def test_pictures_of_one_name_in_two_folders_are_two(tmp_path):
    sources = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png())
        record = {"prompt": "?", "responses": [name], "image": "a.png"}
        sources.append(write_lines(tmp_path / name / "d.jsonl", [record, record]))
    path = write_scores(tmp_path / "s.jsonl", sources, [[1], [2], [4], [3]])
    choose.best(path, tmp_path / "o.jsonl", by=["prompt", "image"])
    assert [(row["responses"], row["score"]) for row in read_rows(tmp_path / "o.jsonl")] == [
        (["one"], 2.0),
        (["two"], 4.0),
    ]
    choose.best(path, tmp_path / "o.jsonl", by="prompt", overwrite=True)
    assert [row["score"] for row in read_rows(tmp_path / "o.jsonl")] == [4.0]


# ---- filter ----


@pytest.mark.parametrize(
    "options, ids",
    [
        ({"min_score": 2.0}, [1, 3, 4]),
        ({"min_score": 2.0, "of": "mean"}, [1, 3]),
        ({"min_score": 2.0, "of": "worst"}, [3]),
        ({"min_score": 1.0, "of": "margin"}, [1, 4]),
        ({"top_share": 0.5}, [1, 3]),
        ({"top_share": 0.01}, [1]),
        ({"top_share": 1}, [1, 2, 3, 4]),
        ({"top_share": 0.33, "of": "margin"}, [4]),
        ({"top_share": 0.5, "of": "worst"}, [1, 3]),
    ],
)
def test_records_that_are_kept(scores, out, options, ids):
    done = choose.filter_(scores, out, **options)
    rows = read_rows(out)
    assert [row["id"] for row in rows] == ids and done.written == len(ids)
    for row in rows:
        record, values = RECORDS[row["id"] - 1], SCORES[row["id"] - 1]
        statistic = {"mean": sum(values) / len(values), "worst": min(values)}.get(options.get("of"), max(values))
        if options.get("of") == "margin":
            statistic = np.subtract(*sorted(values)[:-3:-1])
        assert row["scores"] == values and row["score"] == statistic
        assert row.get("original_score") == record.get("score")
        assert all(row[name] == value for name, value in record.items() if name != "score")


def test_a_share_is_exact_and_ties_go_by_the_input(tmp_path):
    records = [{"id": i, "prompt": "?", "responses": [f"{i}"]} for i in range(50)]
    source = write_lines(tmp_path / "d.jsonl", records)
    path = write_scores(tmp_path / "job", source, [[1 + (i == 30)] for i in range(50)])  # parts in another order
    for share, count in ((0.1, 5), (0.29, 15), (0.27, 14), (0.001, 1)):  # the nearest whole number, one at least
        choose.filter_(path, tmp_path / "o.jsonl", top_share=share, overwrite=True)
        ids = [row["id"] for row in read_rows(tmp_path / "o.jsonl")]
        assert sorted(ids) == sorted([30, *range(count - 1)])


def test_responses_that_are_kept(scores, out):
    done = choose.filter_(scores, out, min_score=2, responses=True)
    rows = read_rows(out)
    assert [(row["id"], row["responses"], row["scores"], row["places"]) for row in rows] == [
        (1, ["b", "c"], [3.0, 2.0], [1, 2]), (3, ["alone"], [2.5], [0]), (4, ["x "], [2.0], [2]),
    ]  # fmt: skip
    assert rows[0]["rankings"] == [1, 2] and rows[0]["score"] == 7 and rows[1]["targets"] == [1.0]
    assert done.left_out["responses"] == 6 and done.left_out["records"] == 1
    choose.filter_(scores, out, top_share=0.3, responses=True, overwrite=True)  # three of ten
    assert [(row["id"], row["responses"]) for row in read_rows(out)] == [(1, ["b", "c"]), (3, ["alone"])]
    assert data.load(out, ranked=False)[0].rankings == [1, 2]


# ---- media and other values ----


def test_media_are_found_from_where_the_rows_lie(tmp_path, out):
    home = tmp_path / "in"
    (home / "frames").mkdir(parents=True)
    for name, colour in (("a.png", "red"), ("b.png", "blue"), ("frames/0.png", "green"), ("frames/1.png", "black")):
        (home / name).write_bytes(png((8, 8), colour))
    part = {"type": "image_url", "image_url": {"url": "b.png"}}
    records = [
        {"prompt": "?", "image": "a.png", "responses": ["x"], "id": "a"},
        {"prompt": "?", "video": "frames", "sampling_interval": 2, "responses": ["x"], "id": "b"},
        {"prompt": [{"role": "user", "content": [part, {"type": "text", "text": "?"}]}], "responses": ["x"], "id": "c"},
        {"prompt": "<image> or <image>?", "images": ["b.png", "a.png"], "responses": ["x"], "id": "d"},
    ]
    for number in range(4):  # prompts of two types are no column of a table
        source = write_lines(home / "data.jsonl", records[number : number + 1])
        expected = data.load(source, ranked=False)[0]
        path = write_scores(tmp_path / "s.jsonl", source, [[1]])
        for function, options in ((choose.best, {}), (choose.filter_, {"min_score": 0})):
            function(path, out, overwrite=True, **options)
            (row,) = data.load(out, ranked=False)
            assert shown(row) == shown(expected), (number, function)
            if function is choose.filter_ and number != 2:
                assert row.prompt == expected.prompt


def test_images_in_the_record_itself_stay_with_it(tmp_path, out):
    record = {"prompt": "?", "image": {"bytes": png(colour="red"), "path": "gone.png"}, "responses": ["x", "y"]}
    table = write_rows(tmp_path / "d.parquet", [record])
    path = write_scores(tmp_path / "s.jsonl", table, [[1, 2]])
    for function, options in ((choose.best, {}), (choose.filter_, {"min_score": 0}), (choose.pairs, {})):
        function(path, out, overwrite=True, **options)
        example = data.load(out, ranked=False)[0]
        assert list(example.images) == [png(colour="red")]
        (row,) = read_rows(out)
        image = row["image"] if function is choose.filter_ else row["images"][0]
        if out.suffix == ".parquet":
            assert image == record["image"]
        else:
            assert image.startswith("data:image/png;base64,")


def write_rows(path, rows):
    with writing.writing(path) as file:
        for row in rows:
            file.add(row)
    return path


def test_pictures_in_memory_are_written_without_a_loss(tmp_path, out):
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (6, 5, 3), "uint8"))
    image.getexif()[0x0112] = 6  # lies on its side
    array = rng.integers(0, 256, (4, 3), "uint8")
    clip = rng.integers(0, 256, (2, 4, 4, 3), "uint8")
    cmyk = image.convert("CMYK")
    records = [{"prompt": "?", "images": [image, array, cmyk], "video": clip, "fps": 2, "responses": ["x", "y"]}]
    source = write_lines(tmp_path / "d.jsonl", [{"prompt": "?", "responses": ["x", "y"]}])
    path = write_scores(tmp_path / "s.jsonl", source, [[1, 2]])
    rows = read_rows(path)
    write_lines(path, [rows[0] | {"record": digest(data.load(records, ranked=False).raw(0))}])
    choose.best(path, out, data=records)
    example = data.load(out, ranked=False)[0]
    for made, given in zip(example.images, (image, array, cmyk), strict=True):
        loaded = [np.asarray(yojo.inputs.images.load_image(one, "it")) for one in (made, given)]
        assert np.array_equal(*loaded)
    frames = [np.asarray(yojo.inputs.images.load_image(frame, "it")) for frame in example.videos[0].source]
    assert np.array_equal(frames, clip) and example.videos[0].fps == 2


def test_values_that_json_lacks_and_columns_that_tables_lack(tmp_path):
    record = {
        "prompt": "?",
        "responses": ["x", "y"],
        "when": datetime.datetime(2026, 1, 2),
        "raw": b"\xff",
        "half": "\ud800",
    }
    with writing.writing(tmp_path / "o.jsonl") as file:
        file.add(record)
    (row,) = read_rows(tmp_path / "o.jsonl")
    assert row["when"] == "2026-01-02T00:00:00" and row["raw"].startswith("data:application/octet-stream;base64,")
    assert row["half"] == "\ud800"
    rows = [{"a": None}] * 600 + [{"a": 1, "b": {"c": None}}, {"a": 0.5, "b": {"c": "late", "d": [1]}}]
    write_rows(tmp_path / "o.parquet", rows)  # types that are known late
    assert read_rows(tmp_path / "o.parquet")[-1] == {"a": 0.5, "b": {"c": "late", "d": [1]}}
    with pytest.raises(
        ValueError, match="column 'a' holds values that no Parquet file has side by side .*write a .jsonl file"
    ):
        write_rows(tmp_path / "bad.parquet", [{"a": 1}, {"a": "text"}])
    with pytest.raises(ValueError, match="no Parquet file has side by side"):
        write_rows(tmp_path / "bad.parquet", [{"a": 1}] * 600 + [{"a": "text"}])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["o.jsonl", "o.parquet"]  # and nothing half written


def test_columns_of_other_formats_are_kept(tmp_path):
    completions = [{"response": text, "annotations": {"x": {"Rating": "3"}}, "model": "m"} for text in ("a", "b")]
    source = write_lines(tmp_path / "d.jsonl", [{"instruction": "?", "completions": completions, "source": "s"}])
    path, out = write_scores(tmp_path / "s.jsonl", source, [[1, 2]]), tmp_path / "o.jsonl"
    choose.best(path, out)
    (row,) = read_rows(out)
    assert row["original_completions"] == completions and row["source"] == "s" and "instruction" not in row
    assert (row["prompt"], row["responses"], row["rankings"], row["completion"]) == ("?", ["a", "b"], [1, 1], "b")
    assert data.load(out, ranked=False).format == "yojo"
    choose.pairs(path, out, overwrite=True)
    assert set(read_rows(out)[0]) & {"completions", "original_completions", "responses", "source"} == {"source"}


# ---- what is refused, and what a crash leaves ----


@pytest.mark.parametrize(
    "function, options, message",
    [
        (choose.best, {"top": 0}, "top must be a whole number, 1 or more"),
        (choose.best, {"top": True}, "top must be a whole number"),
        (choose.pairs, {"kind": "some"}, "kind must be best-worst or all"),
        (choose.pairs, {"margin": -1}, "margin must be 0 or more"),
        (choose.pairs, {"margin": float("nan")}, "margin must be a finite number"),
        (choose.pairs, {"max_pairs": 0}, "max_pairs must be"),
        (choose.filter_, {}, "give min_score or top_share"),
        (choose.filter_, {"min_score": 1, "top_share": 0.1}, "one of them"),
        (choose.filter_, {"top_share": 0}, "top_share must be above 0"),
        (choose.filter_, {"top_share": 10}, "at most 1"),
        (choose.filter_, {"min_score": 1, "of": "median"}, "of must be one of best, mean, worst, margin"),
        (choose.filter_, {"min_score": 1, "of": "mean", "responses": True}, "is a statistic of whole records"),
        (choose.filter_, {"min_score": 100}, r"nothing to write: .*left out: records \(4\)"),
        (choose.best, {"report": "o.txt"}, "report must be a .png"),
    ],
)
def test_what_makes_no_sense_is_said(scores, tmp_path, function, options, message):
    with pytest.raises(ValueError, match=message):
        function(scores, tmp_path / "o.jsonl", **options)
    assert not (tmp_path / "o.jsonl").exists()


def test_no_file_that_is_read_or_there_is_replaced(scores, tmp_path):
    kept = {path: path.read_bytes() for path in (scores, tmp_path / "in" / "data.jsonl")}
    for path in kept:
        with pytest.raises(ValueError, match="is what is read|out is the scores file itself"):
            choose.best(scores, path, overwrite=True)
    folder = write_scores(tmp_path / "job", tmp_path / "in", SCORES)
    for inside in (folder / "o.jsonl", tmp_path / "in" / "o.jsonl", tmp_path / "in" / "deep" / "o.jsonl"):
        with pytest.raises(ValueError, match="lies in the folder .*, all files of which are read"):
            choose.best(folder, inside)
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "in" / "data.jsonl")
    with pytest.raises(ValueError, match="is what is read"):
        choose.best(scores, tmp_path / "link.jsonl", overwrite=True)
    choose.best(scores, tmp_path / "o.jsonl")
    with pytest.raises(ValueError, match="out is there already"):
        choose.best(scores, tmp_path / "o.jsonl")
    with pytest.raises(ValueError, match="out must be a .jsonl or a .parquet file"):
        choose.best(scores, tmp_path / "o.csv")
    assert all(path.read_bytes() == content for path, content in kept.items())


def test_an_error_on_the_way_leaves_the_old_file(scores, tmp_path):
    out = tmp_path / "o.jsonl"
    choose.best(scores, out)
    before = out.read_bytes()
    with open(scores, "a") as file:
        file.write("{")
    with pytest.raises(ValueError, match="line 5: the last line is cut off"):
        choose.best(scores, out, overwrite=True)
    assert out.read_bytes() == before and not list(tmp_path.glob("*writing*")) + list(tmp_path.glob(".*writing*"))


def test_what_is_no_longer_in_the_input_is_counted(scores, tmp_path):
    write_lines(tmp_path / "in" / "data.jsonl", [*RECORDS[2:], {"prompt": "new", "responses": ["n"]}])
    done = choose.best(scores, tmp_path / "o.jsonl")
    assert "4 scored" not in done.line() and "2 rows of 2 scored records" in done.line()
    assert "scores of records that are no longer in the input (2)" in done.line()
    assert "records of the input without scores (1)" in done.line()
    assert [json.loads(line)["id"] for line in open(tmp_path / "o.jsonl")] == [3, 4]
    assert set(COLUMNS) & set(read_rows(tmp_path / "o.jsonl")[0]) == {"id", "scores"}

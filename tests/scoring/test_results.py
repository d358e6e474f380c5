"""Scores read again: what is checked, what they are joined with when the input has changed, and in how much memory."""

import json
import shutil
import tracemalloc

import pytest
from chosen_cases import JOB, read_rows, score_rows, write_job, write_scores, write_table
from data_cases import GOOD, png, write_lines

from yojo import data
from yojo.scoring.results import joined, open_scores

RECORDS = [{"prompt": f"question {i}", "responses": [f"{i} a", f"{i} b"], "id": f"r{i}"} for i in range(7)]
SCORES = [[i, i / 2] for i in range(7)]


@pytest.fixture()
def source(tmp_path):
    (tmp_path / "in").mkdir()
    return write_lines(tmp_path / "in" / "data.jsonl", RECORDS)


@pytest.mark.parametrize("name", ["s.jsonl", "s.parquet", "job"])
def test_rows_come_beside_their_records(tmp_path, source, name):
    scores = open_scores(write_scores(tmp_path / name, source, SCORES))
    assert scores.job["job"] == JOB and scores.is_folder == (name == "job")
    for _ in range(2):  # every loop reads them anew
        found = {scored.row["id"]: scored for scored in joined(scores)}
        assert sorted(found) == [f"r{i}" for i in range(7)]
        for i, record in enumerate(RECORDS):
            scored = found[f"r{i}"]
            assert (scored.index, scored.record, scored.row["scores"]) == (i, record, SCORES[i])
            assert (scored.fields.prompt, scored.fields.responses) == (record["prompt"], record["responses"])


def test_files_under_way_and_hidden_ones_are_not_read(tmp_path, source):
    folder = write_scores(tmp_path / "job", source, SCORES)
    assert (folder / ".scores-3.jsonl.writing").exists()  # and is no JSON
    (folder / "bad-1.jsonl").write_text("{")
    assert len(list(open_scores(folder))) == 7
    for part in folder.glob("scores-*"):
        part.unlink()
    with pytest.raises(ValueError, match="no finished part .*run `yojo score` again"):
        open_scores(folder)


def changed(**fields):
    """A whole row with some fields changed; None takes a field out."""
    row = {
        "id": "a",
        "row": 0,
        "scores": [2.0, 1.0],
        "order": [0, 1],
        "key": "",
        "record": "0" * 32,
        "media": "",
        "job": JOB,
    }
    return json.dumps({name: value for name, value in (row | fields).items() if value is not None})


@pytest.mark.parametrize(
    "line, message",
    [
        (changed(scores=[2.0, float("nan")]), "scores must be a list of finite numbers"),
        (changed(scores=[]), "one at least"),
        (changed(scores=[True, 1.0]), "finite numbers"),
        (changed(order=[1, 0]), r"the order \[1, 0\] does not fit the scores"),
        (changed(scores=[1.0, 1.0], order=[1, 0]), "ties as they stand"),
        (changed(order=[0]), "does not fit"),
        (changed(row=-1), "row must be the number of a record"),
        (changed(row=True), "row must be a int"),
        (changed(record="x"), "record must be a digest"),
        (changed(record=None, key=None), "lacks key, record: give what `yojo score --out` wrote"),
        (changed(job="f" * 16), "the job f{16} made this row, but the first row says"),
        (json.dumps(GOOD), "this is no row of scores"),
        ("[1]", "must be an object, got list"),
        ("{oops", "not JSON"),
    ],
)
def test_a_row_that_is_none_is_named(tmp_path, line, message):
    path = write_lines(tmp_path / "s.jsonl", [changed(), line, changed()])
    with pytest.raises(ValueError, match=f"s.jsonl: line 2: .*{message}"):
        list(open_scores(path))
    if line.startswith("{") and "oops" not in line and "true" not in line:  # which columns of numbers cannot hold
        columns = json.loads(line).keys() | json.loads(changed()).keys()
        rows = [{name: json.loads(text).get(name) for name in columns} for text in (changed(), line)]
        with pytest.raises(ValueError, match="s.parquet: row 2: "):
            list(open_scores(write_table(tmp_path / "s.parquet", rows)))


def test_a_last_line_that_is_cut_off_and_what_is_not_there(tmp_path, source):
    path = write_scores(tmp_path / "s.jsonl", source, SCORES)
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])  # the end of the line alone: nothing is lost
    assert len(list(open_scores(path))) == 7
    path.write_bytes(whole[:-9])
    with pytest.raises(ValueError, match="line 7: the last line is cut off: run `yojo score` again"):
        list(open_scores(path))
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="not one row of scores"):
        list(open_scores(path))
    path.unlink()
    with pytest.raises(ValueError, match="not finished yet, its parts lie in .*run `yojo score` again"):
        open_scores(path)
    table = write_scores(tmp_path / "s.parquet", source, SCORES)
    table.write_bytes(table.read_bytes()[:-9])
    with pytest.raises(ValueError, match="not a complete Parquet file: .*run `yojo score` again"):
        list(open_scores(table))
    with pytest.raises(ValueError, match="no such file or folder"):
        open_scores(tmp_path / "nothing.jsonl")
    with pytest.raises(ValueError, match=r"scores are a .jsonl or a .parquet file"):
        open_scores(write_lines(tmp_path / "s.txt", []))


def test_another_job_than_the_one_described_is_an_error(tmp_path, source):
    path = write_scores(tmp_path / "s.jsonl", source, SCORES)
    rows = score_rows(data.load(source, ranked=False), SCORES, job="f" * 16)
    write_lines(path, rows)
    with pytest.raises(ValueError, match=f"line 1: the job f+ made this row, but job.json says {JOB}"):
        list(open_scores(path))


# ---- the input has changed since ----


def found_of(scores, **options):
    source = joined(scores, **options)
    return [(scored.row["id"], scored.index) for scored in source], source


def test_records_that_moved_are_found_by_their_content(tmp_path, source):
    path = write_scores(tmp_path / "s.jsonl", source, SCORES)
    new = [{"prompt": "new", "responses": ["n"], "id": "n"}]
    write_lines(source, new + RECORDS[::-1])
    found, after = found_of(path)
    assert found == [(f"r{i}", 7 - i) for i in range(7)] and (after.stale, after.surplus) == (0, 0)
    assert after.unscored() == 1
    write_lines(source, RECORDS[3:] + [RECORDS[0] | {"prompt": "another"}])
    found, after = found_of(path)
    assert found == [(f"r{i}", i - 3) for i in range(3, 7)] and after.stale == 3
    write_lines(source, ["{broken", *RECORDS])  # what cannot be read was never scored
    assert found_of(path)[0] == [(f"r{i}", i + 1) for i in range(7)]
    write_lines(source, new)
    with pytest.raises(ValueError, match="none of its 7 scores is of a record in data.jsonl"):
        found_of(path)


def test_equal_records_have_a_row_each_and_no_more(tmp_path, source):
    many = [RECORDS[0], RECORDS[1], RECORDS[0], RECORDS[0]]
    write_lines(source, many)
    path = write_scores(tmp_path / "s.jsonl", source, [[3, 1], [5, 4], [3, 1], [3, 1]])
    assert [index for _, index in found_of(path)[0]] == [0, 1, 2, 3]
    rows = read_rows(path)
    write_lines(path, [*rows, rows[2]])
    found, after = found_of(path)
    assert [index for _, index in found] == [0, 1, 2, 3] and (after.surplus, after.stale) == (1, 0)
    write_lines(source, [RECORDS[1], RECORDS[0], RECORDS[0]])
    found, after = found_of(path)
    assert sorted(index for _, index in found) == [0, 1, 2] and after.surplus == 2
    assert all(index == 0 for name, index in found if name == "r1")
    write_lines(source, [RECORDS[0]] * 40 + [RECORDS[1]])  # long runs are looked through once
    write_lines(path, [rows[0] | {"row": 100}] * 45)
    found, after = found_of(path)
    assert [index for _, index in found] == list(range(40)) and after.surplus == 5


def test_where_the_records_lie(tmp_path, source):
    path = write_scores(tmp_path / "s.jsonl", source, SCORES)
    moved = shutil.move(source, tmp_path / "moved.jsonl")
    with pytest.raises(ValueError, match="no such file; say with data .--data. where the scored records lie now"):
        joined(path)
    assert len(found_of(path, data=moved)[0]) == len(found_of(path, data=RECORDS)[0]) == 7
    shutil.rmtree(tmp_path / ".s.jsonl.job")
    assert open_scores(path).job is None
    with pytest.raises(ValueError, match="name them with data .--data."):
        joined(path)


def test_records_read_in_another_way_are_not_taken(tmp_path, source):
    write_lines(source, [record | {"first": record["responses"][:1]} for record in RECORDS])
    path = write_scores(tmp_path / "s.jsonl", source, SCORES)
    with pytest.raises(ValueError, match="r0: 2 scores for 1 responses: were the records read in another way"):
        list(joined(path, columns={"responses": "first"}))


def test_how_the_records_were_read_is_in_the_job(tmp_path):
    (tmp_path / "in").mkdir()
    source = write_lines(tmp_path / "in" / "data.jsonl", [{"ask": "<image> as text", "said": ["a", "b"]}])
    options = {"columns": {"prompt": "ask", "responses": "said"}, "literal_tags": True}
    path = write_scores(tmp_path / "s.jsonl", source, [[1, 2]], **options)
    (scored,) = joined(path)
    assert scored.fields.prompt == "<image> as text" and joined(path).literal_tags
    write_job(tmp_path / ".s.jsonl.job", source)
    assert list(joined(path, **options))[0].fields == scored.fields


def test_no_image_is_looked_for(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png())
    record = {"prompt": "?", "image": "in/a.png", "responses": ["a", "b"]}
    source = write_lines(tmp_path / "data.jsonl", [record])
    path = write_scores(tmp_path / "s.jsonl", source, [[1, 2]], image_root=str(tmp_path))
    shutil.rmtree(tmp_path / "in")
    (scored,) = joined(path)
    assert scored.fields.images == ["in/a.png"] and scored.root == tmp_path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, suffix):
    """A few bytes a row: where its line begins in the input, and whether it was met."""

    def peak(count):
        records = [{"prompt": f"question {i}", "responses": ["a" * 50, "b" * 50]} for i in range(count)]
        source = write_lines(tmp_path / f"{count}.jsonl", records)
        path = write_scores(tmp_path / f"s{count}{suffix}", source, [[1, 2]] * count)
        del records
        tracemalloc.start()
        assert sum(1 for _ in joined(path)) == count
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(10)  # what is loaded once
    small, large = peak(200), peak(2200)
    assert large - small < 2000 * 100, (small, large)

"""Files of votes: their columns and words, and what is refused, with its line."""

import json

import pytest
from rank_cases import write_votes

from yojo.data import ColumnError, DataError
from yojo.rankings import Vote, read_votes

GOOD = {"question": "q", "model_a": "x", "model_b": "y", "winner": "model_a"}


def only(record, **options):
    (votes,) = read_votes([record], **options).questions.values()
    return votes[0]


@pytest.mark.parametrize(
    "said, winner",
    [
        *[
            (word, "first")
            for word in ("model_a", "A", "a", "first", "A>B", "A>>B", "[[A]]", "leftvote", " Model_A ", "x")
        ],
        *[(word, "second") for word in ("model_b", "B", "second", "B>A", "B>>A", "[[B]]", "rightvote", "y")],
        *[
            (word, "tie")
            for word in ("tie", "Tie", "tie (bothbad)", "both_bad", "bothbad_vote", "A=B", "[[C]]", "tievote")
        ],
        *[(word, "abstain") for word in ("abstain", "skip", "error")],
    ],
)
def test_words_for_the_winner(said, winner):
    assert only(GOOD | {"winner": said}) == Vote("x", "y", winner)


@pytest.mark.parametrize(
    "columns",
    [
        {"question": "q", "model_a": "x", "model_b": "y", "winner": "model_b", "judge": "j", "weight": 2},
        {"question_id": "q", "item_a": "x", "item_b": "y", "vote": "B", "annotator": "j", "weight": 2.0},
        {"prompt": "q", "first": "x", "second": "y", "verdict": "second", "user": "j", "weight": 2},
    ],
)
def test_names_of_columns(columns):
    found = read_votes([columns | {"more": 1}])
    assert found.questions == {"q": [Vote("x", "y", "second", "j", 2.0)]} and found.records == 1


def test_columns_can_be_mapped():
    record = {"qid": 3, "left_model": "x", "right_model": "y", "said": 1, "who": 7}
    columns = {"question": "qid", "first": "left_model", "second": "right_model", "winner": "said", "annotator": "who"}
    found = read_votes([record], columns=columns, labels={"1": "second"})
    assert found.questions == {"3": [Vote("x", "y", "second", "7")]} and found.columns == columns


def test_labels_come_before_words():
    assert only(GOOD | {"winner": None}, labels={"null": "abstain"}).winner == "abstain"
    assert only(GOOD | {"winner": "b", "model_a": "b"}, labels={"b": "first"}).winner == "first"
    assert only(GOOD | {"winner": 0.5}, labels={"0.5": "tie"}).winner == "tie"


def test_one_hot_winners():
    record = {"id": 1, "prompt": "q", "model_a": "x", "model_b": "y"}
    hot = {"winner_model_a": 0, "winner_model_b": 1, "winner_tie": 0}
    assert only(record | hot).winner == "second"
    with pytest.raises(DataError, match="must be 1 and the others 0, got winner_model_a=1, winner_model_b=1"):
        only(record | hot | {"winner_model_a": 1})


def test_prompts_as_messages_are_questions():
    turns = [{"role": "user", "content": "hé"}]
    (question,) = read_votes([GOOD | {"question": turns}, GOOD | {"question": turns}]).questions
    assert json.loads(question) == turns


@pytest.mark.parametrize(
    "change, message",
    [
        ({"winner": 0}, "winner is 0, which is a number, and files disagree on what numbers mean.*--label 0=first"),
        ({"winner": "1"}, "winner is '1', which is a number"),
        ({"winner": True}, "winner is True, which is a number"),
        ({"winner": "model_c"}, "winner is 'model_c', which names neither item, and is no word that is known"),
        ({"winner": None}, "winner is empty: where that is an abstention"),
        ({"winner": "b", "model_a": "b"}, "names the first item and is also the word for 'second'"),
        ({"model_b": "x"}, "a vote of 'x' against itself"),
        ({"model_b": ""}, "model_b must be a string that is not empty, or a whole number, got ''"),
        ({"question": None}, "question must be a string that is not empty"),
        ({"weight": -1}, "weight must be finite and above 0"),
        ({"weight": "1"}, "weight must be a number"),
        ({"judge": 1.5}, "judge must be a string"),
    ],
)
def test_bad_records_are_named(tmp_path, change, message):
    path = write_votes(tmp_path / "v.jsonl", [GOOD | {"weight": 1, "judge": "j"}, "", GOOD | change])
    with pytest.raises(DataError, match=message) as error:
        read_votes(path)
    assert str(error.value).startswith("example 'v.jsonl:3': ") and error.value.line == 3
    found = read_votes(path, skip_bad=True)
    assert (found.records, [len(votes) for votes in found.questions.values()]) == (2, [1])
    (bad,) = found.bad
    assert (bad.file, bad.line) == (str(path), 3) and not bad.reason.startswith("example")


def test_records_that_lack_a_column_or_are_no_json(tmp_path):
    lacking = {name: value for name, value in GOOD.items() if name != "winner"}
    path = write_votes(tmp_path / "v.jsonl", [GOOD, lacking, "{", GOOD])
    found = read_votes(path, skip_bad=True)
    assert [bad.line for bad in found.bad] == [2, 3] and len(found.questions["q"]) == 2
    assert "there is no 'winner'; the record has question, model_a, model_b" in found.bad[0].reason
    assert "not JSON" in found.bad[1].reason


def test_missing_columns(tmp_path):
    path = write_votes(tmp_path / "v.jsonl", [{"question": "q", "model_a": "x", "winner": "a"}])
    with pytest.raises(
        ColumnError, match=r"no column for second \(model_b, .*columns found: question, model_a, winner"
    ):
        read_votes(path)
    with pytest.raises(ColumnError, match="no column 'z' .mapped to second.*columns found"):
        read_votes(path, columns={"second": "z"})


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"columns": {"quest": "a"}}, ValueError, "columns maps 'quest', which is none of question, first"),
        ({"columns": {"first": "a", "second": "a"}}, ValueError, "columns maps 'a' to several fields"),
        ({"columns": {"first": 1}}, TypeError, "columns must map first to the name of a column, got 1"),
        ({"labels": {0: "first"}}, TypeError, "labels must map text as it stands in the file, got 0: write '0'"),
        ({"labels": {"0": "model_a"}}, ValueError, "labels maps '0' to 'model_a': it must be one of first, second"),
    ],
)
def test_mistakes_are_named(options, error, message):
    with pytest.raises(error, match=message):
        read_votes([GOOD], **options)


def test_all_kinds_of_files_are_the_same(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [GOOD, GOOD | {"winner": "tie", "judge": "j"}, GOOD | {"question": "r"}]
    lines = write_votes(tmp_path / "v.jsonl", rows)
    (tmp_path / "v.json").write_text(json.dumps(rows))
    whole = [{"judge": None} | row for row in rows]
    pq.write_table(pa.Table.from_pylist(whole), tmp_path / "v.parquet")
    found = [read_votes(path).questions for path in (lines, tmp_path / "v.json", tmp_path / "v.parquet")]
    assert found[0] == found[1] == found[2] and len(found[0]["q"]) == 2
    assert len(read_votes([lines, tmp_path / "v.json"]).questions["q"]) == 4

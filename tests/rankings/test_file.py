"""`rank_file`: rankings of many questions, and training records drawn from them that `yojo.data.load` reads."""

import collections
import json

import numpy as np
import pytest
from PIL import Image
from rank_cases import random_votes, response_rows, rows_of, write_votes

from yojo import data
from yojo.data import ColumnError, DataError
from yojo.rankings import Vote, aggregate, rank_file, read_votes
from yojo.rankings.responses import Question, read_responses
from yojo.rankings.variants import draw


def read(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture()
def votes(tmp_path):
    cut_off = {"question": "cut", "model_a": "a", "model_b": "b", "winner": "a"}
    rows = rows_of(6, annotators=2, per_pair=3) + [cut_off, cut_off | {"model_a": "c", "model_b": "d"}]
    return write_votes(tmp_path / "votes.jsonl", rows)


@pytest.fixture()
def responses(tmp_path):
    return write_votes(tmp_path / "responses.jsonl", response_rows(6))


def test_a_line_is_what_aggregate_says(tmp_path, votes):
    report = rank_file(votes, tmp_path / "out" / "r.jsonl", method="borda", draws=10, seed=3)
    rows = read(tmp_path / "out" / "r.jsonl")
    assert [row["question"] for row in rows] == [*(f"q{i}" for i in range(6)), "cut"]
    for row in rows[:6]:
        votes_of = read_votes(votes).questions[row["question"]]
        want = aggregate(votes_of, "borda", draws=10, seed=3)
        assert row == {"question": row["question"], **json.loads(json.dumps(want.to_dict()))}
        assert row["ranks"] == sorted(row["ranks"]) and row["seed"] == 3 and row["options"] == {"ties": "half"}
    assert rows[6]["ranks"] is None and [part["items"] for part in rows[6]["components"]] == [["a", "b"], ["c", "d"]]
    assert report.disconnected == ["cut"] and report.questions == 7 and report.exit_code() == 0
    assert report.votes == sum(row["votes"] for row in rows) == 272
    assert report.ties == sum(row["ties"] for row in rows) > 0
    assert report.curl == pytest.approx(np.mean([row["curl"] for row in rows]))
    assert report.best_stability == pytest.approx(np.mean([row["best_stability"] for row in rows[:6]]))
    pairs = [row["majority"] for row in rows]
    assert report.agreement == sum(pair["agree"] for pair in pairs) / sum(pair["pairs"] for pair in pairs)
    assert report.annotators["who0"]["votes"] == sum(row["annotators"]["who0"]["votes"] for row in rows[:6])
    assert report.tied_best == sum(row["ranks"].count(1) > 1 for row in rows[:6]) > 0
    json.dumps(report.to_dict(), allow_nan=False)
    assert report.to_dict()["agreement"] == report.agreement


def test_two_runs_give_the_same_bytes(tmp_path, votes, responses):
    found = []
    for name in ("one", "other"):
        options = {"variants": 4, "responses": responses, "per_question": 2, "seed": 5, "draws": 10}
        rank_file(votes, tmp_path / f"{name}.jsonl", **options)
        found.append([(tmp_path / f"{name}{end}").read_bytes() for end in (".jsonl", ".variants.jsonl")])
    assert found[0] == found[1] and all(found[0])
    rank_file(votes, tmp_path / "third.jsonl", **options | {"seed": 6})
    assert (tmp_path / "third.variants.jsonl").read_bytes() != found[0][1]


def test_training_records_are_read(tmp_path, votes, responses):
    out = tmp_path / "train.jsonl"
    report = rank_file(
        votes, tmp_path / "r.jsonl", draws=10, variants=4, responses=responses, variants_out=out, per_question=2
    )
    rankings = {row["question"]: row for row in read(tmp_path / "r.jsonl")}
    records, rows = data.load(out), read(out)
    assert len(records) == len(report.variants.records) > 6 and not records.unused
    for i, row in enumerate(rows):
        question = row["id"].split("#")[0]
        assert row["prompt"] == f"What is {question[1:]}?"
        assert row["responses"] == [f"{model} says {question[1:]}" for model in row["models"]]
        full = dict(zip(rankings[question]["items"], rankings[question]["ranks"], strict=True))
        own = [full[model] for model in row["models"]]
        assert row["rankings"] == [sorted(set(own)).index(rank) + 1 for rank in own] and row["rankings"].count(1) == 1
        example = records[i]
        assert list(example.rankings) == row["rankings"] and list(example.responses) == row["responses"]
    assert report.variants.skipped["cut"] == "its votes do not connect its items"
    tied = "no 4 of its ranks are 1 apart, with one best"
    assert {name: why for name, why in report.variants.skipped.items() if name != "cut"} == {"q5": tied}
    assert len(set(rankings["q5"]["ranks"])) < 4 and report.variants.questions == 5
    assert len({tuple(sorted(row["models"])) + (row["id"].split("#")[0],) for row in rows}) == len(rows)


def test_images_and_videos_come_along(tmp_path, votes):
    folder = tmp_path / "in"
    (folder / "frames").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(folder / "i.png")
    Image.new("RGB", (8, 8)).save(folder / "frames" / "0.png")
    beside = {"image": "i.png", "video": "frames", "fps": 2.0, "system": "Be brief."}
    source = write_votes(folder / "responses.jsonl", [row | beside for row in response_rows(6)])
    out = tmp_path / "out" / "deep" / "r.jsonl"
    rank_file(votes, out, draws=0, variants=2, responses=source)
    (row, *_) = read(out.with_suffix(".variants.jsonl"))
    assert (row["image"], row["video"]) == ("../../in/i.png", "../../in/frames")
    example = data.load(out.with_suffix(".variants.jsonl"))[0]
    assert len(example.images) == len(example.videos) == 1 and example.videos[0].fps == 2
    assert example.prompt[0]["content"] == "Be brief."
    rank_file(votes, folder / "r.jsonl", draws=0, variants=2, responses=source)
    assert read(folder / "r.variants.jsonl")[0]["image"] == "i.png"
    moved = write_votes(tmp_path / "responses.jsonl", [row | beside for row in response_rows(6)])
    rank_file(votes, folder / "s.jsonl", draws=0, variants=2, responses=moved, image_root=folder)
    assert read(folder / "s.variants.jsonl")[0]["image"] == "i.png"


def test_images_in_parquet_become_data_urls(tmp_path, votes):
    import pyarrow as pa
    import pyarrow.parquet as pq
    from data_cases import png

    rows = [row | {"image": {"bytes": png(), "path": None}} for row in response_rows(6)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "responses.parquet")
    out = tmp_path / "r.jsonl"
    rank_file(votes, out, draws=0, variants=2, responses=tmp_path / "responses.parquet")
    assert data.load(tmp_path / "r.variants.jsonl")[0].images[0] == png()


# ---- which responses are drawn ----


def asked(models, texts=None):
    return Question("p", {}, {name: f"{name} says" for name in models} | (texts or {}))


def ranked(order, draws=0):
    """A ranking from votes that are clear: each string of `order` is a tie of its letters."""
    votes = [
        Vote(a, b, "tie" if level == other else "first")
        for level, ones in enumerate(order)
        for other, others in enumerate(order)
        for a in ones
        for b in others
        if level < other or (level == other and a < b)
    ]
    return aggregate(votes, "borda", draws=draws)


@pytest.mark.parametrize(
    "order, options, question, reason",
    [
        ("abc", {"size": 4}, asked("abc"), "fewer than 4 of its items have a response"),
        ("abcde", {"size": 4}, asked("abc"), "fewer than 4 of its items have a response"),
        ("abcde", {"size": 4, "gap": 2}, asked("abcde"), "no 4 of its ranks are 2 apart, with one best"),
        (["ab", "c"], {"size": 3}, asked("abc"), "no 3 of its ranks are 1 apart, with one best"),
        (["ab", "c"], {"size": 3, "gap": 0}, asked("abc"), "no 3 of its items have one best"),
        (
            "abc",
            {"size": 3},
            asked("abc", {"b": "a says"}),
            "no 3 of its responses that may be drawn are different texts",
        ),
        ("abc", {"size": 3}, None, "no responses to it are there"),
    ],
)
def test_questions_that_give_nothing_say_why(order, options, question, reason):
    found = draw({"q": ranked(order)}, {"q": question} if question else {}, **options)
    assert found.skipped == {"q": reason} and not found.records and not found.questions


def test_gaps_and_ties():
    found = draw({"q": ranked("abcdefg")}, {"q": asked("abcdefg")}, size=3, gap=3, per_question=5)
    assert [sorted(record["models"]) for record in found.records] == [["a", "d", "g"]] and found.fewer == {"q": 1}
    assert found.models["a"] == [1, 0, 0] and found.models["b"] == [0, 0, 0]
    found = draw({"q": ranked(["a", "bc", "d"])}, {"q": asked("abcd")}, size=4, gap=0)
    (record,) = found.records
    assert dict(zip(record["models"], record["rankings"], strict=True)) == {"a": 1, "b": 2, "c": 2, "d": 3}


def test_records_are_as_stable_as_was_asked():
    ranking = aggregate(random_votes(0, 7, per_pair=9), draws=100)
    questions = {"q": asked("abcdefg")}
    loose = draw({"q": ranking}, questions, size=3, per_question=40)
    assert min(loose.stabilities) < 0.9
    strict = draw({"q": ranking}, questions, size=3, per_question=40, stability=0.9)
    assert 0 < len(strict.records) < len(loose.records) and min(strict.stabilities) >= 0.9
    for found in (loose, strict):
        for record, sure in zip(found.records, found.stabilities, strict=True):
            assert sure == ranking.label_stability([ranking.items.index(name) for name in record["models"]])
    unsure = aggregate([Vote("a", "b", "first"), *[Vote("b", name, "first") for name in "cd"], Vote("c", "d", "first")])
    skipped = draw({"q": unsure}, questions, size=4, stability=1.0)
    assert skipped.skipped == {"q": "the best is stable in less than 1 of the draws"}


def test_models_are_balanced():
    """12 models whose order is chance: each is in a third of 120 records, and at each of the 4 places as often."""
    rng = np.random.default_rng(0)
    names = "abcdefghijkl"
    rankings = {f"q{i}": ranked([str(name) for name in rng.permutation(list(names))]) for i in range(60)}
    found = draw(rankings, dict.fromkeys(rankings, asked(names)), size=4, per_question=2)
    assert len(found.records) == 120 and found.questions == 60
    uses = {name: sum(places) for name, places in found.models.items()}
    assert set(uses) == set(names) and max(uses.values()) - min(uses.values()) <= 2
    assert max(map(max, found.models.values())) - min(map(min, found.models.values())) <= 4
    counted = collections.Counter(model for record in found.records for model in record["models"])
    assert uses == counted
    best = collections.Counter(record["rankings"].index(1) for record in found.records)
    assert len(best) == 4 and min(best.values()) > 15  # no place of the row is the place of the best


def test_one_order_leaves_no_choice_of_places_but_of_models():
    rankings = {f"q{i}": ranked("abcdefgh") for i in range(40)}
    found = draw(rankings, dict.fromkeys(rankings, asked("abcdefgh")), size=4)
    uses = [sum(places) for places in found.models.values()]
    assert sum(uses) == 160 and max(uses) - min(uses) <= 3 and found.models["a"][1:] == [0, 0, 0]


# ---- responses ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"response": "other"}, "a has answered question 'q0' before, otherwise"),
        ({"model": "b", "prompt": "Why?"}, "prompt of question 'q0' differ from those of its other responses"),
        ({"model": "b", "image": "other.png"}, "images, videos, ... of question 'q0' differ"),
        ({"model": "b", "response": None}, "response must be a string, got NoneType"),
        ({"model": None}, "model must be a string that is not empty"),
        ({"model": "b", "prompt": ""}, "prompt must be a string or a list of messages, got ''"),
    ],
)
def test_bad_responses_are_named(tmp_path, change, message):
    good = response_rows(1)[0] | {"image": "i.png"}
    path = write_votes(tmp_path / "r.jsonl", [good, good | change])
    with pytest.raises(DataError, match="example 'r.jsonl:2'.*" + message):
        read_responses(path, folder=tmp_path)
    bad = []
    assert list(read_responses(path, folder=tmp_path, bad=bad, skip_bad=True)["q0"].responses) == ["a"]
    assert bad[0].line == 2


def test_what_is_asked_may_be_the_question(tmp_path):
    rows = [{"question": "What?", "model": "a", "answer": "x"}]
    assert read_responses(rows, folder=tmp_path)["What?"].prompt == "What?"
    rows = [{"question_id": "7", "model": "a", "answer": "x"}]
    with pytest.raises(
        ColumnError, match="no column for prompt .prompt, instruction, question.; columns found: question_id"
    ):
        read_responses(rows, folder=tmp_path)
    rows = [{"question_id": "7", "model": "a", "answer": "x", "text": "What?"}]
    assert read_responses(rows, folder=tmp_path, columns={"prompt": "text"})["7"].prompt == "What?"
    assert list(read_responses(rows, folder=tmp_path, columns={"question": "text", "prompt": "text"})) == ["What?"]


def test_questions_are_named_as_in_the_votes(tmp_path):
    votes = [{"question_id": "7", "model_a": "a", "model_b": "b", "winner": "a"}]
    rows = [{"question_id": "7", "question": "What?", "model": m, "answer": m} for m in "ab"]
    rank_file(votes, tmp_path / "r.jsonl", variants=2, responses=rows, draws=0)
    assert read(tmp_path / "r.variants.jsonl")[0]["prompt"] == "What?"
    with pytest.raises(ValueError, match="no question of the votes, such as '7', is among .* such as 'What.'.*--map"):
        rank_file(
            votes, tmp_path / "s.jsonl", variants=2, responses=rows, draws=0, response_columns={"question": "question"}
        )


# ---- mistakes ----


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"method": "best"}, ValueError, "method must be one of"),
        ({"step": 3}, TypeError, "bradley_terry has no option 'step'"),
        ({"variants": 4}, ValueError, "variants needs responses"),
        ({"responses": "responses.jsonl"}, ValueError, "say how many responses each has, variants=4"),
        ({"variants": 1, "responses": "responses.jsonl"}, ValueError, "variants must be at least 2, got 1"),
        ({"variants": 4, "responses": "responses.jsonl", "gap": -1}, ValueError, "gap must be at least 0"),
        (
            {"variants": 4, "responses": "responses.jsonl", "per_question": 0},
            ValueError,
            "per_question must be at least 1",
        ),
        ({"variants": 4, "responses": "responses.jsonl", "stability": 2}, ValueError, "stability must be a share"),
        ({"variants": 4, "responses": "responses.jsonl", "stability": 0.5, "draws": 0}, ValueError, "needs draws"),
        ({"variants": 4, "responses": "responses.jsonl", "variants_out": "r.jsonl"}, ValueError, "written besides"),
        (
            {"variants": 4, "responses": "responses.jsonl", "image_root": "no"},
            ValueError,
            "image_root is no folder: no",
        ),
        ({"variants": 4, "responses": "responses.jsonl", "response_columns": {"a": "b"}}, ValueError, "maps 'a'"),
        ({"out": "r.csv"}, ValueError, "out must be a .jsonl file, got r.csv"),
        ({"out": "votes.jsonl", "overwrite": True}, ValueError, "out is, or lies in, what is read"),
        ({"out": "there.jsonl"}, ValueError, "out is there already: there.jsonl: .*--overwrite"),
        ({"method": "bradley_terry", "prior": 0}, ValueError, "question 'q1': prior=0"),
    ],
)
def test_mistakes_write_nothing(tmp_path, monkeypatch, votes, responses, options, error, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.jsonl").write_text("mine")
    before = {path.name for path in tmp_path.iterdir()}
    with pytest.raises(error, match=message):
        rank_file("votes.jsonl", **{"out": "r.jsonl"} | options)
    assert {path.name for path in tmp_path.iterdir()} == before and (tmp_path / "there.jsonl").read_text() == "mine"
    rank_file("votes.jsonl", "there.jsonl", draws=0, overwrite=True)


def test_files_without_a_vote(tmp_path):
    path = write_votes(tmp_path / "v.jsonl", [{"question": "q", "model_a": "x", "model_b": "x", "winner": "a"}])
    with pytest.raises(ValueError, match="there is no vote in 1 records, 1 of them bad"):
        rank_file(path, tmp_path / "r.jsonl", skip_bad=True)


def test_too_many_sets_are_sampled(monkeypatch):
    monkeypatch.setattr("yojo.rankings.variants.MOST_SETS", 50)
    names = "abcdefghijkl"
    found = draw({"q": ranked(names)}, {"q": asked(names)}, size=4, per_question=3)
    assert len(found.records) == 3

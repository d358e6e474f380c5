"""Opened benchmarks: counts, column maps, kinds of files, laziness, pickles."""

import io
import json
import pickle

import numpy as np
import pytest
from benchmark_cases import CASES, made, opened, records_of, write, write_media
from data_cases import png
from PIL import Image

from yojo.data import ColumnError, DataError
from yojo.evaluation import benchmarks
from yojo.evaluation.benchmarks.benchmark import question_of
from yojo.evaluation.benchmarks.sources import frames_of

ENTRY = ("number", "id", "group", "question", "tags", "info", "rankings", "lengths")


def comparable(item):
    """All of an item but where it stands, its media as what they show."""
    example = item.example
    media = [_pixels(image) for image in example.images] + [str(video.source) for video in example.videos]
    text = json.dumps(example.prompt, default=repr)
    return [getattr(item, key) for key in ENTRY if key != "id" or item.id != item.where] + [
        text, list(example.responses), list(example.rankings), media, example.literal_tags,
    ]  # fmt: skip


def _shown(example):
    parts = example.prompt[0]["content"]
    return " ".join("(image)" if part["type"] == "image" else part["text"] for part in parts)


def _pixels(image):
    return np.asarray(Image.open(io.BytesIO(image) if isinstance(image, bytes) else image)).tolist()


# Parquet files of MMRB2 have a layout of their own: test_rows_of_the_hub_are_the_pairs_of_the_json.
KINDS = [(name, kind) for name in CASES for kind in ("json", "parquet") if (name, kind) != ("mmrb2", "parquet")]


@pytest.mark.parametrize("name, kind", KINDS)
def test_kinds_of_files_give_the_same_items(name, kind, tmp_path):
    expected = list(map(comparable, made(name, tmp_path)))
    records = {"pairs": CASES[name][0]} if name == "mmrb2" else CASES[name][0]
    found = opened(name, write(records, tmp_path, kind))
    assert list(map(comparable, found)) == expected
    assert [item.where for item in found] == [f"data.{kind}:{line + 1}" for line in range(len(found))]


def test_images_may_be_bytes_as_datasets_stores_them(tmp_path):
    records = records_of("vl-rewardbench")
    expected = list(map(comparable, made("vl-rewardbench", tmp_path)))
    for record in records:
        record["image"] = {"bytes": (tmp_path / record["image"]).read_bytes(), "path": None}
    found = opened("vl-rewardbench", write(records, tmp_path, "parquet"))
    assert list(map(comparable, found)) == expected
    in_memory = opened("vl-rewardbench", records)
    assert list(map(comparable, in_memory)) == expected and in_memory[2].where == "records:3"


def test_rows_of_the_hub_are_the_pairs_of_the_json(tmp_path):
    folder = write_media(tmp_path)
    (tmp_path / "json").mkdir()
    (tmp_path / "json" / "edit.json").write_text(json.dumps({"pairs": CASES["mmrb2"][0]}))
    (tmp_path / "json" / "reasoning.json").write_text(json.dumps({"pairs": CASES["mmrb2"][0][:1]}))
    (tmp_path / "json" / "reasoning_response_only.json").write_text('{"pairs": [{"id": "1"}]}')
    from_json = opened("mmrb2", tmp_path / "json", image_root=folder)
    assert from_json.group_counts == {"edit": 3, "reasoning": 1}
    rows = [
        {
            "pair_id": record["id"], "prompt_source": "made up", "chosen": record["chosen"].lower(),
            "prompt_text": "Look here <image_1> and at " + f"{record['id'][0]}." if i < 2 else "Look here and at b.",
            "prompt_images": [{"bytes": png(colour="white"), "path": None}] * (i < 2),
            **{f"response_{side}_text": record[f"response_{side}"]["response_content"][0][1] for side in "ab"},
            "response_a_images": [], "response_b_images": [],
        }
        for i, record in enumerate(CASES["mmrb2"][0])
    ]  # fmt: skip
    for task, count in (("edit", 3), ("reasoning", 1)):
        (tmp_path / "hub" / task).mkdir(parents=True)
        write(rows[:count], tmp_path / "hub" / task, "parquet", "test-00000-of-00001")
    from_rows = opened("mmrb2", tmp_path / "hub")
    assert from_rows.group_counts == {"edit": 3, "reasoning": 1}
    for one, other in zip(from_json, from_rows, strict=True):
        assert (one.id, one.group, one.rankings, one.lengths) == (other.id, other.group, other.rankings, other.lengths)
        assert list(map(_pixels, one.example.images)) == list(map(_pixels, other.example.images))
        assert _shown(one.example) == _shown(other.example)
    rows[1]["prompt_text"] = "<image_1> and <image_2>"
    with pytest.raises(DataError, match="places for 2 images, and prompt_images holds 1"):
        opened("mmrb2", rows)
    rows[1] |= {"prompt_text": "Without a place", "response_b_images": [{"bytes": png(), "path": None}]}
    rows[2]["response_a_text"] = "As <image_1> shows."
    items = opened("mmrb2", rows, skip_bad=True)
    whys = [why.split(",")[0] for _, why in items.bad]
    assert len(items) == 1 and whys == ["response_b holds images", "response_a holds images"]


def test_a_folder_of_pairs_without_a_task(tmp_path):
    write(CASES["mmrb2"][0], tmp_path, "json", "other")
    with pytest.raises(DataError, match="no file named after t2i, edit, interleaved, reasoning"):
        opened("mmrb2", tmp_path)
    with pytest.raises(DataError, match="no such file"):
        opened("mmrb2", tmp_path / "nothing.json")
    (tmp_path / "pairs.csv").write_text("a,b")
    with pytest.raises(DataError, match="unknown extension '.csv'"):
        opened("mmrb2", tmp_path / "pairs.csv")


def test_what_a_table_fills_in_is_not_there(tmp_path):
    records = records_of("vl-rewardbench")
    records[2].pop("query")
    with pytest.raises(DataError, match="no query; the record has id, response, image, human_ranking, query_source$"):
        opened("vl-rewardbench", write(records, write_media(tmp_path), "parquet"))


# ---- counts ----


def test_counts_are_compared_with_the_published_ones(tmp_path):
    file = write(CASES["vl-rewardbench"][0], write_media(tmp_path))
    with pytest.raises(
        DataError, match="not all of VL-RewardBench: general: 183 published, 2 found;.*another version.*partial"
    ):
        benchmarks.open_benchmark("vl-rewardbench", file)
    items = benchmarks.open_benchmark("vl-rewardbench", file, partial=True)
    assert items.missing == {"general": (183, 2), "hallucination": (749, 3), "reasoning": (318, 2)}
    assert made("mm-rlhf-rewardbench", tmp_path).missing == {"all": (170, 5)}


def whole(bad=()):
    """As many records as JudgeBench's gpt split has; those whose numbers are in `bad` cannot be judged."""
    sources = ["mmlu-pro-x"] * 154 + ["livebench-reasoning"] * 98 + ["livebench-math"] * 56 + ["livecodebench"] * 42
    return [
        {
            "pair_id": str(i), "question": f"{i}?", "response_A": "yes", "response_B": "yes" if i in bad else "no",
            "label": "A>B", "source": source,
        }
        for i, source in enumerate(sources)
    ]  # fmt: skip


def test_a_whole_benchmark_needs_no_partial():
    items = benchmarks.open_benchmark("judgebench-gpt", whole())
    assert len(items) == 350 and items.missing == {} and items.bad == []
    assert items.group_counts == {"knowledge": 154, "reasoning": 98, "math": 56, "coding": 42}
    with pytest.raises(DataError, match="knowledge: 154 published, 155 found"):
        benchmarks.open_benchmark("judgebench-gpt", [*whole(), whole()[0]])
    with pytest.raises(DataError, match="sudoku: 0 published, 1 found"):
        benchmarks.open_benchmark("judgebench-gpt", [*whole(), whole()[0] | {"source": "sudoku"}])


def test_records_left_out_explain_what_lacks():
    items = benchmarks.open_benchmark("judgebench-gpt", whole(bad=(0, 349)), skip_bad=True)
    assert len(items) == 348 and items.missing == {"knowledge": (154, 153), "coding": (42, 41)}
    assert [where for where, _ in items.bad] == ["records:1", "records:350"]
    with pytest.raises(DataError, match="knowledge: 154 published, 152 found"):  # one left out, one more not there
        benchmarks.open_benchmark("judgebench-gpt", whole(bad=(0,))[:1] + whole()[2:], skip_bad=True)
    with pytest.raises(DataError, match="coding: 42 published, 43 found"):  # one left out does not explain one too many
        benchmarks.open_benchmark("judgebench-gpt", [*whole(bad=(0,)), whole()[-1]], skip_bad=True)
    with pytest.raises(
        DataError, match="none of its 350 records can be judged; the first, records:1: responses 0 and 1"
    ):
        benchmarks.open_benchmark("judgebench-gpt", whole(bad=range(350)), skip_bad=True)


# ---- columns ----


@pytest.mark.parametrize("name", [name for name in benchmarks.names() if not benchmarks.get(name).confirmed])
def test_a_layout_that_is_not_confirmed_asks_for_a_column_map(name, tmp_path):
    file = write(CASES[name][0], write_media(tmp_path))
    needed = ", ".join(benchmarks.get(name).fields)
    with pytest.raises(
        ColumnError, match=f"not confirmed: say which column is which.*for {needed} at least.*found: asked"
    ):
        opened(name, file, columns=None)
    with pytest.raises(ColumnError, match="for prompt at least"):
        opened(name, file, columns={field: column for field, column in CASES[name][1].items() if field != "prompt"})


def test_column_maps_reach_other_names_and_into_objects(tmp_path):
    expected = list(map(comparable, made("vl-rewardbench", tmp_path)))
    records = records_of("vl-rewardbench")
    for record in records:
        record["asked"], record["meta"] = record.pop("query"), {"better": record.pop("human_ranking")}
    file = write(records, tmp_path)
    found = opened("vl-rewardbench", file, columns={"query": "asked", "human_ranking": "meta.better"})
    assert list(map(comparable, found)) == expected
    with pytest.raises(
        ColumnError, match="no column 'query', which VL-RewardBench needs; columns found: id, .*--map query="
    ):
        opened("vl-rewardbench", file)
    with pytest.raises(ColumnError, match="no column 'ask', mapped to query; columns found"):
        opened("vl-rewardbench", file, columns={"query": "ask", "human_ranking": "meta.better"})
    with pytest.raises(ValueError, match="maps 'quary', which is no field of vl-rewardbench .did you mean query"):
        opened("vl-rewardbench", file, columns={"quary": "asked"})
    with pytest.raises(ValueError, match="no name of a column"):
        opened("vl-rewardbench", file, columns={"query": ""})
    with pytest.raises(TypeError, match="columns must be a dict"):
        opened("vl-rewardbench", file, columns=["query"])


def test_preferences_of_any_format(tmp_path):
    records = [
        {"prompt": "One?", "chosen": "good", "rejected": "bad one", "topic": "x", "key": 7, "asked": "q"},
        {"prompt": "Two?", "chosen": "better", "rejected": "worse", "topic": "y", "key": 8, "asked": "q"},
    ]
    items = benchmarks.open_benchmark(
        "preferences", write(records, tmp_path), columns={"group": "topic", "id": "key", "question": "asked"}
    )
    entries = [items.light(i) for i in range(2)]
    assert [(e.group, e.id, e.question, e.rankings) for e in entries] == [
        ("x", "7", "q", (1, 2)),
        ("y", "8", "q", (1, 2)),
    ]
    again = benchmarks.open_benchmark("preferences", records, format="trl")
    assert (
        again[1].example.responses == ["better", "worse"]
        and again.light(1).id == "records:2"
        and again.light(1).group == "all"
    )
    assert again.light(0).question != again.light(1).question
    targets = [{"prompt": "One?", "responses": ["a", "b", "c"], "targets": [0.2, 0.6, 0.2]}]
    items = benchmarks.open_benchmark("preferences", targets)
    assert items.light(0).rankings == (2, 1, 2) and items[0].example.rankings == [2, 1, 2]
    with pytest.raises(ColumnError, match="no column 'topics'"):
        benchmarks.open_benchmark("preferences", records, columns={"group": "topics"})
    with pytest.raises(ValueError, match="format is for preferences only"):
        opened("vl-rewardbench", CASES["vl-rewardbench"][0], format="trl")


def test_one_parser_for_one_preference():
    record = {"prompt": "One?", "chosen": "good", "rejected": "bad"}
    assert benchmarks.get("preferences").parse(record).rankings == [1, 2]


# ---- the object ----


@pytest.mark.parametrize(
    "name", ["vl-rewardbench", "mm-rlhf-rewardbench", "mr2bench-video-4", "judgebench-gpt", "preferences"]
)
@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_items_can_be_pickled(name, kind, tmp_path):
    items = opened(name, write(CASES[name][0], write_media(tmp_path), kind))
    items[0]  # an open file must not travel
    copied = pickle.loads(pickle.dumps(items))
    assert list(map(comparable, copied)) == list(map(comparable, items))
    assert (copied.missing, copied.group_counts, copied.name) == (items.missing, items.group_counts, items.name)
    assert copied.benchmark == items.benchmark


def test_items_are_a_sequence(tmp_path):
    items = made("vl-rewardbench", tmp_path)
    assert items[-1].number == 6 and items.light(np.int64(2)).number == 2 and items.name == "data.jsonl"
    with pytest.raises(IndexError, match="item 7 of 7"):
        items[7]
    with pytest.raises(TypeError):
        items["first"]


def test_nothing_is_looked_up_before_an_item_is_read(tmp_path, monkeypatch):
    from yojo.evaluation.benchmarks import sources

    asked = []
    monkeypatch.setattr(sources, "find_image", lambda image, *rest: asked.append(image) or image)
    items = made("vl-rewardbench", tmp_path)
    [items.light(i) for i in range(len(items))]
    assert asked == []
    items[3]
    assert asked == ["images/b.png"]


def test_urls_are_fetched_only_where_allowed(tmp_path):
    records = records_of("vl-rewardbench")
    records[0]["image"] = "https://example.invalid/a.png"
    items = opened("vl-rewardbench", write(records, write_media(tmp_path)))
    with pytest.raises(DataError, match=r"data.jsonl:1'.*is a URL.*allow_urls"):
        items[0]


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"skip_bad": 1}, TypeError, "skip_bad must be a bool, got 1"),
        ({"partial": "yes"}, TypeError, "partial must be a bool"),
        ({"allow_urls": None}, TypeError, "allow_urls must be a bool"),
        ({"image_root": "/nowhere/at/all"}, ValueError, "image_root is no folder"),
    ],
)
def test_bad_arguments(options, error, message):
    with pytest.raises(error, match=message):
        opened("judgebench", CASES["judgebench"][0], **options)


def test_frames_are_spaced_evenly():
    assert frames_of(3, 32) == [0, 1, 2] and frames_of(32, 32) == list(range(32))
    assert frames_of(100, 4) == [0, 33, 66, 99]
    assert len(set(frames_of(33, 32))) == 32


def test_questions_are_told_apart_by_text_and_media():
    one = question_of("What?", [{"bytes": b"1", "path": None}])
    assert one == question_of("What?", [b"1"]) and len(one) == 16
    others = [
        question_of("What?"),
        question_of("Which?", [b"1"]),
        question_of("What?", [b"2"]),
        question_of("What?", (), [b"1"]),
    ]
    assert len({one, *others}) == 5

"""Preference pairs: which are made, that none is there twice, and that they read as the records they are from."""

import itertools

import numpy as np
import pytest
from chosen_cases import read_rows, shown, write_scores
from data_cases import png, write_lines

from yojo import data
from yojo.inputs.messages import place
from yojo.scoring import choose
from yojo.scoring.seen import Seen

TOOLS = [{"type": "function", "function": {"name": "far", "parameters": {"type": "object", "properties": {"a": {}}}}}]


@pytest.fixture()
def make(tmp_path):
    """Function (records, scores) -> scores file."""

    def make(records, scores, **options):
        (tmp_path / "in").mkdir(exist_ok=True)
        source = write_lines(tmp_path / "in" / "data.jsonl", records)
        return write_scores(tmp_path / "s.jsonl", source, scores, **options)

    return make


def texts(path):
    return [(row["chosen"], row["rejected"]) for row in read_rows(path)]


def record(*responses, prompt="?", **fields):
    return {"prompt": prompt, "responses": list(responses), **fields}


@pytest.mark.parametrize(
    "responses, scores, pair",
    [
        ("abc", [1, 3, 2], ("b", "a")),
        ("abcd", [1, 3, 3, 1], ("b", "a")),  # of equal ones the first, at both ends
        ("abc", [2, 2, 2], None),
        (["a", "b", "a"], [3, 2, 1], ("a", "b")),  # the text at its better place
        (["a", "b", "a "], [1, 2, 3], ("a ", "b")),
        (["a", " a"], [1, 2], None),
        ("a", [1], None),
    ],
)
def test_the_best_against_the_worst(make, tmp_path, responses, scores, pair):
    path = make([record(*responses), record("good", "bad", prompt="other")], [scores, [1, 0]])
    done = choose.pairs(path, tmp_path / "o.jsonl")
    assert texts(tmp_path / "o.jsonl") == ([pair] if pair else []) + [("good", "bad")]
    assert sum(done.left_out.values()) == (pair is None)
    assert done.notes["ties for the best or the worst"] == (responses == "abcd")


def test_all_pairs_that_differ_enough(make, tmp_path):
    out = tmp_path / "o.jsonl"
    path = make([record(*"abcd")], [[1, 3, 2, 3]])
    choose.pairs(path, out, kind="all")
    assert texts(out) == [("b", "a"), ("d", "a"), ("b", "c"), ("d", "c"), ("c", "a")]
    choose.pairs(path, out, kind="all", margin=1, overwrite=True)  # more than the margin, not as much
    assert texts(out) == [("b", "a"), ("d", "a")]
    done = choose.pairs(path, out, kind="all", max_pairs=3, overwrite=True)
    assert texts(out) == [("b", "a"), ("d", "a"), ("b", "c")] and done.left_out["pairs beyond 3 of a record"] == 2
    for row in read_rows(out):
        assert row["score_margin"] == row["score_chosen"] - row["score_rejected"] > 0
    with pytest.raises(ValueError, match=r"nothing to write: .*records with no margin above 2 \(1\)"):
        choose.pairs(path, out, margin=2, overwrite=True)


def test_pairs_of_many_records_are_as_counted_by_hand(make, tmp_path):
    rng = np.random.default_rng(0)
    records, scores = [], []
    for _ in range(120):
        count = int(rng.integers(1, 6))
        responses = [f"r{rng.integers(4)}" for _ in range(count)]
        records.append(record(*responses, prompt=f"q{rng.integers(8)}"))
        scores.append(rng.integers(0, 4, count).tolist())
    choose.pairs(make(records, scores), tmp_path / "o.jsonl", kind="all")
    found = [(row["prompt"], row["chosen"], row["rejected"]) for row in read_rows(tmp_path / "o.jsonl")]
    expected = set()
    for one, values in zip(records, scores, strict=True):
        top = {}
        for text, value in zip(one["responses"], values, strict=True):
            top[text] = max(value, top.get(text, value))
        expected |= {(one["prompt"], a, b) for a, b in itertools.permutations(top, 2) if top[a] > top[b]}
    assert len(found) == len(set(found)) and set(found) == expected


def test_the_same_pair_about_another_picture_is_another_pair(make, tmp_path):
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).write_bytes(png())
    names = ("a.png", "b.png", "a.png")
    path = make([record("x", "y", image=name) for name in names], [[1, 0]] * 3)
    done = choose.pairs(path, tmp_path / "o.jsonl")
    assert [row["images"] for row in read_rows(tmp_path / "o.jsonl")] == [[f"{tmp_path}/in/{n}"] for n in names[:2]]
    assert done.left_out["pairs that were there already"] == 1


PART = {"type": "text", "text": "What"}
RATED = {"helpfulness": {"Rating": "3"}}
RECORDS = {
    "string": record("x", "y", "z", id="r", note=3),
    "system": record("x", "y", "z", system="Be kind."),
    "turns": record(
        "x", "y", "z",
        prompt=[
            {"role": "user", "content": "Hello"},
            {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "far"}}]},
            {"role": "tool", "content": "2 km"},
        ],
        tools=TOOLS,
    ),
    "parts": record("x", "y", "z", prompt=[{"role": "user", "content": [PART, " is?"]}]),
    "image": record("x", "y", "z", image="a.png"),
    "tags": record("x", "y", "z", prompt="One <image> and\n<image> two", images=["b.png", "a.png"], system="Look."),
    "index": record(
        "x", "y", "z",
        prompt=[{"role": "user", "content": [{"type": "image", "index": 1}, PART, {"type": "image", "index": 0}]}],
        images=["a.png", "b.png"],
    ),
    "inline": record(
        "x", "y", "z",
        prompt=[
            {"role": "system", "content": "Look."},
            {"role": "user", "content": [{"type": "image", "image": "b.png"}, PART, {"type": "image"}]},
        ],
        images=["a.png"],
    ),
    "video": record("x", "y", "z", prompt="<video>?", video="frames", fps=2),
    "videos": record("x", "y", "z", videos=["frames", ["a.png", "b.png"]], fps=[2, None]),
    "question": {"question": "?", "responses": ["x", "y", "z"], "messages": [{"role": "user", "content": "?"}]},
    "trl": {"chosen": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "x"}],
            "rejected": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "y"}]},
    "nectar": {"prompt": "\n\nHuman: ?\n\nAssistant: ", "answers": [{"answer": text, "rank": 1} for text in "xyz"]},
}  # fmt: skip


OTHERS = {
    "ultrafeedback": {"instruction": "?", "completions": [{"response": text, "annotations": RATED} for text in "xyz"]},
    "vlfeedback": {
        "prompt": "?", "img_path": "a.png", "completions": [{"response": text, "annotations": RATED} for text in "xy"],
    },
    "rewardbench2": {"prompt": "?", "chosen": ["x"], "rejected": ["y", "z"], "id": "1", "subset": "s"},
    "rlaifv": {"question": "?", "image": "a.png", "chosen": "x", "rejected": "y"},
    "nemo_rl": {
        "context": [{"role": "user", "content": "?"}], "completions": [{"rank": i, "completion": text} for i, text in enumerate("xyz")],
    },
    "transcripts": {"chosen": "\n\nHuman: ?\n\nAssistant: x", "rejected": "\n\nHuman: ?\n\nAssistant: y"},
    "targets": record("x", "y", targets=[0.75, 0.25]),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize("name", RECORDS)
def test_pairs_read_as_the_records_they_are_from(make, tmp_path, name, suffix):
    home, out = tmp_path / "in", tmp_path / "out" / f"o{suffix}"
    (home / "frames").mkdir(parents=True)
    for file, colour in (("a.png", "red"), ("b.png", "blue"), ("frames/0.png", "green"), ("frames/1.png", "black")):
        (home / file).write_bytes(png((8, 8), colour))
    path = make([RECORDS[name]], [[2, 3, 1][: 2 if name == "trl" else 3]])
    example = data.load(home / "data.jsonl", ranked=False)[0]
    if name == "videos" and suffix == ".parquet":  # a path beside a list
        with pytest.raises(ValueError, match="the column 'videos' holds values that no Parquet file has side by side"):
            choose.pairs(path, out)
        return
    choose.pairs(path, out)
    records = data.load(out)
    (row,), (raw,) = records, read_rows(out)
    assert records.format == "trl" and row.rankings == [1, 2]
    assert row.responses == (["y", "x"] if name == "trl" else ["y", "z"])
    assert shown(row) == shown(example) and row.tools == example.tools
    assert [turn.get("tool_calls") for turn in turns_of(row)] == [turn.get("tool_calls") for turn in turns_of(example)]
    assert [video.fps for video in row.videos] == [video.fps for video in example.videos]
    if isinstance(example.prompt, str) and not (example.images or example.videos):
        assert row.prompt == example.prompt == raw["prompt"] and raw["chosen"] == row.responses[0]
    else:
        assert [turn["role"] for turn in raw["chosen"]] == ["assistant"] and isinstance(raw["prompt"], list)
    assert raw.get("note") == RECORDS[name].get("note") and raw.get("id") == RECORDS[name].get("id")


@pytest.mark.parametrize("name", [*RECORDS, *OTHERS])
def test_what_other_commands_write_reads_so_too(make, tmp_path, name):
    home, out = tmp_path / "in", tmp_path / "out" / "o.jsonl"
    (home / "frames").mkdir(parents=True)
    for file, colour in (("a.png", "red"), ("b.png", "blue"), ("frames/0.png", "green"), ("frames/1.png", "black")):
        (home / file).write_bytes(png((8, 8), colour))
    one = (RECORDS | OTHERS)[name]
    example = data.load([one], ranked=False, image_root=str(home))[0]
    path = make([one], [[2, 3, 1][: len(example.responses)]])
    for function, options in (
        (choose.best, {}), (choose.filter_, {"min_score": 3}), (choose.filter_, {"min_score": 0, "responses": True}),
    ):  # fmt: skip
        function(path, out, overwrite=True, **options)
        (row,) = data.load(out, ranked=False)
        assert shown(row) == shown(example) and (row.tools, row.rankings) == (example.tools, example.rankings)
        assert list(row.responses) == list(example.responses)


def turns_of(example):
    return place(example.prompt, example.images, example.videos)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_a_file_has_prompts_of_one_form(make, tmp_path, suffix):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png())
    out = tmp_path / f"o{suffix}"
    records = [RECORDS["string"], RECORDS["system"], RECORDS["image"] | {"prompt": "!"}]
    for count, form in enumerate(("strings", "messages", "messages with parts"), 1):
        done = choose.pairs(make(records[:count], [[2, 3, 1]] * count), out, overwrite=True)
        assert done.line().endswith(f"prompts are {form}") and done.written == count
        kinds = {type(row["prompt"]) for row in read_rows(out)}
        contents = {type(turn["content"]) for row in read_rows(out) for turn in row["prompt"] if isinstance(turn, dict)}
        assert (kinds, contents) == (({str}, set()), ({list}, {str}), ({list}, {list}))[count - 1]
        assert all(("images" in row) == (count == 3) for row in read_rows(out))  # empty where there are none
        for i, row in enumerate(data.load(out)):
            assert shown(row) == shown(data.load(tmp_path / "in" / "data.jsonl", ranked=False)[i])
    choose.pairs(make(records[:1], [[2, 3, 1]]), out, messages=True, overwrite=True)
    (row,) = read_rows(out)
    assert row["prompt"] == [{"role": "user", "content": "?"}]
    assert row["chosen"] == [{"role": "assistant", "content": "y"}]


def test_columns_with_a_meaning_make_way(make, tmp_path):
    fields = {"history": "old", "margin": 1, "score_margin": 2, "original_score_margin": 3, "id": "r"}
    path = make([record("x", "y", **fields)], [[1, 0]], ignore_columns=["history"])
    done = choose.pairs(path, tmp_path / "o.jsonl")
    (row,) = read_rows(tmp_path / "o.jsonl")
    assert (
        row["original_history"] == "old" and row["original_original_score_margin"] == 2 and row["score_margin"] == 1.0
    )
    assert row["original_score_margin"] == 3 and row["margin"] == 1 and row["id"] == "r" and "history" not in row
    assert sum(done.notes.values()) == 2 and data.load(tmp_path / "o.jsonl")[0].rankings == [1, 2]


def test_a_set_of_digests_is_a_set():
    rng = np.random.default_rng(0)
    digests = [rng.integers(0, 256, 16, "uint8").tobytes() for _ in range(2000)]
    digests += [digest[:8] + bytes(7) + b"\1" for digest in digests[:200]]  # alike in what they are found by
    seen, own = Seen(), set()
    for at in rng.integers(0, len(digests), 6000):
        assert seen.add(digests[at]) == (digests[at] not in own)
        own.add(digests[at])
    assert len(seen) == len(own) and len(seen._table) < 64 * len(seen)


def test_tags_that_are_characters_stay_characters(make, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.png").write_bytes(png())
    path = make([record("x", "y", prompt="Say <image>", image="a.png")], [[1, 0]], literal_tags=True)
    choose.pairs(path, tmp_path / "o.jsonl")
    (row,) = data.load(tmp_path / "o.jsonl", literal_tags=True)
    example = data.load(tmp_path / "in" / "data.jsonl", ranked=False, literal_tags=True)[0]
    assert place(row.prompt, row.images, literal_tags=True) == place(
        example.prompt, [f"{tmp_path}/in/a.png"], literal_tags=True
    )

"""What a record holds is read, refused or reported: every column, every field of a message, in every format."""

import copy
import json
import logging
import pickle

import hypothesis
import numpy as np
import pyarrow
import pytest
from data_cases import GOOD, only, png, write_lines
from hypothesis import strategies as st
from PIL import Image
from pyarrow import parquet
from test_sources import ARENA, CRITIC, RECORDS, critic, said
from test_sources import TURNS as CHAT
from typer.testing import CliRunner

import yojo
from yojo import data
from yojo.cli import app
from yojo.data import checking, columns, sources

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo", "days": None}}}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
TALK = [
    {"role": "user", "content": "Weather?", "name": "Ann"},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "Look it up."},
    {"role": "tool", "tool_call_id": "call-1", "name": "weather", "content": "18 degrees"},
    {"role": "user", "content": "So?"},
]
PAIR = {"prompt": "Which digit?", "chosen": "7", "rejected": "2"}
# One record of each format.
EACH = {RECORDS[name][1]: RECORDS[name][0] for name in RECORDS}


@pytest.fixture()
def folder(tmp_path):
    """With digit.png, and v, a video of three frames."""
    (tmp_path / "digit.png").write_bytes(png())
    (tmp_path / "v").mkdir()
    for i in range(3):
        Image.new("RGB", (16, 16)).save(tmp_path / "v" / f"{i}.png")
    return tmp_path


def bad(record, message, **options):
    with pytest.raises(data.DataError, match=f"^example 'records:1': .*{message}"):
        only(record, **{"keep_tied": True} | options)


# ---- the same columns in every format ----


@pytest.mark.parametrize("format", EACH)
def test_every_format_reads_media_system_and_tools(format, folder):
    record = {name: value for name, value in EACH[format].items() if name not in ("image", "img_path")}
    if format == "llava_critic":
        record["conversations"] = critic(CRITIC.removeprefix("<image>\n"), "The better response: [second]")[
            "conversations"
        ]
    options = {"image_root": folder, "keep_tied": True}
    plain = only(record, **options)
    more = {"images": ["digit.png"], "video": "v", "fps": 2, "system": "Be brief.", "tools": json.dumps([TOOL])}
    if plain.prompt == CHAT:
        more["system"] = CHAT[0]["content"]
    records = data.load([record | more], **options)
    example = records[0]
    assert records.format == format and not records.unused
    assert len(example.images) == 1 and [video.fps for video in example.videos] == [2]
    assert example.tools == [TOOL]
    turns = plain.prompt if isinstance(plain.prompt, list) else [{"role": "user", "content": plain.prompt}]
    assert example.prompt == (turns if plain.prompt == CHAT else [{"role": "system", "content": "Be brief."}, *turns])
    assert (example.responses, example.rankings) == (plain.responses, plain.rankings)


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [json.dumps(TOOL)]])
def test_tools_as_data_sets_store_them(tools):
    assert only(GOOD | {"tools": tools}).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, [], "", "[]", "null"])
def test_no_tools(tools):
    assert only(GOOD | {"tools": tools}).tools is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"tools": "[{"}, "tools is a string that is not JSON"),
        ({"tools": ["[{"]}, "tool 0 is a string that is not JSON"),
        ({"tools": TOOL}, "tools must be a list of objects, or that list as JSON, got dict"),
        ({"tools": [7]}, "tool 0 must be an object, its description, got int"),
        ({"system": ["x"]}, "system must be a string, what the system turn says, got list"),
        (
            {"system": "Be kind.", "system_prompt": "Be rude."},
            "both system and system_prompt are given, and they differ",
        ),
        ({"system": "Be rude.", "prompt": CHAT}, "system says 'Be rude.' and the prompt's own system turn 'Be brief.'"),
        ({"question": "Another?"}, "both prompt and question are given, and they differ.*--ignore-columns question"),
        ({"image": "digit.png", "images": ["other.png"]}, "both images and image are given, and they differ"),
        ({"image": png(), "img_path": "digit.png"}, "both image and img_path are given, and they differ"),
        ({"video": "v", "videos": ["w"]}, "both videos and video are given, and they differ"),
        ({"fps": [1, 2]}, "2 rates under fps for 0 videos"),
        ({"fps": 10**400, "video": "v"}, "fps must be a number of frames, .* got a number of 1329 bits"),
        ({"sampling_interval": 1e-320, "video": "v"}, "sampling_interval must be a number of frames"),
        (
            {"audio": "a.wav"},
            "the column 'audio' is not read by the format yojo.*--map FIELD=audio.*--ignore-columns audio",
        ),
        ({"history": [["a", "b"]]}, "the column 'history' is not read"),
        ({"input": "7 x 8"}, "the column 'input' is not read"),
        ({"context": "A story."}, "the column 'context' is not read"),
        ({"messages": CHAT}, "the column 'messages' is not read"),
        ({"chosen": "another"}, "the column 'chosen' is not read"),
    ],
)
def test_what_would_change_the_prompt_is_never_left(change, message, folder):
    bad(GOOD | change, message, image_root=folder)


@pytest.mark.parametrize("name", ["tool_calls", "reasoning_content", "system", "images"])
def test_what_a_response_holds_beside_its_text_is_never_left(name):
    record = {"context": "?", "completions": [{"rank": n, "completion": "ab"[n], name: ["x"]} for n in range(2)]}
    bad(record, rf"the column 'completions\.{name}' is not read by the format nemo_rl")
    assert only(record, ignore_columns=[f"completions.{name}"]).responses == ["a", "b"]


def test_two_columns_may_say_the_same(folder):
    options = {"image_root": folder}
    example = only(GOOD | {"question": "Which digit?", "image": "digit.png", "images": ["digit.png"]}, **options)
    assert example.prompt == "Which digit?" and len(example.images) == 1
    assert len(only(GOOD | {"video": "v", "videos": ["v"]}, **options).videos) == 1
    both = PAIR | {"messages": [{"role": "user", "content": "Which digit?"}, *said("7")], "system": "Be brief."}
    records = data.load([both])
    assert records[0].prompt == CHAT and records.ignored == {"messages": 1}
    assert only(GOOD | {"prompt": CHAT, "system": "Be brief. "}).prompt == CHAT
    records = data.load([GOOD | {"chosen": "two"}], format="yojo")
    assert records[0].responses == GOOD["responses"] and records.ignored == {"chosen": 1}


def test_ranks_beside_a_pair_must_agree():
    record = PAIR | {"rankings": [1, 2]}
    assert only(record, format="trl").rankings == [1, 2]
    bad(record | {"rankings": [2, 1]}, "the column 'rankings' is not read by the format trl", format="trl")


def test_a_video_in_memory_may_be_an_array():
    frames = np.zeros((2, 16, 16, 3), np.uint8)
    (video,) = only(GOOD | {"video": frames, "fps": 2}).videos
    assert video.source is frames and video.fps == 2
    message = "video 0 must be a path of a file or a folder of frames, a list of frames or an array of them, got bytes"
    with pytest.raises(data.MediaError, match=message):
        only(GOOD | {"video": b"mp4"})
    with pytest.raises(data.MediaError, match="video 0: an array of frames must be"):
        only(GOOD | {"video": frames[0, 0]})


def test_the_rate_of_a_record_is_that_of_videos_in_its_messages(folder):
    prompt = [{"role": "user", "content": [{"type": "video", "video": "v"}, {"type": "text", "text": "?"}]}]
    example = only(GOOD | {"prompt": prompt, "sampling_interval": 2}, image_root=folder)
    assert example.prompt[0]["content"][0]["video"].fps == 0.5
    records = data.load([GOOD | {"fps": 2}])
    assert records[0].videos == [] and records.unused == {"fps": 1}


# ---- messages ----


def test_fields_of_messages_stay():
    record = {
        "prompt": TALK,
        "tools": [TOOL],
        "responses": ["It is 18 in Oslo.", "It is 18 in Rome."],
        "rankings": [1, 2],
    }
    example = only(record)
    assert [{**turn, "content": turn["content"] or None} for turn in example.prompt] == TALK
    other = copy.deepcopy(record)
    other["prompt"][1]["tool_calls"][0]["function"]["arguments"]["city"] = "Rome"
    assert only(other).prompt != example.prompt
    assert only(record).prompt == yojo.Example(**record).prompt and only(record).tools == [TOOL]


def test_tables_fill_objects_and_files_do_not(tmp_path):
    """A column of Parquet gives every message the keys of all; null that a file holds is the user's."""
    rows = [GOOD | {"prompt": TALK, "tools": [TOOL]}, GOOD | {"prompt": CHAT, "tools": None}]
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    talk, chat = data.load(tmp_path / "a.parquet")
    assert chat.prompt == CHAT and chat.tools is None and talk.tools == [TOOL]
    assert "days" not in talk.prompt[1]["tool_calls"][0]["function"]["arguments"]
    (from_lines,) = data.load(write_lines(tmp_path / "b.jsonl", rows[:1]))
    assert from_lines.prompt[1]["tool_calls"] == [CALL]


@pytest.mark.parametrize(
    "more",
    [{"tool_calls": [CALL]}, {"reasoning_content": "Hm."}, {"name": "Bob"}, {"thinking": "Hm."}, {"refusal": "No."}],
)
def test_a_response_is_one_text(more):
    (name,) = more
    message = rf"chosen has more than text \({name}\), and a response is one text"
    bad({"prompt": CHAT, "chosen": [said("7")[0] | more], "rejected": said("2")}, message)
    bad({"chosen": [*CHAT, said("7")[0] | more], "rejected": [*CHAT, *said("2")]}, message)
    nemo = {"context": CHAT, "completions": [{"rank": 1, "completion": [said("7")[0] | more]}]}
    bad(nemo, message.replace("chosen", "completion 0"), ranked=False)
    empty = dict.fromkeys(more, None)
    assert only({"prompt": CHAT, "chosen": [said("7")[0] | empty], "rejected": said("2")}).responses == ["7", "2"]


def test_one_text_is_not_better_than_itself():
    bad(PAIR | {"rejected": "7"}, "responses 0 and 1 are the same text, but ranked 1 and 2")
    bad(GOOD | {"responses": ["a", "b", "a"]}, "responses 0 and 2 are the same text, but ranked 2 and 3")
    soft = {"prompt": "?", "responses": ["a", "a"], "targets": [0.25, 0.75]}
    bad(soft, "the same text, but ranked 0.25 and 0.75")
    assert only(GOOD | {"responses": ["a", "b", "a"], "rankings": [1, 2, 1]}).responses == ["a", "b", "a"]


# ---- LLaVA-Critic ----


def test_tags_of_a_judges_prompt(folder):
    verdict = "The better response: [second]"
    question = "Question: [<image> or <image>?]\nThe first response: [see <image>]\nThe second response: [b]"
    both = critic(f"Judge.\n{question}", verdict, image=["digit.png", "digit.png"])
    example = only(both, image_root=folder)
    assert example.prompt == "<image> or <image>?" and example.responses == ["see <image>", "b"]  # a place, a text
    bad(critic(CRITIC, verdict, image=None), "1 <image> in the text, but 0 images are given")
    bad(critic(f"<image>\n{ARENA}", "[[A>B]]"), "2 <image> in the text, but 1 images are given")
    bad(critic("<video>\n" + CRITIC, verdict), "1 <video> in the text, but 0 videos are given")


# ---- what is left is said ----


def test_unused_columns_are_counted_and_warned_of_once(tmp_path, caplog):
    records = [GOOD | {"id": 1, "margin": 0.5}, GOOD, GOOD | {"margin": 0.25, "note": "x", "empty": ""}]
    path = write_lines(tmp_path / "a.jsonl", records)
    with caplog.at_level(logging.WARNING):
        loaded = data.load(path)
        assert "a.jsonl: columns not used: margin;" in caplog.text and not loaded.unused  # nothing is read yet
        for _ in range(2):
            list(loaded)
        assert loaded.unused == {"margin": 2, "note": 1} and loaded.ignored == {"id": 1}
        again = pickle.loads(pickle.dumps(loaded))
        assert again[0] == loaded[0] and again.unused == loaded.unused
    assert caplog.text.count("margin;") == 1 and caplog.text.count("not used: note;") == 1


def test_columns_left_out_knowingly(caplog):
    record = GOOD | {"margin": 0.5, "audio": "a.wav", "image": png(), "img_path": "digit.png"}
    with caplog.at_level(logging.WARNING):
        records = data.load([record], ignore_columns=["margin", "audio", "img_path"])
        assert records[0].images == [png()]
    assert not caplog.text and not records.unused and set(records.ignored) == {"margin", "audio", "img_path"}
    answers = RECORDS["nectar"][0]["answers"]
    noted = RECORDS["nectar"][0] | {"answers": [answer | {"note": "x"} for answer in answers]}
    for options, unused in (({}, {"answers.note": 1}), ({"ignore_columns": ["answers.note"]}, {})):
        records = data.load([noted], **options)
        assert len(records[0].responses) == 3 and records.unused == unused
    with pytest.raises(
        data.ColumnError, match=r"there is no column 'margn' \(in ignore_columns\); columns found: prompt"
    ):
        data.load([record], ignore_columns=["margn"])
    with pytest.raises(TypeError, match="ignore_columns must be a list of names of columns, got 'margin'"):
        data.load([record], ignore_columns="margin")
    with pytest.raises(TypeError, match="literal_tags must be a bool, got 1"):
        data.load([record], literal_tags=1)


def test_beside_a_column_map():
    meta = {"question": "Which digit?", "more": {"note": "x", "n": [1, 2]}}
    record = {"meta": meta, "prompt": "Other", "good": "7", "answers": ["7", "2"]}
    columns_ = {"prompt": "meta.question", "responses": "answers", "rankings": "meta.more.n"}
    records = data.load([record], columns=columns_)
    assert records[0].prompt == "Which digit?" and records[0].rankings == [1, 2]
    assert records.unused == {"prompt": 1, "meta.more.note": 1, "good": 1}
    meta["system"] = "Be brief."
    bad(record, r"the column 'meta\.system' is not read", columns=columns_)
    assert only(record, columns=columns_ | {"system": "meta.system"}).prompt == CHAT


def test_what_parts_hold_for_servers():
    url = {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "auto"}
    parts = [{"type": "image_url", "image_url": url}, {"type": "text", "text": "?", "cache_control": {"type": "x"}}]
    records = data.load([GOOD | {"prompt": [{"role": "user", "content": parts}]}])
    assert len(records[0].prompt[0]["content"]) == 2
    assert set(records.ignored) == {"parts.detail", "parts.cache_control"}
    parts[0]["max_pixels"] = 7
    bad(GOOD | {"prompt": [{"role": "user", "content": parts}]}, "'max_pixels'")


def test_literal_tags(folder):
    record = GOOD | {"prompt": "What does <image> mean in HTML?", "image": "digit.png"}
    for literal in (False, True):
        assert only(record, image_root=folder, literal_tags=literal).literal_tags is literal
    two = GOOD | {"prompt": "<image> or <image>?", "image": "digit.png"}
    bad(two, "2 <image> tags, but 1 images", image_root=folder)
    assert only(two, image_root=folder, literal_tags=True).prompt == two["prompt"]


def run(*arguments):
    return CliRunner().invoke(app, ["data", "check", *map(str, arguments)])


def test_the_command_lists_what_is_left(folder):
    lines = [GOOD | {"id": i, "margin": 0.5, "prompt": f"<image> or <image>? {i}"} for i in range(2)]
    path = write_lines(folder / "a.jsonl", [*lines, GOOD | {"image": "digit.png", "prompt": lines[0]["prompt"]}])
    assert run(path).exit_code == 1
    result = run(path, "--literal-tags", "--json", folder / "report.json")
    assert result.exit_code == 0, result.output
    assert "column not used: margin (2 records): the model sees nothing of it" in result.stdout
    assert "left out (names the record): id" in result.stdout
    total = json.loads((folder / "report.json").read_text())["total"]
    assert total["unused"] == {"margin": 2} and total["ignored"]["id"] == {"records": 2, "reason": "names the record"}
    result = run(path, "--literal-tags", "--ignore-columns", "margin")
    assert result.exit_code == 0 and "not used" not in result.stdout
    assert "left out (by ignore_columns): margin" in result.stdout


def test_the_report_lists_what_the_template_does_not_render(folder, make_reward_model):
    path = write_lines(folder / "a.jsonl", [GOOD, GOOD | {"prompt": TALK, "tools": [TOOL]}])
    (report,) = checking.check([path], processor=make_reward_model().processor).files
    assert report.good == 2 and report.unseen["tools"] == 1
    assert any("not seen by the model: tools (1 records)" in line for line in checking.notes(checking.Report([report])))
    assert not checking.check([path]).files[0].unseen


# ---- nothing that one record holds ends the check ----


def test_whatever_a_record_does_is_its_own_fault(folder, monkeypatch):
    deep = '{"prompt": ' + "[" * 100_000 + "]" * 100_000 + "}"
    digits = '{"prompt": "?", "responses": ["a", "b"], "rankings": [1, ' + "9" * 5000 + "]}"
    lines = [
        GOOD,
        deep,
        digits,
        '{"prompt": "?", "responses": ["a", "b"], "rankings": [1, 1e400]}',
        '{"prompt": "?", "responses": ["a", "b"], "rankings": [1, NaN]}',
        GOOD | {"image": "digit.png"},
        GOOD | {"prompt": [{"role": "user", "content": [{"type": "input_audio", "input_audio": "x"}]}]},
        GOOD | {"prompt": [{"role": "user", "content": [{"type": "image"}, {"type": "image"}]}], "image": "digit.png"},
        GOOD | {"prompt": [{"role": "system", "content": "?"}], "image": "digit.png"},
        GOOD,
    ]
    path = write_lines(folder / "a.jsonl", lines)
    import struct

    def broken(source, name):
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(checking, "load_image", broken)
    (report,) = checking.check([path]).files
    assert [b.line for b in report.bad] == [2, 3, 4, 5, 6, 7, 8, 9] and report.good == 2
    assert report.bad[4].reason == "error: unpack requires a buffer of 2 bytes" and report.missing_media == 1
    monkeypatch.setattr(checking, "load_image", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        checking.check([path])


def test_ratings_that_would_fill_the_memory():
    for rating in ("1e-999999999", "1e999999999", "1e400", float("inf"), float("nan"), 10**400):
        record = copy.deepcopy(EACH["ultrafeedback"])
        record["completions"][0]["annotations"]["helpfulness"]["Rating"] = rating
        try:
            assert len(only(record, keep_tied=True).rankings) == 3
        except data.DataError as error:
            assert "is no number" in str(error)


# ---- over records and chats ----

NAMES = st.sampled_from(sorted(columns.CONTENT) + ["margin", "weight", "note", "id", "source", "meta", "lang", "score"])
VALUES = st.one_of(
    st.none(), st.just(""), st.just([]), st.integers(3, 9), st.just("v@lue"), st.lists(st.just("v@lue"), max_size=2),
    st.just({"key": "v@lue"}), st.just([{"role": "user", "content": "v@lue"}]),
)  # fmt: skip
FIELDS = st.dictionaries(
    st.sampled_from(["tool_calls", "tool_call_id", "name", "reasoning_content", "weight", "x"]), VALUES, max_size=3
)
GOOD_PARTS = [
    {"type": "text", "text": "Wh@t?"},
    {"type": "input_text", "text": "Wh@t?"},
    {"text": "Wh@t?"},
    {"type": "text", "text": "Wh@t?", "cache_control": {"type": "x"}, "image": None},
    {"type": "image"},
    {"type": "image", "image": png(), "index": 0},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "auto"}},
]
BAD_PARTS = [
    {"type": "image", "max_pixels": 5},
    {"type": "image", "image": png(), "path": "a.png"},
    {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo=", "detail": "high"}},
    {"type": "input_audio", "input_audio": {"data": "v@lue"}},
    {"type": "text", "text": "Wh@t?", "image": "a.png"},
]


def turns_of(roles, parts):
    content = st.one_of(st.just("Wh@t?"), st.lists(st.sampled_from(parts), min_size=1, max_size=3))
    return st.builds(
        lambda role, said, more: {"role": role, "content": said} | more, st.sampled_from(roles), content, FIELDS
    )


CALLS = st.builds(lambda more: {"role": "assistant", "content": None} | more, FIELDS)
GOOD_TURNS = st.lists(st.one_of(turns_of(["system", "user", "assistant", "tool"], GOOD_PARTS), CALLS), max_size=3)
ANY_TURNS = st.lists(turns_of(["user", "assistant", "human", "judge"], GOOD_PARTS + BAD_PARTS), max_size=3)


def leaves(value):
    """Texts and numbers of a value that holds something."""
    if isinstance(value, dict):
        return [leaf for inner in value.values() for leaf in leaves(inner)]
    if isinstance(value, (list, tuple)):
        return [leaf for inner in value for leaf in leaves(inner)]
    return [value] if columns.given(value) else []


def is_seen(leaf, example):
    seen = [example.prompt, example.responses, example.rankings, example.tools, list(example.images)]
    seen += [[video.source, video.fps] for video in example.videos]
    return any(leaf == other for other in leaves(seen))


def loaded(record, **options):
    """(example, paths left) of one record; None where it is an error."""
    records = data.load([record], keep_tied=True, **options)
    try:
        example = records[0]
    except data.DataError:
        return None
    return example, {*records.unused, *records.ignored}


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(
    format=st.sampled_from(sorted(EACH)), more=st.dictionaries(NAMES, VALUES, max_size=3), data_=st.data()
)
def test_whatever_is_left_of_a_record_is_reported(format, more, data_, tmp_path_factory):
    root = tmp_path_factory.getbasetemp()
    (root / "digit.png").write_bytes(png())
    record = copy.deepcopy(EACH[format])
    inner = {"ultrafeedback": "completions", "nemo_rl": "completions"}.get(format)
    nested = data_.draw(st.dictionaries(st.sampled_from(["note", "system", "tools"]), VALUES, max_size=1))
    if inner and nested:
        record[inner][0] |= nested
    result = loaded(
        {name: value for name, value in more.items() if name not in record} | record, format=format, image_root=root
    )
    if result is None:
        return
    example, left = result
    for name, value in more.items():
        if name not in record:
            assert name in left or all(is_seen(leaf, example) for leaf in leaves(value)), name
    for name, value in nested.items() if inner else ():
        assert f"{inner}.{name}" in left or not leaves(value), name


@hypothesis.settings(max_examples=300, deadline=None, derandomize=True)
@hypothesis.given(
    turns=st.one_of(GOOD_TURNS, GOOD_TURNS, ANY_TURNS),
    last=turns_of(["user"], GOOD_PARTS),
    format=st.sampled_from(["yojo", "trl", "implicit", "nemo_rl"]),
    tools=st.sampled_from([None, [], [TOOL], json.dumps([TOOL]), "v@lue"]),
    more=st.sampled_from([0, 0, 0, 1]),
)
def test_whatever_is_left_of_a_chat_is_reported(turns, last, format, tools, more):
    turns = [*turns, last]
    parts = [part for turn in turns if isinstance(turn["content"], list) for part in turn["content"]]
    images = parts.count({"type": "image"}) + more
    record = {
        "yojo": {"prompt": turns, "responses": ["a", "b"], "rankings": [1, 2]},
        "trl": {"prompt": turns, "chosen": said("a"), "rejected": said("b")},
        "implicit": {"chosen": [*turns, *said("a")], "rejected": [*turns, *said("b")]},
        "nemo_rl": {"context": turns, "completions": [{"rank": n, "completion": said("ab"[n])} for n in range(2)]},
    }[format] | {"tools": tools, "images": [png()] * images}
    result = loaded(record)
    if result is None:
        return
    example, left = result
    assert len(example.prompt) == len(turns) and len(example.images) == images
    for turn, kept in zip(turns, example.prompt, strict=True):
        assert {name for name, value in turn.items() if columns.given(value)} <= set(kept)
        for name, value in turn.items():
            if name != "content":
                assert leaves(value) == leaves(kept.get(name)), name
            elif isinstance(value, list):
                assert len(value) == len(kept["content"])
                for name in ("cache_control", "index"):
                    assert f"parts.{name}" in left or not any(columns.given(part.get(name)) for part in value)
                details = [part["image_url"].get("detail") for part in value if "image_url" in part]
                assert "parts.detail" in left or not any(details)
                assert sum("Wh@t?" == part.get("text") for part in value) == leaves(kept["content"]).count("Wh@t?")
            else:
                assert (value or "") == kept["content"]
    assert example.tools == ([TOOL] if tools else None)


def test_every_reason_is_of_a_format():
    assert set(columns.LEFT) == {"", *sources.FORMATS}
    assert not any(set(paths) & columns.CONTENT for paths in columns.LEFT.values())

"""Prompts as chat messages: parts in every form, tags and places, what templates leave out, errors that name the record."""

import base64
import json
import logging
import re
import struct

import hypothesis
import jinja2
import numpy as np
import pytest
import real_processors as real
import torch
from data_cases import write_lines
from hypothesis import strategies as st

import yojo
from yojo import data, messages, prompts
from yojo.prompts import PromptEncoder, bad_record
from yojo.videos import Video

A, B = real.image(24, 24, 1), real.image(40, 18, 3)
TEXT = {"type": "text", "text": "Which?"}


def user(*parts):
    return {"role": "user", "content": list(parts)}


def encode(processor, prompt, **options):
    """(encoder, outputs) of one prompt."""
    encoder = PromptEncoder(processor, getattr(processor, "tokenizer", processor), "example 'x'")
    return encoder, encoder(yojo.Example(prompt, ["a"], id="x", **options))


def same(one, other):
    keys = {key for outputs in (one, other) for key in outputs} - {"video_metadata"}
    return all(key in one and key in other and torch.equal(one[key], other[key]) for key in keys)


def kinds(turns):
    """What stands where, media by what they are in these tests: strings."""
    return [[part.get("text", part.get(part["type"])) for part in turn["content"]] for turn in turns]


# ---- one form ----


@pytest.mark.parametrize(
    "part, cleaned",
    [
        ({"type": "text", "text": "a", "image": None, "index": None}, {"type": "text", "text": "a"}),
        ({"text": "a"}, {"type": "text", "text": "a"}),
        ({"type": "input_text", "text": "a"}, {"type": "text", "text": "a"}),
        ({"type": "output_text", "text": "a", "annotations": []}, {"type": "text", "text": "a"}),
        ({"type": "text", "text": "a", "cache_control": {"type": "ephemeral"}}, {"type": "text", "text": "a"}),
        ({"type": "image", "text": None, "image": None}, {"type": "image"}),
        ({"type": "image", "text": "", "path": "a.png"}, {"type": "image", "image": "a.png"}),
        ({"type": "image", "url": "a.png", "path": "a.png"}, {"type": "image", "image": "a.png"}),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "auto"}}, {"type": "image", "image": "a.png"}),
        ({"type": "image_url", "image_url": "a.png"}, {"type": "image", "image": "a.png"}),
        ({"type": "input_image", "image_url": "a.png"}, {"type": "image", "image": "a.png"}),
        ({"type": "video_url", "video_url": {"url": "a.mp4"}}, {"type": "video", "video": "a.mp4"}),
        ({"type": "video", "video": "a.mp4", "fps": 2.0}, {"type": "video", "video": "a.mp4", "fps": 2.0}),
        ("a", "a"),
    ],
)
def test_parts_come_in_many_forms(part, cleaned):
    assert messages.clean([user(part)]) == [user(cleaned)]
    assert messages.clean(messages.clean([user(part)])) == [user(cleaned)]


@pytest.mark.parametrize(
    "part, error, message",
    [
        ({"type": "audio", "audio": "a.wav"}, ValueError, "must be of type text, image or video .* got 'audio'"),
        ({"type": "input_audio", "input_audio": {}}, ValueError, "must be of type text, image or video"),
        ({"type": "file", "file_id": "7"}, ValueError, "got 'file' with the keys file_id"),
        ({"image": "a.png"}, ValueError, "must be of type text, image or video .* got None with the keys image"),
        ({"type": "text"}, TypeError, "a text part needs a string under 'text', got None"),
        ({"type": "text", "text": 7}, TypeError, "a text part needs a string under 'text', got 7"),
        ({"type": "text", "text": "a", "image": "a.png"}, ValueError, "a part of type text has 'image'"),
        ({"type": "image", "image": "a.png", "text": "a dog"}, ValueError, "a part of type image has 'text'"),
        ({"type": "image", "image": "a.png", "min_pixels": 4}, ValueError, "'min_pixels', which nothing here reads"),
        ({"type": "image", "image": "a.png", "path": "b.png"}, ValueError, "both image and path"),
        ({"type": "image_url", "image_url": {"url": "a.png", "detail": "low"}}, ValueError, "has 'detail'"),
        ({"type": "video", "video": "a.mp4", "nframes": 4}, ValueError, "has 'nframes'"),
        (7, TypeError, "a content part must be a string or a dict, got 7"),
    ],
)
def test_parts_that_say_what_nothing_reads(part, error, message):
    with pytest.raises(error, match=f"example 'x': .*{message}"):
        yojo.Example([user(part, TEXT)], ["a"], id="x")


@pytest.mark.parametrize(
    "prompt, error, message",
    [
        ([], ValueError, "prompt is an empty list"),
        (
            [{"role": "human", "content": "a"}],
            ValueError,
            "role must be one of system, .* got 'human'; it is called 'user'",
        ),
        ([{"role": "critic", "content": "a"}], ValueError, "role must be one of .* got 'critic'$"),
        ([{"role": "user", "content": None}], TypeError, "a chat message must be a dict with role and content"),
        ([user(TEXT), {"role": "tool"}], TypeError, "a chat message must be a dict with role and content"),
        ([{"role": "user", "content": 7}], TypeError, "content must be a string or a list of parts, got 7"),
        ([user("a"), {"role": "assistant", "content": "b"}], ValueError, "ends with an assistant turn"),
        ([user(" ")], ValueError, "the prompt is empty"),
        ([user("a \ud800")], ValueError, "the prompt holds half of a surrogate pair"),
        ([{"role": "user", "content": "a", "name": "\ud800"}], ValueError, "half of a surrogate pair"),
    ],
)
def test_prompts_that_make_no_sense(prompt, error, message):
    with pytest.raises(error, match=f"example 'x': .*{message}"):
        yojo.Example(prompt, ["a"], id="x")


def test_fields_that_are_none_are_left_out_and_others_kept():
    call = [{"type": "function", "function": {"name": "f", "arguments": {}}}]
    given = [
        {"role": "user", "content": "a", "name": None, "tool_calls": None},
        {"role": "assistant", "content": None, "tool_calls": call},
        {"role": "assistant", "tool_calls": call, "reasoning_content": "hm"},
        {"role": "tool", "content": "b", "tool_call_id": "7"},
    ]
    assert yojo.Example(given, ["a"]).prompt == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "", "tool_calls": call},
        {"role": "assistant", "content": "", "tool_calls": call, "reasoning_content": "hm"},
        {"role": "tool", "content": "b", "tool_call_id": "7"},
    ]
    assert given[0]["name"] is None  # the caller's own stay as they are


# ---- places ----


@pytest.mark.parametrize(
    "prompt, images, videos, placed",
    [
        ("<image>\nWhich?", "a", "", [["a", "\nWhich?"]]),
        ("Which?\n<image>", "a", "", [["Which?\n", "a"]]),
        ("One <image> two <image>", "ab", "", [["One ", "a", " two ", "b"]]),
        ("<video><image>?", "a", "v", [["v", "a", "?"]]),
        ("<Image> <image >?", "a", "", [["a", "<Image> <image >?"]]),
        ("<image> <video>?", "a", "", [["a", " <video>?"]]),
        ("a?", "ab", "vw", [["a", "b", "v", "w", "a?"]]),
        ([{"role": "system", "content": "<image> s"}, user("<image>", TEXT)], "ab", "", [["a", " s"], ["b", "Which?"]]),
        ([user("x"), {"role": "assistant", "content": "<image>"}, user("<image>")], "a", "", [["x"], ["<image>"], ["a"]]),
        ([user("A ", {"type": "image"}, "B")], "a", "v", [["v", "A ", "a", "B"]]),
        ([user({"type": "image"}, "A ", {"type": "image"})], "ab", "v", [["a", "v", "A ", "b"]]),
        ([user({"type": "video"}, "A")], "ab", "v", [["a", "b", "v", "A"]]),
        ([user("x"), {"role": "assistant", "content": "y"}, user({"type": "image"}, "z")], "a", "v", [["v", "x"], ["y"], ["a", "z"]]),
        ([user("<video> A ", {"type": "image"})], "a", "v", [["v", " A ", "a"]]),
        ([user({"type": "image", "index": 1}, "A", {"type": "image", "index": 0})], "ab", "", [["b", "A", "a"]]),
        ([user({"type": "image", "image": "own"}, {"type": "image"}, "A")], "a", "", [["own", "a", "A"]]),
    ],
)  # fmt: skip
def test_where_media_stand(prompt, images, videos, placed):
    example = yojo.Example(prompt, ["a"], images=list(images), videos=list(videos))
    assert kinds(messages.place(example.prompt, example.images, example.videos)) == placed


@pytest.mark.parametrize(
    "prompt, images, videos, message",
    [
        ("<image> and <image>?", "a", "", "2 <image> tags, but 1 images are given.*literal_tags=True"),
        ("<image>?", "ab", "", "1 <image> tags, but 2 images are given"),
        ("<video>?", "", "vw", "1 <video> tags, but 2 videos are given"),
        ([user("<image>", {"type": "image"})], "a", "", "both image parts .1. and the tag <image> in its text .1."),
        ([user("<image>", {"type": "image", "image": "a"})], "", "", "both image parts .* literal_tags=True"),
        ([user({"type": "image"}), user("<image>")], "ab", "", "both image parts"),
        ([user("a"), {"role": "assistant", "content": "<image>"}, user("b")], "a", "", "stands in an assistant turn"),
        ([user({"type": "image"}, TEXT)], "", "", "1 image placeholders to fill, but 0 images"),
        ([user({"type": "image", "index": 1}, TEXT)], "a", "", r"ask for the images \[1\], but each of the 1"),
        ([{"role": "system", "content": "a"}], "a", "", "1 images but no user turn to put them in"),
        (
            [user({"type": "video", "video": Video("v.mp4", 1), "fps": 2}, "a")],
            "",
            "",
            "has fps=2, its video another: 1",
        ),
    ],
)
def test_media_without_a_place_need_no_model_to_be_found(prompt, images, videos, message, tmp_path):
    with pytest.raises(ValueError, match=f"example 'x': .*{message}"):
        yojo.Example(prompt, ["a"], images=list(images), videos=list(videos), id="x")


def test_tags_are_text_where_one_says_so():
    example = yojo.Example("a <image> <image>", ["a"], images=["a"], literal_tags=True)
    assert kinds(messages.place(example.prompt, example.images, (), True)) == [["a", "a <image> <image>"]]


def test_a_video_part_may_say_its_rate():
    example = yojo.Example(
        [user({"type": "video", "video": "v.mp4", "fps": 2}, {"type": "video", "fps": 1}, "a")], ["a"], videos=["w.mp4"]
    )
    assert kinds(messages.place(example.prompt, (), example.videos)) == [[Video("v.mp4", 2), Video("w.mp4", 1), "a"]]


@pytest.mark.parametrize("family", [name for name in real.FAMILIES if name not in ("PaliGemma", "Qwen3 (text)")])
def test_a_tag_is_the_place_of_an_image_in_every_family(family):
    processor = real.processor_of(family)
    parts = [user("First: ", {"type": "image", "image": A}, " Second: ", {"type": "image", "image": B}, " Which?")]
    expected = encode(processor, parts)[1]
    tagged = encode(processor, "First: <image> Second: <image> Which?", images=[A, B])[1]
    assert same(tagged, expected) and not same(
        tagged, encode(processor, "First: <image> Second: <image> Which?", images=[B, A])[1]
    )
    with pytest.raises(ValueError, match="example 'x': .*tag <image>, but no images are given.*literal_tags=True"):
        encode(processor, "Which <image>?")
    with pytest.raises(ValueError, match="example 'x': .*tag <audio>, but audio is not supported"):
        encode(processor, "Hear <audio>!")
    literal = "What is an <image>?"
    if "<image>" in set().union(*prompts.placeholder_tokens(processor).values()):
        with pytest.raises(ValueError, match="example 'x': .*placeholder '<image>'"):
            encode(processor, literal, literal_tags=True)
    else:
        text = processor.tokenizer.decode(encode(processor, literal, literal_tags=True)[1]["input_ids"][0])
        assert "<image>" in text


def test_without_a_template_images_stand_in_front():
    processor = real.processor_of("PaliGemma")
    expected = encode(processor, "Which?", images=[A, B])[1]
    assert same(encode(processor, "<image><image>Which?", images=[A, B])[1], expected)
    for prompt in ("First: <image><image>", [user("First: ", {"type": "image"}, {"type": "image"})]):
        with pytest.raises(
            ValueError, match="example 'x': .*no chat template and takes images, then videos, then text"
        ):
            encode(processor, prompt, images=[A, B])


def test_a_text_only_model_keeps_tags_as_text():
    tokenizer = real.processor_of("Qwen3 (text)")
    for literal in (False, True):
        ids = encode(tokenizer, "The <image> and <audio> tags", literal_tags=literal)[1]["input_ids"][0]
        assert "The <image> and <audio> tags" in tokenizer.decode(ids)
    with pytest.raises(ValueError, match="the prompt has 1 images, but a bare tokenizer was given"):
        encode(tokenizer, "<image>?", images=[A])


def test_scores_and_files_take_tags_alike(tmp_path):
    made = real.reward_model("Qwen3-VL", "isolated")[0]
    A.save(tmp_path / "a.png")
    B.save(tmp_path / "b.png")
    text = "First: <image> Second: <image> Which?"
    record = {
        "question": text,
        "images": ["a.png", "b.png"],
        "responses": ["It is a seven.", "two"],
        "rankings": [1, 2],
    }
    other = record | {"question": "<image><image>First:  Second:  Which?"}
    from_file = made.score_many(data.load(write_lines(tmp_path / "a.jsonl", [record, other])))
    scores = made.score(text, record["responses"], images=[A, B])
    assert torch.allclose(scores, from_file[0], atol=2e-6) and not torch.allclose(scores, from_file[1], atol=1e-3)
    literal = made.score("An <image>?", ["It is a seven."], literal_tags=True)
    assert literal.shape == (1,) and not torch.equal(literal, made.score("An image?", ["It is a seven."]))


def test_openai_messages_are_taken_as_they_are(tmp_path):
    processor = real.processor_of("Qwen3-VL")
    A.save(tmp_path / "a.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    sent = [user({"type": "input_text", "text": "Which?"}, {"type": "image_url", "image_url": {"url": url}})]
    expected = encode(processor, [user("Which?", {"type": "image", "image": A})])[1]
    assert same(encode(processor, sent)[1], expected)
    with pytest.raises(ValueError, match="example 'x': image 0: the data URL .* cannot be read"):
        encode(processor, [user({"type": "image_url", "image_url": "data:image/png;base64,?"})])


def test_parts_that_tables_fill_up_are_the_same(tmp_path):
    """What `datasets` makes of parts with different keys: all of them, None where there is nothing."""
    processor = real.processor_of("Qwen2.5-VL")
    processor.chat_template = (  # as released: whatever has an image is one
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' or 'image' in c %}"
        "<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    )
    filled = [
        {"type": "image", "text": None, "image": None, "index": 1, "fps": None},
        {"type": "text", "text": "or", "image": None, "index": None, "fps": None},
        {"type": "image", "text": None, "image": None, "index": 0, "fps": None},
    ]
    expected = encode(processor, [user({"type": "image", "image": B}, "or", {"type": "image", "image": A})])[1]
    assert same(encode(processor, [user(*filled)], images=[A, B])[1], expected)


def test_mr2rm_has_the_same_net(monkeypatch):
    model, processor = real.build("Qwen2.5-VL")
    collator = yojo.RewardModel(
        yojo.patch(model, processor, format="mr2rm", pooling="last", head_dim=16), processor
    ).collator
    assert collator.encode(yojo.Example("<image>\nWhich?", ["a"], images=[A])).vision
    for options, message in (
        ({"prompt": "What is <|vision_end|>?"}, "contains the placeholder '<|vision_end|>'"),
        ({"prompt": "Which <image>?", "images": [A]}, "images come first, then videos, then one text"),
        ({"prompt": "Which <image>?"}, "has the tag <image>, but no images are given"),
        ({"prompt": "Which?", "tools": SCHEMA}, "format='mr2rm' knows no tools"),
    ):
        with pytest.raises(ValueError, match=f"example 'x': .*{re.escape(message)}"):
            collator.encode(yojo.Example(**options, responses=["a"], id="x"))

    def fail(*args, **kwargs):
        raise jinja2.TemplateError("no")

    monkeypatch.setattr(processor, "apply_chat_template", fail)
    with pytest.raises(ValueError, match="^example 'x': .*TemplateError: no"):
        collator.encode(yojo.Example("Which?", ["a"], id="x"))


# ---- what templates leave out ----

STRINGS = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
TOOLS = (
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}" + STRINGS + "{% if m.tool_calls %}"
    "{% for c in m.tool_calls %}<tool_call>{{ c.function | tojson }}</tool_call>{% endfor %}{% endif %}"
    "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)
PLAIN = STRINGS + "<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
CALL = [{"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}]
WEATHER = [
    {"role": "user", "content": "Weather?"},
    {"role": "assistant", "content": None, "tool_calls": CALL},
    {"role": "tool", "content": "18 degrees", "name": "weather"},
    {"role": "user", "content": "So?"},
]
SCHEMA = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


def text_only(template):
    tokenizer = real.processor_of("Qwen3 (text)")
    tokenizer.chat_template = template
    return tokenizer


def test_tools_and_calls_reach_the_template(caplog):
    tokenizer = text_only(TOOLS)
    with caplog.at_level(logging.WARNING, "yojo"):
        encoder, outputs = encode(tokenizer, WEATHER, tools=SCHEMA)
        encode(tokenizer, WEATHER, tools=SCHEMA)
    text = tokenizer.decode(outputs["input_ids"][0])
    assert text == tokenizer.apply_chat_template(
        [WEATHER[0], WEATHER[1] | {"content": ""}, *WEATHER[2:]],
        tools=SCHEMA,
        tokenize=False,
        add_generation_prompt=True,
    )
    assert '"city": "Oslo"' in text and '"parameters": {}' in text
    assert encoder.unseen == ["the field 'name' of tool turns"]
    assert prompts.unseen(tokenizer) == {"the field 'name' of tool turns": 2}
    assert len(caplog.records) == 1 and "example 'x': not all of the prompt reaches the model" in caplog.text
    assert prompts.unseen(text_only(TOOLS)) == {}


DUMPED = "{{ c.function | tojson }}"
ARGUMENTS = {  # how templates write the arguments of a call -> whether they take JSON text as it is
    DUMPED: False,
    "{{ c.function.name }} {{ c.function.arguments | tojson }}": False,
    "{{ c.function.arguments }}": True,
    "{{ 'arguments: ' ~ c.function.arguments }}": True,
    "{{ 'arguments: ' + c.function.arguments }}": True,
    '"{{ c.function.arguments }}"': True,
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}": True,
    "{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}{% endfor %}": False,
    "{% for k, v in c.function.arguments | items %}<{{ k }}>{{ v }}{% endfor %}": False,
    "{% if c.function.arguments is mapping %}{{ c.function.arguments | tojson }}{% endif %}": False,
    "{% for k in c.function.arguments %}{{ k }}={{ c.function.arguments[k] }},{% endfor %}": False,
    "{{ c.function | tojson | tojson }}": False,
}


@pytest.mark.parametrize("style", ARGUMENTS)
def test_arguments_as_json_text_are_what_the_template_takes(style):
    """OpenAI has the arguments of a call as JSON text: templates that write objects get one, others their text."""
    tokenizer = text_only(TOOLS.replace(DUMPED, style))
    texts = ['{"city":"Oslo"}', "{}", '{"ok": true, "n": null}', '{"a": {"b": ["\\u00e9"]}}']

    def turns(arguments):
        calls = [{"type": "function", "function": {"name": "weather", "arguments": each}} for each in arguments]
        said = {"role": "user", "content": "Fix print(\"{}\".format(x)), print('{}')"}
        return [said, {"role": "assistant", "content": "", "tool_calls": calls}, *WEATHER[2:]]

    for given in ([texts[0]], [texts[1]], texts):
        messages = turns(given)
        before = json.dumps(messages)
        _, outputs = encode(tokenizer, messages)
        expected = turns(given if ARGUMENTS[style] else map(json.loads, given))
        stock = tokenizer.apply_chat_template(expected, tokenize=False, add_generation_prompt=True)
        assert tokenizer.decode(outputs["input_ids"][0]) == stock and json.dumps(messages) == before
    if not ARGUMENTS[style]:  # both kinds in one prompt
        _, outputs = encode(tokenizer, turns([texts[0], {"x": 1}]))
        stock = tokenizer.apply_chat_template(
            turns([json.loads(texts[0]), {"x": 1}]), tokenize=False, add_generation_prompt=True
        )
        assert tokenizer.decode(outputs["input_ids"][0]) == stock


def test_arguments_that_are_no_object_again_stay_text():
    for text in ("Oslo", "[1]", '{"city": ', '{"a": 1, "a": 2}', '{"a": NaN}', '{"a": 1e400}', '{"a": "\\ud83d"}'):
        turns = [dict(turn) for turn in WEATHER]
        turns[1]["tool_calls"] = [{"function": None, "name": "weather", "arguments": text}]
        tokenizer = text_only(TOOLS.replace("c.function", "c"))
        assert json.dumps(text) in tokenizer.decode(encode(tokenizer, turns)[1]["input_ids"][0])
    turns[1]["tool_calls"] = [{"function": None, "name": "weather", "arguments": '{"a": 1}'}]
    assert '"arguments": {"a": 1}' in tokenizer.decode(encode(tokenizer, turns)[1]["input_ids"][0])


def test_arguments_that_a_template_leaves_out_are_said():
    turns = [dict(turn) for turn in WEATHER]
    turns[1]["tool_calls"] = [{"function": {"name": "weather", "arguments": '{"a": 1}'}}]
    encoder, _ = encode(text_only(TOOLS.replace(DUMPED, "{{ c.function.name }}")), turns)
    assert "the arguments of tool calls" in encoder.unseen


def test_what_a_template_leaves_out_is_said():
    encoder, _ = encode(text_only(PLAIN), WEATHER, tools=SCHEMA)
    assert encoder.unseen == ["tools", "the field 'tool_calls' of assistant turns", "the field 'name' of tool turns"]
    dropping = text_only(
        "{% for m in messages if m.role in ('user', 'assistant') %}{{ m.content.split('|')[-1] }}{% endfor %}"
    )
    conversation = [
        {"role": "system", "content": "So?"},  # the same words as another turn's
        {"role": "user", "content": "Why?", "name": "", "mood": []},
        {"role": "assistant", "content": "thoughts|answer"},
        {"role": "user", "content": "So?"},
    ]
    assert encode(dropping, conversation)[0].unseen == ["the text of system turns", "some text of assistant turns"]
    quoted = text_only("{% for m in messages %}{{ m.role }}{{ m.content | tojson }}{% endfor %}")
    conversation[2] = {"role": "assistant", "content": 'é "quoted"\nlines'}
    assert encode(quoted, conversation)[0].unseen == []


def test_tools_reach_the_template_of_a_processor():
    processor = real.processor_of("Qwen3-VL")
    processor.chat_template = "{% if tools %}{{ tools | tojson }}{% endif %}" + processor.chat_template
    encoder, outputs = encode(processor, "<image>Weather?", images=[A], tools=SCHEMA)
    assert '"name": "weather"' in processor.tokenizer.decode(outputs["input_ids"][0]) and encoder.unseen == []
    encoder, outputs = encode(real.processor_of("Qwen3-VL"), "<image>Weather?", images=[A], tools=SCHEMA)
    assert encoder.unseen == ["tools"] and same(outputs, encode(processor, "<image>Weather?", images=[A])[1])


def test_a_template_that_takes_one_text_of_a_turn():
    processor = real.processor_of("Qwen3-VL")
    processor.chat_template = (
        "{% for m in messages %}{% for c in m.content if c.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
        "{% endfor %}{{ (m.content | selectattr('type', 'equalto', 'text') | first).text }}{% endfor %}"
    )
    assert encode(processor, "One <image> two", images=[A])[0].unseen == ["some text of user turns"]
    assert encode(processor, "<image>One two", images=[A])[0].unseen == []


def test_prompts_of_one_plain_turn_are_rendered_no_second_time(monkeypatch):
    tokenizer = text_only(PLAIN)
    renderings = []
    own = tokenizer.apply_chat_template
    monkeypatch.setattr(tokenizer, "apply_chat_template", lambda *a, **k: renderings.append(k) or own(*a, **k))
    encode(tokenizer, "Hello?")
    assert len(renderings) == 1


FIELDS = ("name", "tool_calls", "reasoning_content", "weight")


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(
    chat=st.lists(
        st.tuples(
            st.sampled_from(["system", "user", "assistant", "tool"]),
            st.booleans(),
            st.sets(st.sampled_from(FIELDS)),
        ),
        min_size=1,
        max_size=5,
    ),
    roles=st.sets(st.sampled_from(["system", "tool"])),
    fields=st.sets(st.sampled_from(FIELDS)),
    takes_tools=st.booleans(),
)
def test_whatever_is_dropped_is_reported(chat, roles, fields, takes_tools):
    """Over chats and templates: all that was given is in the rendered prompt or among the notices."""
    shown = "".join(f"{{{{ m.{field} }}}}" for field in sorted(fields))
    template = "{% if tools %}{{ tools | tojson }}{% endif %}" if takes_tools else ""
    template += f"{{% for m in messages if m.role not in {sorted(roles)} %}}{{{{ m.role }}}}: {{{{ m.content }}}}{shown}\n{{% endfor %}}"
    turns, said = [], {"tools": "the-tool"}
    for at, (role, parts, extra) in enumerate([*chat, ("user", False, set())]):
        text = f"text-{at}-"
        turn = {"role": role, "content": [text[:5], {"type": "text", "text": text[5:]}] if parts else text}
        said[f"the text of {role} turns", at] = text
        for field in extra:
            turn[field] = f"{field}-{at}-"
            said[f"the field {field!r} of {role} turns", at] = turn[field]
        turns.append(turn)
    tokenizer = text_only(template)
    encoder, _ = encode(tokenizer, turns, tools=[{"name": "the-tool"}])
    rendered = encoder.apply_template(messages.place(yojo.Example(turns, ["a"]).prompt), tokenize=False)
    missing = {what[0] if isinstance(what, tuple) else what for what, text in said.items() if text not in rendered}
    assert set(encoder.unseen) == missing


# ---- errors that name the record ----


class PanicException(BaseException):
    """As Rust's libraries raise it: no Exception."""


@pytest.mark.parametrize(
    "error",
    [
        jinja2.TemplateError("System role not supported"),
        jinja2.UndefinedError("no such thing"),
        struct.error("unpack requires a buffer"),
        RuntimeError("decoder"),
        ImportError("no decoder"),
        RecursionError("too deep"),
        OSError("disk"),
        AssertionError(),
        NotImplementedError("DDS"),
        PanicException("index out of bounds"),
    ],
)
def test_whatever_a_template_raises_is_an_error_of_the_record(error, monkeypatch):
    tokenizer = text_only(PLAIN)

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(tokenizer, "apply_chat_template", fail)
    for prompt in ("Hello?", WEATHER):
        with pytest.raises(ValueError, match=f"^example 'x': .*{type(error).__name__}: {error}") as caught:
            encode(tokenizer, prompt)
        assert caught.value.__cause__ is error


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError, torch.OutOfMemoryError, SystemExit])
def test_what_is_no_fault_of_a_record_passes(error):
    with pytest.raises(error), bad_record("example 'x'"):
        raise error


def test_errors_that_name_the_record_stay_as_they_are():
    with pytest.raises(TypeError, match="^example 'x': image 0 is none$"), bad_record("example 'x'"):
        raise TypeError("example 'x': image 0 is none")


def test_a_template_that_refuses_is_a_bad_record():
    tokenizer = text_only(
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + PLAIN
    )
    with pytest.raises(ValueError, match="example 'x': .*System role not supported"):
        encode(tokenizer, [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    "family, token",
    [
        ("Molmo2", "<im_patch>"),
        ("Molmo2", "<low_res_im_start>"),
        ("Gemma 3", "<image_soft_token>"),
        ("Gemma 3", "<start_of_image>"),
        ("Qwen2.5-VL", "<|video_pad|>"),
        ("Qwen3-VL", "<|vision_start|>"),
        ("SmolVLM", "<fake_token_around_image>"),
        ("InternVL", "<IMG_CONTEXT>"),
        ("Mistral 3", "[IMG_BREAK]"),
        ("PaliGemma", "<image>"),
    ],
)
def test_placeholders_spelt_in_a_prompt_name_the_record(family, token):
    made, _, _ = real.reward_model(family, "isolated")
    said = f"What is {token}?"
    prompts_with = [{"prompt": said}, {"prompt": [user("Hi"), {"role": "assistant", "content": said}, user("And?")]}]
    prompts_with.append({"prompt": [{"role": "system", "content": said}, user("Hi")]})
    prompts_with.append({"prompt": [{"role": "user", "content": "Hi", "name": said}]})
    prompts_with.append({"prompt": "Hi", "tools": [{"name": "f", "parameters": {token: [1, said]}}]})
    for options in prompts_with:
        example = yojo.Example(**options, responses=["two"], id="x", literal_tags=True)
        with pytest.raises(ValueError, match="example 'x': .*contains the placeholder") as caught:
            made.collator.encode(example)
        assert repr(token) in str(caught.value)
        # As `data check --model` looks at it, with the processor alone.
        with pytest.raises(ValueError, match="example 'x': .*contains the placeholder"):
            PromptEncoder(made.processor, made.collator.tokenizer, "example 'x'")(example)


def test_records_are_checked_without_a_model(tmp_path):
    A.save(tmp_path / "a.png")
    base = {"responses": ["a", "b"], "rankings": [1, 2]}
    bad = [
        {"prompt": [user({"type": "image"}, {"type": "image"}, TEXT)], "image": "a.png"},
        {"prompt": [user({"type": "image"}, TEXT)]},
        {"prompt": [{"role": "system", "content": "Which?"}], "image": "a.png"},
        {"prompt": "<image> or <image>?", "image": "a.png"},
        {"prompt": [user({"type": "audio"}, TEXT)]},
    ]
    good = [
        {"prompt": [user({"type": "input_text", "text": "Which?"})]},
        {"prompt": "<image>\nWhich?", "image": "a.png"},
    ]
    from yojo import checking

    report = checking.check([write_lines(tmp_path / "a.jsonl", [record | base for record in bad + good])])
    assert report.total.good == len(good) and [entry.line for entry in report.total.bad] == [1, 2, 3, 4, 5]


# ---- videos at rates of their own ----


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """16 frames in 4 seconds."""
    return str(real.write_video(tmp_path_factory.mktemp("videos") / "clip.mp4"))


VIDEO_FAMILIES = ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Molmo2", "LLaVA-OneVision", "InternVL", "SmolVLM")


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_a_file_is_sampled_at_the_rate_that_is_asked_for(family, clip):
    from yojo.decoding import sample_file

    processor = real.processor_of(family)
    processor.video_processor.num_frames = 64  # as Molmo2 has it, and files of others may: it must not win
    own = processor.video_processor.num_frames, processor.video_processor.fps
    for fps in (1, 2, 4):
        frames, metadata, bounded = sample_file(clip, fps, processor.video_processor)
        assert len(frames) == 4 * fps and frames.dtype == np.uint8 and frames.shape[3] == 3 and bounded is None
        assert len(metadata["frames_indices"]) == 4 * fps and metadata["fps"] == 4
    assert own == (processor.video_processor.num_frames, processor.video_processor.fps)
    with pytest.raises(ValueError, match="example 'x': video 0: .*it has 4 frames a second, fewer than fps=9 asks for"):
        encode(processor, "What?", videos=[Video(clip, 9)])
    encode(processor, "What?", videos=[Video(clip, 2)])


def test_molmo2_takes_a_rate(clip, tmp_path):
    """Its processor has a number of frames by default, which excludes a rate: what it does with 8 frames is what it gets."""
    processor, stock = real.processor_of("Molmo2"), real.stock_processor("Molmo2")
    expected = stock.apply_chat_template(
        [user({"type": "video", "video": clip}, {"type": "text", "text": "What?"})],
        tokenize=True,
        add_generation_prompt=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"num_frames": 8, "do_sample_frames": True},
    )
    outputs = encode(processor, "What?", videos=[Video(clip, 2)])[1]
    assert torch.equal(outputs["input_ids"], expected["input_ids"])
    assert torch.equal(outputs["pixel_values_videos"], expected["pixel_values_videos"])
    record = {"prompt": "What?", "video": clip, "sampling_interval": 0.5, "responses": ["a", "b"], "rankings": [1, 2]}
    from_file = PromptEncoder(processor, processor.tokenizer, "x")(
        data.load(write_lines(tmp_path / "a.jsonl", [record]))[0]
    )
    assert torch.equal(from_file["input_ids"], outputs["input_ids"])


def test_files_at_several_rates_and_frames_in_one_prompt(clip):
    processor = real.processor_of("Qwen3-VL")
    frames = Video(real.frames(4), 0.5)
    alone = [encode(processor, "What?", videos=[video])[1] for video in (Video(clip, 1), frames, Video(clip, 2), clip)]
    together = encode(processor, "What?", videos=[Video(clip, 1), frames, Video(clip, 2), clip])[1]
    for name in ("video_grid_thw", "pixel_values_videos"):
        assert torch.equal(together[name], torch.cat([outputs[name] for outputs in alone]))


def test_a_rate_that_a_family_does_not_keep_is_said(clip, tmp_path):
    processor = real.processor_of("Qwen3-VL")
    processor.video_processor.min_frames = 12
    encoder, _ = encode(processor, "What?", videos=[Video(clip, 1)])
    assert encoder.unseen == ["the fps of a video file (Qwen3VLVideoProcessor takes more frames)"]
    assert encode(processor, "What?", videos=[Video(clip, 4)])[0].unseen == []


def test_a_file_that_no_decoder_takes_names_the_record(tmp_path):
    (tmp_path / "a.webm").write_bytes(b"\x1aE\xdf\xa3" + json.dumps("no video").encode())
    with pytest.raises(ValueError, match=r"example 'x': video 0: .*a\.webm"):
        encode(real.processor_of("Qwen3-VL"), "What?", videos=[str(tmp_path / "a.webm")])

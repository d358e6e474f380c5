"""Prompts through chat templates: what they take and leave out, arguments of tool calls, errors that name the record."""

import json
import logging
import struct

import hypothesis
import jinja2
import pytest
import real_processors as real
import torch
from data_cases import write_lines
from hypothesis import strategies as st
from test_messages import SCHEMA, TEXT, A, encode, same, user

import yojo
from yojo.inputs import messages, prompts
from yojo.inputs.prompts import PromptEncoder, bad_record

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


def test_what_was_left_out_of_one_prompt_is_not_said_of_the_next():
    tokenizer = text_only(TOOLS)
    encoder = PromptEncoder(tokenizer, tokenizer, "example 'x'")
    encoder(yojo.Example(WEATHER, ["warm"], tools=SCHEMA))
    assert encoder.unseen == ["the field 'name' of tool turns"]
    encoder(yojo.Example("Hi", ["hello"]))
    assert encoder.unseen == []


def test_without_a_template_tools_and_fields_are_left_out():
    tokenizer = text_only(None)
    encoder = PromptEncoder(tokenizer, tokenizer, "example 'x'")
    encoder.messages(yojo.Example([user("Hi") | {"name": "Ann"}], ["hello"], tools=SCHEMA))
    assert encoder.unseen == ["tools", "the field 'name' of user turns"]


def test_a_template_that_refuses_other_texts_leaves_nothing_out():
    """Texts are looked for with others in their place, which this one does not take."""
    refuses = "{% if m.content not in ('Hi', 'Hello', 'So?') %}{{ raise_exception('another text') }}{% endif %}"
    tokenizer = text_only(PLAIN.replace("{{ m.content }}", refuses + "{{ m.content }}"))
    encoder, outputs = encode(tokenizer, [user("Hi"), {"role": "assistant", "content": "Hello"}, user("So?")])
    assert encoder.unseen == [] and "Hello" in tokenizer.decode(outputs["input_ids"][0])


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
    from yojo.data import checking

    report = checking.check([write_lines(tmp_path / "a.jsonl", [record | base for record in bad + good])])
    assert report.total.good == len(good) and [entry.line for entry in report.total.bad] == [1, 2, 3, 4, 5]

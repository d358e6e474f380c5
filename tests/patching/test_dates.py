"""Templates that print today's date: one day for a model, from the patch to the last score."""

import copy
import datetime
import json
import logging
import pickle

import pytest
import torch
from PIL import Image
from transformers.utils import chat_template_utils
from turn_cases import TEMPLATES, image_processor, text_model, tokenizer_of_kind

import yojo
from yojo.data.checking import count_tokens, model_settings
from yojo.inputs.mr2rm import ConversationEncoder
from yojo.inputs.processors import load_processor
from yojo.inputs.prompts import PromptEncoder
from yojo.patching import dates
from yojo.training.resume import adopt_date

MISTRAL = "{%- set today = strftime_now('%Y-%m-%d') %}<|im_start|>system\nToday is {{ today }}.<|im_end|>\n"
# Llama 3.2: a variable that the caller may give, else today.
LLAMA = (
    "{%- if not date_string is defined %}{%- if strftime_now is defined %}{%- set date_string = strftime_now('%d %b %Y') %}"
    "{%- else %}{%- set date_string = '26 Jul 2024' %}{%- endif %}{%- endif %}<|im_start|>system\nToday: {{ date_string }}<|im_end|>\n"
)
QUESTION, ANSWERS = "Is it good?", ["yes", "no, it is not"]


class Clock:
    """Sets the day of transformers' templates and ours."""

    def __init__(self, monkeypatch):
        self.monkeypatch = monkeypatch

    def __call__(self, day):
        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime.fromisoformat(day)

        class Date(datetime.date):
            @classmethod
            def today(cls):
                return datetime.date.fromisoformat(day)

        self.monkeypatch.setattr(chat_template_utils, "datetime", Day)
        self.monkeypatch.setattr(dates.datetime, "date", Date)


@pytest.fixture()
def clock(monkeypatch):
    dates.say.cache_clear()
    clock = Clock(monkeypatch)
    clock("2026-01-02")
    return clock


def dated(head):
    tokenizer = tokenizer_of_kind("bytes", "chatml")
    tokenizer.chat_template = head + TEMPLATES["chatml"]
    return tokenizer


def prompt_of(reward_model):
    item = reward_model.collator.encode(yojo.Example(QUESTION, ANSWERS))
    return reward_model.processor.decode(item.prompt_ids)


@pytest.mark.parametrize("head, day", [(MISTRAL, "2026-01-02"), (LLAMA, "02 Jan 2026")])
def test_a_model_prints_the_day_it_was_patched_on(clock, tmp_path, caplog, head, day):
    reward_model = text_model(dated(head), mode="isolated")
    assert day in prompt_of(reward_model)
    expected = reward_model.score(QUESTION, ANSWERS)
    clock("2027-10-11")
    assert "2027" in reward_model.processor.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    with caplog.at_level(logging.WARNING):
        for name in ("one", "two"):
            reward_model.save_pretrained(tmp_path / name)
    assert [record.getMessage().count("2026-01-02") for record in caplog.records if "date" in record.getMessage()] == [
        1
    ]
    assert json.loads((tmp_path / "one" / "yojo_config.json").read_text())["date"] == "2026-01-02"
    assert "2026-01-02" in (tmp_path / "one" / "README.md").read_text()
    loaded = yojo.RewardModel.from_pretrained(tmp_path / "one")
    assert day in prompt_of(loaded)
    for model in (reward_model, loaded):
        assert torch.equal(model.score(QUESTION, ANSWERS), expected)
    # Loader workers, copies, and another collator of the same model.
    for collator in (
        pickle.loads(pickle.dumps(loaded.collator)),
        copy.deepcopy(loaded.collator),
        yojo.Collator(loaded.processor, loaded.model),
    ):
        assert day in loaded.processor.decode(collator.encode(yojo.Example(QUESTION, ANSWERS)).prompt_ids)
    # A processor that has seen no model takes the model's day.
    fresh = tokenizer_of_kind("bytes")
    fresh.chat_template = loaded.processor.chat_template
    fresh.add_special_tokens({"extra_special_tokens": ["<|resp_sep|>"]}, replace_extra_special_tokens=False)
    assert day in prompt_of(yojo.RewardModel(loaded.model, fresh))


def test_a_model_saved_without_a_day(clock, tmp_path, caplog):
    reward_model = text_model(dated(MISTRAL), mode="isolated")
    reward_model.save_pretrained(tmp_path / "old")
    file = tmp_path / "old" / "yojo_config.json"
    description = json.loads(file.read_text())
    del description["date"]
    file.write_text(json.dumps(description))
    clock("2027-10-11")
    with caplog.at_level(logging.WARNING):
        loaded = yojo.RewardModel.from_pretrained(tmp_path / "old")
    assert "depend on the day" in caplog.text and "2027-10-11" in prompt_of(loaded)
    loaded.save_pretrained(tmp_path / "new")
    clock("2028-10-11")
    assert "2027-10-11" in prompt_of(yojo.RewardModel.from_pretrained(tmp_path / "new"))


def test_a_template_without_a_clock_is_left_alone(tmp_path, caplog):
    tokenizer = tokenizer_of_kind("bytes", "chatml")
    reward_model = text_model(tokenizer, mode="isolated")
    with caplog.at_level(logging.WARNING):
        reward_model.save_pretrained(tmp_path)
    assert "date" not in caplog.text and reward_model.model.yojo.date is None and dates.date_of(tokenizer) is None
    assert json.loads((tmp_path / "yojo_config.json").read_text())["date"] is None
    assert "date" not in (tmp_path / "README.md").read_text() and dates.template_options(tokenizer) == {}


@pytest.mark.parametrize("options", [{"format": "mr2rm", "pooling": "last"}, {"mode": "isolated"}])
def test_the_paper_format_and_images(clock, options):
    processor = image_processor("chatml")
    processor.chat_template = MISTRAL + processor.chat_template
    model = text_model(processor.tokenizer, **options).model
    dates.agree(model.yojo, processor)
    clock("2027-10-11")
    prompts = PromptEncoder(processor, processor.tokenizer, "example")
    example = yojo.Example(QUESTION, ANSWERS, images=[Image.new("RGB", (32, 32), "red")])
    if "format" in options:
        separator = processor.tokenizer.convert_tokens_to_ids("<|resp_sep|>")
        encoder = ConversationEncoder(prompts, "<|resp_sep|>", separator, {separator})
        ids = encoder(example).inputs["input_ids"]
    else:
        ids = prompts(example)["input_ids"]
    text = processor.decode(ids[0])
    assert "2026-01-02" in text and "2027" not in text and "<|image_pad|>" in text


def test_counting_with_a_saved_model(clock, tmp_path):
    text_model(dated(MISTRAL.replace("%Y-%m-%d", "%B")), mode="isolated", turn="generation_prompt").save_pretrained(
        tmp_path
    )
    counts = []
    for day in ("2026-01-02", "2026-09-02"):  # September takes more tokens than January
        clock(day)
        processor = load_processor(tmp_path)
        settings = model_settings(tmp_path, processor)
        assert settings["turn"] == "generation_prompt" and settings["config"].model_type == "qwen3"
        counts.append(count_tokens(yojo.Example(QUESTION, ANSWERS), processor, **settings))
        loose = load_processor(tmp_path)
        counts.append(count_tokens(yojo.Example(QUESTION, ANSWERS), loose, **settings))
    assert counts[0] == counts[2] == counts[1] != counts[3]


def test_a_resumed_run_adopts_the_day_of_its_checkpoint(clock, tmp_path):
    text_model(dated(MISTRAL), mode="isolated").save_pretrained(tmp_path)
    clock("2027-10-11")
    later = text_model(dated(MISTRAL), mode="isolated")
    assert "2027-10-11" in prompt_of(later)
    adopt_date(later.model, later.processor, tmp_path)
    assert "2026-01-02" in prompt_of(later) and later.model.yojo.date == datetime.date(2026, 1, 2)
    later.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "yojo_config.json").read_text())["date"] == "2026-01-02"


def test_a_processor_for_other_tools_prints_the_day_itself(clock, tmp_path):
    for processor in (dated(MISTRAL), image_processor("chatml")):
        processor.chat_template = MISTRAL + processor.chat_template
        template = processor.chat_template
        dates.settle(processor, "2026-01-02")
        dates.pinned(processor).save_pretrained(tmp_path)
        clock("2027-10-11")
        turns = [{"role": "user", "content": [{"type": "text", "text": "hi"}]}]
        loaded = load_processor(tmp_path)
        text = loaded.apply_chat_template(turns, tokenize=False)
        assert "2026-01-02" in text and "2027" not in text
        assert processor.chat_template == template
    tokenizer = tokenizer_of_kind("bytes", "chatml")
    assert dates.pinned(tokenizer) is tokenizer


def test_two_days_are_refused(clock):
    one = text_model(dated(MISTRAL), mode="isolated")
    clock("2027-10-11")
    other = text_model(dated(MISTRAL), mode="isolated")
    with pytest.raises(ValueError, match="2027-10-11, the model to one of 2026-01-02"):
        yojo.RewardModel(one.model, other.processor)


FORMATS = [
    "%Y-%m-%d",
    "%-d %b %Y",
    "%A, %d. %B %y, week %V of %G",
    "100%% %j %p %I:%M:%S %H",
    "%F %D %T %R %e %u %w %%Y %",
    "%q%",
    "plain",
]


@pytest.mark.parametrize("day", ["2026-01-02", "2024-02-29", "1999-12-31"])
def test_the_macro_writes_what_strftime_writes(monkeypatch, day):
    tokenizer = tokenizer_of_kind("bytes")
    parts = "|".join("{{ strftime_now(" + repr(form) + ") }}" for form in FORMATS)
    # As templates use it: in macros, loops and filters, after blanks and line breaks that jinja trims.
    body = (
        "  {% if true %}\n"
        + parts
        + "\n  {% endif %}\n{% macro m() %}{{ strftime_now('%Y') | int + 1 }}{% endmacro %}{{ m() }}"
        "{% for x in messages %}{{ strftime_now(format='%d').split('-')[0] }}{% endfor %}{{ strftime_now is defined }}"
    )
    for template in (body, "\n" + body, "{{ strftime_now('%d') }}" + body + "\n\n"):
        tokenizer.chat_template = template
        if hasattr(tokenizer, "yojo_date"):
            del tokenizer.yojo_date

        class Day(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime.fromisoformat(day)

        with monkeypatch.context() as context:
            context.setattr(chat_template_utils, "datetime", Day)
            expected = tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False)
        dates.settle(tokenizer, day)
        options = dates.template_options(tokenizer)
        assert tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False, **options) == expected

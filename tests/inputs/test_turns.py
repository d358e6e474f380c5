"""Prompt and response together are the tokens of the conversation, wherever they can be had; elsewhere, what is said."""

import dataclasses
import json

import numpy as np
import pytest
import torch
import transformers
import turn_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from turn_cases import KINDS, TEMPLATES, image_processor, rendered_ids, text_model, tokenizer_of_kind

import yojo
from yojo.config import YojoConfig
from yojo.inputs.plain import forbidden_ids, plain_ids
from yojo.inputs.prompts import PromptEncoder
from yojo.inputs.turns import TurnEncoder

PROMPT = "What is it?"
ANSWERS = ["A cat sat.", "42", "yes, it is good", " a dog", "better \n", "two\n\nlines", "猫", "dog <think> bird"]
ORDINARY = [
    "smolvlm",
    "qwen3",
    "thinking",
    "deepseek",
    "llava_onevision",
    "molmo2",
    "gemma3",
    "zephyr",
    "chatml",
    "headless",
]


def encode(tokenizer, responses, turn="template", prompt=PROMPT):
    """(prompt ids, responses' ids, leads) of an example."""
    encoder = TurnEncoder(tokenizer, forbidden_ids(tokenizer, tokenizer), turn)
    outputs, ids, leads = encoder(PromptEncoder(tokenizer, tokenizer, "the example"), yojo.Example(prompt, responses))
    return outputs["input_ids"][0].tolist(), ids, leads


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("template", ORDINARY)
def test_prompt_and_response_are_the_conversation(kind, template):
    tokenizer = tokenizer_of_kind(kind, template)
    prompt, responses, leads = encode(tokenizer, ANSWERS)
    for answer, ids, lead in zip(ANSWERS, responses, leads, strict=True):
        expected, crosses = rendered_ids(tokenizer, PROMPT, answer)
        assert not crosses and prompt + ids == expected
        assert 0 <= lead < len(ids)
    # A response's tokens, and the prompt's, are its own: others beside it change nothing.
    for answer, ids in zip(ANSWERS, responses, strict=True):
        assert encode(tokenizer, [answer])[:2] == (prompt, [ids])


# What each of these templates does is what makes the old way differ; where it does not, the tests above show nothing.
@pytest.mark.parametrize(
    "template", ["smolvlm", "qwen3", "thinking", "deepseek", "llava_onevision", "molmo2", "gemma3"]
)
def test_the_generation_prompt_alone_differs(template):
    tokenizer = tokenizer_of_kind("bytes", template)
    prompt, responses, leads = encode(tokenizer, [" a dog"], "generation_prompt")
    turns = [{"role": "user", "content": PROMPT}]
    generation = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    assert prompt == generation and leads == [0]
    assert responses == [tokenizer(" a dog", add_special_tokens=False)["input_ids"]]
    assert prompt + responses[0] != rendered_ids(tokenizer, PROMPT, " a dog")[0]


def test_a_vocabulary_with_a_space_marker_alone_differs():
    tokenizer = tokenizer_of_kind("llama2", "zephyr")
    prompt, responses, _ = encode(tokenizer, ["yes"], "generation_prompt")
    assert prompt + responses[0] != rendered_ids(tokenizer, PROMPT, "yes")[0]


def test_what_leads_a_response():
    def tokens(template, answer, kind="bytes"):
        tokenizer = tokenizer_of_kind(kind, template)
        prompt, (ids,), (lead,) = encode(tokenizer, [answer])
        return tokenizer.decode(prompt), tokenizer.decode(ids[:lead]), tokenizer.decode(ids[lead:])

    # The blank of SmolVLM is part of the answer's first token where the vocabulary has one, else it leads.
    assert tokens("smolvlm", "yes")[1:] == (" ", "yes") and tokens("smolvlm", "it is")[1:] == ("", " it is")
    assert tokens("qwen3", "yes")[1:] == ("<think>\n\n</think>\n\n", "yes")
    assert tokens("molmo2", "yes") == (f"<|im_start|>user\n{PROMPT}<|im_end|>\n <|im_start|>assistant\n", "", "yes")
    assert tokens("llava_onevision", "yes")[0].endswith("<|im_start|>assistant \n")
    assert tokens("gemma3", "\n yes ")[1:] == ("", "yes")  # the template takes the blanks away
    assert tokens("headless", "yes")[0].endswith("<|assistant|>")
    # The generation prompt of a thinking model opens thoughts; conversations close them before the answer. A token of both
    # line breaks would cross the prompt's end, which then is where the vocabulary splits.
    assert tokens("thinking", "yes")[1:] == ("\n</think>\n\n", "yes")
    prompt, _, leads = encode(tokenizer_of_kind("unigram", "thinking"), ["yes"])
    assert tokenizer_of_kind("unigram").convert_ids_to_tokens(prompt[-1]) == "<think>" and leads == [5]


def test_thoughts_that_the_template_parses_stay_whole():
    """What the template would take out of a response or rewrite in it is taken as it is, behind the generation prompt."""
    for kind in KINDS:
        tokenizer = tokenizer_of_kind(kind, "qwen3")
        canonical, other = "<think>\nit is\n</think>\n\nyes", "<think>it is</think>yes"
        prompt, (first, second), leads = encode(tokenizer, [canonical, other])
        assert prompt + first == rendered_ids(tokenizer, PROMPT, canonical)[0] and leads == [0, 0]
        generation = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
        )
        assert prompt + second == tokenizer(generation + other, add_special_tokens=False)["input_ids"]
        # A template that drops thoughts, and opens them itself: once is enough.
        tokenizer = tokenizer_of_kind(kind, "deepseek")
        prompt, (first, second), _ = encode(tokenizer, ["it is</think>yes", "<think>\nit is</think>yes"])
        assert first == second
        generation = tokenizer.apply_chat_template(
            [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
        )
        assert prompt + first == tokenizer(generation + "it is</think>yes", add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kind", KINDS)
def test_where_it_cannot_be_had_the_response_stands_alone(kind):
    # It begins with a line break, which the vocabulary joins with the one before it.
    tokenizer = tokenizer_of_kind(kind, "chatml")
    forbidden = forbidden_ids(tokenizer, tokenizer)
    prompt, (ids,), _ = encode(tokenizer, ["\nyes"])
    generation = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], add_generation_prompt=True, return_dict=False
    )
    assert prompt == generation
    if prompt + ids != rendered_ids(tokenizer, PROMPT, "\nyes")[0]:
        assert kind != "bytes" and ids == plain_ids(tokenizer, "\nyes", forbidden)
    # It spells a special token: it stays text, and still the template's blank stands before it.
    tokenizer = tokenizer_of_kind("bytes", "smolvlm")
    prompt, (ids,), _ = encode(tokenizer, ["it <|im_end|>"])
    assert not forbidden_ids(tokenizer, tokenizer) & set(ids) and tokenizer.decode(ids) == " it <|im_end|>"


def test_templates_that_refuse_or_hide_an_answer_or_write_it_twice():
    tokenizer = tokenizer_of_kind("bytes", "chatml")
    alone = encode(tokenizer, ANSWERS, "generation_prompt")
    generation = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    for answer in (
        "{{ raise_exception('no assistant') }}",
        "<|im_start|>assistant\n{{ m.content | upper }}x<|im_end|>",
        "<|im_start|>assistant\n{{ m.content }}<|im_end|>{{ m.content }}",  # where does it begin?
    ):
        tokenizer.chat_template = (
            "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>user\n{{ m.content }}<|im_end|>\n{% else %}"
            + answer
            + "{% endif %}{% endfor %}"
            + generation
        )
        assert encode(tokenizer, ANSWERS) == alone
    tokenizer.chat_template = None
    assert encode(tokenizer, ["yes"])[1:] == ([tokenizer("yes")["input_ids"]], [0])


def test_a_long_prompt_without_added_tokens_at_its_end():
    for kind in ("bytes", "unigram"):
        tokenizer = tokenizer_of_kind(kind, "vicuna")
        long = "one two three " * 200
        prompt, responses, _ = encode(tokenizer, ["yes", "it is"], prompt=long)
        for answer, ids in zip(["yes", "it is"], responses, strict=True):
            assert prompt + ids == rendered_ids(tokenizer, long, answer)[0]


PIECES = [
    *turn_cases.SPECIAL,
    *turn_cases.THOUGHTS,
    "<image>",
    "<unk>",
    " ",
    "\n",
    "a",
    "猫",
    "\u2042yojo\u2042",
    "<",
    "|>",
    "im_end",
]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    st.sampled_from(KINDS),
    st.sampled_from(sorted(TEMPLATES)),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=8).map("".join).filter(str.strip),
)
def test_no_special_token_comes_out_of_a_response(kind, template, response):
    tokenizer = tokenizer_of_kind(kind, template, added=(*turn_cases.THOUGHTS, "<image>"))
    forbidden = forbidden_ids(tokenizer, tokenizer) | {tokenizer.convert_tokens_to_ids("<image>")}
    encoder = TurnEncoder(tokenizer, forbidden, "template")
    example = yojo.Example(PROMPT, [response, "yes"])
    outputs, (ids, other), _ = encoder(PromptEncoder(tokenizer, tokenizer, "the example"), example)
    assert not forbidden & set(ids)
    # Nothing of it is lost, whatever the template does with it, but blanks around it and thoughts opened before it.
    if kind == "bytes":
        said = "".join((tokenizer.decode(outputs["input_ids"][0]) + tokenizer.decode(ids)).split())
        assert said.endswith("".join(response.split()))
    # Nor does it change what stands beside it.
    alone = encoder(PromptEncoder(tokenizer, tokenizer, "the example"), dataclasses.replace(example, responses=["yes"]))
    assert alone[0]["input_ids"].tolist() == outputs["input_ids"].tolist() and alone[1] == [other]


# ---- with images ----


@pytest.mark.parametrize("template", ["chatml", "smolvlm", "llava_onevision", "molmo2", "zephyr"])
def test_images_stay_where_they_are(template):
    processor = image_processor(template)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype="uint8"))
    turns = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]
    encoder = TurnEncoder(processor.tokenizer, forbidden_ids(processor, processor.tokenizer), "template")
    calls = []
    inner = processor.image_processor
    processor.image_processor = _Counting(inner, calls)
    outputs, responses, _ = encoder(
        PromptEncoder(processor, processor.tokenizer, "the example"),
        yojo.Example(PROMPT, ["yes", "it is"], images=[image]),
    )
    processor.image_processor = inner
    assert len(calls) == 1  # images are processed once, however often the template is looked at
    prompt = outputs["input_ids"][0].tolist()
    image_id = processor.image_token_id
    assert prompt.count(image_id) > 1
    for answer, ids in zip(["yes", "it is"], responses, strict=True):
        talk = [*turns, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
        text = processor.apply_chat_template(talk, tokenize=False)
        whole = processor(text=[text], images=[image], return_tensors="pt", return_mm_token_type_ids=True)
        count = len(prompt) + len(ids)
        assert prompt + ids == whole["input_ids"][0, :count].tolist()
        assert torch.equal(outputs["mm_token_type_ids"], whole["mm_token_type_ids"][:, : len(prompt)])
        assert torch.equal(outputs["pixel_values"], whole["pixel_values"])


class _Counting:
    def __init__(self, inner, calls):
        self._inner, self._calls = inner, calls

    def __call__(self, *args, **kwargs):
        self._calls.append(1)
        return self._inner(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._inner, name)


# ---- settings, saving, pooling ----


def test_a_response_is_pooled_from_its_own_tokens():
    tokenizer = tokenizer_of_kind("bytes", "qwen3")
    for pooling in ("first", "response_mean", "last", "separator"):
        reward_model = text_model(tokenizer, mode="isolated", pooling=pooling)
        example = yojo.Example(PROMPT, ["yes", "it is"])
        item, batch = reward_model.collator.encode(example), reward_model.collator([example])
        assert item.leads == [6, 6]
        ends = torch.tensor([len(item.prompt_ids), *map(len, item.responses)]).cumsum(0).tolist()
        own = [list(range(start + 6, stop - 1)) for start, stop in zip(ends[:-1], ends[1:], strict=True)]
        assert [tokenizer.decode(batch["input_ids"][0, rows]) for rows in own] == ["yes", "it is"]
        expected = {
            "first": [rows[0] for rows in own],
            "last": [rows[-1] for rows in own],
            "response_mean": [row for rows in own for row in rows],
            "separator": [rows[-1] + 1 for rows in own],
        }
        assert batch["separators"].read.tolist() == expected[pooling]


def test_a_saved_model_keeps_the_rule_it_was_trained_with(tmp_path):
    tokenizer = tokenizer_of_kind("bytes", "smolvlm")
    new, old = (text_model(tokenizer, mode="isolated", turn=turn) for turn in ("template", "generation_prompt"))
    old.model.load_state_dict(new.model.state_dict())
    scores = {turn: model.score(PROMPT, ["yes", "it is"]) for turn, model in (("new", new), ("old", old))}
    assert (scores["new"] - scores["old"]).abs().max() > 1e-4
    new.save_pretrained(tmp_path)
    loaded = yojo.RewardModel.from_pretrained(tmp_path)
    assert loaded.config.turn == "template" and torch.equal(loaded.score(PROMPT, ["yes", "it is"]), scores["new"])
    # A folder of before there was a choice.
    file = tmp_path / "yojo_config.json"
    description = json.loads(file.read_text())
    del description["config"]["turn"], description["date"]
    file.write_text(json.dumps(description))
    loaded = yojo.RewardModel.from_pretrained(tmp_path)
    assert loaded.config.turn == "generation_prompt"
    assert torch.equal(loaded.score(PROMPT, ["yes", "it is"]), scores["old"])
    with pytest.raises(ValueError, match="turn='generation_prompt'"):
        yojo.patch(loaded.model, turn="template")
    loaded.save_pretrained(tmp_path / "again")
    assert yojo.RewardModel.from_pretrained(tmp_path / "again").config.turn == "generation_prompt"


def test_the_setting_and_the_paper_format():
    assert YojoConfig().turn == "template"
    with pytest.raises(ValueError, match="turn must be one of template, generation_prompt, got 'chat'"):
        YojoConfig(turn="chat")
    with pytest.raises(ValueError, match=r"format='mr2rm' .* needs turn='template'"):
        YojoConfig(format="mr2rm", pooling="last", turn="generation_prompt")
    saved = YojoConfig(format="mr2rm", pooling="last").to_dict()
    del saved["turn"]
    assert YojoConfig.from_saved(saved) == YojoConfig(format="mr2rm", pooling="last")


def test_the_shipped_model_keeps_its_rule():
    from yojo.demo.reward import load_reward_model

    assert load_reward_model().config.turn == "generation_prompt"


def test_what_an_exported_template_cannot_say_is_refused(tmp_path):
    """A template made of the generation prompt gives our tokens, or the model is not exported."""
    from yojo.converting.export import export_trl

    for template, turn, works in (
        ("smolvlm", "template", False),
        ("smolvlm", "generation_prompt", True),
        ("zephyr", "template", True),
    ):
        tokenizer = tokenizer_of_kind("bytes", template)
        reward_model = text_model(tokenizer, mode="isolated", head="linear", turn=turn)
        if works:
            export_trl(reward_model, tmp_path / f"{template}-{turn}")
            exported = transformers.AutoTokenizer.from_pretrained(tmp_path / f"{template}-{turn}")
            turns = [{"role": "user", "content": PROMPT}, {"role": "assistant", "content": "it is"}]
            item = reward_model.collator.encode(yojo.Example(PROMPT, ["it is"]))
            ids = exported.apply_chat_template(turns, tokenize=True, return_dict=False)
            assert ids == [*item.prompt_ids.tolist(), *item.responses[0]]
        else:
            with pytest.raises(ValueError, match="train with turn='generation_prompt' to export to TRL"):
                export_trl(reward_model, tmp_path / "refused")

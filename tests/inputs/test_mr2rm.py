"""The released code's text format: scores against a plain implementation of it, boundaries, and what is refused."""

import copy

import pytest
import released_code as released
import tiny
import torch
from turn_cases import merging_tokenizer

import yojo
from yojo.config import CHOICES, YojoConfig
from yojo.demo import digits

POOLINGS = [name for name in CHOICES["pooling"] if name != "separator"]
PROMPT = "which digit is in the picture ?"
TOLERANCE = 2e-6
SPACES = ["a seven .", "it is a one , not a seven", "9", "no idea\n\nsorry", "the digit 3"]


@pytest.fixture(scope="module")
def make(backbone):
    """Function (pooling, head, activation) -> (`RewardModel`, released head) that share their weights."""

    def build(pooling="last", head="mlp", activation="silu", **options):
        model, processor = copy.deepcopy(backbone)
        yojo.patch(
            model.eval(), processor, format="mr2rm", pooling=pooling, head=head, head_dim=24, activation=activation,
            **options,
        )  # fmt: skip
        theirs = released.make_head(pooling, head, activation, model.config.get_text_config().hidden_size)
        released.put_head(model.score, theirs)
        return yojo.RewardModel(model, processor), theirs

    return build


def stock_scores(reward_model, theirs, example, pooling, scale=True):
    """The released computation on the same weights, from messages to scores."""
    processor, tokenizer = reward_model.processor, reward_model.processor.tokenizer
    messages, answer = released.conversation(example.prompt, example.responses, example.images)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    if example.images:
        inputs = processor(
            text=[text], images=[list(example.images)], return_tensors="pt", return_mm_token_type_ids=True
        )
    else:
        inputs = tokenizer([text], return_tensors="pt")
    model = copy.deepcopy(reward_model.model)
    yojo.unpatch(model)
    with torch.no_grad():
        # unpatch takes an added row away again; the released code keeps it
        model.resize_token_embeddings(reward_model.model.get_input_embeddings().weight.shape[0], mean_resizing=False)
        model.get_input_embeddings().weight.copy_(reward_model.model.get_input_embeddings().weight)
    ends, starts = released.ends_and_starts(
        inputs["input_ids"][0].tolist(),
        tokenizer.encode(answer, add_special_tokens=False),
        tokenizer.convert_tokens_to_ids(released.SEPARATOR),
        len(example.responses),
    )
    return released.scores(model, dict(inputs), ends, starts, pooling, theirs, scale)


@pytest.mark.parametrize("head, activation", [("linear", "silu"), *(("mlp", name) for name in CHOICES["activation"])])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_scores_are_those_of_the_released_code(make, samples, pooling, head, activation):
    reward_model, theirs = make(pooling, head, activation)
    images = [image for image, _ in samples[:2]]
    for example in (yojo.Example(PROMPT, SPACES[:3], images=images[:1]), yojo.Example(PROMPT, SPACES[:2])):
        (ours,) = reward_model.score_many([example])
        expected = stock_scores(reward_model, theirs, example, pooling)
        assert expected.std() > 10 * TOLERANCE  # the responses do differ
        assert ours.shape == expected.shape and (ours - expected).abs().max() <= TOLERANCE


@pytest.mark.parametrize("pooling", POOLINGS)
def test_packed_rows_of_one_to_five_responses(make, samples, pooling):
    reward_model, theirs = make(pooling)
    images = [image for image, _ in samples]
    examples = [
        yojo.Example(PROMPT, SPACES[: n + 1], images=images[: n % 3], rankings=[*range(1, n + 2)]) for n in range(5)
    ]
    expected = [stock_scores(reward_model, theirs, example, pooling) for example in examples]
    for budget in (1, 100_000):  # each in a row of its own, and all in one
        for ours, single in zip(reward_model.score_many(examples, token_budget=budget), expected, strict=True):
            assert (ours - single).abs().max() <= TOLERANCE
    padded = yojo.Collator(reward_model.processor, reward_model.model, pad_to_multiple_of=64)(examples)
    with torch.no_grad():
        output = reward_model.model(**padded)
    for row, single in zip(output.scores, expected, strict=True):
        assert (row[: len(single)] - single).abs().max() <= TOLERANCE
    assert output.loss.isfinite()


def test_without_the_division(make):
    reward_model, theirs = make(scale_scores=False)
    example = yojo.Example(PROMPT, SPACES)
    expected = stock_scores(reward_model, theirs, example, "last", scale=False)
    assert (reward_model.score_many([example])[0] - expected).abs().max() <= 10 * TOLERANCE


def test_a_response_that_the_prompt_repeats_is_read_where_it_stands(make):
    """The released rule would read its first token in the prompt; there is but one place where the answer is."""
    reward_model, _ = make("first")
    encoded = reward_model.collator.encode(yojo.Example("say 9", ["9"]))
    nine = reward_model.processor.tokenizer.convert_tokens_to_ids("9")
    assert nine in encoded.prompt_ids.tolist() and encoded.responses[0][0] == nine


def test_boundaries_of_the_tokens(make):
    reward_model, _ = make("response_mean")
    tokenizer = reward_model.processor.tokenizer
    encoded = reward_model.collator.encode(yojo.Example(PROMPT, ["a seven .", "nine"]))
    assert tokenizer.convert_ids_to_tokens(encoded.responses[0]) == ["a", "seven", ".", "\n", "\n", "<|resp_sep|>"]
    assert tokenizer.convert_ids_to_tokens(encoded.responses[1]) == ["\n", "\n", "nine", "<|im_end|>", "\n"]
    assert tokenizer.convert_ids_to_tokens(encoded.prompt_ids.tolist())[-3:] == ["<|im_start|>", "assistant", "\n"]
    assert encoded.open_end


@pytest.fixture(scope="module")
def merging():
    """(patched tiny Qwen3, its tokenizer, released head), pooling "first_last_concat"."""
    import transformers

    tokenizer = merging_tokenizer()
    torch.manual_seed(0)
    config = transformers.Qwen3Config(**(tiny.TEXT | dict(vocab_size=len(tokenizer), head_dim=8)))
    model = tiny.randomise(transformers.AutoModelForCausalLM.from_config(config), 0)
    yojo.patch(model, tokenizer, format="mr2rm", pooling="first_last_concat", head_dim=24)
    head = released.make_head("first_last_concat", "mlp", "silu", tiny.HIDDEN)
    released.put_head(model.score, head)
    return yojo.RewardModel(model, tokenizer), head


@pytest.mark.parametrize(
    "responses",
    [["yes.", "no", "one two."], ["yes"], ["three\n", "\nfour."], ["fine.\n\n", "one"], ["née — 你好.", "no.\n"]],
)
def test_boundaries_where_line_breaks_merge_with_what_stands_before(merging, responses):
    reward_model, head = merging
    tokenizer = reward_model.processor
    answer = f"\n\n{released.SEPARATOR}\n\n".join(responses)
    messages = [{"role": "user", "content": "one or two.\n"}, {"role": "assistant", "content": answer}]
    ids = tokenizer(tokenizer.apply_chat_template(messages, tokenize=False))["input_ids"]
    encoded = reward_model.collator.encode(yojo.Example("one or two.\n", responses))
    assert encoded.prompt_ids.tolist() + sum(encoded.responses, []) == ids
    ends, starts = released.ends_and_starts(
        ids, tokenizer.encode(answer, add_special_tokens=False), reward_model.collator.separator_id, len(responses)
    )
    stock = copy.deepcopy(reward_model.model)
    embedding = stock.get_input_embeddings().weight.detach().clone()
    yojo.unpatch(stock).resize_token_embeddings(len(embedding), mean_resizing=False)
    with torch.no_grad():
        stock.get_input_embeddings().weight.copy_(embedding)
    expected = released.scores(stock, {"input_ids": torch.tensor([ids])}, ends, starts, "first_last_concat", head)
    ours = reward_model.score("one or two.\n", responses)
    assert (ours - expected).abs().max() <= TOLERANCE * max(1, expected.abs().max())


def test_a_first_token_that_the_template_shares_belongs_to_the_response(merging):
    """The template's line break merges with those a response begins with: the token holds some of the response."""
    reward_model, _ = merging
    encoded = reward_model.collator.encode(yojo.Example("one", ["\n\nyes", "no"]))
    tokenizer = reward_model.processor
    assert tokenizer.decode(encoded.responses[0]).startswith("\n\n\nyes")
    assert tokenizer.decode(encoded.prompt_ids.tolist()).endswith("assistant")


@pytest.mark.parametrize("pooling", POOLINGS)
def test_tiny_molmo2(pooling):
    """Image blocks, vision tensors and token types of the paper's own family, from processed prompts."""
    model = tiny.build("molmo2")
    head = released.make_head(pooling, "mlp", "silu", tiny.HIDDEN)
    tokenizer = tiny.tokenizer(with_separator=True)
    separator = tokenizer.convert_tokens_to_ids(tiny.SEPARATOR)
    stock = copy.deepcopy(model)
    yojo.patch(model, tokenizer, format="mr2rm", pooling=pooling, head_dim=24)
    released.put_head(model.score, head)
    collator = yojo.Collator(tokenizer, model)
    encoded, expected = [], []
    for i, (name, prompt) in enumerate(tiny.prompts("molmo2").items()):
        responses = tiny.responses(i, (3, 1, 4, 2)[: i % 4 + 1])
        encoded.append(collator.from_processed(prompt, responses, name=name))
        ids = [prompt["input_ids"][0].tolist()]
        for response in responses:
            ids += [response, [separator]]
        ids = sum(ids[:-1], [])
        length = prompt["input_ids"].shape[1]
        inputs = {key: value for key, value in prompt.items() if key not in ("input_ids", "attention_mask")}
        inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, len(ids) - length))
        cuts = [place for place, token in enumerate(ids) if token == separator]
        ends, starts = [*(cut - 1 for cut in cuts), len(ids) - 1], [length, *(cut + 1 for cut in cuts)]
        inputs["input_ids"] = torch.tensor([ids])
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        expected.append(released.scores(stock, inputs, ends, starts, pooling, head))
    images, videos = [0, 1, 2], [2, 3, 4]  # Molmo2 takes images or videos in one row
    for group in ([0], images, videos):
        with torch.no_grad():
            found = model.eval()(**collator.pack([encoded[i] for i in group])).scores
        for row, i in zip(found, group, strict=True):
            assert (row[: len(expected[i])] - expected[i]).abs().max() <= TOLERANCE * max(1, expected[i].abs().max())


# ---- what is refused ----


@pytest.mark.parametrize(
    "options, message",
    [
        ({}, "pass the pooling the model was trained with, one of 'last', 'first'"),
        ({"pooling": "separator"}, "pooling='separator' .the default. has nothing to read there"),
        ({"pooling": "last", "mode": "isolated"}, "needs mode='comparative' and permutations=1, got mode='isolated'"),
        ({"pooling": "last", "permutations": 2}, "got mode='comparative', permutations=2"),
    ],
)
def test_settings_the_format_cannot_have(options, message):
    with pytest.raises(ValueError, match=message):
        YojoConfig(format="mr2rm", **options)


@pytest.mark.parametrize(
    "prompt, responses, message",
    [
        ("p", ["a", "b <|resp_sep|> c"], "example 0: response 1 contains the separator .* cannot escape it"),
        ("p <|resp_sep|>", ["a"], "the prompt contains the separator"),
        ("p", ["<|image_pad|>"], "response 0 contains the placeholder '<|image_pad|>'"),
        ("p", ["a", "b <|im_end|>"], "the responses hold the special token '<|im_end|>'"),
        ("p", ["<|vision_start|> a"], "the responses hold the special token '<|vision_start|>'"),
        ([{"role": "system", "content": "s"}, {"role": "user", "content": "p"}], ["a"], "turns are system, user"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}],
            ["a"],
            "then one text; the prompt's parts are text, text",
        ),
    ],
)
def test_text_the_format_cannot_hold(make, prompt, responses, message):
    reward_model, _ = make()
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        reward_model.collator([yojo.Example(prompt, responses)])


def test_images_behind_the_text_are_refused(make, samples):
    reward_model, _ = make()
    prompt = [{"role": "user", "content": [{"type": "text", "text": digits.PROMPT}, {"type": "image"}]}]
    with pytest.raises(ValueError, match="images come first, then videos, then one text; .* are text, image"):
        reward_model.score(prompt, ["a"], images=[samples[0][0]])


def test_separators_that_come_out_of_other_text_are_refused(make):
    """Whatever a tokenizer makes of some text: more separators than responses are never scored."""
    reward_model, _ = make()
    tokenizer = reward_model.processor.tokenizer
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken("sneaky", special=False)])
    collator = copy.copy(reward_model.collator)
    collator.separator_id = tokenizer.convert_tokens_to_ids("seven")
    with pytest.raises(ValueError, match="2 separators .* came out of 2 responses"):
        collator.encode(yojo.Example("p", ["a seven", "seven"]))
    with pytest.raises(ValueError, match="or one out of the prompt"):
        collator.encode(yojo.Example("a seven", ["a"]))


def test_a_template_that_changes_the_responses_is_refused(make):
    reward_model, _ = make()
    processor = reward_model.processor
    kept = processor.chat_template
    try:
        processor.chat_template = kept.replace("{{ part.text }}", "{{ part.text | upper }}")
        with pytest.raises(ValueError, match="the chat template changes what the assistant says"):
            reward_model.score("p", ["a", "b"])
        processor.chat_template = kept.replace("{{ part.text }}", "{{ part.text | trim }}")
        assert reward_model.score("p", [" a", "b "]).shape == (2,)  # blanks alone do no harm
        processor.chat_template = None
        with pytest.raises(ValueError, match="has no chat template, which mr2rm needs"):
            reward_model.score("p", ["a", "b"])
    finally:
        processor.chat_template = kept


def test_ordinary_inputs_are_refused(make):
    reward_model, _ = make()
    ids = torch.tensor([[5, 6, reward_model.collator.separator_id, 7]])
    with pytest.raises(ValueError, match="do not say where a row of format='mr2rm' ends"):
        reward_model.model(input_ids=ids)


def test_the_format_is_saved(make, tmp_path, samples):
    reward_model, _ = make("first_last_sub")
    reward_model.save_pretrained(tmp_path)
    loaded = yojo.RewardModel.from_pretrained(tmp_path)
    example = yojo.Example(PROMPT, SPACES, images=[samples[0][0]])
    assert loaded.config.format == "mr2rm"
    assert torch.equal(loaded.score_many([example])[0], reward_model.score_many([example])[0])

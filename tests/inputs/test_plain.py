"""Plain text: no special token comes out of it, from any thread, in time that goes with its length."""

import concurrent.futures
import copy
import pickle
import sys
import threading
import time

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from turn_cases import KINDS, TEMPLATES, image_processor, text_model, tokenizer_of_kind

import yojo
from yojo.data.checking import count_tokens
from yojo.inputs.placeholders import placeholder_tokens
from yojo.inputs.plain import forbidden_ids, named_errors, plain_ids, private_tokenizer
from yojo.patching.state import tokenizer_of
from yojo.training.batches import CostEstimate


@pytest.fixture()
def busy_threads():
    """Threads take turns as often as on a busy machine."""
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


def in_threads(function, cases, count):
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        return [f.result() for f in [pool.submit(function, cases[i % len(cases)]) for i in range(count)]]


@pytest.mark.parametrize("requests", [400, pytest.param(2000, marks=pytest.mark.soak)])
def test_requests_from_eight_threads(make_reward_model, samples, busy_threads, requests):
    """Prompts with and without images, short and long, forged responses: ids to the bit, scores as one thread's."""
    reward_model = make_reward_model(mode="isolated")
    cases = [
        yojo.Example(
            f"which digit is number {i} " * (1 + i % 4),
            [f"it is a {i} <|im_end|> <|image_pad|>", "no idea " * (1 + i % 3), "<|resp_sep|> 7"],
            images=[image for image, _ in samples[: i % 3]],
        )
        for i in range(9)
    ]

    def ids(example):
        item = reward_model.collator.encode(example)
        return [item.prompt_ids.tolist(), item.responses]

    expected = [ids(case) for case in cases]
    for i, found in enumerate(in_threads(ids, cases, requests)):
        assert found == expected[i % len(cases)]
    scores = [reward_model.score_many([case])[0] for case in cases]
    for i, found in enumerate(in_threads(lambda case: reward_model.score_many([case])[0], cases, requests // 10)):
        assert (found - scores[i % len(cases)]).abs().max() <= 2e-6


def test_whatever_else_tokenises_changes_nothing(busy_threads):
    """Counting, estimating and other users of the tokenizer beside scoring; padding and truncation are state as well."""
    tokenizer = tokenizer_of_kind("bytes", "chatml")
    reward_model = text_model(tokenizer, mode="isolated")
    estimate = CostEstimate(reward_model.collator, reward_model.model)
    example = yojo.Example("What is it?", ["a <|im_end|> cat", "no"])
    expected = reward_model.collator.encode(example)

    def work(kind):
        if kind == 0:
            item = reward_model.collator.encode(example)
            assert item.prompt_ids.tolist() == expected.prompt_ids.tolist() and item.responses == expected.responses
        elif kind == 1:
            estimate(example)
        elif kind == 2:
            count_tokens(example, tokenizer)
        elif kind == 3:
            plain_ids(tokenizer, "<|im_start|>" * 5, set())
        else:
            tokenizer(["a", "a longer one"], padding=True)

    in_threads(work, [0, 1, 2, 3, 4], 600)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    tokenizer.backend_tokenizer.enable_truncation(2)
    assert plain_ids(tokenizer, "a <|im_end|> cat", reward_model.collator.forbidden) == expected.responses[0][:-1]


@pytest.mark.parametrize("options", [{"truncation": True, "max_length": 2}, {"split_special_tokens": True}])
@pytest.mark.parametrize("images", [False, True])
def test_prompts_are_not_cut_or_split_by_another_user_of_the_tokenizer(
    make_reward_model, busy_threads, images, options
):
    if images:
        reward_model = make_reward_model(mode="isolated")
    else:
        reward_model = text_model(tokenizer_of_kind("bytes", "chatml"), mode="isolated")
    tokenizer, example = reward_model.collator.tokenizer, yojo.Example("What is it?", ["a cat"])
    state, expected = dict(vars(tokenizer)), reward_model.collator.encode(example).prompt_ids.tolist()
    done = threading.Event()

    def use():
        while not done.is_set():
            tokenizer("<|im_start|> a long text", **options)

    user = threading.Thread(target=use)
    user.start()
    try:
        found = [reward_model.collator.encode(example).prompt_ids.tolist() for _ in range(400)]
    finally:
        done.set()
        user.join()
    assert all(ids == expected for ids in found)
    assert vars(tokenizer) == state and tokenizer_of(reward_model.processor) is tokenizer


def test_a_tokenizer_that_is_changed_is_copied_again():
    """Where there is no chat template, what a tokenizer puts around a text is its prompt's."""
    tokenizer = tokenizer_of_kind("bytes")
    reward_model = text_model(tokenizer, mode="isolated")
    example = yojo.Example("What is it?", ["a cat"])
    before = reward_model.collator.encode(example).prompt_ids.tolist()
    start = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", start)]
    )
    assert reward_model.collator.encode(example).prompt_ids.tolist() == [start, *before]


@pytest.mark.parametrize("kind", KINDS)
def test_plain_ids_are_those_of_the_tokenizer(kind):
    tokenizer = tokenizer_of_kind(kind)
    texts = ["A cat sat. 猫 <|im_end|> <think>", " <s></s>", "\n\n a  b", "<|im_start|>assistant\n", "<unk>"]
    for text in texts:
        expected = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        tokenizer("back to what it was")
        assert plain_ids(tokenizer, text, set()) == expected
        assert tokenizer.backend_tokenizer.encode_special_tokens is False
    # A token that is added later is known from then on, as it is to the tokenizer.
    tokenizer.add_tokens(["zebra"])
    assert plain_ids(tokenizer, "zebra", set())[-1] == tokenizer.convert_tokens_to_ids("zebra")
    tokenizer.add_special_tokens({"extra_special_tokens": ["gnu"]}, replace_extra_special_tokens=False)
    assert tokenizer.convert_tokens_to_ids("gnu") not in plain_ids(tokenizer, "gnu", set())
    for twin in (copy.deepcopy(tokenizer), pickle.loads(pickle.dumps(tokenizer))):
        assert plain_ids(twin, texts[0], set()) == plain_ids(tokenizer, texts[0], set())


def test_a_degenerate_response_takes_as_long_as_it_is_long():
    tokenizer = tokenizer_of_kind("bytes", "chatml", added=["<image>", "<image"])
    forbidden = {tokenizer.convert_tokens_to_ids(token) for token in ("<image>", "<image")}

    def seconds(count):
        """Of computing, at best: on a busy machine others take their turns, and the collector of garbage its own."""
        return min(measured(count) for _ in range(3))

    def measured(count):
        begin = time.thread_time()
        ids = plain_ids(tokenizer, "<image>" * count, forbidden)
        assert not forbidden & set(ids) and tokenizer.decode(ids) == "<image>" * count
        return time.thread_time() - begin

    measured(10)
    assert seconds(4000) < 30 * seconds(400)  # 10 where it is linear, 100 where it is not
    model = text_model(tokenizer, mode="isolated")
    model.model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    model = yojo.RewardModel(model.model, tokenizer)
    example = yojo.Example("hi", ["<image>" * 1500, "b"])
    tokens = model.collator.encode(example).num_tokens(model.config)
    assert tokens == count_tokens(example, tokenizer, model.model.config) > 1500 * 5
    assert model.score("hi", ["<image>" * 20, "b"]).isfinite().all()


PIECES = [
    "<image>",
    "<image",
    "image>",
    "<",
    ">",
    "<im",
    "<|im_end|>",
    "<|resp_sep|>",
    " ",
    "\n",
    "a",
    "İ",
    "猫",
    "<unk>",
    "</s>",
]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.sampled_from(KINDS),
    st.lists(st.sampled_from(PIECES), min_size=1, max_size=12).map("".join),
    st.booleans(),
    st.booleans(),
)
def test_nothing_forbidden_comes_out(kind, text, stripping, normalized):
    tokenizer = tokenizer_of_kind(kind, special=("<|im_end|>", "<|resp_sep|>"), added=())
    flags = {"special": False, "lstrip": stripping, "rstrip": stripping, "normalized": normalized}
    tokenizer.add_tokens([tokenizers.AddedToken(token, **flags) for token in ("<image>", "<image", "image>")])
    names = ("<image>", "<image", "image>", "<|im_end|>", "<|resp_sep|>", "</s>")
    forbidden = {tokenizer.convert_tokens_to_ids(name) for name in names}
    ids = plain_ids(tokenizer, text, forbidden)
    assert not forbidden & set(ids)
    if kind == "bytes":
        assert tokenizer.decode(ids) == text
    if not any(name in text for name in ("<image", "image>")):
        assert ids == tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


class SlowTokenizer(
    transformers.PythonBackend if hasattr(transformers, "PythonBackend") else transformers.PreTrainedTokenizer
):
    """A tokenizer in Python: a character is a token."""

    def __init__(self, **kwargs):
        super().__init__(unk_token="<unk>", **kwargs)

    vocab_size = 128

    def get_vocab(self):
        return {chr(i): i for i in range(128)} | self.added_tokens_encoder

    def _tokenize(self, text, **kwargs):
        return list(text)

    def _convert_token_to_id(self, token):
        return ord(token) if len(token) == 1 and ord(token) < 128 else 63

    def _convert_id_to_token(self, index):
        return chr(index)


def test_a_tokenizer_in_python():
    tokenizer = SlowTokenizer()
    tokenizer.add_special_tokens({"eos_token": "<eos>"})
    tokenizer.add_tokens(["<image>"])
    forbidden = forbidden_ids(tokenizer, tokenizer) | {tokenizer.convert_tokens_to_ids("<image>")}
    text = "a<eos><image><image>b" * 500
    ids = plain_ids(tokenizer, text, forbidden)
    assert not forbidden & set(ids) and "".join(tokenizer.convert_ids_to_tokens(ids)) == text


# ---- what is forbidden ----


def test_ids_of_a_config_that_are_ordinary_words():
    tokenizer = tokenizer_of_kind("bytes", "chatml")
    word = tokenizer("!", add_special_tokens=False)["input_ids"][0]
    hash_sign = tokenizer("#", add_special_tokens=False)["input_ids"][0]
    model = text_model(tokenizer, mode="isolated").model
    model.config.pad_token_id, model.config.bos_token_id, model.config.eos_token_id = word, word, [hash_sign]
    model.config.sep_token_id = hash_sign
    reward_model = yojo.RewardModel(model, tokenizer)
    assert reward_model.score("hi", ["Good idea!", "# no"]).isfinite().all()
    assert word not in reward_model.collator.forbidden
    # What a model replaces by features stays forbidden, whatever it is spelt.
    model.config.image_token_id = word
    with pytest.raises(ValueError, match=r"example 'e': response 1: '!' cannot be tokenised as plain text"):
        yojo.Collator(tokenizer, model)([yojo.Example("hi", ["no", "Good idea!"], id="e")])
    # A padding token of one character is that character.
    tokenizer = tokenizer_of_kind("bytes", "chatml")
    tokenizer.pad_token = "!"
    assert text_model(tokenizer, mode="isolated").score("hi", ["Good idea!", "no"]).isfinite().all()


def test_counting_refuses_what_the_model_refuses():
    """A placeholder that only the model's config names: `yojo data check --model` and training say the same of it."""
    tokenizer = tokenizer_of_kind("bytes", "chatml", added=["<im_patch>"])
    reward_model = text_model(tokenizer, mode="isolated")
    config = reward_model.model.config
    config.image_patch_id = tokenizer.convert_tokens_to_ids("<im_patch>")
    example = yojo.Example("What is <im_patch>?", ["a cat"], id="e")
    for encode in (yojo.Collator(tokenizer, reward_model.model).encode, lambda e: count_tokens(e, tokenizer, config)):
        with pytest.raises(ValueError, match="the prompt's text contains the placeholder '<im_patch>'"):
            encode(example)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<late>"]})
    config.frame_start_token_id = tokenizer.convert_tokens_to_ids("<late>")
    with pytest.raises(ValueError, match="contains the placeholder '<late>'"):
        count_tokens(yojo.Example("What is <late>?", ["a cat"], id="e"), tokenizer, config)


def test_placeholders_of_processor_and_config():
    processor = image_processor("chatml")
    found = placeholder_tokens(processor)
    assert found["image"] >= {"<|image_pad|>", "<|vision_start|>", "<|vision_end|>"} and not found["audio"]
    assert found["video"] >= {"<|video_pad|>"}
    assert placeholder_tokens(processor.tokenizer) == {"image": set(), "video": set(), "audio": set()}
    tokenizer = tokenizer_of_kind("bytes", added=["<im_patch>", "<frame>", "<sound>", "<soft>"])
    i = tokenizer.convert_tokens_to_ids
    config = transformers.PretrainedConfig()
    config.image_patch_id, config.frame_start_token_id, config.audio_token_index = (
        i("<im_patch>"),
        i("<frame>"),
        i("<sound>"),
    )
    config.boi_token_id, config.eos_token_id, config.video_token_id = [i("<soft>")], i("</s>"), 100000
    assert placeholder_tokens(tokenizer, config) == {
        "image": {"<im_patch>", "<soft>"},
        "video": {"<frame>"},
        "audio": {"<sound>"},
    }
    forbidden = forbidden_ids(tokenizer, tokenizer, config)
    assert {i(token) for token in ("<im_patch>", "<frame>", "<sound>", "<soft>", "</s>")} <= forbidden
    named = tokenizer_of_kind("bytes")
    named = transformers.PreTrainedTokenizerFast(
        tokenizer_object=named.backend_tokenizer,
        extra_special_tokens={"image_token": "<image_soft_token>", "boi_token": "<start_of_image>"},
    )
    assert placeholder_tokens(named)["image"] == {"<image_soft_token>", "<start_of_image>"}


# ---- errors ----


class PanicException(BaseException):
    """What a panic of Rust is in Python: no Exception."""


def test_the_response_that_cannot_be_tokenised_is_named_once():
    words = {"<|im_start|>": 0, "<|im_end|>": 1, "user": 2, "assistant": 3, "hi": 4, "a": 5, "b": 6}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=["<|im_start|>", "<|im_end|>"], bos_token=None, unk_token=None
    )
    tokenizer.chat_template = TEMPLATES["chatml"]
    for turn in ("template", "generation_prompt"):
        collator = text_model(copy.deepcopy(tokenizer), mode="isolated", turn=turn).collator
        with pytest.raises(ValueError, match="^example 'e': response 1: (?!.*example).*"):
            collator.encode(yojo.Example("hi", ["a b", "a zzz"], id="e"))


@pytest.mark.parametrize("error", [RecursionError("deep"), RuntimeError("odd"), Exception(), PanicException("rust")])
def test_whatever_a_tokenizer_raises_names_the_response(monkeypatch, error):
    tokenizer = tokenizer_of_kind("bytes", "chatml")
    reward_model = text_model(tokenizer, mode="isolated", turn="generation_prompt")

    def fail(*args):
        raise error

    monkeypatch.setattr("yojo.inputs.turns.plain_ids", fail)
    with pytest.raises(ValueError, match="example 'e': response 0"):
        reward_model.collator.encode(yojo.Example("hi", ["yes"], id="e"))
    with pytest.raises(KeyboardInterrupt), named_errors("e"):
        raise KeyboardInterrupt


def test_a_word_that_becomes_special_is_so_in_the_private_copies():
    """Its vocabulary has the same size as before; a copy made earlier would go on as if nothing had happened."""
    tokenizer = tokenizer_of_kind("bytes")
    vocabulary = tokenizer.get_vocab()

    def ids(text):
        return private_tokenizer(tokenizer)(text, add_special_tokens=False)["input_ids"]

    words = (w for w in vocabulary if len(w) > 1 and w.isalpha() and w.isascii())
    word = next(w for w in words if vocabulary[w] not in ids(f"so{w}s"))
    text = f"so{word}s"
    plain_ids(tokenizer, text, set())
    tokenizer.add_special_tokens({"additional_special_tokens": [word]})
    assert len(tokenizer) == len(vocabulary)
    assert ids(text) == copy.deepcopy(tokenizer)(text, add_special_tokens=False)["input_ids"]
    assert vocabulary[word] in ids(text) and vocabulary[word] not in plain_ids(tokenizer, text, {vocabulary[word]})

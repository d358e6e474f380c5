"""Examples, collator and packed rows, on the demonstration's real processor."""

import io
import math
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

import yojo
from yojo.config import YojoConfig
from yojo.inputs.images import load_image
from yojo.inputs.packing import orders
from yojo.inputs.plain import plain_ids

SPECIALS = ("<|resp_sep|>", "<|image_pad|>", "<|im_end|>", "<|vision_start|>", "<|endoftext|>")


@pytest.fixture(scope="module")
def comparative(make_reward_model):
    return make_reward_model()


@pytest.fixture(scope="module")
def isolated(make_reward_model):
    return make_reward_model(mode="isolated")


def test_what_a_batch_holds(isolated, examples):
    collator = isolated.collator
    batch = collator(examples)
    layout, separators = batch["layout"], batch["separators"]
    tokens = batch["input_ids"].shape[1]
    assert batch["input_ids"].shape == (1, tokens) and batch["position_ids"].shape == (3, 1, tokens)
    assert layout.num_tokens == tokens and layout.num_samples == 5
    assert [len(branches) for branches in layout.branch_lengths] == [4, 1, 3, 2, 2]
    # Every response closes with the separator, and there are no others.
    rows = separators.rows.flatten()
    assert (batch["input_ids"][0, rows] == collator.separator_id).all()
    assert (batch["input_ids"] == collator.separator_id).sum() == len(rows) == 12
    assert separators.offsets.tolist() == [0, 4, 5, 8, 10, 12] and separators.width == 4
    assert batch["rankings"].tolist()[1] == [1, -1, -1, -1] and batch["rankings"].dtype == torch.int64
    assert batch["image_grid_thw"].shape[0] == 2  # of 1 + 1 + 2 + 0 + 1 images these are different
    # Branches go on from the prompt's largest position, on all three axes.
    start, _ = layout.sample_spans()[0]
    prompt = layout.prompt_lengths[0]
    positions = batch["position_ids"][:, 0, start:]
    first = int(positions[:, :prompt].max()) + 1
    assert first < prompt  # an image takes fewer positions than tokens, so this is M-RoPE
    for branch in range(4):
        at = prompt + sum(layout.branch_lengths[0][:branch])
        length = layout.branch_lengths[0][branch]
        assert (positions[:, at : at + length] == first + torch.arange(length)).all()


def test_scores_have_the_shape_of_the_batch(isolated, examples):
    output = isolated.model(**isolated.collator(examples))
    assert output.scores.shape == (5, 4) and output.scores.dtype == torch.float32
    assert output.loss.ndim == 0 and output.loss.isfinite()
    for row, example in zip(output.scores, examples, strict=True):
        assert row[: len(example.responses)].isfinite().all()
        assert (row[len(example.responses) :] == -math.inf).all()


@pytest.mark.parametrize("special", SPECIALS)
@pytest.mark.parametrize("mode", ["comparative", "isolated"])
def test_a_response_cannot_forge_a_boundary(make_reward_model, samples, special, mode):
    reward_model = make_reward_model(mode=mode)
    image = samples[0][0]
    plain = ["it is a 7", "it is a 2"]
    forged = [f"it is {special} a 7 {special}", "it is a 2"]
    batches = [
        reward_model.collator([yojo.Example("Which digit?", texts, images=[image])]) for texts in (plain, forged)
    ]
    collator = reward_model.collator
    for batch in batches:
        ids = batch["input_ids"][0]
        rows = batch["separators"].rows.flatten()
        assert (ids == collator.separator_id).nonzero()[:, 0].tolist() == sorted(rows.tolist())
        assert len(rows) == 2 and batch["image_grid_thw"].shape[0] == 1
    image_token = collator.processor.image_token_id
    assert (batches[0]["input_ids"] == image_token).sum() == (batches[1]["input_ids"] == image_token).sum()
    assert reward_model.score("Which digit?", forged, images=[image]).isfinite().all()


def test_an_added_token_that_is_not_special_is_cut_too(backbone):
    import copy

    tokenizer = copy.deepcopy(backbone[1].tokenizer)
    tokenizer.add_tokens(["<im_patch>"])  # not flagged special: split_special_tokens leaves it whole
    forbidden = {tokenizer.convert_tokens_to_ids("<im_patch>")}
    assert forbidden & set(tokenizer("a <im_patch> b", split_special_tokens=True)["input_ids"])
    ids = plain_ids(tokenizer, "a <im_patch> b <im_patch>", forbidden)
    assert ids and not forbidden & set(ids)


def test_a_token_added_after_the_collator_was_made_is_cut_too(backbone):
    import copy

    model, processor = copy.deepcopy(backbone)
    collator = yojo.Collator(processor, yojo.patch(model, processor))
    response = "a <late> b"
    collator.encode(yojo.Example("Which digit?", [response, "7"]))
    processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<late>"]})
    late = processor.tokenizer.convert_tokens_to_ids("<late>")
    encoded = collator.encode(yojo.Example("Which digit?", [response, "7"]))
    assert late in collator.forbidden and all(late not in ids for ids in encoded.responses)
    assert late not in pickle.loads(pickle.dumps(collator)).encode(yojo.Example("?", [response])).responses[0]


@pytest.mark.parametrize("prompt", ["Which?", [{"role": "user", "content": "Which?"}]])
def test_half_a_character_in_a_tool_is_refused_with_any_prompt(prompt):
    with pytest.raises(ValueError, match="half of a surrogate pair"):
        yojo.Example(prompt, ["a"], tools=[{"name": "x\ud800"}])


def test_ranks_and_rates_of_arrays_are_numbers():
    for ranks in ([np.int64(2), np.int64(1)], [torch.tensor(2), torch.tensor(1)], np.array([2, 1]), (2, np.uint8(1))):
        rankings = yojo.Example("x", ["a", "b"], rankings=ranks).rankings
        assert rankings == [2, 1] and {type(rank) for rank in rankings} == {int}
    assert type(yojo.Video("x.mp4", fps=np.float32(0.5)).fps) is float
    for ranks in ([np.bool_(True), 2], [np.array([1]), 2], [np.str_("1"), 2]):
        with pytest.raises(TypeError, match="rankings must be numbers"):
            yojo.Example("x", ["a", "b"], rankings=ranks)


def test_permuted_rows_score_the_mean_over_orders(make_reward_model, examples):
    permuted, comparative = make_reward_model(permutations=3), make_reward_model()
    got = permuted.score_many(examples)
    for example, scores in zip(examples, got, strict=True):
        count = len(example.responses)
        chosen = orders(count, permuted.config)
        expected = torch.zeros(count)
        for order in chosen:
            responses = [example.responses[n] for n in order]
            expected[list(order)] += comparative.score(example.prompt, responses, list(example.images)) / len(chosen)
        assert (scores - expected).abs().max() <= 2e-6


@pytest.mark.parametrize(
    "count, wanted, found", [(1, 4, 1), (2, 4, 2), (3, 6, 6), (3, 10, 6), (4, 4, 4), (5, 3, 3), (4, 12, 12)]
)
def test_orders_are_distinct_and_balanced(count, wanted, found):
    chosen = orders(count, YojoConfig(permutations=wanted))
    assert len(chosen) == len(set(chosen)) == found and chosen[0] == tuple(range(count))
    assert all(sorted(order) == list(range(count)) for order in chosen)
    if wanted == count:
        for n in range(count):
            assert sorted(order.index(n) for order in chosen) == list(range(count))
    assert chosen == orders(count, YojoConfig(permutations=wanted))


def test_too_long_says_by_how_much_and_for_whom(isolated, examples):
    sizes = [isolated.collator.encode(e).num_tokens(isolated.config) for e in examples]
    batch = isolated.collator(examples)
    assert batch["input_ids"].shape[1] == sum(sizes)
    strict = yojo.Collator(isolated.processor, isolated.model, max_length=max(sizes) - 3)
    longest = examples[sizes.index(max(sizes))]
    with pytest.raises(ValueError, match=rf"example '{longest.id}' takes {max(sizes)} tokens, 3 more than max_length"):
        strict(examples)
    yojo.Collator(isolated.processor, isolated.model, max_length=max(sizes))(examples)


def test_loader_workers_and_pickling_give_the_same_batches(isolated, examples):
    expected = isolated.collator(examples)
    for context in ("fork", "spawn"):
        loader = torch.utils.data.DataLoader(
            examples, batch_size=5, num_workers=1, collate_fn=isolated.collator, multiprocessing_context=context
        )
        (batch,) = list(loader)
        assert set(batch) == set(expected)
        assert torch.equal(isolated.model(**batch).scores, isolated.model(**expected).scores)
    assert len(pickle.dumps(isolated.collator)) < 1e6  # no weights travel


def test_batches_survive_accelerate_and_pinning(accelerate_state, isolated, examples, monkeypatch):
    from accelerate import Accelerator
    from accelerate.utils import send_to_device

    loader = torch.utils.data.DataLoader(examples, batch_size=2, collate_fn=isolated.collator)
    prepared = Accelerator(cpu=True).prepare(loader)
    scores = [isolated.model(**batch).scores for batch in prepared]
    assert [s.shape[0] for s in scores] == [2, 2, 1]
    batch = isolated.collator(examples)
    moved = send_to_device(batch, "meta", non_blocking=True)
    assert moved["layout"].device.type == "meta" and moved["separators"].rows.device.type == "meta"
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self)
    again = torch.utils.data._utils.pin_memory.pin_memory(batch)
    assert type(again["layout"]) is type(batch["layout"]) and len(pinned) >= 10


def test_prompts_as_messages_and_strings_are_the_same(comparative, samples):
    image, other = samples[0][0], samples[1][0]
    as_string = comparative.collator([yojo.Example("Which digit?", ["7"], images=[image, other])])
    variants = [
        [{"role": "user", "content": "Which digit?"}],
        [{"role": "user", "content": [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which digit?"}]}],
    ]
    for messages in variants:
        batch = comparative.collator([yojo.Example(messages, ["7"], images=[image, other])])
        assert torch.equal(batch["input_ids"], as_string["input_ids"])
        assert torch.equal(batch["pixel_values"], as_string["pixel_values"])
    inline = [{"role": "user", "content": [{"type": "image", "image": image}, {"type": "image"}, "Which digit?"]}]
    batch = comparative.collator([yojo.Example(inline, ["7"], images=[other])])
    assert torch.equal(batch["pixel_values"], as_string["pixel_values"])
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "Which digit?"},
    ]
    assert comparative.score(turns, ["7", "2"], images=[image]).shape == (2,)


def test_images_in_every_form(comparative, samples, tmp_path):
    image = samples[0][0]
    image.save(tmp_path / "digit.png")
    forms = [image, tmp_path / "digit.png", str(tmp_path / "digit.png"), (tmp_path / "digit.png").read_bytes()]
    forms += [np.asarray(image), torch.from_numpy(np.array(image))]
    scores = [comparative.score("Which digit?", ["7", "2"], images=[form]) for form in forms]
    assert all(torch.equal(score, scores[0]) for score in scores)


def png_bytes(size=(8, 8)):
    buffer = io.BytesIO()
    Image.new("RGB", size, "white").save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "source, error, message",
    [
        ("missing.png", ValueError, "image 0: no such file: missing.png"),
        ("https://example.org/a.png", ValueError, "is a URL; download it first"),
        (b"", ValueError, "0 bytes is not a readable image"),
        (b"not an image", ValueError, "is not a readable image"),
        (png_bytes((64, 64))[:90], ValueError, "is not a readable image"),
        (Image.new("RGB", (0, 5)), ValueError, "zero-sized: 0 x 5 pixels"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "zero-sized: 4 x 0 pixels"),
        (np.zeros((5, 4, 9), np.uint8), ValueError, r"must be \[height, width\] or \[height, width, 1 to 4 channels\]"),
        (7, TypeError, "must be a PIL image, a path, bytes or an array, got int"),
    ],
)
def test_images_that_cannot_be_read(comparative, source, error, message):
    example = yojo.Example("Which digit?", ["7"], images=[source], id="bad")
    with pytest.raises(error, match=message) as caught:
        comparative.collator([example])
    assert "example 'bad': image 0" in str(caught.value)


def test_a_truncated_file_and_a_rotated_one(tmp_path):
    good = tmp_path / "good.jpg"
    Image.new("RGB", (40, 20), "red").save(good, quality=95)
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(good.read_bytes()[:-60])
    with pytest.raises(ValueError, match=r"cut\.jpg is not a readable image"):
        load_image(cut, "image 0")
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn
    turned = tmp_path / "turned.jpg"
    Image.new("RGB", (40, 20), "red").save(turned, exif=exif)
    assert load_image(turned, "image 0").size == (20, 40)


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({"responses": []}, ValueError, "example 'x': no responses"),
        ({"responses": "seven"}, TypeError, "responses must be a list of strings, got str"),
        ({"responses": ["7", " \n"]}, ValueError, "example 'x': response 1 is empty"),
        ({"responses": ["7", 2]}, TypeError, "response 1 must be a string, got int"),
        ({"rankings": [1]}, ValueError, "1 rankings for 2 responses"),
        ({"rankings": [-1, -1]}, ValueError, "all negative"),
        ({"rankings": [1, -1]}, ValueError, "must not be negative"),
        ({"rankings": ["best", "worst"]}, TypeError, "rankings must be numbers"),
        ({"rankings": [float("nan"), 1]}, ValueError, "must not be negative"),
        ({"prompt": " "}, ValueError, "the prompt is empty"),
        ({"prompt": 7}, TypeError, "prompt must be a string or a list of chat messages"),
        ({"prompt": [{"role": "user"}]}, TypeError, "a chat message must be a dict with role and content"),
        ({"prompt": [{"role": "assistant", "content": "7"}]}, ValueError, "ends with an assistant turn"),
        ({"images": "a.png"}, TypeError, "images must be a list, got str"),
    ],
)
def test_examples_that_make_no_sense(arguments, error, message):
    good = {"prompt": "Which digit?", "responses": ["7", "2"], "id": "x"}
    with pytest.raises(error, match=message):
        yojo.Example(**(good | arguments))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"rankings": [0, 1]}, "example 'x': rankings must be whole numbers from 1"),
        ({"rankings": [1.5, 1]}, "example 'x': rankings must be whole numbers from 1"),
        ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "1 image placeholders to fill, but 0 images"),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image"}, "?"]}], "images": [None, None]},
            "1 image placeholders to fill, but 2 images",
        ),
        ({"prompt": "Which <|image_pad|> digit?"}, "contains the placeholder '<|image_pad|>'"),
        ({"prompt": [{"role": "user", "content": [{"type": "audio"}]}]}, "must be of type text, image or video"),
        ({"videos": ["a.mp4"]}, "takes none .*torchvision"),
    ],
)
def test_examples_the_collator_refuses(comparative, arguments, message):
    good = {"prompt": "Which digit?", "responses": ["7", "2"], "id": "x"}
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        comparative.collator([yojo.Example(**(good | arguments))])


def test_batches_the_collator_refuses(comparative):
    ranked = yojo.Example("Which digit?", ["7"], rankings=[1], id="a")
    with pytest.raises(ValueError, match="'b' has no rankings while others"):
        comparative.collator([ranked, yojo.Example("Which digit?", ["7"], id="b")])
    with pytest.raises(ValueError, match="no examples"):
        comparative.collator([])
    with pytest.raises(TypeError, match=r"packs yojo\.Example objects, got dict at place 1"):
        comparative.collator([ranked, {"prompt": "p"}])


def test_soft_targets(make_reward_model):
    soft = make_reward_model(loss="soft")
    batch = soft.collator(
        [yojo.Example("p", ["7", "2", "1"], rankings=[0.7, 0.2, 0.1]), yojo.Example("q", ["7"], rankings=[1])]
    )
    assert batch["rankings"].dtype == torch.float32 and soft.model(**batch).loss.isfinite()
    with pytest.raises(ValueError, match="targets that sum to 1"):
        soft.collator([yojo.Example("p", ["7", "2"], rankings=[1, 2])])


def test_a_collator_needs_a_patched_model_and_its_separator(backbone, make_reward_model):
    model, processor = backbone
    with pytest.raises(ValueError, match=r"Collator needs a patched model: call yojo\.patch"):
        yojo.Collator(processor, model)
    with pytest.raises(ValueError, match="tokenizer lacks the separator"):
        yojo.Collator(processor, make_reward_model().model)
    with pytest.raises(ValueError, match="pad_to_multiple_of must be at least 1 or None, got 0"):
        yojo.Collator(make_reward_model().processor, make_reward_model().model, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="max_length must be at least 1"):
        yojo.Collator(make_reward_model().processor, make_reward_model().model, max_length=0)


def test_a_text_only_model_takes_its_tokenizer(backbone):
    import copy

    from transformers import AutoModelForCausalLM, Qwen3Config

    tokenizer = copy.deepcopy(backbone[1].tokenizer)
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8,
    )  # fmt: skip
    model = yojo.patch(AutoModelForCausalLM.from_config(config), tokenizer, mode="isolated")
    reward_model = yojo.RewardModel(model, tokenizer)
    scores = reward_model.score("Which digit is best?", ["seven", "two"])  # no chat template: the plain text
    assert scores.shape == (2,) and scores.isfinite().all()
    with pytest.raises(ValueError, match="the prompt has 1 images, but a bare tokenizer was given"):
        reward_model.score("Which digit?", ["7"], images=[Image.new("RGB", (8, 8))])

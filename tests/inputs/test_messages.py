"""Prompts as chat messages: parts in every form, tags and places, videos at rates of their own."""

import base64
import json
import re

import jinja2
import numpy as np
import pytest
import real_processors as real
import torch
from data_cases import write_lines

import yojo
from yojo import data
from yojo.inputs import messages, placeholders
from yojo.inputs.prompts import PromptEncoder
from yojo.inputs.videos import Video

A, B = real.image(24, 24, 1), real.image(40, 18, 3)
TEXT = {"type": "text", "text": "Which?"}
SCHEMA = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]


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
    if "<image>" in set().union(*placeholders.placeholder_tokens(processor).values()):
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
    assert torch.allclose(scores, from_file[0], rtol=0, atol=2e-6) and not torch.allclose(
        scores, from_file[1], atol=1e-3
    )
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


# ---- videos at rates of their own ----


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """16 frames in 4 seconds."""
    return str(real.write_video(tmp_path_factory.mktemp("videos") / "clip.mp4"))


VIDEO_FAMILIES = ("Qwen2-VL", "Qwen2.5-VL", "Qwen3-VL", "Molmo2", "LLaVA-OneVision", "InternVL", "SmolVLM")


@pytest.mark.parametrize("family", VIDEO_FAMILIES)
def test_a_file_is_sampled_at_the_rate_that_is_asked_for(family, clip):
    from yojo.inputs.decoding import sample_file

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

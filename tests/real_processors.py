"""Every family's own processor, built from its classes at tiny sizes, with a tokenizer trained here and a tiny model.

The templates are our own; each behaves as the released one of its family does: where images stand, what stands between
two turns, and what the generation prompt leaves out.
"""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import tiny
import torch
import transformers
from PIL import Image
from real_tokenizers import (
    GEMMA3,
    IDEFICS3,
    LLAVA_ONEVISION,
    MISTRAL3,
    MOLMO2,
    QWEN,
    QWEN3,
    byte_tokenizer,
    chatml,
    marked_tokenizer,
)
from transformers.video_utils import load_video

import yojo

# ---- tokenizers ----


# ---- templates ----


# ---- families ----

CHAT = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHAT_OPTIONS = dict(eos_token="<|im_end|>", pad_token="<|endoftext|>")
MEAN = dict(image_mean=[0.5, 0.4, 0.6], image_std=[0.3, 0.25, 0.2])


def _text(tokenizer, **more):
    size = dict(vocab_size=len(tokenizer) + 8, max_position_embeddings=4096)
    ids = dict(pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id)
    return tiny.TEXT | size | ids | dict(eos_token_id=tokenizer.eos_token_id) | more


def _qwen_vl(name):
    special = (*CHAT, "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = byte_tokenizer(special, **CHAT_OPTIONS)
    ids = dict(zip(("start", "end", "image", "video"), tokenizer.convert_tokens_to_ids(list(special[3:])), strict=True))
    sizes = dict(patch_size=4, merge_size=2, temporal_patch_size=2, **MEAN)
    images = transformers.Qwen2VLImageProcessor(size={"shortest_edge": 64, "longest_edge": 1024}, **sizes)
    videos = "Qwen3VLVideoProcessor" if name == "Qwen3VL" else "Qwen2VLVideoProcessor"
    videos = getattr(transformers, videos)(size={"shortest_edge": 64, "longest_edge": 2048}, **sizes)
    template = chatml(*QWEN, None if name == "Qwen3VL" else "You are a helpful assistant.")
    processor = getattr(transformers, f"{name}Processor")(images, tokenizer, videos, chat_template=template)
    vision = dict(hidden_size=16, intermediate_size=24, depth=2, num_heads=2, patch_size=4)
    sections = (4, 2, 2) if name == "Qwen3VL" else (2, 1, 1)
    rope = dict(rope_type="default", rope_theta=100.0, mrope_section=list(sections))
    text = _text(tokenizer, rope_parameters=rope)
    if name == "Qwen2VL":
        vision = dict(depth=2, embed_dim=16, hidden_size=32, num_heads=2, mlp_ratio=2, patch_size=4)
    elif name == "Qwen2_5_VL":
        vision |= dict(out_hidden_size=32, window_size=16, fullatt_block_indexes=[1], tokens_per_second=4)
    else:
        vision |= dict(out_hidden_size=32, num_position_embeddings=16, deepstack_visual_indexes=[0])
        text["head_dim"] = 16
    config = getattr(transformers, f"{name}Config")(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["image"],
        video_token_id=ids["video"],
        vision_start_token_id=ids["start"],
        vision_end_token_id=ids["end"],
    )
    return config, processor


def _molmo2():
    if not hasattr(transformers, "Molmo2Processor"):
        pytest.skip(f"transformers {transformers.__version__} has no Molmo2")
    marks = ("<im_start>", "<low_res_im_start>", "<im_end>", "<im_patch>", "<frame_start>", "<frame_end>")
    special = (*CHAT, *marks, "<im_col>", "<im_low>", "<|image|>", "<|video|>")
    tokenizer = byte_tokenizer(special, bos_token="<|im_end|>", **CHAT_OPTIONS)
    sizes = dict(size={"height": 16, "width": 16}, patch_size=4, pooling_size=[2, 2], **MEAN)
    images = transformers.Molmo2ImageProcessor(max_crops=2, overlap_margins=[1, 1], **sizes)
    videos = transformers.Molmo2VideoProcessor(num_frames=6, **sizes)
    processor = transformers.Molmo2Processor(images, videos, tokenizer, chat_template=MOLMO2)
    vision = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    text = _text(tokenizer, additional_vocab_size=24, head_dim=8)
    text["vocab_size"] -= 16
    start, low, end, patch, frame_start, frame_end = tokenizer.convert_tokens_to_ids(list(marks))
    config = transformers.Molmo2Config(
        text_config=text,
        vision_config=vision | dict(num_hidden_layers=3, image_size=[16, 16], patch_size=4),
        adapter_config=vision | dict(vision_feature_layer=[2, 0], text_hidden_size=32),
        image_start_token_id=start,
        low_res_image_start_token_id=low,
        image_end_token_id=end,
        image_patch_id=patch,
        frame_start_token_id=frame_start,
        frame_end_token_id=frame_end,
    )
    return config, processor


def _gemma3():
    named = dict(boi_token="<start_of_image>", eoi_token="<end_of_image>", image_token="<image_soft_token>")
    special = ("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>")
    tokenizer = marked_tokenizer(special, named, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    images = transformers.Gemma3ImageProcessor(size={"height": 16, "width": 16}, **MEAN)
    processor = transformers.Gemma3Processor(images, tokenizer, chat_template=GEMMA3, image_seq_length=4)
    config = transformers.Gemma3Config(
        text_config=_text(tokenizer, **tiny.GEMMA3),
        vision_config=tiny._siglip(),
        mm_tokens_per_image=4,
        boi_token_index=tokenizer.boi_token_id,
        eoi_token_index=tokenizer.eoi_token_id,
        image_token_index=tokenizer.image_token_id,
    )
    return config, processor


def _llava_onevision():
    tokenizer = byte_tokenizer((*CHAT, "<image>", "<video>"), **CHAT_OPTIONS)
    grid = [[8, 8], [8, 16], [16, 8], [16, 16]]
    size = dict(size={"height": 8, "width": 8}, **MEAN)
    processor = transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(image_grid_pinpoints=grid, **size),
        tokenizer,
        transformers.LlavaOnevisionVideoProcessor(**size),
        num_image_tokens=4,
        vision_feature_select_strategy="full",
        chat_template=LLAVA_ONEVISION,
    )
    image, video = tokenizer.convert_tokens_to_ids(["<image>", "<video>"])
    config = transformers.LlavaOnevisionConfig(
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config=tiny._siglip() | dict(image_size=8),
        image_token_index=image,
        video_token_index=video,
        image_grid_pinpoints=grid,
    )
    return config, processor


def _internvl():
    named = dict(start_image_token="<img>", end_image_token="</img>", context_image_token="<IMG_CONTEXT>")
    tokenizer = byte_tokenizer(CHAT, named | dict(video_token="<video>"), **CHAT_OPTIONS)
    size = dict(size={"height": 16, "width": 16}, **MEAN)
    processor = transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(crop_to_patches=True, max_patches=4, **size),
        tokenizer,
        transformers.InternVLVideoProcessor(**size),
        image_seq_length=4,
        chat_template=chatml("<IMG_CONTEXT>\n", "<video>\n"),
    )
    config = transformers.InternVLConfig(
        text_config=_text(tokenizer, model_type="qwen2"),
        vision_config=tiny._vision("internvl_vision", image_size=[16, 16], patch_size=[4, 4]),
        image_token_id=tokenizer.context_image_token_id,
        image_seq_length=4,
    )
    return config, processor


def _idefics3(name="Idefics3"):
    named = dict(
        fake_image_token="<fake_token_around_image>",
        image_token="<image>",
        end_of_utterance_token="<end_of_utterance>",
        global_image_token="<global-img>",
    )
    grid = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    special = ("<|im_start|>", "<|im_end|>", "<end_of_utterance>", *grid, "<video>")
    tokenizer = byte_tokenizer(
        special, named, bos_token="<|im_start|>", eos_token="<end_of_utterance>", pad_token="<|im_end|>"
    )
    size = dict(max_image_size={"longest_edge": 16}, **MEAN)
    images = getattr(transformers, f"{name}ImageProcessor")(size={"longest_edge": 32}, **size)
    options = dict(image_seq_len=4, chat_template=IDEFICS3)
    if name == "SmolVLM":
        videos = transformers.SmolVLMVideoProcessor(size={"longest_edge": 16}, num_frames=6, fps=1, **size)
        processor = transformers.SmolVLMProcessor(images, tokenizer, videos, **options)
    else:
        processor = transformers.Idefics3Processor(images, tokenizer, **options)
    vision = {k: v for k, v in tiny._vision("", image_size=16, patch_size=4).items() if k != "model_type"}
    config = getattr(transformers, f"{name}Config")(
        text_config=_text(tokenizer, model_type="llama", head_dim=8),
        vision_config=vision,
        image_token_id=processor.image_token_id,
        scale_factor=2,
        pad_token_id=tokenizer.pad_token_id,
    )
    return config, processor


def _mistral3():
    special = ("<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
    special += ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = marked_tokenizer(special, bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    images = transformers.PixtralImageProcessor(size={"longest_edge": 32}, patch_size={"height": 4, "width": 4}, **MEAN)
    processor = transformers.PixtralProcessor(
        images, tokenizer, patch_size=4, spatial_merge_size=2, chat_template=MISTRAL3
    )
    config = transformers.Mistral3Config(
        text_config=_text(tokenizer, model_type="mistral", head_dim=8, sliding_window=None),
        vision_config=tiny._vision("pixtral", image_size=32, patch_size=4, head_dim=8),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
    )
    return config, processor


def _paligemma():
    tokenizer = marked_tokenizer(
        ("<bos>", "<eos>", "<pad>"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", prepend="first"
    )
    images = transformers.SiglipImageProcessor(size={"height": 8, "width": 8}, **MEAN)
    images.image_seq_length = 4
    processor = transformers.PaliGemmaProcessor(images, tokenizer)
    config = transformers.PaliGemmaConfig(
        text_config=_text(tokenizer, model_type="gemma", head_dim=8),
        vision_config=tiny._siglip() | dict(image_size=8),
        image_token_index=processor.image_token_id,
        projection_dim=32,
        hidden_size=32,
    )
    return config, processor


def _qwen3_text():
    tokenizer = byte_tokenizer(CHAT, **CHAT_OPTIONS)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = QWEN3
    return transformers.Qwen3Config(**_text(tokenizer, head_dim=8)), tokenizer


FAMILIES = {
    "Qwen2-VL": functools.partial(_qwen_vl, "Qwen2VL"),
    "Qwen2.5-VL": functools.partial(_qwen_vl, "Qwen2_5_VL"),
    "Qwen3-VL": functools.partial(_qwen_vl, "Qwen3VL"),
    "Molmo2": _molmo2,
    "Gemma 3": _gemma3,
    "LLaVA-OneVision": _llava_onevision,
    "InternVL": _internvl,
    "SmolVLM": functools.partial(_idefics3, "SmolVLM"),
    "Idefics 3": _idefics3,
    "Mistral 3": _mistral3,
    "PaliGemma": _paligemma,
    "Qwen3 (text)": _qwen3_text,
}


@functools.cache
def _built(family):
    config, processor = FAMILIES[family]()
    auto = transformers.AutoModelForCausalLM if family.endswith("(text)") else transformers.AutoModelForImageTextToText
    with torch.random.fork_rng():
        torch.manual_seed(0)  # single rows keep some of what they begin with
        model = auto.from_config(config, attn_implementation="sdpa")
    return tiny.finished(model, seed=3), processor


def build(family):
    """(stock model in eval mode, processor): fresh copies, the same at every call."""
    return copy.deepcopy(_built(family))


def processor_of(family):
    """A fresh copy of the family's processor alone."""
    return copy.deepcopy(_built(family)[1])


def stock_processor(family):
    """Likewise; its files are decoded by transformers' own reader for PyAV, which it has to be told to take."""
    processor = processor_of(family)
    if hasattr(processor, "video_processor"):

        def fetch_videos(videos, sample_indices_fn=None):
            read = [load_video(video, backend="pyav", sample_indices_fn=sample_indices_fn) for video in videos]
            return list(zip(*read, strict=True))

        processor.video_processor.fetch_videos = fetch_videos
    return processor


# ---- media ----


def image(width, height, seed):
    """An RGB image of low frequencies and noise, so that resizing leaves something of it."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    pixels[: height // 2] //= 3
    return Image.fromarray(pixels)


def frames(count, size=(20, 16), seed=0):
    """A list of frames that change from one to the next."""
    return [image(*size, seed=100 * seed + i) for i in range(count)]


def write_video(path, count=16, size=(32, 24), rate=4):
    """Write a video file of `count` frames, `rate` in a second."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height = size
        for i in range(count):
            pixels = np.full((size[1], size[0], 3), 12 * i, np.uint8)
            pixels[:, : 2 * i, 0] = 255 - 10 * i
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


# ---- the stock model's own passes ----


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt in two forms: as YOJO takes it, and as the family's processor does.

    Attributes:
        prompt: string or messages, for `yojo.Example`.
        images, videos: likewise.
        messages: the same for the processor, media in its places.
        options: what the processor is told of the videos.
    """

    prompt: object
    messages: list
    images: tuple = ()
    videos: tuple = ()
    options: dict = dataclasses.field(default_factory=dict)


def rendered_inputs(processor, prompt, response, family):
    """The processor's own outputs for the conversation with its answer, up to the answer's end."""
    if family == "PaliGemma":
        return _with_suffix(processor, prompt, response)
    messages = prompt.messages
    if family.endswith("(text)"):
        messages = [{**turn, "content": "".join(part["text"] for part in turn["content"])} for turn in messages]
        messages.append({"role": "assistant", "content": response})
    else:
        messages = [{**turn, "content": list(turn["content"])} for turn in messages]
        messages.append({"role": "assistant", "content": [{"type": "text", "text": response}]})
    options = {"processor_kwargs": dict(prompt.options)} if prompt.options else {}
    if family == "Molmo2" and "fps" in prompt.options:  # its own number of frames would stand beside the rate
        processor = copy.copy(processor)
        processor.video_processor = copy.copy(processor.video_processor)
        processor.video_processor.num_frames = None
    made = processor.apply_chat_template(
        messages, tokenize=True, continue_final_message=True, return_dict=True, return_tensors="pt", **options
    )
    return dict(made)


def _with_suffix(processor, prompt, response):
    parts = prompt.messages[0]["content"]
    text = "".join("<image>" if part["type"] == "image" else part["text"] for part in parts)
    images = [part["image"] for part in parts if part["type"] == "image"]
    made = dict(processor(text=[text], images=[images] if images else None, suffix=[response], return_tensors="pt"))
    made.pop("labels")
    return {name: value if name == "pixel_values" else value[:, :-1] for name, value in made.items()}  # without the end


def continued(inputs, ids):
    """The same with ids behind it: text, or of the kind of the last token (PaliGemma's answer)."""
    tail = torch.tensor([ids], dtype=torch.int64)
    made = dict(inputs)
    made["input_ids"] = torch.cat([inputs["input_ids"], tail], dim=1)
    made["attention_mask"] = torch.ones_like(made["input_ids"])
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in made:
            made[name] = torch.cat([inputs[name], inputs[name][:, -1:].expand(1, len(ids))], dim=1)
    return made


def hidden_states(stock, inputs):
    """[L, H]: the stock backbone's own pass."""
    inputs = {name: value for name, value in inputs.items() if name != "video_metadata"}
    return stock.base_model(**inputs, use_cache=False)[0][0]


RESPONSES = ("It is a seven.", "two", "A cat sits; a dog runs to the left.")
QUESTION = "What is shown in the picture?"


def cases(folder):
    """name -> `Prompt`; a video file is written into the folder."""
    file = str(write_video(folder / "clip.mp4"))
    taken = frames(4)

    def user(text, images=(), videos=()):
        parts = [{"type": "image", "image": picture} for picture in images]
        parts += [{"type": "video", "video": video} for video in videos]
        return {"role": "user", "content": [*parts, {"type": "text", "text": text}]}

    def one(text, images=(), videos=(), options=None, given=None):
        given = videos if given is None else given
        return Prompt(text, [user(text, images, videos)], tuple(images), tuple(given), options or {})

    def turns(*messages, images=(), given=None):
        return Prompt(given or list(messages), list(messages), tuple(images))

    def answer(text):
        return {"role": "assistant", "content": [{"type": "text", "text": text}]}

    two = [image(24, 24, 2), image(40, 18, 3)]
    array = np.stack([np.asarray(frame) for frame in taken])
    metadata = dict(total_num_frames=4, fps=0.5, frames_indices=[0, 1, 2, 3], duration=8.0, width=20, height=16)
    shown = {"video_metadata": [metadata], "do_sample_frames": False}
    larger = frames(4, size=(28, 22), seed=1)
    faster = metadata | dict(fps=2.0, duration=2.0, width=28, height=22)
    both = [array, np.stack([np.asarray(frame) for frame in larger])]
    made = {
        "image": one(QUESTION, [image(24, 24, 1)]),
        "two images": one(QUESTION, two),
        "wide image": one(QUESTION, [image(61, 13, 4)]),
        "tall image": one(QUESTION, [image(9, 33, 5)]),
        "small image": one(QUESTION, [image(3, 5, 6)]),
        "text": one(QUESTION),
        "several turns": turns(user(QUESTION), answer("A dog."), user("Which dog?")),
        "images in turns": turns(user(QUESTION, two[:1]), answer("A dog."), user("And here?", two[1:])),
        "system turn": turns({"role": "system", "content": [{"type": "text", "text": "Be brief."}]}, user(QUESTION)),
        "video file": one(QUESTION, videos=[file]),
        "video file, 2 fps": one(
            QUESTION, videos=[file], options={"fps": 2, "do_sample_frames": True}, given=[yojo.Video(file, fps=2)]
        ),
        "frames": one(QUESTION, videos=[array], options=shown, given=[yojo.Video(taken, fps=0.5)]),
        "video + image": one(QUESTION, [image(24, 24, 7)], [file]),
        "frames + image": one(QUESTION, [image(24, 24, 7)], [array], options=shown, given=[yojo.Video(taken, fps=0.5)]),
        "two videos": one(
            QUESTION,
            videos=both,
            options=shown | {"video_metadata": [metadata, faster]},
            given=[yojo.Video(taken, fps=0.5), yojo.Video(larger, fps=2)],
        ),
    }
    return made


@functools.cache
def reward_model(family, mode):
    """(RewardModel, stock model, processor of its own): the stock model has the separator's row, nothing else is new."""
    model, processor = build(family)
    own = stock_processor(family)
    yojo.patch(model, processor, mode=mode, head_dim=16)
    generator = torch.Generator().manual_seed(7)
    head = model.score
    with torch.no_grad():  # scores of order 1
        for weight, gain in ((head.weight1, 1.0), (head.weight2, head.scale)):
            weight.copy_(torch.randn(weight.shape, generator=generator) * gain / weight.shape[1] ** 0.5)
    stock = build(family)[0]
    stock.get_input_embeddings().weight = torch.nn.Parameter(model.get_input_embeddings().weight.detach().clone())
    return yojo.RewardModel(model, processor), stock, own


def expected_scores(family, mode, prompt, responses=RESPONSES):
    """What the stock model's own passes give: one for each response, or one over all of them."""
    made, stock, own = reward_model(family, mode)
    head, separator = made.model.score, made.collator.separator_id
    whole = [rendered_inputs(own, prompt, response, family) for response in responses]
    with torch.no_grad():
        if mode == "isolated":
            states = [hidden_states(stock, continued(inputs, [separator]))[-1:] for inputs in whole]
            return torch.cat([head(state, torch.tensor([0])) for state in states]), whole
        # The answers behind the first one: what is behind the prompt they have in common with it.
        start = made.collator.encode(example(prompt, responses)).prompt_ids.shape[0]
        rest = [ids for inputs in whole[1:] for ids in (*inputs["input_ids"][0, start:].tolist(), separator)]
        ends = np.cumsum([inputs["input_ids"].shape[1] - start + 1 for inputs in whole]) + start - 1
        states = hidden_states(stock, continued(whole[0], [separator, *rest]))
        return head(states, torch.tensor(ends)), whole


def example(prompt, responses=RESPONSES, **options):
    """The `yojo.Example` of a `Prompt`."""
    return yojo.Example(prompt.prompt, list(responses), images=prompt.images, videos=prompt.videos, **options)


def differences(family, mode, prompt):
    """How far YOJO is from the stock model's own passes.

    Returns:
        (ids, score): how many responses' ids are not those of the rendered conversation; and the largest difference of
        a score, relative to the largest score or 1.

    Raises:
        ValueError: what YOJO refuses.
    """
    made = reward_model(family, mode)[0]
    scores = made.score(prompt.prompt, list(RESPONSES), images=list(prompt.images), videos=list(prompt.videos))
    encoded = made.collator.encode(example(prompt))
    expected, whole = expected_scores(family, mode, prompt)
    wrong = sum(
        [*encoded.prompt_ids.tolist(), *response] != [*inputs["input_ids"][0].tolist(), made.collator.separator_id]
        for response, inputs in zip(encoded.responses, whole, strict=True)
    )
    return wrong, float((scores - expected).abs().max() / expected.abs().max().clamp(min=1.0))


def config_of(family):
    """The config of the family's tiny model."""
    return _built(family)[0].config

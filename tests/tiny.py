"""Tiny random models of every supported family, and prompts as each family's processor would make them."""

import copy
import functools

import pytest
import torch
import transformers

PAD, BOS, EOS, UNK, IMAGE, VIDEO, START, END, BREAK, FRAME_START, FRAME_END, LOW_START = range(12)
SPECIAL = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>", "<video>", "<start>", "<end>", "<break>", "<frame>")
SPECIAL += ("</frame>", "<low>")
WORDS = 100
VOCABULARY = len(SPECIAL) + WORDS
SEPARATOR = "<|resp_sep|>"

HIDDEN = 32
# Attention dropout is 0 in all of them: the packed attention refuses any other.
TEXT = dict(
    vocab_size=VOCABULARY,
    hidden_size=HIDDEN,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    pad_token_id=PAD,
    bos_token_id=BOS,
    eos_token_id=EOS,
)
WINDOW = 6
ALTERNATING = ["sliding_attention", "full_attention", "sliding_attention"]

# Families that the installed transformers does not have, and why their tests are skipped.
LACKING = {}
if not hasattr(transformers, "Molmo2Config"):
    LACKING["molmo2"] = f"transformers {transformers.__version__} has no Molmo2"


def tokenizer(with_separator=False):
    """A word-level tokenizer over w0 ... w99; the separator, when it has it already, takes the id after the words."""
    import tokenizers

    names = [*SPECIAL, *(f"w{i}" for i in range(WORDS))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    made = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<unk>"
    )
    made.add_special_tokens({"additional_special_tokens": [*SPECIAL[4:], *([SEPARATOR] if with_separator else [])]})
    return made


def words(count, seed):
    """`count` ids of ordinary words."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(len(SPECIAL), VOCABULARY, (count,), generator=generator).tolist()


def responses(seed=0, lengths=(3, 5, 2)):
    """Responses as lists of ids, without the separator."""
    return [words(length, 1000 + 10 * seed + i) for i, length in enumerate(lengths)]


def randomise(model, seed):
    """Weights large enough that attention, images and positions all matter; every one of them, norms and biases too.

    The default initialisation (std 0.02) leaves a tiny model close to a bag of words, and zero biases or norm weights
    of one would hide a mistake in what they multiply.
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator)
            if "embed_tokens" in name:
                parameter.copy_(noise)
            elif parameter.ndim >= 2:
                parameter.copy_(noise * (1.5 / parameter[0].numel() ** 0.5))
            else:
                parameter.add_(noise * 0.1)
    return model.eval()


def finished(model, seed=0):
    model = randomise(model.float(), seed)
    model.generation_config.eos_token_id = None  # so that generate() always makes as many tokens as asked for
    return model


# ---- models ----


def _vision(model_type, **kwargs):
    base = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, hidden_act="gelu")
    return dict(model_type=model_type, **(base | kwargs))


def _siglip(**kwargs):
    return _vision("siglip_vision_model", image_size=16, patch_size=4, vision_use_head=False, **kwargs)


def _rope(*sections):
    return dict(rope_type="default", rope_theta=100.0, mrope_section=list(sections))


def _qwen2_vl(attention):
    config = transformers.Qwen2VLConfig(
        text_config=TEXT | dict(rope_parameters=_rope(2, 1, 1)),
        vision_config=dict(depth=2, embed_dim=16, hidden_size=HIDDEN, num_heads=2, mlp_ratio=2, patch_size=4),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return transformers.Qwen2VLForConditionalGeneration._from_config(config, attn_implementation=attention)


def _qwen2_5_vl(attention):
    config = transformers.Qwen2_5_VLConfig(
        text_config=TEXT | dict(rope_parameters=_rope(2, 1, 1)),
        vision_config=dict(
            depth=2,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            patch_size=4,
            out_hidden_size=HIDDEN,
            window_size=16,
            fullatt_block_indexes=[1],
            tokens_per_second=4,
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration._from_config(config, attn_implementation=attention)


def _qwen3_vl(attention):
    config = transformers.Qwen3VLConfig(
        text_config=TEXT | dict(head_dim=16, rope_parameters=_rope(4, 2, 2)),
        vision_config=dict(
            depth=2,
            hidden_size=16,
            intermediate_size=24,
            num_heads=2,
            patch_size=4,
            out_hidden_size=HIDDEN,
            num_position_embeddings=16,
            deepstack_visual_indexes=[0],
        ),
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return transformers.Qwen3VLForConditionalGeneration._from_config(config, attn_implementation=attention)


def _molmo2(attention):
    if "molmo2" in LACKING:
        pytest.skip(LACKING["molmo2"])
    vision = dict(hidden_size=16, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
    text = TEXT | dict(vocab_size=VOCABULARY - 8, additional_vocab_size=16, head_dim=8)
    config = transformers.Molmo2Config(
        text_config=text,
        vision_config=vision | dict(num_hidden_layers=3, image_size=[16, 16], patch_size=4),
        adapter_config=vision | dict(vision_feature_layer=[2, 0], text_hidden_size=HIDDEN),
        image_start_token_id=START,
        low_res_image_start_token_id=LOW_START,
        image_end_token_id=END,
        image_patch_id=IMAGE,
        frame_start_token_id=FRAME_START,
        frame_end_token_id=FRAME_END,
    )
    return transformers.Molmo2ForConditionalGeneration._from_config(config, attn_implementation=attention)


GEMMA3 = dict(num_hidden_layers=3, head_dim=8, sliding_window=WINDOW, layer_types=ALTERNATING, query_pre_attn_scalar=8)


def _gemma3(attention):
    config = transformers.Gemma3Config(
        text_config=TEXT | GEMMA3,
        vision_config=_siglip(),
        mm_tokens_per_image=4,
        boi_token_index=START,
        eoi_token_index=END,
        image_token_index=IMAGE,
    )
    return transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation=attention)


def _llava_onevision(attention):
    config = transformers.LlavaOnevisionConfig(
        text_config=TEXT | dict(model_type="qwen2"),
        vision_config=_siglip() | dict(image_size=8),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[8, 8], [8, 16], [16, 8], [16, 16]],
    )
    return transformers.LlavaOnevisionForConditionalGeneration._from_config(config, attn_implementation=attention)


def _internvl(attention):
    config = transformers.InternVLConfig(
        text_config=TEXT | dict(model_type="qwen2"),
        vision_config=_vision("internvl_vision", image_size=[16, 16], patch_size=[4, 4]),
        image_token_id=IMAGE,
        image_seq_length=4,
    )
    return transformers.InternVLForConditionalGeneration._from_config(config, attn_implementation=attention)


def _idefics3(attention, name="Idefics3"):
    config = getattr(transformers, f"{name}Config")(
        text_config=TEXT | dict(model_type="llama", head_dim=8),
        vision_config={k: v for k, v in _vision("", image_size=16, patch_size=4).items() if k != "model_type"},
        image_token_id=IMAGE,
        scale_factor=2,
        pad_token_id=PAD,
    )
    cls = getattr(transformers, f"{name}ForConditionalGeneration")
    return cls._from_config(config, attn_implementation=attention)


def _mistral3(attention):
    config = transformers.Mistral3Config(
        text_config=TEXT | dict(model_type="mistral", head_dim=8, sliding_window=None),
        vision_config=_vision("pixtral", image_size=16, patch_size=4, head_dim=8),
        image_token_index=IMAGE,
        spatial_merge_size=2,
    )
    return transformers.Mistral3ForConditionalGeneration._from_config(config, attn_implementation=attention)


def _paligemma(attention, **text):
    config = transformers.PaliGemmaConfig(
        text_config=TEXT | dict(model_type="gemma", head_dim=8) | text,
        vision_config=_siglip() | dict(image_size=8),
        image_token_index=IMAGE,
        projection_dim=HIDDEN,
        hidden_size=HIDDEN,
    )
    return transformers.PaliGemmaForConditionalGeneration._from_config(config, attn_implementation=attention)


GEMMA2 = dict(
    num_hidden_layers=3,
    head_dim=8,
    layer_types=ALTERNATING,
    query_pre_attn_scalar=8,
    attn_logit_softcapping=2.0,
    final_logit_softcapping=5.0,
)


def _paligemma2(attention):
    # A prompt longer than the window is refused, so the window is wider here: responses still run out of it.
    return _paligemma(attention, model_type="gemma2", sliding_window=16, **GEMMA2)


def _text(config_class, **kwargs):
    def build(attention):
        config = config_class(**(TEXT | kwargs))
        return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=attention)

    return build


# ---- prompts ----


def _pixels(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _prompt(ids, types=None, types_name="mm_token_type_ids", **tensors):
    input_ids = torch.tensor([ids])
    prompt = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
    if types is not None:
        prompt[types_name] = torch.tensor([[types.get(token, 0) for token in ids]])
    return prompt | tensors


def _qwen_prompts(model):
    split_frames = model.config.model_type == "qwen3_vl"

    def make(seed, images=(), video=None, **extra):
        ids = [BOS, *words(3, seed)]
        for _, height, width in images:
            ids += [START, *[IMAGE] * (height * width // 4), END, *words(1, seed + 1)]
        if images:
            patches = sum(t * h * w for t, h, w in images)
            extra["pixel_values"] = _pixels(patches, 3 * 2 * 4 * 4, seed=seed)
            extra["image_grid_thw"] = torch.tensor(images)
        if video is not None:
            frames, height, width = video
            size = height * width // 4
            if split_frames:  # one run of tokens per frame, behind its timestamp
                for frame in range(frames):
                    ids += [*words(2, seed + 10 + frame), START, *[VIDEO] * size, END]
            else:
                ids += [START, *[VIDEO] * (frames * size), END]
            extra["pixel_values_videos"] = _pixels(frames * height * width, 3 * 2 * 4 * 4, seed=seed + 5)
            extra["video_grid_thw"] = torch.tensor([video])
        ids += words(4, seed + 2)
        return _prompt(ids, {IMAGE: 1, VIDEO: 2}, **extra)

    prompts = {
        "image": make(1, [(1, 4, 4)]),
        "two images": make(2, [(1, 4, 6), (1, 8, 4)]),
        "text": make(3),
        "video": make(4, video=(2, 4, 4)),
        "image and video": make(5, [(1, 4, 4)], video=(3, 4, 4)),
    }
    if model.config.model_type == "qwen2_5_vl":
        # Seconds per grid stretch the video's temporal positions far beyond those of the text behind it.
        prompts["slow video"] = make(6, video=(3, 4, 4), second_per_grid_ts=torch.tensor([2.0]))
    elif model.config.model_type == "qwen2_vl":
        prompts["long video"] = make(6, video=(9, 4, 4))  # more frames than the text behind it has tokens
    return prompts


def _molmo2_prompts(model):
    marked = dict.fromkeys((IMAGE, BREAK, START, LOW_START, FRAME_START, END, FRAME_END), 1)

    def image(crops, offset):
        """Ids and pooling of one image: one crop of low resolution, `crops` in a row of high resolution."""
        ids = [LOW_START, *[IMAGE, IMAGE, BREAK] * 2, END, START, *[*[IMAGE] * 2 * crops, BREAK] * 2, END]
        patches = torch.arange(16 * (1 + crops)).view(1 + crops, 4, 4)
        pooled = [patches[:1].transpose(0, 1).reshape(4, 4), patches[1:].transpose(0, 1).reshape(4, 4 * crops)]
        pooling = [grid.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4) for grid in pooled]
        pooling = torch.cat(pooling)
        pooling[0, 3] = -1  # an edge that the image does not fill
        return ids, torch.where(pooling >= 0, pooling + offset, -1), [2, 2, 2, 2 * crops]

    def make(seed, images=(), frames=0):
        ids, tensors = [BOS, *words(3, seed)], {}
        if images:
            pooling, grids, offset = [], [], 0
            for crops in images:
                image_ids, image_pooling, grid = image(crops, offset)
                ids += [*image_ids, *words(1, seed + 1)]
                pooling.append(image_pooling)
                grids.append(grid)
                offset += 16 * (1 + crops)
            tensors = {
                "pixel_values": _pixels(offset // 16, 16, 48, seed=seed),
                "image_token_pooling": torch.cat(pooling),
                "image_grids": torch.tensor(grids),
                "image_num_crops": torch.tensor([1 + crops for crops in images]),
            }
        if frames:
            for frame in range(frames):
                ids += [*words(1, seed + 10 + frame), FRAME_START, *[IMAGE] * 4, FRAME_END]
            patches = torch.arange(16 * frames).view(frames * 4, 4)
            tensors = {
                "pixel_values_videos": _pixels(frames, 16, 48, seed=seed + 5),
                "video_token_pooling": patches.unfold(0, 2, 2).unfold(1, 2, 2).reshape(-1, 4),
                "video_grids": torch.tensor([[frames, 2, 2]]),
            }
        return _prompt([*ids, *words(4, seed + 2)], marked, **tensors)

    return {
        "image": make(1, [1]),
        "two images": make(2, [2, 1]),
        "text": make(3),
        "video": make(4, frames=2),
        "longer video": make(5, frames=3),
    }


def _gemma3_prompts(model):
    def make(seed, images):
        ids = [BOS, *words(2, seed)]
        for i in range(images):
            ids += [*words(1, seed + 10 + i), START, *[IMAGE] * 4, END, *words(1, seed + 20 + i)]
        tensors = {"pixel_values": _pixels(images, 3, 16, 16, seed=seed)} if images else {}
        return _prompt([*ids, *words(3, seed + 2)], {IMAGE: 1}, "token_type_ids", **tensors)

    return {"image": make(1, 1), "two images": make(2, 2), "text": make(3, 0)}


def _llava_onevision_prompts(model):
    def make(seed, sizes=(), frames=0):
        ids, tensors = [BOS, *words(3, seed)], {}
        if sizes:
            tiles = [1 if len(sizes) > 1 else 1 + (h // 8) * (w // 8) for h, w in sizes]
            tensors = {
                "pixel_values": _pixels(len(sizes), max(tiles), 3, 8, 8, seed=seed),
                "image_sizes": torch.tensor(sizes),
                "batch_num_images": torch.tensor([len(sizes)]),
            }
            with torch.no_grad():
                features = model.model.get_image_features(**tensors).pooler_output
            for feature in features:
                ids += [*[IMAGE] * len(feature), *words(1, seed + 1)]
        if frames:
            tensors = {"pixel_values_videos": _pixels(1, frames, 3, 8, 8, seed=seed)}
            ids += [VIDEO] * (frames + 1)
        return _prompt([*ids, *words(3, seed + 2)], **tensors)

    return {
        "image": make(1, [(16, 8)]),
        "larger image": make(4, [(16, 16)]),
        "two images": make(2, [(16, 8), (8, 8)]),
        "text": make(3),
        "video": make(5, frames=3),
    }


def _internvl_prompts(model):
    def make(seed, tiles):
        ids = [BOS, *words(3, seed)]
        for count in tiles:
            ids += [START, *[IMAGE] * (4 * count), END, *words(1, seed + 1)]
        tensors = {"pixel_values": _pixels(sum(tiles), 3, 16, 16, seed=seed)} if tiles else {}
        return _prompt([*ids, *words(3, seed + 2)], **tensors)

    return {"image": make(1, [1]), "two images": make(2, [3, 1]), "text": make(3, [])}


def _idefics3_prompts(model):
    def make(seed, tiles):
        ids, tensors = [BOS, *words(3, seed)], {}
        for _ in range(tiles):
            ids += [START, *[IMAGE] * 4, *words(1, seed + 1)]
        if tiles:
            mask = torch.ones(1, tiles, 16, 16, dtype=torch.int64)
            mask[0, -1, :, 12:] = 0  # the last tile is not filled
            tensors = {"pixel_values": _pixels(1, tiles, 3, 16, 16, seed=seed), "pixel_attention_mask": mask}
            tensors["pixel_values"] = tensors["pixel_values"] * mask[:, :, None]
        return _prompt([*ids, *words(3, seed + 2)], **tensors)

    return {"image": make(1, 1), "two images": make(2, 3), "text": make(3, 0)}


def _mistral3_prompts(model):
    def make(seed, sizes):
        ids, tensors = [BOS, *words(3, seed)], {}
        for height, width in sizes:
            rows = [[*[IMAGE] * (width // 8), BREAK] for _ in range(height // 8)]
            ids += [*sum(rows, [])[:-1], END, *words(1, seed + 1)]
        if sizes:
            shape = (max(h for h, _ in sizes), max(w for _, w in sizes))
            pixels = _pixels(len(sizes), 3, *shape, seed=seed)
            for i, (height, width) in enumerate(sizes):
                pixels[i, :, height:] = pixels[i, :, :, width:] = 0
            tensors = {"pixel_values": pixels, "image_sizes": torch.tensor(sizes)}
        return _prompt([*ids, *words(3, seed + 2)], **tensors)

    return {
        "image": make(1, [(16, 8)]),
        "larger image": make(4, [(16, 16)]),
        "two images": make(2, [(8, 16), (16, 8)]),
        "text": make(3, []),
    }


def _paligemma_prompts(model):
    def make(seed, images, length):
        ids = [*[IMAGE] * (4 * images), BOS, *words(length, seed)]
        return _prompt(ids, {}, "token_type_ids", pixel_values=_pixels(images, 3, 8, 8, seed=seed))

    # The processor refuses a prompt without an image.
    return {"image": make(1, 1, 6), "two images": make(2, 2, 5), "longer image": make(3, 1, 9)}


def _text_prompts(model):
    return {"text": _prompt([BOS, *words(8, 1)]), "short": _prompt([BOS, *words(1, 2)]), "long": _prompt(words(14, 3))}


# ---- the families ----

FAMILIES = {
    "qwen2_vl": (_qwen2_vl, _qwen_prompts),
    "qwen2_5_vl": (_qwen2_5_vl, _qwen_prompts),
    "qwen3_vl": (_qwen3_vl, _qwen_prompts),
    "molmo2": (_molmo2, _molmo2_prompts),
    "gemma3": (_gemma3, _gemma3_prompts),
    "llava_onevision": (_llava_onevision, _llava_onevision_prompts),
    "internvl": (_internvl, _internvl_prompts),
    "smolvlm": (functools.partial(_idefics3, name="SmolVLM"), _idefics3_prompts),
    "idefics3": (_idefics3, _idefics3_prompts),
    "mistral3": (_mistral3, _mistral3_prompts),
    "paligemma": (_paligemma, _paligemma_prompts),
    "paligemma2": (_paligemma2, _paligemma_prompts),
    "llama": (_text(transformers.LlamaConfig, head_dim=8), _text_prompts),
    "qwen3": (_text(transformers.Qwen3Config, head_dim=8), _text_prompts),
    "gemma2": (_text(transformers.Gemma2Config, sliding_window=WINDOW, **GEMMA2), _text_prompts),
    "gemma3_text": (_text(transformers.Gemma3TextConfig, **GEMMA3), _text_prompts),
    "mistral": (_text(transformers.MistralConfig, head_dim=8, sliding_window=WINDOW), _text_prompts),
}

# transformers' SDPA leaves the soft cap of Gemma 2's scores out; its eager attention is the true one.
EAGER = ("gemma2", "paligemma2")


def attention_of(family):
    """The attention implementation that computes what the family means."""
    return "eager" if family in EAGER else "sdpa"


@functools.cache
def _stock(family, attention):
    with torch.random.fork_rng(devices=[]):  # SigLIP draws biases, to which `randomise` adds
        torch.manual_seed(0)
        return finished(FAMILIES[family][0](attention))


def build(family, attention=None):
    """A fresh stock model of the family in eval mode, the same at every call."""
    return copy.deepcopy(_stock(family, attention or attention_of(family)))


@functools.cache
def _prompts(family):
    return FAMILIES[family][1](_stock(family, attention_of(family)))


def prompts(family):
    """dict: name -> processed prompt, as the family's processor returns it for one prompt."""
    return {name: dict(prompt) for name, prompt in _prompts(family).items()}

"""Backbones of real shapes with random weights, and prompts of a given number of tokens for them.

Random weights are right for speed: a matrix product takes as long whatever its numbers mean. The shapes are those of the
published checkpoints; the small ones keep their proportions and run on a CPU.
"""

import dataclasses
import math

import torch

KINDS = ("text", "image", "video")


@dataclasses.dataclass(frozen=True)
class Shape:
    """A backbone's sizes, as its family's configuration takes them.

    Attributes:
        family: "Qwen3VL", "Qwen2_5_VL" or "Molmo2": the beginning of transformers' class names.
        config: keywords of the configuration.
        frame: merged (pooled) tokens along a side of a video's frame.
    """

    family: str
    config: dict
    frame: int


def _mrope(theta, *sections, **more):
    return dict(rope_type="default", rope_theta=theta, mrope_section=list(sections), **more)


QWEN3_4B = dict(  # the decoder of both 4B models
    vocab_size=151936,
    hidden_size=2560,
    intermediate_size=9728,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
)
QWEN3_VL_4B = dict(
    text_config=QWEN3_4B
    | dict(max_position_embeddings=262144, rope_parameters=_mrope(5e6, 24, 20, 20, mrope_interleaved=True)),
    vision_config=dict(
        depth=24,
        hidden_size=1024,
        intermediate_size=4096,
        num_heads=16,
        patch_size=16,
        out_hidden_size=2560,
        num_position_embeddings=2304,
        deepstack_visual_indexes=[5, 11, 17],
    ),
    tie_word_embeddings=True,
)
QWEN2_5_VL_7B = dict(
    text_config=dict(
        vocab_size=152064,
        hidden_size=3584,
        intermediate_size=18944,
        num_hidden_layers=28,
        num_attention_heads=28,
        num_key_value_heads=4,
        max_position_embeddings=128000,
        rope_parameters=_mrope(1e6, 16, 24, 24),
    ),
    vision_config=dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        patch_size=14,
        out_hidden_size=3584,
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
        tokens_per_second=2,
    ),
    tie_word_embeddings=False,
)
MOLMO2_4B = dict(
    text_config=QWEN3_4B | dict(rope_parameters=dict(rope_type="default", rope_theta=5e6)),
    vision_config={},  # the defaults: SigLIP 2 so400m at 378 pixels, patches of 14
    adapter_config=dict(intermediate_size=9728, text_hidden_size=2560),
)
# Vocabularies of 1,200 cost about the share of a pass that the logits of the real ones do.
SMALL_TEXT = dict(
    vocab_size=1200,
    hidden_size=192,
    intermediate_size=576,
    num_hidden_layers=10,
    num_attention_heads=6,
    num_key_value_heads=2,
    bos_token_id=0,
    eos_token_id=1,
    initializer_range=192**-0.5,
    max_position_embeddings=8192,
)
SMALL_IDS = dict(image_token_id=1190, video_token_id=1191, vision_start_token_id=1192, vision_end_token_id=1193)
SMALL_QWEN3_VL = dict(
    text_config=SMALL_TEXT | dict(head_dim=32, rope_parameters=_mrope(1e4, 8, 4, 4, mrope_interleaved=True)),
    vision_config=dict(
        depth=3,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        patch_size=8,
        out_hidden_size=192,
        num_position_embeddings=256,
        deepstack_visual_indexes=[0, 1, 2],
    ),
    **SMALL_IDS,
)
SMALL_QWEN2_5_VL = dict(
    text_config=SMALL_TEXT | dict(rope_parameters=_mrope(1e4, 4, 6, 6)),
    vision_config=dict(
        depth=3,
        hidden_size=128,
        intermediate_size=256,
        num_heads=4,
        patch_size=8,
        out_hidden_size=192,
        window_size=64,
        fullatt_block_indexes=[1],
        tokens_per_second=2,
    ),
    **SMALL_IDS,
)
SMALL_MOLMO2 = dict(
    text_config=SMALL_TEXT | dict(additional_vocab_size=16, head_dim=32, rope_parameters=dict(rope_type="default", rope_theta=1e4)),
    vision_config=dict(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        image_size=[48, 48],
        patch_size=8,
    ),
    adapter_config=dict(
        vision_feature_layer=[2, 0],
        hidden_size=64,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        intermediate_size=128,
        text_hidden_size=192,
    ),
    image_patch_id=1200,
    image_start_token_id=1201,
    image_end_token_id=1202,
    low_res_image_start_token_id=1203,
    frame_start_token_id=1204,
    frame_end_token_id=1205,
)  # fmt: skip
SHAPES = {
    "cuda": {
        "qwen3-vl-4b": Shape("Qwen3VL", QWEN3_VL_4B, 16),
        "molmo2-4b": Shape("Molmo2", MOLMO2_4B, 9),
        "qwen2.5-vl-7b": Shape("Qwen2_5_VL", QWEN2_5_VL_7B, 16),
    },
    "cpu": {
        "small": Shape("Qwen3VL", SMALL_QWEN3_VL, 8),
        "small-molmo2": Shape("Molmo2", SMALL_MOLMO2, 2),
        "small-qwen2.5-vl": Shape("Qwen2_5_VL", SMALL_QWEN2_5_VL, 8),
    },
}
DTYPES = {"cuda": torch.bfloat16, "cpu": torch.float32}


def described(name):
    """A shape in words; "" for a name that is none."""
    shape = {**SHAPES["cpu"], **SHAPES["cuda"]}.get(name)
    if shape is None:
        return ""
    text = shape.config["text_config"]
    return f"{shape.family} with {text['num_hidden_layers']} layers of width {text['hidden_size']:,}, random weights"


class MissingFamily(ValueError):
    """The installed transformers is too old for a shape."""


def build(shape, device):
    """The stock model of a shape with random weights, made where it is to lie; in eval mode.

    Args:
        shape: `Shape`.
        device: torch device; "meta" for a model that is only counted. Weights are bfloat16 on a GPU, else float32.

    Raises:
        MissingFamily: transformers lacks the family.
    """
    import transformers

    config_class = getattr(transformers, f"{shape.family}Config", None)
    if config_class is None:
        raise MissingFamily(f"transformers {transformers.__version__} has no {shape.family}: install a newer one")
    model_class = getattr(transformers, f"{shape.family}ForConditionalGeneration")
    torch.manual_seed(0)
    with torch.device(device):
        model = model_class._from_config(
            config_class(**shape.config),
            attn_implementation="sdpa",
            dtype=DTYPES.get(torch.device(device).type, torch.float32),
        )
    return model.eval()


def prompt_of(shape, config, kind, tokens, device, dtype, seed=0):
    """What the family's processor would make of a prompt: an image or a video that fills it, and words around it.

    Args:
        shape: `Shape`.
        config: the model's configuration.
        kind: "text", "image" or "video".
        tokens: P, all tokens of the prompt.
        device, dtype: of the pixels, which are random, or none on the meta device.
        seed: of words and pixels.

    Returns:
        dict: input_ids, attention_mask and mm_token_type_ids [1, P] on the CPU, and the vision tensors.

    Raises:
        ValueError: a prompt too short for an image or a frame.
    """
    device = torch.device(device)
    words = torch.Generator().manual_seed(seed)
    pixels = None if device.type == "meta" else torch.Generator(device).manual_seed(seed)

    def random_words(count):
        return torch.randint(20, 1000, (count,), generator=words).tolist()

    def random_pixels(*sizes):
        return torch.randn(*sizes, generator=pixels, dtype=dtype, device=device)

    make = {"text": lambda *_: ([], {}), "image": _IMAGES[shape.family], "video": _VIDEOS[shape.family]}[kind]
    room = max(4, tokens // 32)  # words beside what is seen
    found, tensors = make(shape, config, tokens - room, random_words, random_pixels)
    if kind != "text" and not tensors:
        raise ValueError(f"a prompt of {tokens} tokens is too short for {kind} input of {shape.family}")
    before = (tokens - len(found)) // 2
    ids = [*random_words(before), *found, *random_words(tokens - len(found) - before)]
    types = [_types_of(config).get(token, 0) for token in ids]
    return {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, tokens, dtype=torch.int64),
        "mm_token_type_ids": torch.tensor([types]),
        **tensors,
    }


def response_ids(count, tokens, seed=0):
    """`count` responses of `tokens` random words each: list of lists of ids."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randint(20, 1000, (count, tokens), generator=generator).tolist()


def head_dim(text_config):
    """Numbers of one attention head."""
    return getattr(text_config, "head_dim", None) or text_config.hidden_size // text_config.num_attention_heads


# ---- what the families' processors make: (ids, tensors) of at most `room` tokens; nothing where none fits ----


def _types_of(config):
    if config.model_type == "molmo2":
        names = "image_patch_id image_start_token_id image_end_token_id low_res_image_start_token_id".split()
        names += ["frame_start_token_id", "frame_end_token_id"]
        return {getattr(config, name): 1 for name in names}
    return {config.image_token_id: 1, config.video_token_id: 2}


def _qwen_image(shape, config, room, random_words, random_pixels):
    side = math.isqrt(room - 2)
    if not side:
        return [], {}
    ids = [config.vision_start_token_id, *[config.image_token_id] * side**2, config.vision_end_token_id]
    grid = torch.tensor([[1, 2 * side, 2 * side]])
    return ids, {"pixel_values": random_pixels(4 * side**2, _patch_numbers(config)), "image_grid_thw": grid}


def _qwen_video(shape, config, room, random_words, random_pixels):
    side = shape.frame
    if shape.family == "Qwen3VL":  # every frame behind its timestamp
        frames = room // (side**2 + 8)
        ids = []
        for _ in range(frames):
            frame = [config.vision_start_token_id, *[config.video_token_id] * side**2, config.vision_end_token_id]
            ids += [*random_words(6), *frame]
        more = {}
    else:
        frames = (room - 2) // side**2
        ids = [config.vision_start_token_id, *[config.video_token_id] * (frames * side**2), config.vision_end_token_id]
        more = {"second_per_grid_ts": torch.tensor([1.0])}
    if frames < 1:
        return [], {}
    grid = torch.tensor([[frames, 2 * side, 2 * side]])
    values = random_pixels(4 * frames * side**2, _patch_numbers(config))
    return ids, {"pixel_values_videos": values, "video_grid_thw": grid, **more}


def _patch_numbers(config):
    vision = config.vision_config
    return 3 * vision.temporal_patch_size * vision.patch_size**2


def _molmo2_image(shape, config, room, random_words, random_pixels):
    """The image as a whole, and cut into crops that overlap, patches pooled 2 x 2: a row break behind every row."""
    side, inner = _molmo2_sides(config)
    low = _pooled_tokens(side, side) + 2
    fitting = [
        (rows, columns)
        for rows in range(1, 9)
        for columns in (rows, rows + 1)
        if low + 2 + _pooled_tokens(inner * rows + side - inner, inner * columns + side - inner) <= room
    ]
    if not fitting:
        return [], {}
    rows, columns = fitting[-1]
    # Of the crops that show a patch, the one in which it stands nearer to the middle.
    margin = (side - inner) // 2
    y, x = (torch.arange(inner * n + side - inner) for n in (rows, columns))
    crop_y, crop_x = (((at - margin) // inner).clamp(0, n - 1) for at, n in ((y, rows), (x, columns)))
    crop = crop_y[:, None] * columns + crop_x
    patch = (y - inner * crop_y)[:, None] * side + (x - inner * crop_x)
    whole = torch.arange(side**2).view(side, side)
    grids = [_pool(whole, 2), _pool((1 + crop) * side**2 + patch, 2)]
    ids = []
    for start, grid in zip((config.low_res_image_start_token_id, config.image_start_token_id), grids, strict=True):
        row = [config.image_patch_id] * grid.shape[1]
        ids += [start, *[*row, *random_words(1)] * grid.shape[0], config.image_end_token_id]
    sizes = [size for grid in grids for size in grid.shape[:2]]
    crops = 1 + rows * columns
    tensors = {
        "pixel_values": random_pixels(crops, side**2, 3 * config.vision_config.patch_size**2),
        "image_token_pooling": torch.cat([grid.flatten(0, 1) for grid in grids]),
        "image_grids": torch.tensor([sizes]),
        "image_num_crops": torch.tensor([crops]),
    }
    return ids, tensors


def _molmo2_video(shape, config, room, random_words, random_pixels):
    side, _ = _molmo2_sides(config)
    frames = room // (shape.frame**2 + 6)
    if frames < 1:
        return [], {}
    ids = []
    for _ in range(frames):
        frame = [config.frame_start_token_id, *[config.image_patch_id] * shape.frame**2, config.frame_end_token_id]
        ids += [*random_words(4), *frame]
    patches = torch.arange(frames * side**2).view(frames, side, side)
    tensors = {
        "pixel_values_videos": random_pixels(frames, side**2, 3 * config.vision_config.patch_size**2),
        "video_token_pooling": torch.cat([_pool(grid, side // shape.frame).flatten(0, 1) for grid in patches]),
        "video_grids": torch.tensor([[frames, shape.frame, shape.frame]]),
    }
    return ids, tensors


def _molmo2_sides(config):
    """(patches along a side of a crop, those of it that its neighbours do not show)."""
    side = config.vision_config.image_size[0] // config.vision_config.patch_size
    return side, side - 2 * max(1, side // 6)


def _pooled_tokens(height, width):
    return math.ceil(height / 2) * (math.ceil(width / 2) + 1)


def _pool(grid, by):
    """Patches [h, w] -> those of every pooled token [ceil(h / by), ceil(w / by), by * by], -1 beyond the edge."""
    height, width = grid.shape
    padded = torch.nn.functional.pad(grid, (0, -width % by, 0, -height % by), value=-1)
    return padded.unfold(0, by, by).unfold(1, by, by).flatten(2)


_IMAGES = {"Qwen3VL": _qwen_image, "Qwen2_5_VL": _qwen_image, "Molmo2": _molmo2_image}
_VIDEOS = {"Qwen3VL": _qwen_video, "Qwen2_5_VL": _qwen_video, "Molmo2": _molmo2_video}

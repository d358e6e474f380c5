"""What differs between backbones, as facts: positions, image blocks, how vision tensors of several prompts join."""

import dataclasses
import inspect
import sys

import torch


class CannotJoin(ValueError):
    """Examples that are good by themselves and cannot stand in one packed row: each in a row of its own can be scored."""


# Per-token inputs beside input_ids; which of them a processor returns depends on the family.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")

KINDS = ("pixel_values", "pixel_values_videos")  # what an image and what a video becomes

LAYER_TYPES = ("full_attention", "sliding_attention")
SLIDES = "yojo_slides"  # attribute of a patched model's attention modules: whether the layer has a sliding window


def _token_types(prompt):
    return next((prompt[name] for name in TOKEN_TYPES if name in prompt), None)


def image_blocks(prompt):
    """Each run of image tokens is one block (Gemma 3): tokens of an image see each other in both directions."""
    types = _token_types(prompt)
    if types is None:
        return None
    image = types[0] == 1
    starts = image & ~torch.cat([image.new_zeros(1), image[:-1]])
    return torch.where(image, starts.cumsum(0) - 1, -1)


def one_image_block(prompt):
    """All image and frame tokens of the prompt are one block (Molmo2)."""
    types = _token_types(prompt)
    return None if types is None else torch.where(types[0] == 1, 0, -1)


def whole_prompt_block(prompt):
    """The whole prompt is one block (PaliGemma's prefix)."""
    return torch.zeros_like(prompt["input_ids"][0])


def _lengths(name, offsets):
    return {f"cu_{name}seqlens": offsets, f"max_{name}seqlen": int((offsets[1:] - offsets[:-1]).max())}


def qwen2_vl_indices(config, grid):
    """Indices of the vision tower for images of these sizes: what it computes itself where it gets none.

    Args:
        config: the vision config.
        grid: [images, 3] int64, frames, height and width in patches.

    Returns:
        dict of tensors and ints.
    """
    from transformers import vision_utils

    positions = vision_utils.get_vision_position_ids(grid, config.spatial_merge_size)
    return {"position_ids": positions, **_lengths("", vision_utils.get_vision_cu_seqlens(grid))}


def qwen2_5_vl_indices(config, grid):
    """Likewise, with the windows."""
    from transformers import vision_utils

    window_index, offsets = vision_utils.get_vision_window_index(
        grid, config.spatial_merge_size, config.window_size, config.patch_size
    )
    return qwen2_vl_indices(config, grid) | {"window_index": window_index} | _lengths("window_", offsets)


def qwen3_vl_indices(config, grid):
    """Likewise, with the interpolation of learned positions."""
    from transformers import vision_utils

    taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
        grid,
        num_grid_per_side=int(config.num_position_embeddings**0.5),
        mode="bilinear",
        align_corners=True,
        spatial_merge_size=config.spatial_merge_size,
    )
    return qwen2_vl_indices(config, grid) | {"interp_indices": taps, "interp_weights": weights}


@dataclasses.dataclass(frozen=True)
class Family:
    """Facts about one family of backbones.

    Attributes:
        name: the name users know.
        model_types: the `config.model_type` values it covers.
        blocks: function of a processed prompt (dict of tensors) -> [P] block ids, -1 = none; or None for a family
            whose attention is causal throughout.
        first_position: position of a prompt's first token, where the model counts in one dimension.
        passes_token_types: the model wants its token types even when they change nothing.
        join: tensor name -> the dimension along which the tensors of several prompts are joined; 0 by default.
        padded: tensor name -> dimensions that may differ between prompts; they are filled up with zeros, which the
            model cuts off again.
        offsets: tensor name -> the name of the tensor whose entries (the product of its first two dimensions) it
            indexes; indices are shifted when prompts are joined, negative ones are left alone.
        features: whether vision features replace the embeddings of their placeholders ("replaced") or are added to
            them ("added"); None: the model's own forward does it, and waits for the device (see `yojo.patching.media`).
        video_token: the config's name for the id of a video's placeholders.
        one_kind: whether the model takes either images or videos in one pass.
        sizes: names of vision tensors that the model asks for their values; they are kept on the CPU for it.
        vision_indices: function of a vision config and a `..._grid_thw` -> dict of the keyword arguments that let the
            vision tower do without the grid on the device; None for a family without grids.
    """

    name: str
    model_types: tuple[str, ...]
    blocks: object = None
    first_position: int = 0
    passes_token_types: bool = False
    join: dict[str, int] = dataclasses.field(default_factory=dict)
    padded: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    offsets: dict[str, str] = dataclasses.field(default_factory=dict)
    features: str | None = None
    video_token: str = "video_token_id"
    one_kind: bool = False
    sizes: tuple[str, ...] = ()
    vision_indices: object = None


_GRIDS = {"features": "replaced", "sizes": ("image_grid_thw", "video_grid_thw")}
_TILES = {"pixel_values": 1, "pixel_attention_mask": 1}  # [1, images, ...]: one prompt is one entry of dimension 0

FAMILIES = (
    Family("Qwen2-VL", ("qwen2_vl",), vision_indices=qwen2_vl_indices, **_GRIDS),
    Family("Qwen2.5-VL", ("qwen2_5_vl",), vision_indices=qwen2_5_vl_indices, **_GRIDS),
    Family("Qwen3-VL", ("qwen3_vl",), vision_indices=qwen3_vl_indices, **_GRIDS),
    Family(
        "Molmo2",
        ("molmo2",),
        blocks=one_image_block,
        passes_token_types=True,
        offsets={"image_token_pooling": "pixel_values", "video_token_pooling": "pixel_values_videos"},
        features="added",
        video_token="image_token_id",
        one_kind=True,
        sizes=("image_grids", "video_grids"),
    ),
    Family("Gemma 3", ("gemma3",), blocks=image_blocks, features="replaced"),
    Family("Gemma 3 (text)", ("gemma3_text",)),
    Family(
        "LLaVA-OneVision",
        ("llava_onevision",),
        padded={"pixel_values": (1,)},
        features="replaced",
        sizes=("image_sizes", "batch_num_images"),
    ),
    Family("InternVL", ("internvl",), features="replaced"),
    Family("SmolVLM", ("smolvlm",), join=_TILES, features="replaced"),
    Family("Idefics 3", ("idefics3",), join=_TILES, features="replaced"),
    Family("Mistral 3", ("mistral3",), padded={"pixel_values": (2, 3)}, features="replaced", sizes=("image_sizes",)),
    Family("PaliGemma", ("paligemma",), blocks=whole_prompt_block, first_position=1, features="replaced"),
    Family("Llama", ("llama",)),
    Family("Qwen3", ("qwen3",)),
    Family("Gemma 2", ("gemma2",)),
)


def family_of(config):
    """The `Family` of a model config; one without special facts for a `model_type` not listed."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    return Family(config.model_type, (config.model_type,))


def is_known(config):
    """Whether the facts of this model's family are listed here."""
    return any(config.model_type in family.model_types for family in FAMILIES)


def attention_modules(model):
    """The self-attention modules of the text decoder, in layer order.

    Args:
        model: a `transformers.PreTrainedModel` with a language-model head.

    Returns:
        list of modules, one per decoder layer.

    Raises:
        ValueError: a decoder that multi-response attention cannot serve, with the reason.
    """
    name = type(model).__name__
    decoder = model.get_decoder()
    text_config = model.config.get_text_config()
    layer_types = getattr(text_config, "layer_types", None) or []
    foreign = sorted(set(layer_types) - set(LAYER_TYPES))
    if foreign:
        raise ValueError(
            f"{name} has layers of type {', '.join(foreign)}: only softmax attention (full or sliding) can keep the "
            "branches of a packed row apart"
        )
    if not getattr(decoder, "_supports_attention_backend", False):
        raise ValueError(
            f"{name}: {type(decoder).__name__} does not use transformers' attention interface "
            "(`_supports_attention_backend`), so its attention cannot be replaced"
        )
    modules = attentions_in(decoder)
    layers = getattr(text_config, "num_hidden_layers", len(modules))
    if not modules or len(modules) != layers:
        raise ValueError(
            f"{name} has {layers} decoder layers but {len(modules)} softmax attention modules: hybrid decoders "
            "(linear attention, state-space layers, cross-attention) cannot be patched"
        )
    for module in modules:
        # PaliGemma declares its layers bidirectional and restores causality behind the prompt with its mask.
        if not module.is_causal and family_of(model.config).blocks is not whole_prompt_block:
            raise ValueError(f"{name}: layer {module.layer_idx} attends in both directions; a decoder must be causal")
        if getattr(module, "sinks", None) is not None:
            raise ValueError(f"{name}: layer {module.layer_idx} has attention sinks, which are not supported")
    if not is_known(model.config) and _builds_block_masks(model, decoder):
        raise ValueError(
            f"{name} ({model.config.model_type}) builds its masks from token types or blocks of tokens, and how is not "
            "known to yojo/patching/families.py; scoring it as plainly causal would be wrong"
        )
    return modules


def attentions_in(decoder):
    """The modules of a decoder, or of one of its layers, that are softmax attention by what they have."""
    return [
        module
        for module in decoder.modules()
        if hasattr(module, "layer_idx") and hasattr(module, "is_causal") and hasattr(module, "config")
    ]


def _builds_block_masks(model, decoder):
    for cls in {type(model.base_model), type(decoder)}:
        try:
            source = inspect.getsource(sys.modules[cls.__module__])
        except (OSError, TypeError, KeyError):
            continue
        if any(word in source for word in ("block_sequence_ids", "or_mask_function", "create_chunked_causal_mask")):
            return True
    return False


class PromptPositions:
    """Positions a model gives to a prompt: M-RoPE through the model's own code, else a plain count.

    Holds no weights, so that a DataLoader worker can carry it.
    """

    def __init__(self, model):
        backbone = model.base_model
        self.first = family_of(model.config).first_position
        self.shell = None
        if hasattr(backbone, "get_rope_index"):
            # The method reads nothing but the configuration, so a module without its weights is enough.
            self.shell = type(backbone).__new__(type(backbone))
            torch.nn.Module.__init__(self.shell)
            self.shell.config = backbone.config
            self.accepts = set(inspect.signature(type(backbone).get_rope_index).parameters)

    def __call__(self, prompt):
        """Positions of a processed prompt, and of the text that follows it.

        Args:
            prompt: dict of a processor's outputs, `input_ids` [1, P] among them.

        Returns:
            (positions [axes, P] int64, next int): axes = 1, or 3 for M-RoPE; a token that follows has position `next`
            on every axis.
        """
        input_ids = prompt["input_ids"]
        length = input_ids.shape[1]
        if self.shell is None:
            return torch.arange(length)[None, :] + self.first, length + self.first
        # One token of text more, so that the model itself says where text goes on. That is not always behind the
        # largest position: after a long video, transformers' Qwen2-VL goes on from the frame's height and width.
        inputs = {name: value for name, value in prompt.items() if name in self.accepts and name != "attention_mask"}
        inputs["input_ids"] = torch.nn.functional.pad(input_ids, (0, 1))
        if "mm_token_type_ids" in self.accepts:
            types = inputs.get("mm_token_type_ids", torch.zeros_like(input_ids))
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, 1))
        positions, _ = self.shell.get_rope_index(**inputs)
        return positions[:, 0, :length], int(positions[0, 0, length])


def join_vision(prompts, family):
    """Join the vision tensors of several processed prompts for one packed row.

    Args:
        prompts: list of dicts name -> tensor, vision tensors only; a text-only prompt has an empty one.
        family: their `Family`.

    Returns:
        dict name -> tensor.

    Raises:
        CannotJoin: shapes that cannot be joined exactly, or images and videos in one row of a family that takes either.
    """
    if family.one_kind and len({kind for prompt in prompts for kind in KINDS if kind in prompt}) > 1:
        raise CannotJoin(
            f"{family.name} takes either images or videos in one pass, and the examples have both; put examples with "
            "images and examples with videos in different batches"
        )
    joined = {}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt):
        tensors = [prompt[name] for prompt in prompts if name in prompt]
        if name in family.offsets:
            tensors = _shifted(tensors, [prompt[family.offsets[name]] for prompt in prompts if name in prompt])
        for dim in family.padded.get(name, ()):
            size = max(tensor.shape[dim] for tensor in tensors)
            tensors = [_fill_up(tensor, dim, size) for tensor in tensors]
        dim = family.join.get(name, 0)
        if len({(*tensor.shape[:dim], *tensor.shape[dim + 1 :]) for tensor in tensors}) > 1:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in tensors)
            raise CannotJoin(
                f"{family.name}: {name} of the examples have shapes {shapes}, which cannot stand in one packed row; "
                "put these examples in different batches"
            )
        joined[name] = torch.cat(tensors, dim=dim)
    return joined


def _fill_up(tensor, dim, size):
    shape = list(tensor.shape)
    shape[dim] = size - shape[dim]
    return tensor if shape[dim] == 0 else torch.cat([tensor, tensor.new_zeros(shape)], dim=dim)


def _shifted(indices, sources):
    shifted, offset = [], 0
    for index, source in zip(indices, sources, strict=True):
        shifted.append(torch.where(index >= 0, index + offset, index))
        offset += source.shape[0] * source.shape[1]
    return shifted

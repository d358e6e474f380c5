"""How many rows the layers of a vision tower see, by family, as facts; for counting, nothing here is run in a pass."""

import dataclasses
import math
import typing

# ---- what one batch of images means to a tower ----


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that the layers of a vision tower see, and pairs that its attention computes, for one batch.

    Attributes:
        pixels: positions of the patch embedding; more than patches where images are padded to one size.
        patches: rows inside the tower (class tokens included).
        merged: rows behind it, one per token that the decoder gets.
        members: patches gathered for pooling attention (Molmo2); 0 elsewhere.
        frame_pairs: (query, key) pairs of an attention layer in which each image or frame sees itself.
        window_pairs: the same for the layers that see windows (Qwen2.5-VL).
        row_pairs: all pairs of patches, what a dense implementation computes where images stand in one sequence
            behind a mask (Mistral 3); equal to frame_pairs elsewhere.
    """

    pixels: int = 0
    patches: int = 0
    merged: int = 0
    members: int = 0
    frame_pairs: int = 0
    window_pairs: int = 0
    row_pairs: int = 0


@dataclasses.dataclass(frozen=True)
class Vision:
    """Facts about the vision tower of one family.

    Attributes:
        model_types: the `config.model_type` values it covers.
        grids: function (model config, dict of the processor's vision tensors) -> list of (frames, height, width), the
            patches of each image, tile, crop or video.
        tokens: function (model config, height, width) -> tokens that the decoder gets for one frame of so many
            patches.
        rows: parts of module names -> the field of `Rows` that says how many rows they see; the first that fits
            counts. Where none does, "pixels" for convolutions and "patches" for the rest.
        class_tokens: rows that the tower adds to every frame.
        matrices: names of parameters that are multiplied with, though no Linear holds them.
        in_one_row: all images stand in one sequence, kept apart by a mask.
    """

    model_types: tuple[str, ...]
    grids: typing.Callable
    tokens: typing.Callable
    rows: dict[str, str] = dataclasses.field(default_factory=dict)
    class_tokens: int = 0
    matrices: tuple[str, ...] = ()
    in_one_row: bool = False


# ---- grids ----

PIXELS = ("pixel_values", "pixel_values_videos")  # every family's images and frames come under these names


def _listed_grids(config, tensors):
    names = ("image_grid_thw", "video_grid_thw")
    return [tuple(grid) for name in names if name in tensors for grid in tensors[name].tolist()]


def _tile_grids(config, tensors):
    """Pixels [..., channels, height, width]: every entry of the leading dimensions is a frame of its own."""
    grids = []
    for pixels in (tensors[name] for name in PIXELS if name in tensors):
        *leading, _, height, width = pixels.shape
        grids.append((math.prod(leading), height // _patch_size(config), width // _patch_size(config)))
    return grids


def _anyres_grids(config, tensors):
    """LLaVA-OneVision: an image by itself is cut into tiles, several are not; tensors are padded to the most tiles."""
    from transformers.models.llava_onevision.modeling_llava_onevision import image_size_to_num_patches

    size, grids = config.vision_config.image_size, []
    side = size // _patch_size(config)
    if "pixel_values" in tensors:
        sizes = tensors["image_sizes"].tolist()
        counts = tensors["batch_num_images"].tolist() if "batch_num_images" in tensors else [1] * len(sizes)
        alone = [count == 1 for count in counts for _ in range(count)]
        for image, cut in zip(sizes, alone, strict=True):
            tiles = image_size_to_num_patches(image, config.image_grid_pinpoints, size) if cut else 1
            grids.append((int(tiles), side, side))
    if "pixel_values_videos" in tensors:
        grids += _tile_grids(config, {"pixel_values_videos": tensors["pixel_values_videos"]})
    return grids


def _sized_grids(config, tensors):
    if "pixel_values" not in tensors:
        return []
    patch = _patch_size(config)
    return [(1, height // patch, width // patch) for height, width in tensors["image_sizes"].tolist()]


def _crop_grids(config, tensors):
    """Molmo2: pixels [crops, patches, pixels of a patch], square crops."""
    grids = []
    for pixels in (tensors[name] for name in PIXELS if name in tensors):
        side = math.isqrt(pixels.shape[1])
        grids.append((pixels.shape[0], side, pixels.shape[1] // side))
    return grids


def _patch_size(config):
    size = config.vision_config.patch_size
    return size if isinstance(size, int) else size[0]


# ---- the families ----

_MERGER = {"merger": "merged"}
_PROJECTOR = {"multi_modal_projector": "merged"}

VISION = (
    Vision(
        ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_vl_moe"),
        _listed_grids,
        lambda config, height, width: height * width // config.vision_config.spatial_merge_size**2,
        rows=_MERGER,
    ),
    Vision(
        ("molmo2",),
        _crop_grids,
        lambda config, height, width: height * width // 4,  # where no table of pooled patches says it better
        rows={
            "image_pooling_2d.k_proj": "members",
            "image_pooling_2d.v_proj": "members",
            "patch_embedding": "pixels",
            "multi_modal_projector": "merged",
        },
    ),
    Vision(
        ("gemma3",),
        _tile_grids,
        lambda config, height, width: config.mm_tokens_per_image,
        rows=_PROJECTOR,
        matrices=("mm_input_projection_weight",),
    ),
    Vision(("llava_onevision",), _anyres_grids, lambda config, height, width: height * width),
    Vision(
        ("internvl",),
        _tile_grids,
        lambda config, height, width: round(height * width * config.downsample_ratio**2),
        rows=_PROJECTOR,
        class_tokens=1,
    ),
    Vision(
        ("smolvlm", "idefics3"),
        _tile_grids,
        lambda config, height, width: height * width // config.scale_factor**2,
        rows={"connector": "merged"},
    ),
    Vision(
        ("mistral3",),
        _sized_grids,
        lambda config, height, width: (height // config.spatial_merge_size) * (width // config.spatial_merge_size),
        rows=_PROJECTOR,
        in_one_row=True,
    ),
    Vision(("paligemma",), _tile_grids, lambda config, height, width: height * width),
)


def vision_of(config):
    """The `Vision` facts of a model config.

    Raises:
        ValueError: a family whose vision tower is not described here.
    """
    for vision in VISION:
        if config.model_type in vision.model_types:
            return vision
    known = ", ".join(name for vision in VISION for name in vision.model_types)
    raise ValueError(
        f"how many rows the vision tower of {config.model_type!r} sees is not known to yojo/costs/vision.py (it knows "
        f"{known}): count a text-only batch, or measure with torch.utils.flop_counter.FlopCounterMode"
    )


def rows_of_tensors(config, tensors):
    """`Rows` of a batch's vision tensors; None where there are none.

    Args:
        config: the model's config.
        tensors: dict name -> tensor, as `yojo.Collator` or a processor returns them; other names are ignored. Only
            shapes, grids and sizes are read.
    """
    if not any(name in tensors for name in PIXELS):
        return None
    vision = vision_of(config)
    grids = vision.grids(config, tensors)
    rows = rows_of_grids(config, grids)
    if vision.in_one_row:
        count, _, height, width = tensors["pixel_values"].shape
        patch = _patch_size(config)
        rows = dataclasses.replace(rows, pixels=count * (height // patch) * (width // patch))
    pooling = [tensors[f"{kind}_token_pooling"] for kind in ("image", "video") if f"{kind}_token_pooling" in tensors]
    if pooling:
        rows = dataclasses.replace(
            rows, merged=sum(table.shape[0] for table in pooling), members=sum(table.numel() for table in pooling)
        )
    return rows


def rows_of_grids(config, grids):
    """`Rows` of images given as (frames, height, width) in patches; see `Vision.grids`."""
    vision = vision_of(config)
    frames = [(height, width) for count, height, width in grids for _ in range(count)]
    sizes = [height * width + vision.class_tokens for height, width in frames]
    merged = sum(vision.tokens(config, height, width) for height, width in frames)
    pairs = sum(size**2 for size in sizes)
    return Rows(
        pixels=sum(height * width for height, width in frames),
        patches=sum(sizes),
        merged=merged,
        members=4 * merged if config.model_type == "molmo2" else 0,
        frame_pairs=pairs,
        window_pairs=sum(_window_pairs(config, height, width) for height, width in frames),
        row_pairs=sum(sizes) ** 2 if vision.in_one_row else pairs,
    )


def _window_pairs(config, height, width):
    """Qwen2.5-VL: windows of so many patches a side, cut off at the right and at the bottom."""
    vision = config.vision_config
    if not hasattr(vision, "fullatt_block_indexes"):
        return 0
    unit = vision.spatial_merge_size
    side = vision.window_size // unit // vision.patch_size * unit
    down, across = ([min(side, size - start) for start in range(0, size, side)] for size in (height, width))
    return sum(h**2 for h in down) * sum(w**2 for w in across)


def sees_windows(config, layer):
    """Whether the tower's attention layer of this index (in order of execution) sees windows rather than frames."""
    whole = getattr(config.vision_config, "fullatt_block_indexes", None)
    return whole is not None and layer not in whole

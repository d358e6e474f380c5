"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: M-RoPE, images and videos as patches behind one another, their sizes as grids."""

from yojo.families.family import PIXELS, Decoder, Family, Tower, cut

# ---- what the vision tower computes itself where it gets no indices ----


def _lengths(name, offsets):
    return {f"cu_{name}seqlens": offsets, f"max_{name}seqlen": int((offsets[1:] - offsets[:-1]).max())}


def qwen2_vl_indices(config, grid):
    """Indices of the vision tower for images of these sizes.

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


# ---- what it is counted by ----

_GRIDS = {"image": "image_grid_thw", "video": "video_grid_thw"}


def count_features(prompt, config):
    """A feature for every square of merged patches."""
    merged = config.vision_config.spatial_merge_size**2
    return {kind: int(prompt[grid].prod(dim=1).sum()) // merged for kind, grid in _GRIDS.items() if grid in prompt}


def pictures(tensors, kind, config):
    """Each image and each video."""
    if _GRIDS[kind] not in tensors:
        return None
    grid = tensors[_GRIDS[kind]]
    patches, merged = grid.prod(dim=1).tolist(), config.vision_config.spatial_merge_size**2
    pieces = cut(tensors, {PIXELS[kind]: patches, _GRIDS[kind]: [1] * len(grid)})
    return None if pieces is None else [(p, n // merged) for p, n in zip(pieces, patches, strict=True)]


def listed_grids(config, tensors):
    """The grids are inputs of the model."""
    return [tuple(grid) for name in _GRIDS.values() if name in tensors for grid in tensors[name].tolist()]


def merged_tokens(config, height, width):
    """A token for every square of merged patches."""
    return height * width // config.vision_config.spatial_merge_size**2


def windows(config, height, width):
    """Windows of so many patches a side, cut off at the right and at the bottom."""
    unit = config.spatial_merge_size
    side = config.window_size // unit // config.patch_size * unit
    down, across = ([min(side, size - start) for start in range(0, size, side)] for size in (height, width))
    return [h * w for h in down for w in across]


# ---- the rows ----

_TOWER = {"grids": listed_grids, "tokens": merged_tokens, "rows": {"merger": "merged"}}
_ALL = {
    "takes": ("image", "video"),
    "features": "replaced",
    "sizes": tuple(_GRIDS.values()),
    "count": count_features,
    "pictures": pictures,
}

FAMILIES = (
    Family(
        "Qwen2-VL",
        ("qwen2_vl",),
        decoders=("qwen2_vl_text",),
        indices=qwen2_vl_indices,
        tower=Tower(**_TOWER),
        **_ALL,
    ),
    Family(
        "Qwen2.5-VL",
        ("qwen2_5_vl",),
        decoders=("qwen2_5_vl_text",),
        indices=qwen2_5_vl_indices,
        tower=Tower(windows=windows, whole_layers="fullatt_block_indexes", **_TOWER),
        **_ALL,
    ),
    Family(
        "Qwen3-VL",
        ("qwen3_vl",),
        decoders=("qwen3_vl_text",),
        indices=qwen3_vl_indices,
        tower=Tower(also=("qwen3_vl_moe",), **_TOWER),
        **_ALL,
    ),
)

DECODERS = (
    Decoder("qwen2_vl_text", norms=("Qwen2VLRMSNorm",), mlps=("Qwen2MLP",), attentions=("Qwen2VLAttention",)),
    Decoder("qwen2_5_vl_text", norms=("Qwen2_5_VLRMSNorm",), mlps=("Qwen2MLP",), attentions=("Qwen2_5_VLAttention",)),
    Decoder(
        "qwen3_vl_text",
        norms=("Qwen3VLTextRMSNorm",),
        mlps=("Qwen3VLTextMLP",),
        attentions=("Qwen3VLTextAttention",),
    ),
)

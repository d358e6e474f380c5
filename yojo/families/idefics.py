"""Idefics 3 and SmolVLM: one prompt's tiles are one entry of dimension 0; tiles of nothing but zeros are padding."""

from yojo.families.family import Family, Tower, tile_grids


def count_features(prompt, config):
    """As many for every tile that is not padding: the model takes a tile of nothing but zeros for it."""
    if "pixel_values" not in prompt:
        return {}
    pixels, patch = prompt["pixel_values"], config.vision_config.patch_size
    tiles = int((pixels != 0).any(dim=(-1, -2, -3)).sum())
    height, width = (size // patch for size in pixels.shape[-2:])
    return {"image": tiles * shuffled_tokens(config, height, width)}


def shuffled_tokens(config, height, width):
    """Squares of patches are shuffled into one token."""
    return height * width // config.scale_factor**2


_ALL = {
    "decoders": ("llama",),
    "join": {"pixel_values": 1, "pixel_attention_mask": 1},  # [1, images, ...]
    "features": "replaced",
    "count": count_features,
    "tower": Tower(tile_grids, shuffled_tokens, rows={"connector": "merged"}),
}

FAMILIES = (
    Family("SmolVLM", ("smolvlm",), takes=("image", "video"), **_ALL),
    Family("Idefics 3", ("idefics3",), takes=("image",), **_ALL),
)

DECODERS = ()

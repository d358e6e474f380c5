"""Idefics 3 and SmolVLM: one prompt's tiles are one entry of dimension 0; tiles of nothing but zeros are padding."""

from yojo.families.family import Family, Tower, cut, tile_grids


def count_features(prompt, config):
    """As many for every tile that is not padding: the model takes a tile of nothing but zeros for it."""
    if "pixel_values" not in prompt:
        return {}
    pixels, patch = prompt["pixel_values"], config.vision_config.patch_size
    tiles = int((pixels != 0).any(dim=(-1, -2, -3)).sum())
    height, width = (size // patch for size in pixels.shape[-2:])
    return {"image": tiles * shuffled_tokens(config, height, width)}


def pictures(tensors, kind, config):
    """Each tile; one of padding makes no features."""
    if any(tensor.shape[0] != 1 for tensor in tensors.values()):
        return None
    pieces = cut(tensors, {name: [1] * tensors[name].shape[1] for name in _JOIN if name in tensors}, dim=1)
    if pieces is None or "pixel_values" not in tensors:
        return None
    height, width = (size // config.vision_config.patch_size for size in tensors["pixel_values"].shape[-2:])
    tokens = shuffled_tokens(config, height, width)
    return [(piece, tokens * _is_picture(piece["pixel_values"])) for piece in pieces]


def _is_picture(tile):
    return bool(tile[..., ::16, ::16].any()) or bool(tile.any())  # most have something there


def shuffled_tokens(config, height, width):
    """Squares of patches are shuffled into one token."""
    return height * width // config.scale_factor**2


_JOIN = {"pixel_values": 1, "pixel_attention_mask": 1}  # [1, images, ...]
_ALL = {
    "decoders": ("llama",),
    "join": _JOIN,
    "features": "replaced",
    "count": count_features,
    "pictures": pictures,
    "tower": Tower(tile_grids, shuffled_tokens, rows={"connector": "merged"}),
}

FAMILIES = (
    Family("SmolVLM", ("smolvlm",), takes=("image", "video"), **_ALL),
    Family("Idefics 3", ("idefics3",), takes=("image",), **_ALL),
)

DECODERS = ()

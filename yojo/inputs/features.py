"""How many vision features a prompt's pixels make, and whether it has a place for each: an example's own fault, found early."""

import torch


def _qwen_vl(prompt, config):
    grids = {"image": "image_grid_thw", "video": "video_grid_thw"}
    merged = config.vision_config.spatial_merge_size**2
    return {kind: int(prompt[grid].prod(dim=1).sum()) // merged for kind, grid in grids.items() if grid in prompt}


def _molmo2(prompt, config):
    pooling = {"image": "image_token_pooling", "video": "video_token_pooling"}
    return {kind: int((prompt[name] >= 0).any(dim=-1).sum()) for kind, name in pooling.items() if name in prompt}


def _tiles(tokens):
    """Families whose every picture of [n, 3, height, width] makes as many features."""

    def count(prompt, config):
        return {"image": prompt["pixel_values"].shape[0] * tokens(config)} if "pixel_values" in prompt else {}

    return count


def _idefics3(prompt, config):
    if "pixel_values" not in prompt:
        return {}
    pixels, patch = prompt["pixel_values"], config.vision_config.patch_size
    tiles = int((pixels != 0).any(dim=(-1, -2, -3)).sum())  # the model takes a tile of nothing but zeros for padding
    height, width = (size // patch for size in pixels.shape[-2:])
    return {"image": tiles * (height * width // config.scale_factor**2)}


def _mistral3(prompt, config):
    if "image_sizes" not in prompt:
        return {}
    size = config.vision_config.patch_size * config.spatial_merge_size
    count = int((torch.as_tensor(prompt["image_sizes"]) // size).prod(dim=-1).sum())
    if count == 1:  # transformers drops a dimension of one feature, and then fails
        raise ValueError(
            f"the only image has one feature ({size} x {size} pixels), which the model's code cannot take: enlarge it"
        )
    return {"image": count}


_COUNTS = {
    "qwen2_vl": _qwen_vl,
    "qwen2_5_vl": _qwen_vl,
    "qwen3_vl": _qwen_vl,
    "molmo2": _molmo2,
    "gemma3": _tiles(lambda config: config.mm_tokens_per_image),
    "internvl": _tiles(lambda config: config.image_seq_length),
    "paligemma": _tiles(lambda config: (config.vision_config.image_size // config.vision_config.patch_size) ** 2),
    "smolvlm": _idefics3,
    "idefics3": _idefics3,
    "mistral3": _mistral3,
}


def check(prompt, family, config):
    """Check that a processed prompt has as many places for features of images and videos as its pixels make.

    Where it has not, the model fails on the whole row, whose other examples are good. For families whose features
    nobody counts here the model says it.

    Args:
        prompt: dict of a processor's outputs, `input_ids` [1, P] among them.
        family: its `yojo.patching.families.Family`.
        config: the model's.

    Raises:
        ValueError: other numbers of places and features; the message names neither example nor family.
    """
    count = _COUNTS.get(config.model_type)
    if count is None:
        return
    made = count(prompt, config)
    tokens = {
        kind: getattr(config, name, None) for kind, name in (("image", "image_token_id"), ("video", family.video_token))
    }
    for token in set(tokens.values()) - {None}:  # one for both in Molmo2
        features = sum(made.get(kind, 0) for kind, own in tokens.items() if own == token)
        places = int((prompt["input_ids"] == token).sum())
        if places != features:
            raise ValueError(
                f"the prompt has {places} places for vision features, and its pixels make {features}: the processor "
                "takes either in one prompt, images or videos, or the prompt and its pixels do not belong together"
            )

"""PaliGemma and PaliGemma 2: the whole prompt is a prefix that sees itself, and positions count from one."""

import torch

from yojo.families.family import Blocks, Family, Tower, alike, all_patches, count_per_picture, tile_grids


def block_ids(prompt):
    """The whole prompt is one block."""
    return torch.zeros_like(prompt["input_ids"][0])


def block_sizes(prompt, images):
    """One block of all the prompt's tokens."""
    return (prompt,)


def count_features(prompt, config):
    """A feature for every patch."""
    return count_per_picture(prompt, _patches(config))


def _patches(config):
    return (config.vision_config.image_size // config.vision_config.patch_size) ** 2


def pictures(tensors, kind, config):
    """Each image."""
    return alike(tensors, _patches(config))


FAMILIES = (
    Family(
        "PaliGemma",
        ("paligemma",),
        decoders=("gemma", "gemma2"),
        takes=("image",),
        blocks=Blocks("the whole prompt as one", block_ids, block_sizes, whole_prompt=True),
        first_position=1,
        features="replaced",
        count=count_features,
        pictures=pictures,
        tower=Tower(tile_grids, all_patches),
    ),
)

DECODERS = ()

"""Gemma 3, with images and without: the tokens of an image see each other in both directions."""

import torch

from yojo.families.family import (
    GEMMA_NORM,
    PROJECTOR,
    Blocks,
    Decoder,
    Family,
    Tower,
    alike,
    count_per_picture,
    tile_grids,
    token_types,
)


def block_ids(prompt):
    """Each run of image tokens is one block."""
    types = token_types(prompt)
    if types is None:
        return None
    image = types[0] == 1
    starts = image & ~torch.cat([image.new_zeros(1), image[:-1]])
    return torch.where(image, starts.cumsum(0) - 1, -1)


def block_sizes(prompt, images):
    """A block for each image."""
    return tuple(images)


def count_features(prompt, config):
    """As many for every picture."""
    return count_per_picture(prompt, config.mm_tokens_per_image)


def pictures(tensors, kind, config):
    """Crops are pictures, too."""
    return alike(tensors, config.mm_tokens_per_image)


def tokens(config, height, width):
    """As many for every picture."""
    return config.mm_tokens_per_image


FAMILIES = (
    Family(
        "Gemma 3",
        ("gemma3",),
        decoders=("gemma3_text",),
        takes=("image",),
        blocks=Blocks("within each image", block_ids, block_sizes),
        features="replaced",
        count=count_features,
        pictures=pictures,
        tower=Tower(tile_grids, tokens, rows=PROJECTOR, matrices=("mm_input_projection_weight",)),
    ),
    Family("Gemma 3 (text)", ("gemma3_text",), decoders=("gemma3_text",)),
)

DECODERS = (
    Decoder(
        "gemma3_text",
        norms=("Gemma3RMSNorm",),
        mlps=("Gemma3MLP",),
        attentions=("Gemma3Attention",),
        norm=GEMMA_NORM,
    ),
)

"""Mistral 3: images of any size, filled up to the largest, in one sequence of the tower; and the Mistral decoder."""

import torch

from yojo.families.family import PROJECTOR, Decoder, Family, Tower, cut, patch_size


def count_features(prompt, config):
    """A feature for every square of merged patches."""
    if "image_sizes" not in prompt:
        return {}
    size = config.vision_config.patch_size * config.spatial_merge_size
    count = int((torch.as_tensor(prompt["image_sizes"]) // size).prod(dim=-1).sum())
    if count == 1:  # transformers drops a dimension of one feature, and then fails
        raise ValueError(
            f"the only image has one feature ({size} x {size} pixels), which the model's code cannot take: enlarge it"
        )
    return {"image": count}


def pictures(tensors, kind, config):
    """Each image, without what fills it up to the largest of its prompt."""
    pieces = cut(
        tensors, {name: [1] * len(tensors[name]) for name in ("pixel_values", "image_sizes") if name in tensors}
    )
    if pieces is None or len(tensors) != 2:
        return None
    found = []
    for piece in pieces:
        (height, width) = piece["image_sizes"][0].tolist()
        piece["pixel_values"] = piece["pixel_values"][..., :height, :width]
        size = config.vision_config.patch_size * config.spatial_merge_size
        found.append((piece, (height // size) * (width // size)))
    return found


def sized_grids(config, tensors):
    """Images have sizes of their own, smaller than the tensor they are filled up to."""
    if "pixel_values" not in tensors:
        return []
    patch = patch_size(config)
    return [(1, height // patch, width // patch) for height, width in tensors["image_sizes"].tolist()]


def merged_tokens(config, height, width):
    """A token for every square of merged patches."""
    return (height // config.spatial_merge_size) * (width // config.spatial_merge_size)


FAMILIES = (
    Family(
        "Mistral 3",
        ("mistral3",),
        decoders=("mistral",),
        takes=("image",),
        padded={"pixel_values": (2, 3)},
        features="replaced",
        count=count_features,
        pictures=pictures,
        sizes=("image_sizes",),
        tower=Tower(sized_grids, merged_tokens, rows=PROJECTOR, in_one_row=True),
    ),
)

DECODERS = (Decoder("mistral", norms=("MistralRMSNorm",), mlps=("MistralMLP",), attentions=("MistralAttention",)),)

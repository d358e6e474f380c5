"""The vision tensors of several prompts joined for one packed row."""

import torch

from yojo.families.family import PIXELS


class CannotJoin(ValueError):
    """Examples that are good by themselves and cannot stand in one packed row: each in a row of its own can be scored."""


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
    if family.one_kind and len({kind for prompt in prompts for kind in PIXELS.values() if kind in prompt}) > 1:
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

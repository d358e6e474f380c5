"""An image that several prompts of a packed row have, or one prompt twice: seen by the vision tower once.

Pictures are told apart by their tensors alone, entry for entry: where they came from says nothing. Only those that the
tower sees each apart from the others are shared (`Family.pictures`); where a family's, or a prompt's, are only taken
together, prompts with the same pictures share all of them.
"""

import dataclasses
import itertools

import torch

from yojo.families.family import PIXELS
from yojo.patching.joining import join_vision


@dataclasses.dataclass(frozen=True, eq=False)
class Shared:
    """Where each picture of a packed row stands among the different ones, which alone are in its vision tensors.

    Attributes:
        features: dict "image" or "video" -> [n] int64, for each placeholder the feature that goes there.
        made: dict kind -> how many features the different pictures make.
        order: dict kind -> for each picture of the row, its place among the different ones.
        sizes: dict name of a vision tensor -> how many of its entries each of the different pictures has.
    """

    features: dict
    made: dict
    order: dict
    sizes: dict


def share(prompts, ids, family, config):
    """Look for pictures that a row has more than once.

    Args:
        prompts: list of dicts name -> tensor, the vision tensors of every prompt; a text-only prompt has an empty one.
        ids: list of [P] int64, the ids of every prompt.
        family: their `yojo.families.Family`.
        config: the model's.

    Returns:
        (what `join_vision` takes, `Shared`): the tensors of the different pictures; or, where no picture stands in the row
        twice, the prompts as they are, and None. Tensors that are not on the CPU are not looked at: it would be waited for.
    """
    tensors = [tensor for prompt in prompts for tensor in prompt.values()]
    if any(tensor.device.type != "cpu" for tensor in tensors):
        return prompts, None
    kept, features, made, order, sizes, twice = [], {}, {}, {}, {}, False
    for kind in PIXELS:
        pictures = _pictures_of_row(prompts, ids, kind, family, config)
        if pictures is None:
            return prompts, None
        if not pictures:
            continue
        different, places = _different(pictures)
        counts = [count for _, count in different]
        if sum(counts) < 2:  # of one feature alone some models drop a dimension
            different, places, counts = pictures, range(len(pictures)), [count for _, count in pictures]
        twice = twice or len(different) < len(pictures)
        ends = list(itertools.accumulate(counts))
        features[kind] = torch.cat([torch.arange(ends[place] - counts[place], ends[place]) for place in places])
        made[kind], order[kind] = sum(counts), tuple(places)
        kept += [tensors for tensors, _ in different]
        for name in dict.fromkeys(name for tensors, _ in different for name in tensors):
            dim = family.join.get(name, 0)
            sizes[name] = tuple(tensors[name].shape[dim] if name in tensors else 0 for tensors, _ in different)
    return (kept, Shared(features, made, order, sizes)) if twice else (prompts, None)


def unshare(inputs, shared, family):
    """The inputs of a model that looks for placeholders itself: every picture as often as it stands in the row.

    Args:
        inputs: dict name -> whatever, a row's vision tensors among it, on any device.
        shared: the row's `Shared`.
        family: its `Family`.

    Returns:
        dict.
    """
    row = []
    for kind, order in shared.order.items():
        pieces = {
            name: inputs[name].split(sizes, family.join.get(name, 0))
            for name, sizes in shared.sizes.items()
            if _kind_of(name) == kind
        }
        pictures = [dict(zip(pieces, parts, strict=True)) for parts in zip(*pieces.values(), strict=True)]
        start = 0
        for picture in pictures:
            for name in family.offsets.keys() & picture.keys():
                picture[name] = torch.where(picture[name] >= 0, picture[name] - start, picture[name])
                source = picture[family.offsets[name]]
                start += source.shape[0] * source.shape[1]
        row += [pictures[place] for place in order]
    return {**inputs, **join_vision(row, family)}


def _pictures_of_row(prompts, ids, kind, family, config):
    """(tensors, number of features) of each picture of the row; None where they do not fit the placeholders."""
    found = []
    for prompt, tokens in zip(prompts, ids, strict=True):
        tensors = {name: tensor for name, tensor in prompt.items() if _kind_of(name) == kind}
        if PIXELS[kind] not in tensors:
            if tensors:
                return None
            continue
        places = int((tokens == getattr(config, family.video_token if kind == "video" else "image_token_id")).sum())
        pictures = None if family.pictures is None else family.pictures(tensors, kind, config)
        if pictures is None:
            pictures = [(tensors, places)]
        if sum(count for _, count in pictures) != places:
            return None  # the model will say so
        found += pictures
    return found


def _different(pictures):
    """(the different ones, in order; for each picture its place among them). Of one number of features: prompts taken whole
    may have fewer places than their pixels make features, which is for the model to say."""
    different, places, known = [], [], {}
    for tensors, count in pictures:
        alike = known.setdefault((count, *_sample(tensors)), [])
        place = next((place for place in alike if _equal(different[place][0], tensors)), None)
        if place is None:
            place = len(different)
            different.append((tensors, count))
            alike.append(place)
        places.append(place)
    return different, places


def _sample(tensors):
    """What equal tensors have in common: names, shapes, types and some of their values."""
    return tuple((name, tensor.shape, tensor.dtype, _some(tensor)) for name, tensor in sorted(tensors.items()))


def _some(tensor):
    steps = [max(size // 8, 1) for size in tensor.shape]
    return tuple(tensor[tuple(slice(step // 2, None, step) for step in steps)].flatten().tolist())


def _equal(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def _kind_of(name):
    return "video" if "video" in name else "image"

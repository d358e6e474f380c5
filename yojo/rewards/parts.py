"""Chat messages of trainers whose parts hold images and videos, in the form that `yojo.Example` takes."""

import os

from yojo.inputs.lookup import find_image, find_videos
from yojo.inputs.messages import KINDS

# Of a part with an image or video: how large the policy's own processor makes it, which is not the judge's business.
_SIZES = ("min_pixels", "max_pixels", "total_pixels", "resized_height", "resized_width")
_SIZES += ("fps", "nframes", "min_frames", "max_frames")


def taken(messages):
    """Chat messages with every part of an image or video as {"type": kind, kind: source}.

    Args:
        messages: list of dicts with `role` and `content`, a string or a list of parts; a part of an image or video has it under
            its kind, or as `bytes` or `path`, and may say how large the policy sees it.

    Returns:
        list of new dicts; sources are paths, bytes, PIL images, arrays, `yojo.inputs.videos.Video`s.

    Raises:
        ValueError: a file that is not there, a URL, or a part that says more, of which a judge would see nothing.
    """
    return [
        turn if isinstance(turn["content"], str) else {**turn, "content": [_part(part) for part in turn["content"]]}
        for turn in messages
    ]


def _part(part):
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in KINDS:
        return part
    part = {name: value for name, value in part.items() if value is not None and name not in _SIZES}
    source = part.pop(kind, None)
    for name in ("bytes", "path"):  # they stay beside the image that was made of them
        held = part.pop(name, None)
        source = held if source is None else source
    if set(part) != {"type"}:
        more = ", ".join(sorted(set(part) - {"type"}))
        raise ValueError(f"a part of type {kind} has {more}, of which the judge would see nothing")
    if kind == "video":
        (source,) = find_videos([source], None, "")
    elif isinstance(source, (str, os.PathLike)):
        source = find_image(source, "", False, kind)
    return {"type": kind, kind: source}

"""What a record, or what an example shows a model, is told from others by: digests of content, whatever it lies in."""

import hashlib
import io
import json
import os

import numpy as np

from yojo.inputs.images import as_numpy, is_array, pixel_lock
from yojo.inputs.lookup import find_image
from yojo.inputs.videos import Video, frame_files

SIZE = 16  # bytes of a digest: of a billion different contents, two have the same one with a chance of 1e-21
_CHUNK = 1 << 20


def digest(value):
    """Digest of a value: None, bools, numbers, strings, bytes, lists, dicts, arrays, tensors, PIL images, at any depth.

    Equal values have equal digests in every process and on every machine, and the order of a dict's keys does not count.
    1, 1.0, True and "1" are different; tuples are lists.

    Returns:
        str of 32 hexadecimal digits.

    Raises:
        TypeError: a value of another type.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), default=_tagged)
    return hashlib.blake2b(text.encode(), digest_size=SIZE).hexdigest()


_TAG = "\0"  # a key that no record has


def _tagged(value):
    """What JSON lacks, as JSON that nothing else becomes."""
    if isinstance(value, (bytes, bytearray, memoryview)):
        return {_TAG: "bytes", "is": _stream_digest(io.BytesIO(value))}
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if is_array(value):
        array = np.ascontiguousarray(as_numpy(value))
        if array.dtype.kind == "O":
            return array.tolist()
        return {_TAG: "array", "of": [array.dtype.str, *array.shape], "is": _stream_digest(io.BytesIO(array.tobytes()))}
    if hasattr(value, "isoformat"):  # dates and times, which tables in memory hold
        return {_TAG: type(value).__name__, "is": value.isoformat()}
    if type(value).__name__ == "Decimal":
        return {_TAG: "Decimal", "is": str(value)}
    if hasattr(value, "tobytes") and hasattr(value, "mode"):
        with pixel_lock():
            return _tagged_image(value)
    raise TypeError(f"a record holds a {type(value).__name__}, which has no digest")


def _tagged_image(image):
    """A PIL image: its pixels and what changes how they are seen."""
    transparency = image.info.get("transparency")
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # damaged EXIF data do not count, see `yojo.inputs.images`
        orientation = None
    return {
        _TAG: "image",
        "of": [image.mode, *image.size, getattr(image, "n_frames", 1), str(orientation)],
        "is": _stream_digest(io.BytesIO(image.tobytes())),
        "palette": image.getpalette("RGBA") if image.mode in ("P", "PA") else None,
        "transparency": transparency if isinstance(transparency, (bytes, int, type(None))) else str(transparency),
    }


def media_digest(source):
    """Digest of what an image or a video of an `Example` holds, by content: the same for a path and for its bytes.

    Args:
        source: whatever `Example.images` or `Example.videos` take.

    Returns:
        str.

    Raises:
        OSError: a file that cannot be read.
    """
    if isinstance(source, Video):
        return digest(["video", media_digest(source.source), source.fps])
    if isinstance(source, (str, os.PathLike)):
        path = os.fsdecode(source)
        if path.startswith("data:"):
            return _stream_digest(io.BytesIO(find_image(path, "", False, "image")))
        if os.path.isdir(path):
            return digest(["frames", *(_file_digest(file) for file in frame_files(path))])
        return _file_digest(path)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _stream_digest(io.BytesIO(source))
    if isinstance(source, (list, tuple)):
        return digest(["frames", *map(media_digest, source)])
    return digest(source)


def media_stamp(source):
    """What tells without reading it that a source is the file it was: its path, size, times and inode.

    Returns:
        list; None for what is no file.

    Raises:
        OSError: it is not there.
    """
    if isinstance(source, Video):
        inner = media_stamp(source.source)
        return None if inner is None else [inner, source.fps]
    if isinstance(source, (list, tuple)):
        found = [media_stamp(one) for one in source]
        return None if None in found else found
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = os.fsdecode(source)
    if path.startswith("data:"):
        return None
    files = [path, *map(os.fspath, frame_files(path))] if os.path.isdir(path) else [path]
    stats = map(os.stat, files)
    return [path, *([s.st_size, s.st_mtime_ns, s.st_ctime_ns, s.st_ino] for s in stats)]


def example_key(example):
    """Digest of what an example shows a model: prompt, responses in their order, tools, and the content of its media.

    Rankings and id do not count, nor does where a file lies.

    Args:
        example: `yojo.Example`.

    Returns:
        str of 32 hexadecimal digits.

    Raises:
        OSError: a file that cannot be read.
    """
    prompt = example.prompt
    if not isinstance(prompt, str):
        prompt = [_turn(turn) for turn in prompt]
    return digest(
        {
            "prompt": prompt,
            "responses": list(example.responses),
            "images": list(map(media_digest, example.images)),
            "videos": list(map(media_digest, example.videos)),
            "tools": None if example.tools is None else list(example.tools),
            "literal_tags": example.literal_tags,
        }
    )


def example_stamp(example):
    """Digest of what tells without reading them that an example's files are those they were.

    Returns:
        str; "" for an example whose media are no files (its record holds them), or that has none.

    Raises:
        OSError: a file that is not there.
    """
    found = [media_stamp(source) for source in media_of(example)]
    return "" if None in found or not found else digest(found)


def media_of(example):
    """list of the images and videos of an example, those in the parts of its messages too."""
    inline = [
        part[part["type"]]
        for turn in (() if isinstance(example.prompt, str) else example.prompt)
        for part in (turn["content"] if isinstance(turn["content"], list) else ())
        if isinstance(part, dict) and part.get("type") in ("image", "video") and part.get(part["type"]) is not None
    ]
    return [*example.images, *example.videos, *inline]


def _turn(turn):
    if not isinstance(turn["content"], list):
        return turn
    return {**turn, "content": [_part(part) for part in turn["content"]]}


def _part(part):
    kind = part.get("type") if isinstance(part, dict) else None
    if kind not in ("image", "video") or part.get(kind) is None:
        return part
    return {**part, kind: media_digest(part[kind])}


def _file_digest(path):
    with open(path, "rb") as file:
        return _stream_digest(file)


def _stream_digest(file):
    state = hashlib.blake2b(digest_size=SIZE)
    while chunk := file.read(_CHUNK):
        state.update(chunk)
    return state.hexdigest()

"""What a record, or what an example shows a model, is told from others by: digests of content, whatever it lies in."""

import hashlib
import io
import os

import numpy as np

from yojo.inputs.images import as_numpy, is_array
from yojo.inputs.lookup import find_image
from yojo.inputs.videos import Video, frame_files

SIZE = 16  # bytes of a digest: of a billion different contents, two have the same one with a chance of 1e-21
_CHUNK = 1 << 20


def digest(value):
    """Digest of a value: None, bools, numbers, strings, bytes, lists, dicts, arrays, tensors, PIL images, at any depth.

    Equal values have equal digests in every process and on every machine, and the order of a dict's keys does not count.
    1 and 1.0 are different, as are a list and a string that spells it; tuples are lists.

    Returns:
        str of 32 hexadecimal digits.

    Raises:
        TypeError: a value of another type.
    """
    state = hashlib.blake2b(digest_size=SIZE)
    _feed(state, value)
    return state.hexdigest()


def _feed(state, value):
    if value is None or isinstance(value, bool):
        _put(state, "c", repr(value).encode())
    elif isinstance(value, str):
        _put(state, "s", value.encode("utf-8", "surrogatepass"))
    elif isinstance(value, (bytes, bytearray, memoryview)):
        _put(state, "b", value)
    elif isinstance(value, int):
        _put(state, "i", repr(int(value)).encode())
    elif isinstance(value, float):
        _put(state, "f", float(value).hex().encode())
    elif isinstance(value, (list, tuple)):
        _put(state, "l", str(len(value)).encode())
        for item in value:
            _feed(state, item)
    elif isinstance(value, dict):
        _put(state, "d", str(len(value)).encode())
        for key in sorted(value, key=str):
            _feed(state, str(key))
            _feed(state, value[key])
    elif isinstance(value, os.PathLike):
        _feed(state, os.fspath(value))
    elif is_array(value):
        array = np.ascontiguousarray(as_numpy(value))
        if array.dtype.kind == "O":
            _feed(state, array.tolist())
        else:
            _put(state, "a", f"{array.dtype.str} {array.shape}".encode())
            _put(state, "b", array.tobytes())
    elif hasattr(value, "isoformat"):  # dates and times, which tables in memory hold
        _put(state, "t", value.isoformat().encode())
    elif hasattr(value, "tobytes") and hasattr(value, "mode"):
        _feed_image(state, value)
    elif type(value).__name__ == "Decimal":
        _put(state, "n", str(value).encode())
    else:
        raise TypeError(f"a record holds a {type(value).__name__}, which has no digest")


def _feed_image(state, image):
    """A PIL image: its pixels and what changes how they are seen."""
    _put(state, "p", f"{image.mode} {image.size}".encode())
    _put(state, "b", image.tobytes())
    if image.mode == "P":
        _put(state, "b", bytes(image.getpalette("RGBA") or b""))
    transparency = image.info.get("transparency")
    _feed(state, transparency if isinstance(transparency, (int, bytes, tuple, type(None))) else str(transparency))
    try:
        _feed(state, image.getexif().get(0x0112))
    except Exception:  # damaged EXIF data do not count, see `yojo.inputs.images`
        _feed(state, None)


def _put(state, kind, data):
    data = memoryview(data)
    state.update(f"{kind}{data.nbytes}:".encode())
    state.update(data)


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
    found = [media_stamp(source) for source in _media(example)]
    return "" if None in found or not found else digest(found)


def _media(example):
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

"""What the header of an image file says, read before any decoder allocates or inflates what it promises.

Decoders trust files: Pillow's plugins inflate a PNG's texts, loop over a JPEG's markers byte by byte, make a tuple for
each strip of a TIFF, and reserve a WebP's canvas, all in `Image.open`. So each format is walked here first, in steps
whose number is bounded, and only what passes is shown to Pillow, which has the last word on format and size. No pixel
is decoded.
"""

import io
import re
import struct
import typing
import zlib

from yojo.serving.errors import ApiError

FORMATS = ("PNG", "JPEG", "WebP", "GIF", "BMP", "TIFF")
MOST_CHUNKS = 20_000  # of a PNG; at 4 KiB each they are 80 MB
MOST_INFLATED = 4 << 20  # bytes of a PNG's compressed texts and colour profile, all together
MOST_BLOCKS = 200_000  # of a GIF; at their usual 255 bytes they are 51 MB
MOST_SEGMENTS = 1_000  # of a JPEG, and chunks of a WebP
MOST_SCANS = 100  # of a progressive JPEG, each of which passes over all pixels; encoders write about ten
MOST_EXIF = 16  # segments of a JPEG, which Pillow joins one by one
MOST_JUNK = 1 << 16  # bytes between the segments of a JPEG
MOST_TAGS, MOST_VALUES = 1_000, 70_000  # of a TIFF's directory, and of one tag that is not bytes

_MAGIC = (
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"\xff\xd8\xff", "JPEG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
    (b"II*\0", "TIFF"),
    (b"MM\0*", "TIFF"),
)


class Header(typing.NamedTuple):
    """What an image is, without its pixels.

    Attributes:
        format: Pillow's name of it: "PNG", "JPEG" ("MPO" where further pictures follow, which do not count), "WEBP",
            "GIF", "BMP" or "TIFF".
        width, height: pixels, as stored; EXIF data may turn them.
    """

    format: str
    width: int
    height: int


class _Complex(Exception):
    """More parts than any honest file has."""


def check_image(data, limits, param=None):
    """Refuse an image file by its header.

    Args:
        data: bytes of a file.
        limits: `Limits`, of which image_bytes and pixels count here.
        param: the field that errors name.

    Returns:
        `Header`.

    Raises:
        ApiError: image_too_large, image_format (none of `FORMATS`), image_unreadable, image_empty (0 pixels),
            image_too_many_pixels, image_frames (an animation, several pages) or image_complex (a header that costs
            more to read than any picture's should).
    """
    if len(data) > limits.image_bytes:
        raise too_large(limits, param)
    kind = _format(data)
    if kind is None:
        raise ApiError(422, "image_format", f"the image is none of {', '.join(FORMATS)}", param)
    try:
        width, height, frames = _WALKS[kind](data)
    except _Complex:
        raise ApiError(
            422, "image_complex", "the image's header holds more than a picture needs: save it anew", param
        ) from None
    except (struct.error, IndexError):
        raise _unreadable(param) from None
    _check_size(width, height, limits, param)
    if frames > 1:
        raise ApiError(
            422, "image_frames", "the image holds several frames or pages: send one, or all as frames of a video", param
        )
    header = _by_pillow(data, kind, param)
    _check_size(header.width, header.height, limits, param)
    return header


def too_large(limits, param=None):
    """The error of an image of too many bytes."""
    return ApiError(413, "image_too_large", f"an image may have {limits.image_bytes} bytes at most", param)


def _unreadable(param):
    return ApiError(422, "image_unreadable", "the image's header cannot be read: the file is damaged or cut off", param)


def _format(data):
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    return next((kind for magic, kind in _MAGIC if data.startswith(magic)), None)


def _check_size(width, height, limits, param):
    if not width or not height:
        raise ApiError(422, "image_empty", "the image has no pixels: its width or height is 0", param)
    if width * height > limits.pixels:
        raise ApiError(
            413,
            "image_too_many_pixels",
            f"an image may have {limits.pixels} pixels at most, this one has {width} x {height}: scale it down",
            param,
        )


def _by_pillow(data, kind, param):
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data), formats=[kind]) as image:
            return Header(image.format, image.width, image.height)
    except Exception:  # decoders raise anything
        raise _unreadable(param) from None


def _png(data):
    (length,) = struct.unpack_from(">I", data, 8)
    if data[12:16] != b"IHDR" or length != 13:
        raise struct.error
    width, height = struct.unpack_from(">II", data, 16)
    frames, at, left = 1, 8, MOST_INFLATED
    for _ in range(MOST_CHUNKS):
        if at + 8 > len(data):
            break
        length, name = struct.unpack_from(">I4s", data, at)
        if name == b"IEND":
            break
        if name == b"acTL":
            frames = max(frames, struct.unpack_from(">I", data, at + 8)[0])
        elif name in (b"zTXt", b"iTXt", b"iCCP"):
            left -= _inflated(name, data[at + 8 : at + 8 + length], left)
        at += 12 + length
    else:
        raise _Complex
    return width, height, frames


def _inflated(name, chunk, left):
    """Bytes that a compressed text or profile becomes; more than are left is too much."""
    _, _, rest = chunk.partition(b"\0")
    if name == b"iTXt":  # flag, method, language, 0, translated keyword, 0, text
        rest = rest[2:].split(b"\0", 2)[-1] if rest[:1] == b"\1" else b""
    else:
        rest = rest[1:]
    inflate = zlib.decompressobj()
    try:
        size = len(inflate.decompress(rest, left + 1))
    except zlib.error:  # Pillow passes over it, or refuses the file
        return 0
    if size > left:
        raise _Complex
    return size


def _gif(data):
    width, height, flags = struct.unpack_from("<HHB", data, 6)
    at = 13 + (3 << (flags & 7) + 1 if flags & 128 else 0)
    frames = blocks = 0
    while at < len(data) and frames < 2:
        mark, at, blocks = data[at], at + 1, blocks + 1
        if mark == 0x3B:
            break
        if mark == 0x21:
            at += 1
        elif mark == 0x2C:
            left, top, wide, high, flags = struct.unpack_from("<HHHHB", data, at)
            if not frames:  # which Pillow lets outgrow the screen
                width, height = max(width, left + wide), max(height, top + high)
            frames += 1
            at += 10 + (3 << (flags & 7) + 1 if flags & 128 else 0)
        elif blocks > MOST_BLOCKS:
            raise _Complex
        else:
            continue
        while at < len(data) and data[at]:
            at, blocks = at + 1 + data[at], blocks + 1
            if blocks > MOST_BLOCKS:
                raise _Complex
        at += 1
    return width, height, frames


# A marker of a JPEG; in the coded data 0 and the restart markers follow 255, too.
_MARKER = re.compile(rb"\xff[^\x00\xff]", re.DOTALL)
_AFTER_SCAN = re.compile(rb"\xff[^\x00\xd0-\xd7\xff]", re.DOTALL)
_FRAMES = {0xC0, 0xC1, 0xC2, 0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF, 0xDE}


def _jpeg(data):
    width = height = scans = junk = exif = 0
    at, known = 2, False
    for _ in range(MOST_SEGMENTS):
        found = (_AFTER_SCAN if scans else _MARKER).search(data, at)
        if found is None or found[0][1] == 0xD9:
            break
        junk += 0 if scans else found.start() - at
        mark, at = found[0][1], found.end()
        if mark in (0x01, 0xD8) or 0xD0 <= mark <= 0xD7:
            continue
        (length,) = struct.unpack_from(">H", data, at)
        if mark in _FRAMES:
            high, wide = struct.unpack_from(">HH", data, at + 3)
            if not known or wide * high > width * height:
                width, height, known = wide, high, True
        scans += mark == 0xDA
        exif += mark == 0xE1 and data[at + 2 : at + 6] == b"Exif"
        if scans > MOST_SCANS or exif > MOST_EXIF or junk > MOST_JUNK:
            raise _Complex
        at += max(length, 2)
    else:
        raise _Complex
    if not scans and len(data) - at > MOST_JUNK:
        raise _Complex
    if not known:
        raise struct.error
    return width, height, 1


def _webp(data):
    width = height = frames = 0
    at = 12
    for _ in range(MOST_SEGMENTS):
        if at + 8 > len(data) or frames > 1:
            break
        name, length = struct.unpack_from("<4sI", data, at)
        body = at + 8
        wide = high = 0
        if name == b"VP8X":
            wide, high = (int.from_bytes(data[body + i : body + i + 3], "little") + 1 for i in (4, 7))
        elif name == b"VP8 ":
            wide, high = (side & 0x3FFF for side in struct.unpack_from("<HH", data, body + 6))
        elif name == b"VP8L":
            (bits,) = struct.unpack_from("<I", data, body + 1)
            wide, high = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        frames += name == b"ANMF"
        width, height = max(width, wide), max(height, high)
        at = body + length + (length & 1)
    else:
        raise _Complex
    return width, height, frames


def _bmp(data):
    (size,) = struct.unpack_from("<I", data, 14)
    if size == 12:
        return *struct.unpack_from("<HH", data, 18), 1
    width, height = struct.unpack_from("<ii", data, 18)
    if struct.unpack_from("<I", data, 30)[0] not in (0, 3):
        raise _Complex  # run lengths, which Pillow decodes a byte at a time, and files of other formats inside
    if width < 0:
        raise struct.error
    return width, abs(height), 1


_TIFF_SIZES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}


def _tiff(data):
    order = "<" if data[:2] == b"II" else ">"
    (at,) = struct.unpack_from(f"{order}I", data, 4)
    (count,) = struct.unpack_from(f"{order}H", data, at)
    if count > MOST_TAGS:
        raise _Complex
    values, total = {}, 0
    for i in range(count):
        tag, kind, number = struct.unpack_from(f"{order}HHI", data, at + 2 + 12 * i)
        total += number * _TIFF_SIZES.get(kind, 0)
        # Tags may share their bytes, so a small file can hold any number of them; each is read, and made a tuple of.
        if total > len(data) or (number > MOST_VALUES and kind not in (1, 2, 6, 7)):
            raise _Complex
        if number == 1 and kind in (3, 4) and tag not in values:
            (values[tag],) = struct.unpack_from(order + ("H" if kind == 3 else "I"), data, at + 10 + 12 * i)
    (following,) = struct.unpack_from(f"{order}I", data, at + 2 + 12 * count)
    width, height = values.get(256, 0), values.get(257, 0)
    # A decoder reserves whole tiles: one that is larger than the picture is as good as a larger picture.
    width, height = max(width, values.get(322, 0)) if width else 0, max(height, values.get(323, 0)) if height else 0
    return width, height, 2 if 0 < following < len(data) else 1


_WALKS = {"PNG": _png, "JPEG": _jpeg, "WEBP": _webp, "GIF": _gif, "BMP": _bmp, "TIFF": _tiff}

"""Read one image of an example as a person sees it, in plain RGB, or say what is wrong with it.

One rule for each of Pillow's modes, the same whether the image comes as a PIL image, a path, the bytes of a file or (where
an array alone says enough) an array:

| mode | the picture |
| --- | --- |
| `1`, `L`, `RGB` | as it is; with a transparent colour (`info["transparency"]`: PNG), that colour has alpha 0 |
| `P` | the palette's colours; transparent entries (GIF, PNG) and palettes with alpha count as alpha |
| `LA`, `La`, `PA`, `RGBA`, `RGBa` | laid over a background, see below; exactly the colours where all is opaque |
| `RGBX`, `CMYK`, `YCbCr`, `HSV`, `LAB` | as Pillow converts them (X is ignored; colour profiles and gamma are not applied) |
| `I;16`, `I;16L`, `I;16B`, `I;16N`, `I` | 16-bit gray, 0 black to 65535 white; its high byte, as of 16-bit colour |
| `F` | gray, 0 to 1 or (where a value is at least 16) 0 to 255 |

Integers and floats that fill less than a sixteenth of their range are refused (12 bits in 16, say, which would be black
throughout), as is everything outside of it and NaN: how they are meant, only their owner knows.

Arrays and tensors are [height, width] or [height, width, channels] with 1 (gray), 2 (gray, alpha), 3 (RGB) or 4 (RGB,
alpha) channels; [channels, height, width] where it can be nothing else, as torchvision reads images. bool, uint8, uint16
and int32 (16 bits, as above), and floats. What the array of a PIL image does not say is taken so: `P` as gray, `CMYK`,
`RGBX` and `RGBa` as RGBA, other modes of three channels as RGB, and the transparent colour is lost.

The background is white, as in most viewers, unless more than 1/64 of the outline of what is visible would vanish in it
(white strokes on nothing): then black, then gray (128), the first in which it does not; where it does in all three, that in
which the least of it does. An image that is transparent throughout is white, and refused where it hides different colours.

A truncated file is refused (unless `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` says otherwise, which is Pillow's switch to set).
A file or a PIL image with several frames or pages (GIF, APNG, WebP, TIFF...) is refused, since all but one would be left
out: it is a video, or one frame has to be picked. The further pictures of an MPO (stereo, previews) and the layers of a PSD
are left alone. Images are turned upright where their EXIF data say so; EXIF data that are damaged do not count.
"""

import contextlib
import io
import os
import re
import threading

import numpy as np
import torch

BACKGROUNDS = (255, 0, 128)  # in order of preference
VANISHED = 1 / 64  # of the outline of what is visible
NOT_FRAMES = ("MPO", "PSD")  # formats whose first picture is the whole one
FULL_RANGE = {"uint16": 65535, "int32": 65535}

# Pillow reads the file of a lazily opened image when somebody first wants its pixels, and takes no care of threads.
_lock = threading.Lock()


def _renew_lock():
    """In a forked process (a loader's worker), where nobody is left to release it."""
    global _lock
    _lock = threading.Lock()


def pixel_lock():
    """What whoever reads the pixels, the frames or the EXIF data of a PIL image holds, which other threads may read, too."""
    return _lock


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_lock)


class Refused(ValueError):
    """An image that can be read, but not as one picture; the message goes on a sentence that begins with its name."""


def load_image(source, name):
    """Read one image as plain RGB, by the rule of this module.

    Args:
        source: a PIL image, a path, the bytes of an image file, or an array or tensor (see above).
        name: how errors name it, such as "example 3: image 0".

    Returns:
        A PIL image in mode RGB that nobody else holds, with nothing in its `info`.

    Raises:
        TypeError: none of these.
        ValueError: a missing, unreadable, truncated or zero-sized image; a URL; several frames; values whose range does
            not say what they mean.
    """
    from PIL import Image

    if is_array(source):
        return picture(read_array(source, 3, name), name)
    if isinstance(source, Image.Image):
        with readable(name), pixel_lock():  # a copy: what is given may be shared with other threads
            image, key, orientation = _decoded(source, own=False)
        what = name
    else:
        file, what = file_of(source, name)
        with readable(what), Image.open(file) as opened:
            image, key, orientation = _decoded(opened, own=True)
    with readable(what):
        image = _upright(_as_seen(image, key), orientation)
        image.info = {}  # processors would act on it: a transparent colour left there is painted white
    return image


def image_size(source):
    """(height, width) of what `load_image` takes, without decoding it; None where that does not work, as it will say."""
    from PIL import Image

    try:
        if isinstance(source, Image.Image):
            return source.height, source.width
        if is_array(source):
            shape = np.shape(source)
            return shape[1:3] if _channels_first(shape, 3) else shape[:2]
        file, _ = file_of(source, "image")
        with Image.open(file) as image:
            return image.height, image.width
    except Exception:  # decoders raise anything
        return None


def is_array(source):
    """Whether a source is an array or tensor rather than a PIL image, a path or bytes."""
    from PIL import Image

    others = (Image.Image, bytes, bytearray, memoryview, str, os.PathLike, list, tuple)
    return isinstance(source, torch.Tensor) or (hasattr(source, "__array__") and not isinstance(source, others))


def as_numpy(source):
    """An array or tensor from anywhere as a numpy array."""
    if not isinstance(source, torch.Tensor):
        return np.asarray(source)
    source = source.detach().cpu()
    return (source.float() if source.dtype == torch.bfloat16 else source).numpy()


def read_array(source, ndim, name):
    """An array of pixels as uint8, channels last.

    Args:
        source: array or tensor, [height, width] or [height, width, channels], or channels first (see above); with
            `ndim` 4, frames of these.
        ndim: 3 for an image, 4 for frames: how many dimensions there are with channels.
        name: how errors name it.

    Returns:
        [(frames,) height, width, channels] uint8 array, 1 to 4 channels.

    Raises:
        ValueError: another shape, nothing in it, or values of another type or range.
    """
    with readable(name):
        array = as_numpy(source)
        if array.ndim == ndim - 1 and not (ndim == 4 and array.shape[-1] in (1, 3, 4)):
            array = array[..., None]
        elif array.ndim == ndim and _channels_first(array.shape, ndim):
            array = np.moveaxis(array, -3, -1)
        if array.ndim != ndim or not 1 <= array.shape[-1] <= 4:
            expected = (
                "[height, width] or [height, width, 1 to 4 channels]" if ndim == 3 else "[frames, height, width, 3]"
            )
            raise Refused(f"must be {expected} as an array, channels last, got {list(array.shape)} {array.dtype}")
        if 0 in array.shape:
            if ndim == 4 and not len(array):
                raise Refused(f"has no frames: an array of shape {list(array.shape)}")
            raise Refused(f"is zero-sized: {array.shape[-2]} x {array.shape[-3]} pixels")
        return _eight_bits(array)


def picture(array, name):
    """A [height, width, channels] uint8 array, 1 to 4 channels, as a PIL image in mode RGB."""
    from PIL import Image

    array = np.ascontiguousarray(array[..., 0] if array.shape[-1] == 1 else array)
    with readable(name):
        image = _as_seen(Image.fromarray(array), None)
        image.info = {}
    return image


@contextlib.contextmanager
def readable(what):
    """Whatever a decoder raises inside becomes a ValueError that names `what`."""
    try:
        yield
    except Refused as error:
        raise ValueError(f"{what} {error}") from error
    except Exception as error:  # struct.error, RuntimeError, KeyError...: broken data come out of decoders as anything
        reason = re.sub(r" <_io\.BytesIO object at [^>]*>", "", str(error))  # whose address tells nobody anything
        raise ValueError(f"{what} is not a readable image: {reason or type(error).__name__}") from error


def file_of(source, name):
    """(a path or an `io.BytesIO`, which Pillow opens; how errors name it) of a path or the bytes of a file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return io.BytesIO(source), f"{name}: {len(source)} bytes"
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"{name} must be a PIL image, a path, bytes or an array, got {type(source).__name__}")
    path = os.fsdecode(source)
    if path.startswith(("http://", "https://")):
        raise ValueError(f"{name}: {path} is a URL; download it first, nothing is fetched here")
    if not os.path.exists(path):
        raise ValueError(f"{name}: no such file: {path}")
    return path, f"{name}: {path}"


def _decoded(image, own):
    """(copy of the decoded image, its transparent colour or None, its EXIF orientation or None)."""
    if 0 in image.size:
        raise Refused(f"is zero-sized: {image.size[0]} x {image.size[1]} pixels")
    key = _transparent_colour(image)  # before loading, which forgets how the pixels were stored
    if getattr(image, "tile", None):
        _check_end(image)
    image.load()
    frames = _frames(image, own)
    if frames > 1:
        raise Refused(
            f"holds {frames} frames or pages, an image is one: give them as a video (videos=[[frame, ...]]), or pick one, "
            "in PIL with image.seek(i) and image.copy()"
        )
    try:
        orientation = image.getexif().get(0x0112)
    except Exception:  # the picture is there, whatever has become of its EXIF data
        orientation = None
    return image.copy(), key, orientation


def _check_end(image):
    """Refuse the truncated files that Pillow reads as whole, without a word."""
    if image.format not in ("JPEG2000", "PCX"):
        return
    at = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(at)
    if image.format == "JPEG2000" and b"\xff\xd9" not in content:  # no data of pixels can spell this marker
        raise Refused("is truncated: the end of its code stream is missing")
    # Pixels of one byte have their palette behind them; without it they would be taken for gray.
    if image.format == "PCX" and image.mode == "L" and content[-769:-768] != b"\x0c":
        raise Refused("is truncated: the palette at its end is missing")


def _frames(image, own):
    if image.format in NOT_FRAMES:
        return 1
    try:
        return image.n_frames if getattr(image, "is_animated", False) else 1
    except ValueError:
        if own:
            raise
        return 1  # loaded, and its file closed since: what there is, is one frame


def _transparent_colour(image):
    """`info["transparency"]` of a PNG in mode 1, L, RGB or I;16 in units of the decoded pixels."""
    key = image.info.get("transparency")
    if key is None or image.mode not in ("1", "L", "RGB", "I;16"):
        return None
    fits = isinstance(key, tuple) and len(key) == 3 if image.mode == "RGB" else isinstance(key, int)
    if not fits:
        return None  # left over from another mode (a channel of an RGB image, say): it names no pixel here
    stored = image.tile[0][3] if getattr(image, "tile", None) else None
    stored = stored[0] if isinstance(stored, tuple) and stored else stored
    if image.mode == "RGB" and (stored == "RGB;16B" or max(key) > 255):
        return tuple(value >> 8 for value in key)  # of 16-bit colours the high byte is decoded
    return key * {"1": 255, "L;2": 85, "L;4": 17}.get(image.mode if image.mode == "1" else stored, 1)


def _as_seen(image, key):
    from PIL import Image

    pixels = None if key is None else np.asarray(image)
    if image.mode != "P":
        image.info = {}  # of which Pillow, too, makes something of its own when it converts
    if image.mode == "F" or image.mode.startswith("I"):
        image = Image.fromarray(_eight_bits(np.asarray(image)[..., None])[..., 0])
    if pixels is not None:
        # In mode 1 pixels are bool; a colour of another length than the pixels' raises.
        hidden = (pixels * 255 if pixels.dtype == bool else pixels) == np.asarray(key)
        hidden = hidden.all(-1) if hidden.ndim == 3 else hidden
        image = image.convert("RGB")
        image.putalpha(Image.fromarray(np.where(hidden, 0, 255).astype(np.uint8)))
        return _flat(image)
    if image.mode == "La":  # Pillow goes no straight way from here
        image = image.convert("LA")
    if image.mode in ("LA", "PA", "RGBA", "RGBa") or (image.mode == "P" and _has_alpha(image)):
        return _flat(image.convert("RGBA"))
    return image.convert("RGB")


def _has_alpha(image):
    return "transparency" in image.info or (image.palette is not None and image.palette.mode.endswith("A"))


def _flat(image):
    """An RGBA image as RGB over the background that shows it."""
    from PIL import Image

    low, high = image.getchannel("A").getextrema()
    colours = image.convert("RGB")
    if low == 255:
        return colours
    if high == 0 and any(low < high for low, high in colours.getextrema()):
        raise Refused(
            "is transparent throughout, yet hides different colours: if they are meant, drop its alpha channel"
        )
    shade = BACKGROUNDS[0] if high == 0 else _background(np.asarray(image))
    return Image.alpha_composite(Image.new("RGBA", image.size, (shade, shade, shade, 255)), image).convert("RGB")


def _background(rgba):
    """The shade of gray in which the outline of what is visible does not vanish. rgba: [height, width, 4] uint8."""
    pairs = [_steps(rgba[1:], rgba[:-1]), _steps(rgba[:, 1:], rgba[:, :-1])]
    one, other = (np.concatenate(side).astype(np.int32) for side in zip(*pairs, strict=True))  # [pairs, 4]
    step = one[:, 3] - other[:, 3]
    if not len(step):
        return BACKGROUNDS[0]
    colour = one[:, :3] * one[:, 3:] - other[:, :3] * other[:, 3:]
    lost = []
    for shade in BACKGROUNDS:
        seen = abs(colour - shade * step[:, None]).max(1)  # 255 times the difference of two neighbours over the shade
        gone = seen * 8 < abs(step) * 255  # less than an eighth of what black and white would show
        lost.append(abs(step[gone]).sum() / abs(step).sum())
    best = next((i for i, share in enumerate(lost) if share <= VANISHED), None)
    return BACKGROUNDS[int(np.argmin(lost)) if best is None else best]


def _steps(one, other):
    """The neighbours that differ in alpha, [pairs, 4] and [pairs, 4]; of very many, every n-th."""
    at = np.flatnonzero(one[..., 3] != other[..., 3])
    at = at[:: len(at) // 1_000_000 + 1]
    return one.reshape(-1, 4)[at], other.reshape(-1, 4)[at]


def _eight_bits(array):
    """[..., channels] of any type that is understood -> uint8; the range is judged by the colours, alpha left out."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    full = FULL_RANGE.get(array.dtype.newbyteorder("=").name)
    if full is None and array.dtype.kind != "f":
        raise Refused(f"has pixels of type {array.dtype}: give uint8 in 0..255, uint16 in 0..65535 or floats in 0..1")
    if not np.isfinite(array).all():
        raise Refused("has values that are not finite (NaN or infinite): give uint8 in 0..255")
    low, high = array.min(), array.max()
    if full is None:
        full = 1 if high <= 1 else 255
    if low < 0 or high > full:
        raise Refused(
            f"has values from {low} to {high}, of type {array.dtype}, where 0..{'1 or 0..255' if full < 256 else full} is "
            "understood: scale them to uint8 in 0..255"
        )
    colours = array[..., :-1] if array.shape[-1] in (2, 4) else array
    brightest = colours.max()
    if 0 < brightest < full / 16:
        raise Refused(
            f"has values up to {brightest}, of type {array.dtype}, which is next to black where {full} is white: scale "
            "them to uint8 in 0..255 (or to all of their own range)"
        )
    if full == 65535:
        return (array >> 8).astype(np.uint8)
    return np.rint(array * (255 / full)).astype(np.uint8)


def _channels_first(shape, ndim):
    return len(shape) == ndim and shape[-3] in (1, 3, 4) and shape[-1] > 4


def _upright(image, orientation):
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(orientation) if isinstance(orientation, int) else None
    return image if turn is None else image.transpose(turn)

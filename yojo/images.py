"""Read one image of an example, or say what is wrong with it."""

import io
import os

import torch


def load_image(source, name):
    """Read one image as RGB.

    Args:
        source: a PIL image, a path, the bytes of an image file, or a [height, width, 3] uint8 array.
        name: how errors name it, such as "example 3: image 0".

    Returns:
        A PIL image in mode RGB, turned upright where its EXIF data say so.

    Raises:
        TypeError: none of these.
        ValueError: a missing, unreadable, truncated or zero-sized image, or a URL.
    """
    from PIL import Image, ImageOps

    if isinstance(source, Image.Image):
        image, what = source, "the image"
    elif isinstance(source, (bytes, bytearray)):
        image, what = _open_image(io.BytesIO(source), f"{name}: {len(source)} bytes"), "the image"
    elif isinstance(source, (str, os.PathLike)):
        what = os.fspath(source)
        if what.startswith(("http://", "https://")):
            raise ValueError(f"{name}: {what} is a URL; download it first, nothing is fetched here")
        if not os.path.exists(what):
            raise ValueError(f"{name}: no such file: {what}")
        image = _open_image(what, f"{name}: {what}")
    elif hasattr(source, "__array__") or isinstance(source, torch.Tensor):
        array = source.detach().cpu().numpy() if isinstance(source, torch.Tensor) else source.__array__()
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype.name != "uint8":
            raise ValueError(
                f"{name}: an array image must be [height, width, 3] uint8, got {list(array.shape)} {array.dtype}"
            )
        if 0 in array.shape:
            raise ValueError(f"{name} is zero-sized: {array.shape[1]} x {array.shape[0]} pixels")
        image, what = Image.fromarray(array), "the array"
    else:
        raise TypeError(f"{name} must be a PIL image, a path, bytes or an array, got {type(source).__name__}")
    if 0 in image.size:
        raise ValueError(f"{name} is zero-sized: {image.size[0]} x {image.size[1]} pixels")
    try:
        return ImageOps.exif_transpose(image).convert("RGB")
    except (OSError, SyntaxError, ValueError) as error:
        raise ValueError(f"{name}: {what} cannot be read: {error}") from error


def _open_image(file, what):
    from PIL import Image

    try:
        image = Image.open(file)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = str(error).replace(
            f" {file!r}", ""
        )  # the address of bytes in memory says nothing, and is never the same
        raise ValueError(f"{what} is not a readable image: {reason}") from error
    return image

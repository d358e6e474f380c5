"""Videos of an example: files, folders of frames, lists of frames; how far apart the frames stand, and what is wrong."""

import dataclasses
import math
import os
import re
import struct
import typing
from pathlib import Path

import numpy as np

from yojo.images import load_image

IMAGE_EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm")
# Of frames that come without a rate; the released code of the paper assumes as much.
SAMPLING_INTERVAL = 4.0


@dataclasses.dataclass(frozen=True)
class Video:
    """A video and how often it is sampled.

    Attributes:
        source: a video file; a folder of frames (image files, in natural order of their names); or a list of frames,
            each whatever `Example.images` takes.
        fps: frames per second that the model is shown: how close the given frames stand together or, for a file, how
            many are taken from it. None: frames stand 4 seconds apart, as in the paper's data, and a file is sampled
            as the processor does by default.
    """

    source: typing.Any
    fps: float | None = None

    def __post_init__(self):
        if self.fps is not None:
            if isinstance(self.fps, bool) or not isinstance(self.fps, (int, float)):
                raise TypeError(f"fps must be a number or None, got {self.fps!r}")
            if not 0 < self.fps < math.inf:
                raise ValueError(f"fps must be more than 0, got {self.fps}")
        if not isinstance(self.source, (str, os.PathLike, list, tuple)):
            raise TypeError(f"a video must be a path or a list of frames, got {type(self.source).__name__}")


def natural_key(path):
    """Sorting key that puts frame_10 behind frame_9."""
    pieces = re.split(r"([0-9]+)", os.fspath(path).lower())  # text and numbers take turns
    return [int(piece) if i % 2 else piece for i, piece in enumerate(pieces)]


def frame_files(folder):
    """The image files of a folder in natural order, hidden ones left out."""
    files = (Path(entry.path) for entry in os.scandir(folder) if entry.is_file() and not entry.name.startswith("."))
    return sorted((file for file in files if file.suffix.lower() in IMAGE_EXTENSIONS), key=natural_key)


def check_video(source, name):
    """Look at a video without decoding it.

    Args:
        source: a `Video` or one of its sources; anything else passes.
        name: how errors name it, such as "example 3: video 0".

    Returns:
        int: the number of frames of a folder or list, None for a file.

    Raises:
        ValueError: a missing file, a folder or list without frames, an empty or truncated file.
    """
    source = source.source if isinstance(source, Video) else source
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError(f"{name}: a video with no frames: the list is empty")
        return len(source)
    if not isinstance(source, (str, os.PathLike)):
        return None
    path = os.fspath(source)
    if path.startswith(("http://", "https://")):
        raise ValueError(f"{name}: {path} is a URL; download it first, videos are not fetched here")
    if os.path.isdir(path):
        count = len(frame_files(path))
        if not count:
            raise ValueError(
                f"{name}: a video with no frames: the folder {path} holds no image files ({', '.join(IMAGE_EXTENSIONS)})"
            )
        return count
    if not os.path.exists(path):
        raise ValueError(f"{name}: no such video: {path}")
    reason = _broken(path)
    if reason:
        raise ValueError(f"{name}: a video with no frames: {path} {reason}")
    return None


def load_video(source, name):
    """What a processor takes for a video.

    Args:
        source: a `Video` or one of its sources; anything else (decoded arrays, ...) is handed on.
        name: how errors name it.

    Returns:
        (video, metadata, fps): frames as a [frames, height, width, 3] uint8 array with their metadata, and fps None;
        or a path, metadata None, and the rate to sample it at, or None.

    Raises:
        ValueError: as `check_video`; a frame that cannot be read, or frames of different sizes.
    """
    if not isinstance(source, (Video, str, os.PathLike, list, tuple)):
        return source, None, None
    video = source if isinstance(source, Video) else Video(source)
    check_video(video, name)
    frames = video.source
    if isinstance(frames, (str, os.PathLike)):
        if not os.path.isdir(frames):
            return os.fspath(frames), None, video.fps
        frames = frame_files(frames)
    images = [load_image(frame, f"{name}: frame {i}") for i, frame in enumerate(frames)]
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        sizes = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise ValueError(f"{name}: all frames of a video must have one size, got {sizes}")
    fps = 1 / SAMPLING_INTERVAL if video.fps is None else video.fps
    metadata = {
        "total_num_frames": len(images),
        "fps": fps,
        "frames_indices": list(range(len(images))),
        "duration": len(images) / fps,
        "width": images[0].width,
        "height": images[0].height,
    }
    return np.stack([np.asarray(image) for image in images]), metadata, None


def decode_video(source, name):
    """Decode every frame of a folder or list, and the first of a file where PyAV or torchcodec is installed.

    Raises:
        ValueError: as `load_video`, or a file without a frame that can be decoded.
    """
    video, metadata, _ = load_video(source, name)
    if metadata is not None or not isinstance(video, str):
        return
    try:
        found = _first_frame(video)
    except ImportError:
        return
    except (IndexError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name}: {video} cannot be decoded: {error}") from error
    if found is None:
        raise ValueError(f"{name}: a video with no frames: {video}")


def _first_frame(path):
    try:
        import av
    except ImportError:
        try:
            from torchcodec.decoders import VideoDecoder
        except (OSError, RuntimeError) as error:  # torchcodec without its libraries
            raise ImportError(str(error)) from error
        decoder = VideoDecoder(path)
        return decoder[0] if len(decoder) else None
    with av.open(path) as container:
        return next(container.decode(video=0), None)


def _broken(path):
    """Why a file cannot hold a whole video, or None: size, and the boxes of the MP4 family, whose index may be missing."""
    size = os.path.getsize(path)
    if not size:
        return "is empty (0 bytes)"
    with open(path, "rb") as file:
        head = file.read(12)
        if head[4:8] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return None
        boxes, at = set(), 0
        while at + 8 <= size:
            file.seek(at)
            length, kind = struct.unpack(">I4s", file.read(8))
            if length == 1:
                wide = file.read(8)
                if len(wide) < 8:
                    return "is truncated"
                (length,) = struct.unpack(">Q", wide)
            elif length == 0:
                length = size - at
            if length < 8 or at + length > size:
                return f"is truncated: its {kind.decode('latin-1')!r} part should end at byte {at + length} of {size}"
            boxes.add(kind)
            at += length
    return None if boxes & {b"moov", b"moof"} else "is truncated: it has no index (moov)"

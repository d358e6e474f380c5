"""Videos of an example: files, folders, lists and arrays of frames; how far apart the frames stand, and what is wrong."""

import dataclasses
import math
import os
import re
import struct
import typing
import warnings
from pathlib import Path

import numpy as np

from yojo.inputs.images import as_numpy, is_array, load_image, picture, read_array

# fmt: off
IMAGE_EXTENSIONS = (  # of frames in a folder; one that cannot be read is an error, one of another name is not looked at
    ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm",
    ".pgm", ".pbm", ".pnm", ".jpe", ".jfif", ".jp2", ".avif", ".heic", ".tga", ".qoi",
)
# fmt: on
# Of frames that come without a rate; the released code of the paper assumes as much.
SAMPLING_INTERVAL = 4.0


@dataclasses.dataclass(frozen=True)
class Video:
    """A video and how often it is sampled.

    Attributes:
        source: a video file; a folder of frames (image files, in natural order of their names); a list of frames,
            each whatever `Example.images` takes; or an array or tensor of frames, [frames, height, width, channels]
            (channels first where it can be nothing else) with the types and channels of `yojo.inputs.images`.
        fps: frames per second that the model is shown: how close the given frames stand together or, for a file, how
            many are taken from it. None: frames stand 4 seconds apart, as in the paper's data, and a file is sampled
            as the processor does by default.
    """

    source: typing.Any
    fps: float | None = None

    def __post_init__(self):
        if self.fps is not None:
            if hasattr(self.fps, "item") and not getattr(self.fps, "ndim", 0):
                object.__setattr__(self, "fps", self.fps.item())
            if isinstance(self.fps, bool) or not isinstance(self.fps, (int, float)):
                raise TypeError(f"fps must be a number or None, got {self.fps!r}")
            if not 0 < self.fps < math.inf:
                raise ValueError(f"fps must be more than 0, got {self.fps}")
        if not _is_source(self.source):
            raise TypeError(
                f"a video must be a path, a list of frames or an array of them, got {type(self.source).__name__}"
            )


def _is_source(source):
    return isinstance(source, (str, os.PathLike, list, tuple)) or is_array(source)


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
        source: a `Video` or one of its sources.
        name: how errors name it, such as "example 3: video 0".

    Returns:
        int: the number of frames of a folder, list or array, None for a file.

    Raises:
        TypeError: none of these.
        ValueError: a missing file, a folder, list or array without frames, an empty or truncated file.
    """
    source = source.source if isinstance(source, Video) else source
    if not _is_source(source):
        raise TypeError(
            f"{name} must be a path of a file or a folder of frames, a list of frames or an array of them, "
            f"got {type(source).__name__}"
        )
    if is_array(source):
        shape = np.shape(source)
        if len(shape) not in (3, 4) or not shape[0]:
            raise ValueError(
                f"{name}: an array of frames must be [frames, height, width, 3] with one frame at least, "
                f"got {list(shape)}"
            )
        return shape[0]
    if isinstance(source, (list, tuple)):
        if not source:
            raise ValueError(f"{name}: a video with no frames: the list is empty")
        return len(source)
    path = os.fsdecode(source)
    if path.startswith(("http://", "https://")):
        raise ValueError(f"{name}: {path} is a URL; download it first, videos are not fetched here")
    try:
        return _look(path, name)
    except OSError as error:  # no leave to read it, say
        raise ValueError(f"{name}: {path} cannot be read: {error}") from error


def _look(path, name):
    """As `check_video`, of a path."""
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
        source: a `Video` or one of its sources.
        name: how errors name it.

    Returns:
        (video, metadata, fps): frames as a [frames, height, width, 3] uint8 array with their metadata, and fps None;
        or a path, metadata None, and the rate to sample it at, or None.

    Raises:
        TypeError: something else.
        ValueError: as `check_video`; a frame that cannot be read, or frames of different sizes.
    """
    check_video(source, name)
    video = source if isinstance(source, Video) else Video(source)
    frames = video.source
    if isinstance(frames, (str, os.PathLike)):
        if not os.path.isdir(frames):
            return os.fsdecode(frames), None, video.fps
        frames = frame_files(frames)
    images = _pictures(frames, name)
    sizes = {image.size for image in images}
    if len(sizes) > 1:
        sizes = ", ".join(f"{width} x {height}" for width, height in sorted(sizes))
        raise ValueError(f"{name}: all frames of a video must have one size, got {sizes}")
    width, height = images[0].size
    if height in (1, 3):  # [frames, 3, width, 3]: processors would take the rows for colours
        raise ValueError(f"{name}: frames of {width} x {height} pixels are too low for a video: enlarge or pad them")
    fps = 1 / SAMPLING_INTERVAL if video.fps is None else video.fps
    metadata = {
        "total_num_frames": len(images),
        "fps": fps,
        "frames_indices": list(range(len(images))),
        "duration": len(images) / fps,
        "width": width,
        "height": height,
    }
    return np.stack([np.asarray(image) for image in images]), metadata, None


def _pictures(frames, name):
    """PIL images in mode RGB."""
    if not is_array(frames) and all(map(is_array, frames)):
        frames = [as_numpy(frame) for frame in frames]
        if len({(frame.shape, frame.dtype) for frame in frames}) == 1:  # one range of values for all: some are dark
            frames = np.stack([frame[..., None] if frame.ndim == 2 else frame for frame in frames])
    if is_array(frames):
        return [picture(frame, f"{name}: frame {i}") for i, frame in enumerate(read_array(frames, 4, name))]
    return [load_image(frame, f"{name}: frame {i}") for i, frame in enumerate(frames)]


def decode_video(source, name):
    """Decode every frame: of a file, with PyAV or torchcodec.

    Returns:
        bool: False, with a warning, for a file where neither is installed; else True.

    Raises:
        TypeError, ValueError: as `load_video`, or a file without a frame, or with one that cannot be decoded.
    """
    video, metadata, _ = load_video(source, name)
    if metadata is not None:
        return True
    try:
        frames = _count_frames(video)
    except ImportError:
        warnings.warn(
            "video files are not decoded here, and will not be where a model is to see them: that needs PyAV "
            "(pip install av), or torchcodec with FFmpeg",
            stacklevel=2,
        )
        return False
    except Exception as error:  # broken data come out of decoders as anything
        raise ValueError(f"{name}: {video} cannot be decoded: {error or type(error).__name__}") from error
    if not frames:
        raise ValueError(f"{name}: a video with no frames: {video}")
    return True


def _count_frames(path):
    """How many frames of a file can be decoded: all of them are, since one may be damaged anywhere."""
    try:
        import av
    except ImportError:
        try:
            from torchcodec.decoders import VideoDecoder
        except (OSError, RuntimeError) as error:  # torchcodec without its libraries
            raise ImportError(str(error)) from error
        decoder = VideoDecoder(path)
        return sum(decoder[i] is not None for i in range(len(decoder)))
    with av.open(path) as container:
        if not container.streams.video:
            raise ValueError("it has no video stream")
        container.streams.video[0].thread_type = "AUTO"
        return sum(1 for _ in container.decode(video=0))


def _broken(path):
    """Why a file cannot hold a whole video, or None: its size against what its container says.

    That is the boxes of the MP4 family, whose index may be missing, too; the RIFF list of an AVI; the segment of a
    Matroska or WebM file. A decoder would read such a file to where it breaks off, without a word.
    """
    size = os.path.getsize(path)
    if not size:
        return "is empty (0 bytes)"
    with open(path, "rb") as file:
        head = file.read(12)
        if head[:4] == b"RIFF":
            end = 8 + int.from_bytes(head[4:8], "little")
            return f"is truncated: its list should end at byte {end} of {size}" if end > size else None
        if head[:4] == b"\x1aE\xdf\xa3":
            return _broken_matroska(file, size)
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


def _broken_matroska(file, size):
    """Why the EBML header or the segment behind it is not whole, or None; sizes may be left open, for live streams."""
    at = 4
    for part in ("header", "segment"):
        file.seek(at)
        first = file.read(1)
        count = 9 - first[0].bit_length() if first and first[0] else 0  # bytes of the number, by its leading zeros
        number = int.from_bytes(first + file.read(max(count - 1, 0)), "big") if count else 0
        number -= 1 << 7 * count  # the marker behind the zeros
        at = file.tell()
        if not count or at > size:
            return f"is truncated: its {part} is missing"
        if number == (1 << 7 * count) - 1:
            return None
        if at + number > size:
            return f"is truncated: its {part} should end at byte {at + number} of {size}"
        at += number + 4  # over the identity of the segment
    return None

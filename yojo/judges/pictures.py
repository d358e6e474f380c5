"""Images and videos as others take them: data URLs or files that show what a person sees, or exactly what we read; frames."""

import base64
import io
import os

from yojo.inputs.images import is_array, load_image
from yojo.inputs.lookup import find_image
from yojo.inputs.videos import Video, check_video, frame_files, load_video

# Formats that endpoints take, and modes that every viewer shows alike.
_TAKEN = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp", "GIF": "image/gif"}
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
# Formats that a server of our own takes, which reads a file as we do.
_OURS = {**_TAKEN, "BMP": "image/bmp", "TIFF": "image/tiff"}
_PLAIN = ("1", "L", "P", "RGB", "RGBA", "LA")


def image_url(source, name):
    """A data URL of an image.

    A PNG, JPEG, WebP or GIF file goes as it is, byte for byte, where it shows simply opened what `yojo.inputs.images` reads
    from it. Anything else (EXIF data that turn it, transparency, 16 bits, other formats, arrays, PIL images) becomes a PNG of
    what `yojo.inputs.images` reads.

    Args:
        source: what `Example.images` takes, or a data URL.
        name: how errors name it.

    Returns:
        str, "data:image/png;base64,...".

    Raises:
        TypeError, ValueError: as `load_image`.
    """
    source, picture, content, mime = _read(source, name)
    return _png_url(picture) if mime is None else _url(content, mime)


def exact_url(source, name):
    """A data URL of an image, of which `load_image` reads to the pixel what it reads of the source.

    A PNG, JPEG, WebP, BMP, TIFF or GIF file goes as it is, byte for byte, whatever is in it. Anything else (other formats,
    arrays, PIL images) becomes a PNG of what `load_image` reads.

    Args:
        source: what `Example.images` takes, or a data URL.
        name: how errors name it.

    Returns:
        str, "data:image/png;base64,...".

    Raises:
        TypeError, ValueError: as `load_image`, as far as it can be told without decoding a file.
    """
    if isinstance(source, str) and source.startswith("data:"):
        source = find_image(source, "", False, name)
    try:
        content = _content(source)
    except OSError:
        content = None  # of which `load_image` says more
    mime = None if content is None else _type_of(content)
    return _png_url(load_image(source, name), compress_level=1) if mime is None else _url(content, mime)


def _type_of(content):
    """The media type of a file with one picture in it, in a format of `_OURS`; None for another."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content)) as opened:
            return None if getattr(opened, "is_animated", False) else _OURS.get(opened.format)
    except Exception:  # decoders raise anything
        return None


def _png_url(picture, **options):
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return _url(file.getvalue(), "image/png")


def _url(content, mime):
    return f"data:{mime};base64,{base64.b64encode(content).decode()}"


def exact_frames(source, name):
    """Data URLs of the frames of a video, of which to the pixel the video is read that is read of the source.

    Args:
        source: what `Example.videos` takes, but no video file: which of its frames are taken, a model's processor says.
        name: how errors name it.

    Returns:
        (urls, fps): list of str; frames a second, or None where nothing says so.

    Raises:
        TypeError, ValueError: a video file, or one that cannot be read.
    """
    from PIL import Image

    video = source if isinstance(source, Video) else Video(source)
    check_video(video, name)
    frames = video.source
    if isinstance(frames, (str, os.PathLike)):
        if not os.path.isdir(frames):
            raise ValueError(
                f"{name}: {os.fsdecode(frames)} is a video file, and which of its frames are taken, only the served model's "
                "processor knows: give the frames, a list or an array of them or their folder, and fps with yojo.Video"
            )
        frames = frame_files(frames)
    if is_array(frames) or any(map(is_array, frames)):  # of which the values of all say how they are meant
        frames = [Image.fromarray(frame) for frame in load_video(video, name)[0]]
    return [exact_url(frame, f"{name}: frame {i}") for i, frame in enumerate(frames)], video.fps


def image_file(source, target, name):
    """A file that shows an image to whoever simply opens it.

    A PNG, JPEG, WebP or GIF file with the suffix of one is taken as it is where it shows what `yojo.inputs.images` reads from
    it. Of anything else a PNG is written.

    Args:
        source: what `Example.images` takes, or a data URL.
        target: path of the PNG, should one be needed.
        name: how errors name it.

    Returns:
        str, the path of one or the other.

    Raises:
        TypeError, ValueError: as `load_image`.
    """
    source, picture, _, mime = _read(source, name)
    is_file = isinstance(source, (str, os.PathLike))
    if mime is not None and is_file and os.path.splitext(os.fspath(source))[1].lower() in _SUFFIXES:
        return os.fspath(source)
    picture.save(target, "PNG")
    return os.fspath(target)


def _read(source, name):
    """(source, picture, the bytes of a file or None, their media type where they show the picture or None)."""
    if isinstance(source, str) and source.startswith("data:"):
        source = find_image(source, "", False, name)
    picture = load_image(source, name)
    content = _content(source)
    return source, picture, content, None if content is None else _type_as_it_is(content, picture)


def _content(source):
    """The bytes of a file; None for what is none."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return bytes(source)
    if isinstance(source, (str, os.PathLike)):
        with open(source, "rb") as file:
            return file.read()
    return None


def _type_as_it_is(content, picture):
    """The media type of a file that shows a picture to whoever simply opens it, or None."""
    from PIL import Image

    with Image.open(io.BytesIO(content)) as opened:
        if opened.format not in _TAKEN or opened.mode not in _PLAIN or opened.size != picture.size:
            return None
        mime = _TAKEN[opened.format]
        return mime if opened.convert("RGB").tobytes() == picture.tobytes() else None


def video_frames(source, name, max_frames):
    """Frames of a video, evenly sampled.

    K = min(T, max_frames) of its T frames, or fewer where a file has an `fps` that wants fewer: the middle ones of K equal
    pieces.

    Args:
        source: what `Example.videos` takes.
        name: how errors name it.
        max_frames: int.

    Returns:
        (urls, seconds, total): K data URLs (PNG); K floats, when each is shown, or None where nothing says how far apart
        frames stand; T.

    Raises:
        TypeError, ValueError: a video that cannot be read, or one with fewer frames a second than its `fps` asks for.
    """
    video, metadata, rate = load_video(source, name)
    if metadata is None:
        frames, indices, total, fps = _of_file(video, rate, name, max_frames)
    else:
        total, fps = len(video), metadata["fps"] if isinstance(source, Video) and source.fps is not None else None
        indices = middles(total, max_frames)
        frames = video[indices]
    urls = [image_url(frame, f"{name}: frame {at}") for at, frame in zip(indices, frames, strict=True)]
    return urls, None if fps is None else [at / fps for at in indices], total


def middles(total, most):
    """The middle frames of min(total, most) equal pieces of a video of `total` frames: list of ints."""
    count = min(total, most)
    return [(2 * n + 1) * total // (2 * count) for n in range(count)]


def _of_file(path, rate, name, max_frames):
    from yojo.inputs.decoding import read_video

    def sample(metadata):
        if rate is None:
            return middles(metadata.total_num_frames, max_frames)
        if rate > metadata.fps * 1.01:
            raise ValueError(f"it has {metadata.fps:g} frames a second, fewer than fps={rate:g} asks for")
        return middles(metadata.total_num_frames, min(max_frames, max(1, round(metadata.duration * rate))))

    try:
        frames, metadata = read_video(path, sample)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return frames, metadata.frames_indices, metadata.total_num_frames, metadata.fps

"""Where images and videos of records are: paths, data URLs, bytes -> what an `Example` takes."""

import base64
import binascii
import os
import urllib.parse
import urllib.request

from yojo.inputs.images import is_array
from yojo.inputs.videos import Video, check_video

URL_TIMEOUT = 30.0  # seconds


def find_image(source, root, allow_urls, name):
    """An image of a record as `Example.images` takes it, not yet read.

    Args:
        source: path (relative ones start at `root`), data URL, http(s) URL, bytes, {"bytes", "path"} as `datasets`
            stores it, PIL image or array.
        root: folder.
        allow_urls: fetch http(s) URLs.
        name: how errors name it.

    Returns:
        absolute or root-relative path, bytes, PIL image or array.

    Raises:
        ValueError: nothing there, a missing file, a URL that is not allowed or cannot be fetched.
    """
    if isinstance(source, dict):
        inner = next((source[key] for key in ("bytes", "path", "url") if source.get(key) is not None), None)
        if inner is None:
            raise ValueError(f"{name} has neither bytes nor path: {sorted(source)}")
        source = inner
    if source is None or (isinstance(source, (str, bytes)) and not source):
        raise ValueError(f"{name} is empty")
    if not isinstance(source, (str, os.PathLike)):
        return source
    text = os.fspath(source)
    if text.startswith("data:"):
        return _data_url(text, name)
    if text.startswith(("http://", "https://")):
        if not allow_urls:
            raise ValueError(
                f"{name}: {text} is a URL: download it first, or allow fetching with allow_urls=True (--allow-urls)"
            )
        return _fetch(text, name)
    path = _local(text, root)
    if not os.path.isfile(path):
        what = "a folder, not an image" if os.path.isdir(path) else "no such file"
        raise ValueError(f"{name}: {what}: {path}; relative paths start at image_root (--image-root), {root} here")
    return path


def find_videos(sources, fps, root):
    """Videos of a record as `Example.videos` takes them, not yet decoded.

    Args:
        sources: list; each a path of a file or of a folder of frames, {"path": ...}, a list of frames, or an array of
            them.
        fps: frames per second, one number for all or one each; None where it is unknown.
        root: folder that relative paths start from.

    Returns:
        list of `Video`.

    Raises:
        ValueError: a missing video, one without frames, a URL, or something else.
    """
    rates = list(fps) if isinstance(fps, (list, tuple)) else [fps] * len(sources)
    if len(rates) != len(sources):
        raise ValueError(f"{len(rates)} fps for {len(sources)} videos: give one number, or one for each")
    videos = []
    for i, (source, rate) in enumerate(zip(sources, rates, strict=True)):
        name = f"video {i}"
        if isinstance(source, dict) and isinstance(source.get("path"), str):
            source = source["path"]
        if isinstance(source, (list, tuple)):
            source = [find_image(frame, root, False, f"{name}: frame {j}") for j, frame in enumerate(source)]
        elif isinstance(source, (str, os.PathLike)) and str(source):
            remote = os.fspath(source).startswith(("http://", "https://"))
            source = source if remote else _local(os.fspath(source), root)
        elif not is_array(source):
            raise ValueError(
                f"{name} must be a path of a file or a folder of frames, a list of frames or an array of them, got "
                f"{type(source).__name__}"
            )
        check_video(source, name)
        videos.append(Video(source, rate))
    return videos


def _local(text, root):
    if text.startswith("file://"):
        text = urllib.parse.unquote(urllib.parse.urlparse(text).path)
    return os.path.join(root, text)  # an absolute path stays as it is


def _data_url(text, name):
    head, comma, body = text.partition(",")
    try:
        if not comma or not head.endswith(";base64"):
            raise ValueError("it must be data:image/...;base64,...")
        return base64.b64decode(body, validate=True)
    except (binascii.Error, ValueError) as error:
        raise ValueError(f"{name}: the data URL {head[:40]}... cannot be read: {error}") from error


def _fetch(url, name):
    try:
        with urllib.request.urlopen(url, timeout=URL_TIMEOUT) as answer:
            return answer.read()
    except OSError as error:
        raise ValueError(f"{name}: {url} cannot be fetched: {error}") from error

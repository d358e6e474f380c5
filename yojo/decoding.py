"""Video files through a processor: decoded with PyAV where transformers, which asks for torchcodec, cannot."""

import copy
import functools

import numpy as np

HOW_TO = "video files need PyAV (pip install av), or torchcodec with FFmpeg"


def with_files(processor):
    """The processor, able to take video files with what is installed.

    transformers decodes the files of a prompt with torchcodec, or with a torchvision before 0.26. Where neither is
    there, the frames are decoded here, with PyAV; the processor's video part says which of them, as ever.

    Args:
        processor: a processor or a tokenizer; it is not changed.

    Returns:
        The processor itself, or a copy that shares its parts and whose video part decodes with PyAV.
    """
    part = getattr(processor, "video_processor", None)
    if not hasattr(part, "fetch_videos") or isinstance(part, _WithPyAV) or _transformers_can():
        return processor
    made, own = copy.copy(processor), copy.copy(part)
    own.__class__ = _decoding(type(part))
    made.video_processor = own
    return made


def _transformers_can():
    from transformers.utils import import_utils

    # A torchcodec that does not find FFmpeg is installed and of no use; older releases do not tell these apart.
    usable = getattr(import_utils, "is_torchcodec_usable", None)
    if usable(decode="video") if usable else import_utils.is_torchcodec_available():
        return True
    try:
        from torchvision.io import read_video  # noqa: F401  removed in torchvision 0.26
    except ImportError:
        return False
    return True


class _WithPyAV:
    """Mixed into a class of video processors: files are decoded with PyAV."""

    def fetch_videos(self, video_url_or_urls, sample_indices_fn=None):
        if isinstance(video_url_or_urls, list):
            return list(zip(*[self.fetch_videos(item, sample_indices_fn) for item in video_url_or_urls], strict=True))
        return read_video(video_url_or_urls, sample_indices_fn)


@functools.cache
def _decoding(cls):
    return type(cls.__name__, (_WithPyAV, cls), {"__module__": cls.__module__})


def read_video(path, sample=None):
    """Decode frames of a video file with PyAV, upright as a player shows them.

    Args:
        path: of the file.
        sample: function `metadata=...` -> indices of the frames to take; None takes all.

    Returns:
        (frames, metadata): [frames, height, width, 3] uint8, and transformers' `VideoMetadata` with `frames_indices`.

    Raises:
        ValueError: a file that cannot be decoded, or no PyAV to do it; the message has the path.
    """
    try:
        import av
    except ImportError as error:
        raise ValueError(f"{path}: {HOW_TO}") from error
    try:
        with av.open(path) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream")
            declared = container.streams.video[0].frames  # 0 where the container does not say, WebM for one
        total = declared or _count(path)
        frames, metadata = _take(path, total, sample)
        if frames is None:  # the container promised more frames than there are: sample from those there are
            frames, metadata = _take(path, _count(path), sample)
    except av.error.FFmpegError as error:
        raise ValueError(f"{path} cannot be decoded: {error}") from error
    return frames, metadata


def _count(path):
    import av

    with av.open(path) as container:
        return sum(1 for _ in container.decode(video=0))


def _take(path, total, sample):
    """(frames, metadata) of a file said to have `total` frames; (None, metadata) where it has fewer than asked for."""
    import av
    from transformers.video_utils import VideoMetadata

    if not total:
        raise ValueError(f"{path} has no frames")
    with av.open(path) as container:
        stream = container.streams.video[0]
        rate = float(stream.average_rate or stream.guessed_rate or 0)
        if not rate:
            raise ValueError(f"{path} does not say how many frames it has in a second")
        metadata = VideoMetadata(
            total_num_frames=total,
            fps=rate,
            duration=total / rate,
            video_backend="pyav",
            height=stream.height,
            width=stream.width,
        )
        indices = [int(i) for i in (range(total) if sample is None else sample(metadata=metadata))]
        wanted, last, kept = set(indices), max(indices), {}
        for i, frame in enumerate(container.decode(video=0)):
            if i in wanted:
                kept[i] = _upright(frame)
            if i == last:
                break
    metadata.frames_indices = indices
    if len(kept) < len(wanted):
        return None, metadata
    return np.stack([kept[i] for i in indices]), metadata


def _upright(frame):
    """[height, width, 3] uint8: a phone writes its frames lying down, and how they are to be turned beside them."""
    quarters = round(getattr(frame, "rotation", 0) / 90)
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), quarters))

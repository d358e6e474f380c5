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


def _is_usable_torchcodec():
    from transformers.utils import import_utils

    # A torchcodec that does not find FFmpeg is installed and of no use; older releases do not tell these apart.
    usable = getattr(import_utils, "is_torchcodec_usable", None)
    return usable(decode="video") if usable else import_utils.is_torchcodec_available()


def _transformers_can():
    if _is_usable_torchcodec():
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


# ---- sampling files as a processor would ----

# Their sampling takes num_frames for the most frames, beside fps; others take one of the two, and num_frames first.
_NUM_FRAMES_IS_A_LIMIT = ("SmolVLMVideoProcessor",)
# Arguments of a video processor that its sampling does not take.
_NOT_FOR_SAMPLING = ("input_data_format", "do_convert_rgb", "do_sample_frames", "device", "video_metadata")


def can_sample(video_processor):
    """Whether a video part of a processor says which frames of a file it takes, and reads files as all do."""
    try:
        from transformers.video_processing_utils import BaseVideoProcessor
    except ImportError:  # without torchvision there is no video part
        return False
    own = type(video_processor)
    return isinstance(video_processor, BaseVideoProcessor) and all(
        getattr(own, name) is getattr(BaseVideoProcessor, name) for name in ("preprocess", "_decode_and_sample_videos")
    )


def sample_file(path, fps, video_processor):
    """Decode the frames of a video file that a processor's video part takes.

    Processors sample all videos of a prompt at one rate, some not at all beside frames, and some insist on a number of
    frames of their own. Here every file has its rate.

    Args:
        path: str.
        fps: frames per second, or None: what the processor does by default.
        video_processor: one that `can_sample`.

    Returns:
        (frames, metadata, bounded): [frames, height, width, 3] uint8, metadata as `load_video` has it, and "more
        frames" or "fewer frames" where the processor's own bounds stand in the way of the rate, or None.

    Raises:
        ValueError: a rate above the file's own, a file whose rate is not known, frames that cannot be decoded.
        ImportError: nothing is installed that decodes videos.
    """
    sampling = None
    if fps is not None or _samples(video_processor):
        sampling = _Sampling(video_processor, fps)
    frames, metadata = _decoded(path, sampling)
    indices = [int(index) for index in metadata.frames_indices]
    if len(frames) != len(indices):
        raise ValueError(f"{len(indices)} frames were asked for, {len(frames)} came: the file holds fewer than it says")
    known = {key: getattr(metadata, key) for key in ("total_num_frames", "fps", "duration", "width", "height")}
    return frames, known | {"frames_indices": indices}, sampling.bounded if sampling else None


def _samples(video_processor):
    """Whether a processor samples files by default; SmolVLM's does where its video part has a rate or a number."""
    own = ("do_sample_frames",)
    if any(base.__name__ in _NUM_FRAMES_IS_A_LIMIT for base in type(video_processor).__mro__):
        own = ("do_sample_frames", "num_frames", "fps")
    return any(getattr(video_processor, name, None) for name in own)


class _Sampling:
    """Which frames of a file a video processor takes, as its own code decides; notes when that is not the rate."""

    def __init__(self, video_processor, fps):
        self.processor, self.fps, self.bounded = video_processor, fps, None

    def __call__(self, metadata, **kwargs):
        part = self.processor
        options = {name: getattr(part, name, None) for name in part.valid_kwargs.__annotations__}
        options = {name: value for name, value in options.items() if name not in _NOT_FOR_SAMPLING}
        if self.fps is None:
            return part.sample_frames(metadata=metadata, **options)
        if not metadata.fps:
            raise ValueError(
                f"it does not say how many frames a second it has, so fps={self.fps} cannot be taken of it"
            )
        if self.fps > metadata.fps * 1.01:
            raise ValueError(f"it has {metadata.fps:g} frames a second, fewer than fps={self.fps:g} asks for")
        options["fps"] = self.fps
        if not any(base.__name__ in _NUM_FRAMES_IS_A_LIMIT for base in type(part).__mro__):
            part = copy.copy(part)  # its own number of frames would win
            part.num_frames = options["num_frames"] = None
        try:
            indices = part.sample_frames(metadata=metadata, **options)
        except ZeroDivisionError as error:
            raise ValueError(f"it is too short for a single frame at fps={self.fps:g}") from error
        self._compare(len(indices), metadata.total_num_frames / metadata.fps * self.fps)
        return indices

    def _compare(self, taken, asked):
        rounding = getattr(self.processor, "temporal_patch_size", None) or 1
        if abs(taken - asked) > rounding:
            self.bounded = "more frames" if taken > asked else "fewer frames"


def _decoded(path, sample):
    """As `read_video`, by transformers' own decoder where it has one."""
    if not _transformers_can():
        return read_video(path, sample)
    from transformers.video_utils import load_video

    backend = "torchcodec" if _is_usable_torchcodec() else "torchvision"
    frames, metadata = load_video(path, backend=backend, sample_indices_fn=sample)
    return np.asarray(frames).transpose(0, 2, 3, 1), metadata

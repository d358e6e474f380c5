"""Video files are decoded with PyAV where transformers cannot: the same frames, and an error for what has none."""

import copy
import sys

import numpy as np
import pytest
import real_processors
import transformers
from transformers import video_utils

import yojo
from yojo.inputs import decoding
from yojo.inputs.decoding import read_video, with_files
from yojo.inputs.prompts import PromptEncoder

av = pytest.importorskip("av")
pytest.importorskip("torchvision")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return str(real_processors.write_video(tmp_path_factory.mktemp("videos") / "clip.mp4", count=10))


@pytest.fixture()
def no_decoder(monkeypatch):
    """transformers finds nothing to decode with, whatever is installed here."""
    monkeypatch.setattr(decoding, "_transformers_can", lambda: False)


def some(metadata):
    return np.array([1, 4, 4, 8])


def test_the_frames_are_those_of_transformers(clip):
    for sample in (None, lambda metadata: np.arange(0, metadata.total_num_frames, 3)):
        frames, metadata = read_video(clip, sample)
        expected, of_transformers = video_utils.load_video(clip, backend="pyav", sample_indices_fn=sample)
        assert np.array_equal(frames, expected) and frames.std() > 10
        assert dict(metadata) | {"frames_indices": None} == dict(of_transformers) | {"frames_indices": None}
        assert metadata.frames_indices == list(of_transformers.frames_indices)
    frames, metadata = read_video(clip, some)
    assert metadata.frames_indices == [1, 4, 4, 8] and np.array_equal(frames[1], frames[2])


def test_a_container_that_does_not_say_how_many_frames_it_has(tmp_path):
    path = tmp_path / "clip.mkv"
    real_processors.write_video(path, count=10)
    with av.open(str(path)) as container:
        assert container.streams.video[0].frames == 0
    frames, metadata = read_video(str(path), some)
    assert metadata.total_num_frames == 10 and metadata.duration == 2.5 and len(frames) == 4


def test_a_container_that_promises_more_frames_than_it_has(clip, monkeypatch):
    take, totals = decoding._take, []

    def promised(path, total, sample):
        totals.append(total if totals else 16)
        return take(path, totals[-1], sample)

    monkeypatch.setattr(decoding, "_take", promised)
    frames, metadata = read_video(clip, lambda metadata: range(0, metadata.total_num_frames, 2))
    assert totals == [16, 10] and metadata.frames_indices == [0, 2, 4, 6, 8] and len(frames) == 5
    assert metadata.total_num_frames == 10 and metadata.duration == 2.5


class Frame:
    """A frame with a note that it is to be turned."""

    def __init__(self, rotation):
        self.rotation = rotation

    def to_ndarray(self, format):
        return np.arange(6, dtype=np.uint8).reshape(2, 1, 3)


def test_frames_are_turned_upright():
    lying = Frame(0).to_ndarray("rgb24")
    assert np.array_equal(decoding._upright(Frame(0)), lying)
    assert np.array_equal(decoding._upright(Frame(180)), lying[::-1])
    left, right = decoding._upright(Frame(90)), decoding._upright(Frame(-90))
    assert left.shape == right.shape == (1, 2, 3)
    assert np.array_equal(left[0, 0], lying[0, 0]) and np.array_equal(right[0, 0], lying[1, 0])


def test_the_processor_itself_stays_as_it_is(clip, no_decoder):
    processor = real_processors.processor_of("Qwen2.5-VL")
    before = copy.deepcopy(processor.video_processor.__dict__)
    made = with_files(processor)
    assert made is not processor and made.tokenizer is processor.tokenizer and with_files(made) is made
    assert isinstance(made.video_processor, transformers.Qwen2VLVideoProcessor)
    assert type(made.video_processor).__name__ == "Qwen2VLVideoProcessor"
    assert type(processor.video_processor) is transformers.Qwen2VLVideoProcessor
    assert processor.video_processor.__dict__ == before
    assert with_files(processor.tokenizer) is processor.tokenizer
    gemma = real_processors.processor_of("Gemma 3")
    assert with_files(gemma) is gemma


def test_where_transformers_can_decode_it_does(monkeypatch):
    monkeypatch.setattr(decoding, "_transformers_can", lambda: True)
    processor = real_processors.processor_of("Qwen2.5-VL")
    assert with_files(processor) is processor


def test_files_without_frames_are_errors_of_their_example(tmp_path, clip, no_decoder, monkeypatch):
    processor = real_processors.processor_of("Qwen2.5-VL")
    encoder = PromptEncoder(processor, processor.tokenizer, "example 'v'")
    path = tmp_path / "noise.webm"
    path.write_bytes(b"\x1aE\xdf\xa3 no video at all" * 40)
    with pytest.raises(ValueError, match=r"example 'v': .*noise\.webm"):
        encoder(yojo.Example("What happens?", ["a"], videos=[str(path)]))
    sound = tmp_path / "sound.mkv"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        stream.layout = "mono"
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), format="s16", layout="mono")
        frame.sample_rate = 8000
        container.mux(stream.encode(frame))
    with pytest.raises(ValueError, match=r"example 'v': .*sound\.mkv has no video stream"):
        encoder(yojo.Example("What happens?", ["a"], videos=[str(sound)]))
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(
        ValueError, match=r"example 'v': .*clip\.mp4: video files need PyAV \(pip install av\), or torchc"
    ):
        encoder(yojo.Example("What happens?", ["a"], videos=[clip]))

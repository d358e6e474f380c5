"""Videos: frames in their order and at their times, rates of records, and videos without frames."""

import re
import struct
import sys
import types

import numpy as np
import pytest
from data_cases import GOOD, write_lines
from PIL import Image

import yojo
from yojo import data
from yojo.inputs.prompts import PromptEncoder
from yojo.inputs.videos import Video, check_video, decode_video, frame_files, load_video, natural_key

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'video' %}"
    "<|vision_start|><|video_pad|><|vision_end|>{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "<|im_start|>assistant\n"
)


def make_frames(folder, count, size=(32, 32), name="frame_{}.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (20 * i, 0, 0)).save(folder / name.format(i))
    return folder


def box(kind, body=b""):
    return struct.pack(">I4s", 8 + len(body), kind) + body


MP4 = box(b"ftyp", b"isom\0\0\2\0") + box(b"moov", b"index") + box(b"mdat", b"frames" * 9)


def test_natural_order(tmp_path):
    assert sorted(["f10", "f9", "F1", "f1²"], key=natural_key) == ["F1", "f1²", "f9", "f10"]
    folder = make_frames(tmp_path / "v", 12, name="c01_{}.jpeg")
    (folder / "notes.txt").write_text("x")
    (folder / ".hidden.png").write_text("x")
    (folder / "deeper.png").mkdir()
    assert [file.name for file in frame_files(folder)] == [f"c01_{i}.jpeg" for i in range(12)]


def test_frames_and_their_times(tmp_path):
    folder = make_frames(tmp_path / "v", 12)
    frames, metadata, fps = load_video(Video(folder, fps=0.5), "video 0")
    assert frames.shape == (12, 32, 32, 3) and frames.dtype == np.uint8 and fps is None
    assert frames[:, 0, 0, 0].tolist() == [20 * i for i in range(12)]
    assert metadata["fps"] == 0.5 and metadata["duration"] == 24 and metadata["total_num_frames"] == 12
    assert metadata["frames_indices"] == list(range(12)) and (metadata["height"], metadata["width"]) == (32, 32)
    for source in (folder, str(folder), frame_files(folder), [Image.open(file) for file in frame_files(folder)]):
        again, metadata, _ = load_video(source, "video 0")
        assert np.array_equal(again, frames) and metadata["fps"] == 0.25  # 4 seconds apart, as in the paper's data
    file = tmp_path / "a.mp4"
    file.write_bytes(MP4)
    assert load_video(Video(file, fps=2), "video 0") == (str(file), None, 2)


def test_arrays_are_frames():
    """A list of frames, their array or tensor, channels first or last: the same to a processor."""
    import torch

    array = np.random.default_rng(0).integers(0, 256, (3, 8, 9, 3), dtype=np.uint8)
    expected = load_video(Video([Image.fromarray(frame) for frame in array], fps=2), "video 0")
    assert np.array_equal(expected[0], array)
    first = np.moveaxis(array, -1, 1)
    for source in (
        array,
        torch.from_numpy(array),
        first,
        torch.from_numpy(first),
        list(array),
        array / 255,
        list(first),
    ):
        frames, metadata, fps = load_video(Video(source, fps=2), "video 0")
        assert np.array_equal(frames, array) and frames.dtype == np.uint8 and (metadata, fps) == expected[1:]
        assert load_video(source, "video 0")[1]["fps"] == 0.25 and check_video(source, "video 0") == 3
        assert decode_video(source, "video 0")
    gray = load_video(array[..., 0], "video 0")[0]
    assert np.array_equal(gray, np.repeat(array[..., :1], 3, -1))
    # Floats of all frames have one range: the second frame alone would be taken for one of 0..1.
    for source in (np.stack([array[0], array[1] // 128]).astype(float), [array[0] * 1.0, (array[1] // 128) * 1.0]):
        assert np.array_equal(load_video(source, "video 0")[0], [array[0], array[1] // 128])
    mixed = [array[0], array[1] / 255, torch.from_numpy(array[2])]  # each by itself
    assert np.array_equal(load_video(mixed, "video 0")[0], array)
    assert np.array_equal(load_video([frame[..., 0] for frame in array], "video 0")[0], gray)


@pytest.mark.parametrize(
    "source, error, message",
    [
        (np.zeros((0, 8, 8, 3), np.uint8), ValueError, r"one frame at least, got \[0, 8, 8, 3\]"),
        (np.zeros((8, 8), np.uint8), ValueError, r"must be \[frames, height, width, 3\] .*, got \[8, 8\]"),
        (np.zeros((8, 8, 3), np.uint8), ValueError, r"must be \[frames, height, width, 3\] .*, got \[8, 8, 3\]"),
        (np.zeros((2, 8, 8, 5), np.uint8), ValueError, r"must be \[frames, .*, got \[2, 8, 8, 5\]"),
        (np.zeros((2, 0, 8, 3), np.uint8), ValueError, "is zero-sized: 8 x 0 pixels"),
        (np.zeros((2, 8, 8, 3), np.int64), ValueError, "has pixels of type int64: give uint8"),
        (np.full((2, 8, 8, 3), -1.0), ValueError, r"has values from -1\.0"),
        (np.zeros((2, 3, 8, 3), np.uint8), ValueError, "frames of 8 x 3 pixels are too low for a video"),
        (b"the bytes of a file", TypeError, "must be a path of a file or a folder of frames, .* got bytes"),
        (Image.new("RGB", (4, 4)), TypeError, "must be a path of a file .* got Image"),
        ([7], TypeError, "frame 0 must be a PIL image, a path, bytes or an array, got int"),
        ([np.zeros((4, 4, 3), np.uint8), np.zeros((4, 5, 3), np.uint8)], ValueError, "one size, got 4 x 4, 5 x 4"),
    ],
)
def test_arrays_that_are_no_video(source, error, message):
    with pytest.raises(error, match=f"video 0.*{message}"):
        load_video(source, "video 0")


def test_rates_of_records(tmp_path):
    make_frames(tmp_path / "v", 3)
    (tmp_path / "a.mp4").write_bytes(MP4)
    path = write_lines(
        tmp_path / "a.jsonl",
        [
            GOOD | {"video": "v", "fps": 2},
            GOOD | {"video": "v", "sampling_interval": 4.0},
            GOOD | {"video": "v"},
            GOOD | {"video": ["v/frame_2.png", "v/frame_0.png"], "fps": 1},
            GOOD | {"videos": ["v", "a.mp4"], "sampling_interval": [0.5, None]},
            GOOD | {"video": {"path": "a.mp4", "bytes": None}},
            GOOD | {"prompt": [{"role": "user", "content": [{"type": "video", "video": "v", "fps": 3.0}, "What?"]}]},
            GOOD | {"video": None},
        ],
    )
    records = data.load(path)
    folder, file = str(tmp_path / "v"), str(tmp_path / "a.mp4")
    assert records[0].videos == [Video(folder, 2)] and records[1].videos == [Video(folder, 0.25)]
    assert records[2].videos == [Video(folder, None)] and records[7].videos == []
    assert records[3].videos == [Video([f"{folder}/frame_2.png", f"{folder}/frame_0.png"], 1)]
    assert records[4].videos == [Video(folder, 2.0), Video(file, None)] and records[5].videos == [Video(file)]
    assert records[6].prompt[0]["content"][0] == {"type": "video", "video": Video(folder, 3.0)}


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda path: None, r"video 0: no such video: .*v$"),
        (lambda path: path.mkdir(), r"video 0: a video with no frames: the folder .*v holds no image files \(\.jpg"),
        (
            lambda path: (path.mkdir(), (path / "a.txt").write_text("x")),
            "video 0: a video with no frames: the folder .* holds no image files",
        ),
        (lambda path: path.write_bytes(b""), r"video 0: a video with no frames: .*v is empty \(0 bytes\)"),
        (lambda path: path.write_bytes(MP4[:-5]), "v is truncated: its 'mdat' part should end at byte 91 of 86"),
        (lambda path: path.write_bytes(MP4[:16] + box(b"mdat", b"x")), r"v is truncated: it has no index \(moov\)"),
        (
            lambda path: path.write_bytes(b"RIFF" + struct.pack("<I", 8) + b"AVI"),
            "v is truncated: its list should end at byte 16 of 11",
        ),
        (
            lambda path: path.write_bytes(b"\x1aE\xdf\xa3\x82ab\x18S\x80g\x84mor"),
            "v is truncated: its segment should end at byte 16 of 15",
        ),
        (lambda path: path.write_bytes(b"\x1aE\xdf\xa3\x82a"), "v is truncated: its header should end at byte 7 of 6"),
        (lambda path: path.write_bytes(b"\x1aE\xdf\xa3\x82ab\x18S"), "v is truncated: its segment is missing"),
        (lambda path: path.write_bytes(b"\x1aE\xdf\xa3"), "v is truncated: its header is missing"),
        (lambda path: path.write_bytes(MP4[:16] + struct.pack(">I4sI", 1, b"mdat", 0)), "v is truncated"),
    ],
)
def test_videos_without_frames(tmp_path, make, message):
    make(tmp_path / "v")
    for attempt in (check_video, load_video):
        with pytest.raises(ValueError, match=message):
            attempt(tmp_path / "v", "video 0")
    with pytest.raises(data.MediaError, match=rf"example 'a\.jsonl:1': .*{message}"):
        data.load(write_lines(tmp_path / "a.jsonl", [GOOD | {"video": "v"}]))[0]


def test_whole_files_pass(tmp_path):
    wide = box(b"ftyp", b"isom") + box(b"moov") + struct.pack(">I4sQ", 1, b"mdat", 20) + b"1234"
    for name, content in (("a.mp4", MP4), ("b.mp4", wide), ("c.mp4", MP4 + struct.pack(">I4s", 0, b"mdat") + b"x")):
        (tmp_path / name).write_bytes(content)
        assert check_video(tmp_path / name, "video 0") is None
    header = b"\x1aE\xdf\xa3\x82ab"
    for i, content in enumerate(
        (
            header + b"\x18S\x80g\x84more",
            header + b"\x18S\x80g\x01\xff\xff\xff\xff\xff\xff\xffany",  # a live stream, of unknown length
            b"RIFF" + struct.pack("<I", 8) + b"AVI list",
            b"another container, not looked into",
        )
    ):
        (tmp_path / f"d{i}").write_bytes(content)
        assert check_video(tmp_path / f"d{i}", "video 0") is None
    assert check_video(make_frames(tmp_path / "v", 3), "video 0") == 3


@pytest.mark.parametrize(
    "record, message",
    [
        ({"video": []}, "video 0: a video with no frames: the list is empty"),
        ({"video": ["v/frame_0.png", "v/frame_9.png"]}, "video 0: frame 1: no such file: .*frame_9.png"),
        ({"video": "https://example.org/a.mp4"}, "video 0: https://example.org/a.mp4 is a URL; download it first"),
        (
            {"videos": ["v", 7]},
            "video 1 must be a path of a file or a folder of frames, a list of frames or an array of them, got int",
        ),
        ({"videos": ["v", ""]}, "video 1 must be a path .* got str"),
        ({"videos": ["v", "v"], "fps": [1]}, "1 fps for 2 videos: give one number, or one for each"),
    ],
)
def test_records_whose_videos_make_no_sense(tmp_path, record, message):
    make_frames(tmp_path / "v", 1)
    with pytest.raises(data.MediaError, match=rf"example 'a\.jsonl:1': {message}"):
        data.load(write_lines(tmp_path / "a.jsonl", [GOOD | record]))[0]


@pytest.mark.parametrize(
    "source, fps, error, message",
    [
        ("v", 0, ValueError, "fps must be more than 0, got 0"),
        ("v", float("nan"), ValueError, "fps must be more than 0, got nan"),
        ("v", True, TypeError, "fps must be a number or None, got True"),
        (7, None, TypeError, "a video must be a path, a list of frames or an array of them, got int"),
    ],
)
def test_videos_that_make_no_sense(source, fps, error, message):
    with pytest.raises(error, match=message):
        Video(source, fps)


def test_frames_that_cannot_be_read(tmp_path):
    folder = make_frames(tmp_path / "v", 3)
    whole = (folder / "frame_1.png").read_bytes()
    (folder / "frame_1.png").write_bytes(whole[:40])
    for attempt in (load_video, decode_video):
        with pytest.raises(ValueError, match=r"video 0: frame 1: .*frame_1\.png is not a readable image"):
            attempt(folder, "video 0")
    Image.new("RGB", (32, 40)).save(folder / "frame_1.png")
    with pytest.raises(ValueError, match="video 0: all frames of a video must have one size, got 32 x 32, 32 x 40"):
        load_video(folder, "video 0")


def test_files_that_decode(tmp_path):
    path = write_video(tmp_path / "a.mp4")
    assert decode_video(path, "video 0")
    (tmp_path / "b.mp4").write_bytes(MP4)
    with pytest.raises(ValueError, match=r"video 0: .*b\.mp4 cannot be decoded"):
        decode_video(tmp_path / "b.mp4", "video 0")
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        (tmp_path / "b.mp4").write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"video 0: .*b\.mp4"):
            decode_video(tmp_path / "b.mp4", "video 0")


def test_files_that_decode_up_to_some_frame(tmp_path):
    """What comes later may be damaged, too, and training would find it."""
    path = write_video(tmp_path / "a.mp4", "png")  # every frame by itself, and checked
    content = bytearray(path.read_bytes())
    at = content.rindex(b"IDAT") + 6
    content[at : at + 12] = bytes(12)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"video 0: .*a\.mp4 cannot be decoded"):
        decode_video(path, "video 0")


@pytest.mark.parametrize("error", [struct.error("x"), RuntimeError("x"), KeyError("x"), MemoryError("x")])
def test_whatever_a_decoder_raises_names_the_video(error, tmp_path, monkeypatch):
    import yojo.inputs.videos

    def fail(path):
        raise error

    path = tmp_path / "a.mp4"
    path.write_bytes(MP4)
    monkeypatch.setattr(yojo.inputs.videos, "_count_frames", fail)
    with pytest.raises(ValueError, match=r"video 0: .*a\.mp4 cannot be decoded: '?x"):
        decode_video(path, "video 0")
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        decode_video(path, "video 0")


def write_video(path, codec="mpeg4"):
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=8)
        stream.width, stream.height = 64, 64
        if codec == "png":
            stream.pix_fmt = "rgb24"
        for i in range(16):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 10 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


class Decoder:
    """What torchcodec does with a file, in short: the frames are its digits."""

    def __init__(self, path):
        with open(path) as file:
            self.frames = file.read()
        if self.frames == "broken":
            raise RuntimeError("no stream")

    def __len__(self):
        return len(self.frames.strip())

    def __getitem__(self, index):
        return self.frames[index]


def test_files_that_torchcodec_decodes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    decoders = types.ModuleType("torchcodec.decoders")
    decoders.VideoDecoder = Decoder
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", decoders)
    path = tmp_path / "a.webm"
    path.write_text("123")
    decode_video(path, "video 0")
    path.write_text(" ")
    with pytest.raises(ValueError, match=r"video 0: a video with no frames: .*a\.webm"):
        decode_video(path, "video 0")
    path.write_text("broken")
    with pytest.raises(ValueError, match=r"video 0: .*a\.webm cannot be decoded: no stream"):
        decode_video(path, "video 0")
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", None)
    with pytest.warns(UserWarning, match=r"video files are not decoded here, .* PyAV \(pip install av\)"):
        assert decode_video(path, "video 0") is False


# ---- through processors ----


class Recorder:
    """A processor with a video part that only notes what it is asked for."""

    chat_template = TEMPLATE
    image_processor = video_processor = object()

    def apply_chat_template(self, messages, **options):
        import torch

        self.messages, self.options = messages, options
        return {"input_ids": torch.ones(1, 3, dtype=torch.int64)}


def encode(videos, prompt="What happens?"):
    recorder = Recorder()
    PromptEncoder(recorder, None, "example 'v'")(yojo.Example(prompt, ["a"], videos=videos))
    given = [part["video"] for turn in recorder.messages for part in turn["content"] if part["type"] == "video"]
    return given, recorder.options.get("processor_kwargs")


def test_what_the_processor_is_told(tmp_path):
    folder = make_frames(tmp_path / "v", 3)
    file = tmp_path / "a.mp4"
    file.write_bytes(MP4)
    given, options = encode([Video(folder, 2), folder])
    assert [video.shape for video in given] == [(3, 32, 32, 3)] * 2 and options["do_sample_frames"] is False
    assert [metadata["fps"] for metadata in options["video_metadata"]] == [2, 0.25]
    assert encode([file, str(file)]) == ([str(file), str(file)], None)
    assert encode([Video(file, 2)]) == ([str(file)], {"fps": 2, "do_sample_frames": True})
    inline = [{"role": "user", "content": [{"type": "video", "video": Video(folder, 1)}, "What?"]}]
    assert encode([], inline)[1]["video_metadata"][0]["fps"] == 1
    with pytest.raises(ValueError, match="example 'v': the videos of one prompt are files and frames"):
        encode([file, folder])
    with pytest.raises(ValueError, match=r"files to sample at different fps \(.*2.*\)"):
        encode([file, Video(file, 2)])
    with pytest.raises(ValueError, match="example 'v': video 1: no such video: missing"):
        encode([folder, "missing"])


@pytest.fixture(scope="module")
def qwen3_vl(backbone):
    pytest.importorskip("torchvision")
    import transformers

    processor = backbone[1]
    images = processor.image_processor
    videos = transformers.Qwen3VLVideoProcessor(
        patch_size=images.patch_size,
        merge_size=images.merge_size,
        temporal_patch_size=images.temporal_patch_size,
        size={"shortest_edge": 64, "longest_edge": 10_000},
    )
    return transformers.Qwen3VLProcessor(images, processor.tokenizer, videos, chat_template=TEMPLATE)


def test_qwen3_vl_writes_the_times_of_the_frames(qwen3_vl, tmp_path):
    folder = make_frames(tmp_path / "v", 6)
    for video, times in (
        (Video(folder, 0.5), ["1.0", "5.0", "9.0"]),  # two frames a patch: the mean of their times
        (folder, ["2.0", "10.0", "18.0"]),
        (Video(folder, 4), ["0.1", "0.6", "1.1"]),
    ):
        example = yojo.Example("What happens?", ["a"], videos=[video])
        outputs = PromptEncoder(qwen3_vl, qwen3_vl.tokenizer, "example 'v'")(example)
        assert outputs["video_grid_thw"][0, 0] == 3
        text = qwen3_vl.tokenizer.decode(outputs["input_ids"][0]).replace(" ", "")
        # The words of "<1.0 seconds>" that the demonstration's vocabulary lacks are unknown; the numbers are not.
        assert re.findall(r"<unk>(\d+\.\d)<unk>", text) == times


def test_qwen2_5_vl_gets_the_seconds_of_a_grid(backbone, tmp_path):
    pytest.importorskip("torchvision")
    import transformers

    images = transformers.Qwen2VLImageProcessor(patch_size=4, merge_size=2, min_pixels=64, max_pixels=10_000)
    videos = transformers.Qwen2VLVideoProcessor(
        patch_size=4, merge_size=2, temporal_patch_size=2, size={"shortest_edge": 64, "longest_edge": 10_000}
    )
    tokenizer = backbone[1].tokenizer
    processor = transformers.Qwen2_5_VLProcessor(images, tokenizer, videos, chat_template=TEMPLATE)
    folder = make_frames(tmp_path / "v", 6)
    example = yojo.Example("What happens?", ["a"], videos=[Video(folder, 0.5)])
    outputs = PromptEncoder(processor, tokenizer, "example 'v'")(example)
    assert float(outputs["second_per_grid_ts"][0]) == 4.0  # two frames, two seconds each

"""What a generative judge is shown of an example: text to the letter, images as a person sees them, frames, turns, tools."""

import io
import json
import sys

import numpy as np
import pytest
from endpoint_cases import Endpoint, blocks_of, by_length, opened, parts_of, pictures_of
from PIL import Image

import yojo
from yojo.inputs.images import load_image
from yojo.inputs.videos import Video
from yojo.judges.pictures import image_url, middles, video_frames

ANSWERS = ["yes", "no way"]


def noise(height=24, width=40, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, channels), np.uint8)


def file_of(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def shown(example, **options):
    """The body of the one request that an example makes."""
    with Endpoint(by_length) as endpoint:
        endpoint.judge(**options).score_many([example])
    (body,) = endpoint.bodies
    return body


def same(data, source):
    """Whether a file shows to anyone what our own reading of a source is."""
    return np.array_equal(np.asarray(opened(data).convert("RGB")), np.asarray(load_image(source, "it")))


# ---- images ----


RGB = Image.fromarray(noise())
TURNED = Image.Exif()
TURNED[0x0112] = 6
UPRIGHT = Image.Exif()
UPRIGHT[0x0112] = 1


@pytest.mark.parametrize(
    "content, mime",
    [
        (file_of(RGB, "PNG"), "image/png"),
        (file_of(RGB, "JPEG"), "image/jpeg"),
        (file_of(RGB, "JPEG", exif=UPRIGHT), "image/jpeg"),
        (file_of(RGB, "WEBP"), "image/webp"),
        (file_of(RGB.convert("P"), "GIF"), "image/gif"),
        (file_of(RGB.convert("L"), "PNG"), "image/png"),
        (file_of(RGB.convert("RGBA"), "PNG"), "image/png"),  # all of it opaque
    ],
    ids=["png", "jpeg", "upright", "webp", "gif", "gray", "opaque"],
)
def test_files_go_as_they_are(content, mime, tmp_path):
    (tmp_path / "picture").write_bytes(content)
    data_url = image_url(content, "it")
    for source in (content, tmp_path / "picture", str(tmp_path / "picture"), data_url):
        prompt = "q" if source is not data_url else [{"role": "user", "content": [{"type": "image", "image": source}]}]
        images = [source] if source is not data_url else ()
        assert pictures_of(shown(yojo.Example(prompt, ANSWERS, images=images))) == [(mime, content)]
    assert same(content, content)


@pytest.mark.parametrize(
    "source",
    [
        file_of(RGB, "JPEG", exif=TURNED),
        file_of(RGB, "PNG", exif=TURNED),
        file_of(Image.fromarray(noise(channels=4)), "PNG"),
        file_of(Image.fromarray(np.full((9, 9), 40000, np.uint16)), "PNG"),
        file_of(RGB, "BMP"),
        file_of(RGB.convert("CMYK"), "JPEG"),
        RGB,
        noise(),
    ],
    ids=["turned jpeg", "turned png", "transparent", "16 bits", "bmp", "cmyk", "pil", "array"],
)
def test_others_become_what_a_person_sees(source):
    ((mime, data),) = pictures_of(shown(yojo.Example("q", ANSWERS, images=[source])))
    assert mime == "image/png" and data is not source and same(data, source)
    assert opened(data).mode == "RGB" and not opened(data).getexif()


def test_detail_is_said_where_it_is_asked_for():
    example = yojo.Example("q", ANSWERS, images=[RGB])
    for detail in (None, "low"):
        (part,) = [p for p in parts_of(shown(example, image_detail=detail)) if p["type"] == "image_url"]
        assert part["image_url"].get("detail") == detail and set(part) == {"type", "image_url"}


def test_images_stand_where_the_text_has_them():
    pictures = [Image.fromarray(noise(seed=n)) for n in range(3)]
    turns = [
        {"role": "system", "content": "Be <b>brief</b>."},
        {"role": "user", "content": "First <image>, then <image>: same?"},
        {"role": "assistant", "content": "No: <image> is a tag.\n\n  Indented ☃"},
        {"role": "user", "content": "And\n<image>"},
    ]
    body = shown(yojo.Example(turns, ANSWERS, images=pictures))
    conversation, responses = blocks_of(body)
    assert conversation == [
        ("message system", "Be <b>brief</b>."),
        ("message user", "First [image 1]\0, then [image 2]\0: same?"),
        ("message assistant", "No: <image> is a tag.\n\n  Indented ☃"),
        ("message user", "And\n[image 3]\0"),
    ]
    assert responses == {"A": "yes", "B": "no way"}
    sent = [np.asarray(opened(data)) for _, data in pictures_of(body)]
    assert all(np.array_equal(a, np.asarray(b)) for a, b in zip(sent, pictures, strict=True))
    kinds = [part["type"] for part in parts_of(body)]
    assert kinds == ["text", "image_url"] * 3 + ["text"]


def test_text_alone_is_a_string():
    body = shown(yojo.Example("née?\n\n ☃ ", ["  a\n", "b\t"]))
    assert isinstance(body["messages"][0]["content"], str)
    assert blocks_of(body) == ([("message user", "née?\n\n ☃ ")], {"A": "  a\n", "B": "b\t"})


def test_tools_and_calls():
    tools = [{"type": "function", "function": {"name": "look", "description": "sieht ↗"}}]
    call = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": 1}'}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "seven", "tool_call_id": "c1"},
    ]
    conversation, _ = blocks_of(shown(yojo.Example(turns, ANSWERS, tools=tools)))
    (tool_name, tool), (_, asked), (_, called), (result_name, result) = conversation
    assert tool_name == "tools" and json.loads(tool) == tools[0] and "↗" in tool
    assert asked == "q" and json.loads(called.strip()) == {"tool_calls": [call]}
    text, _, more = result.partition("\n")
    assert result_name == "message tool" and text == "seven" and json.loads(more) == {"tool_call_id": "c1"}


@pytest.mark.parametrize(
    "example, error, message",
    [
        (
            yojo.Example("see <image>", ANSWERS, id=3),
            ValueError,
            "example 3: the prompt's text has the tag <image>, but no",
        ),
        (yojo.Example("hear <audio>", ANSWERS, id=3), ValueError, "example 3: .* <audio>, but audio is not supported"),
        (yojo.Example("q", ANSWERS, images=["no.png"], id=3), ValueError, "example 3: image 0: no such file: no.png"),
        (
            yojo.Example("q", ANSWERS, images=[RGB, b"x"], id=3),
            ValueError,
            "example 3: image 1: 1 bytes is not a readable",
        ),
        (yojo.Example("q", ANSWERS, images=[3], id=3), TypeError, "example 3: image 0 must be a PIL image"),
        (yojo.Example("q", ANSWERS, images=["http://h/a.png"], id=3), ValueError, "is a URL; download it first"),
        (yojo.Example("q", ANSWERS, videos=["no.mp4"], id=3), ValueError, "example 3: video 0: no such video: no.mp4"),
        (yojo.Example("q", ANSWERS, tools=[{"a": {1}}], id=3), TypeError, "example 3: .*not JSON serializable"),
    ],
)
def test_what_cannot_be_shown(example, error, message):
    with Endpoint(by_length) as endpoint, pytest.raises(error, match=message):
        endpoint.judge().score_many([example])
    assert not endpoint.bodies


def test_literal_tags_are_text():
    conversation, _ = blocks_of(shown(yojo.Example("see <image> <audio>", ANSWERS, literal_tags=True)))
    assert conversation == [("message user", "see <image> <audio>")]


# ---- videos ----


def gray(count):
    """Frames that tell their number."""
    return np.stack([np.full((8, 8, 3), 10 * n + 5, np.uint8) for n in range(count)])


def numbers_of(body):
    return [(np.asarray(opened(data))[0, 0, 0] - 5) // 10 for _, data in pictures_of(body)]


@pytest.mark.parametrize("total, most", [(1, 1), (5, 5), (5, 16), (10, 5), (10, 3), (24, 16), (7, 1), (1000, 16)])
def test_middles_of_equal_pieces(total, most):
    found, count = middles(total, most), min(total, most)
    assert len(found) == count == len(set(found)) and found == sorted(found)
    for n, at in enumerate(found):  # frame `at` fills [at, at + 1), and the middle of piece n lies in it
        assert at <= (n + 0.5) * total / count < at + 1


@pytest.mark.parametrize(
    "source, said",
    [
        (gray(6), "[video 1: all 6 frames, in order][frame 1]\0[frame 2]\0"),
        (gray(20), "[video 1: 8 of its 20 frames, evenly sampled, in order][frame 1]\0[frame 2]\0"),
        (
            Video(gray(20), fps=2),
            "[video 1: 8 of its 20 frames, evenly sampled, in order][frame 1 at 0.50 s]\0[frame 2 at 1.50 s]",
        ),
        (list(gray(3)), "[video 1: all 3 frames, in order][frame 1]\0"),
    ],
    ids=["few", "many", "rate", "list"],
)
def test_frames(source, said):
    body = shown(yojo.Example("look", ANSWERS, videos=[source]), max_frames=8)
    ((_, text),) = blocks_of(body)[0]
    assert text.startswith(said) and text.endswith("\0look")
    total = len(source.source if isinstance(source, Video) else source)
    assert numbers_of(body) == middles(total, 8)


def test_folders_and_files(tmp_path):
    av = pytest.importorskip("av")
    (tmp_path / "frames").mkdir()
    for n, frame in enumerate(gray(12)):
        Image.fromarray(frame).save(tmp_path / "frames" / f"{n}.png")
    assert numbers_of(shown(yojo.Example("q", ANSWERS, videos=[tmp_path / "frames"]), max_frames=4)) == middles(12, 4)
    path = str(tmp_path / "film.mkv")
    with av.open(path, "w") as container:
        stream = container.add_stream("ffv1", rate=4)
        stream.width = stream.height = 16
        stream.pix_fmt = "bgr0"
        for n in range(20):
            frame = av.VideoFrame.from_ndarray(np.full((16, 16, 3), 10 * n + 5, np.uint8), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="bgr0")))
        container.mux(stream.encode())
    for source, expected in (
        (path, middles(20, 6)),
        (Video(path, fps=0.6), middles(20, 3)),
        (Video(path, 4), middles(20, 6)),
    ):
        body = shown(yojo.Example("q", ANSWERS, videos=[source]), max_frames=6)
        assert numbers_of(body) == expected
        assert f"[frame 1 at {expected[0] / 4:.2f} s]" in blocks_of(body)[0][0][1]
    with pytest.raises(ValueError, match="video 0: it has 4 frames a second, fewer than fps=9 asks for"):
        video_frames(Video(path, fps=9), "video 0", 4)
    with open(path, "rb") as file:
        head = file.read()[:200]
    (tmp_path / "cut.mkv").write_bytes(head)
    with pytest.raises(ValueError, match="video 0: .*truncated"):
        video_frames(tmp_path / "cut.mkv", "video 0", 4)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "av", None)
        with pytest.raises(ValueError, match="video 0: .*video files need PyAV"):
            video_frames(path, "video 0", 4)

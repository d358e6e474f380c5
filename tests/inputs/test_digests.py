"""What is the same has the same digest, wherever it lies; what a model would see otherwise has another."""

import base64
import concurrent.futures
import io
import itertools
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image

import yojo
from yojo.inputs.digests import digest, example_key, example_stamp, media_digest


def test_values_that_differ_have_different_digests():
    image = Image.new("P", (2, 2))
    image.putpalette([0, 0, 0, 9, 9, 9])
    other = image.copy()
    other.putpalette([0, 0, 0, 8, 8, 8])
    values = [
        *(None, True, False, 0, 1, 1.0, 1.5, "1", "", "a", "ab", b"a", b"ab", b"", float("inf")),
        *([], [[]], ["a"], ["a", "b"], ["ab"], {}, {"a": 1}, {"a": 2}, {"b": 1}, {"a": {"b": 1}}, [{"a": 1}]),
        *(np.arange(4), np.arange(4).reshape(2, 2), np.arange(4.0), torch.zeros(4)),
        *(Image.new("L", (2, 2)), Image.new("L", (1, 4)), Image.new("L", (2, 2), 1), image, other),
    ]
    found = [digest(value) for value in values]
    for (a, one), (b, other) in itertools.combinations(zip(found, values, strict=True), 2):
        assert a != b, (one, other)
    assert all(len(one) == 32 for one in found)


def test_values_that_are_equal_have_equal_digests():
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1})
    assert digest((1, "x")) == digest([1, "x"]) and digest(b"a") == digest(bytearray(b"a"))
    assert digest("\ud800") != digest("\ud801")  # halves of pairs, which are no text
    with pytest.raises(TypeError, match="a record holds a object, which has no digest"):
        digest([object()])


def test_an_example_is_known_by_what_it_shows(tmp_path):
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(content)
    url = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    make = lambda image, **more: yojo.Example(**({"prompt": "p", "responses": ["r", "s"], "images": [image]} | more))  # noqa: E731
    key = example_key(make(tmp_path / "a.png"))
    for source in (str(tmp_path / "b.png"), content, url):
        assert example_key(make(source)) == key
    assert example_key(make(content, rankings=[1, 2], id="x")) == key
    tools = [{"type": "function", "function": {"name": "f"}}]
    for more in ({"prompt": "q"}, {"responses": ["s", "r"]}, {"images": []}, {"literal_tags": True}, {"tools": tools}):
        assert example_key(make(content, **more)) != key
    inline = [{"role": "user", "content": [{"type": "image", "image": content}, {"type": "text", "text": "p"}]}]
    first = example_key(make(content, prompt=inline, images=[]))
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), (1, 2, 4)).save(buffer, "PNG")
    inline[0]["content"][0]["image"] = buffer.getvalue()
    assert example_key(make(content, prompt=inline, images=[])) != first


def test_videos_are_known_by_their_frames_and_rate(tmp_path):
    for folder in ("v", "w"):
        (tmp_path / folder).mkdir()
        for n in range(3):
            Image.new("RGB", (4, 4), (n, 0, 0)).save(tmp_path / folder / f"{n}.png")
    make = lambda source, fps=None: yojo.Example("p", ["r"], videos=[yojo.Video(source, fps)])  # noqa: E731
    key = example_key(make(tmp_path / "v"))
    frames = [str(tmp_path / "v" / f"{n}.png") for n in range(3)]
    assert example_key(make(tmp_path / "w")) == key == example_key(make(frames))
    assert example_key(make(tmp_path / "v", 2.0)) != key and example_key(make(frames[::-1])) != key
    stamp = example_stamp(make(tmp_path / "v"))
    assert stamp == example_stamp(make(tmp_path / "v"))
    (tmp_path / "v" / "1.png").write_bytes((tmp_path / "v" / "1.png").read_bytes())
    later = (tmp_path / "v" / "2.png").stat().st_mtime_ns + 10**9  # a file system's own clock may stand still meanwhile
    os.utime(tmp_path / "v" / "1.png", ns=(later, later))
    assert example_stamp(make(tmp_path / "v")) != stamp and example_key(make(tmp_path / "v")) == key


def test_a_stamp_is_of_files_alone(tmp_path):
    assert example_stamp(yojo.Example("p", ["r"])) == ""
    assert example_stamp(yojo.Example("p", ["r"], images=[Image.new("L", (2, 2))])) == ""
    with pytest.raises(OSError):
        example_stamp(yojo.Example("p", ["r"], images=[tmp_path / "none.png"]))


@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_an_image_that_several_threads_are_the_first_to_read(form):
    """Pillow reads the file of an opened image when somebody wants its pixels; two at once get something else, and leave it behind."""
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (600, 600, 3), dtype=np.uint8)).save(file, form)
    right = media_digest(Image.open(io.BytesIO(file.getvalue())))
    for _ in range(5):
        image, start = Image.open(io.BytesIO(file.getvalue())), threading.Barrier(3)

        def read(image=image, start=start):
            start.wait()
            return media_digest(image)

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            found = [future.result() for future in [pool.submit(read) for _ in range(3)]]
        assert [*found, media_digest(image)] == [right] * 4

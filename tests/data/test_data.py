"""Records to examples: images in every form, and what no tokenizer should trip over."""

import base64
import os
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch
from data_cases import GOOD, only, png, write_lines
from PIL import Image

import yojo
from yojo import data
from yojo.inputs.images import load_image

# ---- images ----


def test_images_in_every_form(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    path = write_lines(
        tmp_path / "a.jsonl",
        [
            GOOD | {"image": "images/a.png"},
            GOOD | {"image": ["images/a.png", "images/a.png"]},
            GOOD | {"images": ["images/a.png"], "image": None},
            GOOD | {"image": "data:image/png;base64," + base64.b64encode(png()).decode()},
            GOOD | {"image": (tmp_path / "images" / "a.png").as_uri()},
            GOOD | {"image": {"path": str(tmp_path / "images" / "a.png"), "bytes": None}},
            GOOD | {"image": ""},
        ],
    )
    records = data.load(path)
    assert [len(example.images) for example in records] == [1, 2, 1, 1, 1, 1, 0]
    assert all(load_image(image, "image").size == (8, 8) for example in records for image in example.images)
    assert records[0].images == [os.path.join(tmp_path, "images", "a.png")]  # a path, not yet read
    picture = Image.new("RGB", (8, 8))
    example = only(GOOD | {"images": [png(), {"bytes": png(), "path": "a.png"}, picture]})
    assert example.images == [png(), png(), picture]
    elsewhere = write_lines(tmp_path / "images" / "b.jsonl", [GOOD | {"image": "../images/a.png"}])
    assert load_image(data.load(elsewhere)[0].images[0], "image").size == (8, 8)
    assert load_image(data.load(elsewhere, image_root=tmp_path / "images")[0].images[0], "image").size == (8, 8)


def test_images_inside_messages(tmp_path, make_reward_model):
    (tmp_path / "a.png").write_bytes(png((32, 32)))
    parts = [
        {"type": "image", "text": None, "image": "a.png"},
        {
            "type": "image_url",
            "image_url": {"url": "data:image/png;base64," + base64.b64encode(png((32, 32))).decode()},
        },
        {"type": "image", "text": None},
        {"type": "text", "text": "Which digit?", "image": None},
    ]
    record = GOOD | {"prompt": [{"role": "user", "content": parts}], "images": ["a.png"]}
    example = data.load(write_lines(tmp_path / "a.jsonl", [record]))[0]
    expected = yojo.Example("Which digit?", GOOD["responses"], images=[png((32, 32))] * 3, rankings=[2, 1, 3])
    collator = make_reward_model().collator
    batch, other = collator([example]), collator([expected])
    assert torch.equal(batch["input_ids"], other["input_ids"])
    assert torch.equal(batch["pixel_values"], other["pixel_values"])
    missing = GOOD | {"prompt": [{"role": "user", "content": [{"type": "image", "image": "no.png"}, parts[3]]}]}
    with pytest.raises(data.MediaError, match="an image of the prompt: no such file"):
        data.load(write_lines(tmp_path / "b.jsonl", [missing]))[0]


@pytest.mark.parametrize(
    "image, message",
    [
        ("no.png", r"image 0: no such file: .*no\.png; relative paths start at image_root \(--image-root\), .* here"),
        ("folder", r"image 0: a folder, not an image: .*folder"),
        (
            "https://example.org/a.png",
            r"image 0: https://example\.org/a\.png is a URL: .*allow_urls=True \(--allow-urls\)",
        ),
        ("data:image/png;base64,@@", "image 0: the data URL data:image/png;base64.* cannot be read"),
        ("data:image/png,abc", r".* must be data:image/\.\.\.;base64,"),
        ({"bytes": None, "path": None}, r"image 0 has neither bytes nor path: \['bytes', 'path'\]"),
        ([None], "image 0 is empty"),
        ([""], "image 0 is empty"),
    ],
)
def test_images_that_are_not_there(tmp_path, image, message):
    (tmp_path / "folder").mkdir()
    path = write_lines(tmp_path / "a.jsonl", [GOOD | {"image": image}])
    with pytest.raises(data.MediaError, match=rf"example 'a\.jsonl:1': {message}"):
        data.load(path)[0]


def test_urls_are_fetched_when_allowed(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            found = self.path == "/a.png"
            self.send_response(200 if found else 404)
            self.end_headers()
            self.wfile.write(png() if found else b"")

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        assert only(GOOD | {"image": f"{address}/a.png"}, allow_urls=True).images == [png()]
        with pytest.raises(data.MediaError, match="image 0: .*/b.png cannot be fetched: HTTP Error 404"):
            only(GOOD | {"image": f"{address}/b.png"}, allow_urls=True)
    finally:
        server.shutdown()
        server.server_close()


# ---- what no tokenizer, no parser and no folder should trip over ----


@pytest.mark.parametrize(
    "change, message",
    [
        ({"responses": ["a\ud800", "b", "c"]}, r"response 0 holds half of a surrogate pair \(U\+D800\) at character 2"),
        ({"prompt": "\udc00"}, "the prompt holds half of a surrogate pair"),
        ({"prompt": [{"role": "user", "content": [5]}]}, "a content part must be a string or a dict, got 5"),
        ({"prompt": [{"role": "user", "content": [{"type": "text"}]}]}, "a text part needs a string under 'text'"),
        ({"rankings": [1, 2, 10**400]}, "have gaps"),
        ({"rankings": None, "targets": [1, 0, 10**400]}, "a target must be a number from 0 to 1"),
    ],
)
def test_odd_records_are_bad_ones(change, message):
    with pytest.raises(data.DataError, match=f"example 'records:1': .*{message}"):
        data.load([GOOD | change])[0]

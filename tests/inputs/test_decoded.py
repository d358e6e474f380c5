"""Decoded images kept by content: what `load_image` gives, decoded once."""

import base64
import copy
import io
import os
import pickle
import threading

import numpy as np
import pytest
from PIL import Image, ImageFile

import yojo
from yojo.inputs import decoded
from yojo.inputs.decoded import BYTES_PER_PIXEL, Decoded
from yojo.inputs.images import load_image


def picture(seed, size=(24, 16)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def file_bytes(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def same(one, other):
    return one.mode == other.mode and one.info == other.info and one.tobytes() == other.tobytes()


@pytest.fixture()
def decodes(monkeypatch):
    """What Pillow has decoded since: a list of sizes."""
    seen, stock = [], ImageFile.ImageFile.load

    def load(image, *args):
        if image.tile:
            seen.append(image.size)
        return stock(image, *args)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    return seen


@pytest.fixture()
def path(tmp_path):
    picture(0).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def test_a_file_is_decoded_once(path, decodes):
    load, expected = Decoded(), load_image(path, "x")
    decodes.clear()
    assert all(same(load(source, "x"), expected) for source in (path, str(path), path, path.read_bytes()))
    assert decodes == [(24, 16)]
    assert load.size == path.stat().st_size + 24 * 16 * BYTES_PER_PIXEL


def test_two_paths_to_the_same_bytes_are_one(path, tmp_path, decodes):
    (tmp_path / "b.dat").write_bytes(path.read_bytes())
    (tmp_path / "c.png").symlink_to(path)
    load = Decoded()
    images = [load(tmp_path / name, name) for name in ("a.png", "b.dat", "c.png")]
    content = path.read_bytes()
    images += [load(source, "x") for source in (content, bytearray(content), memoryview(content))]
    assert len(decodes) == 1 and all(same(image, images[0]) for image in images)


def test_another_picture_in_the_same_path(path, decodes):
    """Of the same length, size and time, too."""
    load = Decoded()
    picture(0).save(path, "BMP")
    before, times = path.read_bytes(), (1e9, 1e9)
    os.utime(path, times)
    assert same(load(path, "x"), picture(0))
    for at in (len(before) - 1, 60, len(before) // 2):  # some are not among the bytes that are compared first
        changed = bytearray(before)
        changed[at] ^= 1
        path.write_bytes(changed)
        os.utime(path, times)
        assert same(load(path, "x"), load_image(path, "x"))
        assert not same(load(path, "x"), picture(0))
    path.write_bytes(before)
    assert same(load(path, "x"), picture(0))


def test_whoever_gets_an_image_may_change_it(path):
    load = Decoded()
    expected = load_image(path, "x")
    for _ in range(3):
        image = load(path, "x")
        assert same(image, expected)
        image.putpixel((0, 0), (1, 2, 3))
        image.paste((9, 9, 9), (2, 2, 8, 8))
        image.info["transparency"] = 7


MODES = {
    "turned.jpg": lambda: file_bytes(picture(1), "JPEG", exif=_orientation(6)),
    "cmyk.jpg": lambda: file_bytes(picture(2).convert("CMYK"), "JPEG"),
    "palette.gif": lambda: file_bytes(picture(3).convert("P"), "GIF", transparency=3),
    "gray.png": lambda: file_bytes(picture(4).convert("L"), transparency=9),
    "alpha.webp": lambda: file_bytes(picture(5).convert("RGBA"), "WEBP", lossless=True),
    "deep.tiff": lambda: file_bytes(Image.fromarray(np.arange(384, dtype=np.uint16).reshape(16, 24) * 170), "TIFF"),
    "raw.bmp": lambda: file_bytes(picture(6), "BMP"),
    "two.mpo": lambda: file_bytes(picture(7), "MPO", save_all=True, append_images=[picture(8)]),
}


def _orientation(value):
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


@pytest.mark.parametrize("name", MODES)
def test_pictures_are_those_of_load_image(name, tmp_path):
    (tmp_path / name).write_bytes(MODES[name]())
    load, expected = Decoded(), load_image(tmp_path / name, "x")
    for _ in range(2):
        image = load(tmp_path / name, "x")
        assert same(image, expected) and type(image) is type(expected) is Image.Image
        assert image.size == expected.size and image.info == {}


BAD = {
    "missing.png": None,
    "empty.png": b"",
    "text.png": b"no image" * 40,
    "cut.png": file_bytes(picture(0, (64, 64)))[:-500],
    "cut.bmp": file_bytes(picture(0, (64, 64)), "BMP")[:-500],
    "frames.gif": file_bytes(picture(0), "GIF", save_all=True, append_images=[picture(1)]),
    "dark.tiff": file_bytes(Image.fromarray(np.full((4, 4), 9, np.uint16)), "TIFF"),
}


@pytest.mark.parametrize("name", [*BAD, "folder", "nul\0.png", "http://host/a.png", 7, None])
def test_errors_are_those_of_load_image(name, tmp_path):
    """Whether it is the first time or not: what is bad is not kept."""
    is_path = isinstance(name, str) and not name.startswith("http")
    source = tmp_path / name if is_path else name
    if BAD.get(name) is not None:
        source.write_bytes(BAD[name])
    (tmp_path / "folder").mkdir()
    sources = [source, *([str(source), BAD[name]] if BAD.get(name) is not None else [])]
    load = Decoded()
    for source in sources * 2:
        with pytest.raises((TypeError, ValueError)) as expected:
            load_image(source, "example 3: image 0")
        with pytest.raises(type(expected.value)) as got:
            load(source, "example 3: image 0")
        assert str(got.value) == str(expected.value) and type(got.value) is type(expected.value)
        assert "example 3: image 0" in str(got.value)
    assert load.size == 0


def test_pillows_switches_count(tmp_path, monkeypatch):
    path = tmp_path / "cut.bmp"
    path.write_bytes(BAD["cut.bmp"])
    load = Decoded()
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    assert same(load(path, "x"), load_image(path, "x")) and load.size > 0
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", False)
    with pytest.raises(ValueError, match="truncated"):
        load(path, "x")
    whole = file_bytes(picture(0, (64, 64)))
    load(whole, "x")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(ValueError, match="exceeds limit"):
        load(whole, "x")


def test_what_is_decoded_already_goes_straight_through():
    load, image = Decoded(), picture(0)
    for source in (image, np.asarray(image), np.asarray(image).astype(np.float32) / 255):
        assert same(load(source, "x"), image)
    assert load.size == 0


def test_no_more_than_the_limit_is_kept(decodes):
    files = [file_bytes(picture(seed, (32, 32)), "BMP") for seed in range(4)]
    each = len(files[0]) + 32 * 32 * BYTES_PER_PIXEL
    load = Decoded(limit=2 * each)
    for place in (0, 1, 0, 2):
        load(files[place], "x")
        assert load.size <= load.limit
    assert len(decodes) == 3
    for place, decoded_again in ((0, False), (1, True), (0, False), (2, True), (3, True)):  # the oldest has gone
        decodes.clear()
        assert same(load(files[place], "x"), picture(place, (32, 32)))
        assert bool(decodes) == decoded_again and load.size == 2 * each
    small = Decoded(limit=each - 1)
    assert same(small(files[0], "x"), picture(0, (32, 32))) and small.size == 0
    off = Decoded(limit=0)
    assert same(off(files[0], "x"), picture(0, (32, 32))) and off.size == 0
    with pytest.raises(ValueError, match="limit must be at least 0"):
        Decoded(limit=-1)


def test_a_file_that_is_larger_than_all_that_is_kept_is_not_read(tmp_path, monkeypatch):
    picture(0).save(tmp_path / "a.png")
    read = []
    monkeypatch.setattr("builtins.open", lambda *args, **kwargs: read.append(args) or open(*args, **kwargs))
    monkeypatch.setattr(decoded, "load_image", lambda source, name: source)
    assert Decoded(limit=100)(tmp_path / "a.png", "x") == tmp_path / "a.png" and not read


def test_files_of_one_sample_take_turns(monkeypatch):
    """The bytes compared first are the same, the pictures are not."""
    content = bytearray(file_bytes(picture(0, (64, 64)), "BMP"))
    other = bytearray(content)
    other[len(content) // decoded.COMPARED + 2 + 54] ^= 255
    assert decoded._key(bytes(content)) == decoded._key(bytes(other))
    load = Decoded()
    for source in (content, other, content, content, other):
        assert same(load(source, "x"), load_image(source, "x"))
    assert load.size == len(content) + 64 * 64 * BYTES_PER_PIXEL


def test_from_many_threads():
    files = [file_bytes(picture(seed, (40, 40))) for seed in range(6)]
    load = Decoded(limit=3 * (len(files[0]) + 40 * 40 * BYTES_PER_PIXEL))
    wrong, errors = [], []

    def work(seed):
        try:
            for at in np.random.default_rng(seed).integers(0, 6, 60):
                image = load(files[at], "x")
                if not same(image, picture(at, (40, 40))) or load.size > load.limit + len(files[0]) + 6400:
                    wrong.append(at)
                image.paste((0, 0, 0), (0, 0, 40, 40))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and not errors
    assert load.size == sum(len(content) + 6400 for content, _ in load._kept.values()) <= load.limit


def test_pickled_copied_and_forked_it_begins_empty(path):
    load = Decoded(limit=12345678)
    load(path, "x")
    assert load.size > 0
    for other in (pickle.loads(pickle.dumps(load)), copy.deepcopy(load)):
        assert other.size == 0 and other.limit == 12345678
        assert same(other(path, "x"), load(path, "x"))
    with load._lock:  # a thread of the parent is in the middle of something
        child = os.fork()
        if child == 0:
            good = load.size == 0 and same(load(path, "x"), picture(0)) and load.size > 0
            os._exit(0 if good else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert load.size > 0


# ---- in a collator ----


def test_examples_that_show_an_image_decode_it_once(make_reward_model, samples, tmp_path, decodes):
    collator = make_reward_model(layers=1).collator
    (first, _), (second, _) = samples[:2]
    first.save(tmp_path / "a.png")
    first.save(tmp_path / "again.png")
    second.save(tmp_path / "b.png")
    url = "data:image/png;base64," + base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    shown = [["a.png"], ["again.png"], ["b.png", "a.png"], ["b.png"]]
    examples = [yojo.Example("Which?", ["1", "2"], images=[tmp_path / n for n in names]) for names in shown]
    part = {"type": "image_url", "image_url": {"url": url}}
    turn = {"role": "user", "content": [part, {"type": "text", "text": "Which?"}]}
    examples.append(yojo.Example([turn], ["1", "2"]))
    decodes.clear()
    batch = collator(examples)
    assert len(decodes) == 2 and batch["image_grid_thw"].shape[0] == 2
    assert collator.decoded.size > 0
    loaded = pickle.loads(pickle.dumps(collator))
    assert loaded.decoded.size == 0 and len(pickle.dumps(collator)) < len(pickle.dumps(loaded)) + 1000
    second.save(tmp_path / "a.png")
    encoded, expected = collator.encode(examples[0]), collator.encode(examples[3])
    assert (encoded.vision["pixel_values"] == expected.vision["pixel_values"]).all()

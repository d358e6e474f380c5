"""Images: what a person sees, whatever the mode and the file; nothing but a ValueError out of a broken one."""

import io
import os
import signal
import struct
import threading
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps, ImageSequence

from yojo.inputs.images import image_size, load_image

Image.init()
SIZE = (32, 24)
# Modes whose array says all there is to say.
PLAIN = ("1", "L", "LA", "RGB", "RGBA", "I", "I;16", "I;16B", "I;16L", "I;16N", "F")


def random_image(mode, seed, size=SIZE):
    """An image of a mode, of any pixels that make sense in it."""
    shape, rng = (size[1], size[0]), np.random.default_rng(seed)
    if mode == "F":
        return Image.fromarray(rng.uniform(0, 1, shape).astype(np.float32))
    if mode.startswith("I"):
        wide = rng.integers(0, 65536, shape).astype("<i4" if mode == "I" else ">u2" if mode == "I;16B" else "<u2")
        return Image.frombytes(mode, size, wide.tobytes())
    if mode == "1":
        return Image.fromarray(rng.integers(0, 2, shape).astype(bool))
    if mode == "P":
        return Image.fromarray(rng.integers(0, 256, (*shape, 3)).astype(np.uint8)).quantize(40)
    bands = Image.getmodebands(mode)
    return Image.frombytes(mode, size, rng.integers(0, 256, (*shape, bands)).astype(np.uint8).tobytes())


def pixels(source):
    image = load_image(source, "image 0")
    assert image.mode == "RGB" and image.info == {}
    return np.asarray(image)


def file_bytes(image, format, **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def writable():
    """(format, mode) of all that Pillow can write and read back."""
    found = []
    for format in sorted(Image.SAVE):
        for mode in sorted(Image.MODES):
            try:
                data = file_bytes(random_image(mode, 0), format)
                with Image.open(io.BytesIO(data)) as image:
                    image.load()
            except Exception:
                continue
            if format != "ICNS":  # a megapixel each, and a PNG inside
                found.append((format, mode))
    return found


WRITABLE = writable()


# ---- the same picture, however it comes ----


@pytest.mark.parametrize("mode", sorted(Image.MODES))
def test_every_mode_has_its_picture(mode):
    image = random_image(mode, 1)
    seen = pixels(image)
    assert seen.shape == (SIZE[1], SIZE[0], 3) and np.array_equal(pixels(image), seen)
    assert not np.array_equal(pixels(random_image(mode, 2)), seen)
    if mode in PLAIN:
        assert np.array_equal(pixels(np.asarray(image)), seen)


@pytest.mark.parametrize("format", sorted({format for format, _ in WRITABLE}))
@settings(max_examples=6, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 40), height=st.integers(1, 40))
def test_path_bytes_pil_and_array_are_one(format, tmp_path_factory, seed, width, height):
    path = tmp_path_factory.mktemp("images") / f"image.{format.lower()}"
    for mode in (mode for some, mode in WRITABLE if some == format):
        try:
            data = file_bytes(random_image(mode, seed, (width, height)), format)
        except (OSError, ValueError, SystemError):  # a format that wants other sizes
            continue
        path.write_bytes(data)
        try:
            seen = pixels(path)
        except ValueError as error:  # a format that stores 16 bits as floats: refused, in whatever way it comes
            assert "of type float32" in str(error) and format == "SPIDER"
            continue
        loaded = Image.open(path)
        loaded.load()
        for source in (str(path), data, bytearray(data), memoryview(data), Image.open(path), loaded, loaded.copy()):
            assert np.array_equal(pixels(source), seen), (mode, type(source))
        if loaded.mode in PLAIN and "transparency" not in loaded.info and "exif" not in loaded.info:
            assert np.array_equal(pixels(np.asarray(loaded)), seen), mode


def test_processors_find_nothing_to_act_on():
    from transformers.image_transforms import convert_to_rgb

    image = Image.new("P", (4, 4), 1)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putpixel((0, 0), 0)
    for data in (file_bytes(image, "PNG", transparency=0), file_bytes(image, "GIF", transparency=0)):
        left = Image.open(io.BytesIO(data)).convert("RGB")
        assert "transparency" in left.info  # what transformers would paint white, wherever it stands
        for source in (data, left):
            ready = load_image(source, "image 0")
            assert np.array_equal(convert_to_rgb(ready, return_numpy=True), np.asarray(ready))


# ---- alpha ----

MASKS = st.lists(st.booleans(), min_size=30, max_size=30).filter(lambda bits: 0 < sum(bits) < 30)


def strokes(mask, colour, hidden=(0, 0, 0)):
    """[H, W] bool -> RGBA: strokes of a colour on nothing."""
    mask = np.asarray(mask)
    mask = mask if mask.ndim == 2 else mask.reshape(5, 6)
    rgba = np.zeros((*mask.shape, 4), np.uint8)
    rgba[..., :3] = np.where(mask[..., None], colour, hidden)
    rgba[..., 3] = mask * 255
    return Image.fromarray(rgba)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(one=MASKS, other=MASKS, shade=st.sampled_from([0, 1, 100, 128, 200, 240, 255]))
def test_different_strokes_are_different_pictures(one, other, shade):
    seen = [pixels(strokes(mask, (shade,) * 3)) for mask in (one, other)]
    assert (one == other) == np.array_equal(*seen)
    assert np.ptp(seen[0]) > 30  # and can be made out


def test_the_background_shows_what_is_visible():
    mask = np.zeros((20, 20), bool)
    mask[5:9, 3:15] = True
    black, white = pixels(strokes(mask, (0, 0, 0))), pixels(strokes(mask, (255, 255, 255)))
    assert black[0, 0].tolist() == [255] * 3 and black[6, 6].tolist() == [0] * 3
    assert white[0, 0].tolist() == [0] * 3 and white[6, 6].tolist() == [255] * 3
    assert pixels(strokes(mask, (255, 255, 0)))[0, 0].tolist() == [255] * 3  # yellow can be seen on white
    both = np.asarray(strokes(mask, (255, 255, 255))).copy()
    both[1:, 18] = (0, 0, 0, 255)
    assert pixels(both)[0, 0].tolist() == [128] * 3 and set(np.unique(pixels(both))) == {0, 128, 255}
    hidden = pixels(strokes(mask, (0, 0, 0), hidden=(9, 99, 200)))
    assert np.array_equal(hidden, black)  # the colour of what is not visible is no matter


@pytest.mark.parametrize("mode", ["RGBA", "LA", "RGBa", "La", "PA"])
def test_opaque_alpha_changes_nothing(mode):
    gray = np.random.default_rng(3).integers(0, 256, (6, 7), dtype=np.uint8)
    if mode == "PA":
        image = Image.fromarray(gray).convert("P").convert("PA")
    else:
        image = Image.fromarray(gray).convert("LA" if mode in ("LA", "La") else "RGBA").convert(mode)
    assert np.array_equal(pixels(image), np.repeat(gray[..., None], 3, 2))


def test_half_transparent_pictures_lie_on_white():
    rgba = np.random.default_rng(4).integers(0, 256, (16, 16, 4), dtype=np.uint8)
    white = Image.new("RGBA", (16, 16), "white")
    for alpha in (rgba[..., 3], 128):
        rgba[..., 3] = alpha
        image = Image.fromarray(rgba)
        assert np.array_equal(pixels(image), np.asarray(Image.alpha_composite(white, image).convert("RGB")))


def test_nothing_to_be_seen():
    assert pixels(Image.new("RGBA", (3, 2))).min() == 255
    rgba = np.random.default_rng(5).integers(0, 256, (4, 4, 4), dtype=np.uint8)
    rgba[..., 3] = 0
    with pytest.raises(ValueError, match="image 0 is transparent throughout, yet hides different colours: .* drop its"):
        load_image(rgba, "image 0")


def test_transparent_colours():
    gray = np.array([[0, 85, 170, 255]] * 4, np.uint8)
    gray = np.kron(gray, np.ones((2, 2), np.uint8))
    for image, key, hidden in (
        (Image.fromarray(gray), 85, gray == 85),
        (Image.fromarray(np.stack([gray] * 3, -1)), (85, 85, 85), gray == 85),
        (Image.fromarray(gray.astype(np.uint16) * 256 + 7), 85 * 256 + 7, gray == 85),
        (Image.fromarray(gray > 99), 1, gray > 99),
    ):
        expected = np.asarray(image.convert("L")) if image.mode != "I;16" else gray
        expected = np.where(hidden, 255, expected)
        if hidden.sum() > 16:  # white is what is left out: the rest is black
            assert image.mode == "1"
        data = file_bytes(image, "PNG", transparency=key)
        for source in (data, Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data)).copy()):
            assert np.array_equal(pixels(source)[..., 0], expected), image.mode


def chunk(kind, body):
    import zlib

    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(width, height, bits, colour, key, rows):
    """A PNG as Pillow does not write it."""
    import zlib

    head = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = b"".join(b"\0" + row for row in rows)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        chunk(*part) for part in ((b"IHDR", head), (b"tRNS", key), (b"IDAT", zlib.compress(body)), (b"IEND", b""))
    )


def test_transparent_colours_in_units_of_the_file():
    # Two bits a pixel, 0 1 2 0, of which 1 is transparent.
    assert pixels(png(4, 1, 2, 0, struct.pack(">H", 1), [bytes([0b00_01_10_00])]))[0, :, 0].tolist() == [0, 255, 170, 0]
    # Sixteen bits a channel.
    red, blue = struct.pack(">HHH", 60000, 0, 0), struct.pack(">HHH", 0, 0, 60000)
    assert pixels(png(2, 1, 16, 2, red, [red + blue])).tolist() == [[[255] * 3, [0, 0, 234]]]


def test_transparent_entries_of_palettes():
    image = Image.new("P", (6, 6), 1)
    image.putpalette([0, 0, 0, 0, 0, 0, 200, 0, 0])  # entries 0 and 1 are the same black; 0 is transparent
    for x in range(6):
        image.putpixel((x, 0), 0)
    image.putpixel((3, 3), 2)
    for format, key in (("GIF", 0), ("PNG", 0), ("PNG", bytes([0, 255]))):
        data = file_bytes(image, format, transparency=key)
        seen = pixels(data)
        assert seen[0].min() == 255 and seen[1].max() == 0 and seen[3, 3].tolist() == [200, 0, 0], (format, key)
        assert np.array_equal(pixels(Image.open(io.BytesIO(data))), seen)


def test_a_transparent_colour_left_over_from_another_mode_names_no_pixel():
    image = Image.new("RGB", (3, 3), (9, 9, 9))
    image.info["transparency"] = (9, 9, 9)
    assert pixels(image.getchannel("R")).max() == 9
    image.info["transparency"] = b"\0"
    assert pixels(image).max() == 9


# ---- more than eight bits ----


def test_wide_values_are_scaled():
    wide = np.array([[0, 255, 256, 65535, 32768, 4096]], np.uint16)
    expected = [0, 0, 1, 255, 128, 16]
    for source in (wide, wide.astype(">u2"), wide.astype(np.int32), Image.fromarray(wide), torch.from_numpy(wide)):
        assert pixels(source)[0, :, 0].tolist() == expected
    rgba = np.stack([wide, wide, wide, np.full_like(wide, 65535)], -1)
    assert pixels(rgba)[0, :, 1].tolist() == expected
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for factor in (256, 257):  # both ways to widen eight bits
        assert np.array_equal(pixels(eight.astype(np.uint16) * factor)[..., 0], eight)


def test_floats_are_scaled():
    eight = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for dtype in (np.float16, np.float32, np.float64):
        assert np.array_equal(pixels((eight / 255).astype(dtype))[..., 0], eight)
        assert np.array_equal(pixels(eight.astype(dtype))[..., 0], eight)
    assert np.array_equal(pixels(Image.fromarray(eight).convert("F"))[..., 0], eight)
    assert np.array_equal(pixels(torch.from_numpy(eight / 255).requires_grad_())[..., 0], eight)
    assert pixels(torch.ones(3, 4, dtype=torch.bfloat16)).min() == 255
    assert pixels(np.zeros((3, 4))).max() == 0


@pytest.mark.parametrize(
    "array, message",
    [
        (np.array([[0, 3000]], np.uint16), "values up to 3000, of type uint16, which is next to black where 65535 is"),
        (np.array([[0, 200]], np.int32), "values up to 200, of type int32"),
        (np.array([[0, 65536]], np.int32), "values from 0 to 65536, of type int32, where 0..65535 is understood"),
        (np.array([[-1, 60000]], np.int32), "values from -1 to 60000"),
        (np.array([[0, 1.5]]), "values up to 1.5, of type float64, which is next to black where 255 is white"),
        (np.array([[0, 0.01]]), r"values up to 0\.01, .* where 1 is white"),
        (np.array([[-2.1, 2.6]]), r"values from -2\.1 to 2\.6, .* where 0\.\.1 or 0\.\.255 is understood"),
        (np.array([[0, 1000.0]]), r"values from 0\.0 to 1000\.0"),
        (np.array([[0, np.nan]]), r"values that are not finite \(NaN or infinite\)"),
        (np.array([[0, np.inf]], np.float32), "values that are not finite"),
        (np.array([[0, 200]]), "pixels of type int64: give uint8"),
        (np.array([[0, 1j]]), "pixels of type complex128"),
        (np.array([["a"]], object), "pixels of type object"),
        (np.zeros((2, 3, 4, 3), np.uint8), r"must be \[height, width\] or .* channels last, got \[2, 3, 4, 3\] uint8"),
        (np.zeros((3, 4, 5), np.uint8)[..., None][..., 0][:2], r"must be .* got \[2, 4, 5\] uint8"),
        (np.zeros(7, np.uint8), r"must be .* got \[7\] uint8"),
        (np.zeros((4, 0), np.uint8), "zero-sized: 0 x 4 pixels"),
    ],
)
def test_arrays_that_do_not_say_what_they_mean(array, message):
    with pytest.raises(ValueError, match=f"image 0 .*{message}"):
        load_image(array, "image 0")
    if array.ndim == 2 and array.dtype in (np.uint16, np.int32, np.float32) and array.size:
        with pytest.raises(ValueError, match=f"image 0 .*{message}"):
            load_image(Image.fromarray(array), "image 0")


def test_shapes_of_arrays():
    rgb = np.random.default_rng(6).integers(0, 256, (8, 9, 3), dtype=np.uint8)
    expected = pixels(Image.fromarray(rgb))
    for source in (
        rgb,
        torch.from_numpy(rgb),
        np.moveaxis(rgb, 2, 0),
        torch.from_numpy(rgb).permute(2, 0, 1),
        rgb[::1],
    ):
        assert np.array_equal(pixels(source), expected) and tuple(image_size(source)) == (8, 9)
    opaque = np.concatenate([rgb, np.full((8, 9, 1), 255, np.uint8)], 2)
    assert np.array_equal(pixels(opaque), expected) and np.array_equal(pixels(opaque / 255), expected)
    gray = pixels(rgb[..., 0])
    assert np.array_equal(pixels(rgb[..., :1]), gray) and np.array_equal(pixels(rgb[..., 0].T).transpose(1, 0, 2), gray)
    assert np.array_equal(pixels(np.stack([rgb[..., 0], opaque[..., 3]], -1)), gray)
    low = rgb[:3, :4]  # channels last wherever that can be
    assert np.array_equal(pixels(low), low) and np.array_equal(pixels(Image.fromarray(low)), low)


# ---- files ----


def animation(format):
    frames = [Image.new("RGB", (8, 8), (50 * i, 9, 200)) for i in range(3)]
    return file_bytes(frames[0], format, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_several_frames_are_no_image(format, tmp_path):
    if format not in Image.SAVE_ALL:
        pytest.skip(f"this Pillow writes no {format}")
    data = animation(format)
    path = tmp_path / "a.bin"
    path.write_bytes(data)
    for source in (data, path, Image.open(path)):
        with pytest.raises(
            ValueError, match=r"image 0.* holds 3 frames or pages, an image is one: give them as a video"
        ):
            load_image(source, "image 0")
    frames = [frame.copy() for frame in ImageSequence.Iterator(Image.open(path))]
    assert len({pixels(frame).tobytes() for frame in frames}) == 3
    # What `list` makes of the iterator is three times the same object, which shows the last frame.
    with pytest.raises(ValueError, match=r"image\.seek\(i\) and image\.copy\(\)"):
        load_image(list(ImageSequence.Iterator(Image.open(path)))[1], "image 0")


def test_a_still_gif_and_the_first_of_an_mpo_are_images():
    still = Image.open(io.BytesIO(file_bytes(random_image("P", 1), "GIF")))
    seen = pixels(still)
    assert np.array_equal(pixels(still), seen)
    first, second = (random_image("RGB", seed) for seed in (1, 2))
    both = file_bytes(first, "MPO", save_all=True, append_images=[second])
    assert Image.open(io.BytesIO(both)).n_frames == 2
    assert np.array_equal(pixels(both), pixels(file_bytes(first, "JPEG")))


@pytest.mark.parametrize("orientation", range(10))
def test_images_are_turned_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = random_image("RGB", 7)
    for format in ("PNG", "JPEG", "WEBP", "TIFF"):
        data = file_bytes(image, format, exif=exif)
        opened = Image.open(io.BytesIO(data))
        expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
        assert np.array_equal(pixels(data), expected) and np.array_equal(pixels(opened), expected), format
    wide = np.arange(6, dtype=np.uint16).reshape(2, 3) * 10_000
    assert pixels(file_bytes(Image.fromarray(wide), "PNG", exif=exif)).shape[0] == (3 if 5 <= orientation <= 8 else 2)


def test_damaged_exif_data_do_not_count(monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = file_bytes(random_image("RGB", 7), "JPEG", exif=exif)
    assert pixels(data).shape == (32, 24, 3)

    def fail(self, *arguments):
        raise struct.error("unpack requires a buffer of 2 bytes")

    monkeypatch.setattr(Image.Exif, "load", fail)
    assert np.array_equal(pixels(data), pixels(file_bytes(random_image("RGB", 7), "JPEG")))
    for value in ((6,), "6", b"6", None, 6.0):
        monkeypatch.setattr(Image.Image, "getexif", lambda self, value=value: {0x0112: value})
        assert pixels(data).shape == (24, 32, 3)


@pytest.mark.parametrize("format", sorted({format for format, _ in WRITABLE}))
def test_truncated_files(format):
    """Anywhere: refused, unless all pixels are there (an end marker was lost)."""
    for mode in ("1", "P", "RGB", "RGBA"):
        if (format, mode) not in WRITABLE:
            continue
        data = file_bytes(random_image(mode, 8, (13, 11)), format)
        whole = pixels(data)
        refused = 0
        for length in range(0, len(data), max(1, len(data) // 97)):
            lazy = None
            try:
                lazy = Image.open(io.BytesIO(data[:length]))
            except Exception:
                pass
            for source in (data[:length], lazy, lazy):  # a second try at an opened image is no better
                if source is not None:
                    try:
                        assert np.array_equal(pixels(source), whole), (mode, length)
                    except ValueError:
                        refused += 1
        assert refused


@pytest.mark.parametrize("format", sorted({format for format, _ in WRITABLE}))
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    changes=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(0, 255)), min_size=1, max_size=8),
    reach=st.sampled_from([40, 200, 10**6]),
    mode=st.sampled_from(["1", "L", "P", "RGB", "RGBA", "CMYK", "I;16"]),
)
def test_broken_files_raise_nothing_but_value_errors(format, changes, reach, mode):
    if (format, mode) not in WRITABLE:
        return
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "Maker"
    data = bytearray(file_bytes(random_image(mode, 9, (9, 8)), format, exif=exif.tobytes()))
    for place, value in changes:
        data[int(place * min(len(data), reach))] = value
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        image_size(bytes(data))
        try:
            load_image(bytes(data), "example 'x': image 0")
        except ValueError as error:
            assert str(error).startswith("example 'x': image 0")


@pytest.mark.parametrize(
    "error", [struct.error("x"), RuntimeError("x"), KeyError("x"), MemoryError(), RecursionError("x"), TypeError("x")]
)
def test_whatever_a_decoder_raises_names_the_image(error, monkeypatch):
    def fail(self):
        raise error

    from PIL import PngImagePlugin

    data = file_bytes(random_image("RGB", 1), "PNG")
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", fail)
    for source in (data, Image.open(io.BytesIO(data))):
        with pytest.raises(ValueError, match=f"image 0.* is not a readable image: '?{error or type(error).__name__}"):
            load_image(source, "image 0")
    error = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        load_image(data, "image 0")


def test_images_too_large_for_pillow(monkeypatch):
    data = file_bytes(random_image("RGB", 1), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(ValueError, match=r"image 0: .* is not a readable image: .*exceeds limit of 200 pixels"):
        load_image(data, "image 0")
    assert image_size(data) is None


# ---- images that others hold ----


def test_the_callers_image_stays_as_it_is(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    image = Image.open(io.BytesIO(file_bytes(random_image("P", 1), "PNG", exif=exif, transparency=3)))
    before = (image.mode, image.size, dict(image.info), dict(image.getexif()), image.tobytes())
    ready = load_image(image, "image 0")
    ready.paste(0, (0, 0, 9, 9))
    assert (image.mode, image.size, dict(image.info), dict(image.getexif()), image.tobytes()) == before
    for mode in ("RGB", "RGBA", "F"):
        image = random_image(mode, 2)
        image.info["note"] = "mine"
        before = image.tobytes()
        load_image(image, "image 0").paste(0, (0, 0, 9, 9))
        assert image.tobytes() == before and image.info == {"note": "mine"}


def test_images_of_closed_files(tmp_path):
    for format in ("PNG", "GIF", "JPEG", "TIFF", "WEBP"):
        path = tmp_path / format
        random_image("P", 1).convert("RGB").save(path, format)
        with Image.open(path) as image:
            pass
        if format != "WEBP":  # whose file Pillow has read by now
            with pytest.raises(ValueError, match="image 0 is not a readable image: "):
                load_image(image, "image 0")
        with Image.open(path) as image:
            image.load()
        assert np.array_equal(pixels(image), pixels(path))


def test_one_opened_image_for_many_threads():
    data = file_bytes(random_image("RGB", 3, (300, 300)), "PNG")
    expected = pixels(data)
    for _ in range(5):
        shared, failures = Image.open(io.BytesIO(data)), []
        barrier = threading.Barrier(8)

        def work(shared=shared, barrier=barrier, failures=failures):
            barrier.wait()
            try:
                assert np.array_equal(pixels(shared), expected)
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_process_forked_in_the_middle_of_it():
    """A worker forked while another thread decodes an image does not wait for that thread for ever."""
    from yojo.inputs import images

    with images._lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's, of forking with threads
        child = os.fork()
        if not child:
            signal.alarm(20)
            os._exit(0 if images._lock.acquire(timeout=1) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


class Lookalike:
    """An array of another library, which only says how to make a numpy array of it."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array


def test_arrays_of_other_libraries():
    from yojo.inputs.videos import load_video

    array = np.random.default_rng(1).integers(0, 256, (2, 8, 9, 3), dtype=np.uint8)
    assert np.array_equal(pixels(Lookalike(array[0])), array[0]) and image_size(Lookalike(array[0])) == (8, 9)
    for video in (Lookalike(array), [Lookalike(frame) for frame in array]):
        assert np.array_equal(load_video(video, "video 0")[0], array)


def test_sizes_without_decoding(tmp_path):
    image = random_image("RGB", 1)
    path = tmp_path / "a.png"
    image.save(path)
    for source in (image, path, str(path), path.read_bytes(), np.asarray(image)):
        assert image_size(source) == (24, 32)
    assert image_size(b"nothing") is None and image_size(7) is None and image_size("missing.png") is None

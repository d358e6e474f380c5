"""Headers of images: what is refused before any of it is decoded, and that nothing else is."""

import dataclasses
import io

import pytest
from PIL import Image

from tests.serving import image_files as files
from yojo.inputs.images import load_image
from yojo.serving.errors import ApiError
from yojo.serving.images import MOST_INFLATED, MOST_SCANS, MOST_SEGMENTS, check_image
from yojo.serving.settings import Limits

LIMITS = Limits()
HONEST = {
    **{f"{kind}-{mode}": (kind, {"mode": mode}) for kind in ("PNG", "TIFF", "GIF") for mode in ("1", "L", "P", "RGB")},
    **{f"{kind}-{mode}": (kind, {"mode": mode}) for kind in ("PNG", "TIFF", "WEBP") for mode in ("LA", "RGBA")},
    **{f"JPEG-{mode}": ("JPEG", {"mode": mode}) for mode in ("L", "RGB", "CMYK")},
    **{f"BMP-{mode}": ("BMP", {"mode": mode}) for mode in ("1", "L", "P", "RGB")},
    "JPEG-progressive": ("JPEG", {"progressive": True, "size": (300, 200)}),
    "WEBP-lossless": ("WEBP", {"lossless": True}),
    "TIFF-strips": ("TIFF", {"compression": "tiff_lzw", "size": (700, 900)}),
    "TIFF-jpeg": ("TIFF", {"compression": "jpeg", "size": (64, 64)}),
    "PNG-profile": ("PNG", {"icc_profile": bytes(1000)}),
}


@pytest.mark.parametrize("name", HONEST)
def test_honest_images_pass_as_pillow_reads_them(name):
    kind, options = HONEST[name]
    data = files.encoded(kind, **options)
    image = Image.open(io.BytesIO(data))
    assert check_image(data, LIMITS) == (image.format, *image.size)
    assert load_image(data, "image").size == image.size


@pytest.mark.parametrize(
    "data",
    [
        files.png(8, 8),
        files.png(8, 8, *files.texts(1000, 3), *files.texts(1000, 3, b"iTXt"), *files.texts(900, 1, b"iCCP")),
        files.gif(blocks=20),
        files.tiff(8, 8),
        files.bmp(8, 8),
        files.bmp(8, -8),
        files.jpeg_with((0xE1, b"Exif\0\0II*\0\x08\0\0\0\0\0"), b"\xff\xff\xff", (0xFE, b"\xff\xda" * 200)),
        files.many_scans(20),
    ],
)
def test_odd_but_honest_images_pass(data):
    with Image.open(io.BytesIO(data)) as image:
        assert check_image(data, LIMITS) == (image.format, *image.size)


REFUSED = {
    "a PNG of 2.5 thousand million pixels": (files.png(50_000, 50_000, pixels=b""), 413, "image_too_many_pixels"),
    "a PNG one pixel too large": (files.png(40_000_001, 1, pixels=b""), 413, "image_too_many_pixels"),
    "a PNG without width": (files.png(0, 9), 422, "image_empty"),
    "a PNG with a bomb of text": (files.png(8, 8, *files.texts(MOST_INFLATED + 1)), 422, "image_complex"),
    "a PNG with many texts": (files.png(8, 8, *files.texts(900_000, 60)), 422, "image_complex"),
    "a PNG with international texts": (files.png(8, 8, *files.texts(900_000, 9, b"iTXt")), 422, "image_complex"),
    "a PNG with a bomb of a profile": (files.png(8, 8, *files.texts(50 << 20, 1, b"iCCP")), 422, "image_complex"),
    "a PNG of a million chunks": (files.png(8, 8, *[(b"teSt", b"")] * 30_000), 422, "image_complex"),
    "a PNG that does not begin with its header": (b"\x89PNG\r\n\x1a\n" + bytes(40), 422, "image_unreadable"),
    "a PNG of its magic alone": (b"\x89PNG\r\n\x1a\n", 422, "image_unreadable"),
    "an APNG": (files.animated_png(), 422, "image_frames"),
    "a GIF of ten thousand frames": (files.gif(10_000), 422, "image_frames"),
    "a GIF in blocks of a byte": (files.gif(blocks=300_000), 422, "image_complex"),
    "a GIF without height": (files.gif(height=0), 422, "image_empty"),
    "a GIF that is cut off": (files.gif()[:15], 422, "image_unreadable"),
    "a JPEG of 4 thousand million pixels": (files.jpeg_of(65_535, 65_535), 413, "image_too_many_pixels"),
    "a JPEG without width": (files.jpeg_of(0, 8), 422, "image_empty"),
    "a JPEG with junk": (files.jpeg_with((0xFE, b""), bytes(100_000)), 422, "image_complex"),
    "a JPEG of junk": (b"\xff\xd8\xff\xe0\0\2" + bytes(100_000), 422, "image_complex"),
    "a JPEG of padding": (b"\xff\xd8" + b"\xff" * 100_000, 422, "image_complex"),
    "a JPEG of a thousand segments": (files.jpeg_with(*[(0xFE, b"")] * MOST_SEGMENTS), 422, "image_complex"),
    "a JPEG with EXIF data in pieces": (files.jpeg_with(*[(0xE1, b"Exif\0\0x")] * 99), 422, "image_complex"),
    "a JPEG of a hundred scans": (files.many_scans(MOST_SCANS), 422, "image_complex"),
    "a JPEG without a frame": (b"\xff\xd8\xff\xd9", 422, "image_unreadable"),
    "a WebP of 16 bits a side": (files.webp_of(16_000, 16_000), 413, "image_too_many_pixels"),
    "a WebP that is a header": (files.webp_of(16, 16), 422, "image_unreadable"),
    "a WebP that moves": (files.animated_webp(), 422, "image_frames"),
    "a WebP that is cut off": (b"RIFF\x10\0\0\0WEBPVP8 ", 422, "image_empty"),
    "a TIFF of 4 thousand million pixels": (files.tiff(65_000, 65_000), 413, "image_too_many_pixels"),
    "a TIFF with a huge tile": (
        files.tiff(8, 8, (322, 4, 1, 60_000), (323, 4, 1, 60_000)),
        413,
        "image_too_many_pixels",
    ),
    "a TIFF without height": (files.tiff(8, 0), 422, "image_empty"),
    "a TIFF of two pages": (files.two_pages(), 422, "image_frames"),
    "a TIFF that begins again": (files.tiff(8, 8, following=8), 422, "image_frames"),
    "a TIFF whose tags share their bytes": (
        files.tiff(8, 8, (700, 1, 4000, 8), (701, 1, 4000, 8)),
        422,
        "image_complex",
    ),
    "a TIFF of a million strips": (files.tiff(8, 8, (65_000, 4, 1_000_000, 8)), 422, "image_complex"),
    "a TIFF of its magic alone": (b"II*\0", 422, "image_unreadable"),
    "a BMP of many pixels": (files.bmp(30_000, -30_000), 413, "image_too_many_pixels"),
    "a BMP without width": (files.bmp(0, 8), 422, "image_empty"),
    "a BMP to the left": (files.bmp(-8, 8), 422, "image_unreadable"),
    "a BMP of run lengths": (files.bmp(8, 8, compression=1), 422, "image_complex"),
    **{name: (getattr(files, name), 422, "image_format") for name in ("HEIC", "AVIF", "SVG", "PDF", "ZIP", "EPS")},
    "nothing": (b"", 422, "image_format"),
    "text": (b"a picture of a cat", 422, "image_format"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_before_it_is_decoded(name, monkeypatch):
    data, status, code = REFUSED[name]
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("pixels were decoded"))
    with pytest.raises(ApiError) as caught:
        check_image(data, LIMITS, "images.0")
    assert (caught.value.status, caught.value.code, caught.value.param) == (status, code, "images.0")


@pytest.mark.parametrize("name", [name for name, (_, _, code) in REFUSED.items() if code != "image_unreadable"])
def test_pillow_is_not_shown_what_the_walk_refuses(name, monkeypatch):
    monkeypatch.setattr(Image, "open", lambda *_, **__: pytest.fail("Pillow has opened it"))
    with pytest.raises(ApiError):
        check_image(REFUSED[name][0], LIMITS)


def test_limits_are_those_given():
    data = files.png(20, 10)
    check_image(data, dataclasses.replace(LIMITS, pixels=200, image_bytes=len(data)))
    for limits, code in (
        (dataclasses.replace(LIMITS, pixels=199), "image_too_many_pixels"),
        (dataclasses.replace(LIMITS, image_bytes=len(data) - 1), "image_too_large"),
    ):
        with pytest.raises(ApiError) as caught:
            check_image(data, limits)
        assert (caught.value.status, caught.value.code) == (413, code)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_damage_anywhere_is_refused_or_read_and_raises_nothing_else(kind):
    """Every byte of the header once as 0 and once as 255, and every length of the file up to there."""
    whole = files.encoded(kind)
    most = min(len(whole), 200)
    damaged = [whole[:at] for at in range(most)]
    damaged += [whole[:at] + bytes([new]) + whole[at + 1 :] for at in range(most) for new in (0, 255)]
    outcomes = set()
    for data in damaged:
        try:
            header = check_image(data, LIMITS)
        except ApiError as error:
            outcomes.add(error.code)
            assert error.status in (413, 422)
        else:
            assert 0 < header.width * header.height <= LIMITS.pixels
    assert {"image_format", "image_unreadable"} <= outcomes


def test_an_mpo_is_its_first_picture():
    file = io.BytesIO()
    Image.new("RGB", (9, 5)).save(file, "MPO", save_all=True, append_images=[Image.new("RGB", (9, 5), "red")])
    assert check_image(file.getvalue(), LIMITS) == ("MPO", 9, 5)
    assert load_image(file.getvalue(), "image").size == (9, 5)

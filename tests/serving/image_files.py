"""Files of images, honest ones and others, made without the pixels that they promise."""

import io
import struct
import zlib

from PIL import Image


def encoded(format="PNG", size=(31, 17), mode="RGB", **options):
    """bytes of an honest image."""
    file = io.BytesIO()
    Image.linear_gradient("L").resize(size).convert(mode).save(file, format, **options)
    return file.getvalue()


def png(width, height, *chunks, pixels=None):
    """A PNG of bytes in gray.

    Args:
        width, height: as its header says.
        chunks: (name, content) that stand before the pixels.
        pixels: bytes that it inflates to; None: as many as it should.
    """
    if pixels is None:
        pixels = bytes((width + 1) * height)
    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)), *chunks]
    parts += [(b"IDAT", zlib.compress(pixels, 9)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(map(_chunk, parts))


def _chunk(part):
    name, content = part
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))


def texts(size, count=1, kind=b"zTXt"):
    """Chunks of a PNG that inflate to so many bytes each."""
    middle = {b"zTXt": b"\0", b"iCCP": b"\0", b"iTXt": b"\1\0\0\0"}[kind]
    return [(kind, b"name\0" + middle + zlib.compress(bytes(size), 9))] * count


def animated_png():
    """An APNG of two frames."""
    file = io.BytesIO()
    frames = [Image.new("L", (8, 8), shade) for shade in (0, 255)]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:])
    return file.getvalue()


def gif(frames=1, blocks=1, width=8, height=8):
    """A GIF of one colour; its pixels stand in so many blocks of one byte each."""
    frame = b"," + struct.pack("<HHHHB", 0, 0, width, height, 0) + b"\2" + b"\1\x04" * blocks + b"\0"
    return b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6) + frame * frames + b";"


def jpeg_of(width, height):
    """An honest JPEG whose header says another size."""
    whole = bytearray(encoded("JPEG"))
    at = whole.index(b"\xff\xc0")
    whole[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(whole)


def jpeg_with(*segments):
    """An honest JPEG with more at its beginning: (marker, content), or bytes as they are."""
    whole = encoded("JPEG")
    parts = [
        part if isinstance(part, bytes) else bytes([255, part[0]]) + struct.pack(">H", len(part[1]) + 2) + part[1]
        for part in segments
    ]
    return whole[:2] + b"".join(parts) + whole[2:]


def many_scans(count):
    """A progressive JPEG whose scans are repeated until there are so many."""
    whole = encoded("JPEG", size=(64, 64), progressive=True)
    at = whole.rindex(b"\xff\xda")
    return whole[:at] + whole[at:-2] * count + whole[-2:]


def animated_webp():
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 16), shade) for shade in ("black", "white")]
    frames[0].save(file, "WEBP", save_all=True, append_images=frames[1:])
    return file.getvalue()


def webp_of(width, height):
    """The header of a WebP that has nothing else."""
    content = b"WEBPVP8X" + struct.pack("<IB3x", 10, 0)
    content += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    return b"RIFF" + struct.pack("<I", len(content)) + content


def tiff(width, height, *tags, following=0):
    """A TIFF of one strip, in gray.

    Args:
        width, height: as its directory says.
        tags: more entries: (tag, type, count, value).
        following: where the next page is said to be.
    """
    entries = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 8), (259, 3, 1, 1), (262, 3, 1, 1)]
    entries += [(273, 4, 1, 8), (277, 3, 1, 1), (278, 4, 1, height), (279, 4, 1, width * height), *tags]
    pixels = bytes(min(width * height, 4096))
    directory = struct.pack("<H", len(entries)) + b"".join(struct.pack("<HHII", *entry) for entry in sorted(entries))
    return b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels + directory + struct.pack("<I", following)


def two_pages():
    """A TIFF of two pages."""
    file = io.BytesIO()
    Image.new("L", (8, 8)).save(file, "TIFF", save_all=True, append_images=[Image.new("L", (8, 8), 9)])
    return file.getvalue()


def bmp(width, height, compression=0):
    """A BMP in gray, whose pixels are not there where there should be many."""
    header = struct.pack("<IiiHHIIiiII", 40, width, height, 1, 8, compression, 0, 0, 0, 256, 0)
    palette = b"".join(bytes([i, i, i, 0]) for i in range(256))
    pixels = bytes(min(abs(width * height), 4096))
    return b"BM" + struct.pack("<IHHI", 54 + 1024 + len(pixels), 0, 0, 54 + 1024) + header + palette + pixels


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0heicmif1" + bytes(64)
AVIF = b"\0\0\0\x18ftypavif\0\0\0\0avifmif1" + bytes(64)
SVG = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"><image href="file:///etc/passwd"/></svg>'
PDF = b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\nendobj\n%%EOF\n"
ZIP = b"PK\3\4\x14\0\0\0\0\0" + bytes(16) + b"PK\5\6" + bytes(18)
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EOF\n"

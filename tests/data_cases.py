"""What tests of preference data share: a good record, files of records, images."""

import io
import json

from PIL import Image

from yojo import data

GOOD = {"prompt": "Which digit?", "responses": ["seven", "two", "one"], "rankings": [2, 1, 3]}


def write_lines(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def png(size=(8, 8), colour="white"):
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def only(record, **options):
    """The example that one record in memory becomes."""
    return data.load([record], **options)[0]

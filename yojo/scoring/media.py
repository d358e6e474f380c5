"""Records that are written elsewhere: their prompts in TRL's form, and images and videos that are found from there."""

import base64
import io
import os

from yojo.data.columns import CONTENT
from yojo.inputs.images import is_array, load_image
from yojo.inputs.messages import place
from yojo.inputs.videos import Video

# How prompts stand in a file, each form able to say all that those before it can: strings; messages whose content is
# text; messages whose content is a list of parts, with images and videos in columns of their own. A table has one.
FORMS = ("text", "messages", "parts")
MEDIA = ("images", "image", "img_path", "video", "videos")
_PART_TYPES = ("image", "image_url", "input_image", "video", "video_url", "input_video")
_PART_KEYS = ("image", "path", "url", "image_url", "video", "video_url")


# ---- forms of prompts and responses ----


def form_of(fields):
    """The first of `FORMS` that can say what a record says.

    Args:
        fields: `yojo.data.fields.Fields`.
    """
    if fields.images or fields.videos:
        return "parts"
    if isinstance(fields.prompt, str):
        return "text"
    return "messages" if all(isinstance(turn["content"], str) for turn in fields.prompt) else "parts"


def asked(scored, form, literal_tags):
    """What a record asks, as columns of a file.

    In the form "parts" every image stands in the list `images` and every video in `videos`, in the order of their places,
    which are parts without a source: the tags `<image>` of the text, or in front of it where there is no place.

    Args:
        scored: `yojo.scoring.results.Scored`.
        form: of `FORMS`, able to say it.
        literal_tags: tags in the text are just text.

    Returns:
        dict: prompt, and images, videos, fps and tools where they are; `images` always in the form "parts", as TRL wants.
    """
    fields = scored.fields
    columns = {"prompt": fields.prompt}
    if form == "messages" and isinstance(fields.prompt, str):
        columns["prompt"] = [{"role": "user", "content": fields.prompt}]
    elif form == "parts":
        columns = _parted(fields, scored.root, literal_tags)
    if fields.tools is not None:
        columns["tools"] = list(fields.tools)
    return columns


def answer(text, form):
    """A response in a form: a string, or the list of the assistant's one message."""
    if form == "text":
        return text
    return [{"role": "assistant", "content": text if form == "messages" else [{"type": "text", "text": text}]}]


def _parted(fields, root, literal_tags):
    rates = fields.fps if isinstance(fields.fps, (list, tuple)) else [fields.fps] * len(fields.videos)
    videos = [Video(_path_of(source), rate) for source, rate in zip(fields.videos, rates, strict=True)]
    images, shown, turns = [], [], []
    for turn in place(fields.prompt, fields.images, videos, literal_tags):
        parts = []
        for part in turn["content"]:
            if part["type"] == "image":
                images.append(findable(part["image"], root))
            elif part["type"] == "video":
                shown.append(part["video"])
            parts.append(part if part["type"] == "text" else {"type": part["type"]})
        turns.append({**turn, "content": parts})
    columns = {"prompt": turns, "images": images}
    if shown:
        columns["videos"] = [findable(_path_of(v.source if isinstance(v, Video) else v), root) for v in shown]
        rates = [v.fps if isinstance(v, Video) else None for v in shown]
        if any(rate is not None for rate in rates):
            columns["fps"] = rates
    return columns


def _path_of(source):
    """A video's {"path": ...} as the path."""
    return source["path"] if isinstance(source, dict) and isinstance(source.get("path"), str) else source


# ---- the rest of a record ----


def others(scored, columns, taken, in_part):
    """The columns of a record that its format does not read, those the new columns leave no room for under another name.

    Args:
        scored: `yojo.scoring.results.Scored`.
        columns: the column map it was read with.
        taken: names of the new columns.
        in_part: also the columns of which its format reads a part: lists of responses with who wrote them.

    Returns:
        (dict, list of the names that are "original_..." now).
    """
    kept, moved = {}, []
    mapped = {column.split(".")[0] for column in columns.values()} | set(columns.values())
    left = {path.split(".")[0] for path in scored.left} | set(scored.left)
    for name, value in scored.record.items():
        if name not in left:
            if name in CONTENT or name in mapped or name in taken:
                continue  # read, or empty
        elif name in CONTENT and name not in scored.left and not in_part:
            continue
        if name in taken or name in CONTENT:
            moved.append(name)
            name = _free(name, {*scored.record, *taken})
        kept[name] = with_found_parts(value, scored.root)
    return kept, moved


def whole(scored, columns, taken):
    """A record as it stands, but that its media are found from elsewhere.

    Args:
        scored, columns, taken: as of `others`.

    Returns:
        as of `others`.
    """
    record = with_found_parts(scored.record, scored.root)
    for field in MEDIA:
        column = columns.get(field, field)
        if column not in scored.left:
            record = _replaced(record, [column] if column in record else column.split("."), scored.root)
    moved = [name for name in record if name in taken]
    names = {name: _free(name, {*record, *taken}) for name in moved}
    return {names.get(name, name): value for name, value in record.items()}, moved


def _free(name, used):
    while name in used:
        name = f"original_{name}"
    return name


def _replaced(record, path, root):
    if not isinstance(record, dict) or record.get(path[0]) is None:
        return record
    inner = record[path[0]]
    return {**record, path[0]: _replaced(inner, path[1:], root) if path[1:] else findable(inner, root)}


# ---- where media are ----


def findable(source, root):
    """An image or a video of a record, relative paths made absolute; lists are those of several, or of frames.

    Args:
        source: as records have it.
        root: folder that relative paths start from.
    """
    if isinstance(source, (list, tuple)):
        return [findable(one, root) for one in source]
    if isinstance(source, dict):
        if source.get("bytes") is not None:
            return source
        return {key: findable(value, root) if key in ("path", "url") else value for key, value in source.items()}
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        return source
    text = os.fspath(source)
    if text.startswith(("data:", "http://", "https://", "file://")):
        return text
    return os.path.abspath(os.path.join(root, text))


def with_found_parts(value, root):
    """A value in which the image and video parts of messages, at any depth, have absolute paths."""
    if isinstance(value, (list, tuple)):
        return [with_found_parts(one, root) for one in value]
    if not isinstance(value, dict):
        return value
    if value.get("type") not in _PART_TYPES:
        return {key: with_found_parts(one, root) for key, one in value.items()}
    return {key: findable(one, root) if key in _PART_KEYS else one for key, one in value.items()}


def png(picture):
    """The bytes of a PNG file (TIFF for the modes that it lacks) of a PIL image or an array."""
    if is_array(picture):
        picture = load_image(picture, "an image of a record")
    buffer, exif = io.BytesIO(), picture.getexif()
    kind = "PNG" if picture.mode in ("1", "L", "LA", "I", "I;16", "P", "RGB", "RGBA") else "TIFF"
    picture.save(buffer, kind, **({"exif": exif} if len(exif) else {}))
    return buffer.getvalue()


def data_url(data):
    """Bytes as text: a data URL, which `yojo.data.load` reads where images stand."""
    data = bytes(data)
    kind = next((name for start, name in _MAGIC if data.startswith(start)), "application/octet-stream")
    kind = "image/webp" if data[:4] == b"RIFF" and data[8:12] == b"WEBP" else kind
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


_MAGIC = (
    (b"\x89PNG", "image/png"), (b"\xff\xd8\xff", "image/jpeg"), (b"GIF8", "image/gif"), (b"BM", "image/bmp"),
    (b"II*\x00", "image/tiff"), (b"MM\x00*", "image/tiff"),
)  # fmt: skip

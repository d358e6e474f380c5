"""What a prompt says before any template sees it: chat messages in one form, every image and video in its place."""

import re

from yojo.inputs.videos import Video

KINDS = ("image", "video")
ROLES = ("system", "developer", "user", "assistant", "tool", "function", "ipython", "observation")
# LLaVA's convention: where they stand in the text, an image or a video stands.
TAGS = {kind: f"<{kind}>" for kind in (*KINDS, "audio")}
_TAG = re.compile("|".join(f"({TAGS[kind]})" for kind in KINDS))
# OpenAI's names of parts, and under which key what they hold may stand.
_PARTS = {
    "text": ("text", ("text",)),
    "input_text": ("text", ("text", "input_text")),
    "output_text": ("text", ("text", "output_text")),
    "image": ("image", ("image", "path", "url", "image_url")),
    "image_url": ("image", ("image_url", "url")),
    "input_image": ("image", ("image_url", "image", "url")),
    "video": ("video", ("video", "path", "url", "video_url")),
    "video_url": ("video", ("video_url", "url")),
    "input_video": ("video", ("video_url", "video", "url")),
}
# Of parts: empty lists (annotations) say nothing, "auto" is what OpenAI's servers do when nothing is said, and the
# last one tells servers what to keep in memory.
_SAYS_NOTHING = {"detail": ("auto",), "cache_control": None}


def clean(messages):
    """Chat messages in one form, whichever of the well-known ones they came in.

    Args:
        messages: list of dicts with `role` and `content`. Content is a string or a list of parts; parts are strings,
            {"type": "text" | "image" | "video", ...}, OpenAI's (image_url, video_url, input_text, input_image,
            output_text), or dicts with nothing but a text. A turn of the assistant may have no content, or None,
            beside a tool call.

    Returns:
        list of new dicts. Fields and keys that are None are left out, as tables add them to every row; content of the
        assistant that is none becomes ""; other fields of a message are kept. A part is a string, {"type": "text", "text": str}, or {"type": "image" | "video"} with its
        source under the key of its type where it brings one, `fps` of a video, and `index` where it says which of the
        images (videos) it wants.

    Raises:
        TypeError, ValueError: what does not fit the above, with the turn that is wrong.
    """
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"prompt must be a string or a list of chat messages, got {type(messages).__name__}")
    return [_turn(turn) for turn in messages]


def place(prompt, images=(), videos=(), literal_tags=False):
    """Put images and videos where the prompt wants them.

    Tags `<image>` and `<video>` in the text of a turn that is not the assistant's are places; a tag is cut out and the
    rest of the text stays as it is. With parts of a kind there must be no tags of it; without any medium of a kind its
    tags stay text, which only models without images can take. Where there is no place at all, images and then videos
    stand before the text of the first user turn.

    Args:
        prompt: string, or messages as `clean` returns them.
        images, videos: lists; they fill the places of their kind in order.
        literal_tags: tags are just text.

    Returns:
        list of new dicts, the content of each a list of parts: {"type": "text", "text": str} and
        {"type": kind, kind: source}.

    Raises:
        ValueError: more or fewer places than images (videos); tags beside parts; no user turn to put media in.
    """
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turns = [{**turn, "content": _listed(turn["content"])} for turn in turns]
    media = {"image": list(images), "video": list(videos)}
    parts = {kind: sum(part["type"] == kind for turn in turns for part in turn["content"]) for kind in KINDS}
    tags = {kind: 0 if literal_tags else count_tags(turns, kind) for kind in KINDS}
    for kind in KINDS:
        _check_places(kind, len(media[kind]), parts[kind], tags[kind], turns, literal_tags)
    cut = [kind for kind in KINDS if tags[kind] and media[kind]]
    for turn in turns:
        if turn["role"] != "assistant":
            turn["content"] = [new for part in turn["content"] for new in _split(part, cut)]
    for kind in KINDS:
        _fill(turns, kind, media[kind])
    return turns


def count_tags(turns, kind):
    """Tags of a kind (image, video or audio) that mean a place: those of all turns but the assistant's."""
    return sum(
        part["text"].count(TAGS[kind])
        for turn in turns
        if turn["role"] != "assistant"
        for part in turn["content"]
        if part["type"] == "text"
    )


def strings(turns, tools=None):
    """Every string of messages as `place` returns them, and of tools, that a template may write into a prompt."""
    for turn in turns:
        yield from (part["text"] for part in turn["content"] if part["type"] == "text")
        yield from _strings_in({key: value for key, value in turn.items() if key != "content"})
    yield from _strings_in(tools)


def _strings_in(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _strings_in(key)
            yield from _strings_in(inner)
    elif isinstance(value, (list, tuple)):
        for inner in value:
            yield from _strings_in(inner)


# ---- one form ----


def _turn(turn):
    if not isinstance(turn, dict) or "role" not in turn:
        raise TypeError(f"a chat message must be a dict with role and content, got {turn!r}")
    turn = {key: value for key, value in turn.items() if value is not None}
    role, content = turn.get("role"), turn.get("content")
    if role not in ROLES:
        known = {"human": "user", "gpt": "assistant", "bot": "assistant", "model": "assistant"}.get(role)
        hint = f"; it is called {known!r} here" if known else ""
        raise ValueError(f"a chat message's role must be one of {', '.join(ROLES)}, got {role!r}{hint}")
    if content is None:
        if role != "assistant":
            raise TypeError(f"a chat message must be a dict with role and content, got {turn!r}")
        return {**turn, "content": ""}  # a tool call alone: OpenAI's own form has null there, or nothing
    if isinstance(content, (list, tuple)):
        return {**turn, "content": [_part(part) for part in content]}
    if not isinstance(content, str):
        raise TypeError(f"content must be a string or a list of parts, got {content!r}")
    return turn


def _part(part):
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise TypeError(f"a content part must be a string or a dict, got {part!r}")
    part = {key: value for key, value in part.items() if value is not None}
    name = part.pop("type", "text" if "text" in part else None)
    if name not in _PARTS:
        raise ValueError(
            f"a content part must be of type text, image or video (or OpenAI's {', '.join(n for n in _PARTS if '_' in n)}), "
            f"got {name!r} with {_keys(part)}"
        )
    kind, keys = _PARTS[name]
    found = [key for key in keys if key in part]
    source = part.pop(found[0]) if found else None
    for key in found[1:]:  # {"path": ..., "url": ...} of one picture; but two different sources are one too many
        if not _same(source, part.pop(key)):
            raise ValueError(f"a part of type {name} has both {found[0]} and {key}: keep the one that is meant")
    cleaned = {"type": kind}
    if kind == "text":
        if not isinstance(source, str):
            raise TypeError(f"a text part needs a string under 'text', got {source!r}")
        return _said({**cleaned, kind: source}, part)
    if isinstance(source, dict) and "url" in source:  # OpenAI's {"url": ..., "detail": ...}
        part.update({key: value for key, value in source.items() if key != "url"})
        source = source["url"]
    for key in ("index", "fps") if kind == "video" else ("index",):
        if key in part:
            cleaned[key] = part.pop(key)
    return _said(cleaned if source is None else {**cleaned, kind: source}, part)


def _said(cleaned, left):
    """The part, if nothing is left of what came that says something."""
    names = [key for key, value in left.items() if not _says_nothing(key, value)]
    if names:
        raise ValueError(
            f"a part of type {cleaned['type']} has {', '.join(map(repr, names))}, which nothing here reads: take it out; "
            "media stand in parts of their own, sizes of images and sampling of videos are options of the processor"
        )
    return cleaned


def _says_nothing(key, value):
    if isinstance(value, (list, tuple, dict, str)) and not value:
        return True
    return key in _SAYS_NOTHING and (_SAYS_NOTHING[key] is None or value in _SAYS_NOTHING[key])


def _same(one, other):
    return one is other or (type(one) is type(other) and isinstance(one, (str, bytes)) and one == other)


def _keys(part):
    return "no keys" if not part else f"the keys {', '.join(map(str, part))}"


# ---- places ----


def _listed(content):
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    return [{"type": "text", "text": part} if isinstance(part, str) else dict(part) for part in content]


def _check_places(kind, given, parts, tags, turns, literal_tags):
    """Parts and tags of one kind against the media of it."""
    tag = TAGS[kind]
    if not tags:
        said = sum(part["text"].count(tag) for turn in turns for part in turn["content"] if part["type"] == "text")
        if given and said and not parts and not literal_tags:
            raise ValueError(
                f"{given} {kind}s are given, and the prompt's only {tag} stands in an assistant turn, where it is text: "
                f"put the tag into the user turn the {kind} belongs to, or keep it as text with literal_tags=True"
            )
        return
    if parts:
        raise ValueError(
            f"the prompt has both {kind} parts ({parts}) and the tag {tag} in its text ({tags}): which of them is meant "
            "cannot be told; take one out, or keep the tags as text with literal_tags=True"
        )
    if given and given != tags:
        raise ValueError(
            f"the prompt's text has {tags} {tag} tags, but {given} {kind}s are given: give one for each tag, or keep "
            "the tags as text with literal_tags=True"
        )


def _split(part, kinds):
    """A text part cut where tags of these kinds stand; they become parts that wait for their media."""
    if part["type"] != "text" or not kinds:
        return [part]
    pieces = []
    before = 0
    for found in _TAG.finditer(part["text"]):
        kind = KINDS[found.lastindex - 1]
        if kind in kinds:
            pieces += [{**part, "text": part["text"][before : found.start()]}, {"type": kind}]
            before = found.end()
    if not before:
        return [part]
    pieces.append({**part, "text": part["text"][before:]})
    return [piece for piece in pieces if piece.get("text") != ""]


def _fill(turns, kind, media):
    """Put images (videos) into the parts that wait for one, or before the text of the first user turn."""
    own = [part for turn in turns for part in turn["content"] if part["type"] == kind]
    waiting = [part for part in own if part.get(kind) is None]
    if not own and media:
        turn = next((turn for turn in turns if turn["role"] == "user"), None)
        if turn is None:
            raise ValueError(f"{len(media)} {kind}s but no user turn to put them in")
        at = _front(turn["content"], kind)
        turn["content"][at:at] = [{"type": kind, kind: item} for item in media]
    elif len(waiting) != len(media):
        raise ValueError(
            f"the prompt has {len(waiting)} {kind} placeholders to fill, but {len(media)} {kind}s are given"
        )
    else:
        for part, item in zip(waiting, _in_order(waiting, kind, media), strict=True):
            part[kind] = item
    for part in own:
        part.pop("index", None)
        if "fps" in part:
            part[kind] = _at_rate(part[kind], part.pop("fps"))


def _in_order(waiting, kind, media):
    """Media in the order of the parts, which may say which they want: {"type": "image", "index": 1}."""
    wanted = [part.get("index") for part in waiting]
    if all(index is None for index in wanted):
        return media
    if sorted(wanted, key=str) != sorted(range(len(media)), key=str):
        raise ValueError(
            f"the {kind} parts ask for the {kind}s {wanted}, but each of the {len(media)} must be asked for once, from 0"
        )
    return [media[index] for index in wanted]


def _front(parts, kind):
    """Where media without a place of their own stand among the parts of a turn: in front, videos after images."""
    if kind == "image":
        return 0
    return next((at for at, part in enumerate(parts) if part["type"] != "image"), len(parts))


def _at_rate(source, fps):
    rate = source.fps if isinstance(source, Video) else None
    if rate is not None and rate != fps:
        raise ValueError(f"a video part has fps={fps}, its video another: {rate}; keep one of them")
    return Video(source.source if isinstance(source, Video) else source, fps)

"""What records of all formats have in common: media and their rates, a system prompt, tools, and what is left over."""

import dataclasses
import json
import typing

from yojo.data.columns import given, one_of, same
from yojo.inputs.images import is_array
from yojo.inputs.messages import KINDS, TAGS, clean


@dataclasses.dataclass
class Fields:
    """What a record says, before media are looked up and ranks are checked.

    Attributes:
        prompt: string or chat messages.
        responses: list.
        rankings: list of ranks, 1 = best; or None.
        targets: list of floats that sum to 1, instead of rankings; or None.
        images, videos: lists of whatever the record holds.
        fps: frames per second of the videos, one number or one each; or None.
        tools: list of dicts, or None.
        tags: kind -> how many tags stood in text that is left out; empty where there is no such text.
    """

    prompt: typing.Any
    responses: typing.Any
    rankings: typing.Any = None
    targets: typing.Any = None
    images: list = dataclasses.field(default_factory=list)
    videos: list = dataclasses.field(default_factory=list)
    fps: typing.Any = None
    tools: list | None = None
    tags: dict = dataclasses.field(default_factory=dict)


def turns_of(prompt):
    """A prompt as messages: a string is what the user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def read_images(row):
    value = one_of(row, "images", "image", "img_path", as_given=_as_list)
    return _as_list(value) if given(value) else []


def read_videos(row):
    # A list under `video` is the frames of one.
    video = row.get("video")
    one = [video] if given(video) or isinstance(video, (list, tuple)) else []
    several = _as_list(row.get("videos")) if given(row.get("videos")) else []
    if given(video) and several and not same(one, several):
        raise ValueError(
            "both videos and video are given, and they differ: keep one, or leave one out with ignore_columns=['video'] "
            "(--ignore-columns video)"
        )
    return several or one


def unstacked(value, name):
    """A list of pictures (videos) where equally large ones were put into one array, as numpy's format of tables does."""
    if not is_array(value):
        return value
    one, shape = {"images": 3, "videos": 4}[name], tuple(value.shape)
    if len(shape) > one:
        return list(value)
    if len(shape) == one and shape[-1] not in (1, 3, 4):
        raise ValueError(
            f"{name} is an array of shape {list(shape)}, which may be several without channels or one with channels first: "
            f"give a list of {name}"
        )
    return value


def _as_list(value):
    return list(value) if isinstance(value, (list, tuple)) else [value]


def read_system(row):
    system = one_of(row, "system", "system_prompt")
    if given(system) and not isinstance(system, str):
        raise ValueError(f"system must be a string, what the system turn says, got {kind_of(system)}")
    return system if given(system) else None


def with_system(prompt, system):
    """A system prompt in front, unless the prompt has it already."""
    if system is None or not isinstance(prompt, (str, list, tuple)):
        return prompt
    turns = list(turns_of(prompt))
    if turns and turns[0].get("role") in ("system", "developer"):
        if text_of(turns[0]).strip() != system.strip():
            raise ValueError(
                f"system says {end_of(system)!r} and the prompt's own system turn {end_of(text_of(turns[0]))!r}: keep one"
            )
        return prompt
    return [{"role": "system", "content": system}, *turns]


def read_tools(row):
    """A list of dicts, which data sets may store as JSON, whole or tool by tool."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _from_json(tools, "tools")
    if not given(tools):
        return None
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"tools must be a list of objects, or that list as JSON, got {kind_of(tools)}")
    tools = [_from_json(tool, f"tool {i}") if isinstance(tool, str) else tool for i, tool in enumerate(tools)]
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise ValueError(f"tool {i} must be an object, its description, got {kind_of(tool)}")
    return tools


def _from_json(text, name):
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is a string that is not JSON: {error}") from error


def says_again(value, fields):
    """Whether a column repeats what others say, as `messages` does beside `chosen`."""
    prompt, responses = fields.prompt, fields.responses
    if same(value, fields.rankings) or same(value, prompt) or same(value, turns_of(prompt)):
        return True
    if any(same(value, response) for response in responses):
        return True
    if not isinstance(value, (list, tuple)) or not value:
        return False
    if all(any(same(item, response) for response in responses) for item in value):
        return True
    try:
        turns = clean(value)
    except (TypeError, ValueError):  # no messages
        return False
    asked = turns_of(prompt)
    whole = [[*asked, {"role": "assistant", "content": response}] for response in responses]
    return same(turns, asked) or any(same(turns, one) for one in whole)


def left_in_parts(row):
    """Paths of what parts of messages hold and `yojo.inputs.messages.clean` leaves out, dict path -> why."""
    left = {}
    for value in row.values.values():
        for turn in value if isinstance(value, (list, tuple)) else ():
            content = turn.get("content") if isinstance(turn, dict) else None
            for part in content if isinstance(content, (list, tuple)) else ():
                left |= _left_in_part(part) if isinstance(part, dict) else {}
    return left


def _left_in_part(part):
    inner = [part.get(name) for name in ("image_url", "video_url")]
    fields = {**part, **{key: value for each in inner if isinstance(each, dict) for key, value in each.items()}}
    left = {f"parts.{name}": "is for a server" for name in ("detail", "cache_control") if given(fields.get(name))}
    if given(part.get("index")) and any(given(part.get(name)) for name in ("image", "video", "path", "url")):
        left["parts.index"] = "the part brings its own"
    return left


def _video_parts(prompt):
    """The video parts of messages that bring their own."""
    for turn in prompt if isinstance(prompt, list) else ():
        for part in turn["content"] if isinstance(turn["content"], list) else ():
            if isinstance(part, dict) and part["type"] == "video" and part.get("video") is not None:
                yield part


def rate_without_video(row, fields):
    """Names of the columns that tell how fast videos go that are not there; those in parts take the record's rate."""
    names = [name for name in ("fps", "sampling_interval") if given(row.get(name))]
    if not names:
        return []
    own = list(_video_parts(fields.prompt))
    if isinstance(fields.fps, (list, tuple)):
        if not fields.videos:
            raise ValueError(f"{len(fields.fps)} rates under {names[0]} for 0 videos: give one number, or one for each")
        return []
    for part in own:
        part.setdefault("fps", fields.fps)
    return [] if fields.videos or own else names


def check_tags(fields):
    """The tags of a text that is left out stand for the media, unless the prompt has tags of its own."""
    asked = tags_in(fields.prompt if isinstance(fields.prompt, str) else "\n".join(map(text_of, fields.prompt)))
    for kind, media in (("image", fields.images), ("video", fields.videos)):
        count = fields.tags.get(kind, 0)
        if count and not asked[kind] and count != len(media):
            raise ValueError(f"{count} <{kind}> in the text, but {len(media)} {kind}s are given")


def tags_in(text):
    return {kind: text.count(TAGS[kind]) for kind in KINDS}


def read_fps(row):
    fps, interval = row.get("fps"), row.get("sampling_interval")
    for name, value in (("fps", fps), ("sampling_interval", interval)):
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if number is not None:
                _check_rate(number, name)
    if fps is not None and interval is not None:
        raise ValueError(
            f"both fps ({fps}) and sampling_interval ({interval}) are given: keep one (fps = 1 / sampling_interval)"
        )
    if interval is None:
        return fps
    if isinstance(interval, (list, tuple)):
        return [None if seconds is None else 1 / seconds for seconds in interval]
    return 1 / interval


def _check_rate(number, name):
    if not (is_number(number) and number > 0):
        raise ValueError(f"{name} must be a number above 0, got {number!r}")
    if not 1e-9 < number < 1e9:
        raise ValueError(f"{name} must be a number of frames, or seconds, that videos have, got {brief(number)}")


def text_of(turn):
    content = turn.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(
        part if isinstance(part, str) else part["text"] for part in content if isinstance(part, str) or is_text(part)
    )


def is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def kind_of(value):
    return "nothing" if value is None else type(value).__name__


def brief(value, length=40):
    text = (
        str(value)
        if not isinstance(value, int) or value.bit_length() < 200
        else f"a number of {value.bit_length()} bits"
    )
    return text if len(text) <= length else text[:length] + "..."


def end_of(text, length=60):
    return text.strip()[-length:]


def is_text(part):
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)

"""The preference data sets people have: how to tell which one a record is from, and what it says in our words."""

import dataclasses
import fractions
import json
import re
import typing

from yojo.data import critic
from yojo.data.columns import CONTENT, OF_A_RESPONSE, Row, given, one_of, reason, same
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


def read(record, format, ignore=(), used=()):
    """What a record of a format says, and which of its columns are left.

    A format reads prompt, responses and ranks; media, a system prompt and tools are the same in all of them.

    Args:
        record: dict, its column map applied.
        format: name of the format.
        ignore: paths that the user has said may be left.
        used: columns that have been read already, as a column map does.

    Returns:
        (`Fields`, dict path -> why it may be left, or None where nobody knows it).

    Raises:
        TypeError, ValueError: a record that does not fit the format, or has a column that must not be left.
    """
    stacked = [name for name in ("images", "videos") if name in record and name not in ignore]
    record = record | {name: _unstacked(record[name], name) for name in stacked}
    ignored = [name for name in record if name in ignore and given(record[name])]
    row = Row({name: value for name, value in record.items() if name not in ignore})
    for name in used:
        row.get(name)
    fields = FORMATS[format](row)
    fields.images, fields.videos = _images(row), _videos(row)
    fields.fps, fields.tools = _fps(row), _tools(row)
    system = _system(row)
    left = {name: "by ignore_columns" for name in ignored}
    for name in row.own_left():
        if name in CONTENT:
            if not _says_again(row.values[name], fields):
                raise ValueError(_must_not_be_left(name, format))
            left[name] = "says again what other columns say"
    for path in row.left():
        if "." in path:
            refuse_content(path, format, ignore)
        left.setdefault(path, "by ignore_columns" if path in ignore else reason(format, path))
    fields.prompt = _with_system(fields.prompt, system)
    if fields.tags:
        _check_tags(fields)
    left |= _left_in_parts(row)
    left |= dict.fromkeys(_rate_without_video(row, fields))
    return fields, left


# ---- the formats: prompt, responses, ranks ----


def native(row):
    """The paper's JSONL: prompt or question, responses, rankings (or targets)."""
    responses = row.get("responses")
    if isinstance(responses, str) or not isinstance(responses, (list, tuple)):
        raise ValueError(f"responses must be a list of strings, got {_kind(responses)}{_columns(row)}")
    rankings, targets = row.get("rankings"), row.get("targets")
    if rankings is not None and targets is not None:
        raise ValueError("both rankings and targets are given: keep the one that your loss needs")
    return Fields(
        prompt=_prompt(row, "prompt", "question"),
        responses=list(responses),
        rankings=_listed(rankings, "rankings"),
        targets=_listed(targets, "targets"),
    )


def trl(row):
    """TRL preference: prompt, chosen, rejected as strings or messages, with the prompt inside them or apart."""
    chosen, rejected = row.get("chosen"), row.get("rejected")
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, (str, list, tuple)):
            raise ValueError(f"{name} must be a string or a list of messages, got {_kind(value)}{_columns(row)}")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("chosen and rejected must both be strings or both be lists of messages")
    prompt = one_of(row, "prompt", "question", as_given=_turns)
    if isinstance(chosen, str):
        if prompt is None:
            prompt, chosen, rejected = _shared_wrapper(chosen, rejected)
        responses = [chosen, rejected]
    else:
        prompt, responses = _shared_turns(prompt, clean(chosen), clean(rejected))
    prompt = clean(prompt) if isinstance(prompt, (list, tuple)) else prompt
    return Fields(prompt=prompt, responses=responses, rankings=[1, 2])


def rewardbench2(row):
    """RewardBench 2: prompt, chosen[] (rank 1), rejected[] (rank 2)."""
    chosen, rejected = _listed(row.get("chosen"), "chosen"), _listed(row.get("rejected"), "rejected")
    if chosen is None or rejected is None:
        raise ValueError(f"chosen and rejected must be lists of strings{_columns(row)}")
    if not chosen:
        raise ValueError("chosen is empty: no response has rank 1")
    return Fields(
        prompt=_prompt(row, "prompt"),
        responses=[*chosen, *rejected],
        rankings=[1] * len(chosen) + [2] * len(rejected),
    )


def nectar(row):
    """Nectar: prompt in a Human/Assistant wrapper, answers[{answer, rank}]."""
    answers = _inner_rows(row, "answers")
    return Fields(
        prompt=unwrapped(_prompt(row, "prompt")),
        responses=[answer.get("answer") for answer in answers],
        rankings=[answer.get("rank") for answer in answers],
    )


def ultrafeedback(row):
    """UltraFeedback: instruction, completions[{response, annotations.<aspect>.Rating}]; ranked by the mean rating."""
    return _rated(row, _prompt(row, "instruction"))


def vlfeedback(row):
    """VLFeedback: prompt, img_path, completions[{response, annotations.<aspect>.Rating}]; ranked by the mean rating."""
    return _rated(row, _prompt(row, "prompt"))


def rlaifv(row):
    """RLAIF-V: question, image, chosen, rejected."""
    return Fields(prompt=_prompt(row, "question"), responses=[row.get("chosen"), row.get("rejected")], rankings=[1, 2])


def nemo_rl(row):
    """NeMo-RL: context (string or messages), completions[{rank, completion}], a lower rank is better, 0 may be the best."""
    completions = _inner_rows(row, "completions")
    ranks = [completion.get("rank") for completion in completions]
    if all(_is_number(rank) for rank in ranks) and ranks and min(ranks) == 0:
        ranks = [rank + 1 for rank in ranks]
    responses = []
    for i, completion in enumerate(completions):
        answer = completion.get("completion")
        if isinstance(answer, (list, tuple)):
            answer = _only_reply(clean(answer), f"completion {i}")
        responses.append(answer)
    return Fields(prompt=_prompt(row, "context"), responses=responses, rankings=ranks)


def llava_critic(row):
    """LLaVA-Critic-113k: a judge's prompt with a question and two responses, and its verdict, in `conversations`.

    The judge's instructions and reasons are left out, they are not the question's; a system prompt beside them is taken
    for the question's.
    """
    turns = _inner_rows(row, "conversations")
    said = [turn.get("from") for turn in turns]
    if said != ["human", "gpt"]:
        raise ValueError(f"a LLaVA-Critic record has a human turn and a gpt turn, got {said}")
    question, responses, rankings, rest = critic.parse(*(turn.get("value") for turn in turns))
    return Fields(prompt=question, responses=responses, rankings=rankings, tags=_tags(rest))


FORMATS = {
    "yojo": native,
    "trl": trl,
    "rewardbench2": rewardbench2,
    "nectar": nectar,
    "ultrafeedback": ultrafeedback,
    "vlfeedback": vlfeedback,
    "rlaifv": rlaifv,
    "llava_critic": llava_critic,
    "nemo_rl": nemo_rl,
}
# What a record of each format must have, as error messages tell it.
COLUMNS = {
    "yojo": "prompt or question, responses, rankings or targets",
    "trl": "chosen, rejected, and prompt unless they are conversations",
    "rewardbench2": "prompt, chosen[], rejected[]",
    "nectar": "prompt, answers",
    "ultrafeedback": "instruction, completions",
    "vlfeedback": "prompt, completions, img_path",
    "rlaifv": "question, chosen, rejected, image",
    "llava_critic": "conversations, image",
    "nemo_rl": "context, completions",
}
# What a column map may fill.
FIELDS = {
    "prompt", "question", "responses", "rankings", "targets", "image", "images", "img_path", "video", "videos", "fps",
    "sampling_interval", "chosen", "rejected", "answers", "instruction", "completions", "conversations", "context", "system",
    "tools",
}  # fmt: skip


def detect(record, columns):
    """The name of the format, or None.

    Args:
        record: a record of the file, its column map applied.
        columns: the columns found.
    """
    has = set(columns).union(record).issuperset
    if has({"responses"}) and (has({"prompt"}) or has({"question"})):
        return "yojo"
    if has({"answers", "prompt"}):
        return "nectar"
    for name, prompt in (("nemo_rl", "context"), ("ultrafeedback", "instruction"), ("vlfeedback", "prompt")):
        if has({"completions", prompt}):
            return name
    if has({"chosen", "rejected"}):
        chosen, rejected = record.get("chosen"), record.get("rejected")
        lists = all(isinstance(value, (list, tuple)) for value in (chosen, rejected))
        if lists and has({"prompt"}) and all(isinstance(item, str) for item in (*chosen, *rejected)):
            return "rewardbench2"
        return "rlaifv" if has({"question"}) and not has({"prompt"}) and isinstance(chosen, str) else "trl"
    return "llava_critic" if has({"conversations"}) else None


def unwrapped(text):
    """A prompt in a Human/Assistant wrapper as messages, or as a string when it is one user turn.

    Raises:
        ValueError: a text without the wrapper, or one that does not end where the assistant speaks.
    """
    if not isinstance(text, str):
        raise ValueError(f"the prompt must be a string, got {_kind(text)}")
    before, *pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    turns = [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if not turns or turns[-1] != {"role": "assistant", "content": ""}:
        raise ValueError(
            "the prompt is not in the wrapper '\\n\\nHuman: ...\\n\\nAssistant: ' that ends where the assistant speaks; "
            f"it ends {_end_of(text)!r}"
        )
    turns.pop()
    if before.strip():
        turns.insert(0, {"role": "system", "content": before.strip()})
    if not any(turn["role"] == "user" and turn["content"] for turn in turns):
        raise ValueError("the prompt is empty")
    return turns[0]["content"] if len(turns) == 1 and turns[0]["role"] == "user" else turns


def dense_ranks(scores):
    """Ranks of scores, the highest first, equal scores tied: [4, 5, 4] -> [2, 1, 2]."""
    order = sorted(set(scores), reverse=True)
    return [order.index(score) + 1 for score in scores]


# ---- parts of records ----


def _prompt(row, *names):
    value = one_of(row, *names, as_given=_turns)
    if value is None:
        raise ValueError(f"no {' or '.join(names)}{_columns(row)}")
    return clean(value) if isinstance(value, (list, tuple)) else value


def _turns(prompt):
    """A prompt as messages: a string is what the user says."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def _images(row):
    value = one_of(row, "images", "image", "img_path", as_given=_as_list)
    return _as_list(value) if given(value) else []


def _videos(row):
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


def _unstacked(value, name):
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


def _system(row):
    system = one_of(row, "system", "system_prompt")
    if given(system) and not isinstance(system, str):
        raise ValueError(f"system must be a string, what the system turn says, got {_kind(system)}")
    return system if given(system) else None


def _with_system(prompt, system):
    """A system prompt in front, unless the prompt has it already."""
    if system is None or not isinstance(prompt, (str, list, tuple)):
        return prompt
    turns = list(_turns(prompt))
    if turns and turns[0].get("role") in ("system", "developer"):
        if _text(turns[0]).strip() != system.strip():
            raise ValueError(
                f"system says {_end_of(system)!r} and the prompt's own system turn {_end_of(_text(turns[0]))!r}: keep one"
            )
        return prompt
    return [{"role": "system", "content": system}, *turns]


def _tools(row):
    """A list of dicts, which data sets may store as JSON, whole or tool by tool."""
    tools = row.get("tools")
    if isinstance(tools, str):
        tools = _from_json(tools, "tools")
    if not given(tools):
        return None
    if not isinstance(tools, (list, tuple)):
        raise ValueError(f"tools must be a list of objects, or that list as JSON, got {_kind(tools)}")
    tools = [_from_json(tool, f"tool {i}") if isinstance(tool, str) else tool for i, tool in enumerate(tools)]
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            raise ValueError(f"tool {i} must be an object, its description, got {_kind(tool)}")
    return tools


def _from_json(text, name):
    if not text.strip():
        return None
    try:
        return json.loads(text)
    except ValueError as error:
        raise ValueError(f"{name} is a string that is not JSON: {error}") from error


def _says_again(value, fields):
    """Whether a column repeats what others say, as `messages` does beside `chosen`."""
    prompt, responses = fields.prompt, fields.responses
    if same(value, fields.rankings) or same(value, prompt) or same(value, _turns(prompt)):
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
    asked = _turns(prompt)
    whole = [[*asked, {"role": "assistant", "content": response}] for response in responses]
    return same(turns, asked) or any(same(turns, one) for one in whole)


def refuse_content(path, format, ignore):
    """Raise ValueError where a field of an object, by its name, must not be left."""
    if path.rpartition(".")[2] in CONTENT | OF_A_RESPONSE and path not in ignore and reason(format, path) is None:
        raise ValueError(_must_not_be_left(path, format))


def _must_not_be_left(name, format):
    return (
        f"the column {name!r} is not read by the format {format}, and what it says would be lost: put it into the prompt, map "
        f"it to what it is (--map FIELD={name}), or leave it out knowingly with ignore_columns=[{name!r}] "
        f"(--ignore-columns {name})"
    )


def _left_in_parts(row):
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


def _rate_without_video(row, fields):
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


def _check_tags(fields):
    """The tags of a text that is left out stand for the media, unless the prompt has tags of its own."""
    asked = _tags(fields.prompt if isinstance(fields.prompt, str) else "\n".join(map(_text, fields.prompt)))
    for kind, media in (("image", fields.images), ("video", fields.videos)):
        count = fields.tags.get(kind, 0)
        if count and not asked[kind] and count != len(media):
            raise ValueError(f"{count} <{kind}> in the text, but {len(media)} {kind}s are given")


def _tags(text):
    return {kind: text.count(TAGS[kind]) for kind in KINDS}


def _fps(row):
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
    if not (_is_number(number) and number > 0):
        raise ValueError(f"{name} must be a number above 0, got {number!r}")
    if not 1e-9 < number < 1e9:
        raise ValueError(f"{name} must be a number of frames, or seconds, that videos have, got {_brief(number)}")


def _listed(value, name):
    if value is None or isinstance(value, list):
        return value
    if isinstance(value, tuple):
        return list(value)
    if hasattr(value, "tolist"):
        return _listed(value.tolist(), name)
    raise ValueError(f"{name} must be a list, got {_kind(value)}")


def _rows(value, name):
    """A list of dicts; a dict of lists, as tables may store it, becomes one."""
    if isinstance(value, dict) and value and all(isinstance(column, (list, tuple)) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) > 1:
            raise ValueError(f"the columns of {name} have different lengths: {sorted(lengths)}")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, (list, tuple)) or not all(isinstance(row, dict) for row in value):
        raise ValueError(f"{name} must be a list of objects, got {_kind(value)}")
    return list(value)


def _inner_rows(row, name):
    """The objects of a list under `name`, each a `Row`."""
    return [row.inside(values, name) for values in _rows(row.get(name), name)]


def _rated(row, prompt):
    means, completions = [], _inner_rows(row, "completions")
    for i, completion in enumerate(completions):
        annotations = completion.get("annotations")
        if not isinstance(annotations, dict):
            raise ValueError(f"completion {i} has no annotations to rank it by")
        ratings = []
        for aspect, annotation in annotations.items():
            if isinstance(annotation, dict):
                annotation = completion.inside(annotation, "annotations").get("Rating")
            ratings.append(_rating(annotation, f"completion {i}: {aspect}"))
        ratings = [rating for rating in ratings if rating is not None]
        if not ratings:
            raise ValueError(
                f"completion {i} has no numeric rating in any aspect ({', '.join(annotations) or 'none given'}): leave "
                "the record out, or the completion"
            )
        means.append(sum(ratings) / len(ratings))
    responses = [completion.get("response") for completion in completions]
    return Fields(prompt=prompt, responses=responses, rankings=dense_ranks(means))


def _rating(value, name):
    """An exact number, so that equal means are ties; None where the annotator gave none."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "n/a", "na", "none")):
        return None
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "/" in value):
            raise ValueError
        if isinstance(value, str) and "e" in value.lower():
            value = float(value)  # "1e-999999999" as a fraction would fill the memory
        return fractions.Fraction(value.strip() if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        raise ValueError(f"{name} is rated {value!r}, which is no number") from None


def _is_text(part):
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _is_text_alone(part):
    if isinstance(part, str):
        return True
    return _is_text(part) and not any(given(value) for name, value in part.items() if name not in ("type", "text"))


def _only_reply(turns, name):
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise ValueError(
            f"{name} must be one assistant message, got the roles {[turn['role'] for turn in turns]}: a response is one "
            "text"
        )
    more = [field for field, value in turns[0].items() if field not in ("role", "content") and given(value)]
    if more:
        raise ValueError(
            f"{name} has more than text ({', '.join(map(str, more))}), and a response is one text: write it into the text as the "
            "model would say it, or leave the record out"
        )
    content = turns[0].get("content")
    if isinstance(content, list):
        if not all(map(_is_text_alone, content)):
            raise ValueError(f"{name} must be text alone, got {content!r}")
        content = "".join(part if isinstance(part, str) else part["text"] for part in content)
    return content


def _shared_turns(prompt, chosen, rejected):
    """Prompt and two responses from two lists of messages that end in them."""
    for name, turns in (("chosen", chosen), ("rejected", rejected)):
        if not turns:
            raise ValueError(f"{name} is an empty list of messages")
    shared = 0
    while shared < min(len(chosen), len(rejected)) - 1 and chosen[shared] == rejected[shared]:
        shared += 1
    responses = [_only_reply(turns[shared:], name) for name, turns in (("chosen", chosen), ("rejected", rejected))]
    if not shared:
        if prompt is None:
            raise ValueError("no prompt: chosen and rejected do not begin with the same messages")
        return prompt, responses
    turns = chosen[:shared]
    if isinstance(prompt, str) and not any(prompt.strip() == _text(turn).strip() for turn in turns):
        raise ValueError("prompt and chosen disagree: no message of chosen says what prompt says")
    if isinstance(prompt, (list, tuple)):
        prompt = clean(prompt)
        if turns[: len(prompt)] != prompt and turns[-len(prompt) :] != prompt:
            if any(turn in turns for turn in prompt):
                raise ValueError("prompt and chosen disagree: they share some messages, but not all of prompt")
            turns = [*prompt, *turns]
    return turns, responses


def _text(turn):
    content = turn.get("content")
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(
        part if isinstance(part, str) else part["text"] for part in content if isinstance(part, str) or _is_text(part)
    )


def _shared_wrapper(chosen, rejected):
    """Prompt and two responses from two Human/Assistant transcripts that differ in the last reply."""
    mark = "\n\nAssistant:"
    ends = [text.rfind(mark) + len(mark) for text in (chosen, rejected)]
    if min(ends) < len(mark) or chosen[: ends[0]] != rejected[: ends[1]]:
        raise ValueError(
            "no prompt, and chosen and rejected are not two '\\n\\nHuman: ...\\n\\nAssistant: ...' transcripts that differ "
            "in the last reply only"
        )
    return unwrapped(chosen[: ends[0]]), chosen[ends[0] :].strip(), rejected[ends[1] :].strip()


def _is_number(value):
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _kind(value):
    return "nothing" if value is None else type(value).__name__


def _columns(row):
    return f"; the record has {row.names()}"


def _brief(value, length=40):
    text = (
        str(value)
        if not isinstance(value, int) or value.bit_length() < 200
        else f"a number of {value.bit_length()} bits"
    )
    return text if len(text) <= length else text[:length] + "..."


def _end_of(text, length=60):
    return text.strip()[-length:]

"""The preference data sets people have: how to tell which one a record is from, and what it says in our words."""

import dataclasses
import fractions
import math
import re
import typing

from yojo import critic
from yojo.messages import clean


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
    """

    prompt: typing.Any
    responses: typing.Any
    rankings: typing.Any = None
    targets: typing.Any = None
    images: list = dataclasses.field(default_factory=list)
    videos: list = dataclasses.field(default_factory=list)
    fps: typing.Any = None


# ---- the formats ----


def native(record):
    """The paper's JSONL: prompt or question, responses, rankings (or targets), image(s), video(s), fps."""
    responses = record.get("responses")
    if isinstance(responses, str) or not isinstance(responses, (list, tuple)):
        raise ValueError(f"responses must be a list of strings, got {_kind(responses)}{_columns(record)}")
    rankings, targets = record.get("rankings"), record.get("targets")
    if rankings is not None and targets is not None:
        raise ValueError("both rankings and targets are given: keep the one that your loss needs")
    return Fields(
        prompt=_prompt(record, "prompt", "question"),
        responses=list(responses),
        rankings=_listed(rankings, "rankings"),
        targets=_listed(targets, "targets"),
        images=_images(record),
        videos=_videos(record),
        fps=_fps(record),
    )


def trl(record):
    """TRL preference: prompt, chosen, rejected as strings or messages, with the prompt inside them or apart; images."""
    chosen, rejected = record.get("chosen"), record.get("rejected")
    for name, value in (("chosen", chosen), ("rejected", rejected)):
        if not isinstance(value, (str, list, tuple)):
            raise ValueError(f"{name} must be a string or a list of messages, got {_kind(value)}{_columns(record)}")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("chosen and rejected must both be strings or both be lists of messages")
    prompt = next((record[key] for key in ("prompt", "question") if record.get(key) is not None), None)
    if isinstance(chosen, str):
        if prompt is None:
            prompt, chosen, rejected = _shared_wrapper(chosen, rejected)
        responses = [chosen, rejected]
    else:
        prompt, responses = _shared_turns(prompt, clean_messages(chosen), clean_messages(rejected))
    return Fields(
        prompt=clean_messages(prompt) if isinstance(prompt, (list, tuple)) else prompt,
        responses=responses,
        rankings=[1, 2],
        images=_images(record),
        videos=_videos(record),
        fps=_fps(record),
    )


def rewardbench2(record):
    """RewardBench 2: prompt, chosen[] (rank 1), rejected[] (rank 2)."""
    chosen, rejected = _listed(record.get("chosen"), "chosen"), _listed(record.get("rejected"), "rejected")
    if chosen is None or rejected is None:
        raise ValueError(f"chosen and rejected must be lists of strings{_columns(record)}")
    if not chosen:
        raise ValueError("chosen is empty: no response has rank 1")
    return Fields(
        prompt=_prompt(record, "prompt"),
        responses=[*chosen, *rejected],
        rankings=[1] * len(chosen) + [2] * len(rejected),
        images=_images(record),
    )


def nectar(record):
    """Nectar: prompt in a Human/Assistant wrapper, answers[{answer, rank}]."""
    answers = _rows(record.get("answers"), "answers")
    return Fields(
        prompt=unwrapped(_prompt(record, "prompt")),
        responses=[answer.get("answer") for answer in answers],
        rankings=[answer.get("rank") for answer in answers],
        images=_images(record),
    )


def ultrafeedback(record):
    """UltraFeedback: instruction, completions[{response, annotations.<aspect>.Rating}]; ranked by the mean rating."""
    return _rated(record, _prompt(record, "instruction"))


def vlfeedback(record):
    """VLFeedback: prompt, img_path, completions[{response, annotations.<aspect>.Rating}]; ranked by the mean rating."""
    return _rated(record, _prompt(record, "prompt"))


def rlaifv(record):
    """RLAIF-V: question, image, chosen, rejected."""
    return Fields(
        prompt=_prompt(record, "question"),
        responses=[record.get("chosen"), record.get("rejected")],
        rankings=[1, 2],
        images=_images(record),
    )


def nemo_rl(record):
    """NeMo-RL: context (string or messages), completions[{rank, completion}], a lower rank is better, 0 may be the best."""
    completions = _rows(record.get("completions"), "completions")
    ranks = [completion.get("rank") for completion in completions]
    if all(_is_number(rank) for rank in ranks) and ranks and min(ranks) == 0:
        ranks = [rank + 1 for rank in ranks]
    responses = []
    for i, completion in enumerate(completions):
        answer = completion.get("completion")
        if isinstance(answer, (list, tuple)):
            answer = _only_reply(clean_messages(answer), f"completion {i}")
        responses.append(answer)
    return Fields(prompt=_prompt(record, "context"), responses=responses, rankings=ranks, images=_images(record))


def llava_critic(record):
    """LLaVA-Critic-113k: a judge's prompt with a question and two responses, and its verdict, in `conversations`."""
    turns = _rows(record.get("conversations"), "conversations")
    if len(turns) != 2 or [turn.get("from") for turn in turns] != ["human", "gpt"]:
        raise ValueError(
            f"a LLaVA-Critic record has a human turn and a gpt turn, got {[turn.get('from') for turn in turns]}"
        )
    question, responses, rankings = critic.parse(*(turn.get("value") for turn in turns))
    return Fields(prompt=question, responses=responses, rankings=rankings, images=_images(record))


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
    "sampling_interval", "chosen", "rejected", "answers", "instruction", "completions", "conversations", "context",
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


def clean_messages(messages):
    """Chat messages in the one form that `Example.prompt` has: see `yojo.messages.clean`."""
    return clean(messages)


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


def _prompt(record, *names):
    for name in names:
        value = record.get(name)
        if value is not None:
            return clean_messages(value) if isinstance(value, (list, tuple)) else value
    raise ValueError(f"no {' or '.join(names)}{_columns(record)}")


def _images(record):
    found = [name for name in ("images", "image", "img_path") if _is_there(record.get(name))]
    if not found:
        return []
    value = record[found[0]]
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _videos(record):
    if _is_there(record.get("videos")):
        value = record["videos"]
        return list(value) if isinstance(value, (list, tuple)) else [value]
    value = record.get("video")
    # A list under `video` is the frames of one.
    return [value] if _is_there(value) or isinstance(value, (list, tuple)) else []


def _is_there(value):
    return value is not None and not (isinstance(value, (str, list, tuple)) and not value)


def _fps(record):
    fps, interval = record.get("fps"), record.get("sampling_interval")
    for name, value in (("fps", fps), ("sampling_interval", interval)):
        for number in value if isinstance(value, (list, tuple)) else [value]:
            if number is not None and not (_is_number(number) and 0 < number < math.inf):
                raise ValueError(f"{name} must be a number above 0, got {number!r}")
    if fps is not None and interval is not None:
        raise ValueError(
            f"both fps ({fps}) and sampling_interval ({interval}) are given: keep one (fps = 1 / sampling_interval)"
        )
    if interval is None:
        return fps
    if isinstance(interval, (list, tuple)):
        return [None if seconds is None else 1 / seconds for seconds in interval]
    return 1 / interval


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


def _rated(record, prompt):
    completions = _rows(record.get("completions"), "completions")
    means = []
    for i, completion in enumerate(completions):
        annotations = completion.get("annotations")
        if not isinstance(annotations, dict):
            raise ValueError(f"completion {i} has no annotations to rank it by")
        ratings = [
            _rating(
                annotation.get("Rating") if isinstance(annotation, dict) else annotation, f"completion {i}: {aspect}"
            )
            for aspect, annotation in annotations.items()
        ]
        ratings = [rating for rating in ratings if rating is not None]
        if not ratings:
            raise ValueError(
                f"completion {i} has no numeric rating in any aspect ({', '.join(annotations) or 'none given'}): leave "
                "the record out, or the completion"
            )
        means.append(sum(ratings) / len(ratings))
    return Fields(
        prompt=prompt,
        responses=[completion.get("response") for completion in completions],
        rankings=dense_ranks(means),
        images=_images(record),
    )


def _rating(value, name):
    """An exact number, so that equal means are ties; None where the annotator gave none."""
    if value is None or (isinstance(value, str) and value.strip().lower() in ("", "n/a", "na", "none")):
        return None
    try:
        if isinstance(value, bool) or (isinstance(value, str) and "/" in value):
            raise ValueError
        return fractions.Fraction(value.strip() if isinstance(value, str) else value)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        raise ValueError(f"{name} is rated {value!r}, which is no number") from None


def _is_text(part):
    return isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)


def _only_reply(turns, name):
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise ValueError(
            f"{name} must be one assistant message, got the roles {[turn['role'] for turn in turns]}: a response is one "
            "text"
        )
    content = turns[0]["content"]
    if isinstance(content, list):
        if not all(isinstance(part, str) or _is_text(part) for part in content):
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
        prompt = clean_messages(prompt)
        if turns[: len(prompt)] != prompt and turns[-len(prompt) :] != prompt:
            if any(turn in turns for turn in prompt):
                raise ValueError("prompt and chosen disagree: they share some messages, but not all of prompt")
            turns = [*prompt, *turns]
    return turns, responses


def _text(turn):
    content = turn["content"]
    if isinstance(content, str):
        return content
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


def _columns(record):
    return f"; the record has {', '.join(map(str, record)) or 'no columns'}"


def _end_of(text, length=60):
    return text.strip()[-length:]

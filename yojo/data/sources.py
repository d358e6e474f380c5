"""The preference data sets people have: how to tell which one a record is from, and what it says in our words."""

import fractions
import re

from yojo.data import critic
from yojo.data.columns import CONTENT, OF_A_RESPONSE, Row, given, one_of, reason
from yojo.data.fields import (
    Fields,
    check_tags,
    end_of,
    is_number,
    is_text,
    kind_of,
    left_in_parts,
    rate_without_video,
    read_fps,
    read_images,
    read_system,
    read_tools,
    read_videos,
    says_again,
    tags_in,
    text_of,
    turns_of,
    unstacked,
    with_system,
)
from yojo.inputs.messages import clean


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
    record = record | {name: unstacked(record[name], name) for name in stacked}
    ignored = [name for name in record if name in ignore and given(record[name])]
    row = Row({name: value for name, value in record.items() if name not in ignore})
    for name in used:
        row.get(name)
    fields = FORMATS[format](row)
    fields.images, fields.videos = read_images(row), read_videos(row)
    fields.fps, fields.tools = read_fps(row), read_tools(row)
    system = read_system(row)
    left = {name: "by ignore_columns" for name in ignored}
    for name in row.own_left():
        if name in CONTENT:
            if not says_again(row.values[name], fields):
                raise ValueError(_must_not_be_left(name, format))
            left[name] = "says again what other columns say"
    for path in row.left():
        if "." in path:
            refuse_content(path, format, ignore)
        left.setdefault(path, "by ignore_columns" if path in ignore else reason(format, path))
    fields.prompt = with_system(fields.prompt, system)
    if fields.tags:
        check_tags(fields)
    left |= left_in_parts(row)
    left |= dict.fromkeys(rate_without_video(row, fields))
    return fields, left


# ---- the formats: prompt, responses, ranks ----


def native(row):
    """The paper's JSONL: prompt or question, responses, rankings (or targets)."""
    responses = row.get("responses")
    if isinstance(responses, str) or not isinstance(responses, (list, tuple)):
        raise ValueError(f"responses must be a list of strings, got {kind_of(responses)}{_columns(row)}")
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
            raise ValueError(f"{name} must be a string or a list of messages, got {kind_of(value)}{_columns(row)}")
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise ValueError("chosen and rejected must both be strings or both be lists of messages")
    prompt = one_of(row, "prompt", "question", as_given=turns_of)
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
    if all(is_number(rank) for rank in ranks) and ranks and min(ranks) == 0:
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
    return Fields(prompt=question, responses=responses, rankings=rankings, tags=tags_in(rest))


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
        raise ValueError(f"the prompt must be a string, got {kind_of(text)}")
    before, *pieces = re.split(r"(?:^|\n\n)(Human|Assistant):", text)
    turns = [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(pieces[::2], pieces[1::2], strict=True)
    ]
    if not turns or turns[-1] != {"role": "assistant", "content": ""}:
        raise ValueError(
            "the prompt is not in the wrapper '\\n\\nHuman: ...\\n\\nAssistant: ' that ends where the assistant speaks; "
            f"it ends {end_of(text)!r}"
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
    value = one_of(row, *names, as_given=turns_of)
    if value is None:
        raise ValueError(f"no {' or '.join(names)}{_columns(row)}")
    return clean(value) if isinstance(value, (list, tuple)) else value


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


def _listed(value, name):
    if value is None or isinstance(value, list):
        return value
    if isinstance(value, tuple):
        return list(value)
    if hasattr(value, "tolist"):
        return _listed(value.tolist(), name)
    raise ValueError(f"{name} must be a list, got {kind_of(value)}")


def _rows(value, name):
    """A list of dicts; a dict of lists, as tables may store it, becomes one."""
    if isinstance(value, dict) and value and all(isinstance(column, (list, tuple)) for column in value.values()):
        lengths = {len(column) for column in value.values()}
        if len(lengths) > 1:
            raise ValueError(f"the columns of {name} have different lengths: {sorted(lengths)}")
        value = [dict(zip(value, row, strict=True)) for row in zip(*value.values(), strict=True)]
    if not isinstance(value, (list, tuple)) or not all(isinstance(row, dict) for row in value):
        raise ValueError(f"{name} must be a list of objects, got {kind_of(value)}")
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


def _is_text_alone(part):
    if isinstance(part, str):
        return True
    return is_text(part) and not any(given(value) for name, value in part.items() if name not in ("type", "text"))


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
    if isinstance(prompt, str) and not any(prompt.strip() == text_of(turn).strip() for turn in turns):
        raise ValueError("prompt and chosen disagree: no message of chosen says what prompt says")
    if isinstance(prompt, (list, tuple)):
        prompt = clean(prompt)
        if turns[: len(prompt)] != prompt and turns[-len(prompt) :] != prompt:
            if any(turn in turns for turn in prompt):
                raise ValueError("prompt and chosen disagree: they share some messages, but not all of prompt")
            turns = [*prompt, *turns]
    return turns, responses


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


def _columns(row):
    return f"; the record has {row.names()}"

"""Rows as trainers hand them to a reward function, prompts, completions and columns, as what a judge is shown."""

import dataclasses

from yojo.inputs import messages
from yojo.rewards.groups import Group

IMAGES, VIDEOS = ("images", "image"), ("videos", "video")  # columns, of several and of one


@dataclasses.dataclass(frozen=True)
class Row:
    """One completion and its prompt.

    Attributes:
        prompt, images, videos: as for `yojo.Example`.
        text: of the completion.
        truncated: True, False or None.
        tools, literal_tags: as for `yojo.Example`. Most trainers' chat templates make text of tags: so must the judge's.
    """

    prompt: str | list
    images: list
    videos: list
    text: str
    truncated: bool | None
    tools: list | None = None
    literal_tags: bool = True

    def group(self, completions, truncated=None, id=None):
        """A `yojo.rewards.Group` of completions of this row's prompt."""
        shown = {"images": self.images, "videos": self.videos, "tools": self.tools, "literal_tags": self.literal_tags}
        return Group(self.prompt, completions, **shown, truncated=truncated, id=id)


def rows_of(prompts, completions, completion_ids=None, columns=(), *, text=None, eos_token_ids=None):
    """The rows of a reward function's call.

    Args:
        prompts: list of R prompts, strings or chat messages; an image or video that stands in the parts of a message is
            taken from there, and the column of that kind is not looked at.
        completions: list of R completions, strings or lists of one message of the assistant.
        completion_ids: list of R lists of token ids, or None.
        columns: dict: name -> list of R values. Of it `images` (lists), `image`, `videos` (lists) and `video` are read.
        text: function from a completion to the text that is judged; by default the completion itself, or its message's.
        eos_token_ids: ids, one of which ends a completion that is not truncated; None: it is not told.

    Returns:
        list of R `Row`.

    Raises:
        TypeError, ValueError: what does not fit the above; the message has the number of the row, from 0.
    """
    columns = dict(columns)
    media = {name: columns.get(name) for name in (*IMAGES, *VIDEOS)}
    for name, values in ({"completions": completions, "completion_ids": completion_ids} | media).items():
        if values is not None and len(values) != len(prompts):
            raise ValueError(f"{len(values)} {name} for {len(prompts)} prompts")
    rows = []
    for place, prompt in enumerate(prompts):
        try:
            ids = None if completion_ids is None else completion_ids[place]
            rows.append(
                Row(
                    prompt=prompt,
                    images=_media(prompt, "image", columns, IMAGES, place),
                    videos=_media(prompt, "video", columns, VIDEOS, place),
                    text=_text(completions[place], text),
                    truncated=_truncated(ids, eos_token_ids),
                )
            )
        except (TypeError, ValueError) as error:
            raise type(error)(f"row {place}: {error}") from None
    return rows


def _media(prompt, kind, columns, names, place):
    """What the columns hold for a row's prompt; [] where the prompt holds it itself."""
    several, one = names
    found = []
    if columns.get(several) is not None:
        found = columns[several][place]
        found = [] if found is None else found
        if not isinstance(found, (list, tuple)):
            raise TypeError(f"the column {several!r} must hold lists, got {type(found).__name__}; one a row: {one!r}")
    elif columns.get(one) is not None and columns[one][place] is not None:
        found = [columns[one][place]]
    if isinstance(prompt, str) or not found:
        return list(found)
    parts = [
        part
        for turn in messages.clean(prompt)
        for part in (turn["content"] if isinstance(turn["content"], list) else ())
        if isinstance(part, dict) and part.get("type") == kind
    ]
    filled = sum(part.get(kind) is not None for part in parts)
    if not filled:
        return list(found)
    if filled < len(parts) or filled < len(found):
        raise ValueError(
            f"the messages hold {filled} {kind}s and {len(parts) - filled} places of {kind}s, and the column {len(found)} "
            f"{kind}s: which is which cannot be told; leave the {kind}s in one of them"
        )
    return []


def _text(completion, text):
    if text is not None:
        found = text(completion)
        if not isinstance(found, str):
            raise TypeError(f"text(completion) must return a string, got {type(found).__name__}")
        return found
    if isinstance(completion, str):
        return completion
    hint = "pass text=, a function from a completion to the text that is judged"
    if not isinstance(completion, (list, tuple)):
        raise TypeError(f"a completion must be a string or a list of messages, got {type(completion).__name__}; {hint}")
    if len(completion) != 1 or completion[0].get("role") != "assistant" or completion[0].get("tool_calls"):
        what = ", ".join(
            f"{turn.get('role')}{' with tool calls' if turn.get('tool_calls') else ''}" for turn in completion
        )
        raise ValueError(f"a completion must be one message of the assistant, got {what or 'none'}; {hint}")
    beside = [name for name, value in completion[0].items() if name not in ("role", "content") and value]
    if beside:  # trainers that parse what the policy wrote cut its reasoning off, where it can be parsed
        raise ValueError(f"a completion holds {', '.join(beside)} beside its content, and only that is judged; {hint}")
    content = completion[0].get("content")
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    parts = messages.clean([{"role": "assistant", "content": content}])[0]["content"]
    if not all(isinstance(part, str) or part["type"] == "text" for part in parts):
        raise ValueError(f"a completion holds more than text; {hint}")
    return "".join(part if isinstance(part, str) else part["text"] for part in parts)


def _truncated(ids, eos_token_ids):
    if ids is None or eos_token_ids is None:
        return None
    ids = list(ids)
    return bool(ids) and int(ids[-1]) not in eos_token_ids

"""`Example`: one prompt and its candidate responses."""

import dataclasses
import typing

from yojo.inputs import messages


@dataclasses.dataclass(frozen=True)
class Example:
    """One prompt and its candidate responses.

    Attributes:
        prompt: a string, the text of one user turn; or chat messages, a list of dicts with `role` and `content`,
            where content is a string or a list of parts ({"type": "text", "text": ...}, {"type": "image"},
            {"type": "video"}, or OpenAI's) and the last turn is not the assistant's. They are kept in one form, that of
            `yojo.inputs.messages.clean`. What a message has beside role and content (tool_calls, name, ...) reaches the chat
            template.
        responses: N >= 1 strings, none empty.
        images: PIL images, paths, bytes of an image file, or arrays (see `yojo.inputs.images`). They fill the image parts of
            the messages, or the tags `<image>` in the text of all turns but the assistant's, in order; where the prompt
            has neither they stand before the text of the first user turn.
        videos: `yojo.inputs.videos.Video`s, or their sources: paths of video files or of folders of frames, lists or arrays of
            frames, [frames, height, width, 3]; placed like images, after them.
        rankings: N ranks, 1 = best, ties allowed; N targets that sum to 1 for the loss "soft"; or None.
        id: how errors name the example.
        tools: descriptions of the tools the assistant may call, a list of dicts (JSON schemas), for the chat template;
            or None.
        literal_tags: `<image>` and `<video>` in the prompt's text are just characters. By default they are places of
            images and videos, as in LLaVA's files: the tag is cut out, the rest of the text stays as it is, line breaks
            included. A prompt for a text-only model, without images and videos, keeps them as text.

    Raises:
        TypeError, ValueError: anything that does not fit the above; the message names the example.
    """

    prompt: str | list
    responses: typing.Sequence[str]
    images: typing.Sequence = ()
    videos: typing.Sequence = ()
    rankings: typing.Sequence | None = None
    id: typing.Any = None
    tools: typing.Sequence | None = None
    literal_tags: bool = False

    def __post_init__(self):
        if isinstance(self.responses, str) or not isinstance(self.responses, (list, tuple)):
            raise TypeError(f"{self.name}: responses must be a list of strings, got {type(self.responses).__name__}")
        if not self.responses:
            raise ValueError(f"{self.name}: no responses: at least one is needed")
        for i, response in enumerate(self.responses):
            if not isinstance(response, str):
                raise TypeError(f"{self.name}: response {i} must be a string, got {type(response).__name__}")
            if not response.strip():
                raise ValueError(f"{self.name}: response {i} is empty")
            self._check_unicode(response, f"response {i}")
        for field in ("images", "videos"):
            value = getattr(self, field)
            if value is None:
                object.__setattr__(self, field, ())
            elif not isinstance(value, (list, tuple)):
                raise TypeError(f"{self.name}: {field} must be a list, got {type(value).__name__}")
        if self.rankings is not None:
            self._check_rankings()
        if self.tools is not None and (
            not isinstance(self.tools, (list, tuple)) or not all(isinstance(tool, dict) for tool in self.tools)
        ):
            raise TypeError(f"{self.name}: tools must be a list of dicts (JSON schemas) or None, got {self.tools!r}")
        if not isinstance(self.literal_tags, bool):
            raise TypeError(f"{self.name}: literal_tags must be a bool, got {self.literal_tags!r}")
        self._check_prompt()

    @property
    def name(self):
        """How errors name the example."""
        return "example" if self.id is None else f"example {self.id!r}"

    def _check_rankings(self):
        rankings = self.rankings.tolist() if hasattr(self.rankings, "tolist") else list(self.rankings)
        rankings = [
            rank.item() if hasattr(rank, "item") and not getattr(rank, "ndim", 0) else rank for rank in rankings
        ]
        object.__setattr__(self, "rankings", rankings)
        if len(rankings) != len(self.responses):
            raise ValueError(f"{self.name}: {len(rankings)} rankings for {len(self.responses)} responses")
        for rank in rankings:
            if isinstance(rank, bool) or not isinstance(rank, (int, float)):
                raise TypeError(f"{self.name}: rankings must be numbers, got {rank!r}")
        if all(rank < 0 for rank in rankings):
            raise ValueError(f"{self.name}: rankings {rankings} are all negative: no response is ranked; 1 is the best")
        if any(not rank >= 0 for rank in rankings):
            raise ValueError(f"{self.name}: rankings {rankings} must not be negative; 1 is the best")

    def _check_prompt(self):
        try:
            turns = self.prompt if isinstance(self.prompt, str) else messages.clean(self.prompt)
            if isinstance(turns, list) and not turns:
                raise ValueError("prompt is an empty list: at least one chat message is needed")
            if isinstance(turns, list) and turns[-1]["role"] == "assistant":
                raise ValueError("the prompt ends with an assistant turn; what the assistant says goes into responses")
            placed = messages.place(turns, self.images, self.videos, self.literal_tags)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}: {error}") from None
        for text in messages.strings(placed, self.tools):
            self._check_unicode(text, "the prompt")
        if not any(part["type"] != "text" or part["text"].strip() for turn in placed for part in turn["content"]):
            raise ValueError(f"{self.name}: the prompt is empty")
        object.__setattr__(self, "prompt", turns)

    def _check_unicode(self, text, what):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"{self.name}: {what} holds half of a surrogate pair (U+{ord(text[error.start]):04X}) at character "
                f"{error.start + 1}, which no tokenizer takes"
            ) from error

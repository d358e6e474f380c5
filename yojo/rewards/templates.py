"""`AskedBy`: prompts that a policy's chat template has made, taken back to the messages they were made of."""

import copy
import functools
import threading

from yojo.inputs.plain import special_ids

_MARKS = ("yojo-mark-one", "yojo-mark-two", "yojo-mark-three")  # no template changes them, and no prompt holds them


class AskedBy:
    """Prompts that a policy's chat template has made, taken back to the messages they were made of.

    A judge puts a prompt into its own template. Where a framework hands over the policy's prompt as text, template and all, the
    judge would see it as what a user has typed, inside of another template, and score something else without an error.

    One turn of a user is found, behind a turn of the system or not, with images in it. What is found is put through the
    template again, and has to give the prompt to the last character; anything else is an error.

    Args:
        processor: the policy's processor or tokenizer, whose `apply_chat_template` made the prompts.

    Raises:
        ValueError: it has no chat template, or one that does not write what a user says.
    """

    def __init__(self, processor):
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"the {type(processor).__name__} has no chat template, so that none has made the prompts: prompts are plain text then"
            )
        self._processor = processor
        tokenizer = getattr(processor, "tokenizer", processor)
        tokens = (str(tokenizer.convert_ids_to_tokens(i)) for i in special_ids(tokenizer))
        self._special = frozenset(token for token in tokens if len(token) > 1)
        self._frames = {}  # (roles, leading images) -> the ones that were seen: a template may write the date
        if not self._known(("user",), 0):
            raise ValueError("the chat template does not write what a user says, as it is")
        self._lock, self._found = threading.Lock(), functools.lru_cache(maxsize=1024)(self._find)

    def messages(self, prompt, images=0):
        """The messages of a prompt.

        Args:
            prompt: str, as the template made it with a generation prompt.
            images: how many it shows.

        Returns:
            list of dicts: chat messages, with a part {"type": "image"} where an image stands.

        Raises:
            ValueError: a prompt that the template has not made, of one turn of a user.
        """
        with self._lock:
            return copy.deepcopy(self._found(prompt, images))

    def _find(self, prompt, images):
        for roles in (("user",), ("system", "user")):
            for leading in {0, images}:
                for frame in self._known(roles, leading):
                    texts = _filled(frame, prompt)
                    if texts is not None and (found := self._made(roles, leading, images, texts)) is not None:
                        return found
        raise ValueError(
            f"the prompt is not what the policy's chat template makes of one turn of a user with {images} images: {_short(prompt)}"
        )

    def _made(self, roles, leading, images, texts):
        """Messages with these texts, if the template makes the prompt of them and nothing else could be meant."""
        *before, asked = texts
        content = self._split(asked, images) if leading < images else [*_images(images), _text(asked)]
        if content is None or sum(part["type"] == "image" for part in content) != images:
            return None
        said = [*before, *(part["text"] for part in content if part["type"] == "text")]
        if any(mark in text for text in said for mark in (*self._special, *self._between)):
            return None  # more than one turn, or an image that nobody has told of
        contents = [*before, content if images else asked]
        found = [{"role": role, "content": one} for role, one in zip(roles, contents, strict=True)]
        # As it stands today: of the prompt itself the date may be another.
        frame = self._known(roles, leading)[-1]
        made = "".join(part for pair in zip(frame, (*texts, ""), strict=True) for part in pair)
        return found if self._render(found) == made else None

    def _split(self, text, images):
        """Text with images in it, as parts; None where the template writes no image between two texts."""
        if not images:
            return [_text(text)]
        probe = [_text(_MARKS[0]), *_images(1), _text(_MARKS[1])]
        frame = self._frame([{"role": "user", "content": probe}], 2)
        if frame is None or not any(token in frame[1] for token in self._special):
            return None
        pieces = text.split(frame[1])
        parts = [part for piece in pieces for part in (*_images(1), _text(piece))][1:]
        return [part for part in parts if part["type"] == "image" or part["text"]]

    def _known(self, roles, leading):
        """Frames of these roles that were seen, today's last: the text in front of, between and behind what is said."""
        marks = _MARKS[: len(roles)]
        contents = [*marks[:-1], [*_images(leading), _text(marks[-1])] if leading else marks[-1]]
        turns = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
        frame, seen = self._frame(turns, len(roles)), self._frames.setdefault((roles, leading), [])
        if frame is not None and (not seen or seen[-1] != frame):
            if frame in seen:
                seen.remove(frame)
            seen.append(frame)
        return tuple(seen)

    @functools.cached_property
    def _between(self):
        """What stands between a user's turn and the assistant's, and between that and the next: two turns, not one."""
        roles = ("user", "assistant", "user")
        frame = self._frame([{"role": r, "content": m} for r, m in zip(roles, _MARKS, strict=True)], 3)
        return tuple(text for text in (frame or ())[1:3] if text.strip())

    def _frame(self, turns, count):
        """A rendering cut at its marks; None where the template refuses it, or does not write each mark once, in order."""
        try:
            text = self._render(turns)
        except Exception:  # templates raise what they like: it takes no such conversation
            return None
        pieces = []
        for mark in _MARKS[:count]:
            if text.count(mark) != 1:
                return None
            head, text = text.split(mark)
            pieces.append(head)
        return (*pieces, text)

    def _render(self, turns):
        return self._processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)


def _filled(frame, prompt):
    """What stands in a frame's gaps; None where the prompt is no such frame, or there is more than one way."""
    head, *between, tail = frame
    if not prompt.startswith(head) or not prompt.endswith(tail) or len(prompt) < len(head) + len(tail):
        return None
    inner = prompt[len(head) : len(prompt) - len(tail)]
    if not between:
        return [inner]
    (middle,) = between
    return inner.split(middle) if middle and inner.count(middle) == 1 else None


def _images(count):
    return [{"type": "image"}] * count


def _text(text):
    return {"type": "text", "text": text}


def _short(text, most=160):
    return repr(text if len(text) <= most else f"{text[: most // 2]}...{text[-most // 2 :]}")

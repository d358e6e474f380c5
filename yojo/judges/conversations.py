"""A prompt and one response as the conversation that a stock classifier reads: through the chat template, answer and all."""

import logging

from yojo.inputs.example import Example
from yojo.inputs.plain import forbidden_ids, plain_ids
from yojo.inputs.prompts import PromptEncoder, bad_record
from yojo.patching.state import tokenizer_of

logger = logging.getLogger(__name__)

_MARK = "yojo-answer-mark"


class Conversations:
    """Examples -> for each response, the model's inputs.

    A conversation becomes tokens at once, as `tokenizer.apply_chat_template(messages)` makes them: the template writes the
    special tokens, and none is added to them a second time. A response that spells a special token is the exception: it is
    tokenised by itself, as plain text, or whoever wrote it could end its own turn and go on in another's.

    Args:
        processor: the model's processor, or its tokenizer.
        config: the model's config.
        max_length: the most tokens a conversation may have, or None.

    Raises:
        ValueError: no chat template, or one that leaves answers out.
    """

    def __init__(self, processor, config, max_length=None):
        self.processor, self.tokenizer, self.config = processor, tokenizer_of(processor), config
        self.max_length = max_length
        self.is_multimodal = self.tokenizer is not processor
        self.forbidden = forbidden_ids(processor, self.tokenizer, config)
        self.said = set()
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                f"the {type(processor).__name__} has no chat template, and nobody can tell how the classifier was shown "
                "prompt and response: set its chat_template to the one it was trained with"
            )
        self._probe()

    def _probe(self):
        """A template that writes no answer would give all responses of a prompt one score."""
        example = Example("Is it?", ["yes", "no"])
        encoder = self._encoder("the chat template")
        with bad_record("the chat template", "it refuses a conversation"):
            messages, _ = encoder.messages(example)
            one, other = (self._rendered(encoder, messages, text) for text in example.responses)
        if one == other:
            raise ValueError(
                "the chat template leaves out the assistant's answer: every response would get the same score; set the "
                "chat_template that the classifier was trained with"
            )

    def _encoder(self, name):
        return PromptEncoder(self.processor, self.tokenizer, name, self.config)

    def __call__(self, example):
        """The inputs of an example's conversations.

        Returns:
            list, one for each response: a list of ids; or, for a model with a processor, a dict of tensors.

        Raises:
            TypeError, ValueError: an example that cannot be scored; the message names it.
        """
        encoder = self._encoder(example.name)
        self._check_media(example)
        messages, options = encoder.messages(example)
        found = []
        for n, response in enumerate(example.responses):
            with bad_record(f"{example.name}: response {n}", "the conversation cannot be encoded"):
                inputs = self._inputs(encoder, messages, options, response)
            self._check_length(inputs, f"{example.name}: response {n}")
            found.append(inputs)
        return found

    def _check_media(self, example):
        if self.is_multimodal:
            return
        parts = () if isinstance(example.prompt, str) else [p for t in example.prompt for p in _parts(t)]
        kinds = [
            kind for kind in ("image", "video") if getattr(example, f"{kind}s") or any(_is(kind, p) for p in parts)
        ]
        if kinds:
            raise ValueError(
                f"{example.name}: the prompt has {' and '.join(f'{kind}s' for kind in kinds)}, and this classifier was given a "
                "tokenizer: it takes text alone (for one of the few whose class in transformers takes images, pass its processor)"
            )

    def _inputs(self, encoder, messages, options, response):
        text = self._rendered(encoder, messages, response)
        self._check_answer(text, response)
        spelled = self._spelled(response)
        if self.is_multimodal:
            if spelled:
                raise ValueError(
                    f"the response spells the special token {spelled!r}, which a processor cannot tell from the token itself"
                )
            turns = _with_answer(messages, response)
            how = {"processor_kwargs": options} if options else {}
            made = encoder.apply_template(
                turns, tokenize=True, add_generation_prompt=False, return_dict=True, return_tensors="pt", **how
            )
            return encoder.tensors(made)
        if spelled:
            return self._plain(encoder, messages, text, spelled)
        return self._ids(encoder, text)

    @staticmethod
    def _ids(encoder, text):
        return list(encoder.tokenizer(text, add_special_tokens=False)["input_ids"])

    @staticmethod
    def _rendered(encoder, messages, response):
        return encoder.apply_template(_with_answer(messages, response), tokenize=False, add_generation_prompt=False)

    def _spelled(self, response):
        """A special token that stands in a response as text, or None."""
        tokens = (self.tokenizer.convert_ids_to_tokens(i) for i in sorted(self.forbidden))
        return next((token for token in tokens if isinstance(token, str) and token in response), None)

    def _plain(self, encoder, messages, text, spelled):
        """The ids of a conversation whose answer spells a special token: before it, the answer as plain text, behind it."""
        mark = _MARK
        while mark in text:
            mark += "-"
        before, *behind = self._rendered(encoder, messages, mark).split(mark)
        is_between = len(behind) == 1 and text.startswith(before) and text.endswith(behind[0])
        if not is_between or len(before) + len(behind[0]) > len(text):
            raise ValueError(
                f"the response spells the special token {spelled!r}, and where it stands in the conversation cannot be told, "
                "so that the tokenizer would take it for the token itself"
            )
        answer = text[len(before) : len(text) - len(behind[0])]
        return [
            *self._ids(encoder, before),
            *plain_ids(self.tokenizer, answer, self.forbidden),
            *self._ids(encoder, behind[0]),
        ]

    def _check_answer(self, text, response):
        """Templates may trim an answer, and some take thoughts out of it: that is how they were trained, but good to know."""
        if response.strip() not in text and "answer" not in self.said:
            self.said.add("answer")
            logger.warning(
                "the chat template changes answers, or leaves out parts of them (thoughts, perhaps), and the classifier does "
                "not see those: %r, for one (said once)",
                response if len(response) <= 60 else f"{response[:57]}...",
            )

    def _check_length(self, inputs, name):
        count = len(inputs) if isinstance(inputs, list) else inputs["input_ids"].shape[1]
        if self.max_length is not None and count > self.max_length:
            raise ValueError(
                f"{name} makes a conversation of {count} tokens, {count - self.max_length} more than "
                f"max_length={self.max_length}; nothing is cut: shorten it, leave it out or raise max_length"
            )


def _with_answer(messages, response):
    return [*messages, {"role": "assistant", "content": [{"type": "text", "text": response}]}]


def _parts(turn):
    return turn["content"] if isinstance(turn["content"], list) else []


def _is(kind, part):
    return isinstance(part, dict) and part.get("type") == kind

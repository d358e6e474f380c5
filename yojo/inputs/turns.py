"""The assistant's turn: prompt and responses in the tokens that the chat template gives a conversation with the response.

A generation prompt often ends elsewhere than where the template puts an answer: SmolVLM's ends "Assistant:" and its
conversations read "Assistant: text", Qwen3 writes an empty block of thoughts before an answer, Molmo2 a blank before the
turn. Where the tokens can be had, the prompt's and a response's together are those of the conversation as the template
renders it, up to the answer's end:

- what stands before any answer belongs to the prompt; what stands only before an answer that the template takes as it is
  (it may parse thoughts out of others), or is joined with the answer's first word, leads the response;
- blanks around an answer that the template takes away are taken away;
- a response is tokenised behind the end of the prompt, so that a vocabulary which marks the beginning of a text
  (SentencePiece) does not mark it.

They cannot be had where a token would cross from prompt to response, where the response spells a special token, with a
tokenizer in Python, and without a chat template: there the response is tokenised alone behind the generation prompt. What
the template would leave out of a response or rewrite in it, is taken whole and as it is.
"""

import dataclasses
import re

from yojo.inputs.plain import named_errors, plain_ids, private_copy, special_ids

_END = 1000  # characters of a prompt's end in which an added token is looked for
MARK = "\u2042yojo\u2042"  # stands for the assistant's text while the template is looked at; no template changes it


@dataclasses.dataclass(frozen=True)
class Opening:
    """How a template opens the assistant's turn behind one prompt.

    Attributes:
        prompt: text of the prompt's tokens, placeholders not expanded.
        generation: text with the generation prompt.
        head: text of a conversation up to the answer; None where the template does not show answers.
        tail: text behind the answer.
        lead: between `prompt` and an answer that the template renders: `prompt + lead` is `head`.
        other: between `prompt` and an answer that it does not render as it is.
        context: the end of `prompt` that a response is tokenised behind: from the last added token on, where fast
            tokenizers split.
        has_anchor: whether it begins with such a token.
        opener: the added token that the generation prompt ends with, as one that opens thoughts; or "".
    """

    prompt: str
    generation: str
    head: str | None
    tail: str
    lead: str
    other: str
    context: str
    has_anchor: bool
    opener: str

    def split(self, text, response):
        """(lead, answer): what stands behind `prompt` for a response whose conversation is rendered as `text`."""
        if text is None or self.head is None:
            return self._whole(response)
        for head, lead in ((self.head, self.lead), (self.generation, self.other)):
            if not text.startswith(head):
                continue
            if text.endswith(self.tail) and len(text) >= len(head) + len(self.tail):
                answer = text[len(head) : len(text) - len(self.tail)]
                if answer.strip() and answer.strip() == response.strip():
                    return lead, answer
            if text.startswith(response, len(head)):
                return lead, response
        # The prompt may open the thoughts that the response begins with: together they are the rendered text.
        before = text[: len(text) - len(self.tail) - len(response)]
        overlap = len(self.prompt) - len(before)
        if 0 < overlap < len(response) and text == before + response + self.tail and text.startswith(self.prompt):
            return "", response[overlap:]
        return self._whole(response)

    def _whole(self, response):
        """Behind the generation prompt, as it is; what opens the thoughts stands there once."""
        begun = response.lstrip()
        if self.opener and begun.startswith(self.opener):
            rest = begun[len(self.opener) :]
            if self.prompt.rstrip().endswith(self.opener):
                return ("", rest) if rest.strip() else (self.other, response)
            return "", response
        return self.other, response


class TurnEncoder:
    """Examples -> the prompt's tensors and the responses' ids, by `YojoConfig.turn`.

    Args:
        tokenizer: the processor's tokenizer.
        forbidden: ids that no response may hold, see `yojo.inputs.plain.forbidden_ids`.
        turn: "template", as this module's head says; "generation_prompt", the generation prompt and each response by
            itself.
    """

    def __init__(self, tokenizer, forbidden, turn):
        self.tokenizer, self.forbidden = tokenizer, forbidden
        self.joins = turn == "template" and bool(getattr(tokenizer, "is_fast", False))
        added = tokenizer.added_tokens_decoder if self.joins else {}
        self.added, self.special = set(added), special_ids(tokenizer) if self.joins else set()
        longest_first = sorted((str(token) for token in added.values()), key=len, reverse=True)
        self.splits = re.compile("|".join(map(re.escape, longest_first))) if longest_first else None
        self.openers = [str(token) for i, token in added.items() if i not in self.special]
        self.unknown, self.unknown_id = getattr(tokenizer, "unk_token", None), getattr(tokenizer, "unk_token_id", None)

    def __call__(self, prompts, example):
        """Encode one example.

        Args:
            prompts: its `yojo.inputs.prompts.PromptEncoder`.
            example: `yojo.Example`.

        Returns:
            (prompt, responses, leads): dict of the processor's outputs, `input_ids` [1, P] among them; N lists of ids;
            N ints, how many of them the template puts before the response.

        Raises:
            ValueError: a prompt or response that cannot be tokenised; the message names the example and the response.
        """
        messages, options = prompts.messages(example)
        with named_errors(prompts.name):
            opening = self._opening(prompts, messages) if self.joins else None
        if opening is None:
            prompt = prompts.process(messages, options)
            found = [self._alone(prompts.name, i, text) for i, text in enumerate(example.responses)]
            return prompt, found, [0] * len(found)
        changed = opening.prompt != opening.generation
        prompt = prompts.process(messages, options, opening.prompt if changed else None)
        split = [opening.split(_rendered(prompts, messages, text), text) for text in example.responses]
        with named_errors(prompts.name):
            context = self._encode(opening.context).ids
            led = {lead: self._encode(opening.context + lead).ids for lead, _ in split}
        known = bool(context) and prompt["input_ids"][0].tolist()[-len(context) :] == context
        responses, leads = [], []
        for i, (lead, answer) in enumerate(split):
            with named_errors(f"{prompts.name}: response {i}"):
                found = self._joined(opening, context, led[lead], lead, answer) if known else None
                ids, count = found or self._behind(opening, lead, answer)
            responses.append(self._not_empty(ids[count:] and ids, prompts.name, i, answer))
            leads.append(count)
        return prompt, responses, leads

    def _alone(self, name, i, text):
        with named_errors(f"{name}: response {i}"):
            ids = plain_ids(self.tokenizer, text, self.forbidden)
        return self._not_empty(ids, name, i, text)

    def _not_empty(self, ids, name, i, text):
        if not ids:
            raise ValueError(f"{name}: response {i} is empty: {text!r} has no tokens")
        return ids

    def _opening(self, prompts, messages):
        """The `Opening` behind a prompt; None where there is no template, or it takes no answer to look at."""
        if getattr(prompts.processor, "chat_template", None) is None:
            return None
        generation, marked = _rendered(prompts, messages), _rendered(prompts, messages, MARK)
        if generation is None:
            return None
        marked = marked or ""
        head, _, tail = marked.rpartition(MARK)
        if marked.count(MARK) != generation.count(MARK) + 1:  # the answer is not there, or twice
            return self._anchored(generation, generation, None, "", "", "", self._last_tokens(generation))
        tokens = self._last_tokens(head)
        lead = head[len(generation) :] if head.startswith(generation) else None
        if lead is not None and not any(i in self.special and end > len(generation) for i, _, end in tokens):
            prompt, other = generation, ""
        else:
            prompt = head.rstrip(" ")  # a blank at the end becomes one token with the word behind it
            other = generation[len(prompt) :] if generation.startswith(head) else ""
        crossing = next((start for _, start, end in tokens if start < len(prompt) < end), None)
        if crossing is not None:
            cut = max((end for i, _, end in tokens if i in self.added and end <= crossing), default=None)
            if cut is not None:
                prompt, other = prompt[:cut], prompt[cut:] + other
        return self._anchored(prompt, generation, head, tail, head[len(prompt) :], other, tokens)

    def _last_tokens(self, text):
        """[(id, start, end)] of the end of a text, from an added token on: fast tokenizers split there."""
        found = self.splits.search(text, max(0, len(text) - _END)) if self.splits is not None else None
        start = found.start() if found else 0
        return [(i, start + a, start + b) for i, a, b in self._tokens(text[start:])]

    def _tokens(self, text):
        """[(id, start, end)] of a text of the template's, special tokens and all."""
        encoded = self._encode(text)
        return [(i, *place) for i, place in zip(encoded.ids, encoded.offsets, strict=True)]

    def _encode(self, text):
        return private_copy(self.tokenizer, split_special=False).encode(text, add_special_tokens=False)

    def _anchored(self, prompt, generation, head, tail, lead, other, tokens):
        opener = max((t for t in self.openers if generation.rstrip().endswith(t)), key=len, default="")
        starts = [start for i, start, end in tokens if i in self.added and start < end <= len(prompt)]
        start = starts[-1] if starts else 0
        return Opening(prompt, generation, head, tail, lead, other, prompt[start:], bool(starts), opener)

    def _joined(self, opening, context, led, lead, answer):
        """(ids, how many of them lead) of a response tokenised behind the prompt; None where that cannot be."""
        ids = self._encode(opening.context + lead + answer).ids
        own = ids[len(context) :]
        if ids[: len(context)] != context or self._is_foreign(own, answer):
            return None
        return own, _shared(led[len(context) :], own)

    def _is_foreign(self, ids, text):
        """Whether a response spells a special token; what the vocabulary does not know is another matter."""
        special = (
            self.special if self.unknown is not None and self.unknown in text else self.special - {self.unknown_id}
        )
        return not self.forbidden.isdisjoint(ids) or not special.isdisjoint(ids)

    def _behind(self, opening, lead, answer):
        """The same for an answer that spells a special token, or one that would melt into the prompt."""
        context = opening.context
        if opening.has_anchor:  # the token itself would be split
            with_anchor = self._tokens(context)
            context = context[with_anchor[0][2] :]
        before, led, ids = (
            plain_ids(self.tokenizer, text, self.forbidden) if text else []
            for text in (context, context + lead, context + lead + answer)
        )
        if ids[: len(before)] == before and [i for i, *_ in self._tokens(opening.context)][-len(before) :] == before:
            return ids[len(before) :], _shared(led[len(before) :], ids[len(before) :])
        if not lead.strip():
            alone = plain_ids(self.tokenizer, answer, self.forbidden)
            if lead == " " and alone and self.tokenizer.convert_ids_to_tokens(alone[0]).startswith("\u2581"):
                return alone, 0  # the vocabulary writes the blank itself where a text begins
            return plain_ids(self.tokenizer, lead + answer, self.forbidden), 0
        led = self._encode(lead).ids
        return led + plain_ids(self.tokenizer, answer, self.forbidden), len(led)


def _rendered(prompts, messages, answer=None):
    """The conversation as the template renders it, with an answer or the generation prompt; None where it refuses."""
    turns = messages
    if answer is not None:
        turns = [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    try:
        return prompts.apply_template(turns, tokenize=False, add_generation_prompt=answer is None)
    except Exception:  # of the template, whatever it is: for a prompt, tokenising it will raise it with its name
        return None


def _shared(ids, others):
    """How many ids two lists begin with alike."""
    return next((n for n, (a, b) in enumerate(zip(ids, others, strict=False)) if a != b), min(len(ids), len(others)))

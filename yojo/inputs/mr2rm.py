"""The text format of the paper's released code, `format="mr2rm"`: the whole conversation tokenised at once.

One user turn, images, then videos, then the prompt's text; one assistant turn, the responses joined by line breaks and
the separator. The chat template closes the assistant turn, there is no generation prompt. What stands between two
separators, line breaks included, is a response; the last one reaches to the sequence's last token. The facts are those
of https://github.com/yinuoyang01/multi-response-rm (Apache 2.0), read at 0b6c8bc.
"""

import dataclasses

import torch

_MARK = "\u2042yojo\u2042"  # stands for the assistant's text while the template is looked at; no template changes it


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One example as the released code tokenises it.

    Attributes:
        inputs: dict of the processor's outputs for the part before the first response, `input_ids` [1, P] among them.
        responses: N lists of token ids that follow it without a gap: each but the last closed by the separator, the
            last one by the end of the template.
    """

    inputs: dict
    responses: list


class ConversationEncoder:
    """Examples -> `Conversation`.

    Args:
        prompts: the `yojo.inputs.prompts.PromptEncoder` of the example, which places and checks images and videos.
        separator: the separator token.
        separator_id: its id.
        forbidden: ids that no response may hold: special tokens and placeholders, the separator among them.
    """

    def __init__(self, prompts, separator, separator_id, forbidden):
        self.prompts, self.name = prompts, prompts.name
        self.processor, self.tokenizer = prompts.processor, prompts.tokenizer
        self.separator, self.separator_id, self.forbidden = separator, separator_id, forbidden

    def __call__(self, example):
        """Encode one `yojo.Example`.

        Raises:
            ValueError: a prompt that is not one user turn, text that contains the separator or (in a response) any
                special token or placeholder, a chat template that changes the responses. The message names the
                example.
        """
        if getattr(self.processor, "chat_template", None) is None:
            raise ValueError(f"{self.name}: {type(self.processor).__name__} has no chat template, which mr2rm needs")
        if example.tools:
            raise ValueError(f"{self.name}: format='mr2rm' knows no tools; leave them out, or use format='yojo'")
        messages, options = self.prompts.messages(example)
        self._check_prompt(messages)
        self._check_responses(example.responses)
        answer = f"\n\n{self.separator}\n\n".join(example.responses)
        text, start, stop = self._rendered(messages, answer)
        ids, first, last = self._tokens(text, start, stop)
        inputs = self._inputs(messages, answer, text, options)
        whole = inputs["input_ids"][0].tolist()
        tail = ids[first:]
        if whole[len(whole) - len(tail) :] != tail:
            raise ValueError(
                f"{self.name}: {type(self.processor).__name__} and its tokenizer disagree about the tokens of the "
                "responses, so where they begin cannot be told"
            )
        prompt = len(whole) - len(tail)
        found = [place for place, token in enumerate(tail) if token == self.separator_id]
        if len(found) != len(example.responses) - 1 or self.separator_id in whole[:prompt]:
            raise ValueError(
                f"{self.name}: {len(found)} separators {self.separator!r} came out of {len(example.responses)} "
                "responses, or one out of the prompt: the text holds something the tokenizer reads as a separator"
            )
        foreign = self.forbidden.intersection(ids[first:last]) - {self.separator_id}
        if foreign:
            tokens = self.tokenizer.convert_ids_to_tokens(sorted(foreign))
            raise ValueError(f"{self.name}: the responses hold the special token {tokens[0]!r}{_WHY}")
        ends = [place + 1 for place in found] + [len(tail)]
        starts = [0, *ends[:-1]]
        cut = {key: value[:, :prompt] if _is_per_token(value, len(whole)) else value for key, value in inputs.items()}
        return Conversation(cut, [tail[a:b] for a, b in zip(starts, ends, strict=True)])

    def _check_prompt(self, messages):
        if len(messages) != 1 or messages[0]["role"] != "user":
            roles = ", ".join(str(turn["role"]) for turn in messages)
            raise ValueError(
                f"{self.name}: format='mr2rm' knows one user turn and no other, the prompt's turns are {roles}; join "
                "them into one, or use format='yojo'"
            )
        order = [("image", "video", "text").index(part["type"]) for part in messages[0]["content"]]
        if order != sorted(order) or order.count(2) > 1:
            kinds = ", ".join(part["type"] for part in messages[0]["content"])
            raise ValueError(
                f"{self.name}: in format='mr2rm' images come first, then videos, then one text; the prompt's parts "
                f"are {kinds}"
            )
        for part in messages[0]["content"]:
            if part["type"] == "text" and self.separator in part["text"]:
                raise ValueError(f"{self.name}: the prompt contains the separator {self.separator!r}{_WHY}")

    def _check_responses(self, responses):
        names = [getattr(self.processor, f"{kind}_token", None) for kind in ("image", "video", "audio")]
        placeholders = [name for name in names if isinstance(name, str)]
        for i, response in enumerate(responses):
            for token in (self.separator, *placeholders):
                if token in response:
                    kind = "separator" if token == self.separator else "placeholder"
                    raise ValueError(f"{self.name}: response {i} contains the {kind} {token!r}{_WHY}")

    def _render(self, messages, answer):
        return self.prompts.apply_template(
            self._conversation(messages, answer), tokenize=False, add_generation_prompt=False
        )

    def _conversation(self, messages, answer):
        return [*messages, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]

    def _rendered(self, messages, answer):
        """(whole text, where the answer begins in it, where it ends)."""
        marked = self._render(messages, _MARK)
        text = self._render(messages, answer)
        head, found, tail = marked.rpartition(_MARK)
        for kept in (answer, answer.strip()):  # some templates take the blanks around an answer away
            if found and text == head + kept + tail:
                return text, len(head), len(head) + len(kept)
        raise ValueError(
            f"{self.name}: the chat template changes what the assistant says, so that where the responses stand cannot "
            "be told; a response may hold something the template takes for its own, such as <think>"
        )

    def _tokens(self, text, start, stop):
        """(ids of the text, place of the first token of the answer, place behind its last one)."""
        encoded = self.tokenizer(text, return_offsets_mapping=True)
        offsets = encoded["offset_mapping"]
        ids = encoded["input_ids"]
        first = next((i for i, (_, end) in enumerate(offsets) if end > start), len(ids))
        last = next((i for i in range(first, len(ids)) if offsets[i][0] >= stop or offsets[i] == (0, 0)), len(ids))
        if first == len(ids):
            raise ValueError(f"{self.name}: the responses have no tokens")
        return ids, first, last

    def _inputs(self, messages, answer, text, options):
        kinds = {part["type"] for part in messages[0]["content"]} - {"text"}
        if not kinds:  # the tokenizer alone, as the released code does it
            return {"input_ids": torch.tensor([self.tokenizer(text)["input_ids"]])}
        if kinds == {"image"}:
            images = [part["image"] for part in messages[0]["content"] if part["type"] == "image"]
            output = self.processor(
                text=[text], images=[images], return_tensors="pt", return_mm_token_type_ids=True, padding=False
            )
        else:
            output = self.prompts.apply_template(
                self._conversation(messages, answer),
                tokenize=True,
                add_generation_prompt=False,
                return_dict=True,
                return_tensors="pt",
                **({"processor_kwargs": options} if options else {}),
            )
        return self.prompts.tensors(output)


_WHY = "; format='mr2rm' tokenises prompt and responses as one text and cannot escape it: take it out, or use format='yojo'"


def _is_per_token(value, length):
    return isinstance(value, torch.Tensor) and value.ndim == 2 and value.shape[0] == 1 and value.shape[1] == length

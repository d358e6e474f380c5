"""`ChatScores`: a model whose own code scores chats, `get_scores(chats, images)`, as IXC-2.5-Reward's does."""

import inspect
import tempfile
from pathlib import Path

import torch

from yojo.inputs.messages import place
from yojo.judges.checkpoints import load_config, load_stock, where
from yojo.judges.pictures import image_file
from yojo.judges.prompts import check_tags
from yojo.patching.eval_mode import EvalMode
from yojo.saving.identity import chat_scores_fingerprint

PLACE = "<ImageHere>"  # where an image stands in a chat's text
_ROLES = ("system", "user", "assistant")
_MARKS = (PLACE, "[UNUSED_TOKEN_")  # of InternLM's chats, where the tokenizer does not call them special
_UNCUT = 2**31 - 1


class ChatScores:
    """A model that scores chats by code of its own, as a judge: InternLM-XComposer-2.5-Reward's kind.

    It has `get_scores(chats, images, hd_num=...)`: chats, lists of {"role", "content"} with text for content; the paths of each
    one's images; and a float for each back. Every response is a chat of its own: the turns of the prompt, and the response as the
    assistant's. A single image at the beginning of a prompt is left to the code, which puts it before the chat; one elsewhere
    stands as `<ImageHere>` in the text, several as `Image1 <ImageHere>; Image2 <ImageHere>; `, as that model was trained.
    Where `get_scores` has a `max_length`, it is set so high that nothing is cut.

    Args:
        model: a `torch.nn.Module` with `get_scores` and a `tokenizer`.
        hd_num: the most tiles an image is cut into; IXC-2.5-Reward's code takes 6 where there are several images.
        batch_size: responses of an example in one call. More than one may change scores by the rounding of half precision.

    Raises:
        TypeError, ValueError: a model without these, a bad argument.

    Example:
        >>> name = "internlm/internlm-xcomposer2d5-7b-reward"
        >>> judge = yojo.judges.ChatScores.from_pretrained(name, trust_remote_code=True, dtype=torch.float16, device="cuda")
        >>> judge.score_many([yojo.Example("Which car is it?", ["A G-Class.", "No idea."], images=["cars.jpg"])])
        [tensor([ 5.8, -2.8])]
    """

    def __init__(self, model, hd_num=9, batch_size=1):
        if not isinstance(model, torch.nn.Module) or not callable(getattr(model, "get_scores", None)):
            raise TypeError(f"model must be a torch module with get_scores(chats, images), got {type(model).__name__}")
        if getattr(model, "tokenizer", None) is None:
            raise ValueError(f"{type(model).__name__} has no tokenizer: set model.tokenizer = tokenizer")
        for name, value in (("hd_num", hd_num), ("batch_size", batch_size)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an int of at least 1, got {value!r}")
        self.model, self.hd_num, self.batch_size = model, hd_num, batch_size
        self.eval_mode = EvalMode()
        known = inspect.signature(model.get_scores).parameters
        if "hd_num" not in known:
            raise TypeError(
                f"{type(model).__name__}.get_scores takes no hd_num, it takes {', '.join(known)}: another kind of model"
            )
        self.options = {"hd_num": hd_num} | ({"max_length": _UNCUT} if "max_length" in known else {})

    @property
    def order_free(self):
        """True: every response is a chat of its own."""
        return True

    @classmethod
    def from_pretrained(cls, path, *, trust_remote_code, dtype=None, device=None, hd_num=9, batch_size=1, **kwargs):
        """Load a model and its code with all its weights, or not at all.

        Args:
            path: folder or hub name.
            trust_remote_code: must be True: Python files that come with the model are run.
            dtype: torch dtype of the weights; the one they were saved in by default.
            device: where the model goes; where transformers puts it (the CPU) by default.
            hd_num, batch_size: as above.
            **kwargs: handed to `from_pretrained` of the model, such as revision or device_map.

        Returns:
            `ChatScores`.

        Raises:
            ValueError: trust_remote_code is not True, no model of this kind, weights that are missing.
        """
        if trust_remote_code is not True:
            raise ValueError(
                f"trust_remote_code must be True, got {trust_remote_code!r}: {path} is scored with by Python files that come with "
                "it; read them first"
            )
        import transformers

        kwargs["trust_remote_code"] = True
        config = load_config(path, "model whose code scores chats", **kwargs)
        has_auto = "AutoModel" in (getattr(config, "auto_map", None) or {})
        auto = transformers.AutoModel if has_auto else transformers.AutoModelForCausalLM
        model = load_stock(path, auto, dtype=dtype, device=device, **kwargs)
        model.tokenizer = transformers.AutoTokenizer.from_pretrained(path, **where(kwargs))
        return cls(model, hd_num=hd_num, batch_size=batch_size)

    def __repr__(self):
        config = getattr(self.model, "config", None)
        return f"ChatScores({type(self.model).__name__}, {getattr(config, 'name_or_path', '')!r})"

    def score_many(self, examples):
        """Score many examples.

        Args:
            examples: iterable of `yojo.Example`.

        Returns:
            list of [N] float32 tensors on the CPU, in the order of examples and responses; higher is better.

        Raises:
            TypeError, ValueError: an example that cannot be scored; the message names it.
        """
        return [self._scores(example) for example in examples]

    def fingerprint(self):
        """All that changes a score but the model's code, a dict (see `yojo.saving.identity`)."""
        return chat_scores_fingerprint(self.model, self.hd_num)

    def _scores(self, example):
        with tempfile.TemporaryDirectory() as folder:
            try:
                chat, images = self._chat(example, Path(folder))
                answers = [{"role": "assistant", "content": self._plain(text)} for text in example.responses]
            except (TypeError, ValueError, OSError) as error:
                kind = TypeError if isinstance(error, TypeError) else ValueError
                raise kind(f"{example.name}: {error}") from error
            found = []
            for begin in range(0, len(answers), self.batch_size):
                found += self._pass([[*chat, answer] for answer in answers[begin : begin + self.batch_size]], images)
        return torch.tensor(found)

    def _chat(self, example, folder):
        """(turns of the prompt, paths of its images)."""
        turns = place(example.prompt, example.images, example.videos, example.literal_tags)
        if not example.literal_tags:
            check_tags(turns)
        _check_turns(turns, example)
        sources = [part["image"] for turn in turns for part in turn["content"] if part["type"] == "image"]
        images = [image_file(source, folder / f"{n}.png", f"image {n}") for n, source in enumerate(sources)]
        first = next(turn for turn in turns if turn["role"] != "system" or turn is turns[-1])
        leads = len(images) == 1 and bool(first["content"]) and first["content"][0]["type"] == "image"
        chat, number = [], 0
        for turn in turns:
            text = ""
            for part in turn["content"]:
                if part["type"] == "text":
                    text += self._plain(part["text"])
                elif not leads:
                    number += 1
                    text += PLACE if len(images) == 1 else f"Image{number} {PLACE}; "
            chat.append({"role": turn["role"], "content": text})
        return chat, images

    def _plain(self, text):
        """Text that spells no token: whoever wrote it could move an image, or end its own turn and go on in another's."""
        marks = [*_MARKS, *getattr(self.model.tokenizer, "all_special_tokens", ())]
        found = next((mark for mark in marks if mark and mark in text), None)
        if found is not None:
            raise ValueError(
                f"the text spells {found!r}, which the model's code cannot tell from the token itself: {text[:60]!r}"
            )
        return text

    def _pass(self, chats, images):
        """The scores of some chats about the same images, a list of floats."""
        dtype = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), torch.float32)
        device = next((p.device.type for p in self.model.parameters()), "cpu")
        half = torch.bfloat16 if dtype == torch.bfloat16 else torch.float16
        with (
            self.eval_mode.of(self.model),
            torch.inference_mode(),
            torch.autocast(device, half, enabled=device == "cuda"),
        ):
            found = self.model.get_scores(chats, [list(images) for _ in chats], **self.options)
        scores = torch.as_tensor(found, dtype=torch.float32).reshape(-1).tolist()  # a bare number for a single chat
        if len(scores) != len(chats):
            raise RuntimeError(
                f"{type(self.model).__name__}.get_scores gave {len(scores)} scores for {len(chats)} chats"
            )
        return scores


def _check_turns(turns, example):
    if example.tools:
        raise ValueError("the prompt has tools, which the model's chats have no place for")
    if any(part["type"] == "video" for turn in turns for part in turn["content"]):
        raise ValueError("the prompt has videos: this judge takes images and text")
    for turn in turns:
        more = sorted(set(turn) - {"role", "content"})
        if turn["role"] not in _ROLES or more:
            what = f"the field {more[0]}" if more else f"the role {turn['role']}"
            raise ValueError(f"a turn has {what}, which the model's chats have no place for")

"""One prompt through a processor's chat template, images and videos in their places; responses as plain text."""

import torch

from yojo.decoding import with_files
from yojo.images import load_image
from yojo.processors import ImageOnly
from yojo.videos import load_video

# Outputs of processors that are no input of a packed row: the row has no padding, labels are not for scoring, and
# the rest has served its purpose once the positions are known.
NOT_FOR_THE_MODEL = ("input_ids", "attention_mask", "labels", "second_per_grid_ts", "video_metadata")


def plain_ids(tokenizer, text, forbidden):
    """Tokenise text as plain text: nothing in it becomes a special token, a separator or an image placeholder.

    Args:
        tokenizer: a fast tokenizer of transformers.
        text: str.
        forbidden: set of token ids that must not come out.

    Returns:
        list of ids.

    Raises:
        ValueError: a vocabulary that spells a forbidden token from text that does not contain it.
    """
    ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    found = forbidden.intersection(ids)
    if not found:
        return ids
    # An added token that is not flagged special is still matched as a whole: cut it in two, and tokenise the halves.
    for token in sorted((tokenizer.convert_ids_to_tokens(i) for i in found), key=len, reverse=True):
        at = text.find(token)
        if at >= 0 and len(token) > 1:
            cut = at + 1
            return plain_ids(tokenizer, text[:cut], forbidden) + plain_ids(tokenizer, text[cut:], forbidden)
    raise ValueError(
        f"{text!r} cannot be tokenised as plain text: {tokenizer.convert_ids_to_tokens(sorted(found))} come out of it"
    )


class PromptEncoder:
    """One prompt through the processor's chat template, images and videos in their places."""

    def __init__(self, processor, tokenizer, name):
        self.is_multimodal = processor is not tokenizer
        self.processor, self.tokenizer, self.name = with_files(processor), tokenizer, name

    def __call__(self, example):
        """The processor's outputs for the prompt: dict of tensors, `input_ids` [1, P] among them."""
        messages, options = self.messages(example)
        try:
            return self.tensors(self._run(messages, options))
        except (ValueError, TypeError, IndexError, KeyError, AttributeError, RuntimeError, StopIteration) as error:
            raise ValueError(
                f"{self.name}: {type(self.processor).__name__} could not process the prompt: {error}"
            ) from error

    def messages(self, example):
        """The prompt as the processor takes it.

        Returns:
            (messages, options): chat messages whose content is a list of parts, images and frames loaded and in their
            places; and what the processor must be told of the videos, keyword arguments.
        """
        messages = [{"role": "user", "content": example.prompt}] if isinstance(example.prompt, str) else example.prompt
        messages = [{**turn, "content": self._parts(turn["content"])} for turn in messages]
        media = {"image": list(example.images), "video": list(example.videos)}
        for kind in media:
            self._place(messages, kind, media[kind])
        self._check_text(messages)
        for kind in ("image", "video"):
            found = sum(part["type"] == kind for turn in messages for part in turn["content"])
            if found and not self._takes(kind):
                raise ValueError(f"{self.name}: the prompt has {found} {kind}s, but {self._why_not(kind)}")
        images, videos = iter(range(10**9)), []
        for turn in messages:
            for part in turn["content"]:
                if part["type"] == "image":
                    part["image"] = load_image(part["image"], f"{self.name}: image {next(images)}")
                elif part["type"] == "video":
                    part["video"], *sampling = load_video(part["video"], f"{self.name}: video {len(videos)}")
                    videos.append(sampling)
        return messages, self._video_options(videos)

    def _parts(self, content):
        if isinstance(content, str):
            return [{"type": "text", "text": content}]
        parts = []
        for part in content:
            if isinstance(part, str):
                part = {"type": "text", "text": part}
            if not isinstance(part, dict) or part.get("type") not in ("text", "image", "video"):
                raise ValueError(f"{self.name}: a content part must be of type text, image or video, got {part!r}")
            if part["type"] == "text" and not isinstance(part.get("text"), str):
                raise TypeError(f"{self.name}: a text part needs a string under 'text', got {part!r}")
            parts.append(dict(part))
        return parts

    def _place(self, messages, kind, media):
        """Put images (videos) into the parts that wait for one, or before the first user turn's text."""
        own = [part for turn in messages for part in turn["content"] if part["type"] == kind]
        waiting = []
        for part in own:
            source = next((part[key] for key in (kind, "path", "url") if part.get(key) is not None), None)
            part.clear()
            part["type"] = kind
            if source is None:
                waiting.append(part)
            else:
                part[kind] = source
        if not own and media:
            turn = next((turn for turn in messages if turn["role"] == "user"), None)
            if turn is None:
                raise ValueError(f"{self.name}: {len(media)} {kind}s but no user turn to put them in")
            at = sum(part["type"] == "image" for part in turn["content"]) if kind == "video" else 0
            turn["content"][at:at] = [{"type": kind, kind: item} for item in media]
        elif len(waiting) != len(media):
            raise ValueError(
                f"{self.name}: the prompt has {len(waiting)} {kind} placeholders to fill, but {len(media)} {kind}s are given"
            )
        else:
            for part, item in zip(waiting, media, strict=True):
                part[kind] = item

    def _check_text(self, messages):
        for kind in ("image", "video"):
            token = getattr(self.processor, f"{kind}_token", None)
            for turn in messages:
                for part in turn["content"]:
                    if isinstance(token, str) and part["type"] == "text" and token in part["text"]:
                        raise ValueError(
                            f"{self.name}: the prompt's text contains the placeholder {token!r}, for which there is no "
                            f"{kind}: take it out, and pass {kind}s through {kind}s=..."
                        )

    def _takes(self, kind):
        return getattr(self.processor, f"{kind}_processor", None) is not None

    def _why_not(self, kind):
        if not self.is_multimodal:
            return "a bare tokenizer was given: pass the model's processor, if it has one"
        reason = f"{type(self.processor).__name__} takes none"
        if kind == "video" and isinstance(self.processor, ImageOnly):
            return f"{reason} (it was loaded or saved without its video part, which needs torchvision)"
        return reason

    def _video_options(self, videos):
        """What the processor must know about the videos, from their (metadata, fps): frames are taken as they are."""
        if not videos:
            return {}
        framed = [metadata is not None for metadata, _ in videos]
        if all(framed):
            return {"video_metadata": [metadata for metadata, _ in videos], "do_sample_frames": False}
        rates = {fps for _, fps in videos}
        if any(framed) or len(rates) > 1:
            what = (
                "files and frames"
                if any(framed)
                else f"files to sample at different fps ({', '.join(map(str, rates))})"
            )
            raise ValueError(f"{self.name}: the videos of one prompt are {what}: processors sample all of them alike")
        return {} if rates == {None} else {"fps": rates.pop(), "do_sample_frames": True}

    def _run(self, messages, options):
        if getattr(self.processor, "chat_template", None) is None:
            return self._run_without_template(messages, options)
        if not self.is_multimodal:  # templates of text-only models expect strings
            messages = [{**turn, "content": "".join(p["text"] for p in turn["content"])} for turn in messages]
        if options:
            options = {"processor_kwargs": options}
        return self.processor.apply_chat_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt", **options
        )

    def _run_without_template(self, messages, options):
        """PaliGemma and base models: media placeholders, then the text of the only turn."""
        if len(messages) != 1:
            raise ValueError("it has no chat template, so the prompt must be a string or a single user turn")
        parts = messages[0]["content"]
        media = {kind: [p[kind] for p in parts if p["type"] == kind] for kind in ("image", "video")}
        text = "".join(p["text"] for p in parts if p["type"] == "text")
        if not self.is_multimodal:
            return self.processor(text, return_tensors="pt")
        for kind in ("video", "image"):
            if media[kind]:
                text = getattr(self.processor, f"{kind}_token") * len(media[kind]) + text
        inputs = {f"{kind}s": [items] for kind, items in media.items() if items}
        return self.processor(text=[text], return_tensors="pt", **inputs, **options)

    def tensors(self, outputs):
        """A processor's outputs for one prompt, all of them tensors."""
        tensors = {}
        for key, value in outputs.items():
            if isinstance(value, torch.Tensor) or key in NOT_FOR_THE_MODEL:
                tensors[key] = value
            else:
                try:
                    tensors[key] = torch.as_tensor(value)
                except (ValueError, TypeError) as error:
                    raise ValueError(f"its output {key} is no tensor and cannot be made one: {error}") from error
        if tensors["input_ids"].ndim != 2 or tensors["input_ids"].shape[0] != 1:
            raise ValueError(f"one prompt became input_ids of shape {list(tensors['input_ids'].shape)}")
        return tensors

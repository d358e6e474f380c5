"""One prompt through a processor's chat template, images and videos in their places."""

import collections
import contextlib
import copy
import json
import logging
import threading
import weakref

import torch

from yojo.inputs.decoding import can_sample, sample_file, with_files
from yojo.inputs.images import load_image
from yojo.inputs.lookup import find_image
from yojo.inputs.messages import KINDS, TAGS, count_tags, place, strings
from yojo.inputs.placeholders import placeholder_tokens
from yojo.inputs.plain import known_state, private_tokenizer
from yojo.inputs.processors import ImageOnly
from yojo.inputs.videos import load_video
from yojo.patching import dates

logger = logging.getLogger(__name__)

# Outputs of processors that are no input of a packed row: the row has no padding, labels are not for scoring, and
# the rest has served its purpose once the positions are known.
NOT_FOR_THE_MODEL = ("input_ids", "attention_mask", "labels", "second_per_grid_ts", "video_metadata")


# What processors left out, over all prompts of this process; and the placeholders they have.
_UNSEEN = weakref.WeakKeyDictionary()


_PLACEHOLDERS = weakref.WeakKeyDictionary()


_LOCK = threading.Lock()


def unseen(processor):
    """What prompts held that the processor or its chat template left out, so that no model saw it.

    Returns:
        `collections.Counter`: what, as "the field 'name' of tool turns", "tools", "the text of system turns" or "the
        fps of a video file (... takes more frames)" -> the number of prompts in this process.
    """
    with _LOCK:
        return collections.Counter(_UNSEEN.get(processor))


@contextlib.contextmanager
def bad_record(name, doing="it cannot be encoded"):
    """Make whatever goes wrong with one example a ValueError that names it.

    Templates, decoders, processors and tokenizers raise what they like (jinja2.TemplateError, struct.error,
    RecursionError, a panic of a Rust library). Running out of memory, and whatever ends a program, is no fault of an
    example and passes; so does a TypeError or ValueError that begins with the name.

    Args:
        name: how errors name the example.
        doing: what failed, as the message tells it.
    """
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        if isinstance(error, (TypeError, ValueError)) and str(error).startswith(name):
            raise
        kind = "" if isinstance(error, (TypeError, ValueError)) else f"{type(error).__name__}: "
        raise ValueError(f"{name}: {doing}: {kind}{error}") from error


def _image(source, name, load):
    if isinstance(source, str) and source.startswith("data:"):  # OpenAI's way to send one
        source = find_image(source, "", False, name)
    return load(source, name)


def _calls_with_text(turn):
    """The dicts of a turn's tool calls whose `arguments` are the JSON text of an object."""
    calls = turn.get("tool_calls")
    for call in calls if isinstance(calls, (list, tuple)) else ():
        inner = (call.get("function") or call) if isinstance(call, dict) else None
        if isinstance(inner, dict) and _object_in(inner.get("arguments")) is not None:
            yield inner


def _with_arguments(messages, arguments):
    """Messages whose calls (`_calls_with_text`, in order) have other arguments."""
    turns = [{**t, "tool_calls": copy.deepcopy(t["tool_calls"])} if "tool_calls" in t else t for t in messages]
    calls = [call for turn in turns for call in _calls_with_text(turn)]
    for call, value in zip(calls, arguments, strict=True):
        call["arguments"] = value
    return turns


def _object_in(text):
    """The object that a JSON text is; None where it is none, or could not be written again as it stands."""
    try:
        found = json.loads(text, object_pairs_hook=_unlike_keys, parse_constant=_refuse_number)
        written = json.dumps(found, ensure_ascii=False, allow_nan=False)
        written.encode()  # a half surrogate cannot be tokenised
    except (TypeError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _unlike_keys(pairs):
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _refuse_number(name):
    raise ValueError(f"{name} is no number of JSON")


_MARK = "yojo-mark-"


def _with_text(turn, text):
    """A turn that says something else, its media as they are."""
    media = [part for part in turn["content"] if part["type"] != "text"]
    return {**turn, "content": [*media, {"type": "text", "text": text}]}


def _stands_in(text, whole):
    """As it is, or as a string of JSON, which is how some templates write the results of tools."""
    return text in whole or any(json.dumps(text, ensure_ascii=ascii)[1:-1] in whole for ascii in (False, True))


class PromptEncoder:
    """One prompt through the processor's chat template, images and videos in their places.

    Args:
        processor: the model's processor, or its tokenizer.
        tokenizer: the processor's tokenizer.
        name: how errors name the example.
        config: the model's config, which names placeholders that no processor does; or None.
        load: what reads an image: `load_image`, or one that keeps some (`yojo.inputs.decoded.Decoded`).

    Attributes:
        unseen: after a call, list of str: what of this prompt was left out (`unseen`).
    """

    def __init__(self, processor, tokenizer, name, config=None, load=load_image):
        self.is_multimodal = processor is not tokenizer
        self.given, self.name, self.config, self.load_image = processor, name, config, load
        self.tokenizer, self.processor = private_tokenizer(tokenizer), with_files(processor)
        if not self.is_multimodal:
            self.processor = self.tokenizer
        elif self.tokenizer is not tokenizer:
            self.processor = copy.copy(self.processor)
            self.processor.tokenizer = self.tokenizer
        self.unseen, self.template_options = [], {}

    def __call__(self, example):
        """The processor's outputs for the prompt: dict of tensors, `input_ids` [1, P] among them.

        Raises:
            TypeError, ValueError: whatever is wrong with the prompt; the message names the example.
        """
        return self.process(*self.messages(example))

    def process(self, messages, options, text=None):
        """The same for what `messages` returns; or, with the same images and videos, for a text of one's own."""
        with bad_record(self.name, f"{type(self.processor).__name__} could not process the prompt"):
            return self.tensors(self._run(messages, options, text))

    def messages(self, example):
        """The prompt as the processor takes it.

        Returns:
            (messages, options): chat messages whose content is a list of parts, images and frames loaded and in their
            places; and what the processor must be told of the videos, keyword arguments.
        """
        self.unseen = []
        self.template_options = {"tools": list(example.tools)} if example.tools else {}
        with bad_record(self.name, "the prompt cannot be read"):
            messages = self._placed(example)
            messages = self._with_arguments(messages, example.tools)
            self._check_text(messages, example.tools)
            self._look_for_unseen(messages, example.tools)
            videos = self._load(messages)
            options = self._video_options(videos)
        self._count_unseen()
        return messages, options

    def _placed(self, example):
        try:
            messages = place(example.prompt, example.images, example.videos, example.literal_tags)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{self.name}: {error}") from error
        for kind in ("image", "video"):
            found = sum(part["type"] == kind for turn in messages for part in turn["content"])
            if found and not self._takes(kind):
                raise ValueError(f"{self.name}: the prompt has {found} {kind}s, but {self._why_not(kind)}")
        if self.is_multimodal and not example.literal_tags:
            self._check_tags(messages)
        return messages

    def _with_arguments(self, messages, tools):
        """Tool calls with their arguments as the template takes them: OpenAI has JSON text, most templates want objects.

        Marks in their place tell: text stays where the template writes it as it is. Where it quotes it, leaves it out, or
        fails at it, the object is given, if that gets through.
        """
        calls = [call for turn in messages for call in _calls_with_text(turn)]
        if not calls or getattr(self.processor, "chat_template", None) is None:
            return messages
        names = [f"{_MARK}{i}-" for i in range(len(calls))]
        marks = [{name: name} for name in names]
        texts = [json.dumps(mark) for mark in marks]
        rendered = self._rendered_or_none(_with_arguments(messages, texts), tools) or ""
        as_objects = self._rendered_or_none(_with_arguments(messages, marks), tools) or ""
        chosen = []
        for call, name, mark, text in zip(calls, names, marks, texts, strict=True):
            as_text, shown = text in rendered, name in as_objects and str(mark) not in as_objects
            chosen.append(_object_in(call["arguments"]) if shown and not as_text else call["arguments"])
            if not as_text and not shown and name not in rendered:
                self.unseen.append("the arguments of tool calls")
        return _with_arguments(messages, chosen)

    def _check_tags(self, messages):
        """A tag without its medium: the image was lost on its way, or the characters are meant."""
        for kind, tag in TAGS.items():
            if count_tags(messages, kind):
                lost = f"no {kind}s are given" if kind in KINDS else f"{kind} is not supported"
                raise ValueError(
                    f"{self.name}: the prompt's text has the tag {tag}, but {lost}: take it out, or keep it as text "
                    "with literal_tags=True"
                )

    def _check_text(self, messages, tools):
        placeholders = self.placeholders()
        for text in strings(messages, tools):
            for kind, tokens in placeholders.items():
                for token in tokens:
                    if token in text:
                        raise ValueError(
                            f"{self.name}: the prompt's text contains the placeholder {token!r}, for which there is no "
                            f"{kind}: take it out, and pass {kind}s through {kind}s=...; the tokenizer cannot tell it "
                            "from text"
                        )

    def placeholders(self):
        """The tokens that stand for media: `placeholder_tokens` of the processor and the model's config."""
        known = _PLACEHOLDERS.setdefault(self.given, {})
        key = id(self.config), known_state(self.tokenizer)
        if key not in known:  # beside the config, whose id nothing else may get then
            known[key] = self.config, placeholder_tokens(self.given, self.config)
        return known[key][1]

    def _load(self, messages):
        """Read images and videos; returns (metadata, fps) of each video, as `_video_options` takes them."""
        images, videos = iter(range(10**9)), []
        for turn in messages:
            for part in turn["content"]:
                if part["type"] == "image":
                    part["image"] = _image(part["image"], f"{self.name}: image {next(images)}", self.load_image)
                elif part["type"] == "video":
                    part["video"], *sampling = self._video(part["video"], f"{self.name}: video {len(videos)}")
                    videos.append(sampling)
        return videos

    def _video(self, source, name):
        """Frames, metadata and None; or what the processor must read and sample itself, None, and the rate to do it at."""
        video, metadata, fps = load_video(source, name)
        part = self.processor.video_processor
        if metadata is None and can_sample(part):
            with bad_record(name, f"{video} cannot be decoded"):
                video, metadata, bounded = sample_file(video, fps, part)
            if bounded:
                self.unseen.append(f"the fps of a video file ({type(part).__name__} takes {bounded})")
            return video, metadata, None
        return video, metadata, fps

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

    # ---- what the template does not render ----

    def _look_for_unseen(self, messages, tools):
        """Note what changes nothing in the rendered prompt when it is taken out."""
        fields = [
            (at, key)
            for at, turn in enumerate(messages)
            for key, value in turn.items()
            if key not in ("role", "content") and value not in ("", [], {}, ())
        ]
        texts = sum(part["type"] == "text" for turn in messages for part in turn["content"])
        if len(messages) == 1 and texts < 2 and not fields and not tools:
            return  # nothing that a template could leave out
        with bad_record(self.name, "the chat template refuses the prompt"):
            whole = self._rendered(messages, tools)
        if tools and self._renders_the_same(whole, messages, None):
            self.unseen.append("tools")
        for at, key in fields:
            less = [dict(turn) for turn in messages]
            del less[at][key]
            if self._renders_the_same(whole, less, tools):
                self.unseen.append(f"the field {key!r} of {messages[at]['role']} turns")
        if whole is not None:
            self._look_for_text(whole, messages, tools)

    def _look_for_text(self, whole, messages, tools):
        """Note turns whose text is not in the rendered prompt, or not all of it."""
        marked = self._rendered_or_none([_with_text(turn, f"{_MARK}{at}-") for at, turn in enumerate(messages)], tools)
        for at, turn in enumerate(messages):
            texts = [part["text"].strip() for part in turn["content"] if part["type"] == "text"]
            there = all(_stands_in(text, whole) for text in texts)
            if not any(texts) or (there and (marked is None or f"{_MARK}{at}-" in marked)):
                continue
            # Another text instead: where nothing changes, nobody reads it.
            other = [*messages[:at], _with_text(turn, f"{_MARK}{at}-"), *messages[at + 1 :]]
            if self._renders_the_same(whole, other, tools):
                self.unseen.append(f"the text of {turn['role']} turns")
            elif not there:
                self.unseen.append(f"some text of {turn['role']} turns")

    def _renders_the_same(self, whole, messages, tools):
        if whole is None:
            return True
        return self._rendered_or_none(messages, tools) == whole

    def _rendered_or_none(self, messages, tools):
        try:
            return self._rendered(messages, tools)
        except Exception:  # a template that misses something looks at it
            return None

    def _rendered(self, messages, tools):
        """The prompt's text before any token is made of it, or None without a chat template."""
        if getattr(self.processor, "chat_template", None) is None:
            return None
        return self.apply_template(messages, tokenize=False, add_generation_prompt=True, tools=tools)

    def _count_unseen(self):
        self.unseen = list(dict.fromkeys(self.unseen))
        for what in self.unseen:
            with _LOCK:
                counts = _UNSEEN.setdefault(self.given, collections.Counter())
                counts[what] += 1
                first = counts[what] == 1
            if first:
                logger.warning(
                    "%s: not all of the prompt reaches the model through %s: %s is left out (said once; "
                    "yojo.inputs.prompts.unseen(processor) counts the prompts)",
                    self.name,
                    type(self.processor).__name__,
                    what,
                )

    # ---- through the processor ----

    def _run(self, messages, options, text):
        if getattr(self.processor, "chat_template", None) is None:
            return self._run_without_template(messages, options)
        if options:
            options = {"processor_kwargs": options}
        if text is not None:  # through the template that prints nothing but its variable
            options = {**options, "chat_template": "{{ yojo_text }}", "yojo_text": text}
        return self.apply_template(
            messages, tokenize=True, add_generation_prompt=True, return_dict=True, return_tensors="pt", **options
        )

    def apply_template(self, messages, **how):
        """`apply_chat_template` of the processor, for messages whose content is a list of parts."""
        if not self.is_multimodal:  # templates of text-only models expect strings
            messages = [{**turn, "content": "".join(p["text"] for p in turn["content"])} for turn in messages]
        options = dates.template_options(self.given, self.template_options.get("tools"))
        return self.processor.apply_chat_template(messages, **{**options, **self.template_options, **how})

    def _run_without_template(self, messages, options):
        """PaliGemma and base models: media placeholders, then the text of the only turn."""
        if len(messages) != 1:
            raise ValueError("it has no chat template, so the prompt must be a string or a single user turn")
        parts = messages[0]["content"]
        order = [("image", "video", "text").index(part["type"]) for part in parts]
        if order != sorted(order):
            raise ValueError(
                "it has no chat template and takes images, then videos, then text, but the prompt's parts are "
                f"{', '.join(part['type'] for part in parts)}: put images (or their tags) in front of the text"
            )
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

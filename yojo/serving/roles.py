"""What workers do: `Preparer` makes of a request what a row is packed of; `Scorer` holds the model and scores rows."""

import dataclasses
import logging
import os
import pickle
import re
import traceback

from yojo.serving.errors import ApiError, without_text
from yojo.serving.images import check_image

logger = logging.getLogger(__name__)

NO_LIMIT = 1 << 62  # tokens: what is a row is decided where requests wait


@dataclasses.dataclass(frozen=True)
class Asked:
    """One prompt with its responses, as a worker gets it: strings, numbers and bytes alone.

    Attributes:
        prompt: string or chat messages, whose parts may hold the bytes of images.
        responses: N strings.
        images: list of the bytes of image files.
        videos: list of (list of bytes, frames per second or None).
        tools, literal_tags: as for `yojo.Example`.
        details: whether the row is to be described.
    """

    prompt: str | list
    responses: list
    images: list = dataclasses.field(default_factory=list)
    videos: list = dataclasses.field(default_factory=list)
    tools: list | None = None
    literal_tags: bool = False
    details: bool = False

    def pictures(self):
        """[(field, bytes)] of all images, frames of videos among them."""
        found = [(f"images.{n}", data) for n, data in enumerate(self.images)]
        for n, (frames, _) in enumerate(self.videos):
            found += [(f"videos.{n}.frames.{m}", data) for m, data in enumerate(frames)]
        for n, turn in enumerate(self.prompt if isinstance(self.prompt, list) else ()):
            for m, part in enumerate(turn["content"] if isinstance(turn.get("content"), list) else ()):
                if isinstance(part, dict) and isinstance(part.get("image"), bytes):
                    found.append((f"prompt.{n}.content.{m}", part["image"]))
        return found

    def texts(self):
        """Every string that a user wrote."""
        return [*strings_in(self.prompt), *self.responses, *strings_in(self.tools)]

    def num_bytes(self):
        """What it takes in memory, about."""
        return sum(len(data) for _, data in self.pictures()) + sum(map(len, self.texts()))


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A request that is ready to be packed.

    Attributes:
        payload: `yojo.inputs.packing.Encoded`, pickled: whoever hands it on need not look into it.
        tokens: that it takes in a packed row.
        prompt_tokens: of its prompt.
        response_tokens: N, those of each response.
        row: how it lies in the row, where that was asked for; or None.
    """

    payload: bytes
    tokens: int
    prompt_tokens: int
    response_tokens: list
    row: dict | None = None


class Preparer:
    """Requests made into `Prepared` ones.

    Args:
        collator: a pickled `yojo.Collator`, which a `Scorer` has made of its model.
        limits: `yojo.serving.settings.Limits`.
    """

    def __init__(self, collator, limits):
        import torch

        torch.set_num_threads(1)
        self.collator, self.limits = pickle.loads(collator), limits
        self._warm_up()

    def _warm_up(self):
        """The first request is as fast as the next."""
        try:
            self.prepare(Asked("Warm up.", ["Yes."]))
        except ApiError as error:  # a chat template that wants an image, say
            logger.debug("warming up: %s", error)

    def hello(self):
        return {}

    def begin(self, ident, asked):
        try:
            yield ident, self.prepare(asked)
        except ApiError as error:
            yield ident, error

    def rest(self):
        return ()

    def prepare(self, asked):
        """`Prepared` of an `Asked`; an `ApiError` says what is wrong with it."""
        pixels = 0
        for field, data in asked.pictures():
            _, width, height = check_image(data, self.limits, field)
            pixels += width * height
            if pixels > self.limits.all_pixels:
                raise ApiError(
                    413, "too_many_pixels", f"the images have more than {self.limits.all_pixels} pixels together", field
                )
        try:
            encoded = self.collator.encode(self._example(asked), rankings=False)
        except (TypeError, ValueError) as error:
            raise self._wrong(error, asked) from None
        except MemoryError:
            raise ApiError(413, "out_of_memory", "there is not enough memory to prepare this request") from None
        except Exception as error:  # templates, tokenizers and image processors raise anything
            logger.warning("a request cannot be prepared: %s at %s", type(error).__name__, _place(error))
            raise ApiError(
                422, "not_preparable", f"the model's processor does not take this input ({type(error).__name__})"
            ) from None
        config = self.collator.config
        return Prepared(
            pickle.dumps(encoded, pickle.HIGHEST_PROTOCOL),
            encoded.num_tokens(config),
            len(encoded.prompt_ids),
            [len(ids) for ids in encoded.responses],
            _row(encoded, config) if asked.details else None,
        )

    def _example(self, asked):
        from yojo.inputs.example import Example
        from yojo.inputs.videos import Video

        return Example(
            asked.prompt,
            asked.responses,
            images=asked.images,
            videos=[Video(frames, fps) for frames, fps in asked.videos],
            tools=asked.tools,
            literal_tags=asked.literal_tags,
        )

    def _wrong(self, error, asked):
        message = without_text(re.sub(r"^example(?: \d+)?: ", "", str(error)), asked.texts())
        longer = "max_length" in message
        return ApiError(413 if longer else 422, "too_long" if longer else "invalid_input", message, _field_of(message))


def _field_of(message):
    """The field that a message of `yojo.Example` speaks of, if it names one."""
    found = re.match(r"(?:response|(image|video)) (\d+)", message)
    if found:
        return f"{found[1] or 'response'}s.{found[2]}"
    named = re.match(r"(?:the )?(prompt|responses|images|videos|tools|literal_tags)\b", message)
    if named:
        return named[1]
    return "prompt" if re.match(r"a chat message|a content part|a text part|content ", message) else None


def _place(error):
    """Where an exception was raised, without what it says: that may hold what a user wrote."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "?"


def strings_in(value):
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for key, inner in value.items() for text in (*strings_in(key), *strings_in(inner))]
    return [text for inner in value for text in strings_in(inner)] if isinstance(value, (list, tuple)) else []


def _row(encoded, config):
    """The segments of an example in its row, and which of those before each sees."""
    from yojo.inputs.packing import orders

    count = len(encoded.responses)
    branches = [(n,) for n in range(count)] if config.mode == "isolated" else orders(count, config)
    segments = [{"kind": "prompt", "response": None, "tokens": len(encoded.prompt_ids), "sees": []}]
    for branch in branches:
        before = [0]
        for n in branch:
            segments.append(
                {"kind": "response", "response": n, "tokens": len(encoded.responses[n]), "sees": list(before)}
            )
            before.append(len(segments) - 1)
    return {"mode": config.mode, "orders": 1 if config.mode == "isolated" else len(branches), "segments": segments}


@dataclasses.dataclass(frozen=True)
class Model:
    """Which reward model a server serves, and how it is loaded.

    Attributes:
        path: folder, absolute where `model_of` made it: workers may have other working directories; or hub name.
        name: what it is called where nobody says otherwise.
        mode, permutations: as for `yojo.RewardModel.from_pretrained`.
        max_length: the most tokens of one example, or None.
        options: dict of further arguments of `from_pretrained`: base_model, dtype, check_base, check_files, ...
    """

    path: str
    name: str = "reward-model"
    mode: str | None = None
    permutations: int | None = None
    max_length: int | None = None
    options: dict = dataclasses.field(default_factory=dict)

    def load(self, device=None):
        """(`yojo.RewardModel` as it was saved, its folder)."""
        from yojo.files.saved import local_folder
        from yojo.judges.loading import dtype_of
        from yojo.reward_model import RewardModel

        options = {**self.options, "dtype": dtype_of(self.options.get("dtype"))}
        path = local_folder(self.path)
        return RewardModel.from_pretrained(path, device=device, max_length=self.max_length, **options), path


def model_of(name, *, max_length=None, dtype=None, base_model=None, check_base=True, check_files=True):
    """The `Model` of a name as `yojo.judges.load_judge` takes it: a folder or hub name, with a mode behind #; or "demo".

    What can be told without loading it is checked here.

    Args:
        name: str.
        max_length, dtype, base_model, check_base, check_files: as for `yojo.RewardModel.from_pretrained`; dtype may be a name.

    Raises:
        ValueError: no such folder, no reward model of ours, or a dtype that is none.
    """
    from yojo.files.saved import local_folder, read_description
    from yojo.judges.loading import dtype_of, mode_of
    from yojo.saving import stock

    path, mode = mode_of(str(name))
    dtype_of(dtype)
    if path == "demo" and not os.path.isdir(path):
        from importlib.resources import files

        folder = files("yojo") / "demo"
        options = {"base_model": str(folder / "backbone")}
        if base_model is not None:
            raise ValueError("base_model is given, and the demonstration's model has its own")
        path, called = str(folder / "reward_model"), "demo"
    else:
        here = base_model is not None and os.path.isdir(base_model)
        options = {} if base_model is None else {"base_model": os.path.abspath(base_model) if here else base_model}
        called = re.sub(r"[^A-Za-z0-9_.-]", "-", os.path.basename(os.path.normpath(path))) or "reward-model"
    folder = local_folder(path)
    if not stock.is_checkpoint(folder):
        read_description(folder)
    options |= {"dtype": dtype, "check_base": check_base, "check_files": check_files}
    return Model(os.path.abspath(folder), called, **mode, max_length=max_length, options=options)


def load_scorer(model, device=None, threads=None):
    """A `Scorer` of a model that is loaded here, after it has shown that it scores as it did when it was saved.

    Args:
        model: `Model`.
        device: of torch; None for wherever the model is put.
        threads: of torch on a CPU; None for its own choice.
    """
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    loaded, path = model.load(device)
    known = loaded.check_known_scores(path)
    if model.mode is not None or model.permutations is not None:
        from yojo.patching.modes import set_mode
        from yojo.reward_model import RewardModel

        set_mode(loaded.model, model.mode, model.permutations)
        loaded = RewardModel(loaded.model, loaded.processor, model.max_length)
    return Scorer(loaded, known)


class Scorer:
    """A reward model, and rows scored by it.

    Args:
        reward_model: `yojo.RewardModel`.
        known: `yojo.saving.known_scores.Known`: whether it scores as it did when it was saved.
    """

    def __init__(self, reward_model, known):
        from yojo.patching import devices
        from yojo.patching.state import unwrap
        from yojo.reward_model import Run

        self.reward_model, self.known = reward_model, known
        self.device = devices.input_device(unwrap(reward_model.model))
        self._run, self._place = Run(reward_model, NO_LIMIT, "return"), 0
        self._rows, self._row_of = {}, {}  # ident -> {place: answer, None before it is there}; place -> (ident, item)

    def hello(self):
        """What the server has to know of the model."""
        from yojo.inputs.digests import digest
        from yojo.patching.state import unwrap

        config, fingerprint = self.reward_model.config, self.reward_model.fingerprint()
        return {
            "collator": pickle.dumps(self.reward_model.collator),
            "fingerprint": fingerprint,
            "digest": digest(fingerprint),
            "known": dataclasses.asdict(self.known),
            "mode": config.mode,
            "permutations": config.permutations,
            "order_free": self.reward_model.order_free,
            "separator": config.separator,
            "max_length": self.reward_model.collator.max_length,
            "dtype": str(unwrap(self.reward_model.model).dtype).removeprefix("torch."),
            "device": str(self.device),
            "depth": 1 if self.device.type == "cpu" else 2,
        }

    def begin(self, ident, payloads):
        """Begin a row, a list of pickled `Encoded`; its answer is a list of [N] floats or `ApiError`s."""
        from yojo.reward_model import Numbered

        items = []
        for payload in payloads:
            encoded = pickle.loads(payload)
            item = Numbered(self._place, encoded, encoded.num_tokens(self.reward_model.config), encoded.num_bytes())
            self._row_of[item.place] = ident, item
            items.append(item)
            self._place += 1
        self._rows[ident] = {item.place: None for item in items}
        yield from self._done(self._run.row, items)

    def rest(self):
        """What is under way, waited for."""
        yield from self._done(self._run.rest)

    def _done(self, function, *args):
        """(ident, answer) of the rows that are whole after some more of the scoring."""
        try:
            for scored in function(*args):
                self._note(scored.place, scored.scores, scored.error)
        except Exception as error:  # of a row as a whole
            logger.error("a row cannot be scored: %s at %s", type(error).__name__, _place(error))
            self._one_by_one()
        for ident in [ident for ident, row in self._rows.items() if None not in row.values()]:
            yield ident, list(self._rows.pop(ident).values())

    def _one_by_one(self):
        """After a row that raised what nobody foresaw: whatever that example is, the others have their scores."""
        self._run.under_way.clear()
        for place, (_, item) in list(self._row_of.items()):
            self._check_device()
            try:
                (scores,) = self.reward_model._score_row([item.encoded])
            except Exception as error:
                self._note(place, None, error)
            else:
                self._note(place, scores, None)

    def _check_device(self):
        """A CUDA device that an error has left unusable takes the process with it, which is begun anew."""
        if self.device.type != "cuda":
            return
        import torch

        try:
            torch.cuda.synchronize(self.device)
        except Exception as error:
            logger.error("the device is lost: %s", type(error).__name__)
            os._exit(1)

    def _note(self, place, scores, error):
        ident, _ = self._row_of.pop(place)
        self._rows[ident][place] = _answer(scores, error)


def _answer(scores, error):
    """[N] floats, or the `ApiError` that says why there are none."""
    if isinstance(error, MemoryError):
        return ApiError(413, "out_of_memory", "this request does not fit into the device's memory by itself")
    if isinstance(error, (TypeError, ValueError)):
        return ApiError(422, "refused_by_model", without_text(str(error).removeprefix("example: "), []))
    if error is not None:
        return ApiError(424, "model_failed", f"the model fails on this input ({type(error).__name__})")
    if not bool(scores.isfinite().all()):
        broken = (~scores.isfinite()).nonzero()[:, 0].tolist()
        return ApiError(
            424,
            "not_finite",
            "the model's score is not finite: its hidden states overflow, and there is no score to give",
            f"responses.{broken[0]}",
        )
    return scores.tolist()

"""`Classifier`: a stock sequence classifier with one label, the usual form of a reward model, one response a pass."""

import itertools
import logging

import torch

from yojo.inputs.processors import load_processor
from yojo.judges.conversations import Conversations
from yojo.patching import dates, devices, ropes
from yojo.patching.eval_mode import EvalMode
from yojo.patching.state import is_patched, tokenizer_of, unwrap
from yojo.saving.identity import classifier_fingerprint

logger = logging.getLogger(__name__)

WINDOW = 64  # examples whose conversations are sorted by length before they are put into batches
_OF_A_CLASS = "ForSequenceClassification"


class Classifier:
    """A stock sequence classifier of transformers with one label, as a judge: the logit of a conversation is its score.

    Every response is a pass of its own, of the prompt with the response as the assistant's turn, through the classifier's own
    chat template (`yojo.judges.conversations`). Conversations share batches, filled up on the right with the token by which the
    model tells padding, and a score is the same in every company, to rounding: it is that of the model's own forward on the
    conversation alone. Where the model has no such token, or would read other scores from padded rows, every conversation
    is a pass of its own. From any number of threads.

    transformers' decoder classifiers read the logit at the last token that is not the padding token: one that was trained
    with its end token for padding reads the one before, here too.

    Args:
        model: a model of transformers' `AutoModelForSequenceClassification`, bare or wrapped by PEFT.
        processor: its tokenizer; or its processor, for one of the few classes that take images.
        max_length: the most tokens a conversation may have, or None. A longer one is an error: nothing is ever cut.
        batch_size: conversations in a pass.
        date: day that the chat template prints, where it prints one; what the processor has settled, or today, by default.

    Raises:
        TypeError, ValueError: another kind of model, more labels than one, no chat template, a bad argument.

    Example:
        >>> judge = yojo.judges.Classifier.from_pretrained("my-classifier")
        >>> judge.score_many([yojo.Example("Which digit is it?", ["It is a 7.", "Who knows."])])
        [tensor([ 1.3, -0.8])]
    """

    def __init__(self, model, processor, max_length=None, batch_size=8, date=None):
        base = unwrap(model)
        _check_model(base)
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be an int of at least 1{_or_none(name)}, got {value!r}")
        if batch_size is None:
            raise ValueError("batch_size must be an int of at least 1, got None")
        self._settle(processor, date)
        self.model, self.processor, self.max_length = model, processor, max_length
        self.conversations = Conversations(processor, base.config, _limit(base, tokenizer_of(processor), max_length))
        self.rope = ropes.switch_of(base) if _has_decoder(base) else None
        self.padding = getattr(base.config.get_text_config(), "pad_token_id", None)
        self.eval_mode = EvalMode()
        self.batch_size = batch_size if batch_size == 1 or self._may_pad(base) else 1

    @property
    def order_free(self):
        """True: every response is a pass of its own."""
        return True

    @classmethod
    def from_pretrained(
        cls,
        path,
        *,
        dtype=None,
        device=None,
        max_length=None,
        batch_size=8,
        date=None,
        processor_options=None,
        **kwargs,
    ):
        """Load a stock sequence classifier with all its weights, or not at all.

        Args:
            path: folder or hub name.
            dtype: torch dtype of the weights; the one they were saved in by default.
            device: where the model goes; where transformers puts it (the CPU) by default.
            max_length, batch_size, date: as above.
            processor_options: dict of keyword arguments for the tokenizer or processor.
            **kwargs: handed to `AutoModelForSequenceClassification.from_pretrained`, such as attn_implementation or
                device_map.

        Returns:
            `Classifier`.

        Raises:
            ValueError: no classifier, or one whose head or any other weight is missing: random weights score at random.
        """
        import transformers

        try:
            config = transformers.AutoConfig.from_pretrained(path, **_where(kwargs))
        except (OSError, ValueError) as error:
            raise ValueError(f"{path} is no sequence classifier: {_first_line(error)}") from error
        _check_config(config, path)
        model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, dtype=dtype or "auto", output_loading_info=True, **kwargs
        )
        _check_report(report, path)
        try:
            processor = load_processor(path, **_where(kwargs), **(processor_options or {}))
        except OSError as error:
            raise ValueError(f"{path} has no tokenizer: {_first_line(error)}") from error
        if not _takes_media(model):
            processor = tokenizer_of(processor)
        if device is not None:
            model.to(device)
        return cls(model.eval(), processor, max_length=max_length, batch_size=batch_size, date=date)

    def __repr__(self):
        return f"Classifier({type(unwrap(self.model)).__name__}, {unwrap(self.model).config.name_or_path!r})"

    def score_many(self, examples):
        """Score many examples.

        Args:
            examples: iterable of `yojo.Example`.

        Returns:
            list of [N] float32 tensors on the CPU, in the order of examples and responses; higher is better.

        Raises:
            TypeError, ValueError: an example that cannot be scored; the message names it.
        """
        examples, scores = iter(examples), []
        window = 1 if self.conversations.is_multimodal else WINDOW  # pixels take memory
        while some := list(itertools.islice(examples, window)):
            scores += self._scores([self._encoded(example) for example in some])
        return scores

    def _scores(self, encoded):
        places = [(i, n) for i, some in enumerate(encoded) for n in range(len(some))]
        scores = [torch.empty(len(some)) for some in encoded]
        for batch in self._batches(places, encoded):
            found = self._pass([encoded[i][n] for i, n in batch])
            for (i, n), score in zip(batch, found, strict=True):
                scores[i][n] = score
        return scores

    def fingerprint(self):
        """All that changes a score, a dict (see `yojo.saving.identity`)."""
        return classifier_fingerprint(self.model, self.processor)

    def _encoded(self, example):
        found = self.conversations(example)
        if self.rope is not None and "dynamic" in self.rope.kind:  # whose frequencies depend on the passes before, too
            for n, inputs in enumerate(found):
                self.rope.check(_count(inputs), f"{example.name}: response {n}", "the conversation")
        return found

    def _batches(self, window, encoded):
        """Places of a window in batches: those of like length together, and alone what must be."""
        alone = [place for place in window if self._is_alone(encoded[place[0]][place[1]])]
        yield from ([place] for place in alone)
        kept = set(alone)
        rest = [place for place in window if place not in kept]
        rest.sort(key=lambda place: len(encoded[place[0]][place[1]]))  # stable: ties in the order of the examples
        for begin in range(0, len(rest), self.batch_size):
            yield rest[begin : begin + self.batch_size]

    def _is_alone(self, inputs):
        # Beyond the limit of such a rope, what else is in the batch would change the frequencies.
        return isinstance(inputs, dict) or (self.rope is not None and len(inputs) > self.rope.limit)

    def _pass(self, batch):
        """[B] float32 on the CPU."""
        base = unwrap(self.model)
        if isinstance(batch[0], dict):
            inputs = batch[0]
        else:
            inputs = self._padded(batch)
        device = devices.input_device(base)
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with self.eval_mode.of(self.model), torch.inference_mode():
            logits = self.model(**inputs).logits
        if logits.shape != (len(batch), 1):
            raise RuntimeError(
                f"{type(base).__name__} gave logits of shape {list(logits.shape)} for {len(batch)} conversations"
            )
        return logits[:, 0].float().cpu()

    def _padded(self, batch):
        longest = max(map(len, batch))
        ids = torch.full((len(batch), longest), self.padding if len(batch) > 1 else 0)
        mask = torch.zeros_like(ids)
        for row, some in enumerate(batch):
            ids[row, : len(some)] = torch.tensor(some)
            mask[row, : len(some)] = 1
        return {"input_ids": ids, "attention_mask": mask}

    def _may_pad(self, base):
        """Whether a row scores the same with padding behind it: tried once, since some classes read padding all the same."""
        name = type(base).__name__
        rows = base.get_input_embeddings().weight.shape[0]
        if not isinstance(self.padding, int) or not 0 <= self.padding < rows:  # -1 in older configs
            logger.warning(
                "the config of this %s has no pad_token_id among its tokens, by which it would tell padding: every conversation is a pass of "
                "its own",
                name,
            )
            return False
        words = [i for i in range(min(rows, 64)) if i != self.padding]
        short, long = [words[n % len(words)] for n in (11, 5, 17)], [words[(7 * n + 3) % len(words)] for n in range(12)]
        alone, beside = self._pass([short])[0], self._pass([short, long])[0]
        # Padding that is read changes a score by more than half precision does.
        bound = {torch.float32: 1e-3, torch.float64: 1e-3}.get(base.dtype, 0.1)
        if not abs(alone - beside) <= bound * max(1.0, abs(alone)):  # NaN, too
            logger.warning(
                "%s scores a row otherwise where another one is longer (%.4g, alone %.4g): every conversation is a pass of its "
                "own",
                name,
                beside,
                alone,
            )
            return False
        return True

    def _settle(self, processor, date):
        """A template that prints the date prints one day, whichever day it is."""
        if not dates.has_clock(processor):
            if date is not None:
                raise ValueError(f"date={date!r} is given, and the chat template prints none")
            return
        known = dates.date_of(processor)
        day = dates.settle(processor, date)
        if date is None and known is None:
            logger.warning(
                "the chat template prints today's date, on which scores depend: it goes on printing %s; date=... sets another",
                day,
            )


def _count(inputs):
    return len(inputs) if isinstance(inputs, list) else inputs["input_ids"].shape[1]


# ---- checks ----


def _check_model(base):
    from transformers import PreTrainedModel

    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {type(base).__name__}")
    name = type(base).__name__
    if is_patched(base):
        raise ValueError(f"this {name} is patched: its judge is yojo.RewardModel(model, processor)")
    if _OF_A_CLASS not in name:
        raise ValueError(f"model must be a sequence classifier (AutoModelForSequenceClassification), got a {name}")
    _check_labels(base.config, name)


def _check_labels(config, name):
    if config.num_labels != 1:
        raise ValueError(
            f"{name} has {config.num_labels} labels, and a judge gives one score: a reward model is a classifier with "
            "num_labels=1"
        )


def _check_config(config, path):
    architectures = config.architectures or []
    if architectures and not any(_OF_A_CLASS in name for name in architectures):
        raise ValueError(
            f"{path} holds a {architectures[0]}, no sequence classifier: it has no head to score with, and a random one "
            "would score at random"
        )
    _check_labels(config, path)


def _check_report(report, path):
    missing = sorted(report.get("missing_keys") or ())
    if missing:
        raise ValueError(
            f"{path} lacks weights of its model: {', '.join(missing[:3])}{_more(missing)}; transformers fills them with "
            "random numbers, and they would score at random. A head that lies in an adapter must be merged first "
            "(merge_and_unload, save_pretrained)"
        )
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report.get("mismatched_keys") or ())
    if mismatched:
        raise ValueError(f"{path} has weights of another shape than its config says: {', '.join(mismatched[:3])}")
    unexpected = sorted(report.get("unexpected_keys") or ())
    if unexpected:
        logger.warning(
            "%s has weights that its model has no place for: %s%s", path, unexpected[0], _more(unexpected, 1)
        )


def _more(names, shown=3):
    return f" and {len(names) - shown} more" if len(names) > shown else ""


def _limit(base, tokenizer, max_length):
    """The most tokens of a conversation: learned positions end where their table does."""
    config = base.config.get_text_config()
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    if getattr(config, "rope_parameters", None) or not isinstance(longest, int) or longest < 1:
        return max_length
    known = getattr(tokenizer, "model_max_length", None)  # RoBERTa's table has two rows that are no positions
    return min(value for value in (max_length, longest, known) if value is not None)


def _has_decoder(base):
    try:
        return base.get_decoder() is not None
    except (AttributeError, NotImplementedError):
        return False


def _takes_media(model):
    """Whether transformers passes pixels on to the backbone of this classifier."""
    return any(hasattr(model.config, f"{name}_config") for name in ("vision", "visual"))


_SHARED = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def _where(kwargs):
    return {name: kwargs[name] for name in _SHARED if name in kwargs}


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _or_none(name):
    return " or None" if name == "max_length" else ""

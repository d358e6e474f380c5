"""Conversations in passes of one model: which of them share a batch, how it is filled up, how long they may be."""

import itertools
import logging

import torch

from yojo.judges.conversations import Conversations
from yojo.patching import dates, devices, ropes
from yojo.patching.eval_mode import EvalMode
from yojo.patching.state import tokenizer_of, unwrap

logger = logging.getLogger(__name__)

WINDOW = 64  # examples whose conversations are sorted by length before they are put into batches


class Passes:
    """Scores of responses, each of which is a conversation that the model reads by itself.

    Conversations share batches, filled up on the right; a score is the same in every company, to rounding. Where it would
    not be, every conversation is a pass of its own. From any number of threads.

    Args:
        model: a model of transformers, bare or wrapped by PEFT.
        processor: its processor or tokenizer.
        read: function (inputs, a dict of tensors on the model's device) -> [B], the scores of one pass.
        padding: id of the token that fills rows up; None where the model could not tell it.
        max_length: the most tokens a conversation may have, or None.
        batch_size: conversations in a pass.
        date: day that the chat template prints, where it prints one; what the processor has settled, or today, by default.

    Raises:
        ValueError: no chat template, a bad argument.
    """

    def __init__(self, model, processor, read, padding, max_length=None, batch_size=8, date=None):
        base = unwrap(model)
        for name, value in (("max_length", max_length), ("batch_size", batch_size)):
            if value is not None and (not isinstance(value, int) or isinstance(value, bool) or value < 1):
                raise ValueError(f"{name} must be an int of at least 1{_or_none(name)}, got {value!r}")
        if batch_size is None:
            raise ValueError("batch_size must be an int of at least 1, got None")
        _settle(processor, date)
        self.model, self.read, self.padding = model, read, padding
        self.conversations = Conversations(processor, base.config, _limit(base, tokenizer_of(processor), max_length))
        self.rope = ropes.switch_of(base) if _has_decoder(base) else None
        self.eval_mode = EvalMode()
        self.batch_size = batch_size if batch_size == 1 or self._may_pad(base) else 1

    def score_many(self, examples):
        """As `yojo.judges.Judge.score_many`."""
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
        inputs = batch[0] if isinstance(batch[0], dict) else self._padded(batch)
        device = devices.input_device(unwrap(self.model))
        inputs = {name: value.to(device) for name, value in inputs.items()}
        with self.eval_mode.of(self.model), torch.inference_mode():
            return self.read(inputs).float().cpu()

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


def _settle(processor, date):
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


def _or_none(name):
    return " or None" if name == "max_length" else ""

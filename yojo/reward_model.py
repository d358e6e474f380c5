"""`RewardModel`: a patched model and its processor, ready to score."""

import contextlib
import dataclasses
import logging
import operator

import torch

from yojo.inputs import windows
from yojo.inputs.example import Example
from yojo.inputs.feeding import fed
from yojo.inputs.orders import checked_orders, ordered, put_back
from yojo.inputs.packing import Collator, Encoded, pack_in_parts
from yojo.patching import devices, graphs
from yojo.patching.eval_mode import Modules
from yojo.patching.modes import set_mode
from yojo.patching.state import unwrap
from yojo.saving import known_scores
from yojo.saving.identity import reward_model_fingerprint
from yojo.saving.load import load_pretrained
from yojo.saving.save import push_to_hub, save_pretrained

logger = logging.getLogger(__name__)


def _named_scores(encoded, scores, dtype):
    """The scores of each example, from the table of a batch; a warning names those that are not finite."""
    scores = [row[: len(item.responses)].clone() for row, item in zip(scores, encoded, strict=True)]
    for row, item in zip(scores, encoded, strict=True):
        if broken := (~row.isfinite()).nonzero()[:, 0].tolist():
            count = len(row) // item.orders  # in whichever order
            logger.warning(
                "%s: the scores of responses %s are not finite (%s): hidden states overflow in %s, or weights are not "
                "finite; bfloat16 and float32 reach further than float16",
                item.name,
                ", ".join(map(str, dict.fromkeys(n % count for n in broken))),
                ", ".join(str(row[n].item()) for n in broken),
                str(dtype).removeprefix("torch."),
            )
    return scores


def _sent(batch, device, stream):
    """A batch on its way to the device; through a stream of its own it is copied beside the pass before."""
    if stream is None:
        return {name: devices.sent(value, device) for name, value in batch.items()}
    with torch.cuda.stream(stream):
        batch = {name: devices.sent(value, device) for name, value in batch.items()}
    torch.cuda.current_stream(device).wait_stream(stream)
    return batch


@dataclasses.dataclass(frozen=True)
class Scored:
    """One example, scored.

    Attributes:
        place: its number in the stream, from 0.
        encoded: `Encoded`.
        scores: [N] float32 on the CPU; None where there is an error.
        error: the exception that says why there are no scores, or None.
        tokens: of the example in its packed row.
        filled: tokens that the row's padding adds for it, its share.
    """

    place: int
    encoded: Encoded
    scores: torch.Tensor | None
    error: Exception | None
    tokens: int
    filled: float = 0.0


@dataclasses.dataclass(frozen=True)
class Numbered:
    """One example on its way into a row.

    Attributes:
        place: its number, by which `Scored` names it.
        encoded: `Encoded`.
        tokens, bytes: that it takes in the row, and of its vision tensors.
    """

    place: int
    encoded: Encoded
    tokens: int
    bytes: int


class _Encode:
    """What a worker does for `score_many`."""

    def __init__(self, collator):
        self.collator = collator

    def __call__(self, numbered):
        place, example = numbered
        return self.collator.encode(example, place, rankings=False)


class Run:
    """Rows on their way through a model: one on the device while the next is packed; halved where memory is short.

    Attributes:
        budget: tokens in a row, at most; less after it was too much.
    """

    def __init__(self, reward_model, budget, errors):
        self.reward_model, self.budget, self.errors = reward_model, budget, errors
        self.modules, self.under_way = Modules(), []
        device = devices.input_device(unwrap(reward_model.model))
        self.ahead = 0 if device.type == "cpu" else 1
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def row(self, items):
        """Begin a row, then wait for those before but one: a device has work while the next row is encoded."""
        yield from self._begin(items)
        yield from self._end(self.ahead)

    def rest(self):
        """Wait for the rows that are left."""
        yield from self._end(0)

    def _end(self, all_but):
        while len(self.under_way) > all_but:
            items, wait = self.under_way.pop(0)
            yield from self._named(items, wait())

    def _begin(self, items):
        found = self._try(items)
        if _is_memory(found):
            yield from self._end(0)  # the rows before hold memory, too
            found = self._try(items)
        if not isinstance(found, Exception):
            self.under_way.append((items, found))
        elif len(items) > 1 and (_is_memory(found) or self.errors == "return"):
            half = -(-len(items) // 2)
            if _is_memory(found):
                tokens = sum(item.tokens for item in items)
                self.budget = max(1, min(self.budget, tokens) // 2)
                logger.warning("out of memory with %d tokens in a row: %d at most from now on", tokens, self.budget)
            yield from self._begin(items[:half])
            yield from self._end(self.ahead)
            yield from self._begin(items[half:])
        else:
            yield from self._failed(items, found)

    def _try(self, items):
        """A function that waits for the scores; or the exception, if it may be an example's or memory is short."""
        try:
            encoded = [item.encoded for item in items]
            return self.reward_model._begin_row(encoded, self.modules, self.stream)
        except Exception as error:
            if _is_memory(error):
                found = error.with_traceback(None)  # whose frames hold what there is no room for
                found.__context__ = found.__cause__ = None
            elif self.errors == "return" and isinstance(error, (TypeError, ValueError)):
                found = error
            else:
                raise
        if torch.cuda.is_available() and _is_memory(found):
            torch.cuda.empty_cache()
        return found

    def _failed(self, items, error):
        if _is_memory(error):
            (item,) = items
            text = f"{item.encoded.name}: out of memory with {item.tokens} tokens in a row of its own: {_first_line(error)}"
            error = MemoryError(text)
        if self.errors == "raise":
            raise error
        for item in items:
            yield Scored(item.place, item.encoded, None, error, item.tokens)

    def _named(self, items, scores):
        tokens = sum(item.tokens for item in items)
        multiple = self.reward_model._multiple(tokens)
        filled = (-tokens % multiple if multiple else 0) / len(items)
        for item, found in zip(items, scores, strict=True):
            yield Scored(item.place, item.encoded, found, None, item.tokens, filled)


def _is_memory(error):
    """Whether an exception says that memory is short; on the CPU, torch says so in words."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class RewardModel:
    """A patched model and its processor, ready to score, from any number of threads.

    A model that is in training mode is put into eval mode while any thread scores with it, and back behind the last. Train
    it meanwhile and the training passes run without dropout; where training mode is set under a pass that scores, that
    pass raises a RuntimeError rather than returning a score with dropout in it.

    Args:
        model: a model that `yojo.patch` has patched, bare or wrapped by PEFT.
        processor: its processor, or its tokenizer for a text-only model.
        max_length: the most tokens one example may take (see `yojo.Collator`), or None.

    Example:
        >>> reward_model = yojo.RewardModel.from_pretrained("my-reward-model")
        >>> reward_model.score("Which digit is shown?", ["It is a 7.", "It is a 2."], images=["seven.png"])
        tensor([ 1.3, -0.8])
    """

    def __init__(self, model, processor, max_length=None):
        self.collator = Collator(processor, model, max_length)
        self.model = model
        self.processor = processor

    @property
    def config(self):
        """The `YojoConfig` the model is patched with."""
        return self.collator.config

    @property
    def order_free(self):
        """Whether no score depends on the order of the responses: in mode "isolated", where none sees another."""
        return self.config.mode == "isolated"

    def score(self, prompt, responses, images=None, videos=None, *, tools=None, literal_tags=False):
        """Score the responses to one prompt in one forward pass.

        Args:
            prompt: string or chat messages (see `yojo.Example`).
            responses: N strings.
            images, videos: lists, or None.
            tools: list of dicts for the chat template, or None.
            literal_tags: `<image>` and `<video>` in the prompt are text, not places.

        Returns:
            [N] float32 on the CPU, in the order of responses; higher is better.

        Raises:
            TypeError, ValueError: an input that cannot be scored; the message names it.
        """
        example = Example(prompt, responses, images=images, videos=videos, tools=tools, literal_tags=literal_tags)
        return self.score_many([example])[0]

    def score_many(self, examples, progress=False, token_budget=8192, workers=0):
        """Score many examples, several in one forward pass where they fit.

        Examples of like length share rows, within a window of some rows. Which do depends on the examples alone: scores are
        the same to the bit for any number of workers. Rankings are not looked at. A response whose states overflow has a
        score that is not finite, and changes no other response's but those that see it (later ones, in comparative mode); a
        warning names it.

        Args:
            examples: iterable of `yojo.Example`; it is read some rows ahead.
            progress: show a progress bar.
            token_budget: packed rows are filled up to this many tokens; an example that is longer by itself gets a
                row of its own. Where memory does not suffice for a row it is halved, with the budget of those to come.
            workers: processes that read images and run processor and tokenizer while the model runs; 0: done in between.

        Returns:
            list of [N] float32 tensors on the CPU, in the order of examples.

        Raises:
            TypeError, ValueError: an example that cannot be scored; the message names it.
            MemoryError: one that does not fit into memory by itself.
        """
        from tqdm.auto import tqdm

        total = len(examples) if hasattr(examples, "__len__") else None
        scores = {}
        encoded = fed(_Encode(self.collator), enumerate(examples), workers)
        with (
            contextlib.closing(encoded),
            tqdm(total=total, disable=not progress, desc="scoring", unit="example") as bar,
        ):
            for scored in self.score_encoded(encoded, token_budget):
                scores[scored.place] = scored.scores
                bar.update()
        return [scores[place] for place in range(len(scores))]

    def score_orders(self, example, orders):
        """Score one example with its responses in several orders, the prompt paid once.

        Args:
            example: `yojo.Example` with N responses.
            orders: K tuples of 0..N-1: `order[place]` is the response that stands at that place.

        Returns:
            [K, N] float32 on the CPU: `scores[k, n]` is that of response n of the example in order k.

        Raises:
            TypeError, ValueError: an example that cannot be scored, or what is no order of its responses.

        Example:
            >>> reward_model.score_orders(yojo.Example("Which digit?", ["A 7.", "A 2."]), [(0, 1), (1, 0)])
            tensor([[ 1.3, -0.8],
                    [ 1.2, -0.9]])
        """
        encoded = self.encode_orders(example, orders)
        budget = sum(item.num_tokens(self.config) for item in encoded)
        found = {scored.place: scored.scores for scored in self.score_encoded(encoded, budget)}
        return self.of_orders([found[place] for place in range(len(encoded))], orders)

    def encode_orders(self, example, orders, place=0):
        """An example in several orders, encoded: what `score_encoded` takes, and `of_orders` puts together again.

        Args:
            example, orders: as for `score_orders`.
            place: how errors name an example that has no id.

        Returns:
            list of `Encoded`: one with all orders behind one prompt; for the format "mr2rm" one for each order.
        """
        orders = checked_orders(orders, len(example.responses))
        if self.config.format == "mr2rm":
            return [self.collator.encode(ordered(example, order), place, rankings=False) for order in orders]
        return [self.collator.encode(example, place, rankings=False).in_orders(orders, self.config)]

    def of_orders(self, scores, orders):
        """[K, N] float32: the scores of an example in several orders, put together.

        Args:
            scores: list of the scores of each `Encoded` that `encode_orders` has made.
            orders: K tuples, those that it was given.
        """
        if self.config.format == "mr2rm":
            return put_back(scores, orders)
        return scores[0].view(len(orders), -1)

    def score_encoded(self, encoded, token_budget=8192, errors="raise"):
        """Score a stream of encoded examples, row by row, and give the scores as they come.

        Args:
            encoded: iterable of what `collator.encode` returns.
            token_budget: as for `score_many`.
            errors: "raise", or "return": an example that the model refuses, or that does not fit into memory by itself,
                has an `error` instead of scores, and the others of its row are scored.

        Yields:
            `Scored`, in the order in which rows are done.
        """
        if token_budget < 1:
            raise ValueError(f"token_budget must be at least 1, got {token_budget}")
        if errors not in ("raise", "return"):
            raise ValueError(f"errors must be 'raise' or 'return', got {errors!r}")
        run = Run(self, token_budget, errors)
        numbered = (
            Numbered(place, item, item.num_tokens(self.config), item.num_bytes()) for place, item in enumerate(encoded)
        )
        size, weight = operator.attrgetter("tokens"), operator.attrgetter("bytes")
        for row in windows.rows(numbered, lambda: run.budget, size, weight):
            yield from run.row(row)
        yield from run.rest()

    def _score_row(self, encoded):
        return self._begin_row(encoded)()

    def _begin_row(self, encoded, modules=None, stream=None):
        """Hand a row to the device, in parts where it must be; returns a function that waits for its scores.

        `modules`: the `Modules` of the rows before. `stream`: the CUDA stream that copies go through.
        """
        parts = [self._score_batch(some, batch, modules, stream) for some, batch in pack_in_parts(self._pack, encoded)]
        return lambda: [scores for part in parts for scores in part()]

    def _pack(self, encoded):
        self.collator.tables.follow(unwrap(self.model))
        tokens = sum(item.num_tokens(self.config) for item in encoded)
        return self.collator.pack(encoded, pad_to_multiple_of=self._multiple(tokens))

    def _multiple(self, tokens):
        """What the length of a row of so many tokens is filled up to a multiple of, or None."""
        limit = unwrap(self.model).yojo.graphs
        return graphs.BUCKET if limit and graphs.bucket_of(tokens, limit) else None

    def _score_batch(self, encoded, batch, modules=None, stream=None):
        """Begin the pass over a batch; returns a function that waits for its scores, one tensor per example."""
        base = unwrap(self.model)
        batch = _sent(batch, devices.input_device(base), stream)
        with base.yojo.eval_mode.of(self.model, modules), torch.inference_mode():
            scores = devices.fetched(self.model(**batch).scores.float())

        def wait(batch=batch):  # whose memory another copy may take only when the pass is over
            return _named_scores(encoded, scores(), base.dtype)

        return wait

    def fingerprint(self):
        """All that changes a score: dict of weights, settings, chat template, tokenizer, processor and dtype, as digests.

        The same in every process and on every device, and after saving and loading.
        """
        return reward_model_fingerprint(self)

    def save_pretrained(self, path, **options):
        """Write everything that changes a score into a folder, whole or not at all.

        Args:
            path: folder, made if it is missing.
            **options: as for `yojo.saving.save.save_pretrained`: state_dict, card, provenance.
        """
        save_pretrained(self, path, **options)

    def check_known_scores(self, path):
        """Score the examples again that a saved model has its scores of, and compare: a pass, which loading does not make.

        Args:
            path: the folder the model was loaded from (or hub name).

        Returns:
            `yojo.saving.known_scores.Known`: `ok`, `stored`, `reason`, `difference`, `bound`. A model that was saved without known
            scores is ok, and says so.

        Raises:
            ValueError: no such folder, or one whose settings are damaged.

        Example:
            >>> reward_model.check_known_scores("my-reward-model").reason
            'the model gives its known scores, 2e-07 apart at most (in float32)'
        """
        return known_scores.check(self, path)

    def push_to_hub(self, repo_id, private=None, token=None, commit_message=None, **options):
        """Save and upload to the hub; the repository is made if it is missing.

        Args:
            repo_id: "name/repository".
            private: whether a new repository is private; the account's default by default.
            token: a hub token; the one that is logged in by default.
            commit_message: of the upload.
            **options: as for `save_pretrained`.

        Returns:
            What `huggingface_hub.HfApi.upload_folder` returns.
        """
        return push_to_hub(self, repo_id, private=private, token=token, commit_message=commit_message, **options)

    @classmethod
    def from_pretrained(cls, path, *, mode=None, permutations=None, max_length=None, **kwargs):
        """Load what `save_pretrained` wrote, or a checkpoint of transformers' own Trainer with a patched model.

        Args:
            path: folder, or a hub name.
            mode, permutations: score in another mode than it was saved with (`yojo.patching.modes.set_mode`).
            max_length: the most tokens one example may take, or None.
            **kwargs: as for `yojo.saving.load.load_pretrained`: base_model, dtype, device, fuse, trainable, check_base, ...

        Returns:
            `RewardModel`, in eval mode.

        Raises:
            ValueError: something is missing, damaged, or of another save; nothing is ever filled with random weights.
        """
        model, processor = load_pretrained(path, **kwargs)
        set_mode(model, mode, permutations)
        return cls(model, processor, max_length)

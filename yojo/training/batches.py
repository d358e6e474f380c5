"""Global batches of examples -> packed rows of a token budget, shared out evenly among the processes of a training run.

Every process reads the records of the whole global batch, which is cheap, agrees with the others on who takes which without
a word, since all compute the same, and encodes its own share alone. All randomness is a function of seed, epoch and place
in the data set, so that a run can be resumed anywhere, and on another number of processes.
"""

import dataclasses
import os
import random

import torch

from yojo.data.mixtures import draw_responses, take_responses
from yojo.data.readers import NOT_A_RECORDS_FAULT, what_it_says
from yojo.inputs.example import Example
from yojo.inputs.images import image_size, is_array
from yojo.inputs.packing import orders, pack_in_parts
from yojo.inputs.plain import private_copy
from yojo.inputs.videos import Video, frame_files

VIDEO_TOKENS = 2048  # what a video is taken to have where its frames cannot be counted without decoding it
PIXELS_PER_TOKEN = 28 * 28  # of an image, where the processor does not say
TEMPLATE_TOKENS = 16  # of the chat template around a prompt


class GlobalBatches(torch.utils.data.Sampler):
    """Keys (epoch, index) of the examples of every global batch; a batch sampler for a DataLoader.

    Args:
        dataset: map-style; one with a method `order(epoch, seed)` (see `yojo.data.Mixture`) says itself what an epoch
            is.
        batch_size: examples of a global batch, those of all processes together.
        seed: of the order.
        shuffle: in another order every epoch, or in the given one.
        drop_last: leave out the last batch of an epoch where it is not full.
    """

    def __init__(self, dataset, batch_size, *, seed=0, shuffle=True, drop_last=False):
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.shuffle, self.drop_last, self.epoch = shuffle, drop_last, 0

    def set_epoch(self, epoch):
        """Say which epoch the next iteration is."""
        self.epoch = epoch

    @property
    def _count(self):
        # Weights are for training: in its own order, a mixture is each of its records once.
        whole = None if self.shuffle else getattr(self.dataset, "total", None)
        return len(self.dataset) if whole is None else whole

    def __len__(self):
        count = self._count
        return count // self.batch_size if self.drop_last else -(-count // self.batch_size)

    def __iter__(self):
        epoch = self.epoch
        if not self.shuffle:
            order = range(self._count)
        elif hasattr(self.dataset, "order"):
            order = self.dataset.order(epoch, self.seed)
        else:
            order = list(range(len(self.dataset)))
            random.Random(f"{self.seed}:{epoch}").shuffle(order)
        for start in range(0, len(self) * self.batch_size, self.batch_size):
            yield [(epoch, index) for index in order[start : start + self.batch_size]]


@dataclasses.dataclass(frozen=True)
class Draw:
    """What stands for one key of `GlobalBatches`: an example with its responses in the order of this epoch, or why not.

    Attributes:
        index: place in the data set.
        example: `Example`, or None where it is bad.
        order: tuple, the place in the data set's own example of each of its responses.
        error: why there is no example.
    """

    index: int
    example: Example | None
    order: tuple = ()
    error: str | None = None


class Drawn(torch.utils.data.Dataset):
    """A data set whose items are `Draw`s: responses in another order every epoch, perhaps some of them.

    A record that cannot be read is a `Draw` that says why.

    Args:
        dataset: map-style, of `Example`s.
        seed: of the orders.
        shuffle_responses: draw an order for each example and epoch; else the given one.
        max_responses: how many of an example's responses to take at most, or None for all; two different ranks are
            among them wherever the example has two.
    """

    def __init__(self, dataset, *, seed=0, shuffle_responses=True, max_responses=None):
        if max_responses is not None and max_responses < 2:
            raise ValueError(f"max_responses must be at least 2, got {max_responses}: one response is not compared")
        self.dataset, self.seed = dataset, seed
        self.shuffle_responses, self.max_responses = shuffle_responses, max_responses

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, key):
        epoch, index = key
        try:
            example = self.dataset[index]
        except NOT_A_RECORDS_FAULT:
            raise
        except Exception as error:  # files, decoders and data sets of one's own raise what they like
            return Draw(index, None, error=_of_record(error, f"record {index} of the data set"))
        if not isinstance(example, Example):
            raise TypeError(
                f"the data set must hold yojo.Example objects, got {type(example).__name__} at place {index}: "
                "yojo.data.load makes them from files and records"
            )
        generator = random.Random(f"{self.seed}:{epoch}:{index}")
        order = draw_responses(example, generator, count=self.max_responses, shuffle=self.shuffle_responses)
        return Draw(index, take_responses(example, order), tuple(order))


def _of_record(error, name):
    """What is wrong with a record, with its name in front where the error does not say it."""
    text = what_it_says(error)
    return text if isinstance(error, ValueError) and str(error) or name in text else f"{name}: {text}"


class CostEstimate:
    """What a forward pass over an example costs, in units of one token's share outside of attention.

    Good enough to share work out evenly: text is tokenised, images are read up to their size, and the visible pairs of
    attention are counted. Holds no weights.

    Args:
        collator: the `yojo.Collator` of the model.
        model: the patched model (unwrapped).
    """

    def __init__(self, collator, model):
        self.collator = collator
        decoder = model.get_decoder()
        config = model.config.get_text_config()
        weights = sum(p.numel() for name, p in decoder.named_parameters() if "embed" not in name)
        heads = config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        # Two FLOPs a weight and token; four a head's dimension and pair, in every layer.
        self.pair = 2.0 * heads * head_dim * config.num_hidden_layers / max(weights, 1)

    def __call__(self, example):
        """The cost of an `Example`, a float above 0."""
        config = self.collator.config
        prompt = TEMPLATE_TOKENS + self._text(_prompt_text(example)) + self._media(example)
        responses = [self._text(text) + 1 for text in example.responses]
        if config.mode == "isolated":
            tokens = prompt + sum(responses)
            pairs = prompt**2 / 2 + sum(prompt * length + length**2 / 2 for length in responses)
        else:
            branches, length = len(orders(len(responses), config)), sum(responses)
            tokens = prompt + branches * length
            pairs = prompt**2 / 2 + branches * (prompt * length + length**2 / 2)
        return tokens + self.pair * pairs

    def _text(self, text):
        try:
            tokenizer = private_copy(self.collator.tokenizer, split_special=False)
            if tokenizer is None:
                return len(self.collator.tokenizer(text, add_special_tokens=False)["input_ids"])
            return len(tokenizer.encode(text, add_special_tokens=False).ids)
        except Exception:  # whatever a tokenizer raises: encoding the example will say so, with its name
            return len(text)

    def _media(self, example):
        images, videos = _media_of(example)
        tokens = 0
        sizes = [size for size in map(image_size, images) if size is not None]
        if sizes:
            tokens += self._image_tokens(sizes)
        for video in videos:
            frames = _frames(video)
            size = image_size(frames[0]) if frames is not None and len(frames) else None
            tokens += VIDEO_TOKENS if size is None else len(frames) * self._image_tokens([size]) // 2
        return tokens

    def _image_tokens(self, sizes):
        count = getattr(self.collator.processor, "_get_num_multimodal_tokens", None)
        if count is not None:
            try:
                return sum(count(image_sizes=sizes)["num_image_tokens"])
            except (TypeError, ValueError, KeyError, AttributeError, ImportError):
                pass  # a processor that does not say
        return sum(height * width // PIXELS_PER_TOKEN + 1 for height, width in sizes)


def _prompt_text(example):
    if isinstance(example.prompt, str):
        return example.prompt
    texts = []
    for turn in example.prompt:
        content = turn["content"]
        parts = [content] if isinstance(content, str) else content
        texts += [part if isinstance(part, str) else str(part.get("text") or "") for part in parts]
    return "\n".join(texts)


def _media_of(example):
    images, videos = list(example.images), list(example.videos)
    for turn in example.prompt if not isinstance(example.prompt, str) else ():
        for part in turn["content"] if not isinstance(turn["content"], str) else ():
            if isinstance(part, dict):
                images += [part[key] for key in ("image",) if part.get(key) is not None]
                videos += [part[key] for key in ("video",) if part.get(key) is not None]
    return images, videos


def _frames(video):
    """The frames of a folder, or a list or array of them; None for a file, which would have to be decoded."""
    source = video.source if isinstance(video, Video) else video
    if isinstance(source, (str, os.PathLike)):
        return frame_files(source) if os.path.isdir(source) else None
    return source if isinstance(source, (list, tuple)) or is_array(source) else None


def shares(costs, world):
    """Which of a global batch's examples each process takes: the dearest first, to whoever has least.

    Args:
        costs: list of floats above 0.
        world: how many processes.

    Returns:
        list of `world` sorted lists of places; none is empty where there are as many examples as processes.
    """
    loads, taken = [0.0] * world, [[] for _ in range(world)]
    for place in sorted(range(len(costs)), key=lambda place: -costs[place]):
        rank = min(range(world), key=lambda rank: (loads[rank], rank))
        loads[rank] += costs[place]
        taken[rank].append(place)
    return [sorted(places) for places in taken]


def rows_of(sizes, budget):
    """Which examples stand in one packed row: the largest first, each into the first row that has room.

    Args:
        sizes: tokens of each.
        budget: tokens of a row; an example that is larger by itself gets a row of its own.

    Returns:
        list of sorted lists of places.
    """
    rows, room = [], []
    for place in sorted(range(len(sizes)), key=lambda place: -sizes[place]):
        at = next((row for row, left in enumerate(room) if left >= sizes[place]), None)
        if at is None:
            rows.append([])
            room.append(budget)
            at = len(rows) - 1
        rows[at].append(place)
        room[at] -= sizes[place]
    return sorted(sorted(row) for row in rows)


class RowCollator:
    """Turn the `Draw`s of a global batch into the packed rows of one process; the `collate_fn` of a loader.

    Whatever reading, encoding or packing one example raises is that example's fault, but for memory that runs out.

    Args:
        collator: `yojo.Collator` of the model.
        estimate: `CostEstimate`, by which examples are shared out.
        rank, world: which process this is, and of how many.
        row_tokens: token budget of a row.
        skip_bad: leave out examples that cannot be encoded (too long, a damaged image, ...), and say so.
        need_rankings: an example without rankings is an error.
    """

    def __init__(self, collator, estimate, *, rank=0, world=1, row_tokens, skip_bad=False, need_rankings=True):
        if row_tokens < 1:
            raise ValueError(f"row_tokens must be at least 1, got {row_tokens}")
        self.collator, self.estimate, self.rank, self.world = collator, estimate, rank, world
        self.row_tokens, self.skip_bad, self.need_rankings = row_tokens, skip_bad, need_rankings

    def __call__(self, draws):
        """Encode and pack this process's share.

        Returns:
            dict: error, why that does not work, and nothing else (an exception would come out of a loader's worker with
            its whole traceback for a message). Or rows, a list of batches for `model(**row)`, empty where no process has
            an example that can be used; indices and orders, for each row a list with the `Draw.index` and `Draw.order`
            of its samples; samples, how many of them count (0 where there was nothing to do and the only row is there to
            keep the processes in step); drawn, how many examples all processes were given; skipped, a list of
            (index, why).
        """
        try:
            return self._rows(draws)
        except (TypeError, ValueError) as error:
            return {"error": str(error)}

    def _rows(self, draws):
        good = [draw for draw in draws if draw.example is not None]
        if len(good) < len(draws) and not self.skip_bad:
            raise ValueError(next(draw.error for draw in draws if draw.example is None))
        skipped = [(draw.index, draw.error) for draw in draws if draw.example is None] if self.rank == 0 else []
        taken = shares([self._cost(draw.example) for draw in good], self.world)[self.rank]
        packed, bad = self._packed([good[place] for place in taken])
        samples, skipped = sum(len(some) for some, _ in packed), skipped + bad
        if not packed:  # nobody may be left without a row: the others' collectives would wait for it for ever
            for draw in good:
                packed, _ = self._packed([draw])
                if packed:
                    break
        return {
            "rows": [batch for _, batch in packed],
            "indices": [[draw.index for draw, _ in some] for some, _ in packed],
            "orders": [[draw.order for draw, _ in some] for some, _ in packed],
            "samples": samples,
            "drawn": len(draws),
            "skipped": skipped,
        }

    def _cost(self, example):
        try:
            return self.estimate(example)
        except NOT_A_RECORDS_FAULT:
            raise
        except Exception:  # whoever encodes it will say what is wrong with it
            return 1.0

    def _packed(self, draws):
        """([(samples, batch)], [(index, why)]): the rows of some draws, and those that cannot be used."""
        encoded, bad = self._encode(draws)
        sizes = [item.num_tokens(self.collator.config) for _, item in encoded]
        rows = []
        for places in rows_of(sizes, self.row_tokens):
            made, left = self._pack([encoded[place] for place in places])
            rows, bad = rows + made, bad + left
        return rows, bad

    def _encode(self, draws):
        encoded, bad = [], []
        for draw in draws:
            try:
                if self.need_rankings and draw.example.rankings is None:
                    raise ValueError(f"{draw.example.name} has no rankings: nothing says which response is better")
                encoded.append((draw, self.collator.encode(draw.example, draw.index)))
            except NOT_A_RECORDS_FAULT:
                raise
            except Exception as error:  # templates, decoders and tokenizers raise what they like
                bad.append(self._bad(draw, error))
        return encoded, bad

    def _bad(self, draw, error):
        """(index, why) of a draw that cannot be used; raises ValueError where none may be skipped."""
        name = draw.example.name if draw.example.id is not None else f"example {draw.index}"
        why = _of_record(error, name)
        if not self.skip_bad:
            raise ValueError(why) from error
        return draw.index, why

    def _pack(self, some):
        """([(samples, batch)], [(index, why)]): one row, or several where vision tensors do not fit together."""
        try:
            return pack_in_parts(self._pack_row, some), []
        except NOT_A_RECORDS_FAULT:
            raise
        except Exception as error:
            if len(some) == 1:
                return [], [self._bad(some[0][0], error)]
            alone = [self._pack([one]) for one in some]
            bad = [left for _, lefts in alone for left in lefts]
            if not bad:  # each of them fits by itself: the fault is not one record's
                raise
        good = [one for one, (_, lefts) in zip(some, alone, strict=True) if not lefts]
        packed, more = self._pack(good) if good else ([], [])
        return packed, bad + more

    def _pack_row(self, some):
        return self.collator.pack([item for _, item in some])


class RowLoader(torch.utils.data.DataLoader):
    """A DataLoader of packed rows, one item a global batch; `set_epoch` reaches its sampler."""

    def set_epoch(self, epoch):
        """Say which epoch the next iteration is."""
        self.batch_sampler.set_epoch(epoch)

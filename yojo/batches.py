"""Global batches of examples -> packed rows of a token budget, shared out evenly among the processes of a training run.

Every process reads the records of the whole global batch, which is cheap, agrees with the others on who takes which without
a word, since all compute the same, and encodes its own share alone. All randomness is a function of seed, epoch and place
in the data set, so that a run can be resumed anywhere, and on another number of processes.
"""

import dataclasses
import io
import os
import random

import torch

from yojo.data import draw_responses, take_responses
from yojo.packing import Example, orders, pack_in_parts
from yojo.videos import Video, frame_files

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
        except ValueError as error:
            return Draw(index, None, error=str(error))
        if not isinstance(example, Example):
            raise TypeError(
                f"the data set must hold yojo.Example objects, got {type(example).__name__} at place {index}: "
                "yojo.data.load makes them from files and records"
            )
        generator = random.Random(f"{self.seed}:{epoch}:{index}")
        order = draw_responses(example, generator, count=self.max_responses, shuffle=self.shuffle_responses)
        return Draw(index, take_responses(example, order), tuple(order))


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
        return len(self.collator.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _media(self, example):
        images, videos = _media_of(example)
        tokens = 0
        sizes = [size for size in map(_image_size, images) if size is not None]
        if sizes:
            tokens += self._image_tokens(sizes)
        for video in videos:
            frames = _frames(video)
            size = _image_size(frames[0]) if frames else None
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
        parts = [turn["content"]] if isinstance(turn["content"], str) else turn["content"]
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
    """The frames of a folder or a list of them; None for a file, which would have to be decoded."""
    source = video.source if isinstance(video, Video) else video
    if isinstance(source, (str, os.PathLike)):
        return frame_files(source) if os.path.isdir(source) else None
    return source if isinstance(source, (list, tuple)) else None


def _image_size(source):
    """(height, width) without decoding the image; None where that does not work, which its owner will say."""
    from PIL import Image

    if hasattr(source, "size") and isinstance(source.size, tuple):
        return source.size[1], source.size[0]
    if hasattr(source, "shape"):
        return tuple(source.shape[:2])
    try:
        if isinstance(source, (bytes, bytearray)):
            source = io.BytesIO(source)
        elif not isinstance(source, (str, os.PathLike)):
            return None
        with Image.open(source) as image:
            return image.size[1], image.size[0]
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
        return None


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
        taken = shares([self.estimate(draw.example) for draw in good], self.world)[self.rank]
        encoded, bad = self._encode([good[place] for place in taken])
        samples, skipped = len(encoded), skipped + bad
        if not encoded:  # nobody may be left without a row: the others' collectives would wait for it for ever
            for draw in good:
                encoded, _ = self._encode([draw])
                if encoded:
                    break
        rows, indices, orders_of = [], [], []
        sizes = [item.num_tokens(self.collator.config) for _, item in encoded]
        for places in rows_of(sizes, self.row_tokens):
            for some, batch in pack_in_parts(self._pack, [encoded[place] for place in places]):
                rows.append(batch)
                indices.append([draw.index for draw, _ in some])
                orders_of.append([draw.order for draw, _ in some])
        return {
            "rows": rows,
            "indices": indices,
            "orders": orders_of,
            "samples": samples,
            "drawn": len(draws),
            "skipped": skipped,
        }

    def _encode(self, draws):
        encoded, bad = [], []
        for draw in draws:
            try:
                if self.need_rankings and draw.example.rankings is None:
                    raise ValueError(f"{draw.example.name} has no rankings: nothing says which response is better")
                encoded.append((draw, self.collator.encode(draw.example, draw.index)))
            except (TypeError, ValueError) as error:
                if not self.skip_bad:
                    raise
                bad.append((draw.index, str(error)))
        return encoded, bad

    def _pack(self, some):
        return self.collator.pack([item for _, item in some])


class RowLoader(torch.utils.data.DataLoader):
    """A DataLoader of packed rows, one item a global batch; `set_epoch` reaches its sampler."""

    def set_epoch(self, epoch):
        """Say which epoch the next iteration is."""
        self.batch_sampler.set_epoch(epoch)

"""Examples and a processor -> the packed batch a patched model takes: training, scoring and serving pack alike."""

import dataclasses
import random

import torch

from yojo import families
from yojo.families import TOKEN_TYPES
from yojo.families.family import PIXELS
from yojo.inputs import features
from yojo.inputs.decoded import Decoded
from yojo.inputs.example import Example
from yojo.inputs.mr2rm import ConversationEncoder
from yojo.inputs.plain import forbidden_ids, known_state
from yojo.inputs.prompts import NOT_FOR_THE_MODEL, PromptEncoder, bad_record
from yojo.inputs.turns import TurnEncoder
from yojo.patching import dates, media, sharing, tables
from yojo.patching.joining import CannotJoin, join_vision
from yojo.patching.positions import PromptPositions
from yojo.patching.readings import Separators
from yojo.patching.state import patched_base, separator_id_of, tokenizer_of
from yojo_kernels import Layout


@dataclasses.dataclass(frozen=True)
class Encoded:
    """One example as tokens: what `Collator.encode` returns and `Collator.pack` packs.

    Attributes:
        name: how errors name the example.
        prompt_ids: [P] int64.
        positions: [axes, P] int64, the prompt's positions as the model gives them.
        next_position: where every branch starts to count, on every axis.
        blocks: [P] int64 bidirectional block ids, -1 = none; or None.
        token_types: dict name -> [P], the processor's per-token types.
        vision: dict name -> tensor, the processor's vision tensors.
        responses: N lists of token ids, each closed by the separator.
        rankings: N numbers or None.
        leads: N ints, how many ids at the beginning of each response the chat template puts before it.
        open_end: the last response is closed by no separator: it reaches to the last of its tokens (format="mr2rm").
        branches: tuple of tuples of places in `responses`, the branches as they stand in a row; None: those of the model's
            mode (`in_orders` gives others).
        orders: K, in how many orders the responses stand; responses holds them K times.
    """

    name: str
    prompt_ids: torch.Tensor
    positions: torch.Tensor
    next_position: int
    blocks: torch.Tensor | None
    token_types: dict
    vision: dict
    responses: list
    rankings: list | None
    leads: list
    open_end: bool = False
    branches: tuple | None = None
    orders: int = 1

    def num_tokens(self, config):
        """Tokens this example takes in a packed row.

        Args:
            config: `YojoConfig` of the model.

        Returns:
            int.
        """
        branches = self.branches or _branches(len(self.responses), config)
        return len(self.prompt_ids) + sum(len(self.responses[n]) for branch in branches for n in branch)

    def in_orders(self, orders, config):
        """The same example with its responses in several orders, all of them behind one prompt.

        Every order is laid out as the mode lays out an example whose responses stand in that order, in branches of its own,
        so that its scores are those of a pass of its own, to rounding.

        Args:
            orders: K tuples of 0..N-1: `order[place]` is the response that stands there.
            config: `YojoConfig` of the model.

        Returns:
            `Encoded` with K * N responses and without rankings: response n in order k is number k * N + n.

        Raises:
            ValueError: no orders, one that is no order of N responses, or the format "mr2rm", in which the tokens of a
                response depend on its place.
        """
        count = len(self.responses)
        if self.open_end:
            raise ValueError('the format "mr2rm" tokenises an order as a whole: encode every order by itself')
        if not orders or any(sorted(order) != list(range(count)) for order in orders):
            raise ValueError(f"{self.name}: orders must be orders of 0..{count - 1}, got {list(orders)!r}")
        branches = [
            tuple(k * count + order[place] for place in branch)
            for k, order in enumerate(orders)
            for branch in _branches(count, config)
        ]
        return dataclasses.replace(
            self,
            responses=self.responses * len(orders),
            leads=self.leads * len(orders),
            rankings=None,
            branches=tuple(branches),
            orders=len(orders),
        )

    def one_by_one(self):
        """list of `Encoded`, one for each order of `in_orders`, with N responses each."""
        count, each = len(self.responses) // self.orders, len(self.branches) // self.orders
        return [
            dataclasses.replace(
                self,
                responses=self.responses[:count],
                leads=self.leads[:count],
                branches=tuple(tuple(n % count for n in branch) for branch in self.branches[k * each : (k + 1) * each]),
                orders=1,
            )
            for k in range(self.orders)
        ]

    def num_bytes(self):
        """Bytes of its vision tensors."""
        return sum(tensor.nbytes for tensor in self.vision.values())


class Collator:
    """Make the batch a patched model takes: `model(**collator(examples))`.

    Several examples, of whatever mix of text, images and videos, stand end to end in one packed row without padding.
    A DataLoader takes it as `collate_fn`, a Trainer as `data_collator`; it holds no weights, so that loader workers
    can carry it. Made when the model is where it runs, it lets workers make the tile tables of its kernels, too
    (`tables.look()` says that the model has moved since).

    Args:
        processor: the model's processor, or its tokenizer for a text-only model.
        model: the patched model.
        max_length: the most tokens one example may take in the row (prompt and all branches), or None. A longer one
            is an error: nothing is ever cut.
        pad_to_multiple_of: fill rows up to a multiple of so many tokens, or None: a sample of its own at the end of the
            row, which nothing reads and no score depends on. Rows then have few different lengths.

    Raises:
        ValueError: a model that is not patched, or a tokenizer without the separator.
    """

    def __init__(self, processor, model, max_length=None, pad_to_multiple_of=None):
        base = patched_base(model, "Collator")
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length must be at least 1 or None, got {max_length}")
        if pad_to_multiple_of is not None and pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of must be at least 1 or None, got {pad_to_multiple_of}")
        self.pad_to_multiple_of = pad_to_multiple_of
        self.processor = processor
        self.tokenizer = tokenizer_of(processor)
        self.config = base.yojo.config
        self.family = families.family_of(base.config)
        self.model_config = base.config
        self.places_features = media.can_place(base, self.family)
        self.positions = PromptPositions(base)
        self.max_length = max_length
        self.window = _shortest_window(base) if self.family.has_prefix else None
        self.rope = base.yojo.rope
        self.separator_id = separator_id_of(self.tokenizer, self.config.separator)
        if self.separator_id is None:
            raise ValueError(
                f"the tokenizer lacks the separator {self.config.separator!r}: yojo.patch(model, processor) adds it "
                "to both"
            )
        rows = base.get_input_embeddings().weight.shape[0]
        if self.separator_id >= rows:
            raise ValueError(
                f"the separator {self.config.separator!r} has id {self.separator_id}, beyond the {rows} rows of the "
                "model's embedding: call yojo.patch(model, processor) with this processor"
            )
        dates.agree(base.yojo, processor)
        self.tables = tables.Tables(base)
        self.decoded = Decoded()  # of examples one after the other, which may show the same image
        self._encoder = None

    @property
    def turns(self):
        """The `TurnEncoder`, made anew when the tokenizer has learnt new tokens."""
        state = known_state(self.tokenizer)
        if self._encoder is None or self._encoder[0] != state:
            forbidden = forbidden_ids(self.processor, self.tokenizer, self.model_config) | {self.separator_id}
            self._encoder = state, TurnEncoder(self.tokenizer, forbidden, self.config.turn)
        return self._encoder[1]

    @property
    def forbidden(self):
        """set of the ids that no response may hold."""
        return self.turns.forbidden

    def __call__(self, examples):
        """Encode and pack examples.

        Args:
            examples: list of `Example`.

        Returns:
            dict: input_ids [1, T] int64; position_ids [1, T], or [3, 1, T] for M-RoPE; layout (`Layout`); separators
            (`Separators`); the processor's vision tensors and where their features go (placeholders, a
            `yojo.patching.media.Placeholders`); and rankings [S, Nmax] (int64, -1 = no response; float32
            for the loss "soft") when the examples have them.

        Raises:
            TypeError, ValueError: an example that cannot be packed; the message names it.
        """
        return self.pack([self.encode(example, place) for place, example in enumerate(examples)])

    def encode(self, example, place=0, rankings=True):
        """Turn one `Example` into tokens, positions and vision tensors (`Encoded`), unpacked.

        Args:
            example: `Example`.
            place: how errors name an example that has no id.
            rankings: False: not to be trained on or evaluated, so its rankings are not looked at and left out.
        """
        if not isinstance(example, Example):
            raise TypeError(f"the collator packs yojo.Example objects, got {type(example).__name__} at place {place}")
        name = example.name if example.id is not None else f"example {place}"
        ranks = example.rankings if rankings else None
        if ranks is not None:
            _check_ranks(ranks, self.config.loss, name)
        with bad_record(name):
            return self._encode(example, ranks, name)

    def _encode(self, example, ranks, name):
        prompts = PromptEncoder(self.processor, self.tokenizer, name, self.model_config, self.decoded)
        if self.config.format == "mr2rm":
            whole = ConversationEncoder(prompts, self.config.separator, self.separator_id, self.forbidden)(example)
            return self._encoded(whole.inputs, whole.responses, ranks, name)
        prompt, responses, leads = self.turns(prompts, example)
        return self.from_processed(prompt, responses, rankings=ranks, name=name, leads=leads)

    def from_processed(self, prompt, responses, *, rankings=None, name="example", leads=None):
        """The same from what a processor has made already.

        Args:
            prompt: dict of the processor's outputs for one prompt, up to where the first response begins (for the
                format "yojo", generation prompt included): `input_ids` [1, P] int64, its token types if it has any,
                vision tensors.
            responses: N lists of token ids, without the separator. For the format "mr2rm" the line breaks around
                separators are among them, and the template's end belongs to the last one.
            rankings: N numbers, or None.
            name: how errors name the example.
            leads: N ints, how many ids at the beginning of each response are the chat template's; none by default.

        Returns:
            `Encoded`.
        """
        closed = [[*ids, self.separator_id] for ids in responses]
        if self.config.format == "mr2rm":
            closed[-1] = closed[-1][:-1]
        return self._encoded(prompt, closed, rankings, name, leads)

    def _encoded(self, prompt, responses, rankings, name, leads=None):
        prompt_ids = prompt["input_ids"][0]
        if self.window is not None and len(prompt_ids) > self.window:
            raise ValueError(
                f"{name}: the prompt has {len(prompt_ids)} tokens, the model's sliding window {self.window}: "
                f"{self.family.name} lets a prompt see itself beyond its window, which is not supported"
            )
        if self.family.one_kind and all(kind in prompt for kind in PIXELS.values()):
            raise ValueError(
                f"{name}: the prompt has images and videos, and {self.family.name} takes either in one pass: leave the "
                "images or the videos out"
            )
        try:
            features.check(prompt, self.family, self.model_config)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        positions, next_position = self.positions(prompt)
        encoded = Encoded(
            name=name,
            prompt_ids=prompt_ids,
            positions=positions,
            next_position=next_position,
            blocks=None if self.family.blocks is None else self.family.blocks.ids(prompt),
            token_types={key: prompt[key][0] for key in TOKEN_TYPES if key in prompt},
            vision={
                key: value for key, value in prompt.items() if key not in NOT_FOR_THE_MODEL and key not in TOKEN_TYPES
            },
            responses=responses,
            leads=[0] * len(responses) if leads is None else list(leads),
            rankings=rankings,
            open_end=self.config.format == "mr2rm",
        )
        tokens = encoded.num_tokens(self.config)
        if self.max_length is not None and tokens > self.max_length:
            raise ValueError(
                f"{name} takes {tokens} tokens, {tokens - self.max_length} more than max_length={self.max_length} "
                f"(prompt {len(prompt_ids)}, responses {', '.join(str(len(ids)) for ids in responses)}); "
                "nothing is cut: shorten it, leave it out or raise max_length"
            )
        if self.rope is not None:
            lengths = [len(ids) for ids in responses]
            branch = max(lengths) if self.config.mode == "isolated" else sum(lengths)
            longest = max(int(positions.max()) + 1, next_position + branch)
            self.rope.check(longest, name, "the prompt with its longest branch of responses")
        return encoded

    def pack(self, encoded, pad_to_multiple_of=None, share=True):
        """Lay encoded examples end to end in one row; returns the batch that `__call__` describes.

        Args:
            encoded: list of `Encoded`.
            pad_to_multiple_of: instead of the collator's own.
            share: put a picture that stands in the row several times among its vision tensors once, where features are
                placed by rows (see `yojo.patching.sharing`); `yojo.patching.media.whole` makes of the batch what a model
                without YOJO takes.

        Raises:
            ValueError: no examples. `yojo.patching.joining.CannotJoin`, which is one: vision tensors that cannot stand in one
                row, or rankings that some have and others lack; see `pack_in_parts`.
        """
        if not encoded:
            raise ValueError("no examples: a batch needs at least one")
        ids, positions, blocks, branch_lengths, spans, starts = [], [], [], [], [], []
        row = 0
        for item in encoded:
            starts.append(row)
            ids.append(item.prompt_ids)
            positions.append(item.positions)
            blocks.append(torch.full_like(item.prompt_ids, -1) if item.blocks is None else item.blocks)
            row += len(item.prompt_ids)
            branches = item.branches or _branches(len(item.responses), self.config)
            sample = [[] for _ in item.responses]
            for branch in branches:
                branch_ids = [token for n in branch for token in item.responses[n]]
                ids.append(torch.tensor(branch_ids))
                positions.append(
                    (item.next_position + torch.arange(len(branch_ids))).expand(item.positions.shape[0], -1)
                )
                blocks.append(torch.full((len(branch_ids),), -1))
                for n in branch:
                    closed = not (item.open_end and n == len(item.responses) - 1)
                    sample[n].append((row + item.leads[n], row + len(item.responses[n]) - closed))
                    row += len(item.responses[n])
            branch_lengths.append([sum(len(item.responses[n]) for n in branch) for branch in branches])
            spans.append(sample)
        prompt_lengths = [len(item.prompt_ids) for item in encoded]
        filling = -row % (pad_to_multiple_of or self.pad_to_multiple_of or 1)
        if filling:
            ids.append(torch.full((filling,), self.separator_id))
            counted = torch.arange(filling)  # nobody reads them, but a rope may look for the longest position
            if self.rope is not None:
                counted = counted.clamp(max=self.rope.limit - 1)
            positions.append(counted.expand(positions[0].shape[0], -1))
            blocks.append(torch.full((filling,), -1))
            prompt_lengths.append(filling)
            branch_lengths.append([])
        position_ids = torch.cat(positions, dim=1)
        prompts, pictures, shared = [item.prompt_ids for item in encoded], [item.vision for item in encoded], None
        if share and self.places_features:
            pictures, shared = sharing.share(pictures, prompts, self.family, self.model_config)
        pixels = join_vision(pictures, self.family)
        batch = {
            "input_ids": torch.cat(ids)[None],
            "position_ids": position_ids if position_ids.shape[0] == 1 else position_ids[:, None],
            "layout": Layout.build(prompt_lengths, branch_lengths, bidirectional=torch.cat(blocks)),
            "separators": Separators.build(spans, self.config.pooling),
            **pixels,
        }
        if self.places_features and pixels:
            batch["placeholders"] = media.placeholders(prompts, starts, pixels, self.family, self.model_config, shared)
        if self.family.passes_token_types:
            batch.update(self._token_types(encoded, branch_lengths, filling))
        ranked = [item.rankings is not None for item in encoded]
        if any(ranked):
            if not all(ranked):
                raise CannotJoin(
                    f"{encoded[ranked.index(False)].name} has no rankings while others of the batch have: rank all "
                    "or none"
                )
            batch["rankings"] = _ranking_table([item.rankings for item in encoded], self.config.loss)
        self.tables.make(batch["layout"], gradients="rankings" in batch)
        return batch

    def _token_types(self, encoded, branch_lengths, filling):
        names = dict.fromkeys(name for item in encoded for name in item.token_types)
        types = {}
        for name in names:
            pieces = []
            for item, lengths in zip(encoded, branch_lengths, strict=False):
                prompt = item.token_types.get(name, torch.zeros_like(item.prompt_ids))
                pieces += [prompt, prompt.new_zeros(sum(lengths))]
            pieces.append(pieces[0].new_zeros(filling))
            types[name] = torch.cat(pieces)[None]
        return types


def pack_in_parts(pack, items):
    """Pack items in one row, or in several where they cannot stand in one: training and scoring split rows alike.

    Args:
        pack: function of a list of items -> batch, that raises `yojo.patching.joining.CannotJoin` where they do not fit together.
        items: list, not empty.

    Returns:
        list of (some of the items, in order; their batch).
    """
    try:
        return [(items, pack(items))]
    except CannotJoin:
        if len(items) == 1:
            raise
    half = -(-len(items) // 2)
    return pack_in_parts(pack, items[:half]) + pack_in_parts(pack, items[half:])


def orders(count, config):
    """The orders in which a comparative row lays out `count` responses: min(permutations, count!) distinct ones.

    Cyclic shifts come first, evenly spread, so that with permutations = count every response stands once in every
    place; further ones are the shifts of seeded shuffles, so that each full round is balanced again.

    Returns:
        list of tuples of 0..count-1; the first is the given order.
    """
    wanted, found = config.permutations, []
    generator = random.Random(count)
    base = tuple(range(count))
    possible = 1
    for n in range(2, count + 1):
        possible = min(possible * n, wanted)
    while len(found) < min(wanted, possible):
        left = min(wanted, possible) - len(found)
        shifts = range(count) if left >= count else [j * count // left for j in range(left)]
        for shift in shifts:
            order = base[shift:] + base[:shift]
            if order not in found:
                found.append(order)
        base = tuple(generator.sample(range(count), count))
    return found[:wanted]


def _branches(count, config):
    if config.mode == "isolated":
        return [(n,) for n in range(count)]
    return orders(count, config)


def _check_ranks(rankings, loss, name):
    if loss == "soft":
        if abs(sum(rankings) - 1) > 1e-3:
            raise ValueError(f"{name}: the loss 'soft' needs targets that sum to 1, got {rankings}")
    elif any(rank != int(rank) or rank < 1 for rank in rankings):
        raise ValueError(f"{name}: rankings must be whole numbers from 1 (best), got {rankings}")


def _ranking_table(rankings, loss):
    width = max(map(len, rankings))
    dtype = torch.float32 if loss == "soft" else torch.int64
    return torch.tensor([[*ranks, *[-1] * (width - len(ranks))] for ranks in rankings], dtype=dtype)


def _shortest_window(base):
    config = base.config.get_text_config()
    slides = "sliding_attention" in (getattr(config, "layer_types", None) or [])
    return config.sliding_window if slides else None

"""Ways to score N responses to one prompt with one backbone in memory: what people do today, and YOJO.

Each way is a function `make(scene, point, fuse) -> call`, where `call()` gives the scores [N] in the order of the
responses. What a collator or processor makes beforehand (ids, positions, pixels, FlexAttention's block mask) is made by
`make` and not timed, for every way alike. All ways read the same head at the same separators.
"""

import contextlib
import copy
import dataclasses
import functools
import traceback
import types

import pytest
import torch

import yojo
from bench import models
from bench.sweeps import Point
from bench.timing import give_back, is_out_of_memory
from yojo.costs.flops import batch_flops
from yojo.costs.profiling import IdsOnly
from yojo.families import TOKEN_TYPES
from yojo.inputs.packing import orders
from yojo.patching import media
from yojo.patching.decoders import attention_modules
from yojo.patching.fuse import liger_forward, liger_on
from yojo.patching.joining import join_vision
from yojo.patching.state import unwrap
from yojo_kernels import AttentionCall, choose_attention

PERMUTATIONS = 4  # of the permuted way, or N! where that is fewer


MODES = {
    "comparative": {"mode": "comparative"},
    "permuted": {"mode": "comparative", "permutations": PERMUTATIONS},
    "isolated": {"mode": "isolated"},
}


class Twin:
    """A shape's model on the meta device, patched: it makes batches and is counted, and holds no weights.

    Attributes:
        shape: `models.Shape`.
        model: the model, wrapped by PEFT where it is to be trained.
        base: the same without the wrapper.
        collators: dict mode of `MODES` -> `yojo.Collator`.
    """

    def __init__(self, shape, wrap=lambda model: model):
        self.shape = shape
        self.model = wrap(models.build(shape, "meta"))
        self.base = unwrap(self.model)
        self.collators, self.counted = {}, {}
        for mode, options in MODES.items():
            yojo.unpatch(self.model)
            yojo.patch(self.model, **options)
            rows = self.base.get_input_embeddings().weight.shape[0]
            self.collators[mode] = yojo.Collator(IdsOnly(self.base.yojo.config, rows), self.model)

    def encoded(self, point, device="meta", dtype=torch.float32, seed=0, rankings=None):
        """Prompt and responses of a point with positions, as a collator packs them; words and pixels by the seed."""
        prompt = models.prompt_of(self.shape, self.base.config, point.kind, point.prompt, device, dtype, seed=seed)
        responses = models.response_ids(point.count, point.each - 1, seed=seed)
        return self.collators["isolated"].from_processed(prompt, responses, rankings=rankings)

    @contextlib.contextmanager
    def whole_last_layer(self):
        """While open, the last layer is counted for every token, as stock passes compute it."""
        state = self.base.yojo
        state.whole_last_layer, before = "as stock passes do", state.whole_last_layer
        try:
            yield
        finally:
            state.whole_last_layer = before

    def logits(self, tokens):
        """FLOPs of the vocabulary's logits of so many tokens."""
        text = self.base.config.get_text_config()
        return 2 * tokens * text.hidden_size * text.vocab_size

    def flops_of(self, variant, fuse, point):
        """FLOPs of one call of a way; single passes with YOJO's fused layers are its own passes."""
        found = self.flops(point)
        return found.get(f"{variant}, fused", found[variant]) if fuse != "none" else found[variant]

    def batches(self, encoded):
        """dict mode of `MODES` -> a batch of one encoded sample, as a model in that mode takes it."""
        return {mode: collator.pack([encoded]) for mode, collator in self.collators.items()}

    def flops_of_passes(self, batches):
        """dict "single", "yojo_" and each mode -> FLOPs over the `batches` of one sample."""
        found = {f"yojo_{mode}": batch_flops(self.model, batch).total for mode, batch in batches.items()}
        return found | {"single": batch_flops(self.model, batches["isolated"], single=True).total}

    def flops(self, point):
        """variant -> FLOPs of one call, counted beforehand by `yojo.costs.flops`: what the mask makes visible, no more."""
        if point not in self.counted:
            encoded = self.encoded(point)
            batches = self.batches(encoded)
            found = self.flops_of_passes(batches)
            found["single_batch"] = found["single"]
            # With YOJO's fused layers: their last layer for the rows that are read, as in all of its passes.
            alone = self.collators["isolated"].pack([alone_with(encoded, [0])])  # all responses of a point are as long
            alone = point.count * batch_flops(self.model, alone).total
            found["single, fused"] = found["single_batch, fused"] = alone
            with self.whole_last_layer():
                found["prefix_cache"] = found["flex"] = batch_flops(self.model, batches["isolated"]).total
                found["released"] = batch_flops(self.model, batches["comparative"]).total
            found["released"] += self.logits(point.prompt + point.count * point.each)
            self.counted[point] = found
        return self.counted[point]


class Scene:
    """One backbone of a shape in memory, stock or patched, whichever is asked for, with one value head for all.

    Attributes:
        name: of the shape.
        twin: `Twin`, which makes batches while the model keeps its state: that may have taken long to compile.
        model: the model, wrapped by PEFT where it is trained.
        base: the same without the wrapper.
        head: the value head, with weights that give scores of order 1.
        dtype: of the model's weights; pixels: what the pixels are rounded to.
    """

    def __init__(self, name, device, wrap=lambda model: model):
        self.name, self.device = name, device
        shape = models.SHAPES[device.type][name]
        self.twin = Twin(shape, wrap)
        self.model = wrap(models.build(shape, device))
        self.base = unwrap(self.model)
        self.dtype = self.pixels = self.base.dtype
        yojo.patch(self.model, fuse="none")
        self.state, self.head, self.fused = None, self.base.score, []
        yojo.unpatch(self.model)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight, gain in ((self.head.weight1, 1.0), (self.head.weight2, self.head.scale)):
                weight.copy_(torch.randn(weight.shape, generator=generator) * gain / weight.shape[1] ** 0.5)

    def stock(self, attention="sdpa"):
        """The backbone (no vocabulary logits) of the unpatched model."""
        yojo.unpatch(self.model)
        self.state = None
        for module in self.fused:
            del module.forward
        self.fused = []
        # Not through `set_attn_implementation`: transformers refuses FlexAttention to families that can run it.
        for module in attention_modules(self.base):
            module.config._attn_implementation = attention
        return self.base.base_model

    def stock_call(self, call, fuse):
        """A call of the stock model, with `fuse` its norms, rotary embeddings and MLPs through Liger-Kernel as YOJO's."""
        if fuse == "none":
            return call
        for module in self.base.get_decoder().modules():
            function = liger_forward(module)
            if function is not None:
                module.forward = types.MethodType(function, module)
                self.fused.append(module)

        def fused_call():
            with liger_on(self.device):
                return call()

        return fused_call

    def how(self, variant, fuse):
        """What a way's layers are fused by for `fuse`: "none", "liger" or "compile"; None where they cannot be."""
        if fuse == "none":
            return "none"
        self.patched("isolated" if self.state is None else self.state[0], fuse)
        chosen = self.base.yojo.fusion.choose(self.device)[0]
        return None if variant in STOCK_ALONE and chosen != "liger" else chosen

    def patched(self, mode, fuse):
        """The model patched for a mode of `MODES`."""
        if self.state != (mode, fuse):
            self.stock()
            yojo.patch(self.model, fuse=fuse, **MODES[mode])
            self.base.score = self.head
            self.state = (mode, fuse)
        return self.model

    def fields(self):
        """Its fields of a result line."""
        text = self.base.config.get_text_config()
        return {
            "model": self.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "head_dim": models.head_dim(text),
            "heads": text.num_attention_heads,
            "kv_heads": text.num_key_value_heads,
        }

    def encoded(self, point, seed=0, rankings=None):
        """As the twin's, with pixels on the device."""
        return self.twin.encoded(point, self.device, self.pixels, seed, rankings)

    def packed(self, mode, encoded, share=True):
        """A batch for the patched model from a list of encoded examples, on the device; `share` as for `Collator.pack`."""
        return self.to_device(self.twin.collators[mode].pack(encoded, share=share))

    def to_device(self, inputs):
        """Inputs where the model lies, pixels in its precision."""
        inputs = {name: value.to(self.device) for name, value in inputs.items()}
        return {
            name: value.to(self.dtype) if name.startswith("pixel_values") else value for name, value in inputs.items()
        }

    def raised(self):
        """A copy whose stock model computes the same in a higher precision: float64, or float32 for 16-bit weights."""
        self.stock()
        higher = copy.copy(self)
        higher.dtype = torch.float64 if self.dtype == torch.float32 else torch.float32
        higher.fused = []
        higher.model = higher.base = copy.deepcopy(self.base).to(higher.dtype)
        higher.head = copy.deepcopy(self.head).to(higher.dtype if self.dtype == torch.float32 else torch.float32)
        return higher


def sequence(encoded, tail):
    """Ordinary inputs [1, T] of a prompt and the ids behind it, positions given."""
    ids, positions = torch.tensor(tail, dtype=torch.int64), encoded.positions
    following = (encoded.next_position + torch.arange(len(tail))).expand(positions.shape[0], -1)
    inputs = {
        "input_ids": torch.cat([encoded.prompt_ids, ids])[None],
        "position_ids": torch.cat([positions, following], dim=1),
        **{name: torch.cat([types, torch.zeros_like(ids)])[None] for name, types in encoded.token_types.items()},
        **encoded.vision,
    }
    if positions.shape[0] > 1:
        inputs["position_ids"] = inputs["position_ids"][:, None]
    return inputs | {"attention_mask": torch.ones_like(inputs["input_ids"])}


def repeated(inputs, count, family):
    """The same sequence `count` times as one batch; vision tensors once per sequence."""
    vision = {name: inputs[name] for name in inputs if name not in _BY_TOKEN}
    rows = {}
    for name in _BY_TOKEN & set(inputs):
        dim = inputs[name].ndim - 2  # positions of M-RoPE are [3, B, T]
        rows[name] = inputs[name].repeat_interleave(count, dim)
    return rows | join_vision([vision] * count, family)


_BY_TOKEN = {"input_ids", "position_ids", "attention_mask", *TOKEN_TYPES}


def joined(encoded, order):
    """(ids of the responses in an order, one after the other; rows of their separators behind the prompt)."""
    tail = [token for n in order for token in encoded.responses[n]]
    ends = torch.tensor([len(encoded.responses[n]) for n in order]).cumsum(0) - 1
    return tail, ends + len(encoded.prompt_ids)


# ---- the ways ----


def single(scene, point, fuse):
    """N single-response passes one by one: of the stock model, or through YOJO's fused layers."""
    encoded = scene.encoded(point)
    if fuse != "none":
        model = scene.patched("isolated", fuse)
        batches = [scene.packed("isolated", [alone_with(encoded, [n])]) for n in range(point.count)]
        return lambda: torch.cat([model(**batch).scores[0] for batch in batches])
    backbone = scene.stock()
    passes = [scene.to_device(sequence(encoded, ids)) for ids in encoded.responses]
    last = torch.tensor([point.prompt + point.each - 1], device=scene.device)

    def call():
        return torch.cat([scene.head(backbone(**inputs, use_cache=False)[0][0], last) for inputs in passes])

    return call


def single_batch(scene, point, fuse):
    """The N single-response passes as one batch, or, with YOJO's fused layers, as one packed row of N samples."""
    encoded = scene.encoded(point)
    if fuse != "none":
        model = scene.patched("isolated", fuse)
        batch = scene.packed("isolated", [alone_with(encoded, [n]) for n in range(point.count)], share=False)
        return lambda: model(**batch).scores[:, 0]
    backbone = scene.stock()
    batch = repeated(sequence(encoded, encoded.responses[0]), point.count, scene.twin.collators["isolated"].family)
    batch["input_ids"] = torch.cat([sequence(encoded, ids)["input_ids"] for ids in encoded.responses])
    batch = scene.to_device(batch)
    length = point.prompt + point.each
    last = torch.arange(point.count, device=scene.device) * length + length - 1
    return lambda: scene.head(backbone(**batch, use_cache=False)[0].flatten(0, 1), last)


def released(scene, point, fuse):
    """What the paper's released code computes: a causal pass over all responses, every logit, every layer's states."""
    encoded = scene.encoded(point)
    scene.stock()
    tail, rows = joined(encoded, range(point.count))
    inputs, rows = scene.to_device(sequence(encoded, tail)), rows.to(scene.device)

    def call():
        output = scene.base(**inputs, output_hidden_states=True, use_cache=False)
        assert output.logits.shape[1] == point.prompt + len(tail)
        return scene.head(output.hidden_states[-1][0], rows)

    return scene.stock_call(call, fuse)


def prefix_cache(scene, point, fuse):
    """The prompt prefilled once, its keys and values expanded, the N responses as a batch behind them."""
    return scene.stock_call(behind_a_cache(scene, scene.encoded(point)), fuse)


def behind_a_cache(scene, encoded):
    """The call of `prefix_cache` for an encoded example whose responses have one length."""
    backbone = scene.stock()
    count, length, each = len(encoded.responses), len(encoded.prompt_ids), len(encoded.responses[0])
    whole = repeated(sequence(encoded, encoded.responses[0]), count, scene.twin.collators["isolated"].family)
    prompt = scene.to_device(sequence(encoded, []))
    behind = {
        "input_ids": torch.tensor(encoded.responses),
        "position_ids": whole["position_ids"][..., length:],
        "attention_mask": whole["attention_mask"],
    }
    behind = scene.to_device(behind)
    last = torch.arange(1, count + 1, device=scene.device) * each - 1

    def call():
        cache = backbone(**prompt, use_cache=True).past_key_values
        cache.batch_repeat_interleave(count)
        hidden = backbone(**behind, past_key_values=cache, use_cache=True)[0]
        return scene.head(hidden.flatten(0, 1), last)

    return call


def flex(scene, point, fuse):
    """Isolated through FlexAttention, as transformers has it: the stock model, one row, a block mask."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch = scene.packed("isolated", [scene.encoded(point)])
    layout, rows = batch.pop("layout"), batch.pop("separators").read
    batch = media.whole(batch, scene.twin.collators["isolated"].family)
    backbone = scene.stock("flex_attention")
    sample, branch, block = layout.sample, layout.branch, layout.block

    def visible(q, k):
        seen = (q >= k) & (sample[q] == sample[k]) & ((branch[k] < 0) | (branch[q] == branch[k]))
        return seen if block is None else seen | ((block[q] >= 0) & (block[q] == block[k]))

    size = layout.num_tokens
    mask = create_block_mask(lambda b, h, q, k: visible(q, k), None, None, size, size, device=str(scene.device))

    def call():
        # Without its limits torch.compile falls back to plain PyTorch after some lengths, unseen.
        with torch._dynamo.config.patch(recompile_limit=10_000, accumulated_recompile_limit=10_000):
            return scene.head(backbone(**batch, attention_mask=mask, use_cache=False)[0][0], rows)

    return scene.stock_call(call, fuse)


def ours(mode, scene, point, fuse):
    """YOJO: one packed row, one pass."""
    batch = scene.packed(mode, [scene.encoded(point)])
    model = scene.patched(mode, fuse)
    return lambda: model(**batch).scores[0]


WAYS = {
    "single": single,
    "single_batch": single_batch,
    "released": released,
    "prefix_cache": prefix_cache,
    "flex": flex,
    "yojo_comparative": functools.partial(ours, "comparative"),
    "yojo_isolated": functools.partial(ours, "isolated"),
    "yojo_permuted": functools.partial(ours, "permuted"),
}
# In the order in which they run fused: those of one mode behind each other, as they share what is compiled.
FUSED = (
    "single",
    "single_batch",
    "yojo_isolated",
    "yojo_comparative",
    "yojo_permuted",
    "released",
    "prefix_cache",
    "flex",
)
# Ways that only the stock model can go. Its parts are fused by Liger-Kernel, or not at all.
STOCK_ALONE = ("released", "prefix_cache", "flex")


def mode_of(variant):
    """The mode whose scores a way gives: a key of `MODES`."""
    if variant.startswith("yojo_"):
        return variant.removeprefix("yojo_")
    return "comparative" if variant == "released" else "isolated"


def impl_of(scene, variant, fuse):
    """What computes a way's attention, for its result line."""
    if variant == "flex":
        return "flex"
    if not variant.startswith("yojo_") and (fuse == "none" or variant in STOCK_ALONE):
        return "sdpa"
    call = AttentionCall(
        scene.device,
        scene.dtype,
        scene.fields()["head_dim"],
        causal=variant == "yojo_comparative" and scene.twin.collators["comparative"].family.blocks is None,
    )
    return choose_attention(call)[0]


def alone_with(encoded, chosen):
    """The same prompt with some of its responses."""
    return dataclasses.replace(encoded, responses=[encoded.responses[n] for n in chosen], rankings=None)


# ---- what the scores must be ----


AT_A_TIME = 8  # responses that the truth takes behind one cache


@torch.inference_mode()
def stock_scores(scene, mode, point, cached=False):
    """Scores of the stock model [N]: single passes, or a causal pass over all responses, over every order if permuted.

    `cached`: isolated scores from prefix caches of a few responses each, which is quicker.
    """
    encoded, scores = scene.encoded(point), []
    if mode == "isolated":
        if not cached:
            return single(scene, point, "none")()
        for chosen in torch.arange(point.count).split(AT_A_TIME):
            scores.append(behind_a_cache(scene, alone_with(encoded, chosen.tolist()))())
        return torch.cat(scores)
    backbone = scene.stock()
    for order in orders(point.count, scene.twin.collators[mode].config):
        tail, rows = joined(encoded, order)
        hidden = backbone(**scene.to_device(sequence(encoded, tail)), use_cache=False)[0][0]
        found = scene.head(hidden, rows.to(scene.device))
        scores.append(torch.empty_like(found).index_copy(0, torch.tensor(order, device=scene.device), found))
    return torch.stack(scores).mean(0)


# Where the stock model's own error is measured, and every way is tried first: many responses, long beside their prompt,
# so that scores of a random model differ far more than they err. Behind a long prompt they hardly differ in 16 bits.
CALIBRATION = {
    "cuda": (Point("text", 64, 16, 32), Point("image", 512, 16, 128), Point("video", 512, 16, 128)),
    "cpu": (Point("text", 16, 16, 8), Point("image", 32, 16, 8), Point("video", 80, 16, 16)),
}


class Truth:
    """What the scores of a scene must be, and how far the stock model in its own precision is from it.

    Both come from the stock model in a higher precision: float64, or float32 for 16-bit weights (products of 16 bits
    more are tensor cores' TF32, ten times as exact as bfloat16). Isolated scores are taken from prefix caches there, once
    these have given what N passes give. Ids, positions and head are the collator's and YOJO's, for every way alike: that
    they are right is for the tests to say.

    Args:
        scene: `Scene`.
        wanted: (mode, point) pairs that will be asked for; the model in high precision is gone afterwards.

    Attributes:
        scores: (mode, point) -> [N] float64, or None where that did not fit into memory.
        noise: mode -> root mean square of the stock model's own error.
    """

    def __init__(self, scene, wanted):
        points = CALIBRATION[scene.device.type]
        modes = sorted({mode for mode, _ in wanted})
        own = {(mode, point): stock_scores(scene, mode, point).double() for mode in modes for point in points}
        higher = scene.raised()
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            self.scores = {key: stock_scores(higher, *key).double() for key in own}
            self.noise = {mode: _rms(own[mode, p] - self.scores[mode, p] for p in points) for mode in modes}
            for mode, noise in self.noise.items():
                assert noise < LARGEST_NOISE[scene.dtype], f"{mode}: the stock model's own error is {noise:.1e}"
            if "isolated" in modes:
                pairs = [(stock_scores(higher, "isolated", p, cached=True), self.scores["isolated", p]) for p in points]
                error = _rms(got - exact for got, exact in pairs)
                assert error < self.noise["isolated"] / 2, f"a prefix cache errs by {error:.1e} against N passes"
            for key in dict.fromkeys(wanted):
                if key not in self.scores:
                    self.scores[key] = self._unless_out_of_memory(higher, *key)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    @staticmethod
    def _unless_out_of_memory(higher, mode, point):
        try:
            return stock_scores(higher, mode, point, cached=True).double()
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            traceback.clear_frames(error.__traceback__)
        give_back(higher.device)

    def check(self, mode, point, scores):
        """Fail unless the scores are as near to the truth as the stock model's are; the error (root mean square).

        The bound on it is twice the stock model's, and more where N is so small that it says little.
        """
        if self.scores[mode, point] is None:
            pytest.skip(
                "the same in a higher precision, which its scores are checked against, does not fit into memory"
            )
        truth, noise = self.scores[mode, point], self.noise[mode]
        error = (scores.double() - truth).square().mean().sqrt().item()
        bound = noise * (2 + 4 / point.count**0.5)
        assert error <= bound, f"{mode} {point}: error {error:.1e} of the scores, bound {bound:.1e}"
        return error

    def try_out(self, make, scene, mode, fuse):
        """Check a way at the points of `CALIBRATION`, where it would show if it mistook one response for another."""
        for point in CALIBRATION[scene.device.type]:
            self.check(mode, point, make(scene, point, fuse)())
            bound = 3 * self.noise[mode]
            spread = self.scores[mode, point].std().item()
            assert spread > 1.4 * bound, f"{mode} {point}: scores differ by {spread:.1e}, too little to tell them apart"


# Scores are of order 1. A larger error of the stock model is none of rounding.
LARGEST_NOISE = {torch.float32: 1e-4, torch.bfloat16: 0.15, torch.float16: 0.05}


def _rms(errors):
    return torch.cat(list(errors)).square().mean().sqrt().item()

"""What multi-response attention is measured against: every other way to compute the same thing, and the exact result.

Each way is a function `make(case) -> call`, where `call(query, key, value)` gives the output [T, Hq, D] of the case's
row; whatever depends on the layout alone (masks, indices) is made by `make` and not timed.
"""

import dataclasses
import functools
import random

import torch
import torch.nn.functional as F

from yojo_kernels import Layout, attention, causal, multi_response_attention, tuning
from yojo_kernels.layout import visible_to


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one row: S prompts, each with its responses; query heads, key heads, head dim."""

    prompts: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    head_dim: int = 128
    heads: int = 32
    kv_heads: int = 8

    def __str__(self):
        counts = [len(lengths) for lengths in self.responses]
        if len(self.prompts) == 1:
            row = f"{self.prompts[0]}" + (f"+{counts[0]}x{self.responses[0][0]}" if counts[0] else "")
        else:
            row = f"{len(self.prompts)} samples, {self.num_tokens} tokens"
        return f"{row}, {self.heads}:{self.kv_heads} heads of {self.head_dim}"

    @property
    def num_tokens(self):
        """T."""
        return sum(self.prompts) + sum(map(sum, self.responses))

    def fields(self):
        """Its fields of a result line."""
        lengths = [n for responses in self.responses for n in responses]
        return {
            "responses": len(lengths),
            "prompt_tokens": sum(self.prompts),
            "response_tokens": sum(lengths) / len(lengths),
            "head_dim": self.head_dim,
            "heads": self.heads,
            "kv_heads": self.kv_heads,
        }


def one(prompt, count, length, **options):
    """A row of one sample: a prompt and `count` responses of `length` tokens."""
    return Shape((prompt,), ((length,) * count,), **options)


def mix(tokens, seed=0, shortest=64, longest=1024, most=8, **options):
    """A packed row of about `tokens` tokens: samples of mixed lengths, up to `most` responses each."""
    rng = random.Random(seed)
    prompts, responses = [], []
    while not prompts or Shape(tuple(prompts), tuple(responses)).num_tokens < tokens:
        prompts.append(rng.randint(2 * shortest, 4 * longest))
        responses.append(tuple(rng.randint(shortest, longest) for _ in range(rng.randint(1, most))))
    return Shape(tuple(prompts), tuple(responses), **options)


# what is measured, by device
SHAPES = {
    "cuda": [
        one(512, 4, 64),
        one(2048, 4, 128),
        one(2048, 16, 128),
        one(8192, 1, 1024),
        one(8192, 8, 256),
        one(8192, 64, 64),
        one(32768, 4, 512),
        one(32768, 64, 1024),
        mix(16384),
        mix(65536),
        *(one(8192, 8, 256, head_dim=dim) for dim in (64, 256)),
        *(mix(16384, head_dim=dim) for dim in (64, 256)),
    ],
    "cpu": [
        one(40, 3, 9, head_dim=16, heads=4, kv_heads=2),
        mix(150, shortest=5, longest=20, most=4, head_dim=16, heads=4, kv_heads=2),
    ],
}


class Case:
    """The tensors of a shape on a device: query, key, value and the gradient of the output, and its layouts."""

    def __init__(self, shape, dtype, device):
        self.shape, self.device = shape, device
        self.generator = torch.Generator(device).manual_seed(0)
        self.query, self.key, self.value, self.grad = (
            torch.randn(
                shape.num_tokens, heads, shape.head_dim, generator=self.generator, dtype=torch.float32, device=device
            ).to(dtype)
            for heads in (shape.heads, shape.kv_heads, shape.kv_heads, shape.heads)
        )
        for tensor in (self.query, self.key, self.value):
            tensor.requires_grad_()
        self._truths = {}

    @functools.cached_property
    def isolated(self):
        """Every response a branch of its own."""
        return Layout.build(self.shape.prompts, self.shape.responses, device=self.device)

    @functools.cached_property
    def comparative(self):
        """One branch per sample, holding all its responses."""
        return Layout.build(self.shape.prompts, [[sum(n)] for n in self.shape.responses], device=self.device)

    @functools.cached_property
    def dense(self):
        """One causal sequence of T tokens."""
        return Layout.build([self.shape.num_tokens], [[]], device=self.device)

    def flops(self, layout_name, direction):
        """Operations on visible pairs: two products forward, five backward."""
        layout = getattr(self, layout_name)
        pairs = attention.visible_pairs(layout.sample, layout.branch, layout.position, None, 0)
        return float({"forward": 4, "backward": 10}[direction] * self.shape.heads * self.shape.head_dim * pairs)

    def truth(self, layout_name):
        """Output and gradients of the first key head and its query heads, in float64: (out, dq, dk, dv)."""
        if layout_name not in self._truths:
            self._truths[layout_name] = self._truth(layout_name)
        return self._truths[layout_name]

    def _truth(self, layout_name):
        group = self.shape.heads // self.shape.kv_heads
        q, dout = (tensor.detach()[:, :group].double() for tensor in (self.query, self.grad))
        k, v = (tensor.detach()[:, 0].double() for tensor in (self.key, self.value))
        layout, scale = getattr(self, layout_name), self.shape.head_dim**-0.5
        out, dq, dk, dv = (torch.zeros_like(tensor) for tensor in (q, q, k, v))
        chunk = max(1, 2**26 // (group * len(q)))
        for rows in torch.arange(len(q), device=q.device).split(chunk):
            visible = visible_to(rows, layout.sample, layout.branch, layout.position, None, None)[:, None]
            p = (torch.einsum("qhd,kd->qhk", q[rows], k) * scale).masked_fill(~visible, float("-inf")).softmax(-1)
            out[rows] = p @ v
            delta = (out[rows] * dout[rows]).sum(-1, keepdim=True)
            ds = p * (torch.einsum("qhd,kd->qhk", dout[rows], v) - delta) * scale
            dq[rows] = ds @ k
            dk += torch.einsum("qhk,qhd->kd", ds, q[rows])
            dv += torch.einsum("qhk,qhd->kd", p, dout[rows])
        return out, dq, dk[:, None], dv[:, None]

    def check(self, layout_name, results, names):
        """Fail unless results agree with the truth in every prompt and every response.

        The bound is on the relative error (Frobenius) within a segment: 16-bit inputs and weights leave between 1e-3
        and 1e-2, a wrong mask leaves errors of order 1.
        """
        truth = dict(zip(("output", "grad query", "grad key", "grad value"), self.truth(layout_name), strict=True))
        bound = 2e-2 if self.query.dtype != torch.float32 else 1e-4
        offsets = self.isolated.segment_offsets.to(torch.int64)
        segment = torch.arange(len(offsets) - 1, device=self.device).repeat_interleave(offsets.diff())
        for name, got in zip(names, results, strict=True):
            exact = truth[name]
            sizes = []
            for tensor in (got[:, : exact.shape[1]].detach().double() - exact, exact):
                sizes.append(exact.new_zeros(len(offsets) - 1).index_add(0, segment, tensor.square().sum((1, 2))))
            worst = (sizes[0] / sizes[1].clamp(min=1e-30)).sqrt().max().item()
            assert worst <= bound, f"{name}: relative error {worst:.1e} in a prompt or response, bound {bound:.0e}"


# ---- ways to compute it ----


def yojo(case, layout_name, impl):
    """Our own."""
    layout = getattr(case, layout_name)
    return lambda q, k, v: multi_response_attention(q, k, v, layout, impl=impl)


def unpacked(case):
    """Our own forward with each tile holding one head: what packing the heads of a group gains."""
    call = yojo(case, "isolated", "triton")

    def alone(q, k, v):
        with tuning.forced(packed=1):
            return call(q, k, v)

    return alone


def dense_sdpa(case):
    """torch's SDPA over the whole row as one causal sequence: not the same function, the yardstick of the hardware."""
    return lambda q, k, v: causal.sdpa(q, k, v, case.dense, scale=case.shape.head_dim**-0.5)[0]


def gathered(case):
    """Prompt keys gathered once per response, then ordinary varlen attention; returns (call, name of the kernel).

    Sequences are every prompt, then every response with the keys of its prompt before its own: causal attention
    aligned at the bottom right. The keys are gathered in whole segments, so that the backward adds up segments.
    """
    flash = None
    if case.device.type == "cuda":
        flash = causal.flash_function(torch.cuda.get_device_capability(case.device))
        if flash is None and not causal.has_torch_varlen():
            import pytest  # tiles are tuned without it

            pytest.skip("neither flash-attn nor a varlen_attn that takes a scale (torch 2.11 and later) is installed")
    pieces, query_lengths, key_lengths = [], [], []  # pieces: numbers of the segments that are gathered
    for prompt, responses in zip(case.shape.prompts, case.shape.responses, strict=True):
        of_prompt = len(query_lengths)
        pieces.append(of_prompt)
        query_lengths.append(prompt)
        key_lengths.append(prompt)
        for length in responses:
            pieces += [of_prompt, len(query_lengths)]
            query_lengths.append(length)
            key_lengths.append(prompt + length)

    def gather(tensor):
        segments = tensor.split(query_lengths)
        return torch.cat([segments[i] for i in pieces])

    query_offsets, key_offsets = (
        F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32).to(case.device)
        for lengths in (query_lengths, key_lengths)
    )
    longest, scale = (max(query_lengths), max(key_lengths)), case.shape.head_dim**-0.5
    if case.device.type == "cuda":
        if flash is not None:
            function, name = flash
            options = {"max_seqlen_q": longest[0], "max_seqlen_k": longest[1], "softmax_scale": scale, "causal": True}
            offsets = {"cu_seqlens_q": query_offsets, "cu_seqlens_k": key_offsets}

            def call(q, k, v):
                output = function(q, gather(k), gather(v), **offsets, **options)
                return output[0] if isinstance(output, tuple) else output

            return call, {"FlashAttention-3": "flash_attn_3", "FlashAttention-2": "flash_attn_2"}[name]
        return (
            lambda q, k, v: causal.torch_varlen(
                q, gather(k), gather(v), query_offsets, key_offsets, *longest, scale=scale
            ),
            "torch_varlen",
        )

    def loop(q, k, v):
        outputs = []
        sequences = zip(q.split(query_lengths), gather(k).split(key_lengths), gather(v).split(key_lengths), strict=True)
        for sequence in sequences:
            size, length = len(sequence[0]), len(sequence[1])
            visible = torch.ones(size, length, dtype=torch.bool).tril(length - size)
            heads_first = (tensor.transpose(0, 1) for tensor in sequence)
            outputs.append(F.scaled_dot_product_attention(*heads_first, visible, scale=scale, enable_gqa=True))
        return torch.cat(outputs, dim=1).transpose(0, 1)

    return loop, "sdpa"


# ---- FlexAttention ----

# Options tried for the tuned variant, forward and backward apart. FlexAttention's own choice is among what is timed.
FORWARD_OPTIONS = [
    {"fwd_BLOCK_M": m, "fwd_BLOCK_N": n, "fwd_num_warps": warps, "fwd_num_stages": stages}
    for m, n, warps, stages in ((128, 64, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (64, 64, 4, 3), (128, 32, 8, 3))
]
BACKWARD_OPTIONS = [
    {
        "bwd_BLOCK_M1": m1,
        "bwd_BLOCK_N1": n1,
        "bwd_BLOCK_M2": n1,
        "bwd_BLOCK_N2": m1,
        "bwd_num_warps": warps,
        "bwd_num_stages": stages,
    }
    for m1, n1, warps, stages in ((64, 128, 8, 2), (32, 128, 4, 2), (64, 64, 4, 3), (32, 64, 4, 3), (64, 128, 8, 3))
]


@functools.cache
def _flex(device_type):
    from torch.nn.attention.flex_attention import flex_attention

    # On a CPU the uncompiled function does: it is there to know that the harness works.
    return _compiled(flex_attention, dynamic=False) if device_type == "cuda" else flex_attention


def _compiled(function, **options):
    """torch.compile without its limit: every shape, mask and set of options is compiled anew, none falls to eager."""
    torch._dynamo.config.recompile_limit = torch._dynamo.config.accumulated_recompile_limit = 10_000
    return torch.compile(function, **options)


def block_mask(visible, num_queries, num_keys, device):
    """FlexAttention's block mask of a function (query row, key row) -> bool."""
    from torch.nn.attention.flex_attention import create_block_mask

    make = _compiled(create_block_mask) if device.type == "cuda" else create_block_mask
    return make(lambda b, h, q, k: visible(q, k), None, None, num_queries, num_keys, device=str(device))


def isolated_mask(case):
    """The block mask of the isolated layout."""
    sample, branch = case.isolated.sample, case.isolated.branch
    size = case.shape.num_tokens
    return block_mask(
        lambda q, k: (q >= k) & (sample[q] == sample[k]) & ((branch[k] < 0) | (branch[q] == branch[k])),
        size,
        size,
        case.device,
    )


def _flex_call(case, mask, q, k, v, options=None, lse=False):
    from torch.nn.attention.flex_attention import AuxRequest

    q, k, v = (tensor.transpose(0, 1)[None] for tensor in (q, k, v))
    output, aux = _flex(case.device.type)(
        q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options, return_aux=AuxRequest(lse=lse)
    )
    output = output[0].transpose(0, 1)
    return (output, aux.lse[0].transpose(0, 1)) if lse else output


def flex(case, options=None):
    """FlexAttention with the isolated mask in one call."""
    mask = isolated_mask(case)
    return lambda q, k, v: _flex_call(case, mask, q, k, v, options)


def flex_split(case):
    """FlexAttention in three calls: prompts alone, responses on prompts, responses on themselves; the last two merged."""
    layout = case.isolated
    is_prompt = layout.branch < 0
    prompts, others = (part.nonzero()[:, 0] for part in (is_prompt, ~is_prompt))
    sample_p, sample_o = layout.sample[prompts], layout.sample[others]
    segment = layout.bounds[0][others]
    size_p, size_o = len(prompts), len(others)
    masks = (
        block_mask(lambda q, k: (q >= k) & (sample_p[q] == sample_p[k]), size_p, size_p, case.device),
        block_mask(lambda q, k: sample_o[q] == sample_p[k], size_o, size_p, case.device),
        block_mask(lambda q, k: (q >= k) & (segment[q] == segment[k]), size_o, size_o, case.device),
    )
    order = torch.cat([prompts, others]).argsort()

    def call(q, k, v):
        in_prompts, in_others = ([tensor[rows] for tensor in (q, k, v)] for rows in (prompts, others))
        first = _flex_call(case, masks[0], *in_prompts)
        on_prompt, lse_p = _flex_call(case, masks[1], in_others[0], *in_prompts[1:], lse=True)
        on_self, lse_s = _flex_call(case, masks[2], *in_others, lse=True)
        share = (lse_p - lse_s).sigmoid()[..., None].to(q.dtype)
        return torch.cat([first, on_prompt * share + on_self * (1 - share)])[order]

    return call


@functools.cache
def tuned_options(head_dim, dtype, device, shape):
    """The fastest of the options above at a shape (one per head dim), forward and backward apart: a dict."""
    from bench.timing import measure

    case = Case(shape, dtype, device)
    mask, inputs = isolated_mask(case), (case.query, case.key, case.value)
    best = {}
    for direction, candidates in (("forward", FORWARD_OPTIONS), ("backward", BACKWARD_OPTIONS)):
        times = []
        for options in [{}, *candidates]:
            try:
                output = _flex_call(case, mask, *inputs, options or None)
                call = functools.partial(_flex_call, case, mask, *inputs, options or None)
                if direction == "backward":
                    call = functools.partial(torch.autograd.grad, output, inputs, case.grad, retain_graph=True)
                times.append((sorted(measure(call, device, rounds=10))[5], len(times), options))
            except Exception as error:  # noqa: BLE001 - too much shared memory, or a shape its template refuses
                print(f"flex {direction} {options}: {type(error).__name__}")
        if not times:
            raise RuntimeError(f"FlexAttention did not run {direction} with any options at {shape}")
        best |= min(times)[2]
    return best

"""Multi-response attention through torch's scaled_dot_product_attention, prompt and branches apart: what runs on CPUs.

The reference makes the scores of every query and every key of a sample, those of the pairs that nobody sees among them.
Here a prompt attends to itself, and the branches of a sample, filled up to the longest, to the prompt and themselves: one
call each, in which torch's own kernel never makes the scores as a whole. A sample so short that a call costs more than
the pairs that it spares is one call under a mask. The calls of a row are planned once for all layers. There is no second
derivative.

Torch's kernel multiplies what is not seen with 0, which makes NaN of what is not finite: a sample that holds such tokens
is computed by the reference, and such gradients of outputs are kept apart from the others.
"""

import dataclasses
import functools
import itertools
import logging
import math

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from yojo_kernels import reference
from yojo_kernels.layout import Layout, fits, visible_to

log = logging.getLogger(__package__)

TAKES_CPUS = True  # off where something else is to run on a CPU
GATHER_BYTES = 64 * 2**20  # of keys and values that are put behind each other for the branches of one call
MASK_BYTES = 64 * 2**20  # of masks that a plan keeps, and of the one that the queries of some rows get
SPARED = 2**21  # products of query and key numbers that a call of its own must spare
LARGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float32, torch.float64)}
SMALLEST_SCALE = torch.finfo(torch.float32).tiny  # that needs no `with_positive_scale`, whatever the dtype


def takes(call):
    """Whether an `AttentionCall` can run here: it wants no log-sum-exp and has no soft cap.

    Under torch.compile nothing in the graph may depend on how long each segment is: there it is the reference.
    """
    return TAKES_CPUS and call.device.type == "cpu" and not (call.lse or call.softcap or torch.compiler.is_compiling())


def multi_response_attention(query, key, value, layout, *, scale, window=None, softcap=None):
    """As `yojo_kernels.multi_response_attention`, whose checked arguments it takes; returns (output, None)."""
    query, scale = with_positive_scale(query, scale)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        seen = [(slice(*s), slice(*s), functools.partial(layout.visible, window, s)) for s in layout.sample_spans()]
        shared = _Shared()
        query, key, value, link = _Inputs.apply(query, key, value, seen, shared)
        return _Outputs.apply(_forward(query, key, value, layout, scale, window), link, shared), None
    return _forward(query, key, value, layout, scale, window), None


def whole_row(query, key, value, layout, scale, window):
    """The output [1, T, Hq, D] of query [1, Hq, T, D] and key, value [1, Hkv, T, D] for a row of one call that is scored.

    The shortest way to torch's own call: in a short row every step beside it counts, so that what a row of these shapes
    takes is looked up. None for all other rows, and where something is not in order, which
    `yojo_kernels.multi_response_attention` then says. Not for a compiler.
    """
    if not (TAKES_CPUS and isinstance(layout, Layout) and type(scale) is float):
        return None
    if window is not None and type(window) is not int:
        return None
    try:
        if not (query.is_cpu and key.is_cpu and value.is_cpu):
            return None
    except AttributeError:  # no tensor
        return None
    of_tensors = query.shape, key.shape, value.shape, query.dtype, key.dtype, value.dtype
    plans, known = layout._plans, (of_tensors, scale, window, *_versions(layout))
    call = plans.get(known)
    if call is None:
        call = plans[known] = _only_call(query, key, value, layout, scale, window)
    if not call or torch.is_autocast_enabled("cpu"):
        return None
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        return None
    if not _are_tame(query, key, value, scale):
        return None
    return _attend(query, key, value, call.mask_of(layout, window, query.dtype), scale)


def _only_call(query, key, value, layout, scale, window):
    """The `_Call` that computes all of a row, of heads-first tensors; False where there is none, or something is wrong."""
    if any(tensor.ndim != 4 or tensor.shape[0] != 1 for tensor in (query, key, value)):
        return False
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
    if not (fits(query, key, value, layout) and SMALLEST_SCALE <= scale < math.inf):
        return False
    if window is not None and not 1 <= window < 2**31:
        return False
    plan = _plan_of(layout, window, query.dtype, query.shape[1], key.shape[1], query.shape[2])
    if len(plan) != 1 or len(plan[0][1]) != 1:
        return False
    log.debug("multi_response_attention: segments (one call of scaled_dot_product_attention in all layers of a row)")
    return plan[0][1][0]


def attention_of_rows(query, key, value, layout, rows, counts, *, scale, window=None, softcap=None):
    """The same for the queries of some rows, as `reference.attention_of_rows` with counts; returns (output, None)."""
    dtype, spans = reference.accumulation_dtype(query.dtype), layout.sample_spans()
    largest = max(count * (stop - start) for count, (start, stop) in zip(counts, spans, strict=True))
    if not largest or largest * torch.finfo(dtype).bits // 8 > MASK_BYTES:
        return reference.attention_of_rows(query, key, value, layout, rows, counts, scale=scale, window=window)
    query, scale = with_positive_scale(query, scale)
    ids = layout.sample, layout.branch, layout.position, layout.block
    parts, first = [], 0  # (number of the sample, its queries, its rows, which of these each query sees)
    for number, (count, (start, stop)) in enumerate(zip(counts, spans, strict=True)):
        if count:
            own, span = slice(first, first + count), slice(start, stop)
            tokens = [None if one is None else one[span] for one in ids]
            parts.append((number, own, span, visible_to(rows[own] - start, *tokens, window)))
            first += count
    link, shared = None, _Shared()
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (query, key, value)):
        seen = [(own, span, visible.clone) for _, own, span, visible in parts]
        query, key, value, link = _Inputs.apply(query, key, value, seen, shared)
    tame = _are_tame(query, key, value, scale)
    pieces = []
    with torch.autocast(query.device.type, enabled=False):
        for number, own, span, visible in parts:
            if tame or _are_tame(query[own], key[span], value[span], scale):
                tensors = (tensor.to(dtype)[None].transpose(1, 2) for tensor in (query[own], key[span], value[span]))
                pieces.append(_attend(*tensors, _added(visible, dtype), scale)[0].to(query.dtype))
            else:
                pieces.append(_by_reference(query[own], key, value, layout, rows[own], number, scale, window))
    output = pieces[0] if len(pieces) == 1 else torch.cat(pieces)
    return (output if link is None else _Outputs.apply(output, link, shared)), None


def _forward(query, key, value, layout, scale, window):
    if not query.shape[0]:
        return torch.zeros_like(query)
    tame = _are_tame(query, key, value, scale)
    heads = query.shape[1], key.shape[1], query.shape[2]
    pieces = []  # (first row, output)
    for number, (span, calls) in enumerate(_plan_of(layout, window, query.dtype, *heads)):
        if tame or _are_tame(*(_rows(tensor, span) for tensor in (query, key, value)), scale):
            for call in calls:
                pieces += call.outputs(query, key, value, layout, window, scale)
        else:
            rows = torch.arange(span.start, span.stop)
            output = _by_reference(query[span], key, value, layout, rows, number, scale, window)
            pieces.append((span.start, output))
    if len(pieces) == 1:
        return pieces[0][1]
    return torch.cat([output for _, output in sorted(pieces, key=lambda piece: piece[0])])


def _by_reference(query, key, value, layout, rows, number, scale, window):
    """The outputs of some rows of one sample."""
    counts = [0] * layout.num_samples
    counts[number] = query.shape[0]
    output, _ = reference.attention_of_rows(query, key, value, layout, rows, counts, scale=scale, window=window)
    return output


def with_positive_scale(query, scale):
    """The same scores with a scale above 0: torch's kernels and ours look for the largest score, and mask, before they
    scale. One that float32 has no normal number for is 0."""
    if abs(scale) < (0.0 if query.dtype == torch.float64 else torch.finfo(torch.float32).tiny) or not scale:
        return query * 0.0, 1.0
    return (query, scale) if scale > 0 else (-query, -scale)


def _are_tame(query, key, value, scale):
    """Whether values are finite, and all products of queries and keys: none is beyond that of their norms.

    False also where the squares of entries are beyond float32 in sum, which costs time alone.
    """
    dtype = reference.accumulation_dtype(query.dtype)
    options = {} if query.dtype == dtype else {"dtype": dtype}  # torch takes twice as long where it is told what it has
    of_query, of_key, of_value = torch._foreach_norm((query, key, value), **options)
    return of_query.item() * of_key.item() * max(scale, 1.0) <= LARGEST[dtype] and math.isfinite(of_value.item())


def _norm(tensor):
    """The square root of the sum of all finite squares, as a number."""
    dtype = reference.accumulation_dtype(tensor.dtype)
    norm = torch.linalg.vector_norm(tensor, dtype=None if tensor.dtype == dtype else dtype).item()
    if math.isfinite(norm):
        return norm
    largest = torch.finfo(dtype).max
    norm = torch.linalg.vector_norm(tensor.double().nan_to_num(0.0, 0.0, 0.0)).item()
    return min(norm, largest * math.sqrt(tensor.numel()) if dtype != torch.float64 else largest)


def _factor(size, norm, dtype):
    """A power of two that makes gradients of norm `size` harmless beside values of norm `norm`; 1 where they are."""
    most = torch.finfo(reference.accumulation_dtype(dtype)).max
    if size * norm <= most / 4:
        return 1.0
    return 2.0 ** -math.ceil(math.log2(size) + math.log2(norm) - math.log2(most / 4))


def _is_finite(tensor):
    """Whether all entries are; False also where their sum is beyond float32, which costs time alone."""
    return math.isfinite(tensor.sum(dtype=reference.accumulation_dtype(tensor.dtype)).item())


class _Shared:
    """What `_Inputs` and `_Outputs` of one call tell each other.

    Attributes:
        norm: of the values.
        factor: what the last gradient of outputs was multiplied by, a power of two.
    """

    norm, factor = 0.0, 1.0


class _Inputs(torch.autograd.Function):
    """Hands on query, key and value; in the backward, puts NaN where a gradient of outputs that is not finite leads.

    `_Outputs` has taken those gradients out, and says which they were: as the gradient of `link` [M, Hq]. `seen` holds, of
    each sample, which queries are its own, which its keys, and a function that gives [queries, keys] bool, who sees whom.
    """

    @staticmethod
    def forward(ctx, query, key, value, seen, shared):
        ctx.set_materialize_grads(False)
        ctx.seen, ctx.shared = seen, shared
        shared.norm = _norm(value)
        return query, key, value, query.new_zeros(query.shape[:2])

    @staticmethod
    def backward(ctx, grad_query, grad_key, grad_value, broken):
        if ctx.shared.factor != 1.0:
            undone = 1.0 / ctx.shared.factor
            grad_query, grad_key, grad_value = (
                None if grad is None else grad * undone for grad in (grad_query, grad_key, grad_value)
            )
        if broken is None:
            return grad_query, grad_key, grad_value, None, None
        asked = broken.unflatten(1, (grad_key.shape[1], -1)).amax(dim=2)  # [M, Hkv], of a group of query heads
        heard = asked.new_zeros(grad_key.shape[:2])
        for queries, keys, visible in ctx.seen:
            heard[keys] = visible().t().to(asked.dtype) @ asked[queries]
        nan = float("nan")
        grad_key, grad_value = (grad.masked_fill(heard[..., None] > 0, nan) for grad in (grad_key, grad_value))
        return grad_query.masked_fill(broken[..., None] > 0, nan), grad_key, grad_value, None, None


class _Outputs(torch.autograd.Function):
    """Hands on the output; in the backward, rows of gradients that are not finite are 0, and `_Inputs` is told.

    torch multiplies every gradient of an output by every value of the call, whoever sees whom, and what is beyond the
    dtype there would be NaN for those who do not: gradients that large go through it made smaller.
    """

    @staticmethod
    def forward(ctx, output, link, shared):
        ctx.shared = shared
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        broken = None
        if not _is_finite(gradient):
            broken = ~gradient.isfinite().all(dim=-1)  # [T, Hq]
            gradient, broken = gradient.masked_fill(broken[..., None], 0.0), broken.to(gradient.dtype)
        ctx.shared.factor = _factor(_norm(gradient), ctx.shared.norm, gradient.dtype)
        if ctx.shared.factor != 1.0:
            gradient = gradient * ctx.shared.factor
        return gradient, broken, None


# ---- which calls a row takes ----


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """One call of torch's attention.

    Attributes:
        runs: the rows that ask, run by run; runs are filled up to the longest.
        shared: the rows of the prompt, whose keys and values stand before a run's own; no rows for those of the run alone.
        plain: whether a run sees what is shared and itself causally; else the layout says what it sees.
        mask: what is added to the scores; None for one that is made in every layer, and for plain runs that share nothing.
    """

    runs: tuple[slice, ...]
    shared: slice
    plain: bool
    mask: torch.Tensor | None = None

    @property
    def is_causal(self):
        return self.plain and self.shared.start == self.shared.stop

    @property
    def mask_shape(self):
        """(runs, queries, keys); one run where the mask is the same for all."""
        longest = max(run.stop - run.start for run in self.runs)
        return 1 if self.plain else len(self.runs), longest, self.shared.stop - self.shared.start + longest

    def made_mask(self, layout, window, dtype):
        """The mask as it is added to scores of a dtype: [1 or runs, 1, queries, keys]."""
        count, longest, keys = self.mask_shape
        if self.plain:  # what fills up comes behind every token that is there
            visible = torch.ones(1, longest, keys, dtype=torch.bool).tril(keys - longest)
        else:
            visible = torch.stack([_visible(layout, self.shared, run, longest, window) for run in self.runs])
        return _added(visible[:, None], dtype)

    def mask_of(self, layout, window, dtype):
        """The mask that is kept, or one made now; None for the causal one of torch's own."""
        return self.mask if self.mask is not None or self.is_causal else self.made_mask(layout, window, dtype)

    def outputs(self, query, key, value, layout, window, scale):
        """A list of (first row, output [rows, Hq, D])."""
        mask = self.mask_of(layout, window, query.dtype)
        if len(self.runs) == 1 and self.shared.start == self.shared.stop:
            run = self.runs[0]
            tensors = (_rows(tensor, run)[None].transpose(1, 2) for tensor in (query, key, value))
            return [(run.start, _attend(*tensors, mask, scale)[0])]
        own = [_filled(tensor, self.runs) for tensor in (query, key, value)]
        # The prompt is taken once for all: its gradients are summed in a fixed order, whatever the number of threads.
        keys, values = (
            torch.cat([tensor[self.shared].expand(len(self.runs), -1, -1, -1), filled], dim=1)
            for tensor, filled in zip((key, value), own[1:], strict=True)
        )
        output = _attend(*(tensor.transpose(1, 2) for tensor in (own[0], keys, values)), mask, scale)
        if _are_even(self.runs):
            return [(self.runs[0].start, output.flatten(0, 1))]
        return [(run.start, one[: run.stop - run.start]) for run, one in zip(self.runs, output, strict=True)]


def _plan_of(layout, window, dtype, heads, key_heads, head_dim):
    """Of each sample its rows and the calls that compute it, made on first use and kept for the other layers."""
    settings = window, dtype, heads * head_dim, 2 * key_heads * head_dim * dtype.itemsize
    known = settings, *_versions(layout)
    plan = layout._plans.get(known)
    if plan is None:
        with torch.inference_mode(False):  # scoring may make what training will save for backward
            plan = layout._plans[known] = _plan(layout, *settings)
    return plan


def _versions(layout):
    """What changes where somebody writes to what a plan is made from."""
    return layout.position._version, layout.block is not None and layout.block._version


def _plan(layout, window, dtype, width, token_bytes):
    plan, room = [], MASK_BYTES
    for (start, stop), prompt, lengths in zip(
        layout.sample_spans(), layout.prompt_lengths, layout.branch_lengths, strict=True
    ):
        end, nothing = start + prompt, slice(start, start)
        cuts = window is not None and _extent(layout.position[start:stop]) >= window
        plain_prompt, plain_branches = (
            not cuts and not _has_blocks(layout, *span) for span in ((start, end), (end, stop))
        )
        whole = _Call((slice(start, stop),), nothing, plain_prompt and plain_branches and len(lengths) <= 1)
        calls = [_Call((slice(start, end),), nothing, plain_prompt)] if prompt else []
        stops = list(itertools.accumulate(lengths, initial=end))
        runs = [slice(*run) for run in itertools.pairwise(stops)]
        for group in _groups(runs, prompt, token_bytes):
            calls.append(_Call(tuple(runs[n] for n in group), slice(start, end), plain_branches))
        spared = (stop - start) ** 2 - sum(len(call.runs) * math.prod(call.mask_shape[1:]) for call in calls)
        if whole.plain or len(calls) > 1 and spared * width <= SPARED:
            calls = [whole]
        for n, call in enumerate(calls):
            size = math.prod(call.mask_shape) * dtype.itemsize
            if not call.is_causal and size <= room:
                room -= size
                calls[n] = dataclasses.replace(call, mask=call.made_mask(layout, window, dtype))
        plan.append((slice(start, stop), calls))
    return plan


def _has_blocks(layout, start, stop):
    return layout.block is not None and bool((layout.block[start:stop] >= 0).any())


def _extent(position):
    """How far the logical positions of some tokens lie apart."""
    return int(position.max() - position.min()) if len(position) else 0


def _groups(rows, prompt, token_bytes):
    """Lists of numbers of branches for one call each: none more than twice as long as another, keys within bounds."""
    lengths = [one.stop - one.start for one in rows]
    group = []
    for n in sorted(range(len(rows)), key=lambda n: -lengths[n]):
        longest = lengths[group[0]] if group else lengths[n]
        if group and (2 * lengths[n] < longest or (len(group) + 1) * (prompt + longest) * token_bytes > GATHER_BYTES):
            yield group
            group = []
        group.append(n)
    if group:
        yield group


def _rows(tensor, rows):
    """Some rows, a slice, of a tensor: itself where they are all."""
    return tensor if rows.stop - rows.start == tensor.shape[0] else tensor[rows]


def _are_even(runs):
    """Whether they are of one length, behind each other."""
    return {run.stop - run.start for run in runs} == {(runs[-1].stop - runs[0].start) / len(runs)}


def _filled(tensor, runs):
    """[B, R, ...] of a tensor's runs, filled up with zeros to the longest."""
    if _are_even(runs):
        return tensor[runs[0].start : runs[-1].stop].unflatten(0, (len(runs), -1))
    return pad_sequence([tensor[run] for run in runs], batch_first=True)


def _added(visible, dtype):
    """What is added to scores so that what is not visible has no weight."""
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, float("-inf"))


def _attend(query, key, value, mask, scale):
    """[B, R, Hq, D] for query [B, Hq, R, D] and key, value [B, Hkv, K, D]; mask: added to the scores, None for causal."""
    return F.scaled_dot_product_attention(
        query, key, value, mask, is_causal=mask is None, scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    ).transpose(1, 2)


def _visible(layout, shared, own, longest, window):
    """[R, P + R] bool: which keys of what is shared and its own the queries of a run see, filled up to `longest` queries.

    Queries that fill up see the first key, so that their softmax, which nobody reads, is one.
    """
    ids = (layout.sample, layout.branch, layout.position, layout.block)
    tokens = [None if one is None else torch.cat([one[shared], one[own]]) for one in ids]
    before, count = shared.stop - shared.start, own.stop - own.start
    seen = visible_to(torch.arange(before, before + count), *tokens, window)
    filled = F.pad(seen, (0, longest - count, 0, longest - count))
    filled[count:, 0] = True
    return filled

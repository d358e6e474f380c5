"""A model whose family is not listed shows at patch time that a packed row gives what its own forward gives.

One row of a few short random samples goes through the packed attention, and each branch behind its prompt through the
model's own forward, window and all. Where the final hidden states differ by more than rounding explains, packed scores
would be wrong, and the model is refused.
"""

import contextlib
import logging

import torch

from yojo import families
from yojo.patching import devices
from yojo.patching.eval_mode import EvalMode
from yojo.patching.positions import PromptPositions
from yojo_kernels import Layout

logger = logging.getLogger(__name__)

WINDOW = 8  # a sliding window that is longer than LONGEST_WINDOW is made so short while the probe runs
LONGEST_WINDOW = 64
SPARE = 8  # tokens of a pass beside twice the window

# A difference is measured in the spread of the hidden states over tokens, and so is what rounding explains: the embeddings
# are changed by one unit in the last place, and the model's own forward runs on those as well. On 30 families of 2 and of
# 24 layers, in float32 and bfloat16, the two ways differ by 0.1 to 1.0 times as much; a window that is left out, by 0.5 to
# 1 of the spread.
ROUNDINGS = 4
LARGEST_NOISE = 0.5  # where rounding explains as much as this, the probe cannot tell


def is_needed(base):
    """Whether the family of a model is not listed, or that of its text decoder (a vision tower's facts go with any)."""
    if not families.is_known(base.config):
        return True
    text_config = base.config.get_text_config()
    is_listed = families.is_known(text_config) or families.decoder_of(text_config) is not None
    return not is_listed and not families.family_of(base.config).has_prefix


def check(base, attentions, rope, replaced):
    """Compare a packed row with the model's own forward; leaves the model as it was.

    Args:
        base: the transformers model, not patched yet.
        attentions: its attention modules.
        rope: its `yojo.patching.ropes.Switch`, or None.
        replaced: function () -> context manager in which packed rows reach the packed attention.

    Raises:
        ValueError: they differ, or the packed row cannot be computed; the reason is named.
    """
    name = f"{type(base).__name__} ({base.config.model_type})"
    if devices.output_device(base).type == "meta":
        logger.warning("%s is on the meta device: it cannot be probed, and is taken as it is", name)
        return
    found = measure(base, attentions, rope, replaced)
    if found is None:
        return
    error, rounding = found
    if not error <= rounding:
        raise ValueError(
            f"{name}: a packed row of random tokens differs from the model's own forward by {error:.2g} of the spread of its "
            f"hidden states, where rounding explains {rounding:.2g}: {_likely(base)}. Its packed scores would be wrong; "
            "probe=False patches it all the same"
        )
    if rounding > LARGEST_NOISE:
        logger.warning("%s: rounding alone changes its hidden states so much that a probe cannot tell", name)


def _likely(base):
    window = getattr(base.config.get_text_config(), "sliding_window", None)
    if window:
        return f"most likely the model puts its sliding window ({window}) into its mask, and its attention does not hand it on"
    return "its attention depends on more than which tokens it may see, and on what is not known to yojo/families/"


@torch.no_grad()
def measure(base, attentions, rope, replaced):
    """(error, what rounding explains), both in the spread of the hidden states over tokens.

    Each is the median over a branch's tokens (a token that a mixture of experts sends elsewhere because of a rounding is
    none of ours), of the branch where it is largest. None where the model's own forward does not run.
    """
    name = type(base).__name__
    with contextlib.ExitStack() as stack:
        indices = {p.device.index for p in base.parameters() if p.device.type == "cuda"}
        stack.enter_context(torch.random.fork_rng(devices=sorted(indices)))
        stack.enter_context(EvalMode().of(base))
        stack.enter_context(torch.autocast(devices.output_device(base).type, enabled=False))
        stack.enter_context(_state_kept(base))
        window = stack.enter_context(_short_window(base, attentions))
        try:
            samples = _samples(base, window, rope)
            own, noisy = _own_passes(base, samples)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever a model's own code does not like
            logger.warning("%s cannot be probed, its own forward fails on a few tokens of text: %s", name, error)
            return None
        try:
            with replaced():
                packed = _packed_pass(base, samples)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise ValueError(f"{name} cannot score a packed row: {error}") from error
    spread = (torch.cat(own) - torch.cat(own).mean(0)).norm(dim=-1).square().mean().sqrt()
    if not spread.isfinite():
        logger.warning("%s cannot be probed, its hidden states are not finite", name)
        return None
    error, noise = (
        max(float(((a - b).norm(dim=-1) / spread).median()) for a, b in zip(ones, own, strict=True))
        for ones in (packed, noisy)
    )
    return error, max(ROUNDINGS * noise, _unit(base, own[0].to(base.dtype)) ** 0.5 / 4)


def _samples(base, window, rope):
    """[(prompt ids, [branch ids, ...]), ...]: isolated branches, and a long one as in comparative mode."""
    limits = [getattr(base.config.get_text_config(), "max_position_embeddings", None), rope and rope.limit]
    room = min((limit for limit in limits if limit), default=4096)
    size = max(1, min(window or WINDOW, (room - SPARE) // 2))
    lengths = [(size + 4, (4, size + 3, 2)), (5, (size + 3,))]
    ids = _ordinary_ids(base, sum(prompt + sum(branches) for prompt, branches in lengths))
    taken = iter(ids.split([n for prompt, branches in lengths for n in (prompt, *branches)]))
    return [(next(taken), [next(taken) for _ in branches]) for _, branches in lengths]


def _ordinary_ids(base, count):
    """Random ids that no config gives a meaning: no placeholders of images, no padding."""
    configs = (base.config, base.config.get_text_config())
    rows = min(base.get_input_embeddings().weight.shape[0], configs[1].vocab_size)
    special = set()
    for config in configs:
        for name, value in vars(config).items():
            if name.endswith(("_token_id", "_token_ids", "_token_index")):
                special.update(value if isinstance(value, (list, tuple)) else [value])
    ordinary = torch.tensor([i for i in range(min(rows, 50_000)) if i not in special])
    return ordinary[torch.randint(len(ordinary), (count,), generator=torch.Generator().manual_seed(0))]


def _own_passes(base, samples):
    """Hidden states of every branch [n, H] by the model's own forward, and the same with embeddings that are rounded."""
    rows = [(torch.cat([prompt, ids]), len(prompt)) for prompt, branches in samples for ids in branches]
    width = max(len(ids) for ids, _ in rows)
    # Filled up behind, where no token looks; the second half of the batch is the one that gets noise.
    batch = torch.stack([torch.nn.functional.pad(ids, (0, width - len(ids)), value=int(ids[0])) for ids, _ in rows])
    with _noise(base, len(rows)):
        hidden = _hidden(base, input_ids=batch.repeat(2, 1)).float()
    found = [hidden[i, start : len(ids)] for i, (ids, start) in enumerate(rows + rows)]
    return found[: len(rows)], found[len(rows) :]


@contextlib.contextmanager
def _noise(base, first):
    """Within it, embeddings of the rows of a batch from `first` on are changed by one unit in the last place."""

    def change(module, args, output):
        sign = torch.randint(0, 2, output[first:].shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
        noisy = output[first:] * (1 + _unit(base, output) * sign.to(output.device, torch.float32))
        return torch.cat([output[:first], noisy.to(output.dtype)])

    handle = base.get_input_embeddings().register_forward_hook(change)
    try:
        yield
    finally:
        handle.remove()


def _unit(base, tensor):
    """What the model's arithmetic rounds to, relative."""
    unit = torch.finfo(tensor.dtype).eps
    if getattr(base, "hf_quantizer", None) is not None:
        return max(unit, 2.0**-6)
    if tensor.is_cuda and tensor.dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest":
        return 2.0**-8 if torch.get_float32_matmul_precision() == "medium" else 2.0**-10
    return unit


def _packed_pass(base, samples):
    """Hidden states of every branch, from one packed row."""
    positions = PromptPositions(base)
    ids, places, spans, row = [], [], [], 0
    for prompt, branches in samples:
        own, after = positions({"input_ids": prompt[None]})
        ids.append(prompt)
        places.append(own)
        row += len(prompt)
        for branch in branches:
            ids.append(branch)
            places.append((after + torch.arange(len(branch))).expand(own.shape[0], -1))
            spans.append((row, row + len(branch)))
            row += len(branch)
    device = devices.input_device(base)
    places = torch.cat(places, dim=1)
    layout = Layout.build([len(prompt) for prompt, _ in samples], [list(map(len, branches)) for _, branches in samples])
    hidden = _hidden(
        base,
        input_ids=torch.cat(ids)[None],
        position_ids=(places if places.shape[0] == 1 else places[:, None]).to(device),
        attention_mask=torch.full((1, 1, 1, 1), float("nan"), dtype=base.dtype, device=device),
        layout=layout.to(device).for_one_pass(),
    )[0].float()
    return [hidden[start:end] for start, end in spans]


def _hidden(base, *, input_ids, **inputs):
    """Final hidden states [B, T, H]."""
    asked = dict(use_cache=False, output_hidden_states=False, output_attentions=False, return_dict=True)
    return base.base_model(input_ids=input_ids.to(devices.input_device(base)), **inputs, **asked)[0]


@contextlib.contextmanager
def _short_window(base, attentions):
    """Within it, the model's sliding window is one that a short row reaches beyond; gives it, or None where there is none."""
    config = base.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if not isinstance(window, int) or not 0 < window:
        yield None
        return
    if window <= LONGEST_WINDOW:
        yield window
        return
    holders = [config, *{id(m.config): m.config for m in attentions}.values(), *attentions]
    changed = []
    for holder in holders:
        for name, value in list(vars(holder).items()):
            if "window" in name and value == window and not isinstance(value, bool):
                changed.append((holder, name))
                holder.__dict__[name] = WINDOW
    try:
        yield WINDOW
    finally:
        for holder, name in changed:
            holder.__dict__[name] = window


@contextlib.contextmanager
def _state_kept(base):
    """Behind it, the state that ropes keep in their modules is what it was."""
    modules = [m for m in base.modules() if m._buffers and not any(True for _ in m.parameters(recurse=False))]
    before = [
        (dict(vars(m)), dict(m._buffers), {n: b.clone() for n, b in m._buffers.items() if b is not None})
        for m in modules
    ]
    try:
        yield
    finally:
        for module, (attributes, buffers, values) in zip(modules, before, strict=True):
            module.__dict__.clear()
            module.__dict__.update(attributes)
            module._buffers.clear()
            module._buffers.update(buffers)
            for name, value in values.items():
                buffers[name].copy_(value)

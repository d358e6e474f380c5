"""Fingerprints of a backbone's weights: some bytes of each tensor, enough to tell one model's from another's.

An adapter means something on the weights it was trained on, and on no others of the same shape. A tensor of up to
`WHOLE` numbers is read as a whole, of a larger one `PLACES` numbers, spread over it: further training moves all of them.
What is hashed are values, not files: the same weights have the same fingerprint in one file or in shards, on any device,
and, since each is hashed in float32 and rounded to bfloat16 and to float16, in whatever dtype they are loaded.
"""

import dataclasses
import functools
import hashlib
import math

import torch

WHOLE = 16384
PLACES = 1024

_LETTERS = {torch.float32: "f", torch.float64: "f", torch.bfloat16: "b", torch.float16: "h"}
_ROUNDED = {"f": torch.float32, "b": torch.bfloat16, "h": torch.float16}
_INNER = ("base_layer", "original_module")  # what PEFT's wrappers keep inside


@dataclasses.dataclass
class Sample:
    """Some of the numbers of one tensor.

    Attributes:
        shape: of the tensor.
        values: [N] on the CPU, in the tensor's dtype; bytes of one that holds no ordinary floats (quantized weights).
        device: type of the device the tensor was on.
    """

    shape: tuple[int, ...]
    values: torch.Tensor
    device: str

    def code(self, keep=None):
        """Text of 9 or 25 characters: kind, and hashes of the values; `keep` [N] bool picks some of them."""
        values = self.values if keep is None else self.values[keep]
        letter = _LETTERS.get(values.dtype, "q")
        if letter == "q":
            return letter + _hash(self.shape, values)
        exact = values.float()
        return letter + "".join(_hash(self.shape, exact.to(dtype).float()) for dtype in _ROUNDED.values())


def _hash(shape, values):
    digest = hashlib.blake2b(repr(tuple(shape)).encode(), digest_size=4)
    digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def tensors_of(base):
    """The backbone's own weights: dict name -> parameter or saved buffer, whatever PEFT has wrapped around them.

    The value head is not among them, nor the projection to the vocabulary, which no score depends on; tensors that are
    shared stand there once. What accelerate has offloaded is read from where it lies.
    """
    outputs = base.get_output_embeddings()
    skipped = ["score", *(path for path, module in base.named_modules() if module is outputs)]
    wrappers, found, seen = {}, {}, set()
    for path, module in base.named_modules(remove_duplicate=False):
        inner = next((name for name in _INNER if name in module._modules), None)
        if inner is not None:
            wrappers[path] = inner
            continue
        if any(f"{path}.".startswith(f"{name}.") for name in skipped) or _is_added(path, wrappers):
            continue
        saved = {n: buffer for n, buffer in module._buffers.items() if n not in module._non_persistent_buffers_set}
        for name, tensor in {**module._parameters, **saved}.items():
            if tensor is None or id(tensor) in seen:
                continue
            seen.add(id(tensor))
            found[plain_name(f"{path}.{name}" if path else name)] = _fetched(module, name, tensor)
    return found


def _is_added(path, wrappers):
    """Whether a module is a part of an adapter, rather than of what it wraps."""
    parts = path.split(".")
    for n in range(len(parts)):
        inner = wrappers.get(".".join(parts[:n]))
        if inner is not None and parts[n] != inner:
            return True
    return False


def plain_name(name):
    """The name of a backbone's tensor, without what PEFT, FSDP and torch.compile have put into it."""
    parts = name.removeprefix("base_model.model.").split(".")
    wrappers = (*_INNER, "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
    return ".".join(part for part in parts if part not in wrappers)


def stored(module, name):
    """A weight of a module; one that accelerate has offloaded, from where it lies."""
    return _fetched(module, name, getattr(module, name))


def _fetched(module, name, tensor):
    if tensor.device.type != "meta":
        return tensor
    hooks = [getattr(module, "_hf_hook", None)]
    hooks += getattr(hooks[0], "hooks", ())
    for hook in hooks:
        weights = getattr(hook, "weights_map", None)
        if weights is not None:
            try:
                return weights[name]
            except KeyError:
                continue
    return tensor


@torch.no_grad()
def take(tensors):
    """dict name -> `Sample` of a dict of tensors; what cannot be read here (meta tensors, shards) is left out."""
    found, groups = {}, {}
    for name, tensor in tensors.items():
        read = _read(tensor)
        if read is not None:
            found[name] = (tuple(tensor.shape), tensor.device.type)
            groups.setdefault((read.dtype, read.device), []).append((name, read))
    samples = {}
    for some in groups.values():  # one copy from the device for all of them
        together = torch.cat([values for _, values in some]).cpu()
        parts = together.split([len(values) for _, values in some])
        for (name, _), values in zip(some, parts, strict=True):
            shape, device = found[name]
            samples[name] = Sample(shape, values.clone(), device)
    return {name: samples[name] for name in found}


def _read(tensor):
    """Some of a tensor's numbers, or None."""
    if tensor.device.type == "meta" or not tensor.numel() or hasattr(tensor, "full_tensor"):
        return None
    tensor = tensor.detach()
    try:
        if tensor.dtype not in _LETTERS:
            tensor = tensor.contiguous().view(torch.uint8)
        flat = tensor.reshape(-1)
        return flat[_places(flat.numel()).to(flat.device)]
    except (RuntimeError, NotImplementedError, TypeError):  # a tensor of somebody's own making
        return None


@functools.lru_cache(maxsize=256)
def _places(count):
    if count <= WHOLE:
        return torch.arange(count)
    n, step = torch.arange(PLACES), count // PLACES
    return n * step + n * 2654435761 % step  # not at even distances, which could all fall into one column


def codes(samples):
    """dict name -> text, of samples: what is saved."""
    return {name: sample.code() for name, sample in samples.items()}


def match(one, other):
    """Whether two codes are of the same weights; None where their dtypes cannot tell.

    Weights that are rounded on one side are compared rounded. Rounded to bfloat16 on one side and to float16 on the
    other, they may have been the same before, and nobody can tell.
    """
    if "q" in (one[0], other[0]):
        return one == other if one[0] == other[0] else None
    if one[1:9] == other[1:9]:
        return True
    kinds = list(_ROUNDED)
    for letter in {one[0], other[0]} - {"f"}:
        at = 1 + 8 * kinds.index(letter)
        if one[at : at + 8] == other[at : at + 8]:
            return True
    return None if {one[0], other[0]} == {"b", "h"} else False


def describe(samples, left_out=0):
    """What `yojo_config.json` says of weights: the codes, where quantized ones were hashed, and how many are left out."""
    found = {"device": next((s.device for s in samples.values()), None), "tensors": codes(samples)}
    return found | ({"left_out": left_out} if left_out else {})


def compare(described, samples, names, same_version=True):
    """Saved weights against those here.

    Args:
        described: what `describe` made.
        samples: what `take` made of the weights here.
        names: of all the weights here, those that could not be read included.
        same_version: whether the same transformers made both; another one may call a weight otherwise.

    Returns:
        (list of text, the weights that differ; list of names that could not be compared).
    """
    saved, differ, unknown = described["tensors"], [], []
    for name in sorted({*saved, *names}):
        if name in saved and name in samples:
            code = samples[name].code()
            same = match(saved[name], code)
            if same is False and code[0] == "q" and samples[name].device != described["device"]:
                same = None  # devices need not quantize to the same bit
            if same is None:
                unknown.append(name)
            elif not same:
                differ.append(name)
        elif name in saved and name not in names and same_version:
            differ.append(f"{name} (lacking)")
        elif name not in saved and same_version and not described.get("left_out"):
            differ.append(f"{name} (unknown)")
        else:
            unknown.append(name)
    return differ, unknown


def changed(before, tensors, separator_id=None, embedding=None):
    """Names of the weights that are not what they were, the separator's own row of the embedding aside.

    Args:
        before: dict of `Sample`s.
        tensors: dict of the tensors now; the embedding may have more rows.
        separator_id: row of the embedding that the patch wrote, or None.
        embedding: its name.
    """
    now = {name: tensor for name, tensor in tensors.items() if name in before}
    if embedding in now:
        now[embedding] = now[embedding][: before[embedding].shape[0]]
    names = []
    for name, new in take(now).items():
        old, keep = before[name], None
        if new.shape != old.shape:
            names.append(name)
            continue
        if name == embedding and separator_id is not None:
            keep = _places(math.prod(old.shape)) // old.shape[-1] != separator_id
        if match(old.code(keep), new.code(keep)) is False:
            names.append(name)
    return names

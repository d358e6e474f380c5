"""The trained part of the separator's embedding: added where the separator stands, and kept with the value head.

Training one row of an embedding through its weight makes a gradient, and with PEFT's trainable tokens a copy, of the whole
vocabulary's embedding in every step. What training adds to the separator's row is a parameter of its own instead, [H]
float32, in the value head: it is trained, saved, sharded and kept through merges as the head is.
"""

import threading

import torch

_installing = threading.Lock()


class SeparatorDelta:
    """Forward hook of the input embedding: adds the head's `separator_delta` to the embeddings of separators."""

    def __init__(self, base):
        self.base = base
        self.handle = None

    def __call__(self, module, args, kwargs, output):
        state = getattr(self.base, "yojo", None)
        ids = args[0] if args else kwargs.get("input", kwargs.get("input_ids"))
        if state is None or state.separator_id is None or ids is None:
            return output
        delta = self.base.score.separator_delta.to(output.device, output.dtype)
        # addcmul makes no tensor but its output; tokens that are no separators keep their bits.
        return torch.addcmul(output, (ids == state.separator_id).to(output.dtype)[..., None], delta)


def install(base):
    """Make the input embedding of a patched model add the delta, as it stands now: PEFT may have wrapped it since."""
    if _is_installed(base):
        return
    with _installing:  # threads that all find it missing would each add the delta
        if not _is_installed(base):
            remove(base)
            hook = SeparatorDelta(base)
            # Kept for pickle: torch numbers hooks by process, and what unpickles the handle counts on from there. Another
            # hook would otherwise get the same number, and replace this one.
            hook.handle = base.get_input_embeddings().register_forward_hook(hook, with_kwargs=True)


def _is_installed(base):
    embedding = base.get_input_embeddings()
    hooks = tuple(embedding._forward_hooks.items())
    return any(isinstance(hook, SeparatorDelta) and key in embedding._forward_hooks_with_kwargs for key, hook in hooks)


def remove(base):
    """Undo `install`."""
    for module in base.get_input_embeddings().modules():  # PEFT keeps what it wraps inside
        for key, hook in list(module._forward_hooks.items()):
            if isinstance(hook, SeparatorDelta):
                del module._forward_hooks[key]
                module._forward_hooks_with_kwargs.pop(key, None)


def folded(embedding, weight, separator_id, delta):
    """An embedding that needs no delta: weight [V, H], a copy with the delta [H] added to the separator's row.

    Args:
        embedding: the module, without PEFT's wrappers; Gemma's multiply a row by a constant, behind which the delta is added.
        weight: its weight [V, H].
        separator_id: the separator's row.
        delta: [H].
    """
    weight, delta = weight.detach().clone(), delta.detach()
    delta = delta / float(getattr(embedding, "embed_scale", 1.0))
    weight[separator_id] += delta.to(weight.device, weight.dtype)
    return weight

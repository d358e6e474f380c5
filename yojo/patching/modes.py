"""A patched model that lays responses out in another mode than it was patched with."""

import dataclasses

from yojo.patching import recorded
from yojo.patching.state import patched_base


def set_mode(model, mode=None, permutations=None):
    """Change the mode of a patched model, in place: how responses are laid out, and no weight.

    Collators and reward models that were made of it before keep the mode they have: make them anew. A model's scores are those
    that it was trained to give in the mode it was trained in; in another one they say what that mode would give without
    training.

    Args:
        model: patched model, bare or wrapped.
        mode: "comparative" or "isolated"; None: as it is.
        permutations: K; None: 1 where a mode is given, else as it is.

    Raises:
        ValueError: a model that is not patched, or settings that do not go together.
    """
    base = patched_base(model, "set_mode")
    changed = {} if mode is None else {"mode": mode, "permutations": 1}
    changed |= {} if permutations is None else {"permutations": permutations}
    config = dataclasses.replace(base.yojo.config, **changed)
    if config != base.yojo.config:
        base.yojo.config = config
        base.config.yojo = recorded.record(base.yojo)

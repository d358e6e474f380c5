"""Models that are loaded whole in each process, though transformers shards what it loads for the trainer of the program."""

import contextlib
import os
import threading

_FSDP = "FSDP_CPU_RAM_EFFICIENT_LOADING"
_lock = threading.Lock()
_held = []  # what was set aside: (DeepSpeed's configuration, the variable), while anything is loaded
_inside = 0


@contextlib.contextmanager
def loaded_whole():
    """What is loaded meanwhile is whole in each process.

    Once a program has made the arguments of a trainer with DeepSpeed ZeRO-3, transformers loads every model in shards. With FSDP
    and loading that is sparing of memory, some versions (5.17 does, 5.23 does not) give all processes but the first of a machine
    weights that are 0, for the trainer to fill; it knows its own model alone. A judge beside it would fail, or score with zeros.
    Any number of threads may load at once. A function that loads is decorated with `@loaded_whole()`.
    """
    global _inside
    from transformers.integrations import deepspeed

    with _lock:
        _inside += 1
        if _inside == 1:
            _held.append((deepspeed._hf_deepspeed_config_weak_ref, os.environ.pop(_FSDP, None)))
            deepspeed._hf_deepspeed_config_weak_ref = None
    try:
        yield
    finally:
        with _lock:
            _inside -= 1
            if not _inside:
                held, variable = _held.pop()
                if deepspeed._hf_deepspeed_config_weak_ref is None:  # no other thread has set one
                    deepspeed._hf_deepspeed_config_weak_ref = held
                if variable is not None:
                    os.environ.setdefault(_FSDP, variable)

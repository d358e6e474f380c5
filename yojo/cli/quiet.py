"""Our own commands show what we have to say; what libraries warn their callers of stays with us, who call them."""

import logging
import os
import sys
import warnings

# Read when the libraries are loaded, which is later than this; whoever has set them wants to see more.
_SETTINGS = {
    "TOKENIZERS_PARALLELISM": "false",  # or they say in every loader worker that it was forked
    "KINETO_LOG_LEVEL": "6",  # or torch's profiler announces itself
    "TORCH_CPP_LOG_LEVEL": "ERROR",
}
_OURS = ("yojo", "yojo_kernels", "__main__")


def be_quiet():
    """Keep warnings of libraries from the screen, logged ones, too, for this process and those it starts; errors pass.

    `python -W ...` or PYTHONWARNINGS shows Python's warnings all the same.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    if not sys.warnoptions:
        # Not a filter: libraries put their own in front of it.
        warnings.showwarning = _nothing
    if not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setLevel(logging.WARNING)
        handler.addFilter(_is_shown)
        logging.getLogger().addHandler(handler)


def quiet_transformers():
    """transformers, loaded, without its log lines on the screen and its bars while weights are read.

    Its level stays: a Trainer whose level is higher than that of warnings shows no progress.
    """
    import transformers

    if "TRANSFORMERS_VERBOSITY" not in os.environ:
        transformers.utils.logging.disable_default_handler()
        transformers.utils.logging.enable_propagation()  # to the root's handler, which picks
    transformers.utils.logging.disable_progress_bar()
    return transformers


def be_quiet_here():
    """All of it, in a process that a command of ours has started."""
    be_quiet()
    quiet_transformers()


def _nothing(*args, **kwargs):
    """Stands for `warnings.showwarning`."""


def _is_shown(record):
    return record.levelno >= logging.ERROR or record.name.partition(".")[0] in _OURS

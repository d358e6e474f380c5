"""Load a stock model that scores with all its weights, or not at all, and the processor beside it."""

import logging

from yojo.files.whole import loaded_whole
from yojo.inputs.processors import load_processor
from yojo.patching.state import is_patched, tokenizer_of

logger = logging.getLogger(__name__)


def check_stock(base):
    """The class name of an (unwrapped) model of transformers that carries no patch; a TypeError or ValueError for others."""
    from transformers import PreTrainedModel

    name = type(base).__name__
    if not isinstance(base, PreTrainedModel):
        raise TypeError(f"model must be a transformers model, got {name}")
    if is_patched(base):
        raise ValueError(f"this {name} is patched: its judge is yojo.RewardModel(model, processor)")
    return name


def load_config(path, what, **kwargs):
    """The config of a folder or hub name; a ValueError that says it is no `what` where there is none."""
    import transformers

    try:
        return transformers.AutoConfig.from_pretrained(path, **where(kwargs))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no {what}: {_first_line(error)}") from error


@loaded_whole()
def load_stock(path, model_class, *, dtype=None, device=None, unread=(), **kwargs):
    """A model of transformers with all its weights.

    Args:
        path: folder or hub name.
        model_class: of transformers, an Auto class or the model's own.
        dtype: torch dtype of the weights; the one they were saved in by default.
        device: where the model goes; where transformers puts it (the CPU) by default.
        unread: beginnings of names of weights that the model is not asked for: they may be missing, or too many.
        **kwargs: handed to `model_class.from_pretrained`.

    Returns:
        the model in eval mode.

    Raises:
        ValueError: weights that are missing or of another shape.
    """
    model, report = model_class.from_pretrained(path, dtype=dtype or "auto", output_loading_info=True, **kwargs)
    _check_report(report, path, unread)
    if device is not None:
        model.to(device)
    return model.eval()


def load_beside(path, model, processor_options=None, **kwargs):
    """The processor in the folder of a model that takes images, the tokenizer of one that does not."""
    try:
        processor = load_processor(path, **where(kwargs), **(processor_options or {}))
    except OSError as error:
        raise ValueError(f"{path} has no tokenizer: {_first_line(error)}") from error
    return processor if _takes_media(model) else tokenizer_of(processor)


def _check_report(report, path, unread):
    missing = sorted(key for key in report.get("missing_keys") or () if not key.startswith(tuple(unread)))
    if missing:
        raise ValueError(
            f"{path} lacks weights of its model: {', '.join(missing[:3])}{_more(missing)}; transformers fills them with "
            "random numbers, and they would score at random. A head that lies in an adapter must be merged first "
            "(merge_and_unload, save_pretrained)"
        )
    mismatched = sorted(str(key[0] if isinstance(key, tuple) else key) for key in report.get("mismatched_keys") or ())
    if mismatched:
        raise ValueError(f"{path} has weights of another shape than its config says: {', '.join(mismatched[:3])}")
    unexpected = sorted(key for key in report.get("unexpected_keys") or () if not key.startswith(tuple(unread)))
    if unexpected:
        logger.warning(
            "%s has weights that its model has no place for: %s%s", path, unexpected[0], _more(unexpected, 1)
        )


def _more(names, shown=3):
    return f" and {len(names) - shown} more" if len(names) > shown else ""


def _takes_media(model):
    """Whether transformers passes pixels on to the backbone of this classifier."""
    return any(hasattr(model.config, f"{name}_config") for name in ("vision", "visual"))


_SHARED = (
    "cache_dir",
    "force_download",
    "local_files_only",
    "proxies",
    "revision",
    "subfolder",
    "token",
    "trust_remote_code",
)


def check_download(kwargs):
    """A ValueError for arguments of a download, where the folder is fetched as a whole."""
    given = [name for name in _SHARED if name in kwargs and name != "trust_remote_code"]
    if given:
        raise ValueError(
            f"{given[0]}={kwargs[given[0]]!r} is given, which says how a model is fetched: fetch it with "
            f"huggingface_hub.snapshot_download(..., {given[0]}=...) first, and name the folder"
        )


def where(kwargs):
    """Those of the arguments that say where files are and how they are read."""
    return {name: kwargs[name] for name in _SHARED if name in kwargs}


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]

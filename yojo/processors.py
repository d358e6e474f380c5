"""Load a processor, also where torchvision is missing and transformers' video processors cannot exist."""

import functools
import importlib
import json
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

# One of them is in every folder with a tokenizer.
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")


class ImageOnly:
    """Mixed into a processor class: the same processor without its video part."""

    @classmethod
    def get_attributes(cls):
        return [name for name in super().get_attributes() if name != "video_processor"]

    def __reduce__(self):
        # The class is made on the fly, so a loader worker that is spawned has to make it again.
        base = type(self).__mro__[2]
        return _restore, (base.__module__, base.__qualname__, self.__dict__)


@functools.cache
def image_only(processor_class):
    """The image-only version of a processor class whose video processor would need torchvision.

    Args:
        processor_class: a `transformers.ProcessorMixin` subclass with a `video_processor` part.

    Returns:
        A subclass of the same name, built from `(image_processor, tokenizer)`; it reads and writes the same files.
    """
    return type(processor_class.__name__, (ImageOnly, processor_class), {"__module__": processor_class.__module__})


def _restore(module, name, state):
    cls = image_only(getattr(importlib.import_module(module), name))
    processor = cls.__new__(cls)
    processor.__dict__.update(state)
    return processor


def load_processor(path, **kwargs):
    """Load a processor (or a bare tokenizer, for a text-only model) from a folder or a hub name.

    Without torchvision, transformers cannot build the video processors that Qwen-VL and others name. Their images
    need none, so the processor is then loaded without its video part, and a warning says so.

    Args:
        path: folder or hub name.
        **kwargs: handed to `from_pretrained`.

    Returns:
        A `transformers.ProcessorMixin`, or a tokenizer.

    Raises:
        ValueError: a folder with neither.
    """
    import transformers
    from transformers.utils import is_torchvision_available

    folder = Path(path)
    config = folder / "processor_config.json"
    if folder.is_dir() and not config.is_file() and not (folder / "preprocessor_config.json").is_file():
        if not any((folder / file).is_file() for file in _TOKENIZERS):
            raise ValueError(f"{path} holds neither a processor nor a tokenizer")
        return transformers.AutoTokenizer.from_pretrained(path, **kwargs)  # AutoProcessor would go by the model's class
    name = json.loads(config.read_text()).get("processor_class") if config.is_file() else None
    cls = getattr(transformers, name, None) if name else None
    has_video_part = cls is not None and "video_processor" in cls.get_attributes()
    if has_video_part and not _has_video_config(folder):
        return image_only(cls).from_pretrained(path, **kwargs)
    if has_video_part and not is_torchvision_available():
        logger.warning("torchvision is not installed: %s is loaded without its video part, images only", path)
        return image_only(cls).from_pretrained(path, **kwargs)
    return transformers.AutoProcessor.from_pretrained(path, **kwargs)


def _has_video_config(folder):
    if (folder / "video_preprocessor_config.json").is_file():
        return True
    return "video_processor" in json.loads((folder / "processor_config.json").read_text())

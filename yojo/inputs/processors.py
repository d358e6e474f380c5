"""Load a processor from folders of every layout, also where torchvision is missing and video processors cannot exist."""

import difflib
import functools
import importlib
import inspect
import json
import logging
from pathlib import Path

from yojo.files.saved import BACKEND

logger = logging.getLogger(__name__)

# One of them is in every folder with a tokenizer.
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "tekken.json", "vocab.json", "vocab.txt")
# Arguments of `from_pretrained` that say where files are and how they are read, and are no options of a processor.
_WHERE = ("cache_dir", "force_download", "local_files_only", "proxies", "repo_type", "revision", "subfolder", "token")
_HOW = ("backend", "code_revision", "config", "trust_remote_code", "use_fast", "user_agent")
# Options of tokenizers beside their special tokens: they take any, and most do nothing.
_OF_TOKENIZERS = ("add_prefix_space", "chat_template", "clean_up_tokenization_spaces", "extra_special_tokens")
_OF_TOKENIZERS += ("model_max_length", "padding_side", "truncation_side", "split_special_tokens", "legacy")
_OF_TOKENIZERS += (
    "add_bos_token",
    "add_eos_token",
    "do_lower_case",
    "fix_mistral_regex",
    "from_slow",
    "tokenizer_type",
)


class ImageOnly:
    """Mixed into a processor class: the same processor without its video part."""

    @classmethod
    def get_attributes(cls):
        return [name for name in super().get_attributes() if name != "video_processor"]

    @classmethod
    def from_args_and_dict(cls, args, processor_dict, **kwargs):
        # Parts are handed to the class in the order of its arguments, the video part among them.
        args = list(args)
        args.insert(super().get_attributes().index("video_processor"), None)
        own = {name: value for name, value in processor_dict.items() if name != "video_processor"}
        return super().from_args_and_dict(args, own, **kwargs)

    def apply_chat_template(self, *args, **kwargs):
        import transformers

        if isinstance(self, transformers.SmolVLMProcessor):  # its own asks the video part how to sample
            return transformers.ProcessorMixin.apply_chat_template(self, *args, **kwargs)
        return super().apply_chat_template(*args, **kwargs)

    def __getattr__(self, name):
        # ms-swift gives the processor's own class one that calls itself without end where it is inherited.
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def to_dict(self):
        # So that who loads it knows that nothing is lost.
        return super().to_dict() | {"video_processor": None}

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
        A subclass of the same name, built from the other parts; it reads and writes the same files.
    """
    from transformers import ProcessorMixin

    names = processor_class.get_attributes()

    class Parts(ProcessorMixin):
        """Behind the processor's own class, which hands its parts on in its own order."""

        def __init__(self, *args, **kwargs):
            parts = dict(zip(names, args, strict=False)) | kwargs
            if parts.get("video_processor") is None:
                parts.pop("video_processor", None)
            super().__init__(**parts)

    return type(
        processor_class.__name__, (ImageOnly, processor_class, Parts), {"__module__": processor_class.__module__}
    )


def _restore(module, name, state):
    cls = image_only(getattr(importlib.import_module(module), name))
    processor = cls.__new__(cls)
    processor.__dict__.update(state)
    return processor


def load_processor(path, *, image_backend=None, **kwargs):
    """Load a processor (or a bare tokenizer, for a text-only model) from a folder or a hub name.

    In layouts before transformers 5, `preprocessor_config.json` may hold the settings of images and videos: both parts
    are read from it. Without torchvision, transformers cannot build the video processors that Qwen-VL and others name.
    Their images need none, so the processor is then loaded without its video part, and a warning says so; likewise
    where the folder has no settings for it.

    Args:
        path: folder or hub name.
        image_backend: what resizes images, "pil" or "torchvision", where a saved model says it (see `save_processor`);
            None: what processor_config.json says of it, else what transformers takes.
        **kwargs: handed to `from_pretrained`: where files are (`revision`, `token`, ...), and options such as
            `max_pixels`, which every part takes that knows them.

    Returns:
        A `transformers.ProcessorMixin`, or a tokenizer.

    Raises:
        ValueError: a folder with neither, a file of it that is not JSON, or an option that no part of the processor
            knows.
    """
    import transformers
    from transformers.utils import is_torchvision_available

    files = _Files(path, kwargs)
    nested, images = files.read("processor_config.json"), files.read("preprocessor_config.json")
    if (
        Path(path).is_dir()
        and nested is None
        and images is None
        and files.read("video_preprocessor_config.json") is None
    ):
        if not any((files.folder / file).is_file() for file in _TOKENIZERS):
            raise ValueError(f"{path} holds neither a processor nor a tokenizer")
        # AutoProcessor would go by the model's class.
        return _with_options(transformers.AutoTokenizer.from_pretrained(path, **kwargs), kwargs)
    cls = _processor_class(files, nested, images)
    nested = nested or {}
    if cls is None or "video_processor" not in cls.get_attributes() or kwargs.get("trust_remote_code"):
        processor = transformers.AutoProcessor.from_pretrained(path, **kwargs)
    elif "video_processor" in nested and nested["video_processor"] is None:  # saved so: see `ImageOnly.to_dict`
        processor = image_only(cls).from_pretrained(path, **kwargs)
    elif not is_torchvision_available():
        logger.warning("torchvision is not installed: %s is loaded without its video part, images only", path)
        processor = image_only(cls).from_pretrained(path, **kwargs)
    elif "video_processor" in nested or files.read("video_preprocessor_config.json") is not None:
        processor = transformers.AutoProcessor.from_pretrained(path, **kwargs)
    elif images is not None:
        processor = _with_shared_settings(cls, path, images, kwargs)
    else:
        logger.warning(
            "%s has no settings for the video part of its %s (no video_processor in processor_config.json, no "
            "video_preprocessor_config.json): it is loaded without, images only",
            path,
            cls.__name__,
        )
        processor = image_only(cls).from_pretrained(path, **kwargs)
    return _with_options(_with_backend(processor, image_backend or nested.get(BACKEND), path, kwargs), kwargs)


def save_processor(processor, folder):
    """`processor.save_pretrained`, and with it what resizes its images: transformers does not write that down.

    Pillow's pixels and torchvision's differ by a level of grey here and there, and so would the scores of a model that
    is loaded where another of the two is installed.

    Args:
        processor: a processor or a tokenizer.
        folder: where to.
    """
    processor.save_pretrained(folder)
    file = Path(folder) / "processor_config.json"
    backend = backend_of(processor)
    if backend is not None and file.is_file():
        file.write_text(json.dumps(_json(file) | {BACKEND: backend}, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def backend_of(processor):
    """What resizes the images of a processor, "pil" or "torchvision"; None where there is one way only."""
    return _backend(getattr(processor, "image_processor", None))


def _backend(part):
    """ "pil" or "torchvision" for an image processor there are both of, else None."""
    import transformers

    name = type(part).__name__
    if name.endswith("Pil"):
        return "pil"
    return "torchvision" if hasattr(transformers, f"{name}Pil") else None


def _with_backend(processor, wanted, path, kwargs):
    """The processor with images resized as where it was saved."""
    import transformers

    part = getattr(processor, "image_processor", None)
    if wanted in (None, _backend(part)) or "backend" in kwargs or "use_fast" in kwargs:
        return processor
    if wanted == "pil":
        processor.image_processor = getattr(transformers, f"{type(part).__name__}Pil").from_pretrained(path, **kwargs)
    else:
        logger.warning(
            "%s was saved where torchvision resizes its images, and here Pillow does: pixels differ by a level of grey "
            "here and there, and scores a little",
            path,
        )
    return processor


class _Files:
    """The JSON files of a folder or a hub name."""

    def __init__(self, path, kwargs):
        self.path = path
        self.folder = Path(path) / (kwargs.get("subfolder") or "")
        self.where = {name: kwargs[name] for name in _WHERE if kwargs.get(name) is not None}

    def read(self, name):
        """What a JSON file holds, or None where there is none."""
        from transformers.utils import cached_file

        if Path(self.path).is_dir():
            found = self.folder / name
            return _json(found) if found.is_file() else None
        # What is missing or cannot be reached, `from_pretrained` will say.
        quiet = dict.fromkeys(("gated_repo", "missing_entries", "connection_errors"), False)
        quiet = {f"_raise_exceptions_for_{what}": value for what, value in quiet.items()}
        found = cached_file(self.path, name, **self.where, **quiet)
        return None if found is None else _json(found)


def _json(path):
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error


def _processor_class(files, nested, images):
    """The class of a processor by the files that may name it, in the order of AutoProcessor; None: not one of transformers."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

    for found in (nested, images, files.read("video_preprocessor_config.json"), files.read("tokenizer_config.json")):
        if found and found.get("processor_class"):
            return getattr(transformers, found["processor_class"], None)
    config = files.read("config.json") or {}
    name = config.get("processor_class") or PROCESSOR_MAPPING_NAMES.get(config.get("model_type"))
    return getattr(transformers, name, None) if isinstance(name, str) else None


def _video_class(cls):
    """The class of video processors that the models of a processor class have, or None where they have several."""
    import transformers
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
    from transformers.models.auto.video_processing_auto import VIDEO_PROCESSOR_MAPPING_NAMES

    models = [model for model, name in PROCESSOR_MAPPING_NAMES.items() if name == cls.__name__]
    found = [VIDEO_PROCESSOR_MAPPING_NAMES.get(model) for model in models]
    names = {name.get("torchvision") if isinstance(name, dict) else name for name in found} - {None}
    return getattr(transformers, names.pop(), None) if len(names) == 1 else None


def _with_shared_settings(cls, path, images, kwargs):
    """Both parts from the settings of images: AutoVideoProcessor guesses the class by that of the image processor."""
    import transformers

    video_class = _video_class(cls)
    if video_class is None:
        return transformers.AutoProcessor.from_pretrained(path, **kwargs)
    processor = image_only(cls).from_pretrained(path, **kwargs)
    state = dict(processor.__dict__, video_processor=video_class.from_pretrained(path, **kwargs))
    processor = cls.__new__(cls)
    processor.__dict__.update(state)
    guessed = str(images.get("image_processor_type")).removesuffix("Fast").replace("ImageProcessor", "VideoProcessor")
    if hasattr(transformers, guessed) and guessed != video_class.__name__:
        logger.warning(
            "%s has no settings for the video part of its %s: its %s takes those of images",
            path,
            cls.__name__,
            video_class.__name__,
        )
    return processor


def _with_options(processor, kwargs):
    """The processor, once each option is known to have reached a part of it."""
    tokenizer = getattr(processor, "tokenizer", processor)
    special = getattr(tokenizer, "SPECIAL_TOKENS_ATTRIBUTES", ())
    known = {"tokenizer": {*_OF_TOKENIZERS, *special, *_arguments(type(tokenizer))}}
    for name in ("image_processor", "video_processor"):
        part = getattr(processor, name, None)
        if part is not None:
            known[name] = set(getattr(getattr(part, "valid_kwargs", None), "__annotations__", ())) | set(part.to_dict())
    if tokenizer is not processor:
        known["processor"] = _arguments(type(processor)) - set(type(processor).get_attributes())
    options = [name for name in kwargs if name not in (*_WHERE, *_HOW) and not name.startswith("_")]
    unknown = [name for name in options if not any(name in names for names in known.values())]
    if unknown:
        listed = "; ".join(f"{part}: {', '.join(sorted(names))}" for part, names in known.items())
        near = difflib.get_close_matches(unknown[0], sorted(set().union(*known.values())), 3)
        raise ValueError(
            f"no part of {type(processor).__name__} knows the option {', '.join(map(repr, unknown))}: it would change "
            f"nothing{'; did you mean ' + ' or '.join(near) + '?' if near else '.'} What they know: {listed}"
        )
    return processor


def _arguments(cls):
    return set(inspect.signature(cls.__init__).parameters) - {"self", "args", "kwargs"}

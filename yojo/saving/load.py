"""Load a saved reward model exactly as it was, or not at all."""

import dataclasses
import logging
from pathlib import Path

import torch

from yojo.config import YojoConfig
from yojo.files import saved
from yojo.files.saved import (
    ADAPTER_FILE,
    ADAPTERS,
    BESIDE_FILE,
    CONFIG_FILE,
    HEAD_FILE,
    SEPARATOR_ROW,
    local_folder,
    read_description,
)
from yojo.files.whole import loaded_whole
from yojo.inputs.processors import load_processor
from yojo.patching import dates, fingerprints
from yojo.patching.devices import embedding_of
from yojo.patching.patch import patch_loaded
from yojo.saving import parts, stock
from yojo.saving.parts import active_head

logger = logging.getLogger(__name__)


def load_pretrained(
    path,
    *,
    base_model=None,
    dtype=None,
    device=None,
    fuse=None,
    probe=True,
    trainable=False,
    check_base=True,
    check_files=True,
    processor_options=None,
    model=None,
    **kwargs,
):
    """Load a folder that `save_pretrained` wrote, or a checkpoint of transformers' own Trainer with a patched model.

    Args:
        path: folder, or a hub name whose files are then downloaded.
        base_model: for an adapter, where its base model lies if not where it was when the adapter was saved.
        dtype: torch dtype of the backbone; the one it was saved in by default. The head stays float32.
        device: where the model goes; where transformers puts it (the CPU) by default.
        fuse: how the decoder layers run, as for `yojo.patch`; "auto" by default.
        probe: whether a model of a family that is not listed is tried first, as for `yojo.patch`.
        trainable: load an adapter to train it further; its weights take gradients.
        check_base: refuse a base model with other weights than the adapter was trained on. False loads it, says so in a
            warning, and scores are then another model's.
        check_files: refuse files, and a full model's weights, that are not those that were saved. False takes them as
            they are, a chat template that was changed by hand, say.
        processor_options: dict of keyword arguments for the processor, such as {"max_pixels": 1003520}; scores are then
            not those of the model as it was saved.
        model: the backbone, where it is in memory already, bare: it is patched, and its weights are compared with those that were
            saved. None reads it from where it lies.
        **kwargs: handed to the model class's `from_pretrained`, such as attn_implementation, device_map or
            quantization_config. An adapter's base model is quantized as it was in training; quantization_config=None
            loads it as it is.

    Returns:
        (patched model in eval mode, processor), the arguments of `yojo.RewardModel`.

    Raises:
        ValueError: a missing, damaged, mismatched or non-finite head or adapter; files of two different saves;
            settings this version does not know; another base model than the adapter's; files that are not a YOJO reward
            model. Nothing is ever filled with random weights.
    """
    path = local_folder(path)
    if not (path / CONFIG_FILE).is_file() and stock.is_checkpoint(path):
        if base_model is not None:
            raise ValueError(f"base_model is given, but {path} holds a full model")
        if model is not None:
            raise ValueError(
                f"model is given, but {path} is a trainer's checkpoint, which holds the value head among its weights"
            )
        options = {
            "dtype": dtype,
            "device": device,
            "fuse": fuse,
            "probe": probe,
            "processor_options": processor_options,
        }
        return stock.load(path, **options, **kwargs)
    return load_described(
        path,
        read_description(path),
        base_model,
        dtype,
        device,
        fuse,
        kwargs,
        trainable=trainable,
        probe=probe,
        checks=Checks(check_base, check_files),
        processor_options=processor_options,
        model=model,
    )


@dataclasses.dataclass(frozen=True)
class Checks:
    """What is compared with what was saved: an adapter's base model, and the folder's own files."""

    base: bool = True
    files: bool = True


@loaded_whole()
def load_described(
    path,
    description,
    base_model,
    dtype,
    device,
    fuse,
    kwargs,
    prepare=None,
    trainable=False,
    probe=True,
    checks=Checks(),  # noqa: B008, it is frozen
    processor_options=None,
    model=None,
):
    """`prepare` may change the base model before the adapter is put on it."""
    import transformers

    config = YojoConfig.from_saved(description["config"])
    head = saved.read_head(path)
    if checks.files:
        saved.check_whole(path, description)
    processor = load_processor(path, image_backend=description.get("image_backend"), **(processor_options or {}))
    model_class = getattr(transformers, description["model_class"], None)
    if model_class is None:
        raise ValueError(
            f"{path / CONFIG_FILE} names the model class {description['model_class']}, which transformers "
            f"{transformers.__version__} lacks"
        )
    source = path
    if description["adapter"]:
        source = base_model or description["base_model"]
        if not source:
            raise ValueError(f"{path} is an adapter that does not name its base model: pass base_model=...")
        if description.get("quantization") and "quantization_config" not in kwargs and model is None:
            kwargs = {**kwargs, "quantization_config": _quantization(description["quantization"])}
    else:
        if base_model is not None:
            raise ValueError(f"base_model is given, but {path} holds a full model")
        stale = next((name for name in ADAPTERS if list(path.glob(name))), None)
        if stale:
            raise ValueError(f"{path} holds a full model and {stale}, which is not its own: it would change the scores")
    if kwargs.get("quantization_config", ...) is None:
        kwargs = {name: value for name, value in kwargs.items() if name != "quantization_config"}
    if checks.files:
        saved.check_sizes(path, description)
    try:
        if model is None:
            dtype = dtype or getattr(torch, description["dtype"])
            base = model_class.from_pretrained(source, dtype=dtype, **kwargs)
        else:
            base = _given(model, model_class, path, kwargs if dtype is None else {"dtype": dtype, **kwargs})
    except OSError as error:
        if not description["adapter"] or Path(source).is_dir():
            raise
        raise ValueError(
            f"{path} is an adapter of the base model {source}, which is no folder here and cannot be fetched: say where it "
            f"lies, base_model=... ({str(error).splitlines()[0]})"
        ) from error
    if base.config.model_type != description["model_type"]:
        raise ValueError(
            f"{source} is a {base.config.model_type} model, the head was made for {description['model_type']}"
        )
    hidden_size = base.config.get_text_config().hidden_size
    if hidden_size != description["hidden_size"]:
        raise ValueError(f"the head was made for hidden size {description['hidden_size']}, {source} has {hidden_size}")
    check_weights(base, path, description, source, checks)
    if prepare is not None:
        base = prepare(base)
    dates.settle_saved(processor, description, path)
    patch_loaded(base, processor, fuse=fuse, probe=probe, **config.to_dict())
    if base.yojo.separator_id != description["separator_id"]:
        raise ValueError(
            f"the separator has id {base.yojo.separator_id} in the processor and {description['separator_id']} in "
            f"{path / CONFIG_FILE}: the tokenizer is not the one the model was saved with"
        )
    load_head(base, head, path / HEAD_FILE)
    if checks.files:
        saved.check_hashes(path, description)
    model = base
    if description["adapter"]:
        model = _with_adapter(base, path, trainable)
        _check_adapter_head(base, head, path)
        load_beside(base, path, description)  # behind the adapter, which may begin by changing what it is put on
    if device is not None:
        model.to(device)
    return model.eval(), processor


def _given(model, model_class, path, options):
    """A backbone that is in memory already, if it can be the folder's."""
    if not isinstance(model, model_class):
        raise TypeError(f"model must be a {model_class.__name__}, as {path} was made of, got {type(model).__name__}")
    if options:
        raise ValueError(f"model is in memory already: {', '.join(options)} cannot be chosen any more")
    return model


def check_weights(base, path, description, source, checks=Checks()):  # noqa: B008
    """Compare a backbone, as it was loaded, with the fingerprints that were saved."""
    described = description.get("weights")
    if not described:
        logger.debug("%s was saved without fingerprints of its weights: they are not checked", path)
        return
    own = fingerprints.tensors_of(base)
    differ, unknown = fingerprints.compare(described, fingerprints.take(own), own, _same_transformers(description))
    if differ:
        some = f"{len(differ)} of {len(described['tensors'])} weights differ: {', '.join(differ[:3])}"
        if description["adapter"]:
            text = (
                f"{path} is an adapter trained on other weights than {source} holds ({some}): with them it would score "
                "otherwise. Say where its base model lies (base_model=...), or load it all the same with check_base=False"
            )
        else:
            text = (
                f"{path} does not hold the weights it was saved with ({some}): the folder holds files of two different "
                "saves, or they were changed. Load it all the same with check_files=False"
            )
        if checks.base if description["adapter"] else checks.files:
            raise ValueError(text)
        logger.warning("%s", text)
    if unknown:
        logger.warning(
            "%s: %d of %d weights of %s cannot be compared with those it was saved with (quantized otherwise, offloaded, or "
            "named otherwise), %s among them",
            path,
            len(unknown),
            len(own),
            source,
            unknown[0],
        )


def _same_transformers(description):
    import transformers

    return description.get("made_with", {}).get("transformers") == transformers.__version__


def load_beside(base, path, description):
    """Put the weights that were trained beside an adapter into the model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    names = description.get("beside") or []
    if not names:
        return
    file = path / BESIDE_FILE
    try:
        weights = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is missing or damaged: {error}") from error
    own = fingerprints.tensors_of(base)
    wrong = sorted(set(names) ^ set(weights)) or sorted(
        name for name in names if name not in own or own[name].shape != weights[name].shape
    )
    if wrong:
        raise ValueError(f"{file} does not fit the base model and {CONFIG_FILE}: {', '.join(wrong[:3])}")
    with torch.no_grad():
        for name, tensor in weights.items():
            own[name].copy_(tensor)


def _quantization(settings):
    from transformers.quantizers.auto import AutoQuantizationConfig

    return AutoQuantizationConfig.from_dict(dict(settings))


def _with_adapter(base, path, trainable):
    """The base model with the folder's adapter, every weight of which is there."""
    from peft import PeftModel
    from peft.utils import get_peft_model_state_dict
    from safetensors import SafetensorError, safe_open

    for name in ("adapter_config.json", ADAPTER_FILE):
        if not (path / name).is_file():
            raise ValueError(f"{path} has no adapter: {name} is missing")
    try:
        with safe_open(path / ADAPTER_FILE, "pt") as file:
            found = set(file.keys())
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path / ADAPTER_FILE} is damaged: {error}") from error
    try:
        model = PeftModel.from_pretrained(base, path, is_trainable=trainable)
    except KeyError as error:
        raise ValueError(f"{path / ADAPTER_FILE} does not fit adapter_config.json: it lacks {error}") from error
    except RuntimeError as error:
        raise ValueError(f"{path / ADAPTER_FILE} does not fit the base model: {error}") from error
    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if expected != found:
        missing, extra = sorted(expected - found)[:3], sorted(found - expected)[:3]
        raise ValueError(
            f"{path / ADAPTER_FILE} does not fit adapter_config.json and the base model: missing "
            f"{missing or 'nothing'}, unknown {extra or 'nothing'}"
        )
    return model


def load_adapter(model, path):
    """Put a folder's adapter weights into a live model's adapter of the same make."""
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights = load_file(path / ADAPTER_FILE)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path / ADAPTER_FILE} is missing or damaged: {error}") from error
    name = parts.scoring_adapter(model)
    own = get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    wrong = sorted(set(own) ^ set(weights)) or sorted(n for n in own if own[n].shape != weights[n].shape)
    if wrong:
        raise ValueError(f"{path / ADAPTER_FILE} does not fit the model's adapter: {', '.join(wrong[:3])}")
    set_peft_model_state_dict(model, weights, adapter_name=name)


def _check_adapter_head(base, head, path):
    if not hasattr(base.score, "modules_to_save"):
        return
    for name, parameter in active_head(base).named_parameters():
        if not torch.equal(parameter.detach().cpu(), head[name]):
            raise ValueError(
                f"{path}: the value heads in {ADAPTER_FILE} and {HEAD_FILE} differ ({name}): the files are of two "
                "different saves"
            )


def load_head(base, head, file):
    """Put a saved head and the separator's row into a patched model; a ValueError where names or shapes do not fit."""
    parameters = dict(active_head(base).named_parameters())
    expected = {*parameters, SEPARATOR_ROW}
    if set(head) != expected:
        missing, extra = sorted(expected - set(head)), sorted(set(head) - expected)
        raise ValueError(
            f"{file} does not fit the settings in {CONFIG_FILE}: missing {missing or 'nothing'}, unknown {extra or 'nothing'}"
        )
    row = embedding_of(base).weight[base.yojo.separator_id]
    for name, parameter in (*parameters.items(), (SEPARATOR_ROW, row)):
        if head[name].shape != parameter.shape:
            raise ValueError(
                f"{file}: {name} has shape {list(head[name].shape)}, the model needs {list(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(head[name])
    if row.is_meta:  # offloaded: the copy went nowhere
        from accelerate.utils import align_module_device

        with align_module_device(base.get_input_embeddings()):
            row = embedding_of(base).weight[base.yojo.separator_id]
            if not torch.equal(row.cpu(), head[SEPARATOR_ROW].to(row.dtype)):
                raise ValueError(
                    f"{file}: the separator's embedding must be written into the model's, which is offloaded: give the "
                    "embedding a device of its own in device_map ('cpu' will do)"
                )

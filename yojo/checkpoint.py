"""Save a reward model with everything that changes its scores, and load it back exactly or not at all."""

import contextlib
import dataclasses
import json
import logging
import tempfile
from pathlib import Path

import torch

import yojo
from yojo import adapters
from yojo import card as cards
from yojo.config import YojoConfig
from yojo.files import saved
from yojo.files.folders import files_of, replaced_folder
from yojo.files.saved import (
    ADAPTER_FILE,
    ADAPTERS,
    BESIDE_FILE,
    CONFIG_FILE,
    HEAD_FILE,
    SEPARATOR_ROW,
    VERSION,
    local_folder,
    read_description,
)
from yojo.inputs.processors import backend_of, load_processor, save_processor
from yojo.patching import dates, fingerprints
from yojo.patching.devices import embedding_of
from yojo.patching.patch import patch_loaded
from yojo.patching.state import patched_base
from yojo.saving import stock

__all__ = ["import_mr2rm", "load_pretrained", "merge", "push_to_hub", "replaced_folder", "save_pretrained"]

logger = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"
_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")


def save_pretrained(reward_model, path, *, state_dict=None, card=True, provenance=None):
    """Write a reward model into a folder, whole or not at all (see `replaced_folder`).

    The folder holds the full model, or the adapter alone when PEFT wraps the model; the value head and the separator's
    embedding (`score_head.safetensors`); the processor with its chat template; a model card; and `yojo_config.json`:
    the `YojoConfig`, the backbone's class, dtype, quantization and origin, the separator's id, the date that its chat
    template prints, the versions it was made with, size or checksum of the other files, and fingerprints of the backbone's
    weights (see `yojo.patching.fingerprints`): those of an adapter's base model as it was patched, those of a full model as it is.
    An adapter is the one that is active, under whatever name; weights that were trained beside it (an unfrozen norm,
    vision tower, embedding) are saved with it, in `beside_adapter.safetensors`. An older model in the folder is replaced,
    also one of the other kind; files of others stay.

    Args:
        reward_model: a `yojo.RewardModel`.
        path: folder, made if it is missing.
        state_dict: the whole state dict of `reward_model.model`, wrappers and all, where its own parameters are shards
            (FSDP, DeepSpeed): what `accelerator.get_state_dict(model)` returns on the main process. No parameter of the
            model is read then. None reads the model's own.
        card: write README.md, a model card. One that is there and was not written by YOJO is kept.
        provenance: dict for the card: `data` (what it was trained on), `metrics` (dict of figures), `notes` (text); any
            other entry is listed by its name.

    Raises:
        TypeError, ValueError: an argument that does not fit; a state dict that lacks the head or the embedding; a
            folder in which another adapter, or a processor's file, would be loaded with the model; an adapter that is
            disabled, one of several active ones, or of a kind that adds tokens to the prompt.
        OSError: what the file system says; the folder is then as before.
    """
    path = Path(path)
    base = patched_base(reward_model.model, "save_pretrained")
    adapter = adapter_of(reward_model.model)
    if card:
        cards.check(provenance)
    refuse_own_base(reward_model.model, path)
    if state_dict is not None and adapter is None and getattr(base, "hf_quantizer", None) is not None:
        raise ValueError("a quantized model without an adapter is saved from its own weights: leave state_dict out")
    state = _plain_names((base if adapter is None else adapter).state_dict() if state_dict is None else state_dict)
    name = None if adapter is None else adapters.scoring_adapter(adapter)
    head = _head_tensors(reward_model, base, adapter, state)
    own = fingerprints.tensors_of(base)
    if state_dict is not None:
        given = {fingerprints.plain_name(key): tensor for key, tensor in state.items()}
        own = {key: given[key] for key in own if key in given}
    beside = {} if adapter is None else adapters.weights_beside(base, own)
    absent = [name for name, tensor in (head if adapter else state | head).items() if tensor.is_meta]
    if absent:
        raise ValueError(
            f"{absent[0]} and {len(absent) - 1} other weights are offloaded and cannot be saved from the model: load it "
            "without offloading (device_map=None) to save it, or pass state_dict"
        )
    known = (path / CONFIG_FILE).is_file()
    foreign = [name for name in ADAPTERS if not known and path.is_dir() and list(path.glob(name))]
    if foreign and adapter is None:
        raise ValueError(
            f"{path} holds {foreign[0]} of another model, which transformers would load on top of this one: save into a "
            "folder of its own"
        )
    with replaced_folder(path, owned=saved.owned(path), mark=CONFIG_FILE) as staging:
        if adapter is None:
            # The head goes into a file of its own, so that the folder also loads as the plain model it came from.
            save_model(base, state, staging)
        else:
            # The one row that the separator may have added is in our own file; PEFT would save the whole embedding.
            save_adapter(adapter, name, staging, None if state_dict is None else state)
        save_processor(reward_model.processor, staging)
        _write_tensors(head, staging / HEAD_FILE)
        if beside:
            _write_tensors(beside, staging / BESIDE_FILE)
        saved.refuse_strangers(path, files_of(staging))
        description = _description(reward_model, base, adapter)
        if base.yojo.date is not None:
            dates.say(description["date"])
        weights = fingerprints.take(own) if adapter is None else base.yojo.weights
        description["weights"] = fingerprints.describe(weights, left_out=len(own) - len(own.keys() & weights))
        description["beside"] = sorted(beside)
        cards.write(staging, path, description, provenance) if card else cards.leave_out(staging)
        _write_description(description, staging)


def refuse_own_base(model, path):
    """Raise a ValueError where an adapter is to be saved into the very folder that holds its base model."""
    adapter = adapter_of(model)
    source = None if adapter is None else patched_base(model, "save_pretrained").config.name_or_path
    if source and Path(source).is_dir() and Path(source).resolve() == Path(path).resolve():
        raise ValueError(
            f"{path} holds the base model of this adapter, and saving the adapter there would remove it: take another folder"
        )


def save_model(base, state, folder):
    """Write the backbone alone, as the plain model it came from; a quantizer gathers its own state dict."""
    ignored = base._keys_to_ignore_on_save
    base._keys_to_ignore_on_save = {
        *(ignored or ()),
        *(name for name in base.state_dict() if name.startswith("score.")),
    }
    try:
        with _unchecked_generation(base):
            base.save_pretrained(folder, state_dict=dict(state))
    finally:
        base._keys_to_ignore_on_save = ignored


@contextlib.contextmanager
def _unchecked_generation(base):
    """transformers loads a generation_config.json that it calls invalid, but writes none: a reward model never generates."""
    settings = getattr(base, "generation_config", None)
    if settings is None:
        yield
        return
    base.generation_config = _AsItIs(settings)
    try:
        yield
    finally:
        base.generation_config = settings


class _AsItIs:
    """Generation settings that are written although they make no sense."""

    def __init__(self, settings):
        self._settings = settings

    def __getattr__(self, name):
        return getattr(self._settings, name)

    def save_pretrained(self, folder, *args, **kwargs):
        try:
            self._settings.save_pretrained(folder, *args, **kwargs)
        except ValueError as error:
            logger.debug("generation_config.json is written as it is: %s", error)
            self._settings.to_json_file(Path(folder) / GENERATION_FILE, use_diff=True)


def save_adapter(adapter, name, staging, state=None):
    """Write one adapter into a folder as PEFT's "default" one, which is what loads without its name."""
    adapter.save_pretrained(staging, selected_adapters=[name], state_dict=state, save_embedding_layers=False)
    below = staging / name
    if name != "default":
        for file in below.iterdir():
            file.rename(staging / file.name)
        below.rmdir()


def _write_tensors(tensors, file):
    from safetensors.torch import save_file

    save_file({name: t.detach().to("cpu", copy=True).contiguous() for name, t in tensors.items()}, file)


def _write_description(description, staging):
    description["files"] = {name: saved.fingerprint(staging / name) for name in files_of(staging)}
    (staging / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")


def _description(reward_model, base, adapter):
    import transformers

    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return {
        "version": VERSION,
        "config": base.yojo.config.to_dict(),
        # FSDP makes a class of its own, which inherits from transformers'.
        "model_class": next(
            (c.__name__ for c in type(base).__mro__ if getattr(transformers, c.__name__, None) is c),
            type(base).__name__,
        ),
        "model_type": base.config.model_type,
        "adapter": adapter is not None,
        "base_model": base.config.name_or_path or None,
        "quantization": quantization,
        "hidden_size": base.config.get_text_config().hidden_size,
        "separator_id": reward_model.collator.separator_id,
        "dtype": str(base.dtype).removeprefix("torch."),
        "image_backend": backend_of(reward_model.processor),
        "date": None if base.yojo.date is None else base.yojo.date.isoformat(),
        "made_with": {
            "yojo": yojo.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _plain_names(state):
    """A state dict without the names that torch.compile, FSDP and DistributedDataParallel put into it."""
    if not hasattr(state, "items"):
        raise TypeError(f"state_dict must be a dict of tensors, got {type(state).__name__}")
    plain = {}
    for name, tensor in state.items():
        for wrapper in _WRAPPERS:
            name = name.replace(wrapper, "")
        while name.startswith("module."):
            name = name.removeprefix("module.")
        plain[name] = tensor
    return plain


def _head_tensors(reward_model, base, adapter, state):
    """The value head (float32) and the separator's row of the embedding, from a state dict."""
    prefix = "" if adapter is None else "base_model.model."
    active = "" if not hasattr(base.score, "modules_to_save") else f"modules_to_save.{base.score.active_adapter}."
    modules = dict(base.named_modules())
    head = base.score.modules_to_save[base.score.active_adapter] if active else base.score
    tensors = {}
    for name, _ in head.named_parameters():
        key = f"{prefix}score.{active}{name}"
        if key not in state:
            raise ValueError(f"state_dict has no value head: {key} is missing; it must be that of the whole model")
        tensors[name] = state[key].float()
    embedding = next(name for name, module in modules.items() if module is base.get_input_embeddings())
    below = ("", "base_layer.", "original_module.", "token_adapter.base_layer.")
    keys = [f"{prefix}{embedding}.{part}weight" for part in below]
    key = next((key for key in keys if key in state), None)
    if key is None:
        raise ValueError(f"state_dict has no embedding: {keys[0]} is missing; it must be that of the whole model")
    if state[key].ndim != 2:
        raise ValueError(
            f"state_dict holds a shard: {key} has shape {list(state[key].shape)}; gather the whole model's, as "
            "accelerator.get_state_dict(model) does"
        )
    tensors[SEPARATOR_ROW] = state[key][reward_model.collator.separator_id]
    return tensors


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
        options = {
            "dtype": dtype,
            "device": device,
            "fuse": fuse,
            "probe": probe,
            "processor_options": processor_options,
        }
        return stock.load(path, **options, **kwargs)
    return _load(
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
    )


@dataclasses.dataclass(frozen=True)
class Checks:
    """What is compared with what was saved: an adapter's base model, and the folder's own files."""

    base: bool = True
    files: bool = True


def _load(
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
        if description.get("quantization") and "quantization_config" not in kwargs:
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
    dtype = dtype or getattr(torch, description["dtype"])
    try:
        base = model_class.from_pretrained(source, dtype=dtype, **kwargs)
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
    name = adapters.scoring_adapter(model)
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


def push_to_hub(reward_model, repo_id, *, private=None, token=None, commit_message=None, **options):
    """Save into a temporary folder and upload it to the hub; the repository is made if it is missing.

    Args:
        reward_model: a `yojo.RewardModel`.
        repo_id: "name/repository".
        private: whether a new repository is private; the account's default by default.
        token: a hub token; the one that is logged in by default.
        commit_message: of the upload.
        **options: of `save_pretrained`, such as provenance.

    Returns:
        What `huggingface_hub.HfApi.upload_folder` returns.
    """
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as folder:
        save_pretrained(reward_model, Path(folder, "model"), **options)
        api.create_repo(repo_id, private=private, repo_type="model", exist_ok=True)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=str(Path(folder, "model")),
            repo_type="model",
            commit_message=commit_message or "Upload a YOJO reward model",
        )


def merge(path, out, *, base_model=None, device=None, check_base=True, check_files=True):
    """Make a full model out of a saved adapter: the same scores within rounding, and no adapter needed to load it.

    Weights are merged in float32 and then cast to the dtype the model was saved in. A quantized base model is
    dequantized first, since the adapter was trained on what the quantized weights stand for.

    Args:
        path: folder or hub name of a reward model that `save_pretrained` wrote with an adapter.
        out: folder for the full model.
        base_model: where the base model lies, if not where it was when the adapter was saved.
        device: where to merge; the CPU by default.
        check_base, check_files: as for `load_pretrained`.

    Returns:
        The merged `yojo.RewardModel`.

    Raises:
        ValueError: a folder that holds no adapter, or none that fits (see `load_pretrained`).
    """
    reward_model = merged(path, base_model=base_model, device=device, check_base=check_base, check_files=check_files)
    save_pretrained(reward_model, out, provenance={"merged from": Path(path).name})
    return reward_model


def merged(path, *, base_model=None, device=None, check_base=True, check_files=True):
    """What `merge` saves, in memory alone."""
    path = local_folder(path)
    description = read_description(path)
    if not description["adapter"]:
        raise ValueError(f"{path} holds a full model already: there is no adapter to merge")
    quantized = description.get("quantization")

    def prepare(base):
        if not quantized:
            return base
        logger.warning("the base model is dequantized from %s to be merged", quantized.get("quant_method"))
        return base.dequantize().float()

    checks = Checks(check_base, check_files)
    model, processor = _load(path, description, base_model, torch.float32, device, None, {}, prepare, checks=checks)
    base = model.merge_and_unload(safe_merge=True)
    dtype = getattr(torch, description["dtype"])
    for name, parameter in base.named_parameters():
        if not name.startswith("score.") and parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
        parameter.requires_grad_(True)
    for config in {id(c): c for c in (base.config, base.config.get_text_config())}.values():
        config.dtype = dtype
    return yojo.RewardModel(base.eval(), processor)


def import_mr2rm(path, out=None, **options):
    """Make a reward model out of a checkpoint of the paper's released code; see `yojo.released.import_mr2rm`."""
    from yojo.released import import_mr2rm

    return import_mr2rm(path, out, **options)


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


def active_head(base):
    """The value head that scores: PEFT's trained copy where `modules_to_save` made one."""
    head = base.score
    return head.modules_to_save[head.active_adapter] if hasattr(head, "modules_to_save") else head


def adapter_of(model):
    """The PEFT model inside torch.compile and DistributedDataParallel, or None."""
    while True:
        if hasattr(model, "_orig_mod"):  # first, since a compiled model has all attributes of the one inside
            model = model._orig_mod
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            return model
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return None

"""Save a reward model with everything that changes its scores."""

import contextlib
import json
import logging
import tempfile
from pathlib import Path

import torch

from yojo import __version__
from yojo.files import saved
from yojo.files.folders import files_of, replaced_folder
from yojo.files.saved import (
    ADAPTERS,
    BESIDE_FILE,
    CONFIG_FILE,
    HEAD_FILE,
    SEPARATOR_ROW,
    VERSION,
)
from yojo.inputs.processors import backend_of, save_processor
from yojo.patching import dates, fingerprints
from yojo.patching.state import patched_base
from yojo.saving import card as cards
from yojo.saving import known_scores, parts
from yojo.saving.parts import adapter_of

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
    It holds some fixed examples with the scores that the model gives them, too (see `yojo.saving.known_scores`), but where
    `state_dict` is given, or they cannot be scored: that takes a pass, changes nothing of the model, and is never an error.
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
    name = None if adapter is None else parts.scoring_adapter(adapter)
    head = _head_tensors(reward_model, base, adapter, state)
    own = fingerprints.tensors_of(base)
    if state_dict is not None:
        given = {fingerprints.plain_name(key): tensor for key, tensor in state.items()}
        own = {key: given[key] for key in own if key in given}
    beside = {} if adapter is None else parts.weights_beside(base, own)
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
        description[known_scores.KEY] = known_scores.take(reward_model, state_dict)
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
            "yojo": __version__,
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

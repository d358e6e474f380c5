"""What the folder of a saved reward model holds, and whether it is whole."""

import contextlib
import fnmatch
import hashlib
import json
from pathlib import Path

import torch

CONFIG_FILE = "yojo_config.json"
HEAD_FILE = "score_head.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
BESIDE_FILE = "beside_adapter.safetensors"  # weights that were trained beside the adapter
SEPARATOR_ROW = "separator_embedding"
VERSION = 1
CARD_FILE = "README.md"
CARD_SIGN = "<!-- written by yojo: remove this line to keep your own text -->"  # in a card that may be replaced
BACKEND = "image_backend"  # in processor_config.json: what resizes images, see `yojo.inputs.processors.save_processor`

# Files of a model folder that a later save may remove: left behind, they would be loaded with the new ones.
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "*.safetensors.index.json", "pytorch_model*")
ADAPTERS = ("adapter_model*", "adapter_config.json")
_OURS = (CONFIG_FILE, HEAD_FILE, *_WEIGHTS, *ADAPTERS, "config.json", "generation_config.json")
_ALL_THE_SAME = "if that is meant, load it with check_files=False"
# Files that may be changed: no score depends on them. All others may not, since with another one a score means nothing;
# of a model's weights the size is checked here, and the values once they are loaded (see `yojo.patching.fingerprints`).
_FREE = (CARD_FILE, "generation_config.json")
# Files that transformers would read beside those that were saved.
_READ = (
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *(
        "chat_template.jinja",
        "chat_template.json",
        "additional_chat_templates/*",
        "vocab.json",
        "vocab.txt",
        "merges.txt",
    ),
    *(
        "processor_config.json",
        "preprocessor_config.json",
        "video_preprocessor_config.json",
        "spiece.model",
        "tekken.json",
    ),
)


def has_foreign_card(folder):
    """Whether a folder has a README.md that YOJO did not write."""
    file = Path(folder) / CARD_FILE
    return file.is_file() and CARD_SIGN not in file.read_text(errors="replace")


def owned(path):
    """Function name -> whether a file of this folder was written by an earlier save."""
    try:
        description = json.loads((path / CONFIG_FILE).read_text())
        names = {*description.get("files", ()), CONFIG_FILE}
    except (OSError, ValueError, AttributeError):
        return lambda name: False
    patterns = () if description.get("files") else _OURS
    keeps_card = has_foreign_card(path)

    def owned(name):
        if name == CARD_FILE:
            return not keeps_card
        return name in names or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    return owned


def fingerprint(file):
    """Size of a file, and its SHA-256 where no other content would do."""
    found = {"size": file.stat().st_size}
    if not _is_weights(file.name) and file.name not in _FREE:
        found["sha256"] = _sha256(file)
    return found


def _sha256(file):
    if file.name == "processor_config.json":  # what resizes images stands in the description, too
        with contextlib.suppress(ValueError, AttributeError):
            settings = json.loads(file.read_text())
            settings.pop(BACKEND, None)  # which `processor.save_pretrained` into the same folder leaves out
            return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    digest = hashlib.sha256()
    with file.open("rb") as handle:
        while chunk := handle.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _is_weights(name):
    return any(fnmatch.fnmatch(name, pattern) for pattern in _WEIGHTS if not pattern.endswith(".json"))


def strangers(path, names):
    """Files of a folder that a processor would be read from, but for those of these names."""
    found = {file.relative_to(path).as_posix() for pattern in _READ for file in path.glob(pattern)}
    return sorted(found - set(names))


def refuse_strangers(path, names):
    """A ValueError where a folder holds processor files of others that a save of these names would leave there."""
    was_saved = owned(path)
    left = [name for name in strangers(path, names) if not was_saved(name)] if path.is_dir() else []
    if left:
        raise ValueError(
            f"{path} holds {left[0]} of another model, which would be read with this one: save into a folder of its own"
        )


def local_folder(path):
    """The folder of a path, or of a hub name whose files are then downloaded."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        raise ValueError(f"no such folder: {path}")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path)))
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path} is no folder here, and cannot be fetched from the hub: {str(error).strip().splitlines()[0]}"
        ) from error


def read_description(path):
    file = path / CONFIG_FILE
    if not file.is_file() and (path / "reward_model_config.json").is_file():
        raise ValueError(
            f"{path} is a checkpoint of the paper's released code: `yojo import {path} --out FOLDER` makes one of ours"
        )
    if not file.is_file() and (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} is an adapter that PEFT saved, which says nothing of how its base model was patched (it has no {CONFIG_FILE}): "
            "yojo.patch the base model with the options of the training run, put the adapter on it "
            "(PeftModel.from_pretrained), and save it with yojo.RewardModel(model, processor).save_pretrained"
        )
    if not file.is_file():
        raise ValueError(
            f"{path} is no YOJO reward model: it has no {CONFIG_FILE} (RewardModel.save_pretrained makes one)"
        )
    try:
        description = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    needed = ("version", "config", "model_class", "model_type", "adapter", "hidden_size", "separator_id", "dtype")
    missing = [name for name in needed if name not in description] if isinstance(description, dict) else needed
    if missing:
        raise ValueError(f"{file} is damaged: it lacks {', '.join(missing)}")
    if description["version"] != VERSION:
        raise ValueError(f"{file} has version {description['version']}, this YOJO reads version {VERSION}")
    return description


def read_head(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / HEAD_FILE
    if not file.is_file():
        raise ValueError(f"{path} has no value head: {HEAD_FILE} is missing, and a random head would score at random")
    try:
        head = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    for name, tensor in head.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {name} has weights that are not finite (NaN or infinity)")
    return head


def check_whole(path, description):
    """A ValueError where a file that a score depends on is missing: transformers would do without, or ask the hub for it."""
    for name, known in (description.get("files") or {}).items():
        if (_is_weights(name) or "sha256" in known) and not (path / name).is_file():
            raise ValueError(f"{path} is not whole: {name} is missing")


def check_sizes(path, description):
    """A ValueError where a file of weights has another size than was saved."""
    for name, known in (description.get("files") or {}).items():
        if _is_weights(name) and (size := (path / name).stat().st_size) != known["size"]:
            raise ValueError(
                f"{path / name} is damaged or of another save: it has {size} bytes, {CONFIG_FILE} names {known['size']}"
            )


def check_hashes(path, description):
    """A ValueError where a file that a score depends on is missing, changed, or not of this save."""
    check_whole(path, description)
    files = description.get("files") or {}
    for name, known in files.items():
        if "sha256" in known and _sha256(path / name) != known["sha256"]:
            raise ValueError(
                f"{path / name} is not the file that {CONFIG_FILE} was written with: it was changed, or the folder holds "
                f"files of two different saves ({_ALL_THE_SAME})"
            )
    extra = strangers(path, files) if files else []
    if extra:
        raise ValueError(f"{path / extra[0]} was not there when the model was saved ({_ALL_THE_SAME})")

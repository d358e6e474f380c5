"""What the folder of a saved reward model holds, and whether it is whole."""

import fnmatch
import hashlib
import json
from pathlib import Path

import torch

from yojo import card

CONFIG_FILE = "yojo_config.json"
HEAD_FILE = "score_head.safetensors"
ADAPTER_FILE = "adapter_model.safetensors"
SEPARATOR_ROW = "separator_embedding"
VERSION = 1

# Files of a model folder that a later save may remove: left behind, they would be loaded with the new ones.
_WEIGHTS = ("model.safetensors", "model-*.safetensors", "*.safetensors.index.json", "pytorch_model*")
ADAPTERS = ("adapter_model*", "adapter_config.json")
_OURS = (CONFIG_FILE, HEAD_FILE, *_WEIGHTS, *ADAPTERS, "config.json", "generation_config.json")
# Files that must not have been changed since: with another one a score means nothing.
_HASHED = (HEAD_FILE, ADAPTER_FILE, "tokenizer.json", "chat_template.jinja")


def owned(path):
    """Function name -> whether a file of this folder was written by an earlier save."""
    try:
        description = json.loads((path / CONFIG_FILE).read_text())
        names = {*description.get("files", ()), CONFIG_FILE}
    except (OSError, ValueError, AttributeError):
        return lambda name: False
    patterns = () if description.get("files") else _OURS
    keeps_card = card.is_foreign(path)

    def owned(name):
        if name == card.FILE:
            return not keeps_card
        return name in names or any(fnmatch.fnmatch(name, pattern) for pattern in patterns)

    return owned


def fingerprint(file):
    """Size of a file, and its SHA-256 where no other content would do."""
    found = {"size": file.stat().st_size}
    if file.name in _HASHED:
        digest = hashlib.sha256()
        with file.open("rb") as handle:
            while chunk := handle.read(1 << 20):
                digest.update(chunk)
        found["sha256"] = digest.hexdigest()
    return found


def local_folder(path):
    """The folder of a path, or of a hub name whose files are then downloaded."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        raise ValueError(f"no such folder: {path}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path)))


def read_description(path):
    file = path / CONFIG_FILE
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


def check_sizes(path, description):
    for name, known in (description.get("files") or {}).items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in _WEIGHTS):
            continue
        size = (path / name).stat().st_size if (path / name).is_file() else None
        if size is None:
            raise ValueError(f"{path} is not whole: {name} is missing")
        if size != known["size"]:
            raise ValueError(
                f"{path / name} is damaged or of another save: it has {size} bytes, {CONFIG_FILE} names {known['size']}"
            )


def check_hashes(path, description):
    for name, known in (description.get("files") or {}).items():
        if "sha256" in known and (path / name).is_file() and fingerprint(path / name) != known:
            raise ValueError(
                f"{path / name} is not the file that {CONFIG_FILE} was written with: it was changed, or the folder holds "
                "files of two different saves"
            )

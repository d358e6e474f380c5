"""Save a reward model with everything that changes its scores, and load it back exactly or not at all."""

import json
import logging
from pathlib import Path

import torch

import yojo
from yojo.config import YojoConfig
from yojo.patch import patch, patched_base, unwrap
from yojo.processors import load_processor

logger = logging.getLogger(__name__)

CONFIG_FILE = "yojo_config.json"
HEAD_FILE = "score_head.safetensors"
HEAD_NAMES = ("weight1", "bias1", "weight2", "bias2")
SEPARATOR_ROW = "separator_embedding"
VERSION = 1


def save_pretrained(reward_model, path):
    """Write a reward model into a folder.

    The folder holds the full model, or the adapter alone when PEFT wraps the model; the value head and the separator's
    embedding (`score_head.safetensors`); the processor with its chat template; and `yojo_config.json`: the
    `YojoConfig`, the backbone's class, dtype and origin, the separator's id and the versions it was made with.

    Args:
        reward_model: a `yojo.RewardModel`.
        path: folder, made if it is missing.
    """
    import transformers
    from safetensors.torch import save_file

    path = Path(path)
    if path.is_file():
        raise ValueError(f"path must be a folder, {path} is a file")
    path.mkdir(parents=True, exist_ok=True)
    base = patched_base(reward_model.model, "save_pretrained")
    adapter = _peft_model(reward_model.model)
    if adapter is None:
        # The head goes into a file of its own, so that the folder also loads as the plain model it came from.
        weights = {name: tensor for name, tensor in base.state_dict().items() if not name.startswith("score.")}
        base.save_pretrained(path, state_dict=weights)
    else:
        # The one row that the separator may have added is in our own file; PEFT would save the whole embedding.
        adapter.save_pretrained(path, save_embedding_layers=False)
    reward_model.processor.save_pretrained(path)
    tensors = {name: tensor for name, tensor in _active_head(base).named_parameters()}
    separator_id = reward_model.collator.separator_id
    tensors[SEPARATOR_ROW] = _embedding_weight(base)[separator_id]
    save_file({name: t.detach().to("cpu").contiguous() for name, t in tensors.items()}, path / HEAD_FILE)
    description = {
        "version": VERSION,
        "config": base.yojo.config.to_dict(),
        "model_class": type(base).__name__,
        "model_type": base.config.model_type,
        "adapter": adapter is not None,
        "base_model": base.config.name_or_path or None,
        "hidden_size": base.config.get_text_config().hidden_size,
        "separator_id": separator_id,
        "dtype": str(base.dtype).removeprefix("torch."),
        "made_with": {
            "yojo": yojo.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    (path / CONFIG_FILE).write_text(json.dumps(description, indent=2) + "\n")


def load_pretrained(path, *, base_model=None, dtype=None, device=None, fuse=None, **kwargs):
    """Load a folder that `save_pretrained` wrote.

    Args:
        path: folder, or a hub name whose files are then downloaded.
        base_model: for an adapter, where its base model lies if not where it was when the adapter was saved.
        dtype: torch dtype of the backbone; the one it was saved in by default. The head stays float32.
        device: where the model goes; where transformers puts it (the CPU) by default.
        fuse: how the decoder layers run, as for `yojo.patch`; "auto" by default.
        **kwargs: handed to the model class's `from_pretrained`, such as attn_implementation or device_map.

    Returns:
        (patched model in eval mode, processor), the arguments of `yojo.RewardModel`.

    Raises:
        ValueError: a missing, damaged, mismatched or non-finite head; settings this version does not know; files that
            are not a YOJO reward model. Nothing is ever filled with random weights.
    """
    import transformers

    path = local_folder(path)
    description = _read_description(path)
    config = YojoConfig.from_dict(description["config"])
    head = _read_head(path)
    processor = load_processor(path)
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
    elif base_model is not None:
        raise ValueError(f"base_model is given, but {path} holds a full model")
    dtype = dtype or getattr(torch, description["dtype"])
    base = model_class.from_pretrained(source, dtype=dtype, **kwargs)
    if base.config.model_type != description["model_type"]:
        raise ValueError(
            f"{source} is a {base.config.model_type} model, the head was made for {description['model_type']}"
        )
    hidden_size = base.config.get_text_config().hidden_size
    if hidden_size != description["hidden_size"]:
        raise ValueError(f"the head was made for hidden size {description['hidden_size']}, {source} has {hidden_size}")
    patch(base, processor, fuse=fuse, **config.to_dict())
    if base.yojo.separator_id != description["separator_id"]:
        raise ValueError(
            f"the separator has id {base.yojo.separator_id} in the processor and {description['separator_id']} in "
            f"{path / CONFIG_FILE}: the tokenizer is not the one the model was saved with"
        )
    _load_head(base, head, path / HEAD_FILE)
    model = base
    if description["adapter"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(base, path)
    if device is not None:
        model.to(device)
    return model.eval(), processor


def local_folder(path):
    """The folder of a path, or of a hub name whose files are then downloaded."""
    if Path(path).is_dir():
        return Path(path)
    if Path(path).exists() or str(path).startswith((".", "/", "~")) or str(path).count("/") > 1:
        raise ValueError(f"no such folder: {path}")
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(str(path)))


def _read_description(path):
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


def _read_head(path):
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


def _load_head(base, head, file):
    parameters = dict(base.score.named_parameters())
    expected = {*parameters, SEPARATOR_ROW}
    if set(head) != expected:
        missing, extra = sorted(expected - set(head)), sorted(set(head) - expected)
        raise ValueError(
            f"{file} does not fit the settings in {CONFIG_FILE}: missing {missing or 'nothing'}, unknown {extra or 'nothing'}"
        )
    row = _embedding_weight(base)[base.yojo.separator_id]
    for name, parameter in (*parameters.items(), (SEPARATOR_ROW, row)):
        if head[name].shape != parameter.shape:
            raise ValueError(
                f"{file}: {name} has shape {list(head[name].shape)}, the model needs {list(parameter.shape)}"
            )
        with torch.no_grad():
            parameter.copy_(head[name])


def _embedding_weight(base):
    """The embedding's own rows, below whatever PEFT lays over them."""
    embedding = base.get_input_embeddings()
    while hasattr(embedding, "base_layer") or hasattr(embedding, "original_module"):
        embedding = embedding.base_layer if hasattr(embedding, "base_layer") else embedding.original_module
    return embedding.weight


def _active_head(base):
    """The value head that scores: PEFT's trained copy where `modules_to_save` made one."""
    head = base.score
    return head.modules_to_save[head.active_adapter] if hasattr(head, "modules_to_save") else head


def _peft_model(model):
    while model is not None:
        if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            return model
        model = getattr(model, "_orig_mod", None) or (model.module if unwrap(model) is not model else None)
    return None

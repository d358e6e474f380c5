"""Checkpoints of the paper's released code: read into reward models of ours, and written from them.

Its layout: a PEFT adapter folder or a merged model, `value_head.pt` and `reward_model_config.json`. Adapters trained on
Molmo2's remote code name fused projections, which transformers' own Molmo2 keeps apart.
"""

import json
import logging
import re
from pathlib import Path

import torch

from yojo.config import CHOICES
from yojo.families.molmo2 import REMOTE_EMBEDDINGS, REMOTE_LAYER, REMOTE_PARTS
from yojo.files.folders import replaced_folder
from yojo.files.saved import local_folder
from yojo.inputs.processors import load_processor, save_processor
from yojo.patching import dates, recorded
from yojo.patching.devices import embedding_of
from yojo.patching.patch import patch
from yojo.patching.separator import folded
from yojo.patching.state import patched_base, separator_id_of, tokenizer_of
from yojo.reward_model import RewardModel
from yojo.saving.parts import active_head, adapter_of
from yojo.saving.save import save_model

logger = logging.getLogger(__name__)

SEPARATOR = "<|resp_sep|>"
HEAD_FILE = "value_head.pt"
CONFIG_FILE = "reward_model_config.json"
ADAPTER_FILE = "adapter_model.safetensors"
HEADS = {
    "linear": {"weight": "weight2", "bias": "bias2"},
    "mlp": {"0.weight": "weight1", "0.bias": "bias1", "2.weight": "weight2", "2.bias": "bias2"},
}
POOLINGS = tuple(name for name in CHOICES["pooling"] if name != "separator")

_PREFIX = "base_model.model."


def import_mr2rm(path, out=None, *, base_model=None, scale_scores=True, dtype=None):
    """Make a reward model out of a checkpoint of the paper's released code.

    Args:
        path: its folder, or a hub name: an adapter folder or a merged model, with `value_head.pt` and
            `reward_model_config.json`.
        out: folder to save the reward model in, or None.
        base_model: for an adapter, where its base model lies if not where adapter_config.json says.
        scale_scores: whether the checkpoint divides scores by sqrt(H). The released code does so by default and does
            not record it.
        dtype: torch dtype of the backbone; the one of its files by default.

    Returns:
        `yojo.RewardModel` with `format="mr2rm"`.

    Raises:
        ValueError: a file that is missing or damaged, a head that does not fit, tensors that have no place in the
            model (they are named), an embedding of the separator that nobody knows.
    """
    name = Path(path).name if Path(path).is_dir() else str(path)
    path = local_folder(path)
    options, head = _read_head(path)
    is_adapter = (path / "adapter_config.json").is_file()
    if not is_adapter and not (path / "config.json").is_file():
        nested = sorted(folder.name for folder in path.glob("checkpoint-*") if folder.is_dir())
        hint = f"; it has {', '.join(nested)}: import one of them" if nested else ""
        raise ValueError(f"{path} holds neither an adapter (adapter_config.json) nor a model (config.json){hint}")
    if is_adapter:
        adapter, settings = _read_adapter(path)
        source = base_model or settings.get("base_model_name_or_path")
        if not source:
            raise ValueError(f"{path} is an adapter that does not name its base model: pass base_model=...")
    elif base_model is not None:
        raise ValueError(f"base_model is given, but {path} holds a merged model")
    else:
        source = path
    model = _load_base(source, dtype)
    processor = _load_processor(path, source)
    tokenizer = tokenizer_of(processor)
    if separator_id_of(tokenizer, SEPARATOR) is None:
        from tokenizers import AddedToken

        tokenizer.add_tokens([AddedToken(SEPARATOR, special=True, normalized=False)], special_tokens=True)
    separator_id = separator_id_of(tokenizer, SEPARATOR)
    rows = None
    if is_adapter:
        rows = _take_embeddings(adapter, model, separator_id, path)
        adapter, settings = _converted(adapter, settings, model)
    elif separator_id >= model.get_input_embeddings().weight.shape[0]:
        raise ValueError(
            f"{path}: the separator has id {separator_id}, but the merged model's embedding has "
            f"{model.get_input_embeddings().weight.shape[0]} rows"
        )
    row = _separator_row(model, separator_id, rows, path)
    recorded.forget(model)
    patch(model, processor, format="mr2rm", scale_scores=scale_scores, **options)
    with torch.no_grad():
        model.get_input_embeddings().weight[separator_id] = row
        for name, parameter in model.score.named_parameters():
            if name == "separator_delta":  # what was trained of the separator is in the row itself
                continue
            if head[name].shape != parameter.shape:
                raise ValueError(
                    f"{path / HEAD_FILE}: {name} has shape {list(head[name].shape)}, the model and {CONFIG_FILE} need "
                    f"{list(parameter.shape)}"
                )
            parameter.copy_(head[name])
    model.config.name_or_path = str(source)
    if is_adapter:
        model = _with_adapter(model, adapter, settings, path)
    reward_model = RewardModel(model.eval(), processor)
    if out is not None:
        reward_model.save_pretrained(out, provenance={"imported from": f"{name}, a checkpoint of mr2rm"})
    return reward_model


# ---- reading ----


def _read_json(file, what):
    if not file.is_file():
        raise ValueError(f"{file.parent} has no {file.name}, {what}")
    try:
        found = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file} is damaged: it holds no object")
    return found


def _read_head(path):
    """(options of `YojoConfig`, dict name in `ScoreHead` -> float32 tensor)."""
    config = _read_json(path / CONFIG_FILE, "which says what the value head is and what it reads")
    kind, pooling = config.get("value_head_type"), config.get("resp_repr_mode")
    for name, value, choices in (("value_head_type", kind, tuple(HEADS)), ("resp_repr_mode", pooling, POOLINGS)):
        if value not in choices:
            raise ValueError(f"{path / CONFIG_FILE}: {name} must be one of {', '.join(choices)}, got {value!r}")
    options = {"head": kind, "pooling": pooling}
    file = path / HEAD_FILE
    if not file.is_file():
        raise ValueError(f"{path} has no value head: {HEAD_FILE} is missing, and a random head would score at random")
    try:
        state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises whatever pickle and zip do
        raise ValueError(f"{file} is damaged, or holds more than tensors: {error}") from error
    if not isinstance(state, dict) or set(state) != set(HEADS[kind]):
        names = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{file}: a head of type {kind} has {sorted(HEADS[kind])}, found {names}")
    head = {ours: state[theirs].float() for theirs, ours in HEADS[kind].items()}
    for name, tensor in head.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{file}: {name} has weights that are not finite (NaN or infinity)")
    if kind == "mlp":
        activation = str(config.get("value_head_activation", "selu")).lower()
        if activation not in CHOICES["activation"]:
            raise ValueError(
                f"{path / CONFIG_FILE}: value_head_activation must be one of {', '.join(CHOICES['activation'])}, got "
                f"{activation!r}"
            )
        wanted = config.get("value_head_hidden_dim")
        if wanted not in (None, head["weight1"].shape[0]):
            raise ValueError(
                f"{path / CONFIG_FILE} says value_head_hidden_dim {wanted}, {HEAD_FILE} has {head['weight1'].shape[0]}"
            )
        options.update(activation=activation, head_dim=head["weight1"].shape[0])
    return options, head


def _read_adapter(path):
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    settings = _read_json(path / "adapter_config.json", "the adapter's settings")
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"{path} holds a {settings.get('peft_type')} adapter; the released code makes LORA ones")
    file = path / ADAPTER_FILE
    try:
        if file.is_file():
            return load_file(file), settings
        if (path / "adapter_model.bin").is_file():
            return torch.load(path / "adapter_model.bin", map_location="cpu", weights_only=True), settings
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{path} has a damaged adapter: {error}") from error
    raise ValueError(f"{path} has no adapter: {ADAPTER_FILE} is missing")


def _load_base(source, dtype):
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
    except (ValueError, KeyError) as error:
        raise ValueError(
            f"{source}: transformers {transformers.__version__} itself does not know this model, and its remote code is "
            f"not run: {error}"
        ) from error
    is_multimodal = type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING
    auto = transformers.AutoModelForImageTextToText if is_multimodal else transformers.AutoModelForCausalLM
    model, report = auto.from_pretrained(
        source, config=config, dtype=dtype or "auto", trust_remote_code=False, output_loading_info=True
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if report[kind]:
            names = sorted(map(str, report[kind]))
            raise ValueError(
                f"{source} does not fit transformers' {type(model).__name__}: {kind.replace('_', ' ')} "
                f"{', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            )
    return model


def _load_processor(path, source):
    for folder in dict.fromkeys((path, source)):
        has = [(Path(folder) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")]
        if any(has) or not Path(folder).is_dir():
            return load_processor(folder)
    raise ValueError(f"neither {path} nor the base model {source} has a tokenizer")


# ---- the adapter ----


def _take_embeddings(adapter, model, separator_id, path):
    """Take the embeddings out of an adapter's tensors: [rows, H], or None where it holds none.

    They were not trained, so all rows but the separator's must be the base model's; so must the output embedding.
    """
    weight = model.get_input_embeddings().weight
    name = _embedding_name(model)
    found = [adapter.pop(_PREFIX + key) for key in REMOTE_EMBEDDINGS if _PREFIX + key in adapter]
    for key in (f"{name}.weight", f"{name}.base_layer.weight"):
        if _PREFIX + key in adapter:
            found = [adapter.pop(_PREFIX + key)]
    outputs = adapter.pop(f"{_PREFIX}lm_head.weight", None)
    rows = torch.cat(found) if found else None
    pairs = [("embedding", rows, weight)]
    if model.get_output_embeddings() is not None:
        pairs.append(("output embedding", outputs, model.get_output_embeddings().weight))
    for what, given, own in pairs:
        if given is None:
            continue
        count = min(len(given), len(own))
        same = (given[:count] == own[:count].to(given.dtype)).all(dim=1)
        if separator_id < count:
            same[separator_id] = True
        if not same.all():
            raise ValueError(
                f"{path}: row {int((~same).nonzero()[0])} of the adapter's {what} is not the base model's: the adapter "
                "was trained on another base model, or its embedding was trained; import the merged model instead"
            )
    return rows


def _embedding_name(base):
    return next(name for name, module in base.named_modules() if module is base.get_input_embeddings())


def _separator_row(model, separator_id, rows, path):
    """[H]: the embedding that the separator had in training."""
    weight = model.get_input_embeddings().weight
    if rows is not None and separator_id < len(rows):
        return rows[separator_id]
    if separator_id < len(weight):
        return weight[separator_id].detach().clone()  # a spare row, which the released code leaves as it is
    if model.config.model_type == "molmo2":
        raise ValueError(
            f"{path}: the separator has id {separator_id}, beyond the {len(weight)} rows of the base model's embedding, "
            "whose input rows alone transformers cannot extend: merge the adapter with the released scripts/merge_lora.py "
            "and import the result"
        )
    raise ValueError(
        f"{path}: the separator has id {separator_id}, beyond the {len(weight)} rows of the base model's embedding, and "
        "the adapter does not hold its embedding, which the released code drew at random: import the merged model"
    )


def _converted(adapter, settings, model):
    """An adapter of Molmo2's remote code for transformers' own: fused rows of lora_B are split, lora_A is shared."""
    names = [name.removeprefix(_PREFIX) for name in adapter]
    if not any(REMOTE_LAYER.match(name) for name in names):
        return adapter, settings
    for option in ("rank_pattern", "alpha_pattern", "modules_to_save", "layers_pattern", "target_parameters"):
        if settings.get(option):
            raise ValueError(f"the adapter names modules of Molmo2's remote code in {option}, which is not converted")
    if settings.get("use_dora") or settings.get("bias", "none") != "none":
        raise ValueError("adapters with DoRA or trained biases on Molmo2's remote code are not converted")
    made, unknown, targets = {}, [], set()
    for key, tensor in adapter.items():
        match = re.fullmatch(re.escape(_PREFIX) + REMOTE_LAYER.pattern + r"\.lora_(A|B)(?:\.default)?\.weight", key)
        if match is None:
            unknown.append(key)
            continue
        layer, fused, side = match.groups()
        parts = [f"model.language_model.layers.{layer}.{part}" for part in REMOTE_PARTS[fused]]
        targets.update(parts)
        if side == "A":
            pieces = [tensor] * len(parts)
        else:
            try:
                sizes = [model.get_submodule(part).out_features for part in parts]
            except AttributeError as error:
                raise ValueError(f"{key} has no place in the base model: {error}") from error
            if sum(sizes) != tensor.shape[0]:
                raise ValueError(f"{key} has {tensor.shape[0]} rows, {', '.join(parts)} need {sizes}")
            pieces = tensor.split(sizes)
        for part, piece in zip(parts, pieces, strict=True):
            made[f"{_PREFIX}{part}.lora_{side}.weight"] = piece.clone().contiguous()
    if unknown:
        raise ValueError(f"the adapter holds tensors that have no place in the model: {', '.join(sorted(unknown)[:5])}")
    return made, {**settings, "target_modules": sorted(targets), "exclude_modules": None}


def _with_adapter(model, adapter, settings, path):
    from peft import LoraConfig, get_peft_model
    from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

    known = set(LoraConfig.__dataclass_fields__)
    settings = {name: value for name, value in settings.items() if name in known and name != "auto_mapping"}
    settings |= {"base_model_name_or_path": model.config.name_or_path, "inference_mode": True}
    peft_model = get_peft_model(model, LoraConfig(**settings))
    expected = get_peft_model_state_dict(peft_model, save_embedding_layers=False)
    unknown, missing = sorted(set(adapter) - set(expected)), sorted(set(expected) - set(adapter))
    if unknown or missing:
        raise ValueError(
            f"{path}: the adapter does not fit the base model: tensors without a place {unknown[:5] or 'none'}, places "
            f"without a tensor {missing[:5] or 'none'}"
        )
    for name, tensor in adapter.items():
        if tensor.shape != expected[name].shape:
            raise ValueError(
                f"{path}: {name} has shape {list(tensor.shape)}, the base model needs {list(expected[name].shape)}"
            )
    set_peft_model_state_dict(peft_model, adapter)
    return peft_model


# ---- writing ----


def export_mr2rm(reward_model, out):
    """Write a reward model in the layout of the paper's released code; `import_mr2rm` reads it back to the bit.

    An adapter stays an adapter (on Molmo2 with the fused names of its remote code) and holds the embedding, so that the
    separator's row is not lost; a full model becomes a merged model.

    Args:
        reward_model: a `yojo.RewardModel` with `format="mr2rm"`.
        out: folder.

    Raises:
        ValueError: a model whose scores the released code would not give, with the reason.
    """
    base, config = patched_base(reward_model.model, "export"), reward_model.config
    if config.format != "mr2rm":
        raise ValueError(
            f"the model has format={config.format!r}: the released code lays prompt and responses out otherwise, and its "
            "scores would be others; only a model with format='mr2rm' can be exported to it"
        )
    if not config.scale_scores:
        raise ValueError(
            "the model has scale_scores=False, which the released layout cannot say: it divides by sqrt(H)"
        )
    if config.separator != SEPARATOR:
        raise ValueError(f"the model's separator is {config.separator!r}, the released code knows {SEPARATOR!r} alone")
    adapter, head = adapter_of(reward_model.model), dict(active_head(base).named_parameters())
    embedding = folded(
        embedding_of(base),
        embedding_of(base).weight,
        reward_model.collator.separator_id,
        head["separator_delta"],
    )
    with replaced_folder(out, mark=CONFIG_FILE) as staging:
        if adapter is None:
            save_model(base, base.state_dict() | {f"{_embedding_name(base)}.weight": embedding}, staging)
        else:
            _write_adapter(adapter, base, embedding, staging)
        save_processor(dates.pinned(reward_model.processor), staging)
        state = {theirs: head[ours].detach().cpu().clone() for theirs, ours in HEADS[config.head].items()}
        torch.save(state, staging / HEAD_FILE)
        settings = {
            "value_head_type": config.head,
            "value_head_hidden_dim": config.head_dim if config.head == "mlp" else None,
            "value_head_activation": config.activation,
            "value_head_input_dim": head["weight1" if config.head == "mlp" else "weight2"].shape[1],
            "resp_repr_mode": config.pooling,
        }
        (staging / CONFIG_FILE).write_text(json.dumps(settings, indent=2) + "\n")


def _write_adapter(adapter, base, embedding, staging):
    from peft.utils import get_peft_model_state_dict
    from safetensors.torch import save_file

    config = adapter.peft_config[adapter.active_adapter]
    if getattr(config, "trainable_token_indices", None) or hasattr(base.get_input_embeddings(), "modules_to_save"):
        raise ValueError(
            "the adapter trained the model's embedding, which the released layout keeps in the model: merge it first "
            "(yojo merge) and export the merged model"
        )
    adapter.save_pretrained(staging, save_embedding_layers=False)
    state = get_peft_model_state_dict(adapter, save_embedding_layers=False)
    state = {name: tensor for name, tensor in state.items() if not name.startswith(f"{_PREFIX}score.")}
    settings = json.loads((staging / "adapter_config.json").read_text())
    settings["modules_to_save"] = [n for n in settings.get("modules_to_save") or () if n != "score"] or None
    if base.config.model_type == "molmo2":
        state, settings = _fused(state, settings)
        vocabulary = base.config.get_text_config().vocab_size
        tables = zip(REMOTE_EMBEDDINGS, (embedding[:vocabulary], embedding[vocabulary:]), strict=True)
    else:
        tables = [(f"{_embedding_name(base)}.weight", embedding)]
    state |= {_PREFIX + name: tensor for name, tensor in tables}
    save_file({name: t.detach().cpu().clone().contiguous() for name, t in state.items()}, staging / ADAPTER_FILE)
    (staging / "adapter_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (staging / "README.md").unlink(missing_ok=True)


def _fused(state, settings):
    """The inverse of `_converted`, where the parts of a fused projection share one lora_A."""
    made, left, layers = {}, dict(state), {}
    for name in state:
        match = re.fullmatch(re.escape(_PREFIX) + r"model\.language_model\.layers\.(\d+)\..*", name)
        layers[match.group(1) if match else None] = True
    for layer in layers:
        for fused, parts in REMOTE_PARTS.items():
            names = [f"{_PREFIX}model.language_model.layers.{layer}.{part}.lora_" for part in parts]
            if not any(f"{name}A.weight" in state for name in names):
                continue
            found = [(left.pop(f"{name}A.weight", None), left.pop(f"{name}B.weight", None)) for name in names]
            shared = found[0][0]
            if any(a is None or b is None or not torch.equal(a, shared) for a, b in found):
                raise ValueError(
                    f"layer {layer}: {', '.join(parts)} have adapters of their own, which Molmo2's remote code, where "
                    "they are one projection, cannot hold: merge first (yojo merge) and export the merged model"
                )
            target = f"{_PREFIX}model.transformer.blocks.{layer}.{fused}.lora_"
            made |= {f"{target}A.weight": shared, f"{target}B.weight": torch.cat([b for _, b in found])}
    if left:
        raise ValueError(f"the adapter holds what Molmo2's remote code has no place for: {', '.join(sorted(left)[:5])}")
    targets = sorted({name.split(".lora_")[0].rpartition(".")[2] for name in made})
    return made, {**settings, "target_modules": targets}

"""What a model's scores are told from another's by: all that changes a score, as a dict that is the same in every process.

The same before and after saving and on every device; versions of libraries, the attention's implementation and the like,
which change a score by rounding at most, are not in it.
"""

import json

import torch

from yojo.inputs.digests import digest
from yojo.inputs.plain import private_copy
from yojo.inputs.processors import backend_of
from yojo.patching import dates, fingerprints
from yojo.patching.devices import embedding_of
from yojo.patching.state import patched_base, tokenizer_of, unwrap
from yojo.saving.parts import active_head, adapter_of

_CHUNK = 1 << 24  # numbers of a tensor that are summed at a time
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

# Entries of a model's config that change no score: where it lies, what wrote it, how it runs, names of labels. The patch's
# own settings, the dtype, quantization and the weights are told by themselves.
_NOT_OF_A_CONFIG = frozenset(
    """
    _name_or_path _commit_hash architectures auto_map transformers_version tokenizer_class id2label label2id problem_type
    dtype torch_dtype yojo quantization_config tie_word_embeddings use_cache return_dict output_attentions
    output_hidden_states attn_implementation _attn_implementation _attn_implementation_internal experts_implementation
    _experts_implementation
    """.split()
)
# Training writes its tokenizer's into a config; scores behind a value head depend on none of them, a classifier's may.
_TOKENS = frozenset("pad_token_id bos_token_id eos_token_id sep_token_id decoder_start_token_id".split())
# Likewise of an adapter's: what is its own name, what training alone looks at, and where its base model lies.
_NOT_OF_AN_ADAPTER = frozenset(
    """
    base_model_name_or_path revision inference_mode peft_version auto_mapping task_type lora_dropout init_lora_weights
    runtime_config loftq_config eva_config corda_config
    """.split()
)
_NOT_OF_A_PROCESSOR = ("processor_class", "auto_map", "chat_template", "tokenizer", "_processor_class", "image_backend")
_PARTS = ("image_processor", "video_processor", "feature_extractor")


def reward_model_fingerprint(reward_model):
    """All that changes a score of a reward model.

    Args:
        reward_model: a `yojo.RewardModel`.

    Returns:
        dict of strings, numbers and dicts, as JSON has them. Weights are hashes: of the backbone's as
        `yojo.patching.fingerprints` samples them, with the sum of all their bits; of every number of the value head, of the
        separator's row and of an adapter.

    Raises:
        ValueError: weights that cannot be read here (sharded ones, the meta device).
    """
    base, processor = patched_base(reward_model.model, "fingerprint"), reward_model.processor
    state = base.yojo
    settings = reward_model.config.to_dict()  # its own: the model's mode may have been set anew since
    del settings["loss"]
    head = dict(active_head(base).named_parameters())
    separator = {"separator": _row(base, state.separator_id)}
    return {
        "judge": "RewardModel",
        **_model(base, _TOKENS),
        "weights": {
            "backbone": weights_digest(fingerprints.tensors_of(base)),
            "head": exact_digest({**head, **separator}),
            "adapter": adapter_digest(reward_model.model),
        },
        "settings": settings,
        **processor_fingerprint(processor),
        "date": None if state.date is None else state.date.isoformat(),
    }


def classifier_fingerprint(model, processor):
    """All that changes a score of a stock sequence classifier.

    Args:
        model: of transformers, bare or wrapped by PEFT.
        processor: its processor or tokenizer.

    Returns, Raises: as for `reward_model_fingerprint`.
    """
    base = unwrap(model)
    # A head under another name stands among the other weights.
    head = dict(active_head(base).named_parameters()) if hasattr(base, "score") else {}
    return _of_stock("Classifier", model, head, processor)


def value_head_fingerprint(model, head, processor):
    """All that changes a score of a causal model with a value head beside it.

    Args:
        model: of transformers, bare or wrapped by PEFT.
        head: dict name -> tensor, the value head's.
        processor: its processor or tokenizer.

    Returns, Raises: as for `reward_model_fingerprint`.
    """
    return _of_stock("ValueHead", model, head, processor, _TOKENS)


def chat_scores_fingerprint(model, hd_num):
    """All that changes a score of a model whose own code scores chats, but for that code.

    Args:
        model: a `torch.nn.Module` with a `tokenizer`.
        hd_num: the most tiles of an image.

    Returns, Raises: as for `reward_model_fingerprint`.
    """
    tensors = model.state_dict()
    config = getattr(model, "config", None)
    return {
        "judge": "ChatScores",
        "model_class": type(model).__name__,
        "dtype": str(next((t.dtype for t in tensors.values() if t.is_floating_point()), None)).removeprefix("torch."),
        "config": None if config is None else config_digest(config),
        "weights": weights_digest(tensors),
        "tokenizer": tokenizer_digest(model.tokenizer),
        "hd_num": hd_num,
    }


def _of_stock(judge, model, head, processor, names=()):
    base = unwrap(model)
    date = dates.date_of(processor) if dates.has_clock(processor) else None
    return {
        "judge": judge,
        **_model(base, names),
        "weights": {
            "backbone": weights_digest(fingerprints.tensors_of(base)),
            "head": exact_digest(head),
            "adapter": adapter_digest(model),
        },
        **processor_fingerprint(processor),
        "date": None if date is None else date.isoformat(),
    }


def _model(base, names):
    """What the model is, without the entries `names` of its config."""
    import transformers

    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None and not isinstance(quantization, dict):
        quantization = quantization.to_dict()
    return {
        # FSDP makes a class of its own, which inherits from transformers'.
        "model_class": next(
            (c.__name__ for c in type(base).__mro__ if getattr(transformers, c.__name__, None) is c),
            type(base).__name__,
        ),
        "model_type": base.config.model_type,
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": None if quantization is None else digest(_plain(quantization)),
        "config": config_digest(base.config, names),
    }


def _row(base, index):
    """One row of the embedding, wherever accelerate has put it."""
    embedding = embedding_of(base)
    weight = fingerprints.stored(embedding, "weight")
    _refuse_unreadable("the embedding", weight)
    return weight[index]


# ---- weights ----


@torch.no_grad()
def weights_digest(tensors):
    """Digest of many tensors: some numbers of each, and the sum of all bits, in which any single change shows.

    Args:
        tensors: dict name -> tensor.

    Raises:
        ValueError: a tensor that cannot be read here.
    """
    samples = fingerprints.take(tensors)
    for name, tensor in tensors.items():
        if name not in samples and tensor.numel():
            _refuse_unreadable(name, tensor)
            raise ValueError(
                f"{name} is a {type(tensor).__name__}, whose numbers cannot be read to tell it from others"
            )
    return digest({name: [sample.code(), _sum_of_bits(tensors[name])] for name, sample in samples.items()})


def _sum_of_bits(tensor):
    """The sum of a tensor's numbers, their bits read as integers: exact, on every device."""
    try:
        flat = tensor.detach().reshape(-1)
        bits = flat.view(_BITS[flat.element_size()])
        return sum(int(chunk.sum(dtype=torch.int64)) for chunk in bits.split(_CHUNK))
    except (
        RuntimeError,
        NotImplementedError,
        TypeError,
        KeyError,
    ):  # a tensor of somebody's own making: samples must do
        return None


def exact_digest(tensors):
    """Digest of every number of some tensors, in whatever dtype they are kept.

    Args:
        tensors: dict name -> tensor.
    """
    found = {}
    for name, tensor in tensors.items():
        _refuse_unreadable(name, tensor)
        values = tensor.detach().to("cpu", torch.float64)
        found[name] = [list(values.shape), values.contiguous().numpy().tobytes()]
    return digest(found)


def _refuse_unreadable(name, tensor):
    if tensor.device.type == "meta" or hasattr(tensor, "full_tensor"):
        where = "on the meta device" if tensor.device.type == "meta" else "a shard of several processes'"
        raise ValueError(
            f"{name} is {where}: its numbers cannot be read, and nobody could tell this model's scores from another's"
        )


def adapter_digest(model):
    """Digest of the adapters that are active in a PEFT model: weights, settings, scale; None without any.

    Which name an adapter has does not count.
    """
    adapter = adapter_of(model)
    if adapter is None:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import get_peft_model_state_dict

    layers = {
        fingerprints.plain_name(path): layer
        for path, layer in adapter.named_modules()
        if isinstance(layer, BaseTunerLayer)
    }
    names = list(dict.fromkeys(name for layer in layers.values() for name in _active(layer)))
    if not layers:
        active = adapter.active_adapter
        names = [active] if isinstance(active, str) else list(active)
    if not names:
        return None
    found = []
    for name in names:
        weights = get_peft_model_state_dict(adapter, adapter_name=name, save_embedding_layers=False)
        settings = adapter.peft_config[name].to_dict()
        settings = {key: value for key, value in settings.items() if key not in _NOT_OF_AN_ADAPTER}
        found.append(
            {
                "weights": exact_digest(weights),
                "settings": digest(_plain(settings)),
                "layers": {path: _scale(layer, name) for path, layer in layers.items() if name in _active(layer)},
            }
        )
    return digest(found)


def _active(layer):
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if _has(layer, name)]


def _has(layer, name):
    return any(name in getattr(layer, kind, ()) for kind in layer.adapter_layer_names)


def _scale(layer, name):
    scaling = getattr(layer, "scaling", None)
    value = scaling.get(name) if isinstance(scaling, dict) else None
    return float(value) if isinstance(value, (int, float)) else None


# ---- config, tokenizer, processor ----


def config_digest(config, names=()):
    """Digest of a model's config, without what changes no score; nor `names`."""
    return digest(_without(_plain(config.to_dict()), _NOT_OF_A_CONFIG.union(names)))


def processor_fingerprint(processor):
    """Entries of a fingerprint: `chat_template`, `tokenizer`, `processor`."""
    tokenizer = tokenizer_of(processor)
    template = getattr(processor, "chat_template", None)
    return {
        "chat_template": None if template is None else digest(template),
        "tokenizer": tokenizer_digest(tokenizer),
        "processor": None if tokenizer is processor else processor_settings(processor),
    }


def tokenizer_digest(tokenizer):
    """Digest of a tokenizer: its class where it is in Python, its vocabulary and rules, its special tokens."""
    special = {
        key: sorted(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
        for key, value in getattr(tokenizer, "special_tokens_map", {}).items()
    }
    backend = private_copy(tokenizer, split_special=False)  # without truncation and padding, which come and go
    if backend is not None:
        rules = json.loads(backend.to_str())
        rules.pop("decoder", None)
        return digest([special, rules])
    model = getattr(tokenizer, "sp_model", None)
    pieces = model.serialized_model_proto() if hasattr(model, "serialized_model_proto") else None
    return digest([type(tokenizer).__name__, special, dict(tokenizer.get_vocab()), pieces])


def processor_settings(processor):
    """The settings of a processor and of its parts, plain dicts, without the tokenizer's."""
    found = {}
    for name in _PARTS:
        part = getattr(processor, name, None)
        if part is not None:
            found[name] = _without(_plain(part.to_dict()), _NOT_OF_A_PROCESSOR)
    own = _plain(processor.to_dict()) if hasattr(processor, "to_dict") else {}
    own = _without(own, (*_NOT_OF_A_PROCESSOR, *_PARTS))
    return {**found, "own": own, "backend": backend_of(processor)}


def _plain(value):
    """What JSON makes of a value; what is nothing is left out."""
    return _some(json.loads(json.dumps(value, default=_named)))


def _named(value):
    if hasattr(value, "items"):
        return dict(value.items())
    if isinstance(value, (set, frozenset)):
        return sorted(value, key=str)
    return getattr(value, "value", None) or str(value)


def _some(value):
    if isinstance(value, dict):
        return {key: _some(inner) for key, inner in value.items() if inner is not None}
    return [_some(inner) for inner in value] if isinstance(value, list) else value


def _without(value, names):
    """A plain value without the entries of these names, at any depth."""
    if isinstance(value, dict):
        return {key: _without(inner, names) for key, inner in value.items() if key not in names}
    return [_without(inner, names) for inner in value] if isinstance(value, list) else value

"""`load_judge`: a judge by its name, a folder, a hub name, a baseline, an address, or a model behind an endpoint."""

import json
import os
import re
from pathlib import Path

import torch

from yojo.config import CHOICES
from yojo.files.saved import CONFIG_FILE, local_folder
from yojo.judges.baselines import UNITS, Length, Place, Random
from yojo.judges.prompts import STYLES
from yojo.reward_model import RewardModel
from yojo.saving import stock

BASELINES = ("length", "length:words", "length:shortest", "place", "place:last", "random", "random:SEED")
# What says the same as a bare name, for whoever has a folder of that name.
_IN_FULL = {"length": "length:characters", "place": "place:first", "random": "random:0"}

_OPENAI = "openai:"
_REMOTE = ("http://", "https://")
_CHAT_SCORES = "chat-scores:"
_ENDPOINT = re.compile(r"openai:(.+?)@(https?://[^#]*)(?:#(.*))?", re.DOTALL)


def load_judge(name, *, base_model=None, check_base=True, check_files=True, device=None, dtype=None, max_length=None):
    """Load a judge by its name.

    Args:
        name: folder or hub name of a reward model (or a checkpoint of transformers' Trainer with a patched model), or of a
            stock sequence classifier, or of a causal model with value_head.safetensors or value_head.bin beside it; or a
            baseline: "length", "length:words", "length:shortest", "length:words:shortest", "place", "place:last", "random",
            "random:SEED". A folder with a baseline's name is "./length". Or a model behind an OpenAI-compatible endpoint, as
            `yojo.judges.Generative` asks it: "openai:MODEL@http://host:port/v1", with "#pairwise" or "#pointwise" behind it
            for another style than listwise. Or the address of a server of `yojo serve`, "http://host:port", with "#NAME" behind
            it for one of several models there. Or "chat-scores:FOLDER" (or hub name), a model whose own code scores chats,
            `yojo.judges.ChatScores`: Python files that come with it are run. Behind the name of a reward model "#isolated",
            "#comparative" or "#permutations=K": score in that mode, whatever it was saved with.
        base_model, check_base, check_files: as for `yojo.RewardModel.from_pretrained`.
        device: where a model goes; baselines and models behind an endpoint need none, and for an address none can be given.
        dtype: torch dtype or its name, such as "bfloat16"; the one a model was saved in by default.
        max_length: the most tokens of an example (of a conversation, for a stock model); or None.

    Returns:
        `yojo.RewardModel`, `yojo.judges.Classifier`, `yojo.judges.ValueHead`, `yojo.judges.ChatScores`,
        `yojo.judges.Generative`, `yojo.RemoteJudge` or a baseline.

    Raises:
        ValueError: a name that is none of these, or something that cannot be loaded, with the reason.
    """
    check_device(device)
    made, kind, options = None, "baseline", {"base_model": base_model, "dtype": dtype, "max_length": max_length}
    if isinstance(name, str):
        made = _baseline(name)
        if name.startswith(_OPENAI):
            made, kind = _generative(name), "endpoint's judge"
        elif name.startswith(_REMOTE):
            made, kind, options = _remote(name), "served judge", {**options, "device": device}
    if made is not None:
        for option, value in options.items():
            if value is not None:
                raise ValueError(f"{option}={value!r} is given, and the {kind} {name} has no model here")
        return made
    if isinstance(name, str) and name.startswith(_CHAT_SCORES):
        return _chat_scores(name, base_model=base_model, max_length=max_length, dtype=dtype_of(dtype), device=device)
    name, mode = mode_of(os.fspath(name))
    if mode and not os.path.exists(name) and _baseline(name) is not None:
        raise ValueError(f"{name} is a baseline, which has no modes: leave #... out")
    path, dtype = local_folder(name), dtype_of(dtype)
    if not (path / CONFIG_FILE).is_file() and not stock.is_checkpoint(path) and (found := _stock(path)) is not None:
        kind, judge = found
        if base_model is not None:
            raise ValueError(f"base_model is given, but {path} holds a full model, a {kind}")
        if mode:
            raise ValueError(f"{name} is a {kind}, which has no modes: leave #... out")
        return judge.from_pretrained(path, dtype=dtype, device=device, max_length=max_length)
    options = {"base_model": base_model, "check_base": check_base, "check_files": check_files}
    return RewardModel.from_pretrained(path, dtype=dtype, device=device, max_length=max_length, **mode, **options)


def has_model(name):
    """Whether a judge of this name has a model that is loaded here: it is no baseline, no address and behind no endpoint."""
    return not isinstance(name, str) or not (name.startswith((_OPENAI, *_REMOTE)) or _baseline(name) is not None)


def check_name(name):
    """Raise what is wrong with the name of a judge and can be told without loading it; what lies on the hub is fetched.

    Args:
        name: as for `load_judge`.

    Raises:
        ValueError: no judge can have that name, or there is no such folder.
    """
    name = os.fspath(name)
    if name.startswith(_OPENAI):
        _generative(name)
    elif name.startswith(_REMOTE):
        _remote(name)
    elif _baseline(name) is None:
        local_folder(mode_of(name.removeprefix(_CHAT_SCORES))[0])


def mode_of(name):
    """A name without the mode behind it, and the mode as options of `yojo.RewardModel.from_pretrained`."""
    head, mark, mode = name.rpartition("#")
    if not mark or os.path.exists(name):
        return name, {}
    if mode in CHOICES["mode"]:
        return head, {"mode": mode}
    key, _, count = mode.partition("=")
    if key == "permutations" and count.isascii() and count.isdigit():
        return head, {"mode": "comparative", "permutations": int(count)}
    modes = ", ".join(f"#{one}" for one in CHOICES["mode"])
    raise ValueError(f"{name}: what stands behind # must be a mode, {modes} or #permutations=K, got {mode!r}")


def _baseline(name):
    """The baseline of a name; None for a name that is none."""
    kind, *options = name.split(":")
    if kind not in _IN_FULL:
        return None
    if name in _IN_FULL and os.path.exists(name):
        raise ValueError(
            f"{name!r} is a baseline, and there is a folder or file of that name here: write ./{name} for the folder, "
            f"{_IN_FULL[name]} for the baseline"
        )
    made = {"length": _length, "place": _place, "random": _random}[kind](options)
    if made is None:
        raise ValueError(f"{name!r} is no baseline; there are {', '.join(BASELINES)}")
    return made


def _generative(name):
    """The judge of a name that begins with openai: and has a model and an address."""
    from yojo.judges.generative import Generative

    expected = (
        "openai:MODEL@http://host:port/v1, with #pairwise or #pointwise behind it for another style than listwise"
    )
    found = _ENDPOINT.fullmatch(name)
    if found is None:  # nothing is shown behind the model: it may hold a password
        raise ValueError(f"{name.partition('@')[0]}... is no name of an endpoint's model: it must be {expected}")
    model, url, style = found.groups()
    if style is not None and style not in STYLES:
        raise ValueError(f"the style behind # must be one of {', '.join(STYLES)}, got {style!r}")
    return Generative(url, model, style=style or "listwise")


def _remote(name):
    """The judge of an address, with the name of a model behind it or not."""
    from yojo.judges.remote import RemoteJudge

    url, mark, model = name.partition("#")
    if url.rstrip("/").endswith("/v1"):
        raise ValueError(
            f"{url} ends with /v1, and an address is of `yojo serve`, without it, such as http://host:8000; a model behind an "
            "OpenAI-compatible endpoint is openai:MODEL@http://host:port/v1"
        )
    if mark and not model.strip():
        raise ValueError(f"nothing stands behind # of {url}#: it must be the name of a model that is served there")
    return RemoteJudge(url, model=model or None)


def _chat_scores(name, *, base_model, max_length, dtype, device):
    """The judge of a name that begins with chat-scores:, whose code is run since the name says so."""
    from yojo.judges.chat_scores import ChatScores

    path = name.removeprefix(_CHAT_SCORES)
    if not path:
        raise ValueError(f"{name!r} names no model: chat-scores:FOLDER or a hub name")
    for option, value in (("base_model", base_model), ("max_length", max_length)):
        if value is not None:
            raise ValueError(
                f"{option}={value!r} is given, and {name} is scored by the model's own code, which takes none"
            )
    return ChatScores.from_pretrained(path, trust_remote_code=True, dtype=dtype, device=device)


def _length(options):
    if not set(options) <= {*UNITS, "shortest"} or len(set(options)) < len(options) or set(UNITS) <= set(options):
        return None
    return Length("words" if "words" in options else "characters", shortest="shortest" in options)


def _place(options):
    return Place(last=options == ["last"]) if options in ([], ["first"], ["last"]) else None


def _random(options):
    try:
        return Random(*map(int, options)) if len(options) < 2 else None
    except ValueError:
        return None


def _stock(path):
    """(what it is, the judge's class) of a folder with a stock model that has one score to give; None for another."""
    from yojo.judges.value_head import has_value_head

    if _is_classifier(path):
        from yojo.judges.classifier import Classifier

        return "sequence classifier", Classifier
    if has_value_head(path):
        from yojo.judges.value_head import ValueHead

        return "causal model with a value head", ValueHead
    return None


def _is_classifier(path):
    try:
        names = json.loads((Path(path) / "config.json").read_text()).get("architectures") or ()
    except (OSError, ValueError, AttributeError):
        return False
    return any(isinstance(name, str) and name.endswith("ForSequenceClassification") for name in names)


def check_device(device):
    """Refuse a device that is not there: torch says so with a RuntimeError, when the model is loaded.

    Args:
        device: of torch, or its name; None for wherever a model is put.

    Raises:
        ValueError: it is none, or not there.
    """
    if device is None:
        return
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is no device; such as cpu or cuda:1") from error
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"there is no device {device}: this machine has {torch.cuda.device_count()} CUDA devices")


def dtype_of(dtype):
    """A torch dtype of its name, such as "bfloat16"; None for None; a ValueError for what is no float dtype."""
    if dtype is None or isinstance(dtype, torch.dtype):
        return dtype
    found = getattr(torch, str(dtype).removeprefix("torch."), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype must be a float dtype of torch, such as 'bfloat16' or 'float32', got {dtype!r}")
    return found

"""What a checkpoint of a patched model says of it: its head and settings found again when its model is patched.

The checkpoint is one of transformers' own Trainer, or of `model.save_pretrained`: a plain model's folder, with the value
head among the weights (`score.*`) and the settings in config.json (`yojo`). transformers loads the model and leaves the
head out; a patch that began anew would score at random.
"""

import dataclasses
import datetime
import json
import re
from pathlib import Path

import torch

from yojo.config import YojoConfig
from yojo.files.saved import CONFIG_FILE, HEAD_FILE, SEPARATOR_ROW, check_hashes, read_description, read_head
from yojo.patching import fingerprints
from yojo.patching.head import ScoreHead

_HEAD = re.compile(r"(?:.*\.)?score\.(weight1|bias1|weight2|bias2|separator_delta)")


_COMPARED = 24  # weights of the file that are compared with the model's


@dataclasses.dataclass
class Recorded:
    """What a checkpoint of a patched model holds beside the model.

    Attributes:
        source: its folder or hub name.
        config: the `YojoConfig` it was patched with.
        separator_id: id of the separator; None where it was patched without a processor, -1 where nobody noted it.
        head: dict name in `ScoreHead` -> tensor.
        date: the `datetime.date` its chat template printed (see `yojo.patching.dates`), or None.
    """

    source: str
    config: YojoConfig
    separator_id: int | None
    head: dict
    date: datetime.date | None = None

    def put_into(self, score):
        """Give the value head its weights."""
        with torch.no_grad():
            for name, parameter in score.named_parameters():
                parameter.copy_(self.head[name])
        self.head = {}

    def check_separator(self, known, tokenizer, rows):
        """Whether the embedding has the separator's row already; a ValueError where the tokenizer's is another one."""
        if self.separator_id is None:
            return False
        own = len(tokenizer) if known is None else known
        if self.separator_id == -1:
            return own < rows
        if own != self.separator_id or own >= rows:
            raise ValueError(
                f"{self.source} was saved with the separator {self.config.separator!r} as token {self.separator_id}, in this "
                f"tokenizer it would be {own}, in an embedding of {rows} rows: pass the processor it was trained with"
            )
        return True


def record(state):
    """What `config.yojo` says of a patch."""
    date = None if state.date is None else state.date.isoformat()
    return {**state.config.to_dict(), "separator_id": state.separator_id, "date": date}


def forget(base):
    """Let `yojo.patch` begin anew, with a head of its own."""
    base.config.__dict__.pop("yojo", None)


def recorded(base, options):
    """`Recorded` of a model that was loaded from a checkpoint of a patched one, else None.

    Args:
        base: a transformers model that is not patched.
        options: fields of `YojoConfig` that are asked for.

    Raises:
        ValueError: other options than it was saved with, a head that cannot be found or does not fit, weights that are
            not those of the checkpoint; an adapter that has a value head of its own.
    """
    _refuse_adapter_with_a_head(base)
    said = getattr(base.config, "yojo", None)
    if said is None:
        return None
    source = base.config.name_or_path
    config, separator_id, date = _read(said, f"{source or 'the model'}: config.yojo")
    other = {name: value for name, value in options.items() if getattr(config, name) != value}
    if other:
        was, now = (
            ", ".join(f"{name}={value!r}" for name, value in pairs)
            for pairs in ([(name, getattr(config, name)) for name in other], other.items())
        )
        raise ValueError(
            f"{source or 'the model'} was saved as a reward model with {was}, and is to be patched with {now}: leave that out "
            f"to go on with it, or begin with a new head, after `del model.config.yojo`"
        )
    head = _find_head(base, source)
    _check_head(head, base, config, source)
    return Recorded(source, config, separator_id, head, date)


def _refuse_adapter_with_a_head(base):
    """A ValueError where PEFT has put an adapter on a model whose value head it trains or brings, and could not find."""
    for name, config in (getattr(base, "peft_config", None) or {}).items():
        if "score" in (getattr(config, "modules_to_save", None) or ()):
            raise ValueError(
                f"the adapter {name!r} has a value head of its own (modules_to_save=['score']), and was put on a model without "
                "one: patched now, the model would score with a new head. yojo.patch the base model first, with the options of "
                "the training run, and then put the adapter on it (PeftModel.from_pretrained, get_peft_model); a folder that "
                "YOJO saved is loaded by yojo.RewardModel.from_pretrained"
            )


def _read(said, where):
    if not isinstance(said, dict):
        raise ValueError(f"{where} must hold the options of yojo.patch, got {said!r}")
    said = dict(said)
    separator_id, date = said.pop("separator_id", -1), said.pop("date", None)
    try:
        date = None if date is None else datetime.date.fromisoformat(date)
        config = YojoConfig.from_saved(said)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where} does not fit this version of YOJO: {error}") from error
    return config, separator_id, date


def _find_head(base, source):
    """The head's tensors in the weights of a folder or hub name; compares some of the others with the model's."""
    fetch = _fetcher(source, getattr(base.config, "_commit_hash", None))
    if fetch(CONFIG_FILE) and fetch(
        HEAD_FILE
    ):  # a folder of RewardModel.save_pretrained, loaded as the plain model it is
        folder = Path(fetch(CONFIG_FILE)).parent
        check_hashes(folder, read_description(folder))
        head = read_head(folder)
        head.pop(SEPARATOR_ROW, None)
    else:
        head = {}
    files = _weight_files(fetch)
    own = fingerprints.tensors_of(base)
    names = sorted(own)
    compared = set(names[:: max(1, len(names) // _COMPARED)])
    differ = []
    for file in files:
        for name, tensor in _tensors(file, lambda name: _HEAD.fullmatch(name) or name in compared):
            found = _HEAD.fullmatch(name)
            if found:
                head.setdefault(found.group(1), tensor)
            elif not _alike(own[name], tensor):
                differ.append(name)
    if not head:
        raise ValueError(
            f"config.yojo says that this model was saved as a reward model, but {_where(source)} holds no value head (score.*): "
            "load the model from the folder that has it, or, for a new head, `del model.config.yojo` before yojo.patch"
        )
    if differ:
        raise ValueError(
            f"{source} holds a value head, but not the weights of this model ({', '.join(differ[:3])} differ): load it with "
            "from_pretrained, or, for a new head, `del model.config.yojo` before yojo.patch"
        )
    return head


def _where(source):
    return source if source else "it does not know the folder it came from, which"


def _alike(own, saved):
    before = fingerprints.take({"": saved})
    own = own[: len(saved)] if saved.ndim else own  # the separator may have added rows to the embedding
    return not before or "" not in fingerprints.changed(before, {"": own})


def _fetcher(source, revision):
    """Function file name -> its path in a folder or a hub repository, or None."""
    from transformers.utils import cached_file

    def fetch(name):
        if not source:
            return None
        if Path(source).is_dir():
            return str(Path(source, name)) if Path(source, name).is_file() else None
        options = {
            f"_raise_exceptions_for_{what}": False for what in ("missing_entries", "connection_errors", "gated_repo")
        }
        try:
            return cached_file(str(source), name, revision=revision, **options)
        except (OSError, ValueError):
            return None

    return fetch


def _weight_files(fetch):
    for whole, index in (
        ("model.safetensors", "model.safetensors.index.json"),
        ("pytorch_model.bin", "pytorch_model.bin.index.json"),
    ):
        if fetch(whole):
            return [fetch(whole)]
        if fetch(index):
            names = sorted(set(json.loads(Path(fetch(index)).read_text())["weight_map"].values()))
            return [file for file in map(fetch, names) if file]
    return []


def _tensors(file, wanted):
    from safetensors import SafetensorError, safe_open

    try:
        if not file.endswith(".safetensors"):
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            yield from ((name, tensor) for name, tensor in state.items() if wanted(name))
            return
        with safe_open(file, "pt") as opened:
            for name in opened.keys():  # noqa: SIM118, it is no dict
                if wanted(name):
                    yield name, opened.get_tensor(name)
    except (SafetensorError, OSError, RuntimeError) as error:
        raise ValueError(f"{file} is damaged: {error}") from error


def _check_head(head, base, config, source):
    with torch.device("meta"):
        expected = dict(ScoreHead(base.config.get_text_config().hidden_size, config).named_parameters())
    wrong = sorted(set(head) ^ set(expected)) or sorted(n for n in head if head[n].shape != expected[n].shape)
    if wrong:
        raise ValueError(f"{source}: its value head does not fit its config.yojo ({', '.join(wrong)})")
    for name, tensor in head.items():
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{source}: {name} of the value head has weights that are not finite (NaN or infinity)")

"""`ValueHead`: a causal model with a value head in a file beside it, as LLaMA-Factory and TRL write reward models."""

from pathlib import Path

import torch

from yojo.files.saved import local_folder
from yojo.judges.checkpoints import check_download, check_stock, load_beside, load_config, load_stock
from yojo.judges.passes import Passes
from yojo.patching.state import unwrap
from yojo.saving.identity import value_head_fingerprint
from yojo.saving.parts import adapter_of

HEAD_FILES = ("value_head.safetensors", "value_head.bin")
# Of the names of a head's tensors: as LLaMA-Factory saves them, as the head's own state_dict has them, a linear layer's.
_PREFIXES = ("v_head.summary.", "summary.", "")
_UNREAD = (
    "lm_head.",
    "v_head.",
)  # the vocabulary's projection, which no score depends on; a head that is read by itself


class ValueHead:
    """A causal (vision-language) model of transformers with a value head, as a judge: Skywork-VL-Reward's kind.

    What TRL's `AutoModelForCausalLMWithValueHead` computes, and LLaMA-Factory reads from it: the score of a conversation is

        w . h + b

    with h [H] the hidden state of its last token, behind the last norm, and the head's w and b in float32, whatever dtype
    they were saved and the model runs in. The head's dropout is for training alone, logits of the vocabulary are not computed.

    Every response is a pass of its own, of the prompt with the response as the assistant's turn, through the model's own chat
    template without a generation prompt (`yojo.judges.conversations`). Conversations of text share batches, filled up on the
    right; those of a model with a processor do not. A score is the same in every company, to rounding. From any number of
    threads.

    Args:
        model: a causal language model of transformers, or a vision-language model; bare, or with an adapter of PEFT's that
            lies in its layers (LoRA and its like).
        head: dict of the head's tensors, "v_head.summary.weight" [1, H] and "v_head.summary.bias" [1], with that prefix,
            "summary." or none; or a folder or file of them.
        processor: its processor; or its tokenizer, for text alone.
        max_length: the most tokens a conversation may have, or None. A longer one is an error: nothing is ever cut.
        batch_size: conversations in a pass.
        date: day that the chat template prints, where it prints one; what the processor has settled, or today, by default.

    Raises:
        TypeError, ValueError: another kind of model, a head that is damaged or of another width, no chat template, a bad
            argument.

    Example:
        >>> judge = yojo.judges.ValueHead.from_pretrained("Skywork/Skywork-VL-Reward-7B", device="cuda")
        >>> judge.score_many([yojo.Example("Which digit is it?", ["A 7.", "Who knows."], images=["seven.png"])])
        [tensor([ 9.2, -3.1])]
    """

    def __init__(self, model, head, processor, max_length=None, batch_size=8, date=None):
        base = unwrap(model)
        _check_model(model, base)
        self.head = _checked_head(head if isinstance(head, dict) else read_head(head), base)
        self.model, self.processor, self.max_length = model, processor, max_length
        # What stands behind a conversation is masked and read by nobody, so that any token will do.
        padding = getattr(base.config.get_text_config(), "pad_token_id", None)
        rows = base.get_input_embeddings().weight.shape[0]
        padding = padding if isinstance(padding, int) and 0 <= padding < rows else 0
        self.passes = Passes(model, processor, self._read, padding, max_length, batch_size, date)

    @property
    def batch_size(self):
        """Conversations in a pass: 1 where the model reads padding."""
        return self.passes.batch_size

    @property
    def conversations(self):
        """What the model sees of an example (see `yojo.judges.conversations`)."""
        return self.passes.conversations

    @property
    def order_free(self):
        """True: every response is a pass of its own."""
        return True

    @classmethod
    def from_pretrained(
        cls,
        path,
        *,
        dtype=None,
        device=None,
        max_length=None,
        batch_size=8,
        date=None,
        processor_options=None,
        **kwargs,
    ):
        """Load a causal model and its value head with all their weights, or not at all.

        Args:
            path: folder or hub name, with value_head.safetensors or value_head.bin in it; or with the head among the model's
                own weights, as TRL saves it.
            dtype: torch dtype of the model's weights; the one they were saved in by default. The head is float32 always.
            device: where the model goes; where transformers puts it (the CPU) by default.
            max_length, batch_size, date: as above.
            processor_options: dict of keyword arguments for the tokenizer or processor.
            **kwargs: handed to `from_pretrained` of the model's class, such as attn_implementation or device_map.

        Returns:
            `ValueHead`.

        Raises:
            ValueError: no causal model, no head or a damaged one, weights that are missing, an adapter without its model.
        """
        import transformers

        check_download(kwargs)
        folder = local_folder(path)
        if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
            raise ValueError(
                f"{path} holds an adapter and no model: put it on its base model (peft.PeftModel.from_pretrained), and pass both, "
                f"yojo.judges.ValueHead(model, head={str(path)!r}, processor=...); or merge it into the model"
            )
        config = load_config(folder, "causal model", **kwargs)
        head = read_head(folder)
        takes_images = type(config) in transformers.AutoModelForImageTextToText._model_mapping
        auto = transformers.AutoModelForImageTextToText if takes_images else transformers.AutoModelForCausalLM
        model = load_stock(folder, auto, dtype=dtype, device=device, unread=_UNREAD, **kwargs)
        processor = load_beside(folder, model, processor_options, **kwargs)
        return cls(model, head, processor, max_length=max_length, batch_size=batch_size, date=date)

    def __repr__(self):
        return f"ValueHead({type(unwrap(self.model)).__name__}, {unwrap(self.model).config.name_or_path!r})"

    def score_many(self, examples):
        """Score many examples.

        Args:
            examples: iterable of `yojo.Example`.

        Returns:
            list of [N] float32 tensors on the CPU, in the order of examples and responses; higher is better.

        Raises:
            TypeError, ValueError: an example that cannot be scored; the message names it.
        """
        return self.passes.score_many(examples)

    def fingerprint(self):
        """All that changes a score, a dict (see `yojo.saving.identity`)."""
        return value_head_fingerprint(self.model, self.head, self.processor)

    def _read(self, inputs):
        hidden = unwrap(self.model).base_model(**inputs, use_cache=False).last_hidden_state  # [B, L, H]
        rows = torch.arange(len(hidden), device=hidden.device)
        last = inputs["attention_mask"].sum(-1).to(hidden.device) - 1
        weight, bias = (self.head[name].to(hidden.device) for name in ("weight", "bias"))
        return torch.nn.functional.linear(hidden[rows, last].float(), weight, bias)[:, 0]


# ---- the head ----


def has_value_head(folder):
    """Whether a folder of a model has a value head in a file of its own."""
    return any((Path(folder) / name).is_file() for name in HEAD_FILES)


def read_head(path):
    """The tensors of a value head.

    Args:
        path: a folder with value_head.safetensors, value_head.bin or, as TRL saves it, the head among the model's weights
            (model*.safetensors); or the file itself.

    Returns:
        dict name -> tensor, as they stand there.

    Raises:
        ValueError: no such file, or a damaged one.
    """
    path = Path(path)
    files = [path] if path.is_file() else [path / name for name in HEAD_FILES if (path / name).is_file()]
    if files:
        return _tensors(files[0], "")
    found = {}
    for file in sorted(path.glob("model*.safetensors")):
        found |= _tensors(file, "v_head.")
    if not found:
        raise ValueError(
            f"{path} has no value head: neither {' nor '.join(HEAD_FILES)}, nor v_head.* in model*.safetensors; a random one "
            "would score at random"
        )
    return found


def _tensors(file, prefix):
    """Those whose names begin so."""
    from safetensors import safe_open

    try:
        if file.suffix != ".safetensors":
            found = torch.load(file, map_location="cpu", weights_only=True)
            return dict(found) if isinstance(found, dict) else {}
        with safe_open(file, "pt") as opened:
            return {name: opened.get_tensor(name) for name in opened.keys() if name.startswith(prefix)}  # noqa: SIM118
    except Exception as error:  # unpickling raises of all kinds
        raise ValueError(
            f"{file} is damaged, or no file of tensors: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        ) from error


def _checked_head(tensors, base):
    """{"weight": [1, H], "bias": [1]}, float32 on the CPU."""
    config = base.config.get_text_config()
    width = getattr(
        config, "word_embed_proj_dim", config.hidden_size
    )  # OPT's hidden states come out as wide as its embedding
    prefix = next((p for p in _PREFIXES if set(tensors) == {f"{p}weight", f"{p}bias"}), None)
    if prefix is None:
        raise ValueError(
            "a value head must have the two tensors v_head.summary.weight and v_head.summary.bias (or without v_head., or "
            f"without v_head.summary.), got {', '.join(map(str, sorted(tensors, key=str))) or 'none'}"
        )
    found = {}
    for name, shape in (("weight", (1, width)), ("bias", (1,))):
        tensor = tensors[prefix + name]
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            raise ValueError(f"{prefix}{name} of the value head must be a float tensor, got {tensor!r}"[:300])
        if tuple(tensor.shape) != shape:
            raise ValueError(
                f"{prefix}{name} of the value head has shape {list(tensor.shape)}, and this {type(base).__name__} needs "
                f"{list(shape)}: it is another model's head"
            )
        if not torch.isfinite(tensor).all():
            raise ValueError(f"{prefix}{name} of the value head has numbers that are not finite (NaN or infinity)")
        found[name] = tensor.detach().to("cpu", torch.float32)
    return found


# ---- checks ----


def _check_model(model, base):
    name = check_stock(base)
    if not base.can_generate() or base.config.is_encoder_decoder:
        raise ValueError(
            f"model must be a causal language model or a vision-language model (AutoModelForCausalLM, "
            f"AutoModelForImageTextToText), got a {name}"
        )
    adapter = adapter_of(model)
    if adapter is not None:
        from peft.tuners.tuners_utils import BaseTuner

        if not isinstance(adapter.base_model, BaseTuner):
            raise ValueError(
                f"the model's adapter puts tokens of its own before the conversation ({type(adapter).__name__}): the backbone "
                "is run by itself, and would not see them; only adapters that lie in its layers are taken, such as LoRA's"
            )

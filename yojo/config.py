"""The settings of a patched model: everything that changes what a score means."""

import dataclasses

CHOICES = {
    "mode": ("comparative", "isolated"),
    "head": ("mlp", "linear"),
    "activation": ("silu", "gelu", "relu", "selu", "tanh"),
    "pooling": (
        "separator",
        "last",
        "first",
        "first_last_concat",
        "first_last_add",
        "first_last_sub",
        "response_mean",
    ),
    "loss": ("best", "plackett_luce", "bradley_terry", "soft"),
    "format": ("yojo", "mr2rm"),
    "turn": ("template", "generation_prompt"),
}


@dataclasses.dataclass(frozen=True)
class YojoConfig:
    """Settings of a patched model. They are saved with it, and scores mean nothing without them.

    Attributes:
        mode: "comparative", one branch holds all responses in order and later ones see earlier ones; or "isolated",
            every response is a branch of its own, so that scores equal those of single-response passes.
        permutations: in comparative mode, how many orders of the responses are scored as branches of one prompt; a
            response's score is the mean over them.
        head: "mlp", Linear(H, head_dim), activation, Linear(head_dim, 1); or "linear", Linear(H, 1).
        head_dim: width of the mlp head.
        activation: of the mlp head: "silu", "gelu", "relu", "selu" or "tanh".
        pooling: which of the final hidden states a response is scored from. "separator", the one at its closing
            separator. Or, as in the paper, those of the response's own tokens, without the separator: "last" or
            "first", of its last or first token; "first_last_concat", both, the first one first, so that the head
            reads 2H numbers; "first_last_add", their sum; "first_last_sub", last minus first (0 for a response of
            one token); "response_mean", the mean over all of its tokens. What is joined is joined in float32.
            Ordinary [B, L] inputs, which do not say where the first response begins, are scored with "separator"
            and "last" alone.
        scale_scores: divide the head's output by sqrt(H), with H the backbone's hidden size whatever the pooling.
        loss: "best", "plackett_luce", "bradley_terry" or "soft" (see `yojo_kernels.listwise_loss`).
        separator: the special token that closes every response.
        format: how prompt and responses become tokens; "yojo", the prompt through the chat template with the
            generation prompt, each response tokenised alone and closed by the separator; "mr2rm", that of the paper's
            released code, for its checkpoints: prompt and responses are one text, tokenised at once, where separators
            stand between the responses, the line breaks around them belong to the responses and the last response
            reaches to the end of the chat template. Comparative mode, permutations=1 and one of the paper's poolings
            only, which has to be named.
        turn: in the format "yojo", what stands between prompt and response. "template", what the chat template writes
            there in a conversation with the response, wherever its tokens can be had (see `yojo.inputs.turns`); or
            "generation_prompt", the generation prompt alone, as in models saved before there was a choice, which keep it.
    """

    mode: str = "comparative"
    permutations: int = 1
    head: str = "mlp"
    head_dim: int = 1024
    activation: str = "silu"
    pooling: str = "separator"
    scale_scores: bool = True
    loss: str = "best"
    separator: str = "<|resp_sep|>"
    format: str = "yojo"
    turn: str = "template"

    def __post_init__(self):
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} must be one of {', '.join(choices)}, got {getattr(self, name)!r}")
        for name in ("permutations", "head_dim"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise TypeError(f"{name} must be an int, got {value!r}")
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not isinstance(self.scale_scores, bool):
            raise TypeError(f"scale_scores must be a bool, got {self.scale_scores!r}")
        if not isinstance(self.separator, str) or not self.separator.strip():
            raise ValueError(f"separator must be a token such as '<|resp_sep|>', got {self.separator!r}")
        if self.mode == "isolated" and self.permutations > 1:
            raise ValueError(
                "permutations has no meaning in isolated mode, where no response sees another; "
                "use mode='comparative', or permutations=1"
            )

        if self.format == "mr2rm":
            self._check_released()

    def _check_released(self):
        if self.mode != "comparative" or self.permutations != 1:
            raise ValueError(
                "format='mr2rm' is the paper's comparative row, all responses once in one order: it needs "
                f"mode='comparative' and permutations=1, got mode={self.mode!r}, permutations={self.permutations}"
            )
        if self.pooling == "separator":
            poolings = ", ".join(repr(name) for name in CHOICES["pooling"] if name != "separator")
            raise ValueError(
                "format='mr2rm' has no separator behind the last response, so pooling='separator' (the default) has "
                f"nothing to read there: pass the pooling the model was trained with, one of {poolings}"
            )
        if self.turn != "template":
            raise ValueError(
                f"format='mr2rm' is the chat template's own text: it needs turn='template' (the default), got "
                f"turn={self.turn!r}"
            )

    @classmethod
    def from_dict(cls, options):
        """Make a config from a dict.

        Args:
            options: dict, field -> value; what is left out has its default.

        Returns:
            `YojoConfig`.

        Raises:
            ValueError: an unknown name (the known ones are listed), or a value that does not fit.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        unknown = sorted(set(options) - set(known))
        if unknown:
            raise ValueError(f"unknown option {', '.join(map(repr, unknown))}; the options are {', '.join(known)}")
        return cls(**options)

    @classmethod
    def from_saved(cls, options):
        """The config of a saved model; what was not saved then has the meaning it had.

        Args:
            options: dict in the model's description, yojo_config.json.

        Returns:
            `YojoConfig`.
        """
        if "turn" not in options and options.get("format", "yojo") == "yojo":
            options = {**options, "turn": "generation_prompt"}
        return cls.from_dict(options)

    def to_dict(self):
        """The fields as a plain dict, in the order they are documented."""
        return dataclasses.asdict(self)

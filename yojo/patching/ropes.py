"""Rotary embeddings whose frequencies depend on the longest position of a pass: longrope, dynamic NTK.

In a packed row that would be the longest position of anybody's, and in isolated mode one prompt would need several sets of
frequencies, one for every length of a response. So nothing may reach the length at which they change: up to there, every
token gets what it would get in a pass of its own.
"""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Switch:
    """Where the frequencies change.

    Attributes:
        kind: the rope's type in the model's config, such as "longrope".
        limit: passes of up to so many positions leave the frequencies as they are.
    """

    kind: str
    limit: int

    def check(self, positions, name, what):
        """A ValueError where `what` of the example or batch `name` needs more positions."""
        if positions > self.limit:
            raise ValueError(
                f"{name}: {what} takes {positions} positions, and beyond {self.limit} this model's rope ({self.kind}) changes "
                "its frequencies for all tokens of the pass, so that its score would depend on what else is in the row: "
                "shorten it, or leave it out"
            )


def switch_of(base):
    """The lowest `Switch` among the ropes of a model's decoder; None where frequencies never change."""
    text_config = base.config.get_text_config()
    found = list(_switches(getattr(text_config, "rope_parameters", None), text_config, text_config, ""))
    for module in base.get_decoder().modules():
        if (kinds := getattr(module, "rope_type", None)) is not None:
            config = getattr(module, "config", text_config)
            parameters = getattr(config, "rope_parameters", None)
            if isinstance(kinds, str):
                parameters = {**(parameters or {}), "rope_type": kinds}
            found += _switches(parameters, config, module, type(module).__name__)
    return min(found, key=lambda switch: switch.limit, default=None)


def _switches(parameters, config, holder, rotary):
    """Those of a config's `rope_parameters`: one dict, or one for every type of layer."""
    parameters = parameters or {}
    if "rope_type" not in parameters:
        for one in parameters.values():
            if isinstance(one, dict):
                yield from _switches(one, config, holder, rotary)
        return
    kind = parameters["rope_type"]
    longest = getattr(config, "max_position_embeddings", None)
    if "dynamic" in kind:
        # One less: having grown in an ordinary pass, they go back at lengths below the original one only.
        yield Switch(kind, getattr(holder, "original_max_seq_len", longest) - 1)
    elif kind == "longrope" or (rotary == "PhimoeRotaryEmbedding" and kind != "default"):  # which scales by the length
        original = parameters.get("original_max_position_embeddings")
        yield Switch(kind, original or getattr(config, "original_max_position_embeddings", None) or longest)

"""Positions of a prompt and of what follows it, as the model itself counts them."""

import inspect

import torch

from yojo import families


class PromptPositions:
    """Positions a model gives to a prompt: M-RoPE through the model's own code, else a plain count.

    Holds no weights, so that a DataLoader worker can carry it.
    """

    def __init__(self, model):
        backbone = model.base_model
        self.first = families.family_of(model.config).first_position
        self.shell = None
        if hasattr(backbone, "get_rope_index"):
            # The method reads nothing but the configuration, so a module without its weights is enough.
            self.shell = type(backbone).__new__(type(backbone))
            torch.nn.Module.__init__(self.shell)
            self.shell.config = backbone.config
            self.accepts = set(inspect.signature(type(backbone).get_rope_index).parameters)

    def __call__(self, prompt):
        """Positions of a processed prompt, and of the text that follows it.

        Args:
            prompt: dict of a processor's outputs, `input_ids` [1, P] among them.

        Returns:
            (positions [axes, P] int64, next int): axes = 1, or 3 for M-RoPE; a token that follows has position `next`
            on every axis.
        """
        input_ids = prompt["input_ids"]
        length = input_ids.shape[1]
        if self.shell is None:
            return torch.arange(length)[None, :] + self.first, length + self.first
        # One token of text more, so that the model itself says where text goes on. That is not always behind the
        # largest position: after a long video, transformers' Qwen2-VL goes on from the frame's height and width.
        inputs = {name: value for name, value in prompt.items() if name in self.accepts and name != "attention_mask"}
        inputs["input_ids"] = torch.nn.functional.pad(input_ids, (0, 1))
        if "mm_token_type_ids" in self.accepts:
            types = inputs.get("mm_token_type_ids", torch.zeros_like(input_ids))
            inputs["mm_token_type_ids"] = torch.nn.functional.pad(types, (0, 1))
        positions, _ = self.shell.get_rope_index(**inputs)
        return positions[:, 0, :length], int(positions[0, 0, length])

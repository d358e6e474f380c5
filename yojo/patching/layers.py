"""The modules that transformers builds decoder layers from, by class name, over all decoders that are known."""

from yojo.families import DECODERS

# What is added to the weight of an RMSNorm, and Liger's name for when the weight comes in; see `yojo.families.Decoder`.
NORMS = {name: decoder.norm for decoder in DECODERS for name in decoder.norms}
MLPS = {name for decoder in DECODERS for name in decoder.mlps}
ATTENTIONS = {name for decoder in DECODERS for name in decoder.attentions}

# Of gated MLPs, the activations that Liger has.
ACTIVATIONS = {"SiLU": "silu", "SiLUActivation": "silu", "GELUTanh": "gelu"}

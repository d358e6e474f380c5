"""The families of backbones, each in a file of its own that says all that differs between it and the others.

To add one, write such a file and name it in `_FILES`; a family that is like another is a row more in the other's file.
Nothing else needs to know of it. It is tested once it has a tiny model and prompts in `tests/tiny.py`.
"""

from yojo import former
from yojo.families import (
    gemma3,
    idefics,
    internvl,
    llava_onevision,
    mistral,
    molmo2,
    paligemma,
    qwen_vl,
    text,
)
from yojo.families.family import TOKEN_TYPES, Blocks, Decoder, Family, Tower

__all__ = ["DECODERS", "FAMILIES", "TOKEN_TYPES", "Blocks", "Decoder", "Family", "Tower"]
__all__ += ["decoder_of", "family_of", "is_known", "tower_of"]

_FILES = (qwen_vl, molmo2, gemma3, llava_onevision, internvl, idefics, mistral, paligemma, text)
FAMILIES = tuple(family for file in _FILES for family in file.FAMILIES)
DECODERS = tuple(decoder for file in _FILES for decoder in file.DECODERS)


def family_of(config):
    """The `Family` of a model config; one without special facts for a `model_type` not listed."""
    for family in FAMILIES:
        if config.model_type in family.model_types:
            return family
    return Family(config.model_type, (config.model_type,))


def is_known(config):
    """Whether the facts of this model's family are listed here."""
    return any(config.model_type in family.model_types for family in FAMILIES)


def decoder_of(config):
    """The `Decoder` of a text config; None for one that is not listed."""
    return next((decoder for decoder in DECODERS if decoder.model_type == config.model_type), None)


def tower_of(config):
    """The `Tower` of a model config; None for one that is not listed."""
    for family in FAMILIES:
        if family.tower is not None and config.model_type in (*family.model_types, *family.tower.also):
            return family.tower
    return None


def __getattr__(name):
    """What was in this module before it held facts alone: joining, positions, attention modules."""
    return former(__name__, name)

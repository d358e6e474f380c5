"""The tokens that stand for images, videos and audio in a prompt's ids."""

import re

# Names of the attributes of processors, tokenizers and configs that hold placeholder tokens, as image_token, boi_token_id,
# image_token_index, low_res_image_start_token_id, image_patch_id, video_start_id or fake_image_token.
_MEDIA = {
    "video": r"videos?|frames?",
    "audio": r"audios?|boa|eoa|sound|speech",
    "image": r"images?|img|vision|visual|boi|eoi|tile|slice",
}


_ENDS = "token|tag|patch|col|start|end|newline|break"


_PLACEHOLDER = {
    kind: re.compile(rf"(?!num_)(.*_)?({words})_(.*_)?({_ENDS})(_ids?|_index)?|{kind}_ids")
    for kind, words in _MEDIA.items()
}


def placeholder_tokens(processor, config=None):
    """Find the tokens that stand for images, videos and audio, their beginnings, ends and parts, in a prompt's ids.

    In a text they would be taken for media that is not there.

    Args:
        processor: the model's processor, or its tokenizer.
        config: the model's config, which names some that no processor does (Molmo2's patches); or None.

    Returns:
        dict "image", "video", "audio" -> set of str. Ids of a config that are ordinary words of the vocabulary (a
        default nobody set) are no placeholders.
    """
    tokenizer = getattr(processor, "tokenizer", None) or processor
    added = {i: str(token) for i, token in getattr(tokenizer, "added_tokens_decoder", {}).items()}
    found = {kind: set() for kind in ("image", "video", "audio")}
    for name, value in _named_tokens(processor, tokenizer, config):
        kind = next((kind for kind, pattern in _PLACEHOLDER.items() if pattern.fullmatch(name)), None)
        if kind is None:
            continue
        for item in value if isinstance(value, (list, tuple, set)) else [value]:
            if isinstance(item, int) and not isinstance(item, bool):
                item = added.get(item)
            # The name of an unknown token stands for whatever is unknown, a line break for line breaks.
            if isinstance(item, str) and item.strip() and item != getattr(tokenizer, "unk_token", None):
                found[kind].add(item)
    return found


def _named_tokens(processor, tokenizer, config):
    """(name, value) of all that may name a token; the tokenizer's own are those of `extra_special_tokens`."""
    names = {**getattr(tokenizer, "_special_tokens_map", {})}
    # Some processors have them as properties, and configs under the name their family knows them by.
    common = [f"{kind}_{end}" for kind in ("image", "video", "audio") for end in ("token", "token_id", "token_ids")]
    for source in (processor, tokenizer, config):
        if source is not None:
            yield from ((name, getattr(source, name, None)) for name in common)
            yield from vars(source).items() if hasattr(source, "__dict__") else ()
    yield from ((name, None if value is None else str(value)) for name, value in names.items())

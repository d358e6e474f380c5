"""Whether a prompt has a place for each vision feature that its pixels make: an example's own fault, found early."""


def check(prompt, family, config):
    """Check that a processed prompt has as many places for features of images and videos as its pixels make.

    Where it has not, the model fails on the whole row, whose other examples are good. For families whose features
    nobody counts here the model says it.

    Args:
        prompt: dict of a processor's outputs, `input_ids` [1, P] among them.
        family: its `yojo.families.Family`.
        config: the model's.

    Raises:
        ValueError: other numbers of places and features; the message names neither example nor family.
    """
    if family.count is None:
        return
    made = family.count(prompt, config)
    tokens = {
        kind: getattr(config, name, None) for kind, name in (("image", "image_token_id"), ("video", family.video_token))
    }
    for token in set(tokens.values()) - {None}:  # one for both in Molmo2
        features = sum(made.get(kind, 0) for kind, own in tokens.items() if own == token)
        places = int((prompt["input_ids"] == token).sum())
        if places != features:
            raise ValueError(
                f"the prompt has {places} places for vision features, and its pixels make {features}: the processor "
                "takes either in one prompt, images or videos, or the prompt and its pixels do not belong together"
            )

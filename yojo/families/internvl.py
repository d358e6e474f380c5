"""InternVL: images and the frames of videos are tiles of one size, each behind a class token."""

from yojo.families.family import PROJECTOR, Family, Tower, alike, count_per_picture, tile_grids


def count_features(prompt, config):
    """As many for every tile."""
    return count_per_picture(prompt, config.image_seq_length)


def pictures(tensors, kind, config):
    """Each tile, so that a frame that stands still is one, too."""
    return alike(tensors, config.image_seq_length)


def tokens(config, height, width):
    """Patches are shuffled into fewer."""
    return round(height * width * config.downsample_ratio**2)


FAMILIES = (
    Family(
        "InternVL",
        ("internvl",),
        decoders=("qwen2",),
        takes=("image", "video"),
        features="replaced",
        count=count_features,
        pictures=pictures,
        tower=Tower(tile_grids, tokens, rows=PROJECTOR, class_tokens=1),
    ),
)

DECODERS = ()

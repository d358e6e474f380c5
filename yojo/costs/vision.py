"""How many rows the layers of a vision tower see, by what its family says of it; nothing here is run in a pass."""

import dataclasses

from yojo import families
from yojo.families.family import PIXELS, patch_size


@dataclasses.dataclass(frozen=True)
class Rows:
    """Rows that the layers of a vision tower see, and pairs that its attention computes, for one batch.

    Attributes:
        pixels: positions of the patch embedding; more than patches where images are padded to one size.
        patches: rows inside the tower (class tokens included).
        merged: rows behind it, one per token that the decoder gets.
        members: patches gathered for pooling attention (Molmo2); 0 elsewhere.
        frame_pairs: (query, key) pairs of an attention layer in which each image or frame sees itself.
        window_pairs: the same for the layers that see windows (Qwen2.5-VL).
        row_pairs: all pairs of patches, what a dense implementation computes where images stand in one sequence
            behind a mask (Mistral 3); equal to frame_pairs elsewhere.
    """

    pixels: int = 0
    patches: int = 0
    merged: int = 0
    members: int = 0
    frame_pairs: int = 0
    window_pairs: int = 0
    row_pairs: int = 0


def tower_of(config):
    """The `yojo.families.Tower` of a model config.

    Raises:
        ValueError: a family whose vision tower is not described there.
    """
    tower = families.tower_of(config)
    if tower is not None:
        return tower
    described = [family for family in families.FAMILIES if family.tower is not None]
    known = ", ".join(name for family in described for name in (*family.model_types, *family.tower.also))
    raise ValueError(
        f"how many rows the vision tower of {config.model_type!r} sees is not known to yojo/families/ (it knows "
        f"{known}): count a text-only batch, or measure with torch.utils.flop_counter.FlopCounterMode"
    )


def rows_of_tensors(config, tensors):
    """`Rows` of a batch's vision tensors; None where there are none.

    Args:
        config: the model's config.
        tensors: dict name -> tensor, as `yojo.Collator` or a processor returns them; other names are ignored. Only
            shapes, grids and sizes are read.
    """
    if not any(name in tensors for name in PIXELS.values()):
        return None
    tower = tower_of(config)
    rows = rows_of_grids(config, tower.grids(config, tensors))
    if tower.in_one_row:
        count, _, height, width = tensors["pixel_values"].shape
        patch = patch_size(config)
        rows = dataclasses.replace(rows, pixels=count * (height // patch) * (width // patch))
    tables = [tensors[name] for name in tower.tables if name in tensors]
    if tables:
        rows = dataclasses.replace(
            rows, merged=sum(table.shape[0] for table in tables), members=sum(table.numel() for table in tables)
        )
    return rows


def rows_of_grids(config, grids):
    """`Rows` of images given as (frames, height, width) in patches; see `yojo.families.Tower.grids`."""
    tower = tower_of(config)
    frames = [(height, width) for count, height, width in grids for _ in range(count)]
    sizes = [height * width + tower.class_tokens for height, width in frames]
    merged = sum(tower.tokens(config, height, width) for height, width in frames)
    pairs = sum(size**2 for size in sizes)
    windows = []
    if tower.windows is not None:
        windows = [size for height, width in frames for size in tower.windows(config.vision_config, height, width)]
    return Rows(
        pixels=sum(height * width for height, width in frames),
        patches=sum(sizes),
        merged=merged,
        members=tower.members * merged,
        frame_pairs=pairs,
        window_pairs=sum(size**2 for size in windows),
        row_pairs=sum(sizes) ** 2 if tower.in_one_row else pairs,
    )


def sees_windows(config, layer):
    """Whether the tower's attention layer of this index (in order of execution) sees windows rather than frames."""
    tower = tower_of(config)
    return tower.windows is not None and layer not in getattr(config.vision_config, tower.whole_layers)

"""What can be said of a family of backbones: the rows that each family's file fills in, and helpers that several use.

Rows are facts. What makes use of them stands in the rooms above: `yojo.patching` (positions, joining, placing features,
the last layer, fused layers), `yojo.inputs` (how many features a prompt's pixels make) and `yojo.costs` (FLOPs). Their
functions have names, so that a row can be pickled with the collator that holds it.
"""

import dataclasses
import math
import typing

# What an image and what a video becomes: every family's pixels come under these names.
PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}

# Per-token inputs beside input_ids; which of them a processor returns depends on the family.
TOKEN_TYPES = ("token_type_ids", "mm_token_type_ids")

LLAMA_NORM = (0.0, "llama")
GEMMA_NORM = (1.0, "gemma")


@dataclasses.dataclass(frozen=True)
class Blocks:
    """Which tokens of a prompt see each other in both directions.

    Attributes:
        says: what the table of families says of it.
        ids: function of a processed prompt (dict of tensors) -> [P] block ids, -1 = none; None where it has no block.
        sizes: function (tokens of the prompt, list of the tokens of each image) -> tuple of the blocks' sizes.
        whole_prompt: the prompt is one block to its last token. Such a model declares its layers bidirectional and
            restores causality behind the prompt with its mask, and lets a prompt see itself beyond its sliding window.
    """

    says: str
    ids: typing.Callable
    sizes: typing.Callable
    whole_prompt: bool = False


@dataclasses.dataclass(frozen=True)
class Tower:
    """What a family's vision tower computes for its images; for counting, nothing here is run in a pass.

    Attributes:
        grids: function (model config, dict of the processor's vision tensors) -> list of (frames, height, width), the
            patches of each image, tile, crop or video.
        tokens: function (model config, height, width) -> tokens that the decoder gets for one frame of so many
            patches.
        rows: parts of module names -> the field of `yojo.costs.vision.Rows` that says how many rows they see; the first
            that fits counts. Where none does, "pixels" for convolutions and "patches" for the rest.
        class_tokens: rows that the tower adds to every frame.
        matrices: names of parameters that are multiplied with, though no Linear holds them.
        in_one_row: all images stand in one sequence, kept apart by a mask.
        tables: names of tensors [tokens, patches], the patches that are gathered for each token.
        members: patches that are gathered for a token where there is no such table; 0 for a tower that gathers none.
        windows: function (vision config, height, width) -> list of the windows' sizes in a frame of so many patches;
            None where no layer sees windows.
        whole_layers: the vision config's name for the layers that see whole frames, where there are windows.
        also: the `config.model_type` values of other models with this tower: their images are counted, but they are no
            listed family for it.
    """

    grids: typing.Callable
    tokens: typing.Callable
    rows: dict[str, str] = dataclasses.field(default_factory=dict)
    class_tokens: int = 0
    matrices: tuple[str, ...] = ()
    in_one_row: bool = False
    tables: tuple[str, ...] = ()
    members: int = 0
    windows: typing.Callable | None = None
    whole_layers: str | None = None
    also: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Facts about one kind of text decoder, whichever families it stands in; class names are those of transformers.

    Attributes:
        model_type: the text config's.
        norms: class names of its RMSNorms.
        mlps: class names of its MLPs that compute down_proj(act_fn(gate_proj(x)) * up_proj(x)).
        attentions: class names of attention that calls `apply_rotary_pos_emb` of its module, which rotates halves:
            M-RoPE has then joined its axes.
        norm: what its RMSNorms add to the weight, and Liger's name for when the weight comes in, after rounding to
            the input's dtype ("llama") or before ("gemma").
        token_wise: its layers treat every token alone but for their attention, and its final norm does, so that the
            last layer can be computed for the rows that are read alone (see `yojo.patching.last_layer`). To be tested
            for each.
    """

    model_type: str
    norms: tuple[str, ...] = ()
    mlps: tuple[str, ...] = ()
    attentions: tuple[str, ...] = ()
    norm: tuple[float, str] = LLAMA_NORM
    token_wise: bool = True


@dataclasses.dataclass(frozen=True)
class Family:
    """Facts about one family of backbones.

    Attributes:
        name: the name users know.
        model_types: the `config.model_type` values it covers.
        decoders: the `Decoder.model_type` of text decoders that it is tested with.
        takes: what its processor takes beside text: "image", "video".
        blocks: `Blocks`; or None for a family whose attention is causal throughout.
        first_position: position of a prompt's first token, where the model counts in one dimension.
        passes_token_types: the model wants its token types even when they change nothing.
        one_kind: whether the model takes either images or videos in one pass.
        join: tensor name -> the dimension along which the tensors of several prompts are joined; 0 by default.
        padded: tensor name -> dimensions that may differ between prompts; they are filled up with zeros, which the
            model cuts off again.
        offsets: tensor name -> the name of the tensor whose entries (the product of its first two dimensions) it
            indexes; indices are shifted when prompts are joined, negative ones are left alone.
        features: whether vision features replace the embeddings of their placeholders ("replaced") or are added to
            them ("added"); None: the model's own forward does it, and waits for the device (see `yojo.patching.media`).
        video_token: the config's name for the id of a video's placeholders.
        count: function (processed prompt, model config) -> dict "image" or "video" -> how many features its pixels
            make; a ValueError for pixels that the model cannot take. None: the model says it, for a row as a whole.
        uncounted: why `count` is None, for a family that takes images.
        sizes: names of vision tensors that the model asks for their values; they are kept on the CPU for it.
        indices: function (vision config, a `..._grid_thw`) -> dict of the keyword arguments that let the vision tower
            do without the grid on the device; None for a family without grids.
        pictures: function (dict of the tensors of a prompt's images, or of its videos; "image" or "video"; model config)
            -> list of (dict of the tensors of one picture, how many features it makes): what the vision tower sees each
            apart from all others, in order. None where those of this prompt cannot be taken apart; instead of a function,
            where those of no prompt can.
        tower: its `Tower`; None for a family without one.
    """

    name: str
    model_types: tuple[str, ...]
    decoders: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()
    blocks: Blocks | None = None
    first_position: int = 0
    passes_token_types: bool = False
    one_kind: bool = False
    join: dict[str, int] = dataclasses.field(default_factory=dict)
    padded: dict[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    offsets: dict[str, str] = dataclasses.field(default_factory=dict)
    features: str | None = None
    video_token: str = "video_token_id"
    count: typing.Callable | None = None
    uncounted: str = ""
    sizes: tuple[str, ...] = ()
    indices: typing.Callable | None = None
    pictures: typing.Callable | None = None
    tower: Tower | None = None

    @property
    def has_prefix(self):
        """Whether a prompt sees itself as a whole, in both directions."""
        return self.blocks is not None and self.blocks.whole_prompt


# ---- what the rows of several families are made of ----


def token_types(prompt):
    """[1, P], the token types of a processed prompt; None where its processor gives none."""
    return next((prompt[name] for name in TOKEN_TYPES if name in prompt), None)


def patch_size(config):
    """Pixels along a side of a patch, of a model config."""
    size = config.vision_config.patch_size
    return size if isinstance(size, int) else size[0]


def tile_grids(config, tensors):
    """Grids of pixels [..., channels, height, width]: every entry of the leading dimensions is a frame of its own."""
    grids = []
    for pixels in (tensors[name] for name in PIXELS.values() if name in tensors):
        *leading, _, height, width = pixels.shape
        grids.append((math.prod(leading), height // patch_size(config), width // patch_size(config)))
    return grids


def all_patches(config, height, width):
    """A token for every patch of a frame."""
    return height * width


def count_per_picture(prompt, tokens):
    """Features of a prompt whose pictures, pixel_values [n, 3, height, width], make `tokens` of them each."""
    return {"image": prompt["pixel_values"].shape[0] * tokens} if "pixel_values" in prompt else {}


def cut(tensors, sizes, dim=0):
    """Cut the vision tensors of a prompt into those of its pictures.

    Args:
        tensors: dict name -> tensor.
        sizes: dict name -> how many entries of the dimension each picture has.
        dim: the dimension.

    Returns:
        list of dicts name -> tensor, views; None where the tensors are others, or longer or shorter.
    """
    if tensors.keys() != sizes.keys() or any(sum(sizes[name]) != tensors[name].shape[dim] for name in sizes):
        return None
    pieces = {name: tensors[name].split(sizes[name], dim) for name in sizes}
    return [dict(zip(pieces, parts, strict=True)) for parts in zip(*pieces.values(), strict=True)]


def alike(tensors, tokens):
    """`Family.pictures` of a prompt whose pictures, pixel_values [n, 3, height, width], make `tokens` features each."""
    pieces = cut(tensors, {name: [1] * len(tensor) for name, tensor in tensors.items() if name == PIXELS["image"]})
    return None if pieces is None else [(piece, tokens) for piece in pieces]


PROJECTOR = {"multi_modal_projector": "merged"}  # rows of the module between tower and decoder

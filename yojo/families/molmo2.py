"""Molmo2: all image tokens of a prompt are one block, features are pooled by tables and added to their placeholders."""

import math
import re

import torch

from yojo.families.family import PIXELS, Blocks, Decoder, Family, Tower, cut, token_types

_TABLES = {"image": "image_token_pooling", "video": "video_token_pooling"}


def block_ids(prompt):
    """All image and frame tokens of the prompt are one block."""
    types = token_types(prompt)
    return None if types is None else torch.where(types[0] == 1, 0, -1)


def block_sizes(prompt, images):
    """One block of all images' tokens."""
    return (sum(images),)


def count_features(prompt, config):
    """A feature for every row of a table that pools anything."""
    return {kind: int((prompt[name] >= 0).any(dim=-1).sum()) for kind, name in _TABLES.items() if name in prompt}


def pictures(tensors, kind, config):
    """Each image with its crops, each video with its frames; tables say which of a prompt's patches are pooled."""
    pixels, table, grids = PIXELS[kind], _TABLES[kind], f"{kind}_grids"
    if not {pixels, table, grids} <= tensors.keys() or (kind == "image" and "image_num_crops" not in tensors):
        return None
    if kind == "image":
        crops = tensors["image_num_crops"].tolist()
        rows = [h * w + more_h * more_w for h, w, more_h, more_w in tensors[grids].tolist()]
    else:
        crops = tensors[grids][:, 0].tolist()
        rows = [frames * h * w for frames, h, w in tensors[grids].tolist()]
    sizes = {pixels: crops, table: rows}
    pieces = cut(tensors, sizes | {name: [1] * len(rows) for name in tensors if name not in sizes})
    if pieces is None:
        return None
    found, start = [], 0
    for piece in pieces:
        end = start + piece[pixels].shape[0] * piece[pixels].shape[1]
        pooled = piece[table]
        if bool(((pooled >= 0) & ((pooled < start) | (pooled >= end))).any()):
            return None  # of another picture's patches
        piece[table] = torch.where(pooled >= 0, pooled - start, pooled)
        found.append((piece, int((pooled >= 0).any(dim=-1).sum())))
        start = end
    return found


def crop_grids(config, tensors):
    """Pixels [crops, patches, pixels of a patch], square crops."""
    grids = []
    for pixels in (tensors[name] for name in PIXELS.values() if name in tensors):
        side = math.isqrt(pixels.shape[1])
        grids.append((pixels.shape[0], side, pixels.shape[1] // side))
    return grids


def pooled_tokens(config, height, width):
    """2 x 2 patches are pooled, where no table says it better."""
    return height * width // 4


FAMILIES = (
    Family(
        "Molmo2",
        ("molmo2",),
        decoders=("molmo2_text",),
        takes=("image", "video"),
        blocks=Blocks("all images and frames of a prompt as one", block_ids, block_sizes),
        passes_token_types=True,
        one_kind=True,
        offsets={_TABLES[kind]: pixels for kind, pixels in PIXELS.items()},
        features="added",
        video_token="image_token_id",
        count=count_features,
        pictures=pictures,
        sizes=("image_grids", "video_grids"),
        tower=Tower(
            crop_grids,
            pooled_tokens,
            rows={
                "image_pooling_2d.k_proj": "members",
                "image_pooling_2d.v_proj": "members",
                "patch_embedding": "pixels",
                "multi_modal_projector": "merged",
            },
            tables=tuple(_TABLES.values()),
            members=4,
        ),
    ),
)

DECODERS = (Decoder("molmo2_text", norms=("Molmo2RMSNorm",), mlps=("Molmo2MLP",), attentions=("Molmo2Attention",)),)

# ---- names of its remote code, which adapters of the paper's released code have ----

REMOTE_LAYER = re.compile(
    r"model\.transformer\.blocks\.(\d+)\.(self_attn\.att_proj|self_attn\.attn_out|mlp\.ff_proj|mlp\.ff_out)"
)
REMOTE_EMBEDDINGS = ("model.transformer.wte.embedding", "model.transformer.wte.new_embedding")
# Fused module of the remote code -> transformers' modules, in the order of the fused rows. ff_proj computes (x, gate)
# and then act(gate) * x, so the gate's rows are the second half.
REMOTE_PARTS = {
    "self_attn.att_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.attn_out": ("self_attn.o_proj",),
    "mlp.ff_proj": ("mlp.up_proj", "mlp.gate_proj"),
    "mlp.ff_out": ("mlp.down_proj",),
}

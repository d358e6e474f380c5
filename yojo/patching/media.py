"""Vision features into a packed row without asking the device: the collator knows which rows they replace.

transformers finds the placeholders of images by their id and checks their number on the device, takes rows out with
boolean masks, and reads the sizes of images back from the device: each time the host waits. Here the rows, the sizes and
the indices of the vision tower come from the collator; features are the family's own, from its `get_image_features`.
"""

import dataclasses
import functools
import inspect

import torch

from yojo.families.family import PIXELS
from yojo.patching import methods, sharing


@dataclasses.dataclass(frozen=True, eq=False)
class Placeholders:
    """Which rows of a packed row vision features replace, and what the vision tower needs besides pixels.

    Attributes:
        rows: dict "image" or "video" -> [n] int64, the rows its features go to, in order.
        indices: dict name -> tensor, keyword arguments of `get_image_features` and `get_video_features`.
        sizes: likewise, what is asked for its values and therefore stays on the CPU: numbers and small tensors.
        shared: `yojo.patching.sharing.Shared` where the row's vision tensors hold pictures once that stand in it several
            times; else None.
    """

    rows: dict
    indices: dict = dataclasses.field(default_factory=dict)
    sizes: dict = dataclasses.field(default_factory=dict)
    shared: sharing.Shared | None = None

    def to(self, device, non_blocking=False):
        """The same for a model on another device; `sizes` stay where they are."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self):
        """The same in page-locked memory; DataLoader(pin_memory=True) calls this."""
        return self._map(lambda tensor: tensor.pin_memory())

    def _map(self, function):
        rows = {name: function(tensor) for name, tensor in self.rows.items()}
        shared = self.shared
        if shared is not None:
            features = {name: function(tensor) for name, tensor in shared.features.items()}
            shared = dataclasses.replace(shared, features=features)
        indices = {name: function(tensor) for name, tensor in self.indices.items()}
        return Placeholders(rows, indices, self.sizes, shared)


def can_place(base, family):
    """Whether the features of this model can be placed by rows.

    The family must be known for it, and transformers recent enough for its forward to take encoder outputs (5.18): since
    then they come in one form from all families.
    """
    if family.features is None:
        return False
    return "mm_encoder_outputs" in inspect.signature(type(base.base_model).forward).parameters


def placeholders(prompts, starts, tensors, family, config, shared=None):
    """Find the placeholders of a packed row; on the CPU, before it goes to the model.

    Args:
        prompts: list of [P] int64, the ids of every prompt.
        starts: the row each of them starts at.
        tensors: dict name -> tensor, the joined vision tensors of the row.
        family: their `yojo.families.Family`.
        config: the model's.
        shared: the `Shared` of these tensors, or None.

    Returns:
        `Placeholders`.
    """
    kinds = [kind for kind, pixels in PIXELS.items() if pixels in tensors]
    rows, indices, sizes = {}, {}, {}
    for kind in kinds:
        token = getattr(config, family.video_token if kind == "video" else "image_token_id")
        rows[kind] = torch.cat(
            [(ids == token).nonzero()[:, 0] + start for ids, start in zip(prompts, starts, strict=True)]
        )
    if family.indices is not None:
        for kind in kinds:
            for name, value in family.indices(config.vision_config, tensors[f"{kind}_grid_thw"]).items():
                # Boundaries and numbers are asked for; a flash attention wants the boundaries on the device, see `embed`.
                asked = not isinstance(value, torch.Tensor) or name.startswith("cu_")
                (sizes if asked else indices)[f"{kind}_{name}"] = value
    sizes.update({name: tensors[name] for name in family.sizes if name in tensors})
    return Placeholders(rows, indices, sizes, shared)


def install(base, family):
    """Let a decoder that adds vision features to its first layers take rows instead of a mask."""
    decoder = base.get_decoder()
    if family.features is not None and hasattr(type(decoder), "_deepstack_process"):
        methods.put(decoder, "_deepstack_process", _add_at_rows)


def remove(base):
    """Undo `install`."""
    base.get_decoder().__dict__.pop("_deepstack_process", None)


def is_watched(base):
    """Whether hooks wait for the backbone to be called with images, or something else has replaced its forward."""
    backbone = base.base_model
    return bool(
        backbone._forward_hooks
        or backbone._forward_pre_hooks
        or "forward" in backbone.__dict__
        or hasattr(backbone, "_hf_hook")
    )


def whole(batch, family):
    """A batch of `yojo.Collator` as a model takes it that places vision features itself: no `Placeholders`, and every picture
    as often as it stands in the row."""
    batch = dict(batch)
    found = batch.pop("placeholders", None)
    return batch if found is None or found.shared is None else sharing.unshare(batch, found.shared, family)


def embed(base, inputs, found, family):
    """Turn the inputs of the backbone with images into inputs without.

    Args:
        base: the patched model.
        inputs: dict, what the backbone would be called with; not changed.
        found: the row's `Placeholders`, on the model's device.
        family: its `Family`.

    Returns:
        (module, inputs): what to call instead, the backbone or its decoder, with the embeddings of the row.

    Raises:
        ValueError: as many features as there are placeholders were not made.
    """
    backbone, inputs, config = base.base_model, dict(inputs), base.config
    input_ids = inputs.pop("input_ids")
    # Not the vocabulary's size: Molmo2's placeholders lie beyond it in rows of their own, and features are added to them.
    if config.image_token_id >= base.get_input_embeddings().weight.shape[0]:
        for rows in found.rows.values():
            input_ids = input_ids.index_fill(1, rows, 0)
    embeddings = base.get_input_embeddings()(input_ids)
    deepstack = []
    for kind, rows in found.rows.items():
        features = _features(backbone, kind, inputs, found)
        values = features.pooler_output
        values = torch.cat(list(values)) if isinstance(values, (tuple, list)) else values.flatten(0, -2)
        wanted = rows.shape[0] if found.shared is None else found.shared.made[kind]
        if values.shape[0] != wanted:
            raise ValueError(
                f"the row has {wanted} placeholders of {kind}s, and {values.shape[0]} {kind} features were made "
                "for them: the prompt and its pixels do not belong together"
            )
        values = _each(values.to(embeddings.device, embeddings.dtype), kind, found)[None]
        place = embeddings.index_add if family.features == "added" else embeddings.index_copy
        embeddings = place(1, rows, values)
        if (stack := getattr(features, "deepstack_features", None)) is not None:
            deepstack.append([_each(torch.cat(list(layer)), kind, found) for layer in stack])
    for kind in PIXELS:
        for name in _parameters(type(backbone), f"get_{kind}_features"):
            inputs.pop(name, None)
    inputs["inputs_embeds"] = embeddings
    if not deepstack:
        return backbone, inputs
    inputs["visual_pos_masks"] = torch.cat(list(found.rows.values()))
    inputs["deepstack_visual_embeds"] = [torch.cat(layer) for layer in zip(*deepstack, strict=True)]
    return base.get_decoder(), inputs


def _each(values, kind, found):
    """A feature for every placeholder."""
    if found.shared is None:
        return values
    rows = found.shared.features[kind].to(values.device)
    return values[rows]  # whose backward, unlike index_select's, adds in the same order every time


def _features(backbone, kind, inputs, found):
    method = getattr(backbone, f"get_{kind}_features")
    names = [name for name in _parameters(type(backbone), f"get_{kind}_features") if name in inputs]
    own = {name: value for name, value in (found.indices | found.sizes).items() if name.startswith(f"{kind}_")}
    own |= {name: found.sizes[name] for name in names if name in found.sizes}
    offsets = [name for name in own if name.startswith(f"{kind}_cu_")]
    if offsets and _is_flash(backbone.config.vision_config):
        own |= {name: own[name].to(inputs[PIXELS[kind]].device, non_blocking=True) for name in offsets}
    return method(**{name: inputs[name] for name in names} | own, return_dict=True)


@functools.cache
def _parameters(cls, name):
    """Names of the parameters of a class's method, without `self`; none where it has no such method."""
    method = getattr(cls, name, None)
    return () if method is None else tuple(inspect.signature(method).parameters)[1:]


def _is_flash(config):
    from transformers.utils.generic import is_flash_attention_requested

    return is_flash_attention_requested(config)


def _add_at_rows(self, hidden_states, visual_pos_masks, visual_embeds):
    """As the class's own, for rows [n] int64 as well as for a mask [1, T] bool."""
    if visual_pos_masks.dtype == torch.bool:
        return type(self)._deepstack_process(self, hidden_states, visual_pos_masks, visual_embeds)
    return hidden_states.index_add(1, visual_pos_masks, visual_embeds.to(hidden_states.dtype)[None])

"""The parts of a reward model that are saved by themselves: its adapter, its value head, weights that changed beside them."""

import torch

from yojo.patching import fingerprints
from yojo.patching.state import patched_base


def active_head(base):
    """The value head that scores: PEFT's trained copy where `modules_to_save` made one."""
    head = base.score
    return head.modules_to_save[head.active_adapter] if hasattr(head, "modules_to_save") else head


def adapter_of(model):
    """The PEFT model inside torch.compile and DistributedDataParallel, or None."""
    while True:
        if hasattr(model, "_orig_mod"):  # first, since a compiled model has all attributes of the one inside
            model = model._orig_mod
        elif hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
            return model
        elif isinstance(model, torch.nn.parallel.DistributedDataParallel):
            model = model.module
        else:
            return None


def scoring_adapter(model):
    """The name of the adapter that a PEFT model scores with; a ValueError where it is not one and a whole one."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

    if not isinstance(model.base_model, BaseTuner):
        config = model.peft_config[model.active_adapter]
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        raise ValueError(
            f"an adapter of kind {kind} puts tokens of its own before the prompt: packed rows have no place for them"
        )
    status = model.get_model_status()
    active = status.active_adapters
    if status.num_adapter_layers and status.enabled is not True:
        raise ValueError(
            "the model's adapter is disabled, in some layers at least, and its scores are not the adapter's: "
            "model.enable_adapter_layers() first, or model.unload() to keep the model without it"
        )
    if not status.num_adapter_layers:
        active = model.active_adapters
    if active == "irregular" or len(active) != 1:
        raise ValueError(
            f"the model scores with {'other adapters in some layers' if active == 'irregular' else f'{len(active)} adapters at once'}"
            ", and a saved reward model has one: model.set_adapter(name), or merge them (add_weighted_adapter)"
        )
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    merged = sorted({name for layer in layers for name in layer.merged_adapters})
    if merged not in ([], list(active)):
        raise ValueError(
            f"adapters are merged into the weights ({', '.join(merged)}) that are not the active one, {active[0]}: "
            "model.unmerge_adapter() first"
        )
    embedding = patched_base(model, "saving").get_input_embeddings()
    if merged and getattr(embedding, "merged", False):
        raise ValueError("the adapter is merged into the embedding: model.unmerge_adapter() first, then save")
    return active[0]


def weights_beside(base, tensors):
    """The backbone's weights that are saved with an adapter, since they are not the base model's any more.

    Those are what takes gradients outside of the adapter, and what has changed since the model was patched.

    Args:
        base: a patched model, below PEFT's wrapper.
        tensors: dict name -> the backbone's whole tensors now (see `fingerprints.tensors_of`).

    Returns:
        dict name -> tensor.

    Raises:
        ValueError: quantized weights that have changed, which only a full model could hold.
    """
    own = fingerprints.tensors_of(base)
    state, embedding = base.yojo, base.get_input_embeddings()
    path = next(name for name, module in base.named_modules() if module is embedding)
    known = {name: sample for name, sample in state.weights.items() if name in tensors}
    changed = fingerprints.changed(known, tensors, state.separator_id, f"{fingerprints.plain_name(path)}.weight")
    merged = [
        fingerprints.plain_name(name) for name, module in base.named_modules() if getattr(module, "merged", False)
    ]
    changed = {name for name in changed if name.rpartition(".")[0] not in merged}
    names = sorted(changed | {name for name in tensors if own[name].requires_grad})
    quantized = [name for name in names if not tensors[name].is_floating_point()]
    if quantized:
        raise ValueError(
            f"quantized weights of the base model were changed ({', '.join(quantized[:3])}), and an adapter cannot be saved "
            "without them: merge it (merge_and_unload) and save the full model"
        )
    return {name: tensors[name] for name in names}

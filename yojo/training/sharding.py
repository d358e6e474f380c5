"""FSDP2 for a patched model: which modules gather their weights together, and in which precision."""

import torch


def set_up(accelerator, base):
    """Set accelerate's FSDP2 up for a patched model.

    The decoder's layers are sharded each by itself, and the vision tower with what is left, whose weights a pass gathers
    at its start whatever its row holds: a process whose row holds no image would not be there when the others gather the
    weights of one of the tower's layers. Scores, losses and the sums of gradients over processes are float32.

    Args:
        accelerator: of accelerate, with an FSDP plugin; its settings are changed.
        base: the patched model (unwrapped).

    Raises:
        ValueError: settings that would not work.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy

    plugin = accelerator.state.fsdp_plugin
    if plugin.fsdp_version != 2:
        raise ValueError(f"FSDP version {plugin.fsdp_version} is not supported: set fsdp_version: 2")
    if plugin.cpu_ram_efficient_loading:
        raise ValueError(
            "fsdp_cpu_ram_efficient_loading must be false: yojo.patch changes the loaded model on every process, and all "
            "of them need its weights for that"
        )
    if str(getattr(plugin.state_dict_type, "name", plugin.state_dict_type)) != "FULL_STATE_DICT":
        raise ValueError(
            "fsdp_state_dict_type must be FULL_STATE_DICT: checkpoints are reward models that load anywhere, and of a "
            "sharded one transformers would save none"
        )
    _check_wrapping(plugin, base)
    policy = plugin.mixed_precision_policy
    if policy is not None:
        plugin.mixed_precision_policy = MixedPrecisionPolicy(
            param_dtype=policy.param_dtype, reduce_dtype=torch.float32, output_dtype=None
        )


def shard_ends(accelerator, base, optimizer=None):
    """Shard embedding and value head as one unit, before accelerate shards the rest; once, however often it is called.

    The head is used at both ends of a pass, since the embedding adds its `separator_delta`, and computes in float32
    whatever precision the rest has.

    Args:
        accelerator: of accelerate, after `set_up`.
        base: the patched model (unwrapped).
        optimizer: one that was made before, whose parameters are replaced by their shards; or None.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    embedding, projection = base.get_input_embeddings(), base.get_output_embeddings()
    if isinstance(base.score, FSDPModule):
        return
    unit = [embedding, base.score]
    if projection.weight is embedding.weight:  # what is shared has to be in one unit
        unit.append(projection)
    before = [dict(module.named_parameters()) for module in unit]
    for parameter in {p for parameters in before for p in parameters.values() if p.requires_grad}:
        parameter.data = parameter.data.float()
    mesh = getattr(accelerator, "torch_device_mesh", None)
    if mesh is not None:
        mesh = mesh[tuple(accelerator.parallelism_config.fsdp_dim_names)]
    offload = accelerator.state.fsdp_plugin.cpu_offload
    fully_shard(unit, mesh=mesh, reshard_after_forward=False, offload_policy=offload)
    if optimizer is not None:
        shards = {
            parameter: dict(module.named_parameters())[name]
            for module, parameters in zip(unit, before, strict=True)
            for name, parameter in parameters.items()
        }
        for group in optimizer.param_groups:
            group["params"] = [shards.get(parameter, parameter) for parameter in group["params"]]


def names_of(optimizer, model):
    """The names of an optimizer's parameters, a list for each of its groups."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]


def rebind(optimizer, model, names):
    """Give an optimizer the sharded parameters of these names.

    accelerate finds them by the address of their memory, which is 0 for each of which a process holds nothing: a bias of
    one entry is nowhere but on the first one.
    """
    parameters = dict(model.named_parameters())
    for group, some in zip(optimizer.param_groups, names, strict=True):
        group["params"] = [parameters[name] for name in some]


def free(model):
    """Let go of the whole weights that a pass without a backward leaves behind: parameters are shards again."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def _check_wrapping(plugin, base):
    from torch.distributed.fsdp.wrap import size_based_auto_wrap_policy, transformer_auto_wrap_policy

    decoder = base.get_decoder()
    layers = sorted({type(layer).__name__ for layer in decoder.layers})
    if plugin.auto_wrap_policy is size_based_auto_wrap_policy:
        raise ValueError(
            "FSDP's SIZE_BASED_WRAP would shard parts of the vision tower by themselves, and a process whose row holds no "
            "image would not take part in gathering their weights: take TRANSFORMER_BASED_WRAP"
        )
    if plugin.auto_wrap_policy is transformer_auto_wrap_policy:
        if plugin.transformer_cls_names_to_wrap is None:
            plugin.transformer_cls_names_to_wrap = layers
        inside = set(decoder.modules())
        elsewhere = {type(module).__name__ for module in base.modules() if module not in inside}
        wrong = sorted(elsewhere.intersection(plugin.transformer_cls_names_to_wrap))
        if wrong:
            raise ValueError(
                f"FSDP must not shard {', '.join(wrong)} by itself, since a process whose row holds no image would not take "
                f"part in gathering its weights: leave transformer_layer_cls_to_wrap out, or give {', '.join(layers)}"
            )

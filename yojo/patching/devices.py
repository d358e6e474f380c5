"""Where a model's weights are when it runs: accelerate keeps those of offloaded modules on the meta device in between."""

import torch


def execution_device(module):
    """The device a module's own weights are on when it runs, or None: on the meta device, and nobody will bring them."""
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        if getattr(one, "execution_device", None) is not None:
            return torch.device(one.execution_device)
    device = next((tensor.device for tensor in module.parameters(recurse=False)), torch.device("cpu"))
    return None if device.type == "meta" else device


def embedding_of(base):
    """The input embedding itself, below whatever PEFT lays over it."""
    embedding = base.get_input_embeddings()
    while hasattr(embedding, "base_layer") or hasattr(embedding, "original_module"):
        embedding = embedding.base_layer if hasattr(embedding, "base_layer") else embedding.original_module
    return embedding


def input_device(base):
    """Where the inputs of a patched model go: beside its embedding.

    Raises:
        ValueError: the embedding is on the meta device.
    """
    device = execution_device(embedding_of(base))
    if device is None:
        raise ValueError(
            f"{type(base).__name__} is on the meta device: it has no weights to score with; load it with from_pretrained, "
            "or with a device_map that fits"
        )
    return device


def output_device(base):
    """Where the last of the decoder's weights is when it runs, and with it the hidden states that are read.

    For a model that is on the meta device as a whole (it is only counted) that is the meta device.

    Raises:
        ValueError: some of the weights are on the meta device, and nobody will bring them.
    """
    missing = [
        name
        for name, module in base.named_modules()
        if any(tensor.is_meta for tensor in module.parameters(recurse=False)) and execution_device(module) is None
    ]
    if missing and not all(parameter.is_meta for parameter in base.parameters()):
        raise ValueError(
            f"{type(base).__name__}: weights of {', '.join(missing[:3])}{' and others' * (len(missing) > 3)} are on the meta "
            "device, and no hook of accelerate brings them: load the model with from_pretrained, or with a device_map"
        )
    own = [module for module in base.get_decoder().modules() if any(True for _ in module.parameters(recurse=False))]
    return execution_device(own[-1]) or torch.device("meta")


def is_offloaded(module):
    """Whether the module's own weights are on the meta device until it runs."""
    return any(tensor.is_meta for tensor in module.parameters(recurse=False)) and execution_device(module) is not None


def sent(value, device):
    """A tensor, or what moves like one (`to`, `pin_memory`), on its way to a device; the host waits for none of it."""
    if device.type == "cuda" and (not isinstance(value, torch.Tensor) or value.device.type == "cpu"):
        value = value.pin_memory()  # from other memory, copies of more than 64 KB are waited for
    return value.to(device, non_blocking=device.type != "mps")  # which reads its source later, and it may be gone


def fetched(tensor):
    """Begin to copy a tensor to the CPU.

    Returns:
        function () -> the copy; it waits until the device has come as far.
    """
    if tensor.device.type != "cuda":
        return tensor.cpu
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    with torch.cuda.device(tensor.device):
        copy.copy_(tensor, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()

    def wait():
        arrived.synchronize()
        return copy

    return wait

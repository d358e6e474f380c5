"""`yojo info`."""

import typer


def info():
    """Print versions, devices, and which implementations are in use and why."""
    import importlib.metadata
    import platform

    import torch

    import yojo
    import yojo_kernels
    from yojo.patching import fuse, versions

    typer.echo(f"yojo          {yojo.__version__}")
    typer.echo(f"python        {platform.python_version()}")
    for name in ("torch", "triton", "transformers", "peft", "accelerate", "flash-attn", "liger-kernel"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        typer.echo(f"{name:<13} {version}")
    typer.echo(f"cpu           {torch.get_num_threads()} threads")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            typer.echo(
                f"cuda:{index}        {device.name}, {device.total_memory / 2**30:.0f} GiB, sm_{device.major}{device.minor}"
            )
    else:
        typer.echo("cuda          no device")
    for name, (implementation, reason) in yojo_kernels.implementations().items():
        typer.echo(f"{name}: {implementation} ({reason})")
    implementation, reason = fuse.implementation()
    typer.echo(f"decoder layers: {implementation} ({reason})")
    for sentence in versions.shortcomings():
        typer.echo(f"note: {sentence}")

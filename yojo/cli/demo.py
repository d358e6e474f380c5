"""`yojo demo`."""

import importlib
from pathlib import Path
from typing import Annotated

import typer

from yojo.cli.quiet import quiet_transformers
from yojo.cli.shared import fail


def demo(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("demo-out"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of each mode.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data and order.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Folder for the trained comparative reward model.")] = None,
    images: Annotated[
        int | None, typer.Option(min=1, max=360, help="Held-out images to score; all 360 by default.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Times each pass is timed; the median is shown.")] = 9,
    data: Annotated[
        Path | None, typer.Option(help="Write the digits as preference files into this folder, and train nothing.")
    ] = None,
):
    """Train a tiny reward model on handwritten digits and show what one pass saves (CPU, minutes)."""
    if data is None:
        from yojo.demo.progress import machine, say

        say(machine())
        expected = "about 2 to 3 minutes on two cores" if steps is None else f"twice {steps} steps of training"
        say(f"expected time: {expected}")
    for name in ("torch", "transformers", "peft", "sklearn", "matplotlib"):
        if data is None:
            say(f"loading {name}")
        try:
            importlib.import_module(name)
        except ImportError as error:
            fail(f"the demonstration needs {error.name}: pip install 'yojo[demo]'")
    if data is not None:
        from yojo.demo.reward import write_files

        for path, count in write_files(data, seed=seed).items():
            typer.echo(f"{path}: {count} records")
        return
    quiet_transformers()
    from yojo.demo.run import run

    run(out=out, json_file=json_file, steps=steps, seed=seed, save=save, images=images, rounds=rounds)

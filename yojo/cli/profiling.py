"""`yojo profile`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from yojo.cli.quiet import quiet_transformers
from yojo.cli.shared import fail


def profile(
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a reward model, or of a Hugging Face model, or one that holds a config.json alone (random "
            "weights at its sizes: right for speed); the digits demonstration's by default."
        ),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of the prompt, image tokens among them.")] = 512,
    responses: Annotated[int, typer.Option(min=1, help="How many responses.")] = 4,
    response_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each response.")] = 100,
    mode: Annotated[
        str | None, typer.Option(help="comparative or isolated; the reward model's own by default.")
    ] = None,
    images: Annotated[int, typer.Option(min=0, help="Images in the prompt.")] = 0,
    image_size: Annotated[str, typer.Option(help="Height and width of each image in pixels, such as 448x448.")] = (
        "448x448"
    ),
    device: Annotated[str | None, typer.Option(help="cpu or cuda; cuda where there is one, by default.")] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="bfloat16, float16 or float32; bfloat16 on a GPU and float32 on a CPU by default."),
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    out: Annotated[Path | None, typer.Option(help="Folder for a picture, profile.png.")] = None,
):
    """Show where the time of one scoring pass goes: vision, attention, MLP, launch gaps, ... (random tokens)."""
    import torch
    from rich.console import Console

    from yojo.costs import profiling

    quiet_transformers()
    console = Console()
    try:
        size = _image_size(image_size)
        device = _device(device)
        dtype = _one_of("dtype", dtype, profiling.DTYPES) or ("bfloat16" if device.type == "cuda" else "float32")
        mode = _one_of("mode", mode, ("comparative", "isolated"))
        if model is None:
            from yojo.demo.reward import load_reward_model

            loaded = load_reward_model()
        else:
            loaded = model
        loaded, processor, notes = profiling.load(
            loaded, mode=mode, device=device, dtype=profiling.DTYPES[dtype], processor=images > 0
        )
        batch = profiling.make_batch(
            loaded,
            prompt_tokens,
            [response_tokens] * responses,
            processor=processor if images else None,
            images=[size] * images,
        )
        setting = {
            "model": "demo" if model is None else Path(model).name,
            "prompt_tokens": prompt_tokens,
            "responses": responses,
            "response_tokens": response_tokens,
            "images": images,
            "image_size": list(size) if images else None,
        }
        result = profiling.profile_pass(loaded, batch, setting=setting, notes=notes)
    except (TypeError, ValueError, OSError, ImportError, torch.OutOfMemoryError) as error:
        fail(str(error))
    console.print(profiling.table(result, plain=not console.is_terminal))
    figures = result.to_dict()
    console.print(
        f"{figures['model']}, {figures['mode']} mode, {figures['dtype']}, {figures['device']}; peak: "
        f"{result.peak / 1e12:.3g} TFLOP/s, a {result.peak_dtype} matrix product; {responses} single passes would take "
        f"{result.single_flops / result.flops:.2f}x the FLOPs",
        soft_wrap=True,
        highlight=False,
    )
    for note in result.notes:
        console.print(f"note: {note}", soft_wrap=True, highlight=False)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(figures, indent=2) + "\n")
        typer.echo(f"figures: {json_file}")
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        try:
            profiling.draw(result, out / "profile.png")
        except ImportError as error:
            fail(str(error))
        typer.echo(f"picture: {out / 'profile.png'}")


def _image_size(text):
    height, _, width = text.lower().partition("x")
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise ValueError(f"--image-size must be height x width in pixels, such as 448x448, got {text!r}")
    return int(height), int(width)


def _device(name):
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"--device must be cpu or cuda, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device must be cpu or cuda, got {name!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch finds no CUDA device here")
    return device


def _one_of(option, value, choices):
    if value is not None and value not in choices:
        raise ValueError(f"--{option} must be one of {', '.join(choices)}, got {value!r}")
    return value

"""The command line: yojo demo, yojo score, yojo info."""

import json
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Score N candidate responses to one multimodal prompt in one forward pass.",
)


@app.command()
def demo(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("demo-out"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of each mode.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data and order.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Folder for the trained comparative reward model.")] = None,
):
    """Train a tiny reward model on handwritten digits and show what one pass saves (CPU, minutes)."""
    try:
        import matplotlib  # noqa: F401
        import peft  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        _fail(f"the demonstration needs {error.name}: pip install 'yojo[demo]'")
    from yojo.demo.run import run

    run(out=out, json_file=json_file, steps=steps, seed=seed, save=save)


@app.command()
def score(
    image: Annotated[Path, typer.Argument(help="Image file.")],
    prompt: Annotated[str, typer.Option(help="What is asked about the image.")],
    response: Annotated[list[str], typer.Option(help="A candidate response; give it once per candidate.")],
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of a reward model; the digits demonstration's by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
):
    """Score responses to a prompt about an image; higher is better."""
    import transformers

    import yojo

    transformers.utils.logging.disable_progress_bar()
    try:
        example = yojo.Example(prompt, response, images=[image])
        if model is None:
            from yojo.demo.reward import load_reward_model

            reward_model = load_reward_model()
        else:
            reward_model = yojo.RewardModel.from_pretrained(model)
        scores = reward_model.score_many([example])[0].tolist()
    except (TypeError, ValueError, OSError, ImportError) as error:
        _fail(str(error))
    if as_json:
        rows = [{"response": text, "score": value} for text, value in zip(response, scores, strict=True)]
        typer.echo(
            json.dumps({"prompt": prompt, "image": str(image), "mode": reward_model.config.mode, "scores": rows})
        )
        return
    for text, value in sorted(zip(response, scores, strict=True), key=lambda pair: -pair[1]):
        typer.echo(f"{value:+.4f}  {text}")


@app.command()
def info():
    """Print versions, devices, and which implementations are in use and why."""
    import importlib.metadata
    import platform

    import torch

    import yojo
    import yojo_kernels

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


def _fail(message):
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def main():
    """Entry point of the `yojo` command."""
    app()


if __name__ == "__main__":
    main()

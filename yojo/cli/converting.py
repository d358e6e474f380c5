"""`yojo import`, `yojo export` and `yojo merge`."""

from pathlib import Path
from typing import Annotated

import typer

from yojo.cli.shared import BaseModel, CheckBase, CheckFiles, errors


def import_(
    path: Annotated[str, typer.Argument(help="Folder or hub name of a checkpoint of the paper's released code.")],
    out: Annotated[Path, typer.Option(help="Folder for the reward model.")],
    base_model: Annotated[
        str | None, typer.Option(help="For an adapter: its base model, if not the one it names.")
    ] = None,
    scale_scores: Annotated[
        bool, typer.Option(help="The checkpoint divides scores by sqrt(H); it does not record whether.")
    ] = True,
):
    """Make a reward model out of a checkpoint of the paper's released code."""
    from yojo.converting.released import import_mr2rm

    with errors():
        reward_model = import_mr2rm(path, out, base_model=base_model, scale_scores=scale_scores)
    config = reward_model.config
    typer.echo(f"{out}: {config.head} head, pooling {config.pooling}, scores {'' if scale_scores else 'not '}scaled")


def export(
    path: Annotated[str, typer.Argument(help="Folder or hub name of a reward model.")],
    out: Annotated[Path, typer.Option(help="Folder for what is exported.")],
    format: Annotated[
        str,
        typer.Option(help="mr2rm, the layout of the paper's released code; or trl, a stock sequence classifier."),
    ],
    base_model: BaseModel = None,
    check_base: CheckBase = True,
    check_files: CheckFiles = True,
):
    """Write a reward model in the format of another tool."""
    from yojo.converting import export as exporting

    with errors():
        exported = exporting.export(
            path, out, format=format, base_model=base_model, check_base=check_base, check_files=check_files
        )
    typer.echo(f"{out}: {exported.format}")
    if exported.format == "trl":
        typer.echo(f"scores are those of the reward model minus its constant bias: add {exported.bias!r} to get them")


def merge(
    path: Annotated[str, typer.Argument(help="Folder or hub name of a reward model that is an adapter.")],
    out: Annotated[Path, typer.Option(help="Folder for the full model.")],
    base_model: BaseModel = None,
    check_base: CheckBase = True,
    check_files: CheckFiles = True,
):
    """Merge a reward model's adapter into its base model."""
    from yojo.converting import merge as merging

    with errors():
        merging.merge(path, out, base_model=base_model, check_base=check_base, check_files=check_files)
    typer.echo(f"{out}: a full model")

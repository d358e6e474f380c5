"""`yojo data check`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from yojo.cli.quiet import quiet_transformers
from yojo.cli.shared import AllowUrls, Format, IgnoreColumns, ImageRoot, LiteralTags, Map, column_map, fail


def check(
    files: Annotated[
        list[Path], typer.Argument(exists=True, help=".jsonl, .json or .parquet files, or folders of them.")
    ],
    format: Format = "auto",
    mapped: Map = None,
    image_root: ImageRoot = None,
    allow_urls: AllowUrls = False,
    model: Annotated[str | None, typer.Option(help="Folder or hub name of a model: counts tokens, too.")] = None,
    unranked: Annotated[bool, typer.Option("--unranked", help="For scoring: rankings are optional.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="List bad records, but exit with 0.")] = False,
    keep_tied: Annotated[bool, typer.Option("--keep-tied", help="Records with all responses tied are good.")] = False,
    close_gaps: Annotated[bool, typer.Option("--close-gaps", help="Ranks with gaps are made dense.")] = False,
    literal_tags: LiteralTags = False,
    ignore_columns: IgnoreColumns = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
):
    """Read preference data to its last record, images included, and list every record that cannot be used.

    Exits with 0 when all records are good, 1 when some are bad, 2 when the command or the columns make no sense.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from yojo.data import checking

    console = Console()
    if not console.is_terminal:
        console = Console(width=200)
    try:
        processor, settings = None, {}
        if model is not None:
            from yojo.inputs.processors import load_processor

            quiet_transformers()
            processor = load_processor(model)
            settings = checking.model_settings(model, processor)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            tasks = {}

            def progress(path, done, total):
                if path not in tasks:
                    tasks[path] = bar.add_task(Path(path).name, total=total)
                bar.update(tasks[path], completed=done)

            report = checking.check(
                files,
                processor=processor,
                **settings,
                progress=progress,
                format=format,
                columns=column_map(mapped or []),
                image_root=image_root,
                allow_urls=allow_urls,
                ranked=not unranked,
                keep_tied=keep_tied,
                close_gaps=close_gaps,
                literal_tags=literal_tags,
                ignore_columns=ignore_columns or (),
            )
    except (TypeError, ValueError, OSError, ImportError) as error:
        fail(str(error))
    for table in checking.tables(report, plain=not console.is_terminal):
        console.print(table)
    for line in checking.notes(report, skip_bad):
        typer.echo(line)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        typer.echo(f"report: {json_file}")
    raise typer.Exit(report.exit_code(skip_bad))

"""`yojo best`, `yojo pairs` and `yojo filter`: what people make of scores."""

from pathlib import Path
from typing import Annotated

import typer

from yojo.cli.shared import IgnoreColumns, Map, column_map, fail

Scores = Annotated[
    Path,
    typer.Argument(metavar="SCORES", help="What `yojo score --out` wrote: a .jsonl or .parquet file, or a folder."),
]
Out = Annotated[Path, typer.Option(help="The .jsonl or .parquet file to write.")]
Messages = Annotated[
    bool, typer.Option("--messages", help="Write prompts as messages even where all of them are strings.")
]
Data = Annotated[
    list[Path] | None, typer.Option(help="Where the scored records lie now, if not where they did; once per file.")
]
Format = Annotated[str | None, typer.Option(help="Name of their format; the one they were scored with by default.")]
Root = Annotated[Path | None, typer.Option(help="Folder that relative paths of images and videos start from.")]
Literal = Annotated[
    bool | None, typer.Option("--literal-tags", help="<image> and <video> in prompts are characters, not places.")
]
Report = Annotated[
    Path | None, typer.Option(help="Also draw the scores, their margins and lengths: a .png, .svg or .pdf.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")]


def best(
    scores: Scores,
    out: Out,
    top: Annotated[int | None, typer.Option(help="The best K of each record, a row each with its rank.")] = None,
    by: Annotated[
        list[str] | None, typer.Option(help="The best of all records that agree in this column; once per column.")
    ] = None,
    messages: Messages = False,
    data: Data = None,
    format: Format = None,
    mapped: Map = None,
    image_root: Root = None,
    literal_tags: Literal = None,
    ignore_columns: IgnoreColumns = None,
    report: Report = None,
    overwrite: Overwrite = False,
):
    """Write the best response of each record (best of N), as prompt and completion to fine-tune on.

    Of equal scores the response that stands first is the better one.
    """
    read = (data, format, mapped, image_root, literal_tags, ignore_columns)
    _run("best", read, scores, out, top=top, by=by or (), messages=messages, report=report, overwrite=overwrite)


def pairs(
    scores: Scores,
    out: Out,
    kind: Annotated[str, typer.Option(help="best-worst, one pair a record; or all that differ enough.")] = "best-worst",
    margin: Annotated[float, typer.Option(help="Scores of a pair differ by more than this.")] = 0.0,
    max_pairs: Annotated[
        int | None, typer.Option(help="At most so many of a record, the largest margins first.")
    ] = None,
    messages: Messages = False,
    data: Data = None,
    format: Format = None,
    mapped: Map = None,
    image_root: Root = None,
    literal_tags: Literal = None,
    ignore_columns: IgnoreColumns = None,
    report: Report = None,
    overwrite: Overwrite = False,
):
    """Write pairs of a better and a worse response (prompt, chosen, rejected), TRL's preference format.

    Of equal scores the response that stands first is taken, at both ends; a pair's texts differ, and no pair is there twice.
    """
    read = (data, format, mapped, image_root, literal_tags, ignore_columns)
    options = {"kind": kind, "margin": margin, "max_pairs": max_pairs, "messages": messages}
    _run("pairs", read, scores, out, **options, report=report, overwrite=overwrite)


def filter_(
    scores: Scores,
    out: Out,
    min_score: Annotated[float | None, typer.Option(help="Keep what scores this or more.")] = None,
    top_share: Annotated[
        float | None, typer.Option(help="Keep this share of all, the highest: 0.1 is a tenth.")
    ] = None,
    of: Annotated[
        str, typer.Option(help="What counts of a record: its best, mean or worst score, or margin, best less second.")
    ] = "best",
    responses: Annotated[
        bool, typer.Option("--responses", help="Look at single responses, and keep records with those alone.")
    ] = False,
    messages: Messages = False,
    data: Data = None,
    format: Format = None,
    mapped: Map = None,
    image_root: Root = None,
    literal_tags: Literal = None,
    ignore_columns: IgnoreColumns = None,
    report: Report = None,
    overwrite: Overwrite = False,
):
    """Write the records, or the responses, that score high enough.

    Of equal scores at the edge of a share, those that come first in the input are kept.
    """
    read = (data, format, mapped, image_root, literal_tags, ignore_columns)
    options = {"min_score": min_score, "top_share": top_share, "of": of, "responses": responses, "messages": messages}
    _run("filter_", read, scores, out, **options, report=report, overwrite=overwrite)


def _run(name, read, scores, out, **options):
    from yojo.scoring import choose

    data, format, mapped, image_root, literal_tags, ignore_columns = read
    try:
        if image_root is not None and not image_root.is_dir():
            raise ValueError(f"--image-root is no folder: {image_root}")
        loading = {
            "format": format,
            "columns": column_map(mapped) if mapped else None,
            "image_root": image_root,
            "literal_tags": literal_tags,
            "ignore_columns": ignore_columns or None,
        }
        loading = {name: value for name, value in loading.items() if value is not None}
        done = getattr(choose, name)(scores, out, data=data or None, **options, **loading)
    except (TypeError, ValueError, OSError, ImportError) as error:
        fail(str(error))
    typer.echo(done.line(), err=True)

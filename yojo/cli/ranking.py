"""`yojo rank`: pairwise votes -> rankings, and training records drawn from them."""

import json
from pathlib import Path
from typing import Annotated

import typer

from yojo.cli.shared import Map, column_map, errors


def rank(
    votes: Annotated[
        list[Path],
        typer.Argument(metavar="VOTES", help=".jsonl, .json or .parquet files of votes, or folders of them."),
    ],
    out: Annotated[Path, typer.Option(help="The .jsonl file of rankings to write, a line for each question.")],
    method: Annotated[
        str,
        typer.Option(
            help="bradley_terry, plackett_luce, hodge_rank, rank_centrality, borda, elo, kemeny (at most 20 items), or pged, "
            "the preference-graph ensemble."
        ),
    ] = "bradley_terry",
    mapped: Map = None,
    label: Annotated[
        list[str] | None,
        typer.Option(help="WORD=first, second, tie or abstain: what stands for the winner; once per word."),
    ] = None,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Leave records out that are no votes, and list them.")
    ] = False,
    ties: Annotated[
        str, typer.Option(help="half: a tie is half a vote for either item; drop: it says nothing.")
    ] = "half",
    prior: Annotated[
        float | None,
        typer.Option(help="Votes added, of bradley_terry, plackett_luce and rank_centrality; see their docstrings."),
    ] = None,
    step: Annotated[float | None, typer.Option(help="Points that a vote moves at most, of elo.")] = None,
    orders: Annotated[int | None, typer.Option(help="Orders of the votes that elo averages over.")] = None,
    denoise_ensemble: Annotated[
        bool | None, typer.Option(help="Whether pged drops feedback arcs of the sum of all graphs, too; it does.")
    ] = None,
    draws: Annotated[
        int | None,
        typer.Option(help="Draws of the votes, to see how stable rankings are: 200; 20 with elo and kemeny."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of all draws.")] = 0,
    variants: Annotated[
        int | None, typer.Option(help="Also draw training records of so many responses, such as 4.")
    ] = None,
    responses: Annotated[
        list[Path] | None, typer.Option(help="Files of responses, a record for each question and model; once per file.")
    ] = None,
    mapped_responses: Annotated[
        list[str] | None, typer.Option("--map-responses", help="field=column of these files; once per field.")
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder that their relative paths of images and videos start from.")
    ] = None,
    variants_out: Annotated[
        Path | None, typer.Option(help="The .jsonl file of records; --out with .variants.jsonl by default.")
    ] = None,
    per_question: Annotated[int, typer.Option(help="Records of a question, at most.")] = 1,
    gap: Annotated[int, typer.Option(help="Ranks between neighbours of a record, at least.")] = 1,
    stability: Annotated[
        float, typer.Option(help="Share of draws in which the best of a record is its best, at least.")
    ] = 0.0,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report to this file.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace files that are there already.")] = False,
):
    """Rank the candidates of each question by pairwise votes, and say how sure the rankings are.

    Questions whose votes do not connect their items are ranked part by part, and said. Exits with 0 when every record was used,
    1 when bad ones were left out (--skip-bad) or no training record could be drawn, 2 when the command makes no sense, a record is
    bad, or a method cannot rank a question.
    """
    options = {"prior": prior, "step": step, "orders": orders, "denoise_ensemble": denoise_ensemble}
    with errors():
        from rich.console import Console
        from rich.progress import Progress

        from yojo.rankings import rank_file

        console = Console(stderr=True)
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task("ranking", total=None)
            report = rank_file(
                votes,
                out,
                method=method,
                columns=column_map(mapped or []),
                labels=_labels(label or []),
                skip_bad=skip_bad,
                ties=ties,
                draws=draws,
                seed=seed,
                variants=variants,
                responses=responses,
                response_columns=column_map(mapped_responses or [], "--map-responses"),
                image_root=image_root,
                variants_out=variants_out,
                per_question=per_question,
                gap=gap,
                stability=stability,
                overwrite=overwrite,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                **{name: value for name, value in options.items() if value is not None},
            )
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    for line in report.lines():
        typer.echo(line)
    if json_file is not None:
        typer.echo(f"report: {json_file}")
    raise typer.Exit(report.exit_code())


def _labels(pairs):
    """dict of --label options, word=winner each; a word may hold the sign =."""
    labels = {}
    for pair in pairs:
        word, equals, winner = pair.rpartition("=")
        if not (word and equals and winner):
            raise ValueError(f"--label must be WORD=first, second, tie or abstain, got {pair!r}")
        if word in labels:
            raise ValueError(f"--label gives {word} twice: {labels[word]} and {winner}")
        labels[word] = winner
    return labels

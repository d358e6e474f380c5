"""`yojo eval`: judges on reward benchmarks."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from yojo.cli.shared import (
    AllowUrls,
    BaseModel,
    CheckBase,
    CheckFiles,
    Format,
    ImageRoot,
    Map,
    column_map,
    demo_judge,
    errors,
    going_on_later,
    shard_of,
)


def eval_(
    benchmark: Annotated[str | None, typer.Argument(help="Name of a benchmark; --list shows them.")] = None,
    data: Annotated[
        list[Path] | None, typer.Argument(help="Where its records lie: .jsonl, .json or .parquet files, or folders.")
    ] = None,
    judge: Annotated[
        list[str] | None,
        typer.Option(
            help="Folder or hub name of a reward model (#isolated, #comparative or #permutations=K behind it: in that mode) or "
            "of a sequence classifier, or of a model with a value head; chat-scores:FOLDER; openai:MODEL@URL, behind an endpoint; "
            "http://HOST:PORT, of yojo serve; demo; or length, place, random. NAME=JUDGE names it. Once per judge."
        ),
    ] = None,
    judge_scores: Annotated[
        list[str] | None, typer.Option(help="NAME=FILE: scores that were made elsewhere; once per file.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the scores and the report; gone on with where it is there.")
    ] = None,
    orders: Annotated[
        int,
        typer.Option(help="In how many orders of its responses an item is judged, at most; judges free of order: one."),
    ] = 4,
    every_order: Annotated[
        bool, typer.Option("--every-order", help="Ask judges that say they are free of order in all orders, too.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the orders, and of the bootstrap.")] = 0,
    draws: Annotated[int, typer.Option(help="Of the bootstrap.")] = 2000,
    shard: Annotated[str | None, typer.Option(help="i/n: every n-th item; a call without puts them together.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on with what is in --out; or begin anew.")] = True,
    workers: Annotated[int, typer.Option(help="Processes that read and decode while a judge works.")] = 2,
    skip_bad: Annotated[
        bool, typer.Option("--skip-bad", help="Report without the records that cannot be judged, and list them.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Take data with other numbers of records than were published.")
    ] = False,
    base_model: BaseModel = None,
    check_base: CheckBase = True,
    check_files: CheckFiles = True,
    device: Annotated[str | None, typer.Option(help="Where models go, such as cuda:1.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of models' weights, such as bfloat16; as saved by default.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(help="The most tokens of an item in one order; longer ones are bad, nothing is cut.")
    ] = None,
    format: Format = "auto",
    mapped: Map = None,
    image_root: ImageRoot = None,
    allow_urls: AllowUrls = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
    list_: Annotated[bool, typer.Option("--list", help="Say which benchmarks there are, and where they lie.")] = False,
    download: Annotated[
        Path | None, typer.Option(help="Fetch the benchmark from the hub into this folder, and stop.")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Of the download: branch, tag or commit.")] = None,
):
    """Evaluate judges on a reward benchmark, or on any file of preferences: accuracy with error bars, order bias, calibration.

    Every item is judged in several balanced orders, and nothing is cut. Exits with 0 when every item has its scores, 1 when
    there are records that cannot be judged (--skip-bad reports without them), 2 when the command makes no sense or the run
    could not go on. The same command goes on where it ended, however it ended.
    """
    with errors():
        if list_:
            _list(as_json)
            return
        if benchmark is None:
            raise ValueError("name a benchmark; yojo eval --list shows them")
        if download is not None:
            _download(benchmark, download, revision)
            return
        if revision is not None:
            raise ValueError("--revision is for --download FOLDER")
        loading = {"base_model": base_model, "check_base": check_base, "check_files": check_files, "dtype": dtype}
        judges = _judges(judge or [], loading | {"max_length": max_length})
        scores = dict(_named_file(text) for text in judge_scores or [])
        if len(scores) < len(judge_scores or []):
            raise ValueError("--judge-scores gives a name twice")
        reading = {
            "columns": column_map(mapped or []),
            "image_root": image_root,
            "allow_urls": allow_urls,
            "format": format,
        }
        code = _evaluate(
            judges, scores, benchmark, data, out, as_json, reading,
            orders=orders, every_order=every_order, seed=seed, draws=draws, shard=shard_of(shard), resume=resume, workers=workers, skip_bad=skip_bad,
            partial=partial, device=device,
        )  # fmt: skip
    raise typer.Exit(code)


def _evaluate(judges, scores, benchmark, data, out, as_json, reading, **options):
    from yojo.evaluation.benchmarks.items import BadRecord
    from yojo.evaluation.evaluate import BadItems, evaluate

    data = data[0] if data is not None and len(data) == 1 else data or None
    try:
        with going_on_later(out is not None):
            report = evaluate(
                judges, benchmark, data, out, judge_scores=scores, progress=sys.stderr.isatty(), **options, **reading
            )
    except BadItems as error:
        typer.echo(f"error: {error}", err=True)
        return 1
    except BadRecord as error:
        typer.echo(f"error: {error}; mend it, or leave out what cannot be judged with --skip-bad", err=True)
        return 1
    if report is None:
        typer.echo(f"{out}: the scores of shard {options['shard'][0]}/{options['shard'][1]} are there")
        return 0
    if as_json:
        typer.echo(json.dumps(report.to_dict()))
    else:
        for line in report.lines():
            typer.echo(line)
        if out is not None:
            typer.echo(f"\nreport: {out / 'report.html'}, report.md, report.json")
    return int(bool(report.benchmark["bad"]) or any(verdict.left_out for verdict in report.judges))


def _judges(texts, loading):
    """dict name -> `Load` of --judge options."""
    from yojo.evaluation.evaluate import short_name
    from yojo.judges.loading import has_model
    from yojo.scoring.scorer import Load

    found = {}
    for text in texts:
        name, text = _named(text)
        name = name or short_name(text)
        if name in found:
            raise ValueError(f"two judges are called {name}: name them, --judge NAME={text}")
        if has_model(text):
            text, options = demo_judge(text, loading, "--judge")
            found[name] = Load(text, **options)
        else:
            found[name] = Load(text)
    return found


_NAMED = re.compile(r"([\w .+-]+)=(.+)", re.DOTALL)


def _named(text):
    """(name or None, the rest) of NAME=REST."""
    match = None if Path(text).exists() else _NAMED.fullmatch(text)
    return (None, text) if match is None else (match.group(1).strip(), match.group(2))


def _named_file(text):
    name, file = _named(text)
    if not Path(file).exists():
        raise ValueError(f"--judge-scores: there is no {file}")
    return name or Path(file).stem, Path(file)


def _list(as_json):
    from yojo.evaluation.benchmarks import get, names

    rows = []
    for name in names():
        one = get(name)
        rows.append(
            {
                "name": name,
                "title": one.title,
                "hub": one.hub,
                "split": one.split,
                "items": one.counts.get("all") or sum(one.counts.values()) or None,
                "columns": "known" if one.confirmed else "to be mapped (--map)",
                "paper": one.paper,
                "notes": one.notes,
            }
        )
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        items = "" if row["items"] is None else f", {row['items']:,} items"
        typer.echo(f"{row['name']}: {row['title']}{items}")
        where = "no data set on the hub" if row["hub"] is None else f"https://huggingface.co/datasets/{row['hub']}"
        split = f"split {row['split']}" if row["split"] else ""
        typer.echo("  " + "; ".join(part for part in (where, split, f"columns {row['columns']}", row["paper"]) if part))
        if row["notes"]:
            typer.echo(f"  {row['notes']}")


def _download(benchmark, folder, revision):
    from yojo.evaluation.benchmarks import download

    path = download(benchmark, folder, revision=revision)
    typer.echo(f"{path}: yojo eval {benchmark} {path} --judge ... --out ...")

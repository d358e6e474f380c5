"""`yojo score`: responses given on the command line, or whole files of candidates."""

import json
import re
import sys
from pathlib import Path
from typing import Annotated

import typer
import typer.core

from yojo.cli.quiet import be_quiet_here
from yojo.cli.shared import (
    AllowUrls,
    BaseModel,
    CheckBase,
    CheckFiles,
    Format,
    IgnoreColumns,
    ImageRoot,
    LiteralTags,
    Map,
    column_map,
    demo_judge,
    errors,
    going_on_later,
    shard_of,
)


class ScoreCommand(typer.core.TyperCommand):
    """`--ray` may stand without an address."""

    def parse_args(self, context, args):
        args = list(args)
        for at, word in enumerate(args):
            behind = args[at + 1] if at + 1 < len(args) else ""
            if word == "--ray" and not (behind in ("auto", "local") or re.fullmatch(r"[^/]+:\d+|ray://.*", behind)):
                args[at] = "--ray=local"
        return super().parse_args(context, args)


def score(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILE]...",
            help="With --out: files of candidates (.jsonl, .json, .parquet, folders of them). Else image files, if any.",
        ),
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="What is asked.")] = None,
    response: Annotated[
        list[str] | None, typer.Option(help="A candidate response; give it once per candidate.")
    ] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image file, behind those; once per image.")] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A video file, or a folder of frames; once per video.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder or hub name of a reward model (#isolated, #permutations=K behind it: in that mode), of a sequence "
            "classifier or of a model with a value head; chat-scores:FOLDER; openai:MODEL@URL; http://HOST:PORT of yojo serve; "
            "demo, the digits demonstration's (the default without --out); or length, place, random."
        ),
    ] = None,
    base_model: BaseModel = None,
    check_base: CheckBase = True,
    check_files: CheckFiles = True,
    device: Annotated[str | None, typer.Option(help="Where the model goes, such as cuda:1.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the model's weights, such as bfloat16; as saved by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Scores of FILEs: a .jsonl or .parquet file, or a folder, which shards and machines can share."
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(help="Processes that read and decode while the model runs, per device; 2, with --ray none."),
    ] = None,
    token_budget: Annotated[int, typer.Option(help="Tokens of a packed row.")] = 8192,
    max_length: Annotated[int | None, typer.Option(help="Longer examples are bad rows; nothing is ever cut.")] = None,
    shard: Annotated[
        str | None, typer.Option(help="i/n: the i-th of n parts of the rows, from 0; no shard knows another.")
    ] = None,
    resume: Annotated[
        bool, typer.Option(help="Go on with what is in --out; --no-resume begins anew, and removes it.")
    ] = True,
    parquet: Annotated[bool, typer.Option("--parquet", help="Files in the folder --out are Parquet.")] = False,
    devices: Annotated[
        str | None, typer.Option(help="A process on each: all, or a list such as cuda:0,cuda:1.")
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="[ADDRESS]",
            help="Score on a Ray cluster: host:port, auto, or (without an address) one that is started here.",
        ),
    ] = None,
    report: Annotated[
        Path | None, typer.Option(help="Draw the distribution of scores and margins into this .png.")
    ] = None,
    format: Format = "auto",
    mapped: Map = None,
    image_root: ImageRoot = None,
    allow_urls: AllowUrls = False,
    literal_tags: LiteralTags = False,
    ignore_columns: IgnoreColumns = None,
):
    """Score responses to a prompt, about images or videos or neither; or every record of files, with --out.

    Higher is better. With --out: exits with 0 when every row has its scores, 1 when bad rows are left, 2 when the command
    makes no sense or the run could not go on. The same command goes on where it ended, however it ended.
    """
    loading = {"base_model": base_model, "check_base": check_base, "check_files": check_files, "dtype": dtype}
    with errors():
        if out is None:
            for name, value in {
                "--shard": shard,
                "--devices": devices,
                "--ray": ray,
                "--report": report,
                "--parquet": parquet,
                "--map": mapped,
                "--image-root": image_root,
                "--max-length": max_length,
            }.items():
                if value:
                    raise ValueError(
                        f"{name} is for files of candidates: say where their scores go, --out FOLDER_OR_FILE"
                    )
            images, videos = [*(files or ()), *(image or ())], list(video or ())
            _score_one(prompt, response, images, videos, model, loading | {"device": device}, as_json)
            return
        for name, value in {"--prompt": prompt, "--response": response, "--image": image, "--video": video}.items():
            if value:
                raise ValueError(
                    f"{name} is given with --out, which scores the records of files: leave one of them out"
                )
        if not files:
            raise ValueError("--out is given without a FILE of candidates to score")
        reading = {
            "format": format,
            "columns": column_map(mapped or []),
            "image_root": image_root,
            "allow_urls": allow_urls,
            "literal_tags": literal_tags,
            "ignore_columns": ignore_columns or (),
        }
        running = {
            "shard": shard_of(shard),
            "resume": resume,
            "workers": workers if workers is not None else 2 if ray is None else 0,
            "token_budget": token_budget,
            "parquet": parquet,
            "device": device,
            "devices": devices,
        }
        if running["shard"] is not None and running["shard"][1] > 1 and not resume:
            raise ValueError(
                "--no-resume with --shard removes what the other shards have scored: remove the folder, or name another --out"
            )
        code = _score_files(
            files, out, model, loading | {"max_length": max_length}, ray, report, as_json, running | reading
        )
    raise typer.Exit(code)


def _score_one(prompt, responses, images, videos, model, loading, as_json):
    import yojo

    if prompt is None or not responses:
        raise ValueError(
            "give --prompt and --response (once per candidate); or FILEs of candidates and --out for their scores"
        )
    for file in (*images, *videos):
        if not (file.is_file() or (file in videos and file.is_dir())):
            raise ValueError(f"no such file: {file}")
    from yojo.judges.judge import Refusal, checked_scores

    example = yojo.Example(prompt, responses, images=images, videos=videos)
    if model is None:
        if loading["base_model"] is not None:
            raise ValueError("--base-model is given without --model: the demonstration's model has its own")
        if len(images) != 1 or videos:
            raise ValueError(
                "without --model the digits demonstration's model scores, which wants one image of a digit: give an "
                "IMAGE, or --model FOLDER for a model of yours"
            )
        from yojo.demo.reward import load_reward_model

        judge = load_reward_model()
    else:
        from yojo.judges.loading import load_judge

        judge = load_judge(model, **loading)
    (found,) = checked_scores([example], judge.score_many([example]))
    if isinstance(found, Refusal):
        raise ValueError(str(found))
    scores = found.tolist()
    if as_json:
        rows = [{"response": text, "score": value} for text, value in zip(responses, scores, strict=True)]
        media = {"image": str(images[0])} if len(images) == 1 else {}
        media |= {"images": [str(file) for file in images], "videos": [str(file) for file in videos]}
        mode = getattr(getattr(judge, "config", None), "mode", None)
        typer.echo(json.dumps({"prompt": prompt, **media, "mode": mode, "scores": rows}))
        return
    for text, value in sorted(zip(responses, scores, strict=True), key=lambda pair: -pair[1]):
        typer.echo(f"{value:+.4f}  {text}")


def _score_files(files, out, model, loading, ray, report, as_json, options):
    if model is None:
        raise ValueError(
            "--model is needed with --out: a folder or hub name; demo, the digits demonstration's; or length, place, random"
        )
    from yojo.scoring import file as scoring
    from yojo.scoring.scorer import Load

    model, loading = demo_judge(model, loading, "--model")
    if report is not None:
        from yojo.scoring.report import check_picture

        check_picture(report)
    if ray is not None and (options["devices"] is not None or options["device"] is not None):
        raise ValueError("--ray places its actors itself: leave --device and --devices out")
    if options["devices"] is not None and options["device"] is not None:
        raise ValueError("--device and --devices both say where the model goes: leave one of them out")
    with going_on_later():
        summary = scoring.score_file(
            Load(model, **loading),
            files[0] if len(files) == 1 else files,
            out,
            progress=sys.stderr.isatty(),
            setup=None if options["devices"] is None else be_quiet_here,
            ray=ray,
            **options,
        )
    if report is not None:
        from yojo.scoring.report import report as draw

        draw(summary.out, report)
    if as_json:
        typer.echo(json.dumps(summary.to_dict()))
    else:
        for line in summary.lines():
            typer.echo(line)
    return summary.exit_code

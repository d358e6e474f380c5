"""The command line: yojo demo, score, data, train, import, export, merge, profile, info."""

import contextlib
import json
import os
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Score N candidate responses to one multimodal prompt in one forward pass.",
)

data_app = typer.Typer(no_args_is_help=True, help="Look at preference data.")
app.add_typer(data_app, name="data")


@app.command()
def demo(
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures to this file.")] = None,
    out: Annotated[Path, typer.Option(help="Folder for the picture.")] = Path("demo-out"),
    steps: Annotated[int | None, typer.Option(min=1, help="Training steps of each mode.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights, data and order.")] = 0,
    save: Annotated[Path | None, typer.Option(help="Folder for the trained comparative reward model.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="Write the digits as preference files into this folder, and train nothing.")
    ] = None,
):
    """Train a tiny reward model on handwritten digits and show what one pass saves (CPU, minutes)."""
    try:
        import matplotlib  # noqa: F401
        import peft  # noqa: F401
        import sklearn  # noqa: F401
    except ImportError as error:
        _fail(f"the demonstration needs {error.name}: pip install 'yojo[demo]'")
    if data is not None:
        from yojo.demo.reward import write_files

        for path, count in write_files(data, seed=seed).items():
            typer.echo(f"{path}: {count} records")
        return
    from yojo.demo.run import run

    run(out=out, json_file=json_file, steps=steps, seed=seed, save=save)


BaseModel = Annotated[str | None, typer.Option(help="For an adapter: where its base model lies, if not where it was.")]
CheckBase = Annotated[
    bool, typer.Option(help="Refuse a base model with other weights than the adapter was trained on.")
]
CheckFiles = Annotated[bool, typer.Option(help="Refuse files that are not those the model was saved with.")]


@app.command()
def score(
    prompt: Annotated[str, typer.Option(help="What is asked.")],
    response: Annotated[list[str], typer.Option(help="A candidate response; give it once per candidate.")],
    files: Annotated[list[Path] | None, typer.Argument(metavar="[IMAGE]...", help="Image files, if any.")] = None,
    image: Annotated[list[Path] | None, typer.Option(help="An image file, behind those; once per image.")] = None,
    video: Annotated[
        list[Path] | None, typer.Option(help="A video file, or a folder of frames; once per video.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Folder or hub name of a reward model; the digits demonstration's by default.")
    ] = None,
    base_model: BaseModel = None,
    check_base: CheckBase = True,
    check_files: CheckFiles = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print one line of JSON.")] = False,
):
    """Score responses to a prompt, about images or videos or neither; higher is better."""
    import yojo

    images, videos = [*(files or ()), *(image or ())], list(video or ())
    with _errors():
        for file in (*images, *videos):
            if not (file.is_file() or (file in videos and file.is_dir())):
                raise ValueError(f"no such file: {file}")
        example = yojo.Example(prompt, response, images=images, videos=videos)
        if model is None:
            if base_model is not None:
                raise ValueError("--base-model is given without --model: the demonstration's model has its own")
            if len(images) != 1 or videos:
                raise ValueError(
                    "without --model the digits demonstration's model scores, which wants one image of a digit: give an "
                    "IMAGE, or --model FOLDER for a model of yours"
                )
            from yojo.demo.reward import load_reward_model

            reward_model = load_reward_model()
        else:
            reward_model = yojo.RewardModel.from_pretrained(
                model, base_model=base_model, check_base=check_base, check_files=check_files
            )
        scores = reward_model.score_many([example])[0].tolist()
    if as_json:
        rows = [{"response": text, "score": value} for text, value in zip(response, scores, strict=True)]
        media = {"image": str(images[0])} if len(images) == 1 else {}
        media |= {"images": [str(file) for file in images], "videos": [str(file) for file in videos]}
        typer.echo(json.dumps({"prompt": prompt, **media, "mode": reward_model.config.mode, "scores": rows}))
        return
    for text, value in sorted(zip(response, scores, strict=True), key=lambda pair: -pair[1]):
        typer.echo(f"{value:+.4f}  {text}")


@app.command(
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def train(context: typer.Context):
    """Train a reward model: yojo train --config FILE.yaml [--OPTION VALUE ...]; --help lists the options."""
    from yojo.training import recipe

    if "--help" in context.args or "-h" in context.args:
        recipe.Parser().print_help()
        return
    if not context.args:
        _fail("nothing to train: yojo train --config FILE.yaml, or --model, --train_data and --output_dir; see --help")
    try:
        recipe.train(context.args)
    except (TypeError, ValueError, OSError, ImportError) as error:
        _fail(str(error))


@app.command()
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
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # or torch's profiler announces itself
    import torch
    import transformers
    from rich.console import Console

    from yojo.costs import profiling

    transformers.utils.logging.disable_progress_bar()
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
        _fail(str(error))
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
            _fail(str(error))
        typer.echo(f"picture: {out / 'profile.png'}")


@data_app.command("check")
def data_check(
    files: Annotated[
        list[Path], typer.Argument(exists=True, help=".jsonl, .json or .parquet files, or folders of them.")
    ],
    format: Annotated[str, typer.Option(help="Name of the format; found from the columns by default.")] = "auto",
    column_map: Annotated[
        list[str] | None, typer.Option("--map", help="field=column, such as prompt=question; once per field.")
    ] = None,
    image_root: Annotated[
        Path | None, typer.Option(help="Folder of relative image and video paths; the data file's own by default.")
    ] = None,
    allow_urls: Annotated[bool, typer.Option("--allow-urls", help="Fetch images given as URLs.")] = False,
    model: Annotated[str | None, typer.Option(help="Folder or hub name of a model: counts tokens, too.")] = None,
    unranked: Annotated[bool, typer.Option("--unranked", help="For scoring: rankings are optional.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="List bad records, but exit with 0.")] = False,
    keep_tied: Annotated[bool, typer.Option("--keep-tied", help="Records with all responses tied are good.")] = False,
    close_gaps: Annotated[bool, typer.Option("--close-gaps", help="Ranks with gaps are made dense.")] = False,
    literal_tags: Annotated[
        bool, typer.Option("--literal-tags", help="<image> and <video> in prompts are characters, not places.")
    ] = False,
    ignore_columns: Annotated[
        list[str] | None, typer.Option(help="A column to leave out knowingly; once per column.")
    ] = None,
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
            import transformers

            from yojo.inputs.processors import load_processor

            transformers.utils.logging.disable_progress_bar()
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
                columns=_column_map(column_map or []),
                image_root=image_root,
                allow_urls=allow_urls,
                ranked=not unranked,
                keep_tied=keep_tied,
                close_gaps=close_gaps,
                literal_tags=literal_tags,
                ignore_columns=ignore_columns or (),
            )
    except (TypeError, ValueError, OSError, ImportError) as error:
        _fail(str(error))
    for table in checking.tables(report, plain=not console.is_terminal):
        console.print(table)
    for line in checking.notes(report, skip_bad):
        typer.echo(line)
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
        typer.echo(f"report: {json_file}")
    raise typer.Exit(report.exit_code(skip_bad))


def _column_map(pairs):
    columns = {}
    for pair in pairs:
        field, equals, column = pair.partition("=")
        if not (field and equals and column):
            raise ValueError(f"--map must be field=column, such as prompt=question, got {pair!r}")
        if field in columns:
            raise ValueError(f"--map gives {field} twice: {columns[field]} and {column}")
        columns[field] = column
    return columns


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


@app.command(name="import")
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

    with _errors():
        reward_model = import_mr2rm(path, out, base_model=base_model, scale_scores=scale_scores)
    config = reward_model.config
    typer.echo(f"{out}: {config.head} head, pooling {config.pooling}, scores {'' if scale_scores else 'not '}scaled")


@app.command()
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

    with _errors():
        exported = exporting.export(
            path, out, format=format, base_model=base_model, check_base=check_base, check_files=check_files
        )
    typer.echo(f"{out}: {exported.format}")
    if exported.format == "trl":
        typer.echo(f"scores are those of the reward model minus its constant bias: add {exported.bias!r} to get them")


@app.command()
def merge(
    path: Annotated[str, typer.Argument(help="Folder or hub name of a reward model that is an adapter.")],
    out: Annotated[Path, typer.Option(help="Folder for the full model.")],
    base_model: BaseModel = None,
    check_base: CheckBase = True,
    check_files: CheckFiles = True,
):
    """Merge a reward model's adapter into its base model."""
    from yojo.converting import merge as merging

    with _errors():
        merging.merge(path, out, base_model=base_model, check_base=check_base, check_files=check_files)
    typer.echo(f"{out}: a full model")


@contextlib.contextmanager
def _errors():
    """What a user can mend is a line, not a traceback."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    except (TypeError, ValueError, OSError, ImportError) as error:
        _fail(str(error))


@app.command()
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


def _fail(message):
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def main():
    """Entry point of the `yojo` command."""
    app()


if __name__ == "__main__":
    main()

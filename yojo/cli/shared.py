"""What several commands share: options, and errors as lines."""

import contextlib
import signal
from pathlib import Path
from typing import Annotated

import typer

from yojo.cli.quiet import quiet_transformers

BaseModel = Annotated[str | None, typer.Option(help="For an adapter: where its base model lies, if not where it was.")]
CheckBase = Annotated[
    bool, typer.Option(help="Refuse a base model with other weights than the adapter was trained on.")
]
CheckFiles = Annotated[bool, typer.Option(help="Refuse files that are not those the model was saved with.")]

# Of files of records: how `yojo.data.load` reads them.
Format = Annotated[str, typer.Option(help="Name of the files' format; found from the columns by default.")]
Map = Annotated[list[str] | None, typer.Option("--map", help="field=column, such as prompt=question; once per field.")]
ImageRoot = Annotated[
    Path | None, typer.Option(help="Folder of relative image and video paths; the data file's own by default.")
]
AllowUrls = Annotated[bool, typer.Option("--allow-urls", help="Fetch images given as URLs.")]
LiteralTags = Annotated[
    bool, typer.Option("--literal-tags", help="<image> and <video> in prompts are characters, not places.")
]
IgnoreColumns = Annotated[list[str] | None, typer.Option(help="A column to leave out knowingly; once per column.")]


@contextlib.contextmanager
def errors():
    """What a user can mend is a line, not a traceback; no bar is shown while weights are read."""
    quiet_transformers()
    try:
        yield
    except (TypeError, ValueError, OSError, ImportError) as error:
        fail(str(error))
    except RuntimeError as error:
        from yojo.judges.client import EndpointError

        if not isinstance(error, EndpointError):
            raise
        fail(str(error))


def fail(message):
    """Say what is wrong, and leave with exit code 2."""
    typer.echo(f"error: {message}", err=True)
    raise typer.Exit(2)


def column_map(pairs, option="--map"):
    """dict of --map options, field=column each.

    Args:
        pairs: list of strings.
        option: what they were given with.
    """
    columns = {}
    for pair in pairs:
        field, equals, column = pair.partition("=")
        if not (field and equals and column):
            raise ValueError(f"{option} must be field=column, such as prompt=question, got {pair!r}")
        if field in columns:
            raise ValueError(f"{option} gives {field} twice: {columns[field]} and {column}")
        columns[field] = column
    return columns


def shard_of(text):
    """(i, n) of "i/n"; None for None."""
    if text is None:
        return None
    number, slash, count = text.partition("/")
    if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"--shard is i/n, the i-th of n from 0, such as 0/8 to 7/8; got {text!r}")
    return int(number), int(count)


def demo_judge(name, loading, option):
    """The digits demonstration's model, where a judge is called demo, in any mode.

    Args:
        name: of a judge, as `yojo.judges.load_judge` takes it.
        loading: dict of further arguments of `load_judge`.
        option: that it was given with.

    Returns:
        (name, loading), the folder of the model and its base model for "demo" and "demo#MODE", else as they came.
    """
    head, mark, mode = str(name).partition("#")
    if head != "demo":
        return name, loading
    if Path("demo").exists():
        raise ValueError(
            "demo is the digits demonstration's model, and there is something of that name here: write ./demo"
        )
    if loading["base_model"] is not None:
        raise ValueError(f"--base-model is given with {option} demo, which has its own")
    from yojo.demo.reward import BACKBONE, REWARD_MODEL

    return f"{REWARD_MODEL}{mark}{mode}", loading | {"base_model": str(BACKBONE)}


@contextlib.contextmanager
def going_on_later(is_kept=True):
    """A run that is interrupted says whether it can be gone on with; schedulers' SIGTERM is an interrupt."""
    kept = signal.signal(signal.SIGTERM, _interrupted)  # what was written gets its name
    try:
        yield
    except KeyboardInterrupt:
        kept_or_not = "is kept, and the same command goes on with it" if is_kept else "is lost: --out FOLDER keeps it"
        typer.echo(f"stopped: what was scored {kept_or_not}", err=True)
        raise typer.Exit(130) from None
    finally:
        signal.signal(signal.SIGTERM, kept)


def _interrupted(number, frame):
    raise KeyboardInterrupt

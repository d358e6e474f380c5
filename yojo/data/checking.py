"""Read preference data to its last record and report what is in it and what is wrong with it: `yojo data check`."""

import collections
import dataclasses
import functools
import os
import statistics
import weakref
from pathlib import Path

from yojo.config import YojoConfig
from yojo.data.readers import NOT_A_RECORDS_FAULT, ColumnError, DataError, MediaError, open_source, what_it_says
from yojo.data.records import Records
from yojo.files.saved import CONFIG_FILE, read_description
from yojo.inputs.images import load_image
from yojo.inputs.plain import forbidden_ids, known_state
from yojo.inputs.prompts import PromptEncoder, unseen
from yojo.inputs.turns import TurnEncoder
from yojo.inputs.videos import Video, decode_video
from yojo.patching import dates
from yojo.patching.state import tokenizer_of


@dataclasses.dataclass
class FileReport:
    """What one file (or all of them together) holds.

    Attributes:
        path: the file, or "total".
        format: name of the format; None where it is unknown.
        columns: names of the columns found.
        records: how many there are, good and bad.
        bad: one `Bad` for every record that cannot be used, in order.
        error: why the file as a whole cannot be read, or None.
        responses: number of responses -> number of good records.
        ranks: number of different ranks -> number of good, ranked records.
        ties: good records with a tie.
        all_tied: those whose responses are all tied.
        targets: good records with soft targets.
        duplicates: good records that hold the same response twice.
        images, videos: media in good records; all were decoded (see `undecoded`).
        untimed: folders or lists of frames without a rate, which are taken to stand 4 seconds apart.
        undecoded: video files that nothing here can decode: neither PyAV nor torchcodec is installed.
        missing_media: records refused for an image or a video.
        prompt_characters, response_characters: lengths, one of each good record and of each response.
        tokens: lengths of good records, prompt and responses with their separators; empty without a processor.
        longest: (name, tokens or characters) of the longest good record, or None.
        unused: column -> how many good records hold something there that nothing reads (see `yojo.data.Records.unused`).
        ignored: the same for columns that may be left, (column, why) -> how many.
        unseen: what the processor's chat template does not render -> how many good records hold it (see
            `yojo.inputs.prompts.unseen`); empty without a processor.
    """

    path: str
    format: str | None = None
    columns: list = dataclasses.field(default_factory=list)
    records: int = 0
    bad: list = dataclasses.field(default_factory=list)
    error: str | None = None
    responses: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    ranks: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    ties: int = 0
    all_tied: int = 0
    targets: int = 0
    duplicates: int = 0
    images: int = 0
    videos: int = 0
    untimed: int = 0
    undecoded: int = 0
    missing_media: int = 0
    prompt_characters: list = dataclasses.field(default_factory=list)
    response_characters: list = dataclasses.field(default_factory=list)
    tokens: list = dataclasses.field(default_factory=list)
    longest: tuple | None = None
    unused: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    ignored: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    unseen: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    @property
    def good(self):
        """Records that can be used."""
        return self.records - len(self.bad)

    def to_dict(self):
        """The report as JSON takes it, lengths as (min, median, max)."""
        return {
            "path": self.path,
            "format": self.format,
            "columns": list(map(str, self.columns)),
            "records": self.records,
            "good": self.good,
            "bad": [dataclasses.asdict(bad) for bad in self.bad],
            "error": self.error,
            "responses": {str(count): self.responses[count] for count in sorted(self.responses)},
            "ranks": {str(count): self.ranks[count] for count in sorted(self.ranks)},
            **{name: getattr(self, name) for name in _COUNTS},
            **{name: spread(getattr(self, name)) for name in _LENGTHS},
            "longest": None if self.longest is None else dict(zip(("name", "length"), self.longest, strict=True)),
            "unused": dict(self.unused),
            "unseen": dict(self.unseen),
            "ignored": {column: {"records": count, "reason": why} for (column, why), count in self.ignored.items()},
        }


_COUNTS = ("ties", "all_tied", "targets", "duplicates", "images", "videos", "untimed", "undecoded", "missing_media")
_LENGTHS = ("prompt_characters", "response_characters", "tokens")


@dataclasses.dataclass(frozen=True)
class Bad:
    """A record that cannot be used: its file, its line or record number from 1, and why."""

    file: str
    line: int | None
    reason: str


@dataclasses.dataclass
class Report:
    """What `check` found: a `FileReport` for each file, and `total`, all of them together."""

    files: list

    @property
    def total(self):
        total = FileReport("total")
        for file in self.files:
            total.records += file.records
            total.bad += file.bad
            total.responses += file.responses
            total.ranks += file.ranks
            for name in ("unused", "ignored", "unseen"):
                getattr(total, name).update(getattr(file, name))
            for name in (*_COUNTS, *_LENGTHS):
                setattr(total, name, getattr(total, name) + getattr(file, name))
            if file.longest is not None and (total.longest is None or file.longest[1] > total.longest[1]):
                total.longest = file.longest
        formats = sorted({file.format for file in self.files if file.format is not None})
        total.format = ", ".join(formats) or None
        return total

    @property
    def unreadable(self):
        """Files that cannot be read at all."""
        return [file for file in self.files if file.error is not None]

    def exit_code(self, skip_bad=False):
        """0 when every record is good; with `skip_bad`, when every file can be read and holds a good record."""
        if self.unreadable:
            return 1
        return int(any(not file.good if skip_bad else file.bad for file in self.files))

    def to_dict(self):
        return {"files": [file.to_dict() for file in self.files], "total": self.total.to_dict()}


def check(paths, *, processor=None, config=None, turn="template", progress=None, **options):
    """Read every record of every file, decode every image, and say what is there.

    Args:
        paths: files or folders.
        processor: the model's processor or tokenizer, to count tokens; None counts characters alone.
        config, turn: of the model, to count them as it does; see `count_tokens`.
        progress: function (path, done, total), called after every record; or None.
        **options: of `yojo.data.load`.

    Returns:
        `Report`. A record that cannot be used is in it, and raises nothing.

    Raises:
        ColumnError, ValueError: columns that fit no format, or bad options.
    """
    count = (
        None if processor is None else functools.partial(count_tokens, processor=processor, config=config, turn=turn)
    )
    try:
        return Report([_check_file(path, processor, count, progress, options) for path in paths])
    finally:
        if processor is not None:
            _turns.pop(processor, None)  # a bare tokenizer would keep itself alive there


def _check_file(path, processor, count, progress, options):
    report = FileReport(os.fspath(path))
    try:
        records = Records(path, **options)
    except ColumnError:
        raise
    except DataError as error:
        _unreadable(report, path, error)
        return report
    report.format, report.columns, report.records = records.format, records.columns, len(records)
    for i in range(len(records)):
        try:
            before = None if processor is None else unseen(processor)
            example, left = records.read(i)
            _look_at(example, report, count)
            if processor is not None:
                report.unseen.update((unseen(processor) - before).keys())
            report.unused.update(path for path, why in left.items() if why is None)
            report.ignored.update((path, why) for path, why in left.items() if why is not None)
        except NOT_A_RECORDS_FAULT:
            raise
        except Exception as error:  # decoders, templates and tokenizers raise what they like
            if isinstance(error, MediaError):
                report.missing_media += 1
            file, line = records.where(i)
            report.bad.append(Bad(file, line, _reason(error)))
        if progress is not None:
            progress(report.path, i + 1, len(records))
    return report


def _unreadable(report, path, error):
    """A file that does not open has one error; one without a single record that can be read has one for each."""
    try:
        readers = open_source(path)
    except DataError:
        readers = []
    if error.line is None or not readers:
        report.error = str(error)
        return
    for reader in readers:
        for i in range(len(reader)):
            report.records += 1
            try:
                reader.read(i)
            except DataError as problem:
                report.bad.append(Bad(problem.file, problem.line, _reason(problem)))


def _look_at(example, report, count_of):
    """Decode an example's media, then add it to the report."""
    parts = [] if isinstance(example.prompt, str) else [p for turn in example.prompt for p in _parts(turn)]
    images = [*example.images, *(part["image"] for part in parts if part.get("image") is not None)]
    videos = [*example.videos, *(part["video"] for part in parts if part.get("video") is not None)]
    try:
        for i, image in enumerate(images):
            load_image(image, f"{example.name}: image {i}")
        decoded = [decode_video(video, f"{example.name}: video {i}") for i, video in enumerate(videos)]
    except NOT_A_RECORDS_FAULT:
        raise
    except Exception as error:
        raise MediaError(what_it_says(error)) from error
    tokens = None if count_of is None else count_of(example)
    count, rankings = len(example.responses), example.rankings
    report.responses[count] += 1
    report.duplicates += len(set(example.responses)) < count
    if rankings is not None:
        soft = min(rankings) < 1
        report.targets += soft
        if not soft:
            different = len(set(rankings))
            report.ranks[different] += 1
            report.ties += different < count
            report.all_tied += different == 1 < count
    report.images += len(images)
    report.videos += len(videos)
    report.untimed += sum(_is_untimed(video) for video in videos)
    report.undecoded += decoded.count(False)
    prompt = len(example.prompt) if isinstance(example.prompt, str) else sum(len(p.get("text") or "") for p in parts)
    report.prompt_characters.append(prompt)
    report.response_characters += map(len, example.responses)
    length = prompt + sum(map(len, example.responses))
    if tokens is not None:
        report.tokens.append(tokens)
        length = tokens
    if report.longest is None or length > report.longest[1]:
        report.longest = (example.id, length)


def _parts(turn):
    content = turn["content"]
    if isinstance(content, str):
        return [{"text": content}]
    return [{"text": part} if isinstance(part, str) else part for part in content]


def _is_untimed(video):
    if not isinstance(video, Video) or video.fps is not None:
        return False
    return not isinstance(video.source, (str, os.PathLike)) or os.path.isdir(video.source)


def count_tokens(example, processor, config=None, turn="template"):
    """Tokens of an example: its prompt once, and every response with its separator, as `yojo.Collator` makes them.

    Args:
        example: `Example`.
        processor: a processor or tokenizer.
        config: the model's config, which names placeholders that no processor does; or None.
        turn: see `YojoConfig`.

    Raises:
        ValueError: a prompt or a response that cannot be tokenised.
    """
    prompts = PromptEncoder(processor, tokenizer_of(processor), example.name, config)
    prompt, responses, _ = _turns_of(processor, config, turn)(prompts, example)
    return prompt["input_ids"].shape[1] + sum(len(ids) + 1 for ids in responses)


_turns = weakref.WeakKeyDictionary()  # processor -> (what it was made for, `TurnEncoder`), the same for every record


def _turns_of(processor, config, turn):
    tokenizer = tokenizer_of(processor)
    made_for = (tokenizer, config, turn, known_state(tokenizer))
    if processor not in _turns or not all(
        a is b or a == b for a, b in zip(_turns[processor][0], made_for, strict=True)
    ):
        _turns[processor] = made_for, TurnEncoder(tokenizer, forbidden_ids(processor, tokenizer, config), turn)
    return _turns[processor][1]


def model_settings(path, processor):
    """What counting a model's tokens needs besides its processor: keyword arguments of `check`.

    Args:
        path: folder or hub name of a model, a saved reward model or not.
        processor: its processor, which is given the date that the saved model prints.
    """
    import transformers

    settings, source = {}, path
    file = Path(path) / CONFIG_FILE
    if file.is_file():
        description = read_description(Path(path))
        dates.settle_saved(processor, description, path)
        settings["turn"] = YojoConfig.from_saved(description["config"]).turn
        source = description["base_model"] if description["adapter"] else path
    try:
        settings["config"] = transformers.AutoConfig.from_pretrained(source)
    except (OSError, ValueError):  # a processor alone, or an adapter's base that is elsewhere
        pass
    return settings


def _reason(error):
    """The message without the file and line that stand beside it."""
    text = what_it_says(error)
    head, mark, rest = text.partition("': ")
    return rest if mark and head.startswith("example '") else text


def spread(values):
    """(min, median, max) of numbers, or None when there are none."""
    return [min(values), statistics.median(values), max(values)] if values else None


# ---- tables ----


def tables(report, plain):
    """The report as rich renderables: a line per file, then responses and lengths, then every bad record.

    Args:
        report: `Report`.
        plain: without colours and frames, for pipes.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    shape = box.ASCII2 if plain else box.SIMPLE_HEAD
    rows = report.files if len(report.files) == 1 else [*report.files, report.total]
    files = Table(box=shape, title="records", title_justify="left")
    heads = ("file", "format", "records", "good", "bad", "ties", "duplicates", "images", "videos", "missing media")
    for place, head in enumerate(heads):
        files.add_column(head, justify="left" if place < 2 else "right", overflow="fold")
    lengths = Table(box=shape, title="min / median / max", title_justify="left")
    heads = (
        "file",
        "responses",
        "different ranks",
        "prompt characters",
        "response characters",
        "tokens",
        "longest record",
    )
    for place, head in enumerate(heads):
        lengths.add_column(head, justify="left" if place in (0, 6) else "right", overflow="fold")
    for row in rows:
        name = escape(row.path if row.path == "total" else Path(row.path).name)
        counts = (row.records, row.good, len(row.bad), row.ties, row.duplicates, row.images, row.videos)
        files.add_row(name, row.format or "-", *map(str, counts), str(row.missing_media))
        longest = "-" if row.longest is None else f"{row.longest[0]} ({row.longest[1]})"
        spreads = (list(row.responses.elements()), list(row.ranks.elements()), *(getattr(row, n) for n in _LENGTHS))
        lengths.add_row(name, *map(_spread_text, spreads), escape(longest))
    yield files
    yield lengths
    yield _histogram(report.total, shape)


def notes(report, skip_bad=False):
    """Lines of plain text behind the tables: what deserves a word, every bad record, the verdict."""
    total = report.total
    if total.targets:
        yield f"{total.targets} records have soft targets: train with loss='soft'"
    if total.all_tied:
        yield f"{total.all_tied} records have all responses tied, kept with --keep-tied: they teach nothing"
    if total.undecoded:
        yield f"{total.undecoded} video files were not decoded: that needs PyAV (pip install av) or torchcodec with FFmpeg"
    if total.untimed:
        yield f"{total.untimed} videos are frames without fps or sampling_interval: 4 seconds between frames are assumed"
    for column, count in total.unused.items():
        yield f"column not used: {column} ({count} records): the model sees nothing of it"
    for what, count in total.unseen.items():
        yield f"not seen by the model: {what} ({count} records), which its processor or chat template leaves out"
    reasons = {}
    for column, why in total.ignored:
        reasons.setdefault(why, []).append(column)
    for why, columns in reasons.items():
        yield f"left out ({why}): {', '.join(columns)}"
    for file in report.unreadable:
        yield f"cannot be read: {file.error}"
    for bad in total.bad:
        yield f"{bad.file}:{bad.line}: {bad.reason}"
    if report.unreadable or total.bad:
        skipped = " (skipped)" if skip_bad and total.bad else ""
        unread = f", {len(report.unreadable)} files that cannot be read" if report.unreadable else ""
        yield f"{total.good} of {total.records} records are good, {len(total.bad)} bad{skipped}{unread}"
    else:
        yield f"all {total.records} records are good"


def _histogram(total, shape, width=40):
    from rich.table import Table

    table = Table(box=shape, title="responses per record", title_justify="left")
    table.add_column("responses", justify="right")
    table.add_column("records", justify="right")
    table.add_column("")
    most = max(total.responses.values(), default=1)
    for count in sorted(total.responses):
        number = total.responses[count]
        table.add_row(str(count), str(number), "#" * max(1, round(width * number / most)))
    return table


def _spread_text(values):
    found = spread(values)
    return "-" if found is None else " / ".join(f"{value:g}" for value in found)

"""`Benchmark`: where it comes from, what its records say, its official figures; `Item`: one thing to judge."""

import dataclasses
import hashlib
import json
import typing

NAMES = ("id", "group", "question")  # what a column map may name for any preference data
ALL = "all"  # the group of a benchmark without groups; in `Benchmark.counts`, the whole benchmark


@dataclasses.dataclass(frozen=True)
class Parsed:
    """What one record says, before its media are looked up.

    Attributes:
        prompt: string or chat messages.
        responses: N >= 2 strings, in the record's order.
        rankings: N ints, 1 = best.
        images, videos: lists of whatever the record holds.
        fps: frames per second of the videos, or None.
        frames: of a folder of frames, show at most so many, evenly spaced, first and last among them; None = all.
        literal_tags: as in `yojo.Example`; None = tags are places where there are as many as media, and else just text.
        id: the record's own, or None.
        question: what the record asks; None = what prompt and media say.
        group: the part of the benchmark.
        tags: dict name -> value, further parts.
        info: dict of JSON values, what the official metric needs beside these.
    """

    prompt: typing.Any
    responses: list
    rankings: list
    images: typing.Sequence = ()
    videos: typing.Sequence = ()
    fps: typing.Any = None
    frames: int | None = None
    literal_tags: bool | None = None
    id: str | None = None
    question: str | None = None
    group: str = ALL
    tags: dict = dataclasses.field(default_factory=dict)
    info: dict = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry:
    """What is known of an item without its prompt, responses and media.

    Attributes:
        number: place among the items, from 0.
        id: the record's own id, or "file:line" where it has none; several items may have the same.
        group: the part of the benchmark.
        question: items of one question share it.
        tags: dict name -> value, further parts of the benchmark.
        info: dict of JSON values, what the official metric needs.
        rankings: N ints, 1 = best.
        lengths: N ints, characters of each response.
        where: "file:line".
    """

    number: int
    id: str
    group: str
    question: str
    tags: dict
    info: dict
    rankings: tuple
    lengths: tuple
    where: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Item(Entry):
    """One item: what an `Entry` says of it, and what is to be judged.

    Attributes:
        example: `yojo.Example`, its responses in the record's order, with rankings.
    """

    example: typing.Any


@dataclasses.dataclass(frozen=True, eq=False)
class Benchmark:
    """A benchmark that can be opened and scored; two are the same where their names are.

    Attributes:
        name: as `get` takes it.
        title: as its authors write it.
        paper: URL.
        hub: data set on the Hugging Face hub, or None.
        patterns: files of it to download; empty = all.
        split: name of the split.
        counts: dict group -> published number of records, "all" for the whole benchmark; empty where unknown.
        fields: names of the columns that every record needs.
        optional: names of columns that may be there.
        confirmed: the layout is known from the benchmark's own code or card; otherwise opening asks for a column map.
        headline: key of THE number in what `official` returns.
        notes: quirks, and what of the benchmark is not public.
        published: dict model -> official figure in percent, as the paper of the method (arXiv 2604.10966) states it.
        parse: function, raw record (dict) -> `Parsed`; raises ValueError.
        official: function, list of `yojo.evaluation.judged.Judged` -> dict name -> float in [0, 1]. An item given twice
            counts twice, as a bootstrap needs.
        readers: function, source -> list of `yojo.data.readers.Reader`, where files are not plain lists of records.
    """

    name: str
    title: str
    paper: str
    hub: str | None
    patterns: tuple
    split: str
    counts: dict
    fields: tuple
    confirmed: bool
    headline: str
    notes: str
    parse: typing.Callable
    official: typing.Callable
    optional: tuple = ()
    published: dict = dataclasses.field(default_factory=dict)
    readers: typing.Callable | None = None

    def __eq__(self, other):
        return isinstance(other, Benchmark) and self.name == other.name

    def __hash__(self):
        return hash(self.name)


# ---- what parsers share ----


def present(record, name):
    """A field of a record; ValueError where it is not there."""
    value = record.get(name)
    if value is None:
        raise ValueError(f"no {name}; the record has {', '.join(map(str, record)) or 'no columns'}")
    return value


def text(record, name):
    """A field that is a string."""
    value = present(record, name)
    if not isinstance(value, str):
        raise ValueError(f"{name} must be a string, got {type(value).__name__}")
    return value


def texts(record, name):
    """A field that is a list of strings."""
    value = present(record, name)
    if not isinstance(value, (list, tuple)) or not all(isinstance(one, str) for one in value):
        raise ValueError(f"{name} must be a list of strings, got {_brief(value)}")
    return list(value)


def name_of(record, name):
    """An id, or whatever names something, as a string; None where there is none."""
    value = record.get(name)
    if value is None or value == "":
        return None
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise ValueError(f"{name} must be a string or a whole number, got {_brief(value)}")
    return str(value)


def labelled(record, name, ranks):
    """Ranks that a label stands for.

    Args:
        record: dict.
        name: field of the label.
        ranks: dict label -> ranks.

    Raises:
        ValueError: a label that is not among them; a tie, where the benchmark has none.
    """
    label = text(record, name)
    if label not in ranks:
        raise ValueError(f"{name} must be one of {', '.join(ranks)} (there are no ties), got {label!r}")
    return list(ranks[label])


def holds(record, name):
    """Whether a field holds an image or a video: tables fill in nothing and empty strings."""
    value = record.get(name)
    return value is not None and not (isinstance(value, (str, bytes, list, tuple)) and not value)


def images(record, name):
    """A field with an image, or a list of them, as a list."""
    if not holds(record, name):
        raise ValueError(f"no {name}; the record has {', '.join(map(str, record))}")
    return list(record[name]) if isinstance(record[name], (list, tuple)) else [record[name]]


def videos(record, name):
    """A field with a video as a list; a list of frames is one video."""
    if not holds(record, name):
        raise ValueError(f"no {name}; the record has {', '.join(map(str, record))}")
    return [record[name]]


def tags_of(record, *names):
    """dict of those fields that are there, as strings."""
    found = {name: record.get(name) for name in names}
    return {name: str(value) for name, value in found.items() if isinstance(value, (str, int)) and value != ""}


def question_of(prompt, images=(), videos=()):
    """A name for what a prompt asks: the same for equal text and media, 16 hexadecimal digits."""
    digest = hashlib.blake2b(json.dumps(prompt, sort_keys=True, default=repr).encode(), digest_size=8)
    for kind, sources in (("image", images), ("video", videos)):
        for source in sources:
            digest.update(f"\0{kind}\0".encode())
            digest.update(_bytes_of(source))
    return digest.hexdigest()


def _bytes_of(source):
    if isinstance(source, dict):
        source = next((source[key] for key in ("bytes", "path", "url") if source.get(key) is not None), "")
    if isinstance(source, (bytes, bytearray)):
        return hashlib.blake2b(source, digest_size=16).digest()
    if hasattr(source, "tobytes"):  # arrays and PIL images
        return hashlib.blake2b(source.tobytes(), digest_size=16).digest()
    return str(source).encode()


def _brief(value):
    written = repr(value)
    return written if len(written) <= 60 else written[:60] + "..."

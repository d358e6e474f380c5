"""Parts of a scoring job: files of lines that may be cut short at any moment, and are given their names when whole."""

import collections
import contextlib
import fcntl
import itertools
import json
import os
import re
import time
import uuid

from yojo.files.folders import sync

ASIDE = ".aside-"
SYNC_SECONDS = 30.0
_DIGEST, _NONE = re.compile("[0-9a-f]{32}"), "0" * 32
_GROUP = 4096  # rows of a group of a Parquet file
live = set()  # files that this process writes: its own locks do not keep it out


class Part:
    """A file of JSON lines under way: hidden, locked by this process, flushed with every batch of lines.

    A process that is killed loses nothing that was added; a machine that fails loses `SYNC_SECONDS` of it, at most.

    Args:
        folder: `Path`.
        name: what it will be called.
    """

    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.path = folder / f".{name}.writing"
        self.file = open(self.path, "ab")  # noqa: SIM115 - closed by `finish` or `abandon`
        fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        live.add(os.path.realpath(self.path))
        self.size, self.synced = self.file.tell(), time.monotonic()

    def add(self, lines):
        """Append lines, a list of dicts.

        Returns:
            list of the byte at which each begins.

        Raises:
            OSError: a full disk; what was there before stays.
        """
        starts, data = [], []
        for line in lines:
            starts.append(self.size)
            data.append(encoded(line))
            self.size += len(data[-1])
        self.file.write(b"".join(data))
        self.file.flush()
        if time.monotonic() - self.synced > SYNC_SECONDS:
            os.fsync(self.file.fileno())
            self.synced = time.monotonic()
        return starts

    def finish(self):
        """Give it its name; without a line there is none."""
        if self.file.closed:
            return
        self.file.flush()
        os.fsync(self.file.fileno())
        _finish(self.path, self.folder / self.name)
        self.abandon()

    def abandon(self):
        """Close it as it is, for the next run to find."""
        live.discard(os.path.realpath(self.path))
        try:
            self.file.close()
        except OSError:  # what could not be written is still in its buffer, and never will be
            pass


def encoded(line):
    """One line of a part."""
    return json.dumps(line, ensure_ascii=False, allow_nan=False).encode("utf-8", "backslashreplace") + b"\n"


def _finish(path, final):
    if not os.path.getsize(path):
        os.unlink(path)
        return
    if final.suffix == ".parquet":
        write_parquet(final, read_lines(path))
        os.unlink(path)
    else:
        os.rename(path, final)
    sync(final.parent)


def finish_leftover(path, final, dropped):
    """Give a part that was cut short its name, without what is not a whole line."""
    _rewrite(path, dropped)
    _finish(path, final)


def append_whole(path, final, dropped):
    """Add the whole lines of a list of bad rows to a finished one; of a row that stands there twice the last line counts."""
    last = {}
    for source in (final, path):
        if source.is_file():
            last |= {line["row"]: line for line in read_lines(source, dropped)}
    if last:
        write_aside(final, b"".join(map(encoded, last.values())))
    elif final.is_file():
        final.unlink()


def keep_lines(path, wanted, dropped):
    """Leave out lines of a list of bad rows; an empty one is removed."""
    kept = [line for line in read_lines(path, dropped) if wanted(line)]
    if kept:
        write_aside(path, b"".join(map(encoded, kept)))
    else:
        path.unlink()


def check_whole(path, dropped):
    """Drop lines of a finished part that are not whole: they will be scored again.

    Raises:
        ValueError: a Parquet file that is damaged, of which nothing can be kept.
    """
    if path.suffix == ".parquet":
        _parquet(path)
        return
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(max(0, size - 1))
        if size and file.read(1) == b"\n":
            return
    _rewrite(path, dropped)


def read_lines(path, dropped=None):
    """The whole lines of a JSONL part, as dicts, one by one.

    Args:
        path: of the file.
        dropped: list that says of every other line where it stood; None: they are errors.
    """
    with open(path, "rb") as file:
        for number, data in enumerate(file, 1):
            try:
                if not data.endswith(b"\n"):
                    raise ValueError("it is cut short")
                line = json.loads(data)
                if not isinstance(line, dict) or type(line.get("row")) is not int or line["row"] < 0:
                    raise ValueError("it is no row")
            except ValueError as error:
                if dropped is None:
                    raise ValueError(f"{path}:{number}: not a whole line: {error}") from error
                dropped.append(f"{path}:{number}: {error}")
                continue
            yield line


def _rewrite(path, dropped):
    """Replace a JSONL part by its whole lines, in bounded memory; nothing is written where all of them are."""
    before = len(dropped)
    aside = path.parent / f"{ASIDE}{uuid.uuid4().hex[:12]}"
    with open(aside, "wb") as file:
        for line in read_lines(path, dropped):
            file.write(encoded(line))
        file.flush()
        os.fsync(file.fileno())
    if len(dropped) > before:
        os.replace(aside, path)
        sync(path.parent)
    else:
        os.unlink(aside)


@contextlib.contextmanager
def replaced(path, folder=None):
    """Write a file aside; it takes its place when it is whole and on the disk.

    Args:
        path: of the file.
        folder: where it lies meanwhile, of the same file system; beside the file by default.

    Yields:
        binary file.
    """
    aside = (folder or path.parent) / f"{ASIDE}{uuid.uuid4().hex[:12]}"
    try:
        with open(aside, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    sync(path.parent)


def write_aside(path, data):
    """Replace a file by bytes, as a whole."""
    with replaced(path) as file:
        file.write(data)


def write_lines(path, lines, folder=None):
    """Replace a JSONL file by lines, as a whole, in bounded memory."""
    with replaced(path, folder) as file:
        for line in lines:
            file.write(encoded(line))


# ---- lines by where they stand ----


class Lines:
    """The rows of finished parts, read where they stand.

    A place is one number: which part, and the byte (JSONL) or row (Parquet) in it.

    Args:
        paths: of the parts.
        job: the short fingerprint that every row must have.
    """

    _SHIFT = 40  # a part of up to a terabyte

    def __init__(self, paths, job):
        self.paths, self.job, self._files, self._group = list(paths), job, {}, (None, None)

    def add(self, path):
        """Another part, one that grows perhaps; returns the number its places begin with."""
        self.paths.append(path)
        return (len(self.paths) - 1) << self._SHIFT

    def __iter__(self):
        """(place, row) of every row there is.

        Raises:
            ValueError: a line that is no row of scores, or one of another job's.
        """
        for number, path in enumerate(self.paths):
            for at, line in _placed(path):
                _check_row(line, self.job, path, at)
                yield (number << self._SHIFT) + at, line

    def read(self, place):
        """The row at a place."""
        number, at = place >> self._SHIFT, place & ((1 << self._SHIFT) - 1)
        path = self.paths[number]
        if path.suffix == ".parquet":
            return self._from_parquet(number, path, at)
        if number not in self._files:
            self._files[number] = open(path, "rb")  # noqa: SIM115 - read again and again
        file = self._files[number]
        file.seek(at)
        return json.loads(file.readline())

    def drop(self, rows):
        """Remove rows from finished parts, by what they hold: another shard may have removed some of its own meanwhile.

        Args:
            rows: iterable of (place, key, record).
        """
        self.close()
        own = collections.defaultdict(collections.Counter)
        for place, *row in rows:
            own[place >> self._SHIFT][tuple(row)] += 1
        for number, gone in own.items():
            if self.paths[number].exists():
                _drop(self.paths[number], gone)

    def _from_parquet(self, number, path, at):
        group, within = divmod(at, _GROUP)
        if self._group[0] != (number, group):
            self._group = (number, group), _parquet(path).read_row_group(group).to_pylist()
        return self._group[1][within]

    def close(self):
        for file in self._files.values():
            file.close()
        self._files = {}


def _check_row(line, job, path, at):
    """Whoever put a part here may have taken it from another folder."""
    where = f"{path}: a line at {'row' if path.suffix == '.parquet' else 'byte'} {at}"
    if not (
        isinstance(line, dict)
        and all(map(_is_digest, (line.get("key"), line.get("record"), line.get("media") or _NONE)))
    ):
        raise ValueError(f"{where} is no row of scores: remove the line, and what it was is scored again")
    if line.get("job") != job:
        raise ValueError(
            f"{where} has scores of the job {line.get('job')}, and this folder is of {job}: scores of two jobs cannot be told "
            "apart any more; move the file away"
        )


def _is_digest(text):
    return isinstance(text, str) and _DIGEST.fullmatch(text) is not None


def _drop(path, gone):
    kept = (line for _, line in _placed(path) if not _is_gone(line, gone))
    first = next(kept, None)
    if first is None:
        path.unlink()
    elif path.suffix == ".parquet":
        write_parquet(path, itertools.chain([first], kept))
    else:
        write_lines(path, itertools.chain([first], kept))


def _is_gone(line, gone):
    row = line["key"], line["record"]
    if not gone.get(row):
        return False
    gone[row] -= 1
    return True


def _placed(path):
    if path.suffix == ".parquet":
        file = _parquet(path)
        at = 0
        for group in range(file.metadata.num_row_groups):
            for line in file.read_row_group(group).to_pylist():
                yield at, line
                at += 1
        return
    at = 0
    with open(path, "rb") as file:
        for data in file:
            try:
                yield at, json.loads(data)
            except ValueError as error:
                raise ValueError(
                    f"{path}: a line at byte {at} is damaged ({error}): remove the line, and it is scored again"
                ) from error
            at += len(data)


# ---- Parquet ----


def schema(description=None):
    """The columns of scores in Parquet."""
    import pyarrow

    texts = ("key", "record", "media", "job")
    fields = [
        pyarrow.field("id", pyarrow.string()),
        pyarrow.field("row", pyarrow.int64()),
        pyarrow.field("scores", pyarrow.list_(pyarrow.float32())),
        pyarrow.field("order", pyarrow.list_(pyarrow.int32())),
        *(pyarrow.field(name, pyarrow.string()) for name in texts),
    ]
    metadata = None if description is None else {"yojo": json.dumps(description)}
    return pyarrow.schema(fields, metadata=metadata)


def write_parquet(path, lines, description=None, folder=None):
    """Write rows to a Parquet file, aside and then in its place, in bounded memory."""
    import pyarrow
    from pyarrow import parquet

    columns = schema(description)
    with replaced(path, folder) as file, parquet.ParquetWriter(file, columns) as writer:
        for group in _groups(lines):
            writer.write_table(pyarrow.Table.from_pylist(group, schema=columns), row_group_size=_GROUP)


def _groups(lines):
    group = []
    for line in lines:
        group.append(line)
        if len(group) == _GROUP:
            yield group
            group = []
    if group:
        yield group


def _parquet(path):
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError(f"{path}: Parquet needs pyarrow: pip install 'yojo[train]'") from error
    try:
        return parquet.ParquetFile(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{path} is damaged ({error}): remove it, and its rows are scored again") from error

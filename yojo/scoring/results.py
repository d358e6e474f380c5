"""Scores that were written, read again: row by row, checked, and each beside the record that it is of."""

import array
import contextlib
import dataclasses
import json
import logging
import math
import os
import re
import typing
from pathlib import Path

import numpy as np

from yojo.data import DataError, load
from yojo.inputs.digests import SIZE, digest
from yojo.inputs.videos import natural_key
from yojo.scoring.job import JOB_FILE, SUFFIXES, hidden

COLUMNS = {"id": str, "row": int, "scores": list, "order": list, "key": str, "record": str, "media": str, "job": str}
AGAIN = "run `yojo score` again with the same --out, which goes on where it ended"
_DIGEST = re.compile(f"[0-9a-f]{{{2 * SIZE}}}")
_BATCH = 1024  # rows of a Parquet file that are Python's at a time


def open_scores(path):
    """Open what `yojo score` wrote.

    Args:
        path: FILE.jsonl, FILE.parquet, or the folder of a job.

    Returns:
        `Scores`; no row has been read yet.

    Raises:
        ValueError: nothing is there, nothing is finished, or it is no scores file.
    """
    return Scores(path)


class Scores:
    """Rows of scores, in the order in which they lie there; every loop reads them anew, and holds one batch in memory.

    Attributes:
        path: the file or folder.
        files: the files that hold the rows; those that are still being written are not among them.
        job: what job.json says (see docs/scoring.md), or None where there is none.
    """

    def __init__(self, path):
        self.path = Path(path)
        home = self.path if self.path.is_dir() else hidden(self.path)
        if self.path.is_dir():
            parts = [p for suffix in SUFFIXES for p in self.path.glob(f"scores-*{suffix}") if p.is_file()]
            self.files = sorted(parts, key=natural_key)
            if not self.files:
                raise ValueError(f"{self.path}: the folder holds no finished part (scores-*.jsonl, .parquet): {AGAIN}")
        elif self.path.is_file():
            if self.path.suffix.lower() not in SUFFIXES:
                raise ValueError(
                    f"{self.path}: scores are a .jsonl or a .parquet file, or a folder, as `yojo score` writes them"
                )
            self.files = [self.path]
        elif home.is_dir():
            raise ValueError(f"{self.path}: not finished yet, its parts lie in {home}: {AGAIN}")
        else:
            raise ValueError(f"{self.path}: no such file or folder")
        self.job = _job(home / JOB_FILE)

    @property
    def is_folder(self):
        """Whether rows of records that have left the input may be among them, in any order."""
        return self.files != [self.path]

    def __iter__(self):
        """Yields each row as a dict; raises ValueError with file and line for one that is none."""
        made_by, any_row = None if self.job is None else self.job.get("job"), False
        source = None if made_by is None else JOB_FILE
        for file in self.files:
            for place, row in _rows(file):
                _check(row, place)
                if made_by is not None and row["job"] != made_by:
                    raise ValueError(
                        f"{place}: the job {row['job']} made this row, but {source} says {made_by}: scores of two jobs cannot "
                        "be compared; keep each in a file of its own"
                    )
                made_by, source, any_row = row["job"], source or "the first row", True
                yield row
        if not any_row:
            raise ValueError(f"{self.path}: there is not one row of scores in it")


def _job(path):
    try:
        job = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(job, dict):
        raise ValueError(f"{path}: it must be an object that describes the job, got {type(job).__name__}")
    return job


def _rows(file):
    return _lines(file) if file.suffix.lower() == ".jsonl" else _table(file)


def _lines(file):
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if line.isspace():
                continue
            place = f"{file}: line {number}"
            try:
                yield place, json.loads(line)
            except ValueError as error:  # not UTF-8 is one, too
                if not line.endswith(b"\n"):
                    raise ValueError(f"{place}: the last line is cut off: {AGAIN}") from error
                raise ValueError(f"{place}: not JSON: {error}; {AGAIN}") from error


def _table(file):
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(file) as table:
            number = 0
            for group in range(table.metadata.num_row_groups):
                for batch in table.iter_batches(_BATCH, row_groups=[group]):
                    for row in batch.to_pylist():
                        number += 1
                        yield f"{file}: row {number}", row
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"{file}: not a complete Parquet file: {error}; {AGAIN}") from error


def _check(row, place):
    if not isinstance(row, dict):
        raise ValueError(f"{place}: a row of scores must be an object, got {type(row).__name__}")
    missing = [name for name in COLUMNS if name not in row]
    if missing:
        raise ValueError(
            f"{place}: this is no row of scores, it lacks {', '.join(missing)}: give what `yojo score --out` wrote"
        )
    for name, kind in COLUMNS.items():
        if not isinstance(row[name], kind) or isinstance(row[name], bool):
            raise ValueError(f"{place}: {name} must be a {kind.__name__}, got {row[name]!r}")
    scores, order = row["scores"], row["order"]
    if not scores or not all(type(score) in (float, int) and math.isfinite(score) for score in scores):
        raise ValueError(f"{place}: scores must be a list of finite numbers, one at least, got {scores}")
    if order != sorted(range(len(scores)), key=lambda at: (-scores[at], at)):
        raise ValueError(f"{place}: the order {order} does not fit the scores {scores}: best first, ties as they stand")
    if not _DIGEST.fullmatch(row["record"]):
        raise ValueError(f"{place}: record must be a digest, {2 * SIZE} hexadecimal digits, got {row['record']!r}")
    if row["row"] < 0:
        raise ValueError(f"{place}: row must be the number of a record, 0 or more, got {row['row']}")


# ---- beside their records ----


@dataclasses.dataclass(frozen=True)
class Scored:
    """A row of scores and the record it is of.

    Attributes:
        row: the row, as the scores file has it.
        index: number of the record in the input, as it is now.
        record: the record as it stands in its file.
        fields: `yojo.data.fields.Fields`, what it says: prompt, responses, images, ... . No image has been looked for.
        left: dict, path of a column that the format does not read -> why it may be left, or None.
        root: folder that relative paths of its media start from.
    """

    row: dict
    index: int
    record: dict
    fields: typing.Any
    left: dict
    root: Path


def joined(scores, data=None, **options):
    """Scores beside the records they are of.

    A row says which record it is of by number and by content. Where the record of that number is another one by now (the
    input has grown in front, or was shuffled), the one with the content is looked for, in one pass over the input.

    Args:
        scores: `Scores`, or a path for `open_scores`.
        data: where the records lie, as `yojo.data.load` takes it; by default what the job's job.json names.
        **options: of `yojo.data.load`, instead of those of the job.

    Returns:
        `Joined`, to loop over, more than once if need be.

    Raises:
        ValueError: it is not known where the records lie, or they cannot be read.
    """
    return Joined(scores if isinstance(scores, Scores) else open_scores(scores), data, options)


class Joined:
    """What `joined` returns: yields a `Scored` for each row whose record is in the input.

    The three counts are those of the last loop.

    Attributes:
        scores: `Scores`.
        records: `yojo.data.Records`.
        sources: the paths among what the records were loaded from.
        columns: the column map.
        literal_tags: as `yojo.data.load` took it.
        matched: rows whose record is in the input.
        stale: rows of records that are no longer in it.
        surplus: rows of a record that has its scores already: there are more of them than such records in the input.
    """

    def __init__(self, scores, data, options):
        asked = (scores.job or {}).get("data") or {}
        data = asked.get("sources") if data is None else data
        if data is None or (isinstance(data, (list, tuple)) and not data):
            raise ValueError(
                f"{scores.path}: nothing there says where the scored records lie: name them with data (--data)"
            )
        names = ("format", "columns", "image_root", "allow_urls", "literal_tags", "ignore_columns")
        options = {name: asked[name] for name in names if asked.get(name) is not None} | options
        root = options.pop("image_root", None)
        self._root = None if root is None else Path(root)  # which may have gone: nothing is read from it
        self.sources = _paths(data)
        try:
            with _unsaid():
                self.records = load(data, ranked=False, **options)
        except DataError as error:
            gone = [path for path in self.sources if not os.path.exists(path)]
            hint = "; say with data (--data) where the scored records lie now" if gone else ""
            raise ValueError(f"{scores.path}: its records cannot be read: {error}{hint}") from error
        self.scores, self.columns = scores, dict(options.get("columns") or {})
        self.literal_tags = self.records.literal_tags
        self._index = None
        self.matched = self.stale = self.surplus = 0

    def __iter__(self):
        self.matched = self.stale = self.surplus = 0
        taken, count = bytearray(len(self.records)), len(self.records)
        for row in self.scores:
            at = row["row"]
            said = self._said(at, row["record"]) if at < count and not taken[at] else None
            if said is None:
                if self._index is None:
                    self._index = _Index(self._digest, count)
                at, known = self._index.find(row["record"], taken)
                if at is None:
                    self.surplus, self.stale = self.surplus + known, self.stale + (not known)
                    continue
                said = self.records.said(at)
            taken[at] = 1
            self.matched += 1
            yield self._scored(row, at, *said)
        if not self.matched:
            raise ValueError(
                f"{self.scores.path}: none of its {self.stale} scores is of a record in {self.records.name}: name the records "
                "that were scored with data (--data)"
            )

    def unscored(self):
        """How many records of the input have no scores, after a whole loop."""
        return len(self.records) - self.matched

    def _said(self, at, record):
        """What a record says, if this is its digest; None if it is another record."""
        try:
            said = self.records.said(at)
            return said if digest(said[0]) == record else None
        except (DataError, TypeError):
            if self._digest(at) == record:
                raise
            return None

    def _scored(self, row, at, raw, fields, left, root):
        if not isinstance(fields.responses, list) or len(fields.responses) != len(row["scores"]):
            count = len(fields.responses) if isinstance(fields.responses, (list, tuple)) else "no"
            raise ValueError(
                f"{row['id']}: {len(row['scores'])} scores for {count} responses: were the records read in another way then "
                "(format, columns)?"
            )
        return Scored(row, at, raw, fields, left, self._root or root)

    def _digest(self, index):
        """Digest of a record; None for one that cannot be read, which nobody scored."""
        try:
            return digest(self.records.raw(index))
        except (DataError, TypeError):
            return None


class _Index:
    """Which records have a digest, 24 bytes each.

    Args:
        digest_of: function of the number of a record.
        count: how many there are.
    """

    def __init__(self, digest_of, count):
        data, rows = bytearray(), array.array("q")
        for at in range(count):
            found = digest_of(at)
            if found is not None:
                data += bytes.fromhex(found)
                rows.append(at)
        halves = np.frombuffer(bytes(data), ">u8").reshape(-1, SIZE // 8)
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # stable: equal ones stay in the order of the input
        self._first, self._second = (halves[order, half].astype(np.uint64) for half in (0, 1))
        self._rows = np.array(rows, np.int64)[order]
        self._begin = {}  # of long runs of equal records: where the first one stands that may be free

    def find(self, digest, taken):
        """The first record with a digest that is not taken.

        Returns:
            (its number or None, whether there is any record with this digest).
        """
        first, second = (np.uint64(int(half, 16)) for half in (digest[:SIZE], digest[SIZE:]))
        start, stop = (int(np.searchsorted(self._first, first, side)) for side in ("left", "right"))
        inner = self._second[start:stop]
        start, stop = (start + int(np.searchsorted(inner, second, side)) for side in ("left", "right"))
        for at in range(self._begin.get(start, start), stop):
            if not taken[self._rows[at]]:
                if stop - start > 16:
                    self._begin[start] = at
                return int(self._rows[at]), True
        if stop - start > 16:
            self._begin[start] = stop
        return None, stop > start


@contextlib.contextmanager
def _unsaid():
    """Which columns a model sees nothing of was said when the records were scored."""
    logger = logging.getLogger("yojo.data.records")
    logger.addFilter(_is_error)
    try:
        yield
    finally:
        logger.removeFilter(_is_error)


def _is_error(record):
    return record.levelno >= logging.ERROR


def _paths(data):
    if isinstance(data, (str, os.PathLike)):
        return [Path(data)]
    if isinstance(data, (list, tuple)) and all(isinstance(one, (str, os.PathLike)) for one in data):
        return [Path(one) for one in data]
    return []

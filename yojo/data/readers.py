"""Files and tables of records, read one record at a time: JSONL, JSON, Parquet, lists, `datasets.Dataset`."""

import abc
import array
import bisect
import codecs
import collections
import itertools
import json
import logging
import os
import re
from pathlib import Path

import numpy as np
import torch

from yojo.data.columns import without_fillers
from yojo.inputs.videos import natural_key

logger = logging.getLogger(__name__)

EXTENSIONS = (".jsonl", ".json", ".parquet")
# What is wrong with the machine and not with a record, so that going on with the next one would not help.
NOT_A_RECORDS_FAULT = (MemoryError, torch.OutOfMemoryError)
_SAMPLE = 16  # records looked at to learn the columns of a file without a schema


class DataError(ValueError):
    """A file or a record that cannot be used.

    Attributes:
        file: path of the file, or the name of the list or dataset.
        line: line number (JSONL) or record number, from 1; None when the whole file is meant.
    """

    def __init__(self, message, file=None, line=None):
        super().__init__(message)
        self.file, self.line = file, line


class MediaError(DataError):
    """An image or a video that is missing or cannot be read."""


class ColumnError(DataError):
    """A file whose columns fit no format, or a column map that names a column the file does not have."""


class Reader(abc.ABC):
    """Records of one file or table.

    Attributes:
        name: how errors name the file.
        file: its path, or None.
        folder: where relative paths of images and videos start.
        filled: its objects have the keys of all others, None where they lack one.
    """

    file = None
    folder = Path()
    filled = False

    def __init__(self, name):
        self.name = name

    @abc.abstractmethod
    def __len__(self):
        """Number of records."""

    @abc.abstractmethod
    def read(self, index):
        """Record `index` as a dict; raises `DataError`."""

    def line(self, index):
        """Line or record number of a record, from 1."""
        return index + 1

    def sample(self, count=_SAMPLE):
        """The first `count` records that can be read; raises what is wrong with the first one when none can."""
        found, first_error = [], None
        for index in range(len(self)):
            if len(found) == count:
                break
            try:
                found.append(self.read(index))
            except DataError as error:
                first_error = first_error or error
        if not found and first_error is not None:
            raise first_error
        return found

    def columns(self):
        """Names of the columns, in the order met; of the first records where there is no schema."""
        return list(dict.fromkeys(key for record in self.sample() for key in record))

    def error(self, what, index=None, kind=DataError):
        """A `DataError` about a record, or about the whole file."""
        file = self.name if self.file is None else str(self.file)
        if index is None:
            return kind(f"{file}: {what}", file, None)
        line = self.line(index)
        return kind(f"example {f'{self.name}:{line}'!r}: {what}", file, line)

    def _an_object(self, record, index):
        if not isinstance(record, dict):
            raise self.error(f"a record must be an object with named fields, got {_short(record)}", index)
        return record


class Table(Reader):
    """A list of dicts in memory."""

    def __init__(self, records, name="records"):
        super().__init__(name)
        self.records = records

    def __len__(self):
        return len(self.records)

    def read(self, index):
        record = self._an_object(self.records[index], index)
        try:
            return plain(record)
        except NOT_A_RECORDS_FAULT:
            raise
        except Exception as error:  # values that hold themselves, and whatever else Python can make
            raise self.error(f"cannot be read: {what_it_says(error)}", index) from error


class HubDataset(Reader):
    """A `datasets.Dataset`."""

    filled = True

    def __init__(self, dataset):
        super().__init__(getattr(dataset.info, "dataset_name", None) or "dataset")
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def read(self, index):
        try:
            return plain(self._an_object(self.dataset[index], index))
        except (DataError, *NOT_A_RECORDS_FAULT):
            raise
        except Exception as error:  # an image feature is decoded here, and decoders raise what they like
            raise self.error(f"cannot be read: {what_it_says(error)}", index) from error

    def columns(self):
        return list(self.dataset.column_names)


class File(Reader):
    """A file: what errors call it, and where relative paths of its records start."""

    def __init__(self, path, name=None):
        path = Path(path)
        super().__init__(name or path.name)
        self.file, self.path = path, path.absolute()  # so that a change of the working directory breaks nothing
        self.folder = self.path.parent


class JsonLines(File):
    """A JSONL file: one pass notes where the lines begin, and a line is parsed when it is asked for.

    Blank lines are no records, but they count as lines. Reads are positional, so that threads and forked workers never
    disturb one another; a pickle carries the index and no open file.
    """

    def __init__(self, path, name=None):
        super().__init__(path, name)
        self.starts, self.lengths, self.lines = array.array("q"), array.array("q"), array.array("q")
        start = 0
        with open(path, "rb") as file:
            for number, line in enumerate(file, 1):
                if not line.removeprefix(b"" if start else codecs.BOM_UTF8).isspace():
                    self.starts.append(start)
                    self.lengths.append(len(line))
                    self.lines.append(number)
                start += len(line)
        self._open = None

    def __getstate__(self):
        return self.__dict__ | {"_open": None}

    def __len__(self):
        return len(self.starts)

    def line(self, index):
        return self.lines[index]

    def read(self, index):
        if self._open is None:
            self._open = open(self.path, "rb")  # noqa: SIM115  kept for the next record
        data = os.pread(self._open.fileno(), self.lengths[index], self.starts[index])
        try:
            text = data.decode("utf-8-sig" if self.starts[index] == 0 else "utf-8")
        except UnicodeDecodeError as error:
            raise self.error(
                f"not UTF-8: byte 0x{data[error.start]:02x} at byte {error.start + 1} of the line; save the file as UTF-8",
                index,
            ) from error
        try:
            record = json.loads(text, object_pairs_hook=_object)
        except json.JSONDecodeError as error:
            raise self.error(
                f"not JSON: {error.msg} at column {error.colno}: {_short(text)}; a JSONL line is one whole object",
                index,
            ) from error
        except (ValueError, RecursionError) as error:
            raise self.error(f"not JSON: {_refused(error)}", index) from error
        return self._an_object(record, index)


class Json(File):
    """A JSON file with a list of records, or an object that holds one under "data"; read whole, on first use."""

    # The keys of the released training files of the paper.
    KEYS = ("data", "ranking_data", "pair_data", "single_data")

    def __init__(self, path, name=None):
        super().__init__(path, name)
        self._records = None

    def __getstate__(self):
        return self.__dict__ | {"_records": None}

    def __len__(self):
        return len(self.records)

    def read(self, index):
        return self._an_object(self.records[index], index)

    @property
    def records(self):
        if self._records is None:
            self._records = self._load()
        return self._records

    def _load(self):
        file = str(self.file)
        try:
            content = json.loads(self.path.read_bytes().decode("utf-8-sig"), object_pairs_hook=_object)
        except UnicodeDecodeError as error:
            raise DataError(f"{file}: not UTF-8 at byte {error.start}; save it as UTF-8", file) from error
        except json.JSONDecodeError as error:
            if not error.doc.strip():
                return []
            hint = "; one object a line is JSONL: name it .jsonl" if error.msg == "Extra data" else ""
            raise DataError(
                f"{file}: line {error.lineno}: not JSON: {error.msg} at column {error.colno}{hint}", file, error.lineno
            ) from error
        except (ValueError, RecursionError) as error:
            raise DataError(f"{file}: not JSON: {_refused(error)}", file) from error
        if isinstance(content, dict):
            lists = [content[key] for key in self.KEYS if isinstance(content.get(key), list)]
            if not lists:
                raise DataError(
                    f'{file}: a JSON file must hold a list of records, or {{"data": [...]}}; this object has the keys '
                    f"{', '.join(content) or 'none'}",
                    file,
                )
            beside = [key for key, value in content.items() if not (key in self.KEYS and isinstance(value, list))]
            if beside:
                logger.warning("%s: not used beside the records: %s", file, ", ".join(beside))
            content = list(itertools.chain.from_iterable(lists))
        if not isinstance(content, list):
            raise DataError(f"{file}: a JSON file must hold a list of records, got {_short(content)}", file)
        return content


class Parquet(File):
    """A Parquet file, read by row group; the groups used last stay in memory, 256 MiB of them or one.

    Reading in random order therefore costs a group per record where the file is much larger than that: row groups of
    some hundred records keep it cheap.
    """

    CACHE_BYTES = 2**28
    filled = True

    def __init__(self, path, name=None):
        super().__init__(path, name)
        self._open, self._groups = None, collections.OrderedDict()
        metadata = self._parquet().metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self.ends = list(itertools.accumulate(sizes))
        self.names = list(self._parquet().schema_arrow.names)

    def __getstate__(self):
        return self.__dict__ | {"_open": None, "_groups": collections.OrderedDict()}

    def __len__(self):
        return self.ends[-1] if self.ends else 0

    def columns(self):
        return self.names

    def read(self, index):
        import pyarrow

        group = bisect.bisect_right(self.ends, index)
        if group not in self._groups:
            try:
                # Read at once rather than mapped: a forked worker may share the file with its parent.
                table = self._parquet().read_row_group(group)
            except (OSError, pyarrow.ArrowException) as error:
                raise self.error(f"row group {group} cannot be read: {error}; is the file complete?", index) from error
            self._groups[group] = table
            while len(self._groups) > 1 and sum(t.nbytes for t in self._groups.values()) > self.CACHE_BYTES:
                self._groups.popitem(last=False)
        self._groups.move_to_end(group)
        start = self.ends[group - 1] if group else 0
        return self._groups[group].slice(index - start, 1).to_pylist()[0]

    def _parquet(self):
        # A file position is shared with a forked parent, so every process opens its own.
        if self._open is None or self._open[0] != os.getpid():
            try:
                import pyarrow
                from pyarrow import parquet
            except ImportError as error:
                raise DataError(
                    f"{self.file}: Parquet needs pyarrow: pip install 'yojo[train]'", str(self.file)
                ) from error
            try:
                self._open = (os.getpid(), parquet.ParquetFile(self.path))
            except (OSError, pyarrow.ArrowException) as error:
                raise self.error(f"not a complete Parquet file: {error}") from error
        return self._open[1]


def open_source(source):
    """Readers of a source.

    Args:
        source: path of a .jsonl, .json or .parquet file; of a folder with files of one of these kinds, in natural
            order, hidden ones left out; a list of such paths; a list of dicts; or a `datasets.Dataset`.

    Returns:
        list of `Reader`.

    Raises:
        DataError: a missing, empty or broken file, or an unknown extension.
        TypeError: something else.
    """
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        readers = _folder(path) if path.is_dir() else [_file(path)]
        if not any(map(len, readers)):
            raise DataError(f"{path}: no records: the file is empty", str(path))
        return readers
    if isinstance(source, (list, tuple)):
        if not source:
            raise DataError("records: no records: the list is empty", "records")
        if all(isinstance(item, (str, os.PathLike)) for item in source):
            return [reader for item in source for reader in open_source(item)]
        return [Table(source)]
    if hasattr(source, "column_names") and isinstance(source, dict):
        raise TypeError(f"several splits were given: choose one, such as dataset[{next(iter(source), 'train')!r}]")
    if hasattr(source, "column_names") and hasattr(source, "info"):
        if not hasattr(source, "__len__"):
            raise TypeError("a streamed dataset has no length: load it without streaming=True, or save it to a file")
        if not len(source):
            raise DataError("dataset: no records: the dataset is empty", "dataset")
        return [HubDataset(source)]
    raise TypeError(
        f"records come from a path, a list of paths, a list of dicts or a datasets.Dataset, got {type(source).__name__}"
    )


def _file(path, name=None):
    if not path.exists():
        raise DataError(f"{path}: no such file", str(path))
    extension = path.suffix.lower()
    if extension not in EXTENSIONS:
        raise DataError(
            f"{path}: unknown extension {extension!r}: {', '.join(EXTENSIONS)} are read; rename or convert it",
            str(path),
        )
    if not path.stat().st_size:
        raise DataError(f"{path}: no records: the file is empty", str(path))
    return {".jsonl": JsonLines, ".json": Json, ".parquet": Parquet}[extension](path, name)


def _folder(path):
    files = (p for p in path.rglob("*") if p.suffix.lower() in EXTENSIONS and p.is_file())
    shown = (p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts))
    kinds = {}
    for file in sorted(shown, key=natural_key):
        kinds.setdefault(file.suffix.lower(), []).append(file)
    if {".parquet", ".jsonl"} <= set(kinds):
        raise DataError(
            f"{path}: the folder holds .parquet files ({len(kinds['.parquet'])}) and .jsonl files ({len(kinds['.jsonl'])}): "
            "name those that are meant, one by one",
            str(path),
        )
    for extension in (".parquet", ".jsonl", ".json"):  # the records; .json files beside them describe the data set
        if extension in kinds:
            _one_split(path, kinds[extension])
            return [_file(p, p.relative_to(path).as_posix()) for p in kinds[extension]]
    raise DataError(f"{path}: the folder holds no {', '.join(EXTENSIONS)} file", str(path))


def _one_split(folder, files):
    """Training on a data set's test records would be a silent mistake."""
    splits = {}
    for file in files:
        for part in file.relative_to(folder).parts:
            word = re.split(r"[-_.]", part.lower())[0]
            if word in ("train", "test", "validation", "valid", "val", "dev", "eval"):
                splits.setdefault(word, file)
    if len(splits) > 1:
        raise DataError(
            f"{folder}: the folder holds several splits ({', '.join(sorted(splits))}), which would be read as one: name the "
            "files, or the folder, of the split that is meant",
            str(folder),
        )


def plain(record):
    """A record of a table in memory with Python's own values: pandas and `datasets` formats have numpy's and torch's.

    Scalars become numbers, strings and bools; arrays of strings, of objects, and of one dimension become lists, at any
    depth. Others are images and videos, and stay. NaN, NaT and NA are how pandas says that a row has nothing in a column.
    """
    record = {key: _plain(value) for key, value in record.items()}
    return {key: None if isinstance(value, float) and value != value else value for key, value in record.items()}


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if type(value) in (list, tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, (np.generic, np.ndarray, torch.Tensor)):
        words = isinstance(value, np.ndarray) and value.dtype.kind in "OUS"
        made = value.tolist() if value.ndim < 2 or words else value
        if type(made) is type(value):  # an image, a video; a number that Python does not have
            return made
        # Objects of a Parquet file's list: every one of them has the keys of all others.
        return without_fillers(_plain(made)) if words else _plain(made)
    return None if type(value).__name__ in ("NAType", "NaTType") else value


def what_it_says(error):
    """The message of an exception; with its kind, where the message was not written for whoever reads it."""
    if isinstance(error, RecursionError):
        return "nested too deeply"
    if isinstance(error, (TypeError, ValueError, OSError)) and str(error):
        return str(error)
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


def _object(pairs):
    """A JSON object; of a key that stands twice, Python would take the last without a word."""
    made = dict(pairs)
    if len(made) < len(pairs):
        twice = next(key for key, count in collections.Counter(key for key, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object: keep the one that is meant")
    return made


def _refused(error):
    if isinstance(error, RecursionError):
        return "nested too deeply"
    return "a number has too many digits" if "digits" in str(error) else str(error)


def _short(value, limit=80):
    text = value if isinstance(value, str) else f"{type(value).__name__} {value!r}"
    text = " ".join(text.split())
    return text if len(text) <= limit else text[: limit - 3] + "..."

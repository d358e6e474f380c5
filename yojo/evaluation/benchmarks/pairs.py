"""Files of pairs, one for each task: JSON with a list under "pairs", Parquet; records learn their task from it."""

import os
import re
from pathlib import Path

from yojo.data.readers import DataError, Json, JsonLines, Parquet, open_source
from yojo.inputs.videos import natural_key


class _OfATask:
    """A reader whose records learn their task from the name of the file.

    Attributes:
        task: its name, or None where the file does not say.
    """

    task = None

    def read(self, index):
        record = super().read(index)
        return record if self.task is None or record.get("task") is not None else record | {"task": self.task}


class Pairs(_OfATask, Json):
    """A JSON file {"pairs": [...]} of one task."""

    KEYS = ("pairs", *Json.KEYS)


class PairLines(_OfATask, JsonLines):
    """A JSONL file of one task."""


class PairRows(_OfATask, Parquet):
    """A Parquet file of one task."""


KINDS = {".json": Pairs, ".jsonl": PairLines, ".parquet": PairRows}


def open_pairs(source, tasks):
    """Readers of pairs.

    Args:
        source: path of a .json, .jsonl or .parquet file; of a folder, of which the files that name a task are read; a
            list of such paths; a list of dicts; or a `datasets.Dataset`.
        tasks: names of the tasks; a file is of the one that its name, or a folder above it inside `source`, begins
            with.

    Returns:
        list of `yojo.data.readers.Reader`.

    Raises:
        DataError: no such file, none with a known extension, or no pairs.
    """
    if isinstance(source, (list, tuple)) and source and all(isinstance(one, (str, os.PathLike)) for one in source):
        return [reader for one in source for reader in open_pairs(one, tasks)]
    if not isinstance(source, (str, os.PathLike)):
        return open_source(source)
    path = Path(source)
    if not path.exists():
        raise DataError(f"{path}: no such file", str(path))
    files = [path]
    if path.is_dir():
        found = (file for file in path.rglob("*") if file.suffix.lower() in KINDS and file.is_file())
        shown = (file for file in found if not any(part.startswith(".") for part in file.relative_to(path).parts))
        files = [file for file in sorted(shown, key=natural_key) if _task(file.relative_to(path), tasks)]
        if len({file.suffix.lower() for file in files}) > 1:
            raise DataError(
                f"{path}: the folder holds files of several kinds: name those that are meant, one by one", str(path)
            )
    readers = []
    for file in files:
        kind = KINDS.get(file.suffix.lower())
        if kind is None:
            raise DataError(f"{file}: unknown extension {file.suffix!r}: {', '.join(KINDS)} are read", str(file))
        inner = file.relative_to(path) if path.is_dir() else Path(file.name)
        reader = kind(file, inner.as_posix())
        reader.task = _task(inner, tasks)
        readers.append(reader)
    if not any(map(len, readers)):
        raise DataError(f"{path}: no pairs: no file named after {', '.join(tasks)} holds any", str(path))
    return readers


def _task(file, tasks):
    words = [re.split(r"[-_.]", part.lower()) for part in file.parts]
    if any("response" in each and "only" in each for each in words):
        return None
    return next((each[0] for each in words if each[0] in tasks), None)

"""JSONL and Parquet files of rows, written aside and put in place when they are whole."""

import contextlib
import json
import os
import pickle
import uuid
from pathlib import Path

from yojo.files.folders import sync
from yojo.inputs.images import is_array
from yojo.inputs.lookup import find_image
from yojo.scoring.media import data_url, png

SUFFIXES = (".jsonl", ".parquet")
_ROWS, _BYTES = 512, 1 << 26  # of a row group, at most


def check_out(path, overwrite, others=()):
    """Look whether a file may be written.

    Args:
        path: of the file.
        overwrite: whether it may be there already.
        others: paths of files and folders that are read, and must stay as they are.

    Returns:
        `pathlib.Path`.

    Raises:
        ValueError: of another suffix, there already, or one of those, or inside of them.
    """
    path = Path(path)
    if path.suffix.lower() not in SUFFIXES:
        raise ValueError(f"out must be a {' or a '.join(SUFFIXES)} file, got {path}")
    check_apart(path, others)
    if path.is_dir():
        raise ValueError(f"out is a folder: {path}: name a file in it")
    if path.exists() and not overwrite:
        raise ValueError(f"out is there already: {path}: name another file, or allow it with overwrite (--overwrite)")
    return path


def check_apart(path, others):
    """Raise ValueError where a file that is to be written is one of those that are read, or lies in such a folder."""
    real = Path(os.path.realpath(path))
    for other in others:
        other = Path(os.path.realpath(other))
        if real == other:
            raise ValueError(f"{path} is what is read: name another file to write")
        if other.is_dir() and other in real.parents:
            raise ValueError(f"{path} lies in the folder {other}, all files of which are read: write it elsewhere")


@contextlib.contextmanager
def writing(path):
    """Write a file so that a crash at any moment leaves the old one or the new one.

    Args:
        path: .jsonl or .parquet.

    Yields:
        what has `add(row)`, of a dict. Bytes and images become data URLs in JSONL, and {"bytes", "path"} in Parquet.

    Raises:
        ValueError: rows that the file cannot hold.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.writing"
    writer = (_Lines if path.suffix.lower() == ".jsonl" else _Table)(aside)
    try:
        with contextlib.closing(writer):
            yield writer
            writer.finish()
        sync(aside)
        os.replace(aside, path)
        sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


class _Lines:
    def __init__(self, path):
        self._file = open(path, "wb")  # noqa: SIM115  closed below

    def add(self, row):
        row = as_json(row)
        try:
            line = json.dumps(row, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # half of a surrogate pair, which JSON can say but UTF-8 cannot
            line = json.dumps(row).encode()
        self._file.write(line + b"\n")

    def finish(self):
        self._file.flush()

    def close(self):
        self._file.close()


class _Table:
    """Rows wait in a file beside it until the types of all are known, for what is null in the first may be text in the last."""

    def __init__(self, path):
        self._path, self._spool_path = path, path.with_name(f"{path.name}.rows")
        self._spool = open(self._spool_path, "w+b")  # noqa: SIM115  closed below
        self._batch, self._weight, self._schema, self._sizes = [], 0, None, []

    def add(self, row):
        row = as_table(row)
        self._weight += self._spool.write(pickle.dumps(row, pickle.HIGHEST_PROTOCOL))
        self._batch.append(row)
        if len(self._batch) >= _ROWS or self._weight >= _BYTES:
            self._learn()

    def _learn(self):
        import pyarrow

        if not self._batch:
            return
        with _said():
            schema = _schema(self._batch)
            known = [schema] if self._schema is None else [self._schema, schema]
            self._schema = pyarrow.unify_schemas(known, promote_options="permissive")
        self._sizes.append(len(self._batch))
        self._batch, self._weight = [], 0

    def finish(self):
        import pyarrow
        from pyarrow import parquet

        self._learn()
        self._spool.seek(0)
        with _said(), parquet.ParquetWriter(self._path, self._schema or pyarrow.schema([])) as file:
            for size in self._sizes:
                rows = [pickle.load(self._spool) for _ in range(size)]
                file.write_table(pyarrow.Table.from_pylist(rows, self._schema))

    def close(self):
        self._spool.close()
        self._spool_path.unlink(missing_ok=True)


def _schema(rows):
    """Of a batch; pyarrow by itself takes the columns of the first row alone."""
    import pyarrow

    fields = []
    for name in dict.fromkeys(name for row in rows for name in row):
        with _said(f"the column {name!r}"):
            fields.append((name, pyarrow.array([row.get(name) for row in rows]).type))
    return pyarrow.schema(fields)


@contextlib.contextmanager
def _said(what="a column"):
    import pyarrow

    try:
        yield
    except (pyarrow.ArrowException, TypeError, OverflowError) as error:
        raise ValueError(
            f"{what} holds values that no Parquet file has side by side ({error}): write a .jsonl file instead"
        ) from error


# ---- values ----


def as_json(value):
    """A value as JSON has it: bytes, images and {"bytes", "path"} become data URLs or paths, times become text."""
    if value is None or isinstance(value, (str, int, float)):
        return value
    if isinstance(value, dict):
        if set(value) == {"bytes", "path"}:
            return value["path"] if value["bytes"] is None else as_json(value["bytes"])
        return {str(key): as_json(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_json(inner) for inner in value]
    if isinstance(value, (bytes, bytearray, memoryview)):
        return data_url(value)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if _is_picture(value):
        return data_url(png(value)) if _dims(value) < 4 else [data_url(png(frame)) for frame in value]
    return value.isoformat() if hasattr(value, "isoformat") else str(value)


def as_table(row):
    """A row as Parquet has it: `images` all as {"bytes", "path"}, tools as JSON, pictures as bytes."""
    row = {name: _as_table(value) for name, value in row.items()}
    if isinstance(row.get("images"), list):
        row["images"] = list(map(_stored, row["images"]))
    if isinstance(row.get("tools"), list):  # schemas that have no types in common
        row["tools"] = json.dumps(as_json(row["tools"]), ensure_ascii=False)
    return row


def _as_table(value):
    if value is None or isinstance(value, (str, int, float, bytes)):
        return value
    if isinstance(value, dict):
        return {str(key): _as_table(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_table(inner) for inner in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if _is_picture(value):
        pictures = [{"bytes": png(one), "path": None} for one in (value if _dims(value) == 4 else [value])]
        return pictures if _dims(value) == 4 else pictures[0]
    return value


def _stored(image):
    if isinstance(image, dict):
        return {"bytes": image.get("bytes"), "path": image.get("path") or image.get("url")}
    if isinstance(image, str):
        inside = image.startswith("data:")
        return (
            {"bytes": find_image(image, "", False, "an image"), "path": None}
            if inside
            else {"bytes": None, "path": image}
        )
    return {"bytes": image, "path": None}


def _is_picture(value):
    return is_array(value) or (hasattr(value, "tobytes") and hasattr(value, "mode"))


def _dims(value):
    return len(value.shape) if is_array(value) else 2

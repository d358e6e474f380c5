"""What tests of score files share: records with made-up scores, written as `yojo score --out` writes them."""

import json

import numpy as np
from data_cases import write_lines

from yojo import data
from yojo.data import readers
from yojo.inputs.digests import digest, media_digest
from yojo.inputs.messages import place

JOB = "0123456789abcdef"
COLUMNS = ("id", "row", "scores", "order", "key", "record", "media", "job")


def score_rows(records, scores, job=JOB):
    """Rows of the scores of `yojo.data.Records`; None leaves a record out."""
    rows = []
    for at, values in enumerate(scores):
        if values is None:
            continue
        raw = records.raw(at)
        values = [float(np.float32(value)) for value in values]
        order = sorted(range(len(values)), key=lambda i: (-values[i], i))
        name = str(raw.get("id", f"{records.name}:{at + 1}"))
        found = (name, at, values, order, "0" * 32, digest(raw), "", job)
        rows.append(dict(zip(COLUMNS, found, strict=True)))
    return rows


def write_job(folder, source, **options):
    """job.json as it stands in the folder of a job."""
    folder.mkdir(parents=True, exist_ok=True)
    sources = [str(path) for path in (source if isinstance(source, list) else [source])]
    asked = {"sources": sources, "format": "auto", "columns": None, "image_root": None, "allow_urls": False}
    asked |= {"literal_tags": False, "ignore_columns": []} | options
    job = {"version": 1, "fingerprint": {}, "job": JOB, "data": asked, "made": {}}
    (folder / "job.json").write_text(json.dumps(job))


def write_table(path, rows):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=3)
    return path


def write_scores(out, source, scores, **options):
    """A scores file, or a folder of two parts, of records that lie in files; returns its path."""
    sources = [str(path) for path in source] if isinstance(source, list) else source
    rows = score_rows(data.load(sources, ranked=False, **options), scores)
    if out.suffix == ".parquet":
        write_table(out, rows)
    elif out.suffix:
        write_lines(out, rows)
    write_job(out.parent / f".{out.name}.job" if out.suffix else out, source, **options)
    if not out.suffix:
        write_lines(out / "scores-1.jsonl", rows[1::2])
        write_table(out / "scores-2.parquet", rows[::2])
        (out / ".scores-3.jsonl.writing").write_text("{")
    return out


def read_rows(path):
    """Rows of a file that was written, as Python has them."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    (reader,) = readers.open_source(path)
    return [reader.read(at) for at in range(len(reader))]


def shown(example):
    """What a model is shown: the turns with every image and video in its place, by content."""
    turns = place(example.prompt, example.images, example.videos)
    return [
        (
            turn["role"],
            [part["text"] if part["type"] == "text" else media_digest(part[part["type"]]) for part in turn["content"]],
        )
        for turn in turns
    ]

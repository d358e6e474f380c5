"""Where items come from: files of one benchmark's own layout, or any preference data that `yojo.data.load` reads."""

import bisect
import dataclasses
import difflib
import itertools
import os
from pathlib import Path

import numpy as np

from yojo.data.columns import CONTENT, without_fillers
from yojo.data.readers import (
    NOT_A_RECORDS_FAULT,
    ColumnError,
    DataError,
    MediaError,
    open_source,
    what_it_says,
)
from yojo.data.records import Records, check_ranks, check_targets, reach
from yojo.data.sources import FIELDS
from yojo.evaluation.benchmarks.benchmark import ALL, NAMES, Parsed, name_of, question_of
from yojo.inputs.example import Example
from yojo.inputs.lookup import find_image, find_videos
from yojo.inputs.messages import KINDS, TAGS
from yojo.inputs.videos import Video, frame_files


class FileSource:
    """Records in a benchmark's own layout.

    Args:
        benchmark: `Benchmark`.
        data: whatever `yojo.data.readers.open_source` takes.
        columns: dict, field of the benchmark -> column of the file; None = the same names.
        image_root: folder that relative paths of media start from; None = that of the file.
        allow_urls: fetch images given as URLs.
    """

    def __init__(self, benchmark, data, columns, image_root, allow_urls):
        self.benchmark, self.allow_urls, self.root = benchmark, allow_urls, image_root
        self.columns = _checked_columns(columns, (*benchmark.fields, *benchmark.optional), benchmark.name)
        self._readers = (benchmark.readers or open_source)(data)
        self._ends = list(itertools.accumulate(map(len, self._readers)))
        self.name = Path(data).name if isinstance(data, (str, os.PathLike)) else self._readers[0].name
        self._check_columns(columns)

    def _check_columns(self, columns):
        first = next(reader for reader in self._readers if len(reader))
        found = first.columns()
        listed = f"columns found: {', '.join(map(str, found)) or 'none'}"
        needed = self.benchmark.fields
        if not self.benchmark.confirmed:
            unmapped = [field for field in needed if field not in self.columns]
            if unmapped:
                raise ColumnError(
                    f"{first.name}: the layout of {self.benchmark.title} is not confirmed: say which column is which "
                    f"with columns={{field: column}} (--map FIELD=COLUMN), for {', '.join(unmapped)} at least (also "
                    f"possible: {', '.join(self.benchmark.optional) or 'none'}); {listed}",
                    first.name,
                )
        for field in dict.fromkeys((*needed, *self.columns)):
            column = self.columns.get(field, field)
            if column not in found and column.split(".")[0] not in found:
                hint = "" if field in self.columns else f"; map it with columns={{{field!r}: ...}} (--map {field}=...)"
                mapped = f", mapped to {field}" if field in self.columns else f", which {self.benchmark.title} needs"
                raise ColumnError(f"{first.name}: there is no column {column!r}{mapped}; {listed}{hint}", first.name)

    def __len__(self):
        return self._ends[-1]

    def _locate(self, index):
        shard = bisect.bisect_right(self._ends, index)
        return self._readers[shard], index - (self._ends[shard - 1] if shard else 0)

    def where(self, index):
        """Where a record stands, as "file:line"."""
        reader, at = self._locate(index)
        return f"{reader.name}:{reader.line(at)}"

    def parse(self, index):
        """What a record says, its media not looked up.

        Raises:
            DataError: a record that cannot be judged; the message has file, line and reason.
        """
        reader, at = self._locate(index)
        raw = reader.read(at)
        try:
            record = without_fillers(raw) if reader.filled else raw
            return check(self.benchmark.parse(record | {f: reach(record, c) for f, c in self.columns.items()}))
        except (DataError, *NOT_A_RECORDS_FAULT):
            raise
        except Exception as error:  # whatever a record holds
            raise reader.error(what_it_says(error), at) from error

    def example(self, index):
        """A record with its media looked up.

        Raises:
            MediaError: an image or a video that is missing.
            DataError: anything else; the message has file, line and reason.
        """
        reader, at = self._locate(index)
        parsed = self.parse(index)
        root = self.root or reader.folder
        try:
            images = [find_image(one, root, self.allow_urls, f"image {i}") for i, one in enumerate(parsed.images)]
            videos = find_videos(list(parsed.videos), parsed.fps, root)
            if parsed.frames is not None:
                videos = [_sampled(video, parsed.frames) for video in videos]
        except NOT_A_RECORDS_FAULT:
            raise
        except Exception as error:
            raise reader.error(what_it_says(error), at, MediaError) from error
        where = self.where(index)
        try:
            return Example(
                parsed.prompt, parsed.responses, images=images, videos=videos, rankings=list(parsed.rankings), id=where,
                literal_tags=_literal(parsed, images, videos),
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise reader.error(str(error).removeprefix(f"example {where!r}: "), at) from error


class PreferenceSource:
    """Records of any format of `yojo.data.load`.

    Args:
        data, image_root, allow_urls, format: as `yojo.data.load` takes them.
        columns: dict, field -> column; "id", "group" and "question" beside the fields of `yojo.data.load`.
    """

    def __init__(self, data, columns, image_root, allow_urls, format):
        columns = _checked_columns(columns, sorted({*FIELDS, *NAMES}), "preferences")
        self.names = {name: columns.pop(name) for name in NAMES if name in columns}
        # They are used, so nobody need be warned of them, unless the format reads them, too.
        unread = [column for column in self.names.values() if column.split(".")[0] not in CONTENT and "." not in column]
        self.records = Records(
            data, format=format, columns=columns, image_root=image_root, allow_urls=allow_urls,
            ignore_columns=list(dict.fromkeys(unread)),
        )  # fmt: skip
        found = self.records.columns
        for name, column in self.names.items():
            if column not in found and column.split(".")[0] not in found:
                raise ColumnError(
                    f"{self.records.name}: there is no column {column!r}, mapped to {name}; columns found: "
                    f"{', '.join(found)}",
                    self.records.name,
                )
        self.name = self.records.name

    def __len__(self):
        return len(self.records)

    def where(self, index):
        """Where a record stands, as "file:line"."""
        return self.records.label(index)

    def _ranks(self, fields):
        count = len(fields.responses)
        if fields.targets is not None:
            targets = check_targets(fields.targets, count)
            levels = sorted(set(targets), reverse=True)
            return [1 + levels.index(target) for target in targets]
        if fields.rankings is None:
            raise ValueError("no rankings: evaluation needs one rank per response, 1 = best")
        return check_ranks(fields.rankings, count)

    def parse(self, index):
        """As `FileSource.parse`."""
        raw, fields, _, _ = self.records.said(index)
        where = self.where(index)
        try:
            names = {name: name_of({name: reach(raw, column)}, name) for name, column in self.names.items()}
            return check(
                Parsed(
                    prompt=fields.prompt, responses=list(fields.responses), rankings=self._ranks(fields),
                    id=names.get("id"), question=names.get("question"), group=names.get("group") or ALL,
                    images=fields.images, videos=fields.videos,
                )
            )  # fmt: skip
        except NOT_A_RECORDS_FAULT:
            raise
        except Exception as error:
            file, line = self.records.where(index)
            raise DataError(f"example {where!r}: {what_it_says(error)}", file, line) from error

    def example(self, index):
        """As `FileSource.example`."""
        example = self.records[index]
        return dataclasses.replace(example, rankings=list(self.parse(index).rankings))


def check(parsed):
    """`parsed`, where it is something to judge.

    Raises:
        ValueError: fewer than two responses, an empty one, ranks that do not fit them, a response that is the same text
            as one of another rank, or all responses tied.
    """
    responses = parsed.responses
    if len(responses) < 2:
        raise ValueError(f"{len(responses)} responses: there is nothing to compare; two or more are needed")
    for i, response in enumerate(responses):
        if not isinstance(response, str):
            raise ValueError(f"response {i} must be a string, got {type(response).__name__}")
        if not response.strip():
            raise ValueError(f"response {i} is empty")
    rankings = check_ranks(parsed.rankings, len(responses))
    if len(set(rankings)) == 1:
        raise ValueError(
            f"all {len(rankings)} responses are tied (rankings {rankings}): no judge can be right or wrong"
        )
    first = {}
    for i, (response, rank) in enumerate(zip(responses, rankings, strict=True)):
        j = first.setdefault(response, i)
        if rankings[j] != rank:
            raise ValueError(
                f"responses {j} and {i} are the same text, but ranked {rankings[j]} and {rank}: no judge can tell them apart"
            )
    question = parsed.question or parsed.id or question_of(parsed.prompt, parsed.images, parsed.videos)
    return dataclasses.replace(parsed, rankings=rankings, question=question)


def frames_of(count, wanted):
    """Numbers of `wanted` of `count` frames, evenly spaced, first and last among them; of all where no more are."""
    return list(range(count)) if count <= wanted else np.linspace(0, count - 1, wanted, dtype=int).tolist()


def _sampled(video, wanted):
    if not isinstance(video.source, (str, os.PathLike)) or not os.path.isdir(video.source):
        return video
    files = [os.fspath(file) for file in frame_files(video.source)]
    return Video([files[i] for i in frames_of(len(files), wanted)], video.fps)


def _literal(parsed, images, videos):
    if parsed.literal_tags is not None or not isinstance(parsed.prompt, str):
        return bool(parsed.literal_tags)
    given = dict(zip(KINDS, (len(images), len(videos)), strict=True))
    return any(parsed.prompt.count(TAGS[kind]) != count for kind, count in given.items())


def _checked_columns(columns, fields, name):
    if columns is not None and not isinstance(columns, dict):
        raise TypeError(f"columns must be a dict, field -> column, got {type(columns).__name__}")
    columns = dict(columns or {})
    for field, column in columns.items():
        if field not in fields:
            near = difflib.get_close_matches(str(field), fields, 1)
            raise ValueError(
                f"columns maps {field!r}, which is no field of {name}{f' (did you mean {near[0]}?)' if near else ''}; "
                f"fields are {', '.join(fields)}"
            )
        if not isinstance(column, str) or not column:
            raise ValueError(f"columns maps {field!r} to {column!r}, which is no name of a column")
    return columns

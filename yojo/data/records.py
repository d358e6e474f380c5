"""Files and records -> `Example`, checked: `load`."""

import bisect
import collections
import itertools
import logging
import math
import os
from pathlib import Path

from yojo.data.columns import beside, given, without_fillers
from yojo.data.readers import NOT_A_RECORDS_FAULT, ColumnError, DataError, MediaError, open_source, what_it_says
from yojo.data.sources import COLUMNS, FIELDS, FORMATS, detect, read, refuse_content
from yojo.inputs.example import Example
from yojo.inputs.lookup import find_image, find_videos

logger = logging.getLogger(__name__)


def load(
    source,
    *,
    format="auto",
    columns=None,
    image_root=None,
    allow_urls=False,
    ranked=True,
    keep_tied=False,
    close_gaps=False,
    literal_tags=False,
    ignore_columns=(),
):
    """Open preference data; nothing is parsed before it is asked for, beyond the few records that tell the format.

    Prompt, responses and ranks stand where the format has them. All formats have the same columns for the rest: images
    (`images`, `image` or `img_path`), videos (`video` or `videos`, with `fps` or `sampling_interval`), a system prompt
    (`system` or `system_prompt`, which becomes the first turn) and tools (`tools`, a list or its JSON). Nothing else is
    lost without a word: a column that says what the model is to see, and that the format does not read, is an error of
    its record; any other is counted in `Records.unused`, with one warning for each.

    Args:
        source: path of a .jsonl, .json or .parquet file; of a folder of such files; a list of paths; a list of dicts;
            or a `datasets.Dataset`.
        format: "auto", or a name of `yojo.data.sources.FORMATS`: yojo (the paper's JSONL), trl, rewardbench2, nectar,
            ultrafeedback, vlfeedback, rlaifv, llava_critic, nemo_rl.
        columns: dict, our field -> column of the file: {"prompt": "question", "rankings": "meta.ranks"}. A dot reaches
            into an object.
        image_root: folder that relative paths of images and videos start from; the data file's own by default, the
            working directory for lists and datasets.
        allow_urls: fetch images given as URLs (when a record is read, 30 seconds at most); refused otherwise.
        ranked: every record must have rankings (or targets) that tell at least two responses apart, as training needs.
            False: they are optional, and one response is fine, as scoring needs.
        keep_tied: let records pass whose responses are all tied.
        close_gaps: turn ranks with gaps or fractions ([1, 3], [1.5, 1.5, 3]) into dense ones ([1, 2], [1, 1, 2]).
        literal_tags: `<image>` and `<video>` in prompts are just characters, and no places of images and videos.
        ignore_columns: names of columns to leave out knowingly; a dot reaches into the objects of a list
            ("completions.note").

    Returns:
        `Records`.

    Raises:
        DataError: a file that is missing, empty or broken, or of an unknown extension.
        ColumnError: columns that fit no format, or a column map that names a column the file does not have.
        ValueError, TypeError: a bad argument.
    """
    return Records(
        source,
        format=format,
        columns=columns,
        image_root=image_root,
        allow_urls=allow_urls,
        ranked=ranked,
        keep_tied=keep_tied,
        close_gaps=close_gaps,
        literal_tags=literal_tags,
        ignore_columns=ignore_columns,
    )


class Records:
    """A map-style dataset of `Example`: `len(records)`, `records[i]`; made by `load`, whose arguments it takes.

    It can be pickled, and loader workers that fork or spawn open the files for themselves.

    Attributes:
        name: of the source, as messages use it.
        path: of the file or folder; None for lists and datasets.
        format: name of the format, a key of `yojo.data.sources.FORMATS`.
        columns: names of the columns found.
        unused: Counter, column -> how many of the records read so far hold something there that nothing reads and nobody
            knows; a dot reaches into objects.
        ignored: the same for columns that may be left: ids and the like, what says again what other columns say, and
            `ignore_columns`.
    """

    def __init__(
        self, source, *, format="auto", columns=None, image_root=None, allow_urls=False, ranked=True, keep_tied=False,
        close_gaps=False, literal_tags=False, ignore_columns=(),
    ):  # fmt: skip
        if format != "auto" and format not in FORMATS:
            raise ValueError(f"format must be auto or one of {', '.join(FORMATS)}, got {format!r}")
        if not isinstance(literal_tags, bool):
            raise TypeError(f"literal_tags must be a bool, got {literal_tags!r}")
        self._map, self._ignore = _checked_map(columns), _checked_names(ignore_columns)
        self._readers = open_source(source)
        self._ends = list(itertools.accumulate(map(len, self._readers)))
        self._root = None if image_root is None else Path(image_root)
        if self._root is not None and not self._root.is_dir():
            raise ValueError(f"image_root is no folder: {self._root}")
        self.allow_urls, self.ranked, self.keep_tied, self.close_gaps = allow_urls, ranked, keep_tied, close_gaps
        self.literal_tags = literal_tags
        self.path = Path(source) if isinstance(source, (str, os.PathLike)) else None
        self.name = self._readers[0].name if self.path is None else self.path.name
        first = next(reader for reader in self._readers if len(reader))
        self.columns = first.columns()
        (record,) = first.sample(1)
        record = without_fillers(record) if first.filled else record
        named = [(column, f"mapped to {field}") for field, column in self._map.items()]
        for column, what in [*named, *((name, "in ignore_columns") for name in self._ignore)]:
            if column.split(".")[0] not in self.columns and column not in self.columns:
                raise ColumnError(
                    f"{self.path or self.name}: there is no column {column!r} ({what}); {self._found()}",
                    str(self.path or self.name),
                )
        there = [name for name in self.columns if name not in self._ignore]
        seen = {name: value for name, value in self._mapped(record).items() if name not in self._ignore}
        self.format = detect(seen, there) if format == "auto" else format
        if self.format is None:
            known = "\n".join(f"  {name}: {needs}" for name, needs in COLUMNS.items())
            raise ColumnError(
                f"{self.path or self.name}: these columns fit no known format; {self._found()}\nformats and their "
                f"columns:\n{known}\nname the format, or map columns: columns={{'prompt': ...}} (--map prompt=...)",
                str(self.path or self.name),
            )
        self.unused, self.ignored = collections.Counter(), collections.Counter()
        self._counted, self._warned = bytearray(len(self)), set()  # records in the two, columns that were warned of
        try:  # at once for what the first record shows: nobody should have to wait for it
            self._warn(self._fields(record)[1])
        except NOT_A_RECORDS_FAULT:
            raise
        except Exception:  # whoever reads the record will hear of it
            return

    def _found(self):
        return f"columns found: {', '.join(map(str, self.columns)) or 'none'}"

    def __len__(self):
        return self._ends[-1]

    def _locate(self, index):
        if not -len(self) <= index < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        index %= len(self)
        shard = bisect.bisect_right(self._ends, index)
        return self._readers[shard], index - (self._ends[shard - 1] if shard else 0)

    def raw(self, index):
        """A record as it stands in the file.

        Args:
            index: its number, from 0; negative ones count from the end.

        Returns:
            dict.
        """
        reader, at = self._locate(index)
        return reader.read(at)

    def said(self, index, raw=None):
        """What a record says, its media not looked up and its ranks not checked: they may have gone since it was scored.

        Args:
            index: number of the record, from 0.
            raw: what `raw(index)` returns, where that is at hand.

        Returns:
            (the raw record, `yojo.data.fields.Fields`, what is left out of it as `read` has it, and the folder that relative
            paths of its media start from).

        Raises:
            DataError: a record that does not fit the format.
        """
        reader, at = self._locate(index)
        raw = reader.read(at) if raw is None else raw
        try:
            fields, left = self._fields(without_fillers(raw) if reader.filled else raw)
        except (DataError, *NOT_A_RECORDS_FAULT):
            raise
        except Exception as error:
            raise reader.error(what_it_says(error), at) from error
        return raw, fields, left, self._root or reader.folder

    def where(self, index):
        """Where a record stands.

        Args:
            index: its number, from 0.

        Returns:
            (file, line): path or name of the file, and the line (JSONL) or record number, from 1.
        """
        reader, at = self._locate(index)
        return str(reader.file or reader.name), reader.line(at)

    def __getitem__(self, index):
        """`Example` number `index`, named "file:line"; raises `DataError` for a record that cannot be used."""
        example, left = self.read(index)
        self.count(index, left)
        return example

    def count(self, index, left):
        """Count what is left out of a record, once, and warn of columns that nobody knows.

        Args:
            index: number of the record, from 0.
            left: what `read` has returned with its example.
        """
        index %= len(self)
        if not self._counted[index]:
            self._counted[index] = 1
            self._note(left)

    def _note(self, left):
        self.unused.update(path for path, why in left.items() if why is None)
        self.ignored.update(path for path, why in left.items() if why is not None)
        self._warn(left)

    def _warn(self, left):
        new = [path for path, why in left.items() if why is None and path not in self._warned]
        self._warned.update(new)
        if new:
            logger.warning(
                "%s: columns not used: %s; the model sees nothing of them (`yojo data check` counts them; "
                "ignore_columns=%r says that this is meant)",
                self.path or self.name, ", ".join(new), new,
            )  # fmt: skip

    def label(self, index):
        """What errors call a record, and the `id` of its `Example`: "file:line"."""
        reader, at = self._locate(index)
        return f"{reader.name}:{reader.line(at)}"

    def read(self, index, raw=None):
        """As `records[index]`, with what is left out of it.

        Args:
            index: number of the record, from 0.
            raw: what `raw(index)` returns, where that is at hand.

        Returns:
            (`Example`, dict column -> why it may be left out, or None where nobody knows it).

        Raises:
            DataError: a record that cannot be used, whatever is wrong with it.
        """
        reader, at = self._locate(index)
        try:
            return self._read(reader, at, reader.read(at) if raw is None else raw)
        except (DataError, *NOT_A_RECORDS_FAULT):
            raise
        except Exception as error:  # whatever it is: nothing that a record holds may end the reading of the others
            raise reader.error(what_it_says(error), at) from error

    def _read(self, reader, at, raw):
        fields, left = self._fields(without_fillers(raw) if reader.filled else raw)
        rankings = self._rankings(fields)
        root = self._root or reader.folder
        try:
            images = [find_image(image, root, self.allow_urls, f"image {i}") for i, image in enumerate(fields.images)]
            videos = find_videos(fields.videos, fields.fps, root)
            prompt = self._inline(fields.prompt, root)
        except NOT_A_RECORDS_FAULT:
            raise
        except Exception as error:
            raise reader.error(what_it_says(error), at, MediaError) from error
        place = f"{reader.name}:{reader.line(at)}"
        try:
            example = Example(
                prompt, fields.responses, images=images, videos=videos, rankings=rankings, id=place, tools=fields.tools,
                literal_tags=self.literal_tags,
            )  # fmt: skip
        except (TypeError, ValueError) as error:
            raise reader.error(str(error).removeprefix(f"example {place!r}: "), at) from error
        return example, left

    def _fields(self, raw):
        record = self._mapped(raw)
        columns = self._map.values()
        used = [column if column in record else column.split(".")[0] for column in columns]
        fields, left = read(record, self.format, self._ignore, used)
        overridden = [f for f, c in self._map.items() if c != f and given(raw.get(f)) and f not in columns]
        around = beside(raw, columns)
        for path in around:
            refuse_content(path, self.format, self._ignore)
        for path in [*overridden, *around]:
            left.setdefault(path, "by ignore_columns" if path in self._ignore else None)
        return fields, left

    def _mapped(self, record):
        return record | {field: reach(record, column) for field, column in self._map.items()}

    def _inline(self, prompt, root):
        """Media inside chat messages, looked up like the others."""
        if not isinstance(prompt, list):
            return prompt
        turns = []
        for turn in prompt:
            if isinstance(turn["content"], list):
                turn = {**turn, "content": [self._found_part(part, root) for part in turn["content"]]}
            turns.append(turn)
        return turns

    def _found_part(self, part, root):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("image", "video"):
            return part
        source = part.get(kind)
        if source is None:
            return part
        if kind == "image":
            return {"type": kind, kind: find_image(source, root, self.allow_urls, "an image of the prompt")}
        return {"type": kind, kind: find_videos([source], part.get("fps"), root)[0]}

    def _rankings(self, fields):
        count = len(fields.responses)
        if not count:
            raise ValueError("no responses: at least one is needed")
        if fields.targets is not None:
            rankings = check_targets(fields.targets, count)
        elif fields.rankings is not None:
            rankings = check_ranks(fields.rankings, count, close_gaps=self.close_gaps)
        else:
            rankings = None
        if rankings is not None:
            _check_twins(fields.responses, rankings)
        if not self.ranked:
            return rankings
        if count == 1:
            raise ValueError("one response only: there is nothing to compare; training needs two or more")
        if rankings is None:
            raise ValueError("no rankings: training needs one rank per response, 1 = best (or targets that sum to 1)")
        if fields.targets is None and len(set(rankings)) == 1 and not self.keep_tied:
            raise ValueError(
                f"all {count} responses are tied (rankings {rankings}): there is nothing to learn; leave the record out, "
                "or let it pass with keep_tied=True (--keep-tied)"
            )
        return rankings


# ---- ranks ----


def check_ranks(rankings, count, *, close_gaps=False):
    """Ranks as whole numbers from 1, without gaps other than those that ties leave.

    Dense ranks (1, 1, 2) and competition ranks (1, 1, 3) pass as they are.

    Args:
        rankings: list of ranks.
        count: how many there must be.
        close_gaps: turn any others into dense ranks.

    Returns:
        list of ints.

    Raises:
        ValueError: a wrong count, ranks that are no numbers, below 1, fractional or with gaps.
    """
    if len(rankings) != count:
        raise ValueError(f"{len(rankings)} rankings for {count} responses: one rank per response is needed")
    for rank in rankings:
        if isinstance(rank, bool) or not isinstance(rank, (int, float)):
            raise ValueError(f"a rank must be a number, got {rank!r} in {rankings}")
        if isinstance(rank, float) and not math.isfinite(rank):
            raise ValueError(f"a rank must be a finite number, got {rank} in {rankings}")
    if min(rankings) < 1:
        hint = ": ranks start at 0 here, add 1 to each" if min(rankings) == 0 else ""
        raise ValueError(f"rankings {rankings} must start at 1, which is the best{hint}")
    levels = sorted(set(rankings))
    dense = {level: place + 1 for place, level in enumerate(levels)}
    competition = {level: 1 + sum(rank < level for rank in rankings) for level in levels}
    if all(rank == dense[rank] for rank in levels) or all(rank == competition[rank] for rank in levels):
        return [int(rank) for rank in rankings]
    closed = [dense[rank] for rank in rankings]
    if close_gaps:
        return closed
    what = "have gaps" if all(rank == int(rank) for rank in levels) else "are not whole numbers"
    raise ValueError(
        f"rankings {rankings} {what}: make them {closed}, or have it done with close_gaps=True (--close-gaps)"
    )


def check_targets(targets, count):
    """Soft targets as floats.

    Raises:
        ValueError: a wrong count, a target that is no number or negative, or a sum that is not 1.
    """
    if len(targets) != count:
        raise ValueError(f"{len(targets)} targets for {count} responses: one target per response is needed")
    for target in targets:
        if isinstance(target, bool) or not isinstance(target, (int, float)) or not 0 <= target <= 1 + 1e-3:
            raise ValueError(f"a target must be a number from 0 to 1, got {target!r} in {targets}")
    if abs(sum(targets) - 1) > 1e-3:
        raise ValueError(f"targets must sum to 1, got {targets}, which sum to {sum(targets):g}")
    return [float(target) for target in targets]


def _check_twins(responses, rankings):
    """The same text cannot be better than itself."""
    first = {}
    for i, (response, rank) in enumerate(zip(responses, rankings, strict=True)):
        if not isinstance(response, str):
            continue  # which `Example` refuses
        j = first.setdefault(response, i)
        if rankings[j] != rank:
            raise ValueError(
                f"responses {j} and {i} are the same text, but ranked {rankings[j]} and {rank}: one of them says nothing, or "
                "what tells them apart is not in their text; rank them alike, or leave the record out"
            )


# ---- column maps ----


def _checked_names(names):
    if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
        raise TypeError(f"ignore_columns must be a list of names of columns, got {names!r}")
    return tuple(names)


def _checked_map(columns):
    columns = dict(columns or {})
    for field, column in columns.items():
        if field not in FIELDS:
            raise ValueError(f"columns maps {field!r}, which is no field; fields are {', '.join(sorted(FIELDS))}")
        if not isinstance(column, str) or not column:
            raise ValueError(f"columns maps {field!r} to {column!r}, which is no name of a column")
    return columns


def reach(record, column):
    """What a record holds in a column; a dot reaches into an object. None where there is nothing."""
    if column in record:  # a name with a dot in it
        return record[column]
    for name in column.split("."):
        record = record.get(name) if isinstance(record, dict) else None
    return record

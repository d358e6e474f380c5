"""`Items`: the items of an opened benchmark, in the file's order, their media looked up when they are asked for."""

import collections
import operator

from yojo.data.readers import DataError
from yojo.evaluation.benchmarks.benchmark import ALL, Entry, Item


class BadRecord(DataError):
    """A record that cannot be judged, where none is to be left out."""


class Items:
    """The items of a benchmark.

    Every record is read once when the benchmark is opened, so that a record that cannot be judged is known before the
    first verdict; images and videos are looked up when `items[i]` is asked for. It can be pickled.

    Args:
        benchmark: `Benchmark`.
        source: `FileSource` or `PreferenceSource`.
        skip_bad: leave out records that cannot be judged and list them in `bad`. A missing image is found only when its
            item is read, and is an error there.
        partial: let counts differ from the published ones; `missing` says where.

    Attributes:
        benchmark: `Benchmark`.
        name: of the file or folder.
        group_counts: dict group -> number of items, in the order met.
        bad: list of ("file:line", reason) of the records left out.
        missing: dict group -> (published, found) where they differ; "all" for the whole benchmark.

    Raises:
        BadRecord: a record that cannot be judged, without skip_bad.
        DataError: counts that differ from the published ones by more
            than the records left out, without partial.
    """

    def __init__(self, benchmark, source, *, skip_bad=False, partial=False):
        for name, value in (("skip_bad", skip_bad), ("partial", partial)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {value!r}")
        self.benchmark, self.name, self._source = benchmark, source.name, source
        self.bad, self._entries, self._records = [], [], []
        for record in range(len(source)):
            try:
                parsed = source.parse(record)
            except DataError as error:
                if not skip_bad:
                    raise BadRecord(str(error), error.file, error.line) from error
                where = source.where(record)
                self.bad.append((where, str(error).removeprefix(f"example {where!r}: ")))
                continue
            self._entries.append(_entry(parsed, len(self._entries), source.where(record)))
            self._records.append(record)
        if not self._entries:
            where, why = self.bad[0]
            raise DataError(
                f"{self.name}: none of its {len(self.bad)} records can be judged; the first, {where}: {why}", self.name
            )
        self.group_counts = dict(collections.Counter(entry.group for entry in self._entries))
        self.missing = _differences(benchmark.counts, self.group_counts)
        if self.missing and not partial and not self._explained():
            said = "; ".join(
                f"{group}: {there} published, {here} found" for group, (there, here) in self.missing.items()
            )
            raise DataError(
                f"{self.name}: not all of {benchmark.title}: {said}: another version? partial=True (--partial) judges "
                "what is there",
                self.name,
            )

    def _explained(self):
        """Whether the records left out are as many as those that lack."""
        groups = {group: pair for group, pair in self.missing.items() if group != ALL} or self.missing
        return all(there >= here for there, here in groups.values()) and (
            sum(there - here for there, here in groups.values()) <= len(self.bad)
        )

    def __len__(self):
        return len(self._entries)

    def light(self, index):
        """What is known of an item without its prompt and media.

        Args:
            index: its number, from 0; negative ones count from the end.

        Returns:
            `Entry`.
        """
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        return self._entries[index]

    def __getitem__(self, index):
        """`Item` number `index`; raises `DataError` for a missing image or video, with file, line and reason."""
        entry = self.light(index)
        return Item(**vars(entry), example=self._source.example(self._records[entry.number]))

    def __iter__(self):
        return (self[index] for index in range(len(self)))


def _entry(parsed, number, where):
    return Entry(
        number=number, id=parsed.id or where, group=parsed.group, question=parsed.question, tags=dict(parsed.tags),
        info=dict(parsed.info), rankings=tuple(parsed.rankings), lengths=tuple(map(len, parsed.responses)), where=where,
    )  # fmt: skip


def _differences(published, found):
    """dict group -> (published, found) where they differ; groups that nobody published count where others are."""
    found = found | {ALL: sum(found.values())}
    unpublished = [group for group in found if group != ALL] if set(published) - {ALL} else []
    groups = dict.fromkeys((*published, *unpublished))
    pairs = {group: (published.get(group, 0), found.get(group, 0)) for group in groups}
    return {group: pair for group, pair in pairs.items() if pair[0] != pair[1]}

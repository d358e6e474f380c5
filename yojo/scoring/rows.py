"""Rows of the input, made ready for the judge: read, told apart by what they hold, decoded and tokenised."""

import dataclasses

from yojo.data.readers import NOT_A_RECORDS_FAULT, DataError, what_it_says
from yojo.inputs.digests import digest, example_key, example_stamp


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of the input, made ready.

    Attributes:
        row: its number, from 0.
        id: the record's own `id`, or file and line.
        mine: False: it is another shard's, and nothing else is known.
        record: digest of the raw record; None where it cannot be read.
        key: digest of what the model sees of it; None where that cannot be read.
        media: stamp of its media files.
        ready: what the judge takes (`Encoded` or `Example`); None where there is an error, or none was asked for.
        error: what is wrong with it, or None.
        left: dict column -> why it may be left out, as of `yojo.data.records.Records.read`.
    """

    row: int
    id: str = ""
    mine: bool = True
    record: str | None = None
    key: str | None = None
    media: str = ""
    ready: object = None
    error: str | None = None
    left: dict = dataclasses.field(default_factory=dict)

    def line(self, scores, job):
        """The row of the output: a dict.

        Args:
            scores: [N] float32 tensor, finite.
            job: the job's short fingerprint.
        """
        values = scores.tolist()
        return {
            "id": self.id,
            "row": self.row,
            "scores": values,
            "order": sorted(range(len(values)), key=lambda n: -values[n]),
            "key": self.key,
            "record": self.record,
            "media": self.media,
            "job": job,
        }


class Prepare:
    """What a worker does with the number of a row: a `Row`; whatever is wrong with the record is in it.

    Args:
        records: `yojo.data.records.Records`.
        encode: function (example, number of the row) -> what the judge takes; None: the `Example` itself.
        shard: (number, count).
    """

    def __init__(self, records, encode=None, shard=(0, 1)):
        self.records, self.encode, self.shard = records, encode, shard

    def __call__(self, number):
        row, example = self.read(number)
        if not row.mine or row.error is not None:
            return row
        try:
            ready = example if self.encode is None else self.encode(example, number)
        except (TypeError, ValueError) as error:
            return dataclasses.replace(row, error=_reason(error, example.name))
        return dataclasses.replace(row, ready=ready)

    def read(self, number, known=None):
        """(`Row` without what the judge takes, `Example` or None).

        Args:
            number: of the row.
            known: function (record digest, stamp) -> key or None, where reading the media again can be spared.
        """
        raw = record = None
        try:
            raw = self.records.raw(number)
            record = digest(raw)
            if not self._owns(number, raw, record):
                return Row(number, mine=False), None
            example, left = self.records.read(number, raw)
            stamp = example_stamp(example)
            key = known(record, stamp) if known is not None else None
            key = key or example_key(example)
        except (DataError, OSError, TypeError, ValueError) as error:
            name = name_of(raw, self.records.label(number))
            mine = record is not None or self._owns(number, raw, record)
            return Row(number, name, mine, record, error=_reason(error, f"example {name!r}")), None
        return Row(number, name_of(raw, example.id), True, record, key, stamp, left=left), example

    def _owns(self, number, raw, record):
        """Whether a row is of this shard: by its responses, so that rows which show a model the same are of the same one.

        It must not depend on what may change between the runs of two shards: whether the media can be read, say.
        """
        shard, count = self.shard
        if count == 1:
            return True
        try:
            owner = digest(self.records.said(number, raw)[1].responses)
        except NOT_A_RECORDS_FAULT:
            raise
        except Exception:  # it is a bad row, whatever is wrong with it
            owner = record or digest(list(map(str, self.records.where(number))))
        return int(owner[:15], 16) % count == shard


class Look:
    """What a worker does to find out whether a row is done: it is read, and nothing is decoded.

    Args:
        prepare: `Prepare`.
        known: as for `Prepare.read`.
    """

    def __init__(self, prepare, known):
        self.prepare, self.known = prepare, known

    def __call__(self, number):
        return self.prepare.read(number, self.known)[0]


def name_of(raw, place):
    """The `id` of a row: the record's own, or its place."""
    own = raw.get("id") if isinstance(raw, dict) else None
    usable = isinstance(own, (str, int)) and not isinstance(own, bool) and own != ""
    return str(own) if usable else str(place)


def _reason(error, name):
    """What an exception says, without the name that stands beside it."""
    text = what_it_says(error)
    head, mark, rest = text.partition("': ")
    return rest if mark and head.startswith("example '") else text.removeprefix(f"{name}: ")

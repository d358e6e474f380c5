"""Which rows of a job have their scores, by what they hold: 73 bytes a row."""

import array

import numpy as np

_EMPTY = b"\0" * 16


class Done:
    """The rows that finished parts hold.

    A row of the input is known by its key, the content that the model saw, not by its place: the input may have grown
    anywhere. Where n rows hold the same, n of them are done when n are in the parts.

    Args:
        lines: iterable of (place, row), as of `yojo.scoring.parts.Lines`.

    Attributes:
        places: [n] int64.
    """

    def __init__(self, lines):
        keys, records, media, places = bytearray(), bytearray(), bytearray(), array.array("q")
        for place, line in lines:
            keys += bytes.fromhex(line["key"])
            records += bytes.fromhex(line["record"])
            media += bytes.fromhex(line["media"]) if line["media"] else _EMPTY
            places.append(place)
        self.places = np.frombuffer(places, np.int64)
        self.keys, self.records, self.media = (np.frombuffer(one, "V16") for one in (keys, records, media))
        self.by_key = np.argsort(self.keys, kind="stable")
        self.by_record = np.argsort(self.records, kind="stable")
        self.taken, self.met = np.zeros(len(self), bool), np.zeros(len(self), bool)
        self._next = {}  # where many rows hold the same: the first of them that may be left

    def __len__(self):
        return len(self.places)

    def known(self, record, stamp):
        """The key of a row of the same record whose files are those they were; None where there is none.

        Args:
            record: digest of the raw record.
            stamp: of its media files.
        """
        if not stamp:
            return None
        stamp = np.frombuffer(bytes.fromhex(stamp), "V16")[0]
        for n in self._range(self.by_record, self.records, record):
            if self.media[n] == stamp:
                return self.keys[n].tobytes().hex()
        return None

    def take(self, key, record=None):
        """Take a row with this key that nobody has taken, one of this record where it is given: its number, or None."""
        if record is None:
            return self._take(self.by_key, self.keys, key)
        wanted = np.frombuffer(bytes.fromhex(key), "V16")[0]
        return self._take(self.by_record, self.records, record, lambda n: self.keys[n] == wanted)

    def has(self, key):
        """Whether there is a row with this key."""
        return len(self._range(self.by_key, self.keys, key)) > 0

    def take_record(self, record):
        """The same for a row of the same raw record, whose media cannot be read any more."""
        return self._take(self.by_record, self.records, record)

    def meet(self, record):
        """Say that the input has a row with this raw record."""
        self.met[self._range(self.by_record, self.records, record)] = True

    def replaced(self):
        """Numbers of rows that nobody has taken though their record is in the input: it shows other images by now."""
        return (self.met & ~self.taken).nonzero()[0].tolist()

    def rows(self, numbers):
        """(place, key, record) of rows, as `yojo.scoring.parts.Lines.drop` takes them."""
        return [(int(self.places[n]), self.keys[n].tobytes().hex(), self.records[n].tobytes().hex()) for n in numbers]

    def left(self):
        """How many rows nobody has taken, of records that are not in the input."""
        return int((~self.met & ~self.taken).sum())

    def _take(self, order, table, value, fits=None):
        found = self._range(order, table, value)
        if fits is not None:
            found = [n for n in found if fits(n)]
        start = self._next.get(value, 0)
        for n in found[start:]:
            start += 1
            if not self.taken[n]:
                self.taken[n] = True
                if len(found) > 1:
                    self._next[value] = start
                return int(n)
        return None

    def _range(self, order, table, value):
        value = np.frombuffer(bytes.fromhex(value), "V16")
        low, high = (np.searchsorted(table, value, side, sorter=order)[0] for side in ("left", "right"))
        return order[low:high]

"""Which rows of a job have their scores, by what they hold: 75 bytes a row."""

import array
import bisect

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
        # Those of one record by their keys.
        self.by_record = self.by_key[np.argsort(self.records[self.by_key], kind="stable")]
        self.taken, self.met, self.unsure = (np.zeros(len(self), bool) for _ in range(3))
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
            return self._take(self._range(self.by_key, self.keys, key), key)
        found, wanted = self._range(self.by_record, self.records, record), bytes.fromhex(key)
        low, high = (
            side(found, wanted, key=lambda n: self.keys[n].tobytes()) for side in (bisect.bisect_left, bisect.bisect)
        )
        return self._take(found[low:high], record + key)

    def has(self, key):
        """Whether there is a row with this key."""
        return len(self._range(self.by_key, self.keys, key)) > 0

    def take_record(self, record):
        """The same for a row of the same raw record, whose media cannot be read any more.

        None, too, where such rows are left that hold different things (of two files whose relative paths are the same, say):
        nobody could tell which of them it was. They stay.
        """
        found = self._range(self.by_record, self.records, record)
        left = found[~self.taken[found]]
        if len(left) and self.keys[left[0]] != self.keys[left[-1]]:
            self.unsure[left] = True
            return None
        return self._take(left, None)

    def meet(self, record):
        """Say that the input has a row with this raw record; returns whether there are scores of it."""
        found = self._range(self.by_record, self.records, record)
        self.met[found] = True
        return len(found) > 0

    def replaced(self):
        """Numbers of rows that nobody has taken though their record is in the input: it shows other images by now."""
        return (self.met & ~self.taken & ~self.unsure).nonzero()[0].tolist()

    def rows(self, numbers):
        """(place, key, record) of rows, as `yojo.scoring.parts.Lines.drop` takes them."""
        return [(int(self.places[n]), self.keys[n].tobytes().hex(), self.records[n].tobytes().hex()) for n in numbers]

    def left(self):
        """How many rows nobody has taken, of records that are not in the input."""
        return int((~self.met & ~self.taken).sum())

    def _take(self, found, name):
        start = self._next.get(name, 0)
        for n in found[start:]:
            start += 1
            if not self.taken[n]:
                self.taken[n] = True
                if len(found) > 1 and name is not None:
                    self._next[name] = start
                return int(n)
        return None

    def _range(self, order, table, value):
        value = np.frombuffer(bytes.fromhex(value), "V16")
        low, high = (np.searchsorted(table, value, side, sorter=order)[0] for side in ("left", "right"))
        return order[low:high]

"""Which digests have been met, in little memory."""


class Seen:
    """A set of digests of 16 bytes that takes 21 to 43 bytes for each, where Python's own takes 150."""

    WIDTH = 16
    _EMPTY = bytes(WIDTH)

    def __init__(self):
        self._slots, self._count = 64, 0
        self._table = bytearray(self._slots * self.WIDTH)

    def __len__(self):
        return self._count

    def add(self, digest):
        """Put a digest in.

        Args:
            digest: 16 bytes, as good as random, not all zero.

        Returns:
            bool: whether it was not there before.
        """
        if 4 * (self._count + 1) > 3 * self._slots:
            self._grow()
        new = self._put(digest)
        self._count += new
        return new

    def _put(self, digest):
        slot, last, width = int.from_bytes(digest[:8], "little"), self._slots - 1, self.WIDTH
        while True:
            start = (slot & last) * width
            here = self._table[start : start + width]
            if here == digest:
                return False
            if here == self._EMPTY:
                self._table[start : start + width] = digest
                return True
            slot += 1

    def _grow(self):
        old, width = self._table, self.WIDTH
        self._slots *= 2
        self._table = bytearray(self._slots * width)
        for start in range(0, len(old), width):
            if (digest := bytes(old[start : start + width])) != self._EMPTY:
                self._put(digest)

"""How far a scoring job is: rows and tokens per second, padding, the rate of the last five minutes, the time that is left."""

import collections
import sys
import time

WINDOW = 300.0  # seconds over which the rate is taken


class Progress:
    """Counts what is done, and shows it.

    Args:
        total: rows to score.
        show: draw a bar on standard error.
        clock: function () -> seconds.
        label: in front of the bar.
    """

    def __init__(self, total, show=False, clock=time.monotonic, label="scoring"):
        self.total, self.clock = total, clock
        self.rows = self.bad = self.tokens = 0
        self.filled = 0.0
        self.start = clock()
        self._samples = collections.deque([(self.start, 0)])
        self._bar = None
        if show:
            from tqdm.auto import tqdm

            shape = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"
            self._bar = tqdm(total=total, desc=label, unit="row", bar_format=shape, file=sys.stderr, dynamic_ncols=True)

    def set_total(self, total):
        """It has turned out how many rows there are."""
        self.total = total
        if self._bar is not None:
            self._bar.total = total

    def add(self, rows, bad=0, tokens=0, filled=0.0):
        """More is done.

        Args:
            rows: scored rows.
            bad: bad rows.
            tokens: of the scored rows.
            filled: tokens of padding beside them.
        """
        self.rows, self.bad, self.tokens = self.rows + rows, self.bad + bad, self.tokens + tokens
        self.filled += filled
        now = self.clock()
        if now - self._samples[-1][0] >= 1:
            self._samples.append((now, self.rows + self.bad))
            while len(self._samples) > 2 and now - self._samples[1][0] > WINDOW:
                self._samples.popleft()
        if self._bar is not None:
            self._bar.set_postfix_str(self.text(), refresh=False)
            self._bar.update(rows + bad)

    @property
    def rate(self):
        """Rows per second over the last five minutes, bad ones included; 0.0 at the start."""
        start, rows = self._samples[0]
        seconds = self.clock() - start
        return (self.rows + self.bad - rows) / seconds if seconds > 0 else 0.0

    def left(self):
        """Seconds that the rest takes at this rate; None where there is none yet."""
        rate = self.rate
        return (self.total - self.rows - self.bad) / rate if rate else None

    def text(self):
        """ "1:02:03 left, 31.2 rows/s (5 min: 30.1), 24,100 tokens/s, 1.2% padding, 3 bad"."""
        seconds = max(self.clock() - self.start, 1e-9)
        parts = [f"{(self.rows + self.bad) / seconds:.3g} rows/s (5 min: {self.rate:.3g})"]
        if self.tokens:
            parts.append(f"{self.tokens / seconds:,.0f} tokens/s, {self.padding:.1%} padding")
        if self.bad:
            parts.append(f"{self.bad:,} bad")
        left = self.left()
        if left is not None:  # in front: a narrow screen cuts off what is behind
            parts.insert(0, f"{clock_text(left)} left")
        return ", ".join(parts)

    @property
    def padding(self):
        """Share of the tokens in packed rows that are padding."""
        return self.filled / (self.tokens + self.filled) if self.tokens else 0.0

    def close(self):
        if self._bar is not None:
            self._bar.close()


def clock_text(seconds):
    """Seconds as 1:02:03."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"

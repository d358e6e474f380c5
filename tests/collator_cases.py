"""What tests of the collator share: a clock that stands still, and what futures ended with."""

import concurrent.futures
import time

LONG = 60.0  # seconds that no test takes


class Clock:
    """A clock that stands still until it is told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


class Stopwatch:
    """The real clock, which stands still until it is let go: until then no deadline passes, however slow the machine is."""

    def __init__(self):
        self.begun, self.goes = time.monotonic(), False

    def __call__(self):
        return time.monotonic() if self.goes else self.begun


def settled(futures):
    """What each future ended with: its reward, or the exception."""
    done, left = concurrent.futures.wait(futures, timeout=LONG)
    assert not left
    return [future.exception() or future.result() for future in futures]

"""What the demonstration says while it works: on what machine, how far it is, how long the rest takes."""

import importlib.metadata
import os
import platform
import re
import subprocess
import time
from pathlib import Path

EVERY = 5.0  # seconds between two lines


def say(text):
    """Print a line that shows at once, also where the output is piped into a file."""
    print(text, flush=True)


def cpu_model():
    """The name of the CPU, or else of its architecture."""
    try:
        if platform.system() == "Darwin":
            command = ["sysctl", "-n", "machdep.cpu.brand_string"]
            return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        return re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError, subprocess.SubprocessError):
        return platform.processor() or platform.machine()


def cpu_cores():
    """How many cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def machine():
    """The machine and the libraries in a line; loads none of them."""
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers"))
    return f"{cpu_model()}; cores: {cpu_cores()}; OMP_NUM_THREADS: {threads}; {versions}"


class Progress:
    """Lines on how far a loop is, one every few seconds.

    Args:
        name: what the lines begin with.
        ahead: steps still to come once this loop is done, which the time left includes.
        every: seconds between two lines.
    """

    def __init__(self, name, ahead=0, every=EVERY):
        self.name, self.ahead, self.every = name, ahead, every
        self.what = None

    def __call__(self, what, done, total, loss=None):
        """Count: `done` of `total` things of the kind `what` are done; with a loss, they are steps of training."""
        now = time.perf_counter()
        if what != self.what:
            self.what, self.start, self.first = what, now, done
            self.last = now + min(1.0, self.every) - self.every  # the first line comes after a second
        if done == self.first or (now - self.last < self.every and done < total):
            return
        self.last = now
        text = f"{self.name}: {what} {done} of {total}"
        if loss is not None:
            left = (total - done + self.ahead) * (now - self.start) / (done - self.first)
            text += f", loss {loss:.3f}, {now - self.start:.0f} s, about {left:.0f} s of training left"
        say(text)

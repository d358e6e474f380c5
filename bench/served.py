"""A server as a process of its own: begun, waited for, watched and ended."""

import contextlib
import http.client
import re
import subprocess
import sys
import time
import urllib.parse
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
BEGINS = 120.0  # seconds that no server takes until it can score
ENDS = 60.0  # seconds that no server takes to end


class Served:
    """A server that listens and is ready.

    Args:
        arguments: of Python, such as ["-m", "yojo.cli", "serve", ...]; its log must say "listening at URL".
        log: path of a file for what it writes.
        env: its environment; this one's by default.

    Attributes:
        url: where it listens.
        process: `psutil.Popen`.

    Raises:
        RuntimeError: it ended, or was not ready in time; with what it has written last.
    """

    def __init__(self, arguments, log, env=None):
        self.log = Path(log)
        with open(self.log, "wb") as file:
            self.process = psutil.Popen(
                [sys.executable, *arguments], cwd=ROOT, env=env, stdout=file, stderr=subprocess.STDOUT
            )
        try:
            self.url = self.until(lambda: re.search(r"listening at (http://\S+)", self.text()))[1]
            self.until_ready()
        except BaseException:
            self.kill()
            raise

    def text(self):
        """What it has written."""
        return self.log.read_text(errors="replace")

    def until(self, condition):
        """Wait until a function of no arguments gives something true, and return that."""
        end = time.monotonic() + BEGINS
        while not (found := condition()):
            if self.process.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not get so far:\n{self.text()[-2000:]}")
            time.sleep(0.05)
        return found

    def until_ready(self, wanted=200):
        """Wait until /ready has this status."""
        self.until(lambda: self.status("/ready") == wanted)

    def status(self, path):
        """The status of a path; None where nobody answers."""
        parts = urllib.parse.urlsplit(self.url)
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=BEGINS)
        try:
            connection.request("GET", path)
            return connection.getresponse().status
        except OSError:
            return None
        finally:
            connection.close()

    def workers(self):
        """The processes below it, as `psutil.Process`es."""
        return self.process.children(recursive=True)

    def memory(self):
        """Bytes of resident memory of all its processes: a list, the server's own first, then in the order of their begin."""
        found = []
        for process in (self.process, *sorted(self.workers(), key=lambda one: one.create_time())):
            with contextlib.suppress(psutil.NoSuchProcess):
                found.append(process.memory_info().rss)
        return found

    def end(self):
        """Tell it to end (SIGTERM), and wait; its exit code."""
        self.process.terminate()
        return self.process.wait(ENDS)

    def kill(self):
        """End it and all below it at once."""
        with contextlib.suppress(psutil.NoSuchProcess):
            for process in (*self.workers(), self.process):
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            self.process.wait(ENDS)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.kill()

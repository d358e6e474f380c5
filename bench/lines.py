"""Files of lines, each a JSON object, appended as results come by processes that may be killed at any time."""

import contextlib
import json
import os
import pathlib

MOST_BEGUN = 3  # a test that was begun so often and never ended is given up


def append(path, line):
    """Add a line (a dict) to a file, which is made if it is missing.

    One process at a time: what then stands behind the last newline was cut by a kill, and is taken away, so that the next
    line does not go on there.
    """
    with open(path, "a+b") as file:
        with contextlib.suppress(ImportError, OSError):  # neither Windows nor every network file system has such locks
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 1))
        if file.read(1) not in (b"", b"\n"):
            file.seek(0)
            start = file.read().rfind(b"\n") + 1
            file.seek(start)
            if is_json(file.read()):
                file.write(b"\n")
            else:
                file.truncate(start)
        file.write(json.dumps(line).encode() + b"\n")


def texts(path):
    """(number from 1, text) of each line of a file, without a last one that was cut by a kill."""
    found = pathlib.Path(path).read_text().split("\n")
    if not is_json(found[-1]):  # empty where the file ends in a newline
        del found[-1]
    return list(enumerate(found, 1))


def read(path):
    """The lines of a file; none where there is no file. A last one that was cut by a kill is left out.

    Raises:
        ValueError: another line is no JSON; file and number are named.
    """
    if not os.path.isfile(path):
        return []
    found = []
    for number, text in texts(path):
        try:
            found.append(json.loads(text))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: {error}") from None
    return found


def is_json(text):
    """Whether a line is whole: what a kill leaves of an object is none."""
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def outcomes(path, step):
    """Test -> "passed", "skipped", "failed" or "given up", of a step; what only was begun is not among them.

    Args:
        path: file that `bench.day_plugin` appends to; it need not be there.
        step: its name.
    """
    found, begun = {}, {}
    for line in read(path):
        if line["step"] != step:
            continue
        if line["outcome"] == "begun":
            begun[line["test"]] = begun.get(line["test"], 0) + 1
        elif line["outcome"] != "left":
            found[line["test"]] = line["outcome"]
    given_up = {test: "given up" for test, count in begun.items() if count >= MOST_BEGUN and test not in found}
    return found | given_up

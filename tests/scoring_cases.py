"""Files of candidates, judges of all but no cost, and what the output of a scoring job must be."""

import collections
import contextlib
import json
import os
import time

import torch

from yojo.inputs.digests import digest, example_key
from yojo.scoring.file import score_file
from yojo.scoring.job import folder_of

PIXELS = 8


class Constants:
    """A judge whose scores follow from the responses; slow, or without an answer, where it is to be caught in the middle.

    Args:
        seconds: that an example takes.
        shift: of all scores.
        answers: calls that it answers; in the next one it hangs. None: all.
    """

    def __init__(self, seconds=0.0, shift=0.0, answers=None):
        self.seconds, self.shift, self.answers = seconds, shift, answers

    def fingerprint(self):
        return {"judge": "constants", "shift": self.shift}

    def score_many(self, examples):
        if self.answers is not None:
            if not self.answers:
                time.sleep(600)
            self.answers -= 1
        time.sleep(self.seconds * len(examples))
        return [torch.tensor([score_of(text) + self.shift for text in e.responses]) for e in examples]


def score_of(text):
    return int(digest(text)[:4], 16) / 4096.0  # exact in float32


def candidates(count, images=None, seed=0):
    """Records with ids that repeat, some of them the same throughout; with `images`, a folder, an image each."""
    made = []
    for n in range(count):
        same = n % 10 == 9  # as the row before it
        number = n - same
        record = {
            "id": f"q{number % 7}",
            "prompt": f"question {seed}.{number}?",
            "responses": [f"a{number}", f"b {n % 3}"],
        }
        if same:
            record["responses"] = list(made[-1]["responses"])
        if number % 3 == 0:
            record["responses"].append("c" * (1 + number % 5))
            if same:
                record["responses"] = list(made[-1]["responses"])
        if images is not None:
            record["image"] = picture(images, number)
        made.append(record)
    return made


def picture(folder, number):
    """Path of an image that is unlike those of other numbers, relative to the folder's parent."""
    from PIL import Image

    folder.mkdir(exist_ok=True)
    path = folder / f"{number}.png"
    if not path.exists():
        Image.new("RGB", (PIXELS, PIXELS), (number % 256, number // 256, 7)).save(path)
    return f"{folder.name}/{path.name}"


def write(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def lines_of(out):
    """The rows of an output, those of a folder's finished parts one behind the other."""
    folder, file = folder_of(out)
    paths = [file] if file is not None else sorted(folder.glob("scores-*"))
    found = []
    for path in paths:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            found += parquet.read_table(path).to_pylist()
        else:
            found += [json.loads(line) for line in path.read_text().splitlines()]
    return found


def bad_of(out):
    """dict row number -> reason."""
    folder, _ = folder_of(out)
    lines = [json.loads(line) for path in folder.glob("bad-*") for line in path.read_text().splitlines()]
    assert len({line["row"] for line in lines}) == len(lines)
    return {line["row"]: line["error"] for line in lines}


def check(out, records, path, bad=(), score=score_of):
    """Every record has its scores once, but for the bad ones, and nothing else is there.

    Args:
        out: file or folder.
        records: what the input holds.
        path: of the input.
        bad: numbers of records that cannot be scored.
    """
    import yojo

    lines = lines_of(out)
    wanted, keys = collections.Counter(), {}
    readable = yojo.data.load(path, ranked=False)
    for n, record in enumerate(records):
        if n not in bad:
            wanted[digest(record)] += 1
            keys[digest(record)] = (example_key(readable[n]), record)
    assert collections.Counter(line["record"] for line in lines) == wanted
    for line in lines:
        key, record = keys[line["record"]]
        expected = [score(text) for text in record["responses"]]
        assert line["scores"] == expected and line["key"] == key
        assert line["order"] == sorted(range(len(expected)), key=lambda n: -expected[n])
        assert line["id"] == record.get("id", line["id"])
    assert len({line["job"] for line in lines}) <= 1
    if folder_of(out)[1] is not None:
        assert [line["row"] for line in lines] == [n for n in range(len(records)) if n not in bad]
    assert set(bad_of(out)) == set(bad)
    left = [name for name in os.listdir(folder_of(out)[0]) if name.startswith(".") and name != ".lock"]
    assert left == []


def run(path, out, judge=None, **options):
    return score_file(judge or Constants(), path, out, **options)


def until(condition, seconds=60):
    """Wait for a condition; False: in vain."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return bool(condition())


def lines_in(folder):
    """Whole lines in the parts of a job, those under way and those that are finished."""
    count = 0
    for part in (*folder.glob(".scores-*"), *folder.glob("scores-*")):
        with contextlib.suppress(FileNotFoundError):  # it was given its name meanwhile
            count += part.read_bytes().count(b"\n")
    return count


def children_of(pid):
    """Processes that a process has started."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def is_alive(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False

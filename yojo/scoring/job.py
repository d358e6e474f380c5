"""The folder of a scoring job: what produced its scores, finished parts, and parts that were cut short put right."""

import contextlib
import fcntl
import json
import math
import os
import re
import threading
import uuid
from pathlib import Path

from yojo.inputs.digests import digest
from yojo.scoring import parts

JOB_FILE = "job.json"
LOCK_FILE = ".lock"
VERSION = 1
SUFFIXES = (".jsonl", ".parquet")
# scores-00003-of-00008-1f2e3d4c.jsonl; while it is written there is a dot in front and ".writing" behind
_NAME = re.compile(r"\.?(scores|bad)-(\d+)-of-(\d+)(?:-([0-9a-f]+))?\.(jsonl|parquet)(\.writing)?")
_open = set()  # (folder, shard, shards) of this process: the system's locks are between processes
_threads = threading.Lock()


class JobError(ValueError):
    """A folder or file that cannot take the scores of this job; the message says why and what to do."""


def hidden(file):
    """The folder beside a file of scores that its job goes on with."""
    return file.parent / f".{file.name}.job"


def folder_of(out):
    """The job folder of an output: itself, or the hidden folder beside a file.

    Args:
        out: path; with a suffix .jsonl or .parquet it is a file.

    Returns:
        (`Path` of the folder, `Path` of the file or None).

    Raises:
        JobError: another suffix of a file that is there.
    """
    out = Path(out)
    if out.suffix.lower() in SUFFIXES and not out.is_dir():
        return hidden(out), out
    if out.is_file():
        raise JobError(f"{out} is a file: --out is a folder, or a file that ends with {' or '.join(SUFFIXES)}")
    return out, None


def check_place(folder, file):
    """What is wrong with the place of an output: it is somebody else's.

    Args:
        folder, file: as `folder_of` returns them.

    Raises:
        JobError: so it is.
    """
    has_file = file is not None and file.exists()
    names = os.listdir(folder) if file is None and folder.is_dir() else []
    is_job = (folder / JOB_FILE).is_file()  # looked for last: another shard may have begun just now
    if folder.exists() and not folder.is_dir():
        raise JobError(f"{folder} is a file, and must be the folder of a scoring job")
    if has_file and not is_job:
        raise JobError(
            f"{file} exists and was not written by a scoring job (there is no {folder / JOB_FILE}): name another --out, or "
            "move it away"
        )
    if not is_job:
        strange = [name for name in names if name != LOCK_FILE and not name.startswith(parts.ASIDE)]
        if strange:
            raise JobError(
                f"{folder} holds {sorted(strange)[0]} and is not the folder of a scoring job: name a new folder"
            )


def short(fingerprint):
    """16 hexadecimal digits of a fingerprint: the column `job` of every row."""
    return digest(fingerprint)[:16]


def differences(one, other, path=""):
    """Lines that say in what two fingerprints differ: "settings.mode: isolated there, comparative here"."""
    found = []
    for key in dict.fromkeys([*one, *other]):
        here, there = other.get(key), one.get(key)
        if isinstance(here, dict) and isinstance(there, dict):
            found += differences(there, here, f"{path}{key}.")
        elif here != there:
            found.append(f"{path}{key}: {_shown(there)} there, {_shown(here)} here")
    return found


def _shown(value, limit=60):
    text = "nothing" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


class Job:
    """A job folder that this process writes a shard of.

    Args:
        out: folder, or .jsonl or .parquet file.
        fingerprint: dict of everything that changes a score.
        data: dict, where the records are and how they are read.
        made: dict, what else is worth knowing: versions, device, date.
        shard: (number, count).
        resume: go on with what is there; False: remove the scores of an earlier job first.
        parquet: parts of a folder are Parquet files once they are whole.

    Attributes:
        folder: `Path`.
        file: `Path` of the file to assemble in the end, or None.
        dropped: texts, one for each line that was not whole.
    """

    def __init__(self, out, fingerprint, data, made, shard=(0, 1), resume=True, parquet=False):
        self.folder, self.file = folder_of(out)
        self.shard, self.job, self.dropped = shard, short(fingerprint), []
        self.description = {
            "version": VERSION,
            "fingerprint": fingerprint,
            "job": self.job,
            "data": data,
            "made": made,
        }
        suffix = ".parquet" if parquet and self.file is None else ".jsonl"
        self.stem = f"scores-{shard[0]:05d}-of-{shard[1]:05d}-{uuid.uuid4().hex[:8]}{suffix}"
        self.bad_name = f"bad-{shard[0]:05d}-of-{shard[1]:05d}.jsonl"
        self.scores = self.bad = None
        self._begin(resume)

    def _begin(self, resume):
        check_place(self.folder, self.file)
        self.folder.mkdir(parents=True, exist_ok=True)
        own = (str(self.folder.resolve()), *self.shard)
        with self.locked():
            for other in _open:
                if other[0] == own[0] and _overlap(other[1:], own[1:]):
                    raise JobError(f"{self.folder}: this process is writing shard {other[1]}/{other[2]} of it already")
            self._check_description(resume)
            self._mend(".scores-")
            self._mend(".bad-")
            self._check_parts()
            self.scores = parts.Part(self.folder, self.stem)
            self.bad = parts.Part(self.folder, self.bad_name)
            _open.add(own)
            self._own = own

    def _check_description(self, resume):
        file = self.folder / JOB_FILE
        if file.is_file():
            found = read_description(self.folder)
            if resume and found["job"] != self.job:
                lines = differences(found["fingerprint"], self.description["fingerprint"])
                raise JobError(
                    f"{self.folder} holds the scores of another job, which differs in {'; '.join(lines[:6])}"
                    f"{f' and {len(lines) - 6} more' if len(lines) > 6 else ''}: name another --out, or begin anew with "
                    "--no-resume, which removes them"
                )
            if resume and found["data"] == self.description["data"]:
                return
            if not resume:
                self._remove()
        parts.write_aside(file, json.dumps(self.description, indent=1).encode())

    def _remove(self):
        for name in self._names():
            path = self.folder / name
            if name.endswith(".writing") and not _is_dead(path):
                raise JobError(f"{self.folder}: {name} is being written: stop that run first")
        for name in self._names():
            (self.folder / name).unlink()
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def _names(self):
        return sorted(name for name in os.listdir(self.folder) if _NAME.fullmatch(name))

    def _mend(self, beginning):
        """What a run that was killed has written is kept; what is under way must be of other shards."""
        for name in [name for name in self._names() if name.startswith(beginning)]:
            path = self.folder / name
            if not _is_dead(path):
                number, count = map(int, _NAME.fullmatch(name).group(2, 3))
                if _overlap((number, count), self.shard):
                    raise JobError(
                        f"{self.folder}: shard {number}/{count} is being scored by another process, which has rows of shard "
                        f"{self.shard[0]}/{self.shard[1]}, too: wait for it, or stop it"
                    )
                continue
            final = self.folder / name.removeprefix(".").removesuffix(".writing")
            if beginning == ".bad-":
                parts.append_whole(path, final, self.dropped)
            elif not final.exists():
                parts.finish_leftover(path, final, self.dropped)
            path.unlink(missing_ok=True)
        for name in os.listdir(self.folder):
            if name.startswith(parts.ASIDE):  # of a file that was to be replaced
                (self.folder / name).unlink(missing_ok=True)

    def _check_parts(self):
        """Finished parts must be whole, too: whoever copied or edited them may have cut them short."""
        for path in self.parts():
            parts.check_whole(path, self.dropped)

    def parts(self):
        """Paths of the finished parts, sorted."""
        return [self.folder / name for name in self._names() if name.startswith("scores-")]

    def bad_files(self):
        """Paths of the finished lists of bad rows, sorted."""
        return [self.folder / name for name in self._names() if name.startswith("bad-")]

    @contextlib.contextmanager
    def locked(self):
        """Nobody else begins or ends a run in this folder meanwhile."""
        with _threads, open(self.folder / LOCK_FILE, "ab") as file:
            _lock(file, wait=True)
            yield

    def finish(self, looked_at=None):
        """Give the parts their names; within `locked`, and the folder stays this run's until `close`.

        Args:
            looked_at: function (row number, whether the list is this shard's) -> whether this run has scored it, or has found
                again what is wrong with it: then it leaves the lists of bad rows that earlier runs made; None: the run was
                cut short.
        """
        self.scores.finish()
        if looked_at is not None:
            for path in self.bad_files():
                own = path.name == self.bad_name
                parts.keep_lines(path, lambda line, own=own: not looked_at(line["row"], own), self.dropped)
        self.bad.abandon()
        parts.append_whole(self.bad.path, self.folder / self.bad_name, self.dropped)
        self.bad.path.unlink(missing_ok=True)

    def close(self):
        """Let go of the folder, whatever has become of the run; what was written stays for the next one."""
        _open.discard(self._own)
        self.scores.abandon()
        self.bad.abandon()


def read_description(folder):
    """The job.json of a folder.

    Raises:
        JobError: it is damaged, or of another version.
    """
    file = Path(folder) / JOB_FILE
    try:
        found = json.loads(file.read_text())
        if found["version"] != VERSION:
            raise JobError(f"{file} has version {found['version']}, this YOJO reads version {VERSION}")
        found["fingerprint"], found["job"], found["data"]  # noqa: B018 - KeyError where one is missing
    except JobError:
        raise
    except (OSError, KeyError, TypeError, ValueError) as error:  # neither JSON nor UTF-8, perhaps
        raise JobError(
            f"{file} cannot be read ({error}): is it whole? without it, nobody knows whose scores these are"
        ) from error
    return found


def _overlap(one, other):
    """Whether two shards (number, count) share rows."""
    return (one[0] - other[0]) % math.gcd(one[1], other[1]) == 0


def _is_dead(path):
    """Whether nobody writes this file any more."""
    if os.path.realpath(path) in parts.live:
        return False
    with open(path, "rb+") as file:
        return _lock(file, wait=False)


def _lock(file, wait):
    """Lock a file for this process; False where another one has it. Children do not inherit it, and death ends it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        raise OSError(
            error.errno, f"{file.name} cannot be locked ({error.strerror}): the output needs a file system with locks"
        ) from error
    return True

"""One run over a shard of a scoring job: which rows are left, what becomes of them, and the file that is made in the end."""

import array
import contextlib
import dataclasses
import errno
from pathlib import Path

import numpy as np

from yojo.inputs.feeding import fed
from yojo.scoring import parts
from yojo.scoring.done import Done
from yojo.scoring.progress import Progress, clock_text
from yojo.scoring.rows import Look, Prepare, name_of


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run of a scoring job has done.

    Attributes:
        rows: of the input, in this shard.
        scored: in this run.
        kept: that had their scores already.
        gone: of those kept, rows whose images or videos cannot be read any more.
        bad: rows without scores; the job's folder says why.
        replaced: scores that were removed, because their record shows another image or video by now, or
            stands in the input less often.
        stale: scores of rows that are no longer in the input; 0 for one shard of several.
        dropped: lines of earlier runs that were not whole, and have been scored again.
        tokens: in packed rows.
        padding: share of padding among them.
        seconds: of scoring.
        out: file or folder of the scores.
        folder: of the job.
        job: its short fingerprint.
    """

    rows: int
    scored: int
    kept: int
    gone: int
    bad: int
    replaced: int
    stale: int
    dropped: int
    tokens: int
    padding: float
    seconds: float
    out: Path
    folder: Path
    job: str

    @property
    def exit_code(self):
        """0 where every row has its scores, 1 where bad rows are left."""
        return int(self.bad > 0)

    @classmethod
    def of(cls, parts, out):
        """What several processes have done, each with a shard.

        Args:
            parts: list of `Summary`.
            out: of all of them.
        """
        add = {name: sum(getattr(one, name) for one in parts) for name in _ADDED}
        filled = sum(one.tokens * one.padding / (1 - one.padding) for one in parts)
        padding = filled / (add["tokens"] + filled) if add["tokens"] else 0.0
        return dataclasses.replace(parts[0], **add, padding=padding, seconds=max(o.seconds for o in parts), out=out)

    def to_dict(self):
        """The same for JSON."""
        return {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}

    def lines(self):
        """What it says, for people."""
        rate = tokens = ""
        if self.scored and self.seconds:
            rate = f" in {clock_text(self.seconds)}, {self.scored / self.seconds:.3g} rows/s"
            tokens = f", {self.tokens / self.seconds:,.0f} tokens/s, {self.padding:.1%} padding" if self.tokens else ""
        yield f"{self.out}: {self.rows - self.bad:,} of {self.rows:,} rows have scores: {self.scored:,} new{rate}{tokens}"
        if self.dropped:
            yield f"{self.dropped:,} lines of an earlier run were not whole; their rows were scored again"
        if self.gone:
            yield f"{self.gone:,} rows keep their scores though their images or videos cannot be read any more"
        if self.replaced:
            why = "their records show other images or videos now, or stand in the input less often"
            yield f"{self.replaced:,} scores were removed: {why}"
        if self.stale:
            yield f"{self.stale:,} scores are of rows that are no longer in the input"
        if self.bad:
            yield f"{self.bad:,} rows are bad ({self.folder}/bad-*.jsonl says why); the next run tries them first"


_ADDED = ("rows", "scored", "kept", "gone", "bad", "replaced", "stale", "dropped", "tokens")


class Run:
    """One run over a shard of a job.

    Args:
        job: `yojo.scoring.job.Job`.
        records: `yojo.data.records.Records`.
        workers: processes that look for rows that are done.
        show: draw progress bars; or function (rows, label) -> `Progress` of one's own.
    """

    def __init__(self, job, records, workers=0, show=False):
        self.job, self.records, self.workers, self.show = job, records, workers, show
        self.shard = job.shard
        self.seen = np.zeros(len(records), bool)  # rows that are done, or of which this run knows what is wrong
        self.mine = np.ones(len(records), bool)
        self.where = np.full(len(records) if job.file is not None else 0, -1, np.int64)
        self.lines = None
        self.lost = array.array("q")  # rows whose media are gone, with scores of their record
        self.renamed = array.array("q")  # rows whose scores are of another record that shows the same
        self.old = []  # numbers of those scores
        self.pending, self.done, self.base = None, None, 0
        self.scored = self.kept = self.gone = self.bad = self.others = 0
        self.progress, self.seconds, self.finished = Progress(0), 0.0, False

    def find_done(self):
        """Which rows have their scores, and in which order the others are tried: those that were bad before come first."""
        with self.job.locked():  # other shards may remove rows of theirs, and parts of which nothing is left
            self.lines = parts.Lines(self.job.parts(), self.job.job)
            self.done = Done(self.lines)
            retried = self._retried()
        self.base = self.lines.add(self.job.folder / self.job.stem)
        if len(self.done):
            self._look()
        first = [row for row in retried if not self.seen[row]]
        rest = ~self.seen
        rest[first] = False
        self.pending = np.concatenate([np.array(first, np.int64), rest.nonzero()[0]])

    def _retried(self):
        rows = {}
        for path in self.job.bad_files():
            rows |= {line["row"]: None for line in parts.read_lines(path, self.job.dropped)}
        return [row for row in rows if row < len(self.records)]

    def _look(self):
        """Read every row, and take the scores that are there."""
        bar = self._progress(len(self.records), "looking for rows that have scores")
        look = Look(Prepare(self.records, shard=self.shard), self.done.known)
        with contextlib.closing(fed(look, range(len(self.records)), self.workers)) as rows:
            for row in rows:
                bar.add(1)
                self._find(row)
        with contextlib.closing(fed(look, self.lost, self.workers)) as rows:
            for row in rows:
                self._find_lost(row)
        with contextlib.closing(fed(look, self.renamed, self.workers)) as rows:
            for row in rows:
                self._rename(row)
        bar.close()

    def _find(self, row):
        if not row.mine:
            self.others += 1
            self.seen[row.row], self.mine[row.row] = True, False
            return
        is_met = row.record is not None and self.done.meet(row.record)
        if row.error is None:
            found = self.done.take(row.key, row.record)
            if found is None and self.done.has(row.key):
                self.renamed.append(row.row)  # when all others have theirs
            self._keep(row, found)
        elif is_met:
            self.lost.append(row.row)  # likewise: theirs may be of the same record

    def _find_lost(self, row):
        """Nothing in the record has changed, but its media are gone: the scores stay."""
        if row.error is None:  # and are there again
            found = self.done.take(row.key, row.record)
        else:
            found = None if row.record is None else self.done.take_record(row.record)
            self.gone += found is not None
        self._keep(row, found)

    def _keep(self, row, found):
        if found is not None:
            self.kept += 1
            self.seen[row.row] = True
            if len(self.where):
                self.where[row.row] = self.done.places[found]

    def _rename(self, row):
        """Write down scores that are there, of a record that shows the same and says something else, as this record's."""
        found = None if row.error is not None else self.done.take(row.key)
        if found is None:
            return
        try:
            line = self.lines.read(int(self.done.places[found]))
        except (IndexError, OSError, ValueError):
            line = {}
        if line.get("key") != row.key:  # another shard has removed rows of its own meanwhile: it is scored again
            return
        names = {"id": row.id, "row": row.row, "record": row.record, "media": row.media}
        (start,) = self.job.scores.add([line | names])
        self.old.append(found)
        self.kept += 1
        self.seen[row.row] = True
        if len(self.where):
            self.where[row.row] = self.base + start

    def _progress(self, total, label):
        return self.show(total, label) if callable(self.show) else Progress(total, self.show, label=label)

    def score(self, scorer):
        """Score what is pending."""
        self.progress = self._progress(len(self.pending), "scoring")
        try:
            with _room(self.job.folder):
                scorer.run(map(int, self.pending), self.take)
        finally:
            self.progress.close()
        self.seconds = self.progress.clock() - self.progress.start

    def take(self, outcome):
        """Write down what has become of a row."""
        row = outcome["row"]
        self.seen[row] = True
        if outcome.get("left"):
            self.records.count(row, outcome["left"])
        if "line" in outcome:
            (start,) = self.job.scores.add([outcome["line"]])
            if len(self.where):
                self.where[row] = self.base + start
            self.scored += 1
            self.progress.add(1, tokens=outcome["tokens"], filled=outcome["filled"])
        elif "bad" in outcome:
            self.job.bad.add([outcome["bad"]])
            self.bad += 1
            self.progress.add(0, bad=1)
        else:
            self.others += 1
            self.mine[row] = False
            self.progress.set_total(self.progress.total - 1)

    def finish(self, is_tried=True):
        """Give the parts their names, and write the file.

        Args:
            is_tried: False: others have tried what is pending, and have listed the bad rows.
        """
        out = self.job.file or self.job.folder
        # One step to others: who began in between would find rows that are about to go, and remove what is half written.
        with _room(self.job.folder), self.job.locked():
            if is_tried:
                self.job.finish(self._looked_at)
            else:
                self.job.finish()
                self.bad = int((~self.seen).sum())
            if self.job.file is not None:
                assemble(self.job, self.records, self.lines, self.where)
            replaced = self.done.replaced()  # beside the new scores nobody could tell them apart
            if replaced or self.old:
                self.lines.drop(self.done.rows([*replaced, *self.old]))
        self.finished = True
        return Summary(
            rows=len(self.records) - self.others,
            scored=self.scored,
            kept=self.kept,
            gone=self.gone,
            bad=self.bad,
            replaced=len(replaced),
            stale=self.done.left() if self.shard[1] == 1 else 0,
            dropped=len(self.job.dropped),
            tokens=self.progress.tokens,
            padding=self.progress.padding,
            seconds=self.seconds,
            out=out,
            folder=self.job.folder,
            job=self.job.job,
        )

    def _looked_at(self, row, is_own):
        """Whether a row need not stand in a list of bad rows: what another shard has found is for that one to say."""
        return row >= len(self.records) or self.seen[row] and (is_own or self.mine[row])

    def close(self):
        """Leave the folder in order, however the run has ended."""
        if self.lines is not None:
            self.lines.close()
        if not self.finished:  # interrupted, say: what is there gets its name, if there is room for it
            with contextlib.suppress(OSError), self.job.locked():
                self.job.finish()
        self.job.close()


@contextlib.contextmanager
def _room(folder):
    """A full disk is said with what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise OSError(
            error.errno,
            f"{folder}: {error.strerror}: what was written before is kept; make room and run the same command again",
        ) from error


def assemble(job, records, lines, where):
    """Write the file of a job, whole, in the order of the input.

    Args:
        job: `Job`.
        records: `Records`.
        lines: `yojo.scoring.parts.Lines`.
        where: [rows] int64, the place of every row's line; -1 for none.
    """
    ordered = (_current(lines.read(int(where[row])), row, records) for row in (where >= 0).nonzero()[0].tolist())
    if job.file.suffix.lower() == ".parquet":
        parts.write_parquet(job.file, ordered, job.description, job.folder)
    else:
        parts.write_lines(job.file, ordered, job.folder)


def _current(line, row, records):
    """The line of a row that stood elsewhere in the input when it was scored."""
    if line["row"] == row:
        return line
    return line | {"row": row, "id": name_of(records.raw(row), records.label(row))}

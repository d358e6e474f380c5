"""`score_file`: the scores of a whole file of candidates, exactly once per row, whatever happens meanwhile."""

import contextlib
import dataclasses
import errno
import os
import time
from pathlib import Path

import numpy as np

from yojo.data.records import Records
from yojo.inputs.feeding import fed
from yojo.scoring import parts
from yojo.scoring.done import Done
from yojo.scoring.job import Job, folder_of
from yojo.scoring.progress import Progress, clock_text
from yojo.scoring.rows import Look, Prepare, name_of
from yojo.scoring.stream import encoder_of, scored


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run of a scoring job has done.

    Attributes:
        rows: of the input, in this shard.
        scored: in this run.
        kept: that had their scores already.
        gone: of those kept, rows whose images or videos cannot be read any more.
        bad: rows without scores; the job's folder says why.
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

    def lines(self):
        """What it says, for people."""
        rate = f" in {clock_text(self.seconds)}, {self.scored / self.seconds:.3g} rows/s" if self.seconds else ""
        tokens = f", {self.tokens / self.seconds:,.0f} tokens/s" if self.tokens and self.seconds else ""
        yield f"{self.out}: {self.rows - self.bad:,} of {self.rows:,} rows have scores: {self.scored:,} new{rate}{tokens}"
        if self.dropped:
            yield f"{self.dropped:,} lines of an earlier run were not whole; their rows were scored again"
        if self.gone:
            yield f"{self.gone:,} rows keep their scores though their images or videos cannot be read any more"
        if self.stale:
            yield f"{self.stale:,} scores are of rows that are no longer in the input"
        if self.bad:
            yield f"{self.bad:,} rows are bad ({self.folder}/bad-*.jsonl says why); the next run tries them first"


def score_file(
    judge,
    data,
    out,
    *,
    shard=None,
    resume=True,
    workers=0,
    token_budget=8192,
    progress=False,
    parquet=False,
    fingerprint=None,
    ray=None,
    format="auto",
    columns=None,
    image_root=None,
    allow_urls=False,
    literal_tags=False,
    ignore_columns=(),
):
    """Score every record of a file, exactly once.

    Rows are scored as they come, and written at once: a run that ends early, however it does, is gone on with by the same
    call, on the same input or on one that has grown. A row is known by what the model sees of it, image bytes included.

    Args:
        judge: anything with `score_many` and `fingerprint` (`yojo.judges`), such as a `yojo.RewardModel`.
        data: .jsonl, .json or .parquet file, folder of such, list of these, list of dicts or `datasets.Dataset`, in any
            format that `yojo.data.load` reads; rankings are optional and not looked at.
        out: a folder, which gets a file of scores from every run, in the order in which they are made; or a file that ends
            with .jsonl or .parquet, in the order of the input, written when all rows are done (and a hidden folder beside it
            that the next run goes on with).
        shard: (number from 0, count): every count-th row, by a hash of its responses; `out` is a folder then.
        resume: go on with what is there; False: begin anew, and remove it.
        workers: processes that read, decode and tokenise while the model runs; see `RewardModel.score_many`.
        token_budget: of a packed row.
        progress: show a progress bar.
        parquet: files in a folder are Parquet, not JSONL.
        fingerprint: dict of all that changes a score, for a judge that does not say so itself.
        ray: `yojo.scoring.cluster.Ray`, to score on a Ray cluster; the judge is then a function that makes one.
        format, columns, image_root, allow_urls, literal_tags, ignore_columns: as for `yojo.data.load`.

    Returns:
        `Summary`.

    Raises:
        DataError, ValueError, TypeError: a file that cannot be read, a bad argument, a folder or file that is another
            job's. What is wrong with single rows raises nothing: they are kept with their reason, and tried first next time.
        OSError: a full disk, say: what was written before is kept.
    """
    options = {
        "format": format,
        "columns": columns,
        "image_root": image_root,
        "allow_urls": allow_urls,
        "literal_tags": literal_tags,
        "ignore_columns": ignore_columns,
    }
    shard = checked_shard(shard)
    check_out(out, shard, workers, token_budget)
    records = Records(data, ranked=False, **options)
    fingerprint = _fingerprint(judge, fingerprint) | {"data": _reading(records, options)}
    job = Job(out, fingerprint, where_from(data, records, options), made(), shard, resume, parquet)
    run = _Run(job, records, shard, workers, progress)
    try:
        run.find_done()
        scorer = Scorer(judge, records, shard, job.job, token_budget, workers)
        run.score(scorer if ray is None else ray.over(scorer))
        return run.finish()
    finally:
        run.close()


def checked_shard(shard):
    """(number, count) of a shard; (0, 1) for None."""
    if shard is None:
        return (0, 1)
    number, count = shard
    if not 0 <= number < count:
        raise ValueError(f"shard must be number/count with the number from 0 below the count, got {number}/{count}")
    return (number, count)


def check_out(out, shard=(0, 1), workers=0, token_budget=8192):
    """What is wrong with an output and can be said before anything is loaded."""
    _, file = folder_of(out)
    if file is not None and shard[1] > 1:
        raise ValueError(f"shards write into one folder: name a folder instead of {file} (--out FOLDER)")
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    if token_budget < 1:
        raise ValueError(f"token_budget must be at least 1, got {token_budget}")


def where_from(data, records, options):
    """Where records are and how they are read, as job.json has it."""
    paths = [data] if isinstance(data, (str, os.PathLike)) else list(data) if _is_paths(data) else None
    root = options["image_root"]
    return {
        "sources": None if paths is None else [os.path.abspath(path) for path in paths],
        "format": records.format,
        "columns": dict(options["columns"] or {}) or None,
        "image_root": None if root is None else os.path.abspath(root),
        "allow_urls": options["allow_urls"],
        "literal_tags": options["literal_tags"],
        "ignore_columns": list(options["ignore_columns"]),
    }


def _is_paths(data):
    return isinstance(data, (list, tuple)) and all(isinstance(item, (str, os.PathLike)) for item in data)


def _reading(records, options):
    """What of the reading decides what a row says."""
    return {
        "format": records.format,
        "columns": dict(options["columns"] or {}) or None,
        "literal_tags": options["literal_tags"],
        "ignore_columns": sorted(options["ignore_columns"]),
    }


def made():
    """Versions, machine and date: what is worth knowing of scores, and changes them by rounding at most."""
    import platform

    import torch
    import transformers

    from yojo import __version__

    return {
        "yojo": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.processor() or "cpu",
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _fingerprint(judge, given):
    if given is not None:
        return {"judge": given}
    if not hasattr(judge, "fingerprint"):
        raise TypeError(
            f"{type(judge).__name__} has no fingerprint(), a dict of all that changes its scores: give it one, or pass "
            "fingerprint={...}, so that scores of another judge are told from its own"
        )
    return {"judge": judge.fingerprint()}


# ---- rows -> outcomes ----


class Scorer:
    """Scores rows by their numbers: here, in another process, or in an actor on another machine.

    Args:
        judge: see `score_file`.
        records: `Records`.
        shard: (number, count).
        job: short fingerprint, which every line has.
        token_budget, workers: see `score_file`.
    """

    def __init__(self, judge, records, shard, job, token_budget, workers):
        self.judge, self.job, self.token_budget, self.workers = judge, job, token_budget, workers
        self.prepare = Prepare(records, encoder_of(judge), shard)

    def __call__(self, numbers):
        """As `run`, for a few rows: list of outcomes."""
        outcomes = []
        self.run(numbers, outcomes.append)
        return outcomes

    def run(self, numbers, take):
        """Score rows, and hand over an outcome for each as soon as there is one.

        Args:
            numbers: iterable of row numbers.
            take: function of an outcome, a dict with `row`, and: `line`, the row of the output, with `tokens` and `filled`;
                or `bad`, the row of the list of bad rows; or neither, for a row of another shard. `left` is what was left
                out of the record.
        """

        def good():
            for row in prepared:
                if row.mine and row.error is None:
                    yield row
                else:
                    take(self._bad(row, row.error) if row.mine else {"row": row.row})

        with contextlib.closing(fed(self.prepare, numbers, self.workers)) as prepared:
            for result in scored(self.judge, good(), self.token_budget):
                take(self._outcome(result))

    def _outcome(self, result):
        row = result.row
        if result.error is not None:
            return self._bad(row, result.error)
        line = row.line(result.scores, self.job)
        return {"row": row.row, "line": line, "tokens": result.tokens, "filled": result.filled, "left": row.left}

    def _bad(self, row, error):
        file, line = self.prepare.records.where(row.row)
        return {"row": row.row, "bad": {"id": row.id, "row": row.row, "file": file, "line": line, "error": error}}


# ---- a run ----


class _Run:
    """One run over a shard of a job."""

    def __init__(self, job, records, shard, workers, progress):
        self.job, self.records, self.shard, self.workers, self.show = job, records, shard, workers, progress
        self.seen = np.zeros(len(records), bool)  # rows that are done, or of which this run knows what is wrong
        self.where = np.full(len(records) if job.file is not None else 0, -1, np.int64)
        self.lines = parts.Lines(job.parts())
        self.pending, self.done, self.base = None, None, 0
        self.scored = self.kept = self.gone = self.bad = self.others = 0
        self.progress = None

    def find_done(self):
        """Which rows have their scores, and in which order the others are tried: those that were bad before come first."""
        self.done = Done(self.lines)
        retried = self._retried()
        if len(self.done):
            self._look()
        first = [row for row in retried if not self.seen[row]]
        rest = ~self.seen
        rest[first] = False
        self.pending = np.concatenate([np.array(first, np.int64), rest.nonzero()[0]])
        self.base = self.lines.add(self.job.folder / self.job.stem)

    def _retried(self):
        rows = {}
        for path in self.job.bad_files():
            rows |= {line["row"]: None for line in parts.read_lines(path, self.job.dropped)}
        return [row for row in rows if row < len(self.records)]

    def _look(self):
        """Read every row, and take the scores that are there."""
        bar = Progress(len(self.records), self.show, label="looking for rows that have scores")
        look = Look(Prepare(self.records, shard=self.shard), self.done.known)
        with contextlib.closing(fed(look, range(len(self.records)), self.workers)) as rows:
            for row in rows:
                bar.add(1)
                self._find(row)
        bar.close()

    def _find(self, row):
        if not row.mine:
            self.others += 1
            self.seen[row.row] = True
            return
        if row.error is None:
            found = self.done.take(row.key)
        else:  # nothing in the record has changed, but its media are gone: the scores stay
            found = None if row.record is None else self.done.take_record(row.record)
            self.gone += found is not None
        if found is not None:
            self.kept += 1
            self.seen[row.row] = True
            if len(self.where):
                self.where[row.row] = self.done.places[found]

    def score(self, scorer):
        """Score what is pending."""
        self.progress = Progress(len(self.pending), self.show)
        try:
            scorer.run(iter(self.pending.tolist()), self.take)
        except OSError as error:
            raise _full(error, self.job.folder) from error
        finally:
            self.progress.close()

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
            self.progress.total -= 1

    def finish(self):
        """Give the parts their names, and write the file."""
        seconds = self.progress.clock() - self.progress.start
        out = self.job.file or self.job.folder
        try:
            self.job.finish(lambda row: row >= len(self.records) or self.seen[row])
            if self.job.file is not None:
                assemble(self.job, self.records, self.lines, self.where)
        except OSError as error:
            raise _full(error, self.job.folder) from error
        return Summary(
            rows=len(self.records) - self.others,
            scored=self.scored,
            kept=self.kept,
            gone=self.gone,
            bad=self.bad,
            stale=self.done.left() if self.shard[1] == 1 else 0,
            dropped=len(self.job.dropped),
            tokens=self.progress.tokens,
            padding=self.progress.padding,
            seconds=seconds,
            out=out,
            folder=self.job.folder,
            job=self.job.job,
        )

    def close(self):
        """Leave the folder in order, however the run has ended."""
        self.lines.close()
        self.job.close()


def _full(error, folder):
    """A full disk, with what to do; other errors as they are."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    return OSError(
        error.errno,
        f"{folder}: {error.strerror}: what was written before is kept; make room and run the same command again",
    )


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
        parts.write_parquet(job.file, ordered, job.description)
    else:
        parts.write_lines(job.file, ordered)


def _current(line, row, records):
    """The line of a row that stood elsewhere in the input when it was scored."""
    if line["row"] == row:
        return line
    return line | {"row": row, "id": name_of(records.raw(row), records.label(row))}

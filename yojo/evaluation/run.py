"""A judge asked about the items of a benchmark, each exactly once whatever happens meanwhile, and what it said, kept in a file."""

import contextlib
import dataclasses
import tempfile
import typing
from pathlib import Path

import numpy as np
import torch

from yojo.evaluation.answers import answers, encoder_of
from yojo.evaluation.asking import Ask, Plan
from yojo.evaluation.judged import Judged
from yojo.inputs.feeding import explained, fed
from yojo.inputs.packing import orders as laid_out
from yojo.judges.judge import fingerprint_of, order_free
from yojo.scoring import parts
from yojo.scoring.file import made
from yojo.scoring.job import Job, JobError
from yojo.scoring.progress import Progress

# By how much scores of a judge that is free of order may differ between two orders: rounding, relative to 1 + abs(score).
ROUNDING = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What a judge has said of a benchmark.

    Attributes:
        judged: list of `Judged`, in the order of the benchmark.
        bad: list of (number, id, reason): items that could not be scored.
        others: items of other shards that have not been judged yet.
        orders: K, or None for a judge that is free of order.
        seed: int.
        order_error: for a judge that is free of order, the largest difference between two orders, relative to 1 + abs(score).
        fingerprint: dict of everything that decides the scores, but for the items themselves.
        job: short digest of it.
        asked: items of which this run asked the judge.
        file: the file of scores, or None.
    """

    judged: typing.Sequence
    bad: typing.Sequence
    others: int
    orders: int | None
    seed: int
    order_error: float | None
    fingerprint: dict
    job: str
    asked: int
    file: Path | None


def judge_items(
    judge,
    items,
    out=None,
    *,
    orders=4,
    seed=0,
    shard=(0, 1),
    resume=True,
    workers=0,
    progress=False,
    fingerprint=None,
    label="judging",
    every_order=False,
):
    """Ask a judge about every item of a benchmark.

    Args:
        judge: anything with `score_many`.
        items: of `yojo.evaluation.benchmarks.open_benchmark`.
        out: .jsonl file of scores, gone on with where it, or its hidden folder, is there; None: nothing is kept.
        orders: K, at most, in which an item is asked; one for judges that are free of order (`yojo.judges.order_free`).
        seed: of the orders.
        shard: (number, count): every count-th item; the file is written by a call for all of them.
        resume: go on with what is there; False: begin anew.
        workers: processes that read items and make them ready while the judge works.
        progress: show a bar.
        fingerprint: dict of all that changes the judge's scores, where it does not say so itself.
        label: of the bar.
        every_order: ask a judge that says it is free of order in K orders all the same.

    Returns:
        `Outcome`.

    Raises:
        ValueError: a judge that is not free of order though it says so; bad arguments; another judge's file.
    """
    own = fingerprint or (fingerprint_of(judge) if out is not None or hasattr(judge, "fingerprint") else {})
    plan = Plan(None if order_free(judge) and not every_order else orders, seed, len(items))
    name = items.benchmark.name if hasattr(items, "benchmark") else items.name
    told = {"judge": own, "benchmark": name, "orders": plan.orders, "seed": seed}
    if type(getattr(judge, "max_length", None)) is int:  # which items it refuses; of reward models, see `_fits`
        told["max_length"] = judge.max_length
    with contextlib.ExitStack() as stack:
        if out is None:
            out = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="yojo-"))) / "scores.jsonl"
            kept = None
        else:
            kept = out = Path(out)
            out.parent.mkdir(parents=True, exist_ok=True)
        job = Job(out, told, {"benchmark": name, "items": len(items)}, made(), shard, resume)
        run = _Run(judge, items, plan, job, workers, progress, label)
        stack.callback(run.close)
        return dataclasses.replace(run.run(), file=kept)


class _Run:
    def __init__(self, judge, items, plan, job, workers, progress, label):
        self.judge, self.items, self.plan, self.job = judge, items, plan, job
        self.workers, self.progress, self.label = workers, progress, label
        self.lines, self.bad, self.finished, self.asked = {}, {}, False, 0
        self.tolerance = _tolerance(judge)

    def run(self):
        with self.job.locked():
            stored = self._stored()
        mine = [n for n in range(len(self.items)) if n % self.job.shard[1] == self.job.shard[0]]
        bar = Progress(len(mine), self.progress, label=self.label)
        known = {key for key, line in stored.items() if _fits(self.judge, line)}
        ask = Ask(self.items, self.plan, encoder_of(self.judge), known)
        try:
            with contextlib.closing(fed(ask, mine, self.workers)) as asked:
                for answer in answers(self.judge, self._new(asked, stored, bar)):
                    self._take(answer)
                    bar.add(answer.error is None, bad=answer.error is not None)
        except RuntimeError as error:
            raise explained(error) from error.__cause__
        finally:
            bar.close()
        return self._finish()

    def _new(self, stream, stored, bar):
        """Those of the stream that the judge has to be asked about."""
        for asked in stream:
            if asked.error is not None:
                self._bad(asked, asked.error)
                bar.add(0, bad=1)
            elif asked.ready is None:
                self._keep(stored[asked.number, asked.key])
                bar.add(1)
            else:
                self.asked += 1
                yield asked

    def _take(self, answer):
        asked = answer.asked
        if answer.error is not None:
            self._bad(asked, answer.error)
            return
        line = {
            "row": asked.number,
            "key": asked.key,
            "orders": [list(order) for order in asked.orders],
            "scores": None if answer.scores is None else answer.scores.astype(np.float64).tolist(),
            "refused": answer.refused,
            "tokens": None if answer.tokens is None else list(answer.tokens),
            "job": self.job.job,
        }
        self.job.scores.add([line])
        self._keep(line)

    def _keep(self, line):
        self.lines[line["row"]] = line
        difference = _difference(line) if self.plan.orders is None else None
        if difference is not None and difference > self.tolerance:
            raise ValueError(
                f"item {line['row']} ({self.items.light(line['row']).id}): the judge says that the order of responses does not change its scores "
                f"(order_free), and in another order they differ by {difference:.2g}, relative to 1 + abs(score); rounding is "
                f"{self.tolerance:.0e}: correct what it says, or ask it in several orders (every_order, --every-order)"
            )

    def _bad(self, asked, error):
        self.bad[asked.number] = (asked.number, asked.id, error)
        self.job.bad.add([{"row": asked.number, "id": asked.id, "error": error}])

    def _stored(self):
        """dict (number, key) -> line of what earlier runs have been told."""
        found = {}
        for path in self.job.parts():
            for line in parts.read_lines(path, self.job.dropped):
                if not _is_whole(line, self.job.job):
                    raise JobError(f"{path}: row {line['row']} is no row of this job: remove the file")
                if self._is_planned(line):
                    found[line["row"], line["key"]] = line
        return found

    def _is_planned(self, line):
        """Whether the judge was asked as it would be now: where a benchmark has grown, others are asked about in two orders."""
        planned = self.plan.of(line["row"], len(line["orders"][0]))
        return line["orders"] == [list(order) for order in planned]

    def _finish(self):
        others = set()
        with self.job.locked():
            self.job.finish(lambda row, own: row in self.lines or row in self.bad)
            if self.job.shard[1] == 1:
                parts.write_lines(self.job.file, self._full_lines(self.lines), self.job.folder)
            else:
                others = {number for number, _ in self._stored()}
        self.finished = True
        missing = len(self.items) - len(self.lines.keys() | others | self.bad.keys())
        differences = [d for d in map(_difference, self.lines.values()) if d is not None]
        return Outcome(
            judged=[judged_of(line) for line in self._full_lines(self.lines)],
            bad=[self.bad[number] for number in sorted(self.bad)],
            others=missing,
            orders=self.plan.orders,
            seed=self.plan.seed,
            order_error=max(differences, default=0.0) if self.plan.orders is None else None,
            fingerprint=self.job.description["fingerprint"],
            job=self.job.job,
            asked=self.asked,
            file=None,
        )

    def _full_lines(self, lines):
        for number in sorted(lines):
            yield line_of(self.items.light(number), lines[number])

    def close(self):
        """Let go of the file; what was written stays for the next run."""
        if not self.finished:
            with contextlib.suppress(OSError), self.job.locked():
                self.job.finish()
        self.job.close()


def _fits(judge, line):
    """Whether an item that a run with another max_length has scored is within the judge's: else it is to say so again."""
    limit = getattr(getattr(judge, "collator", None), "max_length", None)
    if limit is None or line["tokens"] is None:
        return True
    prompt, responses = line["tokens"]
    isolated = judge.config.mode == "isolated"
    times = 1 if isolated else len(laid_out(len(line["orders"][0]), judge.config))
    return prompt + times * responses <= limit


def _tolerance(judge):
    model = getattr(judge, "model", None)
    dtype = getattr(model, "dtype", None)
    return ROUNDING.get(dtype, ROUNDING[torch.float32])


def _difference(line):
    """Largest difference between the scores of two orders, relative to 1 + abs(score); None for one order."""
    if line["scores"] is None or len(line["scores"]) < 2:
        return None
    scores = np.array(line["scores"])
    return float(((scores.max(0) - scores.min(0)) / (1 + np.abs(scores).max(0))).max())


def _is_whole(line, job):
    return (
        line.get("job") == job
        and isinstance(line.get("key"), str)
        and {"orders", "scores", "refused", "tokens"} <= line.keys()
    )


def line_of(item, line):
    """A line of the file of scores: what a judge said of an item, with all that the figures need.

    Args:
        item: the item without its media.
        line: dict with row, key, orders, scores, refused, job.
    """
    return {
        "row": line["row"],
        "id": item.id,
        "question": item.question,
        "group": item.group,
        "rankings": list(item.rankings),
        "lengths": list(item.lengths),
        "orders": line["orders"],
        "scores": line["scores"],
        "refused": line["refused"],
        "tokens": line["tokens"],
        "tags": dict(item.tags),
        "info": dict(item.info),
        "key": line["key"],
        "job": line["job"],
    }


def judged_of(line):
    """`Judged` from a line of the file of scores."""
    return Judged(
        number=line["row"],
        id=line["id"],
        question=line["question"],
        group=line["group"],
        rankings=tuple(line["rankings"]),
        lengths=tuple(line["lengths"]),
        orders=tuple(map(tuple, line["orders"])),
        scores=None if line["scores"] is None else np.array(line["scores"]),
        refused=line["refused"],
        tokens=None if line["tokens"] is None else tuple(line["tokens"]),
        tags=line["tags"],
        info=line["info"],
    )

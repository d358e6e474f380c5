"""Rows by their numbers -> outcomes: what one process, here or on another machine, does for a scoring job."""

import contextlib
import dataclasses
import os

from yojo.inputs.feeding import explained, fed
from yojo.scoring.rows import Prepare
from yojo.scoring.stream import encoder_of, scored


@dataclasses.dataclass(frozen=True)
class Load:
    """Loads a judge by its name, in whichever process needs one; the arguments of `yojo.judges.load_judge`."""

    name: str | os.PathLike
    base_model: str | None = None
    check_base: bool = True
    check_files: bool = True
    dtype: str | None = None
    max_length: int | None = None

    def __call__(self, device=None):
        """The judge, on a device; by default, should it have a model here, on a GPU where there is one."""
        import torch

        from yojo.judges.loading import has_model, load_judge

        device = device or ("cuda" if torch.cuda.is_available() and has_model(self.name) else None)
        options = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return load_judge(options.pop("name"), device=device, **options)


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
            try:
                for result in scored(self.judge, good(), self.token_budget):
                    take(self._outcome(result))
            except RuntimeError as error:
                raise explained(error) from error.__cause__

    def _outcome(self, result):
        row = result.row
        if result.error is not None:
            return self._bad(row, result.error)
        line = row.line(result.scores, self.job)
        return {"row": row.row, "line": line, "tokens": result.tokens, "filled": result.filled, "left": row.left}

    def _bad(self, row, error):
        file, line = self.prepare.records.where(row.row)
        return {"row": row.row, "bad": {"id": row.id, "row": row.row, "file": file, "line": line, "error": error}}

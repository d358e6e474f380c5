"""`Report`: what several judges reach on a benchmark, side by side; as JSON, Markdown, a page, and lines for a terminal."""

import dataclasses
import json
import math
import typing
from pathlib import Path

import numpy as np

from yojo.evaluation import figures as counting
from yojo.evaluation.calibration import calibration
from yojo.evaluation.judged import Judged
from yojo.evaluation.order_report import order_report
from yojo.evaluation.orders import cost

VERSION = 1
FILES = ("report.json", "report.md", "report.html")
MISSES = 20


@dataclasses.dataclass(frozen=True, repr=False)
class Verdict:
    """What one judge has said of a benchmark, counted.

    Attributes:
        name: of the judge.
        judged: list of `Judged`.
        values: `yojo.evaluation.figures.Values` of them.
        figures: `yojo.evaluation.figures.Figures`.
        order: `yojo.evaluation.order_report.OrderReport`; None where no item was judged in several orders.
        calibration: `yojo.evaluation.calibration.Calibration`, or None where nothing can be said.
        misses: list of (Judged, margin, number of the response above the best), worst first.
        left_out: list of (number, id, reason): items without scores.
        orders: K, or None for a judge that is free of order or whose scores were made elsewhere.
        seed: of the orders, or None.
        order_error: for a judge that is free of order, the largest difference between two orders, relative to 1 + abs(score).
        fingerprint: dict of everything that decides the scores; None where they were made elsewhere.
        job: digest of it.
        source: file that the scores came from, or None.
        is_baseline: it is one of those that look at nothing.
    """

    name: str
    judged: typing.Sequence
    values: counting.Values
    figures: object
    order: object = None
    calibration: object = None
    misses: typing.Sequence = ()
    left_out: typing.Sequence = ()
    orders: int | None = None
    seed: int | None = None
    order_error: float | None = None
    fingerprint: dict | None = None
    job: str | None = None
    source: str | None = None
    is_baseline: bool = False

    def __repr__(self):
        return f"<{self.name}: {self.figures.headline.value:.3f} of {self.figures.items:,} items>"

    def to_dict(self):
        """The same for JSON, less the scores, which have a file of their own."""
        found = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del found["judged"], found["values"]
        found["misses"] = [_miss(one, margin, chosen) for one, margin, chosen in self.misses]
        found["left_out"] = [{"number": n, "id": name, "reason": why} for n, name, why in self.left_out]
        return _plain(found)


def _miss(one, margin, chosen):
    return {
        "number": one.number,
        "id": one.id,
        "group": one.group,
        "margin": margin,
        "chosen": chosen,
        "best": np.flatnonzero(one.best).tolist(),
        "scores": one.mean.tolist(),
        "rankings": list(one.rankings),
    }


@dataclasses.dataclass(frozen=True, repr=False)
class Report:
    """What judges reach on a benchmark; `print(report)` prints it, `report["name"]` is the `Verdict` of one judge.

    Attributes:
        benchmark: dict: name, title, paper, hub, notes, headline, items, questions, groups (name -> items), published (groups
            whose published number differs: name -> [published, found]), reference (model -> figure in percent, of the paper of
            the method).
        judges: list of `Verdict`.
        baselines: list of `Verdict`.
        comparisons: list of `yojo.evaluation.figures.Comparison`, of every two judges.
        made: dict: versions, device, date.
        files: dict judge -> file of its scores.
    """

    benchmark: dict
    judges: typing.Sequence
    baselines: typing.Sequence
    comparisons: typing.Sequence
    made: dict
    files: dict = dataclasses.field(default_factory=dict)

    def __getitem__(self, name):
        for verdict in [*self.judges, *self.baselines]:
            if verdict.name == name:
                return verdict
        raise KeyError(f"there is no judge {name!r}; there are {', '.join(one.name for one in self.judges)}")

    def __repr__(self):
        return f"<Report on {self.benchmark['name']}: {', '.join(map(repr, self.judges))}>"

    def __str__(self):
        return "\n".join(self.lines())

    def to_dict(self):
        """All of it for JSON."""
        return {
            "version": VERSION,
            "benchmark": _plain(self.benchmark),
            "judges": [verdict.to_dict() for verdict in self.judges],
            "baselines": [verdict.to_dict() for verdict in self.baselines],
            "comparisons": [_plain(comparison) for comparison in self.comparisons],
            "files": {name: str(path) for name, path in self.files.items()},
            "made": self.made,
        }

    def lines(self):
        """All of it as text for a terminal, line by line."""
        from yojo.evaluation.tables import text

        return text(self)

    def markdown(self):
        """All of it as Markdown, a string."""
        from yojo.evaluation.tables import markdown

        return markdown(self)

    def html(self, items=None):
        """One self-contained page with plots and the worst misses, a string.

        Args:
            items: of `yojo.evaluation.benchmarks.open_benchmark`, for what the misses show; None: without.
        """
        from yojo.evaluation.page import page

        return page(self, items)

    def save(self, folder, items=None):
        """Write report.json, report.md and report.html.

        Args:
            folder: made if it is missing.
            items: as for `html`.

        Returns:
            `Path` of the page.
        """
        from yojo.scoring.parts import write_aside

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_aside(folder / "report.json", json.dumps(self.to_dict(), indent=1, allow_nan=False).encode() + b"\n")
        write_aside(folder / "report.md", self.markdown().encode("utf-8", "backslashreplace"))
        write_aside(folder / "report.html", self.html(items).encode("utf-8", "backslashreplace"))
        return folder / "report.html"


def remove_report(folder):
    """Remove what `Report.save` wrote into a folder, if anything; None: there is no folder."""
    for name in FILES if folder is not None else ():
        (Path(folder) / name).unlink(missing_ok=True)


def verdict_of(name, judged, benchmark=None, *, draws=counting.DRAWS, seed=0, **what):
    """Count what a judge has said.

    Args:
        name: of the judge.
        judged: list of `Judged`, not empty.
        benchmark: `yojo.evaluation.benchmarks.Benchmark`, or None.
        draws, seed: of the bootstrap.
        **what: further fields of `Verdict`; its `seed` is `orders_seed` here.

    Returns:
        `Verdict`.
    """
    values = counting.Values.of(judged)
    several = any(one.scores is not None and len(one.scores) > 1 for one in judged)
    return Verdict(
        name=name,
        judged=judged,
        values=values,
        figures=counting.figures(judged, benchmark, draws, seed, values=values),
        order=order_report(judged, name, mean_cost(judged)) if several else None,
        calibration=_calibration(judged),
        misses=counting.misses(judged, MISSES),
        seed=what.pop("orders_seed", None),
        **what,
    )


def mean_cost(judged):
    """Tokens of an item on average, as `yojo.evaluation.orders.cost` counts them; None where they are not known."""
    known = [one for one in judged if one.tokens is not None and len(one.orders) > 1]
    found = [cost(prompt, [responses], len(one.orders)) for one in known for prompt, responses in [one.tokens]]
    names = ("one_order", "isolated", "permutations", "separate_orders")
    return {name: float(np.mean([each[name] for each in found])) for name in names} if found else None


def _calibration(judged):
    if any(one.scores is not None and len(one.rankings) > 1 for one in judged):
        return calibration(judged)
    return None


def baselines(judged, benchmark=None):
    """What judges reach that look at nothing: the longest, the shortest, and the one that stands first in the record.

    Args:
        judged: list of `Judged`, for the items.
        benchmark: as for `verdict_of`.

    Returns:
        list of `Verdict`.
    """
    found = []
    for name, scores in (
        ("longest (baseline)", lambda one: np.array(one.lengths, dtype=np.float64)),
        ("shortest (baseline)", lambda one: -np.array(one.lengths, dtype=np.float64)),
        ("first in the record (baseline)", lambda one: -np.arange(len(one.rankings), dtype=np.float64)),
    ):
        own = [
            dataclasses.replace(
                one, orders=(tuple(range(len(one.rankings))),), scores=scores(one)[None], refused=None, tokens=None
            )
            for one in judged
        ]
        values = counting.Values.of(own)
        figures = counting.figures(own, benchmark, intervals=False, values=values)
        found.append(Verdict(name, own, values, figures, is_baseline=True))
    return found


def _plain(value):
    """Anything of ours for JSON: dataclasses as dicts, NaN as None."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        if hasattr(value, "to_dict") and not isinstance(value, (Verdict, Judged)):
            return _plain(value.to_dict())
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(name): _plain(one) for name, one in value.items()}
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    if isinstance(value, np.generic):
        return _plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return str(value) if isinstance(value, Path) else value

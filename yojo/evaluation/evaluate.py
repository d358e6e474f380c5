"""`evaluate`: judges on a benchmark, every item in several orders, and what comes of it with its error bars."""

import collections
import importlib.util
import itertools
import json
import os
import re
from pathlib import Path

from yojo.evaluation.benchmarks import get, open_benchmark
from yojo.evaluation.figures import DRAWS, compare
from yojo.evaluation.given import given_scores
from yojo.evaluation.listed import Listed
from yojo.evaluation.report import Report, baselines, remove_report, verdict_of
from yojo.evaluation.run import judge_items
from yojo.judges.loading import check_name
from yojo.scoring.file import checked_shard, made
from yojo.scoring.scorer import Load

SHOWN = 5  # bad items that a message names
LONGEST = 200  # bytes of a judge's name in that of a file; a job puts some more around it, and file systems take 255


class BadItems(ValueError):
    """Items without scores; the message names some of them.

    Attributes:
        bad: list of (judge, number, id, reason).
    """

    def __init__(self, message, bad):
        super().__init__(message)
        self.bad = bad


def evaluate(
    judge,
    benchmark,
    data=None,
    out=None,
    *,
    judge_scores=None,
    orders=4,
    every_order=False,
    seed=0,
    shard=None,
    resume=True,
    workers=0,
    skip_bad=False,
    partial=False,
    draws=DRAWS,
    device=None,
    progress=False,
    **reading,
):
    """Evaluate judges on a benchmark.

    Every item is judged in `orders` balanced orders of its responses, drawn by the seed; a judge that is free of order by
    construction is asked once, and about some items twice, to see that it is. Nothing is ever cut. With `out` the scores of
    every item are kept, and a run that ended early, however it did, is gone on with by the same call. A score depends on its
    item alone: not on shards, workers, or on what was scored beside it.

    Args:
        judge: anything with `score_many` (`yojo.judges`), the name of one as `yojo.judges.load_judge` takes it, or a dict of
            several, name -> judge; None where all scores were made elsewhere.
        benchmark: name of a benchmark (`yojo.evaluation.benchmarks.names()`), what `open_benchmark` returns, or a list of
            `yojo.Example` with rankings.
        data: where the benchmark's records lie; file or folder.
        out: folder, which gets NAME.jsonl of every judge, and the report.
        judge_scores: dict name -> file of scores that were made elsewhere (`yojo.evaluation.given.given_scores`).
        orders: K, at most.
        every_order: ask judges that say they are free of order in K orders, too.
        seed: of the orders and of the bootstrap.
        shard: (number from 0, count): judge every count-th item, and report nothing; a call without puts all together.
        resume: go on with what is there; False: begin anew.
        workers: processes that read items and make them ready while a judge works.
        skip_bad: report on the items that have scores, and list the others; they are an error otherwise.
        partial: the data may hold other numbers of items than were published.
        draws: of the bootstrap.
        device: where judges that are loaded by their names go.
        progress: show progress bars.
        **reading: as for `open_benchmark`: columns, image_root, allow_urls, ...

    Returns:
        `yojo.evaluation.report.Report`; None for a shard.

    Raises:
        BadItems: items that could not be read or scored; all others are kept.
        ImportError: what the report needs is not installed.
        DataError, ValueError, TypeError: a benchmark that cannot be read, a bad argument, files of another judge.
    """
    _check_installed()
    if isinstance(benchmark, str):
        get(benchmark)  # a name that is none is said first
    judges, scores = _named(judge), dict(judge_scores or {})
    judges = {name: Load(one) if isinstance(one, (str, os.PathLike)) else one for name, one in judges.items()}
    _check_names([*judges, *scores], out)
    _check_judges(judges)
    _check_whole("orders", orders, 1)
    _check_whole("draws", draws, 1)
    _check_whole("seed", seed, 0)
    shard = checked_shard(shard)
    if shard[1] > 1 and out is None:
        raise ValueError("shards are put together from a folder: name it (out=...)")
    if shard[1] > 1 and not resume:
        raise ValueError("beginning anew removes what other shards have scored: remove the folder, or name another one")
    items = benchmark
    if isinstance(benchmark, str):
        if data is None:
            raise ValueError(f"data is missing: where the records of {benchmark} lie; {_where(get(benchmark))}")
        items = open_benchmark(benchmark, data, skip_bad=skip_bad, partial=partial, **reading)
    elif data is not None or reading:
        raise ValueError("the benchmark is open already: give its name to read it from data, with these options")
    elif not hasattr(benchmark, "light"):
        items = Listed(benchmark)
        _check_ranked(items)
    if not len(items):
        raise ValueError(f"{items.name}: there are no items")
    folder = None if out is None else _folder(out)
    given = {name: given_scores(path, items) for name, path in scores.items()}  # before hours of judging
    for one in judges.values():
        if isinstance(one, Load):
            check_name(one.name)
    found, bad, files, seen = {}, [], {}, {}
    for name, one in judges.items():
        one = one(device) if isinstance(one, Load) else one
        outcome = judge_items(
            one,
            items,
            None if folder is None else folder / f"{file_name(name)}.jsonl",
            orders=orders,
            every_order=every_order,
            seed=seed,
            shard=shard,
            resume=resume,
            workers=workers,
            progress=progress,
            label=f"{name} on {items.name}",
        )
        found[name] = outcome
        answered = getattr(one, "seen", None)
        if answered:
            seen[name] = dict(answered)
        bad += [(name, *row) for row in outcome.bad]
        if outcome.file is not None:
            files[name] = outcome.file
    if bad and not skip_bad:
        remove_report(folder)  # of an earlier run, whose scores these are no more
        raise BadItems(_bad_text(bad, folder), bad)
    if shard[1] > 1:
        return None
    given = {name: (scores[name], given[name]) for name in scores}
    return _report(items, found, given, files, folder, draws, seed, seen)


def _check_ranked(items):
    for item in items:
        if len(set(item.rankings)) < 2:
            raise ValueError(
                f"{item.example.name}: its rankings must tell at least two responses apart, got {item.example.rankings}; "
                "yojo.order_bias needs none"
            )


def _check_installed():
    """What is needed in the end is looked for at the beginning."""
    missing = [name for name in ("scipy", "matplotlib", "jinja2") if importlib.util.find_spec(name) is None]
    if missing:
        raise ImportError(f"evaluation needs {', '.join(missing)}: pip install 'yojo[eval]'")


def _report(items, found, given, files, folder, draws, seed, seen):
    benchmark = getattr(items, "benchmark", None)
    verdicts = []
    for name, outcome in found.items():
        if not outcome.judged:
            raise ValueError(f"{name}: no item of {items.name} has scores; the first reason: {outcome.bad[0][2]}")
        verdicts.append(
            verdict_of(
                name,
                outcome.judged,
                benchmark,
                draws=draws,
                seed=seed,
                left_out=outcome.bad,
                orders=outcome.orders,
                orders_seed=outcome.seed,
                order_error=outcome.order_error,
                fingerprint=outcome.fingerprint,
                job=outcome.job,
            )
        )
    for name, (path, judged) in given.items():
        verdicts.append(verdict_of(name, judged, benchmark, draws=draws, seed=seed, source=str(path)))
    light = max((verdict.judged for verdict in verdicts), key=len)
    report = Report(
        benchmark=_described(items, benchmark),
        judges=verdicts,
        baselines=baselines(light, benchmark),
        comparisons=[
            compare(one.judged, other.judged, (one.name, other.name), draws, seed, (one.values, other.values))
            for one, other in itertools.combinations(verdicts, 2)
        ],
        made=made() | ({"answered": json.dumps(seen)} if seen else {}),
        files=files,
    )
    if folder is not None:
        report.save(folder, items)
    return report


def _described(items, benchmark):
    names = ("title", "paper", "hub", "split", "notes", "headline")
    return {
        "name": items.name if benchmark is None else benchmark.name,
        "data": items.name,
        **{name: getattr(benchmark, name, None) for name in names},
        "items": len(items),
        "questions": len({items.light(number).question for number in range(len(items))}),
        "groups": dict(collections.Counter(items.light(number).group for number in range(len(items)))),
        "differs": {name: list(pair) for name, pair in getattr(items, "missing", {}).items()},
        "bad": [list(row) for row in getattr(items, "bad", ())],
        "reference": dict(getattr(benchmark, "published", {})),
    }


def _folder(out):
    out = Path(out)
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"out={str(out)!r}: {path} is a file, and scores and the report go into a folder")
    return out


def _check_whole(name, value, least):
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be an int of at least {least}, got {value!r}")


def _named(judge):
    if judge is None:
        return {}
    if isinstance(judge, dict):
        return dict(judge)
    if isinstance(judge, Load):
        return {short_name(judge.name): judge}
    if isinstance(judge, (str, os.PathLike)):
        return {short_name(judge): judge}
    return {type(judge).__name__: judge}


def short_name(name):
    """What a judge is called that is named by a folder, an address or a baseline."""
    return os.path.basename(os.fspath(name).rstrip("/")) or os.fspath(name)


def file_name(name):
    """The name of a judge as the name of a file."""
    return re.sub(r"[^\w.=+-]+", "-", name).strip("-.") or "judge"


def _check_names(names, out):
    if not names:
        raise ValueError("there is no judge: give one, or scores that were made elsewhere (judge_scores)")
    files = {}
    for name in names:
        if not isinstance(name, str) or not name.strip():
            raise ValueError(f"judges must have names, got {name!r}")
        if out is not None and len(file_name(name).encode()) > LONGEST:
            raise ValueError(f"{name[:40]}... is too long a name for a file of scores: {LONGEST} bytes at most")
        other = files.setdefault(file_name(name) if out is not None else name, name)
        if other is not name and (other != name or names.count(name) > 1):
            raise ValueError(
                f"two judges would both be called {file_name(name)}: {other!r} and {name!r}; give them other names"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"a name stands for two judges: {', '.join(names)}")
    reserved = {"report"} & set(files)
    if reserved:
        raise ValueError("no judge can be called report, which is what the report is called")


def _check_judges(judges):
    for name, judge in judges.items():
        if not isinstance(judge, (str, os.PathLike, Load)) and not callable(getattr(judge, "score_many", None)):
            raise TypeError(
                f"judge {name} must have score_many(examples) -> list of [N] scores, or be the name of a judge, got "
                f"{type(judge).__name__}"
            )


def _where(benchmark):
    return (
        f"it is {benchmark.hub} on the hub (yojo eval {benchmark.name} --download FOLDER)"
        if benchmark.hub
        else "it is not on the hub"
    )


def _bad_text(bad, folder):
    shown = "".join(f"\n  {name}: item {number} ({own}): {reason}" for name, number, own, reason in bad[:SHOWN])
    more = f"\n  and {len(bad) - SHOWN} more" if len(bad) > SHOWN else ""
    kept = "" if folder is None else f"; all others are kept in {folder}, and the same call tries these again"
    return f"{len(bad)} items have no scores (skip_bad leaves them out){kept}:{shown}{more}"

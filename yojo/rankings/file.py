"""`rank_file`: files of votes of many questions -> a file of rankings, and a file of training records drawn from them."""

import contextlib
import json
import os
import uuid
from pathlib import Path

from yojo.files.folders import sync
from yojo.rankings.ranking import aggregate, settings
from yojo.rankings.reading import read_votes
from yojo.rankings.report import RankReport
from yojo.rankings.responses import read_responses
from yojo.rankings.scores import check_count
from yojo.rankings.variants import draw


def rank_file(
    source,
    out,
    *,
    method="bradley_terry",
    columns=None,
    labels=None,
    skip_bad=False,
    ties="half",
    draws=None,
    seed=0,
    variants=None,
    responses=None,
    response_columns=None,
    image_root=None,
    variants_out=None,
    per_question=1,
    gap=1,
    stability=0.0,
    overwrite=False,
    progress=None,
    **options,
):
    """Rank the items of every question of files of votes, and draw training records from the rankings.

    `out` gets a line for each question, in the order in which questions first appear: what `Ranking.to_dict` gives, and
    `question`. A question whose votes do not connect its items has `components`, each ranked by itself, and no ranking of
    all. The same files and arguments give the same bytes.

    Args:
        source: what `read_votes` takes.
        out: path of the .jsonl file of rankings.
        method: a key of `yojo.rankings.METHODS`.
        columns, labels, skip_bad: as for `read_votes`.
        ties, draws: as for `aggregate`.
        seed: of the draws of every question, and of the records.
        variants: responses of each training record, such as 4; None draws none.
        responses: what `read_responses` takes, a record for each question and model; needed with `variants`.
        response_columns: dict, field (question, model, response, prompt) -> column.
        image_root: folder that relative paths of images and videos in `responses` start from; the files' own by default.
        variants_out: path of the .jsonl file of training records, which `yojo.data.load` reads; by default that of `out`
            with .variants.jsonl in the place of .jsonl.
        per_question: training records of a question, at most.
        gap: ranks between the neighbours of a training record, at least.
        stability: of a training record, the share of draws of the votes in which its best is still its best, at least.
        overwrite: replace files that are there.
        progress: function (questions done, of how many), or None.
        **options: of the method.

    Returns:
        `RankReport`.

    Raises:
        DataError: a file or a record that cannot be used.
        TypeError, ValueError: a bad argument, or a question that the method cannot rank. Nothing is written then.
    """
    _, options, draws = settings(method, options, ties, draws, seed)
    out = _checked_out(out, "out", overwrite, [source, responses])
    if variants is not None:
        variants_out = out.with_suffix(".variants.jsonl") if variants_out is None else variants_out
        variants_out = _checked_out(variants_out, "variants_out", overwrite, [source, responses, out])
        _check_variants(variants, responses, per_question, gap, stability, draws)
    elif responses is not None or variants_out is not None:
        raise ValueError(
            "responses and variants_out are for training records: say how many responses each has, variants=4"
        )
    votes = read_votes(source, columns=columns, labels=labels, skip_bad=skip_bad)
    report = RankReport(str(out), method, options | {"ties": ties}, seed, votes.records, votes.bad)
    if not votes.questions:
        raise ValueError(f"there is no vote in {votes.records} records, {len(votes.bad)} of them bad")
    questions = {}
    if variants is not None:
        questions = read_responses(
            responses,
            folder=variants_out.parent,
            columns=response_columns,
            named=votes.columns["question"],
            image_root=image_root,
            bad=report.bad,
            skip_bad=skip_bad,
        )
        if not questions.keys() & votes.questions.keys():
            one, other = next(iter(votes.questions)), next(iter(questions), None)
            raise ValueError(
                f"no question of the votes, such as {one!r}, is among those of the responses, such as {other!r}: map the "
                "columns that name them alike, columns={'question': ...} and response_columns={'question': ...} (--map "
                "question=..., --map-responses question=...)"
            )
    rankings = {}
    for question, own in votes.questions.items():
        try:
            rankings[question] = aggregate(
                own, method, ties=ties, disconnected="mark", draws=draws, seed=seed, **options
            )
        except ValueError as error:
            raise ValueError(f"question {question!r}: {error}") from error
        if progress is not None:
            progress(len(rankings), len(votes.questions))
    report.add(rankings)
    if variants is not None:
        report.variants = draw(
            rankings,
            questions,
            size=variants,
            per_question=per_question,
            gap=gap,
            stability=stability,
            seed=seed,
        )
        report.variants_out = str(variants_out)
        _write(variants_out, report.variants.records)
    _write(out, ({"question": question, **ranking.to_dict()} for question, ranking in rankings.items()))
    return report


def _check_variants(variants, responses, per_question, gap, stability, draws):
    check_count("variants", variants, least=2)
    check_count("per_question", per_question)
    check_count("gap", gap, least=0)
    if isinstance(stability, bool) or not isinstance(stability, (int, float)):
        raise TypeError(f"stability must be a share of draws, from 0 to 1, got {stability!r}")
    if not 0 <= stability <= 1:
        raise ValueError(f"stability must be a share of draws, from 0 to 1, got {stability!r}")
    if stability > 0 and draws == 0:
        raise ValueError(f"stability={stability:g} needs draws of the votes, and draws=0: draw some")
    if responses is None:
        raise ValueError("variants needs responses: the files that say what each model answered (--responses FILE)")


def _checked_out(path, name, overwrite, others):
    path = Path(path)
    if path.suffix.lower() != ".jsonl":
        raise ValueError(f"{name} must be a .jsonl file, got {path}")
    if path.is_dir():
        raise ValueError(f"{name} is a folder: {path}: name a file in it")
    real = Path(os.path.realpath(path))
    for other in _paths(others):
        other = Path(os.path.realpath(other))
        if real == other or (other.is_dir() and other in real.parents):
            raise ValueError(f"{name} is, or lies in, what is read or written besides: {path}: write it elsewhere")
    if path.exists() and not overwrite:
        raise ValueError(
            f"{name} is there already: {path}: name another file, or allow it with overwrite (--overwrite)"
        )
    return path


def _paths(sources):
    for source in sources:
        if isinstance(source, (str, os.PathLike)):
            yield source
        elif isinstance(source, (list, tuple)):
            yield from _paths(source)


def _write(path, rows):
    """A JSONL file, put in place when it is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}.{uuid.uuid4().hex[:12]}.writing"
    try:
        with open(aside, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        sync(aside)
        os.replace(aside, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            aside.unlink()

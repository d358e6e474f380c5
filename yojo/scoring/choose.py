"""What people make of scores: the best of N, preference pairs, and the records worth keeping."""

import array
import collections
import dataclasses
import fractions
import itertools
import math
import os
from pathlib import Path

import numpy as np

from yojo.data import take_responses
from yojo.inputs.digests import digest
from yojo.scoring.media import FORMS, MEDIA, answer, asked, findable, form_of, others, whole
from yojo.scoring.results import joined
from yojo.scoring.seen import Seen
from yojo.scoring.writing import check_apart, check_out, writing

KINDS = ("best-worst", "all")
STATISTICS = ("best", "mean", "worst", "margin")


@dataclasses.dataclass
class Summary:
    """What a command did.

    Attributes:
        out: the file.
        what: what its rows are, such as "pairs".
        records: scored records that were read.
        written: rows that were written.
        prompts: what the prompts in it are, "strings" say; None for records as they stood.
        left_out: Counter, why -> how many.
        notes: Counter, what else there is to know -> how often.
    """

    out: Path
    what: str
    records: int = 0
    written: int = 0
    prompts: str | None = None
    left_out: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    notes: collections.Counter = dataclasses.field(default_factory=collections.Counter)

    def line(self):
        """All of it in one line."""
        texts = [f"{self.out}: {self.written:,} {self.what} of {self.records:,} scored records"]
        for title, counts in (("left out: ", self.left_out), ("", self.notes)):
            said = [f"{why} ({count:,})" for why, count in counts.items() if count]
            texts += [title + ", ".join(said)] if said else []
        texts += [] if self.prompts is None else [f"prompts are {self.prompts}"]
        return "; ".join(texts)


def best(
    scores, out, *, top=None, by=(), messages=False, data=None, report=None, overwrite=False, **options
):  # fmt: skip
    """Write the best response of each record, for fine-tuning on it (TRL's prompt-completion format).

    Of equal scores the response that stands first is the better one, as in `order`; of records in a group, that of the
    earlier record. A row has `prompt` and `completion`; `responses` and `scores`, all of its record; `score`, `place` (of the
    response in its record, from 0), `margin` (score less that of the next best one of the record or group, null where
    there is none), and the record's other columns.

    Args:
        scores: scores file or folder of a job.
        out: .jsonl or .parquet file.
        top: write the best K of each record, each text once, a row each with its `rank`; None for the best alone.
        by: columns; the records that agree in all of them are one group, of which the best is written, with `candidates`, the
            number of its responses. For files with one response a record.
        messages: write prompts as messages even if all are strings.
        data: where the scored records lie, if not where the job read them.
        report: also draw this picture, see `yojo.scoring.report`.
        overwrite: out may be there already.
        **options: of `yojo.data.load`.

    Returns:
        `Summary`.

    Raises:
        ValueError, TypeError: bad arguments, scores without their records, or nothing to write.
    """
    _check_whole("top", top, 1)
    by = (by,) if isinstance(by, str) else tuple(by)
    source, summary, figures = _begin(scores, out, "rows", data, report, overwrite, options)
    groups = _groups(source, by, top, figures, summary) if by else None
    keys = ["prompt", "completion", "responses", "scores", "score", "place", "margin"]
    keys += (["rank"] if top is not None else []) + (["candidates"] if by else [])

    def rows(form, done):
        for number, scored in enumerate(_read(source, figures if groups is None else None)):
            if groups is None:
                chosen = _best_of(scored, top, done)
            else:
                chosen = groups.of(number)
            if not chosen:
                done.left_out["records whose group has a better one"] += 1
                continue
            rest = _frame(scored, form, source, keys, done)
            ranks = {name: list(value) for name, value in _ranks(scored.fields)}
            for place, rank, margin, candidates in chosen:
                score = scored.row["scores"][place]
                made = {
                    **rest,
                    "completion": answer(scored.fields.responses[place], form),
                    "responses": list(scored.fields.responses),
                    **ranks,
                    "scores": scored.row["scores"],
                    "score": score,
                    "place": place,
                    "margin": margin,
                }
                made |= {"rank": rank} if top is not None else {}
                yield made | ({"candidates": candidates} if by else {})

    return _write(rows, source, summary, figures, report, messages)


def pairs(
    scores, out, *, kind="best-worst", margin=0.0, max_pairs=None, messages=False, data=None, report=None, overwrite=False,
    **options,
):  # fmt: skip
    """Write pairs of a better and a worse response, in TRL's preference format.

    A pair's scores differ by more than the margin; equal texts (but for blanks at their ends) are one response, at its better
    place; the same prompt, media, chosen and rejected are written once. A row has `prompt`, `chosen`, `rejected`,
    `score_chosen`, `score_rejected`, `score_margin`, and the columns of the record that its format does not read.

    Args:
        scores, out: as of `best`.
        kind: "best-worst", one pair of each record, or "all" pairs that differ enough. Of equal scores the response that
            stands first is taken, at both ends.
        margin: by how much two scores must differ at least, itself not included.
        max_pairs: of one record, those with the largest margins; None for all.
        messages, data, report, overwrite: as of `best`.
        **options: of `yojo.data.load`.

    Returns:
        `Summary`.

    Raises:
        ValueError, TypeError: as `best`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be {' or '.join(KINDS)}, got {kind!r}")
    _check_number("margin", margin)
    if margin < 0:
        raise ValueError(f"margin must be 0 or more, got {margin}")
    _check_whole("max_pairs", max_pairs, 1)
    source, summary, figures = _begin(scores, out, "pairs", data, report, overwrite, options)
    keys = ["prompt", "chosen", "rejected", "score_chosen", "score_rejected", "score_margin"]

    def rows(form, done):
        seen = Seen()
        for scored in _read(source, figures):
            found = _pairs_of(scored, kind, margin, done)
            if max_pairs is not None and len(found) > max_pairs:
                done.left_out[f"pairs beyond {max_pairs} of a record"] += len(found) - max_pairs
                found = found[:max_pairs]
            rest = _frame(scored, form, source, keys, done, in_part=False) if found else {}
            question = digest([rest.get(name) for name in ("prompt", "images", "videos", "fps", "tools")])
            values, responses = scored.row["scores"], scored.fields.responses
            for better, worse in found:
                if not seen.add(bytes.fromhex(digest([question, responses[better], responses[worse]]))):
                    done.left_out["pairs that were there already"] += 1
                    continue
                yield {
                    **rest,
                    "chosen": answer(responses[better], form),
                    "rejected": answer(responses[worse], form),
                    "score_chosen": values[better],
                    "score_rejected": values[worse],
                    "score_margin": values[better] - values[worse],
                }

    return _write(rows, source, summary, figures, report, messages)


def filter_(
    scores, out, *, min_score=None, top_share=None, of="best", responses=False, messages=False, data=None, report=None,
    overwrite=False, **options,
):  # fmt: skip
    """Write the records, or the responses, whose score is high enough.

    Records are written as they stand, with absolute paths of media, their `scores`, and `score`, the statistic that counts.
    With `responses`, a row has prompt, responses and rankings (of the format yojo) of those that are kept, their `scores`, and
    `places`, where they stood.

    Args:
        scores, out: as of `best`.
        min_score: the smallest statistic that is kept.
        top_share: instead, the share of the records (or responses) that is kept, those with the highest statistic: exactly
            that many, rounded to the nearest; of equal ones those that come first in the input.
        of: the statistic of a record: its best, mean or worst score, or "margin", the best less the second.
        responses: look at single responses, and keep the records that have one left with those alone.
        messages, data, report, overwrite: as of `best`.
        **options: of `yojo.data.load`.

    Returns:
        `Summary`.

    Raises:
        ValueError, TypeError: as `best`.
    """
    if (min_score is None) == (top_share is None):
        raise ValueError("give min_score or top_share (--min-score, --top-share), one of them")
    if of not in STATISTICS:
        raise ValueError(f"of must be one of {', '.join(STATISTICS)}, got {of!r}")
    if responses and of != "best":
        raise ValueError(f"of={of!r} is a statistic of whole records: leave it out with responses (--responses)")
    _check_number("min_score" if top_share is None else "top_share", min_score if top_share is None else top_share)
    if top_share is not None and not 0 < top_share <= 1:
        raise ValueError(f"top_share must be above 0 and at most 1, got {top_share}")
    what = "records with responses worth keeping" if responses else "records"
    source, summary, figures = _begin(scores, out, what, data, report, overwrite, options)
    kept = None if top_share is None else _top(source, top_share, of, responses, figures)
    keys = ["prompt", "responses", "scores", "places"] if responses else ["scores", "score"]

    def rows(form, done):
        numbers = itertools.count()
        for scored in _read(source, figures if kept is None else None):
            found = _statistics(scored, of, responses)
            if not found:
                done.left_out["records of one response, which have no margin"] += 1
                continue
            good = [
                place
                for place, value in enumerate(found)
                if (value >= min_score if kept is None else kept[next(numbers)])
            ]
            if responses:
                done.left_out["responses"] += len(found) - len(good)
            if not good:
                done.left_out["records"] += 1
                continue
            if not responses:
                record, moved = whole(scored, source.columns, keys)
                _note_moved(done, moved)
                yield {**record, "scores": scored.row["scores"], "score": found[0]}
                continue
            yield {
                **_frame(scored, form, source, keys, done),
                "responses": [scored.fields.responses[place] for place in good],
                **dict(_ranks(scored.fields, good)),
                "scores": [scored.row["scores"][place] for place in good],
                "places": good,
            }

    return _write(rows, source, summary, figures, report, messages, forms=responses)


# ---- one record ----


def margin_of(row):
    """How far the best score of a row is above the next one, or None where there is but one.

    Args:
        row: row of scores.
    """
    scores, order = row["scores"], row["order"]
    return scores[order[0]] - scores[order[1]] if len(order) > 1 else None


def _different(scored):
    """Places of the different texts, best first, each at its better place."""
    texts = {}
    for place in scored.row["order"]:
        texts.setdefault(scored.fields.responses[place].strip(), place)
    return list(texts.values())


def _best_of(scored, top, done):
    values, order = scored.row["scores"], scored.row["order"]
    done.notes["ties for the best"] += len(order) > 1 and values[order[0]] == values[order[1]]
    places = _different(scored) if top is not None else order
    if top is not None:
        done.left_out["responses whose text is there twice"] += len(order) - len(places)
    after = {place: values[place] - values[below] for place, below in itertools.pairwise(order)}
    return [(place, rank, after.get(place), len(order)) for rank, place in enumerate(places[: top or 1], 1)]


def _pairs_of(scored, kind, margin, done):
    """(better place, worse place) of a record, the largest margins first."""
    values, order = scored.row["scores"], _different(scored)
    if len(order) == 1:
        done.left_out["records with one response" if len(values) == 1 else "records with one text alone"] += 1
        return []
    if kind == "best-worst":
        lowest = values[order[-1]]
        worst = min(place for place in order if values[place] == lowest)
        tied = values[order[0]] == values[order[1]] or values[order[-2]] == lowest
        done.notes["ties for the best or the worst"] += tied and values[order[0]] != lowest
        wanted = [(order[0], worst)]
    else:
        wanted = list(itertools.combinations(order, 2))
    found = [(better, worse) for better, worse in wanted if values[better] - values[worse] > margin]
    if not found:
        spread = values[order[0]] - values[order[-1]]
        done.left_out[
            "records with no margin above " + f"{margin:g}" if spread else "records with all scores equal"
        ] += 1
    return sorted(found, key=lambda pair: values[pair[1]] - values[pair[0]])  # stable: equal margins, best first


def _statistics(scored, of, responses):
    scores = scored.row["scores"]
    if responses:
        return scores
    if of == "margin":
        margin = margin_of(scored.row)
        return [] if margin is None else [margin]
    return [{"best": max, "worst": min, "mean": _mean}[of](scores)]


def _mean(scores):
    return math.fsum(scores) / len(scores)


def _ranks(fields, places=None):
    """The ranks or targets that a record has, of all responses or of some, as (column, list)."""
    for name in ("rankings", "targets"):
        ranks = getattr(fields, name)
        if ranks is not None and len(ranks) == len(fields.responses):
            if places is not None and len(places) < len(ranks):
                ranks = take_responses(dataclasses.replace(fields, rankings=list(ranks)), places).rankings
            yield name, list(ranks)


# ---- all records ----


class _Another(Exception):
    """A record needs another form of prompts than the file has so far."""


def _begin(scores, out, what, data, report, overwrite, options):
    """What is read, what will be told of it, and the picture's figures, all checked before the work begins."""
    if os.path.realpath(scores) == os.path.realpath(out):
        raise ValueError(f"out is the scores file itself: {out}")
    figures = None
    if report is not None:
        from yojo.scoring.report import Figures, check_picture

        check_picture(report)
        figures = Figures()
    source = joined(scores, data, **options)
    read = [*source.scores.files, *source.sources, source.scores.path]
    out = check_out(out, overwrite, read)
    if report is not None:
        check_apart(report, [out, *read])
        if Path(report).exists() and not overwrite:
            raise ValueError(
                f"report is there already: {report}: name another file, or allow it with overwrite (--overwrite)"
            )
    return source, Summary(out, what), figures


def _write(rows, source, summary, figures, report, messages, forms=True):
    """Write what a function of (form, summary) yields; anew where a prompt needs a richer form than those before it."""
    form = FORMS[1] if messages else FORMS[0]
    while True:
        done = dataclasses.replace(summary, left_out=collections.Counter(), notes=collections.Counter(summary.notes))
        try:
            with writing(summary.out) as file:
                for row in rows(form, done):
                    file.add(row)
                    done.written += 1
                done.records, done.prompts = source.matched, _CALLED[form] if forms else None
                _note_source(done, source)
                if not done.written:
                    raise ValueError(f"nothing to write: {done.line()}")
            break
        except _Another as richer:
            form = str(richer)
    if figures is not None:
        figures.draw(report, str(source.scores.path))
    return done


_CALLED = {"text": "strings", "messages": "messages", "parts": "messages with parts"}


def _note_source(done, source):
    done.left_out["scores of records that are no longer in the input"] = source.stale
    done.left_out["scores of records that have theirs already"] = source.surplus
    done.notes["records of the input without scores"] = source.unscored()


def _note_moved(done, moved):
    for name in moved:
        done.notes[f"a record's own {name!r} is original_{name} now"] += 1


def _frame(scored, form, source, keys, done, in_part=True):
    """The record's other columns and what it asks, in a form; raises `_Another` where that form cannot say it."""
    needed = form_of(scored.fields)
    if FORMS.index(needed) > FORMS.index(form):
        raise _Another(needed)
    question = asked(scored, form, source.literal_tags)
    taken = {*keys, *question}
    taken |= {"images"} if form == "parts" else set()
    kept, moved = others(scored, source.columns, taken, in_part)
    _note_moved(done, moved)
    return {**kept, **question}


def _read(source, figures):
    """All that is scored, from the start; the figures, if there are any, see each of it."""
    if figures is not None:
        figures.forget()
    for scored in source:
        if figures is not None:
            figures.add(scored.row, scored.fields.responses)
        yield scored


def _top(source, share, of, responses, figures):
    """Which values are in the top share: a bytearray, a flag for each in the order of reading. 16 bytes for each."""
    values, records = array.array("d"), array.array("q")
    for scored in _read(source, figures):
        found = _statistics(scored, of, responses)
        values.extend(found)
        records.extend([scored.index] * len(found))
    if not values:
        raise ValueError("nothing to write: no record has two responses, and a margin")
    count = math.floor(fractions.Fraction(str(share)) * len(values) + fractions.Fraction(1, 2))
    values, records = np.array(values), np.array(records)
    order = np.lexsort((records, -values))  # stable: the responses of one record stay in their order
    kept = np.zeros(len(values), np.uint8)
    kept[order[: max(1, count)]] = 1
    return bytearray(kept)


def _reach(record, column):
    if column in record:
        return record[column]
    value = record
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    return value


def _groups(source, by, top, figures, summary):
    """One pass over all records: which responses are the best of each group."""
    keys, counts, records = bytearray(), array.array("q"), array.array("q")
    values, texts = array.array("f"), array.array("Q")
    media = {source.columns.get(field, field) for field in MEDIA}
    for scored in _read(source, figures):
        key = [_reach(scored.record, column) for column in by]
        key = [
            findable(value, scored.root) if column in media else value for column, value in zip(by, key, strict=True)
        ]
        for column, value in zip(by, key, strict=True):
            if value is None:
                raise ValueError(f"{scored.row['id']}: by names {column!r}, and the record has nothing there")
        keys += bytes.fromhex(digest(key))
        counts.append(len(scored.row["scores"]))
        records.append(scored.index)
        values.extend(scored.row["scores"])
        if top is not None:
            texts.extend(int(digest(text.strip())[:16], 16) for text in scored.fields.responses)
    groups = _Groups(keys, np.array(counts), np.array(records), np.array(values), np.array(texts), top)
    summary.notes["groups"] = groups.count
    summary.notes["ties for the best of a group"] = groups.ties
    return groups


class _Groups:
    """The best responses of groups of records, by the place of a record in the order of reading."""

    def __init__(self, keys, counts, records, values, texts, top):
        halves = np.frombuffer(bytes(keys), ">u8").astype("u8").reshape(-1, 2)
        group = np.unique(halves, axis=0, return_inverse=True)[1].reshape(-1)
        number = np.repeat(np.arange(len(counts)), counts)
        begin = np.cumsum(counts) - counts
        place = np.arange(len(values)) - begin[number]
        group = group[number]
        order = np.lexsort((place, records[number], -values.astype("f8"), group))
        sorted_group, sorted_values = group[order], values[order].astype("f8")
        same = sorted_group[:-1] == sorted_group[1:]
        margins = np.append(np.where(same, sorted_values[:-1] - sorted_values[1:], np.nan), np.nan)
        first = np.append(True, ~same)
        self.count, self.ties = int(first.sum()), int((first & (margins == 0)).sum())
        sizes = np.bincount(group)
        if top is not None:
            _, once = np.unique(np.stack([sorted_group.astype("u8"), texts[order]], 1), axis=0, return_index=True)
            once.sort()
            order, sorted_group, margins = order[once], sorted_group[once], margins[once]
            first = np.append(True, sorted_group[:-1] != sorted_group[1:])
        starts = np.flatnonzero(first)
        rank = np.arange(len(order)) - np.repeat(starts, np.diff(np.append(starts, len(order)))) + 1
        good = rank <= (top or 1)
        order, rank, margins = order[good], rank[good], margins[good]
        back = np.lexsort((rank, number[order]))
        self._number, self._place = number[order][back], place[order][back]
        self._rank, self._margin, self._size = rank[back], margins[back], sizes[group[order]][back]

    def of(self, number):
        """(place, rank, margin or None, responses in the group) of the responses of a record that are written."""
        start, stop = (int(np.searchsorted(self._number, number, side)) for side in ("left", "right"))
        return [
            (
                int(self._place[at]),
                int(self._rank[at]),
                None if np.isnan(self._margin[at]) else float(self._margin[at]),
                int(self._size[at]),
            )
            for at in range(start, stop)
        ]


def _check_whole(name, value, least):
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < least):
        raise ValueError(f"{name} must be a whole number, {least} or more, got {value!r}")


def _check_number(name, value):
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number, got {value!r}")

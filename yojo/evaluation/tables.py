"""A report as tables of strings, for a terminal and as Markdown: the same rows in both."""

import math
import re
import textwrap
import unicodedata

NAMES = {
    "headline": "official",
    "top1": "best of N",
    "top1_strict": "ties wrong",
    "tied": "ties",
    "macro": "mean of groups",
    "pairwise": "pairs",
    "kendall_tau": "Kendall tau-b",
    "ndcg": "NDCG",
    "acc_plus": "ACC+",
    "averaged": "orders averaged",
}
ACCURACY = ("headline", "top1", "top1_strict", "tied", "macro")
RANKS = ("pairwise", "kendall_tau", "ndcg", "acc_plus", "averaged")
WIDTH = 120  # columns of a terminal: wider tables go on below
SHARES = {"headline", "top1", "top1_strict", "tied", "macro", "pairwise", "acc_plus", "averaged"}


def percent(value, digits=1):
    """ "62.5", of a share; "-" for NaN or None."""
    return number(None if value is None else 100 * value, digits)


def chance(value):
    """A p value: "0.041", "<0.001"."""
    return "<0.001" if value is not None and value < 0.001 else number(value)


def number(value, digits=3):
    """ "0.412"; "-" for NaN or None; zero has no sign."""
    return "-" if value is None or math.isnan(value) else f"{round(value, digits) + 0.0:.{digits}f}"


def estimate(found, is_share=True):
    """ "62.5 (58.1 to 66.9)" of an `Estimate`."""
    shown = percent if is_share else number
    if math.isnan(found.value):
        return "-"
    interval = "" if math.isnan(found.low) else f" ({shown(found.low)} to {shown(found.high)})"
    return shown(found.value) + interval


def one_line(text):
    """Text on one line, whatever ids and names hold: line ends, control characters and lone surrogates are "?", tabs too."""
    return "".join("?" if unicodedata.category(letter) in ("Cc", "Cs", "Zl", "Zp") else letter for letter in str(text))


def tables(report):
    """The tables of a report.

    Args:
        report: `yojo.evaluation.report.Report`.

    Returns:
        list of (title, note, header, rows): strings, note may be empty; rows are lists of strings.
    """
    found = [_main(report), _ranks(report), _groups(report)]
    if report.comparisons:
        found.append(_comparisons(report))
    found += [_lengths(report), _orders(report), _calibrations(report)]
    if report.benchmark["reference"]:
        found.append(_reference(report))
    return [table for table in found if table is not None]


def _main(report):
    benchmark = report.benchmark
    has_own = any(one.figures.headline != one.figures.estimates["top1"] for one in report.judges)
    names = [name for name in ACCURACY if name != "headline" or has_own]
    titles = NAMES | {"headline": f"official ({str(benchmark['headline']).replace('_', ' ')})"}
    note = (
        "Percent; in brackets 95 % intervals, by the bootstrap over questions. A tie at the top counts by its "
        "share of best responses in best of N; ties are those of a best response with a worse one. Figures are means over the orders "
        "in which a judge was asked. The last rows look at nothing."
    )
    return "Accuracy", note, ["judge", *(titles[name] for name in names)], _estimates(report, names)


def _ranks(report):
    note = (
        "Percent, but Kendall's tau-b and NDCG, of whole rankings. Of pairs, a tied one counts half. ACC+: questions all of whose items "
        "are right in every order. Orders averaged: best of N of a judge's mean scores over its orders."
    )
    return "Rankings", note, ["judge", *(NAMES[name] for name in RANKS)], _estimates(report, RANKS)


def _estimates(report, names):
    rows = []
    for verdict in [*report.judges, *report.baselines]:
        own = verdict.figures.estimates | {"headline": verdict.figures.headline}
        if verdict.is_baseline:  # nobody asks how sure they are
            cells = [(percent if name in SHARES else number)(own[name].value) for name in names]
        else:
            cells = [estimate(own[name], name in SHARES) for name in names]
        rows.append([verdict.name, *cells])
    return rows


def _groups(report):
    groups = sorted({group for verdict in report.judges for group in verdict.figures.groups})
    if len(groups) < 2:
        return None
    header = ["group", "items", *(verdict.name for verdict in report.judges)]
    rows = []
    for group in groups:
        own = [verdict.figures.groups.get(group) for verdict in report.judges]
        rows.append(
            [
                group,
                str(max(int(one["top1"].count) for one in own if one)),
                *("-" if one is None else estimate(one["top1"]) for one in own),
            ]
        )
    return "Groups", "Best of N in percent, a tie at the top counts by its share of best responses.", header, rows


def _comparisons(report):
    header = [
        "judges",
        "items",
        "difference",
        "p",
        "only the first right",
        "only the second",
        "McNemar p",
        "same choice",
        "kappa",
        "tau",
    ]
    header.append("smallest shown")
    rows = []
    for one in report.comparisons:
        found = one.difference
        rows.append(
            [
                f"{one.first} - {one.second}",
                str(one.items),
                f"{percent(found.value)} ({percent(found.low)} to {percent(found.high)})",
                chance(found.p),
                str(one.mcnemar.only_a),
                str(one.mcnemar.only_b),
                chance(one.mcnemar.p),
                percent(one.agreement.same_choice),
                number(one.agreement.kappa),
                number(one.agreement.kendall),
                percent(one.smallest),
            ]
        )
    note = (
        "Best of N, difference in percentage points, with the paired bootstrap over questions; same choice in percent. McNemar's exact "
        "test counts items that are right in the first of their orders, as a single run sees them. The smallest difference that this benchmark shows with 80 % power at 5 % stands last."
    )
    return "Judges compared", note, header, rows


def _lengths(report):
    header = [
        "judge",
        "items",
        "refused",
        "left out",
        "smallest difference",
        "tau with length",
        "longer preferred",
        "longer is better",
    ]
    rows = []
    for verdict in report.judges:
        own = verdict.figures
        rows.append(
            [
                verdict.name,
                str(own.items),
                str(own.refused),
                str(len(verdict.left_out)),
                percent(own.smallest),
                number(own.length.kendall),
                percent(own.length.judge),
                percent(own.length.labels),
            ]
        )
    note = (
        "Differences in percentage points, how often in percent. Refused items count as wrong; those left out could not be read or "
        "scored, and do not count. The smallest difference from a fixed number that the items show with 80 % power at 5 %. Kendall's tau-b of score and characters "
        "within items; of pairs of unlike length, how often the judge prefers the longer response, and how often it is better."
    )
    return "Items and length", note, header, rows


def _orders(report):
    rows = []
    for verdict in report.judges:
        if verdict.order is None:
            continue
        own = verdict.order
        rows.append(
            [
                verdict.name,
                "free of order" if is_free(verdict) else _orders_of(verdict),
                str(own.items),
                percent(own.flip_rate),
                percent(own.any_flip),
                number(own.kendall),
                number(own.pairwise_instability),
                number(own.global_inconsistency),
                percent(own.first_place_agreement),
                percent(own.relative_spread),
            ]
        )
    if not rows:
        return None
    header = ["judge", "orders", "items", "flips", "any flip", "tau", "PPI", "GPI", "agreement", "spread"]
    note = (
        "Percent, but tau, PPI and GPI. Flips: how often two orders of an item choose differently; any flip: items in which some do. "
        "Tau-b between orders. PPI and GPI "
        "as in docs/evaluation.md. Agreement: share of an item's most frequent choice. Spread: deviation of a response's score over "
        "orders, in percent of that between responses. A judge that is free of order is asked twice about some items, to see that "
        "it is."
    )
    return "Orders", note, header, rows


def _calibrations(report):
    rows = []
    for verdict in report.judges:
        own = verdict.calibration
        if own is not None:
            rows.append(
                [
                    verdict.name,
                    str(own.items),
                    _ece(own.raw, own.bins, own),
                    number(own.raw.brier),
                    number(own.raw.nll),
                    number(own.temperature) + ("" if own.at_limit is None else f" ({own.at_limit})"),
                    _ece(own.scaled, own.scaled_bins, own),
                    number(own.scaled.brier),
                    number(own.scaled.nll),
                ]
            )
    if not rows:
        return None
    header = ["judge", "items", "ECE", "Brier", "NLL", "temperature", "ECE at it", "Brier", "NLL"]
    note = (
        "Softmax over an item's mean scores against whether a response is the best, in shares and nats. ECE takes 80 responses. Behind the temperature that makes the "
        "labels most likely the same figures at a temperature fitted on other questions than it is measured on. A temperature at its "
        "limit is no estimate: low where every best response scores highest, high where scores do not tell."
    )
    return "Calibration", note, header, rows


def _ece(figures, bins, own):
    """ "-" of one bin, in which the mean probability is that of a best response by itself; unless no score tells anything."""
    return number(figures.ece) if len(bins) > 1 or own.at_limit == "none" else "-"


def _reference(report):
    rows = [[name, f"{value:.1f}"] for name, value in report.benchmark["reference"].items()]
    note = "As the paper of the method states them (arXiv 2604.10966); not measured here, and its protocol is its own."
    return "Published figures, for reference", note, ["model", "percent"], rows


def about(report):
    """Lines that say what was evaluated, and on what."""
    benchmark = report.benchmark
    title = benchmark["title"] or benchmark["name"]
    yield f"{title}: {benchmark['items']:,} items, {benchmark['questions']:,} questions"
    for group, (published, found) in benchmark["differs"].items():
        yield f"not the published benchmark: {found} items of {'it' if group == 'all' else group}, {published} published"
    if benchmark["bad"]:
        where, why = benchmark["bad"][0]
        yield f"{len(benchmark['bad'])} records of it cannot be judged, and are left out; the first, {where}: {why}"
    for verdict in report.judges:
        how = ["scores made elsewhere" if verdict.fingerprint is None else f"fingerprint {verdict.job}"]
        if verdict.fingerprint is not None:
            if verdict.orders is None:
                how.append(f"free of order (two orders differ by {verdict.order_error:.1g} at most)")
            else:
                how.append(f"{_orders_of(verdict)} orders, seed {verdict.seed}")
        yield f"{verdict.name}: {', '.join(how)}"
        refused = [one for one in verdict.judged if one.refused is not None]
        if refused:
            share = f"{len(refused):,} of {len(verdict.judged):,} items refused, and wrong"
            yield f"{verdict.name}: {share}; the first, {refused[0].id}: {refused[0].refused}"


def _orders_of(verdict):
    """In how many orders items were judged: fewer than were asked for where there are fewer."""
    if verdict.order is None or not verdict.order.items:
        return str(verdict.orders)
    fewest, most = verdict.order.orders
    return str(most) if fewest == most else f"{fewest} to {most}"


def text(report):
    """Lines for a terminal."""
    yield from map(one_line, _text(report))


def _text(report):
    yield from about(report)
    for title, note, header, rows in tables(report):
        yield ""
        yield title
        yield from textwrap.wrap(
            note.partition(". ")[0].rstrip("."), WIDTH, initial_indent="  ", subsequent_indent="  "
        )
        yield from _columns([header, *rows])
    for lines in _biases(report):
        yield ""
        yield from lines


def _columns(rows):
    """Lines of a table; columns that are too many for `WIDTH` stand below, behind the first one again."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    parts = [[]]
    for n, width in enumerate(widths[1:], 1):
        if parts[-1] and widths[0] + width + 4 + sum(widths[one] + 2 for one in parts[-1]) > WIDTH:
            parts.append([])
        parts[-1].append(n)
    for part in parts:
        for row in rows:
            cells = [row[0].ljust(widths[0]), *(row[n].rjust(widths[n]) for n in part)]
            yield ("  " + "  ".join(cells)).rstrip()
        if part is not parts[-1]:
            yield ""


def _biases(report):
    """What is to be said of every judge that depends on the order."""
    for verdict in report.judges:
        if verdict.order is not None and verdict.order.items and not is_free(verdict):
            yield verdict.order.lines()


def is_free(verdict):
    """Whether a judge was asked as one that is free of order."""
    return verdict.fingerprint is not None and verdict.orders is None


def markdown(report):
    """A whole page of Markdown."""
    benchmark = report.benchmark
    lines = [f"# {_marked(benchmark['title'] or benchmark['name'])}", ""]
    lines += [f"- {_marked(line)}" for line in about(report)]
    for title, note, header, rows in tables(report):
        lines += ["", f"## {title}", "", note, ""] if note else ["", f"## {title}", ""]
        lines.append("| " + " | ".join(map(_cell, header)) + " |")
        lines.append("| --- |" + " ---: |" * (len(header) - 1))
        lines += ["| " + " | ".join(map(_cell, row)) + " |" for row in rows]
    for said in _biases(report):
        lines += ["", *(f"- {_marked(line.strip())}" for line in said)]
    made = ", ".join(f"{name} {value}" for name, value in report.made.items())
    return "\n".join([*lines, "", made, ""])


def _cell(text):
    return _marked(text).replace("|", "\\|")


def _marked(text):
    """Text for Markdown that nothing in it makes HTML or a link of: names are anybody's."""
    return re.sub(r"([\\<\[`])", r"\\\1", one_line(text))

"""`RankReport`: what `rank_file` has read, ranked and drawn, in figures."""

import collections
import dataclasses

import numpy as np


@dataclasses.dataclass
class RankReport:
    """What ranking the questions of files has found.

    Attributes:
        out: path of the rankings.
        method, options, seed: how they were made.
        records: of votes, good and bad.
        bad: list of `yojo.rankings.reading.Bad`, of votes and of responses.
        questions: how many there are.
        items: how many different items there are in all.
        votes, ties, abstentions: how many votes, and how many of them are ties and abstentions.
        disconnected: names of the questions whose votes do not connect their items, which have no single ranking.
        tied_best: how many of the other questions have several best items.
        curl, feedback: means over the questions that have them, or None.
        stability: mean over all items of the share of draws in which an item keeps its place, or None.
        best_stability: mean over the connected questions of the share of draws in which the best stays the best, or None.
        majority_pairs, majority_agree: pairs of items with a majority, and how many of them the rankings have in that order.
        condorcet: Counter, of True, False and None: whether the best item of a question has a majority against all others.
        annotators: dict, name -> dict of votes, ties, abstentions, and agreement: the mean over questions, by votes.
        variants_out: path of the records drawn, or None.
        variants: `yojo.rankings.variants.Variants`, or None.
    """

    out: str
    method: str
    options: dict
    seed: int
    records: int = 0
    bad: list = dataclasses.field(default_factory=list)
    questions: int = 0
    items: int = 0
    votes: int = 0
    ties: int = 0
    abstentions: int = 0
    disconnected: list = dataclasses.field(default_factory=list)
    tied_best: int = 0
    curl: float | None = None
    feedback: float | None = None
    stability: float | None = None
    best_stability: float | None = None
    majority_pairs: int = 0
    majority_agree: int = 0
    condorcet: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    annotators: dict = dataclasses.field(default_factory=dict)
    variants_out: str | None = None
    variants: object = None

    def add(self, rankings):
        """Sum up rankings, a dict question -> `Ranking`."""
        every = list(rankings.values())
        self.questions = len(every)
        self.items = len({name for ranking in every for name in ranking.items})
        for name in ("votes", "ties", "abstentions"):
            setattr(self, name, sum(getattr(ranking, name) for ranking in every))
        self.disconnected = [question for question, ranking in rankings.items() if not ranking.connected]
        self.tied_best = sum(ranking.connected and len(ranking.best) > 1 for ranking in every)
        self.curl = _mean(ranking.curl for ranking in every)
        self.feedback = _mean(ranking.feedback for ranking in every)
        self.stability = _mean(v for ranking in every if len(ranking.draws) for v in ranking.stability.tolist())
        self.best_stability = _mean(ranking.best_stability for ranking in every)
        self.majority_pairs = sum(ranking.majority.pairs for ranking in every)
        self.majority_agree = sum(ranking.majority.agree for ranking in every)
        self.condorcet = collections.Counter(ranking.majority.condorcet for ranking in every)
        self.annotators = _annotators(every)

    @property
    def agreement(self):
        """Share of the majorities that the rankings agree with, or None."""
        return self.majority_agree / self.majority_pairs if self.majority_pairs else None

    def exit_code(self):
        """Of the command: 1 where records were left out as bad, or where no training record could be drawn, else 0."""
        return int(bool(self.bad) or (self.variants is not None and not self.variants.records))

    def to_dict(self):
        """The report as JSON takes it."""
        made = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        made["bad"] = [dataclasses.asdict(bad) for bad in self.bad]
        made["condorcet"] = {name: self.condorcet[key] for name, key in _CONDORCET.items()}
        made["agreement"] = self.agreement
        if self.variants is not None:
            made["variants"] = {
                "records": len(self.variants.records),
                "questions": self.variants.questions,
                "skipped": self.variants.skipped,
                "fewer": self.variants.fewer,
                "models": self.variants.models,
                "label_stability": _mean(self.variants.stabilities),
            }
        return made

    def lines(self, most=20):
        """The report for people, a list of lines.

        Args:
            most: bad records that are listed one by one.
        """
        made = [
            f"{self.questions} questions, {self.items} items: {self.votes} votes, {self.ties} ties and {self.abstentions} "
            f"abstentions among them; ranked by {self.method}",
            f"disconnected questions, which have no single ranking: {len(self.disconnected)}{_listed(self.disconnected)}",
            f"several best items: {self.tied_best} questions",
            f"curl {_share(self.curl)}: share of the margins that no scores explain, mean over questions",
            f"feedback {_share(self.feedback)}: share of the decided votes against the ranking, mean over questions",
            f"majorities agreed with: {_share(self.agreement)} of {self.majority_pairs} pairs",
            f"the best beats all others: {self.condorcet[True]} questions; does not: {self.condorcet[False]}; cannot be "
            f"said: {self.condorcet[None]}",
            f"stability {_share(self.stability)}: share of draws of the votes in which an item keeps its place; "
            f"{_share(self.best_stability)} for the best",
        ]
        shares = [own["agreement"] for own in self.annotators.values() if own["agreement"] is not None]
        if shares:
            made.append(
                f"annotators: {len(self.annotators)}; the rankings agree with {min(shares):.3f} to {max(shares):.3f} of what "
                "each has decided"
            )
        made.append(f"rankings: {self.out}")
        if self.variants is not None:
            made += _variant_lines(self.variants, self.variants_out)
        if self.bad:
            made.append(f"bad records, left out: {len(self.bad)}")
            made += [f"  {bad.file}:{bad.line}: {bad.reason}" for bad in self.bad[:most]]
            made += [f"  ... and {len(self.bad) - most} more (--json FILE lists all)"] if len(self.bad) > most else []
        return made


_CONDORCET = {"yes": True, "no": False, "unknown": None}


def _variant_lines(variants, path):
    uses = [sum(places) for places in variants.models.values()]
    made = [
        f"records: {path}: {len(variants.records)} of {variants.questions} questions"
        + (f", each model in {min(uses)} to {max(uses)} of them" if uses else "")
        + f"; label stability {_share(_mean(variants.stabilities))}"
    ]
    reasons = collections.Counter(variants.skipped.values())
    made += [f"  {count} questions without a record: {reason}" for reason, count in sorted(reasons.items())]
    if variants.fewer:
        made.append(f"  {len(variants.fewer)} questions have fewer records than were asked for")
    return made


def _annotators(rankings):
    found = {}
    for ranking in rankings:
        for name, own in ranking.annotators.items():
            total = found.setdefault(name, {"votes": 0, "ties": 0, "abstentions": 0, "agreement": []})
            for key in ("votes", "ties", "abstentions"):
                total[key] += own[key]
            if own["agreement"] is not None:
                total["agreement"].append((own["agreement"], own["votes"]))
    for total in found.values():
        shares, votes = np.array(total["agreement"] or [(0, 0)]).T
        total["agreement"] = float(shares @ votes / votes.sum()) if votes.any() else None
    return {name: found[name] for name in sorted(found)}


def _mean(values):
    values = [value for value in values if value is not None]
    return float(np.mean(values)) if values else None


def _listed(names, most=5):
    """Some names in brackets."""
    shown = [name if len(name) <= 40 else name[:37] + "..." for name in names[:most]]
    return f" ({', '.join([*shown, '...'] if len(names) > most else shown)})" if names else ""


def _share(value):
    return "-" if value is None else f"{value:.3f}"

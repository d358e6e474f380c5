"""Records of a few responses each, drawn from full rankings so that all models are seen about as often, at each rank."""

import collections
import dataclasses
import itertools
import math

import numpy as np

MOST_SETS = 20_000  # of responses of one question that are looked at; more are sampled


@dataclasses.dataclass
class Variants:
    """What `draw` has drawn.

    Attributes:
        records: list of dicts, in the paper's format: id, prompt, responses, rankings, models, and media.
        questions: how many questions have given one or more.
        skipped: dict, question -> why it has given none.
        fewer: dict, question -> how many it has given, where that is fewer than were asked for.
        models: dict, model -> list of how often it stands at each place of a record's ranking, the best first; of all models
            with a response to a question that may give records.
        stabilities: list of floats, of each record: `Ranking.label_stability`; empty without draws.
    """

    records: list
    questions: int
    skipped: dict
    fewer: dict
    models: dict
    stabilities: list


def draw(rankings, questions, *, size=4, per_question=1, gap=1, stability=0.0, seed=0):
    """Draw records of `size` responses.

    Of the sets of responses of a question that may be drawn, the one is taken whose models have been seen least, and least at
    the place that each would have; chance decides between equals. Responses of a record stand in an order drawn at random.

    Args:
        rankings: dict, question -> `Ranking`.
        questions: dict, question -> `yojo.rankings.responses.Question`.
        size: responses of a record, 2 or more.
        per_question: records of a question, at most; no set of responses is drawn twice.
        gap: ranks (of the full ranking) between neighbours of a record, at least; with 0 they may tie, but for the best.
        stability: `Ranking.label_stability` of a record, at least.
        seed: int.

    Returns:
        `Variants`.
    """
    rng = np.random.default_rng(seed)
    uses, places = collections.Counter(), collections.defaultdict(lambda: [0] * size)
    choices, skipped = {}, {}
    for question, ranking in rankings.items():
        found = _choices(ranking, questions.get(question), size, gap, stability, rng)
        (skipped if isinstance(found, str) else choices)[question] = found
    drawn, stabilities = collections.defaultdict(list), collections.defaultdict(list)
    names_of = list(choices)
    for _ in range(per_question):
        for at in rng.permutation(len(choices)):
            question = names_of[at]
            ranking, (items, sets, sure) = rankings[question], choices[question]
            if not len(sets):
                continue
            names = [ranking.items[i] for i in items]
            seen = np.array([[size * uses[name] + count for count in places[name]] for name in names])
            cost = seen[sets, np.arange(size)].sum(axis=1)
            taken = rng.choice(np.flatnonzero(cost == cost.min()))
            for place, item in enumerate(sets[taken]):
                uses[names[item]] += 1
                places[names[item]][place] += 1
            order = rng.permutation(sets[taken])
            number = len(drawn[question]) + 1
            drawn[question].append(_record(f"{question}#{number}", questions[question], ranking, items[order]))
            stabilities[question] += [] if sure is None else [float(sure[taken])]
            sure = None if sure is None else np.delete(sure, taken)
            choices[question] = (items, np.delete(sets, taken, axis=0), sure)
    answered = {rankings[question].items[i] for question, (items, _, _) in choices.items() for i in items}
    made = [question for question in rankings if drawn.get(question)]
    return Variants(
        records=[record for question in made for record in drawn[question]],
        questions=len(made),
        skipped=skipped,
        fewer={question: len(drawn[question]) for question in made if len(drawn[question]) < per_question},
        models={name: places[name] for name in sorted(answered)},
        stabilities=[value for question in made for value in stabilities[question]],
    )


def _choices(ranking, question, size, gap, stability, rng):
    """(item numbers from the best, [S, size] places in them, [S] label stabilities or None); or why there are none."""
    if not ranking.connected:
        return "its votes do not connect its items"
    if question is None:
        return "no responses to it are there"
    items = np.array([i for i, name in enumerate(ranking.items) if name in question.responses])
    if len(items) < size:
        return f"fewer than {size} of its items have a response"
    items = items[np.argsort(ranking.ranks[items], kind="stable")]
    sets = _sets(len(items), size, rng)
    falls = np.diff(ranking.ranks[items][sets], axis=1)
    sets = sets[(falls >= gap).all(axis=1) & (falls[:, 0] >= 1)]
    if not len(sets):
        return (
            f"no {size} of its ranks are {gap} apart, with one best" if gap else f"no {size} of its items have one best"
        )
    texts = np.unique([question.responses[ranking.items[i]] for i in items], return_inverse=True)[1]
    sets = sets[(np.diff(np.sort(texts[sets], axis=1), axis=1) > 0).all(axis=1)]
    if not len(sets):
        return f"no {size} of its responses that may be drawn are different texts"
    if not len(ranking.draws):
        return items, sets, None
    drawn = ranking.draws[:, items]
    sure = np.zeros(len(sets))
    for row in drawn:
        sure += (row[sets[:, :1]] < row[sets[:, 1:]]).all(axis=1)
    sure /= len(drawn)
    kept = sure >= stability
    if not kept.any():
        return f"the best is stable in less than {stability:g} of the draws"
    return items, sets[kept], sure[kept]


def _sets(count, size, rng):
    """[S, size] int16, ascending: all sets of so many of `count`, or a sample of them."""
    if math.comb(count, size) <= MOST_SETS:
        return np.array(list(itertools.combinations(range(count), size)), dtype=np.int16)
    drawn = np.argsort(rng.random((MOST_SETS, count)), axis=1)[:, :size]
    return np.unique(np.sort(drawn, axis=1), axis=0).astype(np.int16)


def _record(name, question, ranking, items):
    models = [ranking.items[i] for i in items]
    levels = sorted(set(ranking.ranks[items].tolist()))
    return {
        "id": name,
        "prompt": question.prompt,
        "responses": [question.responses[model] for model in models],
        "rankings": [levels.index(rank) + 1 for rank in ranking.ranks[items].tolist()],
        "models": models,
        **question.beside,
    }

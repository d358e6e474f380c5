"""The methods: votes of one question -> a score of each item, higher is better.

Each takes a `Tally` whose graph of comparisons is connected, and its own options as keywords.
"""

import inspect

import numpy as np

from yojo.rankings import graphs
from yojo.rankings.kemeny import kemeny

TIED = 1e-7  # scores of neighbours that differ by no more are a tie: far above what the last step leaves open
_STEP, _MOST_STEPS = 1e-9, 1000  # a step of Newton's method that is the last one, of the largest strength; steps


def bradley_terry(tally, *, prior=1.0):
    """Strengths of the Bradley-Terry model: an item wins against another with probability sigmoid(difference).

    Ties count as half a vote for either item, where they count. Each item has, besides, `prior` votes against one average
    item, half of them won: the estimate is finite whatever the votes say, and the most probable one.

    Args:
        tally: `Tally`.
        prior: number of votes, >= 0.

    Returns:
        [N] float64, log strengths, 0 on average.

    Raises:
        ValueError: prior=0, and some items have never lost to any of the others.
    """
    _check_prior(tally, prior)
    wins = _with_average(tally.wins, prior)
    return _without_average(_most_likely([_of_pairs(wins)], len(wins)), tally)


def plackett_luce(tally, *, prior=1.0):
    """Strengths of the Plackett-Luce model of whole rankings.

    The decided votes of an annotator that make one order of three items or more (each pair was compared, and the majorities
    contradict each other nowhere) are one ranking of them, with the mean weight of these votes for each pair. All other
    votes are rankings of two, for which the model is that of Bradley and Terry; so are ties and the prior, as there.

    Args:
        tally: `Tally`.
        prior: number of votes of each item against one average item, >= 0.

    Returns:
        [N] float64, log strengths, 0 on average.

    Raises:
        ValueError: prior=0, and some items have never lost to any of the others.
    """
    _check_prior(tally, prior)
    wins, rankings = annotators_rankings(tally)
    wins = _with_average(wins, prior)
    parts = [_of_pairs(wins), _of_rankings(rankings, len(wins))] if rankings else [_of_pairs(wins)]
    return _without_average(_most_likely(parts, len(wins)), tally)


def annotators_rankings(tally):
    """What annotators have said as whole rankings, and what is left.

    Args:
        tally: `Tally`.

    Returns:
        (wins, rankings): [N, N] float64, all other votes; and a list of (item numbers from the best, weight).
    """
    left, rankings = np.ones(len(tally.first), dtype=bool), []
    for number in range(len(tally.annotators)):
        own = tally.annotator == number
        votes = tally.take(np.flatnonzero(own))
        decided = votes.decided
        there = np.flatnonzero((decided + decided.T).any(axis=1))
        above = np.round(decided - decided.T, graphs.DIGITS)[np.ix_(there, there)] > 0
        order = np.argsort(-above.sum(axis=1), kind="stable")
        if len(there) > 2 and (above[np.ix_(order, order)] == np.triu(np.ones_like(above), 1)).all():
            pairs = len(there) * (len(there) - 1) / 2
            rankings.append((tuple(there[order].tolist()), decided.sum() / pairs))
            left &= ~(own & ~tally.is_tie & ~tally.is_abstention)
    return tally.take(np.flatnonzero(left)).wins, rankings


def hodge_rank(tally):
    """Potentials of HodgeRank (Jiang, Lim, Yao and Ye, 2011): least squares of the mean margins, weighted by their votes.

    Args:
        tally: `Tally`.

    Returns:
        [N] float64, 0 on average: minimises the sum over pairs of counts (s_i - s_j - margin_ij)^2, with margins from -1
        to 1.
    """
    counts = tally.counts
    laplacian = np.diag(counts.sum(axis=1)) - counts
    divergence = (tally.wins - tally.wins.T).sum(axis=1)
    found = np.linalg.solve(laplacian + 1, divergence)  # + 1: the potential that sums to 0
    return found - found.mean()


def rank_centrality(tally, *, prior=1.0):
    """Log of the stationary distribution of Rank Centrality (Negahban, Oh and Shah): a walk to whoever wins.

    From an item, the walk goes to each item that it was compared with at the rate of the votes that it lost to it, of all
    between the two, `prior` votes added to either side.

    Args:
        tally: `Tally`.
        prior: number of votes, >= 0.

    Returns:
        [N] float64, 0 on average.

    Raises:
        ValueError: prior=0, and some items have never lost to any of the others.
        ImportError: choix is missing.
    """
    try:
        import choix
    except ImportError as error:
        raise ImportError("rank_centrality needs choix: pip install 'yojo[eval]'") from error
    _check_prior(tally, prior)
    compared = tally.counts > 0
    wins = np.where(compared, tally.wins + prior, 0.0)
    shares = np.divide(wins, wins + wins.T, out=np.zeros_like(wins), where=compared)
    return choix.lsr_pairwise_dense(shares)  # its first step, from equal strengths, is this walk


def borda(tally):
    """Borda's score where not all pairs have as many votes: the share of its votes that an item has won.

    Args:
        tally: `Tally`.

    Returns:
        [N] float64 in [0, 1].
    """
    return tally.wins.sum(axis=1) / tally.counts.sum(axis=1)


def elo(tally, *, step=16.0, orders=200, seed=0):
    """Elo ratings, averaged over orders of the votes: a rating depends on which vote came last.

    Items that the graph of votes does not tell apart (`Tally.classes`) have the mean of their ratings, which they differ
    from by the orders drawn alone.

    Args:
        tally: `Tally`.
        step: points that a vote moves at most, Elo's K.
        orders: how many are drawn.
        seed: of the draws.

    Returns:
        [N] float64, about 1000.

    Raises:
        TypeError, ValueError: another step or number of orders.
    """
    if not step > 0:
        raise ValueError(f"step must be above 0, got {step!r}")
    check_count("orders", orders)
    counts = tally.share == tally.share
    counts &= ~tally.is_tie if tally.ties == "drop" else True
    votes = tally.take(np.flatnonzero(counts))
    rng = np.random.default_rng(seed)
    ratings = elo_ratings(votes, [rng.permutation(len(votes.first)) for _ in range(orders)], step).mean(axis=0)
    return np.array([ratings[tally.classes == own].mean() for own in tally.classes])


def elo_ratings(tally, orders, step):
    """Ratings after all votes, one after the other.

    Args:
        tally: `Tally`, without abstentions.
        orders: R arrays of vote numbers, each a permutation.
        step: points.

    Returns:
        [R, N] float64, from 1000.
    """
    ratings = np.full((len(orders), len(tally.items)), 1000.0)
    rows = np.arange(len(orders))
    for votes in np.array(orders).T:
        first, second = tally.first[votes], tally.second[votes]
        expected = 1 / (1 + 10 ** ((ratings[rows, second] - ratings[rows, first]) / 400))
        moved = step * tally.weight[votes] * (tally.share[votes] - expected)
        ratings[rows, first] += moved
        ratings[rows, second] -= moved
    return ratings


def pged(tally, *, denoise_ensemble=True):
    """The preference-graph ensemble of Hu et al. (arXiv 2410.12869): how many items an item is better than, by paths.

    Each annotator's decided votes are a graph (votes without an annotator are one together); feedback arcs are dropped from
    each (`graphs.denoised`); the graphs are added up, opposite arcs netted; the score of an item is the number of its
    descendants. Ties and abstentions are no arcs.

    Args:
        tally: `Tally`.
        denoise_ensemble: drop feedback arcs from the sum, too, as the paper has it, and its code does not.

    Returns:
        [N] float64.
    """
    if not isinstance(denoise_ensemble, bool):
        raise TypeError(f"denoise_ensemble must be a bool, got {denoise_ensemble!r}")
    each = [tally.take(np.flatnonzero(tally.annotator == number)).decided for number in np.unique(tally.annotator)]
    together = graphs.ensemble([graphs.denoised(graph) for graph in each])
    together = graphs.denoised(together) if denoise_ensemble else together
    return graphs.descendants(together > 0).astype(np.float64)


METHODS = {
    "bradley_terry": bradley_terry,
    "plackett_luce": plackett_luce,
    "hodge_rank": hodge_rank,
    "rank_centrality": rank_centrality,
    "borda": borda,
    "elo": elo,
    "kemeny": kemeny,
    "pged": pged,
}


def method_of(name, options):
    """A method and all of its options.

    Args:
        name: key of `METHODS`.
        options: dict of those that are given.

    Returns:
        (function, dict name -> value of each option; `seed` is not among them).

    Raises:
        ValueError: no method.
        TypeError: no option of it.
    """
    if name not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    parameters = list(inspect.signature(METHODS[name]).parameters.values())[1:]
    known = {parameter.name: parameter.default for parameter in parameters if parameter.name != "seed"}
    for option in options:
        if option not in known:
            raise TypeError(f"{name} has no option {option!r}; it has {', '.join(known) or 'none'}")
    return METHODS[name], known | options


def ranks_of(scores):
    """Dense ranks, 1 = best; scores that are as good as equal are a tie.

    Args:
        scores: [N] float64.

    Returns:
        [N] int64.
    """
    order = np.argsort(-scores, kind="stable")
    tolerance = TIED * max(1.0, float(np.abs(scores).max(initial=0)))
    falls = -np.diff(scores[order]) > tolerance
    ranks = np.empty(len(scores), dtype=np.int64)
    ranks[order] = 1 + np.concatenate([[0], np.cumsum(falls)])
    return ranks


def check_count(name, value, least=1):
    """Raise where an argument is no whole number, or too small."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_prior(tally, prior):
    if isinstance(prior, bool) or not isinstance(prior, (int, float)):
        raise TypeError(f"prior must be a number of votes, got {prior!r}")
    if not 0 <= prior < np.inf:
        raise ValueError(f"prior must be a finite number of votes, 0 or more, got {prior!r}")
    if prior == 0 and len(graphs.strong_components(tally.wins > 0)) > 1:
        raise ValueError(
            "prior=0: some items have never lost to any of the others, and nothing limits their strength: take prior > 0"
        )


def _with_average(wins, prior):
    """Wins with one more item in the last place, which is average."""
    count = len(wins)
    made = np.zeros((count + 1, count + 1)) if prior else wins.copy()
    made[:count, :count] = wins
    made[count:, :count] = made[:count, count:] = prior / 2
    return made


def _without_average(strengths, tally):
    found = strengths[: len(tally.items)]
    return found - found.mean()


def _of_pairs(wins):
    """Function: log strengths -> log likelihood of wins [N, N], its gradient [N], and its curvature, negated [N, N]."""
    counts = wins + wins.T

    def look(strengths):
        log_chance = -np.logaddexp(0, strengths[None, :] - strengths[:, None])
        chance = np.exp(log_chance)  # and that of the other item, chance.T, which 1 - chance would round
        flow = counts * chance * chance.T
        gradient = (wins * chance.T - wins.T * chance).sum(axis=1)
        return float((wins * log_chance).sum()), gradient, np.diag(flow.sum(axis=1)) - flow

    return look


def _of_rankings(rankings, count):
    """The same of rankings, a list of (items from the best, weight): each place is a choice from what is left."""
    choices = [(ranking[place:], weight) for ranking, weight in rankings for place in range(len(ranking) - 1)]
    among = np.zeros((len(choices), count))
    for row, (members, _) in enumerate(choices):
        among[row, list(members)] = 1
    chosen, weight = np.array([members[0] for members, _ in choices]), np.array([weight for _, weight in choices])
    rows = np.arange(len(choices))

    def look(strengths):
        highest = np.where(among > 0, strengths, -np.inf).max(axis=1)
        odds = among * np.exp(np.minimum(strengths - highest[:, None], 0))
        total = odds.sum(axis=1)
        chance = odds / total[:, None]
        likelihood = float(weight @ (strengths[chosen] - highest - np.log(total)))
        curvature = np.diag(weight @ chance) - chance.T @ (chance * weight[:, None])
        chance[rows, chosen] = 0  # 1 - chance of what was chosen is the sum of the others
        gradient = np.bincount(chosen, weight * chance.sum(axis=1), minlength=count) - weight @ chance
        return likelihood, gradient, curvature

    return look


def _most_likely(parts, count):
    """Newton's method: where the sum of log likelihoods is largest.

    Args:
        parts: functions as `_of_pairs` gives them.
        count: of strengths.

    Returns:
        [N] float64, 0 on average.
    """

    def look(strengths):
        return [sum(values) for values in zip(*(part(strengths) for part in parts), strict=True)]

    strengths = np.zeros(count)
    likelihood, gradient, curvature = look(strengths)
    for _ in range(_MOST_STEPS):
        step = np.linalg.solve(curvature + 1, gradient)  # + 1: the step that sums to 0
        scale = _STEP * max(1.0, float(np.abs(strengths).max()))
        if np.abs(step).max() < scale:
            return strengths + step
        new = look(strengths + step)
        while new[0] < likelihood - 1e-12 * abs(likelihood) and np.abs(step).max() >= scale:
            step = step / 2
            new = look(strengths + step)
        strengths, (likelihood, gradient, curvature) = strengths + step, new
    raise RuntimeError(f"no estimate after {_MOST_STEPS} steps of Newton's method")

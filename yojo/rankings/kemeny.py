"""Kemeny's ranking: the order that the least weight of votes speaks against, exactly."""

import itertools

import numpy as np

MOST = 20  # items
_GAP = 1e-6  # of the largest margin: costs that differ by less are equal


def kemeny(tally):
    """Scores by the orders with the least weight of votes against them (Kemeny), by integer programming.

    Several orders are often equally good. An item is put above another where it is in all of them; the score of an item is
    how many it is put above, less how many are put above it, so that nothing is decided by the order that a solver finds.

    Args:
        tally: `Tally` of at most 20 items.

    Returns:
        [N] float64.

    Raises:
        ValueError: more items.
        ImportError: scipy is missing.
    """
    count = len(tally.items)
    if count > MOST:
        raise ValueError(f"kemeny is exact and takes at most {MOST} items, got {count}: take another method")
    above = always_above(tally.wins)
    return (above.sum(axis=1) - above.sum(axis=0)).astype(np.float64)


def always_above(wins):
    """Which items stand above which in every order of least cost.

    Args:
        wins: [N, N] float64, weight of votes for the item of the row against that of the column.

    Returns:
        [N, N] bool.
    """
    count = len(wins)
    above = np.zeros((count, count), dtype=bool)
    margins = wins - wins.T
    if count < 2 or not margins.any():
        return above
    pairs = list(itertools.combinations(range(count), 2))
    rows, columns = np.array(pairs).T
    costs = -margins[rows, columns] / np.abs(margins).max()  # of row above column, less that of column above row
    order = _solve(costs, count, pairs)
    flipped = np.zeros(len(pairs), dtype=bool)
    while not flipped.all():  # look for an equally good order that turns round pairs nobody has turned round yet
        goal = np.where(flipped, 0.0, np.where(order, 1.0, -1.0))
        other = _solve(goal, count, pairs, limit=(costs, costs @ order + _GAP))
        new = (other != order) & ~flipped
        if not new.any():
            break
        flipped |= new
    above[rows, columns] = order & ~flipped
    above[columns, rows] = ~order & ~flipped
    return above


def _solve(costs, count, pairs, limit=None):
    """[P] bool: for each pair whether its first item stands above, in an order of least cost."""
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_matrix
    except ImportError as error:
        raise ImportError("kemeny needs scipy: pip install 'yojo[eval]'") from error
    number = {pair: place for place, pair in enumerate(pairs)}
    constraints = []
    triples = list(itertools.combinations(range(count), 3))
    if triples:  # i above j and j above k: i above k, and the same the other way round
        places = np.array([[number[i, j], number[j, k], number[i, k]] for i, j, k in triples])
        at = (np.repeat(np.arange(len(triples)), 3), places.ravel())
        matrix = coo_matrix((np.tile([1.0, 1.0, -1.0], len(triples)), at), shape=(len(triples), len(pairs)))
        constraints.append(LinearConstraint(matrix.tocsr(), 0, 1))
    if limit is not None:
        constraints.append(LinearConstraint(limit[0][None, :], -np.inf, limit[1]))
    found = milp(
        costs,
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        constraints=constraints,
        options={"mip_rel_gap": 0.0},
    )
    if found.x is None or found.status != 0:
        raise RuntimeError(f"no order was found: {found.message}")
    return found.x > 0.5

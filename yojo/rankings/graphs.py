"""Weighted preference graphs, [N, N] arrays: what reaches what, what is alike, feedback arcs, and the ensemble of PGED."""

import numpy as np

DIGITS = 9  # of weights that are compared: sums of the same numbers in another order are the same


def reachable(arcs):
    """Which nodes can be reached from which.

    Args:
        arcs: [N, N] bool, from the node of the row to that of the column.

    Returns:
        [N, N] bool; a node reaches itself only along a cycle.
    """
    reach = np.array(arcs, dtype=bool)
    while True:
        more = reach | (reach.astype(np.float32) @ reach.astype(np.float32) > 0)
        if (more == reach).all():
            return reach
        reach = more


def classes(arcs):
    """Classes of nodes that their arcs tell apart, numbered in an order that does not depend on how nodes are numbered.

    Colours are refined until nothing changes: nodes of one colour have the same arcs to nodes of each colour. Nodes that
    a symmetry of the graph exchanges are always in one class.

    Args:
        arcs: [N, N] or [N, N, K] float64, the weights of K kinds of arcs, 0 where there is none.

    Returns:
        [N] int64, numbers of classes from 0.
    """
    arcs = np.round(np.asarray(arcs, dtype=np.float64), DIGITS)
    arcs = arcs[:, :, None] if arcs.ndim == 2 else arcs
    both = np.concatenate([arcs, arcs.transpose(1, 0, 2)], axis=2)
    kinds, seen = np.unique(both.reshape(-1, both.shape[2]), axis=0, return_inverse=True)
    seen, count = seen.reshape(arcs.shape[:2]), len(arcs)
    colours, found = np.zeros(count, dtype=np.int64), 1
    while True:
        around = np.sort(seen * count + colours[None, :], axis=1)
        keys = [(colour, *row) for colour, row in zip(colours.tolist(), around.tolist(), strict=True)]
        number = {key: place for place, key in enumerate(sorted(set(keys)))}
        colours = np.array([number[key] for key in keys])
        if len(number) == found:
            return colours
        found = len(number)


def strong_components(arcs):
    """List of [K] int64, the nodes of each strongly connected component.

    Args:
        arcs: [N, N] bool.
    """
    reach = reachable(arcs)
    together = reach & reach.T
    np.fill_diagonal(together, True)
    return [np.array(part) for part in sorted({tuple(np.flatnonzero(row)) for row in together})]


def eades_lin_smyth(arcs):
    """Order of nodes with little weight on arcs that go back, by the greedy rule of Eades, Lin and Smyth (1993).

    Sinks go to the end, sources to the front; where there are neither, the node with the largest weight of arcs out less
    arcs in goes to the front. Of several that are equally large, the one of the least class (`classes`) goes, so that
    numbers of nodes decide nothing; those of one class go together, with no order between them.

    Args:
        arcs: [N, N] float64, weights >= 0, 0 where there is no arc.

    Returns:
        list of lists of nodes, from the front to the end.
    """
    arcs = np.round(np.asarray(arcs, dtype=np.float64), DIGITS)
    left, kinds = np.arange(len(arcs)), None
    front, end = [], []
    while len(left):
        inner = arcs[np.ix_(left, left)]
        out, into = inner.sum(axis=1), inner.sum(axis=0)
        if (out == 0).any():
            taken = out == 0
            end.append(left[taken].tolist())
        elif (into == 0).any():
            taken = into == 0
            front.append(left[taken].tolist())
        else:
            kinds = classes(arcs) if kinds is None else kinds
            difference = np.round(out - into, DIGITS)
            largest = difference == difference.max()
            taken = largest & (kinds[left] == kinds[left][largest].min())
            front.append(left[taken].tolist())
        left = left[~taken]
    return front + end[::-1]


def denoised(arcs):
    """A graph without its feedback arcs: in each strongly connected component, those that do not go forward are dropped.

    Args:
        arcs: [N, N] float64, weights >= 0.

    Returns:
        [N, N] float64, without cycles.
    """
    kept = np.array(arcs, dtype=np.float64)
    for nodes in strong_components(kept > 0):
        inner = np.ix_(nodes, nodes)
        level = np.empty(len(nodes), dtype=np.int64)
        for place, group in enumerate(eades_lin_smyth(kept[inner])):
            level[group] = place
        kept[inner] *= level[:, None] < level[None, :]
    return kept


def ensemble(graphs):
    """The union of graphs: weights added, and of two opposite arcs the heavier one with what it is heavier by.

    Args:
        graphs: list of [N, N] float64.

    Returns:
        [N, N] float64.
    """
    total = np.sum(graphs, axis=0)
    return np.maximum(np.round(total - total.T, DIGITS), 0)


def descendants(arcs):
    """[N] int64: how many other nodes each node reaches.

    Args:
        arcs: [N, N] bool.
    """
    reach = reachable(arcs)
    np.fill_diagonal(reach, False)
    return reach.sum(axis=1)

"""Preference graphs: reachability, classes, the rule of Eades, Lin and Smyth, the ensemble of PGED."""

import itertools

import networkx
import numpy as np
import pytest
from rank_cases import by_name

from yojo.rankings import Vote
from yojo.rankings.graphs import (
    classes,
    denoised,
    descendants,
    eades_lin_smyth,
    ensemble,
    reachable,
    strong_components,
)
from yojo.rankings.scores import pged


def random_graph(seed, count=7, density=0.4, most=1):
    """A weighted graph without pairs of opposite arcs."""
    rng = np.random.default_rng(seed)
    arcs = rng.integers(1, most + 1, (count, count)) * (rng.random((count, count)) < density) * 1.0
    arcs = np.where(arcs.T > 0, np.triu(arcs, 1), arcs)
    np.fill_diagonal(arcs, 0)
    return arcs


@pytest.mark.parametrize("seed", range(20))
def test_graphs_against_networkx(seed):
    arcs = random_graph(seed)
    graph = networkx.from_numpy_array(arcs, create_using=networkx.DiGraph)
    assert descendants(arcs > 0).tolist() == [len(networkx.descendants(graph, i)) for i in range(7)]
    want = sorted(sorted(part) for part in networkx.strongly_connected_components(graph))
    assert [part.tolist() for part in strong_components(arcs > 0)] == want
    on_cycle = {i for part in want if len(part) > 1 for i in part}
    assert set(np.flatnonzero(np.diag(reachable(arcs > 0)))) == on_cycle


def levels(arcs):
    level = np.empty(len(arcs), dtype=int)
    for place, group in enumerate(eades_lin_smyth(arcs)):
        level[group] = place
    return level


@pytest.mark.parametrize("seed", range(30))
def test_few_arcs_go_back(seed):
    """Theorem of the paper: at most m / 2 - n / 6 of m arcs between n nodes, where there are no opposite ones."""
    arcs = random_graph(seed, count=9, density=0.5)
    level = levels(arcs)
    assert sorted(i for group in eades_lin_smyth(arcs) for i in group) == list(range(9))
    back = arcs[level[:, None] >= level[None, :]].sum()
    groups = [group for group in eades_lin_smyth(arcs) if len(group) > 1 and arcs[np.ix_(group, group)].any()]
    kinds = classes(arcs)
    assert all(len(set(kinds[group])) == 1 for group in groups)
    if not groups:  # nodes that nothing tells apart are put together, and the theorem is about orders
        assert back <= arcs.sum() / 2 - 9 / 6
    optimum = min(
        sum(arcs[order[j], order[i]] for i, j in itertools.combinations(range(5), 2))
        for order in itertools.permutations(range(5))
    )
    small = levels(arcs[:5, :5])
    assert arcs[:5, :5][small[:, None] >= small[None, :]].sum() >= optimum


def plainly_denoised(arcs):
    """The rule of the paper node by node, in networkx: weights are such that nothing is equally large."""
    graph = networkx.from_numpy_array(arcs, create_using=networkx.DiGraph)
    for part in list(networkx.strongly_connected_components(graph)):
        left, front, end = graph.subgraph(part).copy(), [], []
        while left:
            sinks = [node for node in left if not left.out_degree(node)]
            sources = [node for node in left if not left.in_degree(node)]
            margin = {n: left.out_degree(n, weight="weight") - left.in_degree(n, weight="weight") for n in left}
            if sinks:
                end.insert(0, sinks[0])
            else:
                front.append(sources[0] if sources else max(margin, key=margin.get))
            left.remove_node(end[0] if sinks else front[-1])
        place = {node: number for number, node in enumerate(front + end)}
        graph.remove_edges_from([(i, j) for i in part for j in part if graph.has_edge(i, j) and place[j] < place[i]])
    return networkx.to_numpy_array(graph, nodelist=range(len(arcs)))


@pytest.mark.parametrize("seed", range(20))
def test_denoising_against_the_plain_rule(seed):
    rng = np.random.default_rng(seed)
    arcs = random_graph(seed, count=8, density=0.35) * rng.uniform(0.5, 2, (8, 8))
    if seed % 2:  # with opposite arcs, as one annotator may vote on a pair several times
        arcs = arcs + (rng.random((8, 8)) < 0.1) * rng.uniform(0.5, 2, (8, 8)) * (1 - np.eye(8))
    assert denoised(arcs) == pytest.approx(plainly_denoised(arcs))


def test_order_by_hand():
    # 0 -> 1 -> 2 -> 0 is a cycle; 3 goes to 0, 2 goes to 4. Source 3 first, sink 4 last, then what wins by most.
    arcs = np.zeros((5, 5))
    for i, j, weight in [(0, 1, 3), (1, 2, 2), (2, 0, 1), (3, 0, 1), (2, 4, 1)]:
        arcs[i, j] = weight
    # Without 3 and 4, out less in is 2, -1 and -1: 0 goes, which leaves 1 -> 2.
    assert eades_lin_smyth(arcs) == [[3], [0], [1], [2], [4]]
    kept = denoised(arcs)
    assert kept[2, 0] == 0 and kept.sum() == arcs.sum() - 1
    assert descendants(kept > 0).tolist() == [3, 2, 1, 4, 0]


def test_what_nothing_tells_apart_stays_together():
    cycle = np.roll(np.eye(3), 1, axis=1)
    assert classes(cycle).tolist() == [0, 0, 0] and eades_lin_smyth(cycle) == [[0, 1, 2]]
    assert not denoised(cycle).any()
    path = np.eye(3, k=1)
    assert len(set(classes(path))) == 3


@pytest.mark.parametrize("seed", range(15))
def test_numbers_of_nodes_decide_nothing(seed):
    arcs = random_graph(seed, density=0.6)
    order = np.random.default_rng(seed + 100).permutation(7)
    moved = arcs[np.ix_(order, order)]
    assert classes(moved).tolist() == classes(arcs)[order].tolist()
    assert (denoised(moved) == denoised(arcs)[np.ix_(order, order)]).all()
    assert networkx.is_directed_acyclic_graph(networkx.from_numpy_array(denoised(arcs), create_using=networkx.DiGraph))


def test_only_cycles_lose_arcs():
    path = np.triu(np.ones((4, 4)), 1)
    assert (denoised(path) == path).all()


def test_ensemble_nets_opposite_arcs():
    one, other = np.zeros((3, 3)), np.zeros((3, 3))
    one[0, 1], other[1, 0], other[1, 2], one[1, 2] = 2, 0.5, 1, 1
    assert ensemble([one, other]).tolist() == [[0, 1.5, 0], [0, 0, 2], [0, 0, 0]]


def test_pged_by_hand():
    """Two annotators say a > b > c > a with weights 3, 2, 1; the arc c > a is dropped from each graph before they add up."""
    votes = [
        Vote(first, second, "first", who, weight)
        for who in ("x", "y")
        for first, second, weight in (("a", "b", 3), ("b", "c", 2), ("c", "a", 1))
    ]
    for again in (True, False):
        assert by_name(pged, votes, denoise_ensemble=again) == {"a": 2, "b": 1, "c": 0}
    # A third one who says c > a, without a cycle of his own, keeps the arc: the sum has a cycle, and loses it when it is
    # denoised once more.
    votes.append(Vote("c", "a", "first", "z", 1.0))
    assert by_name(pged, votes, denoise_ensemble=False) == {"a": 2, "b": 2, "c": 2}
    assert by_name(pged, votes) == {"a": 2, "b": 1, "c": 0}


def test_pged_ties_are_ties():
    votes = [Vote("a", "b", "first"), Vote("a", "c", "first"), Vote("b", "c", "tie")]
    assert by_name(pged, votes) == {"a": 2, "b": 0, "c": 0}

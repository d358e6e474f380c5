"""Orders of responses: balanced ones to ask a judge in, and measures of how far what it says depends on them.

Measures take a list of `Judged` and give one number for each item, [I] float64, NaN where the item has none: the judge
refused, there are fewer than two responses, or (where orders are compared) fewer than two orders. Pairwise instability and
global inconsistency follow the measures of InvariRank (Bito, Ren, He, arXiv 2604.27599), with ties added and the minimum exact.
"""

import hashlib
import math

import numpy as np

# ---- orders to ask in ----


def possible(count):
    """Number of orders of `count` responses, `count`!.

    Args:
        count: int, N.

    Raises:
        TypeError, ValueError: `count` that is no int, or below 1.
    """
    return math.factorial(_checked_int("count", count, 1))


def balanced_orders(count, orders, seed, number):
    """Orders for one item of a benchmark in which every response stands in every place equally often.

    Orders come in Latin squares: `count` orders that have every response once in every place. They are Williams's (1949): for an
    even `count` the reverse of every order is in the square, so that of two responses either stands before the other equally
    often, and directly before it, too. An item gets as many whole squares as fit, drawn for it alone, and the rest from a
    square that all items share, each going on where the one before stopped. So of one item's orders no response stands in a
    place more than once more often than in another, and over any run of `count / gcd(count, orders)` items that follow each
    other all do equally often, whatever the seed. For `orders` below `count` this means that the orders of items repeat with
    that period; two orders of an even `count` are each other's reverse.

    The same for the same arguments in every process and version: nothing here depends on a library's random numbers.

    Args:
        count: int, N responses.
        orders: int, K.
        seed: int.
        number: int, place of the item in the benchmark, from 0.

    Returns:
        list of K different tuples of N ints; `order[place]` is the response that stands there.

    Raises:
        TypeError, ValueError: an argument that is no int or too small; more orders than `possible(count)`.

    Example:
        >>> sorted(balanced_orders(2, 2, seed=0, number=0))
        [(0, 1), (1, 0)]
    """
    available = possible(count)
    _checked_int("orders", orders, 1)
    _checked_int("seed", seed, None)
    _checked_int("number", number, 0)
    if orders > available:
        raise ValueError(
            f"orders={orders}, and {count} responses have {available} orders: ask for min(orders, possible({count}))"
        )
    squares, rest = divmod(orders, count)
    # A square is one arrangement of the responses read in a zigzag, from every start: (count - 1)! are different.
    total = math.factorial(count - 1)
    shared = _draw(total, seed, count, "shared")
    found = []
    for square in _sample(total - bool(rest), squares, seed, count, orders, number):
        first = _arrangement(square + (bool(rest) and square >= shared), count)
        begin = first.index(number % count)  # the first order of items begins with each response in turn
        found += [_shifted(first, begin + shift) for shift in range(count)]
    first, start = _arrangement(shared, count), _draw(count, seed, count, "start")
    if rest and count % rest == 0:  # as far from each other as they can be
        shifts = [start + number + step * (count // rest) for step in range(rest)]
    else:
        shifts = [start + number * rest + step for step in range(rest)]
    return found + [_shifted(first, shift) for shift in shifts]


def _shifted(arrangement, shift):
    """Read from `shift` on, forwards and backwards in turns: 0, 1, -1, 2, -2, ..."""
    count = len(arrangement)
    zigzag = ((place + 1) // 2 * (1 if place % 2 else -1) for place in range(count))
    return tuple(arrangement[(step + shift) % count] for step in zigzag)


def _arrangement(index, count):
    """The arrangement of 0, ..., count - 1 of that index, of the (count - 1)! that begin with 0."""
    left, found = list(range(1, count)), [0]
    for size in range(count - 1, 0, -1):
        place, index = divmod(index, math.factorial(size - 1))
        found.append(left.pop(place))
    return found


def _draw(below, *key):
    """An int in [0, below) that depends on the key alone."""
    size = below.bit_length() // 8 + 16  # 128 bits more than it takes: no number is likelier by more than 2^-128
    return int.from_bytes(hashlib.shake_256(repr(key).encode()).digest(size), "big") % below


def _sample(below, size, *key):
    """`size` different ints in [0, below), sorted (Floyd's method)."""
    found = set()
    for last in range(below - size, below):
        drawn = _draw(last + 1, *key, last)
        found.add(last if drawn in found else drawn)
    return sorted(found)


def _checked_int(name, value, least):
    if not isinstance(value, (int, np.integer)) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


# ---- what an item says ----


def _stacks(items, orders=2):
    """Items of one shape at a time: (their numbers in the list, scores [I, K, N], places [I, K, N]).

    `places[i, k, n]` is where response n stood. Items without scores, with one response, or with fewer orders are left out.
    """
    shapes = {}
    for index, item in enumerate(items):
        if item.scores is None:
            continue
        scores, order = np.asarray(item.scores, dtype=np.float64), np.asarray(item.orders)
        count = len(item.rankings)
        if scores.shape != (len(item.orders), count) or order.shape != scores.shape:
            raise ValueError(
                f"item {item.id!r}: scores must be [orders, responses], [{len(item.orders)}, {count}] here, and each order "
                f"name every response once; got scores {list(scores.shape)} and orders {list(order.shape)}"
            )
        if not np.isfinite(scores).all():
            raise ValueError(f"item {item.id!r}: scores must be finite, got {scores.tolist()}: refuse the item instead")
        if (np.sort(order, axis=1) != np.arange(count)).any():
            raise ValueError(f"item {item.id!r}: each order must name every response once, got {item.orders!r}")
        if count > 1 and len(scores) >= orders:
            shapes.setdefault(scores.shape, []).append((index, scores, np.argsort(order, axis=1)))
    for shape in sorted(shapes):
        indices, scores, places = zip(*shapes[shape], strict=True)
        yield np.array(indices), np.stack(scores), np.stack(places)


def _per_item(items, measure, orders=2):
    found = np.full(len(items), np.nan)
    for indices, scores, places in _stacks(items, orders):
        found[indices] = measure(scores, places)
    return found


def _top(scores):
    """[..., N] bool: the highest scores of each order."""
    return scores == scores.max(axis=-1, keepdims=True)


def _choices(scores):
    """[..., N] float64: how likely each response is chosen; the highest scores share."""
    top = _top(scores)
    return top / top.sum(axis=-1, keepdims=True)


# ---- choices ----


def flip_rate(items):
    """Share of pairs of an item's orders whose top choice differs.

    Where scores tie at the top, the choice falls by a lot that is the same in all orders of an item: orders with the sets of
    highest scores A and B differ with probability 1 - #(A and B) / #(A or B). So a judge that does not look at the order has
    0, with ties too.

    Args:
        items: list of `Judged`.

    Returns:
        [I] float64 in [0, 1].

    Raises:
        ValueError: scores or orders that do not fit the item, scores that are not finite; the message names the item.
    """

    def measure(scores, places):
        top = _top(scores).astype(np.float64)
        both = top @ top.swapaxes(1, 2)
        size = top.sum(axis=2)
        either = size[:, :, None] + size[:, None, :] - both
        first, second = np.triu_indices(scores.shape[1], 1)
        return 1 - (both / either)[:, first, second].mean(axis=1)

    return _per_item(items, measure)


def any_flip(items):
    """Whether the orders of an item do not all choose the same response: 0, 1 or, where scores tie at the top, between.

    With A_k the set of highest scores in order k and the lot of `flip_rate`: 1 - #(in all A_k) / #(in any A_k).

    Args:
        items: list of `Judged`.

    Returns:
        [I] float64 in [0, 1].

    Raises:
        ValueError: as in `flip_rate`.
    """

    def measure(scores, places):
        top = _top(scores)
        return 1 - top.all(axis=1).sum(axis=1) / top.any(axis=1).sum(axis=1)

    return _per_item(items, measure)


def first_place_agreement(items):
    """Largest share of an item's orders that put the same response first (the share of its most frequent top choice).

    Args:
        items: list of `Judged`.

    Returns:
        [I] float64 in (0, 1]: max over responses n of the share of orders in which n is among the highest scores.

    Raises:
        ValueError: as in `flip_rate`.
    """
    return _per_item(items, lambda scores, places: _top(scores).mean(axis=1).max(axis=1))


def exposure(items):
    """How often the response at each place is chosen, minus 1/N.

    Ties share. An item's orders are averaged first, then items. Orders that are not balanced (`balanced_orders`) mix this
    with how good the responses are.

    Args:
        items: list of `Judged`; of one order too.

    Returns:
        dict: N -> [N] float64 that sums to 0, over the items with N responses; 0 everywhere: no place is preferred.

    Raises:
        ValueError: as in `flip_rate`.
    """
    return _by_place(items, _choices, lambda count: 1 / count)


def score_by_place(items):
    """How much higher a response scores at each place than on average over its orders.

    Args:
        items: list of `Judged`.

    Returns:
        dict: N -> [N] float64: mean over items, orders and responses of the score minus the same response's mean.

    Raises:
        ValueError: as in `flip_rate`.
    """

    def value(scores):
        same = np.ptp(scores, axis=1, keepdims=True) == 0  # whose mean may differ from them in the last bit
        return np.where(same, 0.0, scores - scores.mean(axis=1, keepdims=True))

    return _by_place(items, value, lambda count: 0.0)


def _by_place(items, value, minus):
    sums, counts = {}, {}
    for indices, scores, places in _stacks(items, orders=1):
        count = scores.shape[2]
        at_place = np.take_along_axis(value(scores), np.argsort(places, axis=2), axis=2)
        sums[count] = sums.get(count, 0) + at_place.mean(axis=1).sum(axis=0)
        counts[count] = counts.get(count, 0) + len(indices)
    return {count: sums[count] / counts[count] - minus(count) for count in sorted(sums)}


# ---- whole orders of responses ----


def _pair_signs(scores):
    """[..., P] float64: 1 where the first response of a pair scores higher, -1 where the second does, 0 where they tie."""
    first, second = np.triu_indices(scores.shape[-1], 1)
    return np.sign(scores[..., first] - scores[..., second])


def kendall_between(items):
    """Mean Kendall tau-b between the scores of an item in two of its orders, over the pairs of orders that have one.

    Args:
        items: list of `Judged`.

    Returns:
        [I] float64 in [-1, 1]; NaN also where all pairs of orders have one in which all scores tie.

    Raises:
        ValueError: as in `flip_rate`.
    """

    def measure(scores, places):
        signs = _pair_signs(scores)
        decided = (signs != 0).sum(axis=2).astype(np.float64)
        first, second = np.triu_indices(scores.shape[1], 1)
        norm = np.sqrt(decided[:, first] * decided[:, second])
        common = (signs @ signs.swapaxes(1, 2))[:, first, second]
        tau = np.divide(common, norm, out=np.zeros_like(common), where=norm > 0)
        return _ratio(tau.sum(axis=1), (norm > 0).sum(axis=1))

    return _per_item(items, measure)


def pairwise_instability(items, parts=3):
    """PPI: how far the win rate of one response over another depends on where the two stand.

    The row is cut into `parts` stretches, place p of N being in stretch floor(p parts / N). For each pair of responses the
    win rate of the first (a tie is half) is taken for each pair of stretches in which they stood, over the orders; its
    largest minus its smallest value is averaged over the pairs of responses that stood in two or more pairs of stretches.

    Args:
        items: list of `Judged`.
        parts: int, stretches of the row. 3 is what InvariRank publishes; up to N = 3 these are the places themselves. Finer
            ones take more orders: a win rate over one order is 0 or 1.

    Returns:
        [I] float64 in [0, 1].

    Raises:
        TypeError, ValueError: `parts` that is no int or below 2; else as in `flip_rate`.
    """
    _checked_int("parts", parts, 2)

    def measure(scores, places):
        wins = (_pair_signs(scores) + 1) / 2  # [I, K, P]
        first, second = np.triu_indices(scores.shape[2], 1)
        stretch = places * parts // scores.shape[2]
        code = stretch[:, :, first] * parts + stretch[:, :, second]
        highest, lowest = np.zeros_like(wins[:, 0]), np.ones_like(wins[:, 0])
        kinds = np.zeros_like(highest)
        for pair in range(parts * parts):
            there = code == pair
            seen = there.sum(axis=1)
            rate = (wins * there).sum(axis=1) / np.maximum(seen, 1)
            highest = np.where(seen > 0, np.maximum(highest, rate), highest)
            lowest = np.where(seen > 0, np.minimum(lowest, rate), lowest)
            kinds += seen > 0
        counted = kinds >= 2
        return _ratio(((highest - lowest) * counted).sum(axis=1), counted.sum(axis=1))

    return _per_item(items, measure)


def global_inconsistency(items):
    """GPI: the least disagreement of any one ranking with the preferences that an item's orders showed.

    With w[a, b] the share of orders in which a scores higher than b (a tie is half): the minimum over rankings of the mean over
    pairs of w[b, a] for a ranked above b. It is 0 if all orders agree, 1/2 if every pair wins as often as it loses.

    Args:
        items: list of `Judged`.

    Returns:
        [I] float64 in [0, 1/2].

    Raises:
        ValueError: as in `flip_rate`.
    """

    def measure(scores, places):
        rates = (_pair_signs(scores).mean(axis=1) + 1) / 2
        return [_least_disagreement(row, scores.shape[2]) / len(row) for row in rates]

    return _per_item(items, measure)


def _least_disagreement(rates, count):
    """Sum over pairs of the losing share under the best ranking; `rates` are win rates of pairs (a, b), a < b."""
    first, second = np.triu_indices(count, 1)
    least = np.minimum(rates, 1 - rates).sum()
    beats = np.zeros((count, count), dtype=bool)
    beats[first, second], beats[second, first] = rates > 0.5, rates < 0.5
    left = np.ones(count, dtype=bool)
    while left.any():
        free = left & ~beats[left].any(axis=0)
        if not free.any():
            return _least_of_cycle(rates, count)
        left &= ~free
    return least  # majorities go round nowhere: a ranking takes the larger share of every pair


def _least_of_cycle(rates, count):
    """The same where majorities go round: a linear order as an integer program, x[a, b] = 1 for a above b, a < b."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    number = {pair: at for at, pair in enumerate(zip(*np.triu_indices(count, 1), strict=True))}
    rows = [(a, b, c) for a in range(count) for b in range(a + 1, count) for c in range(b + 1, count)]
    matrix = np.zeros((len(rows), len(rates)))
    for row, (a, b, c) in zip(matrix, rows, strict=True):
        # a over b and b over c is a over c, and the reverse: 0 <= x[a, b] + x[b, c] - x[a, c] <= 1
        row[[number[a, b], number[b, c], number[a, c]]] = 1, 1, -1
    found = milp(
        1 - 2 * rates, integrality=np.ones(len(rates)), bounds=Bounds(0, 1), constraints=LinearConstraint(matrix, 0, 1)
    )
    above = np.round(found.x).astype(bool)
    return np.where(above, 1 - rates, rates).sum()


# ---- scores ----


def spread(items):
    """Mean over an item's responses of the standard deviation of its score over the orders.

    Args:
        items: list of `Judged`.

    Returns:
        [I] float64 >= 0, in units of the score; the deviation is that of the orders asked (divided by K, not K - 1).

    Raises:
        ValueError: as in `flip_rate`.
    """
    return _per_item(items, lambda scores, places: _deviation(scores, axis=1).mean(axis=1))


def spread_between(items):
    """Standard deviation between an item's responses of their mean score, what `spread` is compared with.

    Args:
        items: list of `Judged`; of one order too.

    Returns:
        [I] float64 >= 0.

    Raises:
        ValueError: as in `flip_rate`.
    """
    return _per_item(items, lambda scores, places: _deviation(scores.mean(axis=1), axis=1), orders=1)


def max_change(items):
    """Largest change of a response's score between two orders of an item: max over responses of its highest minus lowest.

    Args:
        items: list of `Judged`.

    Returns:
        [I] float64 >= 0.

    Raises:
        ValueError: as in `flip_rate`.
    """
    return _per_item(items, lambda scores, places: np.ptp(scores, axis=1).max(axis=1))


def _deviation(values, axis):
    """Standard deviation; exactly 0 for equal numbers, whose mean may differ from them in the last bit."""
    return np.where(np.ptp(values, axis=axis) == 0, 0.0, values.std(axis=axis))


def _ratio(numerator, denominator):
    return np.divide(numerator, denominator, out=np.full(len(numerator), np.nan), where=denominator > 0)


# ---- what it costs not to depend on them ----


def cost(prompt_tokens, response_tokens, orders):
    """Tokens that a model reads for one item, by how the dependence on the order is dealt with.

    Args:
        prompt_tokens: int, tokens of the prompt, pictures included.
        response_tokens: N ints, tokens of each response with its separator.
        orders: int, K.

    Returns:
        dict of ints.

        one_order: prompt and responses in a row, once; what an order-dependent score costs.
        isolated: the same tokens in a row, where no response sees another: nothing depends on the order.
        permutations: the prompt once and the responses in K orders, averaged.
        separate_orders: K passes, each with the prompt and the responses in one order.
        separate_responses: N passes, each with the prompt and one response.

    Raises:
        TypeError, ValueError: what is no int; negative tokens, no response, fewer than one order.
    """
    prompt = _checked_int("prompt_tokens", prompt_tokens, 0)
    responses = [_checked_int("response_tokens", tokens, 0) for tokens in response_tokens]
    if not responses:
        raise ValueError("response_tokens must have a number for each response, got none")
    orders, total = _checked_int("orders", orders, 1), sum(responses)
    return {
        "one_order": prompt + total,
        "isolated": prompt + total,
        "permutations": prompt + orders * total,
        "separate_orders": orders * (prompt + total),
        "separate_responses": len(responses) * prompt + total,
    }

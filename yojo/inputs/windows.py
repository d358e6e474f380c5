"""Which examples share a packed row: those of like length in a bounded window, whatever order they come in."""

import itertools

WINDOW_ROWS = 8  # rows' worth of tokens that wait at most
WINDOW_ITEMS = 256
WINDOW_BYTES = 1 << 28  # of pixels


def rows(items, budget, size, weight=lambda item: 0):
    """Group items into rows, examples of like length together.

    A window of items waits. When it is full, the one that has waited longest gets a row, with those whose lengths are
    nearest to its own, as long as they fit. Which items share a row follows from the items alone.

    Args:
        items: iterable.
        budget: function () -> the most tokens in a row; an item that is longer by itself gets a row of its own.
        size: function of an item -> its tokens.
        weight: function of an item -> its bytes, of which the window holds `WINDOW_BYTES`.

    Yields:
        list of items, in the order they came in.
    """
    window, tokens, held = [], 0, 0
    items = iter(items)
    for count in itertools.count(1):
        full = min(count, WINDOW_ROWS)  # the first row does not wait for eight
        more = True
        while more and (len(window) < WINDOW_ITEMS and tokens < full * budget() and held < WINDOW_BYTES or not window):
            item = next(items, _NOTHING)
            more = item is not _NOTHING
            if more:
                window.append(item)
                tokens, held = tokens + size(item), held + weight(item)
        if not window:
            return
        row = _row(window, budget(), size)
        window = [item for n, item in enumerate(window) if n not in row]
        taken = list(row.values())
        tokens, held = tokens - sum(map(size, taken)), held - sum(map(weight, taken))
        yield taken


_NOTHING = object()


def _row(window, budget, size):
    """dict place -> item, in the order of the places."""
    first = size(window[0])
    left, chosen = budget - first, [0]
    for place in sorted(range(1, len(window)), key=lambda n: abs(size(window[n]) - first)):
        if size(window[place]) > left:
            break
        chosen.append(place)
        left -= size(window[place])
    return {place: window[place] for place in sorted(chosen)}

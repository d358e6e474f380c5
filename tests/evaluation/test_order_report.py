"""The report on order bias: its numbers are those of the measures, its words and pictures say them."""

import dataclasses
import io
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from random_judged import judged, random_items

from yojo.evaluation import order_report as module
from yojo.evaluation import orders
from yojo.evaluation.order_report import order_report
from yojo.evaluation.statistics import bootstrap

FAITHFUL = judged([[2.0, 1.0], [2.0, 1.0]])
FIRST = judged([[1.0, 0.0], [0.0, 1.0]], number=1)
REFUSED = judged(None, rankings=[1, 2], number=2)
ONCE = judged([[1.0, 2.0]], number=3)
ALONE = judged([[1.0], [1.0]], [(0,), (0,)], number=4)
COST = orders.cost(1000, [100] * 4, 8)


def place_judge(items):
    """The same items, scored by place alone, the first one highest."""
    return [
        dataclasses.replace(item, scores=-np.argsort(np.array(item.orders), axis=1).astype(np.float64))
        for item in items
    ]


def test_report_by_hand():
    found = order_report([FAITHFUL, FIRST, REFUSED, ONCE, ALONE], "mine")
    assert (found.judge, found.items, found.refused, found.left_out, found.orders) == ("mine", 2, 1, 2, (2, 2))
    assert (found.flip_rate, found.any_flip, found.first_place_agreement, found.kendall) == (0.5, 0.5, 0.75, 0)
    assert (found.pairwise_instability, found.global_inconsistency, found.balanced) == (0.5, 0.25, 1)
    assert (found.spread, found.relative_spread, found.max_change) == (0.25, 1, 1)
    assert found.exposure == {2: (0.25, -0.25)} and found.score_by_place == {2: (0.25, -0.25)}
    assert found.item_spreads == (0, 0.5) and found.flip_interval == (0, 1)


def test_numbers_are_those_of_the_measures():
    items = random_items(0, 60)
    found = order_report(items)
    for name in ("flip_rate", "any_flip", "pairwise_instability", "global_inconsistency", "first_place_agreement"):
        assert getattr(found, name) == pytest.approx(np.nanmean(getattr(orders, name)(items)))
    assert found.kendall == pytest.approx(np.nanmean(orders.kendall_between(items)))
    assert found.flip_interval == bootstrap(orders.flip_rate(items), [item.question for item in items])
    assert found.max_change == orders.max_change(items).max() and found.orders == (2, 6)
    assert order_report(items[::-1]).flip_interval == found.flip_interval


def test_a_judge_of_places():
    found = order_report(place_judge(random_items(1, 20, counts=(4,), orders=8)))
    assert found.flip_rate == pytest.approx(6 / 7) and found.any_flip == 1 and found.first_place_agreement == 0.25
    assert found.exposure[4] == (0.75, -0.25, -0.25, -0.25) and found.balanced == 1
    assert found.score_by_place[4] == pytest.approx((1.5, 0.5, -0.5, -1.5)) and math.isnan(found.relative_spread)
    assert "chosen by place, of 4 (25.0% each is fair): 100.0% 0.0% 0.0% 0.0%" in "\n".join(found.lines())


def test_orders_that_are_not_balanced():
    found = order_report(random_items(1, 12, counts=(3,), orders=2))
    assert found.balanced == 0 and any(
        line.startswith("  only 0.0% of items have every response") for line in found.lines()
    )
    assert not any("only" in line for line in order_report(random_items(1, 12, counts=(3,), orders=3)).lines())


def test_lines():
    lines = order_report([FAITHFUL, FIRST, REFUSED, ONCE], "mine").lines()
    assert lines[0] == "order bias of mine over 2 items in 2 orders (1 refused, 1 left out)"
    assert "another response: 50.0% [0.0%, 100.0%]; not all choose the same: 50.0%" in lines[1]
    assert "mode isolated reads as many tokens as one order" in lines[-1]
    lines = order_report([FAITHFUL], "mine", COST).lines()
    assert "[" not in lines[1]  # one question has no interval
    assert lines[-1] == (
        "  to remove it: isolated reads 1,400 tokens an item, as one order does; permutations 3.0 times, a pass for each "
        "order 8.0 times as many"
    )
    assert "in 2 to 6 orders" in order_report(random_items(0)).lines()[0]
    nothing = order_report([REFUSED, ONCE], "mine")
    assert nothing.lines() == ["order bias of mine: no item has scores in two orders (1 refused, 1 left out)"]
    assert math.isnan(nothing.flip_rate) and nothing.orders == (0, 0)
    with pytest.raises(ValueError, match="nothing to draw"):
        nothing.plot(io.BytesIO())
    assert json.dumps(nothing.to_dict(), allow_nan=False)


def test_dict():
    found = order_report(random_items(0), "mine", COST)
    made = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert set(made) == {field.name for field in dataclasses.fields(found)} - {"item_spreads"}
    assert made["exposure"]["3"] == list(found.exposure[3]) and made["cost"] == COST and made["orders"] == [2, 6]
    assert made["flip_rate"] == found.flip_rate and made["flip_interval"] == list(found.flip_interval)


def test_plot(tmp_path):
    for number, items in enumerate(
        (
            random_items(0),
            place_judge(random_items(0, counts=(4,), orders=4)),
            [FAITHFUL],
            random_items(0, 60, counts=(2, 5, 12)),
        )
    ):
        file = io.BytesIO()
        order_report(items).plot(file)
        picture = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
        blue = (picture == (0x4C, 0x78, 0xA8)).all(axis=2).mean()
        assert picture.shape[1] > 2 * picture.shape[0] > 700 and blue > 0.01, number
    order_report([FIRST]).plot(tmp_path / "orders.svg", format="svg")
    assert "<svg" in (tmp_path / "orders.svg").read_text()


def test_what_is_drawn():
    found = order_report([*random_items(0), FAITHFUL])
    chosen, scored, spread = found._figure().axes
    assert [bar.get_height() for bar in chosen.patches] == pytest.approx(
        [value + 1 / count for count, values in found.exposure.items() for value in values]
    )
    assert [line.get_ydata().tolist() for line in chosen.lines] == [[1 / count] * 2 for count in (2, 3, 4)]
    assert [text.get_text() for text in chosen.texts] == ["N=2", "N=3", "N=4"]
    places = [bar.get_x() + bar.get_width() / 2 for bar in chosen.patches]
    assert places == pytest.approx([0, 1, 3, 4, 5, 7, 8, 9, 10]) == chosen.get_xticks().tolist()
    assert [label.get_text() for label in chosen.get_xticklabels()] == list("121231234")
    heights = [bar.get_height() for bar in scored.patches]
    assert heights == pytest.approx([value for values in found.score_by_place.values() for value in values])
    assert all(line.get_ydata().tolist() == [0, 0] for line in scored.lines)
    assert sum(bar.get_height() for bar in spread.patches) == found.items == 31
    mean, between = (line.get_xdata()[0] for line in spread.lines)
    assert mean == found.spread and between == pytest.approx(found.spread / found.relative_spread)
    # Nothing moves: a scale all the same, and words.
    still = order_report([FAITHFUL])._figure().axes
    assert still[1].get_ylim() == (-1, 1) and still[2].texts[0].get_text() == "no score changes"
    assert len(still[2].lines) == 1 and still[0].texts[:] == []


def test_drawing_leaves_pyplot_alone():
    code = (
        f"import io, sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); from random_judged import judged; import {module.__name__} as m\n"
        "print([n for n in ('torch', 'scipy', 'matplotlib') if n in sys.modules])\n"
        "m.order_report([judged([[1.0, 0.0], [0.0, 1.0]])]).plot(io.BytesIO())\n"
        "print('matplotlib.pyplot' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split("\n")[:2] == ["[]", "False"]

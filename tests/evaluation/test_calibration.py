"""Calibration of judges whose scores are log-odds, against sklearn, torch and cases worked out by hand."""

import dataclasses
import io
import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from random_judged import judged, orders_shuffled, random_items, responses_renamed
from sklearn.metrics import brier_score_loss, log_loss

from yojo.evaluation import calibration as module
from yojo.evaluation.calibration import Figures, calibration
from yojo.evaluation.statistics import wilson


def log_odds_items(seed, size=4000, scale=1.0, counts=(2, 3, 4)):
    """Items whose best response is drawn by softmax(scores / scale)."""
    rng = np.random.default_rng(seed)
    items = []
    for number in range(size):
        scores = rng.normal(0, 1.5, int(rng.choice(counts)))
        probabilities = np.exp(scores) / np.exp(scores).sum()
        best = rng.choice(len(scores), p=probabilities)
        rankings = [1 if n == best else 2 for n in range(len(scores))]
        items.append(judged([scale * scores], number=number, rankings=rankings))
    return items


# ---- figures by hand ----


def test_figures_by_hand():
    # Chances 3/4 and 1/4, twice right, once wrong.
    gap = math.log(3)
    items = [judged([[gap, 0]], number=n, rankings=ranks) for n, ranks in enumerate(([1, 2], [1, 2], [2, 1]))]
    found = calibration(items, bins=2)
    assert found.items == 3 and found.refused == found.alone == 0
    assert found.raw.brier == pytest.approx((2 * 2 / 16 + 2 * 9 / 16) / 3)
    assert found.raw.nll == pytest.approx(-(2 * math.log(3 / 4) + math.log(1 / 4)) / 3)
    assert found.raw.ece == pytest.approx(3 / 4 - 2 / 3)
    low, high = found.bins
    assert (low.count, low.probability, low.frequency) == pytest.approx((3, 1 / 4, 1 / 3))
    assert (high.count, high.probability, high.frequency) == pytest.approx((3, 3 / 4, 2 / 3))
    assert (high.low, high.high) == wilson(2, 3)
    # The best temperature gives 2/3: gap / T = log 2.
    assert found.temperature == pytest.approx(gap / math.log(2), rel=1e-5) and found.at_limit is None


def test_best_responses_share():
    found = calibration([judged([[0, 0, 0]], rankings=[1, 1, 2])])
    assert found.raw.nll == pytest.approx(math.log(3)) and found.raw.brier == pytest.approx(2 / 36 + 1 / 9)
    assert found.raw.ece == pytest.approx(0)  # one bin: 1/3 given, 1/3 of them best
    assert found.at_limit == "none" and math.isnan(found.temperature) and math.isnan(found.scaled.nll)


def test_figures_are_those_of_sklearn():
    items = log_odds_items(0, 300, counts=(2,))
    found = calibration(items)
    probability = [1 / (1 + math.exp(item.scores[0, 0] - item.scores[0, 1])) for item in items]
    second = [item.rankings[1] == 1 for item in items]
    assert found.raw.nll == pytest.approx(log_loss(second, probability))
    assert found.raw.brier == pytest.approx(2 * brier_score_loss(second, probability))


def test_temperature_is_that_of_another_optimiser():
    items = log_odds_items(1, 300, scale=2.5)
    scores = torch.full((300, 4), -1e9, dtype=torch.float64)
    for row, item in zip(scores, items, strict=True):
        row[: item.scores.shape[1]] = torch.tensor(item.scores[0])
    best = torch.tensor([int(item.best.argmax()) for item in items])
    log = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS([log], line_search_fn="strong_wolfe", max_iter=200, tolerance_grad=1e-12)

    def loss():
        optimiser.zero_grad()
        value = torch.nn.functional.cross_entropy(scores / log.exp(), best)
        value.backward()
        return value

    optimiser.step(loss)
    assert calibration(items).temperature == pytest.approx(float(log.detach().exp()), rel=1e-5)


# ---- judges whose probabilities are known ----


@pytest.mark.parametrize("scale", [1.0, 3.0, 1e-6, 1e6])
def test_scores_that_are_log_odds(scale):
    items = log_odds_items(2, scale=scale)
    found = calibration(items)
    # log T has the standard error 1 / sqrt(items x mean variance of the score under its own probabilities).
    variance = 0.0
    for item in items:
        scores = item.scores[0] / scale
        probabilities = np.exp(scores) / np.exp(scores).sum()
        variance += probabilities @ scores**2 - (probabilities @ scores) ** 2
    assert abs(math.log(found.temperature / scale)) < 3 / math.sqrt(variance) < 0.1
    # In a bin, share minus probability has a standard error of sqrt(p (1 - p) / count).
    noise = sum(one.count * math.sqrt(one.probability * (1 - one.probability) / one.count) for one in found.scaled_bins)
    noise /= sum(one.count for one in found.scaled_bins)
    assert found.scaled.ece < 1.3 * noise < 0.025
    assert all(one.low < one.probability < one.high for one in found.scaled_bins[1:-1:4])
    if scale == 1:
        assert found.raw.ece < 1.3 * noise and found.scaled.nll == pytest.approx(found.raw.nll, abs=1e-3)
    if scale == 3:
        assert found.raw.ece > 4 * noise and found.raw.nll > found.scaled.nll + 0.1
    sizes = [one.count for one in found.scaled_bins]
    assert len(sizes) == 15 and max(sizes) < 1.1 * min(sizes)


def test_temperature_is_judged_on_other_questions():
    # Each half wants another temperature, so what one half learns is wrong for the other.
    items = log_odds_items(3, 400)
    found = calibration(items)
    rows = module._Rows(items, "mean")
    first = rows.half(0)
    assert first.sum() == 200
    one, other = calibration([item for item, of in zip(items, first, strict=True) if of]), calibration(
        [item for item, of in zip(items, first, strict=True) if not of]
    )  # fmt: skip
    assert found.scaled.nll == pytest.approx(
        (rows.nll(other.temperature, first) + rows.nll(one.temperature, ~first)) / 2
    )
    assert found.scaled.nll > rows.nll(found.temperature)  # the fit on all items flatters itself
    # Items of one question are in one half.
    same = [dataclasses.replace(item, question=f"q{item.number // 2}") for item in items]
    halves = module._Rows(same, "mean").half(0)
    assert np.array_equal(halves[::2], halves[1::2]) and 190 <= halves.sum() <= 210
    assert not np.array_equal(halves, module._Rows(same, "mean").half(1))


def test_what_has_no_temperature():
    right = [judged([[2.0, 1.0]], number=n) for n in range(4)]
    found = calibration(right)
    assert found.at_limit == "low" and found.temperature == pytest.approx(0.5e-3) and found.scaled.nll < 1e-9
    assert "the lowest tried" in found.lines()[1]
    wrong = [judged([[1.0, 2.0]], number=n) for n in range(4)]
    assert calibration(wrong).at_limit == "high" and "do not tell" in calibration(wrong).lines()[1]
    far = [judged([[0.0, 5000.0]], number=n) for n in range(4)]  # probabilities of 0 whose logarithm is still -5000
    assert calibration(far).raw.nll == pytest.approx(5000)
    one = calibration([judged([[2.0, 1.0]]), judged([[1.0, 2.0]], question="question 0")])
    assert math.isnan(one.scaled.nll) and one.scaled_bins == () and one.raw.nll > 0


def test_what_is_left_out():
    items = [*log_odds_items(4, 20), judged([[1.0]]), judged(None, rankings=[1, 2], refused="too long")]
    found = calibration(items)
    assert (found.items, found.refused, found.alone) == (20, 1, 1)
    assert dataclasses.replace(found, refused=0, alone=0) == calibration(items[:20])
    nothing = calibration(items[20:])
    assert nothing.items == 0 and math.isnan(nothing.raw.ece) and nothing.bins == ()
    assert nothing.lines() == ["calibration: no items (1 refused, 1 of one response)"]
    with pytest.raises(ValueError, match="nothing to draw"):
        nothing.plot(io.BytesIO())
    assert json.dumps(nothing.to_dict(), allow_nan=False)


# ---- orders ----


def test_over_orders():
    item = judged([[2.0, 0.0], [0.0, 2.0]])
    mean, orders = calibration([item]), calibration([item], over="orders")
    assert mean.raw.nll == pytest.approx(math.log(2))
    assert orders.raw.nll == pytest.approx((math.log1p(math.exp(-2)) + math.log1p(math.exp(2))) / 2)
    assert orders.items == 1 and sum(one.count for one in orders.bins) == pytest.approx(2)
    # An item asked in the same order four times weighs what it weighs once.
    items = log_odds_items(5, 60)
    often = [
        dataclasses.replace(item, scores=np.repeat(item.scores, 4, axis=0), orders=item.orders * 4)
        if item.number % 2
        else item
        for item in items
    ]
    found, expected = calibration(often, over="orders"), calibration(items)
    assert found.temperature == pytest.approx(expected.temperature, rel=1e-5)
    assert dataclasses.astuple(found.raw) == pytest.approx(dataclasses.astuple(expected.raw))


# ---- bins ----


def test_bins_are_as_many_as_the_sample_bears():
    for size, expected in ((10, 1), (39, 1), (40, 2), (150, 7), (1000, 15)):
        assert len(calibration(log_odds_items(6, size, counts=(2,))).bins) == expected
    # Equal probabilities are never parted, however many bins there are.
    items = [judged([[math.log(3), 0]], number=n) for n in range(50)]
    assert [one.count for one in calibration(items, bins=10).bins] == [50, 50]
    assert len(calibration(items, bins=1).bins) == 1


# ---- what must change nothing ----


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10**6), over=st.sampled_from(("mean", "orders")))
def test_names_and_sequence_do_not_count(seed, over):
    rng = np.random.default_rng(seed)
    items = random_items(seed, 40)
    other = [orders_shuffled(responses_renamed(item, rng), rng) for item in items]
    other = [other[n] for n in rng.permutation(len(items))]
    expected, found = calibration(items, over), calibration(other, over)
    for name in ("raw", "scaled"):
        assert dataclasses.astuple(getattr(found, name)) == pytest.approx(
            dataclasses.astuple(getattr(expected, name)), rel=1e-4
        )
    assert found.temperature == pytest.approx(expected.temperature, rel=1e-4) and found.at_limit == expected.at_limit
    for one, two in zip(found.bins, expected.bins, strict=True):
        assert dataclasses.astuple(one) == pytest.approx(dataclasses.astuple(two))
    # A constant added to an item's scores says nothing; a factor is a temperature.
    moved = [dataclasses.replace(item, scores=8 * item.scores + rng.integers(-9, 9)) for item in items]
    scaled = calibration(moved, over)
    assert scaled.temperature == pytest.approx(8 * expected.temperature, rel=1e-4)
    assert scaled.scaled.nll == pytest.approx(expected.scaled.nll, rel=1e-4)


def test_what_is_refused():
    for value in (math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match="item 'item 0': scores must be finite"):
            calibration([judged([[1.0, value]])])
    with pytest.raises(ValueError, match='over must be "mean" or "orders", got \'median\''):
        calibration([], over="median")
    with pytest.raises(ValueError, match="bins must be at least 1"):
        calibration([], bins=0)


# ---- for people ----


def test_lines_and_dict():
    found = calibration(log_odds_items(7, 1200, scale=3.0))
    lines = found.lines()
    assert lines[0].startswith("calibration over 1,200 items: ECE 0.") and len(lines) == 3
    assert lines[1].startswith(f"temperature {found.temperature:.4g}") and "other questions: ECE 0.0" in lines[2]
    made = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert made["raw"] == dataclasses.asdict(found.raw) and len(made["bins"]) == 15 and made["at_limit"] is None
    assert Figures(**made["scaled"]) == found.scaled


def test_plot(tmp_path):
    found = calibration(log_odds_items(8, 500, scale=3.0))
    file = io.BytesIO()
    found.plot(file)
    picture = np.asarray(Image.open(io.BytesIO(file.getvalue())).convert("RGB"))
    assert picture.shape[0] > 300 and len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    found.plot(tmp_path / "diagram.svg", format="svg")
    assert "<svg" in (tmp_path / "diagram.svg").read_text()
    calibration(log_odds_items(8, 1)).plot(io.BytesIO())  # no halves


def test_what_is_drawn():
    found = calibration(log_odds_items(8, 500, scale=3.0))
    for axis, bins, figures in zip(
        found._figure().axes, (found.bins, found.scaled_bins), (found.raw, found.scaled), strict=True
    ):
        diagonal, points = axis.lines[0], axis.containers[0].lines[0]
        assert diagonal.get_xydata().tolist() == [[0, 0], [1, 1]]
        assert points.get_xdata().tolist() == [one.probability for one in bins]
        assert points.get_ydata().tolist() == [one.frequency for one in bins]
        (bars,) = axis.containers[0].lines[2]
        ends = np.array([segment[:, 1] for segment in bars.get_segments()])
        assert ends == pytest.approx(np.array([[one.low, one.high] for one in bins]))
        assert f"ECE {figures.ece:.3f}" in axis.texts[0].get_text()
    alone = calibration(log_odds_items(8, 1))._figure().axes
    assert alone[1].texts[0].get_text() == "too few questions" and alone[1].containers == []


def test_importing_loads_nothing_heavy():
    code = f"import sys, {module.__name__}; print([n for n in ('torch', 'scipy', 'matplotlib') if n in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"

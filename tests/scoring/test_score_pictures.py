"""The picture of scores: what its panels are drawn from, and that no number of rows fills the memory."""

import numpy as np
import pytest
from chosen_cases import write_scores
from data_cases import write_lines
from PIL import Image
from scipy import stats

from yojo.scoring import choose, report


def row_of(scores):
    return {"scores": scores, "order": sorted(range(len(scores)), key=lambda at: (-scores[at], at))}


def test_what_the_panels_are_drawn_from():
    figures = report.Figures()
    figures.add(row_of([1.0, 4.0, 2.0]), ["a", "bbbb", "cc"])
    figures.add(row_of([3.0]), ["ddd"])
    assert figures.margins.values().tolist() == [[2.0, 3.0]]
    assert (figures.rows, figures.alone) == (2, 1)
    expected = [[1, 1, -4 / 3, -4 / 3], [4, 4, 5 / 3, 5 / 3], [2, 2, -1 / 3, -1 / 3], [3, 3, 0, 0]]
    assert np.allclose(figures.responses.values(), expected)


def test_a_sample_is_fair_bounded_and_the_same_every_time():
    lots = [report._Lot(500, 1, seed) for seed in (0, 0, 1)]
    for value in range(40_000):
        for lot in lots:
            lot.add((value,))
    one, again, other = (lot.values()[:, 0] for lot in lots)
    assert np.array_equal(one, again) and not np.array_equal(one, other)
    assert len(set(one)) == 500 and lots[0].count == 40_000 and len(lots[0]._new) < report._CHUNK
    assert stats.kstest(one / 40_000, "uniform").pvalue > 1e-3
    small = report._Lot(500, 1, 0)
    for value in range(300):
        small.add((value,))
    assert small.values()[:, 0].tolist() == list(range(300))


def test_the_rank_correlation_is_scipys():
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, 9, 200), rng.integers(0, 9, 200)
    assert abs(report.spearman(one, other + one) - stats.spearmanr(one, other + one).statistic) < 1e-12
    assert np.isnan(report.spearman(one, np.ones(200)))


@pytest.mark.parametrize("case", ["varied", "one response each", "all the same"])
def test_a_picture_is_drawn(tmp_path, case):
    rng = np.random.default_rng(0)
    counts = {"varied": rng.integers(1, 6, 60)}.get(case, [1] * 3 if case == "one response each" else [2] * 3)
    same = case == "all the same"
    records = [{"prompt": f"{i}", "responses": ["w" * (9 if same else int(rng.integers(1, 900))) for _ in range(count)]}
               for i, count in enumerate(counts)]  # fmt: skip
    scores = [[1.0 if same else rng.normal() for _ in range(count)] for count in counts]
    source = write_lines(tmp_path / "d$1.jsonl", records)
    path, out = write_scores(tmp_path / "s.jsonl", source, scores), tmp_path / "pictures" / "o.png"
    assert report.report(path, out) == out
    pixels = np.asarray(Image.open(out).convert("L"))
    assert pixels.shape[1] > 2 * pixels.shape[0] and all(third.std() > 5 for third in np.array_split(pixels, 3, axis=1))
    assert [file.name for file in out.parent.iterdir()] == ["o.png"]


def test_commands_draw_what_the_function_draws(tmp_path, monkeypatch):
    """Whichever passes they make: anew with other prompts, by groups, or for a share."""
    records = [
        {"prompt": "a", "responses": ["x", "yy"]},
        {"prompt": [{"role": "user", "content": "b"}], "responses": ["z"]},
    ]
    source = write_lines(tmp_path / "d.jsonl", records)
    path = write_scores(tmp_path / "s.jsonl", source, [[1, 2], [3]])
    drawn = []

    def draw(self, out, title):
        drawn.append((self.rows, self.alone, self.responses.values().tolist(), self.margins.values().tolist(), title))

    monkeypatch.setattr(report.Figures, "draw", draw)
    report.report(path, tmp_path / "o.png")
    for function, options in (
        (choose.best, {}), (choose.best, {"by": "prompt"}), (choose.pairs, {}), (choose.filter_, {"min_score": 0}),
        (choose.filter_, {"top_share": 0.5}), (choose.filter_, {"top_share": 0.5, "responses": True}),
    ):  # fmt: skip
        function(path, tmp_path / "o.jsonl", report=tmp_path / "o.png", overwrite=True, **options)
    assert len(drawn) == 7 and all(one == drawn[0] for one in drawn) and drawn[0][:2] == (2, 1)


def test_a_few_far_values_do_not_squeeze_the_others():
    values = np.linspace(0, 1, 5000)
    assert report._range(values) == (0.0, 1.0, "")
    low, high, said = report._range(np.append(values, [500.0, -500.0]))
    assert -1 < low < 0 and 1 < high < 2 and said == " (beyond the ends: 2)"
    assert report._range(np.ones(9)) == (1.0, 1.0, "")

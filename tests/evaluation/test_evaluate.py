"""`yojo.evaluate`: judges on benchmarks from the record to the report, scores made elsewhere, and what is refused."""

import base64
import dataclasses
import gc
import importlib.util
import json
import math
import re
import weakref
import xml.dom.minidom

import numpy as np
import pytest
from benchmark_cases import CASES, made, opened, records_of, write, write_media
from cases import Constants, Items, Leaning, items

import yojo
from yojo.data import DataError
from yojo.evaluation import tables
from yojo.evaluation.evaluate import BadItems, evaluate
from yojo.evaluation.figures import Values, compare, figures, misses
from yojo.evaluation.given import given_scores
from yojo.evaluation.report import verdict_of
from yojo.evaluation.statistics import wilson
from yojo.inputs.digests import example_key
from yojo.judges import Length, Place, Random, Refusal
from yojo.scoring.scorer import Load


@pytest.fixture(params=CASES)
def known(request, tmp_path):
    return made(request.param, tmp_path)


# ---- whole evaluations ----


def test_the_first_place_gets_its_share_of_every_benchmark(known, tmp_path):
    """In K = N orders every response stands first once, 1/N for each best one, and in 6 of 3 in half the orders before another."""
    for size in {len(known.light(n).rankings) for n in range(len(known))}:
        report = evaluate(Place(), known, orders=6 if size == 3 else size, draws=20)
        (verdict,) = report.judges
        some = [one for one in verdict.judged if len(one.rankings) == size]
        values = Values.of(some)
        assert np.allclose(values.top1, [one.best.sum() / size for one in some], rtol=0, atol=1e-15)
        assert np.allclose(values.averaged, [one.best.sum() / size for one in some])  # all tie
        if size != 5:
            assert np.allclose(values.pairs[0] / values.pairs[1], 0.5)


def test_a_report_of_every_benchmark(known, tmp_path):
    judges = {"longest": Length(), "first": Place(), "chance": Random()}
    report = evaluate(judges, known, orders=2, draws=20)
    official = {verdict.name: dict(known.benchmark.official(verdict.judged)) for verdict in report.judges}
    assert {verdict.name: verdict.figures.official for verdict in report.judges} == official
    longest, baseline = report.judges[0].figures, report.baselines[0].figures
    assert longest.official == baseline.official and longest.estimates["top1"].value == baseline.estimates["top1"].value
    for verdict in report.judges:
        own = verdict.figures
        assert own.headline.value == own.official[known.benchmark.headline]
        assert math.isclose(
            sum(one["top1"].value * one["top1"].count for one in own.groups.values()),
            own.estimates["top1"].value * own.items,
        )
        for one in [own.headline, *own.estimates.values()]:
            assert math.isnan(one.low) or one.low - 1e-9 <= one.value <= one.high + 1e-9
    text = report.markdown()
    assert text.startswith(f"# {known.benchmark.title}\n") and "nan" not in text
    for lines in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):  # every row of a table has as many cells
        assert len({line.count("|") for line in lines.splitlines()}) == 1
    assert not [line for line in report.lines() if "nan" in line]
    json.dumps(report.to_dict(), allow_nan=False)


def test_a_report_in_a_folder(tmp_path):
    made_up = made("mmrb2", tmp_path)
    report = evaluate({"first": Place(), "chance": Random()}, made_up, out=tmp_path / "out", orders=2, draws=20)
    assert sorted(path.name for path in (tmp_path / "out").glob("[!.]*")) == [
        "chance.jsonl", "first.jsonl", "report.html", "report.json", "report.md",
    ]  # fmt: skip
    found = json.loads((tmp_path / "out/report.json").read_text(), parse_constant=pytest.fail)
    assert found == json.loads(json.dumps(report.to_dict()))
    assert [judge["name"] for judge in found["judges"]] == ["first", "chance"] and len(found["comparisons"]) == 1
    page = (tmp_path / "out/report.html").read_text()
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page) and page.count("<h2>") == 8


def test_a_report_needs_nothing_from_elsewhere(tmp_path):
    records = records_of("vl-rewardbench")
    records[0]["query"] = "<script>alert(1)</script> & <b>what</b>?"
    items = opened("vl-rewardbench", write(records, write_media(tmp_path)))
    page = evaluate({"a <b> & c": Length(shortest=True)}, items).html(items)
    assert "<script" not in page and "&lt;script&gt;alert(1)&lt;/script&gt; &amp; &lt;b&gt;what" in page
    assert "a &lt;b&gt; &amp; c" in page
    assert set(re.findall(r'(?:src|href)="([a-z]+:[a-z]+/)', page)) == {"data:image/"}
    assert "data:image/jpeg;base64," in page  # what the misses show


@pytest.mark.parametrize(
    "name", ["a$\\foo$b", "a|b", "a\nb\u2028c", "\x1b[31m", "\ud83d", "\\$x$", "\U0001f98a" * 20], ids=range(7)
)
def test_names_may_be_anything(tmp_path, name):
    made = items(8)
    made[:] = [dataclasses.replace(one, group=f"{name} {one.group}", id=f"{one.id} {name}") for one in made]
    report = evaluate({name: Leaning(), "other": Constants()}, made, out=tmp_path / "out", draws=20)
    for line in report.lines():
        assert line.isprintable()
    for rows in re.findall(r"(?:^\|.*\n)+", (tmp_path / "out/report.md").read_text(), re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)(?:\\\\)*\|", row)) for row in rows.splitlines()}) == 1
    for picture in re.findall(r"image/svg\+xml;base64,([^\"]*)", (tmp_path / "out/report.html").read_text()):
        xml.dom.minidom.parseString(base64.b64decode(picture))
    assert json.loads((tmp_path / "out/report.json").read_text())["judges"][0]["name"] == name


def test_tables_fit_a_terminal_and_say_their_units():
    names = ["a long name of a judge", "b#permutations=4", "c", "d"]
    report = evaluate({name: Leaning() for name in names}, items(8), draws=20)
    lines = list(report.lines())
    assert max(map(len, lines[: lines.index("Orders")])) <= 120
    ranks = lines[lines.index("Rankings") + 1 : lines.index("Judges compared") - 1]
    ranks = ranks[: ranks.index("Groups") - 1] if "Groups" in ranks else ranks
    assert ranks[0].startswith("  Percent, but Kendall's tau-b") and ranks.count("") > 0
    assert [line.split()[1:] for line in ranks if line.startswith("  judge")][-1][-2:] == ["orders", "averaged"]
    for name in names:
        assert len([line for line in ranks if line.startswith(f"  {name} ")]) == ranks.count("") + 1


def test_what_is_no_judge_is_said_before_anything_is_read():
    with pytest.raises(TypeError, match=r"judge mine must have score_many\(examples\).*got function"):
        evaluate({"mine": lambda examples: []}, items(2))


@pytest.mark.parametrize(("count", "is_shown"), [(8, False), (60, True)])
def test_no_calibration_error_of_one_bin(count, is_shown):
    """The probabilities of an item sum to one, and so do its shares of the best: one bin has no error, whatever the scores."""
    report = evaluate(Leaning(), items(count), draws=20)
    (found,) = (rows for title, _, _, rows in tables.tables(report) if title == "Calibration")
    assert (found[0][2] != "-") is is_shown and found[0][3] != "-"


def test_zero_has_no_sign():
    assert [tables.number(value) for value in (-0.0, -0.0004, -0.0006)] == ["0.000", "0.000", "-0.001"]
    assert tables.percent(-0.0004) == "0.0" and tables.number(float("nan")) == tables.percent(None) == "-"


def test_names_are_no_markup_of_a_markdown_report():
    made = items(8)
    made[:] = [dataclasses.replace(one, group=f"{one.group} <img src=x> [a](b)") for one in made]
    text = evaluate({"`a` <b>": Leaning()}, made, draws=20).markdown()
    assert not re.findall(r"(?<!\\)[<`\[]", text)
    assert "| a \\<img src=x> \\[a](b) |" in text and "\n- \\`a\\` \\<b>: " in text


def test_lists_that_are_cut_say_so(tmp_path):
    class Choosy(Leaning):
        def score_many(self, examples):
            return [Refusal(f"no {e.prompt}") for e in examples]

    made = Items(dataclasses.replace(one, group=f"g{one.number}") for one in items(124))
    for one in made[60:]:
        picture = dataclasses.replace(one.example, images=["none.png"])
        made[one.number] = dataclasses.replace(one, example=picture)
    page = evaluate({"a": Choosy()}, made, skip_bad=True, draws=20).html()
    assert page.startswith("<!doctype html>")
    assert page.count("<li>q") == 50 and "10 more are not shown." in page  # refused
    assert page.count("none.png") == 50 and "14 more are not shown." in page  # left out
    picture = base64.b64decode(re.findall(r'By group" src="data:image/svg\+xml;base64,([^"]*)', page)[0]).decode()
    assert "36 smaller groups are in the table alone" in picture


def test_records_that_are_left_out_are_listed_on_the_page(tmp_path):
    records = records_of("vl-rewardbench")
    records[3].pop("query")
    opened_anyway = opened("vl-rewardbench", write(records, write_media(tmp_path)), skip_bad=True)
    page = evaluate("length", opened_anyway, draws=20).html()
    assert "<h2>Records that cannot be judged</h2>" in page and "<li>data.jsonl:4: no query" in page


def test_a_report_is_the_same_however_its_scores_came_about(tmp_path):
    items = made("vl-rewardbench", tmp_path)
    whole = evaluate({"leaning": Leaning()}, items, out=tmp_path / "a", orders=2, seed=5)
    for number in (1, 0):
        assert evaluate({"leaning": Leaning()}, items, out=tmp_path / "b", orders=2, seed=5, shard=(number, 2)) is None
    again = evaluate({"leaning": Leaning()}, items, out=tmp_path / "b", orders=2, seed=5, workers=1)
    assert (tmp_path / "a/leaning.jsonl").read_bytes() == (tmp_path / "b/leaning.jsonl").read_bytes()
    one, other = (report.to_dict() for report in (whole, again))
    for found in (one, other):
        found["made"].pop("date")
        found.pop("files")
    assert one == other


def test_scores_made_elsewhere_get_the_same_figures(tmp_path):
    items = made("rewardbench2", tmp_path)
    own = evaluate({"ours": Leaning()}, items, out=tmp_path / "out", orders=3, draws=20)
    report = evaluate(None, items, draws=20, judge_scores={"theirs": tmp_path / "out/ours.jsonl"})
    assert repr(report.judges[0].figures) == repr(own.judges[0].figures)
    both = evaluate(
        {"ours": Leaning()}, items, orders=3, draws=20, judge_scores={"theirs": tmp_path / "out/ours.jsonl"}
    )
    (one,) = both.comparisons
    assert (one.difference.value, one.difference.p, one.mcnemar.only_a, one.agreement.same_choice) == (0, 1, 0, 1)


def test_refusals_count_as_wrong(tmp_path):
    class Refusing(Length):
        def score_many(self, examples):
            found = super().score_many(examples)
            return [Refusal("no") if "How many" in str(e.prompt) else s for e, s in zip(examples, found, strict=True)]

        def fingerprint(self):
            return {"judge": "refusing"}

    items = made("vl-rewardbench", tmp_path)
    whole, some = (evaluate(judge, items).judges[0] for judge in (Length(), Refusing()))
    assert "Refusing: 1 of 7 items refused, and wrong; the first, " in "\n".join(evaluate(Refusing(), items).lines())
    assert some.figures.refused == 1 and some.figures.items == whole.figures.items == 7
    (right,) = [one for one in whole.judged if one.number == 2]
    assert math.isclose(
        7 * (whole.figures.estimates["top1"].value - some.figures.estimates["top1"].value),
        float(np.argmax(right.mean) == np.argmin(right.rankings)),
    )


# ---- what is refused ----


def test_a_missing_image_is_named_and_the_rest_is_kept(tmp_path):
    items = made("vl-rewardbench", tmp_path)
    (tmp_path / "images/b.png").unlink()
    with pytest.raises(BadItems, match=r"3 items have no scores .*kept in .*out") as error:
        evaluate({"length": Length()}, items, out=tmp_path / "out")
    assert "length: item 1 (RLHF_2): example 'data.jsonl:2': image 0: no such file" in str(error.value)
    assert [row[1] for row in error.value.bad] == [1, 3, 5]
    report = evaluate({"length": Length()}, items, out=tmp_path / "out", skip_bad=True)
    assert report.judges[0].figures.items == 4 and len(report.judges[0].left_out) == 3
    assert any("left out" in line for line in report.lines()) and "no such file" in report.html(items)


def test_what_can_be_known_before_is_said_before_anything_is_judged(tmp_path):
    judge, made = Leaning(), items()
    file = lines(tmp_path / "s.jsonl", [{"row": 0, "scores": [1, 2]}])
    for options in ({"draws": 0}, {"seed": -1}, {"judge_scores": {"theirs": file}}):
        with pytest.raises(ValueError, match="draws|seed|theirs|no scores for 23 of 24 items"):
            evaluate({"ours": judge}, made, **options)
    assert not judge.calls


def test_there_is_no_report_while_items_are_bad(tmp_path):
    made = made_up = items()
    evaluate({"ours": Leaning()}, made, out=tmp_path / "out", draws=20)
    made_up[3] = dataclasses.replace(
        made[3], example=yojo.Example("p", ["a", "b"], images=["none.png"], rankings=[1, 2])
    )
    with pytest.raises(BadItems):
        evaluate({"ours": Leaning()}, made_up, out=tmp_path / "out", draws=20)
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == ["ours.jsonl"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r[1].update(human_ranking=[0, 0]), r"data\.jsonl:2': human_ranking"),
        (lambda r: r[2].update(response=["same", "same"]), r"data\.jsonl:3': .*same"),
        (lambda r: r[3].pop("query"), r"data\.jsonl:4': no query"),
    ],
)
def test_bad_records_are_named(tmp_path, change, message):
    records = records_of("vl-rewardbench")
    change(records)
    data = write(records, write_media(tmp_path))
    with pytest.raises(DataError, match=message):
        evaluate("length", "vl-rewardbench", data, partial=True)
    report = evaluate("length", "vl-rewardbench", data, partial=True, skip_bad=True)
    assert len(report.benchmark["bad"]) == 1 and report.benchmark["items"] == 6
    assert any("1 records of it cannot be judged" in line for line in report.lines())


def test_another_version_is_named(tmp_path):
    data = write(records_of("vl-rewardbench"), write_media(tmp_path))
    with pytest.raises(DataError, match="general: 183 published, 2 found.*another version"):
        evaluate("length", "vl-rewardbench", data)
    lines = list(evaluate("length", "vl-rewardbench", data, partial=True).lines())
    assert "not the published benchmark: 2 items of general, 183 published" in lines


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((None, items()), {}, "there is no judge"),
        (({"a": Length(), "A ": Length()}, items()), {"judge_scores": {"a": "f"}}, "a name stands for two judges: a, A , a"),
        (({"a b": Length(), "a/b": Length()}, items()), {"out": "o"}, "two judges would both be called a-b"),
        (({"report": Length()}, items()), {"out": "o"}, "no judge can be called report"),
        (({"": Length()}, items()), {}, "judges must have names"),
        (("length", "vl-rewardbench"), {}, "data is missing: .*hub"),
        (("length", "vl-rewardbank", "x"), {}, "did you mean vl-rewardbench"),
        (("length", items(), "x"), {}, "the benchmark is open already"),
        (("length", items()), {"image_root": "x"}, "the benchmark is open already"),
        (("length", items()), {"shard": (0, 2)}, "shards are put together from a folder"),
        (("length", items()), {"shard": (2, 2), "out": "o"}, "shard must be number/count"),
        (("length", items()), {"shard": (0, 2), "out": "o", "resume": False}, "removes what other shards have scored"),
        (("lengthy", items()), {}, "lengthy"),
        ((Leaning(), items()), {"orders": 0}, "orders must be an int of at least 1"),
        (("length", items()), {"orders": 0}, "orders must be an int of at least 1"),
        (("length", items()), {"out": __file__}, "test_evaluate.py is a file, and scores and the report go into a folder"),
        (("length", items()), {"out": f"{__file__}/x"}, "test_evaluate.py is a file, and scores"),
        ((Leaning(), items()), {"draws": 0}, "draws must be an int of at least 1, got 0"),
        ((Leaning(), items()), {"seed": -1}, "seed must be an int of at least 0, got -1"),
        (({"x" * 201: Leaning()}, items()), {"out": "o"}, r"xxx\.\.\. is too long a name for a file of scores"),
        ((Leaning(), type(items())()), {}, "there are no items"),
    ],
)  # fmt: skip
def test_wrong_arguments(arguments, options, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((TypeError, ValueError), match=message):
        evaluate(*arguments, **options)


def test_what_is_not_installed_is_said_before_a_judge_is_asked(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "jinja2" else True)
    judge = Constants()
    with pytest.raises(ImportError, match=r"evaluation needs jinja2: pip install 'yojo\[eval\]'"):
        evaluate(judge, items())
    assert not judge.calls


@pytest.mark.parametrize(
    ("name", "message"),
    [("./none", "no such folder: ./none"), ("random:x", "is no baseline"), ("openai:m", "must be openai:MODEL@"), (".#up", "behind #")],
)  # fmt: skip
def test_a_name_that_is_no_judge_is_said_before_another_one_is_asked(name, message):
    judge = Constants()
    with pytest.raises(ValueError, match=message):
        evaluate({"ours": judge, "theirs": name}, items())
    assert not judge.calls


# ---- scores made elsewhere ----


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_scores_are_matched_by_row_by_id_and_by_ids_that_repeat(tmp_path):
    made = items(14)  # two items of every id
    by_row = [{"row": n, "scores": [float(n + k) for k in range(len(made[n].rankings))]} for n in range(14)]
    expected = [one.scores.tolist() for one in given_scores(lines(tmp_path / "r.jsonl", by_row[::-1]), made)]
    by_id = [{"id": made[n].id, "scores": by_row[n]["scores"]} for n in range(14)]
    assert [one.scores.tolist() for one in given_scores(lines(tmp_path / "i.jsonl", by_id), made)] == expected
    nested = [{"row": n, "scores": [row["scores"]]} for n, row in enumerate(by_row)]
    assert [one.scores.tolist() for one in given_scores(lines(tmp_path / "n.jsonl", nested), made)] == expected
    refused = [*by_row[:3], {"row": 3, "scores": None, "refused": "no"}, *by_row[4:]]
    assert given_scores(lines(tmp_path / "f.jsonl", refused), made)[3].refused == "no"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.pop(), "has no scores for 1 of 14 items, the first of them item 13"),
        (lambda r: r.append(r[0]), r"s\.jsonl:15: item 0 has scores already"),
        (lambda r: r[1].update(row=14), r"s\.jsonl:2: row must be an int from 0 to 13, got 14"),
        (lambda r: r[1].update(row=True), "row must be an int"),
        (lambda r: r[1].update(id="q5"), r"s\.jsonl:2: row 1 of the benchmark is 'q1', the id here is 'q5'"),
        (lambda r: r[1].update(id="q99"), r"s\.jsonl:2: row 1 of the benchmark is 'q1', the id here is 'q99'"),
        (lambda r: r[1].pop("row"), "neither row nor id"),
        (lambda r: (r[1].pop("row"), r[1].update(id="q99")), "the benchmark has no item 'q99'; its ids are such as '"),
        (lambda r: r[1]["scores"].pop(), "scores must be 4 finite numbers"),
        (lambda r: r[1].update(scores=[1, 2, 3, None]), "scores must be 4 finite numbers"),
        (lambda r: r[1].update(scores=[True] * 4), "scores must be 4 finite numbers"),
        (lambda r: r[1].update(scores=[1, 2, 3, float("inf")]), r"s\.jsonl:2"),
        (lambda r: r[1].update(scores=[1, 2, 3, 1e39]), "scores must be 4 finite numbers"),
        (lambda r: r[1].update(scores=[1, 2, 3, -(10**400)]), "scores must be 4 finite numbers"),
        (lambda r: r[1].update(scores=[[1, 2, 3, 4], 5], orders=[[0, 1, 2, 3]] * 2), "scores must be 4 finite numbers"),
        (lambda r: r[1].update(orders=1), "orders must be 1 orders of 0..3, got 1"),
        (lambda r: r[1].update(orders=[3]), r"orders must be 1 orders of 0..3, got \[3\]"),
        (lambda r: r[1].update(orders=[[0, 1, 2, "3"]]), "orders must be 1 orders of 0..3"),
        (lambda r: r[1].update(scores="1234"), "scores must be a list of 4 numbers"),
        (lambda r: r[1].update(scores=[[1, 2, 3, 4]] * 2), "scores for 2 orders, and no orders"),
        (lambda r: r[1].update(scores=[[1, 2, 3, 4]] * 2, orders=[[0, 1, 2, 3]] * 3), "orders must be 2 orders of 0..3"),
        (lambda r: r[1].update(scores=[[1, 2, 3, 4]], orders=[[0, 1, 2, 2]]), "orders must be 1 orders of 0..3"),
        (lambda r: r[1].update(refused="no"), "it has scores and refused"),
    ],
)  # fmt: skip
def test_scores_that_do_not_fit(tmp_path, change, message):
    made = items(14)
    rows = [{"row": n, "scores": [float(k) for k in range(len(made[n].rankings))]} for n in range(14)]
    change(rows)
    with pytest.raises(ValueError, match=message):
        given_scores(lines(tmp_path / "s.jsonl", rows), made)


def test_scores_of_another_version_of_a_benchmark_are_refused(tmp_path):
    made, replaced, longer = items(14), items(14), items(14)
    evaluate({"ours": Constants()}, made, out=tmp_path, draws=20)
    file = tmp_path / "ours.jsonl"
    assert len(given_scores(file, made)) == 14
    replaced[3] = dataclasses.replace(made[3], example=dataclasses.replace(made[3].example, prompt="something else?"))
    with pytest.raises(ValueError, match=r"ours\.jsonl:4: item 3 \('q3'\) was scored with another prompt"):
        given_scores(file, replaced)
    texts = [*made[3].example.responses[:-1], "x" * 99]
    longer[3] = dataclasses.replace(made[3], example=dataclasses.replace(made[3].example, responses=texts))
    with pytest.raises(ValueError, match=r"ours\.jsonl:4: item 3 \('q3'\) was scored with responses of .* characters"):
        given_scores(file, longer)


def test_rows_under_other_ids_are_known_by_their_key(tmp_path):
    made = items(14)
    rows = [
        {"row": n, "id": f"elsewhere:{n}", "scores": [0.0] * len(one.rankings), "key": example_key(one.example)}
        for n, one in enumerate(made)
    ]
    assert len(given_scores(lines(tmp_path / "s.jsonl", rows), made)) == 14
    rows[4]["key"] = rows[5]["key"]
    with pytest.raises(ValueError, match=r"s\.jsonl:5: row 4 of the benchmark is 'q4', the id here is 'elsewhere:4'"):
        given_scores(lines(tmp_path / "s.jsonl", rows), made)


def test_labels_are_those_that_the_benchmark_has_now(tmp_path):
    made, relabelled = items(14), items(14)
    evaluate({"ours": Constants()}, made, out=tmp_path, draws=20)
    ranks = made[3].rankings[::-1]
    relabelled[3] = dataclasses.replace(made[3], example=dataclasses.replace(made[3].example, rankings=ranks))
    assert list(given_scores(tmp_path / "ours.jsonl", relabelled)[3].rankings) == ranks
    again = evaluate({"ours": Constants()}, relabelled, out=tmp_path, draws=20)
    assert list(again.judges[0].judged[3].rankings) == ranks


# ---- figures ----


def said(number, scores, rankings=(1, 2, 2), question=None, group="g"):
    from yojo.evaluation.judged import Judged

    orders = tuple(tuple(np.roll(range(len(rankings)), k)) for k in range(len(scores or [0])))
    array = None if scores is None else np.array(scores, dtype=np.float64)
    refused = None if scores is not None else "no"
    return Judged(number, f"i{number}", question or f"q{number}", group, rankings, [3, 2, 1], orders, array, refused)


def test_figures_by_hand():
    judged = [
        said(0, [[2, 1, 0], [0, 1, 2]], group="a"),  # right, wrong: of its two pairs 2 and 0 right; the mean ties all
        said(1, [[1, 1, 0], [3, 1, 1]], group="a"),  # tied, right: pairs 1.5 and 2; mean 2, 1, .5
        said(2, None, group="b", question="q1"),
        said(3, [[1, 0, 0]], (1, 2, 3), group="b"),  # right; pairs 1.5 + ... of 3: 2 right and a tie
    ]
    found = figures(judged)
    own = {name: one.value for name, one in found.estimates.items()}
    assert own["top1"] == (0.5 + 0.75 + 0 + 1) / 4 and own["top1_strict"] == (0.5 + 0.5 + 0 + 1) / 4
    assert own["tied"] == 0.5 / 4 and own["macro"] == (0.625 + 0.5) / 2
    assert own["pairwise"] == (1 + 1.75 + 0 + 2.5) / 9 and own["pairwise_strict"] == (1 + 1.5 + 0 + 2) / 9
    assert own["averaged"] == (1 / 3 + 1 + 0 + 1) / 4 and own["averaged_pairwise"] == (1 + 2 + 0 + 2.5) / 9
    assert own["acc_plus"] == 1 / 3  # q0 is right in one order, q1 has a refusal
    assert found.refused == 1 and found.items == 4 and found.questions == 3
    assert found.groups["a"]["top1"].value == 0.625 and found.groups["b"]["top1"].count == 2
    assert found.estimates["kendall_tau"].count == 3


def test_where_all_is_right_the_interval_is_not_a_point():
    right = [said(n, [[2, 1, 0]], (1, 2, 3)) for n in range(10)]
    found = figures(right)
    low, high = wilson(10, 10)
    for name in ("top1", "top1_strict", "macro", "pairwise", "acc_plus"):
        one = found.estimates[name]
        assert (one.value, one.low, one.high) == (1.0, low, high) and 0.6 < low < 0.8
    assert (found.estimates["tied"].value, found.estimates["tied"].low) == (0, 0) and 0.2 < found.estimates[
        "tied"
    ].high < 0.4
    assert math.isnan(found.smallest) and math.isnan(figures(right[:1]).estimates["top1"].low)
    half = figures([said(n, [[2, 1, 0], [0, 1, 2]]) for n in range(10)]).estimates["top1"]
    assert (half.value, half.low, half.high) == (0.5, 0.5, 0.5)  # of every item, by its orders


def test_a_list_of_examples_is_a_benchmark():
    examples = [yojo.Example(f"q{n}?", ["short", "a long one"], rankings=[2, 1], id=f"e{n}") for n in range(6)]
    report = evaluate("length", examples, draws=20)
    assert report["length"].figures.estimates["top1"].value == 1 and report.benchmark["name"] == "examples"
    assert [one.id for one in report["length"].judged] == [f"e{n}" for n in range(6)]
    for ranks in (None, [1, 1]):
        tied = [*examples, yojo.Example("p", ["a", "b"], rankings=ranks, id="last")]
        with pytest.raises(ValueError, match="example 'last': its rankings must tell at least two responses apart"):
            evaluate("length", tied)
    with pytest.raises(TypeError, match="examples must be yojo.Example objects, got str at place 0"):
        evaluate("length", ["p"])


def test_a_report_is_printed_and_gives_its_judges():
    report = evaluate({"ours": Constants()}, items(), draws=20)
    assert str(report).splitlines() == list(report.lines()) and report["ours"] is report.judges[0]
    assert repr(report).startswith("<Report on made-up: <ours: 0.") and len(repr(report)) < 100
    assert report["longest (baseline)"].is_baseline
    with pytest.raises(KeyError, match="there is no judge 'theirs'; there are ours"):
        report["theirs"]


def test_misses_by_hand():
    judged = [
        said(0, [[0, 4, 1]]),  # by 4
        said(1, [[3, 1, 0]]),  # none
        said(2, [[0, 1, 9]]),  # by 9, response 2
        said(3, [[1, 1, 1]]),  # a tie is no miss
        said(4, None),
        said(5, [[0, 1, 2]], (1, 1, 1)),
    ]
    found = misses(judged)
    assert [(one.number, chosen) for one, _, chosen in found] == [(2, 2), (0, 1)]
    unit = np.median([one.mean.std() for one in judged if one.scores is not None])
    assert [margin * unit for _, margin, _ in found] == [9, 4]
    assert len(misses(judged, 1)) == 1


def test_judges_are_compared_on_what_both_were_asked():
    first = [said(n, [[1, 0, 0]]) for n in range(6)]
    second = [said(n, [[0, 1, 0]]) for n in range(2, 8)]
    found = compare(first, second, ("a", "b"))
    assert (found.items, found.difference.value, found.mcnemar.only_a, found.agreement.same_choice) == (4, 1.0, 4, 0.0)
    known = Values.of(first), Values.of(second)
    assert compare(first, second, ("a", "b"), values=known) == found
    assert compare(first[::-1], second, ("a", "b")).mcnemar == found.mcnemar
    with pytest.raises(ValueError, match="a and b have no item in common"):
        compare(first[:2], second, ("a", "b"))


def test_mcnemar_sees_the_first_order_alone():
    turned = [[2, 1, 0], [0, 1, 2], [0, 1, 2]]  # right in the first order, wrong in the others
    first = [said(n, turned) for n in range(5)]
    second = [said(n, turned[::-1]) for n in range(4)] + [said(4, [[3, 3, 0]] * 3)]  # wrong; a tie is, too
    found = compare(first, second).mcnemar
    assert (found.only_a, found.only_b) == (5, 0)


def test_the_cost_is_that_of_an_item_on_average():
    known = [dataclasses.replace(said(n, [[2, 1, 0], [0, 1, 2]]), tokens=(100 * n, 30)) for n in (1, 3)]
    report = verdict_of("ours", [*known, said(4, [[2, 1, 0], [0, 1, 2]])], draws=20)
    cost = {"one_order": 230.0, "isolated": 230.0, "permutations": 260.0, "separate_orders": 460.0}
    assert report.order.cost == cost


def test_one_model_is_there_at_a_time():
    there = weakref.WeakSet()

    class Loaded(Load):
        def __call__(self, device=None):
            gc.collect()
            assert not there
            judge = Constants()
            there.add(judge)
            return judge

    evaluate({"a": Loaded("length"), "b": Loaded("random")}, items(4), draws=20)


# ---- order bias ----


def test_order_bias_needs_no_labels():
    examples = [yojo.Example(f"q{n}?", [f"a{n}", f"b{n}", f"c{n}"]) for n in range(12)]
    report = yojo.order_bias(Place(), examples, orders=3)
    assert report.flip_rate == 1 and report.items == 12 and report.judge == "Place"
    assert report.exposure[3][0] == pytest.approx(2 / 3) and report.exposure[3][1] == pytest.approx(-1 / 3)
    free = yojo.order_bias(Constants(), examples, orders=3, name="ours")
    assert free.flip_rate == 0 and free.judge == "ours" and free.orders == (3, 3)


def test_order_bias_of_a_reward_model(make_reward_model, examples):
    some = [example for example in examples if len(example.responses) > 1]
    report = yojo.order_bias(make_reward_model(layers=1), some, orders=2)
    assert report.spread > 0 and report.cost["permutations"] > report.cost["one_order"]
    assert "to remove it: isolated reads" in report.lines()[-1]


def test_order_bias_of_nothing():
    with pytest.raises(ValueError, match="there are no examples"):
        yojo.order_bias(Place(), [])
    with pytest.raises(TypeError, match="examples must be yojo.Example objects, got str at place 0"):
        yojo.order_bias(Place(), ["x"])
    broken = [yojo.Example("p", ["a", "b"], images=["none.png"], id="one")]
    with pytest.raises(ValueError, match="1 of 1 examples cannot be scored: one: .*none.png"):
        yojo.order_bias(Place(), broken)


def test_misses_show_frames_of_videos(tmp_path):
    made_up = made("mm-rlhf-rewardbench", tmp_path)
    page = evaluate({"wrong": Length(shortest=True)}, made_up, draws=20).html(made_up)
    last = page.split('<article class="miss">')[-1]
    assert "[video 1] What happens?" in last and last.count("data:image/jpeg") == 4


def test_a_judge_that_is_free_of_order_can_be_asked_in_every_order():
    report = evaluate({"a": Constants()}, items(), orders=3, every_order=True, draws=20)
    assert {len(one.orders) for one in report.judges[0].judged} == {2, 3} and report.judges[0].orders == 3

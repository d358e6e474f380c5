"""What a load test's outcomes come to, what of them does not hold, and the tables of its result lines."""

from pathlib import Path

import pytest

from bench import lines, load, load_report
from bench.load_client import Outcome, summary


def outcomes(seconds=0.1, count=100, **fields):
    """`Outcome`s of scored requests, each a bit slower than the one before."""
    given = {"kind": "score", "status": 200, "responses": 2, "problem": None} | fields
    return [Outcome(began=0.0, seconds=seconds * (1 + n / count), **given) for n in range(count)]


def phase(found, seconds=10.0, memory=((100, 50),), **fields):
    """A phase as `bench.load` writes it."""
    health = {"requests": 100, "p99": 0.004, "max": 0.02}
    return {**summary(found, seconds), "health": health, "memory": load.memory_of(memory), **fields}


@pytest.fixture
def phases():
    shed = outcomes(0.001, 50, status=429, responses=0)
    left = [Outcome("left: at once", 0.0, None, None, 0, None)] * 5
    found = {name: phase(outcomes()) for name in ("one", "many", "isolated_one", "isolated_many")}
    found |= {name: phase(outcomes(2.0)) for name in ("plain_one", "plain_many")}
    found["mixed"] = phase(outcomes() + outcomes(count=5, kind="wrong: no JSON", status=400, responses=0) + left)
    found["below"] = phase(outcomes(), rate=8.0, factor=0.8, max_waiting=1024)
    found["above"] = phase(outcomes() + shed, rate=20.0, factor=2.0, max_waiting=1024)
    return found


@pytest.fixture
def line(phases):
    place = {"cpu": "Processor", "cores": 2, "commit": "abc1234", "date": "2026-01-01", "versions": {"torch": "2.0"}}
    return {"phases": phases, "clients": 64, "max_tokens": 1024, "threads": None, "beside": None, **place}


def test_summary_counts_what_came_and_takes_percentiles_of_what_was_scored(phases):
    mixed = phases["mixed"]
    assert mixed["kinds"] == {"score": 100, "wrong": 5, "left": 5}
    assert mixed["statuses"] == {"200": 100, "400": 5}
    assert (mixed["requests_per_second"], mixed["responses_per_second"]) == (10.0, 20.0)
    assert mixed["latency"] == pytest.approx({"p50": 0.15, "p95": 0.195, "p99": 0.199})
    assert phases["above"]["shed_latency"]["p50"] == pytest.approx(0.0015)


def test_memory_is_compared_between_the_second_quarter_and_the_last():
    grown = load.memory_of([(900, 900), (900, 0), (60, 40), (60, 40), (500, 0), (0, 0), (60, 50), (60, 50)])
    assert grown["growth"] == pytest.approx(0.1)
    assert grown["most"] == 1800


def test_all_that_does_not_hold_is_named(phases):
    assert load.faults(phases) == []
    wrong = outcomes(count=1, problem="a score is far away") + outcomes(count=1, status=503, problem="status 503")
    phases["many"] = phase(wrong, exit_code=1)
    phases["mixed"]["memory"]["growth"] = 0.2
    phases["above"] = phase(outcomes(), rate=20.0, factor=2.0, max_waiting=1024)
    assert load.faults(phases) == [
        "many: 2 wrong replies, such as score: a score is far away",
        "many: status 503",
        "many: exit code 1",
        "mixed: memory grew by 20.0%",
        "above: nothing was turned away",
    ]


def test_page_has_the_tables_of_the_last_line(tmp_path, line, capsys):
    results, page = tmp_path / "cpu.jsonl", tmp_path / "page.md"
    page.write_text("before\n<!-- load -->\n<!-- /load -->\nafter\n")
    arguments = [str(page), "--results", str(results)]
    assert load_report.main(arguments) == 2
    lines.append(results, {**line, "commit": "older"})
    lines.append(results, line)
    assert load_report.main([*arguments, "--check"]) == 1
    assert load_report.main(arguments) == 0
    assert load_report.main([*arguments, "--check"]) == 0
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n")
    assert "abc1234" in text and "older" not in text
    assert "| plain FastAPI, N single passes | 64 | 10.0 | 20.0 | 3000 ms |" in text
    assert "| 20.0/s | 2 | 10.0 | 33% |" in text
    assert "100 x 200, 5 x 400; 0 replies were wrong" in text


def test_the_docs_have_the_tables_of_the_last_line():
    folder = Path(__file__).parents[2]
    results = folder / "bench" / "results" / "serving" / "cpu.jsonl"
    assert load_report.main([str(folder / "docs" / "serving.md"), "--results", str(results), "--check"]) == 0


def test_page_without_its_markers_is_left_alone(tmp_path, line, capsys):
    results, page = tmp_path / "cpu.jsonl", tmp_path / "page.md"
    lines.append(results, line)
    page.write_text("nothing here")
    assert load_report.main([str(page), "--results", str(results)]) == 2
    assert "<!-- load -->" in capsys.readouterr().err
    assert page.read_text() == "nothing here"

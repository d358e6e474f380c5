"""A generative judge on a benchmark, behind a real endpoint: placed verdicts, refusals, failures, and a run that goes on."""

import threading

import numpy as np
import pytest
from benchmark_cases import made
from endpoint_cases import Endpoint, blocks_of

from yojo.evaluation.evaluate import evaluate
from yojo.judges import EndpointError, Length


def longest(body):
    """Ranks what it is shown by length, and says nothing of questions that begin with "How many"."""
    conversation, responses = blocks_of(body)
    if "How many" in conversation[-1][1]:
        return "I would rather not."
    return "Ranking: " + " > ".join(sorted(responses, key=lambda label: -len(responses[label])))


def test_it_is_asked_in_every_order_and_refusals_are_wrong(tmp_path):
    items = made("vl-rewardbench", tmp_path)
    with Endpoint(longest) as endpoint:
        judge = endpoint.judge(concurrency=4)
        report = evaluate({"gpt": judge, "length": Length()}, items, out=tmp_path / "out", orders=2, draws=20)
        assert len(endpoint.bodies) == 6 * 2 + 2 * 2  # one item is asked about again in each order
        assert {part["type"] for body in endpoint.bodies for part in body["messages"][0]["content"]} == {
            "text",
            "image_url",
        }
        again = evaluate({"gpt": judge, "length": Length()}, items, out=tmp_path / "out", orders=2, draws=20)
        assert len(endpoint.bodies) == 16 and again.judges[0].to_dict() == report.judges[0].to_dict()
    gpt, length = report.judges
    assert [one.number for one in gpt.judged if one.refused] == [2] and gpt.figures.refused == 1
    assert gpt.judged[2].refused.startswith("order 0: ")
    for one, other in zip(gpt.judged, length.judged, strict=True):
        assert one.refused or (np.argmax(one.scores, 1) == np.argmax(other.mean)).all()
    assert gpt.order.flip_rate == 0 and gpt.order.items == 6
    assert "judge-1-0613" in report.made["answered"]
    assert "no verdict" in report.html() or "Refused" in report.html()


def test_a_judge_that_prefers_the_first_is_found_out(tmp_path):
    items = made("vl-rewardbench", tmp_path)
    with Endpoint(lambda body: "Ranking: A > B") as endpoint:
        report = evaluate({"first": endpoint.judge()}, items, orders=2, draws=20)
    (first,) = report.judges
    assert first.figures.estimates["top1"].value == 0.5 and first.figures.estimates["acc_plus"].value == 0
    assert first.order.flip_rate == 1 and first.order.exposure[2] == pytest.approx((0.5, -0.5))


def test_what_fails_ends_the_run_and_the_next_goes_on(tmp_path):
    items, lock, answered = made("vl-rewardbench", tmp_path), threading.Lock(), []

    def fails(body):
        with lock:
            answered.append(body)
            return longest(body) if len(answered) <= 5 else (500, {}, "no")

    with Endpoint(fails) as endpoint:
        with pytest.raises(EndpointError, match="500"):
            evaluate({"gpt": endpoint.judge(concurrency=1, retries=0)}, items, out=tmp_path / "out", orders=2)
        kept = len((next((tmp_path / "out/.gpt.jsonl.job").glob("scores-*"))).read_text().splitlines())
        assert kept == 2  # both orders of two items, one of a third
        endpoint.rule, before = longest, len(endpoint.bodies)
        evaluate({"gpt": endpoint.judge(concurrency=1)}, items, out=tmp_path / "out", orders=2, draws=20)
        assert len(endpoint.bodies) - before == 16 - 2 * kept


def test_the_first_retry_is_said(monkeypatch, caplog):
    from cases import items

    from yojo.judges import client

    monkeypatch.setattr(client, "FIRST_WAIT", 0.01)
    answered = []

    def fails(body):
        answered.append(body)
        return (503, {}, "busy") if len(answered) in (1, 2, 5) else longest(body)

    with Endpoint(fails) as endpoint:
        evaluate({"gpt": endpoint.judge(concurrency=1)}, items(3), orders=1, draws=20)
    said = [record.getMessage() for record in caplog.records if "trying again" in record.getMessage()]
    assert len(said) == 1 and "503" in said[0] and "5 times at most a request" in said[0] and len(answered) == 6

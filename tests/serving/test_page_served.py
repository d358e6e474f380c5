"""The pages of the server itself: what they show is what `RewardModel.score` gives, and every endpoint."""

import json

import chromium_cases
import pytest

from tests.serving.serving_cases import ANSWERS, QUESTION, body, engine_of, expected, listening, png


@pytest.fixture(scope="module")
def browser():
    path = chromium_cases.find()
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(chromium_cases.NAMES)} is installed")
    with chromium_cases.started(path) as browser:
        yield browser


@pytest.fixture(scope="module")
def server():
    with listening(engine_of()) as server:
        yield server


def test_a_digit_is_ranked(browser, server, tmp_path):
    (tmp_path / "digit.png").write_bytes(png())
    page = chromium_cases.Page(browser)
    try:
        page.go(f"{server.url}/")
        page.until("document.querySelector('.state[data-kind]')")
        page.choose_files("input[type=file]", [str(tmp_path / "digit.png")])
        page.tab_to("at.id === 'prompt'")
        page.type(QUESTION)
        for number, answer in enumerate(ANSWERS):
            if number == 2:
                page.evaluate("document.getElementById('add').click()")
            page.tab_to("at.matches('#answers textarea') && !at.value")
            page.type(answer)
        page.press("Enter", "Control")
        page.until("!document.getElementById('shown').hidden")
        scores = expected(body()).tolist()
        shown = page.evaluate("document.getElementById('shown').textContent")
        places = [shown.index(ANSWERS[n]) for n in sorted(range(3), key=lambda n: -scores[n])]
        assert places == sorted(places)
        for score in scores:
            assert f"{abs(score):.4f}" in shown
        assert page.complaints() == []
        page.screenshot(tmp_path / "ranked.png")
        assert (tmp_path / "ranked.png").stat().st_size > 10_000
    finally:
        page.close()


def test_every_endpoint_is_described(browser, server):
    page = chromium_cases.Page(browser)
    try:
        page.go(f"{server.url}/docs")
        page.until("document.querySelector('.operation')")
        shown = page.evaluate("document.body.textContent")
        paths = server.config.app.openapi()["paths"]
        assert len(paths) >= 15
        assert [path for path in paths if path not in shown] == []
        assert page.complaints() == [] and json.dumps(QUESTION) in page.evaluate(
            "[...document.querySelectorAll('textarea')].map((one) => one.value).join()"
        )
    finally:
        page.close()

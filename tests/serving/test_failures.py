"""What gets no scores: models that fail, and what no reply and no log may say of it."""

import asyncio
import concurrent.futures
import contextlib
import logging
import socket
import time

import httpx
import pytest

from tests.serving.asking import CANARY, LONG, NAN, RAISES, Faulty, ask, close, error_of, posts, until
from tests.serving.serving_cases import QUESTION, body, client_of, data_url, engine_of, expected, listening, png, run
from yojo.rewards.openrlhf_server import Queries
from yojo.serving import server
from yojo.serving.errors import without_text
from yojo.serving.settings import Settings

KEY = f"{CANARY}-of-24-characters"


def answers(count):
    return [f"It is a {n}." for n in range(count)]


# ---- models that fail ----


def test_a_score_that_is_not_finite_is_an_error():
    model = Faulty()
    one, many, rerank, tei, fine = ask(
        ("POST", "/score", {"json": body(responses=answers(NAN))}),
        ("POST", "/score", {"json": [body(), body(responses=answers(NAN))]}),
        ("POST", "/rerank", {"json": {"query": QUESTION, "documents": answers(NAN)}}),
        ("POST", "/tei/rerank", {"json": {"query": QUESTION, "texts": answers(NAN)}}),
        ("POST", "/score", {"json": body()}),
        make=model.scorer,
    )
    for found, param in ((one, "responses.0"), (many, "1.responses.0"), (rerank, "documents.0")):
        error = error_of(found, 424)
        assert (error["code"], error["type"], error["param"]) == ("not_finite", "model_error", param)
    assert tei.status_code == 424 and tei.json()["error_type"] == "backend"
    close(fine.json()["scores"], expected(body()))


@pytest.mark.parametrize(("count", "code"), [(NAN, "not_finite"), (RAISES, "model_failed")])
def test_the_others_of_a_row_have_their_scores(count, code):
    async def go():
        model = Faulty()
        model.go.clear()
        engine = engine_of(make=model.scorer)
        async with client_of(engine) as client:
            try:
                first = asyncio.ensure_future(client.post("/score", json=body(responses=answers(2))))
                await until(lambda: model.entered.is_set() and not len(engine._to_score))
                rest = []
                for waiting, some in enumerate((3, count, 1), 1):
                    rest.append(asyncio.ensure_future(client.post("/score", json=body(responses=answers(some)))))
                    await until(lambda waiting=waiting: len(engine._to_score) == waiting)
            finally:
                model.go.set()
            return model.rows, [await first, *[await one for one in rest]]

    rows, (first, third, bad, last) = run(go)
    assert rows[:2] == [[2], [3, count, 1]]  # they did share a row
    for found, some in ((first, 2), (third, 3), (last, 1)):
        close(found.json()["scores"], expected(body(responses=answers(some))))
    assert error_of(bad, 424)["code"] == code


def test_a_model_that_raises_is_an_error_of_its_own():
    model = Faulty()
    bad, fine = posts("/score", body(responses=answers(RAISES)), body(), make=model.scorer)
    error = error_of(bad, 424)
    assert error["code"] == "model_failed" and CANARY not in bad.text
    assert fine.status_code == 200


def test_a_mistake_of_the_server_is_not_told(caplog):
    async def go():
        async with client_of(engine_of()) as client:

            def broken():
                raise KeyError(f"{CANARY} in the server's own words")

            client.app.state.service.engine.ready = broken
            found = await client.get("/ready")
            del client.app.state.service.engine.ready
            return found

    with caplog.at_level(logging.DEBUG):
        found = run(go)
    assert error_of(found, 500)["code"] == "internal" and CANARY not in found.text and "Key" not in found.text
    own = [one for one in caplog.records if one.name.startswith("yojo")]
    assert any("unforeseen KeyError at" in one.getMessage() and "in broken" in one.getMessage() for one in own)
    assert not any(CANARY in one.getMessage() for one in own)


# ---- what nobody may repeat ----


PART = {"type": "image", "image": f"{CANARY}/{CANARY}.png"}
WRONG = [
    ("POST", "/score", {"content": f'{{"prompt": "{CANARY}'.encode()}),
    ("POST", "/score", {"content": f'{{"{CANARY}": 1, "{CANARY}": 2}}'.encode()}),
    ("POST", "/score", {"json": {"prompt": f"{CANARY} <image><image>", "responses": ["a"], "images": [data_url(png())]}}),
    ("POST", "/score", {"json": body(responses=[CANARY, " "])}),
    ("POST", "/score", {"json": body(responses=[CANARY, {CANARY: CANARY}])}),
    ("POST", "/score", {"json": body(responses=CANARY)}),
    ("POST", "/score", {"json": body(prompt={CANARY: 1})}),
    ("POST", "/score", {"json": body(prompt=[{"role": CANARY, "content": CANARY}])}),
    ("POST", "/score", {"json": body(prompt=[{"role": "user", "content": {CANARY: CANARY}}])}),
    ("POST", "/score", {"json": body(prompt=[{"role": "user", "content": [{"type": CANARY, "text": CANARY}]}])}),
    ("POST", "/score", {"json": body(prompt=[{"role": "user", "content": [{"text": CANARY, "of": CANARY}]}])}),
    ("POST", "/score", {"json": body(prompt=[{"role": "assistant", "content": CANARY}])}),
    ("POST", "/score", {"json": body(prompt=[{"role": "user", "content": [PART]}], images=[])}),
    ("POST", "/score", {"json": body(images=[f"{CANARY}/{CANARY}.png"])}),
    ("POST", "/score", {"json": body(images=[f"../{CANARY}.png"])}),
    ("POST", "/score", {"json": body(images=[f"http://{CANARY}.example/{CANARY}.png"])}),
    ("POST", "/score", {"json": body(images=[f"{CANARY}:{CANARY}"])}),
    ("POST", "/score", {"json": body(images=[f"data:image/{CANARY};base64,{CANARY}"])}),
    ("POST", "/score", {"json": body(tools=[{CANARY: CANARY}, CANARY])}),
    ("POST", "/score", {"json": body(model=CANARY)}),
    ("POST", "/score", {"json": body(videos=[{"frames": [f"{CANARY}.png"]}])}),
    ("POST", "/score", {"json": body(responses=[CANARY] * 300)}),
    ("POST", "/score", {"json": body(), "headers": {"Yojo-Deadline": CANARY}}),
    ("POST", "/score", {"json": body(), "headers": {"Content-Type": CANARY}}),
    ("POST", "/score", {"json": body(), "headers": {"Authorization": f"Bearer {CANARY}"}}),
    ("POST", "/score/upload", {"data": {"prompt": CANARY, "response": " "}, "files": {"image": (CANARY, b"GIF89a")}}),
    ("POST", "/score/upload", {"data": {"prompt": CANARY}, "files": {"response": (CANARY, CANARY.encode())}}),
    ("GET", "/v1/models/" + CANARY, {}),
    ("GET", "/" + CANARY, {}),
    (CANARY.upper(), "/score", {"json": body()}),
    ("POST", "/rerank", {"json": {"query": CANARY, "documents": [CANARY, " "]}}),
    ("POST", "/rerank", {"json": {"query": {"image": f"{CANARY}.png"}, "documents": [CANARY]}}),
    ("POST", "/v1/score", {"json": {"queries": [CANARY, CANARY], "documents": [CANARY] * 3}}),
    ("POST", "/tei/rerank", {"json": {"query": CANARY, "texts": [CANARY, " "]}}),
    ("POST", "/group", {"json": {"key": CANARY, "prompt": f"{CANARY} <image>", "response": CANARY, "images": ["Zm8="]}}),
    ("POST", "/get_reward", {"json": {"query": [CANARY], "prompts": [f"{CANARY} {CANARY}"], "labels": [CANARY]}}),
    ("POST", "/get_reward", {"json": {"query": [f"{CANARY}</s>"], "prompts": [""], "labels": [[CANARY]]}}),
]  # fmt: skip
FINE = [
    ("POST", "/group", {"json": {"key": CANARY, "prompt": f"<|im_start|>{CANARY}", "response": CANARY}}),
    ("POST", "/score", {"json": body(prompt=f"{QUESTION} {CANARY}", responses=[CANARY, "a 3"])}),
    ("POST", "/rerank", {"json": {"query": CANARY, "documents": [CANARY], "return_documents": False}}),
    ("POST", "/get_reward", {"json": {"query": [f"{CANARY}?{CANARY}</s>"], "prompts": [f"{CANARY}?"], "labels": [""]}}),
]


@pytest.fixture
def told(caplog):
    """function of requests and settings -> their replies, and all that our own loggers have written."""

    def tell(requests, **settings):
        settings = Settings(keys={KEY: "client"}, image_root="tests", group_size=1, **settings)
        asked = [
            (method, path, {**given, "headers": {"X-Api-Key": KEY, **given.get("headers", {})}})
            for method, path, given in requests
        ]
        with caplog.at_level(logging.DEBUG):
            found = ask(*asked, settings=settings, policy=Queries(eos=["</s>"], prompt="text"))
        return found, [one.getMessage() for one in caplog.records if one.name.startswith("yojo")]

    return tell


def test_no_error_repeats_what_was_asked(told):
    found, lines = told(WRONG)
    for (method, path, given), one in zip(WRONG, found, strict=True):
        assert 400 <= one.status_code < 500, (path, given, one.text)
        assert CANARY not in (one.text + str(dict(one.headers))).lower(), (method, path, given, one.text)
    assert sum(" client=client" in line for line in lines) == len(WRONG) - 3  # all but a wrong key, path and method
    assert not [line for line in lines if CANARY in line.lower()]


def test_logs_hold_no_text_of_users(told):
    found, lines = told(FINE)
    assert [one.status_code for one in found] == [200] * len(FINE)
    assert sum("POST /score 200 ok" in line for line in lines) == 1
    assert not [line for line in lines if CANARY in line.lower()]


def test_logs_hold_texts_where_that_is_wanted(told):
    wild = body(prompt=[{"role": "user", "content": [{"text": f"{CANARY}\nINFO forged"}, {"type": "image"}]}])
    found, lines = told([*FINE, ("POST", "/score", {"json": wild})], log_text=True)
    assert [one.status_code for one in found] == [200] * (len(FINE) + 1)
    texts = [line for line in lines if line.startswith("prompt=")]
    assert len(texts) == len(FINE) + 1 and all(CANARY in line and "\n" not in line for line in texts)
    assert f'responses=["{CANARY}", "a 3"]' in texts[1]
    assert not [line for line in lines if KEY in line or "base64" in line]  # neither keys nor images


@pytest.mark.parametrize(
    ("message", "texts", "wanted"),
    [
        ("the role must be 'user', got 'bot'", ["user", "bot"], "the role must be 'user', got '...'"),
        ("1 images are given for 2 image parts", ["image", "images"], "1 images are given for 2 image parts"),
        ("a part has 'secret' and secret", ["secret"], "a part has '...' and ..."),
        (f"got {'x' * 400}", [], f"got {'x' * 293}..."),
        ("another has one", ["other"], "another has one"),
        ("another has other, or others", ["other"], "another has ..., or others"),
        (f"has{'z' * 30}s", ["z" * 30], "has...s"),
        ("two\nlines", [], "two lines"),
        (f"got '{'y' * 50}'", [], "got '...'"),
        ("got {'a': 'b'}", [], "got ..."),
    ],
)
def test_messages_keep_our_words_and_no_others(message, texts, wanted):
    assert without_text(message, texts) == wanted


@pytest.mark.parametrize("told", ["(" + "'" * 200_000, "x' " + '"a ' * 200_000, "[{" * 100_000, "`a " * 200_000])
def test_a_long_message_is_looked_through_in_no_time(told):
    """With an expression that reads it in many ways this takes hours."""
    texts = [told, *(f"word {n}" for n in range(50_000))]
    assert without_text(f"it must be one of user, tool, got {told!r}", texts) == "it must be one of user, tool, got ..."
    half = told[:1200]
    assert told[:40] not in without_text(f"it must be a string, got {half!r}", [half])


def test_what_is_not_done_in_its_grace_is_told_so():
    """In our form, with when to ask again, and not by uvicorn's bare 500."""
    model = Faulty()
    model.go.clear()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        try:
            with listening(engine_of(Settings(grace=0.2), make=model.scorer)) as server:
                asked = [{"json": body()}, {"json": [body()] * 3}]
                found = [pool.submit(httpx.post, f"{server.url}/score", **one, timeout=LONG) for one in asked]
                assert model.entered.wait(LONG)
                server.handle_exit(None, None)
                replies = [one.result(LONG) for one in found]
        finally:
            model.go.set()
    for reply in replies:
        assert error_of(reply, 503)["code"] == "ending" and reply.headers["Retry-After"] == "1"


def test_a_connection_on_which_no_request_comes_is_ended(monkeypatch):
    monkeypatch.setattr(server, "KEEP_ALIVE", 0.3)
    with listening(engine_of()) as found, contextlib.ExitStack() as stack:
        where = found.servers[0].sockets[0].getsockname()
        for sent in (b"", b"POST /score HTTP/1.1\r\nHost: x\r\n"):
            connection = stack.enter_context(socket.create_connection(where, timeout=5))
            connection.sendall(sent)
            assert connection.recv(1) == b""
        # Nor one that comes behind another, and one byte at a time.
        connection = stack.enter_context(socket.create_connection(where, timeout=5))
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
        assert connection.recv(65536).startswith(b"HTTP/1.1 200")
        began = time.monotonic()
        with pytest.raises(OSError):
            while time.monotonic() < began + LONG:
                connection.sendall(b"G")
                time.sleep(0.02)
        with httpx.Client() as client:  # while those with requests stay
            for _ in range(12):
                assert client.get(f"{found.url}/health").status_code == 200
                time.sleep(0.05)

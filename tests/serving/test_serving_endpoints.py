"""Our own endpoints give the scores of `RewardModel.score`, and one form of error that names the field."""

import asyncio
import contextlib
import threading

import numpy as np
import pytest
import torch
from starlette.datastructures import URL
from starlette.requests import Request

import yojo
from tests import real_processors
from tests.serving.asking import Faulty, ask, close, error_of, permuted, posts, until
from tests.serving.serving_cases import (
    ANSWERS,
    QUESTION,
    body,
    client_of,
    data_url,
    encoded,
    engine_of,
    expected,
    png,
    run,
    scorer,
)
from yojo.rewards.openrlhf_server import Queries
from yojo.saving.known_scores import Known
from yojo.serving.errors import TYPES, ApiError
from yojo.serving.requests import Memory, hold
from yojo.serving.requests import client_of as client_behind
from yojo.serving.roles import Scorer
from yojo.serving.settings import Limits, Settings
from yojo.serving.workers import Failed

KEY, OTHER = "a-key-of-24-characters-1", "a-key-of-24-characters-2"


# ---- scores ----


def test_one_and_many():
    other = body(images=[encoded(png(1))], responses=["A one."])
    one, many = posts("/score", body(), [body(), other])
    assert one.status_code == many.status_code == 200
    close(one.json()["scores"], expected(body()))
    assert [found["index"] for found in many.json()["data"]] == [0, 1]
    close(many.json()["data"][0]["scores"], expected(body()))
    close(many.json()["data"][1]["scores"], expected(other))
    assert one.headers["Yojo-Fingerprint"] == one.json()["fingerprint"] == many.json()["fingerprint"]


def test_a_reply_says_what_it_is_and_what_it_took():
    one, many = posts("/score", body(), [body(), body(responses=["Eight."])])
    one, many = one.json(), many.json()
    assert (
        one["id"].startswith("score-") and one["id"] != many["id"] and one["model"] == many["model"] == "reward-model"
    )
    assert (one["object"], many["object"]) == ("score", "list") and abs(one["created"] - many["created"]) <= 60
    usage = one["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + sum(usage["response_tokens"])
    assert len(usage["response_tokens"]) == 3 and "row" not in one
    total = sum(found["usage"]["total_tokens"] for found in many["data"])
    assert many["usage"]["total_tokens"] == total > usage["total_tokens"]


def test_images_stand_where_the_messages_have_them():
    parts = [{"type": "image_url", "image_url": {"url": data_url(png())}}, {"type": "text", "text": QUESTION}]
    (found,) = posts("/score", {"prompt": [{"role": "user", "content": parts}], "responses": ANSWERS})
    close(found.json()["scores"], expected(body()))


def test_scores_are_floats_to_the_bit():
    (found,) = posts("/score", body())
    for score in found.json()["scores"]:
        assert float(np.float32(score)) == score


@pytest.mark.parametrize("mode", ["comparative", "isolated"])
def test_every_mode_scores_as_its_model(mode):
    (found,) = posts("/score", body(details=True), args=(mode,))
    found = found.json()
    close(found["scores"], expected(body(), mode))
    row, prompt = found["row"], found["usage"]["prompt_tokens"]
    assert (row["mode"], row["orders"]) == (mode, 1)
    assert row["segments"][0] == {"kind": "prompt", "response": None, "tokens": prompt, "sees": []}
    sees = [[0], [0, 1], [0, 1, 2]] if mode == "comparative" else [[0]] * 3
    tokens = found["usage"]["response_tokens"]
    assert row["segments"][1:] == [
        {"kind": "response", "response": n, "tokens": tokens[n], "sees": sees[n]} for n in range(3)
    ]


def test_permutations_are_orders_that_do_not_see_each_other():
    known = Known(True, True, "as it was")
    (found,) = posts("/score", body(details=True), make=lambda: Scorer(permuted(), known))
    found = found.json()
    close(found["scores"], permuted().score(QUESTION, ANSWERS, images=[png()]))
    row = found["row"]
    assert (row["mode"], row["orders"]) == ("comparative", 2) and len(row["segments"]) == 7
    first, second = row["segments"][1:4], row["segments"][4:]
    assert [one["sees"] for one in first] == [[0], [0, 1], [0, 1, 2]]
    assert [one["sees"] for one in second] == [[0], [0, 4], [0, 4, 5]]
    orders = [[one["response"] for one in some] for some in (first, second)]
    assert [sorted(order) for order in orders] == [[0, 1, 2]] * 2 and orders[0] != orders[1]
    assert found["usage"]["total_tokens"] == sum(one["tokens"] for one in row["segments"])


@pytest.mark.parametrize(
    ("wrong", "status", "param"),
    [
        ({"responses": []}, 422, "1.responses"),
        ({"responses": ["fine", 3]}, 422, "1.responses.1"),
        ({"responses": ["fine", "  "]}, 422, "1.responses.1"),
        ({"prompt": "", "images": []}, 422, "1.prompt"),
        ({"images": [data_url(png()), "data:,"]}, 422, "1.images.1"),
        ({"images": [data_url(png()[:-90])]}, 422, "1.images.0"),
        ({"prompt": "<image><image>"}, 422, "1.prompt"),
        ({"model": "another"}, 404, "1.model"),
        ({"sizes": 3}, 422, "1.sizes"),
        ({"responses": ["a"] * 300}, 413, "1.responses"),
    ],
)
def test_of_a_list_all_or_none_are_scored(wrong, status, param):
    (found,) = posts("/score", [body(), body(**wrong), body()])
    assert error_of(found, status)["param"] == param


def test_a_list_is_bounded_and_not_empty():
    few = Settings(limits=Limits(examples=2))
    empty, many = posts("/score", [], [body()] * 3, settings=few)
    assert error_of(empty, 422)["code"] == "no_examples"
    assert error_of(many, 413)["code"] == "too_many_examples"


# ---- uploads ----


def form(**changes):
    """Keyword arguments of httpx for a form; None takes a field away."""
    fields = {"prompt": QUESTION, "response": ANSWERS, **changes}
    return {
        "data": {name: value for name, value in fields.items() if value is not None},
        "files": [("image", ("a.png", png(), "image/png"))],
    }


def test_an_upload_is_scored():
    plain, detailed = ask(("POST", "/score/upload", form()), ("POST", "/score/upload", form(details="true")))
    close(plain.json()["scores"], expected(body()))
    assert "row" not in plain.json() and len(detailed.json()["row"]["segments"]) == 4
    assert plain.headers["Yojo-Fingerprint"] == plain.json()["fingerprint"]


@pytest.mark.parametrize(
    ("given", "status", "param", "code"),
    [
        (form(prompt=None), 422, "prompt", "missing_field"),
        (form(response=None), 422, "response", "no_responses"),
        (form(prompt=["a", "b"]), 422, "prompt", "invalid_field"),
        (form(details="yes"), 422, "details", "invalid_field"),
        (form(model="another"), 404, "model", "model_not_found"),
        (form(images="x"), 422, "images", "unknown_field"),
        (form(image="text"), 422, "image", "invalid_field"),
        (form(response=["fine", " "]), 422, "response.1", "invalid_input"),
        ({**form(), "files": [("prompt", ("a.png", png(), "image/png"))]}, 422, "prompt", "invalid_field"),
        ({**form(), "files": [("image", ("a.png", png()[:20], "image/png"))]}, 422, "image.0", None),
        ({**form(), "files": [("image", ("a.png", png(), "image/png"))] * 40}, 400, None, "invalid_request"),
        ({"json": body()}, 415, None, "content_type"),
        ({"content": b"x", "headers": {"Content-Type": "multipart/form-data"}}, 400, None, "invalid_request"),
    ],
)
def test_an_upload_that_is_wrong(given, status, param, code):
    (found,) = ask(("POST", "/score/upload", given))
    error = error_of(found, status)
    assert error["param"] == param and (code is None or error["code"] == code), error


def test_an_upload_of_a_large_file():
    (found,) = ask(("POST", "/score/upload", form()), settings=Settings(limits=Limits(image_bytes=100)))
    assert error_of(found, 413)["code"] == "image_too_large"


# ---- the model ----


def test_the_model_is_known_by_its_names():
    settings = Settings(names=("digits", "org/digits-2"))
    models, one, slash, wrong, *scores = ask(
        ("GET", "/v1/models", {}),
        ("GET", "/v1/models/digits", {}),
        ("GET", "/v1/models/org/digits-2", {}),
        ("GET", "/v1/models/reward-model", {}),
        *[("POST", "/score", {"json": body(model=name)}) for name in ("digits", "org/digits-2", None, "reward-model")],
        settings=settings,
    )
    cards = models.json()["data"]
    assert models.json()["object"] == "list" and [card["id"] for card in cards] == ["digits", "org/digits-2"]
    assert [one.json(), slash.json()] == cards
    assert error_of(wrong, 404)["param"] == "model"
    assert [found.status_code for found in scores] == [200, 200, 200, 404]
    assert {found.json()["model"] for found in scores[:3]} == {"digits"}
    card = cards[0]
    assert card["digest"] == scores[0].json()["fingerprint"] == models.headers["Yojo-Fingerprint"]
    assert card["limits"]["responses"] == Limits().responses and card["probe"]["ok"] is True
    assert (card["mode"], card["order_free"], card["dtype"]) == ("comparative", False, "float32")


def test_fingerprints_differ_by_what_changes_scores():
    (one,), (same,), (other,) = (
        ask(("GET", "/v1/models", {}), args=(mode,)) for mode in ("comparative", "comparative", "isolated")
    )
    first, second, third = (found.json()["data"][0] for found in (one, same, other))
    assert first["digest"] == second["digest"] != third["digest"]
    assert first["fingerprint"] != third["fingerprint"] and len(first["digest"]) == 32


# ---- keys, deadlines, paths ----


def test_a_key_is_asked_for():
    settings = Settings(keys={KEY: "first", OTHER: "second"})
    good = [{"Authorization": f"Bearer {KEY}"}, {"Authorization": f"bearer  {OTHER}"}, {"x-api-key": KEY}]
    wrong = [
        {},
        {"Authorization": f"Bearer {KEY[:-1]}"},
        {"Authorization": f"Bearer {KEY}x"},
        {"Authorization": KEY},
        {"Authorization": f"Basic {KEY}"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer \u00e9".encode()},
        {"x-api-key": ""},
        {"x-api-key": KEY.upper()},
        {"Authorization": "Bearer wrong", "x-api-key": KEY},
    ]
    asked = [("POST", "/score", {"json": body(), "headers": headers}) for headers in good + wrong]
    protected = ["/v1/models", "/v1/models/reward-model", "/tei/info"]
    opened = ["/", "/docs", "/page.js", "/openapi.json", "/health", "/ready", "/metrics", "/tei/health"]
    found = ask(*asked, *[("GET", path, {}) for path in protected + opened], settings=settings)
    assert [one.status_code for one in found[:3]] == [200] * 3
    for one in found[3:13]:
        assert error_of(one, 401)["code"] == "wrong_key" and one.headers["WWW-Authenticate"] == "Bearer"
    assert [one.status_code for one in found[13:]] == [401] * 3 + [200] * len(opened)


def test_the_path_that_needs_no_key_is_that_of_the_request_line():
    class Misled(Request):
        url = URL("http://x/health?/score")  # as Starlette 0.52 has it where the header Host is "x/health?"

    scope = {"type": "http", "method": "POST", "path": "/score", "headers": [(b"host", b"x/health?")]}
    with pytest.raises(ApiError, match="a key is needed"):
        client_behind(Misled(scope), Settings(keys={KEY: "one"}))


def test_a_request_without_a_key_is_not_read():
    (found,) = ask(("POST", "/score", {"content": b"{"}), settings=Settings(keys={KEY: "first"}))
    error_of(found, 401)


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon", "", "1e999", "1 s"])
def test_a_deadline_that_is_none(seconds):
    given = {"json": body(), "headers": {"Yojo-Deadline": seconds}}
    (found,) = ask(("POST", "/score", given))
    assert error_of(found, 422)["param"] == "Yojo-Deadline"


def test_a_deadline_that_passes():
    asked = {"headers": {"Yojo-Deadline": "1e-9"}}
    found = ask(
        ("POST", "/score", {"json": body(), **asked}),
        ("POST", "/score", {"json": [body()] * 2, **asked}),
        ("POST", "/rerank", {"json": {"query": "a", "documents": ["b"]}, **asked}),
        ("POST", "/score", {"json": body(), "headers": {"Yojo-Deadline": "100"}}),
    )
    for one in found[:3]:
        assert error_of(one, 504)["code"] == "deadline"
    assert found[3].status_code == 200


def test_paths_and_methods_that_are_not_there():
    missing, wrong, put, tei = ask(
        ("GET", "/scores", {}), ("GET", "/score", {}), ("PUT", "/v1/models", {}), ("GET", "/tei/rerank", {})
    )
    assert error_of(missing, 404)["code"] == "not_found"
    assert error_of(wrong, 405)["code"] == error_of(put, 405)["code"] == "wrong_method"
    assert (wrong.headers["Allow"], put.headers["Allow"]) == ("POST", "GET")
    assert tei.status_code == 405 and set(tei.json()) == {"error", "error_type"}


def test_every_status_has_a_type():
    for status in (*range(400, 402), 404, 405, 408, 409, 411, 413, 415, 422, 424, 429, 500, 503, 504):
        assert TYPES[status].endswith("_error")


def test_bodies_that_are_here_are_bounded_together():
    async def go():
        async with client_of(engine_of(Settings(max_waiting_bytes=100_000))) as client:
            memory = client.app.state.memory
            with memory.holding(99_800, "another"):
                refused = await client.post("/score", json=body())
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
            assert refused.headers["Retry-After"] and memory.taken == 0
            assert (await client.post("/score", json=body())).status_code == 200
            # No length, or one that is none: it is taken to be as long as it may be.
            chunked = await client.post("/score", content=_chunks(), headers={"Content-Type": "application/json"})
            assert chunked.status_code == 429 and memory.taken == 0

    run(go)


async def _chunks():
    yield b"{}"


def test_bodies_of_one_client_leave_room_for_another():
    """Also those that are announced and never come."""
    memory = Memory(1000)

    def refused(size, client):
        with pytest.raises(ApiError, match="too much is here") as caught, memory.holding(size, client):
            pass
        return caught.value.status

    with memory.holding(900, "alone"):  # one request may be as large as it likes
        assert refused(10, "alone") == 429 == refused(101, "another")
        with memory.holding(50, "another"):
            pass
    with contextlib.ExitStack() as stack:
        for _ in range(8):
            stack.enter_context(memory.holding(100, "first"))
        assert refused(100, "first") == 429
        with memory.holding(150, "second"), pytest.raises(ApiError):
            hold(60)
        with memory.holding(150, "second"):
            hold(50)  # of a request itself, there is no share
    assert memory.taken == 0 and not memory._held


def test_videos_come_as_their_frames():
    """As `yojo.Video` takes a list of frames, with and without a rate."""
    judge = real_processors.reward_model("Qwen3-VL", "isolated")[0]
    frames = [png(n) for n in range(4)]

    async def go():
        async with client_of(engine_of(make=lambda: Scorer(judge, Known(True, True, "")))) as client:
            found = []
            for video in (
                {"frames": [data_url(frame) for frame in frames], "fps": 2.0},
                {"frames": list(map(encoded, frames))},
            ):
                reply = await client.post("/score", json={"prompt": QUESTION, "responses": ANSWERS, "videos": [video]})
                assert reply.status_code == 200, reply.text
                found.append(reply.json()["scores"])
            parts = [{"type": "text", "text": QUESTION}, {"type": "video"}]
            messages = {"prompt": [{"role": "user", "content": parts}], "responses": ANSWERS}
            reply = await client.post("/score", json={**messages, "videos": [video]})
            return [*found, reply.json()["scores"]]

    first, second, third = run(go)
    close(first, judge.score(QUESTION, ANSWERS, videos=[yojo.Video(frames, 2.0)]))
    close(second, judge.score(QUESTION, ANSWERS, videos=[yojo.Video(frames)]))
    parts = [{"type": "text", "text": QUESTION}, {"type": "video"}]
    close(third, judge.score([{"role": "user", "content": parts}], ANSWERS, videos=[yojo.Video(frames)]))
    assert not torch.allclose(torch.tensor(first), torch.tensor(third))


# ---- ready ----


def test_not_ready_while_the_model_is_loaded():
    async def go():
        loaded = threading.Event()

        def slow():
            loaded.wait(60)
            return scorer()

        engine = engine_of(make=slow)
        async with client_of(engine, ready=False) as client:
            try:
                ready, models, info, tei = [
                    await client.get(path) for path in ("/ready", "/v1/models", "/tei/info", "/tei/health")
                ]
                assert ready.status_code == 503 and ready.json() == {"ready": False, "reasons": ["scoring 0: starting"]}
                assert (await client.get("/health")).json() == {"status": "ok"}
                assert error_of(models, 503)["code"] == "not_ready" and models.headers["Retry-After"] == "5"
                assert (info.status_code, tei.status_code) == (503, 503)
                assert tei.json()["error_type"] == "unhealthy"
                scored = await client.post("/score", json=body())
                assert error_of(scored, 503)["code"] == "not_ready" and scored.headers["Retry-After"] == "5"
            finally:
                loaded.set()
            await engine.until_ready(60)
            assert (await client.get("/ready")).json() == {"ready": True, "reasons": []}
            assert (await client.post("/score", json=body())).status_code == 200

    run(go)


def test_not_ready_where_it_does_not_score_as_it_did():
    why = "score 3 is off by 0.5, and 0.001 is the bound"

    async def go():
        engine = engine_of(args=("comparative", Known(False, True, why, 7.0, 1e-3)))
        async with client_of(engine, ready=False) as client:
            with pytest.raises(Failed, match="as it did"):
                await engine.until_ready(60)
            ready = await client.get("/ready")
            assert ready.status_code == 503
            assert ready.json()["reasons"][-1] == f"the model does not score as it did when it was saved: {why}"
            assert error_of(await client.post("/score", json=body()), 503)["code"] == "not_ready"
            card = (await client.get("/v1/models")).json()["data"][0]
            assert card["probe"] == {
                "ok": False,
                "stored": True,
                "reason": ready.json()["reasons"][-1],
                "difference": 7.0,
                "bound": 1e-3,
            }

    run(go)


def test_a_client_that_leaves_takes_its_request_along():
    async def go():
        model = Faulty()
        model.go.clear()
        engine = engine_of(make=model.scorer)
        async with client_of(engine) as client:
            try:
                first = asyncio.ensure_future(client.post("/score", json=body()))
                await until(lambda: model.entered.is_set() and not len(engine._to_score))
                second = asyncio.ensure_future(client.post("/score", json=body(responses=["One alone."])))
                await until(lambda: len(engine._to_score) == 1)
                second.cancel()
                await until(lambda: len(engine._open) == 1 and not len(engine._to_score))
            finally:
                model.go.set()
            assert (await first).status_code == 200
        assert model.rows == [[3]]

    run(go)


# ---- the description ----


def shown(description):
    """(method, path, example) of every example of a request in an OpenAPI description."""
    for path, item in description["paths"].items():
        for method, operation in item.items():
            for content in operation.get("requestBody", {}).get("content", {}).values():
                yield from ((method, path, example) for example in _examples(content["schema"], description))


def _examples(schema, description):
    if "$ref" in schema:
        schema = description["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
    yield from schema.get("examples", ())
    for inner in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _examples(inner, description)


def test_the_examples_of_the_description_are_answered():
    async def go():
        settings = Settings(names=("served",), group_size=1)
        policy = Queries(eos=["</s>"], prompt="text")
        async with client_of(engine_of(settings), policy=policy) as client:
            description = (await client.get("/openapi.json")).json()
            examples = list(shown(description))
            found = [await client.request(method, path, json=example) for method, path, example in examples]
            return description, [path for _, path, _ in examples], found

    description, paths, found = run(go)
    assert [(path, one.status_code) for path, one in zip(paths, found, strict=True)] == [(path, 200) for path in paths]
    taking = {
        path
        for path, item in description["paths"].items()
        if "application/json" in item.get("post", {}).get("requestBody", {}).get("content", {})
    }
    assert set(paths) == taking and len(taking) == 8 and paths.count("/score") == 2


def test_a_list_is_larger_than_one_client_may_hold_at_once():
    """On a server that has nothing else to do, it would be turned away for ever."""
    from yojo.serving.settings import Settings

    async def go():
        async with client_of(engine_of(Settings(max_waiting=400, token_budget=64))) as client:
            reply = await client.post("/score", json=[body() for _ in range(40)])
            assert reply.status_code == 200, reply.text
            for found in reply.json()["data"]:
                close(found["scores"], expected(body()))

    run(go)

"""Every endpoint gives the scores of `RewardModel.score`, in the form that its clients read."""

import pytest
import torch

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
)


def close(found, wanted):
    torch.testing.assert_close(torch.tensor(found), torch.as_tensor(wanted), rtol=0, atol=2e-6)


@pytest.fixture(scope="module")
def asked():
    """function: (method, path, keyword arguments)s -> their responses, from one server."""

    def ask(*requests, **options):
        async def go():
            async with client_of(engine_of(**options)) as client:
                return [await client.request(method, path, **given) for method, path, given in requests]

        return run(go)

    return ask


def test_one_and_many(asked):
    other = body(images=[encoded(png(1))], responses=["A one."])
    one, many = asked(("POST", "/score", {"json": body()}), ("POST", "/score", {"json": [body(), other]}))
    assert one.status_code == many.status_code == 200
    close(one.json()["scores"], expected(body()))
    assert [found["index"] for found in many.json()["data"]] == [0, 1]
    close(many.json()["data"][0]["scores"], expected(body()))
    close(many.json()["data"][1]["scores"], expected(other))
    assert one.headers["Yojo-Fingerprint"] == one.json()["fingerprint"] == many.json()["fingerprint"]


def test_images_stand_where_the_messages_have_them(asked):
    parts = [{"type": "image_url", "image_url": {"url": data_url(png())}}, {"type": "text", "text": QUESTION}]
    (found,) = asked(
        ("POST", "/score", {"json": {"prompt": [{"role": "user", "content": parts}], "responses": ANSWERS}})
    )
    close(found.json()["scores"], expected(body()))


def test_bodies_that_are_here_are_bounded_together():
    from yojo.serving.settings import Settings

    async def go():
        async with client_of(engine_of(Settings(max_waiting_bytes=100_000))) as client:
            memory = client.app.state.memory
            with memory.holding(99_800):
                refused = await client.post("/score", json=body())
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "overloaded")
            assert refused.headers["Retry-After"] and memory.taken == 0
            assert (await client.post("/score", json=body())).status_code == 200
            # No length, or one that is none: it is taken to be as long as it may be.
            chunked = await client.post("/score", content=_chunks(), headers=JSON)
            assert chunked.status_code == 429 and memory.taken == 0

    run(go)


JSON = {"Content-Type": "application/json"}


async def _chunks():
    yield b"{}"


def test_videos_come_as_their_frames():
    """As `yojo.Video` takes a list of frames, with and without a rate."""
    import yojo
    from tests import real_processors
    from yojo.saving.known_scores import Known
    from yojo.serving.roles import Scorer

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

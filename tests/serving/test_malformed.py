"""The catalogue of malformed requests against the endpoints, and odd ones against `RewardModel.score`."""

import asyncio
import base64
import contextlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import torch

from tests.reward_cases import demo_judge
from tests.serving.malformed_cases import ACCEPTED, ANY, AS_SCORED, CAT, OUTSIDE, catalogue, prepare, written
from tests.serving.serving_cases import READY, client_of, engine_of, listening
from yojo.serving.errors import TYPES
from yojo.serving.settings import Settings

GIVEN = "http://127.0.0.1:1"  # stands for a server whose port is known once it is there
CASES = {case.name: case for case in catalogue(GIVEN) if case.where != "socket"}


@contextlib.contextmanager
def redirecting():
    """URL of a server that answers `/301` and the like with that status, and leads to itself."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(int(self.path[1:]))
            self.send_header("Location", f"http://127.0.0.1:{self.server.server_port}/200")
            self.end_headers()

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(READY)


@pytest.fixture(scope="module")
def sent(tmp_path_factory):
    """function (method, path, content, headers) -> reply of one server, which lives as long as the tests of this file."""
    folder = prepare(tmp_path_factory.mktemp("served") / "images")
    loop, ready, done = asyncio.new_event_loop(), threading.Event(), asyncio.Event()
    found = {}

    async def live(url):
        port = url.rpartition(":")[2]
        settings = Settings(image_root=str(folder), allow_hosts=(f"private:127.0.0.1:{port}", "images.example"))
        async with client_of(engine_of(settings)) as found["client"]:
            ready.set()
            await done.wait()

    def work(url):
        try:
            loop.run_until_complete(live(url))
        finally:
            ready.set()

    with redirecting() as url:
        thread = threading.Thread(target=work, args=(url,), daemon=True)
        thread.start()
        assert ready.wait(2 * READY) and "client" in found

        def send(method, path, content, headers):
            content = content.replace(GIVEN.encode(), url.encode())
            asked = found["client"].request(method, path, content=content, headers=headers)
            return asyncio.run_coroutine_threadsafe(asked, loop).result(READY)

        yield send
        loop.call_soon_threadsafe(done.set)
        thread.join(READY)
        assert not thread.is_alive()


def scores(sent, request):
    """(status, scores or None) of a request."""
    reply = sent("POST", "/score", written(**request), {"Content-Type": "application/json"})
    return reply.status_code, reply.json().get("scores")


def judged(request):
    """What `RewardModel.score` gives for the same."""
    prompt, images = request["prompt"], [_image(source) for source in request.get("images", ())]
    if isinstance(prompt, list):
        prompt = [{**turn, "content": _parts(turn["content"])} for turn in prompt]
    literal = request.get("literal_tags", False)
    return demo_judge().score(prompt, request["responses"], images=images, literal_tags=literal)


def _image(source):
    """The bytes of an image; all files that are served are one."""
    return CAT if source.endswith(".png") else base64.b64decode(source.rpartition(",")[2])


def _parts(content):
    if isinstance(content, str):
        return content
    named = [part if isinstance(part, dict) else {"type": "text", "text": part} for part in content]
    return [
        {"type": "image", "image": _image(part["image_url"]["url"])} if "image_url" in part else part for part in named
    ]


@pytest.mark.parametrize("name", CASES)
def test_what_is_malformed_gets_its_own_error(name, sent):
    case = CASES[name]
    content = case.content()
    reply = sent(case.method, case.path, content, case.headers)
    error = reply.json()["error"]
    codes = case.code if isinstance(case.code, tuple) else (case.code,)
    assert reply.status_code == case.status, error
    assert case.code is ANY or error["code"] in codes, error
    assert case.param is ANY or error["param"] == case.param, error
    assert error["type"] == TYPES[case.status] and set(error) == {"message", "type", "param", "code"}
    for told in ("Traceback", "/work", "/tmp", ".py", OUTSIDE, "/etc", "evil", "0x7f", "PIL"):
        assert told not in reply.text
    assert len(reply.text) < 600


@pytest.mark.parametrize("name", ACCEPTED)
def test_what_is_odd_gets_the_scores_of_the_model(name, sent):
    status, found = scores(sent, ACCEPTED[name])
    assert status == 200
    torch.testing.assert_close(torch.tensor(found), judged(ACCEPTED[name]), rtol=0, atol=2e-6)


@pytest.mark.parametrize("name", AS_SCORED)
def test_special_tokens_are_taken_as_the_model_takes_them(name, sent):
    status, found = scores(sent, AS_SCORED[name])
    try:
        wanted = judged(AS_SCORED[name])
    except ValueError:
        assert status == 422
    else:
        assert status == 200
        torch.testing.assert_close(torch.tensor(found), wanted, rtol=0, atol=2e-6)


@pytest.mark.parametrize("case", [case for case in catalogue() if case.where == "socket"], ids=lambda case: case.name)
def test_what_is_no_request_at_all_is_refused_by_the_server(case):
    with listening(engine_of(), ready=False) as server, httpx.Client(base_url=server.url, timeout=READY) as client:
        try:
            status = client.request(case.method, case.path, content=case.content(), headers=case.headers).status_code
        except httpx.TransportError:  # it has hung up before all of it was sent
            status = case.status
        assert status == case.status
        assert client.get("/health").status_code == 200


def test_there_are_many():
    assert len(catalogue(GIVEN)) == len({case.name for case in catalogue(GIVEN)}) > 200
    assert len(ACCEPTED) > 20 and len({case.code for case in CASES.values()}) > 40

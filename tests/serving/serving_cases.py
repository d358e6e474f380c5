"""What tests of serving share: the demonstration's model behind the endpoints, in this process or behind a port."""

import base64
import contextlib
import functools
import io
import threading

import anyio
import httpx

from tests.reward_cases import demo_judge, pictures
from yojo.demo import digits
from yojo.saving.known_scores import Known
from yojo.serving.app import create_app
from yojo.serving.engine import Engine
from yojo.serving.roles import Scorer
from yojo.serving.server import Address, Server
from yojo.serving.settings import Settings
from yojo.serving.workers import Role

QUESTION = digits.PROMPT
ANSWERS = ["It is a 3.", "This is a seven.", "Nine, I think."]
READY = 120.0  # seconds that no worker takes to begin


def scorer(mode="comparative", known=None):
    """A `Scorer` of the demonstration's model, whose scores are of order one; loaded once a process."""
    return Scorer(demo_judge(mode), known or Known(True, True, "as it was"))


def engine_of(settings=None, make=None, args=(), preparing=1, scorers=1, **options):
    """An `Engine` whose workers are threads of this process."""
    roles = [Role(f"scoring {n}", make or scorer, args) for n in range(scorers)]
    return Engine(settings or Settings(), roles, preparing, **{"in_process": True, **options})


@functools.cache
def png(number=0):
    """The bytes of a held-out digit, as PNG."""
    file = io.BytesIO()
    pictures()[number].save(file, "PNG")
    return file.getvalue()


def encoded(data):
    """Bytes in base64."""
    return base64.b64encode(data).decode()


def data_url(data, kind="image/png"):
    """Bytes of an image as a data URL."""
    return f"data:{kind};base64,{encoded(data)}"


def body(**fields):
    """A request to /score that is answered."""
    return {"prompt": QUESTION, "responses": ANSWERS, "images": [data_url(png())], **fields}


def expected(body, mode="comparative"):
    """Scores of `RewardModel.score` for a request whose images are data URLs or base64."""
    images = [base64.b64decode(image.partition(",")[2] or image) for image in body.get("images", ())]
    judge = demo_judge(mode)
    return judge.score(body["prompt"], body["responses"], images=images, literal_tags=body.get("literal_tags", False))


@contextlib.asynccontextmanager
async def client_of(engine, settings=None, policy=None, ready=True, **options):
    """An `httpx.AsyncClient` of an app in this event loop, without a socket."""
    app = create_app(engine, settings or engine.settings, policy)
    async with app.router.lifespan_context(app):
        if ready:
            await engine.until_ready(READY)
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=READY, **options) as client:
            client.app = app
            yield client


def run(function, *args):
    """Run an async function of a test, which never takes as long as `READY`."""

    async def bounded():
        with anyio.fail_after(READY):
            return await function(*args)

    return anyio.run(bounded)


@contextlib.contextmanager
def listening(engine, settings=None, policy=None, ready=True):
    """A server behind a port of this machine, in a thread; gives the `Server`, which has `url`."""
    server = Server(engine, settings or engine.settings, Address(port=0), policy)
    failed, up = [], threading.Event()

    async def live():
        async def tell():
            while not server.started:
                await anyio.sleep(0.01)
            if ready:
                await engine.until_ready(READY)
            up.set()

        async with anyio.create_task_group() as group:
            group.start_soon(tell)
            await server.serve()
            group.cancel_scope.cancel()

    def work():
        try:
            anyio.run(live)
        except BaseException as error:
            failed.append(error)
        finally:
            up.set()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    up.wait(2 * READY)
    if failed:
        raise failed[0]
    try:
        yield server
    finally:
        server.should_exit = True
        thread.join(READY)
        assert not thread.is_alive() and not failed, failed

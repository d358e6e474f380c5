"""A server for the pages: no model, scores by rule, everything else as `yojo serve` answers it; on a port of its own."""

import base64
import contextlib
import hmac
import socket
import threading
from typing import Any

import fastapi
import uvicorn
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from yojo.serving import pages
from yojo.serving.errors import ApiError

FINGERPRINT = "0123456789abcdef" * 2
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAgAAAAGCAIAAABxZ0isAAAAEElEQVR4nGM4FWCCFTHQUgIAPyU5YZeY6D0AAAAASUVORK5CYII="
)
WORD = 4  # characters of a token
PROMPT = 40  # tokens that a prompt has besides its text


class ScoreRequest(BaseModel):
    """One prompt and the responses to it."""

    model_config = ConfigDict(
        json_schema_extra={"examples": [{"prompt": "Two plus two?", "responses": ["4", "It's five"]}]}
    )
    prompt: str | list[dict] = Field(description="Text, or a list of chat messages.")
    responses: list[str] = Field(description="At least one; none is empty.")
    images: list[str] | None = Field(None, description="Data URLs or `base64`.", max_length=32)
    details: bool = Field(False, description="Whether the reply holds `row`.")


class Segment(BaseModel):
    kind: str
    response: int | None
    tokens: int
    sees: list[int]


class Row(BaseModel):
    mode: str
    orders: int
    segments: list[Segment]


class ScoreReply(BaseModel):
    """Scores of one prompt."""

    id: str
    model: str
    scores: list[float]
    fingerprint: str
    usage: dict[str, Any]
    row: Row | None = None


def score(text):
    """Longer answers are better, and those below ten characters have negative scores."""
    return (len(text) - 10) / 8


def row(prompt, responses, images=(), mode="isolated", orders=1):
    """A packed row: one prompt, then every order of the responses, each rotated by one from that before."""
    segments = [
        {"kind": "prompt", "response": None, "tokens": PROMPT * (1 + len(images)) + len(prompt) // WORD, "sees": []}
    ]
    for order in range(orders):
        branch = []
        for place in range(len(responses)):
            index = (place + order) % len(responses)
            tokens = 1 + -(-len(responses[index]) // WORD)
            segments.append({"kind": "response", "response": index, "tokens": tokens, "sees": [0, *branch]})
            if mode == "comparative":
                branch.append(len(segments) - 1)
    return {"mode": mode, "orders": orders, "segments": segments}


def application(mode="isolated", orders=1, key=None, reasons=(), limits=None):
    """The server.

    Args:
        mode, orders: of the rows that it shows.
        key: that it asks for; None: none.
        reasons: why it is not ready; empty: it is.
        limits: of `GET /v1/models`.

    Returns:
        FastAPI. `state.seen`: bodies of `POST /score`, as they came; `state.hold`: a threading.Event that each waits for.
    """
    app = fastapi.FastAPI(
        title="A reward model", description="Scores by `rule`.", docs_url=None, redoc_url=None, routes=pages.routes()
    )
    app.state.seen, app.state.hold = [], threading.Event()
    app.state.hold.set()

    def allowed(request: fastapi.Request):
        if key and not hmac.compare_digest(request.headers.get("authorization", ""), f"Bearer {key}"):
            raise ApiError(401, "wrong_key", "The API key is missing or wrong.")

    @app.exception_handler(ApiError)
    async def refused(request, error):
        return JSONResponse(error.body(), error.status, error.headers())

    @app.post("/score", dependencies=[fastapi.Depends(allowed)], responses={429: {"description": "Overloaded."}})
    def scored(
        body: ScoreRequest, response: fastapi.Response, yojo_deadline: float | None = fastapi.Header(None, ge=0)
    ) -> ScoreReply:
        """Scores of all `responses` to one prompt, in one pass."""
        app.state.seen.append(body)
        app.state.hold.wait()
        if body.prompt == "busy":
            raise ApiError(429, "overloaded", "Too much is waiting.", retry_after=7)
        if not body.prompt:
            raise ApiError(422, "empty", "The prompt is empty.", "prompt")
        if not body.responses:
            raise ApiError(422, "empty", "At least one response is needed.", "responses")
        for index, text in enumerate(body.responses):
            if not text:
                raise ApiError(422, "empty", "The response is empty.", f"responses.{index}")
        for index, url in enumerate(body.images or ()):
            if base64.b64decode(url.partition(",")[2])[:8] != PNG[:8]:
                raise ApiError(422, "not_an_image", "This is no image that can be read.", f"images.{index}")
        made = row(body.prompt, body.responses, body.images or (), mode, orders)
        prompt, *rest = [segment["tokens"] for segment in made["segments"]]
        response.headers["Yojo-Fingerprint"] = FINGERPRINT
        own = rest[: len(body.responses)]  # the first order is that of the request
        usage = {"prompt_tokens": prompt, "response_tokens": own, "total_tokens": prompt + sum(own)}
        scores = [score(text) for text in body.responses]
        return {
            "id": "score-1",
            "model": "by-rule",
            "scores": scores,
            "fingerprint": FINGERPRINT,
            "usage": usage,
            "row": made,
        }

    @app.post("/upload/{name}")
    def upload(
        name: str, image: fastapi.UploadFile, note: str = fastapi.Form("", description="Whatever.")
    ) -> dict[str, str]:
        """Takes a file."""
        return {"name": name, "note": note, "bytes": str(len(image.file.read()))}

    @app.get("/v1/models", dependencies=[fastapi.Depends(allowed)])
    def models():
        one = {
            "id": "by-rule",
            "mode": mode,
            "permutations": orders,
            "order_free": mode == "isolated",
            "dtype": "float32",
        }
        return {"object": "list", "data": [one | {"max_length": 4096, "limits": limits or {}}]}

    @app.get("/ready")
    def ready(response: fastapi.Response):
        response.status_code = 503 if reasons else 200
        return {"ready": not reasons, "reasons": list(reasons)}

    return app


@contextlib.contextmanager
def served(app):
    """The address of a server of `app` on this machine. It listens before it starts, so nobody has to wait for it."""
    listening = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        app.state.hold.set()
        server.should_exit = True
        thread.join(10)
        listening.close()

"""What people write who have no serving layer: one FastAPI process that makes N single passes for each request.

It is given all that costs nothing: an image is decoded once a request, one request has the model to itself (threads that share
it are slower), and /health does not wait for a thread.
"""

import argparse
import base64
import io
import socket
import threading

import uvicorn
from fastapi import FastAPI
from PIL import Image
from pydantic import BaseModel

import yojo


class Body(BaseModel):
    """A request to /score."""

    prompt: str
    responses: list[str]
    images: list[str] = []


def app_of(judge):
    """The app around a `yojo.RewardModel`."""
    app, lock = FastAPI(), threading.Lock()

    @app.post("/score")
    def score(body: Body):
        images = [Image.open(io.BytesIO(base64.b64decode(image.rpartition(",")[2]))) for image in body.images]
        with lock:
            return {"scores": [float(judge.score(body.prompt, [text], images=images)[0]) for text in body.responses]}

    @app.get("/ready")
    @app.get("/health")
    async def health():
        return {"status": "ok"}

    return app


def main():
    parser = argparse.ArgumentParser(prog="python -m bench.plain_server", description=__doc__.partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--base-model")
    options = parser.parse_args()
    judge = yojo.RewardModel.from_pretrained(options.model, base_model=options.base_model, mode="isolated")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print("listening at http://{}:{}".format(*listener.getsockname()), flush=True)
        uvicorn.Server(uvicorn.Config(app_of(judge), log_level="warning")).run([listener])


if __name__ == "__main__":
    main()

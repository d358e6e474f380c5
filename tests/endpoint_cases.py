"""An endpoint on this machine, OpenAI-compatible or ours, which answers by rules, notes what it is sent, and fails on purpose."""

import base64
import contextlib
import hashlib
import io
import json
import re
import socket
import struct
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import torch
from PIL import Image

import yojo
from yojo.inputs.digests import digest
from yojo.inputs.images import load_image
from yojo.inputs.lookup import find_image
from yojo.inputs.messages import place
from yojo.inputs.videos import load_video
from yojo.judges import Generative

TWO = yojo.Example("How many?", ["Two.", "I see three."], id="two")
KEY = "sk-a-key-that-nobody-may-see"
LONG = 60.0  # seconds that no test takes
SILENCE = 2 * LONG  # that a server is silent, where nobody has ended it before


def examples(count):
    """Examples that differ, numbered from 0."""
    return [yojo.Example(f"q{n}", ["a" * (1 + n % 3), "b" * (1 + n % 2), "cc"], id=n) for n in range(count)]


def lists(scores):
    """Scores as lists; a `Refusal` as it is."""
    return [one.tolist() if hasattr(one, "tolist") else one for one in scores]


def until(condition):
    """Wait for a condition; False: in vain."""
    deadline = time.monotonic() + LONG
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.005)
    return bool(condition())


class Endpoint:
    """Serves inside `with`.

    Args:
        rule: function (body) -> text, or dict of a whole reply, or bytes to send as they are, or (status, headers, text), or
            one of the ways to fail: "reset", "half", "silence" (until the other side has gone).
        tls: `ssl.SSLContext` of a server that speaks https; or None.

    Attributes:
        bodies, headers, paths: of the requests, in the order in which they came.
        most: requests that were here at once, at most.
        connections: that were made.
    """

    BEHIND = "/v1"  # of the address
    keeps = False  # connections open behind a reply; it never says which

    def __init__(self, rule, tls=None):
        self.rule, self.tls, self.bodies, self.headers, self.paths = rule, tls, [], [], []
        self.here = self.most = self.connections = 0
        self.lock, self.ended = threading.Lock(), threading.Event()

    def __enter__(self):
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def setup(self):
                super().setup()
                with endpoint.lock:
                    endpoint.connections += 1

            def do_POST(self):
                endpoint.serve(self)

            do_GET = do_POST

            def log_message(self, *_):
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads, block_on_close, request_queue_size = True, False, 128

            def handle_error(self, *_):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        if self.tls is not None:
            self.server.socket = self.tls.wrap_socket(self.server.socket, server_side=True)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        self.url = f"http{'' if self.tls is None else 's'}://127.0.0.1:{self.server.server_port}{self.BEHIND}"
        return self

    def __exit__(self, *_):
        self.ended.set()
        self.server.shutdown()
        self.server.server_close()

    def serve(self, request):
        with self.lock:
            self.here += 1
            self.most = max(self.most, self.here)
        try:
            content = request.rfile.read(int(request.headers.get("Content-Length", 0)))
            body = json.loads(content) if content else None
            with self.lock:
                self.bodies.append(body)
                self.headers.append(dict(request.headers))
                self.paths.append(request.path)
            found = self.found(request, body)
        finally:
            with self.lock:
                self.here -= 1
        self.answer(request, found)

    def found(self, request, body):
        """What is answered, see `rule`."""
        return self.rule(body)

    def whole(self, found):
        """A text as a whole reply."""
        return said(found)

    def answer(self, request, found):
        if found in ("reset", "silence"):
            if found == "silence":
                self.ended.wait(SILENCE)
            # Closed with something unread or unsent thrown away: the other side sees a reset.
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.close_connection = True
            return
        half = found == "half"
        status, headers, text = found if isinstance(found, tuple) else (200, {}, self.whole("half") if half else found)
        if isinstance(text, str) and status == 200:
            text = self.whole(text)
        data = text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
        with contextlib.suppress(OSError):
            request.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(data[: len(data) // 2] if half else data)
        request.close_connection = half or not self.keeps

    def judge(self, **options):
        return Generative(self.url, "judge-1", **{"api_key": KEY, **options})


def said(content, finish="stop", model="judge-1-0613", **message):
    """A reply."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "model": model,
        "choices": [
            {"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}
        ],
    }


_BLOCK = re.compile(r"<(message [a-z]+|tools|response(?: \w+)?) ([0-9a-f]{12})>\n(.*?)\n</\1 \2>", re.DOTALL)


def parts_of(body):
    """The parts of what was sent."""
    (message,) = body["messages"]
    assert message["role"] == "user" and set(message) == {"role", "content"}
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def blocks_of(body):
    """(conversation, responses) of what was sent: list of (name, text), and dict label -> text; an image is "\\0"."""
    text = "".join(part["text"] if part["type"] == "text" else "\0" for part in parts_of(body))
    blocks = _BLOCK.findall(text)
    assert len({boundary for _, boundary, _ in blocks}) == 1
    responses = {name.partition(" ")[2]: inner for name, _, inner in blocks if name.startswith("response")}
    return [(name, inner) for name, _, inner in blocks if not name.startswith("response")], responses


def pictures_of(body):
    """The images that were sent: list of (media type, bytes)."""
    found = []
    for part in parts_of(body):
        if part["type"] == "image_url":
            head, data = part["image_url"]["url"].split(",", 1)
            found.append((re.fullmatch("data:(.*);base64", head)[1], base64.b64decode(data, validate=True)))
    return found


def opened(data):
    return Image.open(io.BytesIO(data))


def by_length(body):
    """A judge's answer to whom the longer response is better, in each style."""
    _, responses = blocks_of(body)
    if list(responses) == [""]:
        return f"Well.\n\nScore: {min(10, max(1, len(responses['']) % 11))}"
    lengths = {label: len(text) for label, text in responses.items()}
    asked = parts_of(body)[-1]["text"]
    if '"Verdict: A"' in asked:
        better = max(lengths, key=lengths.get)
        return f"Verdict: {'tie' if lengths['A'] == lengths['B'] else better}"
    order = sorted(lengths, key=lambda label: -lengths[label])
    text = order[0]
    for before, label in zip(order, order[1:], strict=False):
        text += f" {'=' if lengths[before] == lengths[label] else '>'} {label}"
    return f"The longest is {order[0]}.\n\n**Ranking: {text}**\n"


# ---- a server of reward models ----


class Hashed:
    """A judge whose scores are hashes of all that a model would be shown: text, pixels, rates, tools, places."""

    order_free = False

    def __init__(self, salt=0):
        self.salt = salt

    def fingerprint(self):
        return {"judge": "Hashed", "salt": self.salt, "of": {"a": [1, 2.5, "x"], "none": None}}

    def score_many(self, examples):
        return [self._scores(example) for example in examples]

    def _scores(self, example):
        turns = place(example.prompt, example.images, example.videos, example.literal_tags)
        for turn in turns:
            turn["content"] = [self._seen(part) for part in turn["content"]]
        shown = digest([self.salt, turns, example.tools and list(example.tools)])
        texts = [f"{shown} {n} {text}".encode() for n, text in enumerate(example.responses)]
        numbers = [int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") for text in texts]
        return torch.tensor([number / 2**61 - 4 for number in numbers], dtype=torch.float32)

    def _seen(self, part):
        kind = part["type"]
        if kind == "text":
            return part
        if kind == "image":
            source = part["image"]
            if isinstance(source, str) and source.startswith("data:"):
                source = find_image(source, "", False, "image")
            return {"type": kind, "image": np.asarray(load_image(source, "image"))}
        frames, metadata, _ = load_video(part["video"], "video")
        return {"type": kind, "video": frames, "metadata": metadata}


class ScoreServer(Endpoint):
    """A server that speaks as `yojo serve` does, as far as `yojo.RemoteJudge` hears of it.

    Args:
        judge: whose scores it gives.
        ways: what /score answers first, one after the other (see `Endpoint`, and functions of the body); then scores.
        key: that clients must have; "" for none.

    Attributes:
        names: of its models.
        largest: bytes of a request that it says it takes.
        gone: released whenever a client has ended a connection whose request waits ("silence").
    """

    BEHIND, keeps = "", True

    def __init__(self, judge, *ways, key=KEY):
        super().__init__(None)
        self.judge, self.ways, self.key = judge, list(ways), key
        self.names, self.largest, self.gone = ["one"], 1 << 25, threading.Semaphore(0)

    @property
    def asked(self):
        """Requests for scores."""
        with self.lock:
            return [body for body, path in zip(self.bodies, self.paths, strict=True) if path == "/score"]

    def found(self, request, body):
        if self.key and request.headers["Authorization"] != f"Bearer {self.key}":
            return failed(401, "a key is needed", "no_key")
        if request.path == "/v1/models":
            return {"object": "list", "data": [self.model(name) for name in self.names]}
        if request.path != "/score":
            return failed(404, "there is nothing here", "not_found")
        with self.lock:
            way = self.ways.pop(0) if self.ways else self.scored
        found = way(body) if callable(way) else way
        if found == "silence":
            self.ended.is_set() or request.connection.recv(1)  # nothing, once the client has ended it
            self.gone.release()
        return found

    def answer(self, request, found):
        if found != "silence":  # nobody listens
            super().answer(request, found)

    def model(self, name):
        fingerprint = self.judge.fingerprint()
        return {
            "id": name,
            "object": "model",
            "created": 1,
            "owned_by": "yojo",
            "fingerprint": fingerprint,
            "digest": digest(fingerprint),
            "mode": getattr(getattr(self.judge, "config", None), "mode", "comparative"),
            "order_free": self.judge.order_free,
            "limits": {"body": self.largest},
        }

    def whole(self, found):
        return reply([0.5], digest(self.judge.fingerprint()))

    def scored(self, body):
        (scores,) = self.judge.score_many([decoded(body)])
        made = digest(self.judge.fingerprint())
        return 200, {"Yojo-Fingerprint": made}, reply(scores.tolist(), made)

    def remote(self, **options):
        return yojo.RemoteJudge(self.url, **{"api_key": KEY, **options})


def reply(scores, fingerprint):
    """A reply of /score."""
    return {
        "id": "score-1",
        "object": "score",
        "created": 1,
        "model": "one",
        "scores": scores,
        "fingerprint": fingerprint,
    }


def failed(status, message, code, param=None, **headers):
    """An error of /score."""
    error = {"message": message, "type": "some_error", "param": param, "code": code}
    return status, {name.replace("_", "-"): text for name, text in headers.items()}, {"error": error}


def decoded(body):
    """The example of a request, images as bytes of files."""
    assert set(body) <= {"prompt", "responses", "images", "videos", "tools", "literal_tags", "model"}
    videos = [
        yojo.Video([_bytes(frame) for frame in video["frames"]], video.get("fps")) for video in body.get("videos", ())
    ]
    prompt = body["prompt"]
    if not isinstance(prompt, str):
        prompt = [{**turn, "content": _content(turn["content"])} for turn in prompt]
    return yojo.Example(
        prompt,
        body["responses"],
        images=[_bytes(image) for image in body.get("images", ())],
        videos=videos,
        tools=body.get("tools"),
        literal_tags=body.get("literal_tags", False),
    )


def _content(content):
    if isinstance(content, str):
        return content
    return [
        {**part, "image": _bytes(part["image"])} if isinstance(part, dict) and "image" in part else part
        for part in content
    ]


def _bytes(url):
    head, data = url.split(",", 1)
    assert re.fullmatch("data:image/(png|jpeg|webp|bmp|tiff|gif);base64", head)
    return base64.b64decode(data, validate=True)

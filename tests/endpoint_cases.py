"""An OpenAI-compatible endpoint on this machine, which answers by rules, notes what it is sent, and fails where it is to fail."""

import base64
import contextlib
import io
import json
import re
import socket
import struct
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from PIL import Image

from yojo.judges import Generative

KEY = "sk-a-key-that-nobody-may-see"
LONG = 60.0  # seconds that no test takes
SILENCE = 2 * LONG  # that a server is silent, where nobody has ended it before


class Endpoint:
    """Serves inside `with`.

    Args:
        rule: function (body) -> text, or dict of a whole reply, or bytes to send as they are, or (status, headers, text), or
            one of the ways to fail: "reset", "half", "silence".
        tls: `ssl.SSLContext` of a server that speaks https; or None.

    Attributes:
        bodies, headers, paths: of the requests, in the order in which they came.
        most: requests that were here at once, at most.
    """

    def __init__(self, rule, tls=None):
        self.rule, self.tls, self.bodies, self.headers, self.paths = rule, tls, [], [], []
        self.here = self.most = 0
        self.lock, self.ended = threading.Lock(), threading.Event()

    def __enter__(self):
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                endpoint.serve(self)

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
        self.url = f"http{'' if self.tls is None else 's'}://127.0.0.1:{self.server.server_port}/v1"
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
            content = request.rfile.read(int(request.headers["Content-Length"]))
            body = json.loads(content)
            with self.lock:
                self.bodies.append(body)
                self.headers.append(dict(request.headers))
                self.paths.append(request.path)
            found = self.rule(body)
        finally:
            with self.lock:
                self.here -= 1
        self.answer(request, found)

    def answer(self, request, found):
        if found in ("reset", "silence"):
            if found == "silence":
                self.ended.wait(SILENCE)
            # Closed with something unread or unsent thrown away: the other side sees a reset.
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            request.close_connection = True
            return
        half = found == "half"
        status, headers, text = found if isinstance(found, tuple) else (200, {}, said("half") if half else found)
        if isinstance(text, str) and status == 200:
            text = said(text)
        data = text if isinstance(text, bytes) else (text if isinstance(text, str) else json.dumps(text)).encode()
        with contextlib.suppress(OSError):
            request.send_response(status)
            for name, value in {"Content-Length": str(len(data)), **headers}.items():
                request.send_header(name, value)
            request.end_headers()
            request.wfile.write(data[: len(data) // 2] if half else data)
        request.close_connection = True

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

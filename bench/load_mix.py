"""What a server is asked under load: digits at several sizes with 1 to 16 responses, their scores, and what it must refuse."""

import base64
import dataclasses
import functools
import io
import json
import random
import struct
import zlib

from bench.load_client import OVERLOADED, message

SIDES = (8, 16, 32, 64, 128, 256, 512)  # pixels
FORMATS = ("PNG", "JPEG")
MOST = 16  # responses
BOUND = 2e-6  # of a score, or of 1 where that is more


@dataclasses.dataclass(frozen=True)
class Case:
    """A request to /score and its scores.

    Attributes:
        body: bytes of its JSON.
        scores: N floats of `RewardModel.score`, made beforehand.
        tokens: that it takes in a packed row.
    """

    body: bytes
    scores: tuple
    tokens: int = 0
    kind: str = "score"

    @property
    def responses(self):
        """How many."""
        return len(self.scores)

    def message(self, key=None):
        """The bytes of the request."""
        return _message("POST", "/score", self.body, key)

    def problem(self, reply):
        """What is wrong with a reply, or None: right scores, or a server that is overloaded and says until when."""
        if reply.status == OVERLOADED:
            return _overloaded(reply)
        if reply.status != 200:
            return f"status {reply.status}, {reply.body[:200]!r}"
        found = reply.json()["scores"]
        if len(found) != len(self.scores):
            return f"{len(found)} scores of {len(self.scores)}"
        far = [abs(one - wanted) / max(1.0, abs(wanted)) for one, wanted in zip(found, self.scores, strict=True)]
        return None if max(far) <= BOUND else f"a score is {max(far):.1e} away from what RewardModel.score gives"


@dataclasses.dataclass(frozen=True)
class Wrong:
    """A request that must be refused.

    Attributes:
        name: what is wrong.
        status, code: that the reply has.
        method, path, body, headers: of the request.
        has_key: whether it comes with its client's key.
    """

    name: str
    status: int
    code: str
    body: bytes = b""
    method: str = "POST"
    path: str = "/score"
    headers: dict = dataclasses.field(default_factory=dict)
    has_key: bool = True
    responses: int = 0

    @property
    def kind(self):
        return f"wrong: {self.name}"

    def message(self, key=None):
        """The bytes of the request."""
        return _message(self.method, self.path, self.body, key if self.has_key else None, self.headers)

    def problem(self, reply):
        """What is wrong with a reply, or None: its own error, or a server that is overloaded and says until when."""
        if reply.status == OVERLOADED:
            return _overloaded(reply)
        if reply.status != self.status:
            return f"status {reply.status} in place of {self.status}"
        code = reply.json()["error"]["code"]
        return None if code == self.code else f"{code} in place of {self.code}"


@dataclasses.dataclass(frozen=True)
class Mix:
    """What is asked.

    Attributes:
        cases: list of `Case`s.
        wrong: list of `Wrong`s.
    """

    cases: list
    wrong: list


def _message(method, path, body, key, headers=None):
    given = {"Content-Type": "application/json", **({} if key is None else {"Authorization": f"Bearer {key}"})}
    return message(method, path, body, given | (headers or {}))


def _overloaded(reply):
    return None if int(reply.headers.get("retry-after", 0)) >= 1 else "429 without Retry-After"


def make(judge, count=112, seed=0):
    """A mix, and the scores of all that is in it.

    Args:
        judge: `yojo.RewardModel`.
        count: of cases; sizes and formats of images in turn, all else drawn.
        seed: int.
    """
    from yojo.inputs.example import Example

    rng, cases = random.Random(seed), []
    for number in range(count):
        image = picture(number, SIDES[number % len(SIDES)], FORMATS[number // len(SIDES) % 2])
        body = request(image, number % MOST + 1 if number < MOST else rng.randint(1, MOST), rng)
        scores = judge.score(body["prompt"], body["responses"], images=[image]).tolist()
        encoded = judge.collator.encode(Example(body["prompt"], body["responses"], images=[image]), rankings=False)
        cases.append(Case(json.dumps(body).encode(), tuple(scores), encoded.num_tokens(judge.config)))
    return Mix(cases, wrong_requests())


def request(image, responses, rng):
    """dict: a request to /score about an image (bytes)."""
    from yojo.demo import digits

    data = base64.b64encode(image).decode()
    kind = "jpeg" if image.startswith(b"\xff\xd8") else "png"
    return {
        "prompt": rng.choice(digits.QUESTIONS),
        "responses": [digits.caption(rng.randrange(10), rng) for _ in range(responses)],
        "images": [rng.choice((data, f"data:image/{kind};base64,{data}"))],
    }


@functools.cache
def picture(number, side=32, kind="PNG"):
    """The bytes of a held-out digit, `side` pixels wide and high, as a file of a kind of Pillow's."""
    file = io.BytesIO()
    _digits()[number][0].resize((side, side)).save(file, kind)
    return file.getvalue()


@functools.cache
def _digits():
    from yojo.demo import digits

    return digits.load_digits_split()[1]


def huge_png():
    """The head of a PNG of 50,000 x 50,000 pixels, whose header is all right."""
    data = b"IHDR" + struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + data + struct.pack(">I", zlib.crc32(data)) + b"\0\0\0\0IDAT"


def wrong_requests():
    """A list of `Wrong`s, of many kinds."""
    good = request(picture(0), 3, random.Random(0))

    def changed(**fields):
        return json.dumps({**good, **fields}).encode()

    def image(data):
        return changed(images=[data if isinstance(data, str) else base64.b64encode(data).decode()])

    whole = changed()
    return [
        Wrong("no JSON", 400, "json_syntax", whole[:-40] + b"}"),
        Wrong("a key twice", 400, "json_duplicate_key", b'{"prompt": "a", "prompt": "b", "responses": ["c"]}'),
        Wrong("no responses", 422, "no_responses", changed(responses=[])),
        Wrong("unknown field", 422, "unknown_field", changed(answers=["It is a 3."])),
        Wrong("too many responses", 413, "too_many_responses", changed(responses=["3"] * 300)),
        Wrong("broken base64", 422, "image_base64", image("data:image/png;base64,$$$$")),
        Wrong("no image", 422, "image_format", image(b"This is no image at all, whatever its name says.")),
        Wrong("cut image", 422, "invalid_input", image(picture(0, 64)[:-200])),
        Wrong("too many pixels", 413, "image_too_many_pixels", image(huge_png())),
        Wrong("a path", 422, "image_root_missing", image("digits/../secret.png")),
        Wrong("a host that is not allowed", 422, "image_host", image("http://127.0.0.1/digit.png")),
        Wrong("forged separator", 422, "invalid_input", changed(images=[], prompt="<image> of what?")),
        Wrong("another model", 404, "model_not_found", changed(model="another")),
        Wrong("no path", 404, "not_found", whole, path="/scores"),
        Wrong("wrong method", 405, "wrong_method", method="GET"),
        Wrong("no key", 401, "wrong_key", whole, has_key=False),
        Wrong("no JSON by its type", 415, "content_type", whole, headers={"Content-Type": "text/plain"}),
        Wrong("wrong deadline", 422, "wrong_deadline", whole, headers={"Yojo-Deadline": "soon"}),
    ]

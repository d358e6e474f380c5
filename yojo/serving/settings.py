"""`Settings`: what a server is started with; `Limits`: what a request may hold, checked before it is decoded."""

import dataclasses
import math
import numbers


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a request may hold. Whatever is more is refused with a status of its own, and nothing is ever cut.

    Attributes:
        body: bytes of a request's body.
        depth: how deep its JSON may be nested.
        values: values, keys and separators of its JSON, all together.
        examples: in one list.
        responses: to one prompt.
        characters: of one text: a prompt's part, a response.
        all_characters: of all texts of one prompt and its responses.
        images: of one prompt, frames of videos among them.
        image_bytes: of one image, as it comes (decoded from base64).
        pixels: width times height of one image, as its header says.
        all_pixels: of all images of one prompt.
        url_seconds: in which an image has to be fetched, redirects and name look-up included.
    """

    body: int = 32 << 20
    depth: int = 32
    values: int = 100_000
    examples: int = 64
    responses: int = 256
    characters: int = 200_000
    all_characters: int = 1_000_000
    images: int = 32
    image_bytes: int = 16 << 20
    pixels: int = 40_000_000
    all_pixels: int = 80_000_000
    url_seconds: float = 10.0

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            _check(field.name, value, integer=field.name != "url_seconds")


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a server works.

    Attributes:
        names: under which the model is asked for; the first is the one that replies show.
        token_budget: tokens of a packed row.
        max_waiting: tokens that may wait to be scored, those of requests that are being prepared (estimated) among them.
        max_waiting_bytes: of images and of what was made of them, that may wait.
        deadline: seconds in which a request is answered, at most; a client may ask for fewer (header `Yojo-Deadline`).
        linger: seconds that a row which is not full waits for company, from its oldest request; 0: none.
        grace: seconds that what was accepted has to be finished in, once the server is told to end.
        group_size, group_deadline: of `/get_reward` and `/group`: samples that make a group (None: each call of /group says it,
            and /get_reward takes whole groups), and seconds it has to become whole.
        replicas: how many processes like this one share the requests: groups need a single one.
        keys: dict: API key -> the name under which its client is counted; empty: anybody may ask.
        image_root: folder that images may be read from by relative path; None: none may.
        allow_hosts: hosts that images may be fetched from; ("*",): any public one.
        log_text: whether logs may hold what users wrote.
        limits: `Limits`.
    """

    names: tuple = ("reward-model",)
    token_budget: int = 8192
    max_waiting: int = 131_072
    max_waiting_bytes: int = 1 << 30
    deadline: float = 60.0
    linger: float = 0.0
    grace: float = 30.0
    group_size: int | None = None
    group_deadline: float = 600.0
    replicas: int = 1
    keys: dict = dataclasses.field(default_factory=dict)
    image_root: str | None = None
    allow_hosts: tuple = ()
    log_text: bool = False
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self):
        for name in ("token_budget", "max_waiting", "max_waiting_bytes", "replicas"):
            _check(name, getattr(self, name), integer=True)
        for name in ("deadline", "grace", "group_deadline"):
            _check(name, getattr(self, name))
        if self.group_size is not None:
            _check("group_size", self.group_size, integer=True)
        _check("linger", self.linger, least=0)
        if not self.names or not all(isinstance(name, str) and name for name in self.names):
            raise ValueError(f"names must be at least one name that the model is asked for by, got {self.names!r}")


def _check(name, value, integer=False, least=1):
    kind = numbers.Integral if integer else numbers.Real
    if isinstance(value, bool) or not isinstance(value, kind):
        raise TypeError(f"{name} must be {'an int' if integer else 'a number'}, got {value!r}")
    if not math.isfinite(value) or value < (least if integer or least == 0 else 0) or (value == 0 and least):
        raise ValueError(f"{name} must be {f'at least {least}' if integer or not least else 'above 0'}, got {value}")

"""What an example is as a request to a server of `yojo serve`, and what its replies say."""

import dataclasses
import json
import math

import torch

from yojo.inputs import messages
from yojo.inputs.digests import digest
from yojo.judges.client import EndpointError
from yojo.judges.pictures import exact_frames, exact_url


def request_of(example, model=None):
    """The body of a request that scores an example: whoever decodes it has the example, to the letter and the pixel.

    Rankings and id are not in it.

    Args:
        example: `yojo.Example`.
        model: name of the served model; None: whichever is served.

    Returns:
        dict that JSON has.

    Raises:
        TypeError, ValueError: something that cannot be sent; the message names the example.
    """
    name = example.name
    body = {
        "prompt": _prompt(example),
        "responses": list(example.responses),
        "images": [exact_url(source, f"{name}: image {n}") for n, source in enumerate(example.images)],
        "videos": [_video(source, f"{name}: video {n}") for n, source in enumerate(_videos(example))],
        "literal_tags": example.literal_tags,
    }
    body = {key: value for key, value in body.items() if value or key in ("prompt", "responses")}
    if example.tools is not None:
        body["tools"] = _plain(list(example.tools), f"{name}: tools")
    return body if model is None else {**body, "model": model}


def _prompt(example):
    """A string, or messages: images in parts are data URLs there, videos stand among the videos, in the same order."""
    if isinstance(example.prompt, str):
        return example.prompt
    turns = []
    for n, turn in enumerate(example.prompt):
        where = f"{example.name}: turn {n}"
        content = turn["content"]
        if not isinstance(content, str):
            content = [_part(part, where) for part in content]
        # Keys in the order in which they stand: a template may show a turn as a whole.
        turns.append({**_plain({**turn, "content": None}, where), "content": content})
    return turns


def _part(part, where):
    if not isinstance(part, dict) or part["type"] == "text":
        return part
    if part["type"] == "video":
        return {"type": "video"}
    return part if part.get("image") is None else {**part, "image": exact_url(part["image"], f"{where}: image")}


def _videos(example):
    """The videos in the order in which they stand in the prompt."""
    placed = messages.place(example.prompt, example.images, example.videos, example.literal_tags)
    return [part["video"] for turn in placed for part in turn["content"] if part["type"] == "video"]


def _video(source, name):
    urls, fps = exact_frames(source, name)
    return {"frames": urls} if fps is None else {"frames": urls, "fps": fps}


def _plain(value, where):
    """The value, should JSON have it as it is (tuples are lists)."""
    if value is None or isinstance(value, (str, bool, int)) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, (list, tuple)):
        return [_plain(inner, where) for inner in value]
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return {key: _plain(inner, where) for key, inner in value.items()}
    raise TypeError(f"{where} cannot be sent as JSON: it holds {value!r}, a {type(value).__name__}")


@dataclasses.dataclass(frozen=True)
class Served:
    """What is served, as the server says it.

    Attributes:
        name: of the model.
        fingerprint: dict, `fingerprint()` of the `yojo.RewardModel` there.
        digest: its digest, 32 hexadecimal digits.
        order_free: whether no score depends on the order of the responses.
        mode: of the model, such as "isolated".
        largest: bytes of a request that the server takes, at most; None where it does not say.
    """

    name: str
    fingerprint: dict
    digest: str
    order_free: bool
    mode: str
    largest: int | None


def served_of(content, model=None):
    """What a reply of /v1/models says of a model.

    Args:
        content: bytes of the reply.
        model: its name; None: the first.

    Returns:
        `Served`.

    Raises:
        ValueError: it is no JSON, or no list of models.
        LookupError: there is no such model.
        EndpointError: it is no server of `yojo serve`, or its fingerprint is not whole.
    """
    try:
        listed = {entry["id"]: entry for entry in json.loads(content)["data"]}
    except (KeyError, TypeError) as error:
        raise ValueError(f"the reply is no list of models: {content[:200]!r}") from error
    found = next(iter(listed.values()), None) if model is None else listed.get(model)
    if found is None:
        raise LookupError(f"there is no model {model!r}, but {', '.join(map(str, listed)) or 'none'}")
    limits = found.get("limits")
    largest = limits.get("body") if isinstance(limits, dict) else None
    try:
        made = Served(
            name=_of_kind(str, found["id"]),
            fingerprint=_of_kind(dict, found["fingerprint"]),
            digest=_of_kind(str, found["digest"]),
            order_free=_of_kind(bool, found["order_free"]),
            mode=_of_kind(str, found["mode"]),
            largest=largest if type(largest) is int else None,
        )
    except (KeyError, TypeError) as error:
        raise EndpointError(f"it is no server of `yojo serve`: what it says of its model has no {error}") from error
    if digest(made.fingerprint) != made.digest:
        raise EndpointError("the fingerprint of its model did not come as it was: another version of YOJO serves it")
    return made


def _of_kind(kind, value):
    if not isinstance(value, kind):
        raise TypeError(f"{kind.__name__} where there is {value!r}")
    return value


def scores_of(headers, content, count, digest_before):
    """The scores that a reply gives.

    Args:
        headers, content: of a reply of /score.
        count: N, of the responses.
        digest_before: of the fingerprint of the model that was served before.

    Returns:
        [N] float32.

    Raises:
        ValueError: the reply is no whole JSON.
        EndpointError: not N finite scores, or those of another model.
    """
    reply = json.loads(content)
    if not isinstance(reply, dict):
        raise ValueError(f"the reply is no object: {content[:200]!r}")
    said = {headers.get("Yojo-Fingerprint"), reply.get("fingerprint")} - {None}
    if not said:
        raise EndpointError("the reply does not say which model has scored: is it a server of `yojo serve`?")
    if said != {digest_before}:
        now = ", ".join(sorted(str(one) for one in said - {digest_before}))
        raise EndpointError(
            f"the server now serves another model ({now}, it was {digest_before}), and scores of both are not to be mixed: "
            "a new yojo.RemoteJudge takes the new one"
        )
    scores = reply.get("scores")
    if not isinstance(scores, list) or len(scores) != count:
        got = f"{len(scores)} scores" if isinstance(scores, list) else "no scores"
        raise EndpointError(f"the reply has {got} for {count} responses")
    if not all(isinstance(score, (int, float)) and not isinstance(score, bool) for score in scores):
        raise EndpointError(f"the reply has scores that are no numbers: {scores}")
    made = torch.tensor(scores, dtype=torch.float64).to(torch.float32)  # which keeps what is beyond float32 as inf
    if not made.isfinite().all():
        raise EndpointError(f"the reply has scores that are not finite: {scores}")
    return made

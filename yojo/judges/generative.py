"""`Generative`: a model that is asked for its verdict in words, behind an OpenAI-compatible endpoint."""

import collections
import contextlib
import dataclasses
import itertools
import json
import os
import threading

import torch

from yojo.judges.client import KEY_VARIABLE, Client, EndpointError, PolicyError, check_int, check_number
from yojo.judges.judge import Refusal
from yojo.judges.parsing import Unparsable, labels_of, verdict
from yojo.judges.pool import Pool
from yojo.judges.prompts import conversation, messages_of, prompt_digest, template_of

AHEAD = 2  # examples that are read beyond those whose requests can be under way
_OURS = ("model", "messages", "temperature", "seed", "max_tokens", "n", "stream")


class Generative:
    """A judge that is asked in words, through the chat completions of an OpenAI-compatible endpoint.

    style="listwise": one request shows all responses, labelled A, B, ... (1, 2, ... where there are more than 26) in the
    example's order, and asks for a ranking; a response's score is how many of the others it beats, a tie counted as half a
    one: N - 1 for a best one alone, 0 for a worst one alone. style="pairwise": N(N-1)/2 requests, one for each pair as they
    stand; the score is wins and half the ties (Copeland's), on the same scale. style="pointwise": one request for each
    response, which shows no other; the score is the number from 1 to 10. With N = 1 there is nothing to compare: listwise
    and pairwise give 0 without a request.

    Conversation and responses stand in blocks (`yojo.judges.prompts`) that are told by characters which depend on all that
    is shown and stand nowhere in it: no response can close its block, or write into the judge's part. The verdict is read
    from the judge's reply alone, by `yojo.judges.parsing`: exactly one, at the end, in the form that was asked for. A reply
    without one is asked for again once, with the next seed. Then, and where the judge or its server refuses, says
    nothing, or is cut at max_tokens, the example's result is a `Refusal`: never a guess. Images go as data URLs, videos as
    frames, evenly sampled (`yojo.judges.pictures`).

    From any number of threads; scores do not depend on concurrency.

    Args:
        url: of the endpoint, in front of "/chat/completions", such as "http://127.0.0.1:8000/v1".
        model: its name there.
        style: "listwise", "pairwise" or "pointwise".
        api_key: sent in the header Authorization, and kept out of everything else; by default what the environment
            variable OPENAI_API_KEY holds, "" for none.
        temperature, seed, max_tokens: of every request; max_tokens=None leaves it out, for models that take another name
            for it (extra_body={"max_completion_tokens": ...}).
        concurrency: requests under way at once, at most.
        timeout: seconds in which the server may say nothing.
        retries: of a request that times out, breaks, or gets status 408, 409, 429 or 5xx; at most.
        prompt: a template of one's own, see `yojo.judges.prompts.template_of`; or None.
        image_detail: "low", "high" or "auto", for endpoints that know it; or None.
        max_frames: of a video, at most.
        extra_body: dict, further fields of every request, such as {"top_p": 0.9}; or None.

    Attributes:
        seen: `collections.Counter`, the model that answered, as replies name it -> the number of replies.

    Raises:
        TypeError, ValueError: a bad argument.

    Example:
        >>> judge = yojo.judges.Generative("http://127.0.0.1:8000/v1", "my-judge")
        >>> judge.score_many([yojo.Example("Which digit is it?", ["A 7.", "No idea.", "Seven."], images=["seven.png"])])
        [tensor([1.5000, 0.0000, 1.5000])]
    """

    def __init__(
        self,
        url,
        model,
        *,
        style="listwise",
        api_key=None,
        temperature=0.0,
        seed=0,
        max_tokens=4096,
        concurrency=8,
        timeout=300.0,
        retries=5,
        prompt=None,
        image_detail=None,
        max_frames=16,
        extra_body=None,
    ):
        if not isinstance(model, str) or not model.strip():
            raise ValueError(f"model must be the name of a model at the endpoint, got {model!r}")
        self.template = template_of(style, prompt)
        for name, value, least in (
            ("seed", seed, None),
            ("max_tokens", max_tokens, 1),
            ("concurrency", concurrency, 1),
            ("retries", retries, 0),
            ("max_frames", max_frames, 1),
        ):
            if not (name == "max_tokens" and value is None):
                check_int(name, value, least)
        check_number("temperature", temperature, above=False)
        check_number("timeout", timeout, above=True)
        if image_detail not in (None, "low", "high", "auto"):
            raise ValueError(f"image_detail must be 'low', 'high', 'auto' or None, got {image_detail!r}")
        key = os.environ.get(KEY_VARIABLE, "") if api_key is None else api_key
        self.client = Client(url, key, timeout, retries, concurrency)
        self.url, self.model, self.style, self.concurrency = self.client.url, model, style, concurrency
        self.temperature, self.seed, self.max_tokens = float(temperature), seed, max_tokens
        self.image_detail, self.max_frames = image_detail, max_frames
        self.extra_body = _checked_body(extra_body)
        self._seen, self._lock = collections.Counter(), threading.Lock()

    def __getstate__(self):
        return {**vars(self), "_seen": collections.Counter(), "_lock": None}

    def __setstate__(self, state):
        vars(self).update(state, _lock=threading.Lock())

    def __repr__(self):
        return f"Generative({self.url!r}, {self.model!r}, style={self.style!r})"

    @property
    def order_free(self):
        """Whether no score depends on the order of the responses: "pointwise", where none is shown beside another."""
        return self.style == "pointwise"

    @property
    def seen(self):
        """`collections.Counter`: the model that answered, as replies name it ("name", or "name (system_fingerprint)")."""
        with self._lock:
            return collections.Counter(self._seen)

    def fingerprint(self):
        """All that changes a score and is known here, a dict; the endpoint may change its model, see `seen`."""
        return {
            "judge": "Generative",
            "url": self.url,
            "model": self.model,
            "style": self.style,
            "prompt": prompt_digest(self.style, self.template),
            "temperature": self.temperature,
            "seed": self.seed,
            "max_tokens": self.max_tokens or 0,
            "image_detail": self.image_detail or "",
            "max_frames": self.max_frames,
            "extra_body": self.extra_body,
        }

    def score_many(self, examples):
        """Score many examples, several requests at once.

        Args:
            examples: iterable of `yojo.Example`.

        Returns:
            list of [N] float32 tensors and `Refusal`s, in the order of examples.

        Raises:
            TypeError, ValueError: an example that cannot be shown, or whose request the server refuses; the message names it.
            EndpointError: the server cannot be reached, or does not answer; the message names the example. A RuntimeError.
        """
        with contextlib.closing(self.score_each(examples)) as stream:
            found = dict(stream)
        return [found[place] for place in range(len(found))]

    def score_each(self, examples, errors="raise"):
        """Score a stream of examples, and give the scores as they come.

        Args:
            examples: iterable of `yojo.Example`; it is read a few examples ahead.
            errors: "raise", or "return": an example that cannot be scored has the TypeError or ValueError in place of its
                scores, and the others go on.

        Yields:
            (place, scores) in any order: the number of the example, from 0, and its [N] float32 tensor or `Refusal`.

        Raises:
            TypeError, ValueError, EndpointError: as `score_many`. Requests under way are ended, then and where nobody reads on.
        """
        if errors not in ("raise", "return"):
            raise ValueError(f"errors must be 'raise' or 'return', got {errors!r}")
        return self._stream(iter(examples), errors)

    def _stream(self, examples, errors):
        numbered, under_way = enumerate(examples), {}
        with contextlib.closing(Pool(self.concurrency)) as pool:
            while True:
                for place, example in itertools.islice(numbered, max(0, self.concurrency + AHEAD - len(under_way))):
                    under_way[place] = _Asked(example)
                    pool.give((place, None), self._requests, example)
                if not under_way:
                    return
                (place, number), found, error = pool.take()
                if error is not None and (errors == "raise" or not isinstance(error, (TypeError, ValueError))):
                    raise error
                asked = under_way[place]
                if number is not None or error is not None:
                    asked.found[number or 0] = error or found
                else:
                    asked.begin(found)
                    for n, request in enumerate(found):
                        pool.give((place, n), self._ask, asked, request, pool.stop)
                if asked.is_done:
                    del under_way[place]
                    yield place, self._result(asked)

    def _requests(self, example):
        """What an example has to be asked for: list of `_Request`."""
        responses = list(example.responses)
        if len(responses) == 1 and self.style != "pointwise":
            return []
        if self.style == "listwise":
            shown = {"": responses}
        elif self.style == "pairwise":
            shown = {f"responses {i} and {j}: ": [responses[i], responses[j]] for i, j in _pairs(len(responses))}
        else:
            shown = {f"response {i}: ": [text] for i, text in enumerate(responses)}
        pieces = conversation(example, detail=self.image_detail, max_frames=self.max_frames)
        return [_Request(of, messages_of(self.template, self.style, pieces, some)) for of, some in shown.items()]

    def _ask(self, asked, request, stop):
        """The verdict of one request, or a `Refusal`."""
        labels, name = labels_of(len(asked.example.responses)), f"{asked.example.name}: {request.of}"
        body = {**self.extra_body, "model": self.model, "messages": request.messages, "temperature": self.temperature}
        body |= {} if self.max_tokens is None else {"max_tokens": self.max_tokens}
        for seed in (self.seed, self.seed + 1):
            try:
                said = self.client.post("/chat/completions", body | {"seed": seed}, stop, self._read)
                return said if isinstance(said, Refusal) else verdict(said, self.style, labels)
            except Unparsable as error:
                failed = str(error)
            except PolicyError as error:
                return Refusal(str(error))
            except EndpointError as error:
                raise EndpointError(f"{name}{error}") from error
            except ValueError as error:
                raise ValueError(f"{name}{error}") from error
        return Refusal(f"asked twice: {failed}")

    def _read(self, reply):
        """What a reply says: a string, or a `Refusal`."""
        try:
            (choice,) = reply["choices"]
            message, ended = choice["message"], choice.get("finish_reason")
            content, refused = message.get("content"), message.get("refusal")
            if isinstance(content, list):
                content = "".join(part["text"] for part in content if part.get("type") == "text")
            if not isinstance(content, (str, type(None))):
                raise TypeError(f"content is {content!r}")
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"the reply is no chat completion with one choice: {json.dumps(reply)[:200]}") from error
        self._count(reply)
        if refused:
            return Refusal(f"it refuses: {_line(refused)}")
        if ended == "content_filter":
            return Refusal("the endpoint's content filter took the reply away")
        if ended == "length":
            return Refusal(f"the reply was cut (finish_reason length, max_tokens={self.max_tokens}): raise max_tokens")
        if not (content or "").strip():
            return Refusal(f"the reply is empty (finish_reason {ended})")
        return content

    def _count(self, reply):
        name, state = reply.get("model") or "not named", reply.get("system_fingerprint")
        with self._lock:
            self._seen[_line(f"{name} ({state})" if state else name)] += 1

    def _result(self, asked):
        """[N] float32; or the first exception or `Refusal` among the requests of an example."""
        found, count = [asked.found[n] for n in sorted(asked.found)], len(asked.example.responses)
        failed = next((one for one in found if isinstance(one, Exception)), None)
        if failed is not None:
            return failed
        for of, one in zip(asked.of, found, strict=True):
            if isinstance(one, Refusal):
                return Refusal(f"{of}{one.reason}")
        if self.style == "pointwise":
            scores = found
        elif self.style == "listwise":
            scores = found[0] if found else [0.0]
        else:
            scores = [0.0] * count
            for (i, j), won in zip(_pairs(count), found, strict=True):
                scores[i] += won
                scores[j] += 1 - won
        return torch.tensor(scores, dtype=torch.float32)


@dataclasses.dataclass(frozen=True)
class _Request:
    """One request of an example: which responses it is of, for errors, and its messages."""

    of: str
    messages: list


class _Asked:
    """An example whose requests are under way.

    Attributes:
        of: which responses each request is of, for errors; None while the requests are made.
        found: dict number of the request -> its verdict, a `Refusal`, or the exception that it has raised.
    """

    def __init__(self, example):
        self.example, self.of, self.found = example, None, {}

    def begin(self, requests):
        self.of = [request.of for request in requests]  # what they show is large, and with whoever sends it

    @property
    def is_done(self):
        return len(self.found) >= len(self.of) if self.of is not None else bool(self.found)


def _pairs(count):
    return list(itertools.combinations(range(count), 2))


def _line(text):
    text = " ".join(str(text).encode(errors="replace").decode().split())  # half a surrogate pair goes into no file
    return text if len(text) <= 200 else f"{text[:197]}..."


def _checked_body(body):
    """Further fields of requests, a copy."""
    if body is None:
        return {}
    if not isinstance(body, dict) or not all(isinstance(key, str) for key in body):
        raise TypeError(f"extra_body must be a dict of fields of the request, or None, got {body!r}")
    if taken := sorted(set(body) & set(_OURS)):
        raise ValueError(
            f"extra_body has {', '.join(taken)}, which the judge says itself: use the arguments model, temperature, seed and "
            "max_tokens; one reply is read, whole"
        )
    try:
        return json.loads(json.dumps(body, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise ValueError(f"extra_body cannot be written as JSON: {error}") from error

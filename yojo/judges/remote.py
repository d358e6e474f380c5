"""`RemoteJudge`: a reward model that `yojo serve` serves, elsewhere; the scores are those that it gives here."""

import asyncio
import contextlib
import itertools
import json
import os

from yojo.inputs.example import Example
from yojo.judges.client import Client, EndpointError, Stop, Stopped, check_int, check_number
from yojo.judges.pool import Hands, Pool
from yojo.judges.wire import request_of, scores_of, served_of

AHEAD = 2  # examples that are read beyond those whose requests can be under way


class RemoteClient(Client):
    """Requests to a server of `yojo serve`."""

    WHAT, EXAMPLE, BEHIND = "a server of `yojo serve`", "http://127.0.0.1:8000", "/score"
    VARIABLE = "YOJO_API_KEY"
    REFUSED = (400, 404, 413, 422)
    UNCOUNTED = (429, 503, 504)  # overloaded, not ready yet or for a moment, too slow

    def _said(self, found):
        """The message of an error, and the field that is wrong, where it has our form."""
        try:
            error = json.loads(found)["error"]
            message, param = error["message"], error.get("param")
        except (ValueError, KeyError, TypeError, AttributeError):
            return super()._said(found)
        return f"{message} ({param})" if param else str(message)


class RemoteJudge:
    """A reward model behind `yojo serve`, as a judge: what it is shown is what `yojo.RewardModel` is, to the letter and the pixel.

    A request for each example, many under way at once, over connections that are kept. Text goes as it is, image files (PNG,
    JPEG, WebP, BMP, TIFF, GIF) byte for byte, what is no such file as a PNG of the same pixels; files are read here. Videos
    go as frames: lists, arrays and folders of them. Video files are refused, since which of their frames are taken is up to
    the processor there.

    What is overloaded (429), not ready (503) or too slow (504) is asked again until the deadline, after as long as it says;
    broken connections and other errors of the server are tried again, `retries` times. An example never gets scores that are
    not finite, and never those of another model: each reply says whose its scores are, and once the server serves another
    model than at first, that is an error.

    From any number of threads and event loops, in forked processes, and in others that it is pickled for.

    Args:
        url: of the server, "http://host:port" or "https://...", in front of "/score".
        api_key: sent in the header Authorization, and kept out of everything else; by default what the environment
            variable YOJO_API_KEY holds, "" for none.
        model: its name there; None: the one that is served.
        deadline: seconds in which an example is scored, retries included; the server is told how many are left.
        timeout: seconds in which the server may say nothing.
        retries: of a request that times out, breaks, or gets a status that says the server has failed; at most.
        concurrency: requests under way at once, at most.

    Raises:
        TypeError, ValueError: a bad argument. The server is first asked when something is wanted of it.

    Example:
        >>> with yojo.RemoteJudge("http://127.0.0.1:8000") as judge:
        ...     judge.score("Which digit is shown?", ["It is a 7.", "It is a 2."], images=["seven.png"])
        tensor([ 1.3, -0.8])
    """

    def __init__(self, url, *, api_key=None, model=None, deadline=600.0, timeout=120.0, retries=5, concurrency=16):
        if model is not None and (not isinstance(model, str) or not model.strip()):
            raise ValueError(f"model must be the name of a model at the server, or None, got {model!r}")
        check_number("deadline", deadline, above=True)
        check_number("timeout", timeout, above=True)
        check_int("retries", retries, 0)
        check_int("concurrency", concurrency, 1)
        key = os.environ.get(RemoteClient.VARIABLE, "") if api_key is None else api_key
        self.client = RemoteClient(url, key, timeout, retries, concurrency)
        self.url, self.model, self.deadline, self.concurrency = self.client.url, model, deadline, concurrency
        self._met = {}  # "served" -> `Served`, the first; a dict sets it once, whichever thread is first
        self._hands = Hands(concurrency)

    def __getstate__(self):
        return {**vars(self), "_met": dict(self._met), "_hands": None}

    def __setstate__(self, state):
        vars(self).update(state, _hands=Hands(state["concurrency"]))

    def __repr__(self):
        return f"RemoteJudge({self.url!r}{'' if self.model is None else f', model={self.model!r}'})"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def close(self):
        """Close the connections that nothing is under way on. What is scored later opens new ones."""
        self.client.close()

    @property
    def order_free(self):
        """Whether no score depends on the order of the responses, as the server says."""
        return self._served(Stop()).order_free

    @property
    def mode(self):
        """The mode of the model that is served, such as "isolated"."""
        return self._served(Stop()).mode

    def fingerprint(self):
        """All that changes a score, a dict: `fingerprint()` of the `yojo.RewardModel` that is served.

        Raises:
            ValueError, EndpointError: as `score_many`.
        """
        return json.loads(json.dumps(self._served(Stop()).fingerprint))  # a copy, at any depth

    def score(self, prompt, responses, images=None, videos=None, *, tools=None, literal_tags=False):
        """Score the responses to one prompt, as `yojo.RewardModel.score` does.

        Args:
            prompt: string or chat messages (see `yojo.Example`).
            responses: N strings.
            images, videos: lists, or None.
            tools: list of dicts for the chat template, or None.
            literal_tags: `<image>` and `<video>` in the prompt are text, not places.

        Returns:
            [N] float32, in the order of responses; higher is better.

        Raises:
            TypeError, ValueError, EndpointError: as `score_many`.
        """
        example = Example(prompt, responses, images=images, videos=videos, tools=tools, literal_tags=literal_tags)
        return self._score(example, Stop())

    def score_many(self, examples):
        """Score many examples, several requests at once.

        Args:
            examples: iterable of `yojo.Example`.

        Returns:
            list of [N] float32 tensors, in the order of examples.

        Raises:
            TypeError, ValueError: an example that cannot be sent, or that the server refuses; the message names it and says
                which field is wrong. Or there is no such server or model at this address.
            EndpointError: the server cannot be reached, does not answer in time, serves another model than before, or has no
                finite score; the message names the example. A RuntimeError.
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
            (place, scores) in any order: the number of the example, from 0, and its [N] float32 tensor.

        Raises:
            TypeError, ValueError, EndpointError: as `score_many`. Requests under way are ended, then and where nobody reads on.
        """
        if errors not in ("raise", "return"):
            raise ValueError(f"errors must be 'raise' or 'return', got {errors!r}")
        return self._stream(enumerate(examples), errors)

    def _stream(self, numbered, errors):
        under_way = 0
        with contextlib.closing(Pool(self.concurrency)) as pool:
            while True:
                for place, example in itertools.islice(numbered, self.concurrency + AHEAD - under_way):
                    self._served(pool.stop)  # what is wrong with the address is no fault of an example
                    pool.give(place, self._score, example, pool.stop)
                    under_way += 1
                if not under_way:
                    return
                place, found, error = pool.take()
                if error is not None and (errors == "raise" or not isinstance(error, (TypeError, ValueError))):
                    raise error
                under_way -= 1
                yield place, found if error is None else error

    async def ascore(self, prompt, responses, images=None, videos=None, *, tools=None, literal_tags=False):
        """As `score`, in an event loop; where the task is cancelled, the request is ended at the server, too.

        Args:
            prompt, responses, images, videos, tools, literal_tags: as for `score`.

        Returns:
            [N] float32, in the order of responses; higher is better.

        Raises:
            TypeError, ValueError, EndpointError: as `score_many`.
        """
        example = Example(prompt, responses, images=images, videos=videos, tools=tools, literal_tags=literal_tags)
        return (await self.ascore_many([example]))[0]

    async def ascore_many(self, examples):
        """As `score_many`, in an event loop; where the task is cancelled or an example fails, requests under way are ended.

        Args:
            examples: iterable of `yojo.Example`, which is read to its end at once.

        Returns:
            list of [N] float32 tensors, in the order of examples.

        Raises:
            TypeError, ValueError, EndpointError: as `score_many`.
        """
        loop, stop = asyncio.get_running_loop(), Stop()
        try:
            return await asyncio.gather(*[self._begun(loop, example, stop) for example in examples])
        finally:
            stop.set()

    def _begun(self, loop, example, stop):
        """A future of the scores of an example, which are asked for in a thread."""
        future = loop.create_future()

        def work():
            found = error = None
            try:
                found = self._score(example, stop)
            except BaseException as raised:  # raised by whoever awaits it
                error = raised
            with contextlib.suppress(RuntimeError):  # the loop is closed, and nobody waits
                loop.call_soon_threadsafe(_settle, future, found, error)

        self._hands.give(work)
        return future

    def _served(self, stop):
        """What is served: asked once, and the same from then on."""
        if "served" in self._met:
            return self._met["served"]

        def read(headers, content):
            try:
                return served_of(content, self.model)
            except EndpointError as error:
                raise EndpointError(f"{self.url}: {error}") from error

        try:
            found = self.client.request("GET", "/v1/models", None, stop, read, self.deadline)
        except LookupError as error:
            raise ValueError(f"{self.url}: {error.args[0]}") from error
        return self._met.setdefault("served", found)

    def _score(self, example, stop):
        """[N] float32 of an example."""
        if stop.is_set():
            raise Stopped
        served, name, count = self._served(stop), example.name, len(example.responses)
        data = json.dumps(request_of(example, self.model), ensure_ascii=False).encode()
        if served.largest is not None and len(data) > served.largest:
            raise ValueError(
                f"{name}: a request of {len(data)} bytes, and {self.url} takes {served.largest} at most: send smaller images, or "
                "raise the server's limit"
            )

        def read(headers, content):
            try:
                return scores_of(headers, content, count, served.digest)
            except EndpointError as error:
                raise EndpointError(f"{self.url}: {error}") from error

        try:
            return self.client.request("POST", "/score", data, stop, read, self.deadline)
        except EndpointError as error:
            raise EndpointError(f"{name}: {error}") from error
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error


def _settle(future, found, error):
    """Give a future what it waits for, should it still wait."""
    if future.done():
        return
    if isinstance(error, Stopped):
        future.cancel()
    elif error is not None:
        future.set_exception(error)
    else:
        future.set_result(found)

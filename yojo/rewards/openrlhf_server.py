"""`RewardServer`: OpenRLHF's remote reward model, one sample a request, with the requests of a group answered together."""

import collections
import dataclasses
import functools
import http.server
import json
import logging
import select
import socket
import threading
import time
import typing

from yojo.inputs.digests import digest
from yojo.rewards.collator import GroupCollator
from yojo.rewards.openrlhf_samples import given, logs, question
from yojo.rewards.templates import AskedBy

logger = logging.getLogger(__name__)

LARGEST = 64 << 20  # bytes of a request
PATIENCE = 10.0  # seconds after which a client that is gone will not come again: OpenRLHF does, after one


class Queries:
    """Reads OpenRLHF's texts: a query is what the policy was shown and what it wrote, special tokens and all.

    Args:
        processor: the policy's processor or tokenizer; None: prompts are written in queries as they are.
        eos: texts of tokens that end a response, beside the processor's own; one that ends in none of them is truncated.
        prompt: how the judge learns the question, as for `yojo.rewards.openrlhf.GroupAgent`.

    Raises:
        ValueError: what ends a response cannot be told, or "template" without a processor.
    """

    def __init__(self, processor=None, *, eos=(), prompt="template"):
        self._tokenizer = getattr(processor, "tokenizer", processor)
        own = getattr(self._tokenizer, "eos_token", None)
        self._eos = tuple(dict.fromkeys([*([own] if own else []), *eos]))
        if not self._eos or not all(self._eos):
            raise ValueError("what ends a response must be known: the policy's tokenizer, or eos, such as '<|im_end|>'")
        if prompt == "template" and processor is None:
            raise ValueError(
                "prompt='template' needs the policy's tokenizer; prompt='label' takes the question from --data.label_key, and "
                "prompt='text' is for training without --data.apply_chat_template"
            )
        self._prompt, self._asked_by = prompt, AskedBy(processor) if prompt == "template" else None
        self._head = functools.lru_cache(maxsize=1024)(self._decoded)

    def read(self, query, prompt, label):
        """What a judge is shown of a query.

        Returns:
            (prompt, as for `yojo.Example`; the completion, str; whether it is truncated).

        Raises:
            ValueError: what the policy wrote cannot be told from what it was shown.
        """
        head = self._head(prompt)
        if not query.startswith(head):
            raise ValueError(
                "the query does not begin with its prompt. Prompts that OpenRLHF cuts to --data.max_len, or shows images with, "
                "cannot be scored over HTTP (images do not come here: use the agent); a tokenizer that does not write what it "
                f"has read needs --tokenizer. The prompt: {head[:200]!r}, the query: {query[: len(head) + 100][-300:]!r}"
            )
        completion = query[len(head) :]
        end = next((text for text in self._eos if completion.endswith(text)), None)
        if end is not None:
            completion = completion[: -len(end)]
        return question(self._prompt, self._asked_by, prompt, label), completion, end is None

    def _decoded(self, prompt):
        """A prompt as it stands in queries: what its tokens say."""
        if self._tokenizer is None:
            return prompt
        ids = self._tokenizer(text=prompt, add_special_tokens=False)["input_ids"]
        return self._tokenizer.decode(ids, skip_special_tokens=False)


@dataclasses.dataclass(eq=False)
class _Handed:
    """A sample that was handed in.

    Attributes:
        future: of its `Reward`.
        connection: of the client that waits for it; None: it is gone.
        since: when it was found to be gone.
    """

    future: typing.Any
    connection: socket.socket | None
    since: float = 0.0


class Desk:
    """Samples that clients wait for, and may hand in again.

    OpenRLHF gives up a request after 180 s and sends it again, up to five times, with nothing that tells it from another
    sample of the same text. What does is the connection: a sample whose client is gone is the one that comes again; where all
    clients of a text are there, it is one more. A client that does not come again takes its sample with it.

    Args:
        gone: function of a connection, whether its client has left; None: `is_gone`, of a socket.
    """

    def __init__(self, gone=None):
        self._is_gone = gone or is_gone
        self._lock, self._handed = threading.Lock(), collections.defaultdict(list)

    def hand_in(self, text, add, connection):
        """The sample of a text that this client waits for; `add()` makes the future of a new one."""
        with self._lock:
            for one in self._handed.get(text, ()):
                if one.connection is None or self._is_gone(one.connection):
                    one.connection = connection
                    return one
            one = _Handed(add(), connection)
            self._handed[text].append(one)
            return one

    def take(self, text, one, connection):
        """Whether this client may be answered: it is there, and nobody has come again in its place."""
        with self._lock:
            if one.connection is not connection:
                return False
            if self._is_gone(connection):
                self._let_go(one)
                return False
            self._drop(text, one)
            return True

    def put_back(self, text, one):
        """The answer did not get through: it is there for the next time."""
        with self._lock:
            self._let_go(one)
            self._handed[text].append(one)

    def sweep(self):
        """Give up the samples of clients that are gone for good."""
        given_up = []
        with self._lock:
            for text, some in list(self._handed.items()):
                for one in list(some):
                    if one.connection is not None and self._is_gone(one.connection):
                        self._let_go(one)
                    if one.connection is None and time.monotonic() - one.since > PATIENCE:
                        self._drop(text, one)
                        given_up.append(one)
        for one in given_up:
            one.future.cancel()

    def __len__(self):
        with self._lock:
            return sum(map(len, self._handed.values()))

    def _drop(self, text, one):
        self._handed[text].remove(one)
        if not self._handed[text]:
            del self._handed[text]

    @staticmethod
    def _let_go(one):
        one.connection, one.since = None, time.monotonic()


def is_gone(connection):
    """Whether a client has closed its end, of a socket that may be read elsewhere meanwhile."""
    try:
        events = select.poll()
        events.register(connection, select.POLLIN)
        return bool(events.poll(0)) and not connection.recv(1, socket.MSG_PEEK)
    except (OSError, ValueError):  # closed here, or reset there
        return True


class RewardServer:
    """OpenRLHF's remote reward model: POST /get_reward, and GET /health and /metrics.

    A request waits until its group is whole. Samples of one prompt and label are a group, `group_size` of them in the order
    they come: the same number has to be sampled in training and evaluation, several servers would each see parts of groups,
    and two rows of one prompt and label may swap samples, which they do not with `GroupAgent`.

    What goes wrong is an HTTP error (422: the input; 424: no reward), never a reward. OpenRLHF (0.11) asks five times, 180 s
    each; then it goes on without a reward for the sample, and stops with an error of its own ("reward_model_group is
    required", or an AttributeError of None) before it trains on it. The reason is in this server's log.

    Args:
        score, group_size: as for `yojo.rewards.collator.GroupCollator`.
        deadline: seconds from a group's first sample to its last; in 900 s OpenRLHF has given up.
        queries: `Queries`.
        address: (host, port); port 0: a free one.

    Raises:
        OSError: the address is in use.
    """

    def __init__(self, score, group_size, queries, *, address=("127.0.0.1", 5000), deadline=600.0):
        # What comes again after its group has failed is late, and answered at once; nobody comes as late as a minute after.
        self.collator = GroupCollator(score, group_size, deadline=deadline, reuse_keys=True, remember_seconds=60.0)
        self.desk, self.queries = Desk(), queries
        self._http = _Server(address, _Handler)
        self._http.owner, self._serving = self, False
        self.address = self._http.server_address[:2]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def serve(self):
        """Serve until `close` is called, from another thread."""
        self._serving = True
        try:
            self._http.serve_forever()
        finally:
            self._serving = False

    def close(self):
        """End all requests with an error, and the server."""
        if self._serving:
            self._http.shutdown()
        self.collator.close()
        self._http.server_close()

    def rewards(self, data, connection):
        """The answer to a request, a dict, and what was handed in for it; None where its client is not there any more."""
        handed, found = [], None
        try:
            for query, prompt, label in samples_of(data):
                shown, completion, truncated = self.queries.read(query, prompt, label)
                add = functools.partial(
                    self.collator.add, key_of(shown, prompt, label), shown, completion, truncated=truncated
                )
                text = digest([query, prompt, label])
                handed.append((text, self.desk.hand_in(text, add, connection)))
            found = [one.future.result() for _, one in handed]
            rewards = [given(one) for one in found]
        finally:
            taken = [self.desk.take(text, one, connection) for text, one in handed]
            for (_, one), mine in zip(handed, taken, strict=True):
                if found is None and mine:  # the client hears of an error, and sends all of its samples again
                    one.future.cancel()
        if not all(taken):
            return None
        made = [logs(one) for one in found]
        extra = {name: [one[name] for one in made] for name in made[0]}
        return {"rewards": rewards, "scores": rewards, "extra_logs": extra}, handed


def key_of(shown, prompt, label):
    """What tells a group from others, and, to people, which it is: how the question ends."""
    said = shown if isinstance(shown, str) else json.dumps(shown[-1], ensure_ascii=False)
    return f"{digest([prompt, label])} (...{said.strip()[-60:]})"


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 1024

    def service_actions(self):
        self.owner.desk.sweep()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 60.0  # seconds between a connection and its request, and for each part of it

    def do_POST(self):
        if not self._is_reward():
            return self._say(404, {"error": f"there is /get_reward, not {self.path}"})
        data = self._body()
        if data is None:
            return
        owner = self.server.owner
        try:
            found = owner.rewards(data, self.connection)
        except (TypeError, ValueError) as error:
            return self._refuse(422, error)
        except Exception as error:
            return self._refuse(424, error)
        if found is None:
            self.close_connection = True
            return
        answer, handed = found
        try:
            self._say(200, answer)
        except OSError:
            for text, one in handed:
                owner.desk.put_back(text, one)
            self.close_connection = True

    def do_GET(self):
        if self.path == "/health":
            self._say(200, {"status": "ok"})
        elif self.path == "/metrics":
            numbers = {**self.server.owner.collator.metrics(), "yojo_clients_waiting": len(self.server.owner.desk)}
            self._send(
                200, "".join(f"{name} {value}\n" for name, value in numbers.items()), "text/plain; version=0.0.4"
            )
        elif self._is_reward():
            self._say(405, {"error": "/get_reward is asked by POST"}, Allow="POST")
        else:
            self._say(404, {"error": f"there are /health and /metrics, not {self.path}"})

    def _is_reward(self):
        return self.path.rstrip("/") in ("/get_reward", "")

    def log_message(self, text, *arguments):
        logger.debug(text, *arguments)

    def _body(self):
        """What was sent; None where it cannot be read, which has been said."""
        try:
            length = int(self.headers["Content-Length"])
        except (TypeError, ValueError):
            self.close_connection = True
            return self._say(411, {"error": "a Content-Length is needed"})
        if not 0 <= length <= LARGEST:
            self.close_connection = True
            return self._say(413, {"error": f"{length} bytes, and {LARGEST} are the most"})
        try:
            return json.loads(self.rfile.read(length))
        except ValueError as error:
            self._say(400, {"error": f"no JSON: {error}"})

    def _refuse(self, status, error):
        logger.error("no reward: %s: %s", type(error).__name__, error)
        try:
            self._say(status, {"error": str(error)})
        except OSError:  # its client is gone
            self.close_connection = True

    def _say(self, status, answer, **headers):
        self._send(status, json.dumps(answer, allow_nan=False), "application/json", headers)

    def _send(self, status, text, kind, headers=()):
        body = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)


def samples_of(data):
    """[(query, prompt, label)] of a request's JSON."""
    lists = [data.get(name) if isinstance(data, dict) else None for name in ("query", "prompts", "labels")]
    if not all(isinstance(one, list) for one in lists) or len({len(one) for one in lists}) != 1 or not lists[0]:
        raise ValueError(
            "a request must be an object with query, prompts and labels: lists of one length, of at least 1"
        )
    for query, prompt, _ in zip(*lists, strict=True):
        if not isinstance(query, str) or not isinstance(prompt, str):
            raise TypeError("query and prompts must hold strings")
    return list(zip(*lists, strict=True))

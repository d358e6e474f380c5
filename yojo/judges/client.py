"""Requests to an OpenAI-compatible endpoint, by the standard library: retried where that may help, ended when nobody waits."""

import base64
import contextlib
import email.utils
import http.client
import ipaddress
import json
import logging
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
RETRIED = (408, 409, 429)  # and 500 to 599
REFUSED = (400, 413, 422)  # the request itself; it would be refused again
FIRST_WAIT = 1.0  # seconds before the first retry, doubled with each, up to
LONGEST_WAIT = 60.0
LONGEST_ASKED = 600.0  # seconds that a server may ask for; whoever asks for more is not waited for
LARGEST = 1 << 26  # bytes of a reply
_POLICY = ("content_filter", "content_policy_violation")  # codes of errors by which servers refuse what a request shows


class EndpointError(RuntimeError):
    """An endpoint that cannot be reached, or gives no answer: nothing is known of what it was asked, and nothing is scored."""


class PolicyError(Exception):
    """The endpoint answered that it will not judge what it was shown."""


class Stopped(Exception):
    """Nobody waits for the answer any more."""


class Stop:
    """Ends requests under way, from another thread: their sockets are shut down, and their waits end."""

    def __init__(self):
        self._event, self._lock, self._sockets = threading.Event(), threading.Lock(), set()

    def is_set(self):
        return self._event.is_set()

    def wait(self, seconds):
        """Wait, but not longer than until it is set."""
        self._event.wait(seconds)

    def set(self):
        self._event.set()
        with self._lock:
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def shuts(self, sock):
        """Inside, a socket is shut down when this is set."""
        with self._lock:
            self._sockets.add(sock)
        try:
            if self.is_set():
                raise Stopped
            yield
        finally:
            with self._lock:
                self._sockets.discard(sock)


def check_url(url):
    """The address of an endpoint, without a slash at its end.

    Args:
        url: "http://host:port/v1" or "https://...", in front of "/chat/completions".

    Raises:
        ValueError: no such address; or one with a password, a query or a fragment, which would stand in files and logs.
    """
    expected = "such as http://127.0.0.1:8000/v1, in front of /chat/completions"
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise ValueError(f"url must be the http(s) address of an OpenAI-compatible endpoint, {expected}, got {url!r}")
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"url cannot be read ({error}); {expected}") from error
    if "@" in parts.netloc:  # the address is not shown
        raise ValueError("url must hold no user name and no password: they would stand in files; pass api_key instead")
    if "?" in url or "#" in url:
        raise ValueError(f"url must have no query (?...) and no fragment (#...); {expected}")
    if not host or not url.isascii() or re.search(r"[\s\x00-\x1f\x7f]", url):
        raise ValueError(f"url must be an address with a host, in ASCII without blanks; {expected}, got {url!r}")
    if parts.path.rstrip("/").endswith("/chat/completions"):
        raise ValueError(f"url must end in front of /chat/completions; {expected}, got {url!r}")
    return url.rstrip("/")


def check_key(key):
    """Refuse a key that no header takes, without showing it."""
    if not isinstance(key, str) or not re.fullmatch(r"[\x21-\x7e]*", key):
        raise ValueError(
            "api_key must be a string of printable ASCII without blanks (or line breaks: is it read from a file?)"
        )
    return key


class Client:
    """Posts to one endpoint, from any number of threads, a bounded number of requests at once.

    Proxies of the environment (http_proxy, https_proxy, no_proxy) are used, for addresses of this machine never. Redirects
    are errors: a request, its images and its key go where they were meant to.

    Args:
        url: as `check_url` takes it.
        key: goes into the header Authorization, and nowhere else; "" for none.
        timeout: seconds in which a server may say nothing.
        retries: of a request, at most.
        concurrency: requests that are with the server at once, at most.
    """

    def __init__(self, url, key, timeout, retries, concurrency):
        self.url = check_url(url)
        self._key, self.timeout, self.retries, self.concurrency = check_key(key), timeout, retries, concurrency
        self._room = threading.BoundedSemaphore(concurrency)
        self._has_said = False
        self._random = random.Random()  # waits are no scores: they may differ
        self._parts = urllib.parse.urlsplit(self.url)
        self._tls = ssl.create_default_context() if self._parts.scheme == "https" else None

    def __repr__(self):
        return f"Client({self.url!r})"

    def __reduce__(self):
        if self._key not in ("", os.environ.get(KEY_VARIABLE)):
            raise TypeError(f"an api_key goes into no pickle: set {KEY_VARIABLE}, which the other process reads itself")
        return _unpickled, (self.url, bool(self._key), self.timeout, self.retries, self.concurrency)

    def post(self, path, body, stop, read=lambda reply: reply):
        """Post a JSON body.

        Timeouts, connections that break, statuses 408, 409, 429 and 5xx, and replies that are not whole are tried again,
        after waits that double and of which half is drawn; where the server says how long (Retry-After), at least as long.

        Args:
            path: behind the url, such as "/chat/completions".
            body: dict.
            stop: `Stop`.
            read: function of the reply; a ValueError of it says that the reply is not whole.

        Returns:
            what `read` returns.

        Raises:
            EndpointError: no answer after all retries, or a status that another request would get, too (401, 404, ...).
            ValueError: the server refuses this request (400, 413, 422); the message shows its answer in a line.
            PolicyError: it refuses what the request shows.
            Stopped: `stop` was set.
        """
        data = json.dumps(body).encode()
        for tried in range(self.retries + 1):
            asked = 0.0
            try:
                with self._room:
                    if stop.is_set():
                        raise Stopped
                    status, headers, found = self._exchange(path, data, stop)
                if status == 200:
                    return read(json.loads(found))
                reason, asked = self._failed(status, headers, found)
            except (OSError, http.client.HTTPException, ValueError) as error:
                if stop.is_set():
                    raise Stopped from error
                if isinstance(error, (_RequestError, ssl.SSLCertVerificationError)):
                    kind = ValueError if isinstance(error, _RequestError) else EndpointError
                    raise kind(f"{self.url}: {self._line(error)}") from error
                reason = self._line(error)
            if tried < self.retries:
                if not self._has_said:  # once: every request would say the same
                    self._has_said = True
                    logger.warning("%s: %s; trying again, %d times at most a request", self.url, reason, self.retries)
                wait = min(LONGEST_WAIT, FIRST_WAIT * 2**tried) * self._random.uniform(0.5, 1)
                pause(stop, max(wait, asked))
                if stop.is_set():
                    raise Stopped
        raise EndpointError(f"{self.url}: no answer after {self.retries + 1} tries; the last one: {reason}")

    def _failed(self, status, headers, found):
        """(what is wrong, seconds the server asks to wait) of a status that is tried again; others are raised."""
        reason = f"status {status}: {self._line(found.decode(errors='replace').strip() or 'no word')}"
        if status in REFUSED or status == 403:
            if _code(found) in _POLICY:
                raise PolicyError(f"the endpoint refuses it ({reason})")
            if status in REFUSED:
                raise _RequestError(f"the request is refused, {reason}")
        if status not in RETRIED and not 500 <= status < 600:
            hint = {401: " (is api_key, or OPENAI_API_KEY, the right one?)", 404: " (are url and model right?)"}
            moved = f" (it points to {headers['Location']}; give that address)" if headers.get("Location") else ""
            raise EndpointError(f"{self.url}: {reason}{moved}{hint.get(status, '')}")
        asked = _seconds(headers.get("Retry-After"))
        if asked > LONGEST_ASKED:
            raise EndpointError(
                f"{self.url}: it asks to wait {asked:.0f} seconds, more than {LONGEST_ASKED:.0f}; {reason}"
            )
        return reason, asked

    def _exchange(self, path, data, stop):
        """(status, headers, body) of one request on a connection of its own."""
        connection, target, more = self._connection()
        headers = {"Content-Type": "application/json", "Accept": "application/json", "User-Agent": "yojo", **more}
        headers["Connection"] = "close"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        with contextlib.closing(connection):
            connection.connect()
            with stop.shuts(connection.sock):
                connection.request("POST", target + path, data, headers)
                with contextlib.closing(connection.getresponse()) as answer:
                    found = answer.read(LARGEST + 1)
                    if len(found) > LARGEST:
                        raise http.client.HTTPException(f"a reply of more than {LARGEST} bytes")
                    if answer.length:  # which a read with a limit does not say by itself
                        raise http.client.IncompleteRead(found, answer.length)
                    return answer.status, answer.headers, found

    def _connection(self):
        """(connection, in front of the path, further headers) to the endpoint, or to the proxy in between."""
        parts, own = self._parts, {"timeout": self.timeout}
        kind = http.client.HTTPConnection
        if self._tls is not None:
            kind, own = http.client.HTTPSConnection, {**own, "context": self._tls}
        proxy = _proxy(parts)
        if proxy is None:
            return kind(parts.hostname, parts.port or (80 if self._tls is None else 443), **own), parts.path, {}
        login = {}
        if proxy.username is not None:
            words = f"{urllib.parse.unquote(proxy.username)}:{urllib.parse.unquote(proxy.password or '')}"
            login["Proxy-Authorization"] = f"Basic {base64.b64encode(words.encode()).decode()}"
        connection = kind(proxy.hostname, proxy.port or 80, **own)
        if self._tls is None:
            return connection, self.url, login
        connection.set_tunnel(parts.hostname, parts.port or 443, login)
        return connection, parts.path, {}

    def _line(self, text, most=300):
        """What went wrong in one line, the key left out should the server repeat it."""
        said = " ".join((str(text) or type(text).__name__).split())
        if self._key:
            said = said.replace(self._key, "***")
        return said if len(said) <= most else f"{said[: most - 3]}..."


def _unpickled(url, has_key, *settings):
    """A client of another process, with the key of this one's environment."""
    key = os.environ.get(KEY_VARIABLE, "") if has_key else ""
    if has_key and not key:
        raise EndpointError(f"{KEY_VARIABLE} is not set in this process, and the client of {url} had a key")
    return Client(url, key, *settings)


class _RequestError(ValueError):
    """The request itself is refused."""


def pause(stop, seconds):
    """Wait in front of a retry."""
    stop.wait(seconds)


def is_loopback(host):
    """Whether a host is this machine, by its name or number."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _proxy(parts):
    """The proxy of the environment for an address, split; or None."""
    if is_loopback(parts.hostname) or urllib.request.proxy_bypass(parts.netloc):
        return None
    found = urllib.request.getproxies().get(parts.scheme)
    if not found:
        return None
    found = urllib.parse.urlsplit(found if "://" in found else f"http://{found}")
    if found.scheme != "http" or not found.hostname:
        raise EndpointError(
            f"the proxy of the environment for {parts.scheme} must be an http:// address; set {parts.scheme}_proxy"
        )
    return found


def _code(found):
    """The code of an error, as OpenAI's servers say it; None for another body."""
    try:
        return json.loads(found)["error"]["code"]
    except (ValueError, KeyError, TypeError):
        return None


def _seconds(text):
    """Seconds of a Retry-After header, which says how many, or a date; 0 for none, or one that says nothing."""
    if not text:
        return 0.0
    if re.fullmatch(r"\s*[0-9]+(\.[0-9]+)?\s*", text):
        return float(text)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError):
        return 0.0

"""Requests to an endpoint, by the standard library: retried where that may help, ended when nobody waits."""

import base64
import contextlib
import email.utils
import http.client
import ipaddress
import json
import logging
import math
import os
import random
import re
import socket
import ssl
import threading
import time
import urllib.parse
import urllib.request
import weakref

from yojo.judges.connections import Connections

logger = logging.getLogger(__name__)

KEY_VARIABLE = "OPENAI_API_KEY"
RETRIED = (408, 409, 429)  # and 500 to 599
FIRST_WAIT = 1.0  # seconds before the first retry, doubled with each, up to
LONGEST_WAIT = 60.0
LONGEST_IN_TIME = 10.0  # where there is a deadline, which is not to be slept through
LONGEST_ASKED = 600.0  # seconds that a server may ask for; whoever asks for more is not waited for
LARGEST = 1 << 26  # bytes of a reply
_PIECE = 1 << 16
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


def check_url(
    url, what="an OpenAI-compatible endpoint", example="http://127.0.0.1:8000/v1", behind="/chat/completions"
):
    """The address of an endpoint, without a slash at its end.

    Args:
        url: "http://host:port/v1" or "https://...", in front of "/chat/completions".
        what: what is there, as errors call it.
        example: an address as it must be.
        behind: what requests put behind it.

    Raises:
        ValueError: no such address; or one with a password, a query or a fragment, which would stand in files and logs.
    """
    expected = f"such as {example}, in front of {behind}"
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise ValueError(f"url must be the http(s) address of {what}, {expected}, got {url!r}")
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
    if parts.path.rstrip("/").endswith(behind):
        raise ValueError(f"url must end in front of {behind}; {expected}, got {url!r}")
    return url.rstrip("/")


def check_int(name, value, least):
    """Refuse what is no int, or a smaller one than `least` (None: any)."""
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_number(name, value, above):
    """Refuse what is no finite number from 0, or (`above`) more than 0."""
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not (value > 0 or (value == 0 and not above)) or not math.isfinite(value):
        raise ValueError(f"{name} must be {'more than' if above else 'at least'} 0 and finite, got {value}")


def check_key(key):
    """Refuse a key that no header takes, without showing it."""
    if not isinstance(key, str) or not re.fullmatch(r"[\x21-\x7e]*", key):
        raise ValueError(
            "api_key must be a string of printable ASCII without blanks (or line breaks: is it read from a file?)"
        )
    return key


_clients = weakref.WeakSet()


def _renew():
    """In a forked process, whose parent goes on with the connections, and where nobody is left to give back room."""
    for client in list(_clients):
        client._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


class Client:
    """Sends requests to one endpoint, from any number of threads, a bounded number of them at once.

    Connections are kept and used again (`yojo.judges.connections`). Proxies of the environment (http_proxy, https_proxy,
    no_proxy) are used, for addresses of this machine never. Redirects are errors: a request, its images and its key go where
    they were meant to.

    Args:
        url: as `check_url` takes it.
        key: goes into the header Authorization, and nowhere else; "" for none.
        timeout: seconds in which a server may say nothing.
        retries: of a request, at most.
        concurrency: requests that are with the server at once, at most.
    """

    # What a subclass for another kind of endpoint says itself.
    WHAT, EXAMPLE, BEHIND = "an OpenAI-compatible endpoint", "http://127.0.0.1:8000/v1", "/chat/completions"
    VARIABLE = KEY_VARIABLE  # of the environment, which has the key
    REFUSED = (400, 413, 422)  # statuses of the request itself; it would be refused again
    UNCOUNTED = ()  # statuses that are no failed try where there is an end: the server is there, and busy

    def __init__(self, url, key, timeout, retries, concurrency):
        self.url = check_url(url, self.WHAT, self.EXAMPLE, self.BEHIND)
        self._key, self.timeout, self.retries, self.concurrency = check_key(key), timeout, retries, concurrency
        self._has_said = False
        self._random = random.Random()  # waits are no scores: they may differ
        self._parts = urllib.parse.urlsplit(self.url)
        self._tls = ssl.create_default_context() if self._parts.scheme == "https" else None
        self._kept = Connections(concurrency)
        self._room = threading.BoundedSemaphore(concurrency)
        _clients.add(self)

    def _begin(self):
        self._room = threading.BoundedSemaphore(self.concurrency)
        self._kept.close()  # this process's ends of them alone

    def __repr__(self):
        return f"{type(self).__name__}({self.url!r})"

    def __reduce__(self):
        if self._key not in ("", os.environ.get(self.VARIABLE)):
            raise TypeError(
                f"an api_key goes into no pickle: set {self.VARIABLE}, which the other process reads itself"
            )
        return _unpickled, (type(self), self.url, bool(self._key), self.timeout, self.retries, self.concurrency)

    def close(self):
        """Close the connections that nothing is under way on; what is asked later opens new ones."""
        self._kept.close()

    def post(self, path, body, stop, read=lambda reply: reply):
        """Post a JSON body, and read a JSON reply.

        Args:
            path: behind the url, such as "/chat/completions".
            body: dict.
            stop: `Stop`.
            read: function of the reply; a ValueError of it says that the reply is not whole.

        Returns:
            what `read` returns.

        Raises:
            EndpointError, ValueError, PolicyError, Stopped: as `request`.
        """
        data = json.dumps(body).encode()
        return self.request("POST", path, data, stop, lambda headers, found: read(json.loads(found)))

    def request(self, method, path, data, stop, read, seconds=None):
        """Send a request until there is an answer.

        Timeouts, connections that break, statuses 408, 409, 429 and 5xx, and replies that are not whole are tried again,
        after waits that double and of which half is drawn; where the server says how long (Retry-After), at least as long.

        Args:
            method: "POST" or "GET".
            path: behind the url.
            data: bytes of a JSON body, or None.
            stop: `Stop`.
            read: function of headers and bytes of a reply with status 200; a ValueError of it says that the reply is not whole.
            seconds: in which there is an answer, waits included; the server is told how many are left (Yojo-Deadline). None:
                as long as it takes.

        Returns:
            what `read` returns.

        Raises:
            EndpointError: no answer after all retries, or in time, or a status that another request would get, too (401, 404, ...).
            ValueError: the server refuses this request (400, 413, 422); the message shows its answer in a line.
            PolicyError: it refuses what the request shows.
            Stopped: `stop` was set.
        """
        end = None if seconds is None else time.monotonic() + seconds
        tries = failed = 0
        reason = "none was begun"
        while True:
            asked, is_failed = 0.0, True
            try:
                with self._a_place(end):
                    if stop.is_set():
                        raise Stopped
                    tries += 1
                    status, headers, found = self._exchange(method, path, data, stop, end)
                if status == 200:
                    return read(headers, found)
                reason, asked = self._failed(status, headers, found)
                is_failed = end is None or status not in self.UNCOUNTED
            except _Late:
                raise self._too_late(seconds, tries, reason) from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                if stop.is_set():
                    raise Stopped from error
                if isinstance(error, (_RequestError, ssl.SSLCertVerificationError)):
                    kind = ValueError if isinstance(error, _RequestError) else EndpointError
                    raise kind(f"{self.url}: {self._line(error)}") from error
                reason = self._line(error)
            failed += is_failed
            if failed > self.retries:
                raise EndpointError(f"{self.url}: no answer after {tries} tries; the last one: {reason}")
            if not self._has_said:  # once: every request would say the same
                self._has_said = True
                often = f"{self.retries} times at most a request" if is_failed else "until the deadline"
                logger.warning("%s: %s; trying again, %s", self.url, reason, often)
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2 ** min(tries - 1, 30)) * self._random.uniform(0.5, 1)
            wait = max(wait if end is None else min(wait, LONGEST_IN_TIME), asked)
            if end is not None and wait >= end - time.monotonic():
                raise self._too_late(seconds, tries, reason)
            pause(stop, wait)
            if stop.is_set():
                raise Stopped

    @contextlib.contextmanager
    def _a_place(self, end):
        """Inside, this is one of the requests that are with the server."""
        room = self._room
        left = None if end is None else min(max(0.0, end - time.monotonic()), threading.TIMEOUT_MAX)
        if not room.acquire(timeout=left):
            raise _Late
        try:
            yield
        finally:
            room.release()

    def _too_late(self, seconds, tries, reason):
        return EndpointError(
            f"{self.url}: no answer within {seconds:g} seconds (deadline), after {tries} tries; the last one: {reason}"
        )

    def _failed(self, status, headers, found):
        """(what is wrong, seconds the server asks to wait) of a status that is tried again; others are raised."""
        reason = f"status {status}: {self._line(self._said(found) or 'no word')}"
        hint = {401: f" (is api_key, or {self.VARIABLE}, the right one?)", 404: " (are url and model right?)"}.get(
            status, ""
        )
        if status in self.REFUSED or status == 403:
            if _code(found) in _POLICY:
                raise PolicyError(f"the endpoint refuses it ({reason})")
            if status in self.REFUSED:
                raise _RequestError(f"the request is refused, {reason}{hint}")
        if status not in RETRIED and not 500 <= status < 600:
            moved = f" (it points to {headers['Location']}; give that address)" if headers.get("Location") else ""
            raise EndpointError(f"{self.url}: {reason}{moved}{hint}")
        asked = _seconds(headers.get("Retry-After"))
        if asked > LONGEST_ASKED:
            raise EndpointError(
                f"{self.url}: it asks to wait {asked:.0f} seconds, more than {LONGEST_ASKED:.0f}; {reason}"
            )
        return reason, asked

    def _said(self, found):
        """What the body of an error says, text."""
        return found.decode(errors="replace").strip()

    def _exchange(self, method, path, data, stop, end):
        """(status, headers, body) of one request, on a connection that was kept or on a new one."""
        new, target, more = self._connection()
        way = (new.host, new.port, target, *more.items())
        headers = {"Accept": "application/json", "User-Agent": "yojo", **more}
        if data is not None:
            headers["Content-Type"] = "application/json"
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        kept = self._kept.take(way)
        for connection in (kept, new):
            if connection is None:
                continue
            left = math.inf if end is None else end - time.monotonic()
            if left <= 0:
                raise _Late
            if end is not None:
                headers["Yojo-Deadline"] = f"{left:.3f}"
            try:
                found, is_kept = self._sent(connection, method, target + path, data, headers, stop, end)
            except _Gone as gone:
                if connection is kept and not stop.is_set():
                    continue  # the server had closed it, as servers do with what is idle: nothing has failed
                raise gone.__cause__ from None
            if is_kept:
                self._kept.give(way, connection)
            return found

    def _sent(self, connection, method, target, data, headers, stop, end):
        """((status, headers, body), whether the connection can be used again) of one request; else the connection is closed."""
        is_kept = False
        try:
            connection.timeout = self._patience(end)
            if connection.sock is None:
                connection.connect()
            sock = connection.sock
            sock.settimeout(connection.timeout)
            with stop.shuts(sock):
                answer, is_sent = _answer(connection, method, target, data, headers)
                with contextlib.closing(answer):
                    found = self._body(answer, sock, end)
                    is_kept = is_sent and not answer.will_close and not stop.is_set()
                    return (answer.status, answer.headers, found), is_kept
        finally:
            if not is_kept:
                connection.close()

    def _body(self, answer, sock, end):
        """The bytes of a reply, however slowly they come, but not beyond the end."""
        length, pieces, size = answer.length, [], 0
        while length is None or size < length:
            piece = answer.read1(_PIECE)
            if not piece:
                break
            pieces.append(piece)
            size += len(piece)
            if size > LARGEST:
                raise http.client.HTTPException(f"a reply of more than {LARGEST} bytes")
            if end is not None:
                sock.settimeout(self._patience(end))
        found = b"".join(pieces)
        if length is not None and size < length:  # which a read of pieces does not say by itself
            raise http.client.IncompleteRead(found, length - size)
        return found

    def _patience(self, end):
        """Seconds in which the server has to say something."""
        if end is None:
            return self.timeout
        left = end - time.monotonic()
        if left <= 0:
            raise _Late
        return min(self.timeout, left)

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


def _unpickled(kind, url, has_key, *settings):
    """A client of another process, with the key of this one's environment."""
    key = os.environ.get(kind.VARIABLE, "") if has_key else ""
    if has_key and not key:
        raise EndpointError(f"{kind.VARIABLE} is not set in this process, and the client of {url} had a key")
    return kind(url, key, *settings)


class _RequestError(ValueError):
    """The request itself is refused."""


class _Late(Exception):
    """There is no time left."""


class _Gone(Exception):
    """The connection ended before its reply had begun; the cause says how."""


_ENDED = (http.client.RemoteDisconnected, ConnectionError, ssl.SSLEOFError, ssl.SSLZeroReturnError)


def _answer(connection, method, target, data, headers):
    """(`http.client.HTTPResponse`, whether all was sent) of a request on an open connection."""
    is_sent = True
    try:
        try:
            connection.request(method, target, data, headers)
        except ConnectionError:  # a server that refuses what is too large says so, and does not read on
            is_sent = False
            with contextlib.suppress(OSError, http.client.HTTPException):
                return connection.getresponse(), is_sent
            raise
        return connection.getresponse(), is_sent
    except _ENDED as error:
        raise _Gone from error


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

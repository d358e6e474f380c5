"""How every request goes: who asks, a body within bounds, an answer for as long as somebody waits for it."""

import asyncio
import collections
import contextlib
import contextvars
import hashlib
import hmac
import logging
import math
import time
import traceback

from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse

from yojo.serving import pages
from yojo.serving.body import parse_json, read_body
from yojo.serving.errors import ApiError
from yojo.serving.fair import too_much

logger = logging.getLogger(__name__)

LARGE = 1 << 16  # bytes of a body from which on it is parsed in a thread
GONE = 499  # status in logs and metrics of a request whose client has left; nobody is sent it
OPEN = {*pages.FILES, "/openapi.json", "/health", "/ready", "/metrics", "/tei/health"}  # paths that need no key
METHODS = {"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"}  # that logs name; others are what a client wrote
_MESSAGES = {400: "the request cannot be read", 404: "there is no such path", 405: "this path has no such method"}


class Memory:
    """Bytes of requests that are here, from the first of their body to their reply: beyond a limit they are turned away.

    A client with requests here can hold no more than four times what it leaves free, as of tokens (`Engine`): bodies that are
    announced and never come would otherwise keep all others out.

    Args:
        limit: bytes.
    """

    def __init__(self, limit):
        self.limit, self.taken = limit, 0
        self._held = collections.Counter()  # client -> bytes

    @contextlib.contextmanager
    def holding(self, size, client):
        """Inside, `hold` counts for one request of a client, which begins with `size` bytes."""
        mine = [0]

        def hold(more):
            held = self._held[client]
            if too_much(more, held if held > mine[0] else 0, self.limit - self.taken):
                raise ApiError(429, "overloaded", "too much is here already; ask again later", retry_after=1)
            mine[0] += more
            self.taken += more
            self._held[client] += more

        hold(size)
        token = _holding.set(hold)
        try:
            yield
        finally:
            _holding.reset(token)
            self.taken -= mine[0]
            self._held[client] -= mine[0]
            if not self._held[client]:
                del self._held[client]


_holding = contextvars.ContextVar("yojo_holding", default=lambda size: None)


def hold(size):
    """Count bytes that the request in whose context this runs has fetched.

    Raises:
        ApiError: 429, where there is no room for them.
    """
    _holding.get()(size)


class Gone(Exception):
    """The client has closed its connection."""


class Bounded(Request):
    """A request whose body was read, and its JSON parsed, within limits."""

    async def json(self):
        if not hasattr(self, "_parsed"):
            limits, data = self.app.state.settings.limits, await self.body()
            large = len(data) >= LARGE
            self._parsed = await asyncio.to_thread(parse_json, data, limits) if large else parse_json(data, limits)
        return self._parsed


class Route(APIRoute):
    """A path whose handler runs within bounds, and is cancelled when its client leaves."""

    def get_route_handler(self):
        handle = super().get_route_handler()
        takes = self.openapi_extra["x-takes"] if self.openapi_extra and "x-takes" in self.openapi_extra else "json"

        async def handler(request):
            request = Bounded(request.scope, request.receive)
            state, settings = request.scope.setdefault("yojo", {}), request.app.state.settings
            state["endpoint"] = self.path_format
            state["client"] = client_of(request, settings)
            if request.method != "POST":
                return await handle(request)
            check_content(request, takes)
            with request.app.state.memory.holding(_announced(request, settings.limits.body), state["client"]):
                request._body = await read_body(request, settings.limits.body, settings.deadline)
                await request.app.state.service.engine.pace.turn()
                if takes == "json":
                    await request.json()
                return await _while_there(request, handle(request))

        return handler


def _announced(request, most):
    """Bytes of a body, as its head says; as many as it may have, where it says nothing that is possible."""
    said = request.headers.get("content-length", "")
    return min(int(said), most) if said.isascii() and said.isdigit() and len(said) < 19 else most


def check_content(request, takes):
    """Refuse what is no JSON (or no form), before it is read."""
    if request.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise ApiError(415, "content_encoding", "the body must not be compressed (Content-Encoding)")
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if takes == "form":
        if kind != "multipart/form-data":
            raise ApiError(415, "content_type", "the body must be a form: Content-Type: multipart/form-data")
    elif not (kind in ("", "application/json") or (kind.startswith("application/") and kind.endswith("+json"))):
        raise ApiError(415, "content_type", "the body must be JSON: Content-Type: application/json")


def client_of(request, settings):
    """Whose request it is: the name of its key, or its address.

    Raises:
        ApiError: 401, where keys are asked for and this one has none of them.
    """
    address = request.client.host if request.client else "?"
    # Not of `request.url`: many versions of Starlette put it together with the header Host, which may hold "x/health?".
    if not settings.keys or request.scope["path"] in OPEN:
        return address
    kind, _, given = request.headers.get("authorization", "").partition(" ")
    given = given.strip() if kind.lower() == "bearer" else request.headers.get("x-api-key", "")
    digest, found = hashlib.sha256(given.encode("utf-8", "replace")).digest(), None
    for key, name in settings.keys.items():  # all of them: how long it takes says nothing
        if hmac.compare_digest(hashlib.sha256(key.encode()).digest(), digest):
            found = name
    if found is None:
        raise ApiError(401, "wrong_key", "a key is needed here: Authorization: Bearer KEY")
    return found


def seconds_of(request, most):
    """How long the client waits, at most; None where it does not say."""
    given = request.headers.get("yojo-deadline")
    if given is None:
        return None
    try:
        seconds = float(given)
        if not (math.isfinite(seconds) and seconds > 0):
            raise ValueError
    except ValueError:
        raise ApiError(
            422, "wrong_deadline", "the header Yojo-Deadline must be seconds above 0", "Yojo-Deadline"
        ) from None
    return min(seconds, most)


async def _while_there(request, work):
    """The answer of `work`; it is cancelled when the client has left."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_leaves(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise Gone
    finally:
        for one in (task, gone):
            if not one.done():
                one.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _leaves(request):
    while (await request.receive())["type"] != "http.disconnect":
        pass


# ---- errors ----


def install(app):
    """Have an app say all that goes wrong in one form."""
    app.add_exception_handler(ApiError, _api_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)
    app.add_exception_handler(Gone, _gone)


def reply(request, error):
    """The response that says an `ApiError`."""
    request.scope.setdefault("yojo", {})["code"] = error.code
    tei = request.scope["path"].startswith("/tei/")
    headers = error.headers()
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error.body(tei), error.status, headers)


async def _api_error(request, error):
    return reply(request, error)


async def _invalid(request, error):
    first = error.errors()[0]
    kinds = {
        "missing": "missing_field",
        "extra_forbidden": "unknown_field",
        "json_invalid": "not_json",
        "other_endpoint": "other_endpoint",
    }
    message = {
        "missing_field": "this field is needed",
        "unknown_field": "there is no such field: nothing is taken and ignored",
    }
    code = kinds.get(first["type"], "invalid_field")
    said = message.get(code) or first["msg"]
    return reply(request, ApiError(422, code, said[:1].lower() + said[1:], param_of(first["loc"])))


def param_of(location):
    """The field of an error of pydantic's, such as "responses.3"; None for the body as a whole."""
    parts = [str(part) for part in location if not str(part).startswith("<")]
    if parts and parts[0] in ("body", "header", "query", "path"):
        parts = parts[1:]
    return ".".join(part if len(part) <= 64 else "..." for part in parts) or None


async def _http(request, error):
    codes = {404: "not_found", 405: "wrong_method"}
    message = _MESSAGES.get(error.status_code, "the request cannot be answered")
    response = reply(request, ApiError(error.status_code, codes.get(error.status_code, "invalid_request"), message))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response


async def _gone(request, error):
    request.scope.setdefault("yojo", {})["code"] = "gone"
    return JSONResponse(None, GONE)


def log_unforeseen(error):
    """Log a mistake of the server's own by its type and its lines of code; what it says may be what a user wrote."""
    logger.error("unforeseen %s at\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))


class Observed:
    """Middleware: every request is counted, timed and logged, and no reply is guessed at by browsers."""

    def __init__(self, app, metrics):
        self.app, self.metrics = app, metrics

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        started, state, status = time.monotonic(), scope.setdefault("yojo", {}), None

        async def observed(message):
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message["headers"], (b"x-content-type-options", b"nosniff")]
            await send(message)

        try:
            await self.app(scope, receive, observed)
        except Exception as error:
            log_unforeseen(error)
            if status is None:
                unforeseen = ApiError(500, "internal", "the server has made a mistake; its log says where")
                await reply(Request(scope), unforeseen)(scope, receive, observed)
        finally:
            status = status or 500  # cancelled before there was a reply
            path = scope["path"]
            seconds, endpoint = time.monotonic() - started, state.get("endpoint", path if path in OPEN else "other")
            self.metrics.request(endpoint, status, state.get("code"), seconds)
            logger.log(
                logging.DEBUG if endpoint in OPEN else logging.INFO,  # what is asked every few seconds says nothing
                "%s %s %d %s %.1f ms client=%s",
                scope["method"] if scope["method"] in METHODS else "?",
                endpoint,
                status,
                state.get("code", "ok"),
                seconds * 1000,
                state.get("client", "?"),
            )

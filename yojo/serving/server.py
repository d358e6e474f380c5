"""`serve`: the server as a process: workers, uvicorn, signals; what `yojo serve` runs."""

import asyncio
import contextlib
import dataclasses
import ipaddress
import logging
import os
import re
import signal
import stat
import sys
from pathlib import Path

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from yojo.serving.app import create_app
from yojo.serving.engine import Engine
from yojo.serving.roles import load_scorer
from yojo.serving.workers import FAILED, Role, keep_what_is_loaded

logger = logging.getLogger(__name__)

KEEP_ALIVE = 75  # seconds that an idle connection is kept: longer than proxies (nginx: 60) keep theirs
REPLYING = 3  # seconds behind the grace in which what was given up is told so; then uvicorn ends it with a bare 500
SHORTEST_KEY = 16  # characters
_KEY = re.compile(r"(?:(?P<name>[A-Za-z0-9_.-]+):)?(?P<key>[\x21-\x7e]+)")


@dataclasses.dataclass(frozen=True)
class Address:
    """Where a server listens.

    Attributes:
        host, port: port 0: a free one.
        proxies: addresses of proxies whose X-Forwarded-For is believed, as uvicorn takes them; None: of none.
        certificate, private_key: paths of PEM files, to speak https; or None.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    proxies: str | None = None
    certificate: str | None = None
    private_key: str | None = None

    @property
    def is_local(self):
        """Whether only this machine can reach it."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"


def read_keys(path):
    """API keys of a file, one a line: `key`, or `name:key`; empty lines and those that begin with # do not count.

    Args:
        path: of the file.

    Returns:
        dict: key -> the name under which its client is counted ("key 1", ... by default).

    Raises:
        ValueError: no keys, one that is too short or no printable ASCII, one that stands twice. It is not shown.
        OSError: the file cannot be read.
    """
    path, found = Path(path), {}
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(map(str.strip, lines), 1):
        if not line or line.startswith("#"):
            continue
        match = _KEY.fullmatch(line)
        if match is None or len(match["key"]) < SHORTEST_KEY:
            raise ValueError(
                f"{path}, line {number}: a key must be at least {SHORTEST_KEY} printable ASCII characters without blanks, "
                "with its client's name and a colon before it or alone"
            )
        if match["key"] in found:
            raise ValueError(f"{path}, line {number}: this key stands there twice")
        found[match["key"]] = match["name"] or f"key {len(found) + 1}"
    if not found:
        raise ValueError(f"{path} holds no key: one a line")
    if path.stat().st_mode & (stat.S_IRWXO | stat.S_IRWXG):
        logger.warning("%s can be read by others than its owner: chmod 600", path)
    return found


def scoring_roles(model, devices, setup=None):
    """A `Role` for each device, sharing the cores where they are CPUs.

    Args:
        model: `yojo.serving.roles.Model`.
        devices: list of device names; None in it: wherever the model is put.
        setup: as of a `Role`.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    given = os.environ.get("OMP_NUM_THREADS")
    threads = None if given else max(1, cores // len(devices))
    return [Role(f"scoring {name or 'here'}", load_scorer, (model, name, threads), setup) for name in devices]


def sleep_while_waiting():
    """Have torch's threads in workers, which inherit this, wait for each other asleep.

    They do at every step: where they spin, on cores that who prepares and who answers want, too, a pass takes many times as long.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def serve(model, settings, address, devices=(None,), preparing=2, policy=None, setup=None):
    """Serve until the process is told to end.

    SIGTERM and SIGINT: nothing more is accepted, what was accepted is finished (`Settings.grace`), and 0 is returned. A second
    one ends at once.

    Args:
        model: `yojo.serving.roles.Model`.
        settings: `yojo.serving.settings.Settings`.
        address: `Address`.
        devices: list of device names, a scoring worker each.
        preparing: how many workers prepare requests.
        policy: as for `create_app`.
        setup: function that each worker's process calls first, or None.

    Returns:
        int: exit code. 0; 1 where no worker can load the model, or the address is taken (the log says why).
    """
    if not address.is_local and not settings.keys:
        logger.warning("anybody who can reach %s:%d may ask: --api-key-file limits that", address.host, address.port)
    sleep_while_waiting()
    engine = Engine(settings, scoring_roles(model, list(devices), setup), preparing, setup=setup)
    server = Server(engine, settings, address, policy)
    keep_what_is_loaded()
    try:
        asyncio.run(server.serve())
    except SystemExit as ended:  # uvicorn's, of an address that is taken; it has said so
        return int(ended.code or 0)
    except KeyboardInterrupt:
        pass
    return server.code


class Connection(H11Protocol):
    """uvicorn's connection, which ends where a request's head does not come in the time in which an idle one ends.

    uvicorn gives no time to a first head, nor to a later one that has begun.
    """

    looking = None

    def connection_made(self, transport):
        super().connection_made(transport)
        self._watch()

    def data_received(self, data):
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc):
        super().connection_lost(exc)
        if self.looking is not None:
            self.looking.cancel()

    def _watch(self):
        if self.cycle is not None and not self.cycle.response_complete:  # a head is here
            if self.looking is not None:
                self.looking.cancel()
                self.looking = None
        elif self.looking is None:
            self.looking = self.loop.call_later(KEEP_ALIVE, self.transport.close)


class Server(uvicorn.Server):
    """uvicorn with our ends: groups first, exit code 0 after a signal, an early end where no model can be loaded.

    Attributes:
        code: exit code.
    """

    def __init__(self, engine, settings, address, policy=None):
        self.engine, self.address, self.code = engine, address, 0
        app = create_app(engine, settings, policy)
        self.service = app.state.service
        super().__init__(
            uvicorn.Config(
                app,
                host=address.host,
                port=address.port,
                http=Connection,  # of h11, which bounds the head of a request
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                backlog=2048,
                proxy_headers=address.proxies is not None,
                forwarded_allow_ips=address.proxies,
                ssl_certfile=address.certificate,
                ssl_keyfile=address.private_key,
                timeout_keep_alive=KEEP_ALIVE,
            )
        )

    @property
    def url(self):
        """Where it listens, once it has started."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        return f"http{'s' if self.address.certificate else ''}://{f'[{host}]' if ':' in host else host}:{port}"

    async def startup(self, sockets=None):
        """Listen; the model is loaded meanwhile, and `/ready` says when it is there."""
        await super().startup(sockets)
        if self.started:
            logger.info("listening at %s", self.url)
            self._watching = asyncio.get_running_loop().create_task(self._watch())

    async def shutdown(self, sockets=None):
        """Accept nothing more; groups that cannot become whole end now; what was accepted is finished, or given up after the grace."""
        self._watching.cancel()
        logger.info("ending: what was accepted is finished")
        for server in self.servers:
            server.close()
        loop, grace = asyncio.get_running_loop(), self.service.settings.grace
        giving_up = loop.call_later(grace, self.engine.give_up)
        await self.service.groups.stop(grace)
        left = max(0.0, giving_up.when() - loop.time())  # the grace is one for groups and all else
        self.config.timeout_graceful_shutdown = round(left) + REPLYING
        await super().shutdown(sockets)
        giving_up.cancel()

    @contextlib.contextmanager
    def capture_signals(self):
        """A signal ends the server, and not the process behind it: its exit code is that of a server that has ended well."""
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        try:
            for number in numbers:
                loop.add_signal_handler(number, self.handle_exit, number, None)
        except (RuntimeError, ValueError, NotImplementedError):  # not in the main thread: whoever runs it there ends it
            numbers = ()
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)

    def handle_exit(self, sig, frame):
        """The first signal ends the server when all is done, the second one at once."""
        if self.should_exit:
            self.force_exit = True
        self.should_exit = True

    async def _watch(self):
        """Say when requests can be scored; end where that will never be."""
        await self.engine.until(lambda: self.engine.ready()[0] or self._is_hopeless())
        if not self._is_hopeless():
            model = self.engine.model
            logger.info("ready: %s", self.engine.model["known"]["reason"])
            logger.info("model %s: mode %s, %s on %s", model["digest"], model["mode"], model["dtype"], model["device"])
            await self.engine.until(self._is_hopeless)
        for worker in self.engine.scorers:
            logger.error("%s: %s", worker.role.name, worker.why)
            print(f"error: {worker.why}", file=sys.stderr)
        self.code, self.should_exit = 1, True

    def _is_hopeless(self):
        return all(worker.state == FAILED for worker in self.engine.scorers)

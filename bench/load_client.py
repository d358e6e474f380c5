"""Clients of a server under load: connections that count every byte, clients that wait for their reply, and ones that do not.

The standard library alone, so that what is measured is the server and not its client.
"""

import asyncio
import contextlib
import dataclasses
import json
import random
import time
import urllib.parse

OVERLOADED = 429
PAUSE = 0.1  # seconds between two looks at /health
LONGEST = 120.0  # seconds that no reply takes


class Dropped(ConnectionError):
    """The connection ended before the reply did.

    Attributes:
        begun: whether some of the reply had come.
    """

    def __init__(self, begun):
        super().__init__(f"the connection ended {'within' if begun else 'before'} the reply")
        self.begun = begun


@dataclasses.dataclass(frozen=True)
class Reply:
    """What a server said.

    Attributes:
        status: int.
        headers: dict, names in lower case.
        body: bytes.
    """

    status: int
    headers: dict
    body: bytes

    def json(self):
        return json.loads(self.body)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of a request.

    Attributes:
        kind: "score"; "wrong: ..." for one that must be refused; "left: ..." for one whose client went away.
        began: seconds on the clock of `time.monotonic`; of an open loop, when it was due.
        seconds: until the reply was whole; None without one.
        status: of HTTP; None without a reply.
        responses: how many were scored; 0 where none were.
        problem: what is wrong with the reply, or None.
    """

    kind: str
    began: float
    seconds: float | None
    status: int | None
    responses: int
    problem: str | None


def message(method, path, body=b"", headers=None):
    """The bytes of an HTTP/1.1 request."""
    lines = [f"{method} {path} HTTP/1.1", "Host: server", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + body


class Connection:
    """A connection that is kept for the next request, and opened anew where the server has closed it.

    Args:
        url: of the server, such as "http://127.0.0.1:8000".
    """

    def __init__(self, url):
        parts = urllib.parse.urlsplit(url)
        self.address, self.reader, self.writer = (parts.hostname, parts.port), None, None

    async def open(self):
        """Open it, where it is not open."""
        if self.writer is None:
            self.reader, self.writer = await asyncio.open_connection(*self.address, limit=1 << 20)

    async def send(self, data):
        """Send bytes; they are with the system when this returns."""
        await self.open()
        try:
            self.writer.write(data)
            await self.writer.drain()
        except OSError:
            raise Dropped(False) from None

    async def reply(self):
        """The `Reply` to what was sent.

        Raises:
            Dropped: it did not come, or not all of it.
        """
        begun = False
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
            begun = True
            first, *lines = head.decode("latin-1").split("\r\n")[:-2]
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            if "content-length" in headers:
                body = await self.reader.readexactly(int(headers["content-length"]))
            else:  # of one that ends its connection: something has gone wrong over there
                body, headers["connection"] = await self.reader.read(), "close"
        except asyncio.IncompleteReadError as error:
            raise Dropped(begun or bool(error.partial)) from None
        except OSError:
            raise Dropped(begun) from None
        if headers.get("connection", "").lower() == "close":
            self.close()
        return Reply(int(first.split(" ")[1]), headers, body)

    async def ask(self, data):
        """Send a request and wait for its `Reply`."""
        async with asyncio.timeout(LONGEST):
            await self.send(data)
            return await self.reply()

    def close(self):
        """Close it at once, whatever is on its way."""
        if self.writer is not None:
            self.writer.transport.abort()
            self.reader = self.writer = None


async def ask_case(connection, case, key, due=None):
    """Have a case scored, and check what comes; `Outcome`."""
    began = time.monotonic() if due is None else due
    try:
        reply = await connection.ask(case.message(key))
    except (ConnectionError, TimeoutError) as error:
        connection.close()
        return Outcome(case.kind, began, None, None, 0, f"{type(error).__name__}: {error}")
    seconds, problem = time.monotonic() - began, case.problem(reply)
    return Outcome(case.kind, began, seconds, reply.status, case.responses if reply.status == 200 else 0, problem)


LEAVING = ("in the head", "in the body", "at once", "meanwhile")


async def leave(url, case, key, how, rng):
    """Go away in the middle of a request; `Outcome`."""
    began, connection, data = time.monotonic(), Connection(url), case.message(key)
    head = data.index(b"\r\n\r\n") + 4
    end = {"in the head": rng.randrange(1, head), "in the body": rng.randrange(head, len(data))}.get(how, len(data))
    with contextlib.suppress(ConnectionError):
        await connection.send(data[:end])
        if how != "at once":
            await asyncio.sleep(rng.uniform(0.0, 0.05))
    connection.close()
    return Outcome(f"left: {how}", began, None, None, 0, None)


async def closed_loop(url, mix, keys, seconds=None, requests=None, wrong=0.0, leaving=0.0, seed=0):
    """Clients that each ask again as soon as they have their reply.

    Args:
        url: of the server.
        mix: `bench.load_mix.Mix`.
        keys: API key of each client; as many clients as keys.
        seconds: after which nobody asks again; or
        requests: that each client makes.
        wrong, leaving: shares of the requests that must be refused, and of those whose client goes away.
        seed: int; what is asked depends on it and on the client alone.

    Returns:
        list of `Outcome`s.
    """
    outcomes, end = [], time.monotonic() + (LONGEST * 60 if seconds is None else seconds)

    async def client(number):
        rng, connection, made = random.Random(f"{seed} {number}"), Connection(url), 0
        while time.monotonic() < end and made != requests:
            made += 1
            drawn, case = rng.random(), rng.choice(mix.cases)
            if drawn < leaving:
                outcomes.append(await leave(url, case, keys[number], rng.choice(LEAVING), rng))
                continue
            if drawn < leaving + wrong:
                case = rng.choice(mix.wrong)
            outcomes.append(await ask_case(connection, case, keys[number]))
        connection.close()

    async with asyncio.TaskGroup() as group:
        for number in range(len(keys)):
            group.create_task(client(number))
    return outcomes


async def open_loop(url, mix, keys, rate, seconds, seed=0):
    """Requests that come when they come, however the earlier ones fare.

    Args:
        url, mix, keys, seed: as for `closed_loop`; requests are the keys' in turn.
        rate: requests a second, at random times of a Poisson process.
        seconds: in which they come.

    Returns:
        list of `Outcome`s; their seconds are from when they were due.
    """
    outcomes, idle, rng = [], [], random.Random(seed)
    loop, start = asyncio.get_running_loop(), time.monotonic()

    async def one(due, case, key):
        connection = idle.pop() if idle else Connection(url)
        outcomes.append(await ask_case(connection, case, key, due))
        idle.append(connection)

    due, number, tasks = start, 0, set()
    while (due := due + rng.expovariate(rate)) < start + seconds:
        await asyncio.sleep(max(0.0, due - time.monotonic()))
        task = loop.create_task(one(due, rng.choice(mix.cases), keys[number % len(keys)]))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
        number += 1
    await asyncio.gather(*tasks)
    for connection in idle:
        connection.close()
    return outcomes


def look_at_health(url, pipe):
    """Ask for /health every tenth of a second until something comes through the pipe, and send the seconds it took each time.

    For a process of its own: what it measures is to be the server, and not who loads it.
    """

    async def look():
        connection, found, data = Connection(url), [], message("GET", "/health")
        while not pipe.poll():
            began = time.monotonic()
            reply = await connection.ask(data)
            found.append(time.monotonic() - began if reply.status == 200 else LONGEST)
            await asyncio.sleep(max(0.0, PAUSE - (time.monotonic() - began)))
        return found

    pipe.send(asyncio.run(look()))


def quantile(values, share):
    """The value that so large a share of values is not above; None without values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else None


def summary(outcomes, seconds):
    """What a phase of a load test is reported by.

    Args:
        outcomes: list of `Outcome`s.
        seconds: that the phase took.

    Returns:
        dict: requests by kind and by status, those with a problem, scored requests and responses a second, and percentiles
        of the seconds of scored ones and of refused ones (429).
    """
    scored = [one.seconds for one in outcomes if one.kind == "score" and one.status == 200]
    shed = [one.seconds for one in outcomes if one.status == OVERLOADED]
    statuses = sorted({one.status for one in outcomes if one.status})
    problems = [f"{one.kind}: {one.problem}" for one in outcomes if one.problem]
    return {
        "seconds": seconds,
        "requests": len(outcomes),
        "kinds": {kind: sum(one.kind.startswith(kind) for one in outcomes) for kind in ("score", "wrong", "left")},
        "statuses": {str(status): sum(one.status == status for one in outcomes) for status in statuses},
        "problems": len(problems),
        "first_problems": problems[:5],
        "requests_per_second": len(scored) / seconds,
        "responses_per_second": sum(one.responses for one in outcomes) / seconds,
        "latency": {f"p{share}": quantile(scored, share / 100) for share in (50, 95, 99)},
        "shed_latency": {f"p{share}": quantile(shed, share / 100) for share in (50, 99)},
    }

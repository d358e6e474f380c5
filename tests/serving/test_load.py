"""A server of processes under load: every reply right, whatever goes away or dies meanwhile. The long one is `bench.load`."""

import asyncio
import signal
import time

import psutil
import pytest

from bench import load_client, load_mix
from bench.served import Served
from tests.reward_cases import demo_judge
from yojo.demo.backbone import BACKBONE

KEYS = [f"key-of-load-client-{number:02d}" for number in range(16)]
NICE = 5  # of processes that prepare: how they are told from those that score


@pytest.fixture(scope="module")
def mix():
    """Requests and their scores."""
    return load_mix.make(demo_judge(), count=28)


@pytest.fixture(scope="module")
def keep(tmp_path_factory):
    """function: -> a server that is ready; the one that is there, or one that is begun where a test has ended it."""
    folder, kept = tmp_path_factory.mktemp("served"), []
    demo_judge().save_pretrained(folder / "model")
    (folder / "keys").write_text("\n".join(KEYS))
    (folder / "keys").chmod(0o600)
    arguments = ["-m", "yojo.cli", "serve", "--model", str(folder / "model"), "--base-model", str(BACKBONE)]
    arguments += [
        "--port",
        "0",
        "--api-key-file",
        str(folder / "keys"),
        "--max-tokens",
        "1024",
        "--max-waiting",
        "131072",
    ]

    def get():
        if not kept or kept[-1].process.poll() is not None:
            kept.append(Served(arguments, folder / f"log {len(kept)}"))
        kept[-1].until_ready()
        return kept[-1]

    yield get
    for server in kept:
        server.__exit__()


@pytest.fixture
def server(keep):
    return keep()


def worker(server, nice):
    """The first process of a server that is so nice."""
    return next(one for one in server.workers() if one.nice() == nice and "spawn_main" in " ".join(one.cmdline()))


def problems(outcomes):
    return [f"{one.kind}: {one.problem}" for one in outcomes if one.problem]


def statuses(outcomes):
    return {one.status for one in outcomes} - {None}


def test_every_reply_is_right_and_what_is_wrong_is_refused(server, mix):
    load = load_client.closed_loop(server.url, mix, KEYS, requests=12, wrong=0.15, leaving=0.15, seed=1)
    outcomes = asyncio.run(load)
    assert problems(outcomes) == []
    assert len(outcomes) == 12 * len(KEYS)
    kinds = {one.kind.partition(":")[0] for one in outcomes}
    assert kinds == {"score", "wrong", "left"}
    assert 200 in statuses(outcomes) and max(statuses(outcomes)) < 429  # nothing of the server's own


def test_each_wrong_request_has_its_own_error(server, mix):
    async def ask():
        connection = load_client.Connection(server.url)
        return [await load_client.ask_case(connection, case, KEYS[0]) for case in mix.wrong]

    assert problems(asyncio.run(ask())) == []


def test_threads_of_workers_sleep_while_they_wait(server):
    found = [one.environ()["OMP_WAIT_POLICY"] for one in server.workers()]
    assert len(found) >= 3 and set(found) == {"PASSIVE"}


async def until_told(server, mix, outcomes, happens):
    """Clients that ask again and again, through whatever `happens` (an async function) does, until it is done."""
    done, under_load = asyncio.Event(), asyncio.Event()

    async def client(number):
        connection = load_client.Connection(server.url)
        while not done.is_set():
            case = mix.cases[(number + len(outcomes)) % len(mix.cases)]
            found = await ask_through(connection, case, KEYS[number])
            outcomes.append(found)
            if found.status == 503:
                await asyncio.sleep(0.1)
            if len(outcomes) >= len(KEYS):
                under_load.set()
        connection.close()

    async def go():
        await under_load.wait()
        try:
            await happens()
        finally:
            done.set()

    async with asyncio.TaskGroup() as group:
        for number in range(len(KEYS)):
            group.create_task(client(number))
        group.create_task(go())


async def ask_through(connection, case, key):
    """An `Outcome` for which 503 that says when to ask again is no problem."""
    began = time.monotonic()
    reply = await connection.ask(case.message(key))
    if reply.status == 503:
        problem = None if int(reply.headers.get("retry-after", 0)) >= 1 else "503 without Retry-After"
    else:
        problem = case.problem(reply)
    return load_client.Outcome(case.kind, began, time.monotonic() - began, reply.status, 0, problem)


def test_a_scoring_worker_is_killed(server, mix):
    killed, outcomes, meanwhile = worker(server, 0), [], []

    async def happens():
        killed.kill()
        await asyncio.to_thread(server.until_ready, 503)
        meanwhile.append(await ask_through(load_client.Connection(server.url), mix.cases[0], KEYS[0]))
        await asyncio.to_thread(server.until_ready, 200)

    asyncio.run(until_told(server, mix, outcomes, happens))
    assert problems(outcomes + meanwhile) == []
    assert statuses(meanwhile) == {503}
    assert 200 in statuses(outcomes) and statuses(outcomes) <= {200, 503}  # what was in it is done again
    assert worker(server, 0).pid != killed.pid
    again = asyncio.run(load_client.closed_loop(server.url, mix, KEYS, requests=2))
    assert problems(again) == [] and statuses(again) == {200}


def test_a_preparing_worker_is_killed(server, mix):
    before = {one.pid for one in server.workers()}
    killed, outcomes = worker(server, NICE), []

    async def happens():
        killed.kill()
        while len(outcomes) < 6 * len(KEYS):
            await asyncio.sleep(0.05)

    asyncio.run(until_told(server, mix, outcomes, happens))
    assert problems(outcomes) == []
    assert statuses(outcomes) == {200}  # the other one goes on, and what was in this one is done again
    server.until(lambda: len(server.workers()) == len(before) and {one.pid for one in server.workers()} != before)


def test_what_was_accepted_is_answered_after_sigterm(server, mix):
    asked = [(mix.cases[n % len(mix.cases)], KEYS[n % len(KEYS)]) for n in range(8 * len(KEYS))]

    async def go():
        connections = [load_client.Connection(server.url) for _ in asked]
        for connection in connections:  # that all of them are accepted, and not only waiting to be
            assert (await connection.ask(load_client.message("GET", "/health"))).status == 200
        for connection, (case, key) in zip(connections, asked, strict=True):
            await connection.send(case.message(key))
        server.process.send_signal(signal.SIGTERM)
        replies = await asyncio.gather(*(connection.reply() for connection in connections), return_exceptions=True)
        with pytest.raises(ConnectionError):
            await load_client.Connection(server.url).send(mix.cases[0].message(KEYS[0]))
        return replies

    replies = asyncio.run(go())
    assert [reply for reply in replies if isinstance(reply, Exception)] == []
    assert {reply.status for reply in replies} == {200}
    assert [case.problem(reply) for (case, _), reply in zip(asked, replies, strict=True)] == [None] * len(asked)
    assert server.process.wait(60) == 0


def test_no_worker_outlives_a_server_that_is_killed(server, mix):
    below = server.workers()
    assert len(below) >= 3

    async def go():
        connections = [load_client.Connection(server.url) for _ in KEYS]
        for number, connection in enumerate(connections):
            await connection.send(mix.cases[number].message(KEYS[number]))
        server.process.kill()
        for connection in connections:
            connection.close()

    asyncio.run(go())
    server.process.wait(60)
    _, alive = psutil.wait_procs(below, timeout=60)
    assert alive == []

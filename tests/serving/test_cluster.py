"""`yojo serve --ray`: replicas with the scores of `RewardModel.score`, replaced and killed without a request that is lost."""

import asyncio
import concurrent.futures
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from tests.serving.serving_cases import ANSWERS, QUESTION, body
from yojo.demo.reward import load_reward_model
from yojo.serving import cluster
from yojo.serving.cluster import Current, Replicas
from yojo.serving.metrics import Metrics, together
from yojo.serving.roles import model_of
from yojo.serving.server import Address
from yojo.serving.settings import Settings

LONG = 180.0  # seconds that no step takes
LINGER = 0.2  # seconds that a row waits for company: a client can leave meanwhile


def free_port():
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


def wanted(request):
    """Scores of the demonstration's model, as it is shipped."""
    import base64

    images = [base64.b64decode(image.partition(",")[2]) for image in request.get("images", ())]
    return load_reward_model().score(request["prompt"], request["responses"], images=images)


@pytest.mark.parametrize("text, least, most", [("1", 1, 1), ("4", 4, 4), ("1-8", 1, 8)])
def test_replicas_are_read(text, least, most):
    found = Replicas.of(text)
    assert (found.least, found.most) == (least, most)
    options = found.options()
    if least == most:
        assert options == {"num_replicas": most}
    else:
        assert (options["autoscaling_config"]["min_replicas"], options["autoscaling_config"]["max_replicas"]) == (1, 8)


@pytest.mark.parametrize("text", ["0", "", "a", "4-2", "1-", "-1", "1.5"])
def test_what_are_no_replicas(text):
    with pytest.raises(ValueError, match="replicas"):
        Replicas.of(text)


def test_replicas_of_one_deployment_have_one_model():
    current = Current()
    assert current.begin("first") is None
    assert current.agree("first", "d0") == "d0" == current.agree("first", "d1")
    assert current.begin("second") == "first"
    assert current.current() == "second" and current.agree("second", "d1") == "d1"


def test_numbers_of_a_replica_that_is_gone_are_dropped(monkeypatch):
    now, current = 100.0, Current()
    monkeypatch.setattr(cluster.time, "monotonic", lambda: now)
    current.tell("a", b"1")
    now += cluster.FORGOTTEN - 1
    current.tell("b", b"2")
    assert current.told() == {"a": b"1", "b": b"2"}
    now += 2
    assert current.told() == {"b": b"2"}


def samples(text):
    """dict: (name, set of labels with their values) -> number, of what Prometheus reads."""
    all_of_them = [one for family in text_string_to_metric_families(text) for one in family.samples]
    found = {(one.name, frozenset(one.labels.items())): one.value for one in all_of_them}
    assert len(found) == len(all_of_them)
    return found


def test_numbers_of_replicas_stand_beside_each_other():
    texts = {}
    for replica, count in (("a", 1), ("b", 3)):
        metrics = Metrics()
        for _ in range(count):
            metrics.request("/score", 200, "", 0.3)
        metrics.add(lambda: {"yojo_collator_groups_total": 7, "yojo_collator_groups_waiting": 2})
        texts[replica] = metrics.text()
    wanted = {
        (name, labels | {("replica", replica)}): value
        for replica, text in texts.items()
        for (name, labels), value in samples(text.decode()).items()
    }
    assert samples(together(texts).decode()) == wanted
    assert "# TYPE yojo_requests_total counter" in together(texts).decode()


def test_numbers_that_cannot_be_told_are_no_reason_to_be_replaced(monkeypatch):
    """`Current` is lost, then there again: its handle is asked for anew."""
    import ray

    class Lost:
        def remote(self, *_):
            raise ray.exceptions.ActorDiedError

    class There:
        def remote(self, *told):
            heard.append(told)
            return asyncio.sleep(0, {"b": Metrics().text()})

    heard, actors = [], iter([SimpleNamespace(tell=Lost(), told=Lost()), SimpleNamespace(tell=There(), told=There())])
    monkeypatch.setattr(cluster, "_current", lambda _: next(actors))
    monkeypatch.setattr(cluster._Numbers, "_replica", lambda _: "a")
    metrics = Metrics()
    numbers = cluster._Numbers(metrics)

    async def asked():
        alone = samples((await numbers()).decode())
        await numbers.tell()
        return alone, samples((await numbers()).decode())

    alone, both = asyncio.run(asked())
    assert alone == samples(together({"a": metrics.text()}).decode())
    assert heard[0] == ("a", metrics.text()) and {dict(labels)["replica"] for _, labels in both} == {"a", "b"}


class States:
    """Ray Serve as far as `_begun` sees it: what `status` says, one after the other."""

    def __init__(self, *states):
        self.states = iter(states)

    def status(self):
        state = next(self.states)
        part = SimpleNamespace(message="its weights are broken")
        one = SimpleNamespace(status=state, message="said", deployments={"reward-model": part})
        return SimpleNamespace(applications={} if state is None else {cluster.APPLICATION: one})


class Ended:
    """An event that a signal sets while it is asked for the nth time."""

    def __init__(self, at=None):
        self.at, self.asked = at, 0

    def wait(self, seconds):
        self.asked += 1
        return self.asked == self.at


@pytest.mark.parametrize(
    "states, at, why, asked",
    [
        (["DEPLOYING", "DEPLOYING", "RUNNING"], None, None, 3),
        (["DEPLOYING", "UNHEALTHY", "DEPLOY_FAILED"], None, "said its weights are broken", 3),
        (["DEPLOYING", None], None, None, 2),
        (["DEPLOYING", "DEPLOYING"], 3, None, 3),  # told to end while replicas begin
    ],
)
def test_replicas_begin_or_cannot(states, at, why, asked):
    ended = Ended(at)
    assert (cluster._begun(ended, States(*states)), ended.asked) == (why, asked)


def test_the_reason_is_the_last_line():
    said = "The deployment failed to start 3 times in a row.\n  File x\nyojo.serving.workers.Failed: head: is damaged\n"
    assert cluster._reason(said) == "head: is damaged"
    assert cluster._reason("Failed to update: no route") == "Failed to update: no route"


@pytest.mark.parametrize(
    "given, replicas, why",
    [
        (Address(port=0), None, "--port must be one"),
        (Address(certificate="a.pem", private_key="b.pem"), None, "own proxies"),
        (Address(proxies="*"), None, "own proxies"),
        (Address(), "3-1", "LEAST-MOST"),
    ],
)
def test_what_ray_does_not_take(given, replicas, why):
    with pytest.raises(ValueError, match=why):
        cluster.serve_on_ray(model_of("demo"), Settings(), given, 1, None, "local", replicas)


@pytest.fixture(scope="module")
def ray_serve():
    """(ray.serve, address) with the demonstration's model on CPUs: one replica, and a second one under load."""
    import ray
    from ray import serve

    port = free_port()
    ray.init(num_cpus=16, namespace=cluster.NAMESPACE, include_dashboard=False, log_to_driver=False)
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deploy(serve, Replicas(1, 2))
        yield serve, f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()


def deploy(serve, replicas=Replicas(2, 2), surge=0, **settings):  # noqa: B008, it is frozen
    settings = Settings(names=("demo", settings.pop("also", "other")), linger=LINGER, **settings)
    made = cluster.deployment(model_of("demo"), settings, f"{time.time_ns()}", 1, None, replicas, 0, 1, surge)
    serve.run(made, name=cluster.APPLICATION, blocking=False)


def counted(client, status):
    """dict: replica -> how many requests for scores ended so, as any of them tells."""
    found = {}
    for (name, labels), value in samples(client.get("/metrics").text).items():
        labels = dict(labels)
        if name == "yojo_requests_total" and (labels["endpoint"], labels["status"]) == ("/score", str(status)):
            found[labels["replica"]] = found.get(labels["replica"], 0) + value
    return found


def until(condition):
    """What a function gives, once that is true."""
    ends = time.monotonic() + LONG
    while not (found := condition()):
        assert time.monotonic() < ends
        time.sleep(0.1)
    return found


def test_replicas_score_as_one_would(ray_serve):
    _, address = ray_serve
    scores = wanted(body())
    with httpx.Client(base_url=address, timeout=LONG) as client:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            replies = list(pool.map(lambda _: client.post("/score", json=body()), range(24)))
        for reply in replies:
            assert reply.status_code == 200, reply.text
            torch.testing.assert_close(torch.tensor(reply.json()["scores"]), scores, rtol=0, atol=2e-5)
        assert len({reply.headers["Yojo-Fingerprint"] for reply in replies}) == 1
        # What is wrong is said as by one server, and a group's samples might come to two.
        wrong = client.post("/score", json={**body(), "responses": [" "]})
        assert wrong.status_code == 422 and wrong.json()["error"]["param"] == "responses.0"
        group = {"key": "k", "group_size": 2, "prompt": QUESTION, "response": ANSWERS[0]}
        refused = client.post("/group", json=group)
        assert (refused.status_code, refused.json()["error"]["code"]) == (409, "several_replicas")
        assert client.get("/ready").json() == {"ready": True, "reasons": []}
        # Whichever answers, the numbers are those of all.
        until(lambda: sum(counted(client, 200).values()) == 24)

        # A client that leaves is noticed behind Ray's proxy, too.
        def leave():
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{address}/score", json=body(), timeout=httpx.Timeout(LONG, read=LINGER / 2))
            return counted(client, 499)

        assert until(leave)


class Load:
    """Clients that ask one after the other, until they are told to end."""

    def __init__(self, address, clients=4):
        self.address, self.ended, self.found = address, threading.Event(), []
        self.threads = [threading.Thread(target=self.ask) for _ in range(clients)]

    def ask(self):
        with httpx.Client(base_url=self.address, timeout=LONG) as client:
            while not self.ended.is_set():
                try:
                    reply = client.post("/score", json=body())
                    self.found.append((reply.status_code, reply.json().get("scores"), reply.text))
                except Exception as error:
                    self.found.append((None, None, repr(error)))

    def __enter__(self):
        for thread in self.threads:
            thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        for thread in self.threads:
            thread.join()


@pytest.mark.soak
@pytest.mark.parametrize(
    "count, surge",
    [(1, 0), (1, 0), (2, 100)],
    ids=["old ones end first", "the only one ends first", "new ones begin first"],
)
def test_a_new_deployment_takes_over_without_a_request_that_is_lost(ray_serve, count, surge):
    serve, address = ray_serve
    scores, newer = wanted(body()).tolist(), f"newer-{time.time_ns()}"
    with Load(address) as load:
        deploy(serve, Replicas(count, count), surge, also=newer)
    names = [one["id"] for one in httpx.get(f"{address}/v1/models").json()["data"]]
    assert names == ["demo", newer]
    assert len(load.found) >= 4 and {status for status, *_ in load.found} == {200}, load.found[-1]
    for _, found, _ in load.found:
        assert found == pytest.approx(scores, abs=2e-5)
    if count > 1:  # each of several tells the numbers of all
        with httpx.Client(base_url=address, timeout=LONG) as client:
            with concurrent.futures.ThreadPoolExecutor(8) as pool:
                list(pool.map(lambda _: client.post("/score", json=body()), range(24)))
            until(lambda: len(counted(client, 200)) >= count)
            until(lambda: len(counted(client, 200)) == count)  # those that have ended are forgotten


def replicas():
    """The process numbers of the replicas."""
    import psutil

    found = psutil.process_iter(["pid", "cmdline", "status"])
    return {
        one.info["pid"]
        for one in found
        if "ServeReplica" in " ".join(one.info["cmdline"] or ()) and one.info["status"] != psutil.STATUS_ZOMBIE
    }


@pytest.mark.soak
def test_a_replica_that_is_killed_comes_back(ray_serve):
    serve, address = ray_serve
    if len(replicas()) != 2:
        deploy(serve)
    before = replicas()
    assert len(before) == 2
    with Load(address) as load:
        while len(load.found) < 8:
            time.sleep(0.01)
        os.kill(min(before), signal.SIGKILL)
        until = time.monotonic() + LONG
        while time.monotonic() < until:
            states = serve.status().applications["yojo"].deployments["reward-model"].replica_states
            if replicas() - before and states == {"RUNNING": 2}:  # a new one is STARTING once its process is there
                break
            time.sleep(0.2)
    assert len(replicas()) == 2 and min(before) not in replicas()
    # In flight at the one that was killed: an error, or a connection that breaks (None); all others have their scores.
    assert {status for status, *_ in load.found} <= {200, 503, 500, None}
    assert sum(status != 200 for status, *_ in load.found) <= 4
    assert httpx.post(f"{address}/score", json=body(), timeout=LONG).status_code == 200


@pytest.mark.soak
def test_what_else_is_on_the_cluster_is_left_alone(ray_serve):  # the last one: it ends the deployment
    import ray

    serve, address = ray_serve

    @serve.deployment(name="another", ray_actor_options={"num_cpus": 0})
    class Another:
        async def __call__(self, request):
            return "another's"

    serve.run(Another.bind(), name="another", route_prefix="/another")
    port = int(address.rpartition(":")[2])
    cluster._check_address(Address(port=port))
    with pytest.raises(ValueError, match=f"listens at 127.0.0.1:{port} on this cluster already"):
        cluster._check_address(Address(port=port + 1))
    cluster._delete(serve, ray, cluster._current(ray), 30)
    assert set(serve.status().applications) == {"another"}
    assert httpx.get(f"{address}/another").text == "another's"


@pytest.mark.soak
def test_the_command_ends_well(tmp_path):
    """SIGTERM: exit code 0, and nothing of Ray's is left."""
    port = free_port()
    command = [
        sys.executable,
        "-m",
        "yojo.cli",
        "serve",
        "--model",
        "demo",
        "--port",
        str(port),
        "--ray",
        "--workers",
        "1",
    ]
    root = Path(__file__).parents[2]
    with open(tmp_path / "log", "w+") as log:
        server = subprocess.Popen(
            [*command, "--replicas", "1"], cwd=root, stderr=log, env={**os.environ, "PYTHONPATH": str(root)}
        )
        try:
            until = time.monotonic() + LONG
            while time.monotonic() < until and server.poll() is None:
                try:
                    if httpx.get(f"http://127.0.0.1:{port}/ready").status_code == 200:
                        break
                except httpx.HTTPError:
                    pass
                time.sleep(0.2)
            reply = httpx.post(f"http://127.0.0.1:{port}/score", json=body(), timeout=LONG)
            assert reply.json()["scores"] == pytest.approx(wanted(body()).tolist(), abs=2e-5)
            server.send_signal(signal.SIGTERM)
            assert server.wait(LONG) == 0
        finally:
            server.kill()
            server.wait()
        log.seek(0)
        assert re.search("ending: what was accepted is finished", log.read())

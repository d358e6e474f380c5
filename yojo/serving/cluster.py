"""`serve_on_ray`: the server on a Ray cluster, a replica per GPU behind Ray Serve's own proxies; what `yojo serve --ray` runs."""

import asyncio
import dataclasses
import logging
import re
import secrets
import signal
import sys
import threading
import time

from yojo.scoring import ray_data
from yojo.serving.app import create_app
from yojo.serving.engine import Engine
from yojo.serving.metrics import together
from yojo.serving.server import scoring_roles, sleep_while_waiting
from yojo.serving.workers import FAILED, keep_what_is_loaded

logger = logging.getLogger(__name__)

APPLICATION, NAMESPACE = "yojo", "yojo-serving"
ONGOING = 512  # requests at a replica, at most; its own queue is bounded by tokens and says 429 before that
QUEUED = 1024  # requests that a proxy holds for replicas that begin, at most
TARGET = 64  # requests at a replica that autoscaling aims at
AGAIN = 5.0  # seconds after which a request that a proxy has no room for is asked to come again
CHECK = 5.0  # seconds between a replica's health checks, with which it tells its numbers
FORGOTTEN = 4 * CHECK  # seconds after which the numbers of a replica that tells nothing more are dropped
SURGE = 20  # percent of the replicas that begin before as many old ones end
_REPLICAS = re.compile(r"(?P<least>\d+)(?:-(?P<most>\d+))?")


@dataclasses.dataclass(frozen=True)
class Replicas:
    """How many replicas there are, each with a model of its own.

    Attributes:
        least, most: where they differ, Ray Serve follows the load.
    """

    least: int = 1
    most: int = 1

    def __post_init__(self):
        if not 1 <= self.least <= self.most:
            raise ValueError(f"replicas must be at least 1, and LEAST-MOST in this order, got {self.least}-{self.most}")

    @classmethod
    def of(cls, text):
        """Of "4" or "1-8"."""
        found = _REPLICAS.fullmatch(text)
        if found is None:
            raise ValueError(f"--replicas must be a number, or LEAST-MOST such as 1-8, got {text!r}")
        return cls(int(found["least"]), int(found["most"] or found["least"]))

    def options(self):
        """As options of a deployment."""
        if self.least == self.most:
            return {"num_replicas": self.least}
        scaling = {"min_replicas": self.least, "max_replicas": self.most, "target_ongoing_requests": TARGET}
        return {"num_replicas": None, "autoscaling_config": scaling}


class Current:
    """What the cluster serves now, and the numbers of its replicas: an actor that they and the commands share.

    It outlives commands, and comes back empty where its node is lost: replicas tell it anew who they are.
    """

    def __init__(self):
        self.name, self.digests, self.numbers = None, {}, {}

    def begin(self, name):
        """A deployment takes the place of the one before, whose name this is; None: there was none."""
        before, self.name = self.name, name
        return before

    def current(self):
        """The name of the last that has begun."""
        return self.name

    def agree(self, name, digest):
        """The digest of the first replica of a deployment; this one, for the first."""
        return self.digests.setdefault(name, digest)

    def tell(self, replica, text):
        """Keep a replica's numbers."""
        self.numbers[replica] = time.monotonic(), text

    def told(self):
        """dict: replica -> its numbers, of those that have told them of late."""
        since = time.monotonic() - FORGOTTEN
        self.numbers = {replica: one for replica, one in self.numbers.items() if one[0] >= since}
        return {replica: text for replica, (_, text) in self.numbers.items()}


def _current(ray):
    """The cluster's `Current`, made where there is none."""
    options = {"name": "current", "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached"}
    return ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Current).options(**options).remote()


def deployment(
    model,
    settings,
    name,
    workers=2,
    policy=None,
    replicas=Replicas(),  # noqa: B008, it is frozen
    gpus=1,
    cpus=None,
    surge=0,
):
    """A Ray Serve application of a reward model.

    A replica is the whole server but for its port: the endpoints around an `Engine` with a scoring process and some that
    prepare. It takes requests once its model scores as it did when it was saved, and is the one that the first replica has.

    Args:
        model, settings, policy: as for `yojo.serving.server.serve`.
        name: of this deployment, by which its replicas know each other.
        workers: processes of each replica that prepare requests.
        replicas: `Replicas`.
        gpus: of each replica; 0: it scores on CPUs.
        cpus: of each replica; None: those of its workers.
        surge: percent of the replicas that begin before as many of a deployment that is replaced end, which takes room for
            both; 0: old ones end first, a fifth of them at a time.

    Returns:
        what `ray.serve.run` takes.
    """
    from ray import serve
    from ray.serve.config import BackpressureConfig

    settings = dataclasses.replace(settings, replicas=replicas.most)

    def build():
        sleep_while_waiting()
        device = "cuda:0" if gpus else "cpu"
        engine = Engine(settings, scoring_roles(model, [device]), workers)
        keep_what_is_loaded()
        return create_app(engine, settings, policy, numbers=_Numbers(engine.metrics))

    @serve.deployment(
        name="reward-model",
        ray_actor_options={"num_gpus": gpus, "num_cpus": workers + 1 if cpus is None else cpus},
        max_ongoing_requests=ONGOING,
        max_queued_requests=QUEUED,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=AGAIN),
        max_surge_percent=surge,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.grace + 5.0,  # the app, which keeps its own grace, ends within it
        health_check_period_s=CHECK,
        health_check_timeout_s=30.0,  # the first one, which waits for the model, is part of the beginning and has no bound
        **replicas.options(),
    )
    @serve.ingress(build)
    class RewardServer:
        has_agreed = False

        async def check_health(self):
            engine = self.app.state.service.engine
            if not self.has_agreed:
                await engine.until_ready()
                await self._agree(engine.model["digest"])
                self.has_agreed = True
            if all(worker.state == FAILED for worker in engine.scorers):
                raise RuntimeError(engine.scorers[0].why)
            await self.app.state.service.numbers.tell()

        async def _agree(self, digest):
            import ray

            first = await _current(ray).agree.remote(name, digest)
            if first != digest:
                raise RuntimeError(
                    f"this node has another model ({digest}) under its name than the first replica ({first}): its scores would be "
                    "others; put the same files on every node"
                )

    return RewardServer.bind()


class _Numbers:
    """What a replica's /metrics says: the numbers of all of them, since nobody can choose which one answers.

    Args:
        metrics: `yojo.serving.metrics.Metrics`, this replica's.
    """

    def __init__(self, metrics):
        self.metrics, self._current = metrics, None

    async def __call__(self):
        """Everybody's: this replica's as they are, the others' as they were at their last health checks."""
        texts = await self._asked(lambda current: current.told.remote()) or {}
        return await asyncio.to_thread(together, {**texts, self._replica(): self.metrics.text()})

    async def tell(self):
        """Have this replica's known to the others."""
        replica, text = self._replica(), self.metrics.text()
        await self._asked(lambda current: current.tell.remote(replica, text))

    @staticmethod
    def _replica():
        from ray import serve

        return serve.get_replica_context().replica_id.unique_id

    async def _asked(self, question):
        """What `Current` answers; None where it does not: numbers are no reason to replace a replica."""
        import ray

        try:
            if self._current is None:
                self._current = await asyncio.to_thread(_current, ray)  # which may wait for the head node
            return await asyncio.wait_for(question(self._current), 2.0)
        except (ray.exceptions.RayError, asyncio.TimeoutError, ValueError) as error:
            logger.warning("numbers of replicas: %s", type(error).__name__)
            self._current = None
            return None


def serve_on_ray(model, settings, address, workers, policy, ray_address, replicas=None):
    """Serve on a Ray cluster until the process is told to end.

    The same command again, from wherever, takes the place of the deployment that is there, replica by replica. A command whose
    deployment was replaced leaves the new one as it is when it ends; other applications on the cluster are left alone.

    Args:
        model, settings, policy: as for `yojo.serving.server.serve`.
        address: `yojo.serving.server.Address`, where each node's proxy listens.
        workers: processes of each replica that prepare requests.
        ray_address: "host:port" of a cluster, "auto", or "local".
        replicas: "4" or "1-8"; None: one for each GPU of the cluster, or one on CPUs.

    Returns:
        int: exit code: 0, or 1 where no replica can begin.

    Raises:
        ValueError: replicas that are none; a certificate, which Ray's proxies do not take here, or no port; Ray Serve is not
            installed, or listens elsewhere already; nobody answers at the address.
    """
    if address.certificate or address.proxies:
        raise ValueError("--ray serves through Ray's own proxies: leave --certificate, --private-key and --proxy out")
    if not address.port:
        raise ValueError("--ray listens at the same port of every node: --port must be one, not 0")
    replicas = None if replicas is None else Replicas.of(replicas)
    ended = threading.Event()

    def end(*_):
        if ended.is_set():
            raise KeyboardInterrupt
        ended.set()

    with ray_data.cluster(None if ray_address == "local" else ray_address) as ray:
        try:
            from ray import serve
        except ImportError as error:
            raise ValueError("--ray needs Ray Serve: pip install 'yojo[serve,ray]'") from error
        logging.getLogger("ray.serve").setLevel(
            logging.WARNING
        )  # which speaks of options that are not applied, and are
        before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            return _serve_until(ended, ray, serve, model, settings, address, workers, policy, replicas)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _serve_until(ended, ray, serve, model, settings, address, workers, policy, replicas):
    serve.start(http_options={"host": address.host, "port": address.port})
    _check_address(address)
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0))
    replicas = replicas or Replicas(max(1, gpus), max(1, gpus))
    cpus = workers + 1 if gpus else max(1, min(workers + 1, int(there.get("CPU", 1)) // replicas.most))
    free = ray.available_resources()
    has_room = free.get("CPU", 0) >= cpus and free.get("GPU", 0) >= bool(gpus)
    name, current = secrets.token_hex(8), _current(ray)
    before = ray.get(current.begin.remote(name))
    made = deployment(
        model, settings, name, workers, policy, replicas, 1 if gpus else 0, cpus, surge=SURGE if has_room else 0
    )
    serve.run_many([serve.RunTarget(made, APPLICATION, "/")], wait_for_applications_running=False)
    count = replicas.least if replicas.least == replicas.most else f"{replicas.least} to {replicas.most}"
    logger.info("listening at http://%s:%d on every node, replicas: %s", address.host, address.port, count)
    if (why := _begun(ended, serve)) is not None:
        logger.error("no replica can begin: %s", why)
        print(f"error: {_reason(why)}", file=sys.stderr)
        if before is not None:
            # Ray goes on with those that are left of the deployment before, which its own command ends.
            ray.get(current.begin.remote(before))
            logger.error("what is left of the deployment before goes on")
        else:
            _delete(serve, ray, current, settings.grace)
        return 1
    ended.wait()
    logger.info("ending: what was accepted is finished")
    if ray.get(current.current.remote()) in (name, None):
        _delete(serve, ray, current, settings.grace)
    else:
        logger.info("another command has taken this deployment's place: it goes on")
    return 0


def _check_address(address):
    """Ray Serve that was there before listens where it did."""
    from ray.serve.context import _get_global_client  # nothing public tells

    found = _get_global_client().http_config
    if (found.host, found.port) != (address.host, address.port):
        raise ValueError(
            f"Ray Serve listens at {found.host}:{found.port} on this cluster already: --host {found.host} --port {found.port}, "
            "or `serve shutdown` first"
        )


def _begun(ended, serve):
    """Why no replica can begin; None once all are there, or when the process is told to end."""
    said = None
    while not ended.wait(0.5):
        found = serve.status().applications.get(APPLICATION)
        if found is None:  # another command has ended it
            return None
        if found.status == "RUNNING":
            logger.info("ready: all replicas have begun")
            return None
        if found.status == "DEPLOY_FAILED":
            return " ".join([found.message, *(one.message for one in found.deployments.values())]).strip()
        if (found.status, found.message) != said:
            logger.info("replicas begin: %s %s", found.status.lower(), found.message)
            said = found.status, found.message
    return None


def _reason(why):
    """The last line of what Ray says, which is the error's own, without its type."""
    return re.sub(r"^[\w.]+(?:Error|Failed): ", "", why.strip().splitlines()[-1])


def _delete(serve, ray, current, grace):
    """End the application once it has answered what it has accepted; and Ray Serve, unless it has others."""
    serve.delete(APPLICATION, _blocking=False)
    until = time.monotonic() + grace + 30  # Ray ends by force what is there after the grace
    while APPLICATION in (left := serve.status().applications) and time.monotonic() < until:
        time.sleep(0.2)
    if not set(left) - {APPLICATION}:
        serve.shutdown()
    ray.kill(current)

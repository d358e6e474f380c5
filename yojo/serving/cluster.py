"""`serve_on_ray`: the server on a Ray cluster, a replica per GPU behind Ray Serve's own proxies; what `yojo serve --ray` runs."""

import dataclasses
import logging
import os
import re
import secrets
import signal
import threading

from yojo.scoring import ray_data
from yojo.serving.app import create_app
from yojo.serving.engine import Engine
from yojo.serving.server import scoring_roles, sleep_while_waiting
from yojo.serving.workers import FAILED

logger = logging.getLogger(__name__)

APPLICATION, NAMESPACE = "yojo", "yojo-serving"
ONGOING = 512  # requests at a replica, at most; its own queue is bounded by tokens and says 429 before that
QUEUED = 1024  # requests that a proxy holds for replicas that begin, at most
TARGET = 64  # requests at a replica that autoscaling aims at
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
    """What the cluster serves now: an actor, which all replicas of one deployment ask."""

    def __init__(self):
        self.name, self.digests = None, {}

    def begin(self, name):
        """A deployment takes the place of the one before."""
        self.name = name

    def current(self):
        """The name of the last that has begun."""
        return self.name

    def agree(self, name, digest):
        """The digest of the first replica of a deployment; this one, for the first."""
        return self.digests.setdefault(name, digest)


def deployment(model, settings, name, workers=2, policy=None, replicas=Replicas(), gpus=1, cpus=None):  # noqa: B008, it is frozen
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

    Returns:
        what `ray.serve.run` takes.
    """
    from ray import serve

    settings = dataclasses.replace(settings, replicas=replicas.most)

    def build():
        sleep_while_waiting()
        device = "cuda:0" if gpus else "cpu"
        return create_app(Engine(settings, scoring_roles(model, [device]), workers), settings, policy)

    @serve.deployment(
        name="reward-model",
        ray_actor_options={"num_gpus": gpus, "num_cpus": workers + 1 if cpus is None else cpus},
        max_ongoing_requests=ONGOING,
        max_queued_requests=QUEUED,
        graceful_shutdown_wait_loop_s=0.5,
        graceful_shutdown_timeout_s=settings.grace,
        health_check_period_s=5.0,
        health_check_timeout_s=600.0,  # the first one waits for the model; the others answer at once
        **replicas.options(),
    )
    @serve.ingress(build)
    class RewardServer:
        async def check_health(self):
            await self._checked(self.app.state.service.engine)

        async def _checked(self, engine):
            if engine.model is None:
                await engine.until_ready()
                await self._agree(engine.model["digest"])
            if all(worker.state == FAILED for worker in engine.scorers):
                raise RuntimeError(engine.scorers[0].why)

        async def _agree(self, digest):
            import ray

            first = await ray.get_actor("current", namespace=NAMESPACE).agree.remote(name, digest)
            if first != digest:
                raise RuntimeError(
                    f"this node has another model ({digest}) under its name than the first replica ({first}): its scores would be "
                    "others; put the same files on every node"
                )

    return RewardServer.bind()


def serve_on_ray(model, settings, address, workers, policy, ray_address, replicas=None):
    """Serve on a Ray cluster until the process is told to end.

    The same command again, from wherever, takes the place of the deployment that is there, replica by replica: new ones begin before old
    ones have finished what they have. A command whose deployment was replaced leaves it as it is when it ends.

    Args:
        model, settings, policy: as for `yojo.serving.server.serve`.
        address: `yojo.serving.server.Address`, where each node's proxy listens.
        workers: processes of each replica that prepare requests.
        ray_address: "host:port" of a cluster, "auto", or "local".
        replicas: "4" or "1-8"; None: one for each GPU of the cluster, or one on CPUs.

    Returns:
        int: exit code, 0.

    Raises:
        ValueError: replicas that are none; a certificate, which Ray's proxies do not take here; Ray Serve is not installed, or
            nobody answers at the address.
    """
    if address.certificate or address.proxies:
        raise ValueError("--ray serves through Ray's own proxies: leave --certificate, --private-key and --proxy out")
    replicas = None if replicas is None else Replicas.of(replicas)
    ended = threading.Event()
    with ray_data.cluster(None if ray_address == "local" else ray_address) as ray:
        try:
            from ray import serve
        except ImportError as error:
            raise ValueError("--ray needs Ray Serve: pip install 'yojo[serve,ray]'") from error
        before = {number: signal.signal(number, lambda *_: ended.set()) for number in (signal.SIGTERM, signal.SIGINT)}
        try:
            _serve_until(ended, ray, serve, model, settings, address, workers, policy, replicas)
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
    return 0


def _serve_until(ended, ray, serve, model, settings, address, workers, policy, replicas):
    gpus = int(ray.cluster_resources().get("GPU", 0))
    replicas = replicas or Replicas(max(1, gpus), max(1, gpus))
    name = secrets.token_hex(8)
    options = {"name": "current", "namespace": NAMESPACE, "get_if_exists": True, "lifetime": "detached"}
    current = ray.remote(num_cpus=0)(Current).options(**options).remote()
    ray.get(current.begin.remote(name))
    serve.start(http_options={"host": address.host, "port": address.port})
    cpus = None if gpus else max(1, min(workers + 1, (os.cpu_count() or 1) // replicas.most))
    application = deployment(model, settings, name, workers, policy, replicas, 1 if gpus else 0, cpus)
    serve.run(application, name=APPLICATION, route_prefix="/", blocking=False)
    count = replicas.least if replicas.least == replicas.most else f"{replicas.least} to {replicas.most}"
    logger.info("listening at http://%s:%d on every node, replicas: %s", address.host, address.port, count)
    ended.wait()
    logger.info("ending: what was accepted is finished")
    if ray.get(current.current.remote()) == name:
        serve.shutdown()
        ray.kill(current)
    else:
        logger.info("another command has taken this deployment's place: it goes on")

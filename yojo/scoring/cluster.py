"""A scoring job on a Ray cluster: actors score rows by their numbers, and this process alone writes."""

import contextlib
import dataclasses
import json

import numpy as np

from yojo.scoring.scorer import Scorer

ROWS = 64  # that an actor is given at a time
ROWS_OF_WORKERS = 512  # more, where an actor has workers, which it starts for each batch


class Ray:
    """Where the actors are; `with` connects, or starts a cluster on this machine that ends with it.

    Args:
        address: "host:port" of a cluster, "auto" for the one this machine is a node of, or "local".
        actors, num_gpus, num_cpus: as for `yojo.scoring.ray_data.scored`.
    """

    def __init__(self, address="local", actors=None, num_gpus=None, num_cpus=None):
        self.address = None if address == "local" else address
        self.options = {"actors": actors, "num_gpus": num_gpus, "num_cpus": num_cpus}
        self._inside = contextlib.ExitStack()

    def __enter__(self):
        from yojo.scoring import ray_data

        self._inside.enter_context(ray_data.cluster(self.address))
        return self

    def __exit__(self, *how):
        return self._inside.__exit__(*how)

    def scored(self, rows, make_scorer, batch_rows=ROWS):
        """As `yojo.scoring.ray_data.scored`."""
        from yojo.scoring import ray_data

        return ray_data.scored(rows, make_scorer, address=self.address, batch_rows=batch_rows, **self.options)

    def fingerprint(self, load):
        """The fingerprint of a judge, as an actor loads it."""
        (found,) = self.scored([0], Identify(load))
        return json.loads(found["fingerprint"])

    def scorer(self, load, fingerprint, records, shard, job, token_budget, workers):
        """What `yojo.scoring.run.Run.score` takes; see `yojo.scoring.scorer.Scorer`."""
        return _Actors(self, MakeScorer(load, fingerprint, records, shard, job, token_budget, workers))


class _Actors:
    def __init__(self, ray, make):
        self.ray, self.make = ray, make

    def run(self, numbers, take):
        rows = np.fromiter(numbers, np.int64)
        batch_rows = ROWS_OF_WORKERS if self.make.workers else ROWS
        with contextlib.closing(self.ray.scored(rows, self.make, batch_rows)) as outcomes:
            try:
                for outcome in outcomes:
                    take(outcome)
            except RuntimeError as error:
                raise ChildProcessError(
                    f"{error}: what was scored is kept, and the same command goes on with it"
                ) from error


@dataclasses.dataclass(frozen=True)
class Identify:
    """Makes, in an actor, what tells the fingerprint of its judge."""

    load: object

    def __call__(self):
        fingerprint = json.dumps(self.load().fingerprint())
        return lambda rows: [{"row": row, "fingerprint": fingerprint} for row in rows]


@dataclasses.dataclass(frozen=True)
class MakeScorer:
    """Makes an actor's `Scorer`; what a node has under the judge's name must be the judge that the job is of."""

    load: object
    fingerprint: dict
    records: object
    shard: tuple
    job: str
    token_budget: int
    workers: int

    def __call__(self):
        from yojo.scoring.job import differences

        judge = self.load()
        found = json.loads(json.dumps(judge.fingerprint()))
        if found != json.loads(json.dumps(self.fingerprint)):
            raise ValueError(
                f"the judge {self.load.name} is another one on a node of the cluster: it differs in "
                f"{'; '.join(differences(self.fingerprint, found)[:4])}"
            )
        return Scorer(judge, self.records, self.shard, self.job, self.token_budget, self.workers)

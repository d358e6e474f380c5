"""Scoring by actors, on a real Ray cluster of several nodes: each row once, whatever dies."""

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest

pytest.importorskip("ray", reason="needs Ray: pip install 'yojo[ray]'")

from ray_cases import Slow, quick
from scoring_cases import bad_of, candidates, check, write
from scoring_cases import run as score

from yojo.scoring import cluster as ray_jobs
from yojo.scoring import ray_data
from yojo.scoring.progress import Progress

ROOT = Path(__file__).parents[2]
# Raylets look for a lost node every few seconds, five times; tests have no time for that.
HASTY = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 3}


def ended(processes, seconds=60):
    """Those of the processes that are still there."""
    return [process for process in psutil.wait_procs(processes, seconds)[1] if process.status() != "zombie"]


@pytest.fixture(scope="module")
def cluster():
    """A cluster of three nodes on this machine: the one that the driver is on has no CPU to offer, the others one each."""
    import ray
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "tests")]))  # for processes on the nodes
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.delenv("RAY_ADDRESS", raising=False)
        patch.setenv("CUDA_VISIBLE_DEVICES", "3")  # which actors without a GPU must not see
        before = {process.pid for process in psutil.Process().children(recursive=True)}
        made = Cluster(
            initialize_head=True,
            head_node_args={"num_cpus": 0, "include_dashboard": False, "_system_config": HASTY},
        )
        try:
            for _ in range(2):
                made.add_node(num_cpus=1, include_dashboard=False)
            ray.init(address=made.address, log_to_driver=False, logging_level="ERROR")
            yield made
        finally:
            started = [each for each in psutil.Process().children(recursive=True) if each.pid not in before]
            ray.shutdown()
            made.shutdown()
            assert len(started) > 6 and not ended(started)


def run(rows, *args, batch_rows=10, **options):
    return list(ray_data.scored(rows, quick(*args), batch_rows=batch_rows, **options))


def test_every_row_once_though_an_actor_is_killed(cluster, tmp_path):
    """What it was at is done by its successor, and nothing twice."""
    rows, results = [*range(1000, 1100), 45, *range(40), 2**40], []
    for result in ray_data.scored(rows, quick(None, str(tmp_path), 0.01, gates=[(10, 3)]), batch_rows=10):
        if not results:
            os.kill(result["pid"], signal.SIGKILL)
        results.append(result)
    assert sorted(result["row"] for result in results) == sorted(rows)
    assert all(result["scores"] == [result["row"] / 7, 0.1] and result["bad"] is None for result in results)
    assert len({result["pid"] for result in results}) == 3
    assert run([], None) == []


def test_a_job_has_every_row_once_though_an_actor_is_killed(cluster, tmp_path):
    """The same keys, fingerprint, output and resume as on one machine."""
    records = candidates(140, tmp_path / "images")
    records[50] = records[50] | {"responses": []}
    path, out, pids = write(tmp_path / "in.jsonl", records), tmp_path / "o.jsonl", tmp_path / "pids"
    pids.mkdir()
    load = Slow("slow", base_model=str(pids))

    class Killing(Progress):
        killed = False

        def add(self, *counts, **more):
            super().add(*counts, **more)
            if not self.killed:
                self.killed = True
                started = sorted(pids.iterdir(), key=lambda file: file.stat().st_mtime)
                os.kill(int(started[-1].name), signal.SIGKILL)

    found = score(path, out, load, ray=ray_jobs.Ray("auto"), progress=lambda total, label: Killing(total))
    assert (found.scored, found.kept, found.bad) == (139, 0, 1) and list(bad_of(out)) == [50]
    check(out, records, path, bad=[50])
    more = [*candidates(10, seed=1), *records]
    found = score(write(path, more), out, workers=1)  # the same judge, here
    assert (found.scored, found.kept) == (10, 139)
    check(out, more, path, bad=[60])


def test_lost_node(cluster, tmp_path):
    """Its rows are done on the nodes that are left; a node that comes later is used."""
    node, seen, pids, before, lost = cluster.add_node(num_cpus=1, include_dashboard=False), [], set(), None, 0
    scorer = quick(None, str(tmp_path), 0.01, gates=[(10, 3), (200, 4)])
    for result in ray_data.scored(range(900), scorer, batch_rows=10):
        if before is None and len(pids) == 3:  # all are at work
            cluster.remove_node(node, allow_graceful=False)
            before, lost = set(pids), len(seen)
        if before is not None and len(seen) == lost + 10:
            node = cluster.add_node(num_cpus=1, include_dashboard=False)
        seen.append(result["row"])
        pids.add(result["pid"])
    cluster.remove_node(node)
    assert sorted(seen) == list(range(900))
    assert before is not None and pids - before


@pytest.mark.parametrize(
    ("fault", "error", "message"), [("raise", KeyError, "row 70 is odd"), ("make", ValueError, "no model here")]
)
def test_errors_come_back(cluster, fault, error, message):
    with pytest.raises(error, match=message) as caught:
        run(range(100), fault)
    assert "ray_cases.py" in str(caught.value.__cause__)


def test_no_node_has_room(cluster):
    with pytest.raises(ValueError, match="an actor needs 2 CPUs, and no node of the Ray cluster has as many"):
        run(range(10), None, num_cpus=2)
    with pytest.raises(ValueError, match="an actor needs 1 GPUs"):
        run(range(10), None, num_gpus=1)


@pytest.mark.soak
@pytest.mark.parametrize(
    ("fault", "message"), [("die", "rows 70 to 79: 4 processes have ended"), ("make-dies", "the making of a scorer: 4")]
)
def test_a_crash_is_not_repeated_for_ever(cluster, fault, message):
    with pytest.raises(RuntimeError, match=message):
        run(range(100), fault, actors=1)


@pytest.mark.soak
def test_whatever_dies(cluster):
    """Actors are killed again and again, and nodes go and are not replaced; answers of more than one piece."""
    nodes = [cluster.add_node(num_cpus=1, include_dashboard=False) for _ in range(2)]
    seen, kills = [], 0
    for result in ray_data.scored(range(1000), quick(None, None, 0.01, 15_000), batch_rows=10):
        seen.append(result["row"])
        if len(seen) % 150 == 0:
            kills += 1
            with contextlib.suppress(ProcessLookupError):
                os.kill(result["pid"], signal.SIGKILL)
        if len(seen) in (300, 600):
            cluster.remove_node(nodes.pop(), allow_graceful=False)
    assert sorted(seen) == list(range(1000)) and kills == 6 and not nodes


DRIVER = """
    from ray_cases import quick
    from yojo.scoring import ray_data
    try:
        for n, result in enumerate(ray_data.scored(range(4000), quick(None, None, 0.02), batch_rows=5, address={address!r})):
            print(result["row"], result["pid"], flush=True)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
"""


@contextlib.contextmanager
def driver(address):
    """A process that scores; its standard output."""
    command = [sys.executable, "-c", textwrap.dedent(DRIVER.format(address=address))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def actors_of(process, count=1):
    """The actors that the first results come from."""
    pids = set()
    while len(pids) < count:
        pids.add(int(process.stdout.readline().split()[1]))
    return [psutil.Process(pid) for pid in pids]


def test_interrupted_driver_takes_its_actors_along(cluster):
    with driver(cluster.address) as process:
        actors = actors_of(process, 2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and "interrupted" in out, err
        assert not ended(actors)
    assert len(run(range(20), None)) == 20


@pytest.mark.soak
def test_killed_driver_takes_its_actors_along(cluster):
    with driver(cluster.address) as process:
        actors = actors_of(process, 2)
        process.kill()
        assert not ended(actors)
    assert len(run(range(20), None)) == 20


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_cluster_of_ones_own_ends_with_the_scoring(number):
    with driver(None) as process:
        actors_of(process)
        started = psutil.Process(process.pid).children(recursive=True)
        assert any("raylet" in each.name() for each in started)
        process.send_signal(number)
        process.wait(60)
        assert not ended(started, 60 if number != signal.SIGKILL else 150)  # Ray's agents look round for a while


def test_results_that_come_twice_or_not_at_all():
    rows = ray_data.np.array([7, 3, 5])
    once = ray_data._once(rows, iter_of(3, 5, 3, 7, 5))
    assert [result["row"] for result in once] == [3, 5, 7]
    with pytest.raises(RuntimeError, match="2 of 3 rows came back without a result, row 5 for one"):
        list(ray_data._once(rows, iter_of(3)))
    for row in (4, 8):
        with pytest.raises(RuntimeError, match=f"row {row}, which nobody had asked for"):
            list(ray_data._once(rows, iter_of(3, row)))


def iter_of(*rows):
    yield from ({"row": row} for row in rows)


@pytest.mark.parametrize("size", [0, 100, 30_000])
def test_answers_are_small(size):
    """Ray keeps larger ones on the node that made them, and lost ones stop it."""
    results = [{"row": row, "noise": os.urandom(size)} for row in range(13)]
    pieces = list(ray_data.packed(results, "failure"))
    assert all(len(piece) <= ray_data.LARGEST for piece in pieces) and (len(pieces) > 1) == (size > 100)
    found = [ray_data.unpacked(piece) for piece in pieces]
    assert [result for part, _ in found for result in part] == results
    assert [failure for _, failure in found] == [None] * (len(pieces) - 1) + ["failure"]


def test_an_error_that_does_not_travel():
    class Here(Exception):
        pass

    error, report = ray_data._portable(Here("lost"))
    assert type(error) is RuntimeError and str(error) == "Here: lost" and "Here: lost" in report


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ray://head:10001", "does not run through a Ray client"),
        ("head", "expected auto or host:port"),
        ("127.0.0.1:1", "nobody answers there"),
    ],
)
def test_addresses(monkeypatch, address, message):
    import ray

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with pytest.raises(ValueError, match=message):
        list(ray_data.scored([1], quick(), address=address))
    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ValueError, match=message):
        list(ray_data.scored([1], quick()))


def test_ray_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(ValueError, match=r"pip install 'yojo\[ray\]'"):
        list(ray_data.scored([1], quick()))


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([1, 1], {}, "rows: expected"),
        ([1], {"actors": 0}, "actors: expected 1 or more, got 0"),
        ([1], {"batch_rows": 0}, "batch_rows: expected 1"),
        ([1], {"num_cpus": -1}, "num_cpus: expected 0"),
    ],
)
def test_arguments(rows, options, message):
    with pytest.raises(ValueError, match=message):
        ray_data.scored(rows, quick(), **options)

"""Rows scored by actors of a Ray cluster: Ray Data deals them out, brings the results back, and does again what dies."""

import contextlib
import os
import pickle
import re
import signal
import socket
import threading
import traceback
import zlib

import numpy as np

from yojo import __version__

LARGEST = 80_000  # bytes of an answer: Ray keeps up to 100 KiB beside the driver, and more on the node that made it
TRIES = 4  # times that a batch, or the making of a scorer, may end its process before that is an error
BATCHES = 20_000  # that Ray Data keeps a list of, at most: batches of longer inputs are larger
STORE = 256 * 2**20  # bytes of object memory for a cluster of our own: row numbers and results are small
WAIT = 10  # seconds for a cluster to answer


def scored(rows, make_scorer, *, address=None, actors=None, num_gpus=None, num_cpus=None, batch_rows=64):
    """Score rows by actors of a Ray cluster.

    A killed actor, or a node that is gone, costs the batches that were there: others, or its successor, do them again.
    Nodes that come later get actors, too, unless `actors` are there already. Every node needs the same installation.

    Args:
        rows: numbers of the rows, each once.
        make_scorer: called without arguments once in every actor; returns a function list of row numbers ->
            iterable of dicts of plain values, one with a "row" for each of them. Both have to pickle.
        address: "auto", for the cluster that this machine is a node of, or "host:port"; default: the one that RAY_ADDRESS
            names, or a new one on this machine alone, which ends with the scoring. A connection that `ray.init` has
            made before is used as it is.
        actors: at most; default: as many as there is room for.
        num_gpus: of an actor; default: 1 where the cluster has GPUs, else 0.
        num_cpus: of an actor, and the threads of its operators; default: 1 for an actor without a GPU.
        batch_rows: rows that an actor is given at a time, and that are lost with it.

    Returns:
        Iterator of the dicts, one for every row, as they come.

    Raises:
        ValueError: on first use: Ray is missing, nobody answers at the address, or the cluster has no room for an actor.
        RuntimeError: on first use: rows came without a result, or Ray has failed. What the scorer raises is raised as it is.
    """
    rows = np.asarray(rows, dtype=np.int64)
    if rows.ndim != 1 or len(np.unique(rows)) != len(rows):
        raise ValueError("rows: expected a list of row numbers, each of them once")
    for name, value, least in (
        ("actors", actors, 1),
        ("batch_rows", batch_rows, 1),
        ("num_gpus", num_gpus, 0),
        ("num_cpus", num_cpus, 0),
    ):
        if value is not None and value < least:
            raise ValueError(f"{name}: expected {least} or more, got {value}")
    batch_rows = max(batch_rows, -(-len(rows) // BATCHES))
    return _once(rows, _scored(rows, make_scorer, address, actors, num_gpus, num_cpus, batch_rows))


def _once(rows, results):
    """Each row's result the first time that it comes; Ray Data promises at least once, and not at most."""
    places = np.argsort(rows)
    ordered = rows[places]
    missing = np.ones(len(rows), bool)
    with contextlib.closing(results):
        for result in results:
            at = np.searchsorted(ordered, result["row"])
            if at == len(rows) or ordered[at] != result["row"]:
                raise RuntimeError(f"the scorer gave a result for row {result['row']}, which nobody had asked for")
            if missing[at]:
                missing[at] = False
                yield result
    if missing.any():
        left = ordered[missing]
        raise RuntimeError(f"{len(left)} of {len(rows)} rows came back without a result, row {left[0]} for one")


def _scored(rows, make_scorer, address, actors, num_gpus, num_cpus, batch_rows):
    if not len(rows):
        return
    with cluster(address) as ray:
        import pyarrow
        from ray.data import ActorPoolStrategy, from_blocks

        fit, num_gpus, num_cpus = room(ray, num_gpus, num_cpus)
        # Blocks of our own, in the driver's memory: reading tasks would wait for CPUs that actors have.
        blocks = [pyarrow.table({"row": rows[start : start + batch_rows]}) for start in range(0, len(rows), batch_rows)]
        starts = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1)(Starts).remote()
        data = from_blocks(blocks).map_batches(
            Actor,
            fn_constructor_args=(make_scorer, starts, __version__, num_gpus),
            batch_size=batch_rows,
            batch_format="pyarrow",
            # One actor is enough to go on; all that there is room for are asked for at once, and more as nodes join.
            compute=ActorPoolStrategy(
                min_size=1, max_size=actors, initial_size=max(1, min(fit, len(blocks), actors or fit))
            ),
            num_gpus=num_gpus or None,
            num_cpus=num_cpus,
        )
        data.context.enable_progress_bars = False
        data.context.print_on_execution_start = False
        data.context.max_errored_blocks = 0
        data.context.target_max_block_size = 1  # a block for each piece
        data.context.execution_no_progress_timeout_s = -1  # a batch, or the wait for a node, takes what it takes
        batches = iter(data.iter_batches(batch_size=None, batch_format="pyarrow"))
        try:
            with contextlib.closing(batches):
                for batch in batches:
                    for piece in batch["piece"].to_pylist():
                        results, failure = unpacked(piece)
                        yield from results
                        if failure is not None:
                            error, report = failure
                            raise error from RuntimeError(f"in an actor:\n{report}")
        except ray.exceptions.RayError as error:
            raise RuntimeError(f"Ray: {_said(error)}") from error


class Actor:
    """What runs on the nodes: a scorer, made once, that is given one batch of row numbers after the other.

    The results of a batch travel as one pickle: floats stay what they are, and what is small enough Ray sends along with
    its answer, so that no node which goes down later can take it away.
    """

    def __init__(self, make_scorer, starts, version, num_gpus):
        self.starts, self.score, self.failure = starts, None, None
        if not num_gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # Ray leaves the GPUs of a node in sight of all
        try:
            if version != __version__:
                raise RuntimeError(f"this node has yojo {__version__}, the one that scores has {version}")
            with self.started(_actor_id(), "the making of a scorer"):
                self.score = make_scorer()
        except Exception as error:
            # An answer, to the first batch: Ray would say it in forty lines, after starting over.
            self.failure = _portable(error)

    def __call__(self, batch):
        import pyarrow

        for piece in packed(*self.answer(batch["row"].to_pylist())):
            yield pyarrow.table({"piece": pyarrow.array([piece], pyarrow.binary())})

    def answer(self, rows):
        """(results, None or (error, its traceback)) of a batch."""
        if self.failure is not None:
            return [], self.failure
        results = []
        try:
            with self.started(rows[0], f"rows {rows[0]} to {rows[-1]}"):
                results.extend(self.score(rows))
        except Exception as error:
            return results, _portable(error)
        return results, None

    @contextlib.contextmanager
    def started(self, what, name):
        """Counts starts that have no end: Ray tries again for ever, and a process may die of its work."""
        import ray

        times = ray.get(self.starts.begin.remote(what))
        if times > TRIES:
            raise RuntimeError(
                f"{name}: {TRIES} processes have ended without a word while they worked on this (out of memory, or a crash: "
                "Ray's logs, in /tmp/ray/session_latest/logs on the nodes, say more)"
            )
        yield
        self.starts.end.remote(what)


def packed(results, failure=None):
    """Pickles of an answer: one, or several of as many rows each where it is too large to come with Ray's own answer.

    Ray counts the pieces of a batch that is done again, and hands over those that had not come the first time: how they
    are cut must be the same.
    """
    piece = zlib.compress(pickle.dumps((results, failure)), 1)
    if len(piece) <= LARGEST or len(results) < 2:
        yield piece
        return
    half = (len(results) + 1) // 2
    yield from packed(results[:half])
    yield from packed(results[half:], failure)


def unpacked(piece):
    return pickle.loads(zlib.decompress(piece))


class Starts:
    """An actor beside the others: what was started how often, until it ends."""

    def __init__(self):
        self.times = {}

    def begin(self, what):
        self.times[what] = self.times.get(what, 0) + 1
        return self.times[what]

    def end(self, what):
        self.times.pop(what, None)


def _actor_id():
    import ray

    return ray.get_runtime_context().get_actor_id()


def _portable(error):
    """(error, traceback): the error itself if it travels, else what it says."""
    report = "".join(traceback.format_exception(error))
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}")
    return error.with_traceback(None), report


def _said(error):
    """An error in one line: what Ray says first, and what that comes from, which it says last."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    lines = [line.strip() for line in plain.splitlines() if line.strip()] or [type(error).__name__]
    return lines[0] if len(lines) == 1 else f"{lines[0]} ... {lines[-1]}"


@contextlib.contextmanager
def cluster(address=None):
    """Connect to a Ray cluster, or start one; leave it, or stop it.

    Args:
        address: as in `scored`.

    Yields:
        the module `ray`.

    Raises:
        ValueError: Ray is missing, or nobody answers at the address.
    """
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise ValueError(f"scoring with Ray needs Ray Data: pip install 'yojo[ray]' ({_said(error)})") from error
    _hush()
    if ray.is_initialized():
        yield ray
        return
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    _check(address)
    with _kept_signal(signal.SIGTERM):  # Ray takes it, and leaves it taken
        try:
            own = {"include_dashboard": False, "object_store_memory": STORE} if address == "local" else {}
            wait = (
                {} if own else {"RAY_gcs_server_port_wait_time_s": "1"}
            )  # tries of 40 seconds, as it is; else 20 of them
            with _environment(RAY_USAGE_STATS_ENABLED="0", RAY_BACKEND_LOG_LEVEL="fatal", **wait):
                ray.init(address=address, log_to_driver=False, logging_level="ERROR", **own)
        except (ConnectionError, RuntimeError, ValueError, TimeoutError) as error:
            ray.shutdown()
            raise ValueError(f"Ray, {address}: {_said(error)}") from error
        try:
            yield ray
        finally:
            ray.shutdown()


@contextlib.contextmanager
def _kept_signal(number):
    """What a signal does, afterwards, is what it did before."""
    before = signal.getsignal(number)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(number, before)


def _check(address):
    """Refuse an address at which nobody listens, before Ray waits for it."""
    if address in ("local", "auto"):
        return
    if address.startswith("ray://"):
        raise ValueError(
            f"Ray, {address}: Ray Data does not run through a Ray client: start the scoring on a node of the cluster "
            "(or with `ray job submit`) and give auto, or host:port, where port is that of `ray start --head --port`, 6379 mostly"
        )
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit():
        raise ValueError(f"Ray, {address}: expected auto or host:port")
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=WAIT).close()
    except OSError as error:
        raise ValueError(
            f"Ray, {address}: nobody answers there ({error}): is this the port of `ray start --head --port`, 6379 mostly?"
        ) from error


def _hush():
    """Ray Data says on the console what is wrong, and no more; its log file has the rest."""
    import logging

    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler) and handler.level < logging.WARNING:
            handler.setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # that there are no progress bars


@contextlib.contextmanager
def _environment(**values):
    """Environment variables for a while, where they are not set."""
    new = {name: value for name, value in values.items() if name not in os.environ}
    os.environ.update(new)
    try:
        yield
    finally:
        for name in new:
            os.environ.pop(name, None)


def room(ray, num_gpus=None, num_cpus=None):
    """How many actors the nodes of a cluster have room for.

    Args:
        ray: the module, connected.
        num_gpus, num_cpus: of an actor; None: as in `scored`.

    Returns:
        (actors, GPUs of each, CPUs of each or None)

    Raises:
        ValueError: no node has room for one.
    """
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if num_gpus is None:
        num_gpus = int(any(node.get("GPU", 0) >= 1 for node in nodes))
    if num_cpus is None and not num_gpus:
        num_cpus = 1
    need = {"GPU": num_gpus, "CPU": num_cpus or 0}
    fit = sum(
        int(min((node.get(kind, 0) // count for kind, count in need.items() if count), default=1)) for node in nodes
    )
    if not fit:
        wanted = " and ".join(f"{count:g} {kind}s" for kind, count in need.items() if count)
        had = "; ".join(", ".join(f"{node.get(kind, 0):g} {kind}s" for kind in need) for node in nodes)
        raise ValueError(f"an actor needs {wanted}, and no node of the Ray cluster has as many (its nodes: {had})")
    return fit, num_gpus, num_cpus

"""Work in other processes, ahead of whoever needs it: examples decoded and tokenised while the model runs."""

import collections
import io
import itertools
import multiprocessing
import os
import pickle
import signal
import threading
import time
import traceback

import torch

CHUNK = 4  # items a worker takes at a time: neighbours, which often share an image
WATCH = 1.0  # seconds after which a worker looks whether its parent is there
NICE = 10  # workers take the cores that the model leaves: it is what has to be kept busy
AHEAD = 2  # chunks that each worker is ahead
ITEMS = 256  # that may wait besides, and bytes of them
ROOM = 1 << 27
# Tensors from this size are handed over in shared memory, each with a file of its own; smaller ones through the pipe.
SHARED = 1 << 20
_SHARED_MEMORY = "/dev/shm"


def fed(function, items, workers=0):
    """Yield `function(item)` for every item, in the order of the items.

    Args:
        function: what has to be done; it must pickle where processes are not forked. In a worker
            torch has one thread.
        items: iterable; with workers it is read in a thread of its own, a bounded number of items ahead.
        workers: processes; 0: it is done here, when it is asked for.

    Yields:
        What the function returns. Tensors in it are its own: they may lie in shared memory.

    Raises:
        ValueError: a negative number of workers.
        ChildProcessError: a worker has died (killed for memory, say).
        What the function raises, as it would here, with the worker's traceback as its cause.
    """
    if workers < 0:
        raise ValueError(f"workers must be 0 or more, got {workers}")
    if not workers:
        yield from map(function, items)
        return
    chunks = _Chunks(items)
    loader = torch.utils.data.DataLoader(
        _Calls(function, workers),
        batch_size=None,
        sampler=chunks,
        num_workers=workers,
        prefetch_factor=AHEAD,
        worker_init_fn=_begin_worker,
        generator=torch.Generator(),  # or a seed would be drawn from everybody's
    )
    ahead = _Ahead(iter(loader))
    try:
        if chunks.error is not None and not isinstance(chunks.error, Exception):
            raise chunks.error  # an interrupt waits for nothing
        for chunk in ahead:
            for result, error, trace in _unpacked(*chunk):
                if error is not None:
                    raise error from WorkerTraceback(trace)
                yield result
        if chunks.error is not None:
            raise chunks.error
    except RuntimeError as error:  # torch raises it in the main thread, wherever that is
        raise explained(error) from error.__cause__
    finally:
        ahead.close()
        del ahead, loader  # which ends the workers


class _Ahead:
    """Chunks taken from the workers by a thread: whoever computes meanwhile keeps no worker waiting.

    Attributes:
        room: bytes that may wait, and as many items as `ITEMS`.
    """

    def __init__(self, chunks):
        self.chunks, self.room = chunks, ROOM
        self.waiting, self.held, self.ended = collections.deque(), 0, False
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._fill, name="yojo chunks", daemon=True)
        self.thread.start()

    def _fill(self):
        chunk = None
        while chunk is not _END:
            try:
                chunk = next(self.chunks, _END)
            except BaseException as error:  # raised by whoever waits for a chunk
                chunk = error
            size = _size(chunk)
            with self.changed:
                while self.waiting and not self.ended and self._is_full(size):
                    self.changed.wait()
                if self.ended:
                    return
                self.waiting.append((chunk, size))
                self.held += size
                self.changed.notify_all()
            if isinstance(chunk, BaseException):
                return

    def _is_full(self, size):
        return self.held + size > self.room or len(self.waiting) >= ITEMS // CHUNK

    def __iter__(self):
        while True:
            with self.changed:
                while not self.waiting:
                    self.changed.wait()
                chunk, size = self.waiting.popleft()
                self.held -= size
                self.changed.notify_all()
            if chunk is _END:
                return
            if isinstance(chunk, BaseException):
                raise chunk
            yield chunk

    def close(self):
        with self.changed:
            self.ended = True
            self.changed.notify_all()
        self.thread.join()
        self.waiting.clear()
        # Ends the workers even where somebody keeps an exception, whose traceback keeps the loader.
        getattr(self.chunks, "_shutdown_workers", lambda: None)()
        self.chunks = None


_END = object()


def _size(chunk):
    return len(chunk[0]) + sum(tensor.nbytes for tensor in chunk[1]) if isinstance(chunk, (tuple, list)) else 0


def explained(error):
    """The exception to raise for one that was raised here: torch says in its own words that a worker has died."""
    if not (isinstance(error, RuntimeError) and str(error).startswith("DataLoader worker")):
        return error
    return ChildProcessError(
        f"a worker has died ({error}): perhaps memory is short, then fewer workers need less of it"
    )


class WorkerTraceback(Exception):
    """Where in a worker an exception was raised: the cause of the one that is raised here."""

    def __str__(self):
        return f"\n{self.args[0]}"


class _Chunks:
    """A sampler that gives the items themselves.

    Attributes:
        error: what the items have raised, or None. The loader takes the first ones while it is made: raised there, it would be
            in nobody's hands to end the workers that run already.
    """

    def __init__(self, items):
        self.items, self.error = items, None

    def __iter__(self):
        items = self._safe()
        while chunk := list(itertools.islice(items, CHUNK)):
            yield chunk

    def _safe(self):
        try:
            items = iter(self.items)
        except BaseException as error:
            self.error = error
            return
        while True:
            try:
                item = next(items)
            except StopIteration:
                return
            except BaseException as error:
                self.error = error
                return
            yield item


class _Calls(torch.utils.data.Dataset):
    """What runs in a worker: a chunk of items -> its results, packed to be handed over."""

    def __init__(self, function, workers):
        self.function, self.workers = function, workers

    def __getitem__(self, chunk):
        results = []
        for item in chunk:
            try:
                results.append((self.function(item), None, None))
            except Exception as error:
                results.append((None, _that_pickles(error), traceback.format_exc()))
                break  # nobody will read what is behind it
        return _packed(results, self.workers)


def _begin_worker(number):
    # Tokenizers were used before the fork, and would warn that they go on with one thread.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.nice(NICE)
    # Ctrl-C reaches the whole group of processes. A worker that ended by it would be missed for seconds: who reads ends it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None and multiprocessing.get_start_method() == "fork":  # else its parent is a server of forks
        threading.Thread(target=_end_with_parent, args=(parent.pid,), daemon=True).start()


def _end_with_parent(pid):
    """A worker whose parent was killed would wait for ever to hand over what it has made."""
    while os.getppid() == pid:
        time.sleep(WATCH)
    os._exit(1)


def _that_pickles(error):
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:
        pass
    kinds = (TypeError, ValueError, MemoryError, OSError)
    return next((one for one in kinds if isinstance(error, one)), RuntimeError)(f"{type(error).__name__}: {error}")


# ---- results handed over ----


class _Pickler(pickle.Pickler):
    """Large tensors are left out, to go through shared memory; small ones are plain bytes."""

    def __init__(self, file, fits):
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.fits, self.tensors = fits, []

    def persistent_id(self, value):
        if not isinstance(value, torch.Tensor) or value.nbytes < SHARED or not self.fits(value.nbytes):
            return None
        # Here and not when it is sent, in another thread: what fits now may not fit then.
        self.tensors.append(value.detach().contiguous().clone().share_memory_())
        return len(self.tensors) - 1

    def reducer_override(self, value):
        if type(value) is torch.Tensor and value.device.type == "cpu" and value.layout == torch.strided:
            try:
                return _tensor, (value.detach().contiguous().numpy(),)
            except TypeError:  # bfloat16, which numpy lacks
                pass
        return NotImplemented


class _Unpickler(pickle.Unpickler):
    def __init__(self, file, tensors):
        super().__init__(file)
        self.tensors = tensors

    def persistent_load(self, place):
        return self.tensors[place]


def _tensor(array):
    return torch.from_numpy(array.copy() if not array.flags.writeable else array)


def _packed(results, workers):
    file = io.BytesIO()
    pickler = _Pickler(file, lambda size: _fits(size, workers))
    pickler.dump(results)
    return file.getvalue(), pickler.tensors


def _unpacked(payload, tensors):
    return _Unpickler(io.BytesIO(payload), tensors).load()


def _fits(size, workers):
    """Whether so many bytes fit into shared memory, should all workers want as much; beyond it they are killed."""
    try:
        room = os.statvfs(_SHARED_MEMORY)
    except OSError:  # elsewhere it is not bounded apart
        return True
    return room.f_bavail * room.f_frsize > 2 * workers * size

"""Several devices of one machine: a process on each, over shards of the same job."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time

from yojo.judges.loading import check_device
from yojo.scoring.job import folder_of
from yojo.scoring.progress import Progress

GRACE = 15.0  # seconds that processes have to end by themselves


def devices_of(names):
    """List of device names; "all" are the CUDA devices of this machine.

    Raises:
        ValueError: there is none, or no such device.
    """
    import torch

    if names == "all":
        count = torch.cuda.device_count()
        if not count:
            raise ValueError("devices='all': there is no CUDA device here; without --devices the CPU scores")
        return [f"cuda:{n}" for n in range(count)]
    names = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    for name in names:
        check_device(name)
    if not names:
        raise ValueError("devices is empty: such as cuda:0,cuda:1, or all")
    return names


def score_on_devices(score_file, load, data, out, names, shard=(0, 1), progress=False, options=None, setup=None):
    """Score every row of a shard, a part of it on each device.

    Args:
        score_file: `yojo.score_file`, which every process calls.
        load: `yojo.scoring.scorer.Load`.
        data, out, progress: as for `score_file`.
        names: "all", or list of devices.
        shard: (number, count).
        options: dict, further arguments of `score_file`.
        setup: function that every process calls first, or None.

    Returns:
        list of `yojo.scoring.run.Summary`, one from each process.

    Raises:
        ChildProcessError: a process has died, or said what is wrong. What the others have written stays.
    """
    names = devices_of(names)
    folder, _ = folder_of(out)
    context = multiprocessing.get_context("spawn")
    bar = Progress(0, progress)
    processes, options, interrupted = [], dict(options or {}), True
    try:
        for n, name in enumerate(names):
            part = (shard[0] + n * shard[1], len(names) * shard[1])
            here, there = context.Pipe()
            rest = (len(names), setup, {**options, "shard": part})
            process = context.Process(target=_child, args=(there, score_file, load, data, str(folder), name, *rest))
            process.start()
            there.close()
            processes.append((process, here, name))
            if n == 0 and not options.get("resume", True):
                _wait_for_start(here, process)  # it removes what was there
                options["resume"] = True
        found = _listen(processes, bar)
        interrupted = False
        return found
    finally:
        bar.close()
        _end(processes, interrupted)


def _listen(processes, bar):
    """Add up what the processes report until all have ended."""
    open_ones = {here: (process, name) for process, here, name in processes}
    errors, found, totals = [], [], {}  # what is wrong; rows that each process has to score
    while open_ones:
        for here in multiprocessing.connection.wait(list(open_ones), timeout=1.0):
            process, name = open_ones[here]
            try:
                kind, value = here.recv()
            except (EOFError, ConnectionError):
                process.join(GRACE)
                errors.append(f"{name}: the process was ended ({_how(process.exitcode)})")
                del open_ones[here]
                continue
            if kind == "total":
                totals[name] = value
                bar.set_total(sum(totals.values()))
            elif kind == "done":
                bar.add(*value)
            else:
                del open_ones[here]
                if kind == "error":
                    errors.append(f"{name}: {value}")
                else:
                    found.append(value)
    if errors:
        raise ChildProcessError(
            f"{'; '.join(dict.fromkeys(errors))}: what was scored is kept, and the same command goes on with it"
        )
    return found


def _wait_for_start(here, process):
    """Wait until the first process has begun its job."""
    while process.is_alive() and not here.poll(0.2):
        pass


def _how(code):
    if code is None:
        return "it does not answer"
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"


def _end(processes, interrupted):
    """No process is left behind; one that is interrupted has time to put what it wrote in order."""
    for process, _, _ in processes:
        if interrupted and process.is_alive():
            os.kill(process.pid, signal.SIGINT)
    deadline = time.monotonic() + GRACE
    for process, _, _ in processes:
        process.join(max(0.1, deadline - time.monotonic()))
    for process, here, _ in processes:
        here.close()  # which ends it
        process.join(1.0)
        if process.is_alive():
            process.kill()
            process.join()


class _Reporter(Progress):
    """Progress that is told to the parent, twice a second."""

    def __init__(self, there, total, label):
        super().__init__(total, label=label)
        self.there, self.kept, self.sent = there, [0, 0, 0, 0.0], time.monotonic()
        self.counts = label == "scoring"
        self.told = None
        if self.counts:
            self._tell()

    def add(self, rows, bad=0, tokens=0, filled=0.0):
        super().add(rows, bad, tokens, filled)
        self.kept = [a + b for a, b in zip(self.kept, (rows, bad, tokens, filled), strict=True)]
        if self.counts and time.monotonic() - self.sent > 0.5:
            self._tell()

    def close(self):
        if self.counts:
            self._tell()

    def _tell(self):
        if self.told != self.total:
            self.there.send(("total", self.total))
            self.told = self.total
        self.there.send(("done", self.kept))
        self.kept, self.sent = [0, 0, 0, 0.0], time.monotonic()


def _child(there, score_file, load, data, folder, device, count, setup, options):
    """A process: scores its shard and reports."""
    threading.Thread(target=_end_with_parent, args=(there,), daemon=True).start()
    if setup is not None:
        setup()
    import torch

    if device == "cpu":
        torch.set_num_threads(max(1, torch.get_num_threads() // count))
    try:
        found = score_file(load, data, folder, device=device, progress=lambda *how: _Reporter(there, *how), **options)
    except KeyboardInterrupt:
        there.send(("error", "it was interrupted"))
    except (TypeError, ValueError, OSError, ImportError, RuntimeError) as error:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # it ends by itself; an interrupt would be a traceback
        there.send(("error", str(error)))
    else:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        there.send(("end", found))


def _end_with_parent(there):
    """Without its parent a process would go on, and lock the job's folder."""
    try:
        there.recv()
    except (EOFError, OSError):
        os._exit(1)

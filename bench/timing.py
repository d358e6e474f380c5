"""How a call is timed, on a GPU with events and a cold cache, on a CPU with a clock; and the memory that it takes."""

import contextlib
import functools
import gc
import statistics
import time
import traceback

import pytest
import torch

from bench.memory import Watch

FLUSH_BYTES = 256 * 2**20  # more than the level-2 cache of any GPU: what was there before a round is gone
HEAD_START = 1_000_000  # clock cycles: half a millisecond at 2 GHz
SECONDS = 0.5  # rounds are repeated for about this long
FEWEST, MOST = 5, 100


def measure(call, device, rounds=None):
    """Seconds of each round of `call()`, after warm-up.

    Args:
        call: function without arguments.
        device: torch device. On CUDA, time between two events, the level-2 cache overwritten before each round and
            the device kept busy while the call is enqueued (calls that keep the host busy for longer than
            `HEAD_START` are measured with what they make the device wait); elsewhere, wall-clock time.
        rounds: how many; by default as many as fit into half a second, from 5 to 100.
    """
    once = call if device.type != "cuda" else _cold(call, device)
    once()
    estimate = max(once(), 1e-6) if device.type == "cuda" else _timed(call)
    rounds = rounds or int(min(MOST, max(FEWEST, SECONDS / estimate)))
    return [once() if device.type == "cuda" else _timed(call) for _ in range(rounds)]


def _timed(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def _cold(call, device):
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def once():
        flush.zero_()
        torch.cuda._sleep(HEAD_START)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize(device)
        return start.elapsed_time(end) / 1000

    return once


def clocked(benchmark, call, device, seconds=2.0, fewest=3, most=30):
    """Seconds of each round of a call that lasts milliseconds or more, through pytest-benchmark; None where it is off.

    The clock is the host's, started with the device idle and stopped when it is idle again: what a caller waits for,
    launching included. On CUDA the level-2 cache is overwritten before each round.

    Args:
        benchmark: pytest-benchmark's fixture.
        call: function without arguments, warmed up by whoever checked what it gives.
        device: torch device.
        seconds: rounds are repeated for about this long.
        fewest, most: rounds.
    """
    is_cuda = device.type == "cuda"
    flush = torch.empty(FLUSH_BYTES if is_cuda else 0, dtype=torch.int8, device=device)
    wait = functools.partial(torch.cuda.synchronize, device) if is_cuda else lambda: None

    def prepare():
        flush.zero_()
        wait()

    def timed():
        call()
        wait()

    prepare()
    estimate = max(_timed(timed), 1e-6)
    rounds = int(min(most, max(fewest, seconds / estimate)))
    benchmark.pedantic(timed, setup=prepare, rounds=rounds)
    return None if benchmark.stats is None else list(benchmark.stats.stats.data)


@contextlib.contextmanager
def skips_what_does_not_fit(device):
    """Where the device's memory runs out, the test is skipped with that reason; what it took is given back."""
    give_back(device)  # what an earlier error still held
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        traceback.clear_frames(error.__traceback__)  # they hold on to the tensors of the call
        reason = f"does not fit into the memory of {device}: {str(error).splitlines()[0]}"
    else:
        return
    finally:
        give_back(device)
    pytest.skip(reason)


def is_out_of_memory(error):
    """Whether an error says so, in whichever words: torch's, those of a library below it, of code it compiled."""
    words = ("out of memory", "ALLOC_FAILED", "DefaultCPUAllocator")
    return isinstance(error, torch.OutOfMemoryError) or any(word in str(error) for word in words)


def give_back(device):
    """Free what nobody refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def peak_bytes(call, device):
    """Most memory of tensors during a call beyond what there was before it.

    On CUDA the allocator's count; elsewhere that of the tensors made by torch's operations, one by one (compiled code
    and what an operation needs for itself are not seen).
    """
    if device.type != "cuda":
        with Watch() as watch:
            call()
        return watch.peak
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def figures(seconds, flops=None):
    """The fields of a result line that follow from the seconds of each round."""
    median = statistics.median(seconds)
    return {
        "seconds": median,
        "seconds_all": list(seconds),
        "flops": flops,
        "tflops": None if flops is None else flops / median / 1e12,
    }

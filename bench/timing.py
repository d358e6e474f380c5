"""How a call is timed, on a GPU with events and a cold cache, on a CPU with a clock; and the memory that it takes."""

import statistics
import time

import torch

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


def peak_bytes(call, device):
    """Most memory allocated during a call beyond what was allocated before; None on a CPU."""
    if device.type != "cuda":
        return None
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

"""A call that is waited for no longer than a deadline."""

import concurrent.futures
import threading
import time


class Late(Exception):
    """The deadline passed before the call came back."""


def in_thread(function, *args):
    """Begin `function(*args)` in a thread of its own, which never holds up a program's end.

    A thread begins with the first CUDA device, whatever the one that starts it has chosen: it is told.

    Returns:
        `concurrent.futures.Future` of what the function returns.
    """
    future, device = concurrent.futures.Future(), _cuda_device()
    future.set_running_or_notify_cancel()  # a call that has begun cannot be cancelled, whoever stops to wait for it

    def run():
        try:
            if device is not None:
                import torch

                torch.cuda.set_device(device)
            found = function(*args)
        except BaseException as error:  # raised by whoever waits
            future.set_exception(error)
        else:
            future.set_result(found)

    threading.Thread(target=run, name="yojo reward", daemon=True).start()
    return future


def waited(function, *args, until):
    """What `function(*args)` returns, waited for until a time of `time.monotonic()`; None: for ever.

    Raises:
        Late: it has not come back by then. The call itself cannot be ended: its thread is left behind.
    """
    future = in_thread(function, *args)
    left = None if until is None else max(0.0, until - time.monotonic())
    done, _ = concurrent.futures.wait([future], timeout=left)
    if not done:
        raise Late
    return future.result()


def _cuda_device():
    """The device that CUDA calls of this thread go to; None where CUDA was not used yet."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_initialized() else None

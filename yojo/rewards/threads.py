"""A call that is waited for no longer than a deadline."""

import concurrent.futures
import threading
import time


class Late(Exception):
    """The deadline passed before the call came back."""


def in_thread(function, *args, device=None):
    """Begin `function(*args)` in a thread of its own, which never holds up a program's end.

    Args:
        function, args: what is called.
        device: the CUDA device that the thread is to have as its own: a thread begins with the first one, whatever the one that
            starts it has chosen. None: as it is.

    Returns:
        `concurrent.futures.Future` of what the function returns.
    """
    future = concurrent.futures.Future()
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


def waited(function, *args, until, device=None):
    """What `function(*args)` returns, waited for until a time of `time.monotonic()`; None: for ever.

    Raises:
        Late: it has not come back by then. The call itself cannot be ended: its thread is left behind.
    """
    future = in_thread(function, *args, device=device)
    left = None if until is None else max(0.0, until - time.monotonic())
    done, _ = concurrent.futures.wait([future], timeout=left)
    if not done:
        raise Late
    return future.result()

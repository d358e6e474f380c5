"""Scorers for actors: plain Python, so that they start at once; what they see goes to files where a test asks for it."""

import functools
import os
import time
from pathlib import Path

from scoring_cases import until

from yojo.scoring.scorer import Load


def quick(fault=None, folder=None, pause=0.0, padding=0, gates=()):
    """What makes a scorer, as yojo's own: pickles, and loads nothing.

    Args:
        fault: what it does wrong, or None.
        folder: each process writes its rows into a file there; None: it does not.
        pause: seconds that a row takes.
        padding: bytes beside each result.
        gates: (rows, processes): with so many rows done, one waits until so many processes have begun, dead ones included.
            However slowly a process starts, the others have not done all there is by then.
    """
    return functools.partial(_make, fault, folder, pause, padding, gates)


def _make(fault, folder, pause, padding, gates):
    if fault == "make":
        raise ValueError("no model here")
    if fault == "make-dies":
        os._exit(1)
    return functools.partial(_score, fault, folder, pause, padding, gates)


def _score(fault, folder, pause, padding, gates, rows):
    if folder is not None:
        with open(Path(folder) / f"{os.getpid()}", "a+") as file:
            file.seek(0)
            done = len(file.readlines())
            file.writelines(f"{row}\n" for row in rows)
        for least, processes in gates:
            if done >= least:
                until(lambda processes=processes: len(os.listdir(folder)) >= processes)
    for row in rows:
        time.sleep(pause)
        if fault == "raise" and row == 70:
            raise KeyError("row 70 is odd")
        if fault == "die" and row == 70:
            os._exit(1)
        yield {
            "row": row,
            "pid": os.getpid(),
            "scores": [row / 7, 0.1],
            "bad": os.environ.get("CUDA_VISIBLE_DEVICES") or None,
            "padding": os.urandom(padding),
        }


class Slow(Load):
    """Loads a judge that takes its time, and says in a folder which process it is in."""

    def __call__(self, device=None):
        from scoring_cases import Constants

        (Path(self.base_model) / f"{os.getpid()}").touch()
        return Constants(0.01)

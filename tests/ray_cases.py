"""Scorers for actors: plain Python, so that they start at once; what they see goes to files where a test asks for it."""

import functools
import os
import time
from pathlib import Path

from yojo.scoring.scorer import Load


def quick(fault=None, folder=None, pause=0.0, padding=0):
    """What makes a scorer, as yojo's own: pickles, and loads nothing."""
    return functools.partial(_make, fault, folder, pause, padding)


def _make(fault, folder, pause, padding):
    if fault == "make":
        raise ValueError("no model here")
    if fault == "make-dies":
        os._exit(1)
    return functools.partial(_score, fault, folder, pause, padding)


def _score(fault, folder, pause, padding, rows):
    if folder is not None:
        with open(Path(folder) / f"{os.getpid()}", "a") as file:
            file.writelines(f"{row}\n" for row in rows)
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

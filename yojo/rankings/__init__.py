"""Pairwise votes -> rankings of the candidates of each question, and how sure they are."""

import importlib

# Public name -> the module it lives in; loaded on first use, since numpy takes its time.
_HOMES = {
    "METHODS": "yojo.rankings.scores",
    "Majority": "yojo.rankings.quality",
    "Ranking": "yojo.rankings.ranking",
    "RankReport": "yojo.rankings.report",
    "Vote": "yojo.rankings.votes",
    "aggregate": "yojo.rankings.ranking",
    "rank_file": "yojo.rankings.file",
    "read_votes": "yojo.rankings.reading",
}

__all__ = list(_HOMES)


def __getattr__(name):
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'yojo.rankings' has no attribute {name!r}")


def __dir__():
    return sorted({*globals(), *_HOMES})

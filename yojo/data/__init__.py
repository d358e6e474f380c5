"""Files and records of preferences -> `Example`s."""

from yojo.data.mixtures import Mixture, draw_responses, take_responses
from yojo.data.readers import ColumnError, DataError, MediaError
from yojo.data.records import Records, load

__all__ = ["ColumnError", "DataError", "MediaError", "Mixture", "Records", "draw_responses", "load", "take_responses"]

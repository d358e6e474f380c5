"""Files and records of preferences -> `Example`s."""

from yojo.data.readers import ColumnError, DataError, MediaError
from yojo.data.records import Mixture, Records, draw_responses, load, take_responses

__all__ = ["ColumnError", "DataError", "MediaError", "Mixture", "Records", "draw_responses", "load", "take_responses"]

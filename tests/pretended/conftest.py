"""The pretended device is registered with torch for the whole process, so these tests have one of their own."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))  # the tiny models, and what the tests of families share


@pytest.fixture(autouse=True)
def no_chip(monkeypatch):
    """The pretended device has no compute capability: operations run in plain PyTorch, which is what is watched."""
    from yojo_kernels import tuning

    monkeypatch.setattr(tuning, "capability", lambda device: (0, 0))

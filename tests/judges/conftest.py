"""A fixture of tests whose judges send requests."""

import pytest

from yojo.judges import client


@pytest.fixture()
def waits(monkeypatch):
    """Seconds that were waited in front of retries; nobody waits."""
    found = []
    monkeypatch.setattr(client, "pause", lambda stop, seconds: found.append(seconds))
    return found

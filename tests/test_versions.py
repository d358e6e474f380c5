"""What is said of the installed versions."""

import importlib.metadata
import re
import types
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version

from bench import attention_peers
from yojo import versions
from yojo_kernels import causal

ROOT = Path(__file__).parents[1]


def test_the_versions_of_the_constraints_lack_nothing():
    constraints = dict(
        re.findall(r"^(torch|transformers)==(.*)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    )
    installed = {name: importlib.metadata.version(name).partition("+")[0] for name in constraints}
    if any(Version(installed[name]) < Version(version) for name, version in constraints.items()):
        pytest.skip(f"older versions are installed: {installed}")
    assert versions.shortcomings() == []


def test_what_older_versions_lack(monkeypatch):
    model = transformers.Qwen3VLModel
    monkeypatch.setattr(model, "forward", lambda self, input_ids=None, pixel_values=None: None)
    monkeypatch.setattr(causal, "_varlen_parameters", lambda: {"query", "key", "value"})
    waits, *_, varlen = versions.shortcomings()
    assert waits.startswith(f"transformers {transformers.__version__} places image features itself: passes with images")
    assert varlen.startswith("torch has no varlen_attn with a scale")
    assert not versions.places_features()


def test_a_peer_that_nothing_installed_computes_is_skipped_by_name(monkeypatch):
    case = types.SimpleNamespace(device=torch.device("cuda"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(causal, "flash_function", lambda capability: None)
    monkeypatch.setattr(causal, "_varlen_parameters", lambda: {"query", "key", "value"})
    with pytest.raises(pytest.skip.Exception, match=r"varlen_attn that takes a scale \(torch 2\.11"):
        attention_peers.gathered(case)


def test_the_ranges_begin_at_versions_that_are_stated():
    """pyproject.toml, `yojo.versions` and the README name the same oldest versions."""
    text = (ROOT / "pyproject.toml").read_text()
    readme = (ROOT / "README.md").read_text()
    for name, oldest in versions.OLDEST.items():
        (line,) = re.findall(rf'^    "({name}>=[^"]*)"', text, re.MULTILINE)
        assert str(Requirement(line).specifier) == f">={oldest}"
        assert re.search(rf"{name} {re.escape(oldest)}\b", readme, re.IGNORECASE), name

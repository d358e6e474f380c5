"""What is said of the installed versions."""

import importlib.metadata
import pkgutil
import re
import types
from pathlib import Path

import pytest
import torch
import transformers
from packaging.requirements import Requirement
from packaging.version import Version

from bench import attention_peers
from yojo.patching import versions
from yojo_kernels import causal

ROOT = Path(__file__).parents[2]

# Names of torch that begin with an underscore or stand in no documentation, where they are not written out in full.
PRIVATE = {
    "torch.Generator.clone_state",
    "torch.Generator.graphsafe_set_state",
    "torch.autograd.forward_ad._current_level",
}


def code():
    return "\n".join(path.read_text() for name in ("yojo", "yojo_kernels") for path in (ROOT / name).rglob("*.py"))


def private_names():
    """Those in the code, and those above."""
    return sorted(PRIVATE.union(re.findall(r"\btorch(?:\.\w+)*\._\w+(?:\.\w+)*", code())))


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
    """pyproject.toml, `yojo.patching.versions`, README.md and docs/versions.md name the same oldest versions."""
    text = (ROOT / "pyproject.toml").read_text()
    page = (ROOT / "docs" / "versions.md").read_text()
    readme = (ROOT / "README.md").read_text()
    for name, oldest in versions.OLDEST.items():
        (line,) = re.findall(rf'^    "({name}>=[^"]*)"', text, re.MULTILINE)
        assert str(Requirement(line).specifier) == f">={oldest}"
        for said in (page, readme):
            assert re.search(rf"{name} {re.escape(oldest)}\b", said, re.IGNORECASE), name


@pytest.mark.parametrize("name", private_names())
def test_torch_has_the_private_names_that_are_used(name):
    """Some are reached on GPUs alone, and some after a failed capture alone: another torch fails here, by name."""
    if name.startswith("torch._C._cuda_") and not torch.backends.cuda.is_built():
        pytest.skip("torch is built without CUDA")
    pkgutil.resolve_name(name)


def test_private_names_are_found_in_the_code():
    names = {"_cuda_endAllocateToPool", "_cuda_getCurrentRawStream", "_dispatch_keys", "_has_torch_function"}
    assert {f"torch._C.{name}" for name in names}.issubset(private_names())
    text = code()
    for name in PRIVATE:
        assert f".{name.rpartition('.')[2]}" in text, f"{name} is not used any more"

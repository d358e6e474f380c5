"""Kernels on the CPU under Triton's interpreter, which has to be asked for before Triton is imported."""

import importlib.metadata
import os
import sys
from pathlib import Path

import pytest
from packaging.version import Version

if "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"
elif os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("triton is imported already: run these tests alone, as `make test` does")


def refused(triton, numpy):
    """Why these versions cannot interpret, or None: the interpreter asked for int() of arrays, which numpy has given up."""
    if Version(triton) < Version("3.7") and Version(numpy) >= Version("2.4"):
        return f"the interpreter of Triton {triton} does not run with numpy {numpy}: numpy below 2.4, or Triton 3.7"
    return None


def pytest_collection_modifyitems(items):
    reason = refused(*map(importlib.metadata.version, ("triton", "numpy")))
    for item in items:
        if reason and Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.skip(reason=reason))

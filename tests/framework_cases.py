"""Other trainers' own code, each in a process of its own: `make frameworks` has put what it needs into a folder."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent


def folder_of(name, package=None):
    """Where a trainer and what it needs lie; a test without it is skipped."""
    folder = Path(os.environ.get("YOJO_FRAMEWORKS", Path(sys.prefix) / "frameworks")) / name
    if not (folder / (package or name)).is_dir():
        pytest.skip(
            f"{folder} has no {package or name}: `make frameworks` installs it, where this Python has a wheel of it"
        )
    return folder


def run(name, *arguments, package=None):
    """Run the tests of tests/frameworks/inside_NAME.py with the trainer's folder in front of what is installed, and all must pass."""
    folder = folder_of(name, package)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(TESTS.parent), str(TESTS), str(folder)]),
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "PYTEST_ADDOPTS": "",
    }
    environment = {key: value for key, value in environment.items() if not key.startswith("PYTEST_XDIST")}
    command = [
        sys.executable,
        "-m",
        "pytest",
        str(TESTS / "frameworks" / f"inside_{name}.py"),
        "-p",
        "no:cacheprovider",
        "-p",
        "no:warnings",
    ]
    found = subprocess.run([*command, "-x", *arguments], capture_output=True, text=True, env=environment, timeout=900)
    assert found.returncode == 0, f"{found.stdout[-6000:]}\n{found.stderr[-2000:]}"
    assert " passed" in found.stdout or "passed" in found.stdout.splitlines()[-1], found.stdout[-2000:]
    return found.stdout

"""Options of the benchmarks, and result lines in the one schema that all of them share."""

import datetime
import json
import subprocess

import pytest
import torch

FIELDS = [
    "bench",
    "variant",
    "impl",
    "fuse",
    "pass",
    "mode",
    "model",
    "dtype",
    "responses",
    "prompt_tokens",
    "response_tokens",
    "head_dim",
    "heads",
    "kv_heads",
    "seconds",
    "seconds_all",
    "flops",
    "tflops",
    "peak_bytes",
    "gpu",
    "driver",
    "torch",
    "triton",
    "transformers",
    "commit",
    "date",
]


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where to measure: cpu or cuda")
    parser.addoption("--results", default=None, help="folder to append result lines to, one file per device")


@pytest.fixture(scope="session")
def device(request):
    """The torch device to measure on; a clear error where it is missing."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: torch finds no CUDA device here", returncode=2)
    return device


@pytest.fixture(scope="session")
def record(request, device):
    """Function (fields) that appends one result line; what does not apply is null."""
    folder = request.config.getoption("--results")
    place = provenance(device)

    def append(**fields):
        unknown = set(fields) - set(FIELDS)
        assert not unknown, f"not in the schema: {unknown}"
        if folder is None:
            return
        line = dict.fromkeys(FIELDS) | place | fields
        name = (place["gpu"] or "cpu").lower().replace(" ", "-")
        path = request.config.rootpath / folder
        path.mkdir(parents=True, exist_ok=True)
        with open(path / f"{name}.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    return append


def provenance(device):
    """What a figure needs beside it to be one: GPU, driver, versions, commit, date."""
    import transformers

    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    is_cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if is_cuda else None,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if is_cuda else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "transformers": transformers.__version__,
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


def _output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None

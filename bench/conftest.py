"""Options of the benchmarks, and the result lines that they write (`bench/schema.py`)."""

import datetime
import json
import platform
import subprocess

import pytest
import torch

from bench import schema


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", choices=("cpu", "cuda"), help="where to measure")
    parser.addoption("--results", default=None, help="folder to append result lines to, one file per device")


def pytest_configure(config):
    config.result_lines = []


def pytest_terminal_summary(terminalreporter, config):
    """What was measured, in the figures that the benchmarks are about."""
    if not config.result_lines:
        return
    terminalreporter.section("results")
    for line in config.result_lines:
        row = f"{line['prompt_tokens'] or 0:>7}+{line['responses'] or 0:<5} {line['head_dim'] or 0:>4}"
        name = " ".join(str(line[key]) for key in ("variant", "impl", "pass") if line[key])
        rate = f"{line['tflops']:>9.3f} TFLOP/s" if line["tflops"] else ""
        memory = f"{line['peak_bytes'] / 2**20:>9.0f} MiB" if line["peak_bytes"] is not None else ""
        terminalreporter.write_line(
            f"{line['bench']:<10}{row} {name:<40} {line['seconds'] * 1e3:>10.3f} ms {rate} {memory}"
        )


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
        line = dict.fromkeys(schema.FIELDS) | place | fields
        assert schema.problems(line) == []
        request.config.result_lines.append(line)
        if folder is None:
            return
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
        "cpu": None if is_cuda else f"{_cpu()}, {torch.get_num_threads()} threads",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if is_cuda else None,
        "torch": torch.__version__,
        "triton": triton_version,
        "transformers": transformers.__version__,
        "commit": _output("git", "rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(),
    }


def _cpu():
    """The processor's name."""
    try:
        with open("/proc/cpuinfo") as file:
            names = {text.split(":", 1)[1].strip() for text in file if text.startswith("model name")}
    except OSError:
        names = set()
    return ", ".join(sorted(names)) or platform.processor() or platform.machine()


def _output(*command):
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[0].strip() or None
    except (OSError, subprocess.CalledProcessError):
        return None

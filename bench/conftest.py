"""Options of the benchmarks, and the result lines that they write (`bench/schema.py`)."""

import datetime
import platform
import subprocess

import pytest
import torch

from bench import lines, models, points, schema, sections, tiles
from bench.timing import skips_what_does_not_fit


def pytest_addoption(parser):
    group = parser.getgroup("yojo", "YOJO's benchmarks")
    group.addoption("--device", choices=("cpu", "cuda"), help="where to measure; by default a GPU where there is one")
    group.addoption("--results", help="folder to append result lines to, as they come: one file per device")
    group.addoption(
        "--model-shape",
        help="backbones to measure scoring and training on, separated by commas, or 'all'; by default one: "
        + "; ".join(f"{', '.join(shapes)} ({device})" for device, shapes in models.SHAPES.items()),
    )
    group.addoption("--quick", action="store_true", help="few points and few rounds, to see that everything works")
    group.addoption("--full", action="store_true", help="every combination of responses, prompts and lengths")
    group.addoption("--tiles", help="tiles to measure with: the fastest of a file of bench.tune_attention --json")
    group.addoption("--commit", help="of the code, for the result lines; by default what git says")


def pytest_configure(config):
    config.result_lines = []
    if config.getoption("--device") is None:
        config.option.device = "cuda" if torch.cuda.is_available() else "cpu"
    known = models.SHAPES[config.getoption("--device")]
    asked = config.getoption("--model-shape") or next(iter(known))
    config.model_shapes = list(known) if asked == "all" else list(dict.fromkeys(asked.split(",")))
    for name in config.model_shapes:
        if name not in known:
            raise pytest.UsageError(
                f"--model-shape {name}: on {config.getoption('--device')} there are {', '.join(known)}, and all"
            )
    if config.getoption("--tiles"):
        tiles.use(tiles.chosen(config.getoption("--tiles")))
    if config.getoption("--quick") and config.getoption("--full"):
        raise pytest.UsageError("--quick and --full exclude each other")


def pytest_terminal_summary(terminalreporter, config):
    """What was measured, in the figures that the benchmarks are about."""
    if not config.result_lines:
        return
    terminalreporter.section("results")
    for line in config.result_lines:
        row = f"{line['prompt_tokens'] or 0:>7}+{line['responses'] or 0:<5} {line['head_dim'] or 0:>4}"
        about = ("model" if line["bench"] == "host" else "variant", "impl", "pass")
        name = " ".join(str(line[key]) for key in about if line[key])
        rate = f"{line['tflops']:>9.3f} TFLOP/s" if line["tflops"] else ""
        memory = f"{line['peak_bytes'] / 2**20:>9.0f} MiB" if line["peak_bytes"] is not None else ""
        terminalreporter.write_line(
            f"{line['bench']:<10}{row} {name:<40} {line['seconds'] * 1e3:>10.3f} ms {rate} {memory}"
        )
    scores = [line for line in schema.latest(config.result_lines) if line["bench"] == "score"]
    for model in points.models(scores):
        found = points.Scores(points.of_model(scores, model))
        terminalreporter.section(f"{model[0]}: time of N single passes, and how many times faster the others are")
        terminalreporter.write_line(speedups(found))


def speedups(scores):
    """A table of `points.Scores`: a row for every point, a column for every way."""
    rows = []
    for place, found in scores.points.items():
        single = scores.single(place)
        cells = [points.times(scores.speedup(found[one])) if one in found else "" for one in scores.ways]
        rows.append([str(place), points.seconds(single and single["seconds"]), *cells])
    header = ["prompt tokens + N x response tokens", "N single passes", *(scores.names[one] for one in scores.ways)]
    return sections.table(header, rows)


@pytest.fixture(scope="session")
def device(request):
    """The torch device to measure on; a clear error where it is missing."""
    device = torch.device(request.config.getoption("--device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.exit("--device cuda: torch finds no CUDA device here", returncode=2)
    return device


@pytest.fixture(scope="module")
def in_memory(device):
    """Function (name, make) -> what `make()` gives, made once; one at a time in memory, skipped where it does not fit."""
    kept = {}

    def get(name, make):
        if name not in kept:
            kept.clear()
            kept[name] = f"{name} does not fit into the memory of {device}"  # unless it does; not tried again
            try:
                with skips_what_does_not_fit(device):
                    kept[name] = make()
            except models.MissingFamily as error:
                kept[name] = str(error)
        if isinstance(kept[name], str):
            pytest.skip(kept[name])
        return kept[name]

    return get


@pytest.fixture(scope="session")
def record(request, device):
    """Function (fields) that appends one result line; what does not apply is null."""
    folder = request.config.getoption("--results")
    place = provenance(device, request.config.getoption("--commit"))

    def append(**fields):
        line = dict.fromkeys(schema.FIELDS) | place | fields
        assert schema.problems(line) == []
        request.config.result_lines.append(line)
        if folder is None:
            return
        name = (place["gpu"] or "cpu").lower().replace(" ", "-")
        path = request.config.invocation_params.dir / folder
        path.mkdir(parents=True, exist_ok=True)
        lines.append(path / f"{name}.jsonl", line)

    return append


def provenance(device, commit=None):
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
        "commit": commit or _output("git", "describe", "--always", "--dirty", "--exclude=*"),
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

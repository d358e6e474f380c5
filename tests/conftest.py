"""Fixtures shared by the tests: the demonstration's backbone, patched in every mode."""

import copy
import gc
import importlib.util
import os
import random
import signal

import numpy
import pytest
import torch
from PIL import Image

import yojo
from yojo_kernels import segments

# No test needs the hub, whose client tries again for a minute where there is no network. It is not imported yet.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# A shell's jobs in the background ignore it, and so would all that they start; some tests send it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Suites with a process of their own, named on the command line: see the Makefile.
collect_ignore = ["gpu", "interpreted", "pretended"]


# Ray's driver comes before thousands of other tests in its process, too: behind them the raylet of Ray 2.60 has crashed, and all
# that is connected to it with it (a FreeLocalObjects call that had the body of a PinObjectIDs call), in four whole runs;
# never in twenty runs of a young process.
FIRST = "test_ray_data.py", "test_parallel.py"


def pytest_collection_modifyitems(items):
    """What takes a minute comes first, or one worker of several has it before it when the others have ended."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: FIRST.index(item.path.name) if item.path.name in FIRST else len(FIRST))


def pytest_collection_finish():
    """What is loaded by now stays: half a million objects that each full collection of garbage would go through."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def loaded_stays_loaded():
    """What the modules before have loaded besides, too: compilers have as much again."""
    gc.collect()
    gc.freeze()


@pytest.fixture()
def poison():
    """Uninitialised memory is NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture()
def accelerate_state():
    """accelerate as in a new process: it keeps one precision per process, which whoever is first decides."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kept = [(kind._shared_state, dict(kind._shared_state)) for kind in (AcceleratorState, GradientState, PartialState)]
    for shared, _ in kept:
        shared.clear()
    yield
    for shared, before in kept:
        shared.clear()
        shared.update(before)


@pytest.fixture()
def reference_attention(monkeypatch):
    """Packed rows are computed by the reference on CPUs, too: compiled or not, and with all pairs of a sample."""
    monkeypatch.setattr(segments, "TAKES_CPUS", False)


@pytest.fixture(scope="session")
def backbone():
    """(model, processor) of the tiny Qwen3-VL, not patched; tests copy before they change anything."""
    from yojo.demo.backbone import load_backbone

    return load_backbone()


@pytest.fixture(scope="session")
def make_reward_model(backbone):
    """Function options -> `RewardModel` on a copy of the backbone, or of its first layers, with scores of a few tenths."""

    def make(layers=None, **options):
        model, processor = copy.deepcopy(backbone)
        if layers is not None:
            text = model.config.get_text_config()
            text.num_hidden_layers = layers
            model.get_decoder().layers = model.get_decoder().layers[:layers]
        model = yojo.patch(model.eval(), processor, **options)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for name, parameter in model.score.named_parameters():
                if name.startswith("weight"):
                    parameter.copy_(
                        torch.randn(parameter.shape, generator=generator) * (0.1 if name == "weight1" else 0.3)
                    )
        return yojo.RewardModel(model, processor)

    return make


@pytest.fixture(scope="session")
def samples():
    """A few (PIL image, digit) pairs; noise in the place of digits where scikit-learn, which has them, is missing."""
    from yojo.demo import digits

    if importlib.util.find_spec("sklearn") is None:
        noise = numpy.random.default_rng(0).integers(0, 256, (8, digits.IMAGE_SIZE, digits.IMAGE_SIZE, 3), "uint8")
        return [(Image.fromarray(pixels), digit) for digit, pixels in enumerate(noise)]
    return digits.load_digits_split()[1][:8]


@pytest.fixture()
def examples(samples):
    """Five examples: 1 to 4 responses, with one image, two images, and text alone; all ranked."""
    from yojo.demo import digits

    rng = random.Random(0)
    made = []
    for count, images in ((4, 1), (1, 1), (3, 2), (2, 0), (2, 1)):
        responses = [digits.caption(rng.randrange(10), rng) for _ in range(count)]
        pictures = [image for image, _ in samples[:images]]
        rankings = list(range(1, count + 1))
        made.append(yojo.Example(digits.PROMPT, responses, images=pictures, rankings=rankings, id=f"e{len(made)}"))
    return made

"""These tests need a GPU; asking for them without one is an error, not a silent pass."""

import pytest
import torch


def _need_a_gpu():
    if not torch.cuda.is_available():
        pytest.exit("the GPU suite needs a CUDA device, and torch finds none", returncode=2)


def pytest_configure(config):
    _need_a_gpu()  # asked for by name: before workers are started


def pytest_collection_modifyitems(config, items):
    if items:
        _need_a_gpu()


@pytest.fixture(autouse=True)
def exact_float32():
    """No TF32: float32 means float32 here."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before

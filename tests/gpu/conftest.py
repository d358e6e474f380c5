"""These tests need a GPU; asking for them without one is an error, not a silent pass."""

import pytest
import torch


def pytest_collection_modifyitems(config, items):
    if items and not torch.cuda.is_available():
        pytest.exit("the GPU suite needs a CUDA device, and torch finds none", returncode=2)

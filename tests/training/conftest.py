"""Fixtures of the training tests."""

import parallel_cases
import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture()
def make(tmp_path):
    """Function examples, options -> (`RewardTrainer`, record of its first step), one batch of all of them, one step."""

    def make(examples, eval_dataset=None, **options):
        options = {"batch": len(examples), "max_steps": 1, "gradient_checkpointing": False} | options
        return parallel_cases.make_trainer(tmp_path, examples, eval_dataset, world=1, **options)

    return make

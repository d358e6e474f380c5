"""Every attention kernel compiles for every chip, and keeps to registers and shared memory."""

import pytest
import torch

from yojo_kernels import aot, tuning


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("chip", tuning.CHIPS)
@pytest.mark.parametrize("kernel", ["forward", "query_grad", "key_grad"])
def test_a_16_bit_kernel_stays_in_registers(kernel, chip, head_dim):
    for features in aot.FEATURES if chip == 90 else ("all",):
        report = aot.compile_kernel(kernel, chip, torch.bfloat16, head_dim, features)
        assert report.problems() == []


def test_a_spill_in_a_loop_is_seen():
    report = aot.compile_kernel("key_grad", 90, torch.bfloat16, 128, tile=tuning.Tile(64, 128, 8, 3))
    assert report.spills >= report.loop_spills > 0
    assert any("spill instructions inside an inner loop" in problem for problem in report.problems())

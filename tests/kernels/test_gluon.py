"""The Gluon kernels compile for Hopper as they should, are launched as they are called, and refuse all else."""

import pytest
import torch

from bench import pretended_driver
from yojo_kernels import (
    Layout,
    aot,
    gluon_attention,
    implementations,
    multi_response_attention,
    tuning,
)


@pytest.mark.parametrize("dtype, head_dim", [(torch.bfloat16, 128), (torch.bfloat16, 64), (torch.float16, 128)])
@pytest.mark.parametrize("features", [pytest.param("plain", marks=pytest.mark.soak), "all"])
def test_the_forward_spills_nothing_and_overlaps(dtype, head_dim, features):
    report = aot.compile_kernel("gluon_forward", 90, dtype, head_dim, features)
    assert report.problems({}) == []
    assert report.wgmma > 0 and report.waits == report.waits_wanted > 0 and report.late == 0


@pytest.mark.parametrize("head_dim", gluon_attention.HEAD_DIMS)
def test_the_kernel_behind_it_spills_nothing(head_dim):
    assert aot.compile_kernel("gluon_again", 90, torch.bfloat16, head_dim, "all").problems({}) == []


def test_serialised_instructions_and_late_exponentials_are_seen():
    report = aot.compile_kernel("gluon_forward", 90, torch.bfloat16, 64)
    serialised, late = (aot.dataclasses.replace(report, **changes) for changes in ({"waits": 40}, {"late": 64}))
    assert any("ptxas serialised them" in problem for problem in serialised.problems())
    assert any("64 exponentials" in problem for problem in late.problems())
    loop = ["WARPGROUP.DEPBAR.LE gsb0, 0x1", "MUFU.EX2 R1, R1", "WARPGROUP.DEPBAR.LE gsb0, 0x0", "MUFU.EX2 R1, R1"]
    assert aot._late_exponentials(loop) == 1


def test_it_is_compiled_for_hopper_alone():
    found = {configuration[:4] for configuration in aot.configurations(kernels=aot.GLUON_KERNELS)}
    dtypes, dims = gluon_attention.DTYPES, gluon_attention.HEAD_DIMS
    expected = {(kernel, 90, dtype, dim) for kernel in aot.GLUON_KERNELS for dtype in dtypes for dim in dims}
    assert found == expected


def test_a_call_launches_it_and_compiles_once_for_all_lengths():
    with pretended_driver.pretended():
        for prompts, branches, launches in (([90], [[30, 31]], 2), ([200, 30], [[7], [150, 12]], 2)):
            layout = Layout.build(prompts, branches)
            inputs = [torch.randn(layout.num_tokens, heads, 64, dtype=torch.bfloat16) for heads in (8, 2, 2)]
            before = pretended_driver.launches()
            output, lse = multi_response_attention(*inputs, layout, return_lse=True, impl="gluon")
            assert output.shape == inputs[0].shape and lse.shape == output.shape[:2]
            assert pretended_driver.launches() - before == launches
        kernels = gluon_attention.gluon_forward
        for kernel in (kernels.gluon_forward_kernel, kernels.gluon_again_kernel):
            assert len(kernel.device_caches[0][0]) == 1
        trained = [tensor.requires_grad_() for tensor in inputs]
        output = multi_response_attention(*trained, layout, impl="gluon")
        before = pretended_driver.launches()
        assert all(grad is not None for grad in torch.autograd.grad(output.sum(), trained))
        assert pretended_driver.launches() - before == 3  # the backward is the Triton kernels'


def attend(heads=(4, 2, 2), dim=64, dtype=torch.bfloat16, **options):
    layout = Layout.build([5], [[3, 4]])
    tensors = [torch.randn(layout.num_tokens, count, dim, dtype=dtype) for count in heads]
    return multi_response_attention(*tensors, layout, impl="gluon", **options)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "impl='gluon' cannot run multi_response_attention: it needs an NVIDIA GPU"),
        ({"dtype": torch.float32}, "it takes bfloat16 or float16, not float32"),
        ({"dim": 72}, "it takes head dims 64 and 128, not 72"),
        ({"query_rows": torch.arange(12)}, "impl='gluon' cannot run query_rows"),
    ],
)
def test_it_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        attend(**arguments)


@pytest.mark.parametrize("capability, message", [((8, 0), "not 8.0"), ((9, 0), None), ((10, 0), "not 10.0")])
def test_it_needs_hopper(capability, message, monkeypatch):
    monkeypatch.setattr(tuning, "capability", lambda device: capability)
    arguments = torch.device("cuda"), torch.bfloat16, 128
    reason = gluon_attention.obstacle(*arguments)
    assert reason is None if message is None else f"it needs a Hopper GPU (compute capability 9.0), {message}" == reason
    name, reason = implementations(torch.device("cuda"))["multi_response_attention"]
    told = reason.endswith("impl='gluon' could run, but no GPU has measured it yet")
    assert name == "triton" and told == (message is None)


def test_a_triton_without_it_is_named(monkeypatch):
    monkeypatch.setattr(gluon_attention, "MISSING", "Triton 3.4.0 has not the Gluon it is written in")
    with pytest.raises(ValueError, match=r"Triton 3\.4\.0 has not the Gluon"):
        attend()
    assert not aot.configurations(kernels=aot.GLUON_KERNELS)

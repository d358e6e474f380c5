"""Strides of attention's inputs: constants of a kernel where they belong to the model, and no compilation per length."""

import pytest
import torch
import triton.language as tl
from triton.runtime.jit import JITFunction

from bench.pretended_driver import pretended
from yojo_kernels import Layout, aot, attention, attention_backward, attention_forward, launch

KERNELS = (
    attention_forward.forward_kernel,
    attention_backward.query_grad_kernel,
    attention_backward.key_grad_kernel,
    attention_backward.sum_kernel,
)


def tokens_first(size, heads, dim):
    return [torch.zeros(size, number, dim, dtype=torch.bfloat16) for number in heads]


def heads_first(size, heads, dim):
    return [torch.zeros(number, size, dim, dtype=torch.bfloat16).transpose(0, 1) for number in heads]


def of_one_projection(size, heads, dim):
    return list(torch.zeros(size, sum(heads), dim, dtype=torch.bfloat16).split(heads, dim=1))


def of_a_batch(size, heads, dim):
    return [torch.zeros(2, size, number, dim, dtype=torch.bfloat16)[1] for number in heads]


def of_a_batch_with_heads_first(size, heads, dim):
    return [torch.zeros(2, number, size, dim, dtype=torch.bfloat16)[1].transpose(0, 1) for number in heads]


def of_a_buffer(size, heads, dim):
    """Rows of a longer buffer with room between the heads."""
    return [torch.zeros(1000, number + 1, dim + 8, dtype=torch.bfloat16)[3 : size + 3, 1:, 8:] for number in heads]


STORAGE = (tokens_first, heads_first, of_one_projection, of_a_batch, of_a_batch_with_heads_first, of_a_buffer)


class Compiled:
    """Stands for a compiled kernel: what is counted is how often one is asked for."""

    function, packed_metadata = 1, ()

    def launch_metadata(self, *arguments):
        pass

    def run(self, *arguments):
        pass


@pytest.fixture
def compilations(monkeypatch):
    """A list that every compilation is noted in, (kernel, constants); the driver is pretended, the compiler left out."""
    found = []

    def compile_kernel(self, key, signature, device, constexprs, options, attrs, warmup):
        found.append((self.__name__, {self.arg_names[path[0]]: value for path, value in constexprs.items()}))
        self.device_caches[device][0][key] = Compiled()
        return Compiled()

    for kernel in KERNELS:
        kernel.device_caches.clear()
    monkeypatch.setattr(JITFunction, "_do_compile", compile_kernel)
    with pretended():
        yield found
    for kernel in KERNELS:
        kernel.device_caches.clear()


def train(inputs, window=None):
    size = inputs[0].shape[0]
    q, k, v = (tensor.requires_grad_() for tensor in inputs)
    layout = Layout.build([size // 2], [[size - size // 2]])
    output, _ = attention.multi_response_attention(q, k, v, layout, scale=0.1, window=window)
    torch.autograd.grad(output, (q, k, v), torch.zeros_like(output))


@pytest.mark.parametrize("heads, dim", [((8, 2, 2), 128), ((4, 4, 4), 72), ((3, 1, 1), 24), ((1, 1, 1), 64)])
@pytest.mark.parametrize("storage", STORAGE)
def test_all_lengths_share_one_compilation(compilations, storage, heads, dim):
    for size in (2, 3, 7, 8, 15, 16, 31, 32, 48, 64, 99, 128, 160):
        train(storage(size, heads, dim))
    assert sorted(name for name, _ in compilations) == ["forward_kernel", "key_grad_kernel", "query_grad_kernel", "sum_kernel"]  # fmt: skip


@pytest.mark.parametrize("storage", [tokens_first, of_one_projection, of_a_buffer])
def test_strides_of_the_model_are_constants(compilations, storage):
    inputs = storage(40, (8, 2, 2), 128)
    train(inputs)
    (constants,) = (constants for name, constants in compilations if name == "forward_kernel")
    for letter, tensor in zip("qkv", inputs, strict=True):
        assert constants[f"stride_{letter}t"].value == tensor.stride(0)
        assert constants[f"stride_{letter}h"].value == tensor.stride(1)
    assert constants["stride_ot"].value == 8 * 128 and constants["stride_oh"].value == 128


def test_heads_as_far_apart_as_the_row_is_long_are_arguments():
    (rows, heads), unit = launch.strides(*heads_first(41, (4,), 72))
    assert isinstance(rows, tl.constexpr) and rows.value == 72 and heads == 41 * 72 and unit == 8
    (rows, heads), unit = launch.strides(*heads_first(41, (1,), 128))
    assert (rows.value, heads.value, unit) == (128, 0, 16)  # one head is nowhere else
    assert launch.strides(*heads_first(48, (4, 2), 20))[1] == 4
    assert launch.strides(*of_a_buffer(48, (4, 2), 128))[1] == 8


@pytest.mark.parametrize("features", ["plain", "heads_first"])
@pytest.mark.parametrize("kernel", ["forward", "query_grad", "key_grad"])
def test_heads_of_72_are_moved_many_entries_at_once(kernel, features):
    report = aot.compile_kernel(kernel, 90, torch.bfloat16, 72, features)
    assert report.narrow == 0 and report.problems() == []


def test_single_entries_are_seen():
    report = aot.compile_kernel("forward", 90, torch.bfloat16, 71)
    assert report.narrow > 100 and not any("16-bit" in problem for problem in report.problems())
    assert "16-bit" in aot.dataclasses.replace(report, head_dim=72).problems()[-1]

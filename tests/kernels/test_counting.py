"""FLOPs of torch's own attention with grouped heads, counted alike by every version of torch."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.utils import flop_counter as torchs

from bench import counting
from yojo_kernels.causal import has_torch_varlen

aten = torch.ops.aten
SHAPES = [  # query, key, value
    ((2, 6, 5, 8), (2, 6, 9, 8), (2, 6, 9, 8)),
    ((2, 6, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8)),
    ((1, 4, 7, 16), (1, 1, 7, 16), (1, 1, 7, 8)),
]


@pytest.mark.parametrize("query, key, value", SHAPES)
def test_grouped_heads_cost_what_torch_counts_for_repeated_ones(query, key, value):
    repeated = (query, (key[0], query[1], *key[2:]), (value[0], query[1], *value[2:]))
    grad = (*query[:3], value[3])
    assert counting.forward_flops(query, key, value) == torchs.sdpa_flop_count(*repeated)
    assert counting.backward_flops(grad, query, key, value) == torchs.sdpa_backward_flop_count(grad, *repeated)


@pytest.mark.parametrize(
    "key, value",
    [((2, 4, 9, 8), (2, 4, 9, 8)), ((1, 2, 9, 8), (1, 2, 9, 8)), ((2, 2, 9, 4), (2, 2, 9, 8)), ((2, 2, 9, 8), (2, 2, 8, 8))],
)  # fmt: skip
def test_shapes_that_are_no_attention_are_refused(key, value):
    with pytest.raises(ValueError, match=r"no attention: query \[2, 6, 5, 8\]"):
        counting.forward_flops((2, 6, 5, 8), key, value)
    with pytest.raises(ValueError, match=r"shape \[2, 6, 5, 9\], expected \[2, 6, 5, 8\]"):
        counting.backward_flops((2, 6, 5, 9), (2, 6, 5, 8), (2, 2, 9, 8), (2, 2, 9, 8))


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_attention_on_a_cpu_forward_and_backward(kv_heads):
    query, key, value = (torch.randn(2, heads, 5, 8, requires_grad=True) for heads in (6, kv_heads, kv_heads))
    with counting.flop_counter() as counter:
        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=kv_heads != 6).sum().backward()
    pairs = 2 * 6 * 5 * 5
    assert counter.get_total_flops() == 2 * pairs * 8 * (2 + 5)


@pytest.mark.parametrize("kv_heads", [6, 2])
def test_every_kernel_of_a_gpu_is_counted(kv_heads):
    """The operators that torch picks among on a GPU, on tensors without values."""
    make = functools.partial(torch.empty, device="meta", dtype=torch.bfloat16)
    query, key, value = make(2, 6, 8, 16), make(2, kv_heads, 8, 16), make(2, kv_heads, 8, 16)
    with counting.flop_counter() as counter:
        aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True)
        aten._scaled_dot_product_efficient_attention(query, key, value, None, True)
        aten._scaled_dot_product_cudnn_attention(query, key, value, None, True)
    assert counter.get_total_flops() == 3 * 2 * (2 * 6 * 8 * 8) * (16 + 16)
    for operator in counting.BACKWARD:
        formula = counter.flop_registry[operator]
        flops = formula(make(2, 6, 8, 16), query, key, value, make(2, 6, 8, 16), make(2, 6, 8), out_val=None)
        assert flops == 2 * (2 * 6 * 8 * 8) * 5 * 16


@pytest.mark.skipif(not has_torch_varlen(), reason="this torch has no varlen_attn that takes a scale")
@pytest.mark.parametrize("kv_heads", [6, 2])
def test_sequences_of_different_lengths(kv_heads):
    query, key, offsets = torch.randn(9, 6, 8), torch.randn(9, kv_heads, 8), torch.tensor([0, 2, 9], dtype=torch.int32)
    counter, pairs = counting.flop_counter(), 6 * (2 * 2 + 7 * 7)
    forward, backward = torch.ops.torch_attn._varlen_attn, torch.ops.torch_attn._varlen_attn_backward
    arguments = query, key, key, offsets, offsets, 7, 7
    expected = 2 * pairs * 8 * 2
    assert counting.varlen_forward_flops(*arguments) == expected
    assert counter.flop_registry[forward](*arguments, out_val=None) == expected
    arguments = query, query, key, key, query, query[..., 0], offsets, offsets, 7, 7
    assert counting.varlen_backward_flops(*arguments) == counter.flop_registry[backward](*arguments, out_val=None)
    assert counting.varlen_backward_flops(*arguments) == 2 * pairs * 8 * 5

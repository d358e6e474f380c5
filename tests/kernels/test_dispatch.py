"""What impl="auto" picks, and that the kernels of others, where it picks them, get what they need."""

import ast
import logging
import sys
import types
from pathlib import Path

import pytest
import torch

import yojo_kernels
from yojo_kernels import (
    AttentionCall,
    Layout,
    causal,
    choose,
    choose_attention,
    implementations,
    multi_response_attention,
    tuning,
)

HOPPER = torch.device("cuda", 0)


def usual(**changes):
    return AttentionCall(**({"device": HOPPER, "dtype": torch.bfloat16, "head_dim": 128, "causal": True} | changes))


@pytest.fixture(autouse=True)
def hopper(monkeypatch, reference_attention):
    """Every device is a Hopper GPU without flash attention."""
    monkeypatch.setattr(tuning, "capability", lambda device: (9, 0))
    for package in ("flash_attn", "flash_attn_interface"):
        monkeypatch.setitem(sys.modules, package, None)
    causal.flash_function.cache_clear()
    yield
    causal.flash_function.cache_clear()


def test_head_and_loss_run_in_the_kernels_where_they_can(monkeypatch):
    for module in ("head", "loss"):
        assert choose(module, HOPPER, torch.bfloat16, torch.float32) == ("triton", "the Triton kernel")
        name, reason = choose(module, HOPPER, torch.float64)
        assert name == "reference" and "not float64" in reason
        name, reason = choose(module, torch.device("cpu"), torch.float32)
        assert name == "reference" and "it needs an NVIDIA GPU" in reason
    assert {name: chosen for name, (chosen, _) in implementations(HOPPER).items()} == {
        "multi_response_attention": "triton",
        "multi_response_attention, causal rows": "triton",
        "score_head": "triton",
        "listwise_loss": "triton",
    }
    monkeypatch.setattr(tuning, "capability", lambda device: (7, 5))
    assert choose("head", HOPPER, torch.float16)[0] == "reference"


def flash_like(q, k, v, *, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, softmax_scale, causal, softcap, deterministic):  # fmt: skip
    raise AssertionError("not to be called")


def install(monkeypatch, package, function):
    monkeypatch.setitem(sys.modules, package, types.SimpleNamespace(flash_attn_varlen_func=function))
    causal.flash_function.cache_clear()


def test_the_kernel_takes_what_is_not_causal(monkeypatch):
    install(monkeypatch, "flash_attn", flash_like)
    assert choose_attention(usual(causal=False)) == ("triton", "the Triton kernel")


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"lse": True}, "the log-sum-exp is wanted"),
        ({"dtype": torch.float32}, "16-bit types"),
        ({"head_dim": 20}, "multiples of 8"),
        ({"causal": False}, "the Triton kernel"),
    ],
)
def test_flash_attention_takes_only_what_it_can(monkeypatch, changes, why):
    install(monkeypatch, "flash_attn", flash_like)
    name, reason = choose_attention(usual())
    assert name == "flash" and "FlashAttention-2" in reason
    name, reason = choose_attention(usual(**changes))
    assert name == "triton" and why in reason


def test_flash_attention_3_goes_first_on_hopper_alone(monkeypatch):
    install(monkeypatch, "flash_attn", flash_like)
    install(monkeypatch, "flash_attn_interface", flash_like)
    assert "FlashAttention-3" in choose_attention(usual())[1]
    monkeypatch.setattr(tuning, "capability", lambda device: (8, 0))
    assert "FlashAttention-2" in choose_attention(usual())[1]


def test_a_flash_attention_that_does_not_load_is_none(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "flash_attn", types.SimpleNamespace())  # no varlen function: a broken build
    causal.flash_function.cache_clear()
    assert choose_attention(usual())[0] == "triton"
    assert "FlashAttention-2 (flash_attn) is installed and does not load" in caplog.text


def test_a_flash_attention_that_is_too_old_is_none(monkeypatch, caplog):
    install(monkeypatch, "flash_attn", lambda q, k, v, deterministic=False: None)
    assert choose_attention(usual())[0] == "triton"
    assert "too old: it does not take softcap" in caplog.text


def test_torchs_own_attention_needs_a_measurement(monkeypatch):
    assert tuning.CAUSAL == {} and choose_attention(usual())[0] == "triton"
    monkeypatch.setitem(tuning.CAUSAL, (90, 128), "varlen")
    assert choose_attention(usual(num_samples=3))[0] == "varlen"
    for changes in ({"gradients": True}, {"softcap": True}):
        name, reason = choose_attention(usual(**changes))
        assert name == "triton" and "no deterministic backward and no soft cap" in reason
    assert choose_attention(usual(head_dim=64))[0] == "triton"
    monkeypatch.setitem(tuning.CAUSAL, (90, 128), "sdpa")
    assert choose_attention(usual())[0] == "sdpa" and choose_attention(usual(num_samples=3))[0] == "triton"


def test_a_chip_without_kernels_gets_the_reference(monkeypatch):
    monkeypatch.setattr(tuning, "capability", lambda device: (7, 5))
    name, reason = choose_attention(usual())
    assert name == "reference" and "compute capability 8.0" in reason


# ---- the calls themselves, with functions that stand in for CUDA kernels ----


def packed_causal(query, key, value, offsets, scale):
    """Causal attention over packed sequences in plain PyTorch."""
    pieces = []
    for start, stop in zip(offsets.tolist(), offsets.tolist()[1:], strict=False):
        q, k, v = (tensor[start:stop].transpose(0, 1) for tensor in (query, key, value))
        pieces.append(
            torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
        )
    return torch.cat(pieces, dim=1).transpose(0, 1)


def case(prompts, branches):
    layout = Layout.build(prompts, branches)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(layout.num_tokens, heads, 16, generator=generator) for heads in (4, 2, 2)]
    return layout, [tensor.bfloat16() for tensor in tensors]


def check(got, inputs, layout, **options):
    exact = multi_response_attention(*[tensor.double() for tensor in inputs], layout, impl="reference", **options)
    peer = multi_response_attention(*inputs, layout, impl="reference", **options)
    assert (got - exact).abs().max() <= 2 * (peer - exact).abs().max()


@pytest.fixture()
def on_cpu(monkeypatch):
    """CPU tensors pass for tensors of a GPU."""
    from yojo_kernels import attention

    monkeypatch.setattr(attention, "obstacle", lambda *call: None)


@pytest.mark.parametrize("scale", [0.3, -0.3])
@pytest.mark.parametrize("returns_lse", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_flash_attention_is_asked_for_the_samples(monkeypatch, on_cpu, caplog, softcap, returns_lse, scale):
    asked = {}

    def function(q, k, v, *, softmax_scale, causal, softcap, deterministic, **options):
        asked.update(options, causal=causal, softcap=softcap, deterministic=deterministic)
        assert softmax_scale > 0  # the largest raw score is looked for before scaling
        output = packed_causal(q, k, v, options["cu_seqlens_q"], softmax_scale)
        return (output, None) if returns_lse else output

    install(monkeypatch, "flash_attn", function)
    layout, inputs = case([30, 0, 7], [[12], [5], []])
    with caplog.at_level(logging.DEBUG, "yojo_kernels"):
        output = multi_response_attention(*inputs, layout, scale=scale, softcap=softcap)
    assert "multi_response_attention: flash (FlashAttention-2" in caplog.text
    if softcap is None:
        check(output, inputs, layout, scale=scale)
    assert asked["causal"] and asked["deterministic"] and asked["softcap"] == (softcap or 0.0)
    assert asked["cu_seqlens_k"].tolist() == [0, 42, 47, 54] and asked["cu_seqlens_k"].dtype == torch.int32
    assert asked["max_seqlen_q"] == asked["max_seqlen_k"] == 42


@pytest.mark.parametrize("branches, options", [([[3, 4]], {}), ([[7]], {"window": 5})])
def test_flash_attention_is_not_asked_for_other_rows(monkeypatch, on_cpu, branches, options):
    install(monkeypatch, "flash_attn", lambda *arguments, **options: pytest.fail("the row is not causal"))
    chosen = []
    monkeypatch.setattr("yojo_kernels.attention.multi_response_attention", lambda *a, **o: chosen.append(1) or (0, 0))
    layout, inputs = case([9], branches)
    multi_response_attention(*inputs, layout, **options)
    assert chosen


def test_sdpa_gets_a_row_of_one_sample(monkeypatch, on_cpu):
    monkeypatch.setitem(tuning.CAUSAL, (90, 16), "sdpa")
    layout, inputs = case([30], [[12]])
    check(multi_response_attention(*inputs, layout), inputs, layout)


def test_varlen_gets_the_samples(monkeypatch, on_cpu):
    from torch.nn.attention import varlen

    named = "enable_gqa" in causal._varlen_parameters()  # of the real function

    def function(query, key, value, q_offsets, k_offsets, longest_q, longest_k, *, scale, window_size, **grouped):
        assert window_size == (-1, 0) and longest_q == longest_k == 42 and q_offsets is k_offsets
        assert grouped == ({"enable_gqa": True} if named else {})
        return packed_causal(query, key, value, q_offsets, scale)

    monkeypatch.setattr(varlen, "varlen_attn", function)
    monkeypatch.setitem(tuning.CAUSAL, (90, 16), "varlen")
    layout, inputs = case([30, 4], [[12], [5]])
    check(multi_response_attention(*inputs, layout), inputs, layout)


@pytest.mark.parametrize("path", sorted(Path(yojo_kernels.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_what_a_mask_hides_is_read_as_a_number(path):
    """Without `other` it is whatever the register holds: 0 in the interpreter, and anything on a GPU."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.load":
            names = {keyword.arg for keyword in node.keywords}
            assert ("mask" in names) == ("other" in names), f"{path.name}:{node.lineno}"

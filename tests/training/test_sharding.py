"""FSDP2's settings for a patched model: what is chosen, and what is refused."""

import types

import pytest
import torch

from yojo.training import sharding


@pytest.fixture()
def accelerator(monkeypatch):
    """Function settings -> something with an FSDP plugin of accelerate."""
    from accelerate.utils import FullyShardedDataParallelPlugin

    monkeypatch.setenv("FSDP_AUTO_WRAP_POLICY", "TRANSFORMER_BASED_WRAP")

    def make(**settings):
        plugin = FullyShardedDataParallelPlugin(**{"fsdp_version": 2, "state_dict_type": "FULL_STATE_DICT"} | settings)
        return types.SimpleNamespace(state=types.SimpleNamespace(fsdp_plugin=plugin))

    return make


def test_fsdp_shards_the_decoders_layers_and_keeps_what_should_be_exact(make_reward_model, accelerator):
    base = make_reward_model().model
    made = accelerator(mixed_precision_policy="bf16")
    sharding.set_up(made, base)
    plugin = made.state.fsdp_plugin
    assert plugin.transformer_cls_names_to_wrap == ["Qwen3VLTextDecoderLayer"]
    assert "Qwen3VLVisionBlock" in base._no_split_modules  # which accelerate would have taken
    policy = plugin.mixed_precision_policy
    assert policy.param_dtype is torch.bfloat16 and policy.reduce_dtype is torch.float32 and policy.output_dtype is None
    exact = accelerator()
    sharding.set_up(exact, base)
    assert exact.state.fsdp_plugin.mixed_precision_policy is None


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"fsdp_version": 1}, "FSDP version 1 is not supported: set fsdp_version: 2"),
        ({"state_dict_type": "SHARDED_STATE_DICT"}, "fsdp_state_dict_type must be FULL_STATE_DICT"),
        ({"auto_wrap_policy": "size_based_wrap", "min_num_params": 100}, "take TRANSFORMER_BASED_WRAP"),
        (
            {"transformer_cls_names_to_wrap": ["Qwen3VLTextDecoderLayer", "Qwen3VLVisionBlock"]},
            "FSDP must not shard Qwen3VLVisionBlock by itself, .* or give Qwen3VLTextDecoderLayer",
        ),
    ],
)
def test_fsdp_settings_that_would_not_work(make_reward_model, accelerator, settings, message):
    with pytest.raises(ValueError, match=message):
        sharding.set_up(accelerator(**settings), make_reward_model().model)


def test_fsdp_needs_the_weights_on_every_process(make_reward_model, accelerator):
    made = accelerator()
    made.state.fsdp_plugin.cpu_ram_efficient_loading = True
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading must be false"):
        sharding.set_up(made, make_reward_model().model)

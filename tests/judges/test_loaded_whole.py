"""Judges beside a trainer that shards its own model: transformers shards or empties what is loaded for it, and no judge may be."""

import concurrent.futures
import os
import threading
import types

import pytest
import saved_cases
import test_classifier
import test_value_head
import torch
import transformers
from transformers.integrations import deepspeed, is_deepspeed_zero3_enabled

import yojo
from yojo.converting.merge import merge
from yojo.files.whole import loaded_whole
from yojo.judges import load_judge

FSDP = "FSDP_CPU_RAM_EFFICIENT_LOADING"
EXAMPLE = test_classifier.EXAMPLES[0]


def reward_model(folder):
    saved_cases.backbone().save_pretrained(folder / "base")
    made = yojo.RewardModel(*saved_cases.patched(folder / "base"))
    made.save_pretrained(folder / "saved")
    return made, folder / "saved"


def adapter(folder):
    saved_cases.backbone().save_pretrained(folder / "base")
    made = saved_cases.adapted(folder / "base")
    made.save_pretrained(folder / "saved")
    return made, folder / "saved"


def checkpoint(folder):
    made, _ = reward_model(folder)
    made.model.save_pretrained(folder / "checkpoint")
    made.processor.save_pretrained(folder / "checkpoint")
    return made, folder / "checkpoint"


def classifier(folder):
    made = test_classifier.judge()
    made.model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    return made, folder


def value_head(folder):
    made = test_value_head.judge()
    return made, test_value_head.save(folder, made.model, made.processor)


@pytest.fixture()
def sharding(monkeypatch):
    """A program whose trainer shards: with ZeRO-3 nothing can be loaded here (DeepSpeed is not there), with FSDP weights are 0."""
    zero3 = types.SimpleNamespace(is_zero3=lambda: True)
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: zero3)
    monkeypatch.setenv(FSDP, "true")
    stock = transformers.PreTrainedModel.from_pretrained.__func__

    def as_in_another_process(cls, *args, **options):
        found = stock(cls, *args, **options)
        if os.environ.get(FSDP) == "true":  # what transformers 5.17 does in all processes but the first
            for parameter in (found[0] if isinstance(found, tuple) else found).parameters():
                parameter.data.zero_()
        return found

    monkeypatch.setattr(transformers.PreTrainedModel, "from_pretrained", classmethod(as_in_another_process))


@pytest.mark.parametrize("kind", [reward_model, adapter, checkpoint, classifier, value_head])
def test_a_judge_is_loaded_whole_whatever_the_trainer_shards(kind, tmp_path, request):
    made, folder = kind(tmp_path)
    wanted = made.score_many([EXAMPLE])[0]
    assert wanted.std() > 1e-3
    request.getfixturevalue("sharding")
    assert torch.equal(load_judge(str(folder)).score_many([EXAMPLE])[0], wanted)
    assert is_deepspeed_zero3_enabled() and os.environ[FSDP] == "true"


def test_an_adapter_is_merged_into_whole_weights(tmp_path, request):
    made, folder = adapter(tmp_path)
    wanted = made.score_many([EXAMPLE])[0]
    request.getfixturevalue("sharding")
    merge(folder, tmp_path / "merged")
    torch.testing.assert_close(load_judge(str(tmp_path / "merged")).score_many([EXAMPLE])[0], wanted, atol=2e-6, rtol=0)


def test_what_is_set_aside_comes_back_behind_the_last_of_several_threads(sharding):
    inside, ends = threading.Barrier(3), [threading.Event() for _ in range(2)]

    def load(end):
        with loaded_whole():
            inside.wait(60)
            assert end.wait(60)
            return is_deepspeed_zero3_enabled(), os.environ.get(FSDP)

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        loads = [pool.submit(load, end) for end in ends]
        inside.wait(60)
        for end, one in zip(ends, loads, strict=True):
            end.set()
            assert one.result(60) == (False, None)
    assert is_deepspeed_zero3_enabled() and os.environ[FSDP] == "true"


def test_an_error_brings_it_back_too(sharding):
    with pytest.raises(OSError, match="the disk"), loaded_whole():
        assert not is_deepspeed_zero3_enabled()
        raise OSError("the disk")
    assert is_deepspeed_zero3_enabled() and os.environ[FSDP] == "true"

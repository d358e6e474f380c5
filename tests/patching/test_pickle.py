"""Patched models copied, pickled and sent to other processes, and scored with from several threads."""

import concurrent.futures
import copy
import pickle
import subprocess
import sys

import pytest
import real_processors
import tiny
import torch
from family_cases import PARITY, patched, samples_of

import yojo
from yojo.patching import separator as separators
from yojo.patching.eval_mode import EvalMode

CHOICES = ("auto", "none", "compile")

# A process that has patched nothing: it unpickles, scores what it was given, and unpatches.
READER = """
import functools, pickle, sys, torch
everything = []
for path, load in ((sys.argv[1], pickle.load), (sys.argv[2], functools.partial(torch.load, weights_only=False))):
    with open(path, "rb") as file:
        reward_model, batch, ids = load(file)
    import yojo
    base = yojo.patch.__globals__["unwrap"](reward_model.model)
    for _ in range(20):  # hooks of others must not take the place of the separator's
        base.get_input_embeddings().register_forward_hook(lambda module, args, output: output)
    with torch.no_grad():
        found = reward_model.model(**batch).scores, base(input_ids=ids).logits
        yojo.unpatch(base)
        found += (base(input_ids=ids).logits,)
    everything.append(found)
torch.save(everything, sys.argv[3])
"""


def trained(family, **options):
    """A reward model whose separator has been trained."""
    model, collator = patched(family, **options)
    with torch.no_grad():
        model.score.separator_delta.copy_(torch.linspace(-1, 1, model.score.separator_delta.shape[0]))
    return yojo.RewardModel(model, collator.processor)


def packed(reward_model, family):
    collator = reward_model.collator
    return collator.pack([collator.from_processed(*sample) for sample in samples_of(family).values()])


@pytest.mark.parametrize("fuse", CHOICES)
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma2"])
def test_a_pickled_model_scores_the_same(family, fuse, monkeypatch):
    monkeypatch.setattr("yojo.patching.fuse.BACKEND", "eager")  # what a compiler makes is not pickled
    reward_model = trained(family, mode="isolated", fuse=fuse)
    twin = pickle.loads(pickle.dumps(reward_model))
    batch = packed(reward_model, family) if family == "gemma2" else one_row(reward_model, family)
    with torch.no_grad():
        for _ in range(2 if fuse == "compile" and family == "gemma2" else 1):
            expected, found = reward_model.model(**batch).scores, twin.model(**batch).scores
            assert (found - expected).nan_to_num(0.0).abs().max() <= PARITY
    layer, own = twin.model.get_decoder().layers[-1], reward_model.model.get_decoder().layers[-1]
    assert layer.__dict__.keys() == own.__dict__.keys()
    assert twin.model.yojo.fusion.layers[-1] is layer and twin.model.yojo.fuse == fuse
    yojo.unpatch(twin.model)
    assert "forward" not in layer.__dict__ and not twin.model.get_input_embeddings()._forward_hooks
    assert yojo.patch(reward_model.model, mode="isolated") is reward_model.model  # the original is as it was


def one_row(reward_model, family):
    samples = samples_of(family)
    return reward_model.collator.pack([reward_model.collator.from_processed(*samples[n]) for n in ("image", "text")])


def test_a_fresh_process_takes_a_patched_model(tmp_path):
    reward_model = trained("llama", mode="comparative")
    batch, ids = packed(reward_model, "llama"), torch.tensor([[11, 12, 13, 14]])
    pickled, saved, back = (tmp_path / name for name in ("pickled", "saved", "back"))
    pickled.write_bytes(pickle.dumps((reward_model, batch, ids)))
    torch.save((reward_model, batch, ids), saved)
    subprocess.run([sys.executable, "-c", READER, *map(str, (pickled, saved, back))], check=True)
    with torch.no_grad():
        expected = reward_model.model(**batch).scores, reward_model.model(input_ids=ids).logits
    everything = torch.load(back)
    assert len(everything) == 2
    for scores, logits, unpatched in everything:
        assert (scores - expected[0]).nan_to_num(0.0).abs().max() <= PARITY
        assert torch.equal(logits, expected[1])
        assert torch.equal(unpatched[..., : tiny.VOCABULARY], logits[..., : tiny.VOCABULARY])


def score_into(reward_model, batch, queue):
    with torch.no_grad():
        queue.put(reward_model.model(**batch).scores.tolist())


def test_spawned_processes_take_a_patched_model_with_an_adapter():
    from peft import LoraConfig, get_peft_model

    reward_model = trained("llama", mode="isolated")
    settings = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"], init_lora_weights=False)
    wrapped = yojo.RewardModel(get_peft_model(reward_model.model, settings).eval(), reward_model.processor)
    batch = packed(wrapped, "llama")
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    process = context.Process(target=score_into, args=(wrapped, batch, queue))
    process.start()
    found = torch.tensor(queue.get())
    process.join()
    with torch.no_grad():
        expected = wrapped.model(**batch).scores
    assert (found - expected).nan_to_num(0.0).abs().max() <= PARITY


def test_ray_takes_a_patched_model():
    cloudpickle = pytest.importorskip("cloudpickle")
    reward_model = trained("llama")
    batch = packed(reward_model, "llama")
    twin = pickle.loads(cloudpickle.dumps(reward_model))
    with torch.no_grad():
        assert torch.equal(twin.model(**batch).scores, reward_model.model(**batch).scores)


@pytest.mark.parametrize("family", ["Molmo2", "LLaVA-OneVision", "InternVL", "Mistral 3"])
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda given: pickle.loads(pickle.dumps(given))], ids=["deep", "pickle"]
)
def test_a_model_that_has_seen_an_image_pickles(family, copied):
    """Its vision tower was asked for all hidden states, for which transformers leaves hooks behind."""
    model, processor = real_processors.build(family)
    reward_model = yojo.RewardModel(yojo.patch(model, processor, mode="isolated", head_dim=16), processor)
    request = "What is it?", ["a cat", "a dog"], [real_processors.image(20, 16, 0)]
    expected = reward_model.score(*request)
    twin = copied(reward_model)
    for one in (twin, copied(twin), reward_model):
        assert torch.equal(one.score(*request), expected)
        yojo.unpatch(one.model)
        assert not any("__reduce_ex__" in vars(module) for module in one.model.modules())


@pytest.mark.parametrize("keep", [True, False])
def test_accelerate_wraps_and_unwraps_the_forward(accelerate_state, keep):
    accelerate = pytest.importorskip("accelerate")
    reward_model = trained("llama")
    batch = packed(reward_model, "llama")
    accelerator = accelerate.Accelerator(mixed_precision="bf16", cpu=True)
    model = accelerator.prepare(reward_model.model)
    with torch.no_grad():
        wrapped = model(**batch).scores
        unwrapped = accelerator.unwrap_model(model, keep_fp32_wrapper=keep)(**batch).scores
    assert wrapped.isfinite().any() and torch.equal(unwrapped.isfinite(), wrapped.isfinite())
    if not keep:
        twin = pickle.loads(pickle.dumps(reward_model))
        assert torch.equal(twin.model(**batch).scores, unwrapped)


# ---- threads ----


def test_threads_score_a_model_in_training_mode_as_one_does():
    from peft import LoraConfig, get_peft_model

    model, collator = patched("llama", mode="isolated")
    settings = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], lora_dropout=0.5, init_lora_weights=False)
    wrapped = get_peft_model(model, settings)
    wrapped.train()
    wrapped.base_model.model.lm_head.eval()
    flags = [module.training for module in wrapped.modules()]
    reward_model = yojo.RewardModel(wrapped, collator.processor)
    rows = [[collator.from_processed(*sample)] for sample in samples_of("llama").values()]
    expected = [reward_model._score_row(row)[0] for row in rows]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda i: reward_model._score_row(rows[i % len(rows)])[0], range(200)))
    finally:
        sys.setswitchinterval(interval)
    for i, scores in enumerate(found):
        assert (scores - expected[i % len(rows)]).abs().max() <= PARITY
    assert [module.training for module in wrapped.modules()] == flags


def test_a_model_and_what_wraps_it_score_at_once():
    """Modules of a wrapper are in training mode until it is scored with: nobody has put them there meanwhile."""
    model, mode = torch.nn.Sequential(torch.nn.Dropout()), EvalMode()
    wrapper = torch.nn.Sequential(model, torch.nn.Dropout())
    with mode.of(model), mode.of(wrapper):
        assert not any(module.training for module in wrapper.modules())
    assert all(module.training for module in wrapper.modules())


def test_eval_mode_ends_with_the_last_and_survives_errors():
    model = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Linear(1, 1).eval())
    mode = EvalMode()
    with mode.of(model):
        with pytest.raises(KeyError), mode.of(model):
            raise KeyError
        assert not model.training and not model[0].training
    assert model.training and model[0].training and not model[1].training
    assert mode.inside == copy.deepcopy(mode).inside == []


def test_training_mode_set_under_a_pass_is_an_error():
    model, mode = torch.nn.Sequential(torch.nn.Dropout()), EvalMode()
    with pytest.raises(RuntimeError, match="was put into training mode while it scored"), mode.of(model):
        model.train()
    assert model.training and model[0].training  # not lost
    with pytest.raises(RuntimeError, match="while it scored"), mode.of(model):
        model.train()
        with mode.of(model):  # sets eval mode again: the outer pass may have had dropout all the same
            assert not model.training
    assert model.training


def test_threads_add_the_separators_delta_once():
    """Hooks are put back at the next pass where PEFT has wrapped the embedding: by one thread alone."""
    model, _ = patched("llama")
    separators.remove(model)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            for _ in range(50):
                list(pool.map(lambda _: separators.install(model), range(16)))
                hooks = model.get_input_embeddings()._forward_hooks.values()
                assert sum(isinstance(hook, separators.SeparatorDelta) for hook in hooks) == 1
                separators.remove(model)
    finally:
        sys.setswitchinterval(interval)

"""A scoring pass keeps neither vocabulary logits nor the hidden states of its layers."""

import pytest
import tiny
import torch
from family_cases import batch_of, continued, parametrize_families, samples_of

import yojo
from bench.memory import Watch
from yojo import families
from yojo.patching import media

VOCABULARY = 4000  # more than anything else of a tiny model is wide


def large_vocabulary(family):
    """The family's tiny model with many words, not patched."""
    model = tiny.build(family)
    model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
    return model


def with_layers(family, count, monkeypatch):
    monkeypatch.setitem(tiny.TEXT, "num_hidden_layers", count)
    return tiny.finished(tiny.FAMILIES[family][0]("sdpa"))


def patched_row(model, family):
    yojo.patch(model, tiny.tokenizer(), mode="isolated", head_dim=16)
    return batch_of(family, yojo.Collator(tiny.tokenizer(with_separator=True), model))


def watched(call):
    with torch.inference_mode(), Watch() as watch:
        call()
    return watch


@parametrize_families
def test_no_tensor_is_as_large_as_the_logits(family):
    model = large_vocabulary(family)
    prompt, responses = next(iter(samples_of(family).values()))
    inputs = continued(prompt, responses[0], family)
    stock = watched(lambda: model(**inputs))
    assert stock.largest[0] >= 4 * VOCABULARY * inputs["input_ids"].shape[1]  # so the watch sees them
    batch = patched_row(model, family)
    packed = watched(lambda: model(**batch))
    assert 0 < packed.largest[0] < 4 * VOCABULARY * batch["layout"].num_tokens, packed.largest


@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "molmo2", "internvl"])
def test_layers_do_not_add_up(family, monkeypatch):
    """The most memory in use at a time is the same for 3 layers and for 7; not so where all hidden states are kept.

    Not for 2: the first layer works on the embeddings, which live on behind it, and the last on few rows.
    """
    packed, all_states = [], []
    for count in (3, 7):
        model = with_layers(family, count, monkeypatch)
        batch = patched_row(model, family)
        inputs = media.whole(batch, families.family_of(model.config))
        inputs = {name: inputs[name] for name in inputs if name not in ("layout", "separators", "rankings")}
        packed.append(watched(lambda model=model, batch=batch: model(**batch)).peak)
        yojo.unpatch(model)
        inputs["input_ids"] = inputs["input_ids"].clamp(max=tiny.VOCABULARY - 1)  # the separator's row is gone
        all_states.append(
            watched(lambda model=model, inputs=inputs: model.base_model(**inputs, output_hidden_states=True)).peak
        )
    states = 4 * tiny.HIDDEN * batch["layout"].num_tokens
    assert packed[0] == packed[1]
    assert all_states[1] - all_states[0] >= 4 * states  # so the watch sees what layers leave behind


def test_the_watch_counts_what_is_alive():
    with torch.inference_mode(), Watch() as watch:
        kept = torch.zeros(1000)  # 4,000 bytes
        for _ in range(3):
            view = (kept + 1)[:10]  # 4,000 more, gone by the next turn but one
        del view
        small = torch.zeros(10).relu_()
    assert watch.peak == 12_000 and watch.largest[0] == 4000
    assert len(small) == 10

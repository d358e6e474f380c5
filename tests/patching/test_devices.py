"""Models whose weights accelerate keeps elsewhere until they are needed."""

import pytest
import tiny
import torch
import transformers
from family_cases import PARITY, patched, samples_of

import yojo

PARTS = ("model.embed_tokens", "model.rotary_emb", "model.layers.0", "model.layers.1", "model.norm", "lm_head")
OFFLOADED = {
    "tail": ("model.layers.1", "model.norm", "lm_head"),
    "head": ("model.embed_tokens", "model.layers.0"),
    "all": tuple(part for part in PARTS if part != "model.rotary_emb"),
}


def places(part, where="disk"):
    return {name: where if name in OFFLOADED[part] else "cpu" for name in PARTS}


def scores_of(model, collator):
    reward_model = yojo.RewardModel(model, collator.processor)
    rows = [[collator.from_processed(*sample)] for sample in samples_of("mistral").values()]
    return torch.cat([reward_model._score_row(row)[0] for row in rows])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A stock model, and a reward model made of it."""
    stock, saved = tmp_path_factory.mktemp("stock"), tmp_path_factory.mktemp("saved")
    tiny.build("mistral").save_pretrained(stock)
    model, collator = patched("mistral", mode="isolated")
    yojo.RewardModel(model, collator.processor).save_pretrained(saved, card=False)
    return stock, saved


def test_a_tail_that_is_offloaded_scores_the_same(folders, tmp_path):
    model, collator = patched("mistral", mode="isolated")
    expected = scores_of(model, collator)
    offloaded = transformers.AutoModelForCausalLM.from_pretrained(
        folders[0], device_map=places("tail"), offload_folder=tmp_path, attn_implementation="sdpa"
    )
    spare = offloaded.get_input_embeddings().weight.shape[0]
    assert offloaded.model.norm.weight.is_meta
    with pytest.raises(
        ValueError, match=r"the separator .* embedding, which is offloaded: .*device_map \('cpu' will do\)"
    ):
        yojo.patch(offloaded, tiny.tokenizer(), mode="isolated", head_dim=16)  # the output embedding must grow, too
    assert spare == tiny.VOCABULARY and not hasattr(offloaded, "yojo")
    offloaded = transformers.AutoModelForCausalLM.from_pretrained(
        folders[0],
        device_map=places("tail") | {"lm_head": "cpu"},
        offload_folder=tmp_path,
        attn_implementation="sdpa",
    )
    yojo.patch(offloaded, tiny.tokenizer(), mode="isolated", head_dim=16)
    assert {parameter.device.type for parameter in offloaded.score.parameters()} == {"cpu"}
    offloaded.score.load_state_dict(model.score.state_dict())
    assert (scores_of(offloaded, collator) - expected).abs().max() <= PARITY


@pytest.mark.parametrize("part", OFFLOADED)
def test_saved_reward_models_load_offloaded(folders, tmp_path, part):
    expected = yojo.RewardModel.from_pretrained(folders[1])
    found = yojo.RewardModel.from_pretrained(folders[1], device_map=places(part), offload_folder=tmp_path)
    assert any(parameter.is_meta for parameter in found.model.parameters())
    assert (scores_of(found.model, found.collator) - scores_of(expected.model, expected.collator)).abs().max() <= PARITY
    out = tmp_path / "out"
    with pytest.raises(
        ValueError, match="are offloaded and cannot be saved from the model: load it without offloading"
    ):
        found.save_pretrained(out, card=False)
    assert not out.exists()


def test_a_separator_that_is_not_the_offloaded_one_is_refused(folders, tmp_path):
    """The row of the head's file must be in the weights already: it cannot be written into them."""
    from safetensors.torch import load_file

    from yojo.saving.load import load_head

    found = yojo.RewardModel.from_pretrained(folders[1], device_map=places("head"), offload_folder=tmp_path)
    file = folders[1] / "score_head.safetensors"
    head = load_file(file)
    load_head(found.model, head, file)
    head["separator_embedding"] = head["separator_embedding"] + 1
    with pytest.raises(
        ValueError, match="the separator's embedding must be written into the model's, which is offloaded"
    ):
        load_head(found.model, head, file)


def test_weights_that_nobody_brings_are_named():
    model = tiny.build("mistral")
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(
        ValueError, match=r"weights of model\.layers\.1\.mlp\.gate_proj, .* are on the meta device, and no hook"
    ):
        yojo.patch(model, tiny.tokenizer(), head_dim=16)
    with torch.device("meta"):
        empty = transformers.MistralForCausalLM(tiny.build("mistral").config)
    collator = patched("mistral", mode="isolated")[1]
    yojo.patch(empty, tiny.tokenizer(), mode="isolated", head_dim=16)
    with pytest.raises(ValueError, match="is on the meta device: it has no weights to score with"):
        scores_of(empty, collator)

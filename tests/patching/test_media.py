"""Vision features placed by rows: the same as the model's own way, to the bit."""

import copy
import inspect
import pickle

import pytest
import tiny
import torch
from family_cases import FAMILIES, batch_of, gradients, patched, rows_of, samples_of

import yojo
from yojo.families import Family, family_of
from yojo.patching import media
from yojo.patching.media import Placeholders

WITH_IMAGES = [family for family in FAMILIES if family in tiny.LACKING or "image" in tiny.prompts(family)]

parametrize_families = pytest.mark.parametrize("family", WITH_IMAGES)


def own_way(model, batch):
    """The batch from which the model finds placeholders itself."""
    return media.whole(batch, family_of(model.config))


class Calls:
    """What the backbone was called with; a context. Watching by a hook would have the model find placeholders itself."""

    def __init__(self, monkeypatch, model):
        self.seen = []
        stock = type(model.base_model).forward

        def forward(module, *args, **kwargs):
            self.seen.append(kwargs)
            return stock(module, *args, **kwargs)

        monkeypatch.setattr(type(model.base_model), "forward", forward)


# ---- the same ----


@parametrize_families
def test_scores_and_gradients_are_those_of_the_models_own_way(family):
    model, collator = patched(family, mode="isolated")
    for names in [[name] for name in samples_of(family)] + rows_of(family):
        batch = batch_of(family, collator, names)
        assert ("placeholders" in batch) == any(name.startswith("pixel_values") for name in batch)
        with torch.no_grad():
            assert torch.equal(model(**batch).scores, model(**own_way(model, batch)).scores), names
    placed, found = gradients(model, batch), gradients(model, own_way(model, batch))
    assert placed.keys() == found.keys() and any("vis" in name for name in placed)
    for name, gradient in placed.items():
        assert (gradient - found[name]).abs().max() <= 1e-6 * found[name].abs().max() + 1e-7, name


@parametrize_families
def test_the_rows_are_those_of_the_placeholders(family):
    model, collator = patched(family)
    for names in rows_of(family):
        batch = batch_of(family, collator, names)
        found, ids = batch["placeholders"], batch["input_ids"][0]
        assert set(found.rows) <= {"image", "video"} and found.rows
        for kind, rows in found.rows.items():
            token = tiny.VIDEO if kind == "video" and family != "molmo2" else tiny.IMAGE
            assert torch.equal(rows, (ids == token).nonzero()[:, 0])


@parametrize_families
@torch.no_grad()
def test_the_backbone_gets_embeddings(family, monkeypatch):
    """The parity above is not that of one way with itself."""
    model, collator = patched(family)
    batch = batch_of(family, collator, ["image"])
    calls = Calls(monkeypatch, model)
    decoder = []
    handle = model.get_decoder().register_forward_pre_hook(
        lambda module, args, kwargs: decoder.append(kwargs), with_kwargs=True
    )
    model(**batch)
    handle.remove()
    (inputs,) = decoder
    assert inputs.get("input_ids") is None and inputs["inputs_embeds"].shape[1] == batch["layout"].num_tokens
    assert all("input_ids" not in call and "pixel_values" not in call for call in calls.seen)
    model(**own_way(model, batch))
    assert "input_ids" in calls.seen[-1] and "pixel_values" in calls.seen[-1]


@parametrize_families
@torch.no_grad()
def test_an_image_goes_through_the_vision_tower_once(family):
    """However many responses there are, and in however many orders."""
    model, collator = patched(family, permutations=3)
    method = model.base_model.get_image_features
    calls = []

    def watched(*args, **kwargs):
        calls.append(kwargs["pixel_values"].shape)
        return method(*args, **kwargs)

    watched.__signature__ = inspect.signature(method)
    model.base_model.get_image_features = watched
    prompt, responses = samples_of(family)["image"]
    model(**collator.pack([collator.from_processed(prompt, responses * 4)]))
    assert calls == [prompt["pixel_values"].shape]


@parametrize_families
@torch.no_grad()
def test_a_deep_copy_places_its_own(family):
    model, collator = patched(family)
    batch = batch_of(family, collator)
    expected = model(**batch).scores
    duplicate = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.zero_()
    assert torch.equal(duplicate(**batch).scores, expected)


@torch.no_grad()
def test_a_placeholder_beyond_the_embedding():
    """Gemma 3's and PaliGemma's image tokens may have an id that the embedding lacks."""
    for family in ("gemma3", "paligemma"):
        model, collator = patched(family)
        batch = batch_of(family, collator, ["image", "two images"])
        expected = model(**batch).scores
        beyond = 10_000
        model.config.image_token_id = beyond
        ids = batch["input_ids"]
        batch["input_ids"] = torch.where(ids == tiny.IMAGE, beyond, ids)
        assert torch.equal(model(**batch).scores, expected)


@torch.no_grad()
@pytest.mark.parametrize("names", rows_of("molmo2"), ids="-".join)
def test_a_placeholder_beyond_the_vocabulary_but_within_the_embedding(names):
    """Molmo2's released checkpoints have theirs in the additional rows, and features are added to what stands there."""
    model, collator = patched("molmo2")
    batch = batch_of("molmo2", collator, names)
    token = tiny.VOCABULARY + 3
    assert model.config.text_config.vocab_size <= token < model.get_input_embeddings().weight.shape[0]
    model.config.image_token_id = token
    batch["input_ids"] = torch.where(batch["input_ids"] == tiny.IMAGE, token, batch["input_ids"])
    assert torch.equal(model(**batch).scores, model(**own_way(model, batch)).scores)


# ---- vision towers ----


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_grids_stay_on_the_cpu_and_indices_travel(family):
    model, collator = patched(family)
    found = batch_of(family, collator)["placeholders"]
    moved = found.to("meta")
    assert all(tensor.device.type == "meta" for tensor in (*moved.rows.values(), *moved.indices.values()))
    assert moved.sizes is found.sizes
    assert {"image_grid_thw", "image_cu_seqlens", "image_max_seqlen", "video_cu_seqlens"} <= set(found.sizes)
    assert {"image_position_ids", "video_position_ids"} <= set(found.indices)
    assert all(not isinstance(value, torch.Tensor) or value.numel() < 100 for value in found.sizes.values())


@torch.no_grad()
def test_with_an_older_transformers_the_model_places_its_features_itself(monkeypatch):
    model, collator = patched("qwen3_vl")
    expected = model(**batch_of("qwen3_vl", collator)).scores
    stock = type(model.base_model).forward

    def forward(self, input_ids=None, pixel_values=None, **kwargs):
        return stock(self, input_ids=input_ids, pixel_values=pixel_values, **kwargs)

    monkeypatch.setattr(type(model.base_model), "forward", forward)
    batch = batch_of("qwen3_vl", yojo.Collator(tiny.tokenizer(with_separator=True), model))
    assert "placeholders" not in batch
    assert torch.equal(model(**batch).scores, expected)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
@torch.no_grad()
def test_flash_attention_gets_its_boundaries_on_the_device(family, monkeypatch):
    model, collator = patched(family)
    batch = batch_of(family, collator, ["image"])
    sent = []
    stock = torch.Tensor.to

    def to(self, *args, **kwargs):
        sent.append((self.data_ptr(), kwargs.get("non_blocking")))
        return stock(self, *args, **kwargs)

    boundaries = [v for name, v in batch["placeholders"].sizes.items() if name.startswith("image_cu_")]
    monkeypatch.setattr(media, "_is_flash", lambda config: True)
    monkeypatch.setattr(torch.Tensor, "to", to)
    model(**batch)
    assert boundaries and all((tensor.data_ptr(), True) in sent for tensor in boundaries)


# ---- where it does not act ----


@torch.no_grad()
def test_hooks_on_the_backbone_see_images(monkeypatch):
    model, collator = patched("qwen3_vl")
    batch = batch_of("qwen3_vl", collator, ["image"])
    expected = model(**batch).scores
    seen = []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(set(kwargs)), with_kwargs=True
    )
    assert torch.equal(model(**batch).scores, expected)
    handle.remove()
    assert {"input_ids", "pixel_values"} <= seen[0]
    assert not media.is_watched(model)
    model.base_model._hf_hook = object()
    assert media.is_watched(model)


def test_a_family_that_is_not_listed_places_its_features_itself():
    model, collator = patched("qwen3_vl")
    assert media.can_place(model, collator.family)
    assert not media.can_place(model, Family("other", ("other",)))


def test_unpatch_gives_the_decoder_its_method_back():
    model, _ = patched("qwen3_vl")
    decoder = model.get_decoder()
    assert decoder._deepstack_process.args == (decoder,) and "_deepstack_process" in decoder.__dict__
    yojo.unpatch(model)
    assert "_deepstack_process" not in decoder.__dict__


# ---- errors, and the batch ----


@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "molmo2", "llava_onevision"])
@torch.no_grad()
def test_pixels_of_another_prompt_are_an_error(family):
    model, collator = patched(family)
    batch = batch_of(family, collator, ["image"])
    found = batch["placeholders"]
    batch["placeholders"] = Placeholders({"image": found.rows["image"][:-1]}, found.indices, found.sizes)
    with pytest.raises(ValueError, match=r"the row has \d+ placeholders of images, and \d+ image features were made"):
        model(**batch)


def test_placeholders_pickle_and_pin(monkeypatch):
    model, collator = patched("qwen3_vl")
    found = batch_of("qwen3_vl", collator)["placeholders"]
    again = pickle.loads(pickle.dumps(found))
    assert torch.equal(again.rows["image"], found.rows["image"]) and again.sizes.keys() == found.sizes.keys()
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self)
    found.pin_memory()
    assert len(pinned) == len(found.rows) + len(found.indices)

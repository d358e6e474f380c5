"""A picture that several prompts of a row have is seen by the vision tower once, and changes nobody's score."""

import collections
import pickle

import numpy as np
import pytest
import real_processors
import tiny
import torch
from family_cases import FAMILIES, PARITY, batch_of, close, gradients, patched, rows_of, samples_of, score
from PIL import Image

import yojo
from yojo.costs.flops import batch_flops
from yojo.families.family import PIXELS
from yojo.patching import media, sharing

WITH_IMAGES = [family for family in FAMILIES if family in tiny.LACKING or "image" in tiny.prompts(family)]
WHOLE_PROMPTS = ("llava_onevision",)
REAL = [family for family in real_processors.FAMILIES if not family.endswith("(text)")]

parametrize_families = pytest.mark.parametrize("family", WITH_IMAGES)


def other_words(prompt, seed):
    """The same prompt with copies of its tensors and another word at its end."""
    made = {name: tensor.clone() for name, tensor in prompt.items()}
    made["input_ids"][0, -1] = tiny.words(1, seed)[0]
    return made


def again(family, names):
    """The family's samples of these names; each a second time with other words and other responses, in between."""
    samples = [samples_of(family)[name] for name in names]
    twins = [(other_words(prompt, i), tiny.responses(50 + i, (2, 4))) for i, (prompt, _) in enumerate(samples)]
    return samples + twins[::-1]


def one_picture(family, model, collator, name, place):
    """A sample with one picture alone of a prompt that has several."""
    prompt = samples_of(family)[name][0]
    tensors = {key: value for key, value in prompt.items() if key not in ("input_ids", "attention_mask")}
    types = [key for key in tensors if key.endswith("token_type_ids")]
    tensors = {key: value.clone() for key, value in tensors.items() if key not in types}
    picture, count = collator.family.pictures(tensors, "image", model.config)[place]
    ids = [*[tiny.IMAGE] * count, tiny.BOS, *tiny.words(3, 70 + place)]
    made = {"input_ids": torch.tensor([ids]), "attention_mask": torch.ones(1, len(ids), dtype=torch.int64), **picture}
    marked = 0 if family.startswith("paligemma") else 1
    made |= {key: torch.tensor([[marked * (token == tiny.IMAGE) for token in ids]]) for key in types}
    return made, tiny.responses(80 + place, (3, 1))


class Tower:
    """Counts entries (patches, tiles, crops, images) that reach a model's vision tower; a context."""

    def __init__(self, model):
        decoder = set(model.get_decoder().modules())
        parts = [module for module in model.base_model.modules() if module not in decoder]
        kinds = (torch.nn.Linear, torch.nn.Conv2d, torch.nn.Conv3d)
        self.first = next(module for module in parts if isinstance(module, kinds))
        self.seen = 0

    def __enter__(self):
        self.hook = self.first.register_forward_hook(self._count)
        return self

    def _count(self, module, inputs, output):
        self.seen += output.shape[0]

    def __exit__(self, *_):
        self.hook.remove()


def packed(collator, samples, share=True, ranked=False):
    encoded = [
        collator.from_processed(
            prompt, responses, rankings=list(range(1, len(responses) + 1)) if ranked else None, name=str(place)
        )
        for place, (prompt, responses) in enumerate(samples)
    ]
    return collator.pack(encoded, share=share)


@torch.no_grad()
def seen_by_tower(model, batch):
    with Tower(model) as tower:
        model(**batch)
    return tower.seen


def entries(collator, batch):
    """Entries of a batch's pixels."""
    return sum(batch[name].shape[collator.family.join.get(name, 0)] for name in PIXELS.values() if name in batch)


# ---- every family ----


@parametrize_families
@pytest.mark.parametrize("mode", ["isolated", "comparative"])
@torch.no_grad()
def test_scores_are_those_of_each_alone(family, mode):
    model, collator = patched(family, mode=mode)
    for names in rows_of(family):
        samples = again(family, names)
        for scores, sample in zip(score(model, collator, samples), samples, strict=True):
            (alone,) = score(model, collator, [sample])
            assert (scores - alone).abs().max() <= PARITY


@parametrize_families
@torch.no_grad()
def test_the_tower_sees_a_picture_once(family):
    model, collator = patched(family)
    for names in rows_of(family):
        once = list(dict.fromkeys(names))
        single = packed(collator, [samples_of(family)[name] for name in once], share=False)
        twice = packed(collator, again(family, once))
        assert twice["placeholders"].shared is not None and single["placeholders"].shared is None
        assert seen_by_tower(model, twice) == seen_by_tower(model, single) > 0
        assert entries(collator, twice) == entries(collator, single)
        assert entries(collator, packed(collator, again(family, once), share=False)) == 2 * entries(collator, single)


@pytest.mark.parametrize("family", [family for family in WITH_IMAGES if family not in WHOLE_PROMPTS])
@torch.no_grad()
def test_a_picture_among_others_is_shared_alone(family):
    model, collator = patched(family)
    several = samples_of(family)["two images"]
    pictures = [one_picture(family, model, collator, "two images", place) for place in (1, 0)]
    row = [pictures[0], several, pictures[1], samples_of(family)["image"]]
    batch = packed(collator, row)
    whole = packed(collator, [several, samples_of(family)["image"]])
    assert entries(collator, batch) == entries(collator, whole)
    assert seen_by_tower(model, batch) == seen_by_tower(model, whole)
    for scores, sample in zip(score(model, collator, row), row, strict=True):
        (alone,) = score(model, collator, [sample])
        assert (scores - alone).abs().max() <= PARITY


@parametrize_families
def test_gradients_are_those_without_sharing(family):
    model, collator = patched(family)
    samples = again(family, rows_of(family)[0])
    shared, apart = (gradients(model, packed(collator, samples, share, ranked=True)) for share in (True, False))
    assert any("vis" in name for name in shared)
    close(shared, apart)


def test_gradients_below_a_frozen_tower():
    model, collator = patched("qwen3_vl")
    model.base_model.visual.requires_grad_(False)
    model.base_model.visual.merger.requires_grad_(True)
    samples = again("qwen3_vl", rows_of("qwen3_vl")[0])
    shared, apart = (gradients(model, packed(collator, samples, share, ranked=True)) for share in (True, False))
    assert any("merger" in name for name in shared) and not any("visual.blocks" in name for name in shared)
    close(shared, apart)


@parametrize_families
@torch.no_grad()
def test_a_row_without_a_picture_twice_is_as_before(family):
    model, collator = patched(family)
    for names in rows_of(family):
        names = list(dict.fromkeys(names))
        batch = batch_of(family, collator, names)
        assert batch["placeholders"].shared is None
        apart = packed(collator, [samples_of(family)[name] for name in names], share=False)
        for name in apart:
            if isinstance(apart[name], torch.Tensor):
                assert torch.equal(batch[name], apart[name]), name


# ---- where the model places features itself ----


def watched(model, batch):
    """Scores of a model whose backbone has a hook, and what that saw."""
    seen = []
    handle = model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    scores = model(**batch).scores
    handle.remove()
    return scores, seen[-1]


@parametrize_families
@torch.no_grad()
def test_whole_gives_every_picture_back(family):
    """To a model that is watched, to one of transformers', and for counting single passes."""
    model, collator = patched(family)
    for names in rows_of(family):
        samples = again(family, names)
        batch, apart = packed(collator, samples), packed(collator, samples, share=False)
        whole = media.whole(batch, collator.family)
        assert whole.keys() == apart.keys() - {"placeholders"}
        for name in whole:
            if isinstance(whole[name], torch.Tensor):
                assert torch.equal(whole[name], apart[name]), name
        expected = model(**batch).scores
        scores, seen = watched(model, batch)
        assert "placeholders" not in seen
        assert all(torch.equal(seen[name], apart[name]) for name in PIXELS.values() if name in apart)
        there = expected.isfinite()
        assert (scores - expected)[there].abs().max() <= PARITY


@torch.no_grad()
def test_a_batch_without_its_placeholders_is_refused():
    """It lacks pictures: nothing may be scored with those of another prompt."""
    model, collator = patched("qwen3_vl")
    batch = packed(collator, again("qwen3_vl", ["image"]))
    del batch["placeholders"]
    with pytest.raises(ValueError, match="do not match"):
        model(**batch)


@torch.no_grad()
def test_where_features_are_not_placed_nothing_is_shared(monkeypatch):
    model, collator = patched("qwen3_vl")
    collator.places_features = False
    batch = packed(collator, again("qwen3_vl", ["image"]))
    assert "placeholders" not in batch and batch["image_grid_thw"].shape[0] == 2


def test_tensors_on_a_device_are_not_compared():
    model, collator = patched("qwen3_vl")
    samples = again("qwen3_vl", ["image"])
    for prompt, _ in samples:
        prompt["pixel_values"] = prompt["pixel_values"].to("meta")
    batch = packed(collator, samples)
    assert batch["placeholders"].shared is None and batch["image_grid_thw"].shape[0] == 2


def test_flops_are_those_of_what_is_run():
    model, collator = patched("qwen3_vl", mode="isolated")
    one = samples_of("qwen3_vl")["image"]
    batches = [packed(collator, samples) for samples in ([one], again("qwen3_vl", ["image"]))]
    alone, twice = (batch_flops(model, batch).vision for batch in batches)
    assert alone == twice > 0
    handle = model.base_model.register_forward_hook(lambda *_: None)
    assert batch_flops(model, batches[1]).vision == 2 * alone
    handle.remove()
    assert batch_flops(model, batches[1]).vision == alone
    # Single passes of a prompt that shows an image twice.
    prompt = {name: tensor.clone() for name, tensor in samples_of("qwen3_vl")["two images"][0].items()}
    (first, count), _ = collator.family.pictures(
        {name: prompt[name] for name in ("pixel_values", "image_grid_thw")}, "image", model.config
    )
    ids = [*[tiny.START, *[tiny.IMAGE] * count, tiny.END] * 2, *tiny.words(2, 1)]
    prompt = {name: torch.cat([tensor, tensor]) for name, tensor in first.items()}
    prompt["input_ids"] = torch.tensor([ids])
    prompt["mm_token_type_ids"] = (prompt["input_ids"] == tiny.IMAGE).long()
    batch = packed(collator, [(prompt, [[20], [21], [22]])])
    assert batch["image_grid_thw"].shape[0] == 1
    assert batch_flops(model, batch, single=True).vision == 3 * 2 * batch_flops(model, batch).vision


def test_what_is_shared_travels(monkeypatch):
    model, collator = patched("qwen3_vl")
    found = packed(collator, again("qwen3_vl", ["image", "video"]))["placeholders"]
    loaded = pickle.loads(pickle.dumps(found))
    assert torch.equal(loaded.shared.features["image"], found.shared.features["image"])
    moved = found.to("meta")
    assert all(tensor.device.type == "meta" for tensor in moved.shared.features.values())
    assert moved.shared.order is found.shared.order
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda self, *_: pinned.append(self) or self)
    found.pin_memory()
    assert len(pinned) == len(found.rows) + len(found.indices) + len(found.shared.features)


@torch.no_grad()
@pytest.mark.soak
def test_compiled():
    model, collator = patched("qwen3_vl")
    rows = [packed(collator, again("qwen3_vl", names)) for names in (["image"], ["two images"])]
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager")
    for batch in rows:
        expected = model(**batch).scores
        assert (compiled(**batch).scores - expected)[expected.isfinite()].abs().max() <= PARITY


# ---- what is the same picture ----


@pytest.mark.parametrize("family", ["qwen3_vl", "llava_onevision", "molmo2", "smolvlm", "mistral3", "gemma3"])
@torch.no_grad()
def test_any_entry_tells_pictures_apart(family):
    """Also one that the first look does not compare."""
    model, collator = patched(family)
    sample = samples_of(family)["image"]
    for at in (0, 1, 37, -2, -1):
        other = other_words(sample[0], 3)
        other["pixel_values"].view(-1)[at] += 1e-3
        if family == "molmo2" or other["pixel_values"].view(-1)[at] != 1e-3:  # not what is padding
            batch = packed(collator, [sample, (other, sample[1])])
            assert batch["placeholders"].shared is None, at


@torch.no_grad()
def test_a_mask_or_a_size_tells_pictures_apart():
    for family, name, at in (("smolvlm", "pixel_attention_mask", 0), ("llava_onevision", "image_sizes", 0)):
        model, collator = patched(family)
        sample = samples_of(family)["image"]
        other = other_words(sample[0], 3)
        other[name].view(-1)[at] = 1 - other[name].view(-1)[at] if "mask" in name else 15
        batch = packed(collator, [sample, (other, sample[1])])
        assert batch["placeholders"].shared is None, family


def test_one_feature_alone_is_not_left_over():
    """transformers drops a dimension of one feature of Mistral 3, and then fails."""
    model, collator = patched("mistral3")
    pixels = torch.randn(1, 3, 8, 8).expand(2, -1, -1, -1).clone()
    ids = torch.tensor([[tiny.BOS, tiny.IMAGE, tiny.END, tiny.IMAGE, tiny.END, 30]])
    prompt = {"input_ids": ids, "pixel_values": pixels, "image_sizes": torch.tensor([[8, 8], [8, 8]])}
    batch = packed(collator, [(prompt, [[40, 41]])])
    assert batch["placeholders"].shared is None and batch["pixel_values"].shape[0] == 2
    assert model(**batch).scores.isfinite().all()
    batch = packed(collator, [(prompt, [[40, 41]]), samples_of("mistral3")["image"]])
    assert batch["pixel_values"].shape[0] == 2  # of three
    assert model(**batch).scores[0, 0].isfinite()


def test_prompts_that_do_not_fit_their_pixels_are_left_to_the_model():
    model, collator = patched("llava_onevision")
    prompt, responses = samples_of("llava_onevision")["image"]
    short = {**prompt, "input_ids": prompt["input_ids"][:, 5:], "attention_mask": prompt["attention_mask"][:, 5:]}
    with pytest.raises(ValueError, match="placeholders"):
        model(**packed(collator, [(prompt, responses), (short, responses)]))


def test_pictures_that_do_not_fit_the_places_are_left_to_the_model():
    model, collator = patched("qwen3_vl")
    prompt = samples_of("qwen3_vl")["image"][0]
    vision = [{name: prompt[name] for name in ("pixel_values", "image_grid_thw")}] * 2
    ids = prompt["input_ids"][0]
    assert sharing.share(vision, [ids, ids], collator.family, model.config)[1] is not None
    for fewer in ([ids, ids[ids != tiny.IMAGE]], [ids[:6], ids[:6]]):
        assert sharing.share(vision, fewer, collator.family, model.config) == (vision, None)


@torch.no_grad()
def test_an_image_is_the_same_however_it_is_filled_up():
    """Mistral 3: to the largest of its prompt."""
    model, collator = patched("mistral3")
    both, responses = samples_of("mistral3")["two images"]
    pixels, size = both["pixel_values"][1:, :, :16, :8].clone(), both["image_sizes"][1:]
    ids = torch.tensor([[tiny.BOS, 20, tiny.IMAGE, tiny.BREAK, tiny.IMAGE, tiny.END, 21]])
    alone = {"input_ids": ids, "pixel_values": pixels, "image_sizes": size}
    row = [(alone, responses[:1]), (both, responses)]
    assert packed(collator, row)["pixel_values"].shape[0] == 2
    for scores, sample in zip(score(model, collator, row), row, strict=True):
        assert (scores - score(model, collator, [sample])[0]).abs().max() <= PARITY


@pytest.mark.parametrize("family", ["smolvlm", "idefics3"])
@torch.no_grad()
def test_tiles_of_padding_have_no_features(family):
    model, collator = patched(family)
    prompt, responses = samples_of(family)["two images"]
    prompt = {**prompt, "pixel_values": prompt["pixel_values"].clone()}
    prompt["pixel_values"][0, 1] = 0
    places = (prompt["input_ids"][0] == tiny.IMAGE).nonzero()[:4, 0]
    keep = torch.ones(prompt["input_ids"].shape[1], dtype=torch.bool)
    keep[places] = False
    padded = prompt | {name: prompt[name][:, keep] for name in ("input_ids", "attention_mask")}
    faint = {**padded, "pixel_values": padded["pixel_values"].clone()}
    row = [(padded, responses), samples_of(family)["image"], (faint, responses[:2])]
    batch = packed(collator, row)
    assert batch["pixel_values"].shape[1] == 3 + 1
    for scores, sample in zip(score(model, collator, row), row, strict=True):
        assert (scores - score(model, collator, [sample])[0]).abs().max() <= PARITY
    # Nothing where one looks first, and yet no padding.
    tile = torch.zeros(1, 1, 3, 64, 64)
    tile[..., 33, 34] = 1
    assert collator.family.pictures({"pixel_values": tile}, "image", model.config)[0][1] > 0
    assert collator.family.pictures({"pixel_values": 0 * tile}, "image", model.config)[0][1] == 0


def test_tables_that_reach_into_another_picture_are_taken_whole():
    model, collator = patched("molmo2")
    prompt, responses = samples_of("molmo2")["two images"]
    tensors = {name: prompt[name].clone() for name in prompt if name.startswith(("pixel", "image"))}
    assert len(collator.family.pictures(dict(tensors), "image", model.config)) == 2
    tensors["image_token_pooling"][0, 0] = 16 * 4
    assert collator.family.pictures(tensors, "image", model.config) is None
    odd = {**prompt, "image_token_pooling": tensors["image_token_pooling"]}
    row = [(odd, responses), samples_of("molmo2")["image"], (other_words(odd, 1), responses)]
    batch = packed(collator, row)
    assert batch["pixel_values"].shape[0] == 5 + 2
    with torch.no_grad():
        for scores, sample in zip(score(model, collator, row), row, strict=True):
            assert (scores - score(model, collator, [sample])[0]).abs().max() <= PARITY


# ---- files, through the families' own processors ----


@pytest.mark.parametrize("family", REAL)
@torch.no_grad()
def test_what_is_shown_counts_and_not_where_it_lies(family, tmp_path):
    pytest.importorskip("torchvision")
    made = real_processors.reward_model(family, "isolated")[0]
    picture, other = real_processors.image(24, 24, 1), real_processors.image(24, 24, 2)
    pixel = np.asarray(picture).copy()
    pixel[13, 11, 1] ^= 0x80
    for name in ("one.png", "again.png", "other bytes.bmp"):
        picture.save(tmp_path / name)
    other.save(tmp_path / "other.png")
    Image.fromarray(pixel).save(tmp_path / "pixel.png")
    shown = [["one.png"], ["other.png"], ["again.png"], ["other bytes.bmp"], ["pixel.png"], ["other.png", "one.png"]]
    if family != "PaliGemma":
        shown.insert(2, [])
    examples = [
        yojo.Example(
            f"{real_processors.QUESTION} {place}", ["a cat", "two"], images=[tmp_path / name for name in names]
        )
        for place, names in enumerate(shown)
    ]
    collator = made.collator
    encoded = [collator.encode(example) for example in examples]
    batch = collator.pack(encoded)
    sizes = [entries(collator, collator.pack([item])) for item in encoded if item.vision]
    both = sizes.pop()  # in LLaVA-OneVision images that are not alone are not cut into tiles
    different = sizes[0] + sizes[1] + sizes[-1] + (both if family == "LLaVA-OneVision" else 0)
    if family in ("SmolVLM", "Idefics 3", "InternVL"):  # a tile that the pixel is not in is shared
        assert sizes[0] + sizes[1] < entries(collator, batch) <= different
    else:
        assert entries(collator, batch) == different
    with Tower(made.model) as tower:
        scores = made.score_many(examples)
    assert tower.seen > 0
    alone = [made.score_many([example])[0] for example in examples]
    for together, own in zip(scores, alone, strict=True):
        assert (together - own).abs().max() <= PARITY * max(1.0, float(own.abs().max()))
    # The same path with another picture in it is another picture.
    other.save(tmp_path / "one.png")
    late = collator.encode(examples[0])
    assert collator.pack([encoded[0], late])["placeholders"].shared is None
    assert collator.pack([encoded[1], late])["placeholders"].shared is not None
    assert (made.score_many(examples[:1])[0] - alone[0]).abs().max() > 1e-4


def test_a_first_look_costs_little(monkeypatch):
    """Tensors are compared where they look alike, and not pair by pair."""
    compared = collections.Counter()
    stock = torch.equal
    monkeypatch.setattr(torch, "equal", lambda *pair: compared.update(["pairs"]) or stock(*pair))
    pictures = [({"pixel_values": torch.randn(1, 3, 16, 16)}, 4) for _ in range(50)]
    different, places = sharing._different(pictures + pictures[:3])
    assert len(different) == 50 and places == [*range(50), 0, 1, 2] and compared["pairs"] == 3

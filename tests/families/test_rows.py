"""Each family's row says all that is asked of it, a row is all it takes, and the documents' tables are current."""

import dataclasses
import importlib.util
import pickle
import pkgutil
import re
from pathlib import Path

import pytest
import tiny
import torch
from family_cases import parametrize_families, patched, rows_of, samples_of, score

from yojo import families
from yojo.costs import vision
from yojo.costs.flops import batch_flops
from yojo.families.family import PIXELS
from yojo.inputs import features
from yojo.patching import probe
from yojo.patching.joining import join_vision
from yojo.patching.layers import ACTIVATIONS, ATTENTIONS, MLPS, NORMS

ROOT = Path(__file__).parents[2]
WITH_IMAGES = [family for family, (_, prompts) in tiny.FAMILIES.items() if prompts is not tiny._text_prompts]


@pytest.fixture(scope="module")
def docs():
    """The module docs/families.py."""
    spec = importlib.util.spec_from_file_location("docs_families", ROOT / "docs" / "families.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- every row ----


@parametrize_families
def test_the_row_is_complete(family):
    model = tiny.build(family)
    config, decoder = model.config, model.get_decoder()
    assert families.decoder_of(decoder.config) is not None
    row = families.family_of(config)
    if not families.is_known(config):
        assert (
            family == "mistral"
        )  # probed as any text model is: the tests of probing need one that is tested and unlisted
        return
    assert decoder.config.model_type in row.decoders
    assert ("image" in row.takes) == (row.tower is not None) == (row.features is not None) == (family in WITH_IMAGES)
    assert (row.count is not None) != bool(row.uncounted) if row.takes else row.count is None
    if row.blocks is not None:
        assert row.blocks.says
    assert pickle.loads(pickle.dumps(row)) == row


# Shapes of two prompts' tensors as their processors make them, and of what stands in one row.
FILLED = {
    "mistral3": {"pixel_values": ((1, 3, 56, 28), (2, 3, 28, 84), (3, 3, 56, 84))},
    "llava_onevision": {"pixel_values": ((1, 3, 3, 14, 14), (1, 5, 3, 14, 14), (2, 5, 3, 14, 14))},
}


def test_images_of_other_sizes_stand_in_one_row():
    rows = {row.model_types[0]: row for row in families.FAMILIES if row.padded}
    assert {name: row.padded.keys() for name, row in rows.items()} == {n: shapes.keys() for n, shapes in FILLED.items()}
    for name, row in rows.items():
        for tensor, (first, second, both) in FILLED[name].items():
            joined = join_vision([{tensor: torch.ones(first)}, {tensor: torch.ones(second)}], row)[tensor]
            assert joined.shape == both and joined.sum() == torch.ones(first).sum() + torch.ones(second).sum()
            assert joined[0][tuple(slice(size) for size in first[1:])].all()  # what is filled up lies behind


@pytest.mark.parametrize("family", WITH_IMAGES)
def test_its_images_are_counted(family):
    config = tiny.build(family).config
    row = families.family_of(config)
    for name, prompt in tiny.prompts(family).items():
        rows, has_pixels = vision.rows_of_tensors(config, prompt), any(key in prompt for key in PIXELS.values())
        assert (rows is not None) == has_pixels
        if not has_pixels:
            continue
        assert min(rows.pixels, rows.patches, rows.merged, rows.frame_pairs) > 0
        assert (rows.window_pairs > 0) == (row.tower.windows is not None)
        features.check(prompt, row, config)
        if row.count is not None:
            made = row.count(prompt, config)
            assert sum(made.values()) > 0 and set(made) <= {"image", "video"}, name
            less = prompt | {"input_ids": torch.full_like(prompt["input_ids"], tiny.BOS)}
            with pytest.raises(ValueError, match="places for vision features"):
                features.check(less, row, config)


@parametrize_families
def test_its_blocks_have_the_sizes_that_are_counted(family):
    row = families.family_of(tiny.build(family).config)
    for prompt in tiny.prompts(family).values() if row.blocks is not None else ():
        ids = row.blocks.ids(prompt)
        counts = ids[ids >= 0].unique(return_counts=True)[1].tolist()
        length = prompt["input_ids"].shape[1]
        sizes = row.blocks.sizes(length, counts)
        assert list(sizes) == (counts if counts or row.blocks.whole_prompt else list(row.blocks.sizes(length, [])))


@parametrize_families
def test_its_layers_are_made_of_what_its_decoder_names(family):
    decoder = tiny.build(family).get_decoder()
    row = families.decoder_of(decoder.config)
    for layer in decoder.layers:
        names = {type(module).__name__ for module in layer.modules()}
        norms, attentions = ({n for n in names if n.endswith(end)} for end in ("Norm", "Attention"))
        assert not row.norms or norms <= NORMS.keys()
        assert not row.attentions or attentions <= ATTENTIONS
        if row.mlps:
            assert type(layer.mlp).__name__ in MLPS and type(layer.mlp.act_fn).__name__ in ACTIVATIONS


def test_every_file_is_listed_and_no_model_type_twice():
    files = {info.name for info in pkgutil.iter_modules(families.__path__)} - {"family"}
    assert {file.__name__.rpartition(".")[2] for file in families._FILES} == files
    types = [name for family in families.FAMILIES for name in family.model_types]
    decoders = [decoder.model_type for decoder in families.DECODERS]
    assert len(set(types)) == len(types) and len(set(decoders)) == len(decoders)
    assert {name for family in families.FAMILIES for name in family.decoders} <= set(decoders)
    towers = [name for family in families.FAMILIES if family.tower for name in family.tower.also]
    assert not set(towers) & set(types)


def test_a_model_with_a_tower_that_is_described_is_no_family_for_it():
    for row in families.FAMILIES:
        for name in () if row.tower is None else row.tower.also:
            config = type("Config", (), {"model_type": name})
            assert families.tower_of(config) is row.tower and not families.is_known(config)
            assert families.family_of(config) == families.Family(name, (name,))


# ---- a row is all it takes ----


@pytest.mark.parametrize("family", WITH_IMAGES)
@torch.no_grad()
def test_a_made_up_family(family, monkeypatch):
    """The family's models under a name that nothing knows: with a row of its own, everything is as it was."""
    model, collator = patched(family, mode="isolated")
    samples = [samples_of(family)[name] for name in rows_of(family)[0]]
    expected = score(model, collator, samples)
    batch = collator.pack([collator.from_processed(*sample) for sample in samples])
    flops, whole = batch_flops(model, batch), model.yojo.whole_last_layer
    row = dataclasses.replace(families.family_of(model.config), name="Made up", model_types=("made_up",))

    tiny.build(family)  # with its own name; what follows copies it
    monkeypatch.setattr(type(model.config), "model_type", "made_up")
    monkeypatch.setattr(probe, "check", lambda *args: pytest.fail("probed"))
    with pytest.raises(
        (ValueError, pytest.fail.Exception), match="probed|is not known to yojo/families/|both directions"
    ):
        patched(family, mode="isolated")
    with pytest.raises(ValueError, match=r"'made_up' sees is not known to yojo/families/ \(it knows qwen2_vl, "):
        batch_flops(model, batch)

    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, row))
    model, collator = patched(family, mode="isolated")
    assert collator.family is row and model.yojo.whole_last_layer == whole
    for scores, own in zip(score(model, collator, samples), expected, strict=True):
        assert torch.equal(scores, own)
    assert batch_flops(model, batch) == flops
    pickle.loads(pickle.dumps(collator.family))


# ---- the documents ----


def test_tables_are_current(docs):
    files = docs.marked_files()
    assert ROOT / "docs" / "families.md" in files
    for path in files:
        assert docs.with_table(path.read_text()) == path.read_text(), "python docs/families.py --table writes it anew"


def test_the_table_agrees_with_what_was_measured():
    text = (ROOT / "docs" / "families.md").read_text()
    measured = text.partition("<!-- /families -->")[2]
    rows = {family.name: family for family in families.FAMILIES}
    _, _, *lines = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in re.findall(r"^\|.*\|$", measured, re.M)
    ]
    assert not rows.keys().isdisjoint(line[0] for line in lines)
    for name, image, _, video, *_ in lines[: len(lines) // 2]:
        if name in rows:
            assert ("image" in rows[name].takes) == (not image.startswith("refused"))
            assert ("video" in rows[name].takes) == (not video.startswith("refused"))

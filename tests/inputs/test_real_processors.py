"""Every family with its own processor: scores through `RewardModel` against single passes of the stock model."""

import re
from pathlib import Path

import pytest
import real_processors
import torch

pytest.importorskip("torchvision")
pytest.importorskip("av")

PARITY = 2e-6  # of the largest score, or of 1
MODES = ("isolated", "comparative")
VIDEOS = ("video file", "video file, 2 fps", "frames", "two videos", "video + image", "frames + image")
IMAGES = ("image", "two images", "wide image", "tall image", "small image", "images in turns")
BOTH = ("video + image", "frames + image")
NAMES = (*IMAGES, *VIDEOS, "text", "several turns", "system turn")
FAMILIES = list(real_processors.FAMILIES)

REFUSED = {("Molmo2", name): "takes either" for name in BOTH}
REFUSED |= {("SmolVLM", name): "its pixels make 16: the processor takes either" for name in BOTH}
REFUSED |= {("Molmo2", "system turn"): "Conversation roles must alternate"}
REFUSED |= {("Molmo2", "two videos"): "At most one video is supported"}
REFUSED |= {("Mistral 3", "small image"): r"the only image has one feature \(8 x 8 pixels\)"}
for _family in ("Gemma 3", "Idefics 3", "Mistral 3", "PaliGemma"):
    REFUSED |= {(_family, name): "the prompt has [12] videos, but .*Processor takes none" for name in VIDEOS}
REFUSED |= {
    ("PaliGemma", name): "it has no chat template" for name in ("several turns", "images in turns", "system turn")
}
REFUSED |= {("PaliGemma", "text"): "`images` are expected"}
REFUSED |= {("Qwen3 (text)", name): "a bare tokenizer was given" for name in (*IMAGES, *VIDEOS)}


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    made = real_processors.cases(tmp_path_factory.mktemp("clips"))
    assert set(made) == set(NAMES)
    return made


def scorable(family):
    return [name for name in NAMES if (family, name) not in REFUSED]


@pytest.mark.parametrize("family, name", [(family, name) for family in FAMILIES for name in scorable(family)])
def test_scores_are_those_of_single_passes(family, name, cases):
    for mode in MODES:
        wrong_ids, difference = real_processors.differences(family, mode, cases[name])
        assert wrong_ids == 0, mode
        assert difference <= PARITY, mode


@pytest.mark.parametrize("family, name", REFUSED)
def test_what_is_refused_is_refused_with_its_name(family, name, cases):
    made = real_processors.reward_model(family, "isolated")[0]
    bad = real_processors.example(cases[name], id="it")
    with pytest.raises(ValueError, match=f"^example 'it': .*{REFUSED[family, name]}"):
        made.collator.encode(bad)


@pytest.mark.parametrize("family", FAMILIES)
def test_company_changes_nothing(family, cases):
    """All that the family takes, in rows as they come."""
    names = scorable(family)
    for mode in MODES:
        made = real_processors.reward_model(family, mode)[0]
        examples = [real_processors.example(cases[name], id=name) for name in names]
        alone = [made.score_many([one])[0] for one in examples]
        for budget in (8192, 700):
            for name, ours, own in zip(names, made.score_many(examples, token_budget=budget), alone, strict=True):
                assert (ours - own).abs().max() <= PARITY * max(1.0, float(own.abs().max())), (mode, name)


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_shown_matters(family, cases):
    """Else the comparisons above would hold for a model that is blind."""
    made = real_processors.reward_model(family, "isolated")[0]
    names = scorable(family)
    scores = {name: made.score_many([real_processors.example(cases[name])])[0] for name in names}
    assert all(0.05 < score.abs().max() < 30 for score in scores.values())
    for i, name in enumerate(names):
        for other in names[:i]:
            if {name, other} <= {"video file", "video file, 2 fps"}:  # the rate may be the default
                continue
            assert (scores[name] - scores[other]).abs().max() > 1e-4, (name, other)


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "Qwen3 (text)"])
def test_another_picture_is_another_score(family):
    made = real_processors.reward_model(family, "isolated")[0]
    pictures = [real_processors.image(24, 24, seed) for seed in (1, 2)]
    first, second = (made.score("What is it?", ["a cat", "a dog"], images=[picture]) for picture in pictures)
    assert (first - second).abs().max() > 1e-3
    assert torch.equal(first, made.score("What is it?", ["a cat", "a dog"], images=pictures[:1]))


def test_a_prompt_of_other_pixels_is_refused(cases):
    """The processor's outputs of two prompts mixed up, as a user's own code may."""
    for family in [family for family in FAMILIES if family not in ("Qwen3 (text)", "LLaVA-OneVision")]:
        made, _, own = real_processors.reward_model(family, "isolated")
        one = made.collator.encode(real_processors.example(cases["image"]))
        two = made.collator.encode(real_processors.example(cases["two images"]))
        prompt = {"input_ids": one.prompt_ids[None], **{k: v[None] for k, v in one.token_types.items()}, **two.vision}
        with pytest.raises(ValueError, match="mixed: the prompt has [0-9]+ places for vision features, and its pixels"):
            made.collator.from_processed(prompt, [[5, 6]], name="mixed")
        missing = {name: value for name, value in prompt.items() if name not in two.vision}
        with pytest.raises(ValueError, match="missing: the prompt has [0-9]+ places .* its pixels make 0"):
            made.collator.from_processed(missing, [[5, 6]], name="missing")


def test_the_table_of_the_docs_has_every_family_and_input():
    text = (Path(__file__).parents[2] / "docs" / "families.md").read_text()
    text = text.partition("<!-- /families -->")[2]  # what stands before is no measurement
    found = {}
    for block in re.findall(r"((?:^\|.*\n)+)", text, re.MULTILINE):
        names, _, *rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in block.splitlines()]
        found |= {(row[0], name): cell for row in rows for name, cell in zip(names[1:], row[1:], strict=True)}
    assert set(found) == {(family, name) for family in FAMILIES for name in NAMES}
    for key, cell in found.items():
        assert cell.startswith("refused [") if key in REFUSED else float(cell) <= PARITY, (key, cell)

"""Known scores: a model that is saved scores a few examples, and whoever loads it finds the same, or is told that it does not."""

import copy
import json
import logging
import random

import numpy
import pytest
import real_processors
import saved_cases
import torch

import yojo
from yojo.converting.merge import merge
from yojo.demo import reward
from yojo.demo.backbone import BACKBONE
from yojo.files.saved import CONFIG_FILE
from yojo.inputs.digests import digest
from yojo.patching import fuse
from yojo.saving import known_scores
from yojo_kernels import segments


def description_of(path):
    return json.loads((path / CONFIG_FILE).read_text())


def taken(reward_model, **options):
    """The known scores of a model, as a folder's settings have them."""
    return {known_scores.KEY: json.loads(json.dumps(known_scores.take(reward_model, **options)))}


def names_of(description):
    return [one["name"] for one in description[known_scores.KEY]["examples"]]


@pytest.fixture()
def shipped():
    return reward.load_reward_model()


# ---- found again ----


def test_a_saved_model_gives_its_known_scores(make_reward_model, tmp_path):
    reward_model = make_reward_model(mode="comparative", permutations=2)
    reward_model.save_pretrained(tmp_path)
    stored = known_scores.describe(tmp_path)
    assert stored == description_of(tmp_path)[known_scores.KEY]
    assert (stored["rule"], stored["mode"], stored["permutations"]) == (1, "comparative", 2)
    assert (stored["dtype"], stored["left_out"]) == ("float32", {})
    text, image = stored["examples"]
    turns = text["prompt"]
    assert [turn["role"] for turn in turns] == ["user", "assistant", "user"] and not turns[0]["content"].isascii()
    examples = [
        yojo.Example(turns, text["responses"]),
        yojo.Example(image["prompt"], image["responses"], images=[known_scores.picture()]),
    ]
    for one, scores in zip((text, image), reward_model.score_many(examples), strict=True):
        kept = torch.tensor(one["scores"], dtype=torch.float64)
        assert len({len(response) for response in one["responses"]}) == 3 == len(kept)
        assert torch.equal(kept.float().double(), kept)  # float32, to the last bit
        torch.testing.assert_close(kept.float(), scores, atol=2e-6, rtol=0)
    loaded = yojo.RewardModel.from_pretrained(tmp_path)
    known = loaded.check_known_scores(tmp_path)
    assert known.ok and known.stored and known.difference <= 2e-6 < known.bound and "its known scores" in known.reason
    assert known == loaded.check_known_scores(str(tmp_path))
    assert known == known_scores.check(loaded, description_of(tmp_path))


def test_the_picture_is_the_same_everywhere():
    pixels = known_scores.picture()
    assert pixels.shape == (48, 64, 3) and pixels.dtype == numpy.uint8
    assert digest(pixels) == "4cf5a6130e21df53aa8a744f8437af4f"


@pytest.mark.parametrize("family", ["Gemma 3", "LLaVA-OneVision", "Qwen2.5-VL", "PaliGemma", "Qwen3 (text)"])
def test_models_of_real_processors_have_them(family):
    reward_model = real_processors.reward_model(family, "comparative")[0]
    description = taken(reward_model)
    expected = {"PaliGemma": ["image"], "Qwen3 (text)": ["text"]}.get(family, ["text", "image"])
    assert names_of(description) == expected
    assert sorted([*expected, *description[known_scores.KEY]["left_out"]]) == ["image", "text"]
    assert known_scores.check(reward_model, description).difference == 0


def test_a_format_without_turns_has_a_single_one(make_reward_model):
    text, image = taken(make_reward_model(format="mr2rm", pooling="last"))[known_scores.KEY]["examples"]
    assert text["prompt"] == known_scores.TURNS[-1]["content"] and image["images"] == 1


@pytest.mark.parametrize("given", [{"mode": "isolated"}, {"mode": "comparative", "permutations": 3}])
def test_they_are_scored_in_the_mode_they_were_saved_in(make_reward_model, tmp_path, given):
    make_reward_model(mode="comparative").save_pretrained(tmp_path)
    loaded = yojo.RewardModel.from_pretrained(tmp_path, max_length=5, **given)
    before = loaded.config, loaded.model.yojo.config
    known = loaded.check_known_scores(tmp_path)
    assert known.stored and known.ok and known.difference <= 2e-6
    assert (loaded.config, loaded.model.yojo.config) == before and before[0].mode == given["mode"]
    own = taken(loaded)[known_scores.KEY]
    assert (own["mode"], own["permutations"]) == (given["mode"], given.get("permutations", 1))
    assert own["examples"][1]["scores"] != known_scores.describe(tmp_path)["examples"][1]["scores"]


def test_other_implementations_stay_within_the_bound(shipped, monkeypatch):
    monkeypatch.setattr(segments, "TAKES_CPUS", False)
    known = shipped.check_known_scores(reward.REWARD_MODEL)
    assert known.ok and 0 < known.difference < known.bound


def test_another_dtype_has_its_own_bound():
    loaded = yojo.RewardModel.from_pretrained(reward.REWARD_MODEL, base_model=BACKBONE, dtype=torch.bfloat16)
    known = loaded.check_known_scores(reward.REWARD_MODEL)
    assert known.ok and known.difference > 1e-3 and "in bfloat16, stored in float32" in known.reason


def test_the_shipped_model_has_them(shipped):
    known = shipped.check_known_scores(reward.REWARD_MODEL)
    assert known.stored and known.ok, known.reason
    assert names_of(description_of(reward.REWARD_MODEL)) == ["text", "image"]


def test_an_adapter_and_what_it_is_merged_into_have_each_their_own(tmp_path):
    saved_cases.backbone().save_pretrained(tmp_path / "base")
    made = saved_cases.adapted(tmp_path / "base")
    made.save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    for name in ("adapter", "merged"):
        known = yojo.RewardModel.from_pretrained(tmp_path / name).check_known_scores(tmp_path / name)
        assert known.stored and known.ok and known.difference <= 2e-6
    of_both = [known_scores.describe(tmp_path / name)["examples"][0]["scores"] for name in ("adapter", "merged")]
    assert of_both[0] == pytest.approx(of_both[1], abs=1e-5)
    # Without its adapter the model is another one.
    known = saved_cases.moved(made.model, seed=9) and made.check_known_scores(tmp_path / "adapter")
    assert not known.ok


# ---- not found again ----


def _matrix(reward_model):
    weight = reward_model.model.get_decoder().layers[1].self_attn.v_proj.weight
    weight.copy_(weight.flip(0))


def _tower(reward_model):
    weight = reward_model.model.model.visual.merger.linear_fc2.weight
    weight.copy_(weight.flip(0))


def _head(reward_model):
    weight = reward_model.model.score.weight2
    weight.copy_(weight.flip(1))


def _separator(reward_model):
    rows = reward_model.model.get_input_embeddings().weight
    rows[reward_model.collator.separator_id] = rows[100]


def _template(reward_model):
    reward_model.processor.chat_template = _without_ends(reward_model.processor.chat_template)


def _without_ends(template):
    assert "<|im_end|>" in template
    return template.replace("<|im_end|>", "")


def _pixels(reward_model):
    reward_model.processor.image_processor.image_mean = [0.3, 0.5, 0.5]


def _resolution(reward_model):
    reward_model.processor.image_processor.size = {"shortest_edge": 4096, "longest_edge": 4096}


FAULTS = (_matrix, _tower, _head, _separator, _template, _pixels, _resolution)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_what_changes_scores_is_found(trained, fault, dtype, tmp_path):
    reward_model = trained(dtype)
    reward_model.save_pretrained(tmp_path)
    loaded = yojo.RewardModel.from_pretrained(tmp_path)
    assert loaded.check_known_scores(tmp_path).ok
    with torch.no_grad():
        fault(loaded)
    known = loaded.check_known_scores(tmp_path)
    assert known.stored and not known.ok and known.difference > known.bound
    of_pictures = fault in (_tower, _pixels, _resolution)
    assert known.reason.startswith("image: response" if of_pictures else ("text: response", "image: response"))
    assert "when the model was saved" in known.reason


@pytest.fixture(scope="module")
def trained():
    """Function dtype -> the shipped model, merged: with a random head, little depends on the image."""
    from yojo.converting.merge import merged

    whole = merged(reward.REWARD_MODEL, base_model=BACKBONE)

    def make(dtype):
        made = copy.deepcopy(whole)
        for name, parameter in made.model.named_parameters():
            if not name.startswith("score."):
                parameter.data = parameter.data.to(dtype)
        made.model.config.dtype = made.model.config.get_text_config().dtype = dtype
        return yojo.RewardModel(made.model, made.processor)

    return make


def test_a_template_that_was_changed_by_hand_is_found(make_reward_model, tmp_path):
    make_reward_model().save_pretrained(tmp_path)
    file = tmp_path / "chat_template.jinja"
    file.write_text(_without_ends(file.read_text()))
    loaded = yojo.RewardModel.from_pretrained(tmp_path, check_files=False)
    assert not loaded.check_known_scores(tmp_path).ok


def test_scores_that_are_not_finite_are_not_the_known_ones(make_reward_model):
    reward_model = make_reward_model()
    description = taken(reward_model)
    with torch.no_grad():
        reward_model.model.score.bias2.fill_(float("nan"))
    known = known_scores.check(reward_model, description)
    assert not known.ok and "not finite" in known.reason and known.difference is None


def test_a_model_that_cannot_score_does_not_give_them(make_reward_model, monkeypatch):
    reward_model = make_reward_model()
    description = taken(reward_model)
    monkeypatch.setattr(reward_model.model.get_decoder(), "forward", _broken)
    known = known_scores.check(reward_model, description)
    assert (known.ok, known.stored) == (False, True) and known.reason.endswith("scoring failed: no pass today")


def _broken(*args, **kwargs):
    raise RuntimeError("no pass today")


# ---- folders without, and others ----


def test_an_older_folder_is_ok_and_says_so(make_reward_model, tmp_path):
    reward_model = make_reward_model()
    reward_model.save_pretrained(tmp_path)
    description = description_of(tmp_path)
    del description[known_scores.KEY]
    (tmp_path / CONFIG_FILE).write_text(json.dumps(description))
    assert known_scores.describe(tmp_path) is None
    known = reward_model.check_known_scores(tmp_path)
    assert (known.ok, known.stored) == (True, False) and "saved without known scores" in known.reason


def test_a_trainers_checkpoint_has_none(make_reward_model, tmp_path):
    reward_model = make_reward_model()
    reward_model.model.save_pretrained(tmp_path)
    assert known_scores.describe(tmp_path) is None and reward_model.check_known_scores(tmp_path).ok


def test_a_folder_that_is_not_there_is_an_error(make_reward_model, tmp_path):
    with pytest.raises(ValueError, match="no such folder"):
        make_reward_model().check_known_scores(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda known: known.update(rule=2), "follow rule 2, and this YOJO knows rule 1"),
        (lambda known: known.pop("mode"), "damaged"),
        (lambda known: known.update(examples=[]), "damaged"),
        (lambda known: known["examples"][0].update(scores=[]), "damaged"),
        (lambda known: known["examples"][0].update(scores=[1.0, float("nan"), 2.0]), "damaged"),
        (lambda known: known["examples"][0].update(scores="many"), "damaged"),
        (lambda known: known["examples"][0]["scores"].pop(), "has 3 scores, and 2 are stored"),
        (lambda known: known.update(mode="sideways"), "scoring failed"),
    ],
)
def test_known_scores_that_cannot_be_compared_are_not_ok(make_reward_model, change, reason):
    reward_model = make_reward_model()
    description = taken(reward_model)
    change(description[known_scores.KEY])
    known = known_scores.check(reward_model, description)
    assert (known.ok, known.stored) == (False, True) and reason in known.reason


@pytest.mark.parametrize("damaged", ["some", 3, [1]])
def test_known_scores_of_another_form_are_not_ok(make_reward_model, damaged):
    known = known_scores.check(make_reward_model(), {known_scores.KEY: damaged})
    assert not known.ok and "damaged" in known.reason


# ---- saving is never held up ----


def test_saving_changes_nothing_of_the_model(make_reward_model, tmp_path):
    reward_model = make_reward_model()
    model = reward_model.model.train()
    model.model.visual.eval()
    model.score.weight1.grad = torch.ones_like(model.score.weight1)
    handle = model.score.register_forward_hook(lambda *_: None)

    def state():
        return (
            [(name, module.training, list(module._forward_hooks)) for name, module in model.score.named_modules()],
            [module.training for module in model.modules()],
            [(name, p.data_ptr(), p.requires_grad, p.grad is None) for name, p in model.named_parameters()],
            [p.detach().clone() for p in model.parameters()],
            model.yojo.config,
            model.config.to_dict(),
            random.getstate(),
            numpy.random.get_state(),
            torch.get_rng_state(),
        )

    before = state()
    reward_model.save_pretrained(tmp_path)
    assert "scores" in known_scores.describe(tmp_path)["examples"][1]
    numpy.testing.assert_equal(state()[-2], before[-2])
    for ours, then in zip(state()[:-2], before[:-2], strict=True):
        if isinstance(ours, list) and isinstance(ours[0], torch.Tensor):
            assert all(map(torch.equal, ours, then))
        else:
            assert ours == then
    assert torch.equal(state()[-1], before[-1])
    handle.remove()


def test_a_model_in_training_is_scored_without_dropout(tmp_path):
    saved_cases.backbone().save_pretrained(tmp_path / "base")
    made = saved_cases.adapted(tmp_path / "base", saved_cases.lora(lora_dropout=0.5))
    made.model.train()
    before = torch.get_rng_state()
    made.save_pretrained(tmp_path / "adapter")
    assert torch.equal(torch.get_rng_state(), before) and made.model.training
    known = yojo.RewardModel.from_pretrained(tmp_path / "adapter").check_known_scores(tmp_path / "adapter")
    assert known.stored and known.difference <= 2e-6


def test_training_goes_on_after_a_save_to_the_bit(make_reward_model, examples, tmp_path):
    def gradients(save):
        reward_model = make_reward_model(loss="plackett_luce")
        if save:
            reward_model.save_pretrained(tmp_path)
        model = reward_model.model.train()
        model(**reward_model.collator(examples)).loss.backward()
        return [p.grad for p in model.parameters() if p.grad is not None]

    plain = gradients(save=False)
    assert plain and all(map(torch.equal, gradients(save=True), plain))


def test_a_model_in_mixed_precision_is_scored_as_it_will_be_loaded(make_reward_model, tmp_path, accelerate_state):
    from accelerate import Accelerator

    reward_model = make_reward_model()
    model = Accelerator(cpu=True, mixed_precision="bf16").prepare_model(reward_model.model)
    assert "_original_forward" in vars(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        yojo.RewardModel(model, reward_model.processor).save_pretrained(tmp_path)
    known = yojo.RewardModel.from_pretrained(tmp_path).check_known_scores(tmp_path)
    assert known.stored and known.difference <= 2e-6
    assert "_original_forward" in vars(model)


@pytest.fixture()
def process_group():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


def test_nobody_else_is_waited_for_and_nothing_is_compiled(make_reward_model, process_group, monkeypatch):
    """Only one process saves, and the wrapper's pass would wait for the others."""
    made = make_reward_model()
    expected = taken(made)
    wrapped = torch.nn.parallel.DistributedDataParallel(made.model)
    monkeypatch.setattr(wrapped, "forward", _broken)
    assert taken(yojo.RewardModel(wrapped, made.processor)) == expected
    compiled = torch.compile(made.model, backend=_broken)
    assert taken(yojo.RewardModel(compiled, made.processor)) == expected


def test_layers_are_not_compiled_for_a_save(make_reward_model, monkeypatch):
    compiled = []
    monkeypatch.setattr(fuse, "BACKEND", lambda graph, inputs: compiled.append(graph) or graph.forward)
    reward_model = make_reward_model(layers=1, fuse="compile")

    def one_pass():
        with torch.no_grad():
            reward_model.model(**reward_model.collator([yojo.Example("which?", ["a seven", "a nine"])]))

    one_pass()  # the first pass of its kind is not compiled anyway
    assert names_of(taken(reward_model)) == ["text", "image"] and not compiled
    one_pass()
    assert compiled


@pytest.mark.parametrize("attribute", ["full_tensor", "ds_id"])
def test_shards_are_not_scored(make_reward_model, monkeypatch, attribute):
    reward_model = make_reward_model(layers=1)
    setattr(reward_model.model.score.weight1, attribute, 1)
    monkeypatch.setattr(reward_model.model, "forward", _broken)
    assert "shards of several processes" in known_scores.take(reward_model)["reason"]


def test_modules_that_gather_their_weights_are_not_scored(make_reward_model):
    from torch.distributed.fsdp import FSDPModule

    reward_model = make_reward_model(layers=1)
    layer = reward_model.model.get_decoder().layers[0]
    layer.__class__ = type("FSDPLayer", (FSDPModule, type(layer)), {})
    assert "shards of several processes" in known_scores.take(reward_model)["reason"]


def test_a_model_split_over_processes_is_not_scored(make_reward_model):
    reward_model = make_reward_model(layers=1)
    reward_model.model._tp_size = 2
    assert "split over several processes" in known_scores.take(reward_model)["reason"]


def test_with_a_state_dict_the_model_is_not_scored(make_reward_model, tmp_path, caplog):
    reward_model = make_reward_model(layers=1)
    reward_model.save_pretrained(tmp_path, state_dict=reward_model.model.state_dict())
    known = reward_model.check_known_scores(tmp_path)
    assert (known.ok, known.stored) == (True, False) and "handed over as a state dict" in known.reason
    assert [record for record in caplog.records if record.levelno > logging.INFO] == []  # nothing is wrong


def test_weights_that_are_nowhere_are_a_reason(make_reward_model):
    reward_model = make_reward_model(layers=1)
    reward_model.model.to("meta")
    assert known_scores.take(reward_model) == {"rule": 1, "reason": "scoring them failed with ValueError"}


def test_a_pass_that_fails_is_a_reason_without_its_text(make_reward_model, tmp_path, monkeypatch, caplog):
    reward_model = make_reward_model(layers=1)
    monkeypatch.setattr(reward_model.model.get_decoder(), "forward", _broken)
    reward_model.save_pretrained(tmp_path)
    assert known_scores.describe(tmp_path) == {"rule": 1, "reason": "scoring them failed with RuntimeError"}
    assert "without known scores: RuntimeError: no pass today" in caplog.text
    known = yojo.RewardModel.from_pretrained(tmp_path).check_known_scores(tmp_path)
    assert (known.ok, known.stored) == (True, False) and "RuntimeError" in known.reason


def test_an_image_that_cannot_be_scored_is_left_out(make_reward_model, monkeypatch):
    reward_model = make_reward_model()
    monkeypatch.setattr(reward_model.model.model.visual, "forward", _broken)
    description = taken(reward_model)
    assert names_of(description) == ["text"]
    assert description[known_scores.KEY]["left_out"] == {"image": "scoring it failed with RuntimeError"}
    monkeypatch.undo()
    assert known_scores.check(reward_model, description).ok


def test_scores_that_are_not_finite_are_not_stored(make_reward_model, monkeypatch):
    reward_model = make_reward_model()
    tower = reward_model.model.model.visual.merger

    def overflow(*args, **kwargs):
        return type(tower).forward(tower, *args, **kwargs) * float("inf")

    monkeypatch.setattr(tower, "forward", overflow)
    description = taken(reward_model)
    assert names_of(description) == ["text"]
    assert description[known_scores.KEY]["left_out"] == {"image": "its scores are not finite"}
    with torch.no_grad():
        reward_model.model.score.bias2.fill_(float("inf"))
    assert (
        known_scores.take(reward_model)["reason"] == "text: its scores are not finite; image: its scores are not finite"
    )

"""RewardModel and its checkpoints: every way to lose a head, a separator or a setting is an error."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_cases import with_adapter

import yojo
from yojo.files.saved import CONFIG_FILE, HEAD_FILE
from yojo.patching import last_layer


@pytest.fixture(scope="module")
def backbone_path():
    from yojo.demo.backbone import BACKBONE

    return BACKBONE


@pytest.fixture(scope="module", params=["full", "adapter"])
def saved(request, make_reward_model, backbone_path, tmp_path_factory):
    """(reward model, folder it was saved in)."""
    reward_model = make_reward_model(mode="isolated", activation="gelu", loss="plackett_luce", head_dim=64)
    if request.param == "adapter":
        reward_model = with_adapter(reward_model, backbone_path)
    folder = tmp_path_factory.mktemp(request.param)
    reward_model.save_pretrained(folder)
    return reward_model, folder


@pytest.fixture()
def copied(saved, tmp_path):
    """A folder that a test may damage."""
    folder = tmp_path / "model"
    shutil.copytree(saved[1], folder)
    return folder


def test_a_saved_model_scores_to_the_bit_as_before(saved, examples):
    reward_model, folder = saved
    loaded = yojo.RewardModel.from_pretrained(folder)
    assert loaded.config == reward_model.config and not loaded.model.training
    for got, expected in zip(loaded.score_many(examples), reward_model.score_many(examples), strict=True):
        assert torch.equal(got, expected)
    # The training loss, too, is the one that was set.
    batch = loaded.collator(examples)
    with torch.no_grad():
        assert torch.equal(loaded.model(**batch).loss, reward_model.model(**batch).loss)


def test_saving_what_was_loaded_changes_nothing(saved, tmp_path, examples):
    loaded = yojo.RewardModel.from_pretrained(saved[1])
    loaded.save_pretrained(tmp_path / "again")
    again = yojo.RewardModel.from_pretrained(tmp_path / "again")
    assert all(map(torch.equal, again.score_many(examples), saved[0].score_many(examples)))
    first, second = load_file(saved[1] / HEAD_FILE), load_file(tmp_path / "again" / HEAD_FILE)
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)
    assert all(t.dtype == torch.float32 for t in first.values())


def test_the_description_names_everything_that_changes_a_score(saved):
    description = json.loads((saved[1] / CONFIG_FILE).read_text())
    assert description["config"] == saved[0].config.to_dict()
    assert {"model_class", "model_type", "dtype", "separator_id", "hidden_size", "made_with"} <= set(description)


def test_a_missing_head_is_an_error(copied):
    (copied / HEAD_FILE).unlink()
    with pytest.raises(ValueError, match=f"has no value head: {HEAD_FILE} is missing"):
        yojo.RewardModel.from_pretrained(copied)


def test_a_damaged_head_is_an_error(copied):
    (copied / HEAD_FILE).write_bytes((copied / HEAD_FILE).read_bytes()[:-100])
    with pytest.raises(ValueError, match=f"{HEAD_FILE} is damaged"):
        yojo.RewardModel.from_pretrained(copied)
    (copied / HEAD_FILE).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{HEAD_FILE} is damaged"):
        yojo.RewardModel.from_pretrained(copied)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_an_error(copied, value):
    head = load_file(copied / HEAD_FILE)
    head["weight2"][0, 3] = value
    save_file(head, copied / HEAD_FILE)
    with pytest.raises(ValueError, match="weight2 has weights that are not finite"):
        yojo.RewardModel.from_pretrained(copied)


def test_a_mismatched_head_is_an_error(copied):
    original = load_file(copied / HEAD_FILE)
    save_file({k: v for k, v in original.items() if k != "bias1"}, copied / HEAD_FILE)
    with pytest.raises(ValueError, match=r"does not fit the settings.*missing \['bias1'\]"):
        yojo.RewardModel.from_pretrained(copied)
    save_file(original | {"weight2": torch.zeros(1, 32)}, copied / HEAD_FILE)
    with pytest.raises(ValueError, match=r"weight2 has shape \[1, 32\], the model needs \[1, 64\]"):
        yojo.RewardModel.from_pretrained(copied)
    save_file(original | {"weight3": torch.zeros(1)}, copied / HEAD_FILE)
    with pytest.raises(ValueError, match=r"unknown \['weight3'\]"):
        yojo.RewardModel.from_pretrained(copied)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"version": 2}, "has version 2, this YOJO reads version 1"),
        ({"hidden_size": 96}, "the head was made for hidden size 96"),
        ({"separator_id": 5}, "the separator has id .* and 5 in"),
        ({"model_type": "qwen2_vl"}, "the head was made for qwen2_vl"),
        ({"model_class": "NoSuchModel"}, "names the model class NoSuchModel, which transformers .* lacks"),
        ({"config": {"mode": "sideways"}}, "mode must be one of comparative, isolated, got 'sideways'"),
        ({"config": {"colour": "red"}}, "unknown option 'colour'; the options are mode"),
    ],
)
def test_a_description_that_does_not_fit_is_an_error(copied, change, message):
    description = json.loads((copied / CONFIG_FILE).read_text())
    (copied / CONFIG_FILE).write_text(json.dumps(description | change))
    with pytest.raises(ValueError, match=message):
        yojo.RewardModel.from_pretrained(copied)


def test_what_is_no_reward_model_is_an_error(copied, backbone_path, tmp_path):
    with pytest.raises(ValueError, match=f"is no YOJO reward model: it has no {CONFIG_FILE}"):
        yojo.RewardModel.from_pretrained(backbone_path)
    (copied / CONFIG_FILE).write_text("{")
    with pytest.raises(ValueError, match=f"{CONFIG_FILE} is damaged"):
        yojo.RewardModel.from_pretrained(copied)
    (copied / CONFIG_FILE).write_text("[]")
    with pytest.raises(ValueError, match=f"{CONFIG_FILE} is damaged: it lacks version"):
        yojo.RewardModel.from_pretrained(copied)
    with pytest.raises(ValueError, match="no such folder"):
        yojo.RewardModel.from_pretrained(tmp_path / "nowhere")


def test_a_full_checkpoint_also_loads_as_the_plain_model(make_reward_model, tmp_path):
    from transformers import AutoModelForImageTextToText

    reward_model = make_reward_model()
    reward_model.save_pretrained(tmp_path)
    plain, report = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    ours = reward_model.model.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in plain.state_dict().items())


def test_an_adapter_is_small_and_finds_its_base(make_reward_model, backbone_path, tmp_path, examples):
    reward_model = with_adapter(make_reward_model(), backbone_path)
    reward_model.save_pretrained(tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    weights = load_file(tmp_path / "adapter_model.safetensors")
    vocabulary = reward_model.model.get_base_model().get_input_embeddings().weight.shape[0]
    assert all(vocabulary not in tensor.shape for tensor in weights.values())  # not the whole embedding
    description = json.loads((tmp_path / CONFIG_FILE).read_text())
    (tmp_path / CONFIG_FILE).write_text(json.dumps(description | {"base_model": None}))
    with pytest.raises(ValueError, match="an adapter that does not name its base model: pass base_model"):
        yojo.RewardModel.from_pretrained(tmp_path)
    loaded = yojo.RewardModel.from_pretrained(tmp_path, base_model=backbone_path)
    assert all(map(torch.equal, loaded.score_many(examples), reward_model.score_many(examples)))


def test_an_adapter_made_before_the_patch_keeps_its_head(backbone, backbone_path, tmp_path, examples):
    """`patch` on a PEFT model: the head is no part of the adapter, and is saved all the same."""
    from peft import LoraConfig, get_peft_model

    model, processor = copy.deepcopy(backbone)
    model.config.name_or_path = str(backbone_path)
    model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    model = yojo.patch(model, processor)
    reward_model = yojo.RewardModel(model.eval(), processor)
    reward_model.save_pretrained(tmp_path)
    loaded = yojo.RewardModel.from_pretrained(tmp_path)
    assert all(map(torch.equal, loaded.score_many(examples), reward_model.score_many(examples)))


def test_the_dtype_is_kept_and_the_head_stays_float32(make_reward_model, tmp_path, examples):
    make_reward_model().save_pretrained(tmp_path / "float32")
    reward_model = yojo.RewardModel.from_pretrained(tmp_path / "float32", dtype=torch.bfloat16)
    reward_model.save_pretrained(tmp_path)
    loaded = yojo.RewardModel.from_pretrained(tmp_path)
    assert loaded.model.dtype == torch.bfloat16
    assert all(parameter.dtype == torch.float32 for parameter in loaded.model.score.parameters())
    assert all(map(torch.equal, loaded.score_many(examples), reward_model.score_many(examples)))
    assert yojo.RewardModel.from_pretrained(tmp_path, dtype=torch.float32).model.dtype == torch.float32


def test_scores_come_in_the_callers_order_whatever_the_budget(make_reward_model, examples):
    reward_model = make_reward_model(mode="isolated")
    alone = [reward_model.score(e.prompt, e.responses, list(e.images)) for e in examples]
    for budget in (1, 60, 100_000):
        many = reward_model.score_many(iter(examples), token_budget=budget)
        assert [len(scores) for scores in many] == [len(e.responses) for e in examples]
        for got, expected in zip(many, alone, strict=True):
            assert got.dtype == torch.float32 and (got - expected).abs().max() <= 2e-6
    assert reward_model.score_many([]) == []
    with pytest.raises(ValueError, match="token_budget must be at least 1"):
        reward_model.score_many(examples, token_budget=0)


@pytest.mark.parametrize("loss, rankings", [("best", [0.4, 0.6]), ("soft", [1, 2]), ("plackett_luce", [0, 2])])
def test_scoring_does_not_look_at_rankings(make_reward_model, loss, rankings):
    reward_model = make_reward_model(mode="isolated", loss=loss)
    ranked = yojo.Example("Which digit?", ["a seven", "a two"], rankings=rankings)
    plain = yojo.Example("Which digit?", ["a seven", "a two"])
    with pytest.raises(ValueError, match="example 0"):  # training and evaluation do
        reward_model.collator([ranked])
    for budget in (1, 8192):
        scores = reward_model.score_many([ranked, plain], token_budget=budget)
        assert torch.allclose(scores[0], scores[1], rtol=0, atol=2e-6)


@pytest.mark.parametrize("mode", ["isolated", "comparative"])
def test_a_response_that_overflows_changes_no_other(make_reward_model, mode, caplog, monkeypatch):
    monkeypatch.setattr(last_layer, "FEWEST_FLOPS", 0)
    reward_model = make_reward_model(mode=mode)
    good, other = ["a seven", "a two"], yojo.Example("And here?", ["a nine", "a one"], id="other")
    example = yojo.Example("Which digit?", [*good, "zzz"], id="bad")
    token = reward_model.collator.tokenizer("zzz", add_special_tokens=False)["input_ids"][0]
    assert (
        token not in reward_model.collator.tokenizer("Which digit? a seven a two And here? a nine a one")["input_ids"]
    )
    with torch.no_grad():
        reward_model.model.get_input_embeddings().weight[token] = float("inf")
    alone = [reward_model.score(example.prompt, good), reward_model.score(other.prompt, other.responses)]
    assert not caplog.records
    for whole in (None, "for comparison"):
        reward_model.model.yojo.whole_last_layer = whole
        caplog.clear()
        first, second = reward_model.score_many([example, other])
        assert torch.allclose(first[:2], alone[0], rtol=0, atol=2e-6) and first[2].isnan()
        assert torch.allclose(second, alone[1], rtol=0, atol=2e-6)
        (record,) = caplog.records
        assert "example 'bad': the scores of responses 2 are not finite (nan)" in record.getMessage()


def test_the_progress_bar_counts_examples(make_reward_model, examples, capsys):
    make_reward_model().score_many(examples, progress=True)
    assert f"{len(examples)}/{len(examples)}" in capsys.readouterr().err


def test_scoring_leaves_training_as_it_was(make_reward_model, examples):
    reward_model = make_reward_model()
    reward_model.model.train()
    reward_model.model.model.visual.eval()
    before = {name: module.training for name, module in reward_model.model.named_modules()}
    reward_model.score_many(examples)
    assert before == {name: module.training for name, module in reward_model.model.named_modules()}


def test_whoever_makes_the_examples_finds_the_model_as_it_was(make_reward_model, examples):
    """And may put it into another mode between two rows: each pass sets its own."""
    reward_model = make_reward_model()
    expected = reward_model.score_many(examples, token_budget=1)
    reward_model.model.train()
    seen = []

    def drawn():
        for number, example in enumerate(examples):
            seen.append(reward_model.model.training)
            if number == 1:
                reward_model.model.eval()
            yield example

    for one, other in zip(reward_model.score_many(drawn(), token_budget=1), expected, strict=True):
        assert torch.equal(one, other)
    assert seen[:2] == [True, True] and not any(seen[2:]) and not reward_model.model.training


def test_an_error_names_the_example(make_reward_model, examples):
    reward_model = make_reward_model()
    bad = yojo.Example("p", ["7"], images=["missing.png"])
    with pytest.raises(ValueError, match=r"example 5: image 0: no such file"):
        reward_model.score_many([*examples, bad])


def test_a_model_that_is_not_patched_is_an_error(backbone):
    with pytest.raises(ValueError, match=r"call yojo\.patch\(model, processor\) first"):
        yojo.RewardModel(*backbone)

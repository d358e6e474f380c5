"""Every way to lose a head, a separator or a setting on save, merge, quantise, wrap and reload."""

import copy
import errno
import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file
from saved_cases import with_adapter

import yojo
from yojo.converting.merge import merge
from yojo.files.saved import ADAPTER_FILE, CONFIG_FILE, HEAD_FILE
from yojo.saving import load as loading
from yojo.saving import save

OPTIONS = dict(mode="isolated", head_dim=64)


@pytest.fixture(scope="module")
def backbone_path():
    from yojo.demo.backbone import BACKBONE

    return BACKBONE


@pytest.fixture(params=["full", "adapter"])
def reward_model(request, make_reward_model, backbone_path):
    made = make_reward_model(**OPTIONS)
    return made if request.param == "full" else with_adapter(made, backbone_path)


@pytest.fixture()
def adapted(make_reward_model, backbone_path):
    return with_adapter(make_reward_model(**OPTIONS), backbone_path)


def same(first, second, examples, tolerance=0.0):
    a, b = first.score_many(examples), second.score_many(examples)
    return all((x - y).abs().max() <= tolerance for x, y in zip(a, b, strict=True))


def load(path, **options):
    return yojo.RewardModel.from_pretrained(path, **options)


# ---- files of other saves ----


def test_a_save_of_the_other_kind_leaves_nothing_of_the_first(make_reward_model, adapted, tmp_path, examples):
    full = make_reward_model(**OPTIONS)
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "notes.txt").write_text("mine")
    for reward_model in (full, adapted, full):
        reward_model.save_pretrained(tmp_path / "m")
        names = os.listdir(tmp_path / "m")
        assert ("model.safetensors" in names) == (reward_model is full)
        assert (ADAPTER_FILE in names) == ("adapter_config.json" in names) == (reward_model is adapted)
        assert same(load(tmp_path / "m"), reward_model, examples)
    assert (tmp_path / "m" / "notes.txt").read_text() == "mine"
    assert os.listdir(tmp_path) == ["m"]


def test_an_adapter_beside_a_full_model_is_an_error(make_reward_model, adapted, tmp_path):
    adapted.model.save_pretrained(tmp_path)  # PEFT's own, not ours
    with pytest.raises(
        ValueError, match="holds adapter_model.* of another model, which transformers would load on top"
    ):
        make_reward_model(**OPTIONS).save_pretrained(tmp_path)
    full = tmp_path / "full"
    make_reward_model(**OPTIONS).save_pretrained(full)
    adapted.model.save_pretrained(full)
    with pytest.raises(ValueError, match="holds a full model and adapter_model.*, which is not its own"):
        load(full)


def test_files_of_two_saves_are_an_error(reward_model, make_reward_model, tmp_path):
    reward_model.save_pretrained(tmp_path / "a")
    other = copy.deepcopy(reward_model)
    with torch.no_grad():
        for name, parameter in other.model.named_parameters():
            if "score" in name or "lora_B" in name:
                parameter.mul_(1.5)
    other.save_pretrained(tmp_path / "b")
    names = [HEAD_FILE] + [ADAPTER_FILE] * (tmp_path / "a" / ADAPTER_FILE).exists()
    for name in names:
        kept = (tmp_path / "a" / name).read_bytes()
        (tmp_path / "a" / name).write_bytes((tmp_path / "b" / name).read_bytes())
        with pytest.raises(ValueError, match=f"{name} is not the file that {CONFIG_FILE} was written with"):
            load(tmp_path / "a")
        (tmp_path / "a" / name).write_bytes(kept)
    load(tmp_path / "a")


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja"])
def test_another_tokenizer_or_template_is_an_error(reward_model, tmp_path, name):
    reward_model.save_pretrained(tmp_path)
    text = (tmp_path / name).read_text()
    assert "seven" in text or name == "chat_template.jinja"
    (tmp_path / name).write_text(text.replace('"seven"', '"sevenn"').replace("message.role }}", "message.role }}:"))
    with pytest.raises(ValueError, match=f"{name} is not the file that"):
        load(tmp_path)


def test_truncated_or_missing_weights_are_an_error(make_reward_model, tmp_path):
    make_reward_model(**OPTIONS).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match="model.safetensors is damaged or of another save: it has .* bytes"):
        load(tmp_path)
    file.unlink()
    with pytest.raises(ValueError, match="is not whole: model.safetensors is missing"):
        load(tmp_path)


# ---- the adapter ----


def without_checksums(path):
    description = json.loads((path / CONFIG_FILE).read_text())
    del description["files"]
    (path / CONFIG_FILE).write_text(json.dumps(description))


def test_a_missing_truncated_or_other_adapter_is_an_error(adapted, tmp_path):
    adapted.save_pretrained(tmp_path)
    without_checksums(tmp_path)  # as older versions wrote it
    file = tmp_path / ADAPTER_FILE
    original = {name: tensor.clone() for name, tensor in load_file(file).items()}  # the file is mapped, not read
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(ValueError, match=f"{ADAPTER_FILE} is damaged"):
        load(tmp_path)
    lora = next(name for name in original if "lora_B" in name)
    for lost in (lora, "base_model.model.score.weight2"):
        save_file({name: tensor for name, tensor in original.items() if name != lost}, file)
        with pytest.raises(ValueError, match=f"{ADAPTER_FILE} does not fit adapter_config.json"):
            load(tmp_path)
    save_file(original | {"base_model.model.more.lora_A.weight": torch.zeros(1)}, file)
    with pytest.raises(ValueError, match="unknown .*more.lora_A"):
        load(tmp_path)
    save_file(original | {lora: torch.zeros(3, 3)}, file)
    with pytest.raises(ValueError, match="(?s)does not fit the base model: .*size mismatch"):
        load(tmp_path)
    save_file(original | {"base_model.model.score.weight2": original["base_model.model.score.weight2"] * 2}, file)
    with pytest.raises(ValueError, match=r"the value heads in .* differ \(weight2\): the files are of two"):
        load(tmp_path)
    save_file(original, file)
    load(tmp_path)
    for name in (ADAPTER_FILE, "adapter_config.json"):
        (tmp_path / name).rename(tmp_path / "away")
        with pytest.raises(ValueError, match=f"has no adapter: {name} is missing"):
            load(tmp_path)
        (tmp_path / "away").rename(tmp_path / name)


@pytest.mark.parametrize("trained", [True, False])
def test_the_separators_embedding_is_kept(make_reward_model, backbone_path, tmp_path, examples, trained):
    from peft import LoraConfig, get_peft_model

    reward_model = make_reward_model(**OPTIONS)
    separator = reward_model.collator.separator_id
    embedding = reward_model.model.get_input_embeddings().weight
    with torch.no_grad():
        embedding[separator] += 0.3  # not the mean any more: a row that a load would not make again
    row = embedding[separator].clone()
    reward_model.model.config.name_or_path = str(backbone_path)
    tokens = {"trainable_token_indices": {"embed_tokens": [separator]}} if trained else {}
    model = get_peft_model(reward_model.model, LoraConfig(r=2, target_modules=["q_proj"], **tokens))
    if trained:
        delta = next(p for name, p in model.named_parameters() if "trainable_tokens_delta" in name)
        delta.data += 0.2
    reward_model = yojo.RewardModel(model.eval(), reward_model.processor)
    reward_model.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / HEAD_FILE)["separator_embedding"], row)
    loaded = load(tmp_path)
    assert same(loaded, reward_model, examples)
    read = loaded.model.get_input_embeddings()(torch.tensor([separator]))[0]
    assert (read - row - 0.2 * trained).abs().max() <= 1e-6


# ---- wrappers and gathered state dicts ----


def test_a_compiled_model_is_saved_as_it_is(reward_model, tmp_path, examples):
    compiled = torch.compile(reward_model.model, backend="eager")
    yojo.RewardModel(compiled, reward_model.processor).save_pretrained(tmp_path)
    assert same(load(tmp_path), reward_model, examples)


def test_a_ddp_model_is_saved_as_it_is(reward_model, tmp_path, examples):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        for parameter in reward_model.model.parameters():
            parameter.requires_grad_(True)
        wrapped = torch.nn.parallel.DistributedDataParallel(reward_model.model)
        yojo.RewardModel(wrapped, reward_model.processor).save_pretrained(tmp_path / "m")
    finally:
        torch.distributed.destroy_process_group()
    assert same(load(tmp_path / "m"), reward_model, examples)


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod."])
def test_a_gathered_state_dict_is_all_that_is_read(reward_model, tmp_path, examples, prefix):
    expected = reward_model.score_many(examples)
    state = {prefix + name: tensor.clone() for name, tensor in reward_model.model.state_dict().items()}
    for parameter in reward_model.model.parameters():  # what is left of them on a sharded model's main process
        parameter.data = torch.full((0,), float("nan"))
    reward_model.save_pretrained(tmp_path, state_dict=state)
    assert all(map(torch.equal, load(tmp_path).score_many(examples), expected))


def test_a_model_sharded_by_fsdp(reward_model, tmp_path, examples):
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor

    expected = reward_model.score_many(examples)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for layer in yojo.patch(reward_model.model).get_decoder().layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(reward_model.model, mesh=mesh)
        assert all(isinstance(parameter, DTensor) for parameter in reward_model.model.parameters())
        state = get_model_state_dict(reward_model.model, options=StateDictOptions(full_state_dict=True))
        assert not any(isinstance(tensor, DTensor) for tensor in state.values())
        reward_model.save_pretrained(tmp_path / "m", state_dict=state)
    finally:
        torch.distributed.destroy_process_group()
    assert all(map(torch.equal, load(tmp_path / "m").score_many(examples), expected))
    assert "FSDP" not in "".join(file.read_text() for file in (tmp_path / "m").glob("*.json"))


def test_a_state_dict_that_is_not_whole_is_an_error(reward_model, tmp_path):
    state = dict(reward_model.model.state_dict())
    embedding = next(name for name in state if "embed_tokens" in name and name.endswith("weight"))
    with pytest.raises(ValueError, match="state_dict has no value head: .*score.*weight2 is missing"):
        lost = {name: tensor for name, tensor in state.items() if "weight2" not in name}
        reward_model.save_pretrained(tmp_path / "m", state_dict=lost)
    with pytest.raises(ValueError, match="state_dict has no embedding: .*embed_tokens.*weight is missing"):
        lost = {name: tensor for name, tensor in state.items() if name != embedding}
        reward_model.save_pretrained(tmp_path / "m", state_dict=lost)
    with pytest.raises(ValueError, match="state_dict holds a shard: .* has shape"):
        reward_model.save_pretrained(tmp_path / "m", state_dict=state | {embedding: torch.zeros(100)})
    with pytest.raises(TypeError, match="state_dict must be a dict of tensors, got list"):
        reward_model.save_pretrained(tmp_path / "m", state_dict=[])
    assert not (tmp_path / "m").exists()


# ---- a full disk ----


@pytest.mark.parametrize("where", ["head", "config", "processor"])
def test_a_full_disk_leaves_the_old_model_whole(make_reward_model, tmp_path, examples, monkeypatch, where):
    old, new = make_reward_model(**OPTIONS), make_reward_model(mode="comparative")
    old.save_pretrained(tmp_path / "m")

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    if where == "processor":
        monkeypatch.setattr(new.processor, "save_pretrained", full)
    else:
        monkeypatch.setattr(save, f"_write_{'tensors' if where == 'head' else 'description'}", full)
    with pytest.raises(OSError, match="No space left"):
        new.save_pretrained(tmp_path / "m")
    assert os.listdir(tmp_path) == ["m"] and same(load(tmp_path / "m"), old, examples)


# ---- merge ----


@pytest.mark.parametrize("patched_first", [True, False])
def test_merged_scores_are_those_of_the_adapter(adapted, backbone, backbone_path, tmp_path, examples, patched_first):
    from peft import LoraConfig, get_peft_model

    if not patched_first:
        model, processor = copy.deepcopy(backbone)
        model.config.name_or_path = str(backbone_path)
        model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted = yojo.RewardModel(yojo.patch(model, processor, **OPTIONS).eval(), processor)
    adapted.save_pretrained(tmp_path / "a")
    made = merge(tmp_path / "a", tmp_path / "m")
    loaded = load(tmp_path / "m")
    assert same(made, loaded, examples) and same(loaded, adapted, examples, 1e-5)
    assert loaded.config == adapted.config
    assert not (tmp_path / "m" / ADAPTER_FILE).exists() and not hasattr(loaded.model, "peft_config")
    plain = yojo.unpatch(copy.deepcopy(loaded.model))
    assert "lora" not in "".join(plain.state_dict())
    with pytest.raises(ValueError, match="holds a full model already: there is no adapter to merge"):
        merge(tmp_path / "m", tmp_path / "n")


def test_bfloat16_is_merged_in_float32(adapted, tmp_path, examples):
    for parameter in adapted.model.parameters():
        parameter.requires_grad_(False)
    base = adapted.model.get_base_model()
    for name, parameter in base.named_parameters():
        if "score" not in name and "lora" not in name and "delta" not in name:
            parameter.data = parameter.data.bfloat16()
    base.config.dtype = torch.bfloat16
    q = base.model.language_model.layers[0].self_attn.q_proj
    expected = (q.base_layer.weight.float() + q.get_delta_weight("default").float()).bfloat16()
    adapted.save_pretrained(tmp_path / "a")
    description = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    (tmp_path / "a" / CONFIG_FILE).write_text(json.dumps(description | {"dtype": "bfloat16"}))
    merged = merge(tmp_path / "a", tmp_path / "m").model
    # The base lies in float32, so its weights are not rounded before the sum.
    got = merged.model.language_model.layers[0].self_attn.q_proj.weight
    assert got.dtype == torch.bfloat16 and (got.float() - expected.float()).abs().max() <= 2**-7 * expected.abs().max()
    assert all(parameter.dtype == torch.float32 for parameter in merged.score.parameters())
    loaded = load(tmp_path / "m")
    assert loaded.model.dtype == torch.bfloat16
    assert same(loaded, yojo.RewardModel(merged, adapted.processor), examples)


# ---- quantised base models ----

QUANTIZED = [dict(load_in_4bit=True, bnb_4bit_quant_type="nf4"), dict(load_in_8bit=True)]


@pytest.mark.parametrize("settings", QUANTIZED, ids=["4bit", "8bit"])
def test_qlora(settings, backbone, backbone_path, tmp_path, examples):
    pytest.importorskip("bitsandbytes")
    import transformers
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    kind = Linear4bit if "load_in_4bit" in settings else Linear8bitLt
    config = transformers.BitsAndBytesConfig(**settings)
    model = transformers.AutoModelForImageTextToText.from_pretrained(
        backbone_path, dtype=torch.float32, quantization_config=config
    )
    processor = copy.deepcopy(backbone[1])
    reward_model = yojo.RewardModel(yojo.patch(model.eval(), processor, **OPTIONS), processor)
    reward_model = with_adapter(reward_model, backbone_path)
    reward_model.save_pretrained(tmp_path / "a")
    loaded = load(tmp_path / "a")
    base = loaded.model.get_base_model()
    assert isinstance(base.model.language_model.layers[0].self_attn.q_proj.base_layer, kind)
    assert {type(p) for p in base.score.parameters()} == {torch.nn.Parameter}
    assert all(p.dtype == torch.float32 for p in base.score.parameters())
    assert same(loaded, reward_model, examples[:2])
    description = json.loads((tmp_path / "a" / CONFIG_FILE).read_text())
    assert description["quantization"]["quant_method"] == "bitsandbytes"
    whole = load(tmp_path / "a", quantization_config=None)
    assert not isinstance(whole.model.get_base_model().model.language_model.layers[0].self_attn.q_proj.base_layer, kind)
    assert not same(whole, reward_model, examples[:2], 1e-6)


@pytest.mark.parametrize("settings", QUANTIZED, ids=["4bit", "8bit"])
def test_a_quantized_full_model(settings, backbone, backbone_path, tmp_path, examples):
    pytest.importorskip("bitsandbytes")
    import transformers

    model = transformers.AutoModelForImageTextToText.from_pretrained(
        backbone_path, dtype=torch.float32, quantization_config=transformers.BitsAndBytesConfig(**settings)
    )
    processor = copy.deepcopy(backbone[1])
    reward_model = yojo.RewardModel(yojo.patch(model.eval(), processor, **OPTIONS), processor)
    reward_model.save_pretrained(tmp_path)
    assert not any("score" in name for name in load_file(tmp_path / "model.safetensors"))
    assert same(load(tmp_path), reward_model, examples[:2])
    with pytest.raises(ValueError, match="saved from its own weights: leave state_dict out"):
        reward_model.save_pretrained(tmp_path, state_dict=model.state_dict())


def test_a_quantized_base_is_merged_as_what_it_stands_for(
    backbone, backbone_path, tmp_path, examples, caplog, monkeypatch
):
    modules = pytest.importorskip("bitsandbytes.nn.modules")
    import transformers

    # On CPUs that multiply bfloat16, bitsandbytes rounds what it dequantizes to it: that would be compared here.
    monkeypatch.setattr(modules, "has_avx512bf16", lambda: False)

    model = transformers.AutoModelForImageTextToText.from_pretrained(
        backbone_path, dtype=torch.float32, quantization_config=transformers.BitsAndBytesConfig(**QUANTIZED[0])
    )
    processor = copy.deepcopy(backbone[1])
    reward_model = with_adapter(
        yojo.RewardModel(yojo.patch(model.eval(), processor, **OPTIONS), processor), backbone_path
    )
    reward_model.save_pretrained(tmp_path / "a")
    merge(tmp_path / "a", tmp_path / "m")
    assert "the base model is dequantized from" in caplog.text
    merged = load(tmp_path / "m")
    assert json.loads((tmp_path / "m" / CONFIG_FILE).read_text())["quantization"] is None
    assert same(merged, reward_model, examples, 1e-5)
    assert not same(merged, load(tmp_path / "a", quantization_config=None), examples, 1e-5)


# ---- the card and the hub ----


def test_the_card_says_where_the_model_comes_from(reward_model, tmp_path):
    provenance = {"data": "ten digits", "metrics": {"accuracy": 0.75}, "notes": "a toy", "seed": 3}
    reward_model.save_pretrained(tmp_path, provenance=provenance)
    text = (tmp_path / "README.md").read_text()
    for part in ("ten digits", "| accuracy | 0.75 |", "a toy", "- seed: 3", "| mode | isolated |", "## License"):
        assert part in text
    assert text.startswith("---\nlibrary_name: yojo\n") and f"| yojo | {yojo.__version__} |" in text
    reward_model.save_pretrained(tmp_path)
    assert "ten digits" not in (tmp_path / "README.md").read_text()  # ours, so it is written anew
    reward_model.save_pretrained(tmp_path, card=False)
    assert not (tmp_path / "README.md").exists()
    (tmp_path / "README.md").write_text("my own words")
    reward_model.save_pretrained(tmp_path, provenance=provenance)
    assert (tmp_path / "README.md").read_text() == "my own words"
    with pytest.raises(TypeError, match="provenance must be a dict of what the card should say, got str"):
        reward_model.save_pretrained(tmp_path, provenance="data")
    with pytest.raises(TypeError, match="'metrics'. must be a dict of figures, got 3"):
        reward_model.save_pretrained(tmp_path, provenance={"metrics": 3})


def test_the_card_does_not_say_where_the_base_model_lay(adapted, tmp_path, backbone_path):
    adapted.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert str(backbone_path) not in text and "| base model | backbone |" in text


def test_push_to_hub(make_reward_model, monkeypatch):
    import huggingface_hub

    calls = []

    class Api:
        def __init__(self, token=None):
            calls.append(("token", token))

        def create_repo(self, repo_id, **kwargs):
            calls.append(("create", repo_id, kwargs))

        def upload_folder(self, *, repo_id, folder_path, repo_type, commit_message):
            calls.append(("upload", repo_id, sorted(os.listdir(folder_path)), commit_message))
            load(folder_path)
            return "done"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    reward_model = make_reward_model(**OPTIONS)
    assert reward_model.push_to_hub("me/model", private=True, token="t", commit_message="first") == "done"
    assert calls[:2] == [("token", "t"), ("create", "me/model", dict(private=True, repo_type="model", exist_ok=True))]
    assert calls[2][1] == "me/model" and calls[2][3] == "first"
    assert {HEAD_FILE, CONFIG_FILE, "README.md", "model.safetensors"} <= set(calls[2][2])


def test_an_adapter_can_be_trained_further(adapted, tmp_path, examples):
    adapted.save_pretrained(tmp_path)
    trained = {name for name, p in adapted.model.named_parameters() if p.requires_grad}
    loaded, _ = loading.load_pretrained(tmp_path, trainable=True)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trained and trained
    fixed, _ = loading.load_pretrained(tmp_path)
    assert not any(p.requires_grad for name, p in fixed.named_parameters() if "lora" in name)


def test_the_processor_may_be_saved_once_more_into_the_folder(make_reward_model, tmp_path, examples):
    """As scripts do after saving a model; transformers does not write down what resizes images."""
    reward_model = make_reward_model(**OPTIONS)
    reward_model.save_pretrained(tmp_path)
    reward_model.processor.save_pretrained(tmp_path)
    assert "image_backend" not in json.loads((tmp_path / "processor_config.json").read_text())
    loaded = load(tmp_path)
    assert type(loaded.processor.image_processor) is type(reward_model.processor.image_processor)
    assert same(loaded, reward_model, examples)
    settings = json.loads((tmp_path / "processor_config.json").read_text())
    settings["image_processor"]["patch_size"] += 1
    (tmp_path / "processor_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="processor_config.json is not the file"):
        load(tmp_path)

"""Exports for TRL, and the commands import, export and merge."""

import copy
import json

import pytest
import tiny
import torch
from turn_cases import merging_tokenizer
from typer.testing import CliRunner

import yojo
from yojo.cli import app
from yojo.converting.export import export, export_trl

PROMPT, RESPONSES = "one or two ?", ["yes.", "no no", "three four one.\n\nfine", "née"]


def text_model(family, tokenizer, **options):
    import transformers

    torch.manual_seed(0)
    config_class = {
        "llama": transformers.LlamaConfig,
        "qwen3": transformers.Qwen3Config,
        "gemma2": transformers.Gemma2Config,
    }[family]
    config = config_class(**(tiny.TEXT | dict(vocab_size=len(tokenizer), head_dim=8, pad_token_id=None)))
    model = tiny.randomise(transformers.AutoModelForCausalLM.from_config(config), 0)
    yojo.patch(model, tokenizer, mode="isolated", head="linear", **options)
    with torch.no_grad():
        model.score.weight2.copy_(torch.randn(1, tiny.HIDDEN))
        model.score.bias2.fill_(0.7)
        model.score.separator_delta.fill_(0.2)
    return yojo.RewardModel(model.eval(), tokenizer)


def stock_scores(folder, prompt, responses, padding_side="right", dtype=torch.float32):
    """As a user of the exported classifier would get them, in one padded batch."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model, report = AutoModelForSequenceClassification.from_pretrained(folder, dtype=dtype, output_loading_info=True)
    assert not any(report.values()) and model.config.num_labels == 1 and not hasattr(model.config, "yojo")
    assert type(model).__module__.startswith("transformers.")
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=padding_side)
    talks = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": text}] for text in responses]
    batch = tokenizer.apply_chat_template(talks, return_tensors="pt", return_dict=True, padding=True)
    with torch.no_grad():
        return model.eval()(**batch).logits[:, 0], batch


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])  # Gemma's embeddings are multiplied by a constant
@pytest.mark.parametrize("pooling", ["separator", "last"])
@pytest.mark.parametrize("scale_scores", [True, False])
def test_a_stock_classifier_gives_our_scores(tmp_path, family, pooling, scale_scores):
    reward_model = text_model(family, merging_tokenizer(), pooling=pooling, scale_scores=scale_scores)
    expected = reward_model.score(PROMPT, RESPONSES)
    # In float64, so that what differs is no rounding; transformers' Gemma 2 gives NaN for padded batches there.
    dtype = torch.float32 if family == "gemma2" else torch.float64
    twin = copy.deepcopy(reward_model.model).to(dtype)
    exact = yojo.RewardModel(twin, reward_model.processor).score(PROMPT, RESPONSES)
    bias = export_trl(reward_model, tmp_path)
    assert bias == pytest.approx(0.7 / (tiny.HIDDEN**0.5 if scale_scores else 1))
    for side in ("right", "left"):
        found, _ = stock_scores(tmp_path, PROMPT, RESPONSES, side, dtype)
        assert exact.std() > 0.01 and (found + bias - exact).abs().max() <= 1e-5
    assert torch.equal(reward_model.score(PROMPT, RESPONSES), expected)  # the model itself is as before
    assert "yojo" not in reward_model.processor.chat_template
    assert repr(bias) in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("ending", ["", "\n", "\n\n"])
def test_the_template_renders_prompt_answer_and_separator(tmp_path, ending):
    tokenizer = merging_tokenizer()
    tokenizer.chat_template = "\n" + tokenizer.chat_template + ending
    reward_model = text_model("qwen3", tokenizer)
    export_trl(reward_model, tmp_path)
    from transformers import AutoTokenizer

    changed = AutoTokenizer.from_pretrained(tmp_path)
    user = [{"role": "user", "content": "hi"}]
    render = tokenizer.apply_chat_template
    prompt = render(user, tokenize=False, add_generation_prompt=True)
    for content in ("a 'b' {{ c }}", [{"type": "text", "text": "a 'b' {{ c }}"}]):
        found = changed.apply_chat_template([*user, {"role": "assistant", "content": content}], tokenize=False)
        assert found == prompt + "a 'b' {{ c }}<|resp_sep|>"
    # What does not end with an answer, and what goes on behind one, is rendered as before.
    assert changed.apply_chat_template(user, tokenize=False) == render(user, tokenize=False)
    talk = [*user, {"role": "assistant", "content": "yes"}, *user]
    assert changed.apply_chat_template(talk, tokenize=False, add_generation_prompt=True) == render(
        talk, tokenize=False, add_generation_prompt=True
    )


def test_an_adapter_is_merged_first(tmp_path):
    from peft import LoraConfig, get_peft_model

    tokenizer = merging_tokenizer()
    reward_model = text_model("qwen3", tokenizer)
    stock = yojo.unpatch(copy.deepcopy(reward_model.model))
    stock.save_pretrained(tmp_path / "base")
    reward_model.model.config.name_or_path = str(tmp_path / "base")
    model = get_peft_model(
        reward_model.model,
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, modules_to_save=["score"]),
    )
    adapted = yojo.RewardModel(model.eval(), tokenizer)
    with pytest.raises(ValueError, match="wrapped, by PEFT perhaps: merge its adapter first"):
        export_trl(adapted, tmp_path / "out")
    adapted.save_pretrained(tmp_path / "adapter")
    exported = export(tmp_path / "adapter", tmp_path / "out", format="trl")
    found, _ = stock_scores(tmp_path / "out", PROMPT, RESPONSES)
    assert (found + exported.bias - adapted.score(PROMPT, RESPONSES)).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "options, message",
    [
        ({"head": "linear"}, "mode='comparative', where a score depends on the responses before it"),
        ({"mode": "isolated"}, "head='mlp'; a sequence classifier has one linear layer"),
        ({"mode": "isolated", "head": "linear", "pooling": "response_mean"}, "only pooling='separator' or 'last'"),
        ({"mode": "isolated", "head": "linear"}, "no sequence classifier for Qwen3VLForConditionalGeneration"),
    ],
)
def test_what_cannot_be_a_classifier(make_reward_model, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        export_trl(make_reward_model(**options), tmp_path)


def test_a_tokenizer_without_a_template_is_refused(tmp_path):
    reward_model = text_model("qwen3", merging_tokenizer())
    reward_model.processor.chat_template = None
    with pytest.raises(ValueError, match="has no chat template that could be changed"):
        export_trl(reward_model, tmp_path)


# ---- commands ----


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_commands(make_reward_model, tmp_path, examples):
    from peft import LoraConfig, get_peft_model

    from yojo.demo.backbone import BACKBONE

    reward_model = make_reward_model(format="mr2rm", pooling="last")
    with torch.no_grad():
        reward_model.model.score.separator_delta.fill_(0.2)
    reward_model.model.config.name_or_path = "nowhere"
    model = get_peft_model(reward_model.model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    reward_model = yojo.RewardModel(model.eval(), reward_model.processor)
    reward_model.save_pretrained(tmp_path / "adapter")
    base = ("--base-model", BACKBONE)

    result = run("merge", tmp_path / "adapter", "--out", tmp_path / "merged", *base)
    assert result.exit_code == 0, result.output
    merged = yojo.RewardModel.from_pretrained(tmp_path / "merged")
    pairs = zip(merged.score_many(examples), reward_model.score_many(examples), strict=True)
    assert all((a - b).abs().max() <= 1e-5 for a, b in pairs)

    result = run("export", tmp_path / "adapter", "--out", tmp_path / "released", "--format", "mr2rm", *base)
    assert result.exit_code == 0, result.output
    result = run("import", tmp_path / "released", "--out", tmp_path / "again", *base)
    assert result.exit_code == 0 and "mlp head, pooling last, scores scaled" in result.output
    again = yojo.RewardModel.from_pretrained(tmp_path / "again")
    assert all(map(torch.equal, again.score_many(examples), reward_model.score_many(examples)))

    result = run("import", tmp_path / "released", "--out", tmp_path / "raw", "--no-scale-scores", *base)
    assert result.exit_code == 0 and "scores not scaled" in result.output
    config = json.loads((tmp_path / "raw" / "yojo_config.json").read_text())["config"]
    assert config["scale_scores"] is False and config["format"] == "mr2rm"

    result = run("export", tmp_path / "merged", "--out", tmp_path / "trl", "--format", "trl")
    assert result.exit_code == 2 and "error: the model has mode='comparative'" in result.output
    result = run("export", tmp_path / "merged", "--out", tmp_path / "trl", "--format", "onnx")
    assert result.exit_code == 2 and "format must be one of mr2rm, trl, got 'onnx'" in result.output
    result = run("merge", tmp_path / "merged", "--out", tmp_path / "x")
    assert result.exit_code == 2 and "there is no adapter to merge" in result.output
    result = run("import", tmp_path / "merged", "--out", tmp_path / "x")
    assert result.exit_code == 2 and "has no reward_model_config.json" in result.output


def test_the_export_command_names_the_bias(tmp_path):
    text_model("llama", merging_tokenizer()).save_pretrained(tmp_path / "m")
    result = run("export", tmp_path / "m", "--out", tmp_path / "trl", "--format", "trl")
    assert result.exit_code == 0 and "minus its constant bias: add 0.1237" in result.output

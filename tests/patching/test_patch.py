"""patch and unpatch as such: options, tokens, wrappers, and the plain forward (families are in test_families.py)."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch
import transformers

import yojo
from yojo.patching.attention import attend
from yojo.patching.forward import NEW_ARGUMENTS
from yojo.patching.state import is_patched, unwrap


@pytest.fixture()
def fresh(backbone):
    return copy.deepcopy(backbone)


def test_patching_twice_is_patching_once(fresh):
    model, processor = fresh
    assert yojo.patch(model, processor, mode="isolated", head_dim=32) is model
    head, tokens = model.score, len(processor.tokenizer)
    assert yojo.patch(model, processor, mode="isolated") is model
    assert yojo.patch(model) is model
    assert model.score is head and len(processor.tokenizer) == tokens
    with pytest.raises(
        ValueError, match=r"patched already, with mode='isolated'.*again with mode='comparative'.*unpatch"
    ):
        yojo.patch(model, processor, mode="comparative")
    yojo.unpatch(model)
    assert yojo.patch(model, processor, mode="comparative").yojo.config.mode == "comparative"


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"mood": "isolated"}, ValueError, "unknown option 'mood'; the options are mode, permutations"),
        ({"mode": "parallel"}, ValueError, "mode must be one of comparative, isolated, got 'parallel'"),
        ({"loss": "hinge"}, ValueError, "loss must be one of best"),
        ({"pooling": "median"}, ValueError, "pooling must be one of separator, last, first, .*, got 'median'"),
        ({"format": "paper"}, ValueError, "format must be one of yojo, mr2rm, got 'paper'"),
        ({"permutations": 0}, ValueError, "permutations must be at least 1"),
        ({"permutations": 2.0}, TypeError, "permutations must be an int"),
        ({"mode": "isolated", "permutations": 2}, ValueError, "permutations has no meaning in isolated mode"),
        ({"scale_scores": "yes"}, TypeError, "scale_scores must be a bool"),
        ({"separator": ""}, ValueError, "separator must be a token"),
    ],
)
def test_options_that_make_no_sense(fresh, options, error, message):
    with pytest.raises(error, match=message):
        yojo.patch(*fresh, **options)
    assert not is_patched(fresh[0]) and not hasattr(fresh[0], "score")


def test_what_cannot_be_patched(fresh):
    model, processor = fresh
    with pytest.raises(TypeError, match="model must be a transformers model, got Linear"):
        yojo.patch(torch.nn.Linear(2, 2), processor)
    with pytest.raises(ValueError, match="Qwen3VLModel has no language-model head: load the model with AutoModelFor"):
        yojo.patch(model.model, processor)
    with pytest.raises(TypeError, match="processor must be a processor or a tokenizer, got str"):
        yojo.patch(model, "processor")
    assert not is_patched(model)
    model.score = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="has a submodule named `score` already"):
        yojo.patch(model, processor)


def test_the_separator_starts_from_the_mean_embedding(fresh):
    model, processor = fresh
    before = model.get_input_embeddings().weight.detach().clone()
    yojo.patch(model, processor)
    tokenizer, after = processor.tokenizer, model.get_input_embeddings().weight
    separator = tokenizer.convert_tokens_to_ids("<|resp_sep|>")
    assert separator == model.yojo.separator_id == len(before)
    assert after.shape[0] == len(before) + 1 and torch.equal(after[:-1], before)
    assert torch.allclose(after[separator], before.mean(0), atol=1e-7)
    assert tokenizer("a <|resp_sep|>")["input_ids"][-1] == separator
    assert model.lm_head.weight.data_ptr() == after.data_ptr()  # still tied


def test_a_separator_the_tokenizer_has_is_reused(fresh):
    model, processor = fresh
    before = model.get_input_embeddings().weight.detach().clone()
    word = processor.tokenizer.convert_tokens_to_ids("<|video_pad|>")
    yojo.patch(model, processor, separator="<|video_pad|>")
    assert model.yojo.separator_id == word
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_a_separator_that_patch_added_starts_every_fresh_model_from_the_mean(backbone, tmp_path):
    """Whoever has the processor of an earlier model: the same object, a copy, one that was saved."""
    model, processor = copy.deepcopy(backbone)
    size = model.get_input_embeddings().weight.shape[0]

    def fresh():
        model = copy.deepcopy(backbone[0])
        model.resize_token_embeddings(size + 8, mean_resizing=False)  # spare rows with noise in them, as Qwen's
        return model

    first = yojo.patch(fresh(), processor).get_input_embeddings().weight[size].clone()
    processor.tokenizer.save_pretrained(tmp_path)
    saved = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for again in (processor, copy.deepcopy(processor), saved, pickle.loads(pickle.dumps(processor.tokenizer))):
        model = fresh()
        noise = model.get_input_embeddings().weight.detach().clone()
        for _ in range(2):  # and patched again
            yojo.patch(model, again)
            assert model.yojo.separator_id == size
            assert torch.equal(model.get_input_embeddings().weight[size], first)
            yojo.unpatch(model)
            assert torch.equal(model.get_input_embeddings().weight, noise)


def test_a_spare_row_of_the_embedding_is_used_and_given_back(fresh):
    model, processor = fresh
    size = model.get_input_embeddings().weight.shape[0]
    model.resize_token_embeddings(size + 8, mean_resizing=False)  # like Qwen, whose vocabulary is padded
    before = model.get_input_embeddings().weight.detach().clone()
    yojo.patch(model, processor)
    after = model.get_input_embeddings().weight
    assert model.yojo.separator_id == size and after.shape == before.shape
    assert torch.allclose(after[size], before[:size].mean(0), atol=1e-7)
    yojo.unpatch(model)
    assert torch.equal(model.get_input_embeddings().weight, before)


def test_unpatch_leaves_nothing_behind(fresh, samples):
    model, processor = fresh
    reference = copy.deepcopy(model)
    yojo.unpatch(yojo.patch(model, processor))
    assert set(model.__dict__) == set(reference.__dict__) and "score" not in dict(model.named_modules())
    assert model.config.to_dict() == reference.config.to_dict()
    for config, stock in ((model.config, reference.config), (model.config.text_config, reference.config.text_config)):
        assert config._attn_implementation == stock._attn_implementation
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert yojo.unpatch(model) is model  # nothing to do


def test_a_model_made_of_a_patched_models_config_is_an_ordinary_one(backbone):
    model = yojo.patch(copy.deepcopy(backbone[0]))
    config = copy.deepcopy(model.config)
    del config.yojo
    other = transformers.AutoModelForImageTextToText.from_config(config)
    yojo.patch(other)
    assert other.yojo.stock_attention == model.yojo.stock_attention == "sdpa"
    assert other.config.text_config._attn_implementation == "yojo_sdpa"
    assert yojo.unpatch(other).config.text_config._attn_implementation == "sdpa"


def test_wrapped_models_are_unwrapped(fresh, examples):
    from peft import LoraConfig, get_peft_model

    model, processor = fresh
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))
    compiled = torch.compile(wrapped, backend="eager")
    assert yojo.patch(compiled, processor) is compiled and unwrap(compiled) is model and is_patched(model)
    batch = yojo.Collator(processor, compiled)(examples)
    assert wrapped(**batch).scores.shape == (5, 4)
    assert yojo.unpatch(compiled) is compiled and not is_patched(model)


def test_adding_a_token_below_peft_is_refused(fresh):
    from peft import LoraConfig, get_peft_model

    model, processor = fresh
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"]))
    with pytest.raises(ValueError, match=r"call yojo\.patch before PEFT wraps the model"):
        yojo.patch(wrapped, processor)
    assert not is_patched(model)


def test_without_a_processor_packed_rows_are_scored_all_the_same(fresh, examples):
    model, processor = fresh
    yojo.patch(model, processor)
    separator = model.yojo.separator_id
    yojo.unpatch(model)
    model.resize_token_embeddings(separator + 1, mean_resizing=False)
    yojo.patch(model)
    assert model.yojo.separator_id is None
    batch = yojo.Collator(processor, model)(examples)
    assert model(**batch).scores.shape == (5, 4)


def test_the_forward_keeps_the_models_signature(fresh):
    import inspect

    model, processor = fresh
    stock = list(inspect.signature(model.forward).parameters)
    yojo.patch(model, processor)
    patched = list(inspect.signature(model.forward).parameters)
    assert [name for name in patched if name not in NEW_ARGUMENTS] == stock


def test_a_layout_that_is_lost_is_an_error():
    class Module(torch.nn.Module):
        pass

    query = torch.zeros(1, 2, 5, 4)
    with pytest.raises(RuntimeError, match="the layout of the packed row did not reach Module"):
        attend(Module(), query, query, query, torch.zeros(1, 1, 1, 1), stock="sdpa")


def test_flash_attention_sees_its_own_name(fresh, monkeypatch):
    """Ordinary inputs of a model that runs flash attention reach it under the name it knows."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = []

    def flash(module, query, key, value, attention_mask, **kwargs):
        seen.append((module.config._attn_implementation, module.layer_idx))
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("fake_flash", flash)
    ALL_MASK_ATTENTION_FUNCTIONS.register("fake_flash", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model, processor = fresh
    ids = torch.tensor([[5, 6, 7]])
    expected = model(input_ids=ids).logits
    model.config.text_config._attn_implementation = "fake_flash"
    yojo.patch(model, processor)
    assert torch.equal(model(input_ids=ids).logits[..., : expected.shape[-1]], expected)
    assert seen == [("fake_flash", layer) for layer in range(4)]


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"separators": None}, TypeError, "layout is given without separators"),
        ({"labels": torch.zeros(1, 3)}, ValueError, "labels has no meaning for a packed row"),
        ({"rankings": torch.ones(5, 3)}, ValueError, r"rankings must have shape \[5, 4\]"),
    ],
)
def test_packed_batches_that_make_no_sense(make_reward_model, examples, changes, error, message):
    reward_model = make_reward_model()
    with pytest.raises(error, match=message):
        reward_model.model(**(reward_model.collator(examples) | changes))


def plain_batch(reward_model, texts, rankings=None):
    """A right-padded [B, L] batch of texts in which the separator is parsed, as a script of the user's makes it."""
    tokenizer = reward_model.processor.tokenizer
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    return dict(batch) | ({} if rankings is None else {"rankings": torch.tensor(rankings)})


def test_a_pass_leaves_the_separators_hook_in_its_place(make_reward_model):
    """It is put back where it is missing, and nowhere else: hooks run in the order in which they were registered."""
    model = make_reward_model().model
    embedding = model.get_input_embeddings()
    before = dict(embedding._forward_hooks)
    model(input_ids=torch.tensor([[5, 6, model.yojo.separator_id]]))
    assert len(before) == 1 and list(embedding._forward_hooks.items()) == list(before.items())


TEXTS = ["which digit is this ? seven <|resp_sep|> two <|resp_sep|>", "a digit ? one <|resp_sep|>"]


def test_plain_inputs_with_separators_are_scored(make_reward_model):
    reward_model = make_reward_model()
    output = reward_model.model(**plain_batch(reward_model, TEXTS, [[1, 2], [1, -1]]))
    assert output.scores.shape == (2, 2) and output.scores[1, 1] == -torch.inf and output.loss.isfinite()
    alone = [reward_model.model(**plain_batch(reward_model, [text])).scores for text in TEXTS]
    assert (output.scores[0] - alone[0][0]).abs().max() <= 2e-6
    assert (output.scores[1, :1] - alone[1][0]).abs().max() <= 2e-6
    positional = reward_model.model(plain_batch(reward_model, TEXTS[:1])["input_ids"])
    assert torch.equal(positional.scores, alone[0])


@pytest.mark.parametrize(
    "rankings, message",
    [
        ([[1, 2], [-1, -1]], r"row 1 holds 1 separators but its rankings are \[-1, -1\]"),
        ([[1, -1], [1, -1]], "row 0 holds 2 separators but its rankings are"),
        ([[1, 2], [1, 2]], "row 1 holds 1 separators but its rankings are"),
        ([[1, 2]], r"rankings must have shape \[2, responses\]"),
    ],
)
def test_plain_rankings_that_do_not_fit(make_reward_model, rankings, message):
    reward_model = make_reward_model()
    with pytest.raises(ValueError, match=message):
        reward_model.model(**plain_batch(reward_model, TEXTS, rankings))


def test_plain_inputs_that_cannot_be_scored(make_reward_model):
    isolated = make_reward_model(mode="isolated")
    with pytest.raises(ValueError, match=r"scored in comparative mode only.*mode='isolated'.*use yojo\.Collator"):
        isolated.model(**plain_batch(isolated, TEXTS))
    comparative = make_reward_model()
    with pytest.raises(ValueError, match="row 1 of the batch holds no separator"):
        comparative.model(**plain_batch(comparative, [TEXTS[0], "no separator"]))
    with pytest.raises(ValueError, match="rankings are given but nothing to score"):
        comparative.model(**plain_batch(comparative, ["no separator"], [[1]]))


def test_import_is_light():
    """`import yojo` loads no library at all; what is used loads what it needs."""
    code = (
        "import sys; before = set(sys.modules); import yojo\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "assert new <= {'yojo', *sys.stdlib_module_names}, new\n"
        "yojo.patch, yojo.Example, yojo.RewardModel\n"
        "import torch; assert not torch.cuda.is_initialized()\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

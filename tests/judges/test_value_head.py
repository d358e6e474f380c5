"""Value heads as judges: scores are those of TRL's rule, computed from the stock forward of each conversation alone."""

import concurrent.futures
import json
import logging
import pickle

import pytest
import real_processors
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from test_classifier import CONFIGS, EXAMPLES, farthest, ids_of, tokenizer

import yojo
from yojo.judges import Classifier, ValueHead, load_judge
from yojo.scoring.job import differences

PREFIX = "v_head.summary."


def model(family="llama", seed=3, **options):
    kind = tokenizer()
    sizes = tiny.TEXT | dict(vocab_size=len(kind), pad_token_id=None, bos_token_id=None, eos_token_id=None)
    if family == "gpt2":
        sizes = dict(vocab_size=len(kind), n_embd=32, n_layer=2, n_head=4, n_positions=256)
        sizes |= dict(bos_token_id=None, eos_token_id=None)
    elif family != "llama":
        sizes |= dict(head_dim=8)
    if family == "mistral":
        sizes |= dict(sliding_window=6)
    made = transformers.AutoModelForCausalLM.from_config(CONFIGS[family](**(sizes | options)))
    return tiny.randomise(made, seed)


def head(seed=0, width=tiny.HIDDEN, prefix=PREFIX, dtype=torch.float32):
    weight = torch.randn(1, width, generator=torch.Generator().manual_seed(seed)) / width**0.5
    return {f"{prefix}weight": weight.to(dtype), f"{prefix}bias": torch.tensor([0.7], dtype=dtype)}


def judge(family="llama", template="chatml", **options):
    return ValueHead(model(family), head(), tokenizer(template), **options)


def by_hand(made, tensors, inputs):
    """TRL's value at the last token: of the states that the causal model itself gives, in float64."""
    with torch.no_grad():
        states = made(**inputs, output_hidden_states=True).hidden_states[-1]
    weight, bias = (tensors[name].double() for name in sorted(tensors, reverse=True))
    return float(states[0, -1].double() @ weight[0] + bias[0])


def stock_scores(made, kind, examples=EXAMPLES, tensors=None):
    tensors = head() if tensors is None else tensors
    return [
        torch.tensor([by_hand(made, tensors, {"input_ids": torch.tensor([ids_of(kind, e, r)])}) for r in e.responses])
        for e in examples
    ]


def save(folder, made, kind, tensors=None, file="value_head.safetensors"):
    made.save_pretrained(folder)
    kind.save_pretrained(folder)
    if file.endswith("safetensors"):
        save_file(head() if tensors is None else tensors, folder / file)
    elif file:
        torch.save(head() if tensors is None else tensors, folder / file)
    return folder


@pytest.mark.parametrize("family", [name for name in CONFIGS if name != "modernbert"])
def test_scores_are_those_of_single_passes(family):
    made, kind = model(family), tokenizer()
    expected = stock_scores(made, kind)
    assert torch.cat(expected).std() > 0.03
    for batch_size in (1, 3, 8):
        found = ValueHead(made, head(), kind, batch_size=batch_size)
        assert found.batch_size == batch_size and found.order_free is True
        scores = found.score_many(EXAMPLES)
        assert farthest(scores, expected) <= 2e-6 and all(s.dtype == torch.float32 for s in scores)
    assert farthest(found.score_many(iter(EXAMPLES[::-1]))[::-1], expected) <= 2e-6
    assert found.score_many([]) == []


def test_what_the_last_token_is():
    """The very last of the conversation, whatever it is: the template's line break, a padding token; no generation prompt."""
    made, kind = model(pad_token_id=tokenizer().convert_tokens_to_ids("<|im_end|>")), tokenizer()
    assert ids_of(kind, EXAMPLES[0], "yes")[-1] != made.config.pad_token_id
    assert farthest(ValueHead(made, head(), kind).score_many(EXAMPLES), stock_scores(made, kind)) <= 2e-6
    kind.chat_template = kind.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    assert ids_of(kind, EXAMPLES[0], "yes")[-1] == made.config.pad_token_id
    expected = stock_scores(made, kind)
    assert farthest(ValueHead(made, head(), kind).score_many(EXAMPLES), expected) <= 2e-6
    # A classifier of transformers would read the token before.
    one = ids_of(kind, EXAMPLES[0], "yes")[:-1]
    assert abs(by_hand(made, head(), {"input_ids": torch.tensor([one])}) - expected[0][0]) > 0.01


@pytest.mark.parametrize("padding", [None, -1, 10**9, 0])
def test_padding_needs_no_token(caplog, padding):
    made, kind = model(), tokenizer(padding_side="left")
    made.config.pad_token_id = padding
    found = ValueHead(made, head(), kind)
    assert found.batch_size == 8 and not caplog.text
    assert farthest(found.score_many(EXAMPLES), stock_scores(model(), kind)) <= 2e-6


def test_a_model_that_reads_padding_takes_one_at_a_time(caplog, monkeypatch):
    made, kind = model(), tokenizer()
    forward = type(made.model).forward

    def reads_padding(self, input_ids=None, **kwargs):
        found = forward(self, input_ids, **kwargs)
        found.last_hidden_state = found.last_hidden_state + input_ids.shape[1]
        return found

    monkeypatch.setattr(type(made.model), "forward", reads_padding)
    assert ValueHead(made, head(), kind).batch_size == 1
    assert "scores a row otherwise where another one is longer" in caplog.text


def test_no_logits_are_computed(monkeypatch):
    found = judge()

    def refuse(*args, **kwargs):
        raise AssertionError("logits of the vocabulary")

    monkeypatch.setattr(found.model.lm_head, "forward", refuse)
    assert found.score_many(EXAMPLES)


def test_half_precision_keeps_the_head_in_float32():
    made, kind = model().to(torch.bfloat16), tokenizer()
    found = ValueHead(made, head(), kind, batch_size=1)
    scores, expected = found.score_many(EXAMPLES), stock_scores(made, kind)
    assert farthest(scores, expected) <= 2e-6  # a head in bfloat16 would be off by 1e-3
    rounded = stock_scores(made, kind, tensors=head(dtype=torch.bfloat16))
    assert farthest(scores, rounded) > 1e-4


# ---- images ----


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "Gemma 3"])
def test_images(tmp_path, family):
    stock, processor = real_processors.build(family)
    save(tmp_path, stock, processor)
    found = ValueHead.from_pretrained(tmp_path)
    assert type(found.model) is type(stock)
    image, other = real_processors.image(40, 28, 1), real_processors.image(28, 28, 2)
    examples = [
        yojo.Example("Is it a dog?", ["yes", "no, it is not"], images=[image]),
        yojo.Example("Is it a dog?", ["yes"], images=[other]),
        yojo.Example("Are they?", ["yes"], images=[image, other]),
        yojo.Example("Is it a dog?", ["yes"]),
    ]
    scores, seen = found.score_many(examples), []
    for example, some in zip(examples, scores, strict=True):
        for response, score in zip(example.responses, some, strict=True):
            content = [{"type": "image", "image": one} for one in example.images]
            content.append({"type": "text", "text": example.prompt})
            turns = [
                {"role": "user", "content": content},
                {"role": "assistant", "content": [{"type": "text", "text": response}]},
            ]
            inputs = processor.apply_chat_template(turns, tokenize=True, return_dict=True, return_tensors="pt")
            assert ("pixel_values" in inputs) == bool(example.images)
            assert abs(by_hand(stock, head(), inputs) - score) <= 2e-6
            seen.append(round(score.item(), 4))
    assert len(set(seen)) == 5  # pictures and answers matter
    assert differences(found.fingerprint(), ValueHead(stock, head(), processor).fingerprint()) == []


@pytest.mark.parametrize("family", ["Qwen2.5-VL", "LLaVA-OneVision"])
def test_images_videos_and_turns(tmp_path, family):
    stock, processor = real_processors.build(family)
    found, own = ValueHead(stock, head(), processor), real_processors.stock_processor(family)
    responses = real_processors.RESPONSES[:2]
    for name, prompt in real_processors.cases(tmp_path).items():
        scores = found.score_many([real_processors.example(prompt, responses)])[0]
        options = {"processor_kwargs": dict(prompt.options)} if prompt.options else {}
        for response, score in zip(responses, scores, strict=True):
            answer = {"role": "assistant", "content": [{"type": "text", "text": response}]}
            inputs = own.apply_chat_template(
                [*prompt.messages, answer], tokenize=True, return_dict=True, return_tensors="pt", **options
            )
            inputs = {key: value for key, value in inputs.items() if key != "video_metadata"}
            assert abs(by_hand(stock, head(), inputs) - score) <= 2e-6, name


def test_images_are_refused_where_only_a_tokenizer_is_given():
    with pytest.raises(
        ValueError, match="example 'p': the prompt has images, and this classifier was given a tokenizer"
    ):
        judge().score_many([yojo.Example("Which?", ["7"], images=[real_processors.image(8, 8, 0)], id="p")])


# ---- threads, dates, company ----


def test_threads_training_mode_and_copies():
    made = model(attention_dropout=0.5)
    found = ValueHead(made.train(), head(), tokenizer())
    expected = found.score_many(EXAMPLES)
    assert made.training and farthest(expected, stock_scores(made.eval(), tokenizer())) <= 2e-6
    made.train()
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        results = list(pool.map(lambda _: found.score_many(EXAMPLES), range(12)))
    assert all(farthest(scores, expected) <= 2e-6 for scores in results) and made.training
    found = judge()
    again = pickle.loads(pickle.dumps(found))
    assert farthest(again.score_many(EXAMPLES), found.score_many(EXAMPLES)) == 0
    assert again.fingerprint() == found.fingerprint()


def test_company_and_order_do_not_count():
    found = judge()
    alone = [found.score_many([e])[0] for e in EXAMPLES]
    assert farthest(found.score_many(EXAMPLES * 30), alone * 30) <= 2e-6
    turned = [yojo.Example(e.prompt, list(e.responses[::-1])) for e in EXAMPLES]
    assert farthest([s.flip(0) for s in found.score_many(turned)], alone) <= 2e-6


def test_the_date_of_a_template(caplog):
    kind = tokenizer()
    kind.chat_template = "{{ strftime_now('%Y-%m-%d') }}" + kind.chat_template
    with caplog.at_level(logging.WARNING):
        today = ValueHead(model(), head(), kind)
    assert "prints today's date, on which scores depend" in caplog.text and len(today.fingerprint()["date"]) == 10
    other = ValueHead(model(), head(), kind, date="2020-02-03")
    assert "2020-02-03" in kind.decode(other.conversations(EXAMPLES[0])[0])
    assert other.fingerprint()["date"] == "2020-02-03"
    with pytest.raises(ValueError, match="and the chat template prints none"):
        judge(date="2020-02-03")


def test_too_long_is_an_error():
    longest = max(len(ids) for ids in judge().conversations(EXAMPLES[1]))
    with pytest.raises(ValueError, match=f"conversation of {longest} tokens, 1 more than max_length={longest - 1}"):
        judge(max_length=longest - 1).score_many(EXAMPLES)
    assert judge(max_length=longest).score_many(EXAMPLES)


# ---- files ----


@pytest.mark.parametrize("file", ["value_head.safetensors", "value_head.bin"])
@pytest.mark.parametrize("prefix", [PREFIX, "summary.", ""])
def test_folders(tmp_path, file, prefix, caplog):
    made, kind = model("qwen3"), tokenizer()
    save(tmp_path, made, kind, head(prefix=prefix), file)
    expected = stock_scores(made, kind)
    found = load_judge(str(tmp_path), device="cpu", max_length=200)
    assert repr(found) == f"ValueHead(Qwen3ForCausalLM, {str(tmp_path)!r})" and found.max_length == 200
    assert farthest(found.score_many(EXAMPLES), expected) <= 2e-6 and not found.model.training
    assert farthest(ValueHead(made, tmp_path / file, kind).score_many(EXAMPLES), expected) <= 2e-6
    assert load_judge(tmp_path, dtype="bfloat16").model.dtype == torch.bfloat16 and not caplog.text
    with pytest.raises(ValueError, match="base_model is given, but .* holds a full model, a causal model with a value"):
        load_judge(tmp_path, base_model="x")
    with pytest.raises(ValueError, match="which has no modes"):
        load_judge(f"{tmp_path}#isolated")


def test_a_head_among_the_models_weights(tmp_path, caplog):
    """As `save_pretrained` of TRL's wrapper has it."""
    made, kind = model(), tokenizer()
    save(tmp_path, made, kind, file="")
    with pytest.raises(
        ValueError, match=r"has no value head: neither value_head.safetensors nor value_head.bin, nor v_"
    ):
        ValueHead.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file(load_file(file) | head(), file, {"format": "pt"})
    assert farthest(ValueHead.from_pretrained(tmp_path).score_many(EXAMPLES), stock_scores(made, kind)) <= 2e-6
    assert "no place for" not in caplog.text


def test_a_head_that_was_saved_in_half_precision(tmp_path):
    made, kind = model().to(torch.bfloat16), tokenizer()
    tensors = head(dtype=torch.bfloat16)
    save(tmp_path, made, kind, tensors)
    found = ValueHead.from_pretrained(tmp_path, batch_size=1)
    made = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)  # whose rope's frequencies were never rounded
    assert found.model.dtype == made.dtype == torch.bfloat16 and {t.dtype for t in found.head.values()} == {
        torch.float32
    }
    assert farthest(found.score_many(EXAMPLES), stock_scores(made, kind, tensors=tensors)) <= 2e-6


def test_a_classifier_stays_one(tmp_path):
    config = transformers.LlamaConfig(**(tiny.TEXT | dict(vocab_size=len(tokenizer()), num_labels=1)))
    made = transformers.AutoModelForSequenceClassification.from_config(config)
    save(tmp_path, made, tokenizer())
    assert isinstance(load_judge(tmp_path), Classifier)


def test_heads_that_are_damaged():
    made, kind = model(), tokenizer()
    good = head()
    bad = [
        ({PREFIX + "weight": good[PREFIX + "weight"]}, r"must have the two tensors .*, got v_head.summary.weight$"),
        ({}, "got none$"),
        (good | {"v_head.other": torch.ones(1)}, "must have the two tensors"),
        ({"summary.weight": good[PREFIX + "weight"], "bias": good[PREFIX + "bias"]}, "must have the two tensors"),
        (head(width=tiny.HIDDEN + 1), r"has shape \[1, 33\], and this LlamaForCausalLM needs \[1, 32\]: it is another"),
        (good | {PREFIX + "bias": torch.zeros(2)}, r"bias of the value head has shape \[2\]"),
        (good | {PREFIX + "weight": torch.zeros(tiny.HIDDEN)}, r"shape \[32\], and .* needs \[1, 32\]"),
        (good | {PREFIX + "weight": torch.zeros(1, tiny.HIDDEN, dtype=torch.int8)}, "must be a float tensor"),
        (good | {PREFIX + "bias": [0.1]}, "must be a float tensor"),
        (good | {PREFIX + "bias": torch.tensor([float("nan")])}, "not finite"),
        (good | {PREFIX + "weight": torch.full((1, tiny.HIDDEN), float("inf"))}, "not finite"),
    ]
    for tensors, message in bad:
        with pytest.raises(ValueError, match=message):
            ValueHead(made, tensors, kind)


def test_files_that_are_damaged(tmp_path):
    made, kind = model(), tokenizer()
    save(tmp_path, made, kind)
    file = tmp_path / "value_head.safetensors"
    whole = file.read_bytes()
    for content in (b"", whole[:-5], whole[:40]):
        file.write_bytes(content)
        with pytest.raises(ValueError, match=r"value_head.safetensors is damaged"):
            load_judge(tmp_path)
    file.unlink()
    other = tmp_path / "value_head.bin"
    for content in (b"", b"nonsense", pickle.dumps(print)):
        other.write_bytes(content)
        with pytest.raises(ValueError, match=r"value_head.bin is damaged, or no file of tensors"):
            load_judge(tmp_path)
    torch.save([1.0], other)
    with pytest.raises(ValueError, match="got none"):
        load_judge(tmp_path)


def test_folders_that_lack_something(tmp_path):
    made, kind = model(), tokenizer()
    save(tmp_path, made, kind)
    file = tmp_path / "model.safetensors"
    weights = load_file(file)
    save_file({k: v for k, v in weights.items() if k != "lm_head.weight"}, file, {"format": "pt"})
    assert farthest(load_judge(tmp_path).score_many(EXAMPLES), stock_scores(made, kind)) <= 2e-6  # nobody reads it
    save_file({k: v for k, v in weights.items() if k != "model.norm.weight"}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks weights of its model: model.norm.weight; .* random numbers"):
        load_judge(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="is no causal model"):
        load_judge(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="holds an adapter and no model: put it on its base model"):
        load_judge(tmp_path)
    with pytest.raises(ValueError, match=r"revision='main' is given, .* huggingface_hub.snapshot_download"):
        ValueHead.from_pretrained(tmp_path, revision="main")
    with pytest.raises(ValueError, match="no such folder"):
        ValueHead.from_pretrained(tmp_path / "nowhere")


def test_models_that_have_no_value_head():
    kind = tokenizer()
    with pytest.raises(TypeError, match="must be a transformers model, got Linear"):
        ValueHead(torch.nn.Linear(1, 1), head(), kind)
    bare = transformers.LlamaModel(model().config)
    with pytest.raises(ValueError, match="must be a causal language model .*, got a LlamaModel"):
        ValueHead(bare, head(), kind)
    with pytest.raises(ValueError, match="its judge is yojo.RewardModel"):
        ValueHead(yojo.patch(model(), tokenizer()), head(), kind)
    with pytest.raises(ValueError, match="has no chat template"):
        ValueHead(model(), head(), tokenizer(chat_template=None))
    with pytest.raises(ValueError, match="batch_size must be an int of at least 1"):
        judge(batch_size=0)


# ---- adapters, fingerprints ----


def test_adapters():
    from peft import LoraConfig, PromptTuningConfig, get_peft_model

    kind = tokenizer()
    made = get_peft_model(model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    found = ValueHead(made, head(), kind)
    expected = stock_scores(made.eval(), kind)
    assert farthest(found.score_many(EXAMPLES), expected) <= 2e-6
    assert farthest(expected, stock_scores(model(), kind)) > 0.01
    told = [line.split(":")[0] for line in differences(judge().fingerprint(), found.fingerprint())]
    assert told == ["weights.adapter"]
    prompts = get_peft_model(model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="puts tokens of its own before the conversation"):
        ValueHead(prompts, head(), kind)


def test_fingerprints(tmp_path):
    found = judge()
    before = found.fingerprint()
    assert json.loads(json.dumps(before)) == before and before["judge"] == "ValueHead"
    found.score_many(EXAMPLES)
    assert found.fingerprint() == before == judge(max_length=999, batch_size=2).fingerprint()
    save(tmp_path, model(), tokenizer())
    loaded = ValueHead.from_pretrained(tmp_path)

    def told(other):
        return sorted(line.split(":")[0] for line in differences(before, other.fingerprint()))

    assert told(loaded) == [] and farthest(loaded.score_many(EXAMPLES), found.score_many(EXAMPLES)) == 0
    loaded.model.config.pad_token_id = 5  # which no score depends on
    assert told(loaded) == []
    for name in ("weight", "bias"):
        other = judge()
        other.head[name].view(-1)[0] += 1e-6
        assert told(other) == ["weights.head"]
    other = judge()
    other.model.model.norm.weight.data[3] += 1e-3
    assert told(other) == ["weights.backbone"]
    assert told(judge(template="zephyr"))[0] == "chat_template"
    assert told(ValueHead.from_pretrained(tmp_path, dtype=torch.bfloat16)) == ["dtype", "weights.backbone"]

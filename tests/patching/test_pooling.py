"""Poolings: each against a loop over responses, in every mode, and against stock single-response passes."""

import functools
import json
import pickle
import random

import pytest
import tiny
import torch
from family_cases import PARITY, close, continued, gradients, patched, samples_of, score, stock_of

import yojo
from yojo.config import CHOICES
from yojo.files.saved import CONFIG_FILE
from yojo.inputs.packing import orders
from yojo.patching.pooling import pool, rows_read
from yojo.patching.readings import Separators
from yojo_kernels import score_head

POOLINGS = CHOICES["pooling"]
MODES = ({"mode": "comparative"}, {"mode": "isolated"}, {"mode": "comparative", "permutations": 3})

each_pooling = pytest.mark.parametrize("pooling", POOLINGS)


def vector_of(hidden, pooling):
    """What one response is scored from: hidden [n + 1, H], its n tokens and its separator -> [H] or [2H]."""
    own = hidden[:-1]
    first, last = own[0], own[-1]
    return {
        "separator": hidden[-1],
        "last": last,
        "first": first,
        "first_last_concat": torch.cat([first, last]),
        "first_last_add": first + last,
        "first_last_sub": last - first,
        "response_mean": sum(own) / len(own),
    }[pooling]


def head_of(head, vector):
    """The value head on one vector, in float64."""
    inner = torch.nn.functional.silu(head.weight1.double() @ vector + head.bias1.double())
    return (head.weight2.double() @ inner + head.bias2.double())[0] / head.scale


def hidden_of(model, batch):
    """(output of the model, its final hidden states [1, T, H] with their gradient kept)."""
    kept = []
    handle = model.base_model.register_forward_hook(lambda module, inputs, output: kept.append(output[0]))
    try:
        output = model(**batch)
    finally:
        handle.remove()
    (hidden,) = kept
    if hidden.requires_grad:
        hidden.retain_grad()
    return output, hidden


# ---- the pooling itself ----

# Two readings, of three tokens and of one; the first row is a prompt's, -1 a separator's.
HIDDEN = [[7, 7], [1, 10], [2, 30], [6, 50], [-1, -1], [3, 5], [-1, -1]]
POOLED = {
    "separator": [[-1, -1], [-1, -1]],
    "last": [[6, 50], [3, 5]],
    "first": [[1, 10], [3, 5]],
    "first_last_concat": [[1, 10, 6, 50], [3, 5, 3, 5]],
    "first_last_add": [[7, 60], [6, 10]],
    "first_last_sub": [[5, 40], [0, 0]],
    "response_mean": [[3, 30], [3, 5]],
}


@each_pooling
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_worked_example(pooling, dtype):
    separators = Separators.build([[[(1, 4)], [(5, 6)]]], pooling)
    assert separators.rows.tolist() == [[4], [6]]
    pooled = pool(torch.tensor(HIDDEN, dtype=dtype), separators.read, pooling, separators.lengths)
    assert pooled.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert pooled.tolist() == POOLED[pooling]


def many(pooling, seed=0, prompt=5):
    """Readings of 1 to 9 tokens behind a few prompts, in shuffled order: (rows of the hidden states, separators)."""
    rng = random.Random(seed)
    spans, row = [], 0
    for _ in range(3):
        row += prompt
        sample = []
        for _ in range(4):
            length = rng.choice([1, 2, 9])
            sample.append([(row, row + length)])
            row += length + 1
        rng.shuffle(sample)
        spans.append(sample)
    return row, Separators.build(spans, pooling), [span for sample in spans for ((span),) in sample]


@each_pooling
def test_values_and_gradients_are_those_of_a_loop(pooling):
    rows, separators, spans = many(pooling)
    hidden = torch.randn(rows, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1), requires_grad=True)
    pooled = pool(hidden, separators.read, pooling, separators.lengths)
    looped = torch.stack([vector_of(hidden[first : separator + 1], pooling) for first, separator in spans])
    weight = torch.randn(looped.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    assert pooled.shape == looped.shape and (pooled - looped).abs().max() <= 1e-14
    got, expected = (torch.autograd.grad((x * weight).sum(), hidden)[0] for x in (pooled, looped))
    assert (got - expected).abs().max() <= 1e-14
    assert torch.autograd.gradcheck(lambda x: pool(x, separators.read, pooling, separators.lengths), hidden)


@each_pooling
def test_gathered_rows_pool_alike(pooling):
    """All that is read are the rows of `read`: a backbone may compute no others."""
    rows, separators, _ = many(pooling)
    hidden = torch.randn(rows, 6, generator=torch.Generator().manual_seed(1)).bfloat16()
    gathered = hidden[separators.read]
    expected = pool(hidden, separators.read, pooling, separators.lengths)
    assert torch.equal(pool(gathered, torch.arange(len(gathered)), pooling, separators.lengths), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_mean_over_thousands_of_tokens_is_right_to_the_last_bit(dtype):
    lengths = [1, 5000, 3, 2999]
    generator = torch.Generator().manual_seed(0)
    # Far from zero, where a running float32 sum loses bits.
    hidden = (torch.randn(sum(lengths), 8, generator=generator) + 30).to(dtype)
    expected = torch.stack([part.double().mean(0) for part in hidden.split(lengths)]).float()
    got = pool(hidden, torch.arange(sum(lengths)), "response_mean", torch.tensor(lengths))
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    order = [3, 1, 0, 2]
    rows = torch.cat([torch.arange(sum(lengths)).split(lengths)[i] for i in order])
    moved = pool(hidden, rows, "response_mean", torch.tensor([lengths[i] for i in order]))
    assert torch.equal(moved, expected[order])


def test_low_precision_is_joined_in_float32():
    hidden = torch.tensor([[256.0], [1.0]], dtype=torch.bfloat16)  # their sum has no bfloat16
    rows = torch.tensor([0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert pool(hidden, rows, "first_last_add").tolist() == [[257.0]]
        assert pool(hidden, rows, "first_last_sub").tolist() == [[-255.0]]
        assert pool(hidden, rows, "response_mean", torch.tensor([2])).tolist() == [[128.5]]


# ---- the patched model ----


def packed_spans(collator, encoded):
    """Per sample and response the (first row, separator's row) of each reading, from lengths alone."""
    spans, row = [], 0
    for item in encoded:
        row += len(item.prompt_ids)
        count = len(item.responses)
        isolated = collator.config.mode == "isolated"
        found = [[] for _ in range(count)]
        for order in [tuple(range(count))] if isolated else orders(count, collator.config):
            for n in order:
                found[n].append((row, row + len(item.responses[n]) - 1))
                row += len(item.responses[n])
        spans.append(found)
    return spans


@each_pooling
@pytest.mark.parametrize("options", MODES, ids=["comparative", "isolated", "permuted"])
def test_scores_and_gradients_are_those_of_a_loop(pooling, options):
    model, collator = patched("llama", pooling=pooling, **options)
    model.yojo.whole_last_layer = "every row is compared"
    prompts = list(tiny.prompts("llama").values())
    lengths = ((3, 1, 6), (1,), (2, 4))  # one response has one order only: the others are filled up
    encoded = [
        collator.from_processed(prompt, tiny.responses(i, lengths[i]), rankings=[*range(1, len(lengths[i]) + 1)])
        for i, prompt in enumerate(prompts)
    ]
    output, hidden = hidden_of(model, collator.pack(encoded))
    output.loss.backward()
    states = hidden.detach()[0].double().requires_grad_()
    scores = [
        torch.stack([
            sum(head_of(model.score, vector_of(states[a : b + 1], pooling)) for a, b in readings) / len(readings)
            for readings in sample
        ])
        for sample in packed_spans(collator, encoded)
    ]  # fmt: skip
    for row, expected in zip(output.scores, scores, strict=True):
        assert (row[: len(expected)] - expected).abs().max() <= PARITY
    assert 0.1 < torch.cat(scores).abs().mean() < 10
    # The states are looked at behind the embedding, so the separator's delta has no part in the loop.
    head = {name: p.grad.clone() for name, p in model.score.named_parameters() if name != "separator_delta"}
    model.zero_grad()
    loss = sum(torch.nn.functional.cross_entropy(one[None], torch.tensor([0])) for one in scores) / len(scores)
    loss.backward()
    close({"hidden": hidden.grad[0].double()}, {"hidden": states.grad}, 1e-5)
    close(head, {name: model.score.get_parameter(name).grad for name in head}, 1e-5)


@functools.cache
def stock(family):
    return stock_of(family, patched(family)[0]).double()


def in_float64(prompt, responses):
    """A processed prompt whose pixels are float64, and its responses."""
    return {name: value.double() if value.is_floating_point() else value for name, value in prompt.items()}, responses


@each_pooling
@pytest.mark.parametrize("family", ["qwen3_vl", "gemma3", "molmo2", "mistral"])
@torch.no_grad()
def test_isolated_equals_single_passes(family, pooling):
    model, collator = patched(family, mode="isolated", pooling=pooling)
    model.double()
    names = [name for name in samples_of(family) if "video" not in name][:3]
    samples = [in_float64(*samples_of(family)[name]) for name in names]
    head = model.score
    for (prompt, responses), scores in zip(samples, score(model, collator, samples), strict=True):
        vectors = []
        for ids in responses:
            inputs = continued(prompt, [*ids, collator.separator_id], family)
            hidden = stock(family).base_model(**inputs, use_cache=False)[0][0]
            vectors.append(vector_of(hidden[-len(ids) - 1 :], pooling))
        expected = score_head(
            torch.stack(vectors),
            torch.arange(len(vectors)),
            *(head.weight1, head.bias1, head.weight2, head.bias2),
            scale=head.scale,
        )
        assert scores.dtype == torch.float64 and (scores - expected).abs().max() <= 1e-13


@pytest.mark.parametrize("pooling", ["last", "first_last_concat", "response_mean"])
def test_order_and_company_change_nothing(pooling):
    model, collator = patched("qwen3", mode="isolated", pooling=pooling)
    prompt, responses = tiny.prompts("qwen3")["text"], tiny.responses(0, (4, 1, 7))
    (straight,) = score(model, collator, [(prompt, responses)])
    (turned,) = score(model, collator, [(prompt, responses[::-1])])
    assert (turned - straight.flip(0)).abs().max() <= PARITY
    model, collator = patched("qwen3", pooling=pooling)
    (before,) = score(model, collator, [(prompt, responses)])
    (after,) = score(model, collator, [(prompt, [*responses, tiny.words(4, 77)])])
    assert (after[:-1] - before).abs().max() <= PARITY


@pytest.mark.parametrize("pooling", ["first_last_sub", "response_mean"])
def test_gradient_checkpointing_changes_nothing(pooling):
    model, collator = patched("llama", mode="isolated", pooling=pooling)
    model.train()
    prompt = tiny.prompts("llama")["text"]
    batch = collator.pack([collator.from_processed(prompt, tiny.responses(), rankings=[2, 1, 3])])
    plain = gradients(model, batch)
    model.gradient_checkpointing_enable()
    close(gradients(model, batch), plain, 1e-6)


@pytest.mark.parametrize(
    "pooling, backend",
    [
        ("response_mean", "eager"),
        *(pytest.param(name, "aot_eager", marks=pytest.mark.soak) for name in ("first_last_concat", "response_mean")),
    ],
)
def test_compiled_in_one_graph(pooling, backend, reference_attention):
    model, collator = patched("llama", mode="isolated", pooling=pooling)
    prompts = list(tiny.prompts("llama").values())
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    torch._dynamo.reset()
    for seed, lengths in enumerate([(3, 1, 5), (4, 2, 2, 6)]):  # the second with other shapes
        encoded = collator.from_processed(prompts[seed], tiny.responses(seed, lengths), rankings=[1] * len(lengths))
        batch = collator.pack([encoded])
        assert (compiled(**batch).scores - model(**batch).scores).abs().max() <= PARITY
    expected = gradients(model, batch)
    close(gradients(compiled, batch), {f"_orig_mod.{name}": gradient for name, gradient in expected.items()}, 1e-5)


@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_the_heads_width_and_divisor(head):
    """The paper's code divides by sqrt(H) with "first_last_concat", too, although the head reads 2H numbers."""
    model, _ = patched("llama", pooling="first_last_concat", head=head)
    weight = model.score.weight1 if head == "mlp" else model.score.weight2
    assert weight.shape[1] == 2 * tiny.HIDDEN and model.score.scale == tiny.HIDDEN**0.5
    model, _ = patched("llama", pooling="first_last_add", head=head)
    weight = model.score.weight1 if head == "mlp" else model.score.weight2
    assert weight.shape[1] == tiny.HIDDEN and model.score.scale == tiny.HIDDEN**0.5


# ---- batches ----


@each_pooling
def test_a_batch_says_which_rows_are_read_and_moves_whole(make_reward_model, examples, pooling):
    reward_model = make_reward_model(mode="isolated", pooling=pooling)
    batch = reward_model.collator(examples)
    separators, ids = batch["separators"], batch["input_ids"][0]
    assert separators.read.ndim == 1 and separators.read.dtype == torch.int64
    is_separator = ids[separators.read] == reward_model.collator.separator_id
    assert is_separator.all() if pooling == "separator" else not is_separator.any()
    tensors = {name for name, value in vars(separators).items() if isinstance(value, torch.Tensor)}
    expected = {"rows", "weights", "cells", "offsets"}
    expected |= {"tokens"} if pooling != "separator" else set()
    expected |= {"lengths"} if pooling == "response_mean" else set()
    assert tensors == expected
    moved = separators.to("meta")
    assert all(getattr(moved, name).device.type == "meta" for name in tensors)
    copied = pickle.loads(pickle.dumps(separators))
    assert all(torch.equal(getattr(copied, name), getattr(separators, name)) for name in tensors)
    assert copied.pooling == pooling


def test_a_batch_made_for_another_pooling_is_refused(make_reward_model, examples):
    last, mean = make_reward_model(pooling="last"), make_reward_model(pooling="response_mean")
    with pytest.raises(ValueError, match="made for pooling='response_mean'.*patched with pooling='last'.*Collator"):
        last.model(**mean.collator(examples))


# ---- ordinary inputs ----

TEXTS = ["which digit is this ? seven two <|resp_sep|> two <|resp_sep|>", "a digit ? one <|resp_sep|>"]


def plain_batch(reward_model, texts):
    tokenizer = reward_model.processor.tokenizer
    return dict(tokenizer(texts, padding=True, padding_side="right", return_tensors="pt"))


@torch.no_grad()
def test_plain_inputs_read_the_token_before_the_separator(make_reward_model):
    reward_model = make_reward_model(pooling="last")
    batch = plain_batch(reward_model, TEXTS)
    output, hidden = hidden_of(reward_model.model, batch)
    separators = (batch["input_ids"] == reward_model.collator.separator_id).nonzero()
    head = reward_model.model.score
    expected = [float(head_of(head, hidden[b, at - 1].double())) for b, at in separators.tolist()]
    assert output.scores.shape == (2, 2) and output.scores[1, 1] == -torch.inf
    got = output.scores[output.scores.isfinite()]
    assert len(expected) == 3 and (got - torch.tensor(expected)).abs().max() <= PARITY


@pytest.mark.parametrize("pooling", [name for name in POOLINGS if name not in ("separator", "last")])
def test_plain_inputs_do_not_say_where_a_response_begins(make_reward_model, pooling):
    reward_model = make_reward_model(pooling=pooling)
    with pytest.raises(ValueError, match=f"pooling='{pooling}' reads a response from its first token on.*Collator"):
        reward_model.model(**plain_batch(reward_model, TEXTS))


@pytest.mark.parametrize(
    "text, place", [("one <|resp_sep|> <|resp_sep|> two <|resp_sep|>", 2), ("<|resp_sep|> two <|resp_sep|>", 0)]
)
def test_plain_inputs_with_an_empty_response(make_reward_model, text, place):
    reward_model = make_reward_model(pooling="last")
    batch = plain_batch(reward_model, [TEXTS[1], text])
    is_separator = batch["input_ids"][1] == reward_model.collator.separator_id
    if place:
        place = int(is_separator.nonzero()[1])
        assert is_separator[place - 1]
    with pytest.raises(ValueError, match=f"row 1 of the batch holds an empty response.*at place {place}, and pooling"):
        reward_model.model(**batch)


# ---- checkpoints ----


@each_pooling
def test_saved_and_loaded_to_the_bit(make_reward_model, examples, tmp_path, pooling):
    reward_model = make_reward_model(mode="isolated", pooling=pooling, head_dim=16)
    reward_model.save_pretrained(tmp_path)
    loaded = yojo.RewardModel.from_pretrained(tmp_path)
    assert loaded.config.pooling == pooling
    assert all(map(torch.equal, loaded.score_many(examples), reward_model.score_many(examples)))


def test_a_head_of_another_width_is_refused(make_reward_model, tmp_path):
    make_reward_model(pooling="first_last_concat", head_dim=16).save_pretrained(tmp_path)
    description = json.loads((tmp_path / CONFIG_FILE).read_text())
    description["config"]["pooling"] = "first_last_add"
    (tmp_path / CONFIG_FILE).write_text(json.dumps(description))
    with pytest.raises(ValueError, match=r"weight1 has shape \[16, 256\], the model needs \[16, 128\]"):
        yojo.RewardModel.from_pretrained(tmp_path)


@each_pooling
def test_rows_of_one_response(pooling):
    expected = {"separator": [14], "last": [13], "first": [10], "response_mean": [10, 11, 12, 13]}
    assert rows_read(pooling, 10, 14) == expected.get(pooling, [10, 13])

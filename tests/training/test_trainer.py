"""`RewardTrainer` in one process: exactness of its steps, orders and draws, what is trained, predictions, wrong arguments."""

import copy
import types

import numpy as np
import pytest
import torch
from parallel_cases import losses, mixed_examples
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

import yojo
from yojo.demo import digits
from yojo.patching.state import unwrap
from yojo.training.arguments import RewardTrainingArguments
from yojo.training.batches import CostEstimate, Drawn, GlobalBatches
from yojo.training.trainer import RewardTrainer, center_penalty


def assert_same_gradients(found, expected):
    """Of float64: on each CPU float32 rounds its sums in an order of its own. The last bias has none but rounding."""
    assert set(found) == set(expected)
    largest = max(gradient.abs().max() for gradient in expected.values())
    for name, gradient in expected.items():
        assert found[name].dtype == gradient.dtype == torch.float64
        error = (found[name] - gradient).abs().max()
        assert error <= max(1e-12 * gradient.abs().max(), 1e-15 * largest), (name, error)


# ---- one step ----


@pytest.mark.parametrize("mode, tune", [("comparative", "lora"), ("isolated", "full")])
def test_a_packed_step_is_the_sum_of_its_samples(make, mode, tune):
    examples = mixed_examples(6)
    trainer, record = make(examples, mode=mode, tune=tune, shuffle_responses=False)
    alone = copy.deepcopy(trainer.model.double())
    trainer.train()
    assert len(record.shares) == 1 and record.shares[0][0] >= 3
    total = 0.0
    for example in examples:
        loss = alone(**trainer.collator([example])).loss / len(examples)
        loss.backward()
        total += loss.item()
    assert losses(trainer) == pytest.approx([total], rel=1e-6)
    expected = {name: p.grad for name, p in alone.named_parameters() if p.grad is not None}
    assert_same_gradients(record.gradients, expected)


def test_accumulation_is_one_larger_batch_and_many_rows_are_one_row(make):
    examples = mixed_examples(4)
    assert len({len(example.responses) for example in examples}) > 2
    found = {}
    for name, options in {
        "whole": {"row_tokens": 4096},
        "rows": {"row_tokens": 1},
        "accumulated": {"row_tokens": 4096, "accumulation": 4},
    }.items():
        trainer, record = make(examples, **options)
        trainer.model.double()
        trainer.train()
        found[name] = losses(trainer), record
    assert [share[:2] for share in found["whole"][1].shares] == [(1, 4)]
    assert [share[:2] for share in found["rows"][1].shares] == [(4, 4)]
    assert [share[:2] for share in found["accumulated"][1].shares] == [(1, 1)] * 4
    for name in ("rows", "accumulated"):
        assert found[name][0] == pytest.approx(found["whole"][0], rel=1e-6)
        assert_same_gradients(found[name][1].gradients, found["whole"][1].gradients)


def test_the_last_step_of_an_epoch_is_a_mean_over_fewer_samples(make):
    """7 examples in batches of 2, accumulated twice: the second step has 3 samples, in 2 batches."""
    examples = mixed_examples(7)
    trainer, record = make(examples, batch=4, accumulation=2, max_steps=2, learning_rate=0.0, loss="plackett_luce")
    trainer.train()
    assert [share[1] for share in record.shares] == [2, 2, 2, 1]
    model = trainer.model.eval()
    order = [index for batch in GlobalBatches(examples, 2, seed=trainer.args.order_seed) for _, index in batch]
    drawn = Drawn(examples, seed=trainer.args.order_seed)
    with torch.no_grad():
        each = [model(**trainer.collator([drawn[0, index].example])).loss.item() for index in order]
    assert losses(trainer) == pytest.approx([sum(each[:4]) / 4, sum(each[4:]) / 3], rel=1e-5)


def test_center_scores_adds_the_square_of_each_samples_mean(make):
    examples = mixed_examples(5)
    plain, _ = make(examples, row_tokens=1)
    centred, record = make(examples, row_tokens=1, center_scores=0.5)
    alone = copy.deepcopy(centred.model.double())
    plain.train()
    centred.train()
    penalties = []
    drawn = Drawn(examples, seed=centred.args.order_seed)
    for place in range(5):
        output = alone(**centred.collator([drawn[0, place].example]))
        scores = output.scores[output.scores.isfinite()]
        penalties.append(scores.mean() ** 2)
        ((output.loss + 0.5 * penalties[-1]) / 5).backward()
    penalty = 0.5 * sum(penalties).item() / 5
    assert penalty > 0.01
    assert losses(centred)[0] - losses(plain)[0] == pytest.approx(penalty, rel=1e-4)
    assert_same_gradients(record.gradients, {n: p.grad for n, p in alone.named_parameters() if p.grad is not None})


def test_center_penalty_leaves_missing_responses_out():
    scores = torch.tensor([[1.0, 3.0, -torch.inf], [1.0, -2.0, 4.0]], requires_grad=True)
    penalty = center_penalty(scores)
    assert penalty.tolist() == [4.0, 1.0]
    penalty.sum().backward()
    assert scores.grad[0].tolist() == [2.0, 2.0, 0.0]


@pytest.mark.parametrize("loss", ["best", "plackett_luce", "bradley_terry", "soft"])
def test_every_loss_trains(make, loss):
    examples = [example for example in mixed_examples(6) if len(example.responses) > 1]
    if loss == "soft":
        examples = [
            yojo.Example(e.prompt, e.responses, images=e.images, rankings=[float(rank == 1) for rank in e.rankings])
            for e in examples
        ]
    trainer, _ = make(examples, loss=loss, max_steps=12, learning_rate=3e-3, adam_epsilon=1e-8, shuffle_responses=False)
    trainer.train()
    found = losses(trainer)
    assert found[-1] < 0.85 * found[0]  # of the whole ranking the ties remain
    last = [line for line in trainer.state.log_history if "loss" in line][-1]
    assert {"best_of_n", "pairwise", "kendall_tau", "score_mean", "score_spread"} <= set(last)
    assert last["pairwise"] > 0.6  # for "soft", too, where the best has the highest target instead of the lowest rank


# ---- what is trained ----


def trained_names(trainer):
    return {name for name, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("tune", ["lora", "full", "head"])
def test_what_is_trained_changes_and_the_rest_does_not(make, tune):
    trainer, record = make(mixed_examples(4), tune=tune, adam_epsilon=1e-8)
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    names = trained_names(trainer)
    head = {name for name in names if ".score." in f".{name}"}
    assert len(head) == (4 if tune == "head" else 5)
    if tune == "head":
        assert names == head
    elif tune == "lora":
        assert names - head and all("lora_" in name and "language_model" in name for name in names - head)
    else:
        assert all("language_model" in name for name in names - head)
        assert {"model.language_model.embed_tokens.weight"} < names - head
    assert set(record.gradients) == names  # DDP does not look for parameters that get none
    for name, parameter in trainer.model.named_parameters():
        changed = not torch.equal(parameter, before[name])
        if name not in names:
            assert not changed, name
        elif "bias2" not in name and "lora_A" not in name:
            assert changed, name


def test_the_head_has_its_own_learning_rate(make):
    trainer, _ = make(
        mixed_examples(4), learning_rate=1e-4, head_learning_rate=7e-3, weight_decay=0.1, max_grad_norm=1.0
    )
    optimizer = trainer.create_optimizer()
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            in_head = ".score." in name and "separator_delta" not in name
            assert rates.pop(id(parameter)) == (7e-3 if in_head else 1e-4), name
            assert decays[id(parameter)] == (0.0 if "bias" in name else 0.1), name
    assert not rates


# ---- orders ----


class Batches(TrainerCallback):
    """The texts and ranks of every batch, in order."""

    def __init__(self, trainer):
        self.seen = []
        step = trainer.training_step

        def watched(model, inputs, num_items_in_batch=None):
            self.seen.append(
                (inputs["indices"], inputs["orders"], [row["rankings"].tolist() for row in inputs["rows"]])
            )
            return step(model, inputs, num_items_in_batch)

        trainer.training_step = watched


def seen_in_training(make, examples, **options):
    trainer, _ = make(examples, batch=2, max_steps=4, **options)
    batches = Batches(trainer)
    trainer.train()
    return batches.seen


def test_orders_change_with_the_epoch_and_the_seed_and_with_nothing_else(make):
    examples = mixed_examples(4)
    first, again = seen_in_training(make, examples), seen_in_training(make, examples)
    assert first == again
    # Neither loader workers nor how rows are packed have a say.
    assert seen_in_training(make, examples, dataloader_num_workers=2) == first
    assert seen_in_training(make, examples, data_seed=1) != first

    def orders(batches):
        return {
            index: tuple(order)
            for batch in batches
            for row, places in zip(batch[1], batch[0], strict=True)
            for order, index in zip(row, places, strict=True)
        }

    assert orders(first[:2]) != orders(first[2:])
    assert all(sorted(order) == list(range(len(order))) for order in orders(first).values())
    kept = seen_in_training(make, examples, shuffle_responses=False)
    assert all(order == tuple(range(len(order))) for order in orders(kept).values())


def test_two_responses_at_most_are_a_pair_of_different_ranks(make):
    examples = [e for e in mixed_examples(10) if len(e.responses) > 2]  # one of rank 1, the others of rank 2
    drawn, pairs = Drawn(examples, seed=0, max_responses=2), set()
    for epoch in range(30):
        for place, example in enumerate(examples):
            draw = drawn[epoch, place]
            assert sorted(draw.example.rankings) == [1, 2]
            assert [example.responses[n] for n in draw.order] == draw.example.responses
            assert [example.rankings[n] for n in draw.order] == draw.example.rankings
            pairs.add((place, draw.order))
    assert all(len({order for at, order in pairs if at == place}) > 2 for place in range(len(examples)))
    trainer, _ = make(examples, max_responses=2, loss="bradley_terry", mode="isolated")
    batches = Batches(trainer)
    trainer.train()
    assert all(sorted(ranks) == [1, 2] for row in batches.seen[0][2] for ranks in row)


def test_the_cost_of_an_example_follows_its_tokens(make):
    trainer, _ = make(mixed_examples(2))
    estimate = CostEstimate(trainer.collator, unwrap(trainer.model))
    few, many = yojo.Example("Which?", ["one"]), yojo.Example("Which?", ["one " * 40] * 8)
    assert estimate(many) > 100 > estimate(few) > 0
    image = digits.load_digits_split()[0][0][0]
    with_image = yojo.Example("Which?", ["one"], images=[image])
    tokens = len(trainer.collator.encode(with_image).prompt_ids) - len(trainer.collator.encode(few).prompt_ids)
    assert estimate(with_image) - estimate(few) == pytest.approx(tokens, abs=4)


def test_the_cost_is_the_same_with_a_tokenizer_in_python(make, monkeypatch):
    """One that has no Rust tokenizer is asked itself; where it raises, characters are counted."""
    trainer, _ = make(mixed_examples(2))
    estimate = CostEstimate(trainer.collator, unwrap(trainer.model))
    example = yojo.Example("Which of them is it?", ["It is a 3, which is more than 2.", "one"])
    expected = estimate(example)
    monkeypatch.setattr("yojo.training.batches.private_copy", lambda tokenizer, split_special: None)
    assert estimate(example) == expected
    few, many = yojo.Example("Which?", ["one"]), yojo.Example("Which?", ["one" * 40])
    trainer.collator.tokenizer = lambda text, **options: {}[text]
    assert estimate(many) - estimate(few) > 117


# ---- predictions ----


@pytest.mark.parametrize("mode", ["comparative", "isolated"])
def test_predictions_stand_in_the_data_sets_order(make, mode):
    examples = mixed_examples(9)
    trainer, _ = make(examples[:2], mode=mode)
    found = trainer.predict(examples)
    drawn = [Drawn(examples, seed=trainer.args.order_seed)[0, place] for place in range(9)]
    scored = yojo.RewardModel(trainer.model, trainer.processing_class).score_many([draw.example for draw in drawn])
    assert any(draw.order != tuple(sorted(draw.order)) for draw in drawn)
    assert found.predictions.shape == found.label_ids.shape == (9, 7)
    for line, (example, draw, scores) in enumerate(zip(examples, drawn, scored, strict=True)):
        count = len(example.responses)
        expected = torch.empty(count)
        expected[list(draw.order)] = scores
        np.testing.assert_allclose(found.predictions[line, :count], expected, atol=1e-6)
        assert np.isneginf(found.predictions[line, count:]).all()
        assert found.label_ids[line].tolist() == [*example.rankings, *[-1] * (7 - count)]
    if mode == "isolated":  # where the order says nothing
        given = yojo.RewardModel(trainer.model, trainer.processing_class).score_many(examples)
        for line, scores in enumerate(given):
            np.testing.assert_allclose(found.predictions[line, : len(scores)], scores, atol=1e-6)


def test_predictions_need_no_rankings(make):
    examples = mixed_examples(4)
    unranked = [yojo.Example(e.prompt, e.responses, images=e.images) for e in examples]
    trainer, _ = make(examples)
    found = trainer.predict(unranked)
    assert found.label_ids is None and found.predictions.shape == (4, 7)
    assert "test_loss" not in found.metrics and "test_best_of_n" not in found.metrics
    np.testing.assert_array_equal(found.predictions, trainer.predict(examples).predictions)


def test_several_evaluation_sets_and_metrics_of_ones_own(make):
    examples = mixed_examples(6)

    def accuracy(prediction):
        return {"accuracy": float((prediction.predictions.argmax(1) == prediction.label_ids.argmin(1)).mean())}

    trainer, _ = make(examples, {"a": examples[:2], "b": examples[2:]})
    trainer.compute_metrics = accuracy
    found = trainer.evaluate()
    assert {"eval_a_loss", "eval_b_loss", "eval_a_accuracy", "eval_b_best_of_n"} <= set(found)
    assert found["eval_a_loss"] != found["eval_b_loss"]


# ---- wrong arguments ----


def arguments(tmp_path, **options):
    options = {"dataloader_num_workers": 0} | options
    return RewardTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **options)


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"tune": "lorra"}, ValueError, "tune must be one of lora, full, head or None, got 'lorra'"),
        ({"row_tokens": 0}, ValueError, "row_tokens must be at least 1, got 0"),
        ({"max_responses": 1}, ValueError, "max_responses must be at least 2, got 1: one response is not compared"),
        ({"center_scores": -0.1}, ValueError, "center_scores must not be negative, got -0.1"),
        ({"remove_unused_columns": True}, ValueError, "remove_unused_columns must be False"),
        ({"mode": "both"}, ValueError, "mode must be one of comparative, isolated, got 'both'"),
        ({"mode": "isolated", "permutations": 2}, ValueError, "permutations has no meaning in isolated mode"),
        (
            {"global_batch_size": 6, "gradient_accumulation_steps": 4},
            ValueError,
            "global_batch_size 6 cannot be shared by 1 processes x 4 gradient_accumulation_steps: take a multiple of 4",
        ),
    ],
)
def test_wrong_training_arguments(tmp_path, options, error, message):
    with pytest.raises(error, match=message.replace("(", r"\(")):
        arguments(tmp_path, **options)


def test_a_global_batch_is_shared_out(tmp_path):
    args = arguments(tmp_path, global_batch_size=12, gradient_accumulation_steps=3)
    assert args.per_device_train_batch_size == 4


def test_wrong_arguments_of_the_trainer(make_reward_model, tmp_path):
    from peft import LoraConfig
    from transformers import TrainingArguments

    examples = mixed_examples(2)
    made = make_reward_model()

    def trainer(args=None, train_dataset=examples, **options):
        options = {"processing_class": made.processor} | options
        return RewardTrainer(copy.deepcopy(made.model), args or arguments(tmp_path), train_dataset, **options)

    for wrong, error, message in (
        (lambda: trainer(processing_class=None), ValueError, "processing_class is missing: pass the model's processor"),
        (
            lambda: trainer(TrainingArguments(output_dir=str(tmp_path))),
            TypeError,
            "args must be yojo.RewardTrainingArguments, got TrainingArguments",
        ),
        (lambda: trainer(data_collator=made.collator), ValueError, "data_collator is not taken"),
        (lambda: trainer(train_dataset=[]), ValueError, "the data set is empty"),
        (lambda: trainer(train_dataset=iter(examples)), TypeError, "a data set must have a length and be indexed"),
        (lambda: trainer(eval_dataset={"a": []}), ValueError, "the data set is empty"),
        (
            lambda: trainer(peft_config=LoraConfig(target_modules=["q_proj"])),
            ValueError,
            r"does not train the value head: add modules_to_save=\['score'\]",
        ),
        (
            lambda: trainer(arguments(tmp_path, mode="isolated")),
            ValueError,
            "is patched already, with mode='comparative'",
        ),
        (
            lambda: trainer(train_dataset=["text"]).train(),
            TypeError,
            "must hold yojo.Example objects, got str at place 0: yojo.data.load makes them",
        ),
        (lambda: trainer(train_dataset=None).train(), ValueError, "training needs a train_dataset"),
        (lambda: trainer().evaluate(), ValueError, "evaluation needs an eval_dataset"),
        (
            lambda: trainer(train_dataset=[yojo.Example("q", ["a", "b"])] * 2).train(),
            ValueError,
            "has no rankings: nothing says which response is better",
        ),
        (
            lambda: trainer(arguments(tmp_path, max_length=9)).train(),
            ValueError,
            "more than max_length=9",
        ),
    ):
        with pytest.raises(error, match=message):
            wrong()


def test_zero_3_is_refused(make_reward_model, tmp_path):
    made, args = make_reward_model(), arguments(tmp_path)
    args.deepspeed_plugin = types.SimpleNamespace(zero_stage=3)
    with pytest.raises(ValueError, match="ZeRO-3 is not supported: .* FSDP2 shards weights, too"):
        RewardTrainer(made.model, args, mixed_examples(2), processing_class=made.processor)


def test_one_process_uses_one_gpu(make, tmp_path, caplog):
    """transformers would wrap the model in DataParallel, which cannot share out packed rows."""
    made, _ = make(mixed_examples(2))
    args = RewardTrainingArguments(output_dir=str(tmp_path), use_cpu=True, per_device_train_batch_size=4)
    args._n_gpu = 3
    trainer = RewardTrainer(made.model, args, mixed_examples(2), processing_class=made.processing_class)
    assert args.n_gpu == 1 and trainer._train_batch_size == 4
    assert "3 GPUs are visible to one process, which uses the first" in caplog.text


# ---- FSDP ----


def test_an_adapter_of_ones_own_is_kept(make_reward_model, tmp_path):
    from peft import LoraConfig, get_peft_model

    made = make_reward_model()
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["score"])
    model = get_peft_model(made.model, config)
    trainer = RewardTrainer(model, arguments(tmp_path), mixed_examples(2), processing_class=made.processor)
    assert trainer.model is model and trained_names(trainer)
    with pytest.raises(ValueError, match="peft_config is given, but the model has an adapter already"):
        RewardTrainer(
            model, arguments(tmp_path), mixed_examples(2), processing_class=made.processor, peft_config=config
        )


# ---- memory ----


class Sizes(TorchDispatchMode):
    """Every operation whose output is new and as wide as the vocabulary."""

    def __init__(self, size):
        super().__init__()
        self.size, self.found, self.seen = size, [], 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.seen += 1
                if self.size in tensor.shape and tensor.untyped_storage()._cdata not in given:
                    self.found.append(str(function))
        return result


@pytest.mark.parametrize("tune", ["lora", "head", "full"])
def test_no_tensor_of_a_step_is_as_wide_as_the_vocabulary(make, tune):
    """But where the embedding itself is trained."""
    trainer, _ = make(mixed_examples(4), tune=tune)
    embedding = unwrap(trainer.model).get_input_embeddings().weight
    vocabulary = embedding.shape[0]
    assert vocabulary not in {size for p in trainer.model.parameters() for size in p.shape if p is not embedding}
    step = trainer._run_epoch
    sizes = Sizes(vocabulary)

    def watched(*args, **kwargs):
        with sizes:
            return step(*args, **kwargs)

    trainer._run_epoch = watched
    trainer.train()
    assert sizes.seen > 1000
    assert bool(sizes.found) == (tune == "full"), sizes.found


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing_factor": 0.1},
        {"train_sampling_strategy": "group_by_length"},
        {"batch_eval_metrics": True},
        {"include_num_input_tokens_seen": "all"},
    ],
)
def test_arguments_that_would_be_ignored_are_refused(tmp_path, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))} must be "):
        arguments(tmp_path, **options)


def test_a_mixture_is_evaluated_on_each_of_its_records_once(make):
    examples = mixed_examples(5)
    trainer, _ = make(examples)
    mixture = yojo.data.Mixture([examples[:3], examples[3:]], [0.5, 3])
    np.testing.assert_allclose(trainer.predict(mixture).predictions, trainer.predict(examples).predictions, rtol=1e-5)

"""Training over records that cannot be used: an error that names them, or skipped, counted and listed."""

import json
import struct

import jinja2
import pytest
import torch
from parallel_cases import losses, mixed_examples

import yojo
from yojo import data
from yojo.demo import digits
from yojo.training.batches import CostEstimate, Drawn, GlobalBatches


def test_bad_records_stop_training_unless_they_are_skipped(make, tmp_path):
    image = digits.load_digits_split()[0][0][0]
    broken = yojo.Example("Which?", ["one", "two"], images=[b"no image"], rankings=[1, 2], id="broken")
    unranked = yojo.Example("Which?", ["one", "two"], images=[image], id="unranked")
    examples = [*mixed_examples(3), broken, unranked]
    trainer, _ = make(examples)
    with pytest.raises(ValueError, match="broken|unranked"):
        trainer.train()
    trainer, record = make(examples, skip_bad=True)
    trainer.train()
    assert record.shares[0][1] == 3
    lines = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(line["index"] for line in lines) == [3, 4]
    assert any("'unranked' has no rankings" in line["reason"] for line in lines)
    trainer, _ = make([broken, unranked], skip_bad=True)
    with pytest.raises(ValueError, match="none of the last 2 examples can be used; one of them: "):
        trainer.train()


def test_a_process_that_has_nothing_good_gets_a_row_of_another_to_keep_in_step(make):
    """The first that can be used, whatever comes behind it."""
    good = mixed_examples(1)[0]
    long = yojo.Example("Which?", ["seven " * 300, "two"], rankings=[1, 2], id="long")
    trainer, _ = make([good], skip_bad=True, max_length=180)
    collate = trainer.get_train_dataloader().collate_fn
    drawn = Drawn([good, long])
    draws = [drawn[0, place] for place in range(2)]
    shares = []
    for rank in range(2):
        collate.rank, collate.world = rank, 2
        shares.append(collate(draws))
    assert sorted(share["samples"] for share in shares) == [0, 1]
    assert all(len(share["rows"]) == 1 and share["indices"] == [[0]] for share in shares)
    assert [index for share in shares for index, _ in share["skipped"]] == [1]


class Faulty:
    """Examples, and exceptions to raise in place of some."""

    def __init__(self, items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        if isinstance(self.items[index], BaseException):
            raise self.items[index]
        return self.items[index]


def test_whatever_one_record_raises_is_skipped_with_its_name(make, monkeypatch):
    """Files, images, templates, tokenizers and the estimate of an example's size raise what they like."""
    good = mixed_examples(2)
    named = {
        "struct": struct.error("unpack requires a buffer of 2 bytes"),
        "jinja2": jinja2.TemplateError("System role not supported"),
        "deep": RecursionError("maximum recursion depth exceeded"),
        "own": AttributeError("'NoneType' object has no attribute 'x'"),
        "missing": ImportError("no decoder"),
    }
    bad = [yojo.Example("Which?", ["one", "two"], rankings=[1, 2], id=name) for name in named]
    items = [*good, *bad, KeyError("image"), struct.error("cut"), data.DataError("example 'a.jsonl:3': no")]
    trainer, record = make(Faulty(items), batch=len(items), skip_bad=True)
    encode, estimate = trainer.collator.encode, CostEstimate.__call__

    def encode_or_raise(example, place=0):
        if example.id in named:
            raise named[example.id]
        return encode(example, place)

    def estimate_or_raise(self, example):
        if example.id == "struct":
            raise named["struct"]
        return estimate(self, example)

    monkeypatch.setattr(trainer.collator, "encode", encode_or_raise)
    monkeypatch.setattr(CostEstimate, "__call__", estimate_or_raise)
    trainer.train()
    assert record.shares[0][1] == 2
    assert sorted(trainer.skipped.values()) == list(range(2, 10))
    reasons = {index: reason for reason, index in trainer.skipped.items()}
    for index, name in enumerate(named, 2):
        assert reasons[index].startswith(f"example {name!r}: ") and str(named[name]) in reasons[index] or name == "deep"
    assert reasons[4] == "example 'deep': nested too deeply"
    assert reasons[7] == "record 7 of the data set: KeyError: 'image'"
    assert reasons[8] == "record 8 of the data set: error: cut" and reasons[9] == "example 'a.jsonl:3': no"
    named["own"] = torch.OutOfMemoryError("CUDA out of memory")
    trainer, _ = make(Faulty(items), batch=len(items), skip_bad=True)
    monkeypatch.setattr(trainer.collator, "encode", encode_or_raise)
    with pytest.raises(torch.OutOfMemoryError):
        trainer.train()


def test_a_row_that_cannot_be_packed_is_skipped(make, monkeypatch):
    examples = mixed_examples(3)
    trainer, record = make(examples, skip_bad=True)
    pack = trainer.collator.pack

    def pack_or_raise(encoded, *rest):
        if any(item.name == "example 'e1'" for item in encoded):
            raise RuntimeError("Sizes of tensors must match")
        return pack(encoded, *rest)

    monkeypatch.setattr(trainer.collator, "pack", pack_or_raise)
    trainer.train()
    assert record.shares[0][1] == 2
    assert trainer.skipped == {"example 'e1': RuntimeError: Sizes of tensors must match": 1}


def test_a_batch_without_an_example_that_can_be_used_is_no_step(make):
    """Batches of one, accumulated twice: bad records leave one sample of two, or none."""
    good = mixed_examples(4)
    broken = [
        yojo.Example("Which?", ["one", "two"], images=[b"no image"], rankings=[1, 2], id=f"broken {n}")
        for n in range(4)
    ]
    options = {"batch": 2, "accumulation": 2, "max_steps": 4, "skip_bad": True, "learning_rate": 0.0, "data_seed": 5}
    order = [index for batch in GlobalBatches(range(8), 1, seed=5) for _, index in batch]
    examples = [None] * 8
    for index, example in zip(order, [*good[:3], *broken, good[3]], strict=True):
        examples[index] = example
    trainer, _ = make(examples, **options)
    trainer.train()
    used = [[index for index in order[i : i + 2] if examples[index] in good] for i in range(0, 8, 2)]
    assert [len(step) for step in used] == [2, 1, 0, 1]
    drawn = Drawn(examples, seed=trainer.args.order_seed)
    with torch.no_grad():
        means = [
            sum(trainer.model.eval()(**trainer.collator([drawn[0, i].example])).loss.item() for i in step)
            / max(len(step), 1)
            for step in used
        ]
    assert losses(trainer) == pytest.approx(means, rel=1e-5)
    assert len(trainer.skipped) == 4 and trainer.state.global_step == 4
    assert trainer.evaluate([*broken, *good])["eval_loss"] > 0
    assert len(trainer.predict([*broken, *good]).predictions) == 4
    with pytest.raises(ValueError, match="none of the examples can be used; one of them: "):
        trainer.evaluate(broken)


def test_what_was_skipped_is_listed_once_over_stops_and_runs(make, tmp_path):
    broken = yojo.Example("Which?", ["one", "two"], images=[b"no image"], rankings=[1, 2], id="broken")
    examples = [*mixed_examples(3), broken]
    options = {"skip_bad": True, "save_strategy": "steps", "save_steps": 1}

    def listed():
        return [json.loads(line)["reason"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]

    (tmp_path / "skipped.jsonl").write_text('{"index": 7, "reason": "of an earlier run"}\n')
    trainer, _ = make(examples, **options)
    trainer.train()
    assert len(listed()) == 1 and "broken" in listed()[0]
    with open(tmp_path / "skipped.jsonl", "a") as file:
        file.write('{"index": 3, "rea')  # by a run that was killed
    trainer, _ = make(examples, **options | {"max_steps": 2})
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert len(trainer.skipped) == 1 and trainer.state.log_history[-2]["skipped"] == 1.0
    trainer._skip(9, "another")
    lines = (tmp_path / "skipped.jsonl").read_text().splitlines()
    assert len(lines) == 3 and json.loads(lines[-1]) == {"index": 9, "reason": "another"}

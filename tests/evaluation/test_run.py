"""A judge is asked about every item exactly once, and what it says stands in a file that never depends on how it came about."""

import itertools
import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
import torch
from cases import Constants, Items, Leaning, items
from scoring_cases import lines_in, score_of, until

import yojo
from yojo.evaluation.run import judge_items, judged_of
from yojo.judges import Refusal


@pytest.fixture()
def made():
    return items()


def lines_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_stand_by_the_responses_of_the_record(made, tmp_path):
    found = judge_items(Leaning(), made, tmp_path / "s.jsonl", orders=4, seed=3)
    assert found.orders == 4 and found.order_error is None and found.asked == len(made) and not found.bad
    for item, judged in zip(made, found.judged, strict=True):
        count = len(item.example.responses)
        assert judged.scores.shape == (min(4, 2 if count == 2 else 4), count)
        assert len(set(judged.orders)) == len(judged.orders)
        for row, order in zip(judged.scores, judged.orders, strict=True):
            for place, response in enumerate(order):
                assert row[response] == score_of(item.example.responses[response]) - 4.0 * place
        assert (judged.number, judged.id, judged.group, judged.question) == (
            item.number,
            item.id,
            item.group,
            item.question,
        )
        assert list(judged.rankings) == item.rankings and list(judged.lengths) == item.lengths
    kept = [judged_of(line) for line in lines_of(found.file)]
    assert [(one.number, one.orders, one.scores.tolist()) for one in kept] == [
        (one.number, one.orders, one.scores.tolist()) for one in found.judged
    ]


def test_a_judge_that_is_free_of_order_is_asked_once_and_tested(made):
    found = judge_items(Constants(), made)
    assert found.orders is None and found.order_error == 0.0 and found.file is None
    asked = [len(one.orders) for one in found.judged]
    assert set(asked) == {1, 2} and 8 <= asked.count(2) <= 16
    assert all(one.orders[0] == tuple(range(len(one.rankings))) for one in found.judged)

    class Lying(Leaning):
        order_free = True

    with pytest.raises(
        ValueError, match=r"item 0 \(q0\): the judge says that the order of responses does not change its scores"
    ):
        judge_items(Lying(), made)


def test_refusals_are_kept(made, tmp_path):
    class Refusing(Leaning):
        def score_many(self, examples):
            return [
                Refusal("I cannot see it") if e.prompt == "question 5?" and e.responses[0].endswith("0") else scores
                for e, scores in zip(examples, super().score_many(examples), strict=True)
            ]

    found = judge_items(Refusing(), made, tmp_path / "s.jsonl")
    refused = [one for one in found.judged if one.refused]
    assert [(one.number, one.scores) for one in refused] == [(5, None)]
    assert refused[0].refused.startswith("order ") and refused[0].refused.endswith(": I cannot see it")
    assert judge_items(Refusing(), made, tmp_path / "s.jsonl").asked == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_scores_that_are_not_finite_are_no_scores(made, tmp_path, value):
    class Broken(Constants):
        def score_many(self, examples):
            found = super().score_many(examples)
            for example, scores in zip(examples, found, strict=True):
                if example.prompt == "question 4?":
                    scores[[text.endswith("1") for text in example.responses]] = value
            return found

    found = judge_items(Broken(), made, tmp_path / "s.jsonl")
    assert [(number, reason) for number, _, reason in found.bad] == [
        (4, f"the scores of responses 1 are not finite ({value})")
    ]
    assert [line["row"] for line in lines_of(tmp_path / "s.jsonl")] == [n for n in range(24) if n != 4]
    (listed,) = (tmp_path / ".s.jsonl.job").glob("bad-*")
    assert lines_of(listed) == [{"row": 4, "id": "q4", "error": found.bad[0][2]}]


def test_what_cannot_be_read_is_listed_and_tried_again(made, tmp_path):
    broken = Items(made)
    broken[3] = type(made[3])(3, "q3", yojo.Example("p", ["a", "b"], images=["none.png"], rankings=[1, 2]), "a", "q")
    found = judge_items(Constants(), broken, tmp_path / "s.jsonl")
    assert [number for number, _, reason in found.bad if "none.png" in reason] == [3]
    again = judge_items(Constants(), made, tmp_path / "s.jsonl")
    assert again.asked == 1 and not again.bad
    judge_items(Constants(), made, tmp_path / "whole.jsonl")
    assert (tmp_path / "s.jsonl").read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


# ---- the same file, however it came about ----


@pytest.mark.parametrize("judge", [Constants, Leaning])
def test_shards_and_workers_make_the_same_file(made, tmp_path, judge):
    whole = judge_items(judge(), made, tmp_path / "whole.jsonl", orders=3, seed=1).file.read_bytes()
    assert judge_items(judge(), made, tmp_path / "w.jsonl", orders=3, seed=1, workers=2).file.read_bytes() == whole
    out = tmp_path / "s.jsonl"
    for number in (2, 0, 1):
        found = judge_items(judge(), made, out, orders=3, seed=1, shard=(number, 3))
        assert found.asked == 8 and not out.exists()
    assert found.others == 0
    last = judge_items(judge(), made, out, orders=3, seed=1)
    assert last.asked == 0 and out.read_bytes() == whole


def test_items_of_other_shards_are_counted(made, tmp_path):
    assert judge_items(Constants(), made, tmp_path / "s.jsonl", shard=(0, 3)).others == 16


def _judge(path, answers):
    judge_items(Leaning(0.005, answers=answers), items(), path, orders=2)


def _start(path, answers=None):
    process = multiprocessing.get_context("fork").Process(target=_judge, args=(path, answers))
    process.start()
    return process


def test_a_run_that_is_killed_is_gone_on_with(made, tmp_path):
    whole = judge_items(Leaning(), made, tmp_path / "whole.jsonl", orders=2).file.read_bytes()
    out, folder = tmp_path / "s.jsonl", tmp_path / ".s.jsonl.job"
    for _ in range(4):
        before = lines_in(folder)
        process = _start(out, answers=5)  # of 24 items: it cannot have ended, however late it is killed
        written = until(lambda before=before: lines_in(folder) >= before + 2)
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert written and process.exitcode == -signal.SIGKILL and not out.exists()
    process = _start(out)
    process.join()
    assert process.exitcode == 0
    assert judge_items(Leaning(), made, out, orders=2).asked == 0
    assert out.read_bytes() == whole


def test_a_line_that_was_cut_short_is_asked_for_again(made, tmp_path):
    out = tmp_path / "s.jsonl"
    whole = judge_items(Leaning(), made, out).file.read_bytes()
    (part,) = (tmp_path / ".s.jsonl.job").glob("scores-*")
    part.write_bytes(part.read_bytes()[:-9])
    out.unlink()
    assert judge_items(Leaning(), made, out).asked == 1 and out.read_bytes() == whole


def test_an_item_that_has_changed_is_asked_about_again(made, tmp_path):
    out = tmp_path / "s.jsonl"
    judge_items(Constants(), made, out)
    other = Items(made)
    example = yojo.Example("question 2, put otherwise?", made[2].example.responses, rankings=made[2].example.rankings)
    other[2] = type(made[2])(2, made[2].id, example, made[2].group, made[2].question)
    found = judge_items(Constants(), other, out)
    assert found.asked == 1
    assert judge_items(Constants(), made, out).asked == 0  # both are kept
    assert [line["scores"] for line in lines_of(out)] == [
        one.scores.tolist() for one in judge_items(Constants(), made).judged
    ]


@pytest.mark.parametrize("judge", [Constants, Leaning])
@pytest.mark.parametrize(("before", "after"), [(30, 40), (40, 30)])
def test_a_benchmark_that_has_grown_or_shrunk_gets_the_file_of_a_single_run(tmp_path, judge, before, after):
    whole = judge_items(judge(), items(after), tmp_path / "whole.jsonl", orders=2).file.read_bytes()
    judge_items(judge(), items(before), tmp_path / "s.jsonl", orders=2)
    found = judge_items(judge(), items(after), tmp_path / "s.jsonl", orders=2)
    assert (tmp_path / "s.jsonl").read_bytes() == whole and found.asked < 30
    for count in (before, after, before):
        assert judge_items(judge(), items(count), tmp_path / "s.jsonl", orders=2).asked == 0


def test_another_judges_file_is_refused(made, tmp_path):
    out = tmp_path / "s.jsonl"
    judge_items(Leaning(), made, out, orders=2)
    for judge, options, what in (
        (Constants(), {}, "judge.judge: leaning there, constants here"),
        (Leaning(), {"orders": 3}, "orders: 2 there, 3 here"),
        (Leaning(), {"orders": 2, "seed": 5}, "seed: 0 there, 5 here"),
    ):
        with pytest.raises(ValueError, match=f"holds the scores of another job, which differs in .*{what}"):
            judge_items(judge, made, out, **options)
    assert judge_items(Constants(), made, out, resume=False).asked == len(made)


@pytest.mark.parametrize(
    ("name", "value"), [("orders", 0), ("orders", 2.0), ("orders", True), ("seed", "x"), ("seed", None)]
)
def test_wrong_arguments(made, name, value):
    with pytest.raises((TypeError, ValueError), match=f"{name} must be an int"):
        judge_items(Leaning(), made, **{name: value})


@pytest.mark.parametrize(
    ("places", "message"),
    [
        (lambda n: [] if n == 3 else [n], "score_each ended, and gave nothing for 1 of the items that it read"),
        (lambda n: [n, n], "score_each gave something at place 0, where nothing waits for it"),
        (lambda n: [n + 1], "score_each gave something at place 1, where nothing waits for it"),
    ],
)
def test_a_stream_with_answers_that_are_missing_or_strange_is_an_error(made, places, message):
    class Stream(Leaning):
        def score_each(self, examples, errors="raise"):
            for n, example in enumerate(examples):
                yield from ((place, torch.arange(len(example.responses)).float()) for place in places(n))

    with pytest.raises(ValueError, match=message):
        judge_items(Stream(), made, orders=1)


def test_a_stream_that_ends_early_is_an_error(made):
    class Early(Leaning):
        def score_each(self, examples, errors="raise"):
            for n, example in zip(range(5), examples, strict=False):
                yield n, torch.zeros(len(example.responses))

    with pytest.raises(ValueError, match="score_each ended, and gave nothing for"):
        judge_items(Early(), made, orders=1)


# ---- reward models ----


@pytest.fixture(scope="module")
def reward_model(make_reward_model):
    return make_reward_model(layers=2)


def digits(examples):
    return Items(
        type(items()[0])(n, f"d{n}", yojo.Example(e.prompt, e.responses, images=e.images, rankings=e.rankings, id=f"d{n}"), "g", f"{n}")
        for n, e in enumerate(e for e in examples if len(e.responses) > 1)
    )  # fmt: skip


def test_a_reward_model_scores_all_orders_of_an_item_in_one_row(reward_model, examples, tmp_path, monkeypatch):
    made, rows = digits(examples), []
    begin = reward_model._begin_row
    monkeypatch.setattr(
        reward_model, "_begin_row", lambda encoded, *rest: rows.append(len(encoded)) or begin(encoded, *rest)
    )
    found = judge_items(reward_model, made, tmp_path / "s.jsonl", orders=4)
    assert rows == [1] * len(made)
    for item, judged in zip(made, found.judged, strict=True):
        for row, order in zip(judged.scores, judged.orders, strict=True):
            turned = yojo.Example(
                item.example.prompt, [item.example.responses[n] for n in order], images=item.example.images
            )
            alone = reward_model.score_many([turned])[0].numpy()
            assert np.abs(row[list(order)] - alone).max() < 2e-6
    for count in (1, 2):
        judge_items(reward_model, made, tmp_path / f"{count}.jsonl", orders=4, workers=count)
        assert (tmp_path / f"{count}.jsonl").read_bytes() == (tmp_path / "s.jsonl").read_bytes()
    for number in range(2):
        judge_items(reward_model, made, tmp_path / "p.jsonl", orders=4, shard=(number, 2))
    judge_items(reward_model, made, tmp_path / "p.jsonl", orders=4)
    assert (tmp_path / "p.jsonl").read_bytes() == (tmp_path / "s.jsonl").read_bytes()


@pytest.mark.parametrize("mode", [{"mode": "isolated"}, {"permutations": 2}, {"format": "mr2rm", "pooling": "last"}])
def test_every_mode(make_reward_model, examples, mode):
    found = judge_items(make_reward_model(layers=1, **mode), digits(examples), orders=2)
    assert (found.orders is None) == (mode == {"mode": "isolated"})
    assert found.orders == 2 or 0 <= found.order_error < 1e-5
    assert all(np.isfinite(one.scores).all() for one in found.judged)


def test_orders_that_do_not_fit_into_memory_are_scored_one_by_one(reward_model, examples, monkeypatch, caplog):
    made = digits(examples)
    expected = judge_items(reward_model, made, orders=3)
    begin = reward_model._begin_row

    def short(encoded, *rest):
        if any(item.orders > 1 for item in encoded):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return begin(encoded, *rest)

    monkeypatch.setattr(reward_model, "_begin_row", short)
    found = judge_items(reward_model, made, orders=3)
    assert "out of memory with 3 orders in a row: one after the other" in caplog.text
    for one, other in zip(found.judged, expected.judged, strict=True):
        assert np.abs(one.scores - other.scores).max() < 2e-6


def test_an_item_that_does_not_fit_into_memory_is_no_score(reward_model, examples, monkeypatch):
    def short(encoded, *rest):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(reward_model, "_begin_row", short)
    found = judge_items(reward_model, digits(examples), orders=2)
    assert not found.judged and len(found.bad) == len(digits(examples))
    assert all("out of memory with" in reason and "in a row of its own" in reason for _, _, reason in found.bad)


def test_an_item_that_is_too_long_is_no_score(examples, make_reward_model):
    model = make_reward_model(layers=1)
    tokens = sorted(model.collator.encode(item.example).num_tokens(model.config) for item in digits(examples))
    short = yojo.RewardModel(model.model, model.processor, max_length=tokens[1])
    found = judge_items(short, digits(examples))
    assert all("nothing is cut" in reason for _, _, reason in found.bad)
    assert len(found.bad) == sum(count > tokens[1] for count in tokens) and found.bad and found.judged


@pytest.mark.parametrize("mode", [{"mode": "isolated"}, {"permutations": 2}, {}])
def test_what_is_too_long_does_not_depend_on_earlier_runs(make_reward_model, examples, tmp_path, mode):
    model, made = make_reward_model(layers=1, **mode), digits(examples)
    tokens = [model.collator.encode(item.example).num_tokens(model.config) for item in made]
    short = yojo.RewardModel(model.model, model.processor, max_length=sorted(tokens)[1])
    judge_items(short, made, tmp_path / "short.jsonl", orders=2)
    whole = judge_items(model, made, tmp_path / "s.jsonl", orders=2).file.read_bytes()
    found = judge_items(short, made, tmp_path / "s.jsonl", orders=2)
    assert [number for number, _, _ in found.bad] == [n for n, count in enumerate(tokens) if count > sorted(tokens)[1]]
    assert (tmp_path / "s.jsonl").read_bytes() == (tmp_path / "short.jsonl").read_bytes() and found.asked == 0
    assert judge_items(model, made, tmp_path / "s.jsonl", orders=2).asked == 0  # they are kept
    assert (tmp_path / "s.jsonl").read_bytes() == whole


def test_another_max_length_of_a_judge_that_counts_no_tokens_is_another_job(made, tmp_path):
    judge = Constants()
    judge_items(judge, made, tmp_path / "s.jsonl")
    judge.max_length = 10
    with pytest.raises(ValueError, match="differs in max_length: nothing there, 10 here"):
        judge_items(judge, made, tmp_path / "s.jsonl")


# ---- judges with many requests under way ----


class Streaming(Leaning):
    """As it comes: the last of four first."""

    def score_each(self, examples, errors="raise"):
        numbered = enumerate(examples)
        while some := list(itertools.islice(numbered, 4)):
            for place, example in reversed(some):
                if example.prompt == "question 6?":
                    yield place, ValueError(f"{example.name}: no such picture")
                else:
                    yield place, self.score_many([example])[0]


def test_a_stream_gives_what_single_calls_give(made, tmp_path):
    expected = judge_items(Leaning(), made, orders=3)
    found = judge_items(Streaming(), made, orders=3)
    assert [(number, reason) for number, _, reason in found.bad] == [(6, "no such picture")]
    others = [one for one in expected.judged if one.number != 6]
    assert [(one.number, one.scores.tolist()) for one in found.judged] == [
        (one.number, one.scores.tolist()) for one in others
    ]

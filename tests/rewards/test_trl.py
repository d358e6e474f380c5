"""TRL's own trainers with a reward of whole groups: what it hands over, what reaches it, what it logs, and what stops it."""

import asyncio
import copy
import math
import multiprocessing
import queue

import pytest
import torch
from accelerate import PartialState
from datasets import Dataset

pytest.importorskip("trl")

import trl_cases
from endpoint_cases import Endpoint, by_length, opened, pictures_of
from trl_cases import GROUP, Noted, checksum, dataset, expected, logged, make_policy, make_trainer, trained_weights

from tests.reward_cases import Failing, Hanging, Saying
from yojo.demo import digits
from yojo.judges import load_judge
from yojo.rewards import AsyncGroupReward, GroupReward, RewardError


def near(rewards):
    return pytest.approx(rewards, abs=2e-6)


pytestmark = pytest.mark.usefixtures("accelerate_state")


@pytest.fixture(autouse=True)
def the_reward_model_stays_as_it_is():
    judge = trl_cases.reward_model()
    before = checksum(judge.model)
    yield
    assert checksum(judge.model) == before


# ---- what reaches the trainer ----


@pytest.mark.parametrize("kind", ["GRPO", "RLOO"])
@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "max_steps": 1}])
def test_rewards_are_the_judges_of_each_whole_group(tmp_path, kind, options):
    judge = trl_cases.reward_model()
    reward = Noted(GroupReward(judge))
    before = make_policy()
    trainer = make_trainer(tmp_path, make_policy(), reward, kind=kind, **options)
    trainer.train()
    rows = 2 * GROUP * options.get("gradient_accumulation_steps", 1)
    assert [len(call[0]) for call in reward.calls] == [rows] * (2 if not options else 1)
    for prompts, completions, images, rewards, _ in reward.calls:
        wanted = expected(judge, prompts, completions, images)
        assert rewards == near(wanted)
        assert len({round(reward, 3) for reward in rewards}) > rows // 2  # something to learn from
    # The trainer keeps those of the last call: what it works with, in its order.
    *_, rewards, _ = reward.calls[-1]
    assert list(trainer._logs["rewards"]["yojo"]) == torch.tensor(rewards).tolist()
    means = [entry["reward"] for entry in logged(trainer) if "reward" in entry]
    assert means == [pytest.approx(sum(call[3]) / rows, abs=1e-5) for call in reward.calls]
    old, new = trained_weights(before), trained_weights(trainer.model)
    assert any(not torch.equal(old[name], new[name]) for name in old)


def test_advantages_come_of_them(tmp_path):
    """GRPO's: each group's rewards less their mean, divided by their deviation."""
    reward = Noted(GroupReward(trl_cases.reward_model()))
    trainer = make_trainer(tmp_path, make_policy(), reward, max_steps=1)
    trainer.train()
    groups = torch.tensor(reward.calls[0][3]).view(-1, GROUP)
    wanted = (groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)
    assert torch.allclose(torch.tensor(list(trainer._logs["advantages"])), wanted.flatten(), atol=1e-5)


def test_one_picture_twice_in_a_batch_is_two_groups(tmp_path):
    judge = trl_cases.reward_model()
    reward = Noted(GroupReward(judge))
    twice = dataset(1).select([0, 0])
    make_trainer(tmp_path, make_policy(), reward, data=twice, max_steps=1).train()
    prompts, completions, images, rewards, _ = reward.calls[0]
    assert len(rewards) == 2 * GROUP
    assert rewards == near(expected(judge, prompts, completions, images))


def test_several_pictures_of_a_prompt_and_one_question_about_others(tmp_path):
    """The column `images`: two pictures each, of which the groups of a call have one in common."""
    judge = trl_cases.reward_model()
    samples = [image for image, _ in digits.load_digits_split()[0][:3]]
    question = [{"role": "user", "content": digits.PROMPT}]
    pairs = [[samples[0], samples[1]], [samples[0], samples[2]]]
    calls = []
    reward = GroupReward(judge)

    def noted(prompts, completions, images, **columns):
        rewards = reward(prompts, completions, images=images, **columns)
        calls.append((completions, images, rewards))
        return rewards

    data = Dataset.from_list([{"prompt": question, "images": pair} for pair in pairs])
    make_trainer(tmp_path, make_policy(), noted, data=data, max_steps=1).train()
    completions, images, rewards = calls[0]
    for start in (0, GROUP):
        texts = [completion[0]["content"] for completion in completions[start : start + GROUP]]
        wanted = judge.score(digits.PROMPT, texts, images=images[start])
        assert rewards[start : start + GROUP] == near(wanted.tolist())
    assert images[0][1].tobytes() != images[GROUP][1].tobytes()


def test_in_comparative_mode_the_order_is_drawn_and_the_columns_say_it(tmp_path):
    """What the columns say of places is enough to score each group again, to the same scores."""
    judge = trl_cases.reward_model("comparative")
    reward = Noted(GroupReward(judge))
    trainer = make_trainer(tmp_path, make_policy(), reward, max_steps=1)
    trainer.train()
    prompts, completions, images, rewards, _ = reward.calls[0]
    assert list(trainer._logs["extra"]) == ["yojo/place", "yojo/score"]
    places, scores = (list(trainer._logs["extra"][name]) for name in ("yojo/place", "yojo/score"))
    assert scores == rewards
    orders = []
    for start in range(0, len(prompts), GROUP):
        rows = range(start, start + GROUP)
        shown = dict(sorted((places[n], completions[n][0]["content"]) for n in rows))
        found = judge.score(digits.PROMPT, list(shown.values()), images=[images[start]])
        assert [rewards[n] for n in rows] == near([found[places[n]].item() for n in rows])
        orders.append([places[n] for n in rows])
    assert any(order != sorted(order) for order in orders)


def test_its_logs_hold_our_metrics(tmp_path):
    reward = Noted(GroupReward(trl_cases.reward_model()))
    trainer = make_trainer(tmp_path, make_policy(), reward)
    trainer.train()
    entries = logged(trainer, without=())
    assert len(entries) == 2
    for entry, (_, completions, _, rewards, _) in zip(entries, reward.calls, strict=True):
        groups = torch.tensor(rewards).view(-1, GROUP)
        assert entry["yojo/score"] == pytest.approx(groups.mean().item(), abs=1e-5)
        assert entry["yojo/spread"] == pytest.approx(groups.std(1, correction=0).mean().item(), abs=1e-5)
        texts = [completion[0]["content"] for completion in completions]
        equal = sum(GROUP - len(set(texts[start : start + GROUP])) for start in range(0, len(texts), GROUP))
        assert entry["yojo/duplicates"] == equal / len(texts)
        assert entry["yojo/truncated"] == entry["completions/clipped_ratio"]
        assert entry["yojo/seconds"] > 0 and entry["yojo/tokens"] > 0 and entry["yojo/retries"] == 0
        assert {f"yojo/{name}" for name in ("ties", "empty", "forged", "not_judged")} <= set(entry)
        assert entry["rewards/yojo/mean"] == pytest.approx(entry["reward"])


@pytest.mark.parametrize("mode", ["isolated", "comparative"])
def test_two_runs_of_a_seed_are_equal_and_of_another_are_not(tmp_path, mode):
    runs = []
    for kind, seed in ((GroupReward, 0), (GroupReward, 0), (AsyncGroupReward, 0), (GroupReward, 1)):
        reward = kind(trl_cases.reward_model(mode), seed=seed, normalize="rank")
        trainer = make_trainer(tmp_path, make_policy(), reward, seed=seed)
        trainer.train()
        runs.append((logged(trainer), trained_weights(trainer.model)))
    (logs, weights), (again, same), (awaited, also), (other, _) = runs
    assert logs == again == awaited != other
    for found in (same, also):
        assert all(torch.equal(weights[name], found[name]) for name in weights)


def test_the_size_of_a_group_is_the_trainers_in_training_and_in_evaluation(tmp_path):
    judge = trl_cases.reward_model()
    reward = Noted(GroupReward(judge))
    options = {"num_generations_eval": 2, "per_device_eval_batch_size": 6, "max_steps": 1, "eval_strategy": "steps"}
    trainer = make_trainer(tmp_path, make_policy(), reward, eval_data=dataset(3, 40), eval_steps=1, **options)
    trainer.train()
    (*training, rewards, _), (*evaluation, found, _) = reward.calls
    assert rewards == near(expected(judge, *training))
    assert found == near(expected(judge, *evaluation, size=2))
    assert len(found) == 6
    entry = next(entry for entry in trainer.state.log_history if "eval_reward" in entry)
    assert entry["eval_yojo/score"] == pytest.approx(entry["eval_reward"], abs=1e-5)
    with pytest.raises(ValueError, match="group_size is 3, and the trainer's num_generations is 4"):
        make_trainer(tmp_path, make_policy(), GroupReward(judge, group_size=3)).train()


def test_two_rewards_of_one_trainer(tmp_path):
    """The other one is TRL's business: ours is what it is beside it."""
    judge = trl_cases.reward_model()
    rewards = [GroupReward(judge), GroupReward(load_judge("length"), name="length", normalize="centre")]
    trainer = make_trainer(tmp_path, make_policy(), rewards, reward_weights=[1.0, 0.1], max_steps=1)
    trainer.train()
    entry = logged(trainer)[0]
    assert {"rewards/yojo/mean", "rewards/length/mean", "yojo/spread", "length/spread"} <= set(entry)
    assert entry["rewards/length/mean"] == pytest.approx(0, abs=1e-5)
    assert entry["reward"] == pytest.approx(entry["rewards/yojo/mean"], abs=1e-5)


# ---- truncated completions ----


@pytest.mark.parametrize("treatment", ["none", "lowest", -7.5, "score"])
def test_truncated_completions_are_those_without_the_trainers_eos(tmp_path, treatment):
    judge = trl_cases.reward_model()
    reward = Noted(GroupReward(judge, truncated=treatment))
    options = {"max_completion_length": 6, "mask_truncated_completions": True, "max_steps": 3}
    trainer = make_trainer(tmp_path, make_policy(), reward, **options)
    trainer.train()
    end = trl_cases.backbone()[1].tokenizer.eos_token_id
    cut = [[ids[-1] != end for ids in call[4]] for call in reward.calls]
    assert any(map(any, cut)) and not all(map(all, cut))
    for (prompts, completions, images, rewards, _), flags in zip(reward.calls, cut, strict=True):
        wanted = expected(judge, prompts, completions, images)
        for start in range(0, len(rewards), GROUP):
            rows = range(start, start + GROUP)
            judged = [wanted[n] for n in rows if not flags[n]]
            lowest = {"none": None, "lowest": min(judged, default=None)}.get(treatment, treatment)
            for n in rows:
                right = wanted[n] if not flags[n] or treatment == "score" else lowest
                assert rewards[n] == (None if right is None else near(right))
    for entry, flags in zip(logged(trainer), cut, strict=True):
        assert entry["yojo/truncated"] == entry["completions/clipped_ratio"] == sum(flags) / len(flags)
    noted = list(trainer._logs["rewards"]["yojo"])
    assert [math.isnan(value) for value in noted] == [value is None for value in reward.calls[-1][3]]


# ---- what stops it ----


@pytest.mark.parametrize("kind", [GroupReward, AsyncGroupReward])
@pytest.mark.parametrize(
    "make_judge, options, error, match",
    [
        (lambda: Failing(), {"retries": 1}, RewardError, "asked 2 times and gave no scores: OSError: the line is down"),
        (lambda: Failing(error=KeyError("x")), {"retries": 0}, RewardError, "KeyError"),
        (lambda: Failing(error=ValueError("a bad input")), {}, ValueError, "a bad input"),
        (
            lambda: Saying([[1.0, 2.0, float("nan"), 4.0]] * 2),
            {"order": "given"},
            RewardError,
            "is nan, which is no reward",
        ),
        (lambda: Saying([[1.0] * 4]), {}, RewardError, "scores for 1 examples, it was asked for 2"),
        (lambda: Saying([[1.0] * 3] * 2), {}, RewardError, "3 scores for 4 responses"),
        (lambda: Hanging(), {"deadline": 0.2}, RewardError, "within the deadline of 0.2 s"),
    ],
)
def test_a_judge_that_fails_stops_training(tmp_path, monkeypatch, kind, make_judge, options, error, match):
    monkeypatch.setattr("yojo.rewards.scorer.PAUSE", 0.01)
    # Four different texts: wrong counts are of the responses that a judge is shown, equal ones once.
    judge = make_judge()
    reward = kind(judge, text=_numbered(), **options)
    trainer = make_trainer(tmp_path, make_policy(), reward)
    with pytest.raises(error, match=match):
        trainer.train()
    if isinstance(judge, Hanging):
        judge.go.set()
    assert trainer.state.global_step == 0 and not trainer.state.log_history
    assert not trainer._logs["rewards"]["yojo"]
    before, after = trained_weights(make_policy()), trained_weights(trainer.model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def _numbered():
    """A function from a completion to a text that no other completion has."""
    texts = iter(range(10**6))
    return lambda completion: f"{next(texts)} {completion[0]['content']}"


def test_a_judge_that_fails_once_is_asked_again_and_the_logs_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr("yojo.rewards.scorer.PAUSE", 0.01)
    trainer = make_trainer(tmp_path, make_policy(), GroupReward(Failing(times=1)), max_steps=1)
    trainer.train()
    assert logged(trainer)[0]["yojo/retries"] == 1


# ---- AsyncGRPOTrainer: its rollout worker scores whole groups in a spawned process ----

TEXTS = ["It is a 3.", "This is a seven.", "A zero.", "I see a 4."]


@pytest.fixture()
def make_loop(monkeypatch):
    """Function reward, rows -> (arguments of TRL's rollout loop, what its process shares with the trainer's)."""
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    context = multiprocessing.get_context("spawn")
    tokenizer = copy.deepcopy(trl_cases.backbone()[1].tokenizer)
    tokenizer.response_template = {}  # TRL knows chat templates by their text, and not the demonstration's

    PartialState()  # TRL's loggers want it

    def make(reward, rows=()):
        arguments = {
            "model_name": "policy",
            "dataset": list(rows),
            "reward_funcs": [reward],
            "processing_class": tokenizer,
            "eos_token_ids": [0],
            "num_generations": GROUP,
        }
        shared = {
            "rollout_buffer": context.Queue(),
            "model_version_value": context.Value("i", 0),
            "heartbeat_value": context.Value("d", 0.0),
            "failed_event": context.Event(),
            "exception_info_queue": context.Queue(maxsize=1),
            "metrics_queue": context.Queue(),
        }
        return arguments, shared

    return make


def test_the_async_workers_own_scoring(make_loop):
    import trl_worker

    judge = trl_cases.reward_model()
    image, _ = digits.load_digits_split()[0][1]
    wanted = judge.score(digits.PROMPT, TEXTS, images=[image])
    for kind in (GroupReward, AsyncGroupReward):
        arguments, shared = make_loop(kind(judge, group_size=GROUP))
        loop = trl_worker.ScoringLoop(**arguments, **shared)
        samples = asyncio.run(loop._score_group(trl_worker.group(1, TEXTS)))
        assert [s.metrics["reward"] for s in samples] == near(wanted.tolist())
        assert [s.metrics["rewards/yojo"] for s in samples] == near(wanted.tolist())
        centred = (wanted - wanted.mean()) / wanted.std(correction=0)
        assert [s.advantage for s in samples] == pytest.approx(centred.tolist(), abs=1e-4)


def test_the_async_workers_scoring_with_a_judge_behind_an_endpoint(make_loop):
    """Two groups at once, each with its image, judged by one to whom the longer answer is better."""
    import trl_worker

    with Endpoint(by_length) as endpoint:
        arguments, shared = make_loop(AsyncGroupReward(endpoint.judge(), group_size=GROUP))
        loop = trl_worker.ScoringLoop(**arguments, **shared)

        async def both():
            return await asyncio.gather(*(loop._score_group(trl_worker.group(n, TEXTS)) for n in (1, 2)))

        found = asyncio.run(both())
        pictures = [opened(data).convert("RGB").tobytes() for body in endpoint.bodies for _, data in pictures_of(body)]
    assert [[s.metrics["reward"] for s in samples] for samples in found] == [[1.5, 3.0, 0.0, 1.5]] * 2
    assert sorted(pictures) == sorted(digits.load_digits_split()[0][n][0].tobytes() for n in (1, 2))


def _next(samples, process):
    """The next sample of a queue, for as long as the process that fills it is there."""
    while True:
        was_alive = process.is_alive()  # before: it may put its last sample, and end, right behind the wait
        try:
            return samples.get(timeout=1)
        except queue.Empty:
            assert was_alive


def test_in_a_spawned_process_it_scores_and_an_error_there_stops_training(make_loop):
    """The process that TRL's worker runs, and what its trainer asks of the worker whenever the buffer is empty."""
    import trl_worker
    from trl.experimental.async_grpo import async_rollout_worker

    judge = trl_cases.reward_model()
    reward = AsyncGroupReward(trl_worker.FailsAfter(judge, 2), group_size=GROUP, retries=0)
    arguments, shared = make_loop(reward, [{"number": n, "texts": TEXTS} for n in (1, 2, 3)])
    context = multiprocessing.get_context("spawn")
    stop, ready = context.Event(), context.Event()
    process = context.Process(
        target=async_rollout_worker._child_main,
        kwargs={
            "loop_cls": trl_worker.ScoringLoop,
            "loop_kwargs": arguments,
            "samples_queue": shared.pop("rollout_buffer"),
            "stop_event": stop,
            "child_ready_event": ready,
            **shared,
        },
        daemon=True,
    )
    samples = process._kwargs["samples_queue"]
    process.start()
    try:
        for number in (1, 2):
            image, _ = digits.load_digits_split()[0][number]
            got = [_next(samples, process) for _ in TEXTS]
            wanted = judge.score(digits.PROMPT, TEXTS, images=[image]).tolist()
            assert [s.metrics["reward"] for s in got] == near(wanted)
            assert {s.group_id for s in got} == {number}
        process.join(60)
        assert process.exitcode == 1
        with pytest.raises(queue.Empty):
            samples.get(timeout=0.1)
    finally:
        process.kill()
        process.join()
    worker = object.__new__(async_rollout_worker.AsyncRolloutWorker)  # whose __init__ wants vLLM
    worker._failed_event, worker._exception_info_queue = shared["failed_event"], shared["exception_info_queue"]
    with pytest.raises(RuntimeError, match="Rollout worker child has failed") as failure:
        worker.check_health(300)
    assert "RewardError: the judge was asked 1 times and gave no scores: OSError: the line is down" in str(
        failure.value.__cause__
    )

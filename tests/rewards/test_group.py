"""The reward function: rows into groups, whole ones only, in order; what the trainer tells, and what is told to it."""

import asyncio
import collections
import io
import pickle
import threading
import types

import pytest
import torch

import yojo
from tests import reward_cases
from tests.reward_cases import Failing, Hanging, Hashed, Watched, picture, rows
from yojo.rewards import AsyncGroupReward, Group, GroupReward, RewardError
from yojo.rewards.gathering import whole_groups


class Trainer:
    """What a reward function sees of TRL's trainer."""

    num_generations, num_generations_eval, eos_token_ids = 2, 3, [7]
    _tokenizer = types.SimpleNamespace(pad_token_id=0)

    def __init__(self, training=True):
        self.model = types.SimpleNamespace(training=training)
        self.metrics, self.columns = collections.defaultdict(list), collections.defaultdict(list)

    def log_metric(self, name, value):
        self.metrics[name].append(value)

    def log_extra(self, column, values):
        self.columns[column].extend(values)


def state(step):
    return types.SimpleNamespace(global_step=step)


def score_of(prompt, text, images=()):
    return Hashed().score(yojo.Example(prompt, [text], images=images), text)


def test_rewards_come_back_in_the_order_of_rows_whatever_it_is():
    reward = yojo.GroupReward(Hashed(), group_size=3)
    given = rows(["Why?", "Why? ", "How?"], 3)  # two prompts that differ by a blank are two
    expected = [score_of(p, c) for p, c in zip(given["prompts"], given["completions"], strict=True)]
    assert reward(**given) == pytest.approx(expected)
    mixed = [4, 0, 8, 3, 1, 6, 2, 5, 7]
    shuffled = {name: [values[n] for n in mixed] for name, values in given.items()}
    assert reward(**shuffled) == pytest.approx([expected[n] for n in mixed])


def test_one_question_about_two_pictures_is_two_groups():
    judge = Watched()
    reward = GroupReward(judge, group_size=2)
    reward(**rows(["What colour?"] * 2, 2, [picture("red"), picture("blue")]))
    assert len(judge.seen[0]) == 2
    pixels = [example.images[0].getpixel((0, 0)) for example in judge.seen[0]]
    assert sorted(pixels) == [(0, 0, 255), (255, 0, 0)]
    with pytest.raises(ValueError, match="an incomplete group: 1 completions of the prompt of row 0"):
        reward(["What colour?"] * 2, ["a", "b"], image=[picture("red"), picture("blue")])


def test_images_are_told_apart_by_content_alone(tmp_path):
    paths = [tmp_path / "a.png", tmp_path / "b.png"]
    for path in paths:
        picture("red").save(path)
    judge = Watched()
    GroupReward(judge, group_size=2)(["Why?"] * 2, ["a", "b"], image=list(map(str, paths)))
    GroupReward(judge, group_size=2)(["Why?"] * 2, ["a", "b"], images=[[picture("red")], [picture("red")]])
    assert [len(examples) for examples in judge.seen] == [1, 1]


def message(text, *images):
    parts = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


def test_conversations_with_images_in_their_messages():
    judge = Watched()
    reward = GroupReward(judge, group_size=2)
    said = [
        [{"role": "assistant", "content": "a"}],
        [{"role": "assistant", "content": [{"type": "text", "text": "bb"}]}],
    ]
    # TRL has put the column's images into the messages, and hands over both.
    prompts, images = [message("Why?", picture("red")) for _ in range(2)], [picture("red") for _ in range(2)]
    assert [round(found) for found in reward(prompts, said, image=images)] == [1, 2]
    (example,) = judge.seen[0]
    assert not example.images and sorted(example.responses) == ["a", "bb"]
    with pytest.raises(ValueError, match="row 0: the messages hold 1 images and 0 places of images, and the column 2"):
        reward(prompts, said, images=[images, images])
    unfilled = [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Why?"}]}]] * 2
    reward(unfilled, said, image=images)
    assert judge.seen[1][0].images == images[:1]


def test_tags_are_text_as_they_are_to_the_trainers_template():
    judge = Watched()
    GroupReward(judge, group_size=1)(
        [[{"role": "user", "content": "What is <image> for?"}]], ["a"], image=[picture("red")]
    )
    assert judge.seen[0][0].literal_tags


@pytest.mark.parametrize(
    "completion, match",
    [
        ([], "got none"),
        ([{"role": "user", "content": "a"}], "got user"),
        ([{"role": "assistant", "content": "a"}, {"role": "tool", "content": "b"}], "got assistant, tool"),
        ([{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}], "assistant with tool calls"),
        ({"role": "assistant", "content": "a"}, "must be a string or a list of messages"),
        ([{"role": "assistant", "content": [{"type": "image"}]}], "more than text"),
        ([{"role": "assistant", "content": "7.", "reasoning_content": "It bends."}], "holds reasoning_content beside"),
        ([{"role": "assistant", "content": "", "thinking": "It bends"}], "holds thinking beside its content"),
    ],
)
def test_completions_that_are_no_single_text_want_a_function(completion, match):
    with pytest.raises((TypeError, ValueError), match=f"row 0: .*{match}.*pass text="):
        GroupReward(Watched(), group_size=1)(["Why?"], [completion])
    assert GroupReward(Watched(), group_size=1, text=lambda found: "abc")(["Why?"], [completion]) == [3.0]


def test_an_answer_without_content_is_empty():
    assert GroupReward(Watched(), group_size=1, empty=-1)(["Why?"], [[{"role": "assistant", "content": None}]]) == [
        -1.0
    ]


def test_a_text_function_must_return_text():
    with pytest.raises(TypeError, match=r"row 0: text\(completion\) must return a string"):
        GroupReward(Watched(), group_size=1, text=len)(["Why?"], ["a"])


def test_whole_groups_only():
    reward = GroupReward(Hashed(), group_size=2)
    with pytest.raises(ValueError, match="3 completions of the prompt of row 0 .*num_generations"):
        reward(["Why?"] * 3, ["a", "b", "c"])
    with pytest.raises(ValueError, match="set group_size to its num_generations"):
        GroupReward(Hashed())(["Why?"], ["a"])
    with pytest.raises(ValueError, match="2 completions for 3 prompts"):
        reward(["Why?"] * 3, ["a", "b"])


@pytest.mark.parametrize("name", ["image", "images", "video", "videos"])
@pytest.mark.parametrize("count", [1, 3])
def test_a_column_of_media_has_a_value_for_each_row(name, count):
    values = [picture("red") if name == "image" else []] * count
    with pytest.raises(ValueError, match=f"{count} {name} for 2 prompts"):
        GroupReward(Hashed(), group_size=2)(["Why?"] * 2, ["a", "b"], **{name: values})


def test_a_prompt_that_comes_up_twice_is_two_groups():
    judge = Watched()
    GroupReward(judge, group_size=2)(["Why?"] * 4, ["a", "b", "c", "d"])
    assert [sorted(example.responses) for example in judge.seen[0]] == [["a", "b"], ["c", "d"]]


class TestTrainer:
    def test_the_size_of_a_group_is_read_from_it(self):
        judge = Watched()
        GroupReward(judge)(["Why?"] * 4, list("abcd"), log_metric=Trainer().log_metric)
        GroupReward(judge)(["Why?"] * 6, list("abcdef"), log_metric=Trainer(training=False).log_metric)
        assert [[len(example.responses) for example in examples] for examples in judge.seen] == [[2, 2], [3, 3]]
        with pytest.raises(ValueError, match="group_size is 4, and the trainer's num_generations is 2"):
            GroupReward(judge, group_size=4)(["Why?"] * 4, list("abcd"), log_metric=Trainer().log_metric)

    def test_metrics_and_columns(self):
        trainer = Trainer()
        reward = GroupReward(Watched(), name="judge", order="given", empty="none")
        texts = ["a", "bbb", "cc", "cc", "", "dd"]
        found = reward(
            [f"Why {n // 2}?" for n in range(6)],
            texts,
            [[1, 7], [1, 2], [1, 0], [1, 7], [7], [5]],
            log_metric=trainer.log_metric,
            log_extra=trainer.log_extra,
        )
        metrics = {name.removeprefix("judge/"): values for name, values in trainer.metrics.items()}
        assert metrics["images"] == [0.0]
        assert metrics["truncated"] == [2 / 6] and metrics["duplicates"] == [1 / 6]
        assert metrics["empty"] == [1 / 6] and metrics["not_judged"] == [1 / 6] and metrics["forged"] == [0.0]
        assert metrics["ties"] == [2 / 3]  # one of two equal completions, one with a single one that was judged
        assert metrics["spread"] == [pytest.approx((1 + 1 / 2048) / 3)]
        assert metrics["length_correlation"] == [pytest.approx(1)]
        assert metrics["score"] == [pytest.approx((1 + 3 + 1 / 1024 + 2 + 2 + 2) / 5)]
        assert metrics["retries"] == [0.0] and metrics["seconds"][0] >= 0 and "tokens" not in metrics
        assert trainer.columns["judge/score"] == found == [1.0, 3 + 1 / 1024, 2.0, 2.0, None, 2.0]
        assert trainer.columns["judge/place"] == [0, 1, 0, 0, None, 0]
        assert reward.__name__ == "judge"

    def test_tokens_of_a_reward_model(self):
        trainer, image = Trainer(), reward_cases.pictures()[0]
        GroupReward(reward_cases.demo_judge())(
            ["Which digit is shown?"] * 2,
            ["It is a 3.", "It is a 5."],
            image=[image] * 2,
            log_metric=trainer.log_metric,
        )
        example = yojo.Example("Which digit is shown?", ["It is a 3.", "It is a 5."], images=[image])
        judge = reward_cases.demo_judge()
        assert trainer.metrics["yojo/tokens"] == [judge.collator.encode(example).num_tokens(judge.config)]

    def test_images_are_counted_wherever_they_stand(self):
        trainer, red = Trainer(), picture("red")
        GroupReward(Watched())(["Why?"] * 2, ["a", "b"], image=[red, red], log_metric=trainer.log_metric)
        GroupReward(Watched())([message("Why?", red, red)] * 2, ["a", "b"], log_metric=trainer.log_metric)
        assert trainer.metrics["yojo/images"] == [1.0, 2.0]

    def test_truncation_is_told_by_its_ids(self):
        ids = [[1, 7], [1, 5]]
        reward = GroupReward(Watched(), truncated="none", order="given")
        assert reward(["Why?"] * 2, ["a", "b"], ids, log_metric=Trainer().log_metric) == [1.0, None]
        with pytest.raises(ValueError, match="set eos_token_ids"):
            GroupReward(Watched(), group_size=2, truncated="none")(["Why?"] * 2, ["a", "b"], ids)
        own = GroupReward(Watched(), group_size=2, truncated="none", order="given", eos_token_ids=[5])
        assert own(["Why?"] * 2, ["a", "b"], ids) == [None, 1.0]

    @pytest.mark.parametrize("name", ["empty", "truncated", "forged"])
    def test_no_reward_beside_other_rewards_would_be_one_of_0(self, name):
        trainer, ids = Trainer(), [[7], [7]]
        reward = GroupReward(Watched(), **{name: "none"})
        trainer.reward_funcs = [reward]
        assert len(reward(["Why?"] * 2, ["a", "b"], ids, log_metric=trainer.log_metric)) == 2
        trainer.reward_funcs = [reward, len]
        with pytest.raises(ValueError, match=f"{name}='none', and the trainer has other rewards, .* counts as 0"):
            reward(["Why?"] * 2, ["a", "b"], ids, log_metric=trainer.log_metric)

    def test_two_rewards_of_one_name_are_refused(self):
        trainer, reward = Trainer(), GroupReward(Watched())
        trainer.reward_funcs = [reward, GroupReward(Watched(), name="other"), len]
        assert reward(["Why?"] * 2, ["a", "b"], log_metric=trainer.log_metric)
        trainer.reward_funcs.append(GroupReward(Watched()))
        with pytest.raises(ValueError, match="several rewards with name='yojo'"):
            reward(["Why?"] * 2, ["a", "b"], log_metric=trainer.log_metric)

    def test_truncation_that_is_asked_for_and_cannot_be_told(self):
        with pytest.raises(ValueError, match="completion_ids"):
            GroupReward(Watched(), group_size=2, truncated="none", eos_token_ids=[5])(["Why?"] * 2, ["a", "b"])

    def test_orders_go_with_the_step_and_the_call_not_with_what_was_before(self):
        texts = [f"text {n}" for n in range(8)]

        def orders(reward, steps, **options):
            judge.seen.clear()
            run = state(None)
            for run.global_step in steps:
                reward(["Why?"] * 8, texts, trainer_state=run, **options)
            return [examples[0].responses for examples in judge.seen]

        judge = Watched()
        made = orders(GroupReward(judge, group_size=8), [0, 0, 1, 2])
        assert len(set(map(tuple, made))) == 4
        assert orders(GroupReward(judge, group_size=8), [0, 0, 1, 2]) == made
        assert orders(GroupReward(judge, group_size=8), [2]) == made[3:]  # as of a run that was resumed
        assert orders(GroupReward(judge, group_size=8, seed=1), [2]) != made[3:]
        reward = GroupReward(judge, group_size=8)
        assert orders(reward, [0]) == orders(reward, [0]) == made[:1]  # a reward that two runs have had

    def test_evaluation_does_not_change_the_orders_of_training(self):
        class Eight(Trainer):
            num_generations = num_generations_eval = 8

        judge, texts = Watched(), [f"text {n}" for n in range(8)]
        training, evaluating, run = Eight(), Eight(training=False), state(3)
        for trainers in ([training], [evaluating, training]):
            reward = GroupReward(judge)
            for trainer in trainers:
                reward(["Why?"] * 8, texts, trainer_state=run, log_metric=trainer.log_metric)
        first, evaluated, second = (examples[0].responses for examples in judge.seen)
        assert first == second != evaluated


def test_a_failing_judge_stops_it(monkeypatch):
    monkeypatch.setattr("yojo.rewards.scorer.PAUSE", 0.0)
    with pytest.raises(RewardError, match="asked 3 times"):
        GroupReward(Failing(), group_size=2)(["Why?"] * 2, ["a", "b"])


def test_awaited_it_gives_the_same_and_others_run_meanwhile():
    judge = Hanging()
    reward = AsyncGroupReward(judge, group_size=2)
    given = rows(["Why?", "How?"], 2)

    async def both():
        task = asyncio.ensure_future(reward(**given))
        await asyncio.sleep(0)
        judge.go.set()
        return await task

    assert asyncio.run(both()) == GroupReward(Hashed(), group_size=2)(**given)

    judge = Hanging()

    async def failing():
        await AsyncGroupReward(judge, group_size=2, deadline=0.05)(**given)

    with pytest.raises(RewardError, match="deadline of 0.05 s"):
        asyncio.run(failing())
    judge.go.set()


def test_a_task_that_is_cancelled_leaves_no_error_in_its_thread(monkeypatch):
    failures, judge, others = [], Hanging(), set(threading.enumerate())
    monkeypatch.setattr(threading, "excepthook", failures.append)

    async def cancelled():
        task = asyncio.ensure_future(AsyncGroupReward(judge, group_size=2)(["Why?"] * 2, ["a", "b"]))
        assert await asyncio.to_thread(judge.entered.wait, 60)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(cancelled())
    judge.go.set()
    for thread in set(threading.enumerate()) - others:
        thread.join(60)
    assert not failures


@pytest.mark.parametrize("kind", [GroupReward, AsyncGroupReward])
def test_it_pickles(kind):
    reward = pickle.loads(pickle.dumps(kind(Hashed(), group_size=2, name="judge")))
    given = rows(["Why?"], 2)
    found = reward(**given)
    found = asyncio.run(found) if kind is AsyncGroupReward else found
    assert found == GroupReward(Hashed(), group_size=2)(**given) and reward.__name__ == "judge"


@pytest.mark.parametrize(
    "options, match",
    [
        ({"group_size": 0}, "group_size must be an int"),
        ({"group_size": True}, "group_size must be an int"),
        ({"text": "answer"}, "text must be a function"),
        ({"gather": "yes"}, "gather must be"),
        ({"gather": 0}, "gather must be"),
        ({"eos_token_ids": 5}, "eos_token_ids must be a list of ids"),
        ({"eos_token_ids": "57"}, "eos_token_ids must be a list of ids"),
        ({"eos_token_ids": []}, "eos_token_ids must be a list of ids"),
        ({"eos_token_ids": [1.7]}, "eos_token_ids must be an int"),
        ({"name": ""}, "name must be a string"),
        ({"gropu_size": 4}, "no argument 'gropu_size'; did you mean group_size"),
        ({"normalise": "rank"}, "no argument 'normalise'; did you mean normalize"),
        ({"num_generations": 4}, "no argument 'num_generations'; there are deadline, .*group_size"),
        ({"normalize": "zscore"}, "normalize must be one of"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises((TypeError, ValueError), match=match):
        GroupReward(Hashed(), **options)


def test_gathering_in_one_process_is_refused():
    with pytest.raises(ValueError, match="torch.distributed is not initialised"):
        GroupReward(Hashed(), group_size=1, gather=True)(["Why?"], ["a"])


class TestWholeGroups:
    def test_rows_of_several_processes(self):
        first, second, third = whole_groups([["a", "a", "b"], ["b", "c", "c"]], 2)
        assert (first.key, first.members, first.owner) == ("a", ((0, 0), (0, 1)), 0)
        assert (second.key, second.members, second.owner) == ("b", ((0, 2), (1, 0)), 0)
        assert (third.key, third.members, third.owner) == ("c", ((1, 1), (1, 2)), 1)

    def test_whoever_has_most_scores(self):
        assert [one.owner for one in whole_groups([["a"], ["a", "a"]], 3)] == [1]

    def test_a_prompt_of_several_groups(self):
        assert [one.members for one in whole_groups([["a"] * 3, ["a"]], 2)] == [((0, 0), (0, 1)), ((0, 2), (1, 0))]

    def test_what_is_missing_is_said(self):
        with pytest.raises(
            ValueError, match=r"3 completions of the prompt of row 1 of process 0 \(1 on process 0, 2 on process 1\)"
        ):
            whole_groups([["a", "b"], ["b", "a", "b"]], 2)


def test_the_key_of_a_group():
    red, blue = picture("red"), picture("blue")
    buffer = io.BytesIO()
    red.save(buffer, "PNG")
    made = [
        Group("Why?", ["a"], images=[red]),
        Group("Why?", ["a"], images=[blue]),
        Group("Why? ", ["a"], images=[red]),
        Group("Why?", ["a"], images=[red, blue]),
        Group("Why?", ["a"], images=[blue, red]),
        Group("Why?", ["a"]),
        Group([{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}], ["a"]),
        Group("Why?", ["a"], tools=[{"name": "f"}]),
        Group("Why?", ["a"], images=[buffer.getvalue()]),
        Group(message("Why?", red), ["a"]),
        Group(message("Why?", blue), ["a"]),
    ]
    assert len({group.key for group in made}) == len(made)
    assert made[0].key == Group("Why?", ["b", ""], images=[picture("red")]).key


def test_scores_are_those_of_the_judge():
    judge, pictures = reward_cases.demo_judge(), reward_cases.pictures()
    texts = [f"It is a {digit}." for digit in range(6)]
    found = GroupReward(judge, group_size=3, order="given")(
        ["Which digit is shown?"] * 6, texts, image=[pictures[n // 3] for n in range(6)]
    )
    expected = [
        judge.score("Which digit is shown?", texts[start : start + 3], images=[pictures[start // 3]])
        for start in (0, 3)
    ]
    torch.testing.assert_close(torch.tensor(found), torch.cat(expected), atol=2e-6, rtol=0)

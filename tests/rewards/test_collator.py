"""Samples that come one at a time become whole groups, or errors; nothing waits for ever, and nothing is kept."""

import asyncio
import concurrent.futures
import os
import pickle
import threading

import pytest

from tests.collator_cases import LONG, Clock, Stopwatch, settled
from tests.reward_cases import Hanging, Hashed, Watched, picture
from yojo.rewards.answers import Reward
from yojo.rewards.collator import GroupCollator
from yojo.rewards.groups import Group
from yojo.rewards.scorer import GroupScorer, Rewarded, RewardError


class Held:
    """A scorer that waits in its calls until it is let go, and counts them.

    Attributes:
        calls: the groups of each call.
    """

    def __init__(self):
        self.go, self.entered, self.calls = threading.Event(), threading.Semaphore(0), []

    def __call__(self, groups):
        self.calls.append(groups)
        self.entered.release()
        assert self.go.wait(LONG)
        return GroupScorer(Hashed()).score(groups)


def collator(size=2, judge=None, **options):
    return GroupCollator(GroupScorer(judge or Hashed()).score, size, **options)


def expected(prompt, *completions, **options):
    return GroupScorer(Hashed()).score([Group(prompt, list(completions), **options)])[0]


def test_each_sample_gets_the_reward_of_its_group():
    judge = Watched()
    with collator(3, judge) as made:
        futures = {}
        for text in ("a", "bb", "ccc"):  # the groups are interleaved
            for key in "xyz":
                futures[key, text] = made.add(key, f"question {key}", text + key)
        rewards = dict(zip(futures, settled(futures.values()), strict=True))
    for key in "xyz":
        found = GroupScorer(Watched()).score([Group(f"question {key}", [t + key for t in ("a", "bb", "ccc")])])[0]
        assert [rewards[key, t].reward for t in ("a", "bb", "ccc")] == found.rewards
        assert [rewards[key, t].place for t in ("a", "bb", "ccc")] == found.places
    assert all(r.group_size == 3 and r.missing == 0 for r in rewards.values())
    assert sum(map(len, judge.seen)) == 3  # no group was scored twice, or in part


def test_flags_and_media_reach_the_scorer():
    image = picture("red")
    seen = []

    def score(groups):
        seen.extend(groups)
        return GroupScorer(Hashed(), truncated="none").score(groups)

    with GroupCollator(score, 2) as made:
        futures = [
            made.add("k", "What?", "a", [image], truncated=True, tools=[{"name": "t"}], literal_tags=True),
            made.add("k", "What?", "", [picture("red")], truncated=False, tools=[{"name": "t"}], literal_tags=True),
        ]
        cut, empty = settled(futures)
    assert (cut.reward, cut.treated) == (None, "truncated")
    assert (empty.score, empty.treated) == (None, "empty")
    (group,) = seen
    assert group.truncated == [True, False] and list(group.images) == [image] and group.literal_tags
    assert group.key == Group("What?", ["x"], [image], tools=[{"name": "t"}], literal_tags=True).key


def test_messages_that_are_written_on_later_do_not_change_the_prompt():
    messages = [{"role": "user", "content": [{"type": "text", "text": "What?"}]}]
    seen = []
    with GroupCollator(lambda groups: seen.extend(groups) or GroupScorer(Hashed()).score(groups), 2) as made:
        first = made.add("k", messages, "a")
        messages[0]["content"][0]["text"] = "Who?"
        with pytest.raises(ValueError, match="'k'.*another prompt"):
            made.add("k", messages, "b")
        second = made.add("k", [{"role": "user", "content": [{"type": "text", "text": "What?"}]}], "b")
        settled([first, second])
    assert seen[0].prompt[0]["content"][0]["text"] == "What?"
    assert seen[0].key == Group([{"role": "user", "content": [{"type": "text", "text": "What?"}]}], ["-"]).key


def test_a_key_stands_for_one_prompt_one_set_of_images_and_one_size(tmp_path):
    picture("blue").save(tmp_path / "a.png")
    picture("blue").save(tmp_path / "b.png")
    with collator(2) as made:
        first = made.add("k", "What?", "a", [str(tmp_path / "a.png")])
        with pytest.raises(ValueError, match="another prompt, or other images"):
            made.add("k", "What? ", "b", [str(tmp_path / "a.png")])
        with pytest.raises(ValueError, match="another prompt, or other images"):
            made.add("k", "What?", "b", [picture("red")])
        with pytest.raises(ValueError, match="group_size is 3, and was 2"):
            made.add("k", "What?", "b", [str(tmp_path / "b.png")], group_size=3)
        second = made.add("k", "What?", "b", [str(tmp_path / "b.png")])  # the same picture in another place
        found = settled([first, second])
    image = str(tmp_path / "a.png")
    assert [one.reward for one in found] == expected("What?", "a", "b", images=[image]).rewards


def test_groups_that_wait_together_are_scored_in_one_call():
    score = Held()
    with GroupCollator(score, 2, max_groups=3) as made:
        futures = [made.add("first", "Why?", text) for text in "ab"]
        assert score.entered.acquire(timeout=LONG)
        for key in range(5):
            futures += [made.add(key, f"question {key}", text) for text in "ab"]
        metrics = made.metrics()
        assert metrics["yojo_collator_groups_scoring"] == 1 and metrics["yojo_collator_groups_queued"] == 5
        assert metrics["yojo_collator_samples_waiting"] == 12
        score.go.set()
        settled(futures)
        metrics = made.metrics()
    assert [len(call) for call in score.calls] == [1, 3, 2]
    assert metrics["yojo_collator_call_groups_sum"] == 6 and metrics["yojo_collator_call_groups_max"] == 3
    assert metrics["yojo_collator_groups_scored_total"] == 6
    assert metrics["yojo_collator_wait_seconds_count"] == 12
    assert metrics["yojo_collator_wait_seconds_max"] >= metrics["yojo_collator_wait_seconds_mean"] > 0


def test_an_incomplete_group_fails_at_its_deadline_by_a_real_clock():
    clock = Stopwatch()
    with collator(3, deadline=0.05, clock=clock) as made:
        futures = [made.add("k", "Why?", text) for text in "ab"]
        clock.goes = True
        for error in settled(futures):
            assert isinstance(error, RewardError)
            assert "'k': 2 of 3 samples came within deadline=0.05 s" in str(error) and "group_size" in str(error)
        assert settled(futures)[0] is not settled(futures)[1]  # no two share a traceback
        with pytest.raises(RewardError, match="the sample is late: its group ended with 2 of 3 samples"):
            made.add("k", "Why?", "c")
        metrics = made.metrics()
    assert metrics["yojo_collator_groups_incomplete_total"] == metrics["yojo_collator_groups_failed_total"] == 1
    assert metrics["yojo_collator_samples_late_total"] == 1 and metrics["yojo_collator_samples_waiting"] == 0


def test_an_incomplete_group_may_be_scored_as_it_is():
    clock = Clock()
    with collator(3, deadline=10, incomplete="score", reuse_keys=True, clock=clock) as made:
        futures = [made.add("k", "Why?", text) for text in "ab"]
        clock.now += 9.9
        made.expire()
        assert not any(future.done() for future in futures)
        clock.now += 0.2
        made.expire()
        found = settled(futures)
        with pytest.raises(RewardError, match="late"):
            made.add("k", "Why?", "c")
    assert [one.reward for one in found] == expected("Why?", "a", "b").rewards
    assert all(one.missing == 1 and one.group_size == 2 for one in found)


def test_a_deadline_begins_with_each_groups_first_sample():
    clock = Clock()
    with collator(2, deadline=10, clock=clock) as made:
        early = made.add("early", "Why?", "a")
        clock.now += 6
        later = [made.add("later", "Why?", "a")]
        clock.now += 6
        made.expire()
        assert isinstance(settled([early])[0], RewardError)
        later.append(made.add("later", "Why?", "b"))
        assert [one.reward for one in settled(later)] == expected("Why?", "a", "b").rewards


def test_keys_that_have_ended_are_forgotten_in_time_and_by_number():
    clock = Clock()
    with collator(1, remember_keys=2, remember_seconds=100, deadline=10, clock=clock) as made:
        for key in "abc":
            settled([made.add(key, "Why?", "x")])
        with pytest.raises(RewardError, match="a sample more than group_size=1"):
            made.add("b", "Why?", "x")
        assert made.metrics()["yojo_collator_keys_remembered"] == 2
        assert isinstance(settled([made.add("a", "Why?", "x")])[0], Reward)  # beyond the bound: a group of its own
        clock.now += 101
        made.expire()
        assert made.metrics()["yojo_collator_keys_remembered"] == 0
        assert isinstance(settled([made.add("b", "Why?", "x")])[0], Reward)


def test_more_samples_than_the_size_are_an_error_where_keys_are_unique():
    with collator(2) as made:
        settled([made.add("k", "Why?", text) for text in "ab"])
        with pytest.raises(RewardError, match="a sample more than group_size=2"):
            made.add("k", "Why?", "c")


def test_a_key_that_comes_again_begins_its_next_group_when_the_last_is_whole():
    score = Held()
    with GroupCollator(score, 2, reuse_keys=True) as made:
        futures = [made.add("k", "Why?", text) for text in ("a", "b", "c", "d", "e")]  # while the first is being scored
        score.go.set()
        found = settled(futures[:4])
        assert not futures[4].done()
        for pair, texts in ((found[:2], "ab"), (found[2:], "cd")):
            assert [one.reward for one in pair] == expected("Why?", *texts).rewards
    assert isinstance(settled(futures[4:])[0], RewardError)
    clock = Clock()
    with collator(2, reuse_keys=True, deadline=10, remember_seconds=100, clock=clock) as made:
        lost = made.add("k", "Why?", "a")
        clock.now += 11
        made.expire()
        assert isinstance(settled([lost])[0], RewardError)
        with pytest.raises(RewardError, match="late"):  # it may be the lost one, or of the next group
            made.add("k", "Why?", "b")
        clock.now += 101
        settled([made.add("k", "Why?", text) for text in "bc"])


@pytest.mark.parametrize(
    ("score", "kind", "text"),
    [
        (lambda groups: 1 / 0, RewardError, "score raised ZeroDivisionError"),
        (lambda groups: (_ for _ in ()).throw(SystemExit(3)), RewardError, "score raised SystemExit"),
        (lambda groups: (_ for _ in ()).throw(RewardError("the judge is down")), RewardError, "the judge is down"),
        (lambda groups: (_ for _ in ()).throw(UnicodeDecodeError("utf8", b"x", 0, 1, "bad")), ValueError, "bad"),
        (lambda groups: None, RewardError, "must return a list"),
        (lambda groups: [], RewardError, "gave rewards of 0 groups"),
        (lambda groups: [Rewarded([1.0], [1.0], [0], [None], [False])], RewardError, "gave 1 rewards for 2 samples"),
        (lambda groups: [Rewarded([1.0, 2.0], [1.0], [0, 1], [None] * 2, [])], RewardError, "gave 1 scores for 2"),
        (
            lambda groups: [Rewarded([1.0, float("nan")], [1.0, 2.0], [0, 1], [None] * 2, [])],
            RewardError,
            "a reward of nan",
        ),
        (lambda groups: ["ab"], RewardError, "score raised AttributeError"),
    ],
)
def test_whatever_goes_wrong_in_score_is_an_error_of_each_sample(score, kind, text, caplog):
    with GroupCollator(score, 2) as made:
        for error in settled([made.add("k", "Why?", text) for text in "ab"]):
            assert type(error) is kind and text in str(error)
        assert made.metrics()["yojo_collator_groups_failed_total"] == 1
        assert made.metrics()["yojo_collator_wait_seconds_count"] == 0
    assert "no rewards for 1 groups: " in caplog.text  # whoever reads the log need not be who asked


def test_logs_without_text_have_the_type_of_an_error(caplog):
    def score(groups):
        raise RewardError(f"{groups[0].name}: {groups[0].completions[0]!r} is odd")

    with GroupCollator(score, 1, log_text=False) as made:
        (error,) = settled([made.add("a key", "Why?", "some text")])
    assert "a key" in str(error) and "some text" in str(error)
    (record,) = caplog.records
    assert record.getMessage() == "no rewards for 1 groups: RewardError"


@pytest.mark.parametrize("its_own_cause", [False, True])
def test_the_thread_goes_on_behind_an_error(its_own_cause):
    errors = iter([OSError("once"), None])

    def score(groups):
        if (error := next(errors)) is not None:
            raise error from (error if its_own_cause else None)
        return GroupScorer(Hashed()).score(groups)

    with GroupCollator(score, 1, scoring_deadline=LONG) as made:
        assert "once" in str(settled([made.add(1, "Why?", "a")])[0])
        assert isinstance(settled([made.add(2, "Why?", "a")])[0], Reward)


def test_a_group_that_cannot_be_judged_is_no_error_of_the_others():
    held, seen = Held(), []

    def score(groups):
        held.entered.release()
        assert held.go.wait(LONG)
        seen.append(len(groups))
        for group in groups:
            if group.prompt == "bad":
                raise ValueError("the picture is damaged")
        return GroupScorer(Hashed()).score(groups)

    with GroupCollator(score, 1) as made:
        futures = [made.add(0, "first", "a")]
        assert held.entered.acquire(timeout=LONG)
        futures += [made.add(n, prompt, "a") for n, prompt in enumerate(("good", "bad", "fine"), start=1)]
        held.go.set()
        found = settled(futures)
    assert seen == [1, 3, 1, 1, 1]
    assert type(found[2]) is ValueError
    for n, prompt in ((0, "first"), (1, "good"), (3, "fine")):
        assert found[n].reward == expected(prompt, "a").rewards[0]


def test_a_score_that_hangs_ends_for_those_who_wait():
    score, clock = Held(), Stopwatch()
    with GroupCollator(score, 1, scoring_deadline=0.05, clock=clock) as made:
        under_way = made.add(1, "Why?", "a")
        assert score.entered.acquire(timeout=LONG)
        queued = made.add(2, "Why?", "a")
        clock.goes = True
        for error in settled([under_way, queued]):
            assert isinstance(error, RewardError) and "no rewards within scoring_deadline=0.05 s" in str(error)
        score.go.set()  # what it says now comes too late, and changes nothing
    assert len(score.calls) == 1  # nobody waits for the second one any more


def test_the_scorers_own_deadline_comes_through():
    judge = Hanging()
    with GroupCollator(GroupScorer(judge, deadline=0.05).score, 1) as made:
        (error,) = settled([made.add(1, "Why?", "a")])
        assert isinstance(error, RewardError) and "within the deadline of 0.05 s" in str(error)
    judge.go.set()


def test_a_cancelled_sample_leaves_its_place_to_another():
    clock = Clock()
    with collator(2, deadline=10, clock=clock) as made:
        assert made.add("alone", "Why?", "lost").cancel()
        assert made.metrics()["yojo_collator_groups_collecting"] == 0  # nobody is left: nothing is kept
        kept, gone = made.add("k", "Why?", "a"), made.add("short", "Why?", "x", group_size=3)
        left = made.add("short", "Why?", "y", group_size=3)
        assert gone.cancel()
        assert concurrent.futures.wait([gone], timeout=LONG).done == {gone}
        again = made.add("short", "Why?", "z", group_size=3)
        assert not left.done()  # three came, and two are there
        found = settled([left, again, made.add("short", "Why?", "x", group_size=3)])
        clock.now += 11
        made.expire()
        assert "1 of 2 samples came" in str(settled([kept])[0])
        assert made.metrics()["yojo_collator_samples_cancelled_total"] == 2
    assert [one.reward for one in found] == expected("Why?", "y", "z", "x").rewards


def test_a_cancelled_sample_of_a_whole_group_changes_no_others_reward():
    score = Held()
    with GroupCollator(score, 3) as made:
        blocker = [made.add("first", "Why?", text) for text in "abc"]
        assert score.entered.acquire(timeout=LONG)
        futures = [made.add("k", "Who?", text) for text in "abc"]
        assert futures[1].cancel()
        score.go.set()
        settled(blocker)
        found = settled([futures[0], futures[2]])
        metrics = made.metrics()
    whole = expected("Who?", "a", "b", "c").rewards
    assert [one.reward for one in found] == [whole[0], whole[2]] and found[0].group_size == 3
    assert metrics["yojo_collator_samples_cancelled_total"] == 1 and metrics["yojo_collator_samples_waiting"] == 0


def test_event_loops_and_threads_share_groups():
    with collator(4) as made:

        async def some(texts):
            async def one(key, text):
                return key, text, await made.submit(key, f"question {key}", text)

            return await asyncio.gather(*(one(key, text) for key in range(20) for text in texts))

        def threads(text):
            futures = [(key, text, made.add(key, f"question {key}", text)) for key in range(20)]
            return [(key, text, future.result(LONG)) for key, text, future in futures]

        with concurrent.futures.ThreadPoolExecutor(3) as pool:
            parts = [
                pool.submit(asyncio.run, some("ab")),
                pool.submit(asyncio.run, some("c")),
                pool.submit(threads, "d"),
            ]
            found = {(key, text): reward for part in parts for key, text, reward in part.result(LONG)}
    for key in range(20):
        assert [found[key, t].reward for t in "abcd"] == expected(f"question {key}", *"abcd").rewards


def test_a_task_that_is_cancelled_leaves_the_group():
    with collator(2) as made:

        async def run():
            task = asyncio.create_task(made.submit("k", "Why?", "lost"))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert made.metrics()["yojo_collator_samples_waiting"] == 0
            return await asyncio.gather(made.submit("k", "Why?", "a"), made.submit("k", "Why?", "b"))

        found = asyncio.run(run())
    assert [one.reward for one in found] == expected("Why?", "a", "b").rewards


def test_a_callback_may_add_the_next_sample():
    with collator(1) as made:
        added = concurrent.futures.Future()
        first = made.add(1, "Why?", "a")
        first.add_done_callback(lambda _: added.set_result(made.add(2, "Why?", "b")))
        assert settled([added.result(LONG)])[0].reward == expected("Why?", "b").rewards[0]


def test_closing_ends_everything():
    score = Held()
    made = GroupCollator(score, 2)
    futures = [made.add("scoring", "Why?", text) for text in "ab"]
    assert score.entered.acquire(timeout=LONG)
    futures += [made.add("queued", "Why?", text) for text in "ab"] + [made.add("collecting", "Why?", "a")]
    threads = made._threads
    made.close(timeout=0.01)
    for error in settled(futures):
        assert isinstance(error, RewardError) and "closed" in str(error)
    score.go.set()
    for thread in threads:
        assert thread.daemon
        thread.join(LONG)
        assert not thread.is_alive()
    made.close()
    with pytest.raises(RewardError, match="is closed"):
        made.add("k", "Why?", "a")
    assert made.metrics()["yojo_collator_samples_waiting"] == 0
    with GroupCollator(score, 2) as unused:
        assert unused._threads == ()  # they begin with the first sample


def test_it_travels_without_its_samples():
    with collator(2, deadline=7, incomplete="score", reuse_keys=True) as made:
        made.add("k", "Why?", "a")
        with pickle.loads(pickle.dumps(made)) as copy:
            assert (copy.deadline, copy.incomplete, copy.reuse_keys, copy.group_size) == (7, "score", True, 2)
            assert copy.metrics()["yojo_collator_samples_waiting"] == 0
            found = settled([copy.add("k", "Who?", text) for text in "ab"])
    assert [one.reward for one in found] == expected("Who?", "a", "b").rewards


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_collator_in_use_refuses_to_work_in_a_fork(monkeypatch):
    with collator(1) as made:
        settled([made.add(1, "Why?", "a")])
        child = os.getpid() + 1
        monkeypatch.setattr(os, "getpid", lambda: child)  # where the threads are gone
        with pytest.raises(RewardError, match="forked"):
            made.add(2, "Why?", "a")


def test_too_many_samples_are_refused():
    with collator(2, max_waiting=3) as made:
        futures = [made.add(key, "Why?", "a") for key in range(3)]
        with pytest.raises(RewardError, match="3 samples are waiting in 3 groups that are not whole.*max_waiting=3"):
            made.add(3, "Why?", "a")
        assert made.metrics()["yojo_collator_samples_refused_total"] == 1
        futures[0].cancel()
        made.add(3, "Why?", "a")


@pytest.mark.parametrize(
    ("arguments", "options", "kind", "text"),
    [
        ((None, 2), {}, TypeError, "score must be a function"),
        ((len, 0), {}, ValueError, "group_size must be at least 1"),
        ((len, True), {}, TypeError, "group_size must be an int"),
        ((len, 2), {"deadline": 0}, ValueError, "deadline must be above 0"),
        ((len, 2), {"deadline": float("inf")}, ValueError, "deadline must be above 0 and finite"),
        ((len, 2), {"deadline": None}, TypeError, "deadline must be seconds"),
        ((len, 2), {"scoring_deadline": float("nan")}, ValueError, "scoring_deadline"),
        ((len, 2), {"incomplete": "wait"}, ValueError, "incomplete must be one of fail, score"),
        ((len, 2), {"reuse_keys": 1}, TypeError, "reuse_keys"),
        ((len, 2), {"max_groups": 0}, ValueError, "max_groups"),
        ((len, 2), {"max_waiting": 1.5}, TypeError, "max_waiting"),
    ],
)
def test_arguments_that_make_no_sense(arguments, options, kind, text):
    with pytest.raises(kind, match=text):
        GroupCollator(*arguments, **options)


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"completion": None}, TypeError, "'k'.*completion 0 must be a string"),
        ({"completion": "\ud800"}, ValueError, "'k'.*surrogate"),
        ({"prompt": ""}, ValueError, "'k'.*the prompt is empty"),
        ({"truncated": 1}, TypeError, "'k'.*truncated"),
        ({"images": [picture("red")], "prompt": "<image><image>?"}, ValueError, "'k'"),
        ({"images": ["no/such/file.png"]}, OSError, "no/such/file.png"),
        ({"group_size": 0}, ValueError, "group_size"),
        ({"key": []}, TypeError, "unhashable"),
    ],
)
def test_a_sample_that_cannot_be_judged_is_refused_at_once(change, kind, text):
    with collator(2) as made:
        sample = {"key": "k", "prompt": "Why?", "completion": "a"}
        with pytest.raises(kind, match=text):
            made.add(**{**sample, **change})
        assert made.metrics()["yojo_collator_samples_waiting"] == 0
        assert isinstance(settled([made.add(**sample), made.add(**sample)])[0], Reward)
    with GroupCollator(len) as made, pytest.raises(ValueError, match="group_size is not known"):
        made.add("k", "Why?", "a")

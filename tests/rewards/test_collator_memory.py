"""The collator gives back what it held: groups that ended any way, and ten thousand keys of which some never came whole."""

import gc
import itertools
import time
import tracemalloc
import weakref

from tests.collator_cases import LONG, Clock, settled
from tests.reward_cases import Hashed, picture
from yojo.rewards.collator import GroupCollator
from yojo.rewards.scorer import GroupScorer, Rewarded, RewardError


def gone(references, seconds=LONG):
    """Wait until nothing is referred to any more: a thread that has answered may not have returned yet."""
    until = time.monotonic() + seconds
    while (left := {kind for kind, one in references.items() if one() is not None}) and time.monotonic() < until:
        time.sleep(0.01)
        gc.collect()
    assert not left


def test_nothing_of_a_group_is_kept_when_it_has_ended():
    clock = Clock()

    def score(groups):
        if groups[0].prompt == "bad":
            raise OSError("down")
        return GroupScorer(Hashed()).score(groups)

    with GroupCollator(score, 2, deadline=10, clock=clock) as made:
        pictures = {kind: picture("red") for kind in ("scored", "failed", "lost", "cancelled")}
        images = {kind: weakref.ref(image) for kind, image in pictures.items()}
        futures = [made.add("scored", "Why?", text, [pictures["scored"]]) for text in "ab"]
        futures += [made.add("failed", "bad", text, [pictures["failed"]]) for text in "ab"]
        futures += [made.add("lost", "Why?", "a", [pictures["lost"]])]
        made.add("cancelled", "Why?", "a", [pictures["cancelled"]]).cancel()
        settled(futures[:4])
        clock.now += 11
        made.expire()
        settled(futures)
        del pictures
        # One more call: the thread that scores is back from the last one for certain.
        settled([made.add("next", "Why?", text) for text in "ab"])
        settled([made.add("one more", "Why?", text) for text in "ab"])
        gone(images)
        assert len(futures) == 5  # which are still held


def rollouts(made, clock, keys, size, offset=0):
    """Samples of keys, of which one in a hundred is lost; all others have the right reward, and the lost ones' groups an error."""
    lost = {(key, key % size) for key in range(0, keys, 100 // size)}
    futures = {}
    for place, key in itertools.product(range(size), range(keys)):  # all the first samples, then all the second ones
        if (key, place) not in lost:
            futures[key, place] = made.add(offset + key, "Why?", "x" * (key % 7 + place + 1))
    without = {key for key, _ in lost}
    left = []
    for (key, place), future in futures.items():
        if key in without:
            left.append(future)
        else:
            assert future.result(LONG).reward == key % 7 + place + 1
    assert len(lost) == keys * size // 100 and len(left) == len(lost) * (size - 1)
    assert not any(future.done() for future in left)
    assert made.metrics()["yojo_collator_samples_waiting"] == len(left)
    clock.now += 601
    made.expire()
    for error in settled(left):
        assert isinstance(error, RewardError) and f"{size - 1} of {size} samples came" in str(error)
    clock.now += 3601
    made.expire()  # and the keys are forgotten, too
    return len(without)


def lengths(groups):
    return [
        Rewarded([float(len(text)) for text in group.completions], *([None] * len(group.completions) for _ in range(4)))
        for group in groups
    ]


def test_ten_thousand_keys_with_one_rollout_in_a_hundred_lost():
    clock = Clock()
    with GroupCollator(lengths, 2, clock=clock) as made:
        incomplete = rollouts(made, clock, 10_000, 2)
        assert (len(made._collecting), len(made._ready), len(made._scoring), len(made._ended)) == (0, 0, 0, 0)
        metrics = made.metrics()
    assert metrics["yojo_collator_samples_waiting"] == metrics["yojo_collator_keys_remembered"] == 0
    assert (
        metrics["yojo_collator_groups_incomplete_total"] == metrics["yojo_collator_groups_failed_total"] == incomplete
    )
    assert metrics["yojo_collator_groups_scored_total"] == 10_000 - incomplete


def test_memory_is_given_back():
    clock, held = Clock(), []
    with GroupCollator(lengths, 4, clock=clock) as made:
        tracemalloc.start()
        try:
            for n in range(3):
                rollouts(made, clock, 200, 4, 200 * n)
                # One small call more: the thread that scores is back from the last one for certain.
                settled([made.add(("next", n), "Why?", text) for text in "abcd"])
                gc.collect()
                held.append(tracemalloc.get_traced_memory()[0])
        finally:
            tracemalloc.stop()
    assert held[2] - held[1] < 20_000, held  # 800 samples came and went, which take a kilobyte each

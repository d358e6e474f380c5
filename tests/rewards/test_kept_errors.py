"""Errors of a collator that somebody keeps hold nothing of the groups that they ended."""

import concurrent.futures
import gc
import weakref

from tests.reward_cases import picture
from yojo.rewards.collator import GroupCollator


def test_an_error_that_somebody_keeps_does_not_keep_the_groups():
    def score(groups):
        raise OSError("down")

    with GroupCollator(score, 1) as made:
        image = picture("red")
        kept, futures = weakref.ref(image), [made.add(1, "Why?", "a", [image])]
        for key in (2, 3):  # the thread is back from the first call for certain
            concurrent.futures.wait(futures, timeout=60)
            futures.append(made.add(key, "Why?", "a"))
        concurrent.futures.wait(futures, timeout=60)
        del image
        gc.collect()
        assert kept() is None

"""`GroupCollator`: samples that come one at a time, from any thread or event loop, scored as the groups they belong to."""

import asyncio
import collections
import dataclasses
import functools
import logging
import numbers
import os
import threading
import time
import weakref

from yojo.rewards.answers import checked, fail, give, let_go
from yojo.rewards.groups import Group
from yojo.rewards.scorer import RewardError
from yojo.rewards.waiting import Ended, Sample, Tally, Waiting

logger = logging.getLogger(__name__)

INCOMPLETE = ("fail", "score")


class GroupCollator:
    """Collects samples that come one at a time into groups, and gives each its reward.

    Groups that are whole and wait at the same time are scored in one call, by one thread of the collator's own; another one
    keeps the deadlines. Both begin with the first sample, so that a collator can be made, pickled and sent to a worker process
    before; what is sent has the settings and none of the samples. Call from any threads and event loops at once.

    Every future ends: with a `Reward`, or with an error. A group ends at its deadline whatever it lacks; `score` is given
    `scoring_deadline`, behind which its answer is not taken any more. An error of `score` is that of all groups of the call.

    A sample whose future is cancelled (or whose task is, in `submit`) leaves its group while that is not whole: its place is free
    for another sample of the key, and without one the group is incomplete at its deadline. Once a group is whole it is
    scored with all its samples, cancelled ones too: the others' rewards do not depend on who still listens.

    Args:
        score: function from a list of `yojo.rewards.Group` to a list of `yojo.rewards.Rewarded`: `GroupScorer(judge).score`.
        group_size: samples that make a group whole; None: `add` is told for each.
        deadline: seconds that a group has to become whole, from its first sample.
        scoring_deadline: seconds from then on to its rewards, the wait for groups before it included; None: as `deadline`.
        incomplete: what becomes of a group that is not whole at its deadline. "fail": an error for each of its samples. "score":
            what came is scored as a smaller group, and `Reward.missing` says so.
        reuse_keys: whether a key may come again. False: keys are unique (a uid), a sample more than the size is an error. True: keys
            name prompts, which come again, also while the group before is being scored: the samples of a key are counted, and
            each `group_size` of them in the order they come are a group. After a group that ended incomplete, its key is
            an error until it is forgotten: nothing tells a late sample from that of a next group.
        max_groups: groups in one call of `score`, at most.
        max_waiting: samples that wait, at most; one more is an error.
        remember_keys, remember_seconds: how many keys that have ended are remembered, and for how long: their late samples are
            errors that say so. One that comes later still begins a group of its own, which ends by `incomplete` at its deadline.
        log_text: whether logs hold what errors say, which may be keys and text of samples; else their types alone.
        clock: function that gives seconds, which never go back.

    Raises:
        TypeError, ValueError: an argument that does not fit the above.
    """

    def __init__(
        self,
        score,
        group_size=None,
        *,
        deadline=600.0,
        scoring_deadline=None,
        incomplete="fail",
        reuse_keys=False,
        max_groups=64,
        max_waiting=65_536,
        remember_keys=65_536,
        remember_seconds=3600.0,
        log_text=True,
        clock=time.monotonic,
    ):
        self._settings = {name: value for name, value in locals().items() if name != "self"}
        if not callable(score):
            raise TypeError(
                "score must be a function from a list of groups to a list of Rewarded, such as GroupScorer(judge).score, got "
                f"{type(score).__name__}"
            )
        if group_size is not None:
            _check_count("group_size", group_size)
        scoring_deadline = deadline if scoring_deadline is None else scoring_deadline
        for name, value in (
            ("deadline", deadline),
            ("scoring_deadline", scoring_deadline),
            ("remember_seconds", remember_seconds),
        ):
            _check_seconds(name, value)
        if incomplete not in INCOMPLETE:
            raise ValueError(f"incomplete must be one of {', '.join(INCOMPLETE)}, got {incomplete!r}")
        if not isinstance(reuse_keys, bool):
            raise TypeError(f"reuse_keys must be True or False, got {reuse_keys!r}")
        for name, value in (
            ("max_groups", max_groups),
            ("max_waiting", max_waiting),
            ("remember_keys", remember_keys),
        ):
            _check_count(name, value)
        self.group_size, self.deadline, self.scoring_deadline = group_size, deadline, scoring_deadline
        self.incomplete, self.reuse_keys = incomplete, reuse_keys
        self.max_groups, self.max_waiting = max_groups, max_waiting
        self._score, self._clock, self._log_text = score, clock, log_text
        self._lock = threading.Lock()
        self._work, self._timer = threading.Condition(self._lock), threading.Condition(self._lock)
        self._collecting = collections.OrderedDict()  # key -> Waiting, the next deadline first
        self._ready, self._scoring = collections.deque(), []
        self._ended = Ended(remember_keys, remember_seconds)
        self._waiting, self._closed, self._threads, self._process = 0, False, (), None
        self._counts = collections.Counter()
        self._waits, self._calls, self._call_seconds = Tally(), Tally(), Tally()

    def __reduce__(self):
        return functools.partial(GroupCollator, **self._settings), ()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def add(
        self,
        key,
        prompt,
        completion,
        images=(),
        videos=(),
        truncated=None,
        group_size=None,
        *,
        tools=None,
        literal_tags=False,
    ):
        """Add a sample to its group.

        Images and videos are read here, where their objects are not those of the group's first sample, to compare what they hold.

        Args:
            key: what tells its group from others, hashable: a uid, or a digest of the prompt.
            prompt, images, videos, tools, literal_tags: as for `yojo.Example`; by content the same for all samples of a group.
            completion: str, may be empty.
            truncated: whether it was cut off at the length limit, True, False or None (not known).
            group_size: samples that make this group whole; None: the collator's.

        Returns:
            `concurrent.futures.Future` of a `Reward`.

        Raises:
            RewardError: the sample is late, or one too many of its key; too many are waiting; the collator is closed.
            TypeError, ValueError: a sample that cannot be judged, or does not belong to its group.
            OSError: a file that cannot be read.
        """
        size = self.group_size if group_size is None else group_size
        if size is None:
            raise ValueError(f"key {key!r}: group_size is not known: give it to the collator, or to add")
        _check_count("group_size", size)
        flags = None if truncated is None else [truncated]
        group = Group(prompt, [completion], images, videos, flags, tools, literal_tags, id=key)
        if self._process not in (None, os.getpid()):
            raise RewardError("the collator was in use before this process was forked: make one in each process")
        with self._lock:
            waiting = self._collecting.get(key)
        first = waiting.first if waiting is not None and waiting.shares_objects(group) else None
        group = _checked_group(group, first)  # reads media: not under the lock
        with self._lock:
            sample, waiting = self._put(key, group, size, completion, truncated)
        self._listen(waiting, sample)
        return sample.future

    async def submit(self, *args, **options):
        """Add a sample and wait for its `Reward`, in any event loop.

        Args:
            *args: as for `add`, whose errors are raised, too.
            **options: as for `add`.
        """
        return await asyncio.wrap_future(self.add(*args, **options))

    def metrics(self):
        """What was counted, and what waits now.

        Returns:
            dict: name, as Prometheus would have it -> number. `_total`s only grow; seconds are from a sample's arrival to its
            reward (`wait`), or of a call of `score` (`call`).
        """
        with self._lock:
            found = {
                f"yojo_collator_{name}_total": self._counts[name]
                for name in (
                    "samples",
                    "samples_late",
                    "samples_refused",
                    "samples_cancelled",
                    "groups_complete",
                    "groups_incomplete",
                    "groups_scored",
                    "groups_failed",
                )
            }
            found |= {
                "yojo_collator_samples_waiting": self._waiting,
                "yojo_collator_groups_collecting": len(self._collecting),
                "yojo_collator_groups_queued": len(self._ready),
                "yojo_collator_groups_scoring": sum(not one.ended for one in self._scoring),
                "yojo_collator_keys_remembered": len(self._ended),
            }
            for name, tally in (
                ("wait_seconds", self._waits),
                ("call_seconds", self._call_seconds),
                ("call_groups", self._calls),
            ):
                found |= tally.named(f"yojo_collator_{name}")
        return found

    def expire(self):
        """End what is past its deadline; the collator's own thread does so in time, a test with a clock of its own may."""
        lost, overdue = [], []
        with self._lock:
            now = self._clock()
            while self._collecting and (first := next(iter(self._collecting.values()))).due <= now:
                self._counts["groups_incomplete"] += 1
                if self.incomplete == "score":
                    self._close_group(first, now, "incomplete")
                else:
                    del self._collecting[first.key]
                    self._ended.add(first.key, now, self._how(first, "incomplete"))
                    self._end(first, failed=True)
                    lost.append(first)
            for one in [*self._scoring, *self._ready]:
                if one.due <= now and not one.ended:
                    self._end(one, failed=True)
                    overdue.append(one)
            if overdue:
                self._ready = collections.deque(one for one in self._ready if not one.ended)
            self._ended.forget(now)
        for one in lost:
            fail(one, RewardError(self._lost(one), kind="incomplete"))
        for one in overdue:
            why = f"key {one.key!r}: no rewards within scoring_deadline={self.scoring_deadline:g} s of the group being whole"
            fail(one, RewardError(f"{why}: the judge hangs, or is slower than samples come; raise the deadline then"))

    def close(self, timeout=10.0):
        """End everything that waits with an error, and the threads. A second time it does nothing.

        Args:
            timeout: seconds to wait for a call of `score` that is under way; its thread ends with it, and never holds up a program's end.
        """
        with self._lock:
            threads, self._threads, self._closed = self._threads, (), True
            left = [one for one in (*self._scoring, *self._ready, *self._collecting.values()) if not one.ended]
            for one in left:
                self._end(one, failed=True)
            self._ready.clear()
            self._collecting.clear()
            self._ended.clear()
            self._work.notify_all()
            self._timer.notify_all()
        for one in left:
            fail(
                one,
                RewardError(
                    f"key {one.key!r}: the collator was closed before the group had its rewards", kind="closed"
                ),
            )
        until = time.monotonic() + timeout
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, until - time.monotonic()))

    # ---- under the lock ----

    def _put(self, key, group, size, completion, truncated):
        now = self._clock()
        if self._closed:
            raise RewardError(f"key {key!r}: the collator is closed", kind="closed")
        self._ended.forget(now)
        if (how := self._ended.get(key)) is not None:
            self._counts["samples_late"] += 1
            raise RewardError(f"key {key!r}: {how}", kind="late")
        waiting = self._collecting.get(key)
        if waiting is not None and waiting.first.key != group.key:
            raise ValueError(
                f"key {key!r}: another prompt, or other images, than the first sample of the group had; a key must stand for one "
                "prompt with its media"
            )
        if waiting is not None and waiting.size != size:
            raise ValueError(f"key {key!r}: group_size is {size}, and was {waiting.size} for the first sample")
        if self._waiting >= self.max_waiting:
            self._counts["samples_refused"] += 1
            raise RewardError(
                f"key {key!r}: {self._waiting} samples are waiting in {len(self._collecting)} groups that are not whole and "
                f"{len(self._ready) + len(self._scoring)} that are; raise max_waiting={self.max_waiting}, or check group_size={size}",
                kind="crowded",
            )
        self._start()
        if waiting is None:
            waiting = self._collecting[key] = Waiting(key, group, size, now + self.deadline)
            self._timer.notify()
        sample = Sample(completion, truncated, now)
        waiting.samples.append(sample)
        self._waiting += 1
        self._counts["samples"] += 1
        if not waiting.missing:
            self._counts["groups_complete"] += 1
            self._close_group(waiting, now, "complete")
        return sample, waiting

    def _close_group(self, waiting, now, why):
        """A group that takes no more samples goes to be scored."""
        del self._collecting[waiting.key]
        if why == "incomplete" or not self.reuse_keys:
            self._ended.add(waiting.key, now, self._how(waiting, why))
        waiting.due = now + self.scoring_deadline
        self._ready.append(waiting)
        self._work.notify()
        self._timer.notify()

    def _end(self, waiting, failed):
        """A group that is answered outside of the lock, by whoever has called this."""
        waiting.ended = True
        self._waiting -= len(waiting.samples)
        self._counts["groups_failed" if failed else "groups_scored"] += 1

    def _start(self):
        if self._threads:
            return
        self._process = os.getpid()
        self._threads = (
            threading.Thread(target=self._run_scoring, name="yojo collator: scoring", daemon=True),
            threading.Thread(target=self._run_deadlines, name="yojo collator: deadlines", daemon=True),
        )
        for thread in self._threads:
            thread.start()

    def _next_due(self):
        fronts = [next(iter(held), None) for held in (self._collecting.values(), self._ready)]
        fronts += [one for one in self._scoring if not one.ended][:1]
        dues = [one.due for one in fronts if one is not None]
        if (forgotten := self._ended.due()) is not None:
            dues.append(forgotten)
        return min(dues, default=None)

    # ---- threads ----

    def _run_deadlines(self):
        while True:
            with self._lock:
                if self._closed:
                    return
                due = self._next_due()
                left = None if due is None else due - self._clock()
                if left is None or left > 0:
                    self._timer.wait(left)
                    continue
            self.expire()

    def _run_scoring(self):
        while self._score_next():  # what a call holds goes with it, not when the next one begins
            pass

    def _score_next(self):
        with self._lock:
            while not self._ready:
                if self._closed:
                    return False
                self._work.wait()
            self._scoring = [self._ready.popleft() for _ in range(min(self.max_groups, len(self._ready)))]
            batch = list(self._scoring)
        found = self._ask(batch)
        if len(batch) > 1 and any(isinstance(one, (TypeError, ValueError)) for one in found):
            found = [self._ask([one])[0] for one in batch]  # an input that is wrong is its own group's error
        for error in found:
            let_go(error)
        with self._lock:
            now, self._scoring = self._clock(), []
            live = [(one, answer) for one, answer in zip(batch, found, strict=True) if not one.ended]
            for one, answer in live:
                failed = isinstance(answer, BaseException)
                self._end(one, failed)
                for sample in () if failed else one.samples:
                    self._waits.add(now - sample.since)
        for one, answer in live:
            if isinstance(answer, BaseException):
                fail(one, answer)
            else:
                give(one, answer, now)
        # An error's frames lead back to this one: it must not hold the groups for as long as somebody keeps the error.
        batch = live = found = one = sample = answer = error = None  # noqa: F841
        return True

    def _ask(self, batch):
        """For each group its `Rewarded`, or the exception that is in its place."""
        start = time.monotonic()
        try:
            found = checked(batch, self._score([one.group() for one in batch]))
        except BaseException as error:  # whatever it is, those who wait have to hear of it
            said = f": {error}" if self._log_text else ""
            logger.warning("no rewards for %d groups: %s%s", len(batch), type(error).__name__, said)
            found = [error] * len(batch)
        with self._lock:
            self._calls.add(len(batch))
            self._call_seconds.add(time.monotonic() - start)
        return found

    # ---- cancelling ----

    def _listen(self, waiting, sample):
        """Hear of it when a future is cancelled. Futures are the caller's, who may keep them: they must not keep the group."""
        leave, group = weakref.WeakMethod(self._leave), weakref.ref(waiting)

        def done(future):
            if future.cancelled() and (told := leave()) is not None:
                told(group(), future)

        sample.future.add_done_callback(done)

    def _leave(self, waiting, future):
        with self._lock:
            self._counts["samples_cancelled"] += 1
            if waiting is None or waiting.ended or self._collecting.get(waiting.key) is not waiting:
                return
            waiting.samples = [sample for sample in waiting.samples if sample.future is not future]
            self._waiting -= 1
            if not waiting.samples:
                del self._collecting[waiting.key]
        future.set_running_or_notify_cancel()  # or `concurrent.futures.wait` would wait for it

    # ---- what is said ----

    def _how(self, waiting, why):
        if why == "complete":
            return (
                f"a sample more than group_size={waiting.size} for a key that had them all: group_size must be what the framework "
                "samples for a prompt; where keys name prompts that come again, reuse_keys=True"
            )
        came = waiting.size - waiting.missing
        return (
            f"the sample is late: its group ended with {came} of {waiting.size} samples after deadline={self.deadline:g} s; raise "
            "the deadline if rollouts take longer"
        )

    def _lost(self, waiting):
        came = waiting.size - waiting.missing
        return (
            f"key {waiting.key!r}: {came} of {waiting.size} samples came within deadline={self.deadline:g} s of the first: raise the "
            "deadline if rollouts take longer, check that group_size is what the framework samples for a prompt and that all of "
            'them come to this process, or set incomplete="score" to have smaller groups scored'
        )


def _check_count(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an int of at least 1, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")


def _check_seconds(name, value):
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be seconds, a number above 0, got {value!r}")
    if not 0 < value <= threading.TIMEOUT_MAX:
        raise ValueError(f"{name} must be above 0 and finite (a group that lacks a sample has to end), got {value!r}")


def _checked_group(group, first):
    """The group of one sample, such as a judge can be shown, its key known; `first`, where that has the very same media."""
    try:
        group.completions[0].encode()
    except UnicodeEncodeError as error:  # it would be an error of all groups that are scored together
        raise ValueError(
            f"{group.name}: the completion holds half of a surrogate pair, which no tokenizer takes"
        ) from error
    if first is not None:
        return first
    shown = group.example(["-"])
    # Messages are copied: whoever sends them may go on writing the conversation.
    group = dataclasses.replace(group, prompt=shown.prompt, images=tuple(shown.images), videos=tuple(shown.videos))
    _ = group.key
    return group

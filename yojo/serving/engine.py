"""`Engine`: requests admitted, prepared, packed into rows with others', scored and answered; in one event loop."""

import asyncio
import collections
import dataclasses
import functools
import logging
import time
import weakref

import anyio

from yojo.serving.errors import ApiError
from yojo.serving.fair import FairQueue, too_much
from yojo.serving.pace import Pace
from yojo.serving.workers import FAILED, READY, Failed, Role, Worker, WorkerLost

logger = logging.getLogger(__name__)

PREPARING = 60.0  # seconds in which a request is prepared, or its worker hangs
SCORING = 600.0  # seconds for a row
TRIES = 2  # of a request whose worker died under it; the second time it is alone with it
CHARACTERS_A_TOKEN = 3.5  # of text, before it is tokenised
TOKENS_AN_IMAGE = 256
TOKENS_AROUND = 16  # of a request's text: the chat template's
SHORT = 4  # rows of less than the budget by this are short
FORGETS = 0.98  # of the speed that is expected, a row
OWN = "yojo"  # the server itself, as a client


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a request gets.

    Attributes:
        scores: N floats, each exactly a float32.
        prompt_tokens: int.
        response_tokens: N ints.
        total_tokens: in the packed row: in comparative mode with permutations responses stand there several times.
        row: as `Asked.details` asks for; or None.
        digest: of the fingerprint of the model that gave the scores.
    """

    scores: list
    prompt_tokens: int
    response_tokens: list
    total_tokens: int
    row: dict | None
    digest: str


class _Item:
    """A request on its way."""

    def __init__(self, client, asked, tokens, num_bytes, due):
        self.client, self.asked, self.tokens, self.bytes, self.due = client, asked, tokens, num_bytes, due
        self.since = time.monotonic()
        self.ready_at, self.prepared, self.tries, self.is_held, self.queue = None, None, 0, True, None
        self.future = asyncio.get_running_loop().create_future()

    def __lt__(self, other):  # never asked: places in a queue differ
        return self.since < other.since


class Engine:
    """Scores requests of many clients with a worker per device, and says no in time.

    A request is prepared (decoded, tokenised) by one of some preparing workers, then waits for a row. As soon as a scoring worker is
    free it gets a row: requests of the clients in turn (`FairQueue`), up to the token budget. Nothing waits for company unless
    `Settings.linger` says so. What waits is bounded in tokens and bytes; a client can hold no more than four times what it leaves
    free, so that there is always room for another.

    A request whose worker dies is done again by another one, the second time in a row of its own; a second death is its
    error. Preparing workers begin when the first scoring worker has loaded the model.

    Args:
        settings: `yojo.serving.settings.Settings`.
        scorers: list of `Role`s, one a device.
        preparing: how many preparing workers.
        preparer: function that makes one of (pickled collator, limits): `yojo.serving.roles.Preparer`.
        in_process: workers are threads of this process.
        metrics: `yojo.serving.metrics.Metrics`, or None.
        setup: function that each preparing worker's process calls first, or None.

    Attributes:
        model: what the first scoring worker said of the model (`Scorer.hello`); None until then.
        ending: whether the server takes no more requests.
    """

    def __init__(self, settings, scorers, preparing=2, preparer=None, in_process=False, metrics=None, setup=None):
        from yojo.serving.metrics import Metrics
        from yojo.serving.roles import Preparer

        self.settings, self.metrics = settings, metrics or Metrics()
        self.model, self.ending, self.failed = None, False, None
        self.scorers = [Worker(role, in_process, self._changed) for role in scorers]
        make = preparer or Preparer
        roles = [Role(f"preparing {n}", make, self._collator, setup, nice=5) for n in range(preparing)]
        self.preparers = [Worker(role, in_process, self._changed) for role in roles]
        self._to_prepare, self._to_score = FairQueue(), FairQueue()
        self._tokens = self._bytes = 0  # that wait
        self._held = collections.Counter()  # client -> tokens that wait
        self.pace = Pace()
        self._turns = weakref.WeakValueDictionary()  # client -> lock of what waits for room
        self._open = set()  # items without an answer
        self._rate = None  # tokens a second, while there is work
        self._ratio = 1.0  # of tokens to what was guessed, of late
        self._event = None  # set, and made anew, whenever something has changed
        self._loops = []

    # ---- life ----

    async def start(self):
        """Begin the workers; returns at once, `ready` says when they are there."""
        self._event = asyncio.Event()
        loop = asyncio.get_running_loop()
        for worker in self.scorers:
            worker.start()
            self._loops.append(loop.create_task(self._score_rows(worker)))
        for worker in self.preparers:
            self._loops.append(loop.create_task(self._prepare(worker)))

    async def stop(self, grace=None):
        """Take no more requests, finish what is there, and end the workers.

        Args:
            grace: seconds for what is there; `Settings.grace` by default. What is left then gets status 503.
        """
        self.ending = True
        self._wake()
        waiting = {item.future for item in self._open}
        if waiting:
            await asyncio.wait(waiting, timeout=self.settings.grace if grace is None else grace)
        self.give_up()
        for task in self._loops:
            task.cancel()
        await asyncio.gather(*self._loops, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in (*self.scorers, *self.preparers)))

    def give_up(self):
        """Take no more requests, and answer those that are here with status 503."""
        self.ending = True
        self._fail_all("ending", "the server is ending", retry_after=1)
        self._wake()

    def _fail_all(self, code, message, **options):
        for item in list(self._open):
            self._fail(item, ApiError(503, code, message, **options))

    def ready(self):
        """(whether requests can be scored, list of the reasons why not)."""
        reasons = []
        if self.ending:
            reasons.append("the server is ending")
        if self.model is not None and not self.model["known"]["ok"]:
            reasons.append(_not_as_it_did(self.model["known"]))
        elif not any(self._can_score(worker) for worker in self.scorers):
            reasons += [f"{one.role.name}: {one.state}{f' ({one.why})' if one.why else ''}" for one in self.scorers]
        if not reasons and not any(worker.state == READY for worker in self.preparers):
            reasons.append("no worker that prepares requests is ready")
        return not reasons, reasons

    async def until_ready(self, seconds=None):
        """Wait until requests can be scored.

        Args:
            seconds: at most; None: as long as it takes.

        Raises:
            Failed: a worker has said that it cannot begin, or the model does not score as it did.
            TimeoutError: not within so many seconds.
        """
        with anyio.fail_after(seconds):
            await self.until(lambda: self.ready()[0] or self.broken() is not None)
        if (why := self.broken()) is not None:
            raise Failed(why)

    def broken(self):
        """Why it will never be ready, or None."""
        for worker in self.scorers:
            if worker.state == FAILED:
                return worker.why
        if self.model is not None and not self.model["known"]["ok"]:
            return self.ready()[1][0]
        return None

    def _collator(self):
        return self.model["collator"], self.settings.limits

    def _can_score(self, worker):
        return worker.state == READY and self.model is not None and self.model["known"]["ok"]

    def _changed(self):
        """A worker's state has changed."""
        for worker in self.scorers:
            if worker.state == READY and self.model is None:
                self.model = worker.hello
                known = self.model["known"]
                if not known["ok"]:
                    logger.error("not ready: the model does not score as it did when it was saved: %s", known["reason"])
                else:
                    if not known["stored"]:
                        logger.warning("the model is taken as it is: %s", known["reason"])
                    for preparer in self.preparers:
                        preparer.start()
            elif worker.state == READY and worker.hello["digest"] != self.model["digest"]:
                # Begun anew, or on another device, from files that were changed meanwhile.
                worker.state, worker.why = FAILED, "it has loaded another model than the server began with"
                logger.error("%s: %s", worker.role.name, worker.why)
            elif worker.state == READY and self.model["known"]["ok"] and not worker.hello["known"]["ok"]:
                # The same files, on a device (or after an accident) that makes other scores of them.
                worker.state, worker.why = FAILED, _not_as_it_did(worker.hello["known"])
                logger.error("%s: not used: %s", worker.role.name, worker.hello["known"]["reason"])
        if all(worker.state == FAILED for worker in self.scorers):  # nobody will ever score what is here
            self._fail_all("not_ready", f"not ready: {self.ready()[1][0]}")
        self.metrics.workers(self.scorers, self.preparers, self.ready()[0])
        self._wake()

    def _wake(self):
        """Whoever waits for something looks whether it is there."""
        if self._event is not None:
            self._event.set()
            self._event = asyncio.Event()

    async def until(self, condition):
        """Wait until a function of no arguments says yes; it is asked whenever something has changed."""
        while not condition():
            await self._event.wait()

    # ---- a request ----

    async def score(self, asked, client=OWN, seconds=None, patient=False):
        """Score one prompt's responses.

        Args:
            asked: `yojo.serving.roles.Asked`.
            client: whose it is.
            seconds: until the answer, at most; `Settings.deadline` by default and at most.
            patient: where too much is waiting, wait for room: for what is one of many that belong together, of which some are in.

        Returns:
            `Answer`.

        Raises:
            ApiError: 4xx for what is wrong with it, 424 where the model gives no finite score, 429 where too much is waiting, 503
                where nothing can be scored now, 504 at its deadline.
        """
        settings, item = self.settings, None
        seconds = settings.deadline if seconds is None else min(seconds, settings.deadline)
        due = asyncio.get_running_loop().time() + seconds
        try:
            with anyio.fail_after(seconds):
                if not patient:
                    item = self._admit(asked, client, due)
                else:
                    # One at a time of each client: where all look for room whenever there is some, n of them take n^2 looks.
                    async with self._turn(client):
                        while (item := self._admit(asked, client, due, patient)) is None:
                            await self._event.wait()
                found = await item.future
                await self.pace.turn()  # of a row's replies
                return found
        except TimeoutError:
            self.metrics.shed("deadline")
            raise ApiError(504, "deadline", "there was no answer within the deadline of this request") from None
        finally:
            if item is not None:
                self._drop(item)

    def _turn(self, client):
        """The lock that a client's patient requests take one after another, as they come."""
        return self._turns.setdefault(client, asyncio.Lock())

    def _admit(self, asked, client, due, patient=False):
        """An `_Item`; None for one that is patient, where there is no room."""
        settings = self.settings
        ready, reasons = self.ready()
        if not ready:
            code = "ending" if self.ending else "not_ready"
            raise ApiError(503, code, f"not ready: {reasons[0]}", retry_after=1 if self.ending else 5)
        # What is guessed depends on what others sent, so it never says that a request is too long: its tokens do, later.
        tokens, size = min(self.estimate(asked), settings.max_waiting), asked.num_bytes()
        if size > settings.max_waiting_bytes:
            raise ApiError(413, "too_large", "the request is larger than all that may wait here")
        reason, wait = self._full(tokens, size, client, due)
        if reason is not None:
            if patient:
                return None
            self._shed(reason, wait)
        item = _Item(client, asked, tokens, size, due)
        self._hold(item, +1)
        self._open.add(item)
        self._put(item, self._to_prepare)
        return item

    def _full(self, tokens, size, client, due):
        """(what there is no room in for a request, or None; seconds after which there may be)."""
        settings, wait, left = self.settings, self.wait(), due - asyncio.get_running_loop().time()
        if too_much(tokens, self._held[client], settings.max_waiting - self._tokens):
            return "tokens", wait
        if self._bytes + size > settings.max_waiting_bytes:
            return "bytes", wait
        return ("wait", wait - left) if wait > max(left, 0.0) else (None, 0.0)

    def estimate(self, asked):
        """Tokens of a request, before it is tokenised."""
        return int(self._ratio * _guess(asked)) + TOKENS_AROUND

    def wait(self):
        """Seconds until what waits now is scored, as fast as it went of late; 0.0 where nothing is known."""
        return self._tokens / self._rate if self._rate else 0.0

    def _shed(self, reason, seconds):
        self.metrics.shed(reason)
        raise ApiError(
            429,
            "overloaded",
            "too much is waiting to be scored; ask again later",
            retry_after=min(max(1.0, seconds), self.settings.deadline),
        )

    def _put(self, item, queue, first=False):
        item.queue = queue
        if first:
            queue.put_first(item.client, item)
        else:
            queue.put(item.client, item.tokens, item)
        self._wake()

    @staticmethod
    def _take(queue, **options):
        item = queue.take(**options)
        if item is not None:
            item.queue = None
        return item

    def _hold(self, item, sign):
        self._tokens += sign * item.tokens
        self._bytes += sign * item.bytes
        self._held[item.client] += sign * item.tokens
        if not self._held[item.client]:
            del self._held[item.client]
        item.is_held = sign > 0
        self.metrics.waiting(len(self._to_prepare), len(self._to_score), self._tokens, self._bytes)
        if sign < 0:  # there is room for who is patient
            self._wake()

    def _resize(self, item, tokens, size):
        self._hold(item, -1)
        item.tokens, item.bytes = tokens, size
        self._hold(item, +1)

    def _drop(self, item):
        """A request that is answered, or whose client or deadline is gone."""
        if item in self._open:
            self._open.discard(item)
            if item.queue is not None:
                item.queue.remove(item)
            if item.is_held:
                self._hold(item, -1)
            item.future.cancel()

    def _give(self, item, answer):
        if not item.future.done():
            item.future.set_result(answer)

    def _fail(self, item, error):
        if not item.future.done():
            item.future.set_exception(error)

    # ---- preparing ----

    async def _prepare(self, worker):
        while True:
            await self.until(lambda: worker.state == READY and len(self._to_prepare))
            item = self._take(self._to_prepare)
            started = time.monotonic()
            try:
                found = await worker.call(item.asked, PREPARING)
            except WorkerLost as error:
                self._again(item, error, self._to_prepare, self._unpreparable)
                continue
            except ApiError as error:
                self._fail(item, error)
                continue
            except Exception as error:
                logger.error("preparing: %s", type(error).__name__)
                self._fail(item, ApiError(500, "internal", "the server has made a mistake"))
                continue
            finally:
                self.metrics.prepared(time.monotonic() - started)
            self._prepared(item, found)

    def _prepared(self, item, found):
        if item.future.done():
            return
        if found.tokens > self.settings.max_waiting:
            most = self.settings.max_waiting
            self._fail(item, ApiError(413, "too_long", f"it takes {found.tokens} tokens, and {most} may wait here"))
            return
        # Not of what it was estimated to be: that was before all who waited with it, and to answer so late is to swing.
        ratio = (found.tokens - TOKENS_AROUND) / _guess(item.asked)
        self._ratio = min(4.0, max(0.05, 0.95 * self._ratio + 0.05 * ratio))
        self._resize(item, found.tokens, len(found.payload))
        item.prepared, item.asked, item.tries = found, None, 0
        item.ready_at = asyncio.get_running_loop().time()
        self._put(item, self._to_score)

    def _unpreparable(self):
        return ApiError(
            422, "not_preparable", "the process that was to decode this request has died of it, twice: a damaged image?"
        )

    def _again(self, item, error, queue, last):
        """What was in a worker that died: once more, in front; a second time it is the request's own error."""
        item.tries += 1
        if item.future.done():
            return
        if item.tries >= TRIES:
            logger.error("given up: %s", error)
            self._fail(item, last())
            return
        logger.warning("done again: %s", error)
        if not item.is_held:
            self._hold(item, +1)
        self._put(item, queue, first=True)

    # ---- scoring ----

    async def _score_rows(self, worker):
        loop, under_way = asyncio.get_running_loop(), {}  # task -> its row
        try:
            while True:
                await self.until(lambda: self._has_work(worker, under_way.values()))
                await self._linger()
                # Meanwhile another worker may have taken it, or this one have died.
                row = self._row() if self._has_work(worker, under_way.values()) else []
                if row:
                    task = loop.create_task(self._score_row(worker, row))
                    under_way[task] = row
                    task.add_done_callback(functools.partial(self._row_done, under_way))
        finally:
            for task in under_way:
                task.cancel()

    def _row_done(self, under_way, task):
        under_way.pop(task, None)
        self._wake()

    def _has_work(self, worker, rows):
        if not self._can_score(worker) or len(rows) >= worker.hello["depth"] or not len(self._to_score):
            return False
        # One that has seen a worker die is alone with the next, not only in its row: else its death is its neighbour's, too.
        return not rows or not (self._to_score.first().tries or any(item.tries for row in rows for item in row))

    async def _linger(self):
        """Wait for company, where that is wanted and the row is not full."""
        if not self.settings.linger:
            return
        waiting = list(self._to_score)
        oldest = min((item.ready_at for item in waiting), default=None)
        if oldest is None:
            return
        until = oldest + self.settings.linger

        def full():
            return sum(item.tokens for item in self._to_score) >= self.settings.token_budget

        with anyio.move_on_after(until - asyncio.get_running_loop().time()):
            await self.until(full)

    def _row(self):
        """Requests for one row: those whose turn it is, as many as fit; one that has seen a worker die is alone."""
        first = self._take(self._to_score)
        if first is None:
            return []
        row, left = [first], self.settings.token_budget - first.tokens
        while left > 0 and not first.tries:
            item = self._take(self._to_score, fits=lambda item: item.tokens <= left and not item.tries)  # noqa: B023
            if item is None:
                break
            row.append(item)
            left -= item.tokens
        for item in row:
            self._hold(item, -1)
        return [item for item in row if not item.future.done()]

    async def _score_row(self, worker, row):
        now = asyncio.get_running_loop().time()
        started, tokens = time.monotonic(), sum(item.tokens for item in row)
        for item in row:
            self.metrics.queued(now - item.ready_at)
        try:
            found = await worker.call([item.prepared.payload for item in row], SCORING)
        except WorkerLost as error:
            lost = ApiError(503, "worker_lost", "the process that was to score this request has died", retry_after=5)
            for item in row:
                self._again(item, error, self._to_score, lambda: lost)
            return
        except Exception as error:
            logger.error("scoring: %s", type(error).__name__)
            for item in row:
                self._fail(item, ApiError(500, "internal", "the server has made a mistake"))
            return
        seconds = time.monotonic() - started
        self.metrics.scored(len(row), tokens, seconds)
        self._note_rate(tokens, seconds)
        for item, one in zip(row, found, strict=True):
            if isinstance(one, ApiError):
                self._fail(item, one)
            else:
                made = item.prepared
                numbers = made.prompt_tokens, made.response_tokens, made.tokens, made.row
                self.metrics.answered(made.prompt_tokens, len(one))
                self._give(item, Answer(one, *numbers, worker.hello["digest"]))

    def _note_rate(self, tokens, seconds):
        """Tokens a second of all scoring workers, the best of late; short rows say nothing of it."""
        if tokens * SHORT >= self.settings.token_budget:
            rate = tokens / max(seconds, 1e-6) * sum(worker.state == READY for worker in self.scorers)
            self._rate = rate if self._rate is None else max(FORGETS * self._rate, rate)


def _guess(asked):
    """Tokens of a request's texts and images, as models usually have them; at least 1."""
    return max(1.0, sum(map(len, asked.texts())) / CHARACTERS_A_TOKEN + TOKENS_AN_IMAGE * len(asked.pictures()))


def _not_as_it_did(known):
    """Why a model is not used that does not give its known scores."""
    why = "see the log" if known["difference"] is None else known["reason"]  # which may be an exception's text
    return f"the model does not score as it did when it was saved: {why}"

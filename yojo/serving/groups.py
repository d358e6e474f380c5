"""`/group` and `/get_reward`: samples that come one a call, scored as the whole groups they belong to."""

import asyncio
import collections
import dataclasses
import functools

from fastapi import APIRouter, Request

from yojo.inputs.digests import digest
from yojo.rewards.collator import GroupCollator
from yojo.rewards.openrlhf_samples import given, logs
from yojo.rewards.openrlhf_server import Desk, key_of, samples_of
from yojo.rewards.scorer import GroupScorer, RewardError
from yojo.serving import schemas
from yojo.serving.errors import ApiError, without_text
from yojo.serving.replies import errors
from yojo.serving.requests import Route
from yojo.serving.roles import Asked, strings_in

MAX_WAITING = 16_384  # samples


class Groups:
    """Two collators on one engine: of samples that say their group, and of OpenRLHF's, which do not.

    Args:
        service: `yojo.serving.app.Service`.
        policy: `yojo.rewards.openrlhf_server.Queries`, or None.
    """

    def __init__(self, service, policy):
        self.service, self.policy, self.desk = service, policy, Desk(gone=lambda caller: caller.gone)
        settings = service.settings
        common = {"deadline": settings.group_deadline, "log_text": settings.log_text}
        scorer = GroupScorer(_Judge(service.engine, self), retries=2, **common)
        options = {"max_waiting": MAX_WAITING, **common}
        self.by_key = GroupCollator(scorer.score, settings.group_size, **options)
        # What comes again after its group has failed is late, and answered at once; nobody comes as late as a minute after.
        self.of_openrlhf = GroupCollator(
            scorer.score, settings.group_size, reuse_keys=True, remember_seconds=60.0, **options
        )
        self.loop, self._here, self._bytes = None, set(), 0

    def start(self):
        """With the app."""
        self.loop = asyncio.get_running_loop()
        self.service.engine.metrics.add(self.metrics)

    async def stop(self, grace):
        """Groups that are whole are scored; the others cannot become so, and end with an error."""
        until = self.loop.time() + grace
        for collator in (self.by_key, self.of_openrlhf):
            if self._here:
                waiting = collator.metrics()
                if waiting["yojo_collator_groups_queued"] or waiting["yojo_collator_groups_scoring"]:
                    await self._drained(collator, until)
            await asyncio.to_thread(collator.close, 1.0)

    async def _drained(self, collator, until):
        while self.loop.time() < until:
            now = collator.metrics()
            if not (now["yojo_collator_groups_queued"] or now["yojo_collator_groups_scoring"]):
                return
            await asyncio.sleep(0.02)

    def sweep(self):
        """Give up samples whose clients are gone for good."""
        self.desk.sweep()

    def metrics(self):
        """Of both collators, added up."""
        found = collections.Counter(self.by_key.metrics())
        found.update(self.of_openrlhf.metrics())
        return {**found, "yojo_clients_waiting": len(self.desk)}

    async def reward(self, add, size, texts=()):
        """The `Reward` of a sample.

        Args:
            add: function of no arguments that makes its future.
            size: bytes that it takes while it waits.
            texts: strings of the client's that an error's message must not repeat.

        Raises:
            ApiError: as for what went wrong.
        """
        limit = self.service.settings.max_waiting_bytes
        if self._bytes + size > limit:
            raise ApiError(429, "overloaded", "too many samples wait for their groups", retry_after=5)
        self._bytes += size
        token = object()
        self._here.add(token)
        try:
            adding = asyncio.ensure_future(asyncio.to_thread(add))
            try:
                future = await asyncio.shield(adding)
            except asyncio.CancelledError:  # the thread goes on, and the sample must not wait for nobody
                adding.add_done_callback(_withdraw)
                raise
            return await asyncio.wrap_future(future)
        except (RewardError, TypeError, ValueError) as error:
            # What does not go with the first sample of its key says so.
            raise _told(error, texts, "key" if str(error).startswith("key ") else "prompt") from None
        finally:
            self._bytes -= size
            self._here.discard(token)


class _Judge:
    """The engine as a judge, for whoever asks from a thread."""

    def __init__(self, engine, groups):
        self.engine, self.groups = engine, groups

    @property
    def order_free(self):
        return self.engine.model["order_free"]

    @property
    def config(self):
        """What a `GroupScorer` looks for: the separator."""
        return _Config(self.engine.model["separator"])

    def score_many(self, examples):
        asked = [_asked(example) for example in examples]
        return asyncio.run_coroutine_threadsafe(self._all(asked), self.groups.loop).result()

    async def _all(self, asked):
        found = await asyncio.gather(*(self.engine.score(one, patient=True) for one in asked), return_exceptions=True)
        for one in found:
            if isinstance(one, ApiError) and one.status in (413, 422, 424):
                raise _Refused(one)
            if isinstance(one, BaseException):
                raise one
        return [one.scores for one in found]


@dataclasses.dataclass(frozen=True)
class _Config:
    separator: str


class _Refused(ValueError):
    """An input that the engine gives no scores, and would give none again: the error of its own group, and of no other's."""

    def __init__(self, error):
        super().__init__(error.message)
        self.error = error


def _asked(example):
    videos = [(list(video.source), video.fps) for video in example.videos]
    return Asked(
        example.prompt,
        list(example.responses),
        list(example.images),
        videos,
        None if example.tools is None else list(example.tools),
        example.literal_tags,
    )


def _withdraw(adding):
    """Take back a sample whose client has left while it was added."""
    if not adding.cancelled() and adding.exception() is None:
        adding.result().cancel()


def _told(error, texts, field):
    """The error of a sample or of its group as clients hear of it; `field` is that of what is wrong with the sample itself."""
    cause, seen = error, set()
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        found = cause.error if isinstance(cause, _Refused) else cause
        if isinstance(found, ApiError):
            # Which of the group's responses it was is in nobody's request.
            param = None if (found.param or "").startswith("responses") else found.param
            return ApiError(found.status, found.code, found.message, param, found.retry_after)
        cause = cause.__cause__
    if not isinstance(error, RewardError):
        return ApiError(422, "invalid_input", without_text(str(error), texts), field)
    kind = error.kind
    if kind == "late":
        return ApiError(
            409, "late", "the group of this key has ended, or is whole already: a key stands for one group", "key"
        )
    if kind == "crowded":
        return ApiError(429, "overloaded", "too many samples wait for their groups", retry_after=5)
    if kind == "closed":
        return ApiError(503, "ending", "the server is ending", retry_after=1)
    if kind == "incomplete":
        return ApiError(424, "incomplete_group", "the group was not whole at its deadline")
    return ApiError(424, "no_reward", "there is no reward: the judge failed, or gave no scores in time")


class Caller:
    """A client's connection, as `Desk` knows it.

    Attributes:
        gone: whether the client has left.
    """

    gone = False


def router(service):
    """The endpoints."""
    late = errors(status_409="The group of this sample has ended, or is whole already.")
    router = APIRouter(route_class=Route, tags=["groups"], responses=late)

    @router.post(
        "/group", response_model=schemas.GroupReply, summary="One sample of a group, answered when it is whole"
    )
    async def group(request: Request, body: schemas.GroupRequest):
        """Samples of one key are a group, scored in one pass when `group_size` of them are there; each gets its own reward."""
        service.check_model(body.model)
        size = body.group_size or service.settings.group_size
        if size is None:
            raise ApiError(422, "missing_field", "say how many samples make the group", "group_size")
        if size > service.settings.limits.responses:
            most = service.settings.limits.responses
            raise ApiError(413, "too_many_responses", f"a group of {size}, and {most} are the most", "group_size")
        _check_ready(service)
        asked = await service.reader.asked(
            body.prompt, [body.response], body.images, body.videos, body.tools, body.literal_tags
        )
        from yojo.inputs.videos import Video

        add = functools.partial(
            service.groups.by_key.add,
            of_client(request, service, body.key),
            asked.prompt,
            body.response,
            asked.images,
            [Video(frames, fps) for frames, fps in asked.videos],
            body.truncated,
            size,
            tools=asked.tools,
            literal_tags=asked.literal_tags,
        )
        found = await service.groups.reward(add, asked.num_bytes(), [body.key, *asked.texts()])
        digest = service.engine.model["digest"]
        return service.reply({"key": body.key, **dataclasses.asdict(found), "fingerprint": digest})

    @router.post("/get_reward", response_model=schemas.OpenRlhfReply, summary="OpenRLHF's remote reward model")
    async def get_reward(request: Request, body: schemas.OpenRlhfRequest):
        """Samples of one prompt and label are a group, in the order in which they come; the server has to know the policy."""
        groups = service.groups
        if groups.policy is None:
            message = (
                "start the server with --policy TOKENIZER (or --eos) and --group-size to have OpenRLHF's texts read"
            )
            raise ApiError(404, "not_configured", message)
        _check_ready(service)
        size = service.settings.group_size or (1 if service.engine.model["order_free"] else None)
        if size is None:
            message = (
                "this model compares the responses of a group: start the server with --group-size, samples of a prompt"
            )
            raise ApiError(422, "group_size_unknown", message)
        caller = Caller()
        try:
            whose = functools.partial(of_client, request, service)
            return service.reply(await _rewards(service, body.model_dump(), caller, size, whose))
        finally:
            caller.gone = True

    return router


def _check_ready(service):
    if service.settings.replicas > 1:
        message = (
            "the samples of a group have to come to one process, and this server has several: --replicas 1 for groups"
        )
        raise ApiError(409, "several_replicas", message)
    ready, reasons = service.engine.ready()
    if not ready:
        raise ApiError(503, "not_ready", f"not ready: {reasons[0]}", retry_after=5)


def of_client(request, service, key):
    """A key that no other API key's clients have; without API keys it is everybody's: who trains on many machines has many addresses."""
    return (request.scope["yojo"]["client"], key) if service.settings.keys else key


async def _rewards(service, data, caller, size, whose):
    """OpenRLHF's reply; `whose` makes keys those of its client."""
    groups, handed, found, texts = service.groups, [], None, strings_in(list(data.values()))
    try:
        try:
            for query, prompt, label in samples_of(data):
                shown, completion, truncated = groups.policy.read(query, prompt, label)
                key = whose(key_of(shown, prompt, label))
                add = functools.partial(
                    groups.of_openrlhf.add, key, shown, completion, truncated=truncated, group_size=size
                )
                text = whose(digest([query, prompt, label]))
                handed.append((text, groups.desk.hand_in(text, add, caller)))
                service.reader.log(shown, [completion])
        except (RewardError, TypeError, ValueError) as error:
            raise _told(error, texts, "query") from None
        try:
            found = [await asyncio.shield(asyncio.wrap_future(one.future)) for _, one in handed]
            rewards = [given(one) for one in found]
        except (RewardError, TypeError, ValueError) as error:
            raise _told(error, texts, None) from None
    except asyncio.CancelledError:
        caller.gone = True  # its samples wait for it to come again
        raise
    except ApiError:
        for text, one in handed:  # the client hears of an error, and sends all of its samples again
            if groups.desk.take(text, one, caller):
                one.future.cancel()
        raise
    for text, one in handed:
        groups.desk.take(text, one, caller)
    made = [logs(one) for one in found]
    extra = {name: [one[name] for one in made] for name in made[0]}
    return {"rewards": rewards, "scores": rewards, "extra_logs": extra}

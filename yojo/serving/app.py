"""`create_app`: the server's endpoints around an `Engine`."""

import asyncio
import contextlib
import dataclasses
import secrets
import time

from fastapi import APIRouter, FastAPI, Request
from starlette.responses import JSONResponse, Response

from yojo import __version__
from yojo.serving import compatible, groups, pages, schemas
from yojo.serving import requests as handling
from yojo.serving.errors import ApiError
from yojo.serving.media import Media
from yojo.serving.reading import Reader
from yojo.serving.replies import errors, scored, usage_of

FINGERPRINT = "Yojo-Fingerprint"
SWEEP = 5.0  # seconds between looks for samples that nobody waits for


def create_app(engine, settings, policy=None, numbers=None):
    """The server's ASGI app.

    Args:
        engine: `yojo.serving.engine.Engine`, not started: it begins and ends with the app.
        settings: `yojo.serving.settings.Settings`.
        policy: `yojo.rewards.openrlhf_server.Queries`, which reads OpenRLHF's texts; None: `/get_reward` says what it needs.
        numbers: async function of no arguments that gives the bytes of `/metrics`; None: those of the engine's metrics.

    Returns:
        `fastapi.FastAPI`.
    """
    service = Service(engine, settings, policy, numbers)

    @contextlib.asynccontextmanager
    async def life(app):
        await service.start()
        try:
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="YOJO",
        version=__version__,
        summary="N responses to one multimodal prompt, scored in one forward pass.",
        lifespan=life,
        docs_url=None,
        redoc_url=None,
    )
    app.state.settings, app.state.service = settings, service
    app.state.memory = handling.Memory(settings.max_waiting_bytes)
    handling.install(app)
    for router in (own(service), compatible.router(service), groups.router(service)):
        app.include_router(router)
    app.router.routes.extend(pages.routes())
    app.add_middleware(handling.Observed, metrics=engine.metrics)
    return app


class Service:
    """What endpoints share.

    Attributes:
        engine, settings: as `create_app` was given them.
        reader: `Reader`.
        groups: `yojo.serving.groups.Groups`.
        numbers: as `create_app` was given it.
    """

    def __init__(self, engine, settings, policy=None, numbers=None):
        self.engine, self.settings = engine, settings
        self.media = Media(settings)
        self.reader = Reader(settings, self.media)
        self.groups = groups.Groups(self, policy)
        self.created, self._task = int(time.time()), None
        self.numbers = numbers or self._own_numbers

    async def start(self):
        """With the app."""
        await self.engine.start()
        self.groups.start()
        self._task = asyncio.get_running_loop().create_task(self._sweep())

    async def stop(self):
        """With the app: what was accepted is finished first."""
        self._task.cancel()
        self.engine.ending = True
        await self.groups.stop(self.settings.grace)
        await self.engine.stop()
        self.media.close()

    async def _sweep(self):
        while True:
            await asyncio.sleep(SWEEP)
            await asyncio.to_thread(self.groups.sweep)

    async def _own_numbers(self):
        return self.engine.metrics.text()

    @property
    def name(self):
        """The name that replies show."""
        return self.settings.names[0]

    def check_model(self, name):
        """Refuse a request for another model than the one that is here."""
        if name is not None and name not in self.settings.names:
            raise ApiError(404, "model_not_found", "there is no model of this name here; see /v1/models", "model")

    async def score(self, request, asked, named=None):
        """The `Answer`s of a list of `Asked`, all of them or an error.

        Args:
            request: whose they are.
            asked: list of `Asked`.
            named: function of an `ApiError` and the place of the one that it is of, which gives it with the field as the client
                calls it; None: as it is.
        """
        seconds = handling.seconds_of(request, self.settings.deadline)
        client = request.scope["yojo"]["client"]

        async def scored_at(place):
            try:
                return await self.engine.score(
                    asked[place], client, seconds, patient=place > 0
                )  # the first is in: so are they all
            except ApiError as error:
                raise (named(error, place) if named else error) from None

        tasks = [asyncio.ensure_future(scored_at(place)) for place in range(len(asked))]
        try:
            return [await task for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def head(self, kind):
        """What replies begin with."""
        return {"id": f"{kind}-{secrets.token_hex(12)}", "created": int(time.time()), "model": self.name}

    def reply(self, content, answers=()):
        """A reply with the fingerprint of the model that gave the scores."""
        digests = {answer.digest for answer in answers} or {self.engine.model["digest"]}
        return JSONResponse(content, headers={FINGERPRINT: ",".join(sorted(digests))})


def own(service):
    """Our own endpoints."""
    router = APIRouter(route_class=handling.Route, responses=errors())

    @router.post(
        "/score",
        response_model=schemas.ScoreReply | schemas.ScoreListReply,
        tags=["scores"],
        summary="Score the responses to one prompt, or to many",
    )
    async def score(request: Request, body: schemas.OneOrMany):
        """One object, or a list of them: all are scored, or none and the error names which is wrong (`2.responses.0`)."""
        many = isinstance(body, list)
        bodies = body if many else [body]
        if not bodies:
            raise ApiError(422, "no_examples", "the list is empty: at least one prompt with responses is needed")
        if len(bodies) > service.settings.limits.examples:
            most = service.settings.limits.examples
            raise ApiError(413, "too_many_examples", f"{len(bodies)} prompts in one request, and {most} are the most")
        asked = []
        for n, one in enumerate(bodies):
            try:
                service.check_model(one.model)
                asked.append(await asked_of(service, one))
            except ApiError as error:
                raise error.under(n) if many else error from None
        answers = await service.score(request, asked, ApiError.under if many else None)
        head = service.head("score")
        digest = answers[0].digest
        if not many:
            return service.reply({**head, "object": "score", **scored(answers[0]), "fingerprint": digest}, answers)
        data = [{"index": n, **scored(answer)} for n, answer in enumerate(answers)]
        content = {**head, "object": "list", "data": data, "fingerprint": digest, "usage": usage_of(answers)}
        return service.reply(content, answers)

    @router.post(
        "/score/upload",
        response_model=schemas.ScoreReply,
        tags=["scores"],
        summary="Score responses, images uploaded as files",
        openapi_extra={
            "x-takes": "form",
            "requestBody": {"required": True, "content": {"multipart/form-data": {"schema": _FORM}}},
        },
    )
    async def upload(request: Request):
        """A form: `prompt`, `response` once for each response, `image` once for each image file; `details`, `model`."""
        async with request.form(max_files=service.settings.limits.images, max_fields=1024) as form:
            asked = await _uploaded(service, form)
        answers = await service.score(request, [asked], lambda error, _: _of_form(error))
        content = {**service.head("score"), "object": "score", **scored(answers[0]), "fingerprint": answers[0].digest}
        return service.reply(content, answers)

    @router.get("/v1/models", response_model=schemas.ModelList, tags=["server"], summary="The model that is served")
    async def models(request: Request):
        """One model, under each of its names; `fingerprint` is all that changes a score."""
        card = card_of(service)
        return service.reply({"object": "list", "data": [{"id": name, **card} for name in service.settings.names]})

    @router.get("/v1/models/{name:path}", response_model=schemas.ModelCard, tags=["server"], summary="It, by its name")
    async def model(request: Request, name: str):
        """The model, where it is served under this name."""
        service.check_model(name)
        return service.reply({"id": name, **card_of(service)})

    @router.get("/health", response_model=schemas.Health, tags=["server"], summary="The server lives")
    async def health(request: Request):
        """Answers at once, however busy the model is."""
        return JSONResponse({"status": "ok"})

    @router.get(
        "/ready",
        response_model=schemas.Ready,
        tags=["server"],
        summary="Requests can be scored",
        responses={503: {"model": schemas.Ready, "description": "They cannot, and why."}},
    )
    async def ready(request: Request):
        """503 while the model is loaded, where it does not score as it did when it was saved, and at the end."""
        found, reasons = service.engine.ready()
        return JSONResponse({"ready": found, "reasons": reasons}, 200 if found else 503)

    @router.get("/metrics", response_class=Response, tags=["server"], summary="Numbers for Prometheus")
    async def metrics(request: Request):
        """In Prometheus's text format."""
        return Response(await service.numbers(), media_type=service.engine.metrics.content_type)

    return router


_FORM = {
    "type": "object",
    "required": ["prompt", "response"],
    "additionalProperties": False,
    "properties": {
        "prompt": {"type": "string"},
        "response": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "image": {"type": "array", "items": {"type": "string", "format": "binary"}},
        "details": {"type": "boolean", "default": False},
        "literal_tags": {"type": "boolean", "default": False},
        "model": {"type": "string"},
    },
}


def card_of(service):
    """What is told of the model, but its name."""
    model = service.engine.model
    if model is None:
        raise ApiError(503, "not_ready", "the model is being loaded", retry_after=5)
    known = model["known"]
    return {
        "object": "model",
        "created": service.created,
        "owned_by": "yojo",
        "fingerprint": model["fingerprint"],
        "digest": model["digest"],
        **{name: model[name] for name in ("mode", "permutations", "order_free", "max_length", "dtype")},
        "limits": dataclasses.asdict(service.settings.limits),
        "probe": {**known, "reason": known["reason"] if known["ok"] else service.engine.ready()[1][0]},
    }


async def asked_of(service, body):
    """The `Asked` of a `ScoreRequest`."""
    return await service.reader.asked(
        body.prompt, body.responses, body.images, body.videos, body.tools, body.literal_tags, body.details
    )


async def _uploaded(service, form):
    """The `Asked` of a form."""
    texts, images = {"response": []}, []
    for name, value in form.multi_items():
        if name not in _FORM["properties"]:
            raise ApiError(422, "unknown_field", "there is no such field: nothing is taken and ignored", name[:64])
        if (name == "image") == isinstance(value, str):
            raise ApiError(422, "invalid_field", "image must be a file, and all else text", name)
        if name == "image":
            size = service.settings.limits.image_bytes
            data = await value.read(size + 1)
            if len(data) > size:
                raise ApiError(413, "image_too_large", f"an image of more than {size} bytes", f"image.{len(images)}")
            images.append(data)
        elif name == "response":
            texts["response"].append(value)
        elif name in texts:
            raise ApiError(422, "invalid_field", "this field is given twice", name)
        else:
            texts[name] = value
    if "prompt" not in texts:
        raise ApiError(422, "missing_field", "this field is needed", "prompt")
    flags = {}
    for name in ("details", "literal_tags"):
        if texts.get(name, "false").lower() not in ("true", "false"):
            raise ApiError(422, "invalid_field", "must be true or false", name)
        flags[name] = texts.get(name, "false").lower() == "true"
    service.check_model(texts.get("model"))
    try:
        return await service.reader.asked(texts["prompt"], texts["response"], images, **flags)
    except ApiError as error:
        raise _of_form(error) from None


def _of_form(error):
    """An error with the field as the form calls it."""
    head, dot, place = (error.param or "").partition(".")
    name = {"responses": "response", "images": "image"}.get(head, head)
    return ApiError(error.status, error.code, error.message, f"{name}{dot}{place}" or None, error.retry_after)

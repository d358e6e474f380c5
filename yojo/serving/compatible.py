"""Endpoints that people's clients speak already: vLLM's score, rerank as Jina and Cohere have it, TEI's rerank."""

import dataclasses
import math

from fastapi import APIRouter, Request

from yojo import __version__
from yojo.serving import schemas
from yojo.serving.errors import ApiError
from yojo.serving.replies import errors, usage_of
from yojo.serving.requests import Route

_NOT_CUT = ("truncate_prompt_tokens", "max_tokens_per_doc", "max_chunks_per_doc")


def sigmoid(score):
    """1 / (1 + exp(-score)), for any float."""
    if score < 0:
        grown = math.exp(score)
        return grown / (1 + grown)
    return 1 / (1 + math.exp(-score))


def best_first(scores):
    """Places of scores, the best first; equal ones as they stand."""
    return sorted(range(len(scores)), key=lambda n: -scores[n])


def router(service):
    """The endpoints."""
    router = APIRouter(route_class=Route, tags=["compatible"], responses=errors())

    @router.post("/v1/score", response_model=schemas.VllmScoreReply, summary="vLLM's score")
    async def vllm_score(request: Request, body: schemas.VllmScoreRequest):
        """A query with N documents is one prompt with N responses, scored in one pass; N queries with N documents are N pairs."""
        _refuse_cuts(body)
        service.check_model(body.model)
        queries, queries_field = _one_of(body, ("queries", "data_1", "text_1"))
        documents, documents_field = _one_of(body, ("documents", "items", "data_2", "text_2"))
        query_fields, fields = _fields(queries_field, queries), _fields(documents_field, documents)
        queries, documents = _listed(queries), _listed(documents)
        if not queries or not documents:
            raise ApiError(
                422, "no_documents", "there is nothing to score", documents_field if queries else queries_field
            )
        if len(queries) not in (1, len(documents)):
            message = f"{len(queries)} queries and {len(documents)} documents: one query for all, or one for each"
            raise ApiError(422, "wrong_lengths", message, documents_field)
        texts = [response_of(one, field) for one, field in zip(documents, fields, strict=True)]
        if len(queries) == 1:
            pairs = [_Pair(queries[0], texts, query_fields[0], documents_field, fields)]
        else:
            if len(queries) > service.settings.limits.examples:
                raise ApiError(413, "too_many_examples", f"{len(queries)} queries in one request", queries_field)
            pairs = [
                _Pair(query, [text], query_field, documents_field, [field])
                for query, text, query_field, field in zip(queries, texts, query_fields, fields, strict=True)
            ]
        answers = await _answers(service, request, pairs)
        scores = [score for answer in answers for score in answer.scores]
        scores = [sigmoid(score) for score in scores] if body.use_activation else scores
        data = [{"index": n, "object": "score", "score": score} for n, score in enumerate(scores)]
        head = service.head("score")
        return service.reply({**head, "object": "list", "data": data, "usage": usage_of(answers)}, answers)

    async def rerank(request: Request, body: schemas.RerankRequest):
        """The query is the prompt, the documents are its responses: all are scored in one pass, and the best stands first."""
        _refuse_cuts(body)
        service.check_model(body.model)
        fields = _fields("documents", body.documents)
        texts = [response_of(one, field) for one, field in zip(_listed(body.documents), fields, strict=True)]
        (answer,) = await _answers(service, request, [_Pair(body.query, texts, "query", "documents", fields)])
        results = []
        for n in best_first(answer.scores)[: body.top_n or None]:
            score = sigmoid(answer.scores[n]) if body.use_activation else answer.scores[n]
            one = {"index": n, "relevance_score": score}
            if body.return_documents is not False:
                one["document"] = {"text": texts[n]}
            results.append(one)
        head = service.head("rerank")
        content = {"id": head["id"], "model": head["model"], "usage": usage_of([answer]), "results": results}
        return service.reply(content, [answer])

    for path in ("/rerank", "/v1/rerank", "/v2/rerank"):
        router.post(
            path,
            response_model=schemas.RerankReply,
            summary="Rerank, as vLLM, Jina and Cohere have it",
            operation_id=f"rerank{path.replace('/', '_')}",
        )(rerank)

    tei = {"responses": errors(schemas.TeiError)}

    @router.post("/tei/rerank", response_model=list[schemas.TeiScored], summary="TEI's rerank", **tei)
    async def tei_rerank(request: Request, body: schemas.TeiRerankRequest):
        """The query is the prompt, the texts are its responses. A client of TEI is given the address with `/tei` behind it."""
        pair = _Pair(body.query, body.texts, "query", "texts", _fields("texts", body.texts))
        (answer,) = await _answers(service, request, [pair])
        content = []
        for n in best_first(answer.scores)[: body.top_n or None]:
            score = answer.scores[n] if body.raw_scores else sigmoid(answer.scores[n])
            content.append({"index": n, "score": score, **({"text": body.texts[n]} if body.return_text else {})})
        return service.reply(content, [answer])

    @router.get("/tei/info", response_model=schemas.TeiInfo, summary="What TEI's clients ask first", **tei)
    async def tei_info(request: Request):
        """The model, and what a request may hold."""
        model, limits = service.engine.model, service.settings.limits
        if model is None:
            raise ApiError(503, "not_ready", "the model is being loaded", retry_after=5)
        content = {
            "model_id": service.name,
            "model_sha": model["digest"],
            "model_dtype": model["dtype"],
            "model_type": {"reranker": {"id2label": {"0": "score"}, "label2id": {"score": 0}}},
            "max_concurrent_requests": 512,
            "max_input_length": model["max_length"] or service.settings.max_waiting,
            "max_batch_tokens": service.settings.token_budget,
            "max_client_batch_size": limits.responses,
            "version": __version__,
        }
        return service.reply(content)

    @router.get("/tei/health", response_model=schemas.Nothing, summary="Whether TEI's clients can begin", **tei)
    async def tei_health(request: Request):
        """200 once requests can be scored, as TEI has it."""
        ready, reasons = service.engine.ready()
        if not ready:
            raise ApiError(503, "not_ready", reasons[0], retry_after=5)
        return service.reply({})

    return router


@dataclasses.dataclass(frozen=True)
class _Pair:
    """A query and the texts of its documents.

    Attributes:
        query: str, or `schemas.TextOnly`.
        texts: N strings.
        query_field, texts_field: what the client calls the query, and the documents all together.
        fields: N, what it calls each of them.
    """

    query: str | schemas.TextOnly
    texts: list
    query_field: str
    texts_field: str
    fields: list

    def named(self, error):
        """An error of the prompt or of a response, with the field as the client calls it."""
        head, _, rest = (error.param or "").partition(".")
        if head == "responses":
            field = self.fields[int(rest)] if rest else self.texts_field
        elif head in ("prompt", "images"):
            in_parts = rest.startswith("0.content.") and self.query.content is not None
            field = f"{self.query_field}{rest[1:]}" if in_parts else self.query_field
        else:
            field = error.param
        return ApiError(error.status, error.code, error.message, field, error.retry_after)


async def _answers(service, request, pairs):
    """The `Answer`s of `_Pair`s; errors name the fields that the client knows."""
    asked = []
    for pair in pairs:
        try:
            prompt = prompt_of(pair.query, pair.query_field)
            asked.append(await service.reader.asked(prompt, pair.texts, literal_tags=True))
        except ApiError as error:
            raise pair.named(error) from None
    return await service.score(request, asked, lambda error, place: pairs[place].named(error))


def prompt_of(query, field):
    """A query as a prompt: its text, or messages with its parts."""
    if isinstance(query, str):
        return query
    if query.content is not None and query.text is None and query.image is None:
        return [{"role": "user", "content": query.content}]
    if query.content is not None or (query.text is None and query.image is None):
        raise ApiError(422, "invalid_document", "must be a text, {text, image} or {content: [parts]}", field)
    parts = [{"type": "image", "image": query.image}] if query.image is not None else []
    parts += [{"type": "text", "text": query.text}] if query.text is not None else []
    return [{"role": "user", "content": parts}]


def response_of(document, field):
    """A document as a response: its text."""
    if isinstance(document, str):
        return document
    if document.image is not None:
        raise ApiError(422, "image_in_document", "images go into the query: responses are text", f"{field}.image")
    if document.content is not None and document.text is None:
        texts = []
        for n, part in enumerate(document.content):
            if (
                part.get("type", "text") != "text"
                or not isinstance(part.get("text"), str)
                or set(part) - {"type", "text"}
            ):
                message = "a document's parts must be text: images go into the query"
                raise ApiError(422, "image_in_document", message, f"{field}.content.{n}")
            texts.append(part["text"])
        return "".join(texts)
    if document.text is None or document.content is not None:
        raise ApiError(422, "invalid_document", "must be a text, {text} or {content: [parts]}", field)
    return document.text


def _one_of(body, names):
    found = [name for name in names if getattr(body, name) is not None]
    if len(found) != 1:
        what = "one of them is needed" if not found else "one of them alone may be given"
        raise ApiError(
            422,
            "missing_field" if not found else "invalid_field",
            f"{', '.join(names)}: {what}",
            found[-1] if found else names[0],
        )
    return getattr(body, found[0]), found[0]


def _listed(value):
    return value if isinstance(value, list) else [value]


def _fields(name, value):
    """What the client calls each of what it gave as a list, or by itself."""
    return [f"{name}.{n}" for n in range(len(value))] if isinstance(value, list) else [name]


def _refuse_cuts(body):
    for name in _NOT_CUT:
        if getattr(body, name, None) is not None:
            raise ApiError(
                422, "never_cut", "nothing is ever cut here: leave it out, and what is too long is an error", name
            )

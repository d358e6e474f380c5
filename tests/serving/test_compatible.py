"""The endpoints of vLLM, Jina, Cohere and TEI: our scores in their forms, and errors that name their fields."""

import math

import pytest

from tests.serving.asking import ask, close, error_of, posts
from tests.serving.engine_cases import Stage
from tests.serving.serving_cases import ANSWERS, QUESTION, client_of, data_url, expected, png, run
from yojo.serving.settings import Limits, Settings

PLAIN = {"prompt": QUESTION, "responses": ANSWERS}
SHOWN = {**PLAIN, "images": [data_url(png())]}
PARTS = [{"type": "image_url", "image_url": {"url": data_url(png())}}, {"type": "text", "text": QUESTION}]
RERANK = ("/rerank", "/v1/rerank", "/v2/rerank")


def sigmoid(scores):
    return [1 / (1 + math.exp(-score)) for score in scores]


def best_first(scores):
    return sorted(range(len(scores)), key=lambda n: -scores[n])


# ---- rerank ----


@pytest.mark.parametrize("mode", ["comparative", "isolated"])
@pytest.mark.parametrize("path", RERANK)
def test_rerank_is_the_scores_best_first(path, mode):
    wanted = expected(PLAIN, mode).tolist()
    (found,) = posts(path, {"query": QUESTION, "documents": ANSWERS}, args=(mode,))
    reply = found.json()
    order = [one["index"] for one in reply["results"]]
    assert order == best_first(wanted)
    close([one["relevance_score"] for one in reply["results"]], [wanted[n] for n in order])
    assert [one["document"] for one in reply["results"]] == [{"text": ANSWERS[n]} for n in order]
    assert reply["id"].startswith("rerank-") and reply["model"] == "reward-model"
    assert reply["usage"]["total_tokens"] > reply["usage"]["prompt_tokens"] > 0
    assert len(found.headers["Yojo-Fingerprint"]) == 32


@pytest.mark.parametrize(
    "query",
    [
        {"content": PARTS},
        {"text": QUESTION, "image": data_url(png())},
        {"content": [{"type": "image", "image": data_url(png())}, {"type": "text", "text": QUESTION}]},
    ],
)
def test_a_query_may_have_an_image(query):
    (found,) = posts("/rerank", {"query": query, "documents": ANSWERS})
    wanted = expected(SHOWN).tolist()
    close([one["relevance_score"] for one in found.json()["results"]], sorted(wanted, reverse=True))


def test_documents_in_every_form_are_one():
    forms = [
        [{"text": text} for text in ANSWERS],
        [{"content": [{"type": "text", "text": text}]} for text in ANSWERS],
        [ANSWERS[0], {"text": ANSWERS[1]}, {"content": [{"text": ANSWERS[2][:3]}, {"text": ANSWERS[2][3:]}]}],
    ]
    plain, *found = posts("/rerank", *[{"query": QUESTION, "documents": form} for form in (ANSWERS, *forms)])
    for one in found:
        assert one.json()["results"] == plain.json()["results"]
    single, content = posts(
        "/rerank", *[{"query": QUESTION, "documents": one} for one in ("Nine.", {"content": [{"text": "Nine."}]})]
    )
    assert single.json()["results"] == content.json()["results"] and len(single.json()["results"]) == 1


@pytest.mark.parametrize(
    ("field", "count"), [({"top_n": 2}, 2), ({"top_n": 0}, 3), ({"top_n": 9}, 3), ({"top_n": None}, 3)]
)
def test_top_n_are_the_best(field, count):
    every, some = posts("/rerank", *[{"query": QUESTION, "documents": ANSWERS, **more} for more in ({}, field)])
    assert some.json()["results"] == every.json()["results"][:count]


def test_documents_are_left_out_of_a_reply():
    plain, without, between = posts(
        "/rerank",
        *[
            {"query": QUESTION, "documents": ANSWERS, **more}
            for more in ({"return_documents": True}, {"return_documents": False}, {"use_activation": True})
        ],
    )
    plain, without, between = (one.json()["results"] for one in (plain, without, between))
    assert [set(one) for one in without] == [{"index", "relevance_score"}] * 3 and "document" in plain[0]
    assert [one["index"] for one in plain] == [one["index"] for one in without] == [one["index"] for one in between]
    close([one["relevance_score"] for one in between], sigmoid([one["relevance_score"] for one in plain]))


def test_equal_scores_stand_as_they_were_given():
    async def go():
        async with client_of(Stage().engine()) as client:  # scores are lengths
            return await client.post("/rerank", json={"query": QUESTION, "documents": ["ab", "abc", "cd", "a", "ef"]})

    results = run(go).json()["results"]
    assert [(one["index"], one["relevance_score"]) for one in results] == [
        (1, 3.0),
        (0, 2.0),
        (2, 2.0),
        (4, 2.0),
        (3, 1.0),
    ]


def test_tags_in_texts_are_text():
    (found,) = posts("/rerank", {"query": "Does <image> end it?", "documents": ["<image> no", "yes"]})
    wanted = expected({"prompt": "Does <image> end it?", "responses": ["<image> no", "yes"], "literal_tags": True})
    close([one["relevance_score"] for one in sorted(found.json()["results"], key=lambda one: one["index"])], wanted)


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"documents": ANSWERS}, 422, "query", "missing_field"),
        ({"query": QUESTION}, 422, "documents", "missing_field"),
        ({"query": QUESTION, "documents": []}, 422, "documents", "no_responses"),
        ({"query": QUESTION, "documents": ["a", 3]}, 422, "documents.1", None),
        ({"query": QUESTION, "documents": ["a", " "]}, 422, "documents.1", "invalid_input"),
        ({"query": QUESTION, "documents": [" "]}, 422, "documents.0", "invalid_input"),
        ({"query": QUESTION, "documents": " "}, 422, "documents", "invalid_input"),
        ({"query": QUESTION, "documents": [{"image": "x"}]}, 422, "documents.0.image", "image_in_document"),
        ({"query": QUESTION, "documents": [{"content": PARTS}]}, 422, "documents.0.content.0", "image_in_document"),
        ({"query": QUESTION, "documents": ["a", {}]}, 422, "documents.1", "invalid_document"),
        ({"query": QUESTION, "documents": [{"text": "a", "content": []}]}, 422, "documents.0", "invalid_document"),
        ({"query": QUESTION, "documents": [{"text": "a", "title": "b"}]}, 422, "documents.0.title", "unknown_field"),
        ({"query": {}, "documents": ANSWERS}, 422, "query", "invalid_document"),
        ({"query": {"content": PARTS, "text": "a"}, "documents": ANSWERS}, 422, "query", "invalid_document"),
        ({"query": {"image": "%"}, "documents": ANSWERS}, 422, "query", "image_base64"),
        ({"query": {"content": [{"text": "a"}, {"type": "image", "image": "%"}]}, "documents": "a"}, 422,
         "query.content.1", "image_base64"),
        ({"query": QUESTION, "documents": ANSWERS, "top_n": -1}, 422, "top_n", None),
        ({"query": QUESTION, "documents": ANSWERS, "top_n": "2"}, 422, "top_n", None),
        ({"query": QUESTION, "documents": ANSWERS, "model": "rerank-v3.5"}, 404, "model", "model_not_found"),
        ({"query": QUESTION, "documents": ANSWERS, "max_tokens_per_doc": 4096}, 422, "max_tokens_per_doc", "never_cut"),
        ({"query": QUESTION, "documents": ANSWERS, "max_chunks_per_doc": 10}, 422, "max_chunks_per_doc", "never_cut"),
        ({"query": QUESTION, "documents": ANSWERS, "rank_fields": ["a"]}, 422, "rank_fields", "unknown_field"),
        ({"query": QUESTION, "documents": ANSWERS, "priority": 1}, 422, "priority", "unknown_field"),
        ({"query": QUESTION, "texts": ANSWERS}, 422, None, "other_endpoint"),
        ({"query": QUESTION, "documents": ["a"] * 300}, 413, "documents", "too_many_responses"),
    ],
)  # fmt: skip
def test_a_rerank_that_is_wrong(body, status, param, code):
    (found,) = posts("/v2/rerank", body)
    error = error_of(found, status)
    assert error["param"] == param and (code is None or error["code"] == code), error


# ---- vLLM's score ----


NAMES = [("queries", "documents"), ("queries", "items"), ("data_1", "data_2"), ("text_1", "text_2")]


@pytest.mark.parametrize(("query", "documents"), NAMES)
def test_a_query_against_documents_is_one_prompt(query, documents):
    (found,) = posts("/v1/score", {query: QUESTION, documents: ANSWERS})
    reply = found.json()
    assert [(one["index"], one["object"]) for one in reply["data"]] == [(n, "score") for n in range(3)]
    close([one["score"] for one in reply["data"]], expected(PLAIN))
    assert reply["object"] == "list" and reply["id"].startswith("score-") and reply["model"] == "reward-model"
    assert set(reply["usage"]) == {"prompt_tokens", "total_tokens"} and isinstance(reply["created"], int)


def test_queries_against_as_many_documents_are_pairs():
    queries, documents = [QUESTION, {"content": PARTS}, "What is 2 + 2?"], [ANSWERS[0], {"text": ANSWERS[1]}, "4"]
    pairs, single, listed = posts(
        "/v1/score",
        {"queries": queries, "documents": documents},
        {"queries": QUESTION, "documents": ANSWERS[0]},
        {"queries": [QUESTION], "documents": ANSWERS},
    )
    wanted = [
        expected({"prompt": QUESTION, "responses": ANSWERS[:1]}),
        expected({**SHOWN, "responses": ANSWERS[1:2]}),
        expected({"prompt": "What is 2 + 2?", "responses": ["4"]}),
    ]
    close([one["score"] for one in pairs.json()["data"]], [one.item() for one in wanted])
    close([one["score"] for one in single.json()["data"]], wanted[0])
    close([one["score"] for one in listed.json()["data"]], expected(PLAIN))


def test_an_activation_is_a_sigmoid():
    plain, between = posts(
        "/v1/score", *[{"queries": QUESTION, "documents": ANSWERS, "use_activation": on} for on in (False, True)]
    )
    scores = [[one["score"] for one in found.json()["data"]] for found in (plain, between)]
    close(scores[1], sigmoid(scores[0]))
    assert all(0 < score < 1 for score in scores[1]) and min(scores[0]) < 0


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"queries": QUESTION}, 422, "documents", "missing_field"),
        ({"documents": ANSWERS}, 422, "queries", "missing_field"),
        ({"queries": QUESTION, "data_1": QUESTION, "documents": "a"}, 422, "data_1", "invalid_field"),
        ({"queries": QUESTION, "documents": ANSWERS, "text_2": "a"}, 422, "text_2", "invalid_field"),
        ({"queries": [], "documents": ANSWERS}, 422, "queries", "no_documents"),
        ({"data_1": QUESTION, "data_2": []}, 422, "data_2", "no_documents"),
        ({"queries": ["a", "b"], "documents": ANSWERS}, 422, "documents", "wrong_lengths"),
        ({"queries": ["a", "b"], "documents": ["a", " "]}, 422, "documents.1", "invalid_input"),
        ({"queries": ["a", " "], "documents": ["a", "b"]}, 422, "queries.1", "invalid_input"),
        ({"queries": [" "], "documents": ["a", "b"]}, 422, "queries.0", "invalid_input"),
        ({"text_1": "a", "text_2": ["a", " "]}, 422, "text_2.1", "invalid_input"),
        ({"queries": ["a"] * 3, "documents": ["a"] * 3}, 413, "queries", "too_many_examples"),
        ({"queries": "a", "documents": "b", "truncate_prompt_tokens": -1}, 422, "truncate_prompt_tokens", "never_cut"),
        ({"queries": "a", "documents": {"content": PARTS}}, 422, "documents.content.0", "image_in_document"),
        ({"queries": "a", "documents": "b", "encoding_format": "base64"}, 422, "encoding_format", None),
        ({"queries": "a", "documents": "b", "mm_processor_kwargs": {}}, 422, "mm_processor_kwargs", "unknown_field"),
    ],
)
def test_a_score_of_vllm_that_is_wrong(body, status, param, code):
    (found,) = posts("/v1/score", body, settings=Settings(limits=Limits(examples=2)))
    error = error_of(found, status)
    assert error["param"] == param and (code is None or error["code"] == code), error


def test_a_request_of_vllm_at_our_path_is_told_where_it_belongs():
    one, many = posts("/score", {"text_1": "a", "text_2": "b"}, [{"queries": "a", "documents": "b"}])
    for found in (one, many):
        error = error_of(found, 422)
        assert error["code"] == "other_endpoint" and "/v1/score" in error["message"]


# ---- TEI ----


def test_tei_rerank_is_the_scores_best_first():
    wanted = expected(PLAIN).tolist()
    plain, raw, text, two = posts(
        "/tei/rerank",
        *[
            {"query": QUESTION, "texts": ANSWERS, **more}
            for more in ({}, {"raw_scores": True}, {"return_text": True, "truncate": True}, {"top_n": 2})
        ],
    )
    order = best_first(wanted)
    for found in (plain, raw, text):
        assert [one["index"] for one in found.json()] == order
    close([one["score"] for one in raw.json()], [wanted[n] for n in order])
    close([one["score"] for one in plain.json()], sigmoid([wanted[n] for n in order]))
    assert [one["text"] for one in text.json()] == [ANSWERS[n] for n in order]
    assert set(raw.json()[0]) == {"index", "score"} and two.json() == plain.json()[:2]


@pytest.mark.parametrize(
    ("given", "status", "kind", "text"),
    [
        ({"json": {"query": QUESTION}}, 422, "validation", "texts: this field is needed"),
        ({"json": {"query": QUESTION, "texts": ["a", " "]}}, 422, "validation", "texts.1: response 1 is empty"),
        ({"json": {"query": QUESTION, "texts": []}}, 422, "validation", "texts: there are no responses"),
        ({"json": {"query": QUESTION, "texts": ["a"] * 300}}, 413, "validation", "300 responses, and 256 are the most"),
        ({"json": {"query": " ", "texts": ["a"]}}, 422, "validation", "query: "),
        ({"json": {"query": QUESTION, "texts": ["a"], "documents": []}}, 422, "validation", "documents: "),
        ({"content": b"{"}, 400, "validation", "the body"),
    ],
)
def test_tei_says_errors_in_its_form(given, status, kind, text):
    (found,) = ask(("POST", "/tei/rerank", given))
    assert found.status_code == status and set(found.json()) == {"error", "error_type"}
    assert found.json()["error_type"] == kind and text in found.json()["error"]


def test_tei_describes_its_model():
    info, health = ask(("GET", "/tei/info", {}), ("GET", "/tei/health", {}), settings=Settings(token_budget=4096))
    assert health.status_code == 200
    found = info.json()
    assert found["model_id"] == "reward-model" and found["model_sha"] == info.headers["Yojo-Fingerprint"]
    assert found["max_batch_tokens"] == 4096 and found["max_client_batch_size"] == Limits().responses
    assert found["model_type"]["reranker"]["id2label"] == {"0": "score"}

"""The clients that people have speak to the server: cohere's, openai's, httpx, OpenRLHF's own; and what others send.

cohere and openai are installed and are what is tested, over a socket. vLLM, llama-index, Haystack, LiteLLM and LangChain are not (each
brings a framework along, for one request), so what they send is sent here, read from their sources:

- vLLM's examples of its pooling models: `score_api_online.py`, `rerank_api_online.py`, `vision_rerank_api_online.py`, and its
  `/score`, which is `/v1/score` here;
- TEI: `TextEmbeddingInference` of llama-index-postprocessor-tei-rerank, `HuggingFaceTEIRanker` of haystack-ai, the provider
  `huggingface/` of litellm's rerank. huggingface_hub has no rerank;
- Jina: `JinaRerank` of langchain-community.
"""

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import cohere
import httpx
import openai
import pytest

from tests import framework_cases
from tests.reward_cases import demo_judge
from tests.serving.asking import close
from tests.serving.serving_cases import ANSWERS, QUESTION, body, data_url, engine_of, expected, listening, png
from yojo.demo.backbone import build_processor
from yojo.rewards import Group, GroupScorer
from yojo.rewards.openrlhf_server import Queries
from yojo.serving.settings import Settings

ROOT = Path(__file__).parents[2]
KEY = "a-key-of-24-characters-1"
NAME = "org/digits"
SETTINGS = Settings(names=(NAME, "digits"), keys={KEY: "client"}, group_size=3)
PLAIN = {"prompt": QUESTION, "responses": ANSWERS}


@pytest.fixture(scope="module")
def url():
    """Address of a server that asks for a key."""
    with listening(engine_of(SETTINGS)) as server:
        yield server.url


@pytest.fixture(scope="module")
def open_url():
    """Address of a server that asks for none, and reads the demonstration's policy."""
    with listening(engine_of(Settings(group_size=3)), policy=Queries(build_processor())) as server:
        yield server.url


def ranked():
    """(index, score) of the answers to the question, best first."""
    scores = expected(PLAIN).tolist()
    return sorted(enumerate(scores), key=lambda one: -one[1])


def check(results, top=3):
    """What a client has read of a reranking against the model's scores."""
    assert [one.index for one in results] == [n for n, _ in ranked()[:top]]
    close([one.relevance_score for one in results], [score for _, score in ranked()[:top]])


# ---- cohere ----


@pytest.mark.parametrize("client", [cohere.Client, cohere.ClientV2])
def test_cohere(client, url):
    found = client(KEY, base_url=url).rerank(model=NAME, query=QUESTION, documents=ANSWERS)
    check(found.results)
    assert found.id.startswith("rerank-")
    check(client(KEY, base_url=url).rerank(model="digits", query=QUESTION, documents=ANSWERS, top_n=2).results, 2)


@pytest.mark.parametrize("client", [cohere.AsyncClient, cohere.AsyncClientV2])
def test_cohere_async(client, url):
    async def go():
        async with client(KEY, base_url=url) as made:
            asked = [made.rerank(model=NAME, query=QUESTION, documents=ANSWERS) for _ in range(4)]
            return await asyncio.gather(*asked)

    for found in asyncio.run(go()):
        check(found.results)


def test_cohere_documents(url):
    documents = [{"text": text} for text in ANSWERS]
    client = cohere.Client(KEY, base_url=url)
    found = client.rerank(model=NAME, query=QUESTION, documents=documents, return_documents=True)
    check(found.results)
    assert [one.document.text for one in found.results] == [ANSWERS[n] for n, _ in ranked()]
    found = client.rerank(model=NAME, query=QUESTION, documents=documents, return_documents=False)
    assert [one.document for one in found.results] == [None] * 3


@pytest.mark.parametrize(
    ("fields", "error", "param"),
    [
        ({"model": "rerank-v3.5"}, cohere.NotFoundError, "model"),
        ({"documents": ["a", " "]}, cohere.UnprocessableEntityError, "documents.1"),
        ({"max_tokens_per_doc": 100}, cohere.UnprocessableEntityError, "max_tokens_per_doc"),
        ({"priority": 3}, cohere.UnprocessableEntityError, "priority"),
    ],
)
def test_cohere_hears_what_is_wrong(fields, error, param, url):
    with pytest.raises(error) as raised:
        cohere.ClientV2(KEY, base_url=url).rerank(**{"model": NAME, "query": QUESTION, "documents": ANSWERS, **fields})
    assert raised.value.body["error"]["param"] == param


def test_cohere_hears_of_a_wrong_key_and_of_old_fields(url):
    with pytest.raises(cohere.UnauthorizedError):
        cohere.ClientV2("wrong", base_url=url).rerank(model=NAME, query=QUESTION, documents=ANSWERS)
    with pytest.raises(cohere.UnprocessableEntityError, match="rank_fields"):
        cohere.Client(KEY, base_url=url).rerank(model=NAME, query=QUESTION, documents=ANSWERS, rank_fields=["text"])


# ---- openai ----


def test_openai_lists_the_model(url):
    client = openai.OpenAI(base_url=f"{url}/v1", api_key=KEY)
    models = client.models.list()
    assert [model.id for model in models] == [NAME, "digits"] and models.data[0].owned_by == "yojo"
    model = client.models.retrieve(NAME)
    assert model.id == NAME and model.object == "model" and model.created == models.data[0].created > 0
    assert len(model.digest) == 32 and model.mode == "comparative"  # beside what OpenAI's have
    with pytest.raises(openai.NotFoundError) as raised:
        client.models.retrieve("gpt-4")
    assert (raised.value.code, raised.value.param, raised.value.type) == ("model_not_found", "model", "not_found_error")
    with pytest.raises(openai.AuthenticationError) as raised:
        openai.OpenAI(base_url=f"{url}/v1", api_key="wrong").models.list()
    assert raised.value.code == "wrong_key"


def test_openai_async(url):
    async def go():
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY) as client:
            return [model.id async for model in client.models.list()]

    assert asyncio.run(go()) == [NAME, "digits"]


def test_openai_asks_again_where_too_much_waits(monkeypatch):
    pauses, statuses = [], []
    own = openai.OpenAI._calculate_retry_timeout

    def pause(self, *args, **options):
        pauses.append(own(self, *args, **options))
        return 0.0

    monkeypatch.setattr(openai.OpenAI, "_calculate_retry_timeout", pause)
    with listening(engine_of()) as server:
        hooks = {"response": [lambda response: statuses.append(response.status_code)]}
        http = openai.DefaultHttpxClient(event_hooks=hooks)
        client = openai.OpenAI(base_url=server.url, api_key="any", max_retries=2, http_client=http)
        server.engine._tokens += Settings().max_waiting  # as if that much waited
        with pytest.raises(openai.RateLimitError) as raised:
            client.post("/score", body=body(), cast_to=httpx.Response)
        assert (raised.value.code, raised.value.type) == ("overloaded", "overloaded_error")
        assert statuses == [429] * 3 and pauses == [1.0] * 2  # as Retry-After says
        server.engine._tokens -= Settings().max_waiting
        found = client.post("/score", body=body(), cast_to=httpx.Response)
        close(found.json()["scores"], expected(body()))


# ---- httpx, and what others send ----


def test_httpx(url):
    with httpx.Client(base_url=url, headers={"Authorization": f"Bearer {KEY}"}) as client:
        for _ in range(3):
            close(client.post("/score", json=body()).raise_for_status().json()["scores"], expected(body()))
        files = [("image", ("three.png", png(), "image/png"))]
        uploaded = client.post("/score/upload", data={"prompt": QUESTION, "response": ANSWERS}, files=files)
        close(uploaded.json()["scores"], expected(body()))
        assert client.post("/score", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415


def vllm(url, path, **fields):
    """A request of vLLM's examples: the model is the first that `/v1/models` lists."""
    model = httpx.get(f"{url}/v1/models").json()["data"][0]["id"]
    headers = {"accept": "application/json", "Content-Type": "application/json"}
    found = httpx.post(f"{url}{path}", headers=headers, json={"model": model, **fields})
    return found.raise_for_status().json()


def test_vllm_score(open_url):
    for one, many in (("queries", "documents"), ("text_1", "text_2"), ("data_1", "data_2")):
        found = vllm(open_url, "/v1/score", **{one: QUESTION, many: ANSWERS})
        close([one["score"] for one in found["data"]], expected(PLAIN))
    found = vllm(open_url, "/v1/score", queries=QUESTION, documents=ANSWERS[0])
    close([found["data"][0]["score"]], expected({**PLAIN, "responses": ANSWERS[:1]}))
    pairs = vllm(open_url, "/v1/score", queries=[QUESTION, "2 + 2 ="], documents=ANSWERS[:2])
    close(pairs["data"][1]["score"], expected({"prompt": "2 + 2 =", "responses": ANSWERS[1:2]})[0])


def test_vllm_images_are_the_querys(open_url):
    image = {"type": "image_url", "image_url": {"url": data_url(png())}}
    query = {"content": [image, {"type": "text", "text": QUESTION}]}
    found = vllm(open_url, "/v1/score", queries=query, documents=ANSWERS)
    close([one["score"] for one in found["data"]], expected(body()))
    found = vllm(open_url, "/rerank", query=query, documents={"content": [{"type": "text", "text": ANSWERS[0]}]})
    close([found["results"][0]["relevance_score"]], expected(body(responses=ANSWERS[:1])))
    with pytest.raises(httpx.HTTPStatusError) as raised:
        vllm(open_url, "/rerank", query=QUESTION, documents={"content": [image]})
    assert raised.value.response.json()["error"]["code"] == "image_in_document"


def test_jina(open_url):
    asked = {"query": QUESTION, "documents": ANSWERS, "top_n": 2, "model": "reward-model"}
    headers = {"Authorization": "Bearer jina", "Accept-Encoding": "identity", "Content-type": "application/json"}
    found = httpx.post(f"{open_url}/v1/rerank", headers=headers, json=asked).json()
    assert "results" in found  # or it is an error to that client, which reads `detail`
    assert [one["index"] for one in found["results"]] == [n for n, _ in ranked()[:2]]
    close([one["relevance_score"] for one in found["results"]], [score for _, score in ranked()[:2]])


@pytest.mark.parametrize(
    "more",
    [
        {},  # llama-index
        {"raw_scores": False},  # Haystack
        {"raw_scores": False, "truncate": True, "truncation_direction": "Right"},
        {
            "raw_scores": False,
            "truncate": False,
            "truncation_direction": "Right",
            "top_n": 3,
            "return_text": True,
        },  # LiteLLM
    ],
)
def test_tei(more, open_url):
    found = httpx.post(f"{open_url}/tei/rerank", json={"query": QUESTION, "texts": ANSWERS, **more}).json()
    assert isinstance(found, list) and [one["index"] for one in found] == [n for n, _ in ranked()]
    assert all(0 < one["score"] < 1 for one in found) and found == sorted(found, key=lambda one: -one["score"])


# ---- OpenRLHF ----


def test_openrlhf(open_url):
    command = [sys.executable, "-m", "tests.openrlhf_run", str(framework_cases.folder_of("openrlhf")), open_url]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])["served"]
    for group in found:
        wanted = GroupScorer(demo_judge()).score([Group(group["chat"], group["completions"])])[0].rewards
        close([reward for (reward,) in group["rewards"]], wanted)
    assert len(found) == 2 and found[0]["chat"] != found[1]["chat"]

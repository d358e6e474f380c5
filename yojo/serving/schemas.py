"""What requests and replies hold, endpoint by endpoint: checked by pydantic, and shown in the OpenAPI description."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

PIXEL = (
    "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAgAAAAICAIAAABLbSncAAAAE0lEQVR4nGP8z4APMOGVHbHSAEEsAQ+W3+tbAAAAAElF"
    "TkSuQmCC"
)
QUESTION = "Which digit is shown?"
ANSWERS = ["It is a 3.", "This is a seven."]


def _kind(*kinds):
    """What tells the forms of a field apart: the first that a value is an instance of, else the last; errors name none."""

    def found(value):
        return next((f"<{kind.__name__}>" for kind in kinds if isinstance(value, kind)), f"<{kinds[-1].__name__}>")

    return Discriminator(found)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


def _elsewhere(names, message):
    """A validator that says where a request belongs which has fields that only another endpoint's have."""

    def check(value):
        if isinstance(value, dict) and any(name in value for name in names):
            raise PydanticCustomError("other_endpoint", message)
        return value

    return model_validator(mode="before")(check)


def _shown(*examples):
    return ConfigDict(extra="forbid", strict=True, json_schema_extra={"examples": list(examples)})


Prompt = Annotated[
    Annotated[str, Tag("<str>")] | Annotated[list[dict[str, Any]], Tag("<list>")],
    _kind(list, str),
    Field(
        description="The text of one user turn, or chat messages (OpenAI's, with parts; the last is not the assistant's)."
    ),
]
Model = Annotated[str | None, Field(description="The served name, see /v1/models; it may be left out.")]
Images = Annotated[
    list[str],
    Field(
        description="Images in order: data URLs, base64 of image files, paths below the server's image root, or URLs of hosts "
        "that it allows. They fill image parts or `<image>` tags of the prompt, or stand before its first user turn."
    ),
]
Tools = Annotated[list[dict[str, Any]] | None, Field(description="JSON schemas of tools, for the chat template.")]
LiteralTags = Annotated[bool, Field(description="`<image>` and `<video>` in the prompt are characters, not places.")]


class Video(_Strict):
    """A video as its frames."""

    frames: list[str] = Field(description="Images, as in `images`.")
    fps: float | None = Field(None, gt=0, le=1000, description="Frames per second; None where it is not known.")


class ScoreRequest(_Strict):
    """One prompt and its candidate responses."""

    model_config = _shown(
        {"prompt": QUESTION, "responses": ANSWERS, "images": [PIXEL]},
        {
            "prompt": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": PIXEL}},
                        {"type": "text", "text": QUESTION},
                    ],
                }
            ],
            "responses": ANSWERS,
            "details": True,
        },
    )

    prompt: Prompt
    responses: list[str] = Field(description="N candidate responses, none blank; scored in one forward pass.")
    images: Images = []
    videos: list[Video] = []
    tools: Tools = None
    literal_tags: LiteralTags = False
    model: Model = None
    details: bool = Field(False, description="Describe how the responses lie in the packed row, and which sees which.")
    _vllm = _elsewhere(("queries", "data_1", "text_1"), "this is vLLM's form of a request: it goes to /v1/score")


OneOrMany = Annotated[
    Annotated[ScoreRequest, Tag("<dict>")] | Annotated[list[ScoreRequest], Tag("<list>")], _kind(list, dict)
]


class Usage(BaseModel):
    """Tokens: of the prompt, of each response, and of all in the packed row."""

    prompt_tokens: int
    response_tokens: list[int] | None = None
    total_tokens: int


class Segment(BaseModel):
    """A part of the packed row; it sees itself causally, and those before it that are named."""

    kind: Literal["prompt", "response"]
    response: int | None
    tokens: int
    sees: list[int]


class Row(BaseModel):
    """How an example lies in its packed row."""

    mode: str
    orders: int
    segments: list[Segment]


class ScoreReply(BaseModel):
    """Scores of one prompt's responses, in their order; higher is better. Each is exactly the model's float32."""

    id: str
    object: Literal["score"]
    created: int
    model: str
    scores: list[float]
    fingerprint: str
    usage: Usage
    row: Row | None = None


class ScoredOne(BaseModel):
    """One of many."""

    index: int
    scores: list[float]
    usage: Usage
    row: Row | None = None


class ScoreListReply(BaseModel):
    """Scores of a list, in its order."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[ScoredOne]
    fingerprint: str
    usage: Usage


class Failure(BaseModel):
    """What is wrong: `param` names the field, `code` is for programs."""

    message: str
    type: str
    param: str | None = None
    code: str


class ErrorReply(BaseModel):
    """In place of scores."""

    error: Failure


# ---- vLLM, Jina, Cohere, TEI ----


class Parts(_Strict):
    """Text and images as OpenAI's parts; of a document, text alone."""

    content: list[dict[str, Any]]


class TextOnly(BaseModel):
    """A document as a dict with its text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    text: str | None = None
    image: str | None = None
    content: list[dict[str, Any]] | None = None


Document = Annotated[Annotated[str, Tag("<str>")] | Annotated[TextOnly, Tag("<dict>")], _kind(dict, str)]
Documents = Annotated[
    Annotated[str, Tag("<str>")] | Annotated[TextOnly, Tag("<dict>")] | Annotated[list[Document], Tag("<list>")],
    _kind(list, dict, str),
]
Cut = Annotated[int | None, Field(description="Must be absent: nothing is ever cut.")]
TopN = Annotated[int | None, Field(ge=0, description="How many to return; 0 or absent: all.")]
Activation = Annotated[
    bool | None, Field(description="True: the sigmoid of each score. By default scores as they are.")
]


class VllmScoreRequest(_Strict):
    """vLLM's: one query against N documents (its responses, which are scored together), or N queries against one each."""

    model_config = _shown({"queries": QUESTION, "documents": ANSWERS})

    queries: Documents | None = None
    documents: Documents | None = None
    data_1: Documents | None = None
    data_2: Documents | None = None
    text_1: Documents | None = None
    text_2: Documents | None = None
    items: Documents | None = None
    model: Model = None
    user: str | None = Field(None, description="Taken and not looked at.")
    encoding_format: Literal["float"] | None = None
    truncate_prompt_tokens: Cut = None
    use_activation: Activation = None


class VllmScored(BaseModel):
    """Score of one pair."""

    index: int
    object: Literal["score"]
    score: float


class VllmScoreReply(BaseModel):
    """As vLLM replies."""

    id: str
    object: Literal["list"]
    created: int
    model: str
    data: list[VllmScored]
    usage: Usage


class RerankRequest(_Strict):
    """Jina's and Cohere's (v1 and v2): a query (the prompt) and documents (its responses), best first."""

    model_config = _shown({"query": QUESTION, "documents": ANSWERS, "top_n": 1})

    query: Document
    documents: Documents
    model: Model = None
    top_n: TopN = None
    return_documents: bool | None = Field(None, description="False leaves the documents out of the reply.")
    use_activation: Activation = None
    max_tokens_per_doc: Cut = None
    max_chunks_per_doc: Cut = None
    _tei = _elsewhere(("texts",), "this is TEI's form: give its clients this server's address with /tei behind it")
    user: str | None = Field(None, description="Taken and not looked at.")


class RerankDocument(BaseModel):
    """A document's text."""

    text: str


class Reranked(BaseModel):
    """One of the documents; `relevance_score` is the model's score as it is, not squeezed between 0 and 1."""

    index: int
    document: RerankDocument | None = None
    relevance_score: float


class RerankReply(BaseModel):
    """As vLLM, Jina and Cohere reply."""

    id: str
    model: str
    usage: Usage
    results: list[Reranked]


class TeiRerankRequest(_Strict):
    """TEI's `/rerank`."""

    model_config = _shown({"query": QUESTION, "texts": ANSWERS, "raw_scores": True})

    query: str
    texts: list[str]
    raw_scores: bool = Field(False, description="The model's scores; False: their sigmoid, as TEI has it.")
    return_text: bool = False
    top_n: TopN = None
    truncate: bool | None = Field(
        None, description="Allows what is never done: what is too long is an error all the same."
    )
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None


class TeiScored(BaseModel):
    """One of the texts."""

    index: int
    text: str | None = None
    score: float


class TeiInfo(BaseModel):
    """As TEI describes its model and limits."""

    model_id: str
    model_sha: str
    model_dtype: str
    model_type: dict[str, Any]
    max_concurrent_requests: int
    max_input_length: int
    max_batch_tokens: int
    max_client_batch_size: int
    version: str


class Nothing(BaseModel):
    """An object without fields."""


class TeiError(BaseModel):
    """TEI's form of an error."""

    error: str
    error_type: str


# ---- groups ----


class GroupRequest(_Strict):
    """One sample of a group: it is answered when the group is whole and scored in one pass."""

    model_config = _shown(
        {"key": "question-17", "group_size": 1, "prompt": QUESTION, "response": ANSWERS[0], "images": [PIXEL]}
    )

    key: str = Field(min_length=1, max_length=256, description="What tells the group from others, such as a uid.")
    prompt: Prompt
    response: str = Field(description="What the policy wrote; it may be empty.")
    group_size: int | None = Field(
        None, ge=1, description="Samples of the group; the server's --group-size by default."
    )
    truncated: bool | None = Field(None, description="Whether it was cut off at the length limit.")
    images: Images = []
    videos: list[Video] = []
    tools: Tools = None
    literal_tags: LiteralTags = False
    model: Model = None


class GroupReply(BaseModel):
    """The reward of one sample: see `yojo.rewards.Reward`."""

    key: str
    reward: float | None
    score: float | None
    place: int | None
    treated: str | None
    group_size: int
    missing: int
    seconds: float
    fingerprint: str


class OpenRlhfRequest(_Strict):
    """OpenRLHF's remote reward model: three lists of one length."""

    model_config = _shown(
        {"query": ["<user>Hi<assistant>Hello.</s>"], "prompts": ["<user>Hi<assistant>"], "labels": [""]}
    )

    query: list[str]
    prompts: list[str]
    labels: list[Any]


class OpenRlhfReply(BaseModel):
    """As OpenRLHF reads it."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


# ---- the server ----


class ModelCard(BaseModel):
    """The served model: `fingerprint` is all that changes a score, `digest` what replies carry of it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    fingerprint: dict[str, Any]
    digest: str
    mode: str
    permutations: int
    order_free: bool
    max_length: int | None
    dtype: str
    limits: dict[str, Any]
    probe: dict[str, Any]


class ModelList(BaseModel):
    """As OpenAI lists models."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(BaseModel):
    """The server lives."""

    status: Literal["ok"]


class Ready(BaseModel):
    """Whether requests can be scored, and why not."""

    ready: bool
    reasons: list[str]

"""What several endpoints say alike: tokens, scores, which errors there are."""

from yojo.serving import schemas

_ERRORS = {
    400: "No JSON.",
    401: "No key, or a wrong one.",
    404: "No such model.",
    408: "The body came too slowly.",
    413: "Too much: bytes, pixels, responses, tokens.",
    415: "Another Content-Type.",
    422: "An input that is wrong; `param` names the field.",
    424: "The model gives no finite score.",
    429: "Too much is waiting; see Retry-After.",
    503: "Not ready, or ending; see Retry-After.",
    504: "No answer within the deadline.",
}


def usage_of(answers):
    """Tokens of answers, added up."""
    return {
        "prompt_tokens": sum(answer.prompt_tokens for answer in answers),
        "total_tokens": sum(answer.total_tokens for answer in answers),
    }


def errors(model=schemas.ErrorReply, **more):
    """The errors of an endpoint, for the OpenAPI description.

    Args:
        model: their form.
        **more: descriptions of further ones, such as `status_409="..."`.
    """
    told = {**_ERRORS, **{int(name.removeprefix("status_")): text for name, text in more.items()}}
    return {status: {"model": model, "description": text} for status, text in sorted(told.items())}


def scored(answer):
    """An `Answer` as JSON has it."""
    found = {
        "scores": answer.scores,
        "usage": {
            "prompt_tokens": answer.prompt_tokens,
            "response_tokens": answer.response_tokens,
            "total_tokens": answer.total_tokens,
        },
    }
    return found if answer.row is None else {**found, "row": answer.row}

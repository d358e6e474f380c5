"""`ApiError`: what a client is told in place of scores; the same form at every endpoint that has none of its own."""

import re

# What a status is called in the error's form, as OpenAI's servers call theirs.
TYPES = {
    400: "invalid_request_error",
    401: "authentication_error",
    404: "not_found_error",
    405: "invalid_request_error",
    408: "invalid_request_error",
    409: "invalid_request_error",
    411: "invalid_request_error",
    413: "too_large_error",
    415: "invalid_request_error",
    422: "invalid_request_error",
    424: "model_error",
    429: "overloaded_error",
    500: "server_error",
    503: "unavailable_error",
    504: "timeout_error",
}
# TEI's names for the same.
TEI_TYPES = {
    413: "validation",
    422: "validation",
    424: "backend",
    429: "overloaded",
    500: "backend",
    503: "unhealthy",
    504: "overloaded",
}


class ApiError(Exception):
    """A request that gets no scores.

    Args:
        status: of HTTP.
        code: what is wrong, in one word that programs compare, such as "image_too_large".
        message: what is wrong and what to do, in a sentence, without anything that a user wrote.
        param: the field that is wrong, such as "images.0" or "2.responses.1"; None where there is none.
        retry_after: seconds after which to ask again; None: not said.
    """

    def __init__(self, status, code, message, param=None, retry_after=None):
        super().__init__(message)
        self.status, self.code, self.message, self.param, self.retry_after = status, code, message, param, retry_after

    def __reduce__(self):
        return type(self), (self.status, self.code, self.message, self.param, self.retry_after)

    def under(self, prefix):
        """The same error of a field below another, such as "3" for the fourth example of a list."""
        param = ".".join(part for part in (str(prefix), self.param) if part)
        return type(self)(self.status, self.code, self.message, param, self.retry_after)

    def body(self, tei=False):
        """The error as JSON has it: OpenAI's form; or TEI's."""
        if tei:
            where = f"{self.param}: " if self.param else ""
            return {"error": f"{where}{self.message}", "error_type": TEI_TYPES.get(self.status, "validation")}
        return {
            "error": {
                "message": self.message,
                "type": TYPES.get(self.status, "invalid_request_error"),
                "param": self.param,
                "code": self.code,
            }
        }

    def headers(self):
        return {} if self.retry_after is None else {"Retry-After": str(max(1, round(self.retry_after)))}


_QUOTED = re.compile(r"""(?<![A-Za-z0-9])(?P<mark>['"`])(?P<said>.*?)(?P=mark)(?![A-Za-z0-9])""", re.DOTALL)
# Brackets with a quotation in them. The first quotation mark is where it is: no two ways of reading, which would be n^2 of them.
_HOLDS = re.compile(r"[{\[(][^{}\[\]()'\"]*['\"][^{}\[\]()]*[}\])]")
_BEGINS = re.compile(r"(?<![A-Za-z0-9])['\"`]|[{\[(]")
_LONGEST = 300
_READ = 1500  # characters of a message that are looked through
_SEARCHED = 1 << 18  # characters of texts that quotations are looked for in; of more, none is shown
# What requests are made of: keys, roles and types of parts stand among the strings of a request, and in every message about them.
_OURS = frozenset(
    "prompt response responses image images video videos frames tools model role content type text name image_url video_url url "
    "path user assistant system developer tool function".split()
)


def without_text(message, texts):
    """An error's message in a line, without what users wrote: quotations of theirs, and dicts and lists that hold them.

    Args:
        message: str.
        texts: strings that the message may quote.

    Returns:
        str, of at most 300 characters.
    """
    line = " ".join(message.split())
    if len(line) > _READ:  # no sentence of ours: it quotes something long, which would take long to look through, too
        line = f"{_BEGINS.split(line, maxsplit=1)[0][:_LONGEST]}..."
    line = _HOLDS.sub("...", line)
    texts = [text for text in dict.fromkeys(texts) if text not in _OURS]
    known = "\0".join(texts)
    known = known if len(known) <= _SEARCHED else None

    def shown(found):
        said = found["said"]
        if said in _OURS or not said:
            return found[0]
        return "'...'" if len(said) > 40 or known is None or said in known else found[0]

    line = _QUOTED.sub(shown, line)
    for text in texts:  # what stands there as it is
        if len(text) > 3 and text in line:
            line = line.replace(text, "...") if len(text) > 20 else _without_word(line, text)
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..."


def _without_word(line, text):
    """The line without a text, but where it is the middle of a word of ours."""
    kept, at = [], 0
    while (found := line.find(text, at)) >= 0:
        end = found + len(text)
        if _is_word(line[found - 1 : found]) or _is_word(line[end : end + 1]):
            kept.append(line[at : found + 1])
            at = found + 1
        else:
            kept += line[at:found], "..."
            at = end
    return "".join((*kept, line[at:]))


def _is_word(mark):
    return mark.isalnum() or mark == "_"

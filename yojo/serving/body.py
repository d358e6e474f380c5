"""The body of a request as JSON: bounded while it streams in, counted before it is decoded."""

import asyncio
import json
import re

from yojo.serving.errors import ApiError

_BLOCK = 1 << 18  # bytes that are looked through at once: other threads have to get their turn, too
_BLANK = b" \t\r\n"
_NOT_STRUCTURE = bytes(set(range(256)) - set(b"[]{}"))
_LONGEST_NUMBER = 32  # characters, of values on the average
_SEPARATORS = (b",", b":", b"[", b"{")
_CONSTANT = re.compile(rb"NaN|Infinity|nan|inf")
_LONG_INTEGER = re.compile(rb"(?<![0-9.eE+])[0-9]{19,}(?![0-9.eE])")


async def read_body(request, most, seconds=60.0):
    """The body of a request.

    Args:
        request: `starlette.requests.Request`.
        most: bytes that it may have; no more are kept, whatever its headers say.
        seconds: in which it has to be here, however slowly it drips.

    Returns:
        bytes.

    Raises:
        ApiError: content_length (no number, or another than came), body_too_large, body_timeout, body_incomplete (the
            client has gone).
    """
    said = request.headers.get("content-length")
    if said is not None and not (said.isascii() and said.isdigit()):
        raise ApiError(400, "content_length", "Content-Length must be a number of bytes")
    if said is not None and (len(said) > 18 or int(said) > most):
        raise _too_large(most)
    try:
        data = await asyncio.wait_for(_received(request, most), seconds)
    except (asyncio.TimeoutError, TimeoutError):
        raise ApiError(408, "body_timeout", f"the body did not come in {seconds:g} seconds") from None
    if said is not None and int(said) != len(data):
        raise ApiError(400, "content_length", "Content-Length is not the length of the body")
    return data


async def _received(request, most):
    from starlette.requests import ClientDisconnect

    data = bytearray()  # not a list: of a body that comes byte by byte its parts would weigh far more than itself
    try:
        async for part in request.stream():
            if len(data) + len(part) > most:
                raise _too_large(most)
            data += part
    except ClientDisconnect:
        raise ApiError(400, "body_incomplete", "the connection ended before the body did") from None
    return bytes(data)


def _too_large(most):
    return ApiError(413, "body_too_large", f"a body may have {most} bytes at most")


def parse_json(data, limits):
    """Decode JSON that is neither too deep nor too wide, and that says one thing only.

    Strings are stepped over by `bytes.split`, a block at a time, so images in base64 cost next to nothing, and what is
    written to be slow (a million brackets, quotes or backslashes) costs no more per byte.

    Args:
        data: bytes.
        limits: `Limits`, of which depth and values count here.

    Returns:
        whatever JSON can say.

    Raises:
        ApiError: json_empty, json_bom, json_encoding (not UTF-8), json_depth, json_values, json_surrogate (half of a
            pair), json_number (beyond a double), json_constant (NaN, Infinity), json_duplicate_key, json_trailing
            (something behind the value, or a comma behind the last one), json_syntax.
    """
    import orjson

    if data.startswith(b"\xef\xbb\xbf"):
        raise _bad("json_bom", "begins with a byte order mark, which JSON has none of")
    if data[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in data[:2]:
        raise _bad("json_encoding", "must be UTF-8")
    outside, quotes = _outside_strings(data, limits)
    if not outside and not quotes:
        raise _bad("json_empty", "is empty")
    try:
        value = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        raise _why(data, outside, str(error)) from None
    # Each member of an object has one colon outside of strings, so a key that stands twice leaves one too many.
    if outside.count(b":") != _keys(value):
        raise _bad("json_duplicate_key", "has an object with the same key twice")
    return _exact(data) if _LONG_INTEGER.search(outside) else value


def _exact(data):
    """What is known to be JSON, its integers of any length: orjson makes floats of those beyond 64 bits, 1e+20 in a template."""
    try:
        return json.loads(data)
    except ValueError:  # of thousands of digits, which Python does not read
        raise _bad("json_number", "has a number that is too large") from None


def _bad(code, what):
    return ApiError(400, code, f"the body {what}")


def _outside_strings(data, limits):
    """(what of a JSON text stands outside of its strings, without blanks; how many quotes it has)."""
    outside, quotes, separators, carried = bytearray(), 0, 0, b""
    for at in range(0, len(data), _BLOCK):
        block = carried + data[at : at + _BLOCK]
        carried = b""
        if b"\\" in block:
            if (len(block) - len(block.rstrip(b"\\"))) % 2:  # what it escapes is in the next block
                block, carried = block[:-1], b"\\"
            block = block.replace(b"\\\\", b"").replace(b'\\"', b"")
        inside = quotes % 2
        quotes += block.count(b'"')
        new = b"".join(block.split(b'"')[inside::2]).translate(None, _BLANK)
        outside += new
        separators += sum(map(new.count, _SEPARATORS))
        count = (quotes + 1) // 2 + separators
        # Nor is there much else, however few values it claims to be: a number of a million digits, closing brackets.
        if count > limits.values or len(outside) > limits.values * _LONGEST_NUMBER:
            raise _too_wide(limits)
    depth = deepest = 0
    for mark in outside.translate(None, _NOT_STRUCTURE):
        depth += 1 if mark in b"[{" else -1
        deepest = max(deepest, depth)
    if deepest > limits.depth:
        raise _bad("json_depth", f"is nested deeper than {limits.depth}")
    return outside, quotes


def _too_wide(limits):
    return ApiError(
        413,
        "json_values",
        f"the body may have {limits.values} values, keys and separators at most, and no endless numbers",
    )


def _keys(value):
    """Keys of all objects in a decoded value."""
    count, left = 0, [value]
    while left:
        value = left.pop()
        if isinstance(value, dict):
            count += len(value)
            left.extend(inner for inner in value.values() if isinstance(inner, (dict, list)))
        elif isinstance(value, list):
            left.extend(inner for inner in value if isinstance(inner, (dict, list)))
    return count


def _why(data, outside, said):
    """The error of what is no JSON; `said` is what the decoder has to say to it."""
    try:
        data.decode()
    except UnicodeDecodeError:
        return _bad("json_encoding", "must be UTF-8")
    if _CONSTANT.search(outside):
        return _bad("json_constant", "has a number that JSON has not: NaN or Infinity")
    if "surrogate" in said:
        return _bad("json_surrogate", "has half of a surrogate pair in a string")
    if "number is infinity" in said:
        return _bad("json_number", "has a number that is too large")
    if "after document" in said or "trailing comma" in said:
        return _bad("json_trailing", "has something behind its value, or a comma behind the last one")
    return _bad("json_syntax", f"is no JSON at {said.rpartition(': ')[2]}" if ": line " in said else "is no JSON")

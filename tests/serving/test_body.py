"""Bodies of requests: bounded while they stream in, and JSON that is counted before it is decoded."""

import asyncio
import json
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from starlette.requests import Request

from yojo.serving import body
from yojo.serving.body import parse_json, read_body
from yojo.serving.errors import ApiError
from yojo.serving.settings import Limits

LIMITS = Limits()
LONG = 60.0  # seconds that no test takes


def request(parts, ends=True, **headers):
    """A request whose body comes in these parts; `ends` False: and then nothing; None: and then the client has gone."""
    left = [{"type": "http.request", "body": part, "more_body": True} for part in parts]
    left += {True: [{"type": "http.request"}], None: [{"type": "http.disconnect"}], False: []}[ends]

    async def receive():
        if not left:
            await asyncio.Event().wait()
        return left.pop(0)

    names = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return Request({"type": "http", "method": "POST", "headers": names}, receive)


def code(awaitable_or_function, *arguments):
    with pytest.raises(ApiError) as caught:
        if asyncio.iscoroutine(awaitable_or_function):
            asyncio.run(awaitable_or_function)
        else:
            awaitable_or_function(*arguments)
    return caught.value.status, caught.value.code


# ---- how it comes ----


@pytest.mark.parametrize("headers", [{}, {"content_length": "10"}])
def test_a_body_is_joined(headers):
    parts = [b"01", b"", b"234", b"56789"]
    assert asyncio.run(read_body(request(parts, **headers), 10, LONG)) == b"0123456789"


@pytest.mark.parametrize(
    "headers, parts, expected",
    [
        ({"content_length": "11"}, None, (413, "body_too_large")),
        ({"content_length": "1" + "0" * 5000}, None, (413, "body_too_large")),
        ({"content_length": "5"}, [b"0123456789a"], (413, "body_too_large")),
        ({}, [b"0123456789", b"a"], (413, "body_too_large")),
        ({"content_length": "9"}, [b"0123456789"], (400, "content_length")),
        ({"content_length": "10"}, [b"012"], (400, "content_length")),
        ({"content_length": "-1"}, None, (400, "content_length")),
        ({"content_length": "+5"}, None, (400, "content_length")),
        ({"content_length": "\u00b2"}, None, (400, "content_length")),
        ({"content_length": ""}, None, (400, "content_length")),
    ],
)
def test_bodies_that_are_refused(headers, parts, expected):
    """Without parts nothing comes at all: what the headers say is enough."""
    assert code(read_body(request(parts or [], ends=parts is not None, **headers), 10, LONG)) == expected


def test_nothing_is_read_past_the_limit():
    taken = []

    async def receive():
        taken.append(1)
        return {"type": "http.request", "body": b"x" * 4, "more_body": True}

    assert code(read_body(Request({"type": "http", "headers": []}, receive), 10, LONG)) == (413, "body_too_large")
    assert len(taken) == 3


def test_a_body_that_drips_or_stops_is_timed_out():
    async def receive():
        await asyncio.sleep(0.01)
        return {"type": "http.request", "body": b"x", "more_body": True}

    assert code(read_body(Request({"type": "http", "headers": []}, receive), 1 << 20, 0.1)) == (408, "body_timeout")
    assert code(read_body(request([b"[1"], ends=False), 1 << 20, 0.1)) == (408, "body_timeout")


def test_a_client_that_goes():
    assert code(read_body(request([b"[1"], ends=None), 100, LONG)) == (400, "body_incomplete")


# ---- what it says ----

BAD = {
    "nothing": (b"", "json_empty"),
    "blanks": (b" \t\r\n" * 9, "json_empty"),
    "a byte order mark": (b"\xef\xbb\xbf[]", "json_bom"),
    "UTF-16 with a mark": ("[]".encode("utf-16"), "json_encoding"),
    "UTF-16": ("[1, 2]".encode("utf-16-be"), "json_encoding"),
    "UTF-32": ("[1, 2]".encode("utf-32-le"), "json_encoding"),
    "latin-1": ('["caf\u00e9"]'.encode("latin-1"), "json_encoding"),
    "half a pair, raw": (b'["\xed\xa0\x80"]', "json_encoding"),
    "an overlong slash": (b'["\xc0\xaf"]', "json_encoding"),
    "a cut character": ('["\u20ac'.encode()[:-1], "json_encoding"),
    "half a pair": (b'["\\ud83d"]', "json_surrogate"),
    "the other half": (b'["\\ude00 x"]', "json_surrogate"),
    "a half in a key": (b'{"\\ud83d": 1}', "json_surrogate"),
    "NaN": (b'{"a": NaN}', "json_constant"),
    "Infinity": (b"[Infinity]", "json_constant"),
    "minus Infinity": (b"[-Infinity]", "json_constant"),
    "nan": (b"[nan]", "json_constant"),
    "too large a number": (b"[1e999]", "json_number"),
    "too many digits": (b"[" + b"9" * 400 + b"]", "json_number"),
    "a key twice": (b'{"a": 1, "b": {}, "a": 1}', "json_duplicate_key"),
    "a key twice, inside": (b'[{"x": {"\\u0061": 1, "a": ":"}}]', "json_duplicate_key"),
    "a comma at the end of a list": (b"[1,]", "json_trailing"),
    "a comma at the end of an object": (b'{"a": 1,}', "json_trailing"),
    "two values": (b"[1] [2]", "json_trailing"),
    "NUL behind it": (b"[1]\0", "json_trailing"),
    "a cut object": (b'{"a": 1', "json_syntax"),
    "a cut string": (b'["a', "json_syntax"),
    "a string that ends in a backslash": (b'["a\\', "json_syntax"),
    "single quotes": (b"{'a': 1}", "json_syntax"),
    "a comment": (b"[1 /* one */]", "json_syntax"),
    "a leading zero": (b"[01]", "json_syntax"),
    "a plus": (b"[+1]", "json_syntax"),
    "a control character": (b'["a\nb"]', "json_syntax"),
    "brackets that do not fit": (b"[1}", "json_syntax"),
    "an escape that is none": (b'["\\x41"]', "json_syntax"),
    "a form": (b"prompt=a&responses=b", "json_syntax"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_json(name):
    data, expected = BAD[name]
    assert code(parse_json, data, LIMITS) == (400, expected)


@pytest.mark.parametrize("name", [name for name, (data, _) in BAD.items() if b"u0061" not in data])
def test_errors_say_nothing_of_what_was_written(name):
    """Beside a place."""
    with pytest.raises(ApiError) as caught:
        parse_json(BAD[name][0].replace(b"a", b"secret"), LIMITS)
    assert "secret" not in caught.value.message and len(caught.value.message) < 120


@pytest.mark.parametrize(
    "text",
    [
        '{"a": "}{][,:", "b\\"": ["\\\\", "\\\\\\"", "\\\\\\\\"], "c": {"a": {"a": {}}}}',
        '["[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[["]',
        '"NaN"',
        "-0",
        "null",
        '["\\ud83d\\ude00", "\U0001f600"]',
        " [ 1 , 2.5e3 , true , false , null ] ",
        '{"": 1, " ": 2}',
    ],
)
def test_what_is_json(text):
    assert parse_json(text.encode(), LIMITS) == json.loads(text)


@pytest.mark.parametrize(
    "number", [2**63 - 1, 2**63, 2**64 - 1, 2**64, 10**20, -(2**63), -(2**63) - 1, -(10**30), 1e20, 1e22, -1e300, 0.1]
)
def test_numbers_are_what_was_written(number):
    """To the type: 1e+20 stands in a prompt otherwise than 100000000000000000000."""
    for text in (json.dumps(number), json.dumps({"9" * 30: [1, number, "1e5", 2.5]})):
        found = parse_json(text.encode(), LIMITS)
        assert repr(found) == repr(json.loads(text))


def test_an_integer_that_nobody_reads_is_refused():
    assert parse_json(b"[" + b"9" * 200 + b"]", LIMITS) == [10**200 - 1]
    assert code(parse_json, b"[" + b"9" * 5000 + b"]", LIMITS) == (400, "json_number")


def test_depth_is_counted_as_it_nests():
    limits = Limits(depth=3)
    for good in (b"[[[1]],[[2]],[[3]]]", b'{"a":{"b":[]}}', b'[[["[[[["]]]'):
        parse_json(good, limits)
    for bad in (b"[[[[1]]]]", b'[{"a":[{}]}]', b"[" * 100_000, b'{"a":' * 30_000, b"[" * 5000 + b"]" * 5000, b'[[[["'):
        assert code(parse_json, bad, Limits(depth=3, values=400_000)) == (400, "json_depth")


def test_no_decoder_sees_what_is_too_deep_or_too_wide(monkeypatch):
    import orjson

    monkeypatch.setattr(orjson, "loads", lambda _: pytest.fail("decoded"))
    assert code(parse_json, b"[" * 90_000 + b"]" * 90_000, LIMITS) == (400, "json_depth")
    assert code(parse_json, b"[" * 200_000, LIMITS) == (413, "json_values")


@pytest.mark.parametrize(
    "unit", [b"1,", b'"",', b'{"a":1},', b"[],", b"[", b'"', b",", b":", b"{", b"]", b"1", b"x"], ids=repr
)
@pytest.mark.parametrize("times", [3, 1 << 19])
def test_values_are_counted(unit, times, monkeypatch):
    """In bodies of a few bytes, and of more than are looked through at once."""
    import orjson

    monkeypatch.setattr(orjson, "loads", lambda _: pytest.fail("decoded"))
    limits = Limits(values=2, depth=10) if times == 3 else Limits(values=10_000)
    if times == 3 and unit in (b"]", b"1", b"x"):
        times = 100
    assert code(parse_json, b"[" + unit * times, limits) == (413, "json_values")


def test_as_many_values_as_are_allowed():
    assert len(parse_json(b"[" + b"1," * 98 + b"1]", Limits(values=99))) == 99
    assert code(parse_json, b"[" + b"1," * 99 + b"1]", Limits(values=99)) == (413, "json_values")
    assert parse_json(b'{"a": ["b"]}', Limits(values=5)) == {"a": ["b"]}
    assert code(parse_json, b'{"a": ["b"]}', Limits(values=4)) == (413, "json_values")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-99, 99) | st.text('a"\\[]{},:\u00e9\n', max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text('a"\\:{', max_size=3), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(VALUES, st.booleans(), st.sampled_from([1, 2, 3, 7, 1 << 18]))
def test_strings_are_stepped_over_wherever_a_block_ends(value, ascii_only, block):
    """Depth and number are those of the value, however its text is cut, escapes and quotes included."""
    before, body._BLOCK = body._BLOCK, block
    text = json.dumps(value, ensure_ascii=ascii_only).encode()
    depth, count = measured(value)
    try:
        exact = Limits(depth=max(depth, 1), values=max(count, 1))
        assert parse_json(text, exact) == value
        if depth > 1:
            assert code(parse_json, text, Limits(depth=depth - 1, values=count))[1] == "json_depth"
        if count > 1:
            assert code(parse_json, text, Limits(depth=depth + 1, values=count - 1))[1] == "json_values"
    finally:
        body._BLOCK = before


def measured(value):
    """(how deep a value is nested, how many strings, brackets, commas and colons it has)."""
    if isinstance(value, str):
        return 0, 1
    if not isinstance(value, (dict, list)):
        return 0, 0
    inner = [measured(one) for one in (value.values() if isinstance(value, dict) else value)]
    count = 1 + max(len(value) - 1, 0) + (2 * len(value) if isinstance(value, dict) else 0)
    return 1 + max((depth for depth, _ in inner), default=0), count + sum(number for _, number in inner)


@pytest.mark.parametrize(
    "text",
    [
        b'["' + b"\\\\" * (1 << 19) + b'"]',
        b'["' + b'\\"' * (1 << 19) + b'"]',
        b'["' + b"A" * (3 << 20) + b'"]',
        b'["' + b'x\\"' * (1 << 19) + b'"]',
        b"[" + b" " * (3 << 20) + b"]",
    ],
    ids=["backslashes", "quotes", "base64", "both", "blanks"],
)
def test_what_is_written_to_be_slow_takes_few_steps(text):
    """Lines of Python, not seconds: their number does not grow with the text's length, but with that of its blocks."""
    steps = 0

    def count(*_):
        nonlocal steps
        steps += 1
        return count

    before = sys.gettrace()
    sys.settrace(count)
    try:
        parse_json(text, LIMITS)
    finally:
        sys.settrace(before)
    assert steps < 500

"""Requests that fail, wait, are too many or are not wanted any more: what `yojo.judges.client` makes of them."""

import _thread
import collections
import email.utils
import http.client
import itertools
import json
import shutil
import signal
import socket
import ssl
import subprocess
import threading
import time
import types

import pytest
from endpoint_cases import KEY, LONG, SILENCE, TWO, Endpoint, blocks_of, by_length, examples, said, until

import yojo
from yojo.judges import EndpointError, client
from yojo.judges.client import is_loopback
from yojo.judges.pool import Pool


class Failing:
    """Fails in these ways, one after the other, then answers."""

    def __init__(self, *ways):
        self.ways = list(ways)

    def __call__(self, body):
        return self.ways.pop(0) if self.ways else by_length(body)


TRANSIENT = [
    (429, {}, "slow down"),
    (500, {}, "oh"),
    (503, {}, ""),
    (408, {}, "late"),
    (409, {}, "busy"),
    "reset",
    "half",
    (200, {}, b"<html>not JSON</html>"),
    (200, {}, b"\xff\xfe"),
    (200, {}, {"error": {"message": "overloaded"}}),
    (200, {}, {"choices": []}),
    (200, {}, {"choices": said("Ranking: A > B")["choices"] * 2}),
    (200, {}, []),
    (200, {}, {"choices": [{"message": {"content": 7}}]}),
]


@pytest.mark.parametrize("way", TRANSIENT, ids=str)
def test_what_may_pass_is_tried_again(way, waits):
    with Endpoint(Failing(way, way)) as endpoint:
        (found,) = endpoint.judge().score_many([TWO])
        assert found.tolist() == [0, 1] and len(endpoint.bodies) == 3
        assert endpoint.bodies[0] == endpoint.bodies[1] == endpoint.bodies[2]
    assert len(waits) == 2 and 0.5 <= waits[0] <= 1 and 1 <= waits[1] <= 2


@pytest.mark.parametrize("way", TRANSIENT, ids=str)
@pytest.mark.parametrize("retries", [0, 2])
def test_retries_are_counted_and_their_end_is_an_error(way, retries, waits):
    with Endpoint(lambda body: way) as endpoint:
        with pytest.raises(
            EndpointError, match=rf"^example 'two': {endpoint.url}: no answer after {retries + 1} tries; the"
        ):
            endpoint.judge(retries=retries).score_many([TWO])
        assert len(endpoint.bodies) == retries + 1 and len(waits) == retries
    assert issubclass(EndpointError, RuntimeError) and not issubclass(EndpointError, ValueError)


def test_waits_double_up_to_a_minute(waits):
    with Endpoint(lambda body: (500, {}, "")) as endpoint, pytest.raises(EndpointError, match="status 500: no word"):
        endpoint.judge(retries=9).score_many([TWO])
    full = [min(60, 2**n) for n in range(9)]
    assert all(whole / 2 <= wait <= whole for wait, whole in zip(waits, full, strict=True))
    assert len(set(wait / whole for wait, whole in zip(waits, full, strict=True))) == 9


def test_servers_say_how_long_to_wait(waits, monkeypatch):
    now = 1.8e9
    monkeypatch.setattr(client, "time", types.SimpleNamespace(time=lambda: now))
    at, past = (email.utils.formatdate(now + seconds, usegmt=True) for seconds in (90, -90))
    ways = [(429, {"Retry-After": text}, "") for text in ("7", "0.2", at, past, "soon")]
    with Endpoint(Failing(*ways)) as endpoint:
        assert endpoint.judge().score_many([TWO])[0].tolist() == [0, 1]
    assert waits[0] == 7 and 1 <= waits[1] <= 2 and waits[2] == 90 and 4 <= waits[3] <= 8 and 8 <= waits[4] <= 16
    with Endpoint(lambda body: (429, {"Retry-After": "86400"}, "quota\nis spent")) as endpoint:
        with pytest.raises(
            EndpointError, match="asks to wait 86400 seconds, more than 600; status 429: quota is spent"
        ):
            endpoint.judge().score_many([TWO])
        assert len(endpoint.bodies) == 1


@pytest.mark.parametrize(
    "status, error, message",
    [
        (400, ValueError, "the request is refused, status 400: no, no ..."),
        (413, ValueError, "the request is refused, status 413"),
        (422, ValueError, "the request is refused, status 422"),
        (401, EndpointError, r"status 401: .*\(is api_key, or OPENAI_API_KEY, the right one\?\)"),
        (403, EndpointError, "status 403: no, no"),
        (404, EndpointError, r"status 404: .*\(are url and model right\?\)"),
        (302, EndpointError, r"status 302: .*it points to http://elsewhere/; give that address"),
        (204, EndpointError, "status 204"),
    ],
)
def test_what_would_be_refused_again_is_not_tried_again(status, error, message, waits):
    text = "no,\n no\r\n" + " ..." * 200
    with Endpoint(lambda body: (status, {"Location": "http://elsewhere/"} if status == 302 else {}, text)) as endpoint:
        with pytest.raises(error, match=message) as caught:
            endpoint.judge().score_many([TWO])
        assert len(endpoint.bodies) == 1 and not waits
    said = str(caught.value)
    assert said.startswith(f"example 'two': {endpoint.url}: ") and "\n" not in said and len(said) < 500


def test_replies_without_end(waits, monkeypatch):
    whole = json.dumps(said("Ranking: A > B"))
    with Endpoint(lambda body: whole.encode()) as endpoint:
        monkeypatch.setattr(client, "LARGEST", len(whole))
        assert endpoint.judge(retries=0).score_many([TWO])[0].tolist() == [1, 0]
        monkeypatch.setattr(client, "LARGEST", len(whole) - 1)
        with pytest.raises(EndpointError, match=f"a reply of more than {len(whole) - 1} bytes"):
            endpoint.judge(retries=0).score_many([TWO])


def test_timeouts(monkeypatch):
    with Endpoint(Failing("silence")) as endpoint:
        judge = endpoint.judge(timeout=0.2)

        def pause(stop, seconds):
            """The server has read the first request by the time that the second one comes, which may take as long as it takes."""
            assert until(lambda: endpoint.bodies)
            judge.client.timeout = LONG

        monkeypatch.setattr(client, "pause", pause)
        start = time.monotonic()
        assert judge.score_many([TWO])[0].tolist() == [0, 1]
        assert len(endpoint.bodies) == 2 and 0.2 < time.monotonic() - start < LONG
    with Endpoint(lambda body: "silence") as endpoint, pytest.raises(EndpointError, match="2 tries.*timed out"):
        endpoint.judge(timeout=0.1, retries=1).score_many([TWO])


def test_nobody_there(waits):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match="example 'two': .*no answer after 3 tries; the last one: .*refused"):
            yojo.judges.Generative(url, "m", retries=2).score_many([TWO])
    assert len(waits) == 2


def test_an_example_whose_request_is_refused_and_one_that_cannot_be_shown():
    bad = yojo.Example("q", ["a", "b"], images=["nowhere.png"], id="bad")

    def rule(body):
        return (400, {}, "too long") if "q1" in blocks_of(body)[0][0][1] else by_length(body)

    with Endpoint(rule) as endpoint:
        judge = endpoint.judge()
        found = dict(judge.score_each([*examples(3), bad, TWO], errors="return"))
        assert sorted(found) == [0, 1, 2, 3, 4] and found[4].tolist() == [0, 1]
        assert type(found[1]) is ValueError and str(found[1]).startswith("example 1: ") and "too long" in str(found[1])
        assert type(found[3]) is ValueError and str(found[3]) == "example 'bad': image 0: no such file: nowhere.png"
        with pytest.raises(ValueError, match="example 'bad': image 0: no such file"):
            judge.score_many([TWO, bad])
        with pytest.raises(ValueError, match="errors must be 'raise' or 'return', got 'skip'"):
            judge.score_each([], errors="skip")
    with Endpoint(lambda body: (404, {}, "")) as endpoint, pytest.raises(EndpointError):
        list(endpoint.judge().score_each([TWO], errors="return"))  # which is no fault of the example


# ---- many at once ----


@pytest.mark.parametrize("style", ["listwise", "pairwise", "pointwise"])
def test_scores_are_the_same_for_every_concurrency(style):
    many = examples(20)
    found = []
    for concurrency in (1, 3, 16):
        with Endpoint(by_length) as endpoint:
            scores = endpoint.judge(style=style, concurrency=concurrency).score_many(iter(many))
            found.append([one.tolist() for one in scores])
            assert endpoint.most <= concurrency
    assert found[0] == found[1] == found[2] and len(found[0]) == 20


@pytest.mark.parametrize("style, count", [("listwise", 12), ("pairwise", 1)])
def test_so_many_requests_are_under_way_and_not_one_more(style, count):
    """All of four must be there at once for any to be answered; a fifth would be seen. One example has 10 pairs."""
    together, numbers = threading.Barrier(4), itertools.count()

    def rule(body):
        if next(numbers) < 8:  # the last ones may be fewer
            together.wait(LONG)
        return by_length(body)

    many = [yojo.Example(f"q{n}", ["a", "bb", "ccc", "dddd", "eeeee"]) for n in range(count)]
    with Endpoint(rule) as endpoint:
        found = endpoint.judge(style=style, concurrency=4).score_many(many)
        assert [one.tolist() for one in found] == [[0, 1, 2, 3, 4]] * count
        assert endpoint.most == 4


def test_several_threads_share_the_bound():
    together, numbers = threading.Barrier(3), itertools.count()

    def rule(body):
        if next(numbers) < 3:
            together.wait(LONG)
        time.sleep(0.01)  # in which a fourth one would come
        return by_length(body)

    with Endpoint(rule) as endpoint:
        judge, found = endpoint.judge(concurrency=3), {}

        def score(n):
            found[n] = [one.tolist() for one in judge.score_many(examples(8))]

        threads = [threading.Thread(target=score, args=(n,)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(found) == 4 and all(one == found[0] for one in found.values())
        assert endpoint.most == 3 and len(endpoint.bodies) == 32 and sum(judge.seen.values()) == 32


def test_examples_are_read_a_few_ahead():
    read, at_first = [], []

    def rule(body):
        until(lambda: len(read) >= 4 + 2)
        if not at_first:
            time.sleep(0.05)  # in which more would be read
            at_first.append(len(read))
        return by_length(body)

    def source():
        for example in examples(40):
            read.append(example)
            yield example

    with Endpoint(rule) as endpoint:
        found = list(endpoint.judge(concurrency=4).score_each(source()))
    assert sorted(place for place, _ in found) == list(range(40)) and at_first[0] == 4 + 2


def test_what_is_ready_is_given_at_once():
    slow = threading.Event()

    def rule(body):
        if "q0" in blocks_of(body)[0][0][1]:
            slow.wait(LONG)
        return by_length(body)

    with Endpoint(rule) as endpoint:
        stream = endpoint.judge(concurrency=2).score_each(examples(6))
        first = [next(stream)[0] for _ in range(3)]
        assert 0 not in first
        slow.set()
        assert sorted(first + [place for place, _ in stream]) == list(range(6))


# ---- nobody waits any more ----


def ended(threads):
    """Whether they end, before a server would end its silence."""
    return until(lambda: not any(t.is_alive() for t in threads))


def requesting():
    return [t for t in threading.enumerate() if t.name == "yojo requests"]


def test_ctrl_c_ends_what_is_under_way():
    came, main = threading.Semaphore(0), threading.get_ident()

    def rule(body):
        came.release()
        return "silence"

    def interrupt():
        for _ in range(3):
            came.acquire(timeout=LONG)
        signal.pthread_kill(main, signal.SIGINT)

    with Endpoint(rule) as endpoint:
        judge = endpoint.judge(concurrency=3)
        threading.Thread(target=interrupt, daemon=True).start()
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            judge.score_many(examples(10))
        assert time.monotonic() - start < LONG < SILENCE
        assert ended(requesting())  # though the server says nothing, and timeout is minutes
        assert len(endpoint.bodies) == 3
        endpoint.rule = by_length
        assert judge.score_many([TWO])[0].tolist() == [0, 1]  # nothing is held


def test_an_error_ends_the_others_and_waits_end_too():
    def rule(body):
        return (401, {}, "no") if "q3" in blocks_of(body)[0][0][1] else (429, {"Retry-After": "500"}, "wait")

    with Endpoint(rule) as endpoint:
        start = time.monotonic()
        with pytest.raises(EndpointError, match="example 3: .*status 401"):
            endpoint.judge(concurrency=4).score_many(examples(8))
        assert ended(requesting()) and time.monotonic() - start < LONG  # and not the 500 seconds that were asked for


def test_whoever_stops_reading_ends_it():
    with Endpoint(by_length) as endpoint:
        stream = endpoint.judge(concurrency=2).score_each(examples(50))
        next(stream)
        stream.close()
        assert ended(requesting()) and len(endpoint.bodies) < 20


def test_a_stop_that_came_first_lets_nothing_through():
    stop = client.Stop()
    stop.set()
    with Endpoint(by_length) as endpoint, pytest.raises(client.Stopped):
        endpoint.judge().client.post("/chat/completions", {}, stop)
    assert not endpoint.bodies
    with pytest.raises(client.Stopped), stop.shuts(None):
        raise AssertionError("a socket that came too late")


def test_pool_hands_over_whatever_is_raised():
    pool = Pool(2)
    pool.give("a", lambda: 1 / 0)
    pool.give("b", _thread.get_ident)
    assert requesting() and all(thread.daemon for thread in requesting())  # none holds up the end of a program
    found = {tag: (value, error) for tag, value, error in (pool.take(), pool.take())}
    assert isinstance(found["a"][1], ZeroDivisionError) and found["b"][0] != threading.get_ident()
    pool.close()
    assert ended(requesting())


# ---- ways through the network ----


def test_loopback():
    for host in ("localhost", "a.localhost", "127.0.0.1", "127.9.9.9", "::1"):
        assert is_loopback(host), host
    for host in ("example.org", "10.0.0.1", "localhost.example.org", "::2"):
        assert not is_loopback(host), host


def to(url):
    return client.Client(url, "", timeout=5.0, retries=0, concurrency=1)


@pytest.mark.parametrize(
    "url, host, port, path",
    [
        ("http://h/v1/", "h", 80, "/v1"),
        ("https://h.example/api/v1", "h.example", 443, "/api/v1"),
        ("http://[::1]/v1", "::1", 80, "/v1"),
        ("http://[::1]:8000", "::1", 8000, ""),
    ],
)
def test_addresses(url, host, port, path, no_proxies):
    connection, before, headers = to(url)._connection()
    assert (connection.host, connection.port, before, headers) == (host, port, path, {})


@pytest.fixture()
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "no_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    return monkeypatch


def test_proxies_are_for_others_than_this_machine(no_proxies, waits):
    with Endpoint(by_length) as endpoint:
        no_proxies.setenv("http_proxy", "http://127.0.0.1:9")  # where nobody is
        assert endpoint.judge().score_many([TWO])[0].tolist() == [0, 1]
        no_proxies.setenv("http_proxy", f"http://me:p%40ss@127.0.0.1:{endpoint.server.server_port}")
        far = yojo.judges.Generative("http://judge.invalid/v1", "m", api_key=KEY)
        assert far.score_many([TWO])[0].tolist() == [0, 1]
        assert endpoint.paths == ["/v1/chat/completions", "http://judge.invalid/v1/chat/completions"]
        assert endpoint.headers[1]["Proxy-Authorization"] == "Basic bWU6cEBzcw=="
        assert endpoint.headers[1]["Host"] == "judge.invalid"
        no_proxies.setenv("no_proxy", "judge.invalid")
        with pytest.raises(EndpointError, match="no answer after 1 tries"):
            yojo.judges.Generative("http://judge.invalid/v1", "m", retries=0).score_many([TWO])
        no_proxies.delenv("no_proxy")
        no_proxies.setenv("http_proxy", "socks5://127.0.0.1:9")
        with pytest.raises(EndpointError, match="the proxy of the environment for http must be an http:// address"):
            far.score_many([TWO])


def test_ways_through_proxies(no_proxies):
    no_proxies.setenv("http_proxy", "proxy.invalid")
    no_proxies.setenv("https_proxy", "http://me@proxy.invalid:3128")
    connection, before, headers = to("http://h/v1")._connection()
    assert (connection.host, connection.port, before, headers) == ("proxy.invalid", 80, "http://h/v1", {})
    connection, before, headers = to("https://h/v1")._connection()
    assert (connection.host, connection.port, before, headers) == ("proxy.invalid", 3128, "/v1", {})
    # The login is for the proxy alone, and the request goes through a tunnel that it cannot look into.
    assert (connection._tunnel_host, connection._tunnel_port) == ("h", 443)
    assert connection._tunnel_headers["Proxy-Authorization"] == "Basic bWU6"
    assert isinstance(connection, http.client.HTTPSConnection)


def test_https_is_spoken_to_https(no_proxies, waits):
    """A server that does not speak TLS is no answer, and a key is never sent to it in the clear."""
    with Endpoint(by_length) as endpoint:
        judge = yojo.judges.Generative(endpoint.url.replace("http", "https"), "m", retries=1, timeout=LONG, api_key=KEY)
        with pytest.raises(EndpointError, match="no answer after 2 tries.*SSL"):
            judge.score_many([TWO])
        assert not endpoint.bodies


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """A server's `ssl.SSLContext`, and the file of its certificate, which nobody knows."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl that makes a certificate")
    folder = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=localhost -addext"
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    subprocess.run(["openssl", *words.split(), "subjectAltName=IP:127.0.0.1", *files], check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context, str(folder / "cert.pem")


def test_certificates_are_looked_at(certificate, monkeypatch, waits):
    context, file = certificate
    with Endpoint(by_length, context) as endpoint:
        with pytest.raises(EndpointError, match="CERTIFICATE_VERIFY_FAILED"):
            endpoint.judge().score_many([TWO])
        assert not endpoint.bodies and not waits  # the next one would be the same
        monkeypatch.setenv("SSL_CERT_FILE", file)
        assert endpoint.judge().score_many([TWO])[0].tolist() == [0, 1]
        assert endpoint.headers[0]["Authorization"] == f"Bearer {KEY}"


def test_requests_over_https_end_when_nobody_waits(certificate, monkeypatch):
    context, file = certificate
    monkeypatch.setenv("SSL_CERT_FILE", file)

    def rule(body):
        if "q1" in blocks_of(body)[0][0][1]:
            until(lambda: endpoint.here == 3)
            return (401, {}, "no")
        endpoint.ended.wait(SILENCE)
        return by_length(body)

    with Endpoint(rule, context) as endpoint:
        with pytest.raises(EndpointError, match="status 401"):
            endpoint.judge(concurrency=3).score_many(examples(3))
        assert ended(requesting())


def test_the_demand_is_one_request_for_each(waits):
    """Retries of one request do not ask for another again."""
    counts = collections.Counter()

    def rule(body):
        prompt = blocks_of(body)[0][0][1]
        counts[prompt] += 1
        return (500, {}, "") if counts[prompt] <= int(prompt[1:]) % 3 else by_length(body)

    with Endpoint(rule) as endpoint:
        endpoint.judge().score_many(examples(9))
    assert counts == {f"q{n}": 1 + n % 3 for n in range(9)}

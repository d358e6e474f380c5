"""Images from other hosts: only from those that are allowed, at addresses that are, in bounded time and bytes."""

import contextlib
import shutil
import socket
import ssl
import subprocess
import threading

import pytest

from yojo.serving.errors import ApiError
from yojo.serving.fetching import allowed_hosts, fetch

LONG = 60.0  # seconds that no test takes
MOST = 10_000
OK = b"HTTP/1.1 200 OK\r\n"


class Away:
    """A server on this machine that sends what it is told, and stands for the internet.

    Args:
        reply: bytes; or function (connection, ended) -> None, which sends.
        tls: `ssl.SSLContext`; or None.

    Attributes:
        requests: bytes of those that came.
        asked: (host, port) of all look-ups.
    """

    def __init__(self, reply, tls=None):
        self.reply, self.tls, self.requests, self.asked, self.ended = reply, tls, [], [], threading.Event()

    def __enter__(self):
        self.server = socket.create_server(("127.0.0.1", 0))
        self.port = self.server.getsockname()[1]
        self.thread = threading.Thread(target=self._serve, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.ended.set()
        with contextlib.suppress(OSError):
            self.server.shutdown(socket.SHUT_RDWR)
        self.server.close()
        self.thread.join(LONG)

    def _serve(self):
        while not self.ended.is_set():
            try:
                connection, _ = self.server.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), connection:
                connection.settimeout(LONG)
                if self.tls:
                    connection = self.tls.wrap_socket(connection, server_side=True)
                request = b""
                while b"\r\n\r\n" not in request and (part := connection.recv(4096)):
                    request += part
                self.requests.append(request)
                if callable(self.reply):
                    self.reply(connection, self.ended)
                else:
                    connection.sendall(self.reply)
                connection.close()

    def lookup(self, host, port, **_):
        """Every name is this server's."""
        self.asked.append((host, port))
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", self.port))]

    def fetch(self, path="/cat.png", most=MOST, seconds=LONG, tls=None, scheme="http"):
        hosts = allowed_hosts([f"private:images.example:{self.port}"])
        return fetch(f"{scheme}://images.example:{self.port}{path}", hosts, most, seconds, self.lookup, tls)


def refused(*arguments, **options):
    with pytest.raises(ApiError) as caught:
        fetch(*arguments, **options)
    assert caught.value.status == (413 if caught.value.code == "image_too_large" else 422)
    assert "example" not in caught.value.message and "secret" not in caught.value.message
    return caught.value.code


def refused_by(away, **options):
    with pytest.raises(ApiError) as caught:
        away.fetch(**options)
    assert "example" not in caught.value.message and "secret" not in caught.value.message
    return caught.value.code


@pytest.mark.parametrize(
    "reply",
    [
        OK + b"Content-Length: 5\r\n\r\nhello",
        OK + b"\r\nhello",
        b"HTTP/1.0 200 OK\r\nContent-Type: text/html\r\n\r\nhello",
        OK + b"Transfer-Encoding: chunked\r\n\r\n2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n",
        OK + b"Content-Encoding: identity\r\nContent-Length: 5\r\n\r\nhello and more",
        b"HTTP/1.1 100 Continue\r\n\r\n" + OK + b"Content-Length: 5\r\n\r\nhello",
    ],
)
def test_an_image_is_fetched(reply):
    with Away(reply) as away:
        assert away.fetch("/cat.png?secret=1#part") == b"hello"
        assert away.requests[0].startswith(b"GET /cat.png?secret=1 HTTP/1.1\r\n")
        assert f"Host: images.example:{away.port}\r\n".encode() in away.requests[0]
        assert away.asked == [("images.example", away.port)]  # once: what it means later, nobody asks


def test_nothing_of_this_machine_is_sent(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with Away(OK + b"Set-Cookie: a=secret\r\nContent-Length: 2\r\n\r\nhi") as away:
        assert away.fetch() == away.fetch() == b"hi"
        for request in away.requests:
            names = {line.partition(b":")[0] for line in request.split(b"\r\n")[1:] if line}
            assert names == {b"Host", b"Accept", b"Accept-Encoding", b"User-Agent", b"Connection"}


@pytest.mark.parametrize(
    "reply, code",
    [
        *(
            (f"HTTP/1.1 {n} No\r\nLocation: http://127.0.0.1/\r\n\r\n".encode(), "image_redirect")
            for n in (301, 302, 307)
        ),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\nhi", "image_fetch"),
        (b"HTTP/1.1 206 Partial\r\nContent-Length: 2\r\n\r\nhi", "image_fetch"),
        (b"HTTP/1.1 500 secret\r\n\r\n", "image_fetch"),
        (OK + b"Content-Encoding: gzip\r\nContent-Length: 2\r\n\r\nhi", "image_fetch"),
        (OK + b"Content-Length: 10001\r\n\r\n", "image_too_large"),
        (OK + b"\r\n" + bytes(MOST + 1), "image_too_large"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n2711\r\n" + bytes(MOST + 1) + b"\r\n0\r\n\r\n", "image_too_large"),
        (OK + b"Content-Length: 9\r\n\r\nhello", "image_fetch"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n9\r\nhello", "image_fetch"),
        (OK + b"Transfer-Encoding: chunked\r\n\r\n" + (b"1;" + b"e" * 20_000 + b"\r\nx\r\n") * 9, "image_fetch"),
        (OK + b"A: b\r\n" * 1000 + b"\r\n", "image_fetch"),
        (OK + b"A: " + b"b" * 100_000 + b"\r\n\r\n", "image_fetch"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 20_000, "image_fetch"),
        (b"220 secret.example ESMTP\r\n", "image_fetch"),
        (b"", "image_fetch"),
    ],
)
def test_replies_that_are_refused(reply, code):
    with Away(reply) as away:
        assert refused_by(away) == code


def test_a_host_that_drips_has_no_longer_than_one_that_is_silent():
    def drip(connection, ended):
        connection.sendall(OK)
        for _ in range(500):  # a byte of a header now and then keeps every single read from timing out
            connection.sendall(b"a")
            ended.wait(0.01)

    for reply in (drip, lambda connection, ended: ended.wait(LONG)):
        with Away(reply) as away:
            assert refused_by(away, seconds=0.3) == "image_fetch_timeout"


@pytest.mark.parametrize(
    "address",
    """127.0.0.1 127.9.9.9 0.0.0.0 0.1.2.3 10.0.0.1 172.16.0.1 192.168.1.1 169.254.169.254 100.64.0.1 192.0.0.8 198.18.0.1
    224.0.0.1 239.1.1.1 240.0.0.1 255.255.255.255 ::1 :: ::7f00:1 ::ffff:127.0.0.1 ::ffff:10.0.0.1 ::ffff:169.254.169.254
    fe80::1 fe80::1%lo fc00::1 fd00:ec2::254 fec0::1 ff02::1 2002:7f00:1:: 2002:a9fe:a9fe:: 64:ff9b::7f00:1
    64:ff9b::a00:1 64:ff9b:1::1 2001:0:7f00:1::1 2001:db8::1 nonsense""".split(),
)
def test_addresses_that_are_not_public_are_refused(address, monkeypatch):
    """Of a host that anybody may be, also where only one of its addresses is such."""
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("connected"))

    def lookup(host, port, **_):
        good = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("93.184.216.34", port))
        return [
            good,
            (socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port)),
        ]

    assert refused("http://images.example/", allowed_hosts(["*"]), MOST, LONG, lookup) == "image_host"


@pytest.mark.parametrize("address", ["169.254.169.254", "::ffff:169.254.169.254", "0.0.0.0", "224.0.0.1", "fe80::1"])
def test_some_addresses_are_refused_although_private_ones_are_allowed(address, monkeypatch):
    monkeypatch.setattr(socket, "socket", lambda *_, **__: pytest.fail("connected"))

    def lookup(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port))]

    hosts = allowed_hosts(["private:images.example"])
    assert refused("http://images.example/", hosts, MOST, LONG, lookup) == "image_host"


class Connected(Exception):
    pass


@pytest.mark.parametrize(
    "address", ["93.184.216.34", "2606:2800:220:1::1", "64:ff9b::5db8:d822", "::ffff:93.184.216.34"]
)
def test_public_addresses_are_connected_to(address, monkeypatch):
    def connect(self, to):
        raise Connected(to)

    class Socket(socket.socket):
        pass

    Socket.connect = connect
    monkeypatch.setattr(socket, "socket", Socket)

    def lookup(host, port, **_):
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", (address, port))]

    with pytest.raises(Connected, match=address):
        fetch("http://images.example/", allowed_hosts(["*"]), MOST, LONG, lookup)


URLS = """http://allowed.example@evil.example/ http://user:secret@allowed.example/ http://evil.example\\@allowed.example/
http:///cat.png http:// http://[::1/ http://[fe80::1%25lo]/ http://2130706433/ http://0x7f000001/ http://0177.0.0.1/
http://127.1/ http://0x7f.0.0.1/ http://127.0.0.0x1/ http://1.2.3.256/ http://allowed.example:0/ http://allowed.example:99999/
http://allowed.example:80:80/ http://%61llowed.example/ http://allowed..example/ http://.allowed.example/
http://allowed.example/caf\u00e9 http://\u0430llowed.example/ http://\u2460\u2461\u2466.0.0.1/ http:/allowed.example/ http:allowed.example
ftp://allowed.example/ file:///etc/passwd""".split()
URLS += [f"http://allowed.example/{bad}" for bad in ("a b", "a\r\nX: b", "a\tb", "\0", "x" * 5000)]
URLS += ["http://allowed.example\r\n/", "http://allowed.example /", " http://allowed.example/"]


@pytest.mark.parametrize("url", URLS)
def test_urls_that_can_be_misread_are_refused(url):
    def lookup(*_, **__):
        pytest.fail("looked up")

    hosts = allowed_hosts(["allowed.example", "*", "private:127.0.0.1", "private:localhost"])
    assert refused(url, hosts, MOST, LONG, lookup) == "image_url"


@pytest.mark.parametrize(
    "entry, taken, others",
    [
        (
            "example.org",
            "example.org EXAMPLE.org example.org. example.org:443",
            "a.example.org example.org:81 xexample.org",
        ),
        ("Example.org:8443", "example.org:8443", "example.org example.org:443"),
        ("*.example.org", "a.example.org b.a.example.org", "example.org aexample.org example.org.evil"),
        ("*", "anything.example 93.184.216.34 [2606:2800::1]", "anything.example:22"),
        ("93.184.216.34", "93.184.216.34", "93.184.216.35"),
        ("[2606:2800:0::1]", "[2606:2800::1] [2606:2800:0:0:0:0:0:1]", "[2606:2800::2]"),
    ],
)
def test_which_hosts_an_entry_allows(entry, taken, others):
    def lookup(*_, **__):
        raise socket.gaierror("looked up")

    for names, code in ((taken, "image_fetch"), (others, "image_host")):
        for name in names.split():
            assert refused(f"http://{name}/", allowed_hosts([entry]), MOST, LONG, lookup) == code, name
    assert refused(f"http://{taken.split()[0]}/", (), MOST, LONG, lookup) == "image_host"


@pytest.mark.parametrize(
    "entry",
    ["", "http://example.org", "example.org/", "private:*", "a*", "*.*", "[::g]", "a:0", "a:99999", "a b", "u@a"],
)
def test_entries_that_say_nothing_are_refused(entry):
    with pytest.raises(ValueError, match="allowed host|IPv6|Only hex|At least"):
        allowed_hosts([entry])


def test_the_next_address_is_tried():
    with Away(OK + b"\r\nhello") as away:
        closed = socket.create_server(("127.0.0.1", 0))
        port = closed.getsockname()[1]
        closed.close()

        def lookup(host, port_, **_):
            one = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))
            return [one, *away.lookup(host, port_)]

        hosts = allowed_hosts(["private:images.example"])
        assert fetch("http://images.example/", hosts, MOST, LONG, lookup) == b"hello"
        assert b"Host: images.example\r\n" in away.requests[0]

        def none(host, port_, **_):
            return lookup(host, port_)[:1]

        assert refused("http://images.example/", hosts, MOST, LONG, none) == "image_fetch"
        assert refused("http://images.example/", hosts, MOST, LONG, lambda *_, **__: []) == "image_fetch"


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """(a server's context, the file of its certificate, which is for images.example)."""
    if shutil.which("openssl") is None:
        pytest.skip("no openssl that makes a certificate")
    folder = tmp_path_factory.mktemp("tls")
    files = ["-keyout", str(folder / "key.pem"), "-out", str(folder / "cert.pem")]
    words = "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=test -addext"
    command = ["openssl", *words.split(), "subjectAltName=DNS:images.example", *files]
    subprocess.run(command, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "cert.pem", folder / "key.pem")
    return context, folder / "cert.pem"


def test_https_is_verified_against_the_name(certificate):
    server, known = certificate
    trusting = ssl.create_default_context(cafile=known)
    with Away(OK + b"\r\nhello", server) as away:
        assert away.fetch(tls=trusting, scheme="https") == b"hello"
        assert refused_by(away, scheme="https") == "image_fetch"  # nobody has signed it
        hosts = allowed_hosts([f"private:other.example:{away.port}"])
        url = f"https://other.example:{away.port}/"
        assert refused(url, hosts, MOST, LONG, away.lookup, trusting) == "image_fetch"
        assert len(away.requests) == 1 or not any(away.requests[1:])

"""Fetch an image from a host that is allowed, at an address that was checked, in bounded time and bytes.

The name is looked up once, every address it has is checked, and the connection goes to one of these: a name that means
something else a moment later (DNS rebinding) changes nothing. Nothing is followed (redirects), sent (cookies,
credentials, the address of the page) or taken from the environment (proxies).
"""

import dataclasses
import functools
import http.client
import io
import ipaddress
import re
import socket
import ssl
import time

from yojo.serving.errors import ApiError

HEADERS = 1 << 17  # bytes that may come before and between what counts
_URL = re.compile(
    r"(https?)://([a-z0-9._-]+|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?((?:[/?][!-~]*)?)", re.IGNORECASE | re.ASCII
)
_ENTRY = re.compile(
    r"(private:)?(\*|(?:\*\.)?[a-z0-9_-][a-z0-9._-]*|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?", re.IGNORECASE | re.ASCII
)
_PORTS = (80, 443)
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_COMPATIBLE = ipaddress.ip_network("::/96")  # IPv4 addresses as IPv6 ones, long out of use
# Never, whatever is allowed: this host by another name, broadcasts, and where clouds keep the credentials of a machine.
_NEVER = ("is_link_local", "is_multicast", "is_unspecified")
_NEVER_NETWORKS = tuple(map(ipaddress.ip_network, ("0.0.0.0/8", "192.0.0.0/24", "240.0.0.0/4")))
_SHARED = ipaddress.ip_network("100.64.0.0/10")  # private to a provider; Python calls it neither private nor global


@dataclasses.dataclass(frozen=True)
class AllowedHost:
    """An entry of `Settings.allow_hosts`.

    Attributes:
        name: of a host, in small letters; ".example.org" for all below it; "" for any.
        port: the only one; None: 80 and 443.
        private: whether its addresses may be private or loopback ones.
    """

    name: str
    port: int | None
    private: bool

    def takes(self, host, port):
        fits = host.endswith(self.name) and host != self.name if self.name[:1] in ("", ".") else host == self.name
        return fits and (port in _PORTS if self.port is None else port == self.port)


def allowed_hosts(entries):
    """Entries of `Settings.allow_hosts`, read.

    Args:
        entries: strings: "example.org", "example.org:8443", "*.example.org" (every host below it, not itself), "*"
            (any), an IPv4 address or an IPv6 one in brackets. Without a port, 80 and 443 may be asked. Private and
            loopback addresses are refused whoever has them, unless the entry begins with "private:", as
            "private:images.internal:8080".

    Returns:
        tuple of `AllowedHost`.

    Raises:
        ValueError: anything else.
    """
    found = []
    for entry in entries:
        parts = _ENTRY.fullmatch(entry)
        port = int(parts[3]) if parts and parts[3] else None
        if not parts or (parts[1] and parts[2] == "*") or port is not None and not 0 < port < 65536:
            raise ValueError(
                "an allowed host must be a name such as example.org, *.example.org, example.org:8443 or *, with "
                f"private: in front if its address is private, got {entry!r}"
            )
        found.append(AllowedHost(_name(parts[2]).lstrip("*"), port, bool(parts[1])))
    return tuple(found)


def fetch(url, hosts, max_bytes, seconds, lookup=socket.getaddrinfo, tls=None):
    """The bytes behind a URL.

    Args:
        url: str, http or https.
        hosts: tuple of `AllowedHost`.
        max_bytes: more are refused, and not read.
        seconds: for all of it, the look-up left out, which ends when it does.
        lookup: function like `socket.getaddrinfo`.
        tls: `ssl.SSLContext`; None: one with the system's certificates.

    Returns:
        bytes; what they are is not looked at, nor what the server says they are.

    Raises:
        ApiError: image_url (not a URL of that form, or with a user in it), image_host (not allowed, or at a private
            address), image_fetch (no such host, no connection, no certificate, another status than 200, or a
            compressed reply), image_redirect, image_fetch_timeout, image_too_large.
    """
    end = time.monotonic() + seconds
    scheme, host, port, path = _parts(url)
    entries = [entry for entry in hosts if entry.takes(host, port)]
    if not entries:
        raise ApiError(422, "image_host", "images may not be fetched from this host (--allow-url)")
    addresses = _addresses(host, port, lookup)
    if not all(_may_reach(address[4][0], any(entry.private for entry in entries)) for address in addresses):
        raise ApiError(422, "image_host", "images may not be fetched from this host: its address is not a public one")
    try:
        with _connected(addresses, end) as plain:
            if scheme == "http":
                return _reply(plain, host, port, scheme, path, max_bytes, end)
            plain.settimeout(_left(end))
            name = host.strip("[]")
            with (tls or _certificates()).wrap_socket(plain, server_hostname=name) as secured:
                return _reply(secured, host, port, scheme, path, max_bytes, end)
    except TimeoutError:
        raise late() from None
    except (OSError, http.client.HTTPException, ValueError):
        raise _failed("the host did not answer as it should") from None


def late():
    """The error of an image that does not come in time."""
    return ApiError(422, "image_fetch_timeout", "the image could not be fetched in time")


def _failed(what):
    return ApiError(422, "image_fetch", f"the image could not be fetched: {what}")


@functools.lru_cache(1)
def _certificates():
    return ssl.create_default_context()


def _left(end):
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError
    return left


def _name(host):
    """A host as it is compared: small letters, no dot at its end, addresses in their one spelling."""
    host = host.lower()
    if host.startswith("["):
        return f"[{ipaddress.IPv6Address(host[1:-1]).compressed}]"
    return host.removesuffix(".")


def _parts(url):
    """(scheme, host, port, path with query) of a URL."""
    bare = url.partition("#")[0]
    found = _URL.fullmatch(bare) if len(bare) <= 4096 else None
    try:
        host = _name(found[2])
        last = host.rpartition(".")[2]
        if re.fullmatch(r"[0-9]+|0x[0-9a-f]*", last):  # what else could be an address is: 127.1, 0x7f000001, 2130706433
            host = str(ipaddress.IPv4Address(host))
        scheme, port = found[1].lower(), int(found[3] or (443 if found[1].lower() == "https" else 80))
        if not 0 < port < 65536 or any(not 0 < len(label) < 64 for label in host.split(".")) or len(host) > 253:
            raise ValueError
    except (TypeError, ValueError):
        message = "an image's URL must be http(s)://host/..., ASCII, without a user, its host a name or a whole address"
        raise ApiError(422, "image_url", message) from None
    path = found[4] or "/"
    return scheme, host, port, path if path.startswith("/") else f"/{path}"


def _addresses(host, port, lookup):
    try:
        found = lookup(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):
        raise _failed("its host is not known") from None
    found = [one for one in found if one[0] in (socket.AF_INET, socket.AF_INET6)]
    if not found:
        raise _failed("its host is not known")
    return found


def _may_reach(text, private):
    """Whether an address may be connected to: a public one; with `private`, a private or loopback one, too."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    if address.version == 6:
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64 or address in _COMPATIBLE and int(address) > 1:
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if address.teredo:  # a relay's and a client's address: nobody's image is there
            return False
        if inner is not None:
            return _may_reach(str(inner), private)
        if address.scope_id or address.is_site_local:
            return False
    if any(getattr(address, kind) for kind in _NEVER) or any(address in network for network in _NEVER_NETWORKS):
        return False
    if private and (address.is_private or address.is_loopback or address in _SHARED):
        return True
    return address.is_global and not address.is_reserved


def _connected(addresses, end):
    """A socket to the first of the addresses that answers."""
    for i, (family, kind, protocol, _, address) in enumerate(addresses):
        plain = socket.socket(family, kind, protocol)
        try:
            # The last may take all the time there is, the others a part: one that is silent is not the end.
            plain.settimeout(_left(end) / (len(addresses) - i))
            plain.connect(address)
            return plain
        except OSError as error:
            plain.close()
            if i + 1 == len(addresses) or time.monotonic() >= end:
                raise error
    raise OSError("no address")


class _Timed(io.RawIOBase):
    """What a socket receives, until a time and a number of bytes; `http.client` takes it for a socket."""

    def __init__(self, connection, end, most):
        self.connection, self.end, self.most = connection, end, most

    def readable(self):
        return True

    def readinto(self, buffer):
        self.connection.settimeout(_left(self.end))
        count = self.connection.recv_into(buffer)
        self.most -= count
        if self.most < 0:
            raise OSError("more than was allowed")
        return count

    def makefile(self, *_):
        return io.BufferedReader(self)


def _reply(connection, host, port, scheme, path, max_bytes, end):
    connection.settimeout(_left(end))
    usual = port == (443 if scheme == "https" else 80)
    lines = (
        f"GET {path} HTTP/1.1",
        f"Host: {host if usual else f'{host}:{port}'}",
        "Accept: image/*",
        "Accept-Encoding: identity",
        "User-Agent: yojo",
        "Connection: close",
    )
    connection.sendall("\r\n".join((*lines, "", "")).encode("ascii"))
    with http.client.HTTPResponse(_Timed(connection, end, max_bytes + max_bytes // 8 + HEADERS), method="GET") as reply:
        reply.begin()
        if 300 <= reply.status < 400:
            raise ApiError(
                422, "image_redirect", "the image's URL leads to another, and none is followed: give that one"
            )
        if reply.status != 200:
            raise _failed(f"its host answered with status {reply.status}")
        if reply.headers.get("Content-Encoding", "identity").strip().lower() not in ("", "identity"):
            raise _failed("its host sent it compressed")
        if (reply.length or 0) > max_bytes:
            raise _too_many(max_bytes)
        data = reply.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise _too_many(max_bytes)
        if reply.length:  # `read` with a number keeps silent about it
            raise OSError("cut off")
    return data


def _too_many(max_bytes):
    return ApiError(413, "image_too_large", f"an image may have {max_bytes} bytes at most")

"""`Media`: what a client gave for an image -> the bytes of an image file, from nowhere it may not be from."""

import asyncio
import base64
import binascii
import concurrent.futures
import re
import time

from yojo.serving.errors import ApiError
from yojo.serving.fetching import allowed_hosts, fetch, late
from yojo.serving.images import check_image, too_large
from yojo.serving.rooted import Forbidden, Root, TooLarge

WORKERS = 4  # threads that decode base64, read files and check headers
FETCHERS = 16  # threads that wait for other servers
_PIECE = 1 << 18  # characters of base64 that are decoded at once: other threads have to get their turn, too
_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*:")
_DATA = re.compile(r"data:([\w.+-]+/[\w.+-]+)?((?:;[\w.+=-]*)*)", re.ASCII | re.IGNORECASE)
_HEAD = 200  # characters of a data URL before its comma


class Media:
    """Reads images from where clients say they are.

    What a source is, is told from its text, and no text can be taken for two of these, in this order:

    | source | is |
    | --- | --- |
    | begins with `data:` | a data URL, in base64 |
    | begins with `http://` or `https://` | a URL, fetched if its host is one of `Settings.allow_hosts` |
    | begins with another scheme (`file:`, `ftp:`, `C:`), `//` or `\\\\` | refused |
    | has a `.` anywhere, which base64 never has | a path below `Settings.image_root` |
    | all else | an image in base64 |

    So a file without an extension, in a folder without one, cannot be named. The letters of schemes may be of either
    case. Whatever takes long runs in threads of this object: a slow host holds up neither the event loop nor images
    that are here already.

    Args:
        settings: `Settings`, of which image_root, allow_hosts and limits count here.
        lookup: function like `socket.getaddrinfo`, which knows hosts' addresses; None: that one.
        tls: `ssl.SSLContext` for https; None: the system's certificates.

    Raises:
        ValueError: image_root is no folder, or an entry of allow_hosts is none (`yojo.serving.fetching.allowed_hosts`).
    """

    def __init__(self, settings, lookup=None, tls=None):
        self.limits = settings.limits
        self._hosts = allowed_hosts(settings.allow_hosts)
        self._fetching = {} if lookup is None else {"lookup": lookup}
        self._fetching["tls"] = tls
        self._root = None if settings.image_root is None else Root(settings.image_root)
        self._here = concurrent.futures.ThreadPoolExecutor(WORKERS, "media")
        self._away = concurrent.futures.ThreadPoolExecutor(FETCHERS, "fetch")

    def close(self):
        """End the threads once they have finished, without waiting for them."""
        self._here.shutdown(wait=False, cancel_futures=True)
        self._away.shutdown(wait=False, cancel_futures=True)
        if self._root is not None:
            self._root.close()

    async def read(self, source, param):
        """One image.

        Args:
            source: str, see above.
            param: the field that errors name, such as "images.0".

        Returns:
            bytes of an image file.

        Raises:
            ApiError: image_source, image_scheme, image_data_url, image_media_type, image_base64, image_path,
                image_root_missing, image_too_large, those of `check_image`, and of URLs those of `fetch`.
        """
        if not isinstance(source, str) or not source:
            raise ApiError(422, "image_source", "an image must be a string that is not empty", param)
        try:
            if source[:7].lower() == "http://" or source[:8].lower() == "https://":
                data = await self._fetched(source)
                return await self._threaded(self._checked, data)
            return await self._threaded(self._given, source)
        except ApiError as error:
            raise error.under(param) from None

    async def _threaded(self, function, *arguments):
        return await asyncio.get_running_loop().run_in_executor(self._here, function, *arguments)

    async def _fetched(self, url):
        end = time.monotonic() + self.limits.url_seconds

        def fetched():  # waiting for a thread counts
            return fetch(url, self._hosts, self.limits.image_bytes, end - time.monotonic(), **self._fetching)

        future = asyncio.get_running_loop().run_in_executor(self._away, fetched)
        try:
            return await asyncio.wait_for(future, self.limits.url_seconds)
        except (asyncio.TimeoutError, TimeoutError):  # in a look-up, which nothing can end but itself
            raise late() from None

    def _given(self, source):
        if source[:5].lower() == "data:":
            return self._checked(self._of_base64(_data_url(source)))
        if _SCHEME.match(source, 0, 64) or source[:2] in ("//", "\\\\"):
            message = "an image's URL must begin with data:, http:// or https://"
            raise ApiError(422, "image_scheme", message)
        return self._checked(self._of_file(source) if "." in source else self._of_base64(source))

    def _checked(self, data):
        check_image(data, self.limits)
        return data

    def _of_file(self, path):
        if self._root is None:
            message = "this server reads no images from files (--image-root): send the image itself in base64"
            raise ApiError(422, "image_root_missing", message)
        try:
            return self._root.read(path, self.limits.image_bytes)
        except Forbidden:
            message = "no such image: a path is relative to --image-root, of a regular file below it"
            raise ApiError(422, "image_path", message) from None
        except TooLarge:
            raise too_large(self.limits) from None

    def _of_base64(self, text):
        if len(text) * 3 // 4 - 2 > self.limits.image_bytes:
            raise too_large(self.limits)
        whole = bytearray()
        try:
            if len(text) % 4 or not text.isascii():
                raise ValueError
            for at in range(0, len(text), _PIECE):
                piece = text[at : at + _PIECE]
                if "=" in piece and at + _PIECE < len(text):
                    raise ValueError
                whole += base64.b64decode(piece, validate=True)
        except (binascii.Error, ValueError):
            message = (
                "the image is not base64: letters, digits, + and /, padded with = to a multiple of 4, without line "
                "breaks; a path has a file extension"
            )
            raise ApiError(422, "image_base64", message) from None
        return bytes(whole)


def _data_url(source):
    """The base64 of a data URL."""
    comma = source.find(",", 0, _HEAD)
    found = _DATA.fullmatch(source, 0, max(comma, 0))
    if found is None or not found[2].lower().endswith(";base64"):
        raise ApiError(422, "image_data_url", "a data URL must be data:image/...;base64,...")
    if not (found[1] or "").lower().startswith("image/"):
        raise ApiError(422, "image_media_type", "a data URL must be of an image: data:image/...;base64,...")
    return source[comma + 1 :]

"""Decoded images kept by what their files hold: examples one after the other that show the same image decode it once."""

import collections
import io
import os
import threading
import weakref

from yojo.inputs.images import file_of, is_array, load_image

LIMIT = 128 * 2**20  # bytes that one collator keeps in one process: thirty images of a megapixel
BYTES_PER_PIXEL = 4  # of Pillow, in mode RGB too
COMPARED = 256  # bytes of a file that say whether it may be one that is kept

_caches = weakref.WeakSet()


def _renew():
    """In a forked process (a loader's worker), where nobody is left to release a lock."""
    for cache in list(_caches):
        cache._begin()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew)


class Decoded:
    """`load_image` that decodes what it has decoded lately once.

    A file is known by its bytes, all of them: it is read every time, so that a path whose file has changed gives the new
    picture, and two paths to the same bytes are one. Images of PIL and arrays are decoded already and go straight through,
    as do files that are too large to be kept. For any number of threads; pickled, or in a forked process, it begins empty.

    Args:
        limit: the most bytes that are kept, of files and their pixels; what was not asked for longest goes first.
    """

    def __init__(self, limit=LIMIT):
        if limit < 0:
            raise ValueError(f"limit must be at least 0 bytes, got {limit}")
        self.limit = limit
        self._begin()
        _caches.add(self)

    def _begin(self):
        self._lock = threading.Lock()
        self._kept = collections.OrderedDict()  # key -> (bytes of the file, image); the one asked for last at the end
        self._size = 0

    def __reduce__(self):
        return type(self), (self.limit,)

    @property
    def size(self):
        """Bytes that are kept."""
        return self._size

    def __call__(self, source, name):
        """As `yojo.inputs.images.load_image`: the same picture, which nobody else holds, and the same errors."""
        content = self._content(source, name)
        if content is None:
            return load_image(source, name)
        key = _key(content)
        image = self._found(key, content)
        if image is not None:
            return image.copy()
        try:
            image = load_image(content, name)
        except Exception:
            return load_image(source, name)  # which says what is wrong with a file by its path
        if _size(content, image) <= self.limit:
            self._keep(key, content, image.copy())
        return image

    def _content(self, source, name):
        """The bytes of an image file; None for what is none, or cannot be kept."""
        from PIL import Image

        if isinstance(source, Image.Image) or is_array(source):
            return None
        file, _ = file_of(source, name)
        if isinstance(file, io.BytesIO):
            return file.getvalue()  # the bytes that were given, where they were bytes
        try:
            if not os.path.isfile(file) or os.path.getsize(file) > self.limit:  # a pipe can be read once
                return None
            with open(file, "rb") as opened:
                return opened.read()
        except OSError:
            return None

    def _found(self, key, content):
        with self._lock:
            known, image = self._kept.get(key, (None, None))
            if known != content:
                return None
            self._kept.move_to_end(key)
            return image

    def _keep(self, key, content, image):
        with self._lock:
            self._forget(self._kept.pop(key, None))
            self._kept[key] = content, image
            self._size += _size(content, image)
            while self._size > self.limit:
                self._forget(self._kept.popitem(last=False)[1])

    def _forget(self, entry):
        if entry is not None:
            self._size -= _size(*entry)


def _size(content, image):
    return len(content) + image.width * image.height * BYTES_PER_PIXEL


def _key(content):
    """Some of a file's bytes, and Pillow's switches that decide how it is decoded."""
    from PIL import Image, ImageFile

    some = content[:: len(content) // COMPARED + 1]
    return len(content), some, bool(ImageFile.LOAD_TRUNCATED_IMAGES), Image.MAX_IMAGE_PIXELS

"""`Root`: a folder whose files may be read by relative path, and nothing outside of it."""

import os
import stat


class Forbidden(Exception):
    """There is no such file, or it may not be read: which of them is not said."""


class TooLarge(Exception):
    """The file has more bytes than it may."""


class Root:
    """Reads files below a folder.

    A path is opened once, without reading it (`O_PATH`: neither a FIFO nor a device notices), then the kernel is asked
    where what was opened lies, symlinks and all. Only then is that very file, not its name, opened to be read; so
    whoever renames files or turns symlinks in the meantime changes nothing. Symlinks that stay within the folder are
    followed. A hard link is a file like any other: who may make them in the folder, decides what is read.

    Args:
        folder: path of a folder.

    Raises:
        ValueError: not a folder, or no Linux with /proc.
    """

    def __init__(self, folder):
        try:
            self._folder = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            self._place(self._folder)
        except (OSError, AttributeError) as error:
            raise ValueError(
                f"image_root must be a folder that can be opened (on Linux, with /proc): {error}"
            ) from error

    def close(self):
        """Let go of the folder; twice does no harm."""
        folder, self._folder = self._folder, -1
        if folder >= 0:
            os.close(folder)

    def read(self, path, most):
        """The bytes of a file.

        Args:
            path: relative, of plain names with "/" between them.
            most: bytes that the file may have.

        Returns:
            bytes.

        Raises:
            Forbidden: the path is not of that form, nothing is there, it lies outside, or it is no regular file.
            TooLarge: more bytes.
        """
        _check_form(path)
        try:
            found = os.open(path, os.O_PATH | os.O_CLOEXEC, dir_fd=self._folder)
        except (OSError, ValueError):
            raise Forbidden from None
        try:
            return self._read(found, most)
        except OSError:
            raise Forbidden from None
        finally:
            os.close(found)

    def _read(self, found, most):
        root = self._place(self._folder).rstrip("/")
        state = os.fstat(found)
        if not self._place(found).startswith(f"{root}/") or not stat.S_ISREG(state.st_mode):
            raise Forbidden
        if state.st_size > most:
            raise TooLarge
        flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
        with os.fdopen(os.open(f"/proc/self/fd/{found}", flags), "rb") as file:
            data = file.read(most + 1)
        if len(data) > most:  # it has grown since
            raise TooLarge
        return data

    @staticmethod
    def _place(descriptor):
        return os.readlink(f"/proc/self/fd/{descriptor}")


def _check_form(path):
    names = path.split("/")
    if (
        not path.isprintable()  # NUL, line breaks, half surrogates
        or "\\" in path
        or path.startswith("~")
        or len(path.encode()) > 4000
        or any(name in ("", ".", "..") or len(name.encode()) > 255 for name in names)
    ):
        raise Forbidden

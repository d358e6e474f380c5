"""Folders that are replaced as a whole: whoever reads sees the old files or the new ones, never some of each."""

import contextlib
import ctypes
import errno
import os
import shutil
import uuid
from pathlib import Path

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


@contextlib.contextmanager
def replaced_folder(path, *, owned=None, mark=None):
    """Write a folder so that a crash at any moment leaves the old one or the new one.

    Everything is written into a temporary folder beside it and flushed to the disk; only then does it take the place
    of what is there. An error on the way (a full disk, say) removes the temporary folder and leaves the old one whole.

    What happens to an existing folder: where all its files are owned, the two change places in one step of the file
    system. Where it holds files of others, those stay: the mark is removed first, the new files replace the old ones
    one by one, owned files that are no longer there are removed, and the mark comes last. A folder without its mark is
    no model, so a crash in between is an error for whoever loads it, not a mixture.

    Args:
        path: the folder, made if it is missing. A symbolic link is followed.
        owned: function of a relative name ("model.safetensors", "sub/file") -> whether an existing file of this name
            may be removed; by default none may, but for those that are written anew.
        mark: relative name of the file that makes the folder valid, or None.

    Yields:
        `pathlib.Path` of the temporary folder, to be filled.

    Raises:
        ValueError: path is a file.
        OSError: what the file system says.

    Example:
        >>> with yojo.files.folders.replaced_folder("runs/checkpoint-100") as staging:
        ...     (staging / "state.json").write_text("{}")
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_dir():
        raise ValueError(f"path must be a folder, {path} is a file")
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = _temporary(path)
    try:
        yield staging
        flush(staging)
        _put_in_place(staging, path, owned or (lambda name: False), mark)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def files_of(folder):
    """Relative names of all files below a folder, sorted, with "/" between their parts."""
    folder = Path(folder)
    return sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if not file.is_dir())


def flush(folder):
    """Wait until all files below a folder are on the disk."""
    for root, _, names in os.walk(folder):
        for name in names:
            sync(os.path.join(root, name))
        sync(root)


def _temporary(path):
    name = f".{path.name}.writing-{uuid.uuid4().hex[:12]}"
    inside = path.is_dir() and (os.path.ismount(path) or not os.access(path.parent, os.W_OK))
    staging = (path if inside else path.parent) / name
    staging.mkdir()  # not tempfile.mkdtemp, whose folders nobody else may read
    return staging


def _put_in_place(staging, path, owned, mark):
    if not path.exists():
        os.rename(staging, path)
        return sync(path.parent)
    new, old = files_of(staging), [] if staging.parent == path else files_of(path)
    foreign = [name for name in old if name not in new and not owned(name)]
    if staging.parent != path and not foreign and _exchange(staging, path):
        return sync(path.parent)
    old = [name for name in files_of(path) if not name.startswith(f"{staging.name}/")]
    if mark is not None and mark in old:
        os.remove(path / mark)
        sync(path)
    for name in [*(name for name in new if name != mark)]:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging / name, path / name)
    for name in old:
        if name not in new and name != mark and owned(name):
            os.remove(path / name)
    sync(path)
    if mark in new:
        os.replace(staging / mark, path / mark)
        sync(path)


def _exchange(a, b):
    """Let two folders change places in one step; False where the system cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    return renameat2(_AT_FDCWD, os.fsencode(a), _AT_FDCWD, os.fsencode(b), _RENAME_EXCHANGE) == 0


def sync(path):
    """Wait until a file, or the names in a folder, are on the disk."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError:  # a folder that cannot be opened (Windows)
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EROFS, errno.EBADF):  # some file systems have none
            raise
    finally:
        os.close(handle)

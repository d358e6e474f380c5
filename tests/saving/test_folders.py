"""replaced_folder: a crash, a full disk or another's file at any moment leaves the old folder or the new one."""

import errno
import os
import signal

import pytest

from yojo.files import folders
from yojo.files.folders import replaced_folder

OLD, NEW = {"mark": "old", "weights": "old", "stale": "old"}, {"mark": "new", "weights": "new", "sub/more": "new"}


def write(folder, files):
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)


def read(folder):
    return {name: (folder / name).read_text() for name in folders.files_of(folder)}


def replace(path, **options):
    with replaced_folder(path, owned=lambda name: name in OLD, mark="mark", **options) as staging:
        assert staging.parent == path.parent and not read(staging)
        write(staging, NEW)


def test_a_missing_folder_is_made(tmp_path):
    with replaced_folder(tmp_path / "a" / "b") as staging:
        write(staging, NEW)
        assert not (tmp_path / "a" / "b").exists()
    assert read(tmp_path / "a" / "b") == NEW and os.listdir(tmp_path / "a") == ["b"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("foreign", [{}, {"notes.txt": "mine", "runs/log": "mine"}])
def test_an_old_folder_is_replaced_and_foreign_files_stay(tmp_path, monkeypatch, exchange, foreign):
    if not exchange:
        monkeypatch.setattr(folders, "_exchange", lambda a, b: False)
    path = tmp_path / "model"
    write(path, OLD | foreign)
    replace(path)
    assert read(path) == NEW | foreign and os.listdir(tmp_path) == ["model"]


def test_without_a_say_nothing_is_removed(tmp_path):
    write(tmp_path / "model", OLD)
    with replaced_folder(tmp_path / "model") as staging:
        write(staging, NEW)
    assert read(tmp_path / "model") == NEW | {"stale": "old"}


def test_a_link_is_followed(tmp_path):
    write(tmp_path / "real", OLD)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    replace(tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and read(tmp_path / "real") == NEW


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "model").write_text("")
    with pytest.raises(ValueError, match="path must be a folder, .*model is a file"):
        replace(tmp_path / "model")


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_an_error_on_the_way_leaves_the_old_folder_and_no_litter(tmp_path, error):
    write(tmp_path / "model", OLD)
    with pytest.raises(type(error)):
        with replaced_folder(tmp_path / "model") as staging:
            write(staging, NEW)
            raise error
    assert read(tmp_path / "model") == OLD and os.listdir(tmp_path) == ["model"]


def test_a_full_disk_while_flushing_leaves_the_old_folder(tmp_path, monkeypatch):
    """Some file systems say only then that there was no room."""
    write(tmp_path / "model", OLD)

    def full(handle):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        replace(tmp_path / "model")
    assert read(tmp_path / "model") == OLD and os.listdir(tmp_path) == ["model"]


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize("foreign", [{}, {"notes.txt": "mine"}])
def test_killed_at_any_moment_it_is_the_old_or_the_new_or_has_no_mark(tmp_path, exchange, foreign):
    outcomes, step = set(), 0
    while True:
        path = tmp_path / str(step) / "model"
        write(path, OLD | foreign)
        child = os.fork()
        if child == 0:
            _die_at(step, exchange)
            replace(path)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        found = read(path)
        assert foreign.items() <= found.items()
        if "mark" not in found:
            outcomes.add("no mark")
        else:
            own = {name: text for name, text in found.items() if name not in foreign}
            assert own in (OLD, NEW)  # never some of each
            outcomes.add(found["mark"])
        if os.WIFEXITED(status):
            break
        step += 1
    assert step >= 3 and {"old", "new"} <= outcomes
    assert ("no mark" in outcomes) == (not exchange or bool(foreign))


def _die_at(step, exchange):
    """Kill this process before its step-th change of the file system outside of staging."""
    left = [step]

    def dying(function):
        def call(*args, **kwargs):
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            return function(*args, **kwargs)

        return call

    for name in ("rename", "replace", "remove"):
        setattr(os, name, dying(getattr(os, name)))
    folders._exchange = dying(folders._exchange) if exchange else lambda a, b: False
    folders.sync = dying(folders.sync)

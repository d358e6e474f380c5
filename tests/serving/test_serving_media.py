"""Images from wherever clients say they are: in the request, below a folder, from another host; and from nowhere else."""

import asyncio
import base64
import dataclasses
import os
import socket
import threading

import pytest

from tests.serving import image_files as files
from tests.serving.test_fetching import OK, Away
from yojo.serving import rooted
from yojo.serving.errors import ApiError
from yojo.serving.media import FETCHERS, Media
from yojo.serving.rooted import Forbidden, Root, TooLarge
from yojo.serving.settings import Limits, Settings

CAT = files.encoded("PNG")
TEXT = base64.b64encode(CAT).decode()


def read(source, media=None, **settings):
    media = media or Media(Settings(**settings))
    try:
        return asyncio.run(media.read(source, "images.0"))
    finally:
        media.close()


def refused(source, media=None, **settings):
    with pytest.raises(ApiError) as caught:
        read(source, media, **settings)
    error = caught.value
    assert error.param == "images.0"
    assert error.status == (413 if "too_" in error.code else 422)
    for told in ("/etc", "secret", "passwd", str(settings.get("image_root"))):
        assert told not in error.message
    return error.code


@pytest.fixture
def root(tmp_path):
    """A folder with images and traps in it, and a secret beside it."""
    folder = tmp_path / "images"
    (folder / "deep" / "er").mkdir(parents=True)
    (tmp_path / "images-too").mkdir()
    (tmp_path / "secret.png").write_bytes(CAT)
    (tmp_path / "images-too" / "secret.png").write_bytes(CAT)
    for name in ("cat.png", "deep/er/cat.png", "a cat (1).png", "Katze-\u00fc.png", "...png", "-.png"):
        (folder / name).write_bytes(CAT)
    (folder / "notes.txt").write_text("a secret")
    (folder / "empty.png").write_bytes(b"")
    (folder / "folder.png").mkdir()
    (folder / "locked.png").write_bytes(CAT)
    (folder / "locked.png").chmod(0)
    os.mkfifo(folder / "fifo.png")
    with socket.socket(socket.AF_UNIX) as listener:
        before = os.getcwd()
        os.chdir(folder)  # the names of sockets are short
        listener.bind("socket.png")
        os.chdir(before)
    for name, target in {
        "out.png": "../secret.png",
        "absolute.png": str(tmp_path / "secret.png"),
        "beside.png": "../images-too/secret.png",
        "deep/out": "../..",
        "loop.png": "loop.png",
        "dangling.png": "nothing.png",
        "null.png": "/dev/null",
        "environ.png": "/proc/self/environ",
        "root.png": "/proc/self/root/etc/passwd",
        "within.png": "deep/er/cat.png",
        "around.png": f"../{folder.name}/cat.png",
        "deep/up.png": "../cat.png",
    }.items():
        (folder / name).symlink_to(target)
    return folder


@pytest.mark.parametrize(
    "source",
    [
        TEXT,
        f"data:image/png;base64,{TEXT}",
        f"DATA:image/PNG;BASE64,{TEXT}",
        f"data:image/png;name=cat;base64,{TEXT}",
        f"data:image/webp;base64,{TEXT}",  # what it says it is, decides nothing
    ],
)
def test_images_in_the_request(source):
    assert read(source) == CAT


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_raw_base64_is_taken_for_no_path(kind, root):
    data = files.encoded(kind)
    assert read(base64.b64encode(data).decode(), image_root=str(root)) == data


@pytest.mark.parametrize(
    "source, code",
    [
        ("", "image_source"),
        (None, "image_source"),
        (7, "image_source"),
        ({"url": "x"}, "image_source"),
        (TEXT[:-1], "image_base64"),
        (TEXT[:-5] + "!" + TEXT[-4:], "image_base64"),
        (TEXT[:40] + "\n" + TEXT[40:], "image_base64"),
        (TEXT[:40] + "====" + TEXT[40:], "image_base64"),
        ("====" + TEXT, "image_base64"),
        ("A===", "image_base64"),
        (TEXT[:40] + "-_-_" + TEXT[40:], "image_base64"),
        (TEXT[:-4] + "\u00e9\u00e9\u00e9\u00e9", "image_base64"),
        (base64.b64encode(b"no image").decode(), "image_format"),
        (base64.b64encode(files.SVG).decode(), "image_format"),
        (f"data:image/png,{TEXT}", "image_data_url"),
        ("data:image/png;base64", "image_data_url"),
        ("data:", "image_data_url"),
        ("data:,", "image_data_url"),
        (f"data:image/png;{'a' * 300};base64,{TEXT}", "image_data_url"),
        (f"data:image/png;base64 ,{TEXT}", "image_data_url"),
        (f"data:image/png;base64,{TEXT[:40]}%2B{TEXT[43:]}", "image_base64"),
        ("data:image/png;base64,", "image_format"),
        (f"data:text/html;base64,{TEXT}", "image_media_type"),
        (f"data:;base64,{TEXT}", "image_media_type"),
        *((source, "image_scheme") for source in (
            "file:///etc/passwd", "file:cat.png", "FILE:///etc/passwd", "ftp://a.example/cat.png", "gopher://a.example/_x",
            "javascript:alert(1)", "//a.example/cat.png", "\\\\a.example\\cat.png", "C:\\cat.png", "jar:file:x.png",
            "http:cat.png", "https:/cat.png",
        )),
        ("http://a.example/secret.png", "image_host"),
        ("HTTPS://a.example/secret.png", "image_host"),
        ("http://localhost/secret.png", "image_host"),
        ("http://[::1]/secret.png", "image_host"),
        ("cat.png", "image_root_missing"),
        ("../secret.png", "image_root_missing"),
        (" file:///etc/passwd.png", "image_root_missing"),
    ],
)  # fmt: skip
def test_sources_that_are_refused(source, code):
    assert refused(source) == code


def test_longer_base64_than_is_decoded_at_once():
    data = files.png(1000, 1000, pixels=os.urandom(1_001_000))
    text = base64.b64encode(data).decode()
    assert len(text) > 1 << 20
    assert read(text) == data
    for at in (1 << 18, (1 << 18) - 1, len(text) // 2):
        assert refused(text[:at] + "=" + text[at + 1 :]) == "image_base64"


def test_too_large_is_refused_before_it_is_decoded(monkeypatch):
    limits = Limits(image_bytes=len(CAT))
    assert read(TEXT, limits=limits) == CAT
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    assert refused(TEXT + "AAAA", limits=limits) == "image_too_large"
    assert refused(f"data:image/png;base64,{TEXT}AAAA", limits=limits) == "image_too_large"


INSIDE = (
    "cat.png deep/er/cat.png deep/up.png within.png around.png deep/out/images/cat.png Katze-\u00fc.png ...png -.png"
)


@pytest.mark.parametrize("path", [*INSIDE.split(), "a cat (1).png"])
def test_files_below_the_root(path, root):
    assert read(path, image_root=str(root)) == CAT


OUTSIDE = """../secret.png deep/../cat.png ./cat.png deep/./er/cat.png deep//er/cat.png /etc/passwd.png out.png absolute.png
beside.png deep/out/secret.png loop.png dangling.png null.png environ.png root.png fifo.png socket.png folder.png
missing.png cat.png/ cat.png/. deep/.. .. . ~/cat.png ~root/x.png cat.png/cat.png %2e%2e/secret.png ..\\secret.png
deep\\cat.png ..;/secret.png ../images/cat.png ../images-too/secret.png""".split()
OUTSIDE += [
    "cat.png\0",
    "\0.png",
    "cat\n.png",
    "cat\ud800.png",
    "x" * 256 + ".png",
    "a/" * 3000 + "cat.png",
    "a\u202e.png",
]


@pytest.mark.parametrize("path", OUTSIDE)
def test_paths_that_are_refused_all_alike(path, root):
    """None is told from one that is not there."""
    messages = []
    for source in (path, "missing.png"):
        media = Media(Settings(image_root=str(root)))
        with pytest.raises(ApiError) as caught:
            read(source, media)
        messages.append((caught.value.status, caught.value.code, caught.value.message, caught.value.param))
    assert messages[0] == messages[1] and messages[0][:2] == (422, "image_path")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads all files")
def test_a_file_without_permission_is_not_there(root):
    assert refused("locked.png", image_root=str(root)) == "image_path"


def test_what_is_below_the_root_has_to_be_an_image(root):
    for name in ("notes.txt", "empty.png"):
        assert refused(name, image_root=str(root)) == "image_format"
    assert refused("cat.png", image_root=str(root), limits=Limits(image_bytes=len(CAT) - 1)) == "image_too_large"
    assert read("cat.png", image_root=str(root), limits=Limits(image_bytes=len(CAT))) == CAT


def test_the_root_may_be_a_symlink_and_may_be_moved(root, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(root)
    folder = Root(link)
    assert folder.read("cat.png", 1000) == CAT
    root.rename(tmp_path / "moved")
    assert folder.read("deep/up.png", 1000) == CAT
    with pytest.raises(Forbidden):
        folder.read("out.png", 1000)
    folder.close()
    folder.close()
    with pytest.raises(Forbidden):
        folder.read("cat.png", 1000)


@pytest.mark.parametrize("folder", ["/nowhere/at/all", __file__])
def test_a_root_that_is_no_folder_is_refused(folder):
    with pytest.raises(ValueError, match="image_root must be a folder"):
        Media(Settings(image_root=folder))


def test_a_name_that_is_swapped_for_a_symlink_in_between_reads_what_was_checked(root, tmp_path, monkeypatch):
    (tmp_path / "secret.png").write_bytes(b"secret")
    folder, fstat = Root(root), os.fstat

    def swapped(descriptor):
        state = fstat(descriptor)
        (root / "cat.png").unlink()
        (root / "cat.png").symlink_to("../secret.png")
        monkeypatch.setattr(rooted.os, "fstat", fstat)
        return state

    monkeypatch.setattr(rooted.os, "fstat", swapped)
    assert folder.read("deep/up.png", 1000) == CAT
    with pytest.raises(Forbidden):
        folder.read("deep/up.png", 1000)


def test_a_file_that_grows_is_not_read_on(root, monkeypatch):
    folder, fstat = Root(root), os.fstat

    def grown(descriptor):
        state = fstat(descriptor)
        with open(root / "cat.png", "ab") as file:
            file.write(bytes(10_000))
        return state

    monkeypatch.setattr(rooted.os, "fstat", grown)
    with pytest.raises(TooLarge):
        folder.read("cat.png", len(CAT))


def test_no_descriptor_is_left_open(root):
    folder = Root(root)
    before = len(os.listdir("/proc/self/fd"))
    for path in [path for path in OUTSIDE if "\0" not in path] + ["cat.png"]:
        try:
            folder.read(path, 10)
        except (Forbidden, TooLarge):
            pass
    assert len(os.listdir("/proc/self/fd")) == before


def test_images_from_an_allowed_host():
    with Away(OK + b"\r\n" + CAT) as away:
        settings = Settings(allow_hosts=(f"private:images.example:{away.port}",))
        url = f"images.example:{away.port}/cat.png"
        assert read(f"http://{url}", Media(settings, away.lookup)) == CAT
        assert read(f"HTTP://{url}", Media(settings, away.lookup)) == CAT
        small = dataclasses.replace(settings, limits=Limits(image_bytes=len(CAT) - 1))
        assert refused(f"http://{url}", Media(small, away.lookup)) == "image_too_large"
        assert refused(f"http://{url}", Media(Settings(), away.lookup)) == "image_host"
    with Away(OK + b"\r\n" + files.SVG) as away:
        settings = Settings(allow_hosts=(f"private:images.example:{away.port}",))
        assert refused(f"http://images.example:{away.port}/", Media(settings, away.lookup)) == "image_format"


def test_a_look_up_that_hangs_holds_nobody_up():
    release, asked = threading.Event(), []

    def lookup(*_, **__):
        asked.append(1)
        release.wait(60)
        raise socket.gaierror

    media = Media(Settings(allow_hosts=("*",), limits=Limits(url_seconds=0.2)), lookup)

    async def both():
        hung = [asyncio.ensure_future(media.read("http://a.example/", "images.0")) for _ in range(40)]
        await asyncio.sleep(0)
        assert await media.read(TEXT, "images.1") == CAT
        return await asyncio.gather(*hung, return_exceptions=True)

    try:
        outcomes = asyncio.run(both())
    finally:
        release.set()
        media.close()
    assert {(error.code, error.param) for error in outcomes} == {("image_fetch_timeout", "images.0")}
    assert len(asked) == FETCHERS < 40  # the others had no thread, and need none any more

"""The files of the pages: how they are served, what a wheel holds, and that nothing in them is inline or from elsewhere."""

import asyncio
import html.parser
import re
from pathlib import Path

import httpx
import page_cases
import pytest
import setuptools

from yojo.serving import pages

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.name for path in pages.FOLDER.iterdir())
SCRIPTS = {
    "index.html": ("page.js", "mask.js", "parts.js", "theme.js"),
    "docs.html": ("docs.js", "parts.js", "theme.js"),
}
SVG = "http://www.w3.org/2000/svg"  # the name of a vocabulary, which nobody fetches


def text(name):
    return (pages.FOLDER / name).read_text(encoding="utf-8")


def ask(path, method="GET", **headers):
    async def one():
        transport = httpx.ASGITransport(page_cases.application())
        async with httpx.AsyncClient(transport=transport, base_url="http://here") as client:
            return await client.request(method, path, headers=headers)

    return asyncio.run(one())


class Elements(html.parser.HTMLParser):
    """Elements of a page: (tag, attributes, whether a label is around it)."""

    def __init__(self, name):
        super().__init__()
        self.found, self.labels = [], 0
        self.feed(text(name))

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes), self.labels > 0))
        self.labels += tag == "label"

    def handle_endtag(self, tag):
        self.labels -= tag == "label"


# ---- the files and how they are served ----


def test_every_file_is_served():
    assert sorted(name for name, _ in pages.FILES.values()) == NAMES


@pytest.mark.parametrize("path", pages.FILES)
def test_headers(path):
    name, kind = pages.FILES[path]
    reply = ask(path)
    assert reply.status_code == 200 and reply.text == text(name)
    assert reply.headers["content-type"] == kind
    policy = dict(part.strip().split(" ", 1) for part in reply.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["img-src"] == "data: blob:" and policy["trusted-types"] == "'none'"
    assert reply.headers["x-content-type-options"] == "nosniff" and reply.headers["referrer-policy"] == "no-referrer"
    assert reply.headers["cache-control"] == "no-cache"
    head = ask(path, "HEAD")
    assert head.status_code == 200 and not head.content and head.headers["etag"] == reply.headers["etag"]
    assert ask(path, "POST").status_code == 405


def test_what_a_browser_has_is_not_sent_again():
    tag = ask("/").headers["etag"]
    assert tag != ask("/page.js").headers["etag"]
    for known in (tag, f'"other", W/{tag}', "*"):
        reply = ask("/", **{"If-None-Match": known})
        assert (reply.status_code, reply.content, reply.headers["etag"]) == (304, b"", tag)
    assert ask("/", **{"If-None-Match": '"other"'}).status_code == 200


def test_pages_are_no_endpoints():
    assert set(page_cases.application().openapi()["paths"]) == {"/score", "/upload/{name}", "/v1/models", "/ready"}


def test_a_wheel_holds_the_pages(monkeypatch):
    monkeypatch.chdir(ROOT)
    distribution = setuptools.Distribution({"script_name": "setup.py"})
    distribution.parse_config_files(["pyproject.toml"])
    command = distribution.get_command_obj("build_py")
    command.ensure_finalized()
    held = {Path(path).name for path in command.get_outputs(include_bytecode=False) if Path(path).parent.name == "page"}
    assert held == set(NAMES)


# ---- what stands in the files ----


@pytest.mark.parametrize("name", NAMES)
def test_no_outside_address(name):
    said = text(name).replace(SVG, "")
    assert not re.findall(r"\b(?:https?|wss?|ftp):|[\"'(`]//|@import|(?<!\w)url\(", said)
    # Nor one that starts at the root: a proxy may have put us below a prefix.
    assert not re.findall(r"(?:src|href)=\"/|(?:ask|fetch|import|from)\(?\s*[\"'`]/", said)


@pytest.mark.parametrize("name", [name for name in NAMES if name.endswith(".js")])
def test_scripts_make_no_markup(name):
    assert not re.findall(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function|DOMParser|cssText", text(name)
    )


@pytest.mark.parametrize("name", SCRIPTS)
def test_ids(name):
    elements = Elements(name).found
    ids = [attributes["id"] for _, attributes, _ in elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    asked = {
        one for script in SCRIPTS[name] for one in re.findall(r"(?:byId|getElementById)\(\"([^\"]+)\"", text(script))
    }
    assert len(asked) > 8 and asked <= set(ids)
    for _, attributes, _ in elements:
        for reference in ("for", "aria-labelledby", "aria-describedby"):
            assert set(attributes.get(reference, "").split()) <= set(ids), attributes
        if attributes.get("href", "").startswith("#"):
            assert attributes["href"][1:] in ids


@pytest.mark.parametrize("name", SCRIPTS)
def test_fields_have_labels_and_nothing_stands_inline(name):
    elements = Elements(name).found
    labelled = {attributes.get("for") for tag, attributes, _ in elements if tag == "label"}
    fields = [one for one in elements if one[0] in ("input", "textarea", "select")]
    assert fields and all(inside or attributes.get("id") in labelled for _, attributes, inside in fields)
    for tag, attributes, _ in elements:
        assert tag != "style" and not (tag == "script" and "src" not in attributes)
        assert not [one for one in attributes if one == "style" or one.startswith("on")], attributes
        if tag == "button":
            assert attributes.get("type") in ("button", "submit")

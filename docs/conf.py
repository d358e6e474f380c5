"""How Sphinx builds the site: `make docs`. Every warning is an error, references that lead nowhere among them."""

import builtins
import inspect
import pkgutil
import re
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT)]

import yojo  # noqa: E402
import yojo.data  # noqa: E402
import yojo_kernels  # noqa: E402

project = "YOJO"
author = copyright = "the YOJO authors, Apache 2.0"
release = version = yojo.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
root_doc = "index"
nitpicky = True

html_theme = "furo"
html_title = "YOJO"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False

myst_heading_anchors = 4  # as on a repository's page: every heading can be linked
myst_enable_extensions = ["colon_fence"]
highlight_language = "none"  # of blocks that name no language: commands and trees

napoleon_numpy_docstring = False
napoleon_use_ivar = True  # fields of dataclasses: autodoc would list each a second time
napoleon_use_rtype = False  # what stands before the colon is a shape or a tuple's names, and no type to link
autodoc_member_order = "bysource"
autodoc_typehints = "none"
autoclass_content = "class"
python_maximum_signature_line_length = 100

# Pages that stand in the root of the repository, where people look for them.
ELSEWHERE = {"contributing": "CONTRIBUTING.md", "changelog": "CHANGELOG.md"}


def read_elsewhere(app, name, source):
    """The text of a page that lies in the root, and links as they are from here."""
    if name in ELSEWHERE:
        app.env.note_dependency(str(ROOT / ELSEWHERE[name]))
        text = (ROOT / ELSEWHERE[name]).read_text()
        text = re.sub(r"\]\((?!https?:|#|docs/)([^)]+)\)", r"](../\1)", text)
        source[0] = re.sub(r"\]\(docs/([^)]+)\)", r"](\1)", text)
    for page, path in ELSEWHERE.items():
        source[0] = re.sub(rf"\]\((?:\.\./){path}((?:#[^)]*)?)\)", rf"]({page}.md\1)", source[0])


def as_rst(app, what, name, object_, options, lines):
    """Docstrings say `code` in single backticks: names of ours become references, all else is code."""
    lines[:] = [re.sub(r"(?<![`:\w])`([^`]+)`(?!`)(\w?)", _role, line) for line in lines]


def _role(match):
    text, letter = match[1], match[2] and f"\\ {match[2]}"
    if re.fullmatch(r"yojo(_kernels)?(\.\w+)+", text):
        return f":py:obj:`{text}`{letter}"
    return (f":py:obj:`{text} <{SHORT[text]}>`" if text in SHORT else f"``{text}``") + letter


# Classes, as docstrings call them in their own package.
SHORT = {
    name: f"{package.__name__}.{name}"
    for package in (yojo_kernels, yojo.data, yojo)
    for name in package.__all__
    if name[0].isupper()
}


def one_by_one(app, what, name, object_, options, lines):
    """An entry of several attributes (`lora_r, lora_alpha: of LoRA`) becomes one for each, as napoleon has it for arguments."""
    found, inside = [], False
    for line in lines:
        inside = line == "Attributes:" or (inside and (not line or line.startswith(" ")))
        entry = re.match(r"( {4}|\t)(\w+(?:, \w+)+):( .*)", line) if inside else None
        if entry:
            *first, last = entry[2].split(", ")
            found += [f"{entry[1]}{one}: see `{last}`." for one in first]
            line = f"{entry[1]}{last}:{entry[3]}"
        found.append(line)
    lines[:] = found


def resolve(app, env, node, content):
    """References to what is on no page of ours: code where there is such a thing, else an error."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    for name in (target, f"{node.get('py:module')}.{target}"):
        try:
            found = pkgutil.resolve_name(name)
        except (AttributeError, ImportError, ValueError):
            continue
        return _page_of(app, env, node, content, found) or content
    if hasattr(builtins, target) or target in PLAIN:
        return content
    return None


# What `Returns:` and `Raises:` begin with and is no name.
PLAIN = {"IndexError", "None"}


def _page_of(app, env, node, content, found):
    """A reference to a page that shows the same object under another name."""
    from sphinx.util.nodes import make_refnode

    if inspect.ismodule(found) or not callable(found):
        return None
    for name, entry in env.domains.python_domain.objects.items():
        try:
            same = pkgutil.resolve_name(name) is found
        except (AttributeError, ImportError, ValueError):
            continue
        if same:
            return make_refnode(app.builder, node["refdoc"], entry.docname, entry.node_id, content, name)
    return None


def short_signature(app, what, name, object_, options, signature, returns):
    """No signature for what is not made by it (a private field), or that nobody can read (transformers' arguments)."""
    if what == "class" and signature and (", _" in signature or signature.count(",") > 60):
        return "", returns
    return None


def setup(app):
    app.connect("autodoc-process-signature", short_signature)
    app.connect("source-read", read_elsewhere)
    app.connect("autodoc-process-docstring", one_by_one, priority=100)  # before napoleon
    app.connect("autodoc-process-docstring", as_rst, priority=900)  # behind it
    app.connect("missing-reference", resolve)

"""Arguments and their documentation agree: `python docs/arguments.py` prints where they do not; `make docs` runs it.

- Everywhere in `yojo` and `yojo_kernels`: a section `Args:` or `Attributes:` names what the signature has, all of it and nothing
  else. An entry may name several, as in `lora_r, lora_alpha: of LoRA`.
- What the API pages (docs/api/*.rst) show has a docstring, and such a section where it takes arguments.
- What `yojo`, `yojo.data` and `yojo_kernels` offer by name (`__all__`) is on an API page.

Files are read, nothing is imported.
"""

import ast
import functools
import re
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = ("yojo", "yojo_kernels")
OFFERING = ("yojo", "yojo.data", "yojo_kernels")  # packages whose __all__ is a promise
DIRECTIVE = re.compile(r"^\.\. auto(function|class|exception|module|data):: ([\w.]+)\n((?:[ ]+:.*\n)*)", re.MULTILINE)
ENTRY = re.compile(r"(\*{0,2}\w+(?:, *\*{0,2}\w+)*):")


# ---- what a docstring names ----

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)


def section(docstring, title):
    """Names that a section of a Google-style docstring has entries for; None without that section.

    Args:
        docstring: the text, cleaned of its indentation, or None.
        title: "Args" or "Attributes".

    Returns:
        list of names, without the stars of `*args` and `**kwargs`.
    """
    lines = (docstring or "").splitlines()
    if f"{title}:" not in lines:
        return None
    names, depth = [], None
    for line in lines[lines.index(f"{title}:") + 1 :]:
        indent = len(line) - len(line.lstrip())
        if line.strip() and not indent:
            break
        depth = indent if depth is None else depth
        if line.strip() and indent == depth and (found := ENTRY.match(line.strip())):
            names += [name.strip(" *") for name in found[1].split(",")]
    return names


# ---- what the code has ----


@functools.cache
def modules(root=ROOT):
    """dict: name -> syntax tree of every module of both packages."""
    found = {}
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def parameters(node):
    """Names of a function's parameters, but self and cls."""
    own = node.args
    names = [one.arg for one in (*own.posonlyargs, *own.args, *own.kwonlyargs, own.vararg, own.kwarg) if one]
    return [name for i, name in enumerate(names) if not (i == 0 and name in ("self", "cls"))]


def fields(node):
    """Names of the fields of a dataclass or named tuple, private ones left out; None for another class."""
    marks = " ".join(map(ast.unparse, (*node.decorator_list, *node.bases)))
    if "dataclass" not in marks and "NamedTuple" not in marks:
        return None
    named = [one.target.id for one in node.body if isinstance(one, ast.AnnAssign)]
    return [name for name in named if not name.startswith("_")]


def attributes(node):
    """Names that objects of a class have: fields, properties, methods, and what methods set on self."""
    names = set()
    for one in ast.walk(node):
        if isinstance(one, FUNCTIONS):
            names.add(one.name)
        elif isinstance(one, ast.Name) and isinstance(one.ctx, ast.Store):
            names.add(one.id)
        elif isinstance(one, ast.Attribute) and isinstance(one.ctx, ast.Store):
            names.add(one.attr)
    return names


def method(node, name):
    """The method of a class that has this name, or None."""
    return next((one for one in node.body if isinstance(one, FUNCTIONS) and one.name == name), None)


# ---- both compared ----


def disagreements(node):
    """Sentences on where a function's or class's docstring and its signature differ."""
    documented = section(ast.get_docstring(node), "Args")
    if isinstance(node, ast.ClassDef):
        named, has = section(ast.get_docstring(node), "Attributes"), fields(node)
        if named is not None:
            yield from _compared(has if has is not None else [], named, "attribute", attributes(node))
        start = method(node, "__init__")
        if documented is not None and has is None:
            yield from _compared([] if start is None else parameters(start), documented, "argument")
    elif documented is not None:
        yield from _compared(parameters(node), documented, "argument")


def _compared(has, named, what, others=frozenset()):
    for name in has:
        if name not in named:
            yield f"the {what} {name!r} is not documented"
    for name in named:
        if name not in has and name not in others:
            yield f"{name!r} is documented, and there is no such {what}"
    for name in sorted({name for name in named if named.count(name) > 1}):
        yield f"the {what} {name!r} is documented twice"


def omissions(node):
    """Sentences on what a function or class of an API page has no documentation of at all."""
    docstring = ast.get_docstring(node)
    if not docstring:
        yield "has no docstring"
        return
    if isinstance(node, ast.ClassDef):
        start = method(node, "__init__")
        has = fields(node) if fields(node) is not None else parameters(start) if start else []
        if has and section(docstring, "Attributes") is None and section(docstring, "Args") is None:
            yield f"documents none of its arguments: {', '.join(has)}"
    elif parameters(node) and section(docstring, "Args") is None:
        yield f"documents none of its arguments: {', '.join(parameters(node))}"


# ---- API pages ----


def pages(folder=ROOT / "docs" / "api"):
    """What the API pages show: (kind, dotted name, members), members None for none, "all", or a list of names."""
    for path in sorted(folder.glob("*.rst")):
        for kind, name, options in DIRECTIVE.findall(path.read_text()):
            given = re.search(r":members:(.*)", options)
            special = re.search(r":special-members:(.*)", options)
            members = None if given is None else [one.strip() for one in given[1].split(",") if one.strip()] or "all"
            if special is not None:
                members = [*(members or []), *(one.strip() for one in special[1].split(","))]
            yield kind, name, members


def offered(trees, package):
    """Public names of a package: those of its `__all__`, but modules and dunder names."""
    for node in trees[package].body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", None) == "__all__":
            names = [one.value for one in node.value.elts if isinstance(one, ast.Constant)]
            names += _homes(trees[package]) if any(isinstance(one, ast.Starred) for one in node.value.elts) else []
            return [name for name in names if not name.startswith("__") and f"{package}.{name}" not in trees]
    return []


def _homes(tree):
    """The table of `yojo/__init__.py`: public name -> module."""
    for node in tree.body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "_HOMES":
            return ast.literal_eval(node.value)
    return {}


def find(trees, name):
    """(module, node) that a dotted name stands for, through what packages offer; None where there is nothing."""
    module, _, own = name.rpartition(".")
    if module not in trees:
        return None
    for node in trees[module].body:
        if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name == own:
            return module, node
        if isinstance(node, ast.ImportFrom) and any(alias.name == own for alias in node.names):
            return find(trees, f"{node.module}.{own}")
    home = _homes(trees[module]).get(own)
    return None if home is None else find(trees, f"{home}.{own}")


def members_of(node, members):
    """Functions of a class that a page shows: (name, node)."""
    if members is None:
        return
    named = [one for one in node.body if isinstance(one, FUNCTIONS)]
    for one in named:
        if one.name in members if members != "all" else not one.name.startswith("_"):
            yield one.name, one


def problems(root=ROOT, api=None):
    """Sentences, one for each disagreement and omission; [] where all is well."""
    trees, found, shown = modules(root), [], []
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (*FUNCTIONS, ast.ClassDef)):
                found += [f"{module}: {node.name} (line {node.lineno}): {text}" for text in disagreements(node)]
    for kind, name, members in pages(api or root / "docs" / "api"):
        if kind == "module":
            if members is not None and name in trees:
                own = [one for one in trees[name].body if isinstance(one, (*FUNCTIONS, ast.ClassDef))]
                shown += [f"{name}.{one.name}" for one in own if not one.name.startswith("_")]
                found += [f"{name}.{one.name}: {text}" for one in own if not one.name.startswith("_") for text in omissions(one)]  # fmt: skip
            continue
        shown.append(name)
        home = find(trees, name)
        if home is None:
            found.append(f"{name}: is on an API page, and is nowhere defined")
            continue
        found += [f"{name}: {text}" for text in omissions(home[1])]
        if isinstance(home[1], ast.ClassDef):
            own = dict(members_of(home[1], members))
            found += [f"{name}.{one}: {text}" for one, node in own.items() for text in omissions(node)]
            if isinstance(members, list):
                known = attributes(home[1])
                found += [f"{name}.{one}: there is no such member" for one in members if one not in known]
    for package in OFFERING:
        found += [f"{package}.{name}: is on no API page" for name in offered(trees, package) if f"{package}.{name}" not in shown]  # fmt: skip
    return found


if __name__ == "__main__":
    for line in (wrong := problems()):
        print(line, file=sys.stderr)
    sys.exit(bool(wrong))

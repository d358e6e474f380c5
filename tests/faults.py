"""Faults that people make, found in a file of Python: each of them one change that compiles."""

import ast
import dataclasses
import hashlib
from collections import Counter
from pathlib import Path

COMPARISONS = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
OPERATIONS = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "+",
    ast.FloorDiv: "*",
    ast.Div: "*",
    ast.Mod: "+",
    ast.BitAnd: "|",
    ast.BitOr: "&",
}
CALLS = {"min": "max", "max": "min", "any": "all", "all": "any", "minimum": "maximum", "maximum": "minimum"}


@dataclasses.dataclass(frozen=True)
class Fault:
    """One change of one file.

    Attributes:
        area, file: where; the file as a path from the root.
        line: of the change, from 1.
        span: (first, last) byte of what is replaced.
        old, new: the texts.
        function: qualified name of the function it stands in.
        number: a hash of file's name, function, texts and how many like it stand before, 10 hexadecimal digits.
    """

    area: str
    file: str
    line: int
    span: tuple
    old: str
    new: str
    function: str
    number: str


def faults_of(area, file, source):
    """All faults that can be put into a file with this source, bytes: list of `Fault`."""
    starts = [0]
    for line in source.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    found, seen = [], Counter()

    def text(node):
        return source[slice(*span(node))].decode()

    def span(node):
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def add(node, where, new, function, context):
        old = source[slice(*where)].decode()
        if old == new:
            return
        key = (Path(file).name, function, context, old, new)
        seen[key] += 1
        number = hashlib.sha256(repr((*key, seen[key])).encode()).hexdigest()[:10]
        found.append(Fault(area, file, node.lineno, where, old, new, function, number))

    def between(left, right, sign, node, function):
        """An operator's sign has no place of its own in the tree: it stands between its operands."""
        first, last = span(left)[1], span(right)[0]
        gap = source[first:last].decode()
        for old in sorted({*SIGNS}, key=len, reverse=True):
            if old in gap and gap.strip(" ()\n\\") == old:
                place = first + len(gap[: gap.index(old)].encode())
                add(node, (place, place + len(old)), sign, function, text(node))
                return

    def walk(node, function):
        for name, value in ast.iter_fields(node):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    visit(child, function, name)

    def visit(node, function, field):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}" if function else node.name
            given = node.args if isinstance(node, ast.FunctionDef) else None
            defaults = [one for one in (*given.defaults, *given.kw_defaults) if one is not None] if given else []
            for child in [*defaults, *node.body]:
                visit(child, function, "body")
            return
        if isinstance(node, ast.Raise | ast.Import | ast.ImportFrom | ast.JoinedStr | ast.Assert):
            return  # messages; and asserts are tests themselves
        if isinstance(node, ast.AnnAssign):
            if node.value is not None:
                visit(node.value, function, "value")
            return
        if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in COMPARISONS:
            between(node.left, node.comparators[0], COMPARISONS[type(node.ops[0])], node, function)
        if isinstance(node, ast.Compare) and len(node.ops) > 1:
            sides = [node.left, *node.comparators]
            for left, right, op in zip(sides, sides[1:], node.ops, strict=False):
                if type(op) in COMPARISONS:
                    between(left, right, COMPARISONS[type(op)], node, function)
        if isinstance(node, ast.BoolOp):
            for left, right in zip(node.values, node.values[1:], strict=False):
                between(left, right, "or" if isinstance(node.op, ast.And) else "and", node, function)
        if isinstance(node, ast.BinOp) and type(node.op) in OPERATIONS and not _is_text(node):
            between(node.left, node.right, OPERATIONS[type(node.op)], node, function)
        if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
            add(node, span(node), text(node.operand), function, text(node))
        if isinstance(node, ast.Constant) and type(node.value) in (bool, int, float) and field != "slice_step":
            new = {bool: lambda v: not v, int: lambda v: v + 1, float: lambda v: v * 2 or 1.0}[type(node.value)]
            if node.value not in (float("inf"), float("-inf")):
                add(node, span(node), repr(new(node.value)), function, "")
        if isinstance(node, ast.If | ast.IfExp | ast.While) and not isinstance(node.test, ast.Compare):
            add(node.test, span(node.test), f"(not ({text(node.test)}))", function, "")
        if isinstance(node, ast.Return) and node.value is not None and not _is_none(node.value):
            add(node, span(node.value), "None", function, "return")
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", None)
            if name in CALLS:
                last = span(node.func)[1]
                add(node, (last - len(name), last), CALLS[name], function, text(node))
            if len(node.args) + len(node.keywords) > 1 and name not in ("dict", "print"):
                for keyword in node.keywords:
                    first, last = span(keyword)
                    while source[last : last + 1] in (b",", b" ", b"\n") and source[last - 1 : last] != b",":
                        last += 1
                    add(keyword, (first, last), "", function, text(node))
        if isinstance(node, ast.Continue | ast.Break):
            add(node, span(node), "pass", function, "")
        if isinstance(node, ast.AugAssign) or (isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)):
            add(node, span(node), "pass", function, "")
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute | ast.Subscript):
            add(node, span(node), "pass", function, "")
        walk(node, function)

    visit_body = ast.parse(source).body
    for node in visit_body:
        visit(node, "", "body")
    return found


SIGNS = (
    *("<", "<=", ">", ">=", "==", "!=", "is", "is not", "in", "not in", "and", "or"),
    *("+", "-", "*", "/", "//", "%", "&", "|"),
)


def _is_none(node):
    return isinstance(node, ast.Constant) and node.value is None


def _is_text(node):
    return any(
        isinstance(n, ast.JoinedStr) or (isinstance(n, ast.Constant) and isinstance(n.value, str))
        for n in ast.walk(node)
    )


def compiles(fault, source):
    """Whether the file still is Python with the fault in it."""
    try:
        compile(changed(fault, source), fault.file, "exec")
    except SyntaxError:
        return False
    return True


def changed(fault, source):
    """The file's bytes with the fault in them."""
    first, last = fault.span
    if source[first:last].decode() != fault.old:
        raise ValueError(f"{fault.file}:{fault.line} is no longer {fault.old!r}")
    return source[:first] + fault.new.encode() + source[last:]

"""The rooms of the package and the floors they stand on: an import goes down, and nothing goes round."""

import ast
import graphlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# From the ground up. A room imports from the floors below it and from itself, never from its neighbours.
FLOORS = (
    ("yojo_kernels", "yojo.config", "yojo.files"),
    ("yojo.families",),
    ("yojo.patching",),
    ("yojo.inputs",),
    ("yojo.data",),
    ("yojo.saving",),
    ("yojo.reward_model",),
    ("yojo.judges",),
    ("yojo.converting", "yojo.costs", "yojo.rankings", "yojo.rewards", "yojo.scoring"),
    ("yojo.evaluation", "yojo.serving"),
    ("yojo.training", "yojo.demo"),
    ("yojo.cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# `yojo/__init__.py` names modules as text and imports none; others take its version from it.
TABLE = "yojo"
LARGEST = 600  # lines of a file that fits in one's head


def modules():
    """dict: name -> path of every module of both packages."""
    found = {}
    for package in ("yojo", "yojo_kernels"):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imports(path):
    """Names of our own modules that a file imports, wherever in it: (module, line)."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}:{node.lineno}: imports are absolute"
            for alias in node.names if node.module in MODULES else ():
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module, node.lineno


def room_of(module):
    return next((room for room in FLOOR_OF if module == room or module.startswith(f"{room}.")), None)


def test_every_module_is_in_a_room():
    assert [name for name in MODULES if room_of(name) is None] == [TABLE]


@pytest.mark.parametrize("module", [name for name in MODULES if name != TABLE])
def test_imports_go_down(module):
    own = room_of(module)
    for target, line in imports(MODULES[module]):
        other = room_of(target)
        if target == TABLE:
            taken = {"__version__", "former"}  # of the names that a room had before there were rooms
            assert own in ("yojo.demo", "yojo.cli") or only_takes(MODULES[module], taken), f"{module}:{line}"
        else:
            assert other == own or FLOOR_OF[other] < FLOOR_OF[own], f"{module}:{line} imports {target}"


def only_takes(path, names):
    taken = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == TABLE:
            taken |= {alias.name for alias in node.names if f"{TABLE}.{alias.name}" not in MODULES}
        elif isinstance(node, ast.Import) and any(alias.name == TABLE for alias in node.names):
            return False
    return taken <= names


def test_no_import_goes_round():
    """Imports inside of functions count, too: a module that needs another needs it whenever it is loaded."""
    graph = {name: {target for target, _ in imports(path) if target != name} for name, path in MODULES.items()}
    tuple(graphlib.TopologicalSorter(graph).static_order())  # a CycleError names the modules


def test_files_fit_in_ones_head():
    paths = [path for folder in ("yojo", "yojo_kernels", "bench", "tests") for path in (ROOT / folder).rglob("*.py")]
    long = {str(path.relative_to(ROOT)): n for path in paths if (n := len(path.read_text().splitlines())) > LARGEST}
    assert not long


def test_no_file_only_forwards():
    """A module says something itself; packages may name what they offer."""
    for name, path in MODULES.items():
        body = ast.parse(path.read_text()).body[1:]
        if path.name != "__init__.py":
            assert not all(isinstance(node, (ast.Import, ast.ImportFrom, ast.Assign)) for node in body) or any(
                isinstance(node, ast.Assign) and not isinstance(node.value, ast.List) for node in body
            ), name


def test_no_two_files_of_tests_of_one_run_have_one_name():
    """pytest knows them by their names alone, and refuses to collect the second."""
    apart = {"gpu", "interpreted", "pretended"}
    names = [path.name for path in (ROOT / "tests").rglob("test_*.py") if path.parent.name not in apart]
    assert sorted({name for name in names if names.count(name) > 1}) == []

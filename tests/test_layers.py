"""The layer table of the design: imports point down, and the package stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastminima

ROOT = Path(fastminima.__file__).parent
LAYERS = (
    {
        "statistics",
        "_native",
        "_dtypes",
        "_flat",
        "_memory",
        "_optional",
        "_parameters",
        "_processes",
        "_sums",
    },
    {"ops"},
    {"capture", "curvature"},
    {"quantities", "spectrum", "theory"},
    {"monitor", "optim", "callbacks", "report"},
    {"cli"},
)
LAYER = {unit: level for level, units in enumerate(LAYERS) for unit in units}
# The rooms of `capture`, from the ground up; its docstring is the map.
FLOORS = (
    {"errors"},
    {"contributions", "graph"},
    {"compiled", "rows"},
    {"options", "reading"},
    {"rules"},
    {"session"},
    {"accumulation", "audit", "minibatch", "ranks", "singles"},
    {"stepping"},
    {"probe"},
)
FLOOR = {room: level for level, rooms in enumerate(FLOORS) for room in rooms}
# The public names, and the report on everything: above the layers.
TOP = {"__init__", "__main__", "typing"}


def modules():
    """Every module by its dotted name within the package, "" for the root."""
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts[-1] == "__init__" and len(parts) > 1:
            parts = parts[:-1]
        yield ".".join(parts), path


def imports(name, path, known):
    """Modules of the package that a module imports, for its types too."""
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    package = [] if name == "__init__" else package
    for node in at_import(ast.parse(path.read_text())):
        for target in targets(node, package):
            yield from (t for t in resolve(target, known) if t != name)


def at_import(tree):
    """Import statements outside functions; those under TYPE_CHECKING count."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield node
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            waiting += ast.iter_child_nodes(node)


def targets(node, package):
    """What an import statement names, relative to the root of the package."""
    if isinstance(node, ast.Import):
        names = [alias.name.split(".") for alias in node.names]
        return [name[1:] for name in names if name[0] == "fastminima"]
    if node.level:
        base = package[: len(package) - node.level + 1]
    elif (node.module or "").split(".")[0] == "fastminima":
        return [[*node.module.split(".")[1:], alias.name] for alias in node.names]
    else:
        return []
    base = base + (node.module.split(".") if node.module else [])
    return [[*base, alias.name] for alias in node.names]


def resolve(target, known):
    """The module that holds a name: the longest known prefix."""
    for length in range(len(target), 0, -1):
        name = ".".join(target[:length])
        if name in known:
            return [name]
    return ["__init__"]


@pytest.fixture(scope="module")
def graph():
    known = dict(modules())
    return {name: set(imports(name, path, known)) for name, path in known.items()}


def unit(name):
    return name.split(".")[0]


def test_every_module_has_a_layer(graph):
    assert {unit(name) for name in graph} - TOP <= set(LAYER)


def test_imports_point_down(graph):
    wrong = [
        f"{name} (layer {LAYER[unit(name)]}) imports {target}"
        for name, found in graph.items()
        for target in found
        if unit(name) not in TOP
        and (
            unit(target) in TOP
            or (unit(target) != unit(name) and LAYER[unit(target)] > LAYER[unit(name)])
        )
    ]
    assert not wrong


def room(name):
    return name.split(".")[1]


def rooms_that_import_up(graph):
    inside = {n: ts for n, ts in graph.items() if n.startswith("capture.")}
    return [
        f"{name} (floor {FLOOR[room(name)]}) imports {target}"
        for name, found in inside.items()
        for target in found
        if target.startswith("capture")
        and (target == "capture" or room(target) != room(name))
        and (target == "capture" or FLOOR[room(target)] >= FLOOR[room(name)])
    ]


def test_rooms_of_capture_import_from_the_floors_below(graph):
    names = {room(name) for name in graph if name.startswith("capture.")}
    assert names == FLOOR.keys()
    assert not rooms_that_import_up(graph)


def test_folders_of_capture_are_used_from_where_the_map_says(graph):
    """The map in the docstring has every room, and each on a line of its own."""
    text = ast.get_docstring(ast.parse((ROOT / "capture/__init__.py").read_text()))
    assert text
    for name in FLOOR:
        folder = (ROOT / "capture" / name).is_dir()
        assert f"{name}/ " in text if folder else f"{name}.py" in text, name


def test_no_cycles(graph):
    cycles = [path for path in map(list, walk_cycles(graph)) if path]
    assert not cycles


def walk_cycles(graph):
    """Import cycles, each as the path that closes it (depth-first search)."""
    done, path = set(), []

    def visit(name):
        if name in path:
            yield [*path[path.index(name) :], name]
        elif name not in done:
            path.append(name)
            for target in sorted(graph[name]):
                yield from visit(target)
            path.pop()
            done.add(name)

    for name in graph:
        yield from visit(name)


def test_the_checks_can_fail():
    known = dict(modules())
    (node,) = ast.parse("from ..capture.reading import plan").body
    (target,) = targets(node, ["ops"])
    assert resolve(target, known) == ["capture.reading.plan"]
    assert LAYER["capture"] > LAYER["ops"]
    assert list(walk_cycles({"a": {"b"}, "b": {"a"}})) == [["a", "b", "a"]]
    upward = {"capture.rows.layout": {"capture.reading.plan"}}
    assert len(rooms_that_import_up(upward)) == 1
    hidden = "if TYPE_CHECKING:\n    from .b import c"
    assert len(list(at_import(ast.parse(hidden)))) == 1


def test_graph_is_not_empty(graph):
    assert "ops.table" in graph["ops.dense"]
    assert sum(map(len, graph.values())) > 30


def test_import_brings_in_no_more_than_needed():
    code = (
        "import sys, torch; before = set(sys.modules); import fastminima;"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    brought = set(out.stdout.split())
    assert "fastminima" in brought
    assert not brought & {"triton", "matplotlib", "sklearn", "scipy", "tqdm", "pandas"}

"""The shape of the house: imports point one way, files are short, nothing unpickles. Read from the source by `ast`."""

from __future__ import annotations

import ast
import importlib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("prune_env", "baselines", "agents")

# Room -> what it may never import. A room is a module prefix; the longest that fits a module is its room.
FORBIDDEN = {
    "prune_env": ("baselines", "agents"),
    "prune_env.tasks": ("prune_env.pruning", "prune_env.envs", "prune_env.config"),
    "prune_env.pruning": ("prune_env.tasks", "prune_env.envs", "prune_env.config"),
    "baselines": ("agents",),
    "agents": (),
}
LEARNING = ("stable_baselines3", "sb3_contrib")
PICKLES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
# A plan is checked against a graph and a graph counts a plan, so each names the other; the graph only in annotations.
ANNOTATION_ONLY = {("prune_env.pruning.graph", "prune_env.pruning.plan")}
MAX_LINES = 400


@cache
def sources() -> dict[str, Path]:
    """Module name -> file, for every module of the three packages."""
    found = {}
    for path in sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(module: str, path: Path, node: ast.AST) -> list[str]:
    """Absolute names that one import statement loads; `from package import module` counts as the module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = node.module or ""
    if node.level:
        package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
        above = package[: len(package) - node.level + 1]
        base = ".".join([*above, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" if f"{base}.{alias.name}" in sources() else base for alias in node.names]


def imports(module: str) -> set[str]:
    """Everything a module imports, wherever the statement stands: a late or a typing import still is a dependency."""
    path = sources()[module]
    return {name for node in ast.walk(tree(path)) for name in imported(module, path, node)}


def inside(name: str, room: str) -> bool:
    return name == room or name.startswith(f"{room}.")


def rooms(module: str) -> list[str]:
    return [room for room in FORBIDDEN if inside(module, room)]


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def test_every_package_is_read():
    for package in PACKAGES:
        assert package in sources(), f"{package} has no modules: these tests would prove nothing"


@pytest.mark.parametrize("module", sources())
def test_imports_point_one_way(module: str):
    wrong = [
        name
        for room in rooms(module)
        for name in imports(module)
        for forbidden in FORBIDDEN[room]
        if inside(name, forbidden)
    ]
    assert not wrong, f"{module} may not import {sorted(set(wrong))}"


@pytest.mark.parametrize("module", [m for m in sources() if not inside(m, "agents")])
def test_only_agents_knows_the_learning_library(module: str):
    wrong = {name for name in imports(module) for library in LEARNING if inside(name, library)}
    assert not wrong, f"{module} imports {sorted(wrong)}; only agents may"


def test_no_module_takes_part_in_an_import_cycle():
    """Late imports and those for annotations count as well: they only hide a cycle."""
    edges = {
        module: {n for n in imports(module) if n in sources() and n != module and (module, n) not in ANNOTATION_ONLY}
        for module in sources()
    }
    while edges:
        free = [module for module, needed in edges.items() if not needed & edges.keys()]
        assert free, f"import cycle among {sorted(edges)}"
        for module in free:
            del edges[module]


def test_annotation_only_imports_do_not_run():
    for module, name in ANNOTATION_ONLY:
        path = sources()[module]
        statements = [n for n in ast.walk(tree(path)) if name in imported(module, path, n)]
        guarded = [
            inner
            for node in ast.walk(tree(path))
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            for inner in ast.walk(node)
        ]
        assert statements, f"{module} no longer names {name}: drop the exception"
        assert all(statement in guarded for statement in statements)


@pytest.mark.parametrize("module", sources())
def test_no_file_is_longer_than_a_reader_can_hold(module: str):
    lines = len(sources()[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines: what is its second noun?"


@pytest.mark.parametrize("module", sources())
def test_nothing_unpickles(module: str):
    path = sources()[module]
    wrong = sorted(name for name in imports(module) if name.split(".")[0] in PICKLES)
    assert not wrong, f"{module} imports {wrong}"
    for name, call in calls(path):
        options = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        where = f"{module}:{call.lineno}"
        if name == "torch.load":
            assert options.get("weights_only") == "True", f"{where}: torch.load without weights_only=True"
        assert name != "torch.save", f"{where}: torch.save writes a pickle; use safetensors"
        assert options.get("allow_pickle", "False") == "False", f"{where}: allow_pickle"


@pytest.mark.parametrize("module", sources())
def test_no_room_is_named_after_nothing(module: str):
    vague = {"util", "utils", "helper", "helpers", "misc", "common"}
    assert not vague & set(module.split(".")), f"{module}: which noun does the file hold?"


def test_public_names_resolve():
    for package in PACKAGES:
        module = importlib.import_module(package)
        missing = [name for name in getattr(module, "__all__", []) if not hasattr(module, name)]
        assert not missing, f"{package}.__all__ names {missing}"

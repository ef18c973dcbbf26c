"""Who imports whom, read off the syntax trees of all product files, imports in functions included.

What only types need (`if TYPE_CHECKING`) does not count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("runtime.ops", "runtime.backends", "runtime")  # each may import itself and those before
DEVICES = ("cpu", "cuda", "null", "reference", "devices")


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    inside = parts[parts[0] == "runtime" : len(parts) - (parts[-1] == "__init__")]
    return ".".join(("runtime", *inside))


FILES = {
    module_of(path): path
    for folder in ("ops", "backends", "runtime")
    for path in sorted((ROOT / folder).rglob("*.py"))
}


def nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All of a tree, but not what is there for types alone."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node
            yield from nodes(node)


def imported(module: str, source: str, package: str) -> Iterator[str]:
    """Product modules that a source text imports."""
    for node in nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            origin = ".".join(part for part in (above, node.module) if part)
            names = [(origin, alias.name) for alias in node.names]
        else:
            continue
        for origin, name in names:
            inner = f"{origin}.{name}"
            found = inner if inner in FILES else origin
            if found in FILES and found != module:
                yield found


@cache
def imports() -> dict[str, set[str]]:
    """module -> modules it imports."""
    found = {}
    for module, path in FILES.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        found[module] = set(imported(module, path.read_text("utf-8"), package))
    return found


def arrows(importers: tuple[str, ...], targets: tuple[str, ...]) -> list[str]:
    """Imports of modules below `targets` by modules below `importers`."""
    return [
        f"{module} imports {target}"
        for module, found in imports().items()
        for target in sorted(found)
        if _below(module, importers) and _below(target, targets)
    ]


def _below(module: str, names: tuple[str, ...]) -> bool:
    return any(module == name or module.startswith(f"{name}.") for name in names)


def layer(module: str) -> int:
    return next(n for n, name in enumerate(LAYERS) if _below(module, (name,)))


def test_ops_then_backends_then_runtime():
    wrong = [
        f"{module} imports {target}"
        for module, found in imports().items()
        for target in sorted(found)
        if layer(target) > layer(module)
    ]
    assert wrong == []


@pytest.mark.parametrize("device", ["cuda", "null"])
def test_no_device_imports_another(device: str):
    others = tuple(f"runtime.backends.{name}" for name in DEVICES if name != device)
    assert arrows((f"runtime.backends.{device}",), others) == []


def test_plan_and_passes_know_no_device():
    shared = ("runtime.backends.plan", "runtime.backends.passes")
    assert arrows(shared, tuple(f"runtime.backends.{name}" for name in DEVICES)) == []


def test_no_circles():
    try:
        TopologicalSorter(imports()).prepare()
    except CycleError as error:
        pytest.fail("imports in a circle: " + " <- ".join(error.args[1]))


def test_what_counts_as_an_import():
    source = """
from typing import TYPE_CHECKING
if TYPE_CHECKING:
    from runtime.ops.graph import Graph
def late():
    from .graph import walk
    from runtime.backends import forks, cpu
"""
    wanted = {"runtime.ops.graph", "runtime.backends.forks", "runtime.backends.cpu"}
    assert set(imported("runtime.ops.x", source, "runtime.ops")) == wanted

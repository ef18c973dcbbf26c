"""Public names say what they are: every function, class and method of the product is described."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def trees() -> dict[str, ast.Module]:
    """Syntax trees of all product files, by path."""
    paths = (p for folder in ("ops", "backends", "runtime") for p in (ROOT / folder).rglob("*.py"))
    return {p.relative_to(ROOT).as_posix(): ast.parse(p.read_text("utf-8")) for p in paths}


def names(node: ast.AST, owner: str = "") -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    """Public functions, classes and methods below a module or class, with their owner's name."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.ClassDef) and not child.name.startswith("_"):
            yield owner, child
            if isinstance(child, ast.ClassDef):
                yield from names(child, child.name)


def undescribed(files: dict[str, ast.Module]) -> list[str]:
    """Names without a docstring. A method has that of the class it fulfils, as for `help`."""
    classes = {c.name: c for tree in files.values() for _, c in names(tree) if _is_class(c)}

    def described(owner: str, name: str) -> bool:
        node = classes.get(owner)
        if node is None:
            return False
        own = [m for _, m in names(node, owner) if m.name == name]
        bases = [ast.unparse(base).split(".")[-1] for base in node.bases]
        return any(map(ast.get_docstring, own)) or any(described(base, name) for base in bases)

    return [
        f"{path}:{node.lineno} {owner and owner + '.'}{node.name}"
        for path, tree in files.items()
        for owner, node in names(tree)
        if not ast.get_docstring(node) and not described(owner, node.name)
    ]


def _is_class(node: ast.AST) -> bool:
    return isinstance(node, ast.ClassDef)


def test_every_public_name_is_described():
    assert undescribed(trees()) == []


def test_what_counts_as_described():
    source = '''
class Driver:
    """Described."""

    def launch(self):
        """Described."""


class Fake(Driver):
    """Described."""

    def launch(self): ...

    def leaks(self): ...

    def _own(self): ...


def build(): ...
'''
    found = undescribed({"x.py": ast.parse(source)})
    assert [entry.partition(" ")[2] for entry in found] == ["Fake.leaks", "build"]

"""What a kernel is made of: its own source file and all that this imports from the package.

A compiled kernel is good until one of these files changes, and only then: who edits one kernel
compiles that kernel again. Imports are found in the syntax tree, nothing is executed; since
parsing takes longer than all else at a start, what a file imports is kept under its content.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from runtime.backends.plan.entries import Entries

_PACKAGE = "runtime"
_MEMORY = "imports"  # the entry that keeps them
_MOST = 4096  # files remembered, of all versions


class Sources:
    """Digests of modules together with everything of the package they import.

    apart: modules that are left out, since no code depends on how they are written.
    """

    def __init__(self, entries: Entries, apart: Collection[str] = ()) -> None:
        self._entries, self._apart = entries, frozenset(apart)
        self._files: dict[str, tuple[str, list[str]]] = {}  # module -> hash, imports
        self._digests: dict[tuple[str, ...], str] = {}
        self._imports: dict[str, list[str]] | None = None  # hash -> imports, of earlier processes

    def digest(self, *modules: str) -> str:
        """Of these modules and all they import, one by one or through each other."""
        if modules not in self._digests:
            files = sorted(self._closure(modules).items())
            text = "\n".join(f"{module} {content}" for module, content in files)
            self._digests[modules] = hashlib.sha256(text.encode()).hexdigest()
        return self._digests[modules]

    def unchanged(self, *modules: str) -> bool:
        """Whether all these files are still what this process read of them.

        Compile processes read them later: what they make of an edited one must not be kept.
        """
        return all(_content(m)[0] == content for m, content in self._closure(modules).items())

    def modules(self, *modules: str) -> list[str]:
        """The names of all modules that a digest covers, sorted."""
        return sorted(self._closure(modules))

    def _closure(self, modules: Collection[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        todo, known = list(modules), len(self._memory())
        while todo:
            module = todo.pop()
            if module not in found and module not in self._apart:
                found[module], imports = self._file(module)
                todo += imports
        if len(self._memory()) > known:
            self._entries.write(_MEMORY, "", json.dumps(self._memory()).encode())
        return found

    def _file(self, module: str) -> tuple[str, list[str]]:
        """The hash of a module's name and source, and what it imports."""
        if module not in self._files:
            content, path = _content(module)
            if content not in self._memory():
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                self._memory()[content] = sorted(set(_imports(path.read_bytes(), package)))
            self._files[module] = content, self._memory()[content]
        return self._files[module]

    def _memory(self) -> dict[str, list[str]]:
        if self._imports is None:
            kept = self._entries.read(_MEMORY)
            self._imports = json.loads(kept[1]) if kept else {}
            if len(self._imports) > _MOST:
                self._imports = {}
        return self._imports


def _content(module: str) -> tuple[str, Path]:
    """The hash of a module's name and source, and its file."""
    path = source_path(module)
    assert path is not None, f"{module} is a module of the package"
    return hashlib.sha256(f"{module}\n".encode() + path.read_bytes()).hexdigest(), path


def _imports(source: bytes, package: str) -> Iterator[str]:
    """Modules of the package that a source file imports, anywhere in it."""
    for node in ast.walk(ast.parse(source)):
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
            found = inner if name and source_path(inner) else origin
            if found.startswith(f"{_PACKAGE}.") and source_path(found):
                yield found


def source_path(module: str) -> Path | None:
    """The file of a module of the package, wherever the package's folders stand."""
    package, *parts = module.split(".")
    if package != _PACKAGE or not parts:
        return None
    base = f"{_folder(parts[0])}/{'/'.join(parts)}"
    paths = (Path(f"{base}.py"), Path(f"{base}/__init__.py"))
    return next((path for path in paths if path.is_file()), None)


@functools.cache
def _folder(name: str) -> Path:
    """Where the module or folder `name` of the package stands: in a checkout beside it."""
    folders = [Path(folder) for folder in sys.modules[_PACKAGE].__path__]
    here = (f for f in folders if (f / name).exists() or (f / f"{name}.py").exists())
    return next(here, folders[0])

"""Which of its arguments a kernel reads and writes, found in its source: no second list to keep.

The kernel's function is searched for accesses to its pointers, and so is every function it hands
them to. Graphs take their edges from this.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import BackendError

from .intrinsic import WIDTH, Intrinsic

PARSING = threading.RLock()  # CPython 3.11 fails where two threads parse at once
_WIDE = 16  # bytes that `copy_async16` reads


@dataclass(frozen=True)
class Accesses:
    """Names of pointer arguments that a kernel reads and that it writes.

    `widths`: name -> bytes of its widest access, to which the pointer must be aligned. `waits`:
    every thread passes `launch_wait`, so the kernel may be launched before the last one ended.
    `early`: what it touches before that, or reads through a cache that takes it for `unchanging`,
    so that it must be done before the kernel begins.
    """

    reads: frozenset[str]
    writes: frozenset[str]
    widths: dict[str, int]
    waits: bool
    early: frozenset[str] = frozenset()
    unchanging: frozenset[str] = frozenset()


@functools.cache
def accesses(kernel: Kernel) -> Accesses:
    """Of a kernel of the catalogue. BackendError: none is called so."""
    from .catalogue import declared

    found = declared(kernel)
    kinds = {name: kind[:-1] for name, kind in found.entry.arguments if kind.endswith("*")}
    uses = _uses(found.function, frozenset(kinds))
    widths: dict[str, int] = {}
    for name, mode, count in uses:
        if mode == "unchanging":
            continue
        nbytes = _WIDE if count is None else count * WIDTH[kinds[name]]
        widths[name] = max(nbytes, widths.get(name, 0))
    reads, writes, unchanging = (
        frozenset(n for n, mode, _ in uses if mode == m) for m in ("read", "write", "unchanging")
    )
    early = {name for name, _, _ in _uses(found.function, frozenset(kinds), before_wait=True)}
    return Accesses(reads, writes, widths, waits(found.function), unchanging | early, unchanging)


def _uses(
    function: Callable, names: frozenset[str], before_wait: bool = False
) -> set[tuple[str, str, int | None]]:
    """(parameter, what, elements at once) of everything done with `names`.

    What: "read", "write", and also "unchanging" for reads of what is taken to be so.
    """
    scope, found = _scope(function), set()
    meant = _picked(function, names, scope)
    for call in _calls(function, before_wait):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        passed = [(i, a.id) for i, a in enumerate(call.args) if isinstance(a, ast.Name)]
        handed = [(i, name) for i, alias in passed for name in meant.get(alias, ())]
        called = scope.get(call.func.id)
        if handed and isinstance(called, Intrinsic):
            pointers = [name for i, name in handed if _is_pointer(called, i)]
            found |= {(name, *mode) for name in pointers for mode in _modes(called)}
        elif handed and isinstance(called, types.FunctionType):
            found |= _handed_on(called, handed)
    return found


def _picked(function: Callable, names: frozenset[str], scope: dict) -> dict[str, set[str]]:
    """Names of pointers -> the parameters they may be."""
    meant = {name: {name} for name in names}
    for node in _in_order(_tree(function)):
        for target, value in _assigned(node):
            found = [name for a in _chosen(value, scope) for name in meant.get(a, ())]
            if isinstance(target, ast.Name) and found:
                meant[target.id] = set(found)
    return meant


def _chosen(value: ast.expr, scope: dict) -> list[str]:
    """Names of which a value may be one: `a`, `a if .. else b`, `pick(i, a, b, c, d)`."""
    match value:
        case ast.Name(name):
            return [name]
        case ast.IfExp():
            return _chosen(value.body, scope) + _chosen(value.orelse, scope)
        case ast.Call(ast.Name(name), [_, *pointers]):
            called = scope.get(name)
            if isinstance(called, Intrinsic) and called.rule == "pick":
                return [name for p in pointers for name in _chosen(p, scope)]
    return []


def _in_order(node: ast.AST) -> Iterator[ast.AST]:
    """A node and all inside it, as they stand in the text."""
    yield node
    for child in ast.iter_child_nodes(node):
        yield from _in_order(child)


def _assigned(node: ast.AST) -> list[tuple[ast.expr, ast.expr]]:
    """Targets of an assignment with what each gets."""
    if not isinstance(node, ast.Assign):
        return []
    target, value = node.targets[0], node.value
    if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        return list(zip(target.elts, value.elts, strict=True))
    return [(target, value)]


def _handed_on(
    called: types.FunctionType, handed: list[tuple[int, str]]
) -> set[tuple[str, str, int | None]]:
    parameters = called.__code__.co_varnames
    inner = _uses(called, frozenset(parameters[i] for i, _ in handed))
    return {
        (name, mode, count)
        for i, name in handed
        for parameter, mode, count in inner
        if parameter == parameters[i]
    }


def _is_pointer(called: Intrinsic, position: int) -> bool:
    """The first argument of an access; the third of a copy to shared memory."""
    if called.rule == "copy_async":
        return position == 2
    return position == 0 and called.rule in ("load", "stream", "store", "atomic")


def _modes(called: Intrinsic) -> list[tuple[str, int | None]]:
    if called.rule == "copy_async":
        return [("read", None)]
    if called.rule == "atomic":
        return [("read", 1), ("write", 1)]
    if called.rule == "store":
        return [("write", called.parameters[0])]
    unchanging = called.rule == "stream" or called.parameters[1] == "constant"
    return [("read", called.parameters[0])] + [("unchanging", None)] * unchanging


def _scope(function: Callable) -> dict[str, Any]:
    code = function.__code__
    cells = zip(code.co_freevars, function.__closure__ or (), strict=True)
    return function.__globals__ | {name: cell.cell_contents for name, cell in cells}


@functools.cache
def _tree(function: Callable) -> ast.FunctionDef:
    try:
        source = textwrap.dedent(inspect.getsource(function))
    except OSError as error:
        raise BackendError(f"the source of kernel {function.__name__} is not there") from error
    with PARSING:
        tree = ast.parse(source).body[0]
    assert isinstance(tree, ast.FunctionDef), "kernels are plain functions"
    return tree


def _calls(function: Callable, before_wait: bool) -> Iterator[ast.AST]:
    body: list[ast.stmt] = _tree(function).body
    at = _wait_of(body) if before_wait else None
    for statement in body[:at]:
        yield from ast.walk(statement)


def waits(function: Callable) -> bool:
    """Whether every thread passes `launch_wait`: in the body itself, behind no early end."""
    return _wait_of(_tree(function).body) is not None


def _wait_of(body: list[ast.stmt]) -> int | None:
    for i, statement in enumerate(body):
        if any(isinstance(node, ast.Return) for node in ast.walk(statement)):
            return None
        if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
            called = statement.value.func
            if isinstance(called, ast.Name) and called.id == "launch_wait":
                return i
    return None

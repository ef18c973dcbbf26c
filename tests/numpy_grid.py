"""Runs a kernel's own Python function on all threads of a grid at once, in numpy.

The quick brother of `backends/cuda/simulator.py`, for whole models: every value is an array with an
element for each thread, a branch runs under the mask of the threads that take it, and all threads
go on in step. It finds accesses out of bounds, and no races: those are the simulator's to find.

The function's syntax tree is rewritten: assignments keep the values of threads that are not
in the branch, `if`, `while`, `and`, conditional expressions and `return` narrow the mask. What a
kernel cannot say on a GPU either (a list, a string) is not understood.
"""

from __future__ import annotations

import ast
import functools
import inspect
import textwrap
import threading
import types
from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy_lanes import MEANINGS, PLAIN, Pointer, Registers, Run, Shared, minimum_of, select, truth

from runtime.backends.cuda import simulator
from runtime.backends.cuda.accesses import PARSING
from runtime.backends.cuda.intrinsic import Declared, Intrinsic
from runtime.ops.errors import BackendError

_AT_ONCE = 1 << 14  # threads
_UNDEFINED = object()
# Of each kernel's function its twin on arrays, and the run that it asks for threads and masks.
_twins: WeakKeyDictionary[Callable, tuple[Run, Callable]] = WeakKeyDictionary()
_ONE = threading.Lock()  # a run is of one launch at a time; stages of layers launch in threads


def launch(kernel: Declared, grid: int | tuple[int, ...], *arguments: Any) -> None:
    """As `simulator.launch`, many blocks at a time."""
    x, y, z, *_ = (grid, 1, 1) if isinstance(grid, int) else (*grid, 1, 1)
    if kernel.function not in _twins:
        made = Run(kernel.entry.threads, kernel.entry.shared_nbytes)
        _twins[kernel.function] = made, _Rewriter(made).function(kernel.function)
    run, function = _twins[kernel.function]
    bound = [
        Pointer(a.array, a.kind, run) if isinstance(a, _Array) else a
        for a in _bound(kernel, arguments)
    ]
    step = max(1, _AT_ONCE // kernel.entry.threads)
    with _ONE, np.errstate(all="ignore"):
        for first in range(0, x * y * z, step):
            run.begin((x, y, z), first, min(step, x * y * z - first))
            function(*bound)


class _Array:
    def __init__(self, array: np.ndarray, kind: str) -> None:
        self.array, self.kind = array, kind


def _bound(kernel: Declared, arguments: tuple[Any, ...]) -> list[Any]:
    """Checked as the simulator does."""
    found = simulator.bind(kernel, arguments)
    pairs = zip(found, kernel.entry.arguments, arguments, strict=True)
    return [
        _Array(given, kind[:-1]) if kind.endswith("*") else value
        for value, (_, kind), given in pairs
    ]


class _Control:
    """What rewritten functions call; `returned` of each that is under way."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self._returned: list[Any] = []
        self._results: list[Any] = []

    def enter(self, function: Callable) -> Callable:
        """A device function whose caller's mask is as before when it has ended."""

        @functools.wraps(function)
        def called(*arguments: Any) -> Any:
            saved = self.run.mask
            self._returned.append(None)
            self._results.append(None)
            try:
                function(*arguments)
                return self._results[-1]
            finally:
                self._returned.pop()
                self._results.pop()
                self.run.mask = saved

        return called

    def give(self, value: Any) -> bool:
        """`return value`, of the threads that are here; whether none is left in the function."""
        mask = self.run.mask
        before = self._returned[-1]
        self._results[-1] = value if before is None else select(mask, value, self._results[-1])
        if mask is None:
            return True
        self._returned[-1] = mask if before is None else before | mask
        self.run.mask = np.zeros_like(mask)
        return False

    def keep(self, new: Any, old: Any) -> Any:
        """The value of a name after an assignment."""
        return new if old is _UNDEFINED else select(self.run.mask, new, old)

    def put(self, target: Any, index: Any, value: Any) -> None:
        """target[index] = value."""
        target.put(index, value, self.run.mask)

    def branch(self, test: Any) -> Iterator[None]:
        """Once, under the mask of those for which the test holds; not at all if there are none."""
        test = truth(test)
        if isinstance(test, bool):
            if test:
                yield
            return
        saved = self.run.mask
        mask = test if saved is None else saved & test
        if not mask.any():
            return
        self.run.mask = None if saved is None and mask.all() else mask
        try:
            yield
        finally:
            self._restore(saved)

    def loop(self, test: Callable[[], Any]) -> Iterator[None]:
        """`while test()`."""
        saved = self.run.mask
        try:
            while True:
                found = truth(test())
                if isinstance(found, bool):
                    if not found:
                        return
                else:
                    mask = found if self.run.mask is None else self.run.mask & found
                    if not mask.any():
                        return
                    self.run.mask = None if self.run.mask is None and mask.all() else mask
                yield
        finally:
            self._restore(saved)

    def span(self, *arguments: Any) -> Iterator[Any]:
        """`range`, whose bounds may differ from thread to thread."""
        if all(isinstance(n, int | np.integer) for n in arguments):
            yield from range(*map(int, arguments))
            return
        start, stop, step = {1: (0, *arguments, 1), 2: (*arguments, 1)}.get(
            len(arguments), arguments
        )
        place = [start]
        for _ in self.loop(lambda: place[0] < stop):
            yield place[0]
            place[0] = place[0] + step

    def choose(self, test: Any, yes: Callable[[], Any], no: Callable[[], Any]) -> Any:
        """yes() if test else no(), each under its mask."""
        test = truth(test)
        if isinstance(test, bool):
            return yes() if test else no()
        found: Any = None
        for part, value in ((test, yes), (~test, no)):
            for _ in self.branch(part):
                made = value()
                found = made if found is None else select(part, made, found)
        return found if found is not None else yes()

    def every(self, *tests: Callable[[], Any]) -> Any:
        """`and`."""
        found = truth(tests[0]())
        for test in tests[1:]:
            if isinstance(found, bool):
                found = truth(test()) if found else False
            else:
                inner = np.zeros_like(found)
                for _ in self.branch(found):
                    inner = truth(test())
                found = found & inner
        return found

    def some(self, *tests: Callable[[], Any]) -> Any:
        """`or`."""
        found = truth(tests[0]())
        for test in tests[1:]:
            if isinstance(found, bool):
                found = True if found else truth(test())
            else:
                inner = np.ones_like(found)
                for _ in self.branch(~found):
                    inner = truth(test())
                found = found | inner
        return found

    def negated(self, test: Any) -> Any:
        """`not`."""
        found = truth(test)
        return not found if isinstance(found, bool) else ~found

    def _restore(self, saved: Any) -> None:
        gone = self._returned[-1] if self._returned else None
        if gone is not None:
            saved = ~gone if saved is None else saved & ~gone
        self.run.mask = saved


class _Rewriter:
    """Functions of a kernel, rewritten for one run."""

    def __init__(self, run: Run) -> None:
        self._run, self._control = run, _Control(run)
        self._made: dict[int, Callable] = {}

    def function(self, source: Callable) -> Callable:
        """A kernel's or a device function's twin that works on arrays."""
        if id(source) not in self._made:
            scope = self._scope(source)
            with PARSING:
                code = _rewritten(source.__code__, source.__code__.co_filename)
            made: dict[str, Any] = {}
            exec(code, scope, made)
            self._made[id(source)] = self._control.enter(made[source.__name__])
        return self._made[id(source)]

    def _scope(self, source: Any) -> dict[str, Any]:
        code = source.__code__
        cells = zip(code.co_freevars, source.__closure__ or (), strict=True)
        known = source.__globals__ | {name: cell.cell_contents for name, cell in cells}
        used = {name for name in (*code.co_names, *code.co_freevars) if name in known}
        scope = {name: self._twin(known[name]) for name in used}
        more = {"min": minimum_of(np.minimum), "max": minimum_of(np.maximum), "abs": np.abs}
        return more | scope | {"_c": self._control, "_run": self._run, "_undefined": _UNDEFINED}

    def _twin(self, value: Any) -> Any:
        if isinstance(value, Intrinsic):
            if value.name in PLAIN:
                return PLAIN[value.name]
            if value.name not in MEANINGS:
                raise BackendError(f"tests/numpy_lanes.py does not know the intrinsic {value.name}")
            return functools.partial(MEANINGS[value.name], self._run, value)
        if isinstance(value, types.FunctionType):
            return _Late(self, value)
        return value


class _Late:
    """A device function, rewritten when it is first called."""

    def __init__(self, rewriter: _Rewriter, source: Callable) -> None:
        self._rewriter, self._source = rewriter, source

    def __call__(self, *arguments: Any) -> Any:
        return self._rewriter.function(self._source)(*arguments)


@functools.cache
def _rewritten(code: types.CodeType, file: str) -> types.CodeType:
    """file: where it stands; a kernel that is built again has the same code."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(code))).body[0]
    assert isinstance(tree, ast.FunctionDef), "kernels are plain functions"
    tree.decorator_list, tree.returns = [], None
    arguments = code.co_varnames[: code.co_argcount]
    names = set(code.co_varnames + code.co_cellvars) - set(arguments)
    tree.body = [
        *(ast.parse(f"{name} = _undefined").body[0] for name in sorted(names)),
        *(_Statements().all(tree.body) or [ast.Pass()])
    ]  # fmt: skip
    module = ast.fix_missing_locations(ast.Module([tree], []))
    return compile(module, f"<{code.co_name} on arrays>", "exec")


def _call(name: str, *arguments: ast.expr) -> ast.Call:
    function = ast.Attribute(ast.Name("_c", ast.Load()), name, ast.Load())
    return ast.Call(function, list(arguments), [])


def _lazy(value: ast.expr) -> ast.Lambda:
    empty = ast.arguments([], [], None, [], [], None, [])
    return ast.Lambda(empty, value)


# where it holds, an assignment needs no mask
_EVERY_THREAD = ast.parse("_run.mask is None", mode="eval").body


class _Expressions(ast.NodeTransformer):
    """Conditions as calls of `_Control`."""

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        test, yes, no = (self.visit(n) for n in (node.test, node.body, node.orelse))
        return _call("choose", test, _lazy(yes), _lazy(no))

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        name = "every" if isinstance(node.op, ast.And) else "some"
        return _call(name, *(_lazy(self.visit(v)) for v in node.values))

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        value = self.visit(node.operand)
        return (
            _call("negated", value) if isinstance(node.op, ast.Not) else ast.UnaryOp(node.op, value)
        )

    def visit_Compare(self, node: ast.Compare) -> ast.expr:
        parts = [self.visit(n) for n in (node.left, *node.comparators)]
        pairs = zip(parts, node.ops, parts[1:], strict=False)
        found = [ast.Compare(a, [op], [b]) for a, op, b in pairs]
        return found[0] if len(found) == 1 else _call("every", *map(_lazy, found))


class _Statements:
    """Statements under a mask."""

    def __init__(self) -> None:
        self._count = 0

    def all(self, body: list[ast.stmt]) -> list[ast.stmt]:
        return [new for old in body for new in self._one(old)]

    def _one(self, node: ast.stmt) -> list[ast.stmt]:
        value = _Expressions().visit
        match node:
            case ast.Expr(ast.Constant()) | ast.Pass():
                return []
            case ast.Expr():
                return [ast.Expr(value(node.value))]
            case ast.Assign([target]):
                return self._assign(target, value(node.value))
            case ast.AugAssign():
                read = ast.parse(ast.unparse(node.target), mode="eval").body
                return self._assign(node.target, ast.BinOp(value(read), node.op, value(node.value)))
            case ast.If():
                name = self._name()
                begin = ast.Assign([ast.Name(name, ast.Store())], value(node.test))
                test = ast.Name(name, ast.Load())
                found = [begin, self._for("branch", test, node.body)]
                return found + (
                    [self._for("branch", _call("negated", test), node.orelse)] * bool(node.orelse)
                )
            case ast.While():
                return [self._for("loop", _lazy(value(node.test)), node.body)]
            case ast.For(iter=ast.Call(ast.Name("range"), bounds)):
                spans = _call("span", *map(value, bounds))
                return self._loop(node, spans)
            case ast.For():
                return self._loop(node, value(node.iter))
            case ast.Return():
                given = value(node.value) if node.value else ast.Constant(None)
                return [ast.If(_call("give", given), [ast.Return(None)], [])]
        raise BackendError(f"tests/numpy_grid.py does not know {ast.unparse(node)!r}")

    def _loop(self, node: ast.For, over: ast.expr) -> list[ast.stmt]:
        return [ast.For(node.target, over, self.all(node.body) or [ast.Pass()], [])]

    def _for(self, name: str, test: ast.expr, body: list[ast.stmt]) -> ast.For:
        target = ast.Name(self._name(), ast.Store())
        return ast.For(target, _call(name, test), self.all(body) or [ast.Pass()], [])

    def _assign(self, target: ast.expr, value: ast.expr) -> list[ast.stmt]:
        if isinstance(target, ast.Name):
            old = ast.Name(target.id, ast.Load())
            kept = ast.IfExp(_EVERY_THREAD, value, _call("keep", value, old))
            return [ast.Assign([ast.Name(target.id, ast.Store())], kept)]
        if isinstance(target, ast.Subscript):
            index = _Expressions().visit(target.slice)
            return [ast.Expr(_call("put", target.value, index, value))]
        assert isinstance(target, ast.Tuple), "names, elements and tuples of them are assigned"
        name = self._name()
        found: list[ast.stmt] = [ast.Assign([ast.Name(name, ast.Store())], value)]
        for n, part in enumerate(target.elts):
            item = ast.Subscript(ast.Name(name, ast.Load()), ast.Constant(n), ast.Load())
            found += self._assign(part, item)
        return found

    def _name(self) -> str:
        self._count += 1
        return f"_t{self._count}"


__all__ = ["Registers", "Shared", "launch"]

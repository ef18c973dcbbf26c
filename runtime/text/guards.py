"""A jinja2 sandbox that asks its rendering's budget before everything that costs something.

Calls, operators, filters and output go through hooks of the environment. For what has none, the
parsed template is rewritten before it is compiled: loops and macros begin with a `(tick)`, joined
texts, slices, comparisons and keys go through filters whose names no template can write.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from types import GeneratorType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from runtime.text.limits import Budget, growth, operator_size, size_of

_budget: ContextVar[Budget | None] = ContextVar("budget", default=None)

_TICK, _JOIN, _MADE, _SEEN, _SEARCHED = "(tick)", "(join)", "(made)", "(seen)", "(searched)"
# Filters that hand items on without writing, hashing or comparing them.
_PASSING = {
    *("list", "length", "count", "first", "last", "default", "d", "items", "map", "select"),
    *("selectattr", "reject", "rejectattr", "reverse", "attr", "random"),
}
_SCANS = ("index", "count")  # methods of lists that compare items
_CONTAINERS = (dict, list, tuple)
_ITEM = 16  # characters that an item of a new list counts as, for its memory


@contextmanager
def using(budget: Budget) -> Iterator[None]:
    """Renderings inside spend from `budget`."""
    token = _budget.set(budget)
    try:
        yield
    finally:
        _budget.reset(token)


def _spend(characters: int = 0) -> None:
    budget = _budget.get()
    if budget is not None:
        budget.spend(characters)


class GuardedEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox; `add_filter` is how further filters come in."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))

    def __init__(self, **options: Any) -> None:
        # the optimizer would run filters while the template is compiled, without a budget
        super().__init__(optimized=False, finalize=_written, **options)
        for name, function in list(self.filters.items()):
            self.add_filter(name, function)
        self.tests |= {name: _guarded_test(test) for name, test in self.tests.items()}
        self.filters |= {
            _TICK: _tick, _JOIN: _join, _MADE: _spent, _SEEN: _seen, _SEARCHED: _searched
        }  # fmt: skip
        del self.globals["lipsum"]  # makes text without end

    def add_filter(self, name: str, function: Callable[..., Any]) -> None:
        """Have `function` as the filter `name`, within the budget."""
        self.filters[name] = _guarded_filter(name, function)

    def _parse(self, source: str, name: str | None, filename: str | None) -> Any:
        return _Rewrite(self).visit(super()._parse(source, name, filename))

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """`left operator right`, once the budget allows a result of its size."""
        _spend(operator_size(operator, left, right))
        return super().call_binop(context, operator, left, right)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """`obj[argument]`; a tuple is measured before it is hashed."""
        if isinstance(argument, tuple):
            size_of(argument)  # is going to be hashed
        return super().getitem(obj, argument)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        """`obj(*args)`: counted, its arguments measured before and its result after it."""
        _spend()
        if not isinstance(obj, Macro | LoopContext):
            args = _checked_call(obj, args, kwargs)
        return _spent(super().call(context, obj, *args, **kwargs))


def _checked_call(obj: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, ...]:
    function = getattr(obj, "__wrapped__", obj)  # the sandbox wraps str.format
    owner, name = getattr(function, "__self__", None), getattr(function, "__name__", "")
    if name == "join":
        args = tuple(a if isinstance(a, str) else list(a) for a in args)
    given = (*args, *kwargs.values())
    if isinstance(owner, str | bytes | int):
        growth(name, owner, given)
    if name in _SCANS and isinstance(owner, _CONTAINERS):
        given = (*given, owner)
    for value in given:
        if isinstance(value, _CONTAINERS):
            size_of(value)
    return args


def _spent(result: Any) -> Any:
    if isinstance(result, str | bytes):
        _spend(len(result))
    elif isinstance(result, _CONTAINERS):
        _spend(_ITEM * len(result))
    return result


def _guarded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    own = int(hasattr(function, "jinja_pass_arg"))  # the first argument is jinja's

    @wraps(function)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        value = args[own]
        if name not in _PASSING:
            if isinstance(value, GeneratorType) or (name == "join" and not isinstance(value, str)):
                value = list(value)
                args = (*args[:own], value, *args[own + 1 :])
            given = (*args[own + 1 :], *kwargs.values())
            for item in (value, *given):
                if isinstance(item, _CONTAINERS):
                    size_of(item)
            growth(name, value, given)
        _spend()
        return _spent(function(*args, **kwargs))

    return guarded


def _guarded_test(function: Any) -> Callable[..., Any]:
    own = int(hasattr(function, "jinja_pass_arg"))

    @wraps(function)
    def guarded(*args: Any) -> Any:
        if len(args) > own + 1:
            for item in args[own:]:
                _seen(item)
        return function(*args)

    return guarded


@pass_context
def _written(context: Any, value: Any) -> Any:
    """Before a value goes into the text."""
    _spend(len(value) if isinstance(value, str) else size_of(value))
    return value


@pass_context
def _tick(context: Any, characters: int) -> None:
    """One turn of a loop or macro whose body writes `characters` of its own."""
    _spend(characters)


def _join(parts: list[Any]) -> str:
    _spend(sum(size_of(part) for part in parts))
    return "".join(map(str, parts))


def _seen(value: Any) -> Any:
    """Before a value is compared or hashed."""
    if isinstance(value, _CONTAINERS):
        size_of(value)
    return value


def _searched(value: Any) -> Any:
    """Before something is looked for in a value; looking into a mapping compares no items."""
    return value if isinstance(value, dict) else _seen(value)


class _Rewrite(NodeTransformer):
    """Puts guards where the environment has no hooks."""

    def __init__(self, environment: GuardedEnvironment):
        self._environment = environment
        ticking = (nodes.For, nodes.Macro, nodes.CallBlock, nodes.Block)
        self._rules: dict[type, Callable[[Any], nodes.Node]] = {
            **dict.fromkeys(ticking, self._ticking),
            nodes.Concat: self._joining,
            nodes.Getitem: self._slicing,
            nodes.Compare: self._comparing,
            nodes.Pair: self._keying,
        }

    def visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        """The node that stands for `node`, its children first."""
        self.generic_visit(node)
        rule = self._rules.get(type(node))
        return rule(node) if rule else node

    def _ticking(self, node: Any) -> nodes.Node:
        cost = nodes.Const(_constant_size(node.body), lineno=node.lineno)
        tick = nodes.ExprStmt(self._filter(cost, _TICK), lineno=node.lineno)
        tick.set_environment(self._environment)
        node.body.insert(0, tick)
        return node

    def _joining(self, node: nodes.Concat) -> nodes.Node:
        return self._filter(nodes.List(node.nodes, lineno=node.lineno), _JOIN)

    def _slicing(self, node: nodes.Getitem) -> nodes.Node:
        return self._filter(node, _MADE) if isinstance(node.arg, nodes.Slice) else node

    def _comparing(self, node: nodes.Compare) -> nodes.Node:
        node.expr = self._guard(node.expr, _SEEN)
        for operand in node.ops:
            name = _SEARCHED if operand.op in ("in", "notin") else _SEEN
            operand.expr = self._guard(operand.expr, name)
        return node

    def _keying(self, node: nodes.Pair) -> nodes.Node:
        node.key = self._guard(node.key, _SEEN)
        return node

    def _guard(self, node: nodes.Expr, name: str) -> nodes.Expr:
        return node if isinstance(node, nodes.Literal) else self._filter(node, name)

    def _filter(self, node: nodes.Expr, name: str) -> nodes.Filter:
        found = nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)
        found.set_environment(self._environment)
        return found


def _constant_size(body: list[nodes.Node]) -> int:
    """Characters and list items that a body writes out itself, those of loops inside aside."""
    size, rest = 0, list(body)
    while rest:
        node = rest.pop()
        if isinstance(node, nodes.TemplateData):
            size += len(node.data)
        elif isinstance(node, nodes.List | nodes.Tuple | nodes.Dict):
            size += len(node.items)
        if not isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            rest += node.iter_child_nodes()
    return size

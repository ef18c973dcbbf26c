"""An op is a name, a shape rule, a numpy reference, a cost, a split rule and its test cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from types import MappingProxyType
from typing import Any

import numpy as np

from runtime.ops.dtypes import F32, DType
from runtime.ops.errors import OpError
from runtime.ops.tensor import Shape, Tensor

ShapeRule = Callable[..., Shape | tuple[Shape, DType]]


@dataclass(frozen=True)
class Arg:
    """One argument of a test case: `make(rng, shape)` fills it, standard normal by default."""

    shape: Shape
    dtype: DType = F32
    make: Callable[[np.random.Generator, Shape], np.ndarray] | None = None
    leaf: str = "input"


@dataclass(frozen=True)
class Case:
    """Arguments and attributes of one grid point; `tolerance` is a normalised squared error."""

    args: tuple[Any, ...]
    attrs: Mapping[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-11

    def arguments(self) -> tuple[Arg, ...]:
        """The case's arguments, plain shapes taken as float32 arrays."""
        return tuple(a if isinstance(a, Arg) else Arg(a) for a in self.args)


@dataclass(frozen=True)
class Cost:
    """What an op moves and computes at full capacity: bytes read and written, FLOPs."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Op:
    """Calling it with Tensors adds a node; calling `reference` with numpy arrays computes."""

    name: str
    shape: ShapeRule
    reference: Callable[..., np.ndarray]
    flops: Callable[[Tensor], int]
    cases: tuple[Case, ...]
    split: Callable[..., Any] | None = None  # how the op behaves on several devices
    view: bool = False

    def __call__(self, *inputs: Tensor, name: str = "", **attrs: Any) -> Tensor:
        """The node of this op on `inputs`; OpError when shapes or attributes do not fit."""
        for x in inputs:
            if not isinstance(x, Tensor):
                raise OpError(f"{self.name}: expected tensors, got {type(x).__name__}")
        try:
            result = self.shape(*inputs, **attrs)
        except OpError as error:
            where = f" ({name})" if name else ""
            given = ", ".join(map(repr, inputs))
            raise OpError(f"{self.name}{where}: {error}; inputs: {given}") from None
        shape, dtype = result if isinstance(result[-1], DType) else (result, F32)
        return Tensor(self.name, inputs, shape, dtype, MappingProxyType(dict(attrs)), name)

    def cost(self, node: Tensor) -> Cost:
        """Bytes and FLOPs of `node` at full capacity; a view costs nothing."""
        if self.view:
            return Cost(0, 0)
        return Cost(node.nbytes + sum(x.nbytes for x in node.inputs), self.flops(node))


OPS: dict[str, Op] = {}


def op(
    name: str,
    *,
    shape: ShapeRule,
    cases: Sequence[Case],
    flops: Callable[[Tensor], int] = lambda node: node.size,
    split: Callable[..., Any] | None = None,
    view: bool = False,
) -> Callable[[Callable[..., np.ndarray]], Op]:
    """Declare an op; the decorated function is its numpy reference."""

    def register(reference: Callable[..., np.ndarray]) -> Op:
        if name in OPS:
            raise OpError(f"op {name!r} is already declared in {OPS[name].reference.__module__}")
        OPS[name] = Op(name, shape, reference, flops, tuple(cases), split, view)
        return OPS[name]

    return register


def find(name: str) -> Op:
    """The op called `name`; OpError with a suggestion when there is none."""
    if name not in OPS:
        hint = get_close_matches(name, OPS, 1)
        raise OpError(f"unknown op {name!r}" + (f", did you mean {hint[0]!r}?" if hint else ""))
    return OPS[name]


def same_shape(*inputs: Tensor) -> Shape:
    """Shape rule of elementwise ops without broadcasting."""
    first = inputs[0]
    for x in inputs[1:]:
        if tuple(x.shape) != tuple(first.shape):
            raise OpError(f"shapes {list(first.shape)} and {list(x.shape)} differ")
    return first.shape


def need(condition: bool, message: str) -> None:
    """Raise OpError with `message` unless `condition` holds; for shape rules."""
    if not condition:
        raise OpError(message)

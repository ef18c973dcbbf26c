"""An op is a name, a kind, a shape rule, a numpy reference, a cost and its test cases."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from runtime.ops.dtypes import F32, DType
from runtime.ops.errors import OpError
from runtime.ops.tensor import LAYOUTS, LEAVES, Layout, Shape, Tensor

ShapeRule = Callable[..., Shape | tuple[Shape, DType]]


class Arg(NamedTuple):
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


class Kind(Enum):
    """How a result follows from its inputs: choice of rows, cost, validation and splits ask this.

    A row is what lies along the last axis; inputs with fewer axes are shared by all rows.
    """

    LEAF = "given: an input, a weight, a constant or a state"
    ELEMENTWISE = "each element from those at its place"
    ROWWISE = "each row from the same row of the inputs"
    CONTRACTION = "each row of the first input times the rows of a weight"
    REDUCTION = "an axis summed away, each row of the first axis for itself"
    GATHER = "rows of the first input, picked by the second"
    COPY = "the first input in memory of its own"
    WHOLE = "each element from all of the inputs"
    VIEW = "the memory of the first input under another layout"
    STATEFUL = "works on memory that outlives the step"
    COLLECTIVE = "from what the devices of a split graph have together"

    @property
    def by_row(self) -> bool:
        """Whether the result at t of the first axis needs what inputs have at t, and no more."""
        return self in (Kind.ELEMENTWISE, Kind.ROWWISE, Kind.CONTRACTION, Kind.REDUCTION)


@dataclass(frozen=True, eq=False)
class Op:
    """Calling it with Tensors adds a node; calling `reference` with numpy arrays computes.

    flops: for each element of the result, or of (node, `Seen`). picks: input -> the input that
    says which of its rows, pages or slots are used. reads, writes: inputs that are state, by what
    happens to them. layout: where the result lies in another tensor's memory. axes: which axes go
    together when they are split, see ops/axes.py. linear: of which inputs partial sums give a
    partial sum, (0, 1) if they are both partial.
    """

    name: str
    kind: Kind
    shape: ShapeRule
    reference: Callable[..., np.ndarray]
    flops: float | Callable[[Tensor, Any], float] = 1
    cases: Sequence[Case] = ()
    picks: Mapping[int, int] = field(default_factory=dict)
    reads: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    layout: Callable[[Tensor], Layout] | None = None
    axes: str | Callable[[Tensor], str] = ""
    linear: tuple[tuple[int, ...], ...] = ()

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
        shape, dtype = _typed(result, inputs)
        return Tensor(self.name, inputs, shape, dtype, MappingProxyType(dict(attrs)), name)

    @property
    def view(self) -> bool:
        """Whether nothing is computed: the result is memory of an input."""
        return self.kind is Kind.VIEW

    def made(self, node: Tensor) -> bool:
        """Whether a node is of this op."""
        return node.op == self.name


def _typed(result: Any, inputs: Sequence[Tensor]) -> tuple[Shape, DType]:
    """What a shape rule returned, with the dtype of the first input unless it named one."""
    named = len(result) == 2 and isinstance(result[1], DType)
    return result if named else (result, inputs[0].dtype)


OPS: dict[str, Op] = {}
FUSED: dict[str, Op] = {}  # ops of which no model speaks: passes put them for several plain ones


def op(name: str, **declared: Any) -> Callable[[Callable[..., np.ndarray]], Op]:
    """Declare an op with the fields of `Op`; the decorated function is its numpy reference."""

    def register(reference: Callable[..., np.ndarray]) -> Op:
        if name in OPS:
            raise OpError(f"op {name!r} is already declared in {OPS[name].reference.__module__}")
        return _registered(OPS, Op(name, reference=reference, **declared))

    return register


def fused(name: str, **declared: Any) -> Op:
    """Declare an op that only passes make, in the file of the pass.

    Its shape is what they say, unless it has a rule.
    """
    if name in OPS or name in FUSED:
        raise OpError(f"op {name!r} is already declared")
    return _registered(FUSED, Op(name, **{"shape": _given, **declared}, reference=_given))


def _registered(ops: dict[str, Op], made: Op) -> Op:
    state = {*made.reads, *made.writes}
    stateful, view = made.kind is Kind.STATEFUL, made.kind is Kind.VIEW
    need(bool(state) == stateful, f"op {made.name!r}: what is stateful reads or writes an input")
    need(state <= set(made.picks), f"op {made.name!r}: `picks` says what of its state is used")
    need(not view or made.layout is not None, f"op {made.name!r}: a view has a layout")
    ops[made.name] = made
    if made.layout:
        LAYOUTS[made.name] = made.layout
    return made


def _given(*_: Any, **__: Any) -> Any:
    raise OpError("an op of a pass has no meaning without the plain ops it stands for")


def find(name: str) -> Op:
    """The op called `name`; OpError with a suggestion when there is none."""
    found = OPS.get(name) or FUSED.get(name)
    if found is None:
        hint = get_close_matches(name, OPS, 1)
        raise OpError(f"unknown op {name!r}" + (f", did you mean {hint[0]!r}?" if hint else ""))
    return found


def kind_of(node: Tensor) -> Kind:
    """The kind of a node's op."""
    return Kind.LEAF if node.op in LEAVES else find(node.op).kind


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

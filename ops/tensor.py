"""Tensor: one immutable node of a graph, and its place in memory as a layout of another tensor."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from runtime.ops.cached import cached_property
from runtime.ops.cuts import Cut, Parts, Runs, canonical, cut_array, cut_of_cut, cut_shape, label
from runtime.ops.dtypes import F32, I32, DType
from runtime.ops.errors import OpError

LEAVES = ("input", "weight", "constant", "state")


class Dim(int):
    """A capacity that counts something of a step: behaves as its int, remembers its name.

    `Dim("tokens", 8)` is an axis with room for 8 tokens; how many are live is a step input.
    """

    name: str

    def __new__(cls, name: str, size: int) -> Dim:
        self = super().__new__(cls, size)
        self.name = name
        return self

    def __repr__(self) -> str:
        return f"{self.name}:{int(self)}"

    def __getnewargs__(self) -> tuple[str, int]:  # type: ignore[override]
        return self.name, int(self)


Shape = tuple[int, ...]


class Layout(NamedTuple):
    """Where a tensor's elements lie inside `base`: strides and offset in elements."""

    base: Tensor
    strides: Shape
    offset: int = 0

    def is_contiguous(self, shape: Shape) -> bool:
        """Rows of the last axis follow each other without gaps, and so on outwards."""
        return all(
            stride == want or size == 1
            for stride, want, size in zip(self.strides, dense_strides(shape), shape, strict=True)
        )


_NO_ATTRS: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True, eq=False, repr=False, init=False)
class Tensor:
    """The result of `op` on `inputs`: shape in numpy order (outermost first), dtype, attributes.

    Compared by identity. Views (reshape, slice, permute, broadcast) carry a layout of another
    tensor and never copy.
    """

    op: str
    inputs: tuple[Tensor, ...]
    shape: Shape
    dtype: DType
    attrs: Mapping[str, Any]
    name: str

    def __init__(
        self, op: str, inputs: tuple[Tensor, ...], shape: Shape, dtype: DType = F32,
        attrs: Mapping[str, Any] = _NO_ATTRS, name: str = "",
    ) -> None:  # fmt: skip
        # graphs are rebuilt by every pass: setting frozen fields one by one takes thrice as long
        self.__dict__.update(op=op, inputs=inputs, shape=shape, dtype=dtype, attrs=attrs, name=name)

    @property
    def ndim(self) -> int:
        """Number of axes; 0 of a scalar."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """Number of elements at full capacity."""
        return math.prod(map(int, self.shape))

    @cached_property
    def nbytes(self) -> int:
        """Bytes at full capacity, block formats included."""
        return self.size // self.dtype.block * self.dtype.nbytes

    @property
    def layout(self) -> Layout:
        """The layout of this tensor inside the tensor that owns its memory."""
        # one's own is made anew each time: kept, it would be a circle
        return self._view or Layout(self, self._dense)

    @cached_property
    def _view(self) -> Layout | None:
        layout = LAYOUTS.get(self.op)
        return layout(self) if layout else None

    @cached_property
    def _dense(self) -> Shape:
        return dense_strides(self.shape)

    @property
    def base(self) -> Tensor:
        """The tensor that owns the memory of this one (itself unless it is a view)."""
        return self.layout.base

    def with_(
        self, op: str | None = None, inputs: tuple[Tensor, ...] | None = None,
        shape: Shape | None = None, dtype: DType | None = None,
        attrs: Mapping[str, Any] | None = None,
    ) -> Tensor:  # fmt: skip
        """A new node of the same name that differs in these fields."""
        return Tensor(
            op or self.op, self.inputs if inputs is None else inputs,
            self.shape if shape is None else shape, dtype or self.dtype,
            self.attrs if attrs is None else MappingProxyType(dict(attrs)), self.name,
        )  # fmt: skip

    @cached_property
    def content(self) -> tuple[Any, ...]:
        """Of a leaf: what decides its numbers, and what memory keeps it by."""
        given = sorted(self.attrs.items())
        attrs = ((k, v.tobytes() if isinstance(v, np.ndarray) else v) for k, v in given)
        return self.op, stored_name(self), self.shape, self.dtype.name, *attrs

    def __repr__(self) -> str:
        return f"{self.name or self.op}: {self.dtype.name}{list(self.shape)}"


# op -> where its result lies in another tensor's memory; ops/registry.py adds what ops declare
LAYOUTS: dict[str, Callable[[Tensor], Layout]] = {}


def dense_strides(shape: Shape) -> Shape:
    """Strides in elements of a contiguous tensor of `shape`."""
    strides, step = [], 1
    for n in reversed(shape):
        strides.append(step)
        step *= int(n)
    return tuple(reversed(strides))


def weight(
    name: str, shape: Shape, dtype: DType, cut: Cut | None = None, part: str = "", source: str = ""
) -> Tensor:
    """A tensor of the model file; `shape` outermost first, as in `w[rows, inner]`.

    cut: what of it makes this weight, see ops/cuts.py; `shape` is that of the whole. `part`: what
    plans call it. source: of another file that the device was given, its name there.
    """
    parts = canonical(cut or {}, shape, dtype)
    attrs = _cut_attrs(shape, parts) | ({"source": source} if source else {})
    if attrs:
        attrs["of"] = name
        name = f"{source}{'/' * bool(source)}{name}"
        name += (f":{part}" if part else label(parts)) if parts else ""
    return Tensor("weight", (), cut_shape(shape, parts), dtype, MappingProxyType(attrs), name)


def _cut_attrs(whole: Shape, parts: Parts) -> dict[str, Any]:
    return {"whole": tuple(map(int, whole)), "cut": parts} if parts else {}


def stored_name(leaf: Tensor) -> str:
    """The name of the file's tensor that a weight is, or is cut from."""
    return str(leaf.attrs.get("of", leaf.name))


def step_input(name: str, shape: Shape, dtype: DType = I32) -> Tensor:
    """A value that changes from step to step: tokens, positions, slots, block tables."""
    return Tensor("input", (), tuple(shape), dtype, name=name)


def state(
    name: str, shape: Shape, dtype: DType, storage: str = "k", cut: Cut | None = None,
    whole: bool = False,
) -> Tensor:  # fmt: skip
    """Memory that outlives a step and is read and written by explicit ops.

    storage: "k" or "v", pages of a KV cache [pages, PAGE, heads, dim]; or "slots", one for each
    sequence, [slots, ...]. How a device lays them out is its own affair. cut: the part of `shape`
    that this leaf is, say some heads. whole: it is not to be cut, as several graphs have it of
    which some alone would say how.
    """
    parts = canonical(cut or {}, shape, dtype)
    attrs = {"storage": storage} | _cut_attrs(shape, parts) | ({"uncut": True} if whole else {})
    return Tensor("state", (), cut_shape(shape, parts), dtype, MappingProxyType(attrs), name)


def constant(name: str, value: np.ndarray, cut: Cut | None = None) -> Tensor:
    """Numbers known when the graph is built, such as inverse frequencies; float32 or int32.

    cut: what of them is the leaf.
    """
    value = np.ascontiguousarray(cut_array(value, canonical(cut or {}, value.shape, F32)))
    if value.dtype not in (np.float32, np.int32):
        raise OpError(f"constant {name!r} has dtype {value.dtype}; use float32 or int32")
    dtype = F32 if value.dtype == np.float32 else I32
    value.setflags(write=False)
    return Tensor("constant", (), value.shape, dtype, MappingProxyType({"value": value}), name=name)


def cut_leaf(leaf: Tensor, axis: int, runs: Runs) -> Tensor:
    """A leaf that is these stretches of another one, which may be cut itself."""
    if leaf.op == "constant":
        return constant(f"{leaf.name}[{axis}]", leaf.attrs["value"], cut={axis: runs})
    whole = leaf.attrs.get("whole", leaf.shape)
    cut = dict(leaf.attrs.get("cut", ()))
    cut[axis] = cut_of_cut(cut[axis], runs) if axis in cut else runs
    if leaf.op == "state":
        return state(leaf.name, whole, leaf.dtype, leaf.attrs["storage"], cut)
    source, stored = leaf.attrs.get("source", ""), stored_name(leaf)
    _, of, part = leaf.name.partition(f"{stored}:")
    return weight(stored, whole, leaf.dtype, cut, part if of else "", source)

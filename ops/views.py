"""Views: reshape, slice, permute, broadcast: layouts of another tensor. And `copy` of a view."""

from __future__ import annotations

import math

import numpy as np

from runtime.ops.dtypes import DType
from runtime.ops.errors import OpError
from runtime.ops.registry import Case, Kind, need, op
from runtime.ops.tensor import Layout, Shape, Tensor


def _reshape_shape(x: Tensor, *, shape: Shape) -> tuple[Shape, DType]:
    new = math.prod(map(int, shape))
    need(new == x.size, f"cannot reshape {list(x.shape)} ({x.size} elements) to {list(shape)}")
    return tuple(shape), x.dtype


def _layout_reshape(node: Tensor) -> Layout:
    (x,) = node.inputs
    old = x.layout
    return Layout(old.base, reshape_strides(x.shape, old.strides, node.shape), old.offset)


@op(
    "reshape",
    kind=Kind.VIEW,
    layout=_layout_reshape,
    shape=_reshape_shape,
    cases=[Case(((6, 4),), {"shape": (3, 8)}), Case(((2, 3, 5),), {"shape": (2, 15)})],
)
def reshape(x: np.ndarray, *, shape: Shape) -> np.ndarray:
    """The same elements in the same order under another shape."""
    return x.reshape(tuple(int(n) for n in shape))


def _slice_shape(x: Tensor, *, axis: int, start: int, stop: int) -> tuple[Shape, DType]:
    need(-x.ndim <= axis < x.ndim, f"axis {axis} is not an axis of {list(x.shape)}")
    axis %= x.ndim
    need(
        0 <= start <= stop <= x.shape[axis],
        f"slice {start}:{stop} lies outside axis {axis} of {list(x.shape)}",
    )
    need(x.dtype.block == 1, f"cannot slice blocks of {x.dtype.name}")
    whole = start == 0 and stop == x.shape[axis]
    size = x.shape[axis] if whole else stop - start
    return (*x.shape[:axis], size, *x.shape[axis + 1 :]), x.dtype


def _layout_slice(node: Tensor) -> Layout:
    old = node.inputs[0].layout
    stride = old.strides[node.attrs["axis"]]
    return Layout(old.base, old.strides, old.offset + stride * node.attrs["start"])


@op(
    "slice",
    kind=Kind.VIEW,
    layout=_layout_slice,
    shape=_slice_shape,
    cases=[
        Case(((5, 8),), {"axis": 1, "start": 2, "stop": 7}),
        Case(((4, 3, 2),), {"axis": 0, "start": 1, "stop": 3}),
    ],
)
def slice_(x: np.ndarray, *, axis: int, start: int, stop: int) -> np.ndarray:
    """Elements start..stop-1 along one axis."""
    index = [slice(None)] * x.ndim
    index[axis] = slice(start, stop)
    return x[tuple(index)]


def _permute_shape(x: Tensor, *, axes: Shape) -> tuple[Shape, DType]:
    need(sorted(axes) == list(range(x.ndim)), f"axes {axes} do not permute {x.ndim} axes of {x!r}")
    return tuple(x.shape[a] for a in axes), x.dtype


def _layout_permute(node: Tensor) -> Layout:
    old = node.inputs[0].layout
    return Layout(old.base, tuple(old.strides[a] for a in node.attrs["axes"]), old.offset)


@op(
    "permute",
    kind=Kind.VIEW,
    layout=_layout_permute,
    shape=_permute_shape,
    cases=[Case(((2, 3, 4),), {"axes": (1, 0, 2)}), Case(((5, 7),), {"axes": (1, 0)})],
)
def permute(x: np.ndarray, *, axes: Shape) -> np.ndarray:
    """Axes in another order."""
    return np.transpose(x, axes)


def _broadcast_shape(x: Tensor, *, shape: Shape) -> tuple[Shape, DType]:
    fits = x.ndim == len(shape) and all(a in (1, b) for a, b in zip(x.shape, shape, strict=False))
    need(fits, f"cannot broadcast {list(x.shape)} to {list(shape)}: each axis must be 1 or equal")
    return tuple(shape), x.dtype


def _layout_broadcast(node: Tensor) -> Layout:
    (x,) = node.inputs
    old = x.layout
    strides = tuple(
        0 if a != b else s for a, b, s in zip(x.shape, node.shape, old.strides, strict=True)
    )
    return Layout(old.base, strides, old.offset)


@op(
    "broadcast",
    kind=Kind.VIEW,
    layout=_layout_broadcast,
    shape=_broadcast_shape,
    cases=[Case(((1, 4),), {"shape": (3, 4)}), Case(((3, 1, 2),), {"shape": (3, 5, 2)})],
)
def broadcast(x: np.ndarray, *, shape: Shape) -> np.ndarray:
    """Axes of length 1 repeated, with stride 0."""
    return np.broadcast_to(x, tuple(int(n) for n in shape))


@op(
    "copy",
    kind=Kind.COPY,
    shape=lambda x: x.shape,
    flops=0,
    cases=[Case(((3, 40),)), Case(((2, 3, 37),)), Case(((2, 3, 2, 16),))],
)
def copy(x: np.ndarray) -> np.ndarray:
    """The elements of a view one after another, in memory of their own."""
    return np.array(x, order="C")


def reshape_strides(old: Shape, strides: Shape, new: Shape) -> Shape:
    """Strides of `new` over the memory of (`old`, `strides`); OpError when it would need a copy."""
    runs = _merge(old, strides)
    result: list[int] = []
    for n in reversed(new):
        while runs and runs[-1][0] == 1:
            runs.pop()
        if int(n) == 1:
            result.append(runs[-1][1] if runs else 1)
            continue
        if not runs or runs[-1][0] % int(n):
            raise OpError(
                f"reshape of {list(old)} with strides {list(strides)} to {list(new)} needs a copy"
            )
        length, stride = runs[-1]
        result.append(stride)
        runs[-1] = (length // int(n), stride * int(n))
    return tuple(reversed(result))


def _merge(shape: Shape, strides: Shape) -> list[tuple[int, int]]:
    """Neighbouring axes that are contiguous with each other, merged into (length, stride)."""
    runs: list[tuple[int, int]] = []
    for n, s in zip(shape, strides, strict=True):
        if int(n) == 1:
            continue
        if runs and runs[-1][1] == s * int(n):
            runs[-1] = (runs[-1][0] * int(n), s)
        else:
            runs.append((int(n), s))
    return runs


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[T, heads * d] as [T, heads, d]."""
    need(x.shape[-1] % heads == 0, f"{x!r}: {x.shape[-1]} does not divide into {heads} heads")
    return reshape(x, shape=(*x.shape[:-1], heads, x.shape[-1] // heads))  # type: ignore[operator]


def merge_heads(x: Tensor) -> Tensor:
    """[T, heads, d] as [T, heads * d]."""
    return reshape(x, shape=(*x.shape[:-2], x.shape[-2] * x.shape[-1]))  # type: ignore[operator]

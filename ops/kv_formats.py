"""The types a KV cache can have: what a row of K or V becomes, and the numbers it is kept in.

One `KVFormat` a type. A head is kept in planes: the codes of its values and, for types that share
a scale among the dims of a group, numbers of each group. Sizes, padding, what is rounded, and the
places and loads of a device's kernels follow from the row; only the rounding itself is written
once more there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from runtime.ops.dtypes import BF16, DTYPES, F16, F32, I8, DType
from runtime.ops.errors import OpError

PAGE = 32  # tokens in a page: a multiple of the attention block, the unit of sharing
HEAD_UNIT = 16  # a head in a page takes a whole number of these dims, zeros behind its own
GROUP = 32  # dims that share a scale, the last of a head perhaps fewer
SMALLEST = 1e-30  # a group of smaller values is kept as zeros


class Plane(NamedTuple):
    """Numbers of a head that lie together, one of a plain `dtype` for every `dims` dims.

    `name` tells a type's planes apart. Values of less than a byte share a number: 4-bit values
    are a U8 plane of 2 dims.
    """

    name: str
    dtype: DType
    dims: int = 1

    @property
    def numpy(self) -> np.dtype:
        """How numpy holds a number."""
        assert self.dtype.numpy is not None, f"{self.dtype} has no single numbers"
        return self.dtype.numpy

    def width(self, dims: int) -> int:
        """Numbers of a head of that many dims; the last may stand for fewer."""
        return -(-dims // self.dims)


class KVFormat(NamedTuple):
    """One cache type; a value is code * scale + minimum, as far as it has them.

    `codes`: the planes of the values. `shared`: those of the groups, the scale and then the
    minimum. `encode` makes all planes [..., width], codes first, of float32 [..., dims], dims a
    multiple of HEAD_UNIT; `widen` makes float32 codes [..., dims] of their planes.
    """

    name: str
    codes: tuple[Plane, ...]
    encode: Callable[[np.ndarray], tuple[np.ndarray, ...]]
    widen: Callable[..., np.ndarray]
    shared: tuple[Plane, ...] = ()

    @property
    def planes(self) -> tuple[Plane, ...]:
        """All planes, in the order in which they lie in a page."""
        return self.codes + self.shared

    @property
    def dtype(self) -> DType:
        """The element type of pages in a graph; GGUF's of that name where there is one."""
        return DTYPES.get(self.name) or DType(self.name, GROUP, self.token_nbytes(GROUP), None)

    def token_nbytes(self, dim: int) -> int:
        """Bytes of K or V of one token and one KV head of that many dims."""
        dims = padded_head(dim)
        return sum(plane.width(dims) * plane.dtype.nbytes for plane in self.planes)

    def decode(self, *planes: np.ndarray) -> np.ndarray:
        """float32 [..., dims] of planes [..., width]: exactly what was kept."""
        first = len(self.codes)
        values = self.widen(*planes[:first])
        shared = [p.astype(np.float32).repeat(GROUP, -1) for p in planes[first:]]
        with np.errstate(invalid="ignore"):  # 0 * infinity, of a group with an infinite value
            for numbers, apply in zip(shared, (np.multiply, np.add), strict=False):
                values = apply(values, numbers[..., : values.shape[-1]])
        return values

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """x [..., dim] as the cache gives it back, in the dtype of x."""
        kept = self.decode(*self.encode(fill(np.asarray(x, np.float32), HEAD_UNIT)))
        return kept[..., : x.shape[-1]].astype(x.dtype)


def padded_head(dim: int) -> int:
    """Dims that a head of this size takes in a page: what kernels read has no odd end."""
    return (dim + HEAD_UNIT - 1) // HEAD_UNIT * HEAD_UNIT


def fill(x: np.ndarray, unit: int) -> np.ndarray:
    """x with zeros behind its last axis, up to a multiple of `unit`."""
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % unit)])


def in_groups(x: np.ndarray) -> np.ndarray:
    """[..., dims] as [..., groups, GROUP], zeros behind the last."""
    filled = fill(x, GROUP)
    return filled.reshape(*x.shape[:-1], filled.shape[-1] // GROUP, GROUP)


def _f16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # values past 65504 become infinite, as IEEE 754 says
        return x.astype(np.float16)


def _bf16(x: np.ndarray) -> np.ndarray:
    """Bits of bfloat16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(x).view(np.uint32)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    return np.where(np.isnan(x), bits >> 16 | 0x40, rounded).astype(np.uint16)


def _bf16_value(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def _q8_0(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """int8 to nearest even, and the scale that makes the largest of a group 127, as GGUF's Q8_0."""
    groups = in_groups(x)
    peak = np.abs(groups).max(-1, keepdims=True)
    scale = peak / np.float32(127)
    usable = (peak >= np.float32(SMALLEST)) & np.isfinite(scale)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=usable)
    codes = np.rint(np.multiply(groups, inverse, out=np.zeros_like(groups), where=usable))
    codes = codes.astype(np.int8).reshape(*x.shape[:-1], GROUP * codes.shape[-2])
    return codes[..., : x.shape[-1]], _f16(scale[..., 0])


def _wide(codes: np.ndarray) -> np.ndarray:
    return codes.astype(np.float32)


KV_FORMATS = {
    row.name: row
    for row in (
        KVFormat("f32", (Plane("values", F32),), lambda x: (x,), _wide),
        KVFormat("f16", (Plane("values", F16),), lambda x: (_f16(x),), _wide),
        KVFormat("bf16", (Plane("values", BF16),), lambda x: (_bf16(x),), _bf16_value),
        KVFormat("q8_0", (Plane("values", I8),), _q8_0, _wide, (Plane("scales", F16, GROUP),)),
    )
}


def kv_format(name: str) -> KVFormat:
    """The row of a cache type; OpError lists what there is."""
    if name not in KV_FORMATS:
        raise OpError(f"KV type {name!r} is not one of {', '.join(KV_FORMATS)}")
    return KV_FORMATS[name]

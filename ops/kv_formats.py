"""The types a KV cache can have: what a row of K or V becomes, and the numbers it is kept in.

One `KVFormat` a type. A head is kept in planes: the values themselves, or codes of a few bits and,
for the dims of a group, the scale and the minimum that give them a value. Sizes, padding, rounding,
places and loads of a device's kernels follow from the row.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from runtime.ops.blocks import IQ4_LEVELS
from runtime.ops.dtypes import BF16, DTYPES, F16, F32, U8, DType
from runtime.ops.errors import OpError

PAGE = 32  # tokens in a page: a multiple of the attention block, the unit of sharing
HEAD_UNIT = 16  # a head in a page takes a whole number of these dims, zeros behind its own
GROUP = 32  # dims that share a scale, the last of a head perhaps fewer
SMALLEST = 1e-30  # a group of smaller values is kept as zeros


class Plane(NamedTuple):
    """Numbers of a head that lie together, one of a plain `dtype` for every `dims` dims.

    `name` tells a type's planes apart. A plane of codes holds `bits` bits of each, from bit `low`
    of the code on. A group's dims are then taken as [outer][8 / bits][inner]: a byte holds those
    that differ in the middle, the first in its lowest bits, and there are outer * inner bytes.
    """

    name: str
    dtype: DType
    dims: int = 1
    bits: int = 0
    low: int = 0
    outer: int = 1

    @property
    def numpy(self) -> np.dtype:
        """How numpy holds a number."""
        assert self.dtype.numpy is not None, f"{self.dtype} has no single numbers"
        return self.dtype.numpy

    @property
    def together(self) -> int:
        """Numbers that lie side by side, as products take them: of K of a token, of V of tokens."""
        return 4 if self.bits else 1

    def width(self, dims: int) -> int:
        """Numbers of a head of that many dims (a multiple of HEAD_UNIT); groups are whole."""
        return dims if self.dims == 1 else -(-dims // GROUP) * (GROUP // self.dims)

    def pack(self, codes: np.ndarray) -> np.ndarray:
        """This plane [..., width] of codes [..., dims], dims in whole groups."""
        turns, n = 8 // self.bits, codes.shape[-1]
        part = (codes >> self.low & (1 << self.bits) - 1).astype(np.uint8)
        inner = GROUP // turns // self.outer
        part = part.reshape(*codes.shape[:-1], n // GROUP, self.outer, turns, inner)
        shifts = (np.arange(turns) * self.bits).astype(np.uint8)[:, None]
        return (part << shifts).sum(-2, dtype=np.uint8).reshape(*codes.shape[:-1], n // turns)

    def unpack(self, plane: np.ndarray) -> np.ndarray:
        """The inverse of `pack`, at the bits' places in a code."""
        turns, n = 8 // self.bits, plane.shape[-1]
        inner = GROUP // turns // self.outer
        part = plane.reshape(*plane.shape[:-1], n * turns // GROUP, self.outer, 1, inner)
        shifts = (np.arange(turns) * self.bits).astype(np.uint8)[:, None]
        part = (part >> shifts & (1 << self.bits) - 1) << self.low
        return part.reshape(*plane.shape[:-1], n * turns)


_BYTES = Plane("codes", U8, bits=8)
_NIBBLES = Plane("nibbles", U8, 2, bits=4)
_FIFTH = Plane("fifth", U8, 8, bits=1, low=4)
_TOP = Plane("top", U8, 4, bits=2, low=4, outer=2)
_SCALES, _MINIMA = Plane("scales", F16, GROUP), Plane("minima", F16, GROUP)


class Coding(NamedTuple):
    """How the values x of a group become codes q - lowest: value = q * scale + minimum.

    q is an integer from `lowest` to `highest`, or one of a `book` in rising order. Several scales
    (and minima) are tried; the codes with the least squared error are kept, with the scale (and
    minimum) that then fits them best. `tries` has for each way the q that the largest value of a
    group should have, as a real number; `cuts`, of types with minima, how much of the range is cut
    off below and above, as shares of it.
    """

    lowest: int
    highest: int
    tries: tuple[float, ...] = ()
    cuts: tuple[tuple[float, float], ...] = ()
    book: tuple[int, ...] = ()

    @property
    def has_minimum(self) -> bool:
        """Whether groups have a minimum beside their scale."""
        return bool(self.cuts)

    def values(self, codes: np.ndarray) -> np.ndarray:
        """float32 q of codes."""
        if self.book:
            return np.array(self.book, np.float32)[codes]
        return codes.astype(np.float32) + np.float32(self.lowest)

    def codes(self, q: np.ndarray) -> np.ndarray:
        """The codes of float32 q."""
        if self.book:
            return np.searchsorted(self.book, q).astype(np.uint8)
        with np.errstate(invalid="ignore"):  # of a group that is not finite
            return (q - np.float32(self.lowest)).astype(np.uint8)

    def nearest(self, steps: np.ndarray) -> np.ndarray:
        """float32 q nearest to real ones."""
        if not self.book:
            return np.clip(np.rint(steps), np.float32(self.lowest), np.float32(self.highest))
        return np.array(self.book, np.float32)[np.searchsorted(self.edges, steps)]

    @property
    def edges(self) -> np.ndarray:
        """float32: what is above the i-th is nearer to the next entry of the book."""
        return (np.array(self.book[1:], np.float32) + np.array(self.book[:-1], np.float32)) / 2

    def round(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """q [..., GROUP] and scale, or scale and minimum, [...], of float32 groups x."""
        with np.errstate(all="ignore"):  # what is not finite, too small or too large is set apart
            return self._with_minimum(x) if self.has_minimum else self._scaled(x)

    def _scaled(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        peak = np.abs(x).max(-1)
        largest = np.where(x.max(-1) >= peak, peak, -peak)
        best: Any = None
        for goal in self.tries:
            scale = largest / np.float32(goal)
            q = self.nearest(x * (np.float32(goal) / largest)[..., None])
            best = _better(best, x - q * scale[..., None], q)
        q = best[1]
        some = peak >= np.float32(SMALLEST)
        fitted = group_sum(x * q) / group_sum(q * q)
        scale = np.where(some, fitted, peak * np.float32(0))  # NaN where not finite
        return np.where(some[..., None], q, self.nearest(np.zeros(1, np.float32))), scale

    def _with_minimum(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        low, n = x.min(-1), np.float32(GROUP)
        extent, above = x.max(-1) - low, x - low[..., None]
        best: Any = None
        for below, beyond in self.cuts:
            steps = np.float32(self.highest / (1 - below - beyond))
            left = above - (np.float32(below) * extent)[..., None]
            q = self.nearest(left * (steps / extent)[..., None])
            best = _better(best, left - q * (extent / steps)[..., None], q)
        q = best[1]
        total, sums = group_sum(above), group_sum(q)
        covariance = group_sum(above * q) - total * sums / n
        variance = group_sum(q * q) - sums * sums / n
        some = (extent >= np.float32(SMALLEST)) & (variance > 0)
        scale = np.where(some, covariance / variance, extent * np.float32(0))
        minimum = low + np.where(some, (total - scale * sums) / n, 0)
        return np.where(some[..., None], q, np.float32(0)), scale, minimum


def group_sum(x: np.ndarray) -> np.ndarray:
    """The sum of each group [..., GROUP]: i and i + 16 of it, then i and i + 8, and so on."""
    while x.shape[-1] > 1:
        x = x[..., : x.shape[-1] // 2] + x[..., x.shape[-1] // 2 :]
    return x[..., 0]


def _better(best: Any, off: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Per group the least squared error and its q: of the best way so far, or off by `off`."""
    error = group_sum(off * off)
    if best is None:
        return error, q
    wins = error < best[0]
    return np.where(wins, error, best[0]), np.where(wins[..., None], q, best[1])


class KVFormat(NamedTuple):
    """One cache type: the planes of its values or codes, and of the numbers that groups share.

    Of codes, `coding` says what they mean; `shared` are the scale and then the minimum.
    """

    name: str
    codes: tuple[Plane, ...]
    shared: tuple[Plane, ...] = ()
    coding: Coding | None = None

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

    def encode(self, x: np.ndarray) -> tuple[np.ndarray, ...]:
        """All planes [..., width] of float32 [..., dims], dims a multiple of HEAD_UNIT."""
        if self.coding is None:
            return (_PLAIN[self.name][0](x),)
        q, *shared = self.coding.round(in_groups(x))
        codes = self.coding.codes(q).reshape(*x.shape[:-1], q.shape[-2] * GROUP)
        packed = (p.pack(codes)[..., : p.width(x.shape[-1])] for p in self.codes)
        return *packed, *(_f16(numbers) for numbers in shared)

    def decode(self, *planes: np.ndarray) -> np.ndarray:
        """float32 [..., dims] of planes [..., width]: exactly what was kept, in whole groups."""
        if self.coding is None:
            return _PLAIN[self.name][1](planes[0])
        first = len(self.codes)
        parts = (
            p.unpack(fill(x, GROUP // p.dims)) for p, x in zip(self.codes, planes, strict=False)
        )
        codes = next(parts)
        for part in parts:
            codes = codes | part
        values = self.coding.values(codes)
        shared = [p.astype(np.float32).repeat(GROUP, -1) for p in planes[first:]]
        with np.errstate(invalid="ignore"):  # 0 * infinity, of a group with an infinite value
            for numbers, apply in zip(shared, (np.multiply, np.add), strict=False):
                values = apply(values, numbers)
        return values

    def rounded(self, x: np.ndarray) -> np.ndarray:
        """x [..., dim] as the cache gives it back, in the dtype of x."""
        kept = self.decode(*self.encode(fill(np.asarray(x, np.float32), HEAD_UNIT)))
        return kept[..., : x.shape[-1]].astype(x.dtype)

    def plain(self, rows: np.ndarray, dim: int) -> np.ndarray:
        """float32 [..., dim] of `to_rows`: exactly what was kept."""
        return self.decode(*self.from_rows(rows, dim))[..., :dim]

    def to_rows(self, planes: Sequence[np.ndarray]) -> np.ndarray:
        """uint8 [..., bytes of a token] of planes [..., width]: one behind the other."""
        return np.concatenate([np.ascontiguousarray(p).view(np.uint8) for p in planes], -1)

    def from_rows(self, rows: np.ndarray, dim: int) -> list[np.ndarray]:
        """The inverse of `to_rows`, for heads of that many dims."""
        found, at = [], 0
        for plane in self.planes:
            start, at = at, at + plane.width(padded_head(dim)) * plane.dtype.nbytes
            found.append(np.ascontiguousarray(rows[..., start:at]).view(plane.numpy))
        return found


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


def _wide(values: np.ndarray) -> np.ndarray:
    return values.astype(np.float32)


# types without codes -> to a plane, and back to float32
_PLAIN: dict[str, tuple[Callable, Callable]] = {
    "f32": (lambda x: x, _wide), "f16": (_f16, _wide), "bf16": (_bf16, _bf16_value),
}  # fmt: skip

# The tries of each type are the four that together leave the least error on normal values, found
# one after another on a grid: 11 to 18 % less than the plain rounding of GGUF's type of that name.
_CUTS = (0.01, 0.01), (-0.01, 0.03), (0.03, -0.01), (0.0, 0.02)
_FINER_CUTS = (0.0, 0.0), (0.0, -0.03), (-0.01, 0.01), (0.01, -0.01)
_WITH_SCALE, _WITH_BOTH = (_SCALES,), (_SCALES, _MINIMA)

KV_FORMATS = {
    row.name: row
    for row in (
        KVFormat("f32", (Plane("values", F32),)),
        KVFormat("f16", (Plane("values", F16),)),
        KVFormat("bf16", (Plane("values", BF16),)),
        KVFormat("q8_0", (_BYTES,), _WITH_SCALE, Coding(-128, 127, (127, 126, 125, 124))),
        KVFormat(
            "q6_0", (_NIBBLES, _TOP), _WITH_SCALE, Coding(-32, 31, (-32, -31, -30, -32.5))
        ),
        KVFormat("q5_1", (_NIBBLES, _FIFTH), _WITH_BOTH, Coding(0, 31, cuts=_FINER_CUTS)),
        KVFormat(
            "q5_0", (_NIBBLES, _FIFTH), _WITH_SCALE, Coding(-16, 15, (-16.2, -15.2, -15.8, -16.6))
        ),
        KVFormat("q4_1", (_NIBBLES,), _WITH_BOTH, Coding(0, 15, cuts=_CUTS)),
        KVFormat("q4_0", (_NIBBLES,), _WITH_SCALE, Coding(-8, 7, (-8.2, -7.8, -8.6, -7.2))),
        KVFormat(
            "iq4_nl", (_NIBBLES,), _WITH_SCALE,
            Coding(-128, 127, (-129, 115, -136, -123), book=IQ4_LEVELS),
        ),
    )
}  # fmt: skip


def kv_format(name: str) -> KVFormat:
    """The row of a cache type; OpError lists what there is."""
    if name not in KV_FORMATS:
        raise OpError(f"KV type {name!r} is not one of {', '.join(KV_FORMATS)}")
    return KV_FORMATS[name]

"""What the intrinsics mean, in Python: run by the simulator's lanes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from runtime.ops.errors import BackendError

from .intrinsic import WIDTH
from .lanes import Lane, current, meet_block, meet_warp
from .memory import Pointer, Registers, SharedArray

_MASK = 0xFFFFFFFF


def thread_x() -> int:
    """tid.x: the lane's place in its block."""
    return current().thread


def block_index(axis: int) -> int:
    """ctaid: the block's place in the grid along an axis (0 = x)."""
    return current().block.index[axis]


def grid_size(axis: int) -> int:
    """nctaid: how many blocks the grid has along an axis."""
    return current().block.grid[axis]


def u32(x: Any) -> int:
    """The low 32 bits, unsigned."""
    return int(x) & _MASK


def i32(x: Any) -> int:
    """The low 32 bits, signed."""
    return ((int(x) & _MASK) ^ 0x80000000) - 0x80000000


def f32(x: Any) -> np.float32:
    """Rounded to nearest even."""
    return np.float32(x)


def nothing() -> None:
    """Launches of the simulator never overlap."""


def round_i32(x: Any) -> int:
    """cvt.rni: to the nearest integer, halves to even."""
    return int(np.rint(np.float32(x)))


def bits_to_f32(bits: int) -> np.float32:
    """The float32 that a word holds."""
    return np.uint32(u32(bits)).view(np.float32)


def f32_to_bits(x: Any) -> int:
    """The word of a float32, unsigned."""
    return int(np.float32(x).view(np.uint32))


def f16_low(word: int) -> np.float32:
    """The f16 in bits 0 to 15, exactly."""
    return np.float32(np.uint16(int(word) & 0xFFFF).view(np.float16))


def f16_high(word: int) -> np.float32:
    """The f16 in bits 16 to 31, exactly."""
    return f16_low(int(word) >> 16)


def f32_to_f16(x: Any) -> int:
    """The bits of the nearest f16, halves to even."""
    return int(np.float16(x).view(np.uint16))


def pack_f16(low: Any, high: Any) -> int:
    """Two f16 in a word, `low` in bits 0 to 15."""
    return f32_to_f16(low) | f32_to_f16(high) << 16


def _bf16(x: Any) -> int:
    bits = f32_to_bits(x)
    if x != x:
        return 0x7FFF
    return (bits + 0x7FFF + (bits >> 16 & 1)) >> 16 & 0xFFFF


def pack_bf16(low: Any, high: Any) -> int:
    """Two bf16 in a word, `low` in bits 0 to 15; each to nearest even, NaN as 0x7fff."""
    return _bf16(low) | _bf16(high) << 16


def fma(a: Any, b: Any, c: Any) -> np.float32:
    """Rounded once (of float64, which holds the product exactly)."""
    return np.float32(np.float64(a) * np.float64(b) + np.float64(c))


def multiply(a: Any, b: Any) -> np.float32:
    """mul.rn: the product, rounded before anything is added to it."""
    return np.float32(a) * np.float32(b)


def fma_bf16x2(a: int, b: int, c: int) -> int:
    """fma.rn.bf16x2: of both halves."""
    pairs = zip(_bf16_pair(a), _bf16_pair(b), _bf16_pair(c), strict=True)
    low, high = (fma(x, y, z) for x, y, z in pairs)
    return pack_bf16(low, high)


def fmax(a: Any, b: Any) -> np.float32:
    """The number where one is NaN, as max.f32."""
    return np.fmax(np.float32(a), np.float32(b))


def fmin(a: Any, b: Any) -> np.float32:
    """The number where one is NaN, as min.f32."""
    return np.fmin(np.float32(a), np.float32(b))


def fabs(a: Any) -> np.float32:
    """abs.f32: the sign bit cleared."""
    return np.abs(np.float32(a))


def exp2(x: Any) -> np.float32:
    """2^x, exactly rounded where ex2.approx is within 2 ulp."""
    return np.exp2(np.float32(x))


def rcp(x: Any) -> np.float32:
    """1 / x, exactly rounded where rcp.approx is within 1 ulp."""
    return np.float32(1) / np.float32(x)


def rsqrt(x: Any) -> np.float32:
    """1 / sqrt(x), rounded twice where rsqrt.approx is within 2 ulp."""
    return np.float32(1) / np.sqrt(np.float32(x))


def divide(a: Any, b: Any) -> np.float32:
    """div.rn: the quotient to nearest even."""
    return np.float32(a) / np.float32(b)


def floor(x: Any) -> np.float32:
    """cvt.rmi: the largest integer that is not above x, as f32."""
    return np.floor(np.float32(x))


def shift_right(x: int, n: int) -> int:
    """shr.s32: arithmetic, the sign moves in."""
    return i32(x) >> int(n)


def prmt(a: int, b: int, selector: int) -> int:
    """Four bytes of b:a, each chosen by a nibble; bit 3 of the nibble repeats the byte's sign."""
    data = (u32(b) << 32 | u32(a)).to_bytes(8, "little")
    out = 0
    for i in range(4):
        nibble = int(selector) >> 4 * i & 15
        byte = data[nibble & 7]
        out |= ((0xFF if byte & 0x80 else 0) if nibble & 8 else byte) << 8 * i
    return out


def _signed_bytes(word: int) -> list[int]:
    word = u32(word)
    return [((word >> s & 0xFF) ^ 0x80) - 0x80 for s in (0, 8, 16, 24)]


def dp4a(a: int, b: int, c: int) -> int:
    """c + the sum of four products of signed bytes."""
    pairs = zip(_signed_bytes(a), _signed_bytes(b), strict=True)
    return i32(sum(x * y for x, y in pairs) + int(c))


def dp4a_us(a: int, b: int, c: int) -> int:
    """Bytes of a unsigned, of b signed."""
    pairs = zip(u32(a).to_bytes(4, "little"), _signed_bytes(b), strict=True)
    return i32(sum(x * y for x, y in pairs) + int(c))


def dp2a(a: int, b: int, c: int) -> int:
    """c + two int16 of a times the two low signed bytes of b."""
    low, high, *_ = _signed_bytes(b)
    first = ((u32(a) & 0xFFFF) ^ 0x8000) - 0x8000
    return i32(first * low + (i32(a) >> 16) * high + int(c))


def registers(kind: str, count: int) -> Registers:
    """A lane's own array of `count` values of type `kind`."""
    return Registers(kind, count)


def shared(owner: object, kind: str, count: int, alignment: int) -> SharedArray:
    """The block's array of one `owner`, made by the first lane that asks."""
    memory = current().block.memory
    if id(owner) not in memory.arrays:
        memory.arrays[id(owner)] = memory.reserve(count * WIDTH[kind], alignment)
    return SharedArray(memory, memory.arrays[id(owner)], kind, count)


def dynamic_shared(kind: str) -> SharedArray:
    """All dynamic shared memory of the block, as values of type `kind`."""
    start, nbytes = current().block.dynamic
    return SharedArray(current().block.memory, start, kind, nbytes // WIDTH[kind])


def ahead(pointer: Pointer, index: int) -> None:
    """prefetch: nothing but an access in bounds."""
    pointer.read(index)


def read_pair(pointer: Pointer, index: int) -> tuple[Any, ...]:
    """Eight elements, in two accesses of four."""
    return (*pointer.read(index, 4), *pointer.read(int(index) + 1, 4))


def atomic_add(pointer: Pointer, index: int, value: int) -> int:
    """atom.add of u32: the value before."""
    (old,) = pointer.read(index)
    pointer.write(index, (u32(old + int(value)),))
    return old


def copy_async16(
    target: SharedArray, piece: int, source: Pointer, source_piece: int, nbytes: int
) -> None:
    """Nothing arrives before the wait; the bytes beyond `nbytes` become zero."""
    raw = np.zeros(16, np.uint8)
    if nbytes:
        raw[:nbytes] = source.piece(source_piece)[:nbytes]
    current().pending.append((target.memory, target.start + int(piece) * 16, raw))


def copy_commit() -> None:
    """Copies begun since the last commit become a group."""
    lane = current()
    lane.groups.append(lane.pending)
    lane.pending = []


def copy_wait(left: int) -> None:
    """Until at most `left` groups are on their way; the older ones arrive, oldest first."""
    lane = current()
    while len(lane.groups) > left:
        for memory, start, raw in lane.groups.pop(0):
            memory.write(lane, start, raw)


# Operations of a warp: functions of the lanes that meet and the value each brings.


def _warp(meeting: Callable[[Sequence[Lane], Sequence[Any]], Sequence[Any]]) -> Callable[..., Any]:
    return lambda *value: meet_warp(meeting, value)


def _shuffled(source: Callable[[int, int], int]) -> Callable[..., Any]:
    def shuffle(lanes: Sequence[Lane], values: Sequence[Any]) -> list[Any]:
        by_lane = {lane.lane: v[0] for lane, v in zip(lanes, values, strict=True)}
        pairs = zip(lanes, values, strict=True)
        return [by_lane.get(source(lane.lane, int(v[1])), v[0]) for lane, v in pairs]

    return _warp(shuffle)


shuffle_xor = _shuffled(lambda lane, n: lane ^ n)
shuffle_index = _shuffled(lambda lane, n: n & 31)
shuffle_down = _shuffled(lambda lane, n: lane + n)
shuffle_up = _shuffled(lambda lane, n: lane - n)


@_warp
def ballot(lanes: Sequence[Lane], values: Sequence[Any]) -> list[Any]:
    """Bit i says whether lane i brings a value that is not 0."""
    bits = sum(1 << lane.lane for lane, v in zip(lanes, values, strict=True) if v[0])
    return [bits] * len(lanes)


@_warp
def vote_any(lanes: Sequence[Lane], values: Sequence[Any]) -> list[Any]:
    """1 where some lane brings a value that is not 0."""
    return [int(any(v[0] for v in values))] * len(lanes)


@_warp
def vote_all(lanes: Sequence[Lane], values: Sequence[Any]) -> list[Any]:
    """1 where every lane brings a value that is not 0."""
    return [int(all(v[0] for v in values))] * len(lanes)


@_warp
def warp_sum(lanes: Sequence[Lane], values: Sequence[Any]) -> list[Any]:
    """redux.sync.add: the sum over the lanes, wrapped to int32."""
    return [i32(sum(int(v[0]) for v in values))] * len(lanes)


@_warp
def warp_max(lanes: Sequence[Lane], values: Sequence[Any]) -> list[Any]:
    """redux.sync.max: the largest over the lanes, signed."""
    return [max(i32(v[0]) for v in values)] * len(lanes)


@_warp
def warp_min(lanes: Sequence[Lane], values: Sequence[Any]) -> list[Any]:
    """redux.sync.min: the smallest over the lanes, unsigned."""
    return [min(u32(v[0]) for v in values)] * len(lanes)


@_warp
def syncwarp(lanes: Sequence[Lane], values: Sequence[Any]) -> list[Any]:
    """Accesses of the warp before it are seen after it, by the warp."""
    lanes[0].block.epochs[lanes[0].warp] += 1
    return [None] * len(lanes)


def _barrier(lanes: Sequence[Lane], values: Sequence[Any]) -> list[Any]:
    lanes[0].block.epoch += 1
    return [None] * len(lanes)


def syncthreads() -> None:
    """bar.sync: accesses of the block before it are seen after it, by the block."""
    meet_block(_barrier)


def _rows(lanes: Sequence[Lane], values: Sequence[Any], count: int) -> list[np.ndarray]:
    """Matrices of 8 rows of 16 bytes; row r of matrix m is at the address of lane 8 m + r.

    A lane receives bytes of rows that others name: those are its reads.
    """
    if len(lanes) != 32:
        raise BackendError(f"{lanes[0]}: ldmatrix needs 32 lanes, {len(lanes)} came")
    by_lane = {lane.lane: v for lane, v in zip(lanes, values, strict=True)}
    found = []
    for matrix in range(count):
        rows = [by_lane[8 * matrix + r] for r in range(8)]
        reads = [a.memory.read(lanes[0], a.start + int(p) * 16, 16) for a, p in rows]
        found.append(np.stack(reads))
    return found


def _ldmatrix(count: int, transposed: bool) -> Callable[..., Any]:
    def ldmatrix(lanes: Sequence[Lane], values: Sequence[Any]) -> list[Any]:
        halves = [rows.view(np.uint16) for rows in _rows(lanes, values, count)]
        words = [np.ascontiguousarray(h.T if transposed else h).view(np.uint32) for h in halves]
        return [tuple(int(w[lane.lane // 4, lane.lane % 4]) for w in words) for lane in lanes]

    return _warp(ldmatrix)


ldmatrix_x4 = _ldmatrix(4, False)
ldmatrix_x2 = _ldmatrix(2, False)
ldmatrix_x4_trans = _ldmatrix(4, True)


def _mma(unpack: Callable[[int], list[Any]], kind: Any) -> Callable[..., Any]:
    """D = A B + C of A [16, K] and B [K, 8] in fragments of `len(unpack)` values a word.

    Lane 4 g + t holds of A rows g and g + 8, columns of t in both halves of K; of B column g;
    of C and D rows g and g + 8, columns 2 t and 2 t + 1. Floats are added up in float64, which
    holds sums of so few products of halves exactly unless their sizes differ by 2^30, and rounded
    once; a GPU rounds otherwise, but, like this, by the operands and their place in k alone.
    """
    per = len(unpack(0))

    def mma(lanes: Sequence[Lane], values: Sequence[Any]) -> list[Any]:
        if len(lanes) != 32:
            raise BackendError(f"{lanes[0]}: mma needs 32 lanes, {len(lanes)} came")
        a, b = np.zeros((16, 8 * per), kind), np.zeros((8 * per, 8), kind)
        c = np.zeros((16, 8), kind)
        for lane, v in zip(lanes, values, strict=True):
            g, t = divmod(lane.lane, 4)
            for r in range(4):
                k = t * per + 4 * per * (r >> 1)
                a[g + 8 * (r & 1), k : k + per] = unpack(v[r])
                c[g + 8 * (r >> 1), 2 * t + (r & 1)] = v[6 + r]
            for r in range(2):
                b[t * per + 4 * per * r :][:per, g] = unpack(v[4 + r])
        d = a @ b + c
        return [tuple(_fragment(d, lane.lane)) for lane in lanes]

    return _warp(mma)


def _fragment(d: np.ndarray, lane: int) -> list[Any]:
    g, t = divmod(lane, 4)
    found = [d[g + 8 * (r >> 1), 2 * t + (r & 1)] for r in range(4)]
    return [(f32 if d.dtype.kind == "f" else i32)(v) for v in found]


def _bf16_pair(word: int) -> list[Any]:
    return [bits_to_f32(u32(word) << 16), bits_to_f32(u32(word) & 0xFFFF0000)]


mma_s8 = _mma(_signed_bytes, np.int64)


def mma_s8_half(a0: int, a1: int, b: int, *c: int) -> Any:
    """m16n8k16: the words of one half of K, as those of m16n8k32 lie."""
    return mma_s8(a0, a1, 0, 0, b, 0, *c)


mma_f16 = _mma(lambda w: [f16_low(u32(w)), f16_high(u32(w))], np.float64)
mma_bf16 = _mma(_bf16_pair, np.float64)

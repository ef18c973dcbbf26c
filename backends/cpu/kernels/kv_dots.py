"""Integer products of K's codes with queries, and queries as the integers they are taken with.

A query of 32 dims is scale * (128 * high + low) with high and low of one signed byte, so that it
is rounded 2^-14 times as much as its largest dim: what that costs is far below what K's own
rounding does. The products are exact; instructions are those of the weight tiles.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from runtime.backends.cpu import llvm
from runtime.backends.cpu.abi import ATTENTION_ROWS
from runtime.backends.cpu.tile.dots import dot_step
from runtime.backends.cpu.tile.vector import Code
from runtime.ops.kv_formats import GROUP, SMALLEST, Coding

from . import emit as e
from .target import chosen

Value = Any
WORDS = GROUP // 4
ROW = 4 * ATTENTION_ROWS  # bytes of one number of each of 8 rows
# A group of q: words of four bytes, [high, low][word][row], then by row the scale, the correction
# -lowest * sum of q (as far as a product leaves that out), and scale * sum of q.
Q_GROUP = GROUP * ROW
_LOW, _SCALE, _CORRECTION, _SUM = (
    ROW * i for i in (WORDS, 2 * WORDS, 2 * WORDS + 1, 2 * WORDS + 2)
)
_MOST = 127 * 128


def native(b: ir.IRBuilder) -> Code:
    """What the tile's emitters write with, at the end of `b`."""
    code = Code.__new__(Code)
    code.isa, code.lanes, code.b = chosen(), chosen().lanes, b
    return code


def joined(b: ir.IRBuilder, parts: list[Value]) -> Value:
    """Vectors of one length one behind the other, a power of two of them."""
    while len(parts) > 1:
        n = 2 * parts[0].type.count
        pairs = zip(parts[::2], parts[1::2], strict=True)
        parts = [llvm.shuffle(b, x, y, range(n)) for x, y in pairs]
    return parts[0]


class Levels:
    """What the tile's products know of codes: how many there are, and the code of 0."""

    def __init__(self, coding: Coding) -> None:
        self.levels = 256 if coding.book else coding.highest - coding.lowest + 1
        self.offset = -coding.lowest


class KeyDots:
    """Products of 16 keys with some rows of q; `lowest` says what a correction counts."""

    def __init__(self, b: ir.IRBuilder, coding: Coding) -> None:
        self.b, self.code = b, native(b)
        self.step = dot_step(self.code, Levels(coding))

    def begin(self) -> list[Any]:
        """The empty sum."""
        return [self.step.begin(None, 0) for _ in range(e.LANES // self.code.lanes)]

    def keys(self, words: Value) -> list[Any]:
        """Words of 16 keys as products take them."""
        whole, n = self.b.bitcast(words, llvm.vec(e.i8, 64)), 4 * self.code.lanes
        cut = [llvm.shuffle(self.b, whole, whole, range(i, i + n)) for i in range(0, 64, n)]
        return [self.step.weights(part) for part in cut]

    def add(self, total: list[Any], keys: list[Any], place: Value, w: int) -> list[Any]:
        """Add the products with word number w of q, which lies at `place`."""
        four = llvm.splat(self.b, e.load(self.b, place, e.i32, 4), self.code.lanes)
        return [self.step.add(t, k, four, w) for t, k in zip(total, keys, strict=True)]

    def end(self, total: list[Any]) -> Value:
        """int32 of the 16 keys."""
        return joined(self.b, [self.step.end(t) for t in total])


def word_place(b: ir.IRBuilder, q: Value, low: int, w: int, row: int) -> Value:
    """Where a group of q has word w of a row's high or (1) low bytes."""
    return e.offset(b, q, _LOW * low + ROW * w + 4 * row)


def whole_dot(b: ir.IRBuilder, q: Value, row: int, high: Value, low: Value) -> Value:
    """Float32 scale * (q . codes) of 16 keys from both sums of products."""
    total = b.add(b.shl(high, e.ints(7)), low)
    correction = e.splat(b, e.load(b, e.offset(b, q, _CORRECTION + 4 * row), e.i32, 4))
    scale = e.splat(b, e.load(b, e.offset(b, q, _SCALE + 4 * row), e.f32, 4))
    return b.fmul(b.sitofp(b.add(total, correction), e.wide(e.f32)), scale)


def sum_of(b: ir.IRBuilder, q: Value, row: int) -> Value:
    """scale * sum of q of a row in all lanes: what minima of K are multiplied with."""
    return e.splat(b, e.load(b, e.offset(b, q, _SUM + 4 * row), e.f32, 4))


def store_query(
    b: ir.IRBuilder, coding: Coding, parts: tuple[Value, ...], q: Value, factor: Value
) -> None:
    """One group of a row, 32 floats times `factor`, as integers; q: where its first number is."""
    zero = ir.Constant(e.f32, 0.0)
    peak = e.largest(b, e.larger(b, *(e.absolute(b, part) for part in parts)))
    some = b.fcmp_ordered(">=", peak, ir.Constant(e.f32, e.single(SMALLEST)))
    inverse = b.select(some, b.fdiv(ir.Constant(e.f32, float(_MOST)), peak), zero)
    steps = [e.nearest_int(b, b.fmul(part, e.splat(b, inverse))) for part in parts]
    # 0 times what is not finite is NaN, and so are all scores of the row.
    bad = b.fmul(e.total(b, b.fmul(b.fadd(*parts), e.floats(0.0))), zero)
    scale = b.fmul(b.select(some, b.fdiv(peak, ir.Constant(e.f32, float(_MOST))), zero), factor)
    scale = b.fadd(scale, bad)
    high = [b.ashr(b.add(x, e.ints(64)), e.ints(7)) for x in steps]
    low = [b.sub(x, b.shl(h, e.ints(7))) for x, h in zip(steps, high, strict=True)]
    for is_low, halves in enumerate((high, low)):
        for half, value in enumerate(halves):
            words = b.bitcast(b.trunc(value, e.wide(e.i8)), llvm.vec(e.i32, 4))
            for i in range(4):
                one = b.extract_element(words, ir.Constant(e.i32, i))
                e.store(b, one, word_place(b, q, is_low, 4 * half + i, 0), 4)
    total = e.total(b, b.add(*steps))
    left_out = dot_step(native(b), Levels(coding)).leaves_out
    correction = b.mul(total, ir.Constant(e.i32, -left_out))
    for place, value in (
        (_SCALE, scale), (_CORRECTION, correction),
        (_SUM, b.fmul(b.sitofp(total, e.f32), scale)),
    ):  # fmt: skip
        e.store(b, value, e.offset(b, q, place), 4)

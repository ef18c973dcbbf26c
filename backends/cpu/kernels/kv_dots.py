"""Integer products with the codes of K and V, and the integers that codes are multiplied with.

Queries, 32 dims at a time, and the weights of 32 keys become scale * an integer of at most 127 *
128: rounded 2^-15 times as much as their largest, which costs far less than the codes' own rounding
does. The products are exact, in whatever order. Where bytes are multiplied four at a time, as in
the weight tiles, an integer is 128 * high + low, two signed bytes; elsewhere it is one of 16 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
_ROWS = 4 * ATTENTION_ROWS  # bytes of one number of each of 8 rows
# 32 numbers of 8 rows: two halves [row][word of four numbers], the high and the low bytes, or the
# first and third, second and fourth of 16 bits; then by row the scale, the correction -middle * sum
# of the integers (as far as a product leaves that out), and a float beside them.
_HALF = GROUP * ATTENTION_ROWS
_SCALE, _CORRECTION, _BESIDE = (2 * _HALF + _ROWS * i for i in range(3))
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


def middle(coding: Coding) -> int:
    """The code that products take as 0, so that roundings of what it is multiplied with stay small.

    Of types with minima it is none that means 0: minima are `middle` times the scale higher.
    """
    return (coding.highest + 1) // 2 if coding.has_minimum else -coding.lowest


class Levels:
    """What the tile's products know of codes: how many there are, and the one taken as 0."""

    def __init__(self, coding: Coding) -> None:
        self.levels = 256 if coding.book else coding.highest - coding.lowest + 1
        self.offset = middle(coding)


class _ByteDots:
    """Products of 16 keys (of K) or dims (of V) with numbers of two bytes."""

    def __init__(self, b: ir.IRBuilder, coding: Coding) -> None:
        self.b, self.code = b, native(b)
        self.step = dot_step(self.code, Levels(coding))
        self.leaves_out = self.step.leaves_out

    def begin(self) -> list[list[Any]]:
        """The empty sum."""
        return [[self.step.begin(None, 0) for _ in _parts(self.code)] for _ in range(2)]

    def codes(self, words: Value) -> list[Any]:
        """A word of each of the 16 as products take it."""
        return [self.step.weights(part) for part in _cut(self.code, words)]

    def add(self, total: Any, codes: list[Any], fours: list[Value], w: int) -> list[list[Any]]:
        """Add the products with word number w of a row's numbers, of which these are the halves."""
        return [
            [self.step.add(t, c, llvm.splat(self.b, four, self.code.lanes), w)
             for t, c in zip(half, codes, strict=True)]
            for half, four in zip(total, fours, strict=True)
        ]  # fmt: skip

    def end(self, total: Any) -> Value:
        """int32 of the 16."""
        high, low = (joined(self.b, [self.step.end(t) for t in half]) for half in total)
        return self.b.add(self.b.shl(high, e.ints(7)), low)

    def halves(self, numbers: Value) -> tuple[Value, Value]:
        """32 numbers of 16 bits as they are stored."""
        b, seven = self.b, llvm.fill(e.i16, 7, GROUP)
        high = b.ashr(b.add(numbers, llvm.fill(e.i16, 64, GROUP)), seven)
        low = b.sub(numbers, b.shl(high, seven))
        return b.trunc(high, llvm.vec(e.i8, GROUP)), b.trunc(low, llvm.vec(e.i8, GROUP))


class _PairDots:
    """The same with numbers of 16 bits, two at a time."""

    def __init__(self, b: ir.IRBuilder, coding: Coding) -> None:
        self.b, self.code, self.leaves_out = b, native(b), middle(coding)
        self.n = 2 * self.code.lanes

    def begin(self) -> list[Any]:
        """The empty sum."""
        return [self.code.fill(e.i32, 0) for _ in _parts(self.code)]

    def codes(self, words: Value) -> list[Any]:
        """A word of each of the 16: bytes 0 and 2, and bytes 1 and 3, with 16 bits."""
        b, found = self.b, []
        for part in _cut(self.code, words):
            pairs = b.bitcast(part, llvm.vec(e.i16, self.n))
            even = b.and_(pairs, llvm.fill(e.i16, 255, self.n))
            found.append((even, b.lshr(pairs, llvm.fill(e.i16, 8, self.n))))
        return found

    def add(self, total: list[Any], codes: list[Any], fours: list[Value], w: int) -> list[Any]:
        """Add the products with word number w of a row's numbers, of which these are the halves."""
        del w
        b, kind = self.b, llvm.vec(e.i16, self.n)
        wide = [b.bitcast(llvm.splat(b, four, self.code.lanes), kind) for four in fours]
        for half, number in enumerate(wide):
            products = [self._products(pair[half], number) for pair in codes]
            total = [b.add(t, p) for t, p in zip(total, products, strict=True)]
        return total

    def _products(self, x: Value, y: Value) -> Value:
        """x[2 i] y[2 i] + x[2 i + 1] y[2 i + 1]."""
        if self.code.isa.name == "avx2":
            kind = llvm.vec(e.i32, self.code.lanes)
            return self.code.intrinsic("llvm.x86.avx2.pmadd.wd", kind, [x, y])
        b, wide = self.b, llvm.vec(e.i32, self.n)
        products = b.mul(b.sext(x, wide), b.sext(y, wide))
        return b.add(*(
            llvm.shuffle(b, products, products, range(i, self.n, 2)) for i in (0, 1)
        ))  # fmt: skip

    def end(self, total: list[Any]) -> Value:
        """int32 of the 16."""
        return joined(self.b, total)

    def halves(self, numbers: Value) -> tuple[Value, Value]:
        """32 numbers of 16 bits as they are stored."""
        first = [i for w in range(WORDS) for i in (4 * w, 4 * w + 2)]
        return tuple(
            llvm.shuffle(self.b, numbers, numbers, [i + half for i in first]) for half in (0, 1)
        )


def _parts(code: Code) -> range:
    return range(0, e.LANES, code.lanes)


def _cut(code: Code, words: Value) -> list[Value]:
    """A word of each of 16 as bytes, a native vector at a time."""
    whole, n = code.b.bitcast(words, llvm.vec(e.i8, 64)), 4 * code.lanes
    return [llvm.shuffle(code.b, whole, whole, range(i, i + n)) for i in range(0, 64, n)]


def code_dots(b: ir.IRBuilder, coding: Coding) -> Any:
    """The products of codes that this processor is best at."""
    fours = chosen().has_vnni or chosen().has_sdot
    return (_ByteDots if fours else _PairDots)(b, coding)


class Numbers:
    """32 numbers of the rows `row`.. of a block, as integers at `place`."""

    def __init__(self, b: ir.IRBuilder, place: Value, row: Value) -> None:
        self.b = b
        self.words = b.add(place, e.times(b, row, GROUP))
        self.others = b.add(place, e.times(b, row, 4))

    def word(self, w: int, r: int) -> list[Value]:
        """Both halves of word w of a row."""
        at = e.offset(self.b, self.words, GROUP * r + 4 * w)
        return [e.load(self.b, e.offset(self.b, at, half), e.i32, 4) for half in (0, _HALF)]

    def whole(self, r: int, total: Value) -> Value:
        """Float32 of 16 exact products, which may lack what they leave out."""
        correction = e.splat(self.b, e.load(self.b, self._at(_CORRECTION, r), e.i32, 4))
        return self.b.sitofp(self.b.add(total, correction), e.wide(e.f32))

    def scale(self, r: int) -> Value:
        """A row's scale in all lanes."""
        return e.splat(self.b, e.load(self.b, self._at(_SCALE, r), e.f32, 4))

    def beside(self, r: int) -> Value:
        """The float beside a row's numbers in all lanes."""
        return e.splat(self.b, e.load(self.b, self._at(_BESIDE, r), e.f32, 4))

    def _at(self, place: int, r: int) -> Value:
        return e.offset(self.b, self.others, place + 4 * r)

    def store(
        self, coding: Coding, rows: Sequence[tuple[Value, Value]], factor: Value | None = None
    ) -> Value:
        """Keep 32 floats of each row, two vectors, times `factor`, for products with codes.

        Lane r of the result: the sum of row r as it is kept.
        """
        b, kind = self.b, e.wide(e.f32)
        parts = [
            e.larger_int(b, *(b.bitcast(e.absolute(b, half), e.wide(e.i32)) for half in both))
            for both in rows
        ]
        peak = b.bitcast(folded(b, parts, lambda x, y: e.larger_int(b, x, y)), kind)
        some = b.fcmp_ordered(">=", peak, e.floats(SMALLEST))
        inverse = b.select(some, b.fdiv(e.floats(_MOST), peak), e.floats(0.0))
        scale = b.select(some, b.fdiv(peak, e.floats(_MOST)), e.floats(0.0))
        if factor is not None:
            scale = b.fmul(scale, e.splat(b, factor))
        # 0 times what is not finite is NaN, and so is all that the row gets from here.
        scale = b.fadd(scale, b.fmul(peak, e.floats(0.0)))
        totals, dots = [], code_dots(b, coding)
        for r, both in enumerate(rows):
            by = e.lanes_of(b, inverse, [r] * e.LANES)
            steps = [e.nearest_int(b, b.fmul(half, by)) for half in both]
            totals.append(b.add(*steps))
            low, high = (b.trunc(half, e.wide(e.i16)) for half in steps)
            words = dots.halves(llvm.shuffle(b, low, high, range(GROUP)))
            for half, value in enumerate(words):
                at = e.offset(b, self.words, GROUP * r + _HALF * half)
                e.store(b, value, at, 4)
        total = folded(b, totals, b.add)
        correction = b.mul(total, e.ints(-dots.leaves_out))
        self._store_row_by_row(_SCALE, scale, len(rows))
        self._store_row_by_row(_CORRECTION, correction, len(rows))
        return b.fmul(b.sitofp(total, kind), scale)

    def store_beside(self, values: Value, rows: int) -> None:
        """Keep lane r of `values` beside the numbers of row r."""
        self._store_row_by_row(_BESIDE, values, rows)

    def _store_row_by_row(self, place: int, values: Value, rows: int) -> None:
        e.store(self.b, e.lanes_of(self.b, values, range(rows)), self._at(place, 0), 4)


def folded(b: ir.IRBuilder, rows: list[Value], combine: Callable[[Value, Value], Value]) -> Value:
    """Lane r: the 16 lanes of row r combined: i and i + 8, then i and i + 4, i + 2, i + 1.

    rows: up to 16 vectors. What further lanes have means nothing.
    """
    filled = 1 << (len(rows) - 1).bit_length()
    vectors, held, n = rows + rows[-1:] * (filled - len(rows)), 1, e.LANES
    while n > 1:  # vectors have n lanes of each of `held` rows
        pairs = [vectors[i : i + 2] for i in range(0, len(vectors), 2)]
        starts = [e.LANES * i + n * row for i in range(len(pairs[0])) for row in range(held)]
        n, held = n // 2, len(starts)
        low = [start + i for start in starts for i in range(n)] * (e.LANES // (n * held))
        high = [place + n for place in low]
        vectors = [
            combine(*(llvm.shuffle(b, pair[0], pair[-1], picked) for picked in (low, high)))
            for pair in pairs
        ]
    return vectors[0]

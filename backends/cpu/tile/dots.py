"""The integer dot product of unsigned codes with int8 activations, for each instruction set.

Every variant gives the same exact integers: sum over the elements of (code - offset) * q. Where
the instruction wants unsigned codes, sums start from the activations' own correction
-8 * sum(q), shifted to the format's offset; where it wants signed bytes, the offset is taken from
the codes, once per word for all columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from runtime.backends.cpu.tile.codes import Word
from runtime.backends.cpu.tile.formats import Format
from runtime.backends.cpu.tile.vector import I8, I16, I32, Broadcasts, Code, ir, vec

_MAX_ACTIVATION = 127
_CORRECTION = 8
# With fewer columns bringing words together takes the instructions that smmla saves (counted).
_MATRIX_COLUMNS = 8


class Codes(Protocol):
    """What a product has to know of codes: how many there are, and which of them means 0."""

    @property
    def levels(self) -> int:
        """How many codes there are."""
        ...

    @property
    def offset(self) -> int:
        """The code of 0."""
        ...


def dot_step(code: Code, layout: Codes, prepared: bool = False) -> Dot:
    """The products of this instruction set."""
    return _STEPS.get(code.isa.name, _WidenedDot)(code, layout, prepared)


def dot_words(
    code: Code,
    layout: Format,
    words: list[list[Word]],
    x: Sequence[Broadcasts],
    start: Broadcasts,
    prepared: bool = False,
) -> list[list[Any]]:
    """Exact dots [row group][column] of one scale group.

    words: [row group][word] unpackers; x: the words of activations of each column; start: the
    int32 corrections -8 * sum(q) of all columns; prepared: whether words are what
    `prepared_words` gave.
    """
    if code.isa.has_smmla and len(x) >= _MATRIX_COLUMNS:
        return _matrix_dots(code, layout, words, x, prepared)
    step = dot_step(code, layout, prepared)
    n_groups, n_words, columns = len(words), len(words[0]), range(len(x))
    sums = [[step.begin(start, c) for c in columns] for _ in range(n_groups)]
    for w in range(n_words):
        codes = [step.weights(words[g][w]()) for g in range(n_groups)]
        for c in columns:  # columns innermost: their dots do not wait for each other
            four = x[c][w]
            for g in range(n_groups):
                sums[g][c] = step.add(sums[g][c], codes[g], four, w)
    return [[step.end(s) for s in row] for row in sums]


def prepared_words(code: Code, layout: Format, words: list[Any], columns: int) -> list[Any]:
    """Unpacked words as they wait for many tiles of `columns`: on Arm as its products take them."""
    if not code.isa.has_sdot:
        return words
    words = [signed_codes(code, layout, word) for word in words]
    if not code.isa.has_smmla or columns < _MATRIX_COLUMNS:
        return words
    pairs = zip(words[::2], words[1::2], strict=True)
    return [rows for pair in pairs for rows in _rows_of_two(code, *pair)]


def _matrix_dots(
    code: Code, layout: Format, words: list[list[Word]], x: Sequence[Broadcasts], prepared: bool
) -> list[list[Any]]:
    """As `dot_words` by Arm's smmla: two rows by two columns, eight elements at once.

    A product takes [row][element] and [column][element] of 2 x 8 signed bytes and adds to
    [row][column], so that two words of a row, and of a column, are brought together first.
    """
    pairs, halves = range(0, len(x), 2), range(2)
    zero = code.fill(I32, 0)
    sums = [[[zero, zero] for _ in pairs] for _ in words]  # [row group][pair of columns][half]
    for w in range(0, len(words[0]), 2):
        rows = [[words_of[w + i]() for i in halves] for words_of in words]
        if not prepared:
            rows = [prepared_words(code, layout, two, len(x)) for two in rows]
        for p, c in enumerate(pairs):
            both = _columns_of_two(code, [x[c + i] for i in halves], w)
            for g, mine in enumerate(rows):
                sums[g][p] = [_smmla(code, sums[g][p][i], mine[i], both) for i in halves]
    return [[column for pair in group for column in _by_column(code, pair)] for group in sums]


def _rows_of_two(code: Code, low: Any, high: Any) -> list[Any]:
    """Two words of four rows as [row][eight elements], two rows to a vector."""
    low, high = _lanes(code, low), _lanes(code, high)
    return [code.shuffle(low, high, picks) for picks in ([0, 4, 1, 5], [2, 6, 3, 7])]


def _columns_of_two(code: Code, x: list[Broadcasts], w: int) -> Any:
    """Words w and w + 1 of two columns."""
    (first, at), (second, _) = (column.vector_with(w) for column in x)
    return code.shuffle(first, second, [at, at + 1, at + 4, at + 5])


def _by_column(code: Code, sums: list[Any]) -> list[Any]:
    """[row][column] of two rows each as one vector of rows for each column."""
    first, second = sums
    return [code.shuffle(first, second, [c, 2 + c, 4 + c, 6 + c]) for c in range(2)]


def _smmla(code: Code, total: Any, rows: Any, columns: Any) -> Any:
    name = "llvm.aarch64.neon.smmla.v4i32.v16i8"
    return code.intrinsic(name, total.type, [total, _bytes(code, rows), _bytes(code, columns)])


def half_sums(code: Code, halves: tuple[Any, ...], sums: list[Any]) -> Any:
    """-8 * the sum over both halves of factor * sum(q), exact.

    halves: small factors of each row; sums: -8 * sum(q) in every lane, which fits 16 bits.
    """
    if code.isa.has_vnni:
        total = code.fill(I32, 0)
        for factor, value in zip(halves, sums, strict=True):
            # The factor's upper 16 bits are zero, those of the sum do not matter.
            name = "llvm.x86.avx512.vpdpwssd.512"
            total = code.intrinsic(name, factor.type, [total, factor, value])
        return total
    return code.b.add(*(code.b.mul(f, v) for f, v in zip(halves, sums, strict=True)))


class Dot:
    """One way to add up products; the default sums int32 lanes without a correction."""

    leaves_out = 0  # what codes are too large by, for a correction to take off

    def __init__(self, code: Code, layout: Codes, prepared: bool = False) -> None:
        self.code, self.layout, self.prepared = code, layout, prepared

    def begin(self, start: Broadcasts | None, column: int) -> Any:
        """The empty sum of a column; `start` are the activations' corrections, if sums begin so."""
        return self.code.fill(I32, 0)

    def weights(self, codes: Any) -> Any:
        """The codes of a word as `add` wants them, once for all columns."""
        return signed_codes(self.code, self.layout, codes)

    def add(self, total: Any, weights: Any, four: Any, w: int) -> Any:
        """Add word number w; `four` are its activations in every lane."""
        raise NotImplementedError

    def end(self, total: Any) -> Any:
        """The sum as one int32 per row."""
        return total


class _VnniDot(Dot):
    """AVX-512 VNNI: vpdpbusd, unsigned codes by signed activations."""

    def __init__(self, code: Code, layout: Codes, prepared: bool = False) -> None:
        super().__init__(code, layout, prepared)
        self.leaves_out = layout.offset

    def begin(self, start: Broadcasts | None, column: int) -> Any:
        return _correction(self.code, self.layout, start, column)

    def weights(self, codes: Any) -> Any:
        return _lanes(self.code, codes)

    def add(self, total: Any, weights: Any, four: Any, w: int) -> Any:
        name = "llvm.x86.avx512.vpdpbusd.512"
        return self.code.intrinsic(name, total.type, [total, weights, four])


class _NeonDot(Dot):
    """Arm dot product: sdot, signed bytes by signed bytes."""

    def weights(self, codes: Any) -> Any:
        return codes if self.prepared else super().weights(codes)

    def add(self, total: Any, weights: Any, four: Any, w: int) -> Any:
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        return self.code.intrinsic(name, total.type, [total, weights, _bytes(self.code, four)])


class _Avx2Dot(Dot):
    """AVX2: vpmaddubsw adds pairs in int16, which saturates, so sums are emptied in time.

    Codes below 64 fit as they are (2 * 63 * 127 * 2 < 32768). Codes of 8 bits go as |w| and the
    activation takes w's sign (128 * 127 * 2 < 32768).
    """

    def __init__(self, code: Code, layout: Codes, prepared: bool = False) -> None:
        super().__init__(code, layout, prepared)
        self.signed = layout.levels > 64
        self.leaves_out = 0 if self.signed else layout.offset
        largest = 128 if self.signed else layout.levels - 1
        self.room = (2**15 - 1) // (2 * _MAX_ACTIVATION * largest)

    def begin(self, start: Broadcasts | None, column: int) -> Any:
        if self.signed:
            return self.code.fill(I32, 0), None
        return _correction(self.code, self.layout, start, column), None

    def weights(self, codes: Any) -> Any:
        if not self.signed:
            return codes, None
        weights = signed_codes(self.code, self.layout, codes)
        zero = self.code.fill(I8, 0, weights.type.count)
        negative = self.code.b.icmp_signed("<", weights, zero)
        return self.code.b.select(negative, self.code.b.neg(weights), weights), weights

    def add(self, total: Any, weights: Any, four: Any, w: int) -> Any:
        code, (whole, pairs), (codes, sign) = self.code, total, weights
        x = _bytes(code, four)
        if sign is not None:
            x = code.intrinsic("llvm.x86.avx2.psign.b", x.type, [x, sign])
        kind = vec(I16, 2 * code.lanes)
        new = code.intrinsic("llvm.x86.avx2.pmadd.ub.sw", kind, [codes, x])
        pairs = new if pairs is None else code.b.add(pairs, new)
        if (w + 1) % self.room:
            return whole, pairs
        return self._emptied(whole, pairs), None

    def end(self, total: Any) -> Any:
        whole, pairs = total
        return whole if pairs is None else self._emptied(whole, pairs)

    def _emptied(self, whole: Any, pairs: Any) -> Any:
        ones = self.code.fill(I16, 1, pairs.type.count)
        wide = self.code.intrinsic("llvm.x86.avx2.pmadd.wd", whole.type, [pairs, ones])
        return self.code.b.add(whole, wide)


class _WidenedDot(Dot):
    """Any processor: products in int32 element by element, added up at the end of the group."""

    def __init__(self, code: Code, layout: Codes, prepared: bool = False) -> None:
        super().__init__(code, layout, prepared)
        self.wide = vec(I32, 4 * code.lanes)

    def begin(self, start: Broadcasts | None, column: int) -> Any:
        return ir.Constant(self.wide, [0] * self.wide.count)

    def weights(self, codes: Any) -> Any:
        return self.code.b.sext(signed_codes(self.code, self.layout, codes), self.wide)

    def add(self, total: Any, weights: Any, four: Any, w: int) -> Any:
        x = self.code.b.sext(_bytes(self.code, four), self.wide)
        return self.code.b.add(total, self.code.b.mul(weights, x))

    def end(self, total: Any) -> Any:
        parts = [self._every_fourth(total, k) for k in range(4)]
        add = self.code.b.add
        return add(add(parts[0], parts[1]), add(parts[2], parts[3]))

    def _every_fourth(self, total: Any, k: int) -> Any:
        return self.code.shuffle(total, total, range(k, total.type.count, 4))


def signed_codes(code: Code, layout: Codes, codes: Any) -> Any:
    """The codes less their offset, as signed bytes (xor for 128: the sign bit turns over)."""
    offset = code.fill(I8, layout.offset, codes.type.count)
    if layout.offset == 0:
        return codes
    return code.b.xor(codes, offset) if layout.offset == 128 else code.b.sub(codes, offset)


def _correction(code: Code, layout: Codes, start: Broadcasts | None, column: int) -> Any:
    """-offset * sum(q) of a column in every lane, from the values -8 * sum(q) at `start`."""
    if layout.offset == 0 or start is None:
        return code.fill(I32, 0)
    value = start[column]
    if layout.offset < _CORRECTION:
        shift = (_CORRECTION // layout.offset).bit_length() - 1
        return code.b.ashr(value, code.fill(I32, shift))
    shift = (layout.offset // _CORRECTION).bit_length() - 1
    return code.b.shl(value, code.fill(I32, shift)) if shift else value


def _bytes(code: Code, four: Any) -> Any:
    return code.b.bitcast(four, vec(I8, 4 * code.lanes))


def _lanes(code: Code, four: Any) -> Any:
    return code.b.bitcast(four, vec(I32, code.lanes))


_STEPS: dict[str, type[Dot]] = {
    "avx512vnni": _VnniDot,
    "amx": _VnniDot,
    "avx2": _Avx2Dot,
    "arm_dotprod": _NeonDot,
    "arm_i8mm": _NeonDot,  # with few columns
}

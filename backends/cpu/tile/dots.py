"""The integer dot product of unsigned codes with int8 activations, for each instruction set.

Every variant gives the same exact integers: sum over the elements of (code - offset) * q. Where
the instruction wants unsigned codes, sums start from the activations' own correction
-8 * sum(q), shifted to the format's offset; where it wants signed bytes, the offset is taken from
the codes, once per word for all columns.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from runtime.backends.cpu.tile.codes import Word
from runtime.backends.cpu.tile.formats import Format
from runtime.backends.cpu.tile.vector import I8, I16, I32, Code, ir, vec

Address = Callable[[int, int], Any]  # (column, word of four activations) -> address
Start = Callable[[int], Any]  # column -> address of its int32 correction -8 * sum(q)

_MAX_ACTIVATION = 127
_CORRECTION = 8


def dot_words(
    code: Code, layout: Format, words: list[list[Word]], columns: int, x: Address, start: Start
) -> list[list[Any]]:
    """Exact dots [row group][column] of one scale group.

    words: [row group][word] unpackers; x and start address the activations and corrections.
    """
    step = _STEPS.get(code.isa.name, _WidenedDot)(code, layout)
    n_groups, n_words = len(words), len(words[0])
    sums = [[step.begin(start(c)) for c in range(columns)] for _ in range(n_groups)]
    for w in range(n_words):
        codes = [step.weights(words[g][w]()) for g in range(n_groups)]
        for c in range(columns):  # columns innermost: their dots do not wait for each other
            four = code.load_splat(x(c, w), I32)
            for g in range(n_groups):
                sums[g][c] = step.add(sums[g][c], codes[g], four, w)
    return [[step.end(s) for s in row] for row in sums]


def half_sums(code: Code, halves: tuple[Any, ...], starts: list[Any]) -> Any:
    """-8 * the sum over both halves of factor * sum(q), exact.

    halves: small factors of each row; starts: addresses of -8 * sum(q), which fits 16 bits.
    """
    sums = [code.load_splat(start, I32) for start in starts]
    if code.isa.has_vnni:
        total = code.fill(I32, 0)
        for factor, value in zip(halves, sums, strict=True):
            # The factor's upper 16 bits are zero, those of the sum do not matter.
            name = "llvm.x86.avx512.vpdpwssd.512"
            total = code.intrinsic(name, factor.type, [total, factor, value])
        return total
    return code.b.add(*(code.b.mul(f, v) for f, v in zip(halves, sums, strict=True)))


class _Dot:
    """One way to add up products; the default sums int32 lanes without a correction."""

    def __init__(self, code: Code, layout: Format) -> None:
        self.code, self.layout = code, layout

    def begin(self, start: Any) -> Any:
        """The empty sum; `start` is the address of the activations' correction."""
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


class _VnniDot(_Dot):
    """AVX-512 VNNI: vpdpbusd, unsigned codes by signed activations."""

    def begin(self, start: Any) -> Any:
        return _correction(self.code, self.layout, start)

    def weights(self, codes: Any) -> Any:
        return self.code.b.bitcast(codes, vec(I32, self.code.lanes))

    def add(self, total: Any, weights: Any, four: Any, w: int) -> Any:
        name = "llvm.x86.avx512.vpdpbusd.512"
        return self.code.intrinsic(name, total.type, [total, weights, four])


class _NeonDot(_Dot):
    """Arm dot product: sdot, signed bytes by signed bytes."""

    def add(self, total: Any, weights: Any, four: Any, w: int) -> Any:
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        return self.code.intrinsic(name, total.type, [total, weights, _bytes(self.code, four)])


class _Avx2Dot(_Dot):
    """AVX2: vpmaddubsw adds pairs in int16, which saturates, so sums are emptied in time.

    Codes below 64 fit as they are (2 * 63 * 127 * 2 < 32768). Codes of 8 bits go as |w| and the
    activation takes w's sign (128 * 127 * 2 < 32768).
    """

    def __init__(self, code: Code, layout: Format) -> None:
        super().__init__(code, layout)
        self.signed = layout.levels > 64
        largest = 128 if self.signed else layout.levels - 1
        self.room = (2**15 - 1) // (2 * _MAX_ACTIVATION * largest)

    def begin(self, start: Any) -> Any:
        if self.signed:
            return self.code.fill(I32, 0), None
        return _correction(self.code, self.layout, start), None

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


class _WidenedDot(_Dot):
    """Any processor: products in int32 element by element, added up at the end of the group."""

    def __init__(self, code: Code, layout: Format) -> None:
        super().__init__(code, layout)
        self.wide = vec(I32, 4 * code.lanes)

    def begin(self, start: Any) -> Any:
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
        picks = list(range(k, total.type.count, 4))
        mask = ir.Constant(vec(I32, len(picks)), picks)
        return self.code.b.shuffle_vector(total, ir.Constant(total.type, ir.Undefined), mask)


def signed_codes(code: Code, layout: Format, codes: Any) -> Any:
    """The codes less their offset, as signed bytes (xor for 128: the sign bit turns over)."""
    offset = code.fill(I8, layout.offset, codes.type.count)
    if layout.offset == 0:
        return codes
    return code.b.xor(codes, offset) if layout.offset == 128 else code.b.sub(codes, offset)


def _correction(code: Code, layout: Format, start: Any) -> Any:
    """-offset * sum(q) in every lane, from -8 * sum(q) at `start`."""
    if layout.offset == 0:
        return code.fill(I32, 0)
    value = code.load_splat(start, I32)
    if layout.offset < _CORRECTION:
        shift = (_CORRECTION // layout.offset).bit_length() - 1
        return code.b.ashr(value, code.fill(I32, shift))
    shift = (layout.offset // _CORRECTION).bit_length() - 1
    return code.b.shl(value, code.fill(I32, shift)) if shift else value


def _bytes(code: Code, four: Any) -> Any:
    return code.b.bitcast(four, vec(I8, 4 * code.lanes))


_STEPS: dict[str, type[_Dot]] = {
    "avx512vnni": _VnniDot,
    "amx": _VnniDot,
    "avx2": _Avx2Dot,
    "arm_dotprod": _NeonDot,
}

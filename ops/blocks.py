"""The block formats of GGUF, one row each: all that is known of how their bytes mean numbers.

A block holds `block` neighbours of a row. Element i is

    scale * level + minimum      scale and minimum of the element's group, level from its code

in float32, where only the last sum rounds (and the product of Q8_K, whose scale is a float32).
Dequantisation (`quants`), the kernel that reads embedding rows and the packing of weights are
derived from these rows; unpacking in matmul kernels is written by hand and tested against them.

Fields are the C structs of ggml-common.h in order; ids are `ggml_type`. Elements come in groups of
at least 16 with one scale. Most classes are named tuples, which are made in less time than data
classes: every start imports them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

# bytes of the kinds of fields; half_e8m0 and half_ue4m3 are floats of a byte, halved, because the
# levels they go with are doubled to be whole
KINDS = {"u1": 1, "u2": 2, "u4": 4, "i1": 1, "i2": 2, "f2": 2, "f4": 4}
KINDS |= {"half_e8m0": 1, "half_ue4m3": 1}


class Field(NamedTuple):
    """`length` little-endian values of a kind, `offset` bytes from the start of the block."""

    name: str
    kind: str
    length: int
    offset: int

    @property
    def nbytes(self) -> int:
        """Of one value."""
        return KINDS[self.kind]


class Bits(NamedTuple):
    """Numbers of `width` bits in the words of a field, signed where the field is.

    `run` numbers lie in neighbouring words at the same bits, from `start` on; the next `run`
    numbers `step` (default: width) bits further up in the same words, `per` times in all (default:
    as often as they fit); then come the next `run` words. `words` is the range of words used
    (default: all).
    """

    field: str
    width: int
    run: int = 1
    start: int = 0
    step: int = 0
    per: int = 0
    words: tuple[int, ...] = ()


class Trits(NamedTuple):
    """Base-3 digits of bytes, each byte a fraction of 256: first digits of all bytes first."""

    field: str
    digits: int
    words: tuple[int, ...] = ()


class Join(NamedTuple):
    """Each number in parts, the low bits first."""

    parts: tuple[Bits, ...]


class Chain(NamedTuple):
    """The numbers of one part, then those of the next."""

    parts: tuple[Number, ...]


Number = Bits | Trits | Join | Chain


def join(*parts: Bits) -> Join:
    """Numbers in parts, the low bits first."""
    return Join(parts)


def chain(*parts: Number) -> Chain:
    """Several numbers, one after another."""
    return Chain(parts)


class Scale(NamedTuple):
    """Floats, one for each group: base * (steps * times + plus) * unit, each product exact.

    `base` is a field (one value for the block, or one for each group), or 16 bits of a float16 in
    pieces of which the lowest comes first. Without `steps` that factor is 1.
    """

    base: str | Bits
    steps: Number | None = None
    times: int = 1
    plus: int = 0
    unit: float = 1


@dataclass(frozen=True, eq=False)
class BlockFormat:
    """One format.

    A level is code - offset, or levels[code], or each of the numbers of entry `code` of the code
    book: with a sign for each (`signs`: bytes of sign bits, or seven bits where the eighth makes
    the number of minus signs even), or an eighth less where `down` is set and an eighth more
    where not.
    """

    name: str
    gguf_id: int
    block: int
    layout: str  # name:kind or name:kind*count, in order
    codes: Number
    scale: Scale
    minimum: Scale | None = None
    offset: int = 0
    levels: tuple[int, ...] = ()
    book: str = ""  # the format whose code book it is
    signs: Bits | None = None
    down: Bits | None = None

    @cached_property
    def fields(self) -> dict[str, Field]:
        """By name, in order."""
        found: dict[str, Field] = {}
        offset = 0
        for text in self.layout.split():
            name, kind, count = (*text.replace(":", "*").split("*"), "1")[:3]
            found[name] = Field(name, kind, int(count), offset)
            offset += found[name].nbytes * int(count)
        return found

    @property
    def nbytes(self) -> int:
        """Of one block."""
        return sum(f.nbytes * f.length for f in self.fields.values())


def count_of(number: Number, row: BlockFormat) -> int:
    """How many numbers of a kind a block has."""
    match number:
        case Bits():
            return words_of(number, row) * places_of(number, row)
        case Trits():
            return words_of(number, row) * number.digits
        case Join():
            return count_of(number.parts[0], row)
        case Chain():
            return sum(count_of(part, row) for part in number.parts)


def word_range(number: Bits | Trits, row: BlockFormat) -> range:
    """Which words of the field the numbers are in."""
    return range(*number.words) if number.words else range(row.fields[number.field].length)


def words_of(number: Bits | Trits, row: BlockFormat) -> int:
    """Words of the field that the numbers are in."""
    return len(word_range(number, row))


def places_of(number: Bits, row: BlockFormat) -> int:
    """Numbers in a word."""
    free = 8 * row.fields[number.field].nbytes - number.start - number.width
    return number.per or free // (number.step or number.width) + 1


def place_of(number: Bits | Trits, row: BlockFormat, i: int) -> tuple[int, int]:
    """Where number i is: which word of its field, and which bit (of `Trits`: which digit)."""
    words = word_range(number, row)
    if isinstance(number, Trits):
        return words[i % len(words)], i // len(words)
    places = places_of(number, row)
    group, place = divmod(i // number.run, places)
    shift = number.start + place * (number.step or number.width)
    return words[group * number.run + i % number.run], shift


# ---- the rows -------------------------------------------------------------------------------

# kvalues_iq4nl of ggml-common.h
IQ4_LEVELS = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# E2M1 floats, doubled to be whole (OCP Microscaling Formats v1.0, table 5)
E2M1_LEVELS = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)

_D, _M = Scale("d"), Scale("m")
_NIBBLES, _FIFTH, _BYTES = Bits("qs", 4, 16), Bits("qh", 1), Bits("qs", 8)
_PAIRS = Bits("qs", 2, 32)
_QUARTERS = Bits("scales", 4)  # two to a byte

# The 6-bit scales and minima of 8 groups in 12 bytes: the first four of each in the low bits of
# bytes 0-3 and 4-7; the low halves of the last four in bytes 8-11, their top bits above the first.
_FIRST, _SECOND, _THIRD = (0, 4), (4, 8), (8, 12)
_K_SCALES = chain(
    Bits("scales", 6, words=_FIRST),
    join(Bits("scales", 4, per=1, words=_THIRD), Bits("scales", 2, start=6, words=_FIRST)),
)
_K_MINIMA = chain(
    Bits("scales", 6, words=_SECOND),
    join(Bits("scales", 4, start=4, words=_THIRD), Bits("scales", 2, start=6, words=_SECOND)),
)
_K_SCALE, _K_MINIMUM = Scale("d", _K_SCALES), Scale("dmin", _K_MINIMA, unit=-1)


def _odd(base: str | Bits, steps: Number, unit: float = 1) -> Scale:
    """Steps n stand for n + 1/2."""
    return Scale(base, steps, 2, 1, unit)


_SEVEN_SIGNS = Bits("rest", 7)
_EIGHT_SIGNS = Bits("signs", 8)
_REST_STEPS = Bits("rest", 4, start=28)
_IQ2_SCALES = _odd("d", _QUARTERS, 1 / 8)

_ROWS = (
    BlockFormat("q4_0", 2, 32, "d:f2 qs:u1*16", _NIBBLES, _D, offset=8),
    BlockFormat("q4_1", 3, 32, "d:f2 m:f2 qs:u1*16", _NIBBLES, _D, _M),
    BlockFormat("q5_0", 6, 32, "d:f2 qh:u1*4 qs:u1*16", join(_NIBBLES, _FIFTH), _D, offset=16),
    BlockFormat("q5_1", 7, 32, "d:f2 m:f2 qh:u1*4 qs:u1*16", join(_NIBBLES, _FIFTH), _D, _M),
    BlockFormat("q8_0", 8, 32, "d:f2 qs:i1*32", _BYTES, _D),
    # two f16 scales; gguf-py counts two f32 (40 bytes), ggml does not
    BlockFormat("q8_1", 9, 32, "d:f2 s:f2 qs:i1*32", _BYTES, _D),
    BlockFormat(
        "q2_k", 10, 256, "scales:u1*16 qs:u1*64 d:f2 dmin:f2", _PAIRS,
        Scale("d", Bits("scales", 4, per=1)),
        Scale("dmin", Bits("scales", 4, start=4), unit=-1),
    ),
    BlockFormat(
        "q3_k", 11, 256, "hmask:u1*32 qs:u1*64 scales:u1*12 d:f2",
        join(_PAIRS, Bits("hmask", 1, 32)),
        Scale(
            "d",
            join(Bits("scales", 4, 8, words=(0, 8)), Bits("scales", 2, 4, words=_THIRD)),
            plus=-32,
        ),
        offset=4,
    ),
    BlockFormat(
        "q4_k", 12, 256, "d:f2 dmin:f2 scales:u1*12 qs:u1*128", Bits("qs", 4, 32),
        _K_SCALE, _K_MINIMUM,
    ),
    BlockFormat(
        "q5_k", 13, 256, "d:f2 dmin:f2 scales:u1*12 qh:u1*32 qs:u1*128",
        join(Bits("qs", 4, 32), Bits("qh", 1, 32)), _K_SCALE, _K_MINIMUM,
    ),
    BlockFormat(
        "q6_k", 14, 256, "ql:u1*128 qh:u1*64 scales:i1*16 d:f2",
        join(Bits("ql", 4, 64), Bits("qh", 2, 32)), Scale("d", Bits("scales", 8)), offset=32,
    ),
    BlockFormat("q8_k", 15, 256, "d:f4 qs:i1*256 sums:i2*16", _BYTES, _D),
    BlockFormat(
        "iq2_xxs", 16, 256, "d:f2 qs:u4*16", Bits("qs", 8, words=(0, 16, 2)),
        _odd("d", Bits("qs", 4, start=28, words=(1, 16, 2)), 1 / 8),
        book="iq2_xxs", signs=Bits("qs", 7, words=(1, 16, 2)),
    ),
    BlockFormat(
        "iq2_xs", 17, 256, "d:f2 qs:u2*32 scales:u1*8", Bits("qs", 9, per=1), _IQ2_SCALES,
        book="iq2_xs", signs=Bits("qs", 7, start=9),
    ),
    BlockFormat(
        "iq3_xxs", 18, 256, "d:f2 qs:u1*64 rest:u4*8", _BYTES,
        _odd("d", _REST_STEPS, 1 / 4), book="iq3_xxs", signs=_SEVEN_SIGNS,
    ),
    BlockFormat(
        "iq1_s", 19, 256, "d:f2 qs:u1*32 qh:u2*8", join(_BYTES, Bits("qh", 3, per=4)),
        _odd("d", Bits("qh", 3, start=12)),
        book="iq1_s", down=Bits("qh", 1, start=15),
    ),
    BlockFormat("iq4_nl", 20, 32, "d:f2 qs:u1*16", _NIBBLES, _D, levels=IQ4_LEVELS),
    BlockFormat(
        "iq3_s", 21, 256, "d:f2 qs:u1*64 qh:u1*8 signs:u1*32 scales:u1*4",
        join(_BYTES, _FIFTH), _odd("d", _QUARTERS), book="iq3_s", signs=_EIGHT_SIGNS,
    ),
    BlockFormat(
        "iq2_s", 22, 256, "d:f2 qs:u1*32 signs:u1*32 qh:u1*8 scales:u1*8",
        join(_BYTES, Bits("qh", 2)), _IQ2_SCALES, book="iq2_s", signs=_EIGHT_SIGNS,
    ),
    BlockFormat(
        "iq4_xs", 23, 256, "d:f2 high:u2 low:u1*4 qs:u1*128", _NIBBLES,
        Scale("d", join(Bits("low", 4), Bits("high", 2)), plus=-32), levels=IQ4_LEVELS,
    ),
    BlockFormat(
        # the float16 is in the top bits of the words that hold the scales
        "iq1_m", 29, 256, "qs:u1*32 qh:u1*16 scales:u2*4", join(_BYTES, Bits("qh", 3, step=4)),
        _odd(Bits("scales", 4, start=12), Bits("scales", 3, per=4)),
        book="iq1_s", down=Bits("qh", 1, start=3, step=4),
    ),
    BlockFormat(
        "tq1_0", 34, 256, "qs:u1*48 qh:u1*4 d:f2",
        chain(Trits("qs", 5, (0, 32)), Trits("qs", 5, (32, 48)), Trits("qh", 4)), _D,
        offset=1,
    ),
    BlockFormat("tq2_0", 35, 256, "qs:u1*64 d:f2", _PAIRS, _D, offset=1),
    BlockFormat("mxfp4", 39, 32, "e:half_e8m0 qs:u1*16", _NIBBLES, Scale("e"), levels=E2M1_LEVELS),
    BlockFormat(
        "nvfp4", 40, 64, "d:half_ue4m3*4 qs:u1*32", Bits("qs", 4, 8), _D, levels=E2M1_LEVELS
    ),
    BlockFormat("q1_0", 41, 128, "d:f2 qs:u1*16", Bits("qs", 1), _D, levels=(-1, 1)),
    BlockFormat("q2_0", 42, 64, "d:f2 qs:u1*16", Bits("qs", 2), _D, offset=1),
)  # fmt: skip
BLOCK_FORMATS = {row.name: row for row in _ROWS}

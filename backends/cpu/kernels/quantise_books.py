"""Quantisers of the types with a code book: the nearest entries at given scales (IQ1 to IQ3)."""

from __future__ import annotations

from typing import Any, NamedTuple

from runtime.ops.blocks import BLOCK_FORMATS, BlockFormat, count_of

from . import lanes as l
from . import simd as s
from .book_search import Book, entry_picker, half_costs, least_entry, read_book, tables_nbytes
from .quantise_scales import ERROR, SCALE, Search, group, groups_of, scale_quantiser
from .rows import helper

_EIGHTH = 0.125  # what IQ1 adds to the levels of some entries, and takes from those of others
_EIGHTS = 32  # elements of a block whose signs are a byte


class Shape(NamedTuple):
    """How entries make up a block, and where in the scratch memory things are."""

    entries: int
    size: int  # elements of an entry
    per_group: int  # entries of a group with a scale
    signs: bool  # each element has a sign, else its level is shifted
    even: bool  # of eight signs one is not stored: the number of minuses is even
    span: int  # entries between which there is a choice: which has the wrong sign, or which shift
    sides: int  # what is found for an entry: one result, or two to choose from
    found: int  # results of each side of each entry
    picked: int  # and the entries' numbers
    bits: int  # signs of every eight elements
    flags: int  # 1.0 where one of them is wrong
    nbytes: int

    @staticmethod
    def of(row: BlockFormat, book: Book) -> Shape:
        """That of a format."""
        entries, size = row.block // book.size, book.size
        even = row.signs is not None and row.signs.width == 7
        span = entries // count_of(row.down, row) if row.down else 8 // size if even else 1
        sides = 2 if row.down or span > 1 else 1
        found = tables_nbytes(book)
        picked = found + 128 * entries * sides
        bits = picked + 64 * entries * sides
        places = found, picked, bits, bits + 64 * _EIGHTS, bits + 2 * 64 * _EIGHTS
        per_group = entries // groups_of(row)
        return Shape(entries, size, per_group, bool(row.signs), even, span, sides, *places)


def book_quantiser(name: str, search: Search) -> Any:
    """The kernel of a type with a code book."""
    row = BLOCK_FORMATS[name]
    book = read_book(row)
    shape = Shape.of(row, book)
    look, choose = _look(book, shape), _choose(shape)

    @helper
    def evaluate(values, weights, scratch, state, codes, extra, keep):
        look(values, weights, scratch, state, keep)
        choose(scratch, state, codes, extra, keep)

    top = max(book.levels)
    search = search._replace(first=(top / _flattest(book),))
    return scale_quantiser(row, search, top, shape.nbytes, _prepare(shape), evaluate)


def _flattest(book: Book) -> float:
    """The largest level of which an entry is made alone: what constants are made of."""
    return max(float(entry[0]) for entry in book.entries if (entry == entry[0]).all())


def _prepare(shape):
    """Values become weight times value; where signs are stored their magnitudes, signs apart."""
    signs, even, bits_at, flags_at = shape.signs, shape.even, shape.bits, shape.flags

    @helper
    def prepare(values, weights, scratch):
        zero, one = s.splat(s.f32(0)), s.splat(s.f32(1))
        for eight in range(_EIGHTS):
            bits, odd = s.splat_int(0), zero
            for j in range(8):
                at = 64 * (8 * eight + j)
                u = s.load(values + at) * s.load(weights + at)
                if signs:
                    minus = s.load(values + at) < zero
                    bits = bits | s.select_ints(minus, s.splat_int(1 << j), s.splat_int(0))
                    if even:
                        odd = s.select(minus, one - odd, odd)
                    u = l.absolute(u)
                s.store(values + at, u)
            l.store_ints(scratch + bits_at + 64 * eight, bits)
            s.store(scratch + flags_at + 64 * eight, odd)

    return prepare


def _look(book, shape):
    """The nearest entries of all, with their costs; keep: and their numbers."""
    entries, size, per_group, sides = shape.entries, shape.size, shape.per_group, shape.sides
    signs, found_at, picked_at, flags_at = shape.signs, shape.found, shape.picked, shape.flags
    passes = 1 if signs else sides
    costs, pick = half_costs(book, shape.even), entry_picker(book)
    nearest = least_entry(book, shape.even, signs and sides > 1)

    @helper
    def look(values, weights, scratch, state, keep):
        for entry in range(entries):
            t = s.load(group(state, entry // per_group) + SCALE)
            u, w = values + 64 * size * entry, weights + 64 * size * entry
            odd = scratch + flags_at + 64 * (entry * size // 8)
            extra = s.splat(s.f32(_EIGHTH))
            if signs:
                extra = s.load(odd)
            for turn in range(passes):  # levels shifted up, then down
                costs(u, w, t, extra, scratch)
                extra = -extra
                first = sides * entry + turn
                nearest(scratch, scratch + found_at + 128 * first)
                if keep:
                    for at in range(first, first + sides // passes):
                        for lane in range(l.LANES):
                            number = pick(scratch, scratch + found_at + 128 * at, u, odd, lane)
                            s.store_i32(scratch + picked_at + 64 * at + 4 * lane, number)

    return look


def _choose(shape):
    """The better side of every span, the errors of groups; keep: codes, signs and directions."""
    per_group, span, sides = shape.per_group, shape.span, shape.sides
    signs, found_at, groups = shape.signs, shape.found, shape.entries // shape.per_group
    put = _put(shape)

    @helper
    def choose(scratch, state, codes, extra, keep):
        for g in range(groups):
            error = s.splat(s.f32(0))
            for first in range(per_group * g, per_group * (g + 1), span):
                one = other = s.splat(s.f32(0))
                for i in range(span):
                    a = scratch + found_at + 128 * sides * (first + i)
                    b = a + 128 * (sides - 1)
                    if signs and i == 1:  # one entry has the wrong sign, the other has not
                        a, b = b, a
                    one, other = one + s.load(a), other + s.load(b)
                if keep:
                    put(scratch, codes, extra, first, other < one)
                error = error + s.smaller(other, one)
            s.store(group(state, g) + ERROR, error)

    return choose


def _put(shape):
    """(scratch, codes, extra, first, second): what is stored of a span, or of its second side."""
    size, span, sides, signs = shape.size, shape.span, shape.sides, shape.signs
    picked_at, bits_at = shape.picked, shape.bits

    @helper
    def put(scratch, codes, extra, first, second):
        wrong = s.splat_int(0)
        for i in range(span):
            at = scratch + picked_at + 64 * sides * (first + i)
            one, other = l.load_ints(at), l.load_ints(at + 64 * (sides - 1))
            if signs and i == 1:
                one, other = other, one
            number = s.select_ints(second, other, one)
            l.store_ints(codes + 64 * (first + i), number & s.splat_int(0xFFFF))
            wrong = wrong | l.shifted(l.dropped(number, 16), size * i)
        eight = size * first // 8
        if signs:
            bits = l.load_ints(scratch + bits_at + 64 * eight)
            l.store_ints(extra + 64 * eight, bits ^ wrong)
        else:
            down = s.select_ints(second, s.splat_int(1), s.splat_int(0))
            l.store_ints(extra + 64 * (first // span), down)

    return put

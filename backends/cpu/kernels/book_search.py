"""The entry of a code book that is nearest to a group of elements, for sixteen blocks at once.

With u = w x and w the weights, an entry g at scale t costs sum(w (t g)^2 - 2 u t g) more than
zeros. A book's entries share halves: there are at most 81 first and 81 last halves, and 256 to 2048
entries. So the costs of all halves are found first, and an entry's is a sum of two of them. Of the
entries that begin alike only the least last half is added. Every entry is looked at: the result is
the nearest, not one near it.

Where one sign of eight is not stored, an odd number of minus signs costs the least of 4 u t g of
an element whose sign is wrong; that too is a choice in either half.
"""

from __future__ import annotations

import functools
from itertools import product
from typing import NamedTuple

import numpy as np
from llvmlite import ir

from runtime.ops.blocks import BlockFormat
from runtime.ops.codebooks import code_book

from . import emit as e
from . import simd as s
from .rows import helper
from .tables import constant

FAR = 3e38


class Book(NamedTuple):
    """A code book by its halves. Arrays are int64."""

    levels: list[float]
    size: int  # elements of an entry
    first: list[int]  # halves that entries begin with, as numbers in base len(levels)
    last: list[int]  # and end with
    starts: np.ndarray  # of each first half its first entry, and the end [first + 1]
    ends: np.ndarray  # of each entry the place of its last half in `last`, by first half [entries]
    order: np.ndarray  # the number of each entry in the format's book [entries]
    entries: np.ndarray  # float32 [entries, size], in this order


def read_book(row: BlockFormat) -> Book:
    """The book of a format, sorted by first halves."""
    book = code_book(row.book)
    levels, digits = np.unique(book, return_inverse=True)
    half, size = book.shape[1] // 2, book.shape[1]
    powers = len(levels) ** np.arange(half)[::-1]
    first, last = (digits.reshape(book.shape)[:, side] @ powers for side in _sides(half))
    order = np.lexsort((last, first))
    firsts, counts = np.unique(first, return_counts=True)
    lasts, ends = np.unique(last, return_inverse=True)
    starts = np.cumsum([0, *counts])
    lists = ([float(x) for x in levels], size, firsts.tolist(), lasts.tolist())
    return Book(*lists, starts, ends.reshape(-1)[order], order, book[order])


def _sides(half: int) -> tuple[slice, slice]:
    return slice(0, half), slice(half, 2 * half)


def tables_nbytes(book: Book) -> int:
    """Of the costs of halves: first, last, and both again with a wrong sign."""
    return 2 * 64 * (len(book.first) + len(book.last))


def _places(book: Book) -> tuple[int, int, int, int]:
    """Where the costs of first and last halves are, and those with a wrong sign."""
    first, last = 64 * len(book.first), 64 * len(book.last)
    return 0, first, first + last, 2 * first + last


def _combined(b, elements, join):
    """All sums (or the least) of one of each element's values, in the order of halves."""
    found = elements[0]
    for values in elements[1:]:
        found = [join(b, x, y) for x, y in product(found, values)]
    return found


def half_costs(book: Book, odd_signs: bool):
    """(u, w, t, extra, table): costs of all halves for a group of `size` rows of u and w.

    extra: what is added to all levels; with `odd_signs` 1 where a sign must be wrong, else 0.
    """
    half, places = book.size // 2, _places(book)

    @s.operation(s.void, s.i64, s.i64, s.f32x16, s.f32x16, s.i64)
    def costs(b, u, w, t, extra, table):
        levels = [e.floats(v) for v in book.levels]
        if not odd_signs:
            levels = [b.fadd(level, extra) for level in levels]
        steps = [b.fmul(t, level) for level in levels]
        plain, wrong = [], []
        for i in range(book.size):
            x, weight = (e.load(b, e.offset(b, at, 64 * i), e.wide(e.f32), 64) for at in (u, w))
            twice = b.fadd(x, x)
            minus = b.fneg(twice)
            plain.append([b.fmul(e.fma(b, weight, y, minus, s.FUSED), y) for y in steps])
            if odd_signs:
                change = b.fmul(b.fadd(twice, twice), extra)
                wrong.append([b.fmul(change, y) for y in steps])
        for side, used, place, other in zip(
            _sides(half), (book.first, book.last), places[:2], places[2:], strict=True
        ):
            sums = _combined(b, plain[side], lambda b, x, y: b.fadd(x, y))
            least = _combined(b, wrong[side], e.smaller) if odd_signs else []
            for i, pattern in enumerate(used):
                e.store(b, sums[pattern], e.offset(b, table, place + 64 * i), 64)
                if odd_signs:
                    total = b.fadd(sums[pattern], least[pattern])
                    e.store(b, total, e.offset(b, table, other + 64 * i), 64)
        _written(b)

    return costs


def _written(b):
    """What was stored is in memory: values that are used a thousand times are not kept aside."""
    kind = ir.FunctionType(ir.VoidType(), [])
    b.asm(kind, "", "~{memory}", (), True)


def least_entry(book: Book, odd_signs: bool, both: bool):
    """(table, found): the least cost of an entry, 16 float32, then 16 int32 that say which.

    That is 4 i + j, i the place of its first half; j = 1, 2: the wrong sign is in the first or last
    half, 0: none is. both: what is found without a wrong sign and, behind it, with one.
    """
    first, last, wrong_first, wrong_last = _places(book)
    right = [(first, last, 0)]
    wrong = [(wrong_first, last, 1), (first, wrong_last, 2)]
    searches = [right, wrong] if both else [wrong] if odd_signs else [right]

    @s.operation(s.void, s.i64, s.i64)
    def search(b, table, found):
        best = [(e.floats(FAR), e.ints(0)) for _ in searches]
        for i in range(len(book.first)):
            ends = sorted(set(book.ends[book.starts[i] : book.starts[i + 1]].tolist()))
            least = {
                place: _least(b, table, [place + 64 * end for end in ends])
                for place in {pair[1] for pairs in searches for pair in pairs}
            }
            for k, pairs in enumerate(searches):
                for begin, end, j in pairs:
                    one = e.load(b, e.offset(b, table, begin + 64 * i), e.wide(e.f32), 64)
                    total = b.fadd(one, least[end])
                    less = b.fcmp_ordered("<", total, best[k][0])
                    which = b.select(less, e.ints(4 * i + j), best[k][1])
                    best[k] = b.select(less, total, best[k][0]), which
        for k, values in enumerate(best):
            for i, value in enumerate(values):
                e.store(b, value, e.offset(b, found, 128 * k + 64 * i), 64)

    return search


def _least(b, table, places):
    values = (e.load(b, e.offset(b, table, place), e.wide(e.f32), 64) for place in places)
    return functools.reduce(lambda x, y: e.smaller(b, x, y), values)


def entry_picker(book: Book):
    """(table, found, u, odd, lane): which entry `least_entry` found, and the signs to change.

    u: the group's rows; odd: 1.0 in the lanes with a wrong sign. Result: the entry's number in the
    format's book, and from bit 16 on a bit for the element whose sign is wrong.
    """
    starts, ends, order = map(constant, (book.starts, book.ends, book.order))
    entries = constant(book.entries)
    size, half = book.size, book.size // 2
    _, last, _, wrong_last = _places(book)

    @helper
    def pick(table, found, u, odd, lane):
        which = s.load_i32(found + 64 + 4 * lane)
        i, wrong_half = which >> 2, which & 3
        place = last
        if wrong_half == 2:
            place = wrong_last
        least, entry = s.f32(FAR), 0
        for c in range(s.load_i32(starts() + 4 * i), s.load_i32(starts() + 4 * i + 4)):
            value = s.load_f32(table + place + 64 * s.load_i32(ends() + 4 * c) + 4 * lane)
            if value < least:
                least, entry = value, c
        result = s.load_i32(order() + 4 * entry)
        if wrong_half and s.load_f32(odd + 4 * lane) != 0:
            least, wrong = s.f32(FAR), 0
            first = half * (wrong_half - 1)
            for j in range(first, first + half):
                level = s.load_f32(entries() + 4 * (entry * size + j))
                value = s.load_f32(u + 64 * j + 4 * lane) * level
                if value < least:
                    least, wrong = value, j
            result += 65536 << wrong
        return result

    return pick

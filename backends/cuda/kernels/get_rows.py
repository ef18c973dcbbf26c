"""Rows of a weight picked by number, decoded from the bytes that the file has.

A thread an element, neighbours beside each other, so that a warp reads a few blocks of a row.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    bits_to_f32,
    block_x,
    block_y,
    constant,
    entry,
    f16_to_f32,
    launch_next,
    launch_wait,
    load,
    store,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants
from runtime.ops.blocks import BLOCK_FORMATS

from .blocks import element

THREADS = 128
_BITS = {"f32": "u32", "f16": "u16", "bf16": "u16"}  # plain types and how they are read
FORMATS = (*_BITS, *BLOCK_FORMATS)


def _f32(bits):
    return bits_to_f32(bits)


def _f16(bits):
    return f16_to_f32(bits)


def _bf16(bits):
    return bits_to_f32(u32(u32(bits) << 16))


_PLAIN = {"f32": _f32, "f16": _f16, "bf16": _bf16}


@constants(format=FORMATS)
def build_get_rows(format: str) -> Declared:
    """out f32 [rows, n] = rows `ids` of a matrix whose rows have `row_units` units.

    Units are bytes, of plain types elements. `book`: the code book of a format that has one, see
    `book_words`. Grid (n / 128, rows).
    """
    if format in _PLAIN:
        return _plain(format)
    row = BLOCK_FORMATS[format]
    value, block, nbytes = element(row), row.block, row.nbytes

    def one(matrix, book, ids, out, n, row_units):
        """An element of a row by each thread."""
        i, row = u32(block_x() * THREADS + thread_x()), block_y()
        number = u32(i // block)
        first = u32(number * nbytes)
        if i < n:
            at = u32(u32(load(ids, row)) * row_units + first)
            found = value(matrix, book, at, u32(i - u32(number * block)))
            store(out, u32(row * n + i), found)

    @entry("matrix:u8* book:i32* ids:i32* out:f32* n:u32 row_units:u32", threads=THREADS)
    def get_rows_of_book(matrix, book, ids, out, n, row_units):
        launch_next()
        launch_wait()
        one(matrix, book, ids, out, n, row_units)

    @entry("matrix:u8* ids:i32* out:f32* n:u32 row_units:u32", threads=THREADS)
    def get_rows(matrix, ids, out, n, row_units):
        launch_next()
        launch_wait()
        one(matrix, matrix, ids, out, n, row_units)

    return get_rows_of_book if row.book else get_rows


def _plain(format: str) -> Declared:
    value = _PLAIN[format]

    @entry(f"matrix:{_BITS[format]}* ids:i32* out:f32* n:u32 row_units:u32", threads=THREADS)
    def get_rows(matrix, ids, out, n, row_units):
        launch_next()
        i, row = u32(block_x() * THREADS + thread_x()), block_y()
        launch_wait()
        if i < n:
            at = u32(u32(load(ids, row)) * row_units + i)
            store(out, u32(row * n + i), value(constant(matrix, at)))

    return get_rows

"""Weights from the file's blocks to the rows that products read: a thread a word of several rows.

Packing moves bits and computes nothing (see `wiring.py`), so one kernel does it for every format: a
table says of each bit of a packed row which bit of the file's row it is.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    constant,
    constant4,
    entry,
    launch_next,
    launch_wait,
    load,
    registers,
    store,
    thread_x,
    u32,
)  # fmt: skip

THREADS = 128
ROWS = 16  # of a thread
ENTRY = 36  # words of a table's entry: 32 bits of the row, what is exclusive-or'd, which are there


def build_repack() -> Declared:
    """out u32 [rows, words] from raw, rows of `row_bits` bits one after another.

    table u32 [words, 36]: places of 32 bits in a row, the word that they are exclusive-or'd with,
    and the mask of those that are bits of the row (others begin as 0). Grid (words / 128, rows /
    16), rounded up.
    """
    places = registers("u32", 32)

    @entry("raw:u32* table:u32* out:u32* words:u32 rows:u32 row_bits:u32", threads=THREADS)
    def repack(raw, table, out, words, rows, row_bits):
        launch_next()
        word = u32(block_x() * THREADS + thread_x())
        launch_wait()
        if word < words:
            place = places()
            for i in range(8):
                a, b, c, d = constant4(table, u32(word * 9 + i))
                place[4 * i], place[4 * i + 1] = a, b
                place[4 * i + 2], place[4 * i + 3] = c, d
            flips = constant(table, u32(word * ENTRY + 32))
            there = constant(table, u32(word * ENTRY + 33))
            row = u32(block_y() * ROWS)
            end = u32(row + ROWS)
            if end > rows:
                end = rows
            while row < end:
                first, found = u32(row * row_bits), u32(0)
                for i in range(32):
                    bit = u32(first + place[i])
                    found = u32(found | u32(u32(load(raw, u32(bit >> 5)) >> (bit & 31)) & 1) << i)
                store(out, u32(row * words + word), u32(u32(found & there) ^ flips))
                row = u32(row + 1)

    return repack

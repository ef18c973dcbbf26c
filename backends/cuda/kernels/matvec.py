"""Quantised weights times 1 to 8 columns of int8 activations: decode, where weights are read once.

A block of threads owns ROWS neighbouring rows; its threads share the blocks of 32 values of those
rows among them, one block a thread at a time, and sum up over warps at the end. Consecutive lanes
read consecutive 16 bytes. Every sum over a block of 32 is exact (int32); a column's order of
additions depends on the row length alone, never on the number of columns.

Layouts: `layouts.py`. `x` and `meta` are the packed activations of `quantize`.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    bits_to_f32,
    block_x,
    constant,
    dp2a,
    dp4a,
    entry,
    f16_to_f32,
    f32,
    i32,
    int_to_f32,
    launch_next,
    launch_wait,
    load2,
    load4,
    registers,
    stream4,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .matvec_k import THREADS, WARPS, dot_nibbles, matvec_k
from .sums import store_row_sums


def dot_q8_0(weights, quants, blocks, x, cell, start):
    """start + the sum of 32 products; `quants` and `cell` count pieces of 16 bytes."""
    a, b = stream4(weights, quants), stream4(weights, u32(quants + blocks))
    v, w = load4(x, cell), load4(x, u32(cell + blocks))
    t = dp4a(a[0], v[0], start)
    t = dp4a(a[1], v[1], t)
    t = dp4a(a[2], v[2], t)
    t = dp4a(a[3], v[3], t)
    t = dp4a(b[0], w[0], t)
    t = dp4a(b[1], w[1], t)
    t = dp4a(b[2], w[2], t)
    return dp4a(b[3], w[3], t)


def dot_q4_0(weights, quants, blocks, x, cell, start):
    """The same of unsigned nibbles: low ones are the block's first half, high ones the second."""
    a = stream4(weights, quants)
    v, w = load4(x, cell), load4(x, u32(cell + blocks))
    return dot_nibbles(a, v, w, start)


def no_offset(sums):
    """Codes that are signed as they lie: their sum starts at 0."""
    return i32(0)


def offset_8(sums):
    """-8 times the sum of a block's activations, of which `sums` holds the negated halves."""
    return dp2a(sums, u32(0x0808), i32(0))


# format -> pieces of 16 bytes in a block, its dot product, and where the sum starts
FORMATS = {"Q8_0": (2, dot_q8_0, no_offset), "Q4_0": (1, dot_q4_0, offset_8)}


@constants(format=("Q8_0", "Q4_0", "Q4_K", "Q6_K"), columns=(1, 2, 4, 8))
def build_matvec(format: str, columns: int) -> Declared:
    """out[c, row] = sum over k of weights[row, k] x[c, k].

    `n_rows` rows of `blocks` blocks; `out` f32 [columns, out_stride]. Grid: rows / rows_of(...).
    """
    if format not in FORMATS:
        return matvec_k(format, rows_of(format, columns), columns)
    PIECES, dot, offset = FORMATS[format]
    ROWS, COLUMNS = rows_of(format, columns), columns
    N = ROWS * COLUMNS
    accumulators, places = registers("f32", N), registers("u32", ROWS)
    finish = store_row_sums(WARPS, ROWS, COLUMNS)

    @entry(
        "weights:u32* scales:u16* x:u32* meta:u32* out:f32* n_rows:u32 blocks:u32 out_stride:u32",
        threads=THREADS,
        min_blocks=8 if N <= 8 else 4,
    )
    def matvec(weights, scales, x, meta, out, n_rows, blocks, out_stride):
        launch_next()
        acc, row = accumulators(), places()
        for r in range(ROWS):
            row[r] = u32(min(u32(block_x() * ROWS + r), u32(n_rows - 1)) * blocks)
        for n in range(N):
            acc[n] = f32(0)
        launch_wait()
        b = thread_x()
        while b < blocks:
            for c in range(COLUMNS):
                scale, sums = load2(meta, u32(c * blocks + b))
                start = offset(sums)
                cell = u32(2 * c * blocks + b)
                for r in range(ROWS):
                    total = dot(weights, u32(PIECES * row[r] + b), blocks, x, cell, start)
                    d = f16_to_f32(constant(scales, u32(row[r] + b))) * bits_to_f32(scale)
                    acc[r * COLUMNS + c] += d * int_to_f32(total)
            b = u32(b + THREADS)
        finish(acc, out, u32(block_x() * ROWS), n_rows, out_stride)

    return matvec


def rows_of(format: str, columns: int) -> int:
    """Rows that a block of threads owns."""
    return 2 if format in ("Q8_0", "Q6_K") or columns == 4 else 4

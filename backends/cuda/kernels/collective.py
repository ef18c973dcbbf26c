"""What several devices exchange: every device reads the others' parts where they lie.

A part is plain memory, of another virtual device on the same GPU or of another GPU that this one
reaches. Who has written it is ordered before by the graph of launches: nobody waits in a loop.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    block_z,
    entry,
    f32,
    launch_next,
    launch_wait,
    load,
    load4,
    store,
    store4,
    thread_x,
    u32,
)  # fmt: skip

THREADS = 256
PARTS = 4  # of one launch


def taken(x, piece, there):
    """4 elements, or zeros; no read waits for another."""
    return load4(x, piece) if there else (f32(0), f32(0), f32(0), f32(0))


def plus(v, w, there):
    """v + w where w is there."""
    return (v[0] + w[0], v[1] + w[1], v[2] + w[2], v[3] + w[3]) if there else v


def build_sum_parts() -> Declared:
    """out = a + b + c + d + more in this order, of the first the `count` first, more if `has_more`.

    f32, 4 `pieces` elements each, a thread 4. Grid: pieces / 256 rounded up.
    """

    @entry(
        "a:f32* b:f32* c:f32* d:f32* more:f32* out:f32* pieces:u32 count:u32 has_more:u32",
        threads=THREADS,
    )
    def sum_parts(a, b, c, d, more, out, pieces, count, has_more):
        launch_next()
        i = u32(block_x() * THREADS + thread_x())
        launch_wait()
        if i < pieces:
            v = load4(a, i)
            b4, c4 = taken(b, i, count > u32(1)), taken(c, i, count > u32(2))
            d4, m4 = taken(d, i, count > u32(3)), taken(more, i, has_more > u32(0))
            v = plus(plus(v, b4, count > u32(1)), c4, count > u32(2))
            v = plus(plus(v, d4, count > u32(3)), m4, has_more > u32(0))
            store4(out, i, v[0], v[1], v[2], v[3])

    return sum_parts


def build_put_stretch() -> Declared:
    """out[row, turn, :n] = x[row, turn, :n]: 4-byte elements, a thread one.

    Rows lie x_row and out_row apart, and the turns of a row x_step and out_step. Grid (n / 256
    rounded up, rows, turns).
    """

    @entry(
        "x:f32* out:f32* n:u32 x_row:u32 x_step:u32 out_row:u32 out_step:u32",
        threads=THREADS,
    )
    def put_stretch(x, out, n, x_row, x_step, out_row, out_step):
        launch_next()
        i, row, turn = u32(block_x() * THREADS + thread_x()), block_y(), block_z()
        launch_wait()
        if i < n:
            value = load(x, u32(row * x_row + turn * x_step + i))
            store(out, u32(row * out_row + turn * out_step + i), value)

    return put_stretch

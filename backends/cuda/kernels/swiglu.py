"""SwiGLU, plain or clamped: one thread per 4 elements, 16-byte accesses.

With `packed` the result is int8 for the product that follows.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    entry,
    f32,
    launch_next,
    launch_wait,
    load4,
    store4,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .elementwise import clamped, gated
from .pack import pack_values

_THREADS = 256


def plain_of_four(g, v, alpha, limit):
    """silu(g) * v of four values."""
    return gated(g[0], v[0]), gated(g[1], v[1]), gated(g[2], v[2]), gated(g[3], v[3])


def clamped_of_four(g, v, alpha, limit):
    """The clamped form of four values."""
    return (
        clamped(g[0], v[0], alpha, limit), clamped(g[1], v[1], alpha, limit),
        clamped(g[2], v[2], alpha, limit), clamped(g[3], v[3], alpha, limit),
    )  # fmt: skip


@constants(packed=(False, True), clamp=(False, True))
def build_swiglu(packed: bool, clamp: bool) -> Declared:
    """out = silu(gate) * up, or its clamped form: f32 rows of 4 `pieces` elements.

    Rows of gate and up lie `gate_stride` and `up_stride` pieces apart. Grid (pieces / 256, rows).
    """
    four = clamped_of_four if clamp else plain_of_four

    @entry(
        "gate:f32* up:f32* out:f32* pieces:u32 gate_stride:u32 up_stride:u32 alpha:f32 limit:f32",
        threads=_THREADS,
    )
    def swiglu(gate, up, out, pieces, gate_stride, up_stride, alpha, limit):
        launch_next()
        i, row = u32(block_x() * _THREADS + thread_x()), block_y()
        launch_wait()
        if i < pieces:
            g, u = load4(gate, u32(row * gate_stride + i)), load4(up, u32(row * up_stride + i))
            v = four(g, u, alpha, limit)
            store4(out, u32(row * pieces + i), v[0], v[1], v[2], v[3])

    @entry(
        "gate:f32* up:f32* out:u32* pieces:u32 gate_stride:u32 up_stride:u32 alpha:f32 limit:f32 "
        "stretches:u32 length:u32",
        threads=_THREADS,
    )
    def swiglu_packed(
        gate, up, out, pieces, gate_stride, up_stride, alpha, limit, stretches, length
    ):
        launch_next()
        i, row = u32(block_x() * _THREADS + thread_x()), block_y()
        at = min(i, u32(pieces - 1))
        launch_wait()
        g, u = load4(gate, u32(row * gate_stride + at)), load4(up, u32(row * up_stride + at))
        v = four(g, u, alpha, limit)
        if i >= pieces:
            v = f32(0), f32(0), f32(0), f32(0)
        pack_values(v, out, row, i, stretches, length, i < u32(8 * u32(stretches * length)))

    return swiglu_packed if packed else swiglu

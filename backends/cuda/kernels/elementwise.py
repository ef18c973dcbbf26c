"""SwiGLU: one thread per 4 elements, 16-byte accesses; rows lie one after another.

With `packed` the result is int8 for the product that follows.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    entry,
    exp2,
    f32,
    launch_next,
    launch_wait,
    load4,
    rcp,
    store4,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

from .pack import pack_values

_THREADS = 256
_LOG2_E = f32(1.4426950408889634)


def silu(x):
    """x / (1 + e^-x); for large negative x the reciprocal of infinity gives -0."""
    return x * rcp(f32(1) + exp2(-x * _LOG2_E))


def gated(g, v):
    """silu(g) * v of four values."""
    return silu(g[0]) * v[0], silu(g[1]) * v[1], silu(g[2]) * v[2], silu(g[3]) * v[3]


@constants(packed=(False, True))
def build_swiglu(packed: bool) -> Declared:
    """out = silu(gate) * up: f32 rows of 4 `pieces` elements. Grid (pieces / 256, rows)."""

    @entry("gate:f32* up:f32* out:f32* pieces:u32", threads=_THREADS)
    def swiglu(gate, up, out, pieces):
        launch_next()
        i = u32(block_x() * _THREADS + thread_x())
        at = u32(block_y() * pieces + i)
        launch_wait()
        if i < pieces:
            v = gated(load4(gate, at), load4(up, at))
            store4(out, at, v[0], v[1], v[2], v[3])

    @entry("gate:f32* up:f32* out:u32* meta:u32* pieces:u32", threads=_THREADS)
    def swiglu_packed(gate, up, out, meta, pieces):
        launch_next()
        i = u32(block_x() * _THREADS + thread_x())
        at = u32(block_y() * pieces + min(i, u32(pieces - 1)))
        launch_wait()
        v = gated(load4(gate, at), load4(up, at))
        pack_values(v, out, meta, block_y(), i, u32(pieces >> 3), i < pieces)

    return swiglu_packed if packed else swiglu

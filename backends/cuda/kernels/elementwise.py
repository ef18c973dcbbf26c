"""SwiGLU: one thread per 4 elements, 16-byte accesses; rows lie one after another."""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
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

_THREADS = 256
_LOG2_E = f32(1.4426950408889634)


def _silu(x):
    """x / (1 + e^-x); for large negative x the reciprocal of infinity gives -0."""
    return x * rcp(f32(1) + exp2(-x * _LOG2_E))


def swiglu() -> Declared:
    """out = silu(gate) * up, elementwise: f32, `pieces` x 4 elements."""

    @entry("gate:f32* up:f32* out:f32* pieces:u32", threads=_THREADS)
    def swiglu(gate, up, out, pieces):
        launch_next()
        i = u32(block_x() * _THREADS + thread_x())
        launch_wait()
        if i < pieces:
            g, v = load4(gate, i), load4(up, i)
            store4(
                out, i, _silu(g[0]) * v[0], _silu(g[1]) * v[1], _silu(g[2]) * v[2],
                _silu(g[3]) * v[3],
            )  # fmt: skip

    return swiglu


KERNELS = {"swiglu": swiglu}

"""Walsh-Hadamard transforms of heads (Fino and Algazi 1976), a warp a head.

A lane has dims lane, 32 + lane, .. of its head in registers: rounds of sums and differences of dims
less than 32 apart are exchanges between lanes, the others are within a lane. All kernels that
rotate use this one function, so that fused and plain have the same bits.
"""

from __future__ import annotations

from collections.abc import Callable

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    block_y,
    entry,
    f32,
    launch_next,
    launch_wait,
    load,
    registers,
    shuffle_xor,
    store,
    thread_x,
    u32,
)  # fmt: skip

WARPS = 4
MAX_GROUPS = 8  # of 32 dims
_SQRT_HALF = f32(0.70710678118654752)


def block_size(d, dim, block):
    """How many dims are transformed together with dim d: see `ops.rotation.blocks`."""
    at, size, found = u32(0), block, u32(1)
    while at <= d and at < dim:
        while size > u32(dim - at):
            size = u32(size >> 1)
        found = size
        at = u32(at + size)
    return found


def orthonormal(size):
    """1 / sqrt(size) of a power of two."""
    factor = f32(1)
    while size >= 4:
        factor *= f32(0.5)
        size = u32(size >> 2)
    return factor * _SQRT_HALF if size == 2 else factor


def rotating(groups: int) -> Callable:
    """A function that rotates a head of up to `groups` x 32 dims in registers; all lanes come."""
    sizes_of = registers("u32", groups)

    def rotate(values, dim, block):
        sizes, lane = sizes_of(), u32(thread_x() & 31)
        for k in range(groups):
            sizes[k] = block_size(u32(32 * k + lane), dim, block)
            values[k] = values[k] * orthonormal(sizes[k])
        for bit in range(5):
            upper = (lane >> bit) & 1
            for k in range(groups):
                other = shuffle_xor(values[k], u32(1 << bit))
                turned = other - values[k] if upper else other + values[k]
                values[k] = turned if sizes[k] >= (2 << bit) else values[k]
        for bit in range(3):
            for k in range(groups):
                if (k >> bit) & 1 == 0 and k + (1 << bit) < groups:
                    a, b = values[k], values[k + (1 << bit)]
                    if sizes[k] >= (64 << bit):
                        values[k], values[k + (1 << bit)] = a + b, a - b

    return rotate


def build_hadamard() -> Declared:
    """out f32 [tokens, heads, dim] = heads of x rotated in blocks of `block` dims.

    x of strides x_stride and x_head_stride. Grid (heads / 4 rounded up, tokens), a warp a head.
    """
    held, rotate = registers("f32", MAX_GROUPS), rotating(MAX_GROUPS)

    @entry(
        "x:f32* out:f32* heads:u32 dim:u32 x_stride:u32 x_head_stride:u32 block:u32",
        threads=32 * WARPS,
    )
    def hadamard(x, out, heads, dim, x_stride, x_head_stride, block):
        launch_next()
        head, lane = u32(block_x() * WARPS + (thread_x() >> 5)), u32(thread_x() & 31)
        source = u32(block_y() * x_stride + u32(head * x_head_stride) + lane)
        target = u32(u32(u32(block_y() * heads) + head) * dim + lane)
        values = held()
        launch_wait()
        if head < heads:
            for k in range(MAX_GROUPS):
                values[k] = f32(0)
                if 32 * k + lane < dim:
                    values[k] = load(x, u32(source + 32 * k))
            rotate(values, dim, block)
            for k in range(MAX_GROUPS):
                if 32 * k + lane < dim:
                    store(out, u32(target + 32 * k), values[k])

    return hadamard

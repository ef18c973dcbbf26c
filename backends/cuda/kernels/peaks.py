"""What a GPU can do at best: a copy, and products of tensor cores that read and write nothing.

Measured against them, other kernels say how much of the GPU they use.
"""

from __future__ import annotations

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    entry,
    f32,
    int_to_f32,
    launch_next,
    launch_wait,
    load4,
    mma_f16,
    mma_s8,
    registers,
    store,
    store4,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.plan.catalogue import constants

COPY_THREADS = 256
COPIED = 4  # pieces of 16 bytes of a thread
MMA_THREADS = 256
CHAINS = 8  # products of a warp that do not wait for each other
OPERATIONS = {"s8": 2 * 16 * 8 * 32, "f16": 2 * 16 * 8 * 16}  # of one mma


def build_peak_copy() -> Declared:
    """out = x, u32, 4 pieces of 16 bytes a thread, all read before one is written.

    Grid: bytes / 16,384; the rest is not copied.
    """

    @entry("x:u32* out:u32*", threads=COPY_THREADS)
    def peak_copy(x, out):
        launch_next()
        launch_wait()
        first = u32(block_x() * (COPY_THREADS * COPIED) + thread_x())
        a0, a1, a2, a3 = load4(x, first)
        b0, b1, b2, b3 = load4(x, u32(first + COPY_THREADS))
        c0, c1, c2, c3 = load4(x, u32(first + 2 * COPY_THREADS))
        d0, d1, d2, d3 = load4(x, u32(first + 3 * COPY_THREADS))
        store4(out, first, a0, a1, a2, a3)
        store4(out, u32(first + COPY_THREADS), b0, b1, b2, b3)
        store4(out, u32(first + 2 * COPY_THREADS), c0, c1, c2, c3)
        store4(out, u32(first + 3 * COPY_THREADS), d0, d1, d2, d3)

    return peak_copy


@constants(kind=tuple(OPERATIONS))
def build_peak_mma(kind: str) -> Declared:
    """`rounds` times 8 products of tensor cores by each warp; out f32 [threads] their sum.

    Grid: any. The fragments are numbers that differ from lane to lane, as real ones do.
    """
    sums = registers("f32" if kind == "f16" else "i32", 4 * CHAINS)
    multiply, number, zero = (mma_f16, f32, f32(0)) if kind == "f16" else (mma_s8, int_to_f32, 0)

    @entry("out:f32* rounds:u32", threads=MMA_THREADS)
    def peak_mma(out, rounds):
        launch_next()
        thread = u32(block_x() * MMA_THREADS + thread_x())
        seed = u32(u32(thread * 0x9E3779B1) & 0x3BFF3BFF)  # halves below 1
        a, b = u32(seed ^ 0x01230321), u32(seed ^ 0x02020101)
        launch_wait()
        found = sums()
        for i in range(4 * CHAINS):
            found[i] = zero
        n = u32(0)
        while n < rounds:
            for i in range(CHAINS):
                found[4 * i], found[4 * i + 1], found[4 * i + 2], found[4 * i + 3] = multiply(
                    a, b, u32(a ^ b), seed, b, a,
                    found[4 * i], found[4 * i + 1], found[4 * i + 2], found[4 * i + 3],
                )  # fmt: skip
            n = u32(n + 1)
        total = f32(0)
        for i in range(4 * CHAINS):
            total = f32(total + number(found[i]))
        store(out, thread, total)

    return peak_mma

"""A further cache type, with a scale and a minimum, on the CPU's store and attention kernels.

python kv_program.py FOLDERS ROUNDING: the folders to import from, one a line; an empty ROUNDING
leaves the type's out, "packed" puts two codes in a byte, which no kernel reads. A
program, since the type is a row and its rounding of this process alone, which has to compile its
kernels itself.
"""

from __future__ import annotations

import sys

import numpy as np

TYPE = "q8_m"


def encode(x: np.ndarray) -> tuple[np.ndarray, ...]:
    """Codes -128 to 127 from the smallest to the largest of a group."""
    from runtime.ops.kv_formats import in_groups

    groups = in_groups(x)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    scale = (high - low) / np.float32(255)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    codes = np.rint((groups - low) * inverse) - np.float32(128)
    codes = codes.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]].astype(np.int8)
    shared = scale, low + scale * np.float32(128)
    return codes, *(number[..., 0].astype(np.float16) for number in shared)


def round_group(b, low, high):
    """The same, of two vectors of a kernel."""
    from runtime.backends.cpu.kernels import emit as e

    def number(value):
        return e.ir.Constant(e.f32, value)

    top = e.largest(b, e.larger(b, low, high))
    bottom = b.fneg(e.largest(b, e.larger(b, b.fneg(low), b.fneg(high))))
    scale = b.fdiv(b.fsub(top, bottom), number(255.0))
    some = b.fcmp_ordered(">", scale, number(0.0))
    inverse = e.splat(b, b.select(some, b.fdiv(number(1.0), scale), number(0.0)))
    steps = (b.fmul(b.fsub(x, e.splat(b, bottom)), inverse) for x in (low, high))
    codes = [b.sub(e.nearest_int(b, x), e.ints(128)) for x in steps]
    return codes, [scale, b.fadd(bottom, b.fmul(scale, number(128.0)))]


def declare(rounding: str) -> None:
    """The type's row, its rounding, and its kernels."""
    from kernel_calls import ISAS, library

    from runtime.backends.cpu.compile.compilers import compile_one
    from runtime.backends.cpu.kernels import target
    from runtime.backends.plan.kernel import Kernel
    from runtime.ops.dtypes import F16, I8, U8
    from runtime.ops.kv_formats import GROUP, KV_FORMATS, KVFormat, Plane

    target.choose(ISAS[0])
    from runtime.backends.cpu.kernels import kv_planes

    shared = Plane("scales", F16, GROUP), Plane("minima", F16, GROUP)
    widen = KV_FORMATS["q8_0"].widen
    codes = Plane("pairs", U8, 2) if rounding == "packed" else Plane("values", I8)
    KV_FORMATS[TYPE] = KVFormat(TYPE, (codes,), encode, widen, shared)
    if rounding:
        kv_planes._ROUND[TYPE] = round_group
    writes = [Kernel.of("kv_write", which=which, type=TYPE) for which in "kv"]
    for kernel in (*writes, Kernel.of("attention", k_type=TYPE, v_type=TYPE)):
        library(ISAS[0])._loaded[kernel] = library(ISAS[0]).load(*compile_one(kernel, ISAS[0]))


def check() -> None:
    """Bits of what is stored, and attention, at head sizes of every kind."""
    from test_attention_kernel import Case
    from test_attention_kernel import check as check_attention
    from test_cache_kernels import SLOTS, check_kv_write, write

    from runtime.ops.kv_formats import KV_FORMATS

    rng = np.random.default_rng(1)
    for which in "kv":
        check_kv_write(rng, which, TYPE, (16, 32, 48, 80, 128))
        for dim in (1, 20, 33, 63):  # whose padding is not zero, but what minima make of it
            x = rng.standard_normal((6, 2, dim)).astype(np.float32)
            kept = write(which, TYPE, x)[SLOTS[:, 0]]
            assert np.array_equal(kept, KV_FORMATS[TYPE].rounded(x)), f"head size {dim}"
    for k_dim, v_dim in ((64, 64), (128, 80), (20, 33), (100, 48)):
        check_attention(Case(k_dim=k_dim, v_dim=v_dim, k_type=TYPE, v_type=TYPE))


if __name__ == "__main__":
    sys.path[:0] = sys.argv[1].split("\n")
    declare(sys.argv[2])
    check()

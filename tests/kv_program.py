"""A further cache type, a book of sixteen values, on the CPU's store and attention kernels.

python kv_program.py FOLDERS HOW: the folders to import from, one a line; with HOW "unknown" its
codes lie in a plane that no kernel reads. A program, since the type is a row of this process alone,
which has to compile its kernels itself.
"""

from __future__ import annotations

import sys

import numpy as np

TYPE = "book4"
BOOK = (-120, -99, -80, -62, -47, -33, -20, -9, 2, 14, 27, 41, 57, 75, 96, 120)


def row(plane: str = "nibbles"):
    """The type: two codes in a byte, a scale for 32."""
    from runtime.ops.dtypes import F16, U8
    from runtime.ops.kv_formats import GROUP, Coding, KVFormat, Plane

    codes, scales = Plane(plane, U8, 2, bits=4), Plane("scales", F16, GROUP)
    return KVFormat(TYPE, (codes,), (scales,), Coding(-128, 127, (120.0, -124.0), book=BOOK))


def declare(how: str) -> None:
    """The type's row and its kernels."""
    from kernel_calls import ISAS, library

    from runtime.backends.cpu.compile.compilers import compile_one
    from runtime.backends.cpu.kernels import target
    from runtime.backends.plan.kernel import Kernel
    from runtime.ops.kv_formats import KV_FORMATS

    target.choose(ISAS[0])
    KV_FORMATS[TYPE] = row(*([how] if how else []))
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
        for dim in (1, 20, 33, 63):  # whose padding is not zero, but what the book has for it
            x = rng.standard_normal((6, 2, dim)).astype(np.float32)
            kept = write(which, TYPE, x)[SLOTS[:, 0]]
            assert np.array_equal(kept, KV_FORMATS[TYPE].rounded(x)), f"head size {dim}"
    for k_dim, v_dim in ((64, 64), (128, 80), (20, 33), (100, 48)):
        check_attention(Case(k_dim=k_dim, v_dim=v_dim, k_type=TYPE, v_type=TYPE))


if __name__ == "__main__":
    sys.path[:0] = sys.argv[1].split("\n")
    declare(sys.argv[2])
    check()

"""Kernels of the CPU compiled by Numba: `KERNELS` reads off these files which there are.

`build_NAME` returns a function of int64: addresses, sizes, or the bit pattern of a float32 (see
`float_bits`), in any order, then `thread` and `n_threads`. Strides count elements, `*_bytes` and
`*_nbytes` bytes; `live` is the address of an int64 with the number of live rows, `n_tiles` that of
the number of live tiles.
"""

from runtime.backends.plan.catalogue import Catalogue

KERNELS = Catalogue("CPU", __name__)

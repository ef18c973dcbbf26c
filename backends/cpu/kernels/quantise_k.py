"""Rows of float32 to super-blocks of 256. Parallel over groups of 16 super-blocks.

Called as the kernels of quantise_small.py. How scales are found: see fit.py.
"""

from __future__ import annotations

from runtime.ops.blocks import BLOCK_FORMATS

from . import lanes as l
from . import simd as s
from .fit import Parts, Starts, alone_centred, centred, ranged
from .packing import packer
from .rows import helper, share

BLOCK = 256
_values, _weights = l.room(BLOCK * 64), l.room(BLOCK * 64)
_bases, _scales, _minima = l.room(2 * 64), l.room(16 * 64), l.room(16 * 64)
_read, _read_row = l.loader(BLOCK), l.loader(BLOCK, periodic=True)


def _kernel(name, fit):
    """fit(values, weights, bases, scales, minima): see fit.py."""
    pack, nbytes = packer(name), BLOCK_FORMATS[name].nbytes

    def quantise(x, importance, out, n_rows, n_columns, thread, n_threads):
        values, weights, bases = _values(), _weights(), _bases()
        scales, minima = _scales(), _minima()
        blocks = n_rows * (n_columns // BLOCK)
        for j in range(0, BLOCK * 64, 64):
            s.store(weights + j, s.splat(s.f32(1)))
        first, last = share((blocks + 15) // 16, thread, n_threads)
        for block in range(16 * first, min(16 * last, blocks), 16):
            _read(x, block, blocks, values, n_columns)
            if importance != 0:
                _read_row(importance, block, blocks, weights, n_columns)
            fit(values, weights, bases, scales, minima)
            pack(values, scales, minima, bases, out + nbytes * block, min(16, blocks - block))

    return quantise


def build_quantise_q2_k():
    """16 parts with scales and minima of 4 bits."""
    parts = Parts(16, 16, (0, 3), (0, 15))
    return _kernel("q2_k", ranged(parts, Starts(4.05, -0.15, 12), 0.1, 3))


def build_quantise_q3_k():
    """16 parts with scales of 6 bits, of either sign."""
    parts = Parts(16, 16, (-4, 3), (-32, 31))
    return _kernel("q3_k", centred(parts, Starts(0.85, -0.15, 10), 3, 1))


def build_quantise_q4_k():
    """8 parts with scales and minima of 6 bits."""
    parts = Parts(8, 32, (0, 15), (0, 63))
    return _kernel("q4_k", ranged(parts, Starts(17.5, -0.5, 10), 0.03, 3))


def build_quantise_q5_k():
    """8 parts with scales and minima of 6 bits."""
    parts = Parts(8, 32, (0, 31), (0, 63))
    return _kernel("q5_k", ranged(parts, Starts(33.5, -0.5, 10), 0.015, 3))


def build_quantise_q6_k():
    """16 parts with scales of 8 bits, of either sign."""
    parts = Parts(16, 16, (-32, 31), (-128, 127))
    return _kernel("q6_k", centred(parts, Starts(1.75, -0.25, 16), 3, 1))


def _ternary(name):
    block = alone_centred(Parts(1, BLOCK, (-1, 1)), Starts(3.63, -0.33, 12))

    @helper
    def fit(values, weights, bases, scales, minima):
        block(values, weights, bases)

    return _kernel(name, fit)


def build_quantise_tq1_0():
    """Codes -1, 0 and 1."""
    return _ternary("tq1_0")


def build_quantise_tq2_0():
    """Codes -1, 0 and 1."""
    return _ternary("tq2_0")

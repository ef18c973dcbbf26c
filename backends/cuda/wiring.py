"""Which bit of a packed row is which bit of the file's row, found by packing numbered bits.

`layouts.pack` is the meaning of every format. Rows whose bits spell their own numbers go through
it once, and what comes out says where each bit came from: so weights are packed on the GPU by one
kernel for all formats.
"""

from __future__ import annotations

import functools

import numpy as np

from runtime.backends.cuda.kernels.repack import ENTRY
from runtime.backends.cuda.layouts import FLOATS, pack, row_nbytes
from runtime.ops.dtypes import DTYPES


@functools.lru_cache(maxsize=64)
def wiring(format: str, inner: int) -> np.ndarray | None:
    """The table of `repack`, uint32 [words of a packed row, 36], not to be written to.

    None: packing this format does more than to move and to invert bits.
    """
    dtype = DTYPES[format.lower()]
    nbytes = inner // dtype.block * dtype.nbytes
    rows = _numbered(8 * nbytes)
    packed = pack(rows.reshape(-1), format, len(rows), inner).reshape(len(rows), -1)
    bits = np.unpackbits(packed, axis=1, bitorder="little")
    zeros, ones, numbers = bits[0], bits[1], bits[2:]
    there, flipped = zeros != ones, zeros == 1
    source = np.zeros(bits.shape[1], np.uint32)
    for n, row in enumerate(numbers):
        source |= (row ^ zeros).astype(np.uint32) << np.uint32(n)
    source[~there] = 0
    if source.max(initial=0) >= 8 * nbytes:
        return None
    table = np.zeros((bits.shape[1] // 32, ENTRY), np.uint32)
    table[:, :32] = source.reshape(-1, 32)
    table[:, 32], table[:, 33] = _words(flipped), _words(there)
    table.flags.writeable = False
    probe = np.random.default_rng(1).integers(0, 256, (4, nbytes), np.uint8)
    if not np.array_equal(repacked(probe, table), pack(probe.reshape(-1), format, 4, inner)):
        return None
    return table


def repacked(raw: np.ndarray, table: np.ndarray) -> np.ndarray:
    """What the kernel computes: rows uint8 [rows, bytes] of a file -> uint8 [bytes]."""
    bits = np.unpackbits(raw, axis=1, bitorder="little")
    found = bits[:, table[:, :32].reshape(-1)]
    there, flips = (_bits(table[:, n]) for n in (33, 32))
    return np.packbits(found & there ^ flips, axis=1, bitorder="little").reshape(-1)


def is_copy(format: str, inner: int) -> bool:
    """Whether a packed row is the file's row as it is."""
    return format in FLOATS and row_nbytes(format, inner) == inner * FLOATS[format]


def _numbered(count: int) -> np.ndarray:
    """uint8 rows of `count` bits: none set, all set, then row n has those with bit n in their
    number."""
    number = np.arange(count, dtype=np.uint32)
    rows = [np.zeros(count, np.uint8), np.ones(count, np.uint8)]
    rows += [(number >> n & 1).astype(np.uint8) for n in range(max(1, (count - 1).bit_length()))]
    return np.packbits(np.stack(rows), axis=1, bitorder="little")


def _words(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, bitorder="little").view(np.uint32)


def _bits(words: np.ndarray) -> np.ndarray:
    return np.unpackbits(np.ascontiguousarray(words).view(np.uint8), bitorder="little")

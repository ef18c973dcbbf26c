"""Bytes of scratch, as kernels take them, and how they take floats."""

from __future__ import annotations

import struct

from runtime.backends.cpu.abi import (
    ATTENTION_BLOCKS,
    ATTENTION_ROWS,
    ATTENTION_TOKENS,
    DELTA_COLUMNS,
    DELTA_VECTORS,
)
from runtime.ops.kv_formats import GROUP, PAGE


def float_bits(value: float) -> int:
    """The bit pattern of a float32, as kernels take float arguments."""
    return struct.unpack("<I", struct.pack("<f", value))[0]


def conv_scratch_nbytes(block: int, taps: int) -> int:
    """Bytes of scratch that each thread of a short convolution needs: filters and a zero row."""
    return -(-block // 16) * (taps + 1) * 64


def delta_scratch_nbytes(dk: int) -> int:
    """Bytes of scratch that each thread of `gated_delta` needs."""
    return DELTA_VECTORS + dk * DELTA_COLUMNS * 4


def attention_scratch_nbytes(n_heads: int, n_kv_heads: int, k_dim: int, v_dim: int) -> int:
    """Bytes of scratch that each thread of `attention` needs; see kernels/attention.py."""
    rows = ATTENTION_TOKENS * (n_heads // n_kv_heads)
    blocks = min(ATTENTION_BLOCKS, -(-rows // ATTENTION_ROWS))
    q, o = (-(-dim // GROUP) * GROUP for dim in (k_dim, v_dim))
    state = 320 + ATTENTION_ROWS * 4 * (16 + PAGE + q + 2 * o)
    return blocks * state

"""The arithmetic of the tiles in numpy, bit for bit: what the kernels are tested against.

Slow and plain. `fma=False` follows instruction sets without a fused multiply-add.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from runtime.backends.cpu.tile.formats import format_of
from runtime.backends.cpu.tile.spec import PIECES, STRETCHES
from runtime.ops.blocks import BLOCK_FORMATS, BlockFormat
from runtime.ops.quant_blocks import levels, numbers, scales, struct_of

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Codes:
    """Weights of N rows: (code * scale + minimum), codes already without their offset."""

    codes: Array  # int32 [N, K]
    scales: Array  # float32 [N, K / 32, scales of a block of 32]
    minimum: Array | None  # float32 [N, K / 32]
    halves: Array | None  # int32 [N, K / 32, 2]: factors of the minimum for halves of a block


def matmul_int8(name: str, raw: Array, q: Array, d: Array, fma: bool = True) -> Array:
    """float32 [T, N] of weights `raw` (uint8 [N, row bytes]) by activations q * d.

    q: int8 [T, K]; d: float32 [T, K / 32].
    """
    w = decode(name, raw)
    (n_tokens, k), n_rows, parts = q.shape, raw.shape[0], w.scales.shape[2]
    acc = np.zeros((n_tokens, n_rows), np.float32)
    span = 32 // parts
    total = (d * q.reshape(n_tokens, k // 32, 32).sum(2, dtype=np.int32)).astype(np.float32)
    for b in range(k // 32):
        for part in range(parts):
            at = slice(32 * b + span * part, 32 * b + span * (part + 1))
            dot = q[:, at].astype(np.int32) @ w.codes[:, at].T
            if w.halves is not None:
                acc = fused(_less_minima(w, dot, q, b, fma), d[:, b, None], acc, fma)
                continue
            value = dot.astype(np.float32) * d[:, b, None]
            acc = fused(value, w.scales[None, :, b, part], acc, fma)
        if w.minimum is not None and w.halves is None:
            acc = fused(w.minimum[None, :, b], total[:, b, None], acc, fma)
    return acc


def _less_minima(w: Codes, dot: Array, q: Array, b: int, fma: bool) -> Array:
    """dot * scale of block b, less the minimum times the factors and sums of both halves."""
    assert w.halves is not None and w.minimum is not None, "a format with minima of halves"
    sums = q[:, 32 * b : 32 * b + 32].reshape(len(q), 2, 16).sum(2, dtype=np.int32)
    both = (-8 * sums @ w.halves[:, b].T).astype(np.float32)
    product = dot.astype(np.float32) * w.scales[None, :, b, 0]
    return fused(both, (w.minimum[:, b] * np.float32(-0.125))[None], product, fma)


def matmul_f32(name: str, raw: Array, x: Array, fma: bool = True) -> Array:
    """float32 [T, N] of weights `raw` (uint8 [N, row bytes]) by x (float32 [T, K])."""
    w = dequantised(name, raw, fma)
    acc = np.zeros((x.shape[0], w.shape[0]), np.float32)
    for k in range(x.shape[1]):
        acc = fused(w[None, :, k], x[:, k, None], acc, fma)
    return acc


def matmul_split(name: str, raw: Array, x: Array, fma: bool = True) -> Array:
    """float32 [T, N] of BF16 weights by x (float32 [T, K]) in three bfloat16 pieces.

    As tdpbf16ps does for each 32 elements and piece: even and odd products are summed apart, and
    both sums together are added (Intel's Software Developer's Manual, TDPBF16PS).
    """
    w, rest = dequantised(name, raw), np.ascontiguousarray(x, np.float32)
    pieces = []
    for _ in range(PIECES):
        pieces.append((rest.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32))
        rest = rest - pieces[-1]
    acc = np.zeros((x.shape[0], w.shape[0]), np.float32)
    for start in range(0, x.shape[1], 32):
        for piece in pieces:
            sums = [np.zeros_like(acc), np.zeros_like(acc)]
            for k in range(32):
                at = start + k
                sums[k % 2] = fused(w[None, :, at], piece[:, at, None], sums[k % 2], fma)
            acc = acc + (sums[0] + sums[1])
    return acc


def dequantised(name: str, raw: Array, fma: bool = True) -> Array:
    """The weights as the float32 tiles see them: float32 [N, K]."""
    if name == "F32":
        return raw.view(np.float32)
    if name == "F16":
        return raw.view(np.float16).astype(np.float32)
    if name == "BF16":
        return (raw.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    w, offset = decode(name, raw), format_of(name).offset
    each = 32 // w.scales.shape[2]
    scales = np.repeat(w.scales.reshape(len(raw), -1), each, axis=1)
    shift = scales * np.float32(-offset) if w.minimum is None else np.repeat(w.minimum, 32, axis=1)
    if w.halves is not None:
        shift = shift * np.repeat(w.halves.reshape(len(raw), -1), 16, axis=1)
        shift = shift.astype(np.float32)
    return fused((w.codes + offset).astype(np.float32), scales, shift, fma)


def quantise_activations(x: Array) -> tuple[Array, Array]:
    """int8 [T, K] and scales float32 [T, K / 32].

    q = round-to-even(x / d) for the d among max|x| / 127 * STRETCHES that rounds best; the scale is
    then sum(x q) / sum(q^2), the best one for these q.
    """
    blocks = x.reshape(len(x), -1, 32)
    finest = (np.abs(blocks).max(2, keepdims=True) / np.float32(127)).astype(np.float32)
    safe = np.where(finest == 0, np.float32(1), finest)
    tried = np.stack([np.rint(blocks / (safe * np.float32(f))) for f in STRETCHES])
    each = safe * np.array(STRETCHES, np.float32)[:, None, None, None]
    best = ((tried * each - blocks) ** 2).sum(3).argmin(0)
    q = np.take_along_axis(tried, best[None, ..., None], 0)[0]
    q = np.where(finest == 0, 0, q)
    d = (blocks * q).sum(2) / np.maximum(1, (q * q).sum(2))
    return q.reshape(x.shape).astype(np.int8), d.astype(np.float32)


def fused(x: Array, y: Array, z: Array, fma: bool = True) -> Array:
    """x * y + z in float32, rounded once (or, with fma=False, after the product too).

    The product is exact in float64; the sum is rounded to odd there, so that the rounding to
    float32 sees which side of a tie it is on.
    """
    if not fma:
        return (x * y).astype(np.float32) + z
    product, addend = np.float64(x) * np.float64(y), np.float64(z)
    total = product + addend
    back = total - product
    error = (product - (total - back)) + (addend - back)
    even = (total.view(np.uint64) & 1) == 0
    nudged = np.nextafter(total, np.where(error > 0, np.inf, -np.inf))
    return np.where((error != 0) & even, nudged, total).astype(np.float32)


def decode(name: str, raw: Array) -> Codes:
    """Codes, scales and minima of rows of GGUF blocks (uint8 [N, row bytes]).

    From the description of the format, by what `ops/quant_blocks.py` reads from it.
    """
    row, n = BLOCK_FORMATS[name.lower()], len(raw)
    blocks = raw.reshape(-1).view(struct_of(row))
    codes, scale, minimum, halves = _TAKEN_APART.get(name, _taken_apart)(row, blocks)
    parts = format_of(name).scales
    return Codes(
        codes.reshape(n, -1).astype(np.int32),
        _for_each(scale, row.block // 32 * parts).reshape(n, -1, parts),
        None if minimum is None else _for_each(minimum, row.block // 32).reshape(n, -1),
        None if halves is None else halves.reshape(n, -1, 2).astype(np.int32),
    )


def _for_each(values: Array, count: int) -> Array:
    """float32 [blocks, groups] as one value for each of `count` stretches of a block."""
    return np.repeat(values, count // values.shape[1], axis=1).astype(np.float32)


def _taken_apart(row: BlockFormat, blocks: Array) -> tuple[Any, ...]:
    """Levels, scales, minima; those of IQ1 in eighths."""
    unit = 8 if row.down else 1
    minimum = scales(row, row.minimum, blocks) if row.minimum else None
    scale = scales(row, row.scale, blocks) / np.float32(unit)
    return levels(row, blocks) * unit, scale, minimum, None


def _q2_k(row: BlockFormat, blocks: Array) -> tuple[Any, ...]:
    """Codes are two bits times the scale of 16; four bits are the factors of the minima."""
    assert row.scale.steps and row.minimum and row.minimum.steps
    codes = levels(row, blocks) * np.repeat(numbers(row, row.scale.steps, blocks), 16, axis=1)
    d, dmin = (blocks[name].astype(np.float32) for name in ("d", "dmin"))
    return codes, d, -dmin, numbers(row, row.minimum.steps, blocks)


def _q3_k(row: BlockFormat, blocks: Array) -> tuple[Any, ...]:
    """Codes are -(three bits - 4) * (six bits of scale - 32), the float scale is -d."""
    assert row.scale.steps
    steps = numbers(row, row.scale.steps, blocks).astype(np.int32) - 32
    codes = -levels(row, blocks) * np.repeat(steps, 16, axis=1)
    return codes, -blocks["d"].astype(np.float32), None, None


_TAKEN_APART = {"Q2_K": _q2_k, "Q3_K": _q3_k}

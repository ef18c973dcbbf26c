"""The packed layouts of `tile/formats.py` in numpy: weights and activations, byte for byte."""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.backends.cpu.tile.formats import (
    ROWS,
    Copy,
    Format,
    Half,
    Numbers,
    Plane,
    Spread,
    format_of,
)
from runtime.backends.cpu.tile.spec import PIECES, activation_tile_nbytes
from runtime.ops.blocks import BLOCK_FORMATS, BlockFormat, Scale
from runtime.ops.quant_blocks import numbers, pieces, sign_bytes, struct_of

Array = np.ndarray[Any, Any]


def pack_weights(name: str, raw: Array) -> Array:
    """uint8 packed groups of the rows `raw` (uint8 [N, row bytes]); missing rows are zero."""
    layout, n_groups = format_of(name), -(-len(raw) // ROWS)
    rows = np.zeros((n_groups * ROWS, raw.shape[1]), np.uint8)
    rows[: len(raw)] = raw
    found = []
    for values in _planes(layout, rows):  # [row, block, plane, byte]
        values[len(raw) :] = 0  # codes and scales of rows that are zero need not be zero bytes
        grouped = values.reshape(n_groups, ROWS, *values.shape[1:]).transpose(0, 2, 3, 1, 4)
        found.append(grouped.reshape(n_groups, values.shape[1], -1))
    return np.concatenate(found, axis=2).reshape(-1)


def _planes(layout: Format, rows: Array) -> list[Array]:
    """Values of all planes of packed blocks in order, uint8 [row, block, plane, byte]."""
    if layout.is_float:
        return [_pairs(rows) if layout.name == "BF16" else _split(rows, layout.source_bytes)]
    row = BLOCK_FORMATS[layout.name.lower()]
    blocks = rows.reshape(-1).view(struct_of(row))
    found = [_values(row, blocks, plane, 0) for plane in layout.head]
    for chunk in range(layout.chunks):
        found += [_values(row, blocks, plane, chunk) for plane in layout.each]
    return [np.array(values).reshape(len(rows), -1, *values.shape[1:]) for values in found]


def _split(rows: Array, size: int) -> Array:
    return rows.reshape(len(rows), -1, 1, size)


def _pairs(rows: Array) -> Array:
    """BF16: neighbours share a lane; an odd last one has a zero beside it."""
    padded = np.zeros((len(rows), -(-rows.shape[1] // 4) * 4), np.uint8)
    padded[:, : rows.shape[1]] = rows
    return _split(padded, 4)


def _values(row: BlockFormat, blocks: Array, plane: Plane, chunk: int) -> Array:
    """What a chunk has of a plane: uint8 [blocks, plane, bytes of a value]."""
    whole = _BYTES[type(plane)](row, blocks, plane).reshape(len(blocks), -1, plane.unit)
    return whole[:, chunk * plane.planes : (chunk + 1) * plane.planes]


def _field(blocks: Array, name: str) -> Array:
    return np.ascontiguousarray(blocks[name]).view(np.uint8)


def _copied(row: BlockFormat, blocks: Array, plane: Copy) -> Array:
    stored = _field(blocks, plane.field)
    if plane.change == "unsigned":
        return stored ^ 0x80
    if plane.change == "usable":
        return np.where(stored == 0x7F, 0, stored & 0x7F).astype(np.uint8)
    if plane.change == "thirds":  # bit i of 32 bytes is that of 32 elements of 256
        bits = np.stack([stored & 15, stored >> 4], axis=1)
        return bits[..., :16] | bits[..., 16:] << 4
    return stored


def _half(row: BlockFormat, blocks: Array, plane: Half) -> Array:
    base = _scale(row, plane.of).base
    return _field(blocks, base) if isinstance(base, str) else pieces(row, base, blocks).view("u1")


def _scale(row: BlockFormat, name: str) -> Scale:
    found = row.minimum if name == "minimum" else row.scale
    assert found, "a format with minima"
    return found


def _numbers(row: BlockFormat, blocks: Array, plane: Numbers) -> Array:
    count = 8 * plane.unit // plane.width
    found = _those(row, blocks, plane.of).astype(np.int64) >> plane.low & (1 << plane.width) - 1
    found = found.reshape(len(blocks), -1, count) << plane.width * np.arange(count)
    return found.sum(-1).astype(f"<u{plane.unit}").view(np.uint8)


def _those(row: BlockFormat, blocks: Array, name: str) -> Array:
    if name == "codes":
        return numbers(row, row.codes, blocks)
    if name == "signs":
        return sign_bytes(row, blocks)
    scale = _scale(row, name)
    assert scale.steps, "a scale with steps"
    steps = numbers(row, scale.steps, blocks).astype(np.int32)
    if name == "turned":
        steps = -(steps + scale.plus)
        return np.abs(steps) | np.where(steps < 0, 128, 0)
    return steps + (scale.plus if scale.times == 1 else 0)


def _spread(row: BlockFormat, blocks: Array, plane: Spread) -> Array:
    """Element 4 w + k of those of a word in bits width * w .. of byte k."""
    bits = np.unpackbits(_field(blocks, plane.field), axis=-1, bitorder="little")
    bits = bits.reshape(len(blocks), -1, 8 // plane.width, 4, plane.width).swapaxes(2, 3)
    return np.packbits(bits.reshape(len(blocks), -1), axis=-1, bitorder="little")


_BYTES: dict[type[Plane], Any] = {Copy: _copied, Half: _half, Numbers: _numbers, Spread: _spread}


def pack_int8(q: Array, d: Array, columns: int) -> Array:
    """Tiles (uint8 [tiles, bytes]) of int8 activations [T, K] with scales [T, K / 32]."""
    q, d = _whole_tiles(q, columns), _whole_tiles(d, columns)
    n_tiles, n_blocks = len(q) // columns, d.shape[1]
    blocks = q.reshape(n_tiles, columns, n_blocks, 32).transpose(0, 2, 1, 3)
    scale = d.reshape(n_tiles, columns, n_blocks).transpose(0, 2, 1)
    low, high = (blocks[..., h : h + 16].sum(3, dtype=np.int32) for h in (0, 16))
    total = (scale * (low + high)).astype(np.float32)
    side = [scale, total, -8 * (low + high), -8 * low, -8 * high]
    words = np.stack([np.ascontiguousarray(s).view(np.int32) for s in side], axis=2)
    parts = [blocks, words]
    return _tiles(parts, activation_tile_nbytes(columns, "int8", q.shape[1]))


def pack_f32(x: Array, columns: int) -> Array:
    """Tiles (uint8 [tiles, bytes]) of float32 activations [T, K]: [K][columns] each."""
    whole = _whole_tiles(x, columns)
    tiles = whole.reshape(-1, columns, x.shape[1]).transpose(0, 2, 1)
    return _tiles([tiles], activation_tile_nbytes(columns, "f32", x.shape[1]))


def pack_split(x: Array, columns: int) -> Array:
    """Tiles (uint8 [tiles, bytes]) of float32 activations [T, K] in three bfloat16 pieces.

    For every 32 elements: [piece][column][32]. A piece is the leading eight bits of what is left.
    """
    whole = np.ascontiguousarray(_whole_tiles(x, columns), np.float32)
    pieces = []
    for _ in range(PIECES):
        bits = whole.view(np.uint32) & np.uint32(0xFFFF0000)
        pieces.append((bits >> 16).astype(np.uint16))
        whole = whole - bits.view(np.float32)
    shape = (PIECES, len(whole) // columns, columns, x.shape[1] // 32, 32)
    tiles = np.stack(pieces).reshape(shape).transpose(1, 3, 0, 2, 4)
    return _tiles([tiles], activation_tile_nbytes(columns, "split", x.shape[1]))


def _whole_tiles(values: Array, columns: int) -> Array:
    missing = -len(values) % columns
    return np.concatenate([values, np.zeros((missing, *values.shape[1:]), values.dtype)])


def _tiles(parts: list[Array], size: int) -> Array:
    flat = [np.ascontiguousarray(p).reshape(len(p), -1).view(np.uint8) for p in parts]
    joined = np.concatenate(flat, axis=1)
    out = np.zeros((len(joined), size), np.uint8)
    out[:, : joined.shape[1]] = joined
    return out

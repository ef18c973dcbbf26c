"""The packed layouts of `formats` in numpy: weights and activations, byte for byte."""

from __future__ import annotations

import numpy as np

from runtime.backends.cpu.tile.formats import ROWS, format_of
from runtime.backends.cpu.tile.reference_formats import Array
from runtime.backends.cpu.tile.reference_planes import PLANES
from runtime.backends.cpu.tile.spec import PIECES, activation_tile_nbytes


def pack_weights(name: str, raw: Array) -> Array:
    """uint8 packed groups of the rows `raw` (uint8 [N, row bytes]); missing rows are zero."""
    n_groups = -(-len(raw) // ROWS)
    rows = np.zeros((n_groups * ROWS, raw.shape[1]), np.uint8)
    rows[: len(raw)] = raw
    blocks = rows.reshape(n_groups, ROWS, -1, format_of(name).source_bytes)
    planes = PLANES[name](blocks.transpose(0, 2, 1, 3))  # [group, block, row, byte]
    for plane in planes:  # codes and scales of rows that are zero need not be zero bytes
        plane[-1, :, :, len(raw) - len(rows) or ROWS :] = 0
    flat = [np.ascontiguousarray(p).reshape(*p.shape[:2], -1) for p in planes]
    return np.concatenate(flat, axis=2).reshape(-1)


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

"""The packed layouts of `formats` in numpy: weights and activations, byte for byte."""

from __future__ import annotations

import numpy as np

from runtime.backends.cpu.tile.formats import ROWS, format_of
from runtime.backends.cpu.tile.reference import Array, six_bits
from runtime.backends.cpu.tile.spec import PIECES, activation_tile_nbytes


def pack_weights(name: str, raw: Array) -> Array:
    """uint8 packed groups of the rows `raw` (uint8 [N, row bytes]); missing rows are zero."""
    layout = format_of(name)
    n_groups = -(-len(raw) // ROWS)
    rows = np.zeros((n_groups * ROWS, raw.shape[1]), np.uint8)
    rows[: len(raw)] = raw
    blocks = rows.reshape(n_groups, ROWS, -1, layout.source_bytes)
    planes = _PACK[name](blocks.transpose(0, 2, 1, 3))  # [group, block, row, byte]
    packed = np.concatenate(planes, axis=2)
    if layout.levels:
        _clear_missing(packed, name, len(raw))
    return packed.reshape(-1)


def _clear_missing(packed: Array, name: str, n_rows: int) -> None:
    """Codes of Q8_0 are bytes + 128, so missing rows would not be zero by themselves."""
    if name != "Q8_0" or n_rows % ROWS == 0:
        return
    codes = packed[-1, :, 2 * ROWS :].reshape(-1, 8, ROWS, 4)
    codes[:, :, n_rows % ROWS :] = 0


def _flat(values: Array) -> Array:
    """[group, block, row, bytes of one value] as one plane of bytes."""
    return np.ascontiguousarray(values).reshape(*values.shape[:2], -1)


def _words(values: Array) -> Array:
    """[group, block, row, 4 * words] as word planes."""
    shape = values.shape
    words = values.reshape(*shape[:3], shape[3] // 4, 4)
    return _flat(words.transpose(0, 1, 3, 2, 4))


def _bytes(values: Array) -> Array:
    """[group, block, row, n] as n planes of one byte per row."""
    return _flat(values.transpose(0, 1, 3, 2))


def _fifth_bits(values: Array) -> Array:
    """Four bytes of bits, element 4w + k, as the plane with bit w of byte k."""
    bits = np.unpackbits(values, axis=-1, bitorder="little")
    bits = bits.reshape(*values.shape[:3], 8, 4).swapaxes(3, 4)
    return _flat(np.packbits(bits, axis=-1, bitorder="little")[..., 0])


def _values(b: Array) -> list[Array]:
    return [_flat(b)]


def _pairs(b: Array) -> list[Array]:
    """BF16: neighbours share a lane; an odd last one has a zero beside it."""
    groups, blocks, rows, size = b.shape
    padded = np.zeros((groups, blocks + blocks % 2, rows, size), np.uint8)
    padded[:, :blocks] = b
    pairs = padded.reshape(groups, -1, 2, rows, size).transpose(0, 1, 3, 2, 4)
    return [_flat(pairs)]


def _q8_0(b: Array) -> list[Array]:
    return [_flat(b[..., :2]), _words(b[..., 2:] ^ 0x80)]


def _q4_0(b: Array) -> list[Array]:
    return [_flat(b[..., :2]), _words(b[..., 2:])]


def _q4_1(b: Array) -> list[Array]:
    return [_flat(b[..., :2]), _flat(b[..., 2:4]), _words(b[..., 4:])]


def _q5_0(b: Array) -> list[Array]:
    return [_flat(b[..., :2]), _fifth_bits(b[..., 2:6]), _words(b[..., 6:])]


def _q5_1(b: Array) -> list[Array]:
    ends = [_flat(b[..., :2]), _flat(b[..., 2:4])]
    return [*ends, _fifth_bits(b[..., 4:8]), _words(b[..., 8:])]


def _k_chunks(b: Array, nibbles: int) -> list[Array]:
    scales, minima = six_bits(b[..., 4:16])
    planes = []
    for j in range(4):
        two = slice(2 * j, 2 * j + 2)
        planes += [_bytes(scales[..., two]), _bytes(minima[..., two])]
        planes.append(_words(b[..., nibbles + 32 * j : nibbles + 32 * (j + 1)]))
    return planes


def _q4_k(b: Array) -> list[Array]:
    return [_flat(b[..., :2]), _flat(b[..., 2:4]), *_k_chunks(b, 16)]


def _q5_k(b: Array) -> list[Array]:
    ends = [_flat(b[..., :2]), _flat(b[..., 2:4])]
    return [*ends, _words(b[..., 16:48]), *_k_chunks(b, 48)]


def _q6_k(b: Array) -> list[Array]:
    planes = [_flat(b[..., 208:])]
    for h in range(2):
        planes.append(_bytes(b[..., 192 + 8 * h : 200 + 8 * h]))
        planes.append(_words(b[..., 64 * h : 64 * (h + 1)]))
        planes.append(_words(b[..., 128 + 32 * h : 160 + 32 * h]))
    return planes


_PACK = {
    "F32": _values,
    "F16": _values,
    "BF16": _pairs,
    "Q8_0": _q8_0,
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "IQ4_NL": _q4_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}


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

"""Cache pages of this backend to and from plain arrays [pages, PAGE, heads, dim].

A page holds, per KV head, K transposed as [dims][PAGE] and V as [PAGE][dims], where dims is the
head size rounded up (`padded_head`), with zeros; q8_0 keeps the int8 values and behind them one
float16 scale per 32 dims, or for the last 16. The conversion is exact both ways.
"""

from __future__ import annotations

import numpy as np

from runtime.backends.cpu.abi import KV_GROUP
from runtime.backends.cpu.sizes import kv_block_nbytes, padded_head
from runtime.ops.attention import PAGE
from runtime.ops.tensor import Tensor


def page_nbytes(pages: Tensor) -> int:
    """Bytes of one page of one layer: all KV heads of `pages` [pages, PAGE, heads, dim].

    Of state in slots: bytes of one slot, as it is.
    """
    if pages.base.attrs["kind"] == "slots":
        return pages.nbytes // int(pages.shape[0])
    return int(pages.shape[2]) * kv_block_nbytes(pages.dtype.name, int(pages.shape[3]))


def to_plain(memory: np.ndarray, leaf: Tensor, which: str) -> np.ndarray:
    """float32 [pages, PAGE, heads, dim] of uint8 `memory` [pages, bytes]; which: "k" or "v"."""
    heads, dim = int(leaf.shape[2]), int(leaf.shape[3])
    dims = padded_head(dim)
    blocks = np.ascontiguousarray(memory).reshape(len(memory), heads, -1)
    if leaf.dtype.name == "q8_0":
        quants, scales = _split_q8(blocks, dims, which)
        each = np.repeat(scales.astype(np.float32), KV_GROUP, -1)[..., :dims]
        rows = quants.astype(np.float32) * each
    else:
        rows = _rows(_widen(blocks, leaf.dtype.name), dims, which)
    return np.ascontiguousarray(rows[..., :dim].transpose(0, 2, 1, 3))


def from_plain(plain: np.ndarray, leaf: Tensor, which: str) -> np.ndarray:
    """uint8 [pages, bytes] of float32 [pages, PAGE, heads, dim]; the inverse of `to_plain`."""
    rows = np.ascontiguousarray(plain.transpose(0, 2, 1, 3), np.float32)
    dims = padded_head(rows.shape[-1])
    rows = _widened(rows, dims)
    if leaf.dtype.name != "q8_0":
        return _bytes(_narrow(_turn(rows, which), leaf.dtype.name), len(plain))
    blocks = _widened(rows, -(-dims // KV_GROUP) * KV_GROUP)
    blocks = blocks.reshape(*rows.shape[:-1], -1, KV_GROUP)
    scales = np.abs(blocks).max(-1) / np.float32(127)
    safe = np.where(scales > 0, scales, 1)[..., None]
    quants = np.rint(blocks / safe).astype(np.int8).reshape(*rows.shape[:-1], -1)[..., :dims]
    parts = [_turn(quants, which), _turn(scales.astype(np.float16), which)]
    return np.concatenate([_bytes(p, rows.shape[0] * rows.shape[1]) for p in parts], 1).reshape(
        len(plain), -1
    )


def _split_q8(blocks: np.ndarray, dims: int, which: str) -> tuple[np.ndarray, np.ndarray]:
    quants = np.ascontiguousarray(blocks[..., : PAGE * dims]).view(np.int8)
    scales = np.ascontiguousarray(blocks[..., PAGE * dims :]).view(np.float16)
    return _rows(quants, dims, which), _rows(scales, -(-dims // KV_GROUP), which)


def _widened(rows: np.ndarray, dims: int) -> np.ndarray:
    """Zeros behind the last axis, up to `dims`."""
    return np.pad(rows, [(0, 0)] * (rows.ndim - 1) + [(0, dims - rows.shape[-1])])


def _rows(values: np.ndarray, width: int, which: str) -> np.ndarray:
    """[pages, heads, PAGE, width], K turned back."""
    shape = (width, PAGE) if which == "k" else (PAGE, width)
    found = values.reshape(*values.shape[:2], *shape)
    return found.swapaxes(-1, -2) if which == "k" else found


def _turn(rows: np.ndarray, which: str) -> np.ndarray:
    return np.ascontiguousarray(rows.swapaxes(-1, -2) if which == "k" else rows)


def _bytes(values: np.ndarray, first: int) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.uint8).reshape(first, -1)


def _widen(blocks: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return (blocks.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    return blocks.view(np.float32 if kind == "f32" else np.float16).astype(np.float32)


def _narrow(values: np.ndarray, kind: str) -> np.ndarray:
    if kind == "bf16":
        return (np.ascontiguousarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return values.astype(np.float32 if kind == "f32" else np.float16)

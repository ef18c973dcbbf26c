"""Pages of the cache in a GPU's memory, to and from the form that all devices share.

`kv_layout.py` says how they lie.
"""

from __future__ import annotations

import numpy as np

from runtime.backends.cuda.kv_layout import PIECE, extra_bits, group_pieces, groups_of
from runtime.ops import cost
from runtime.ops.kv_formats import GROUP, HEAD_UNIT, PAGE, fill, kv_format, padded_head
from runtime.ops.tensor import Tensor

_NIBBLES = 0, 4, 1, 5  # of K: dims of a part that are the low nibbles of its bytes; 2 on: the high


def page_nbytes(leaf: Tensor) -> int:
    """Bytes of one page of all KV heads of a layer, or of one slot: heads are whole groups here."""
    if leaf.base.attrs["storage"] == "slots":
        return cost.page_nbytes(leaf)
    _, _, heads, dim = map(int, leaf.shape)
    return heads * groups_of(dim) * group_pieces(leaf.dtype.name) * PIECE


def to_plain(pages: np.ndarray, leaf: Tensor) -> np.ndarray:
    """uint8 [pages, bytes] -> what `Backend.read_state` gives: float32, or of codes their bits."""
    _, _, heads, dim = map(int, leaf.shape)
    row, which = kv_format(leaf.dtype.name), leaf.attrs["storage"]
    raw = pages.reshape(len(pages), heads, groups_of(dim), -1)
    if row.coding is None:
        bits = _unfragmented(_float_fragments(raw, row.planes[0].numpy), which)
        values = row.decode(_joined(bits))[..., :dim]
        return np.ascontiguousarray(values)
    codes, at = _codes(raw, which, row.codes[0].bits == 8)
    for bit in extra_bits(row):
        words = np.ascontiguousarray(raw[..., at : at + 4 * PAGE]).view(np.uint32)
        codes |= ((words[..., None] >> np.arange(GROUP, dtype=np.uint32) & 1) << bit).astype("u1")
        at += 4 * PAGE
    planes = [p.pack(_joined(codes))[..., : p.width(padded_head(dim))] for p in row.codes]
    for _ in row.shared:
        numbers = np.ascontiguousarray(raw[..., at : at + 2 * PAGE]).view(np.float16)
        planes.append(numbers.transpose(0, 3, 1, 2))
        at += 2 * PAGE
    return row.to_rows(planes)


def from_plain(values: np.ndarray, leaf: Tensor) -> np.ndarray:
    """The inverse of `to_plain`; of codes also float32, which is rounded, of floats their bits."""
    _, _, heads, dim = map(int, leaf.shape)
    row, which = kv_format(leaf.dtype.name), leaf.attrs["storage"]
    if values.dtype != np.uint8:
        plain = np.asarray(values, np.float32).reshape(-1, PAGE, heads, dim)
        planes = list(row.encode(fill(plain, GROUP if row.coding is None else HEAD_UNIT)))
    else:
        planes = row.from_rows(values.reshape(-1, PAGE, heads, row.token_nbytes(dim)), dim)
    if row.coding is None:
        raw = _float_raw(_fragmented(_split(fill(planes[0], GROUP)), which))
        return raw.reshape(len(raw), -1)
    pairs = zip(row.codes, planes, strict=False)
    codes = _split(
        np.asarray(np.sum([p.unpack(fill(x, GROUP // p.dims)) for p, x in pairs], 0, np.uint8))
    )
    parts = [_code_raw(codes & (0xFF if row.codes[0].bits == 8 else 15), which, row.codes[0].bits)]
    for bit in extra_bits(row):
        places = np.arange(GROUP, dtype=np.uint32)
        words = ((codes >> bit & 1).astype(np.uint32) << places).sum(-1, dtype=np.uint32)
        parts.append(words.view(np.uint8))
    for numbers in planes[len(row.codes) :]:
        parts.append(np.ascontiguousarray(numbers.transpose(0, 2, 3, 1)).view(np.uint8))
    raw = np.concatenate(parts, -1)
    return raw.reshape(len(raw), -1)


def _split(values: np.ndarray) -> np.ndarray:
    """[pages, PAGE, heads, dims] -> [pages, heads, groups, PAGE, GROUP]."""
    shape = (*values.shape[:3], -1, GROUP)
    return np.ascontiguousarray(values.reshape(shape).transpose(0, 2, 3, 1, 4))


def _joined(values: np.ndarray) -> np.ndarray:
    """The inverse of `_split`."""
    turned = values.transpose(0, 3, 1, 2, 4)
    return np.ascontiguousarray(turned).reshape(*turned.shape[:3], -1)


def _fragmented(x: np.ndarray, which: str) -> np.ndarray:
    """[.., token, dim] -> [.., part, lane, 8]."""
    lead, n = x.shape[:-2], x.ndim - 2
    if which == "k":  # token = 8 a + 2 j + b, dim = 8 t + i, lane = 8 a + 4 b + t
        x = x.reshape(*lead, 4, 4, 2, 4, 8)
        order: tuple[int, ...] = (n + 1, n, n + 2, n + 3, n + 4)
    else:  # token = 8 t + i, dim = 8 s + g
        x = x.reshape(*lead, 4, 8, 4, 8)
        order = (n + 2, n + 3, n, n + 1)
    turned = np.ascontiguousarray(x.transpose(*range(n), *order))
    return turned.reshape(*lead, 4, 32, 8)


def _unfragmented(x: np.ndarray, which: str) -> np.ndarray:
    """The inverse of `_fragmented`."""
    lead, n = x.shape[:-3], x.ndim - 3
    if which == "k":
        x = x.reshape(*lead, 4, 4, 2, 4, 8)
        order: tuple[int, ...] = (n + 1, n, n + 2, n + 3, n + 4)
    else:
        x = x.reshape(*lead, 4, 8, 4, 8)
        order = (n + 2, n + 3, n, n + 1)
    return np.ascontiguousarray(x.transpose(*range(n), *order)).reshape(*lead, PAGE, GROUP)


def _float_raw(x: np.ndarray) -> np.ndarray:
    """Fragments of floats as bytes [pages, heads, groups, bytes]."""
    if x.dtype.itemsize == 4:
        x = x.reshape(*x.shape[:-1], 2, 4).swapaxes(-3, -2)
    return np.ascontiguousarray(x).view(np.uint8).reshape(*x.shape[:3], -1)


def _float_fragments(raw: np.ndarray, kind: np.dtype) -> np.ndarray:
    x = np.ascontiguousarray(raw).view(kind)
    if kind.itemsize == 4:
        x = x.reshape(*x.shape[:3], 4, 2, 32, 4).swapaxes(-3, -2)
    return np.ascontiguousarray(x).reshape(*x.shape[:3], 4, 32, 8)


def _code_raw(codes: np.ndarray, which: str, bits: int) -> np.ndarray:
    """uint8 codes [.., token, dim], or their low 4 bits, as bytes [.., bytes]."""
    x, lead = _fragmented(codes, which), codes.shape[:-2]
    if bits == 8:
        x = x.reshape(*lead, 2, 2, 32, 8).swapaxes(-3, -2)
    elif which == "k":
        low = np.array(_NIBBLES)
        x = (x[..., low] | x[..., low + 2] << 4).swapaxes(-3, -2)
    else:
        x = (x[..., 0::2, :, :] | x[..., 1::2, :, :] << 4).swapaxes(-3, -2)
    return np.ascontiguousarray(x).reshape(*lead, -1)


def _codes(raw: np.ndarray, which: str, whole: bool) -> tuple[np.ndarray, int]:
    """The inverse of `_code_raw`, and how many bytes it took."""
    lead, size = raw.shape[:-1], PAGE * GROUP if whole else PAGE * GROUP // 2
    x = raw[..., :size]
    if whole:
        x = x.reshape(*lead, 2, 32, 2, 8).swapaxes(-3, -2).reshape(*lead, 4, 32, 8)
        return _unfragmented(x, which), size
    found = np.empty((*lead, 4, 32, 8), np.uint8)
    if which == "k":
        x, low = x.reshape(*lead, 32, 4, 4).swapaxes(-3, -2), np.array(_NIBBLES)
        found[..., low], found[..., low + 2] = x & 15, x >> 4
    else:
        x = x.reshape(*lead, 32, 2, 8).swapaxes(-3, -2)
        found[..., 0::2, :, :], found[..., 1::2, :, :] = x & 15, x >> 4
    return _unfragmented(found, which), size

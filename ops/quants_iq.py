"""Decoders of the IQ formats: elements come in groups of 4 or 8 from a code book.

The books are data of 0.5 to 4 KiB each that this folder does not hold: `set_codebooks` says where
they come from. The two formats with 16 levels (IQ4) need none.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from . import dtypes as dt
from .errors import ModelError
from .quant_blocks import (
    F16_FIELD,
    U8_FIELD,
    U16_FIELD,
    U32_FIELD,
    bits,
    decodes,
    f32,
    fields,
    nibbles,
    spread,
)

IQ4_LEVELS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)
_DELTA = np.float32(0.125)  # IQ1 shifts each group's levels by this, up or down
_sources: list[Callable[[str], np.ndarray]] = []


def set_codebooks(source: Callable[[str], np.ndarray]) -> None:
    """Take code books from `source(format name) -> float32 [entries, group]`."""
    _sources[:] = [source]


def code_book(name: str) -> np.ndarray:
    """The book of a format (float32 [entries, group]); ModelError when there is no source."""
    if not _sources:
        raise ModelError(f"{name} needs its code book; import runtime.gguf, which provides it")
    return _sources[0](name)


def _signs_of(packed: np.ndarray) -> np.ndarray:
    """Sign bits uint8 [..., n] -> +1 or -1, float32 [..., 8n]."""
    return 1 - 2 * f32(bits(packed))


def _even_signs() -> np.ndarray:
    """7 stored sign bits -> 8: the last one makes the number of minus signs even."""
    code = np.arange(128, dtype=np.uint8)
    parity = np.bitwise_xor.reduce(bits(code[:, None]), axis=-1)
    return code | parity << 7


_EVEN_SIGNS = _even_signs()


@decodes(dt.IQ4_NL, d=(F16_FIELD, 1), qs=(U8_FIELD, 16))
def _iq4_nl(block: np.ndarray) -> np.ndarray:
    return f32(block["d"]) * IQ4_LEVELS[nibbles(block["qs"])]


@decodes(dt.IQ4_XS, d=(F16_FIELD, 1), high=(U16_FIELD, 1), low=(U8_FIELD, 4), qs=(U8_FIELD, 128))
def _iq4_xs(block: np.ndarray) -> np.ndarray:
    low = fields(block["low"], 4, 2).reshape(-1, 8)
    high = fields(block["high"], 2, 8).reshape(-1, 8)
    scale = f32(block["d"]) * (f32(low | high << 4) - 32)
    return spread(scale, IQ4_LEVELS[nibbles(block["qs"].reshape(-1, 8, 16))])


@decodes(dt.IQ2_XXS, d=(F16_FIELD, 1), qs=(U32_FIELD, 16))
def _iq2_xxs(block: np.ndarray) -> np.ndarray:
    words = block["qs"].reshape(-1, 8, 2)
    codes, rest = fields(words[..., 0], 8, 4), words[..., 1]
    scale = f32(block["d"]) * (f32(rest >> 28) + np.float32(0.5)) * np.float32(0.25)
    signs = _signs_of(_EVEN_SIGNS[fields(rest, 7, 4)])
    return spread(scale, code_book("iq2_xxs")[codes].reshape(signs.shape) * signs)


@decodes(dt.IQ2_XS, d=(F16_FIELD, 1), qs=(U16_FIELD, 32), scales=(U8_FIELD, 8))
def _iq2_xs(block: np.ndarray) -> np.ndarray:
    codes, signs = block["qs"] & 511, _signs_of(_EVEN_SIGNS[block["qs"] >> 9])
    values = code_book("iq2_xs")[codes].reshape(signs.shape) * signs
    return spread(_quarter_scales(block), values)


@decodes(
    dt.IQ2_S,
    d=(F16_FIELD, 1),
    qs=(U8_FIELD, 32),
    signs=(U8_FIELD, 32),
    qh=(U8_FIELD, 8),
    scales=(U8_FIELD, 8),
)
def _iq2_s(block: np.ndarray) -> np.ndarray:
    codes = block["qs"] | fields(block["qh"], 2, 4).reshape(-1, 32).astype(np.uint16) << 8
    signs = _signs_of(block["signs"])
    return spread(_quarter_scales(block), code_book("iq2_s")[codes].reshape(signs.shape) * signs)


def _quarter_scales(block: np.ndarray) -> np.ndarray:
    """d * (0.5 + scale) / 4 for the 16 groups of IQ2_XS and IQ2_S."""
    scale = f32(fields(block["scales"], 4, 2).reshape(-1, 16))
    return f32(block["d"]) * (scale + np.float32(0.5)) * np.float32(0.25)


@decodes(dt.IQ3_XXS, d=(F16_FIELD, 1), qs=(U8_FIELD, 64), rest=(U32_FIELD, 8))
def _iq3_xxs(block: np.ndarray) -> np.ndarray:
    scale = f32(block["d"]) * (f32(block["rest"] >> 28) + np.float32(0.5)) * np.float32(0.5)
    signs = _signs_of(_EVEN_SIGNS[fields(block["rest"], 7, 4)])
    return spread(scale, code_book("iq3_xxs")[block["qs"]].reshape(signs.shape) * signs)


@decodes(
    dt.IQ3_S,
    d=(F16_FIELD, 1),
    qs=(U8_FIELD, 64),
    qh=(U8_FIELD, 8),
    signs=(U8_FIELD, 32),
    scales=(U8_FIELD, 4),
)
def _iq3_s(block: np.ndarray) -> np.ndarray:
    codes = block["qs"] | bits(block["qh"]).astype(np.uint16) << 8
    scale = f32(block["d"]) * (1 + 2 * f32(fields(block["scales"], 4, 2).reshape(-1, 8)))
    signs = _signs_of(block["signs"])
    return spread(scale, code_book("iq3_s")[codes].reshape(signs.shape) * signs)


@decodes(dt.IQ1_S, d=(F16_FIELD, 1), qs=(U8_FIELD, 32), qh=(U16_FIELD, 8))
def _iq1_s(block: np.ndarray) -> np.ndarray:
    qh = block["qh"]
    codes = block["qs"] | fields(qh, 3, 4).reshape(-1, 32) << 8
    scale = f32(block["d"]) * (2 * f32(qh >> 12 & 7) + 1)
    delta = np.where(qh >> 15, -_DELTA, _DELTA)[..., None]
    return spread(scale, code_book("iq1_s")[codes].reshape(-1, 8, 32) + delta)


@decodes(dt.IQ1_M, qs=(U8_FIELD, 32), qh=(U8_FIELD, 16), scales=(U16_FIELD, 4))
def _iq1_m(block: np.ndarray) -> np.ndarray:
    """The f16 scale of the block is spread over the top four bits of its four scale words."""
    words, qh = block["scales"], block["qh"]
    pieces = words >> 12 << np.arange(0, 16, 4, dtype=np.uint16)
    d = f32(np.bitwise_or.reduce(pieces, axis=-1).view(np.float16))
    scale = d[:, None] * (2 * f32(fields(words, 3, 4).reshape(-1, 16)) + 1)
    codes = block["qs"] | fields(qh, 3, 2, step=4).reshape(-1, 32).astype(np.uint16) << 8
    delta = np.where(fields(qh >> 3, 1, 2, step=4).reshape(-1, 32), -_DELTA, _DELTA)
    return spread(scale, code_book("iq1_s")[codes] + delta[..., None])

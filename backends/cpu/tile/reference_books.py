"""The code book formats in numpy: their blocks taken apart, and the planes of a packed block.

As `reference_formats` and `reference_planes` for the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from runtime.ops.codebooks import code_book

Array = np.ndarray[Any, Any]


def _half(b: Array) -> Array:
    return np.ascontiguousarray(b[..., :2]).view(np.float16).astype(np.float32)


def _view(b: Array, start: int, stop: int, kind: str) -> Array:
    """Bytes start..stop of every block as numbers of `kind`."""
    return np.ascontiguousarray(b[..., start:stop]).view(kind)


def _fields(words: Array, width: int, count: int, step: int = 0) -> Array:
    """`count` fields of `width` bits of every word, lowest first, `step` or `width` bits apart."""
    shifts = np.arange(count, dtype=words.dtype) * words.dtype.type(step or width)
    found = (words[..., None] >> shifts) & words.dtype.type((1 << width) - 1)
    return found.reshape(*words.shape[:-1], -1)


def _even_signs(seven: Array) -> Array:
    """Seven sign bits and the eighth that makes their number even."""
    bits = np.unpackbits(seven.astype(np.uint8)[..., None], axis=-1)
    return (seven | (bits.sum(-1) & 1) << 7).astype(np.uint8)


def parts(name: str, b: Array) -> dict[str, Array]:
    """Fields of blocks uint8 [..., bytes]: index, signs or down, scale, d."""
    return _PARTS[name](b)


def _iq2_xxs(b: Array) -> dict[str, Array]:
    words = _view(b, 2, 66, "<u4")
    index = _fields(words[..., ::2], 8, 4)
    rest = words[..., 1::2]
    signs = _even_signs(_fields(rest, 7, 4))
    return {"index": index, "signs": signs, "scale": rest >> 28, "d": _half(b)}


def _iq2_xs(b: Array) -> dict[str, Array]:
    words = _view(b, 2, 66, "<u2")
    signs = _even_signs(words >> 9)
    return {
        "index": words & 511,
        "signs": signs,
        "scale": _fields(b[..., 66:], 4, 2),
        "d": _half(b),
    }


def _iq2_s(b: Array) -> dict[str, Array]:
    index = b[..., 2:34] | _fields(b[..., 66:74], 2, 4).astype(np.uint16) << 8
    scale = _fields(b[..., 74:], 4, 2)
    return {"index": index, "signs": b[..., 34:66], "scale": scale, "d": _half(b)}


def _iq3_xxs(b: Array) -> dict[str, Array]:
    rest = _view(b, 66, 98, "<u4")
    signs = _even_signs(_fields(rest, 7, 4))
    return {"index": b[..., 2:66], "signs": signs, "scale": rest >> 28, "d": _half(b)}


def _iq3_s(b: Array) -> dict[str, Array]:
    index = b[..., 2:66] | _fields(b[..., 66:74], 1, 8).astype(np.uint16) << 8
    scale = _fields(b[..., 106:], 4, 2)
    return {"index": index, "signs": b[..., 74:106], "scale": scale, "d": _half(b)}


def _iq1_s(b: Array) -> dict[str, Array]:
    high = _view(b, 34, 50, "<u2")
    index = b[..., 2:34] | _fields(high, 3, 4) << 8
    down = np.repeat(high >> 15, 4, axis=-1)
    return {"index": index, "down": down, "scale": high >> 12 & 7, "d": _half(b)}


def _iq1_m(b: Array) -> dict[str, Array]:
    words, high = _view(b, 48, 56, "<u2"), _view(b, 32, 48, "<u2")
    d = ((words >> 12) << np.arange(0, 16, 4, dtype=np.uint16)).sum(-1, dtype=np.uint16)
    index = b[..., :32] | _fields(high, 3, 4, 4) << 8
    scale = _fields(words, 3, 4)
    d = d[..., None].view(np.float16).astype(np.float32)
    return {"index": index, "down": _fields(high >> 3, 1, 4, 4), "scale": scale, "d": d}


_PARTS = {
    "IQ1_S": _iq1_s,
    "IQ1_M": _iq1_m,
    "IQ2_XXS": _iq2_xxs,
    "IQ2_XS": _iq2_xs,
    "IQ2_S": _iq2_s,
    "IQ3_XXS": _iq3_xxs,
    "IQ3_S": _iq3_s,
}
_UNITS = {"IQ3_XXS": 0.25, "IQ3_S": 1.0}


def _decoded(name: str) -> Any:
    """The step of a format: codes with their offset, scales, no minima."""

    def step(b: Array) -> tuple[Any, ...]:
        part = parts(name, b)
        unit = np.float32(_UNITS.get(name, 0.125))
        scale = part["d"] * (2 * part["scale"].astype(np.float32) + 1) * unit
        levels = code_book(name.lower().replace("iq1_m", "iq1_s"))[part["index"]].astype(np.int32)
        if "down" in part:
            codes = 8 * levels + 16 + (1 - 2 * part["down"][..., None].astype(np.int32))
            return codes.reshape(*b.shape[:-1], 256), scale, None
        negative = _fields(part["signs"], 1, 8)
        levels = levels.reshape(*b.shape[:-1], 256)
        return 128 + np.where(negative, -levels, levels), scale, None

    return step


DECODE = {name: _decoded(name) for name in _PARTS}


def bytes_of(name: str, b: Array) -> list[tuple[str, Array]]:
    """The planes of packed blocks in order, each "words" or "bytes" or "pairs" of a row."""
    part = parts(name, b)
    index, scale = part["index"], part["scale"].astype(np.uint8)
    nibbles = scale[..., ::2] | scale[..., 1::2] << 4
    planes: list[tuple[str, Array]] = [("pairs", part["d"].astype(np.float16).view(np.uint8))]
    if name in ("IQ2_XXS", "IQ3_XXS", "IQ3_S"):
        planes.append(("words", nibbles))
    if name == "IQ2_XS":
        planes.append(("words", np.packbits(index >> 8, axis=-1, bitorder="little")))
    low, per = (index & 255).astype(np.uint8), index.shape[-1] // 8
    for i in range(8):
        planes.append(("words", low[..., per * i : per * (i + 1)]))
        if "signs" in part:
            planes.append(("words", part["signs"][..., 4 * i : 4 * i + 4]))
        planes += [
            (kind, values[..., at * i : at * (i + 1)])
            for kind, at, values in _tail(name, b, nibbles)
        ]
    return planes


def _tail(name: str, b: Array, nibbles: Array) -> list[tuple[str, int, Array]]:
    """What ends a chunk: (kind, bytes of each chunk, bytes of all chunks)."""
    if name == "IQ2_XS":
        return [("bytes", 1, nibbles)]
    if name == "IQ2_S":
        return [("bytes", 1, b[..., 66:74]), ("bytes", 1, nibbles)]
    if name == "IQ3_S":
        return [("bytes", 1, b[..., 66:74])]
    if name == "IQ1_S":
        return [("pairs", 2, b[..., 34:])]
    if name == "IQ1_M":
        scale = parts(name, b)["scale"].astype(np.uint8)
        return [("pairs", 2, b[..., 32:48]), ("bytes", 1, scale[..., ::2] | scale[..., 1::2] << 3)]
    return []

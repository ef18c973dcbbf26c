"""What a value becomes when it is stored in a KV cache type: the rounding, in numpy."""

from __future__ import annotations

import numpy as np

from runtime.ops.errors import OpError

KV_TYPES = ("f32", "f16", "bf16", "q8_0")


def round_to(x: np.ndarray, kv: str) -> np.ndarray:
    """x as a cache of type `kv` returns it; q8_0 rounds 32 values of the last axis together.

    The last of them may be fewer.
    """
    if kv not in _ROUND:
        raise OpError(f"KV type {kv!r} is not one of {', '.join(KV_TYPES)}")
    return _ROUND[kv](np.asarray(x, np.float32)).astype(x.dtype)


def _bf16(x: np.ndarray) -> np.ndarray:
    bits = x.view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) & np.uint32(0xFFFF0000)
    return rounded.view(np.float32)


def _f16(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # values past 65504 become infinite, as IEEE 754 says
        return x.astype(np.float16)


def _q8_0(x: np.ndarray) -> np.ndarray:
    """Blocks of 32 int8 with one float16 scale, as GGUF's Q8_0; zeros fill up the last."""
    filled = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 32)])
    blocks = filled.reshape(*x.shape[:-1], filled.shape[-1] // 32, 32)
    exact = np.abs(blocks).max(-1, keepdims=True) / np.float32(127)
    inverse = np.divide(1, exact, out=np.zeros_like(exact), where=exact > 0)
    quants = np.rint(blocks * inverse)
    rounded = quants * exact.astype(np.float16).astype(np.float32)
    return rounded.reshape(filled.shape)[..., : x.shape[-1]]


_ROUND = {"f32": lambda x: x, "f16": _f16, "bf16": _bf16, "q8_0": _q8_0}

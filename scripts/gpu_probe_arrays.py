"""Arrays of the probe's cases: random inputs, poisoned outputs, and how far from right they are."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from runtime.backends.cuda import layouts
from runtime.ops.dtypes import DTYPES


def random_blocks(rng: np.random.Generator, format: str, rows: int, k: int) -> np.ndarray:
    """GGUF blocks uint8 [rows, blocks, bytes]: any quants, scales near 1/100."""
    dtype = DTYPES[format.lower()]
    blocks = rng.integers(0, 256, (rows, k // dtype.block, dtype.nbytes), dtype=np.uint8)
    first, count = {"Q4_K": (0, 2), "Q6_K": (208, 1)}.get(format, (0, 1))
    scales = rng.uniform(0.005, 0.02, (*blocks.shape[:2], count)).astype(np.float16)
    blocks[..., first : first + 2 * count] = scales.view(np.uint8)
    return blocks


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32, standard normal."""
    return rng.standard_normal(shape, np.float32)


def unset(*shape: int) -> np.ndarray:
    """NaN where a kernel writes nothing."""
    return np.full(shape, np.nan, np.float32)


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """Root of the mean squared error over that of the expected values."""
    difference = found.astype(np.float64) - expected
    return float(np.sqrt((difference**2).mean() / max((expected**2).mean(), 1e-300)))


def farthest(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference."""
    return float(np.abs(found.astype(np.float64) - expected).max())


def differing(found: np.ndarray, expected: np.ndarray) -> float:
    """How many elements are not equal."""
    return float((found != expected).sum())


def result(expected: np.ndarray, packed: bool) -> tuple[dict[str, np.ndarray], Callable]:
    """Poisoned outputs, and what compares them: the values, or the codes they were rounded to."""
    if not packed:
        return {"out": unset(*expected.shape)}, lambda out: relative(out, expected)
    rows, blocks = expected.shape[0], expected.shape[1] // 32
    arrays = {
        "out": np.full((rows, 2, blocks, 16), 0xCD, np.uint8),
        "meta": np.full((rows, blocks, 2), 0xCDCDCDCD, np.uint32),
    }

    def codes(out: np.ndarray, meta: np.ndarray) -> float:
        """Largest distance from the expected values, in steps of the code."""
        peaks = np.abs(expected).reshape(rows, blocks, 32).max(2)
        steps = np.repeat(peaks / 127, 32, axis=1)
        sums = -out.view(np.int8).astype(np.int16).sum(3, dtype=np.int16).swapaxes(1, 2)
        wrong = differing(np.ascontiguousarray(sums).view(np.uint32)[..., 0], meta[..., 1])
        distance = np.abs(layouts.dequantized(out, meta) - expected) / steps
        return float(np.nan_to_num(distance, nan=np.inf).max()) + wrong

    return arrays, codes

"""The tensor-core tile on the simulator: tiles cut on both sides, an odd number of blocks."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_calls import error, random_blocks, simulate, unset, values


def _q8_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    quants = blocks[..., 2:].reshape(*blocks.shape[:2], 2, 16).swapaxes(1, 2)
    return np.ascontiguousarray(quants), np.ascontiguousarray(blocks[..., :2])


def _q4_0(blocks: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.ascontiguousarray(blocks[..., 2:]), np.ascontiguousarray(blocks[..., :2])


def _quantize(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pieces [columns, 2, n, 16], scales and negated sums [columns, n, 2], and what they mean."""
    blocks = x.reshape(len(x), -1, 2, 16)
    scales = np.abs(blocks).max((2, 3)) / np.float32(127)
    quants = np.rint(blocks / scales[..., None, None]).astype(np.int8)
    sums = -quants.astype(np.int16).sum(3, dtype=np.int16)
    meta = np.stack([scales.view(np.uint32), sums.view(np.uint32)[..., 0]], -1)
    values = (quants * scales[..., None, None].astype(np.float64)).reshape(len(x), -1)
    return np.ascontiguousarray(quants.swapaxes(1, 2)), meta, values


PACK = {"Q8_0": _q8_0, "Q4_0": _q4_0}
SHAPES = ((130, 70, 3), (9, 129, 5))
CASES = [
    pytest.param(format, shape, marks=() if one == other else pytest.mark.sweep)
    for one, format in enumerate(PACK)
    for other, shape in enumerate(SHAPES)
]


@pytest.mark.parametrize(("format", "shape"), CASES)
def test_tile_is_the_product(rng, format: str, shape: tuple[int, int, int]):
    rows, columns, n = shape
    weights = random_blocks(rng, format, rows, n)
    x = rng.standard_normal((columns, 32 * n)).astype(np.float32)
    packed, meta, meant = _quantize(x)
    stride = rows + rows % 2
    out = unset(columns + 1, stride)
    simulate(
        "tile", (-(-rows // 128), -(-columns // 128)), *PACK[format](weights), packed, meta, out,
        rows, columns, n, stride, constants={"format": format},
    )  # fmt: skip
    expected = meant @ values(weights, format).T
    assert error(out[:columns, :rows], expected) < 1e-6
    assert np.isnan(out[columns]).all() and np.isnan(out[:, rows:]).all()

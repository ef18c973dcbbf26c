"""Matrix-vector kernels on the simulator against float64: odd rows, odd lengths, 1 to 8 columns."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_calls import NO_NORM, error, random_blocks, simulate, unset, values

from runtime.backends.cuda import layouts
from runtime.backends.cuda.kernels.matvec import blocks_of
from runtime.ops.blocks import BLOCK_FORMATS


def _matvec(
    blocks: np.ndarray, x: np.ndarray, format: str, stride: int = 0,
    bias: np.ndarray | None = None, residual: np.ndarray | None = None, live: int = 8,
) -> np.ndarray:  # fmt: skip
    (rows, *_), (columns, inner) = blocks.shape, x.shape
    packed, cut, parts = layouts.quantize(x), layouts.cut(inner), layouts.parts(format, inner)
    out = unset(columns, stride or rows)
    width = layouts.columns_of(columns)
    nothing = np.zeros(1, np.float32)
    terms = (bias is not None) + 2 * (residual is not None)
    simulate(
        "matvec", (blocks_of(format, width, rows, cut.lanes), -(-columns // 8)),
        layouts.pack(blocks.reshape(-1), format, rows, inner), packed,
        nothing if bias is None else bias, nothing if residual is None else residual, out,
        np.array([live, 0], np.uint32), rows, columns, parts[""] // 16,
        *(parts.get(name, 0) // 4 for name in ("high", "scales", "supers")),
        cut.lanes.bit_length() - 1, cut.stretches, cut.length // 2, stride or rows, rows, terms,
        *NO_NORM,
        constants={"format": format, "columns": width},
    )  # fmt: skip
    return out[:, :rows]


def _weights(rng: np.random.Generator, format: str, rows: int, inner: int) -> np.ndarray:
    return random_blocks(rng, format, rows, -(-inner // BLOCK_FORMATS[format.lower()].block))


def _columns(rng: np.random.Generator, blocks: np.ndarray, format: str, columns: int) -> np.ndarray:
    k = blocks.shape[1] * BLOCK_FORMATS[format.lower()].block
    return rng.standard_normal((columns, k)).astype(np.float32)


@pytest.mark.parametrize("inner", [32, 64, 96, 256, 1056])
@pytest.mark.parametrize("format", layouts.FORMATS)
def test_matvec_is_the_product(rng, format: str, inner: int):
    """Every row and column of few; several rows to a warp, and stretches that are not full."""
    if BLOCK_FORMATS[format.lower()].block == 256 and inner % 256 and inner < 1056:
        pytest.skip("super-blocks")
    blocks = _weights(rng, format, 5, inner)
    x = _columns(rng, blocks, format, 1)
    expected = layouts.dequantized(layouts.quantize(x), x.shape[1]) @ values(blocks, format).T
    assert error(_matvec(blocks, x, format), expected) < 1e-6


@pytest.mark.parametrize("format", layouts.FORMATS)
def test_a_column_does_not_depend_on_the_others(rng, format: str):
    blocks = _weights(rng, format, 3, 256)
    x = _columns(rng, blocks, format, 8)
    together = _matvec(blocks, x, format)
    for columns in (1, 2, 4):
        np.testing.assert_array_equal(_matvec(blocks, x[:columns], format), together[:columns])

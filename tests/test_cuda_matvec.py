"""Matrix-vector kernels on the simulator against float64: odd rows, odd lengths, 1 to 8 columns."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_calls import error, random_blocks, simulate, unset, values

from runtime.backends.cuda import layouts
from runtime.backends.cuda.kernels.matvec import rows_of
from runtime.ops.blocks import BLOCK_FORMATS
from runtime.ops.errors import BackendError

PACK = {
    "Q8_0": layouts.pack_q8_0,
    "Q4_0": layouts.pack_q4_0,
    "Q4_K": layouts.pack_q4_k,
    "Q6_K": layouts.pack_q6_k,
}


def _blocks_of(format: str) -> int:
    """Blocks of 32 in a block of the file's format."""
    return BLOCK_FORMATS[format.lower()].block // layouts.BLOCK


def _matvec(blocks: np.ndarray, x: np.ndarray, format: str, stride: int = 0) -> np.ndarray:
    rows, columns = len(blocks), len(x)
    packed, meta = layouts.quantize(x)
    out = unset(columns, stride or rows)
    planes = PACK[format](blocks)
    grid = -(-rows // rows_of(format, columns))
    constants = {"format": format, "columns": columns}
    simulate(
        "matvec",
        grid,
        *planes,
        packed,
        meta,
        out,
        rows,
        packed.shape[2],
        stride or rows,
        constants=constants,
    )
    return out[:, :rows]


@pytest.mark.parametrize("format", PACK)
@pytest.mark.parametrize("shape", [(5, 3, 1), (3, 130, 1), (7, 5, 2), (1, 33, 4), (6, 2, 8)])
def test_matvec_is_the_product(rng, format: str, shape: tuple[int, int, int]):
    rows, n, columns = shape
    block = _blocks_of(format)
    n = -(-n // block)
    blocks = random_blocks(rng, format, rows, n)
    x = rng.standard_normal((columns, n * block * 32)).astype(np.float32)
    expected = layouts.dequantized(*layouts.quantize(x)) @ values(blocks, format).T
    assert error(_matvec(blocks, x, format), expected) < 1e-6


@pytest.mark.parametrize("format", PACK)
def test_a_column_does_not_depend_on_the_others(rng, format: str):
    n = 3
    blocks = random_blocks(rng, format, 4, n)
    x = rng.standard_normal((8, n * _blocks_of(format) * 32)).astype(np.float32)
    together = _matvec(blocks, x, format)
    for columns in (1, 2, 4):
        np.testing.assert_array_equal(_matvec(blocks, x[:columns], format), together[:columns])


def test_the_output_stride_is_kept(rng):
    blocks = random_blocks(rng, "Q8_0", 3, 2)
    x = rng.standard_normal((2, 64)).astype(np.float32)
    np.testing.assert_array_equal(_matvec(blocks, x, "Q8_0", stride=10), _matvec(blocks, x, "Q8_0"))


def test_packing_refuses_other_shapes():
    with pytest.raises(BackendError, match=r"uint8 \[rows, blocks, 34\], not uint8 \[2, 3, 18\]"):
        layouts.pack_q8_0(np.zeros((2, 3, 18), np.uint8))

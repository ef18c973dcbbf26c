"""The tensor-core tile on the simulator: tiles cut on both sides, an odd number of blocks."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_calls import error, random_blocks, simulate, unset, values

from runtime.backends.cuda import layouts

PACK = {"Q8_0": layouts.pack_q8_0, "Q4_0": layouts.pack_q4_0}


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
    packed, meta = layouts.quantize(x)
    stride = rows + rows % 2
    out = unset(columns + 1, stride)
    simulate(
        "tile", (-(-rows // 128), -(-columns // 128)), *PACK[format](weights), packed, meta, out,
        rows, columns, n, stride, constants={"format": format},
    )  # fmt: skip
    expected = layouts.dequantized(packed, meta) @ values(weights, format).T
    assert error(out[:columns, :rows], expected) < 1e-6
    assert np.isnan(out[columns]).all() and np.isnan(out[:, rows:]).all()

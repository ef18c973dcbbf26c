"""Products of many columns on tensor cores: bit for bit those of one column, for every format.

Whole backends, the kernels at once in numpy; a few points in the simulator, which finds races.
"""

from __future__ import annotations

import numpy as np
import pytest
from cuda_models import fake_cuda
from stored_tensors import Stored, file_of
from tile_calls import random_rows

from runtime import ops
from runtime.backends.cuda.kernels.tile_ends import WIDTHS
from runtime.backends.cuda.layouts import FLOATS, FORMATS
from runtime.backends.cuda.widths import group_width, tile_width
from runtime.ops.dtypes import DTYPES, F32
from runtime.ops.quants import dequantize

ROWS = 37
EVERY = (*FORMATS, *FLOATS)
_RACED = ("Q2_K", "F16", "F32")  # the others differ from them in one part


@pytest.fixture(autouse=True)
def tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of more than 8 columns always, narrow ones."""
    monkeypatch.setattr(
        "runtime.backends.cuda.rules.matmul.tile_width", lambda columns, _: 32 * (columns > 8)
    )


def _weight(format: str, *shape: int) -> Stored:
    *_, inner = shape
    dtype = DTYPES[format.lower()]
    raw = random_rows(format, int(np.prod(shape[:-1])), inner)
    return Stored(dequantize(raw.reshape(-1), dtype, shape), raw, dtype)


class Product:
    """x w + bias + residual on a backend, for any number of tokens."""

    def __init__(self, format: str, inner: int, quick: bool = True, rows: int = ROWS) -> None:
        rng = np.random.default_rng(2)
        self.inner, self.rows = inner, rows
        bias = rng.standard_normal(rows).astype(np.float32)
        self.w = _weight(format, rows, inner)
        self.tensors = {"w": self.w, "bias": Stored(bias, bias.view(np.uint8), F32)}
        self.backend = fake_cuda(file_of(self.tensors), quick=quick)

    def __call__(self, x: np.ndarray, residual: np.ndarray, room: int = 0) -> np.ndarray:
        tokens = ops.Dim("tokens", len(x) + room)
        w = ops.weight("w", (self.rows, self.inner), self.w.dtype)
        bias = ops.weight("bias", (self.rows,), F32)
        given = ops.step_input("x", (tokens, self.inner), F32)
        added = ops.step_input("r", (tokens, self.rows), F32)
        y = ops.add(ops.add(ops.matmul(given, w), bias), added)
        program = self.backend.program(ops.Graph((y,)))
        inputs = {"x": _filled(x, room), "r": _filled(residual, room)}
        (found,) = program.run(inputs, {"tokens": len(x)})
        return np.array(found)

    def numbers(self, tokens: int) -> tuple[np.ndarray, np.ndarray]:
        rng = np.random.default_rng(3)
        shapes = ((tokens, self.inner), (tokens, self.rows))
        x, residual = (rng.standard_normal(shape).astype(np.float32) for shape in shapes)
        return x, residual


def _filled(x: np.ndarray, room: int) -> np.ndarray:
    return np.pad(x, ((0, room), (0, 0)), constant_values=np.nan)


@pytest.mark.parametrize("format", EVERY)
def test_columns_of_a_tile_have_the_bits_of_one_column(format: str):
    """Tiles cut on both sides, with room for more; several stretches, the last one short."""
    product = Product(format, 768 if DTYPES[format.lower()].block == 256 else 13 * 32)
    x, residual = product.numbers(9)
    together = product(x, residual, room=5)
    for n in (0, 8):
        alone = product(x[n : n + 1], residual[n : n + 1])
        np.testing.assert_array_equal(together[n], alone[0])
    product.backend.close()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("format", ["Q8_0", "Q4_K", "Q6_K", *FLOATS])
def test_tiles_of_all_widths_agree(format: str, width: int, monkeypatch: pytest.MonkeyPatch):
    """Two tiles of columns and of rows; an even number of rows, which are stored in pairs."""
    product = Product(format, 256, rows=130)
    x, residual = product.numbers(width + 3)
    eight = product(x[-8:], residual[-8:])
    monkeypatch.setattr("runtime.backends.cuda.rules.matmul.tile_width", lambda *_: width)
    np.testing.assert_array_equal(product(x, residual)[-8:], eight)
    product.backend.close()


@pytest.mark.parametrize(
    "format",
    [*_RACED, *(pytest.param(f, marks=pytest.mark.sweep) for f in EVERY if f not in _RACED)],
)
def test_a_tile_races_with_nothing(format: str):
    inner = {"F32": 72, "F16": 136}.get(format, 256)  # at least three stages
    product = Product(format, inner, quick=False, rows=9)
    x, residual = product.numbers(9)
    quick = Product(format, inner, rows=9)
    np.testing.assert_array_equal(product(x, residual), quick(x, residual))
    product.backend.close()
    quick.backend.close()


def test_tiles_are_as_wide_as_their_columns_are_many():
    assert tile_width(8, 1 << 20) == 0 and tile_width(16, 4096) == 0, "turns of 8 columns"
    assert tile_width(33, 64) == 32 and tile_width(2048, 4096) == 128
    assert group_width(72, 128) == 32 and group_width(4096, 8) == 128

"""Rows of every block format on the simulator, bit for bit, and kernels on rows that lie apart."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_calls import NO_NORM, error, simulate, unset

import runtime.gguf  # noqa: F401  it has the code books
from runtime.backends.cuda.kernels.blocks import book_words
from runtime.ops.blocks import BLOCK_FORMATS, BlockFormat
from runtime.ops.delta import softplus as softplus_op
from runtime.ops.dtypes import DTYPES
from runtime.ops.quants import dequantize


def _random(row: BlockFormat, blocks: int) -> np.ndarray:
    """uint8 [blocks, bytes]: any bytes, but no scale that is no number."""
    rng = np.random.default_rng(1)
    raw = rng.integers(0, 256, (blocks, row.nbytes), np.uint8)
    for field in row.fields.values():
        if field.kind in ("f2", "f4"):
            values = rng.uniform(0.01, 0.02, (blocks, field.length)).astype(f"<{field.kind}")
            raw[:, field.offset :][:, : values.nbytes // blocks] = values.view(np.uint8)
    return raw


@pytest.mark.parametrize("format", BLOCK_FORMATS)
def test_rows_of_every_format(format: str):
    row = BLOCK_FORMATS[format]
    raw = _random(row, 3)
    want = dequantize(raw.reshape(-1), DTYPES[format], (3, row.block))[[2, 0]]
    book = [book_words(row.book)] if row.book else []
    out, ids = unset(2, row.block), np.array([2, 0], np.int32)
    grid = (-(-row.block // 128), 2)
    simulate(
        "get_rows", grid, raw, *book, ids, out, row.block, row.nbytes, constants={"format": format}
    )
    np.testing.assert_array_equal(out, want)


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4"])
def test_every_scale_of_a_byte(format: str):
    row, codes = BLOCK_FORMATS[format], np.arange(256, dtype=np.uint8)
    raw = _random(row, 256)
    first = next(iter(row.fields.values()))
    raw[:, : first.length] = codes[:, None]
    want = dequantize(raw.reshape(-1), DTYPES[format], (256, row.block))
    out, ids = unset(256, row.block), np.arange(256, dtype=np.int32)
    call = raw, ids, out, row.block, row.nbytes
    simulate("get_rows", (1, 256), *call, constants={"format": format})
    np.testing.assert_array_equal(out, want)


def test_softplus_of_small_and_large():
    x = np.array([-100, -87, -20, -5, -1e-3, 0, 1e-3, 1, 20, 88, 1000], np.float32)
    out = unset(len(x))
    call = x, out, len(x), len(x), len(x), 0, 0
    simulate("unary", 1, *call, constants={"op": "softplus"})
    want = softplus_op.reference(x.astype(np.float64))
    assert (abs(out - want) <= 2e-6 * want + 1e-43).all()


@pytest.mark.parametrize(
    ("terms", "own"), [((), True), (("shared",), False), (("gate", "add"), True)]
)
def test_expert_sum(rng, terms: tuple[str, ...], own: bool):
    rows, k, n = 2, 3, 130
    y, weights = rng.standard_normal((rows, k, n)), rng.random((rows, k))
    ids = np.array([[0, -1, 2], [-1, -1, -1]], np.int32)
    shared, gate, add = (rng.standard_normal((rows, n + 2)) for _ in range(3))
    out, has = (
        unset(rows, n),
        [int(own), int(bool(terms)), int("gate" in terms), int("add" in terms)],
    )
    arrays = [a.astype(np.float32) for a in (y, weights, shared, gate, add)]
    call = *arrays[:2], ids, *arrays[2:], out, n, k, n + 2, n + 2, n + 2, *has, *NO_NORM
    simulate("expert_sum", (2, rows), *call)
    kept = np.where(ids[..., None] < 0, 0, 1) if own else 1
    want = (y * weights[..., None] * kept).sum(1)
    if terms:
        want = want + shared[:, :n] * (1 / (1 + np.exp(-gate[:, :1])) if has[2] else 1)
    want = want + (add[:, :n] if has[3] else 0)
    assert error(out, want) < 3e-7

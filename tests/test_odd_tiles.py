"""Packing and matmul tiles at odd sizes: rows 1..40, every inner size, tokens that fill no tile.

Guard pages stand behind all memory, then before it, and every result has the reference's bits.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import tile_calls as tiles
from kernel_calls import at_the_front
from tile_calls import FLOATS, ISAS, QUANTISED, matmul, packed, random_rows
from tile_reference import matmul_f32, matmul_int8, matmul_split

from runtime.backends.cpu.compile.isa import isa
from runtime.backends.cpu.tile.formats import format_of
from runtime.backends.cpu.tile.spec import TileSpec

REFERENCES = {"int8": matmul_int8, "f32": matmul_f32, "split": matmul_split}
ROWS = range(1, 41)


def sizes(spec: TileSpec) -> list[tuple[int, int, int]]:
    """Tokens, rows and inner sizes: every number of rows, every remainder of 64 that there is."""
    step = format_of(spec.format).block if spec.format in QUANTISED else 1
    step = 32 if spec.coding == "split" else step
    inner = range(step, step * 3 + 1, step) if step > 1 else range(1, 65)
    count = max(len(ROWS), len(inner))
    pairs = zip(itertools.cycle(ROWS), itertools.cycle(inner), range(count), strict=False)
    return [(1 + i * 5 % (2 * spec.columns + 1), n, k) for n, k, i in pairs]


def result(spec: TileSpec, isa_name: str, shape: tuple[int, int, int]) -> tuple[np.ndarray, ...]:
    """What the kernels give, bias and residual included, and what the reference does."""
    n_tokens, n_rows, n_inner = shape
    rng = np.random.default_rng(n_rows)
    raw = random_rows(spec.format, n_rows, n_inner, seed=n_rows)
    x = rng.standard_normal((n_tokens, n_inner)).astype(np.float32)
    bias = rng.standard_normal(n_rows).astype(np.float32)
    add = rng.standard_normal((n_tokens, n_rows)).astype(np.float32)
    weights = packed(spec.format, raw, n_inner, isa_name)
    buffer, held = tiles.activations(spec, x)
    got = matmul(spec, isa_name, weights, buffer, shape, bias=bias, add=add, n_threads=2)
    want = REFERENCES[spec.coding](spec.format, raw, *held, fma=isa(isa_name).has_fma)
    return got, (want + bias) + add


def check(spec: TileSpec, isa_name: str) -> None:
    for shape in sizes(spec):
        got, want = result(spec, isa_name, shape)
        np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32), err_msg=str(shape))
        with at_the_front():
            again, _ = result(spec, isa_name, shape)
        assert again.tobytes() == got.tobytes()


def specs(name: str, isa_name: str) -> list[TileSpec]:
    """All tiles of a format on a processor."""
    found = [TileSpec(name, columns, "f32") for columns in (1, 4, 8)]
    if name in QUANTISED:
        wide = (1, 4, 8, 16) if isa_name == "amx" else (1, 4, 8)
        found += [TileSpec(name, columns, "int8") for columns in wide]
    elif name == "BF16" and isa_name == "amx":
        found += [TileSpec(name, columns, "split") for columns in (1, 4, 8, 16)]
    return found


@pytest.mark.parametrize("columns", [1, 8])
@pytest.mark.parametrize("name", FLOATS)
def test_float_tiles(name: str, columns: int) -> None:
    check(TileSpec(name, columns, "f32"), ISAS[0])


@pytest.mark.parametrize("columns", [1, 8])
@pytest.mark.parametrize("name", ["Q4_0", "Q2_0", "Q1_0"])
def test_quantised_tiles(name: str, columns: int) -> None:
    check(TileSpec(name, columns, "int8"), ISAS[0])


@pytest.mark.sweep
@pytest.mark.parametrize("name", FLOATS + QUANTISED)
@pytest.mark.parametrize("isa_name", ISAS)
def test_every_format_on_every_processor(isa_name: str, name: str) -> None:
    for spec in specs(name, isa_name):
        check(spec, isa_name)

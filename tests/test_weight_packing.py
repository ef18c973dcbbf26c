"""Packed weights: the kernels against the numpy layouts, byte for byte, and their sizes."""

from __future__ import annotations

import numpy as np
import pytest
from tile_calls import FLOATS, QUANTISED, Guarded, call, pack_kernel, packed, random_rows
from tile_packs import pack_weights
from tile_reference import decode, dequantised

from runtime.backends.cpu.compile.isa import available
from runtime.backends.cpu.tile.formats import format_of, packed_nbytes
from runtime.errors import Error
from runtime.ops.dtypes import DTYPES
from runtime.ops.quants import dequantize

EVERY = QUANTISED + FLOATS
ISAS = (available()[0], "generic")


def lengths(name: str) -> tuple[int, ...]:
    if format_of(name).is_float:
        return (1, 7, 32)
    block = format_of(name).block
    return (block, 2 * block) if block > 32 else (32, 96)


@pytest.mark.parametrize("isa_name", ISAS)
@pytest.mark.parametrize("name", EVERY)
def test_pack_kernel_gives_the_layout(name: str, isa_name: str) -> None:
    for n_inner in lengths(name):
        for n_rows in (1, 15, 16, 17, 40):
            raw = random_rows(name, n_rows, n_inner)
            for n_threads in (1, 3):
                got = packed(name, raw, n_inner, isa_name, n_threads)
                np.testing.assert_array_equal(got.bytes, pack_weights(name, raw))


@pytest.mark.parametrize("name", EVERY)
def test_several_matrices_and_wide_rows(name: str) -> None:
    """Experts: matrices apart by any distance, source rows too."""
    n_inner, n_rows, n_matrices = lengths(name)[-1], 20, 3
    raw = random_rows(name, n_rows * n_matrices, n_inner).reshape(n_matrices, n_rows, -1)
    wide = np.full((n_matrices, n_rows + 1, raw.shape[2] + 8), 0x7F, np.uint8)
    wide[:, :n_rows, : raw.shape[2]] = raw
    step = packed_nbytes(name, n_rows, n_inner) + 64
    goal = Guarded(n_matrices * step)
    args = [wide.ctypes.data, goal.address, n_rows, n_inner, wide.shape[2]]
    args += [n_matrices, wide.strides[0], step]
    call(pack_kernel(name, available()[0]), args, 2)
    goal.check()
    for got, rows in zip(goal.bytes.reshape(n_matrices, step), raw, strict=True):
        np.testing.assert_array_equal(got[:-64], pack_weights(name, rows))
        assert (got[-64:] == 0xFF).all()


@pytest.mark.parametrize("name", EVERY)
def test_packing_grows_a_matrix_by_at_most_a_sixteenth(name: str) -> None:
    layout, n_inner = format_of(name), 4096
    source = n_inner // layout.block * layout.source_bytes * 1024
    assert packed_nbytes(name, 1024, n_inner) <= 17 / 16 * source


@pytest.mark.parametrize("name", QUANTISED)
def test_reference_reads_blocks_as_gguf_does(name: str) -> None:
    """Codes, scales and minima against the dequantisation that test_quants.py holds to gguf's."""
    raw = random_rows(name, 5, 512)
    want = dequantize(raw, DTYPES[name.lower()], (5, 512))
    np.testing.assert_allclose(dequantised(name, raw), want, rtol=2e-6, atol=1e-7)
    parts = decode(name, raw)
    assert parts.codes.shape == (5, 512)
    assert (parts.minimum is not None) == format_of(name).minimum


def test_lengths_that_cut_a_block_are_refused() -> None:
    with pytest.raises(Error, match=r"Q4_K.*300.*256"):
        packed_nbytes("Q4_K", 16, 300)
    with pytest.raises(Error, match=r"no matmul tile.*Q8_1"):
        packed_nbytes("Q8_1", 16, 256)

"""Element types and dequantisation, against the gguf package's numpy implementation."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

import runtime.gguf  # noqa: F401  (provides the code books)
from runtime.errors import FileError, ModelError, OpError
from runtime.ops import codebooks
from runtime.ops.blocks import BLOCK_FORMATS, BlockFormat, count_of
from runtime.ops.codebooks import code_book
from runtime.ops.dtypes import DTYPES, F16, F32, Q4_K, Q8_0, from_gguf, nbytes_for
from runtime.ops.quants import dequantize

TYPES = list(GGMLQuantizationType)
# what the gguf package can decode; the others are tested by hand below
DECODABLE = [kind for kind in TYPES if kind in gguf.quants._type_traits or kind < 2]
ROWS = 24


def random_blocks(name: str, rows: int = ROWS, blocks: int = 5) -> np.ndarray:
    dtype = DTYPES[name]
    seed = sum(name.encode())
    return np.random.default_rng(seed).integers(0, 256, (rows, blocks * dtype.nbytes), np.uint8)


@pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)
def test_sizes_are_those_of_the_gguf_package(kind: GGMLQuantizationType) -> None:
    dtype = from_gguf(int(kind))
    assert dtype.name == kind.name.lower() and dtype is DTYPES[dtype.name]
    if dtype.name != "q8_1":  # gguf-py counts its two f16 scales as f32
        assert (dtype.block, dtype.nbytes) == GGML_QUANT_SIZES[kind]
    assert (dtype.numpy is None) == (dtype.block > 1)


@pytest.mark.parametrize("kind", DECODABLE, ids=lambda kind: kind.name)
def test_values_are_equal_bit_for_bit(kind: GGMLQuantizationType) -> None:
    """Random bytes reach every code, scale and sign, infinities and NaN included."""
    dtype = from_gguf(int(kind))
    raw = random_blocks(dtype.name)
    found = dequantize(raw, dtype, (ROWS, 5 * dtype.block))
    assert found.dtype == np.float32 and found.shape == (ROWS, 5 * dtype.block)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, kind).astype(np.float32)
    assert np.array_equal(np.isnan(found), np.isnan(expected))
    same = found.view(np.uint32) == expected.view(np.uint32)
    assert (same | np.isnan(expected)).all()


@pytest.mark.parametrize("row", BLOCK_FORMATS.values(), ids=lambda row: row.name)
def test_a_row_describes_every_element_and_group(row: BlockFormat) -> None:
    entry = code_book(row.book).shape[1] if row.book else 1
    assert count_of(row.codes, row) * entry == row.block
    for scale in filter(None, (row.scale, row.minimum)):
        groups = count_of(scale.steps, row) if scale.steps else 1
        assert row.block % groups == 0 and row.block // groups >= 16
    if row.signs:
        assert count_of(row.signs, row) == row.block // 8 and row.signs.width in (7, 8)


@pytest.mark.parametrize("name", ["i8", "i16", "i32", "i64", "f64"])
def test_plain_numbers(name: str) -> None:
    values = np.array([0, 1, -3, 100], DTYPES[name].numpy)
    assert dequantize(values, DTYPES[name], (2, 2)).tolist() == [[0, 1], [-3, 100]]


def test_formats_the_gguf_package_cannot_decode() -> None:
    half = np.array([0.5], "<f2").tobytes()
    q1 = half + bytes([0b00000101]) + bytes(15)
    assert dequantize(np.frombuffer(q1, np.uint8), DTYPES["q1_0"], (128,)).tolist() == [
        0.5, -0.5, 0.5, *[-0.5] * 125
    ]  # fmt: skip
    q2 = half + bytes([0b11100100]) + bytes([0b01010101] * 15)
    assert dequantize(np.frombuffer(q2, np.uint8), DTYPES["q2_0"], (64,)).tolist() == [
        -0.5, 0.0, 0.5, 1.0, *[0.0] * 60
    ]  # fmt: skip
    codes = np.arange(-16, 16, dtype=np.int8)
    q8_1 = np.frombuffer(half + half + codes.tobytes(), np.uint8)
    assert np.array_equal(dequantize(q8_1, DTYPES["q8_1"], (32,)), codes / 2)
    codes = np.arange(-128, 128, dtype=np.int8)
    q8_k = np.frombuffer(np.array([0.25], "<f4").tobytes() + codes.tobytes() + bytes(32), np.uint8)
    assert np.array_equal(dequantize(q8_k, DTYPES["q8_k"], (256,)), codes / 4)


@pytest.mark.parametrize("name", ["q4_0", "q6_k", "iq2_xs", "bf16", "f32"])
def test_any_number_of_rows_gives_the_same_values(name: str) -> None:
    """Longer than one step of the decoder, and cut anywhere."""
    dtype = DTYPES[name]
    blocks = 300_000 // dtype.block
    raw = random_blocks(name, rows=1, blocks=blocks)[0]
    whole = dequantize(raw, dtype, (blocks * dtype.block,)).view(np.uint32)
    cut = blocks // 3
    parts = [raw[: cut * dtype.nbytes], raw[cut * dtype.nbytes :]]
    joined = np.concatenate([dequantize(p, dtype, (p.size // dtype.nbytes * dtype.block,))
                             for p in parts])  # fmt: skip
    assert np.array_equal(whole, joined.view(np.uint32))


def test_quantised_values_come_back_near() -> None:
    values = np.random.default_rng(1).standard_normal((4, 96)).astype(np.float32)
    raw = gguf.quants.quantize(values, GGMLQuantizationType.Q8_0)
    assert np.abs(dequantize(raw, Q8_0, (4, 96)) - values).max() < 0.02


def test_out_is_filled() -> None:
    raw = random_blocks("q8_0")
    out = np.full((ROWS, 160), np.nan, np.float32)
    assert dequantize(raw, Q8_0, (ROWS, 160), out) is out
    assert np.array_equal(out, dequantize(raw, Q8_0, (ROWS, 160)), equal_nan=True)


@pytest.mark.parametrize(
    "out",
    [np.empty((2, 64)), np.empty((64, 2), np.float32), np.empty((2, 128), np.float32)[:, ::2]],
)
def test_a_wrong_out_is_refused(out: np.ndarray) -> None:
    with pytest.raises(OpError, match=r"out must be contiguous float32 \[2, 64\]"):
        dequantize(np.zeros(2 * 2 * 34, np.uint8), Q8_0, (2, 64), out)


def test_wrong_sizes_are_refused() -> None:
    with pytest.raises(OpError, match=r"q8_0 \[2, 32\] takes 68 bytes, 67 given"):
        dequantize(np.zeros(67, np.uint8), Q8_0, (2, 32))
    with pytest.raises(OpError, match=r"last axis of shape \(4, 100\) must be a multiple of 256"):
        nbytes_for(Q4_K, (4, 100))
    with pytest.raises(OpError, match="multiple of 32"):
        nbytes_for(Q8_0, ())
    with pytest.raises(OpError, match="negative"):
        nbytes_for(F32, (-1, 4))


def test_bytes_of_shapes() -> None:
    assert [nbytes_for(F32, ()), nbytes_for(F16, (3, 5)), nbytes_for(Q4_K, (2, 512))] == [
        4,
        30,
        576,
    ]
    assert nbytes_for(Q8_0, (0, 32)) == nbytes_for(Q8_0, (7, 0)) == 0


def test_an_unknown_type_names_the_number_and_what_is_supported() -> None:
    with pytest.raises(
        FileError, match=r"unknown tensor type 31; supported types: f32 \(0\), .*q6_k"
    ):
        from_gguf(31)


def test_a_missing_code_book_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codebooks, "_sources", [])
    with pytest.raises(ModelError, match="iq2_s needs its code book"):
        dequantize(random_blocks("iq2_s"), DTYPES["iq2_s"], (ROWS, 1280))

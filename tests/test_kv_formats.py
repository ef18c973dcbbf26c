"""Cache types: rows as declared against other sources, and rows that nobody ships."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest

import runtime
from runtime import ops
from runtime.backends.cpu.pages import from_plain, from_planes, to_plain, to_planes
from runtime.ops.cost import page_nbytes
from runtime.ops.dtypes import F16, U8
from runtime.ops.kv_formats import GROUP, KV_FORMATS, KVFormat, Plane, in_groups, kv_format

SIZES = {"f32": (256, 192), "f16": (128, 96), "bf16": (128, 96), "q8_0": (68, 52)}  # heads 64, 40
ODD_HEADS = (1, 16, 33, 40, 64, 100)


@pytest.mark.parametrize("kv", KV_FORMATS)
def test_bytes_of_a_token(kv: str):
    if kv in SIZES:
        assert (kv_format(kv).token_nbytes(64), kv_format(kv).token_nbytes(40)) == SIZES[kv]
    assert kv_format(kv).dtype is ops.DTYPES[kv]
    assert kv_format(kv).token_nbytes(64) == 64 // ops.DTYPES[kv].block * ops.DTYPES[kv].nbytes


@pytest.mark.parametrize("dim", ODD_HEADS)
@pytest.mark.parametrize("kv", KV_FORMATS)
def test_what_was_rounded_is_kept(rng: np.random.Generator, kv: str, dim: int):
    x = rng.standard_normal((50, dim)) * 10.0 ** rng.integers(-20, 5, (50, 1))
    once = kv_format(kv).rounded(x)
    assert once.dtype == x.dtype and once.shape == x.shape
    np.testing.assert_array_equal(kv_format(kv).rounded(once), once)


def test_q8_0_is_that_of_gguf(rng: np.random.Generator):
    x = rng.standard_normal((100, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType.Q8_0
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    np.testing.assert_array_equal(kv_format("q8_0").rounded(x), theirs)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kv", KV_FORMATS)
def test_what_is_not_finite_stays_so(kv: str, bad: float):
    x = np.ones((2, 64), np.float32)
    x[0, 5] = bad
    kept = kv_format(kv).rounded(x)
    assert not np.isfinite(kept[0, 5]) and np.isfinite(kept[1]).all()


BOOK = np.array([-120, -99, -80, -62, -47, -33, -20, -9, 2, 14, 27, 41, 57, 75, 96, 120], "f4")


def _encode(x: np.ndarray) -> tuple[np.ndarray, ...]:
    groups = in_groups(x)
    scale = (np.abs(groups).max(-1, keepdims=True) / np.float32(120)).astype(np.float16)
    steps = np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0)
    nearest = np.abs(steps[..., None] - BOOK).argmin(-1).astype(np.uint8)
    codes = nearest.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]
    return codes[..., ::2] | codes[..., 1::2] << 4, scale[..., 0]


def _widen(pairs: np.ndarray) -> np.ndarray:
    return BOOK[np.stack([pairs & 15, pairs >> 4], -1).reshape(*pairs.shape[:-1], -1)]


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> KVFormat:
    """A type of 4-bit codes of a book, two of them in a byte."""
    row = KVFormat(
        "book4", (Plane("pairs", U8, 2),), _encode, _widen, (Plane("scales", F16, GROUP),)
    )
    monkeypatch.setitem(KV_FORMATS, "book4", row)
    return row


@pytest.mark.parametrize("dim", ODD_HEADS)
@pytest.mark.parametrize("which", ["k", "v"])
def test_pages_of_packed_codes(rng: np.random.Generator, book: KVFormat, which: str, dim: int):
    leaf = ops.state("cache", (3, ops.PAGE, 2, dim), book.dtype, which)
    plain = book.rounded(rng.standard_normal((3, ops.PAGE, 2, dim)).astype(np.float32))
    memory = from_plain(plain, leaf)
    assert memory.shape == (3, page_nbytes(leaf))
    assert page_nbytes(leaf) == 2 * 32 * (-(-dim // 16) * 8 + -(-dim // 32) * 2)
    np.testing.assert_array_equal(to_plain(memory, leaf), plain)
    np.testing.assert_array_equal(from_planes(to_planes(memory, leaf), leaf), memory)


def test_a_model_runs_with_a_further_type(book: KVFormat):
    """On the reference; on the null device its pages are counted."""
    ids = [1, 5, 9, 2, 7, 7, 30]
    exact, found = (
        runtime.load(devices="reference", kv_type=kv, context=64).eval(ids)
        for kv in ("f32", "book4")
    )
    error = ((found - exact) ** 2).sum() / (exact**2).sum()
    assert 1e-6 < error < 0.05
    pages = [
        runtime.load(devices="null", kv_type=kv, context=64).memory().page
        for kv in ("q8_0", "book4")
    ]
    assert pages[1] * 34 == pages[0] * 18
    with pytest.raises(runtime.Error, match=r"one of f32, f16, .*book4"):
        runtime.load(kv_type="book5")


def _program(rounding: str) -> str:
    program = Path(__file__).with_name("kv_program.py")
    command = [sys.executable, str(program), "\n".join([str(program.parent), *sys.path]), rounding]
    return subprocess.run(command, capture_output=True, text=True).stderr


def test_minima_on_the_kernels_of_the_cpu():
    """A type of a row and its rounding, both given at run time, through store and attention."""
    assert _program("rounding") == ""


def test_what_a_row_lacks_in_kernels_is_named():
    assert "'q8_m' has no rounding: add it to _ROUND in " in _program("")
    assert "'q8_m' keeps its values in " in _program("packed")

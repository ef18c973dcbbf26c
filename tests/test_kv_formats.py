"""Cache types: rows as declared against other sources, and rows that nobody ships."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import gguf
import kv_program
import numpy as np
import pytest

import runtime
from runtime import ops
from runtime.backends.cpu.pages import from_plain, from_planes, to_plain, to_planes
from runtime.ops.cost import page_nbytes
from runtime.ops.kv_formats import HEAD_UNIT, KV_FORMATS, KVFormat, fill, kv_format

SIZES = {  # heads of 64 and 40
    **{"f32": (256, 192), "f16": (128, 96), "bf16": (128, 96), "q8_0": (68, 52), "q6_0": (52, 52)},
    **{"q5_1": (48, 48), "q5_0": (44, 44), "q4_1": (40, 40), "q4_0": (36, 36), "iq4_nl": (36, 36)},
}
GGUF = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
ODD_HEADS = (1, 16, 33, 40, 64, 100)


def test_bytes_of_a_token():
    for kv, (whole, odd) in SIZES.items():
        assert (kv_format(kv).token_nbytes(64), kv_format(kv).token_nbytes(40)) == (whole, odd)
        if kv in ops.DTYPES:
            assert kv_format(kv).dtype is ops.DTYPES[kv]
            assert whole == 64 // ops.DTYPES[kv].block * ops.DTYPES[kv].nbytes
    assert list(SIZES) == list(KV_FORMATS)
    f16 = kv_format("f16").token_nbytes(128)
    assert kv_format("q8_0").token_nbytes(128) / f16 == 0.53125  # the figures people know
    assert kv_format("q4_0").token_nbytes(128) / f16 == 0.28125


@pytest.mark.parametrize("dim", ODD_HEADS)
@pytest.mark.parametrize("kv", KV_FORMATS)
def test_what_was_rounded_is_kept(rng: np.random.Generator, kv: str, dim: int):
    x = rng.standard_normal((50, dim)) * 10.0 ** rng.integers(-4, 4, (50, 1))
    once = kv_format(kv).rounded(x)
    assert once.dtype == x.dtype and once.shape == x.shape
    again, lost = kv_format(kv).rounded(once), np.abs(once - x).max(-1, keepdims=True)
    assert (np.abs(again - once) <= 1.5 * lost).all()  # of whole groups nearly always nothing
    if dim % 32 == 0:
        assert (again == once).all(-1).mean() > 0.9


@pytest.mark.parametrize("dim", ODD_HEADS)
@pytest.mark.parametrize("kv", KV_FORMATS)
def test_rows_are_exactly_what_was_kept(rng: np.random.Generator, kv: str, dim: int):
    x = rng.standard_normal((7, 3, dim)).astype(np.float32)
    planes = kv_format(kv).encode(fill(x, HEAD_UNIT))
    rows = kv_format(kv).to_rows(planes)
    assert rows.shape == (7, 3, kv_format(kv).token_nbytes(dim))
    for plane, again in zip(planes, kv_format(kv).from_rows(rows, dim), strict=True):
        np.testing.assert_array_equal(again, plane)
    np.testing.assert_array_equal(kv_format(kv).plain(rows, dim), kv_format(kv).rounded(x))


@pytest.mark.parametrize("kv", GGUF)
def test_less_is_lost_than_in_types_of_gguf(rng: np.random.Generator, kv: str):
    x = rng.standard_normal((2000, 64)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[kv.upper()]
    theirs = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
    ratio = ((kv_format(kv).rounded(x) - x) ** 2).sum() / ((theirs - x) ** 2).sum()
    assert 0.7 < ratio < 0.92


def test_codes_are_the_best_that_few_tries_find(rng: np.random.Generator):
    """Of all scales the best leaves hardly less error; the order of types is that of their size."""
    x = rng.standard_normal((300, 32)).astype(np.float32)
    errors = {kv: float(((kv_format(kv).rounded(x) - x) ** 2).mean()) for kv in KV_FORMATS}
    order = ("q8_0", "q6_0", "q5_1", "q5_0", "q4_1", "iq4_nl", "q4_0")
    assert [errors[kv] for kv in order] == sorted(errors[kv] for kv in order)
    scales = np.linspace(0.05, 0.6, 400)
    steps = x[:, None] / scales[:, None]
    best = np.full(len(x), np.inf)
    for sign in (1, -1):
        q = np.clip(np.rint(steps * sign), -8, 7) * sign * scales[:, None]
        best = np.minimum(best, ((q - x[:, None]) ** 2).mean(-1).min(1))
    assert best.mean() <= errors["q4_0"] < 1.03 * best.mean()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("kv", KV_FORMATS)
def test_what_is_not_finite_stays_so(kv: str, bad: float):
    x = np.ones((2, 64), np.float32)
    x[0, 5] = bad
    kept = kv_format(kv).rounded(x)
    assert not np.isfinite(kept[0, 5]) and np.isfinite(kept[1]).all()


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> KVFormat:
    """A type of 4-bit codes of a book, two of them in a byte."""
    row = kv_program.row()
    monkeypatch.setitem(KV_FORMATS, "book4", row)
    return row


@pytest.mark.parametrize("dim", ODD_HEADS)
@pytest.mark.parametrize("which", ["k", "v"])
def test_pages_of_packed_codes(rng: np.random.Generator, book: KVFormat, which: str, dim: int):
    leaf = ops.state("cache", (3, ops.PAGE, 2, dim), book.dtype, which)
    x = rng.standard_normal((3, ops.PAGE, 2, dim)).astype(np.float32)
    memory = from_plain(x, leaf)
    assert memory.shape == (3, page_nbytes(leaf))
    assert page_nbytes(leaf) == 2 * 32 * -(-dim // 32) * 18
    np.testing.assert_array_equal(to_plain(memory, leaf), book.rounded(x))
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


def _program(how: str) -> str:
    program = Path(kv_program.__file__)
    command = [sys.executable, str(program), "\n".join([str(program.parent), *sys.path]), how]
    return subprocess.run(command, capture_output=True, text=True).stderr


def test_a_further_type_on_the_kernels_of_the_cpu():
    """A row that is given at run time, through store and attention."""
    assert _program("") == ""


def test_what_kernels_cannot_read_is_named():
    assert "'book4' keeps its values in planes unknown, which kernels " in _program("unknown")

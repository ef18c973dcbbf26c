"""The SIMD layer against numpy, and its bits across instruction sets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from kernel_calls import ISAS, run

from runtime.backends.cpu.compile.isa import available
from runtime.backends.plan.kernel import Kernel
from runtime.ops.kv_formats import KV_FORMATS

PROGRAM = Path(__file__).with_name("simd_program.py")
LANE = np.arange(16)


@pytest.fixture(scope="module")
def given() -> np.ndarray:
    rng = np.random.default_rng(5)
    x = rng.standard_normal((3, 16)) * [[1], [3], [100]]
    x[2, :6] = 0.5, 1.5, 2.5, -0.5, 3, -7
    x[:2, 3] = 1.25
    return x.astype(np.float32)


def rows(isa: str, given: np.ndarray, folder: Path) -> np.ndarray:
    source, result = folder / "in", folder / "out"
    given.tofile(source)
    command = [sys.executable, PROGRAM, "\n".join(sys.path), isa, source, result]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-500:]
    return np.fromfile(result, np.uint32).reshape(-1, 16)


@pytest.fixture(scope="module")
def found(given, tmp_path_factory) -> np.ndarray:
    return rows(ISAS[0], given, tmp_path_factory.mktemp("simd"))


def tree(x: np.ndarray, combine: np.ufunc) -> np.generic:
    """Lane i with lane i + 8, then i + 4, i + 2, i + 1."""
    while len(x) > 1:
        half = len(x) // 2
        x = combine(x[:half], x[half:])
    return x[0]


def arithmetic(given: np.ndarray) -> list[np.ndarray]:
    a, b, c = given
    i, j = a.view(np.int32), np.rint(c).astype(np.int32)
    whole = np.rint(c) + np.float32(0)  # never -0
    mixed = np.where((a <= b) & (a > c), a, (i ^ j).view(np.float32))
    return [
        *(a + b, a - b, a * b, a / b, -a, np.maximum(a, b), np.minimum(a, b), np.abs(a)),
        *(whole, whole, np.where((a < b) | (a >= c), a, c), mixed),
        *(j + i, j - i, j * i, np.where(j == LANE, i & j, i | j), i << 3, i >> 3),
        np.full(16, j.sum(dtype=np.int32)),
        np.full(16, tree(c, np.add)),
        np.full(16, c.max()),
    ]


def conversions(given: np.ndarray) -> list[np.ndarray]:
    raw = given.view(np.uint8).ravel()
    return [
        raw[:32].view(np.float16).astype(np.float32),
        (raw[:32].view(np.uint16).astype(np.uint32) << 16).view(np.float32),
        raw[:16].view(np.int8).astype(np.float32),
        raw[:64].view(np.int32),
    ]


def bits(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x).view(np.uint32)


def same(found: np.ndarray, wanted: np.ndarray) -> None:
    """Equal bits, but for the payload of NaN."""
    nan = np.isnan(wanted) if wanted.dtype == np.float32 else np.zeros(16, bool)
    assert np.array_equal(found[~nan], bits(wanted)[~nan])
    assert np.isnan(found.view(np.float32)[nan]).all()


def test_operations(found, given):
    with np.errstate(all="ignore"):
        wanted = [*arithmetic(given), *conversions(given)]
    for number, (row, value) in enumerate(zip(found, wanted, strict=False)):
        try:
            same(row, value)
        except AssertionError as error:
            raise AssertionError(f"operation {number} of simd_program.py") from error


def test_narrow_stores(found, given):
    c = given[2]
    half, brain = c.astype(np.float16).view(np.uint16), bits(KV_FORMATS["bf16"].rounded(c)) >> 16
    stored, bytes_, all_, some = found[25:29]
    assert np.array_equal(stored.view(np.uint16), [*half, *brain])
    whole = np.rint(c).astype(np.int32).astype(np.int8).view(np.uint8)
    assert np.array_equal(bytes_.view(np.uint8)[:16], whole)
    assert np.array_equal(all_, bits(c))
    assert np.array_equal(some, np.where(LANE < 7, bits(c), 0))


def test_parts(found, given):
    for n, row in enumerate(found[29:45]):
        wanted = np.where(n > LANE, given[0], np.float32(2)).astype(np.float32)
        kept = n + 1 if n < 15 else 15
        assert np.array_equal(row, np.where(kept > LANE, bits(wanted), 0))


def test_scalars(found, given):
    raw, c = given.view(np.uint8).ravel(), given[2]
    found = found[45:]
    assert np.array_equal(found[0], c.astype(np.float16).view(np.uint16))
    same(found[1], raw[:32].view(np.float16).astype(np.float32))
    same(found[2], np.rint(c) + np.float32(0))
    same(found[3], np.sqrt(raw[:16].astype(np.float32)))
    same(found[4], raw[:16].view(np.int8) + raw[:64].view(np.int32))
    same(found[5], given[0])
    words = raw[:128].view(np.int64)
    assert np.array_equal(found[6].view(np.uint8)[:16], words.astype(np.uint8))
    assert np.array_equal(found[6].view(np.uint16)[8:24], words.astype(np.uint16))
    assert np.array_equal(found[7].view(np.int64), words[8:])


@pytest.mark.parametrize("isa", available())
def test_every_instruction_set_gives_these_bits(found, given, isa, tmp_path):
    again = rows(isa, given, tmp_path)
    nan = np.isnan(again.view(np.float32)) & np.isnan(found.view(np.float32))
    assert np.array_equal(np.where(nan, 0, again), np.where(nan, 0, found))


FUNCTIONS = {
    "exp": (np.exp, -103.0, 88.7, 1.5),
    "log": (np.log, 1e-6, 100.0, 1.5),
    "sigmoid": (lambda x: 1 / (1 + np.exp(-x)), -80.0, 80.0, 3.0),
    "silu": (lambda x: x / (1 + np.exp(-x)), -80.0, 80.0, 3.0),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_accuracy(name, isa):
    exact, low, high, most = FUNCTIONS[name]
    x = np.linspace(low, high, 300_001, dtype=np.float32)
    x = np.concatenate([x, np.geomspace(1e-6, 1, 1000, dtype=np.float32)])[None]
    out, n = np.empty_like(x), x.size
    run(Kernel.of(name), isa, x=x, out=out, live=1, n=n, x_stride=n, out_stride=n)
    wanted = exact(x.astype(np.float64))
    ulps = np.abs(out - wanted) / np.spacing(np.abs(wanted).astype(np.float32))
    assert ulps.max() <= most

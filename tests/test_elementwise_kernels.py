"""Elementwise, softmax and normalize kernels against float64, on memory that ends at a guard."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from kernel_calls import ISAS, Fenced, library, run

from runtime.backends.plan.kernel import Kernel
from runtime.ops.registry import OPS

ROWS, LIVE = 4, 3
LENGTHS = (1, 15, 16, 17, 37, 160)
BINARY, BY_ROW = ("add", "mul", "swiglu"), ("softmax", "normalize")
UNARY = ("silu", "sigmoid", "exp", "log", "scale", *BY_ROW)
ULP = 2.0**-23


@pytest.fixture(scope="module", autouse=True)
def compiled():
    library(ISAS[0]).prepare([Kernel.of(name) for name in (*BINARY, *UNARY)])


def reference(name: str, *x: np.ndarray) -> np.ndarray:
    wide = [v.astype(np.float64) for v in x]
    if name == "swiglu":
        return OPS["silu"].reference(wide[0]) * wide[1]
    if name in ("exp", "log"):
        return getattr(np, name)(*wide)
    return OPS[name].reference(*wide, **({"factor": 0.3} if name == "scale" else {}))


def factor(name: str) -> dict[str, Any]:
    return {"factor": 0.3} if name == "scale" else {}


def values(rng: np.random.Generator, name: str, n: int, rows: int = ROWS) -> np.ndarray:
    x = 4 * rng.standard_normal((rows, n))
    return (np.abs(x) + 0.1 if name in ("log", "normalize") else x).astype(np.float32)


def unary(name: str, x: np.ndarray, live: int = LIVE, threads: int = 1, isa: str = ISAS[0], gap=5):
    rows, n = x.shape
    source, out = Fenced.of(x, n + gap), Fenced(rows, n, n + 3)
    run(
        Kernel.of(name), isa, threads, x=source, out=out, live=live, n=n, x_stride=n + gap,
        out_stride=n + 3, **factor(name),
    )  # fmt: skip
    assert out.strays(live) == 0, f"{name} wrote outside its rows"
    return out.values[:live].copy()


def binary(name: str, x: np.ndarray, y: np.ndarray, threads: int = 1) -> np.ndarray:
    n = x.shape[1]
    left, right, out = Fenced.of(x, n + 5), Fenced.of(y, n + 2), Fenced(ROWS, n, n + 3)
    run(
        Kernel.of(name), threads=threads, x=left, y=right, out=out, live=LIVE, n=n,
        x_stride=n + 5, y_stride=n + 2 if len(y) > 1 else 0, out_stride=n + 3,
    )  # fmt: skip
    assert out.strays(LIVE) == 0, f"{name} wrote outside its rows"
    return out.values[:LIVE].copy()


def ulps_of(name: str, x: np.ndarray) -> float:
    """softmax rounds x - max to float32: half an ulp of the difference, times exp's slope."""
    return 6 + float(np.ptp(x, axis=1).max()) / 2 if name == "softmax" else 6


def close(found: np.ndarray, wanted: Any, ulps: float = 6) -> None:
    np.testing.assert_allclose(found, wanted, rtol=ulps * ULP, atol=1e-38)


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", BINARY)
def test_binary(rng, name, n):
    x, y = values(rng, name, n), values(rng, name, n)
    close(binary(name, x, y), reference(name, x, y)[:LIVE])
    close(binary(name, x, y[:1]), reference(name, x, np.broadcast_to(y[:1], x.shape))[:LIVE])


@pytest.mark.parametrize("n", LENGTHS)
@pytest.mark.parametrize("name", UNARY)
def test_unary(rng, name, n):
    x = values(rng, name, n)
    close(unary(name, x), reference(name, x)[:LIVE], ulps_of(name, x))


@pytest.mark.parametrize("name", ["silu", "softmax"])
def test_without_fused_multiply_add(rng, name):
    x = values(rng, name, 37)
    close(unary(name, x, isa="generic"), reference(name, x)[:LIVE], ulps_of(name, x))


@pytest.mark.parametrize("n", [1, 37, 160])
@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_threads_change_no_bit(rng, name, n):
    x, y = values(rng, name, n), values(rng, name, n)
    call = (lambda t: binary(name, x, y, t)) if name in BINARY else (lambda t: unary(name, x, 3, t))
    for threads in (2, 3, 7):
        assert call(threads).tobytes() == call(1).tobytes()


@pytest.mark.parametrize("name", UNARY)
def test_a_row_does_not_depend_on_the_batch(rng, name):
    x = values(rng, name, 53)
    together = unary(name, x)
    for row in range(LIVE):
        alone = unary(name, x[row : row + 1], 1, gap=0)
        assert alone.tobytes() == together[row : row + 1].tobytes()


@pytest.mark.parametrize("name", [name for name in (*UNARY, *BINARY) if name not in BY_ROW])
def test_a_single_row_is_divided_among_threads(rng, name):
    x, out = Fenced.of(values(rng, "log", 160, 1)), Fenced(1, 160)
    second = {"y": x, "y_stride": 160} if name in BINARY else factor(name)
    operands: dict[str, Any] = {"x": x, **second}
    lengths: dict[str, Any] = {"n": 160, "live": 1, "x_stride": 160, "out_stride": 160}
    run(Kernel.of(name), threads=1, out=out, **lengths, **operands)
    assert not np.isnan(out.values).any()
    for thread in range(2):
        part = Fenced(1, 160)
        run(Kernel.of(name), threads=2, only=thread, out=part, **lengths, **operands)
        assert np.isnan(part.values).sum() == 80


@pytest.mark.parametrize("name", [*UNARY, *BINARY])
def test_no_live_rows(name):
    x = np.ones((ROWS, 20), np.float32)
    source, out = Fenced.of(x), Fenced(ROWS, 20)
    more: dict[str, Any] = {"y": source, "y_stride": 20} if name in BINARY else factor(name)
    run(
        Kernel.of(name), threads=2, x=source, out=out, live=0, n=20, x_stride=20, out_stride=20,
        **more,
    )  # fmt: skip
    assert out.strays(0) == 0


@pytest.mark.parametrize("name", UNARY)
def test_in_place(rng, name):
    x = values(rng, name, 37)
    both = Fenced.of(x)
    run(
        Kernel.of(name), x=both, out=both, live=ROWS, n=37, x_stride=37, out_stride=37,
        **factor(name),
    )  # fmt: skip
    assert both.values.tobytes() == unary(name, x, ROWS).tobytes()


def test_extremes():
    inf, nan = np.inf, np.nan
    x = np.array([[-inf, -200.0, -104.0, -0.0, 0.0, 104.0, 200.0, inf, nan]], np.float32)
    with np.errstate(all="ignore"):
        assert np.array_equal(unary("exp", x, 1) == 0, x < -103.98)
        assert np.isposinf(unary("exp", x, 1)[0, 5:8]).all()
        close(unary("sigmoid", x, 1), reference("sigmoid", x))
        close(unary("silu", x[:, 1:7], 1), reference("silu", x[:, 1:7]))
        close(unary("log", x, 1), [[nan] * 3 + [-inf] * 2 + [np.log(104), np.log(200), inf, nan]])


def test_softmax_of_large_and_absent_scores():
    x = np.array([[1e4, 1e4 - 1, -np.inf, -1e4], [-1e30, -1e30, -1e30, -1e30]], np.float32)
    close(unary("softmax", x, 2), reference("softmax", x))

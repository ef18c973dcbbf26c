"""How fast weights are read in products with one token."""

from __future__ import annotations

import time

import pytest

from runtime.backends.cpu.run.decoding import decode_rate
from runtime.cli import bandwidth
from runtime.ops.dtypes import F16, Q8_0


@pytest.mark.parametrize("dtype", [F16, Q8_0])
def test_a_rate_is_one_of_memory(dtype) -> None:
    assert 1e8 < decode_rate(dtype, 1, 1 << 24) < 1e12


@pytest.fixture
def rates(tmp_path, monkeypatch) -> dict[tuple[int, str], list[float]]:
    """What is measured next, by threads and type: what is popped, the last again and again."""
    found: dict[tuple[int, str], list[float]] = {}

    def measure(key: tuple[int, str]) -> float:
        return found[key].pop(0) if len(found[key]) > 1 else found[key][0]

    kernels = "runtime.backends.cpu.run"
    monkeypatch.setenv("RUNTIME_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(f"{kernels}.decoding.decode_rate", lambda d, n: measure((n, d.name)))
    monkeypatch.setattr(f"{kernels}.bandwidth.read_bandwidth", lambda n: measure((n, "")))
    return found


def test_rates_of_types_are_remembered_apart(rates) -> None:
    rates |= {(2, ""): [7e9], (1, ""): [4e9], (2, "q8_0"): [5e9]}
    assert bandwidth.remembered(2, "q8_0") is None
    assert bandwidth.measured(2) == 7e9 and bandwidth.measured(2, "q8_0") == 5e9
    assert bandwidth.remembered(2, "q8_0") == 5e9 and bandwidth.remembered(2) == 7e9
    assert bandwidth.remembered(1, "q8_0") is None
    bandwidth.measured(1)  # as `runtime devices -b` does: types are measured anew
    assert bandwidth.remembered(2, "q8_0") is None and bandwidth.remembered(2) == 7e9


def test_the_best_is_kept_for_a_day(rates, monkeypatch) -> None:
    rates[2, ""] = [7e9, 3e9, 8e9]
    assert [bandwidth.measured(2) for _ in range(3)] == [7e9, 7e9, 8e9]
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + 86000)
    assert bandwidth.remembered(2) == 8e9
    monkeypatch.setattr("time.time", lambda: now + 87000)
    assert bandwidth.remembered(2) is None


def test_what_cannot_be_is_measured_again_and_not_kept(rates) -> None:
    rates |= {(2, ""): [8e9], (1, ""): [6e9], (2, "q8_0"): [1e9, 5e9], (2, "f16"): [1e9]}
    assert bandwidth.measured(2, "q8_0") == 5e9 == bandwidth.remembered(2, "q8_0")
    assert bandwidth.measured(2, "f16") == 1e9 and bandwidth.remembered(2, "f16") is None
    rates[1, "q8_0"] = [5.5e9]  # faster than two
    assert bandwidth.measured(1, "q8_0") == 5.5e9 and bandwidth.remembered(2, "q8_0") is None
    rates |= {(2, "q4_0"): [9e9], (2, ""): [7e9, 10e9]}  # memory was measured too low
    assert bandwidth.measured(2, "q4_0") == 9e9 == bandwidth.remembered(2, "q4_0")
    assert bandwidth.remembered(2) == 10e9

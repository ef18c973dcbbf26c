"""How fast weights are read in products with one token."""

from __future__ import annotations

import pytest

from runtime.backends.cpu.run.decoding import decode_rate
from runtime.cli import bandwidth
from runtime.ops.dtypes import F16, Q8_0


@pytest.mark.parametrize("dtype", [F16, Q8_0])
def test_a_rate_is_one_of_memory(dtype) -> None:
    assert 1e8 < decode_rate(dtype, 1, 1 << 24) < 1e12


def test_rates_of_types_are_remembered_apart(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RUNTIME_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("runtime.backends.cpu.run.decoding.decode_rate", lambda d, n: 5e9 + n)
    monkeypatch.setattr("runtime.backends.cpu.run.bandwidth.read_bandwidth", lambda n: 7e9 + n)
    assert bandwidth.remembered(2, "q8_0") is None
    assert bandwidth.measured(2) == 7e9 + 2 and bandwidth.measured(2, "q8_0") == 5e9 + 2
    assert bandwidth.remembered(2, "q8_0") == 5e9 + 2 and bandwidth.remembered(2) == 7e9 + 2
    assert bandwidth.remembered(1, "q8_0") is None
    bandwidth.measured(2)  # as `runtime devices -b` does: types are measured anew
    assert bandwidth.remembered(2, "q8_0") is None

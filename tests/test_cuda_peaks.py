"""Bandwidth and tensor peak of a GPU, measured by kernels of ours."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
from cuda_calls import simulate
from fake_driver import H100, FakeDriver
from fake_nodes import FakeLibrary

from runtime.backends.cuda import peaks
from runtime.backends.cuda.kernels.peaks import CHAINS, COPIED, COPY_THREADS, MMA_THREADS
from runtime.backends.cuda.launcher import Device

SMALL = dataclasses.replace(H100, multiprocessors=2)


@pytest.fixture(autouse=True)
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("RUNTIME_CACHE_DIR", str(tmp_path))
    return tmp_path


def _device(**options: float) -> Device:
    return Device(FakeDriver([SMALL], **options), 0, FakeLibrary())  # type: ignore[arg-type]


def test_all_is_copied(rng):
    words = 4 * COPIED * COPY_THREADS
    x = rng.integers(0, 1 << 32, 2 * words, np.uint32)
    out = np.zeros_like(x)
    simulate("peak_copy", 2, x, out)
    np.testing.assert_array_equal(out, x)


@pytest.mark.parametrize("kind", ["s8", "f16"])
def test_products_depend_on_every_round(kind: str):
    found = []
    for rounds in (1, 2):
        out = np.full(MMA_THREADS, np.nan, np.float32)
        simulate("peak_mma", 1, out, rounds, constants={"kind": kind})
        found.append(out)
    np.testing.assert_allclose(found[1], 2 * found[0], rtol=1e-5)
    assert np.isfinite(found[0]).all() and np.count_nonzero(found[0]) > MMA_THREADS / 2


def test_rates_follow_from_times(folder: Path):
    found = peaks.peaks(_device(microseconds=100.0))
    took = 110e-6  # the launch and one event
    assert found.copy == pytest.approx(2 * (1 << 30) / took)
    warps = 8 * SMALL.multiprocessors * MMA_THREADS // 32
    assert found.int8 == pytest.approx(warps * 4096 * CHAINS * 2 * 16 * 8 * 32 / took)
    assert found.f16 == pytest.approx(found.int8 / 2)
    assert list(json.loads((folder / "gpu-peaks.json").read_text()).values()) == [vars(found)]


def test_they_are_measured_once():
    first = peaks.peaks(_device(microseconds=100.0))
    assert peaks.peaks(_device(microseconds=50.0)) == first
    assert peaks.peaks(_device(microseconds=50.0), again=True).copy == pytest.approx(2 * first.copy)


@pytest.mark.parametrize("text", ["", "[]", '{"fake H100, driver with CUDA 13000": {"copy": 1}}'])
def test_what_is_remembered_wrongly_is_measured(folder: Path, text: str):
    (folder / "gpu-peaks.json").write_text(text)
    assert peaks.peaks(_device(microseconds=100.0)).known


def test_no_time_is_remembered_without_a_gpu(folder: Path):
    assert math.isnan(peaks.peaks(_device()).copy)
    assert not (folder / "gpu-peaks.json").exists()

"""The contract of backends/base.py on every device: state, plans, and what compiled kernels are."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runtime import ops
from runtime.backends import devices
from runtime.backends.base import Backend
from runtime.backends.plan import catalogue
from runtime.backends.plan.catalogue import Catalogue
from runtime.ops.errors import BackendError
from runtime.ops.kv_formats import HEAD_UNIT, KV_FORMATS, fill

CACHES = [(kv, which) for kv in KV_FORMATS for which in ("k", "v")]


def opened(name: str) -> Backend:
    return devices.open_backend(name, None, 1, "int8")


def _check(backend: Backend, leaf: ops.Tensor, values: np.ndarray) -> np.ndarray:
    """Pages 1 and 2 are written, 2 and 1 are copied to 0 and 4, and 3 was never touched.

    Gives what is then read of all.
    """
    backend.write_state(leaf, [1, 2], values)
    backend.copy_pages([leaf], [2, 1], [0, 4])
    wanted = np.stack([values[1], values[0], values[1], np.zeros_like(values[0]), values[0]])
    got = backend.read_state(leaf, range(5))
    assert got.dtype == values.dtype
    np.testing.assert_array_equal(got, wanted)
    np.testing.assert_array_equal(backend.read_state(leaf, [4, 1]), wanted[[4, 1]])
    return got


@pytest.mark.parametrize("device", ["cpu", "reference", "tensor(cpu:0,cpu:1)"])
@pytest.mark.parametrize(("kv", "which"), CACHES)
def test_pages_are_copied_whole(device: str, kv: str, which: str, rng: np.random.Generator):
    format = KV_FORMATS[kv]
    leaf = ops.state("pages", (5, ops.PAGE, 2, 40), format.dtype, which)
    values = rng.standard_normal((2, ops.PAGE, 2, 40)).astype(np.float32)
    if format.coding is None or device == "reference":
        _check(opened(device), leaf, format.rounded(values))
        return
    backend, rows = opened(device), format.to_rows(format.encode(fill(values, HEAD_UNIT)))
    _check(backend, leaf, rows)
    backend.write_state(leaf, [0, 1], values)  # numbers are rounded
    np.testing.assert_array_equal(backend.read_state(leaf, [0, 1]), rows)
    np.testing.assert_array_equal(format.plain(rows, 40), format.rounded(values))


@pytest.mark.parametrize("device", ["cpu", "reference", "tensor(cpu:0,cpu:1)"])
def test_slots_are_copied_whole(device: str, rng: np.random.Generator):
    leaf = ops.state("slots", (5, 3, 7), ops.DTYPES["f32"], "slots")
    _check(opened(device), leaf, rng.standard_normal((2, 3, 7)).astype(np.float32))


def test_the_null_device_keeps_nothing():
    leaf = ops.state("pages", (5, ops.PAGE, 2, 40), ops.DTYPES["f16"])
    backend = opened("null")
    backend.write_state(leaf, [1], np.ones((1, ops.PAGE, 2, 40)))
    backend.copy_pages([leaf], [1], [2])
    assert not backend.read_state(leaf, [1, 2]).any()
    assert backend.page_nbytes(leaf) == opened("cpu").page_nbytes(leaf), "and plans with it"


def test_two_files_that_build_one_kernel_are_named(tmp_path: Path, monkeypatch):
    for name in ("one", "two"):
        (tmp_path / f"{name}.py").write_text("def build_copy():\n    pass\n")
    monkeypatch.setattr(catalogue, "source_path", lambda package: tmp_path / "__init__.py")
    with pytest.raises(BackendError, match=r"CPU kernel 'copy' is built in two.py and in one.py"):
        Catalogue("CPU", "runtime.backends.cpu.kernels").names()

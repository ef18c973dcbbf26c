"""Weights packed on the GPU: the bits that `layouts.pack` gives, for every format."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_calls import simulate
from cuda_models import fake_cuda
from fake_driver import FakeDriver
from stored_tensors import Stored, file_of
from tile_calls import random_rows

from runtime import ops
from runtime.backends.cuda import stores, wiring
from runtime.backends.cuda.kernels.repack import ROWS, THREADS
from runtime.backends.cuda.layouts import FLOATS, FORMATS, pack, row_nbytes
from runtime.backends.cuda.uploads import Uploads
from runtime.backends.plan.plan import Buffer
from runtime.ops.dtypes import DTYPES
from runtime.ops.quants import dequantize


def _rows(rng: np.random.Generator, format: str, rows: int, inner: int) -> np.ndarray:
    """uint8 [rows, bytes]: any bits."""
    dtype = DTYPES[format.lower()]
    return rng.integers(0, 256, (rows, inner // dtype.block * dtype.nbytes), np.uint8)


@pytest.mark.parametrize("format", [*FORMATS, *FLOATS])
@pytest.mark.parametrize("inner", [256, 768, 4096])
def test_packing_is_wiring(rng, format: str, inner: int):
    table, raw = wiring.wiring(format, inner), _rows(rng, format, 5, inner)
    assert table is not None
    wanted = pack(raw.reshape(-1), format, 5, inner)
    np.testing.assert_array_equal(wiring.repacked(raw, table), wanted)
    if wiring.is_copy(format, inner):
        np.testing.assert_array_equal(raw.reshape(-1), wanted)


def test_packing_that_computes_is_no_wiring(monkeypatch: pytest.MonkeyPatch):
    def summed(raw: np.ndarray, format: str, rows: int, inner: int) -> np.ndarray:
        out = pack(raw, format, rows, inner)
        return out + np.roll(out, 1)

    wiring.wiring.cache_clear()
    monkeypatch.setattr(wiring, "pack", summed)
    assert wiring.wiring("Q8_0", 64) is None
    wiring.wiring.cache_clear()


@pytest.mark.parametrize(
    ("format", "rows", "inner"),
    [("Q4_K", 2, 256), ("Q3_K", 1, 256), ("IQ4_XS", 1, 256), ("Q8_0", ROWS + 1, 32), ("F16", 3, 4)],
)
def test_the_kernel_packs(rng, format: str, rows: int, inner: int):
    raw, table = _rows(rng, format, rows, inner), wiring.wiring(format, inner)
    words = row_nbytes(format, inner) // 4
    out = np.full((rows, words), 0xCDCDCDCD, np.uint32)
    source = np.pad(raw.reshape(-1), (0, -raw.size % 4)).view(np.uint32)
    grid = -(-words // THREADS), -(-rows // ROWS)
    simulate("repack", grid, source, table, out, words, rows, 8 * raw.shape[1])
    np.testing.assert_array_equal(
        out.reshape(-1).view(np.uint8), pack(raw.reshape(-1), format, rows, inner)
    )


class _Weights:
    """A store on the simulated GPU with these weights."""

    def __init__(self, host: bool, **rows: tuple[str, np.ndarray, int]) -> None:
        tensors, self.leaves = {}, {}
        for name, (format, raw, inner) in rows.items():
            dtype = DTYPES[format.lower()]
            shape = len(raw), inner
            value = dequantize(raw.reshape(-1), dtype, shape)
            tensors[name] = Stored(value, raw, dtype)
            self.leaves[name] = ops.weight(name, shape, dtype)
        driver = FakeDriver(execute=True)
        self.backend = fake_cuda(file_of(tensors), driver=driver, host_packing=host)

    def loaded(self, form: str) -> tuple[dict[str, np.ndarray], list[int]]:
        """Their bytes on the device, and what was told of progress."""
        buffers = [
            Buffer(form, name, leaf.nbytes, tensor=leaf) for name, leaf in self.leaves.items()
        ]
        told, store = list(self.backend.store.load(buffers)), self.backend.store
        stream, found = self.backend.stream, {}
        for buffer in buffers:
            place = store.place(buffer)
            found[buffer.tensor.name] = place.read(np.empty(place.nbytes, np.uint8), stream)
        self.backend.close()
        return found, told


def test_the_gpu_packs_what_the_host_packs(monkeypatch: pytest.MonkeyPatch):
    """Several pieces each; one format is widened, one copied."""
    monkeypatch.setattr(stores, "PIECE", 200)
    rows = {
        "a": ("Q8_0", random_rows("Q8_0", 12, 32), 32),
        "b": ("IQ2_XXS", random_rows("IQ2_XXS", 2, 256), 256),
        "c": ("F32", np.arange(96, dtype=np.float32).view(np.uint8).reshape(3, -1), 32),
        "d": ("Q4_0", random_rows("Q4_0", 3, 64), 64),
    }
    (host, told), (gpu, also) = (_Weights(h, **rows).loaded("repacked") for h in (True, False))
    assert sum(told) == sum(also) == sum(raw.nbytes for _, raw, _ in rows.values())
    assert len(also) > len(rows)
    for name in rows:
        np.testing.assert_array_equal(gpu[name], host[name])


def test_vectors_are_widened_in_parts(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(stores, "_PART", 100)
    raw = random_rows("Q4_K", 3, 256)
    found, _ = _Weights(False, a=("Q4_K", raw, 256)).loaded("vector")
    wanted = dequantize(raw.reshape(-1), DTYPES["q4_k"], (3, 256))
    np.testing.assert_array_equal(found["a"].view(np.float32).reshape(3, 256), wanted)


def test_uploads_leave_nothing_behind(rng):
    driver = FakeDriver(execute=True)
    backend = fake_cuda(driver=driver)
    before, raw = driver.leaks(), rng.integers(0, 256, (50, 90), np.uint8)
    with Uploads(backend.device, backend.stream, 1000) as uploads:
        room = backend.device.arena(5000)
        out = room.take(4500)
        read = lambda first, count, room: raw[first : first + count]  # noqa: E731
        assert list(uploads.rows(read, raw.shape, out)) == [990, 990, 990, 990, 540]
    found = out.read(np.empty(4500, np.uint8), backend.stream)
    np.testing.assert_array_equal(found, raw.reshape(-1))
    room.close()
    assert driver.leaks() == before
    backend.close()

"""numpy_grid.py against the simulator, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_models import fake_cuda
from numpy_grid import launch as at_once
from op_grid import Built

from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.intrinsics import (
    block_x,
    entry,
    f32,
    load,
    registers,
    shared,
    shuffle_xor,
    store,
    syncthreads,
    thread_x,
    u32,
)  # fmt: skip
from runtime.backends.cuda.simulator import launch
from runtime.ops.errors import BackendError
from runtime.ops.registry import OPS

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")


def halved(x):
    """Returns in a branch, and later for the others."""
    if x > f32(1):
        return x * f32(0.5)
    y = x + f32(1)
    return y * f32(0.25) if x > f32(0) and not y > f32(1.5) else -y


def odd_kernel() -> Declared:
    """Bounds, branches and orders that differ from thread to thread."""
    sums, room = registers("f32", 2), shared("f32", 64)

    @entry("x:f32* counts:i32* out:f32* n:u32", threads=64)
    def odd(x, counts, out, n):
        i = u32(block_x() * 64 + thread_x())
        acc, values = sums(), room()
        acc[0], acc[1] = f32(0), f32(-1)
        count = load(counts, u32(i % 7))
        for k in range(count):
            if (k + i) % 3 == 0 or k > 4:
                acc[0] += halved(load(x, u32((i + k) % n)))
            elif k == 1:
                acc[1] = f32(k)
        at, flag = u32(0), 0
        while at * at < i:
            at = u32(at + 1)
            flag = 1
        values[u32(63 - thread_x())] = acc[0] + f32(at) + f32(flag)
        syncthreads()
        total = shuffle_xor(values[thread_x()], 3)
        if i < n:
            store(out, i, max(total, acc[1]))

    return odd


def test_control_flow_is_the_simulators(rng: np.random.Generator):
    x, counts = rng.standard_normal(150).astype(np.float32) * 2, np.arange(7, dtype=np.int32)
    found = []
    for run in (launch, at_once):
        out = np.zeros(150, np.float32)
        run(odd_kernel(), 3, x, counts, out, 150)
        found.append(out)
    np.testing.assert_array_equal(*found)
    assert len(set(found[0])) > 50


def test_an_access_out_of_bounds_is_found(rng: np.random.Generator):
    x, out = np.ones(150, np.float32), np.zeros(100, np.float32)
    with pytest.raises(BackendError, match=r"thread 36 of block \(1, 0, 0\) touches f32 at 100"):
        at_once(odd_kernel(), 3, x, np.arange(7, dtype=np.int32), out, 150)


@pytest.mark.parametrize(("name", "n"), [("matmul", 0), ("attention", 0), ("rope_angles", 0)])
def test_ops_are_the_simulators(name: str, n: int):
    built = Built(name, OPS[name].cases[n], "partly")
    found = []
    for quick in (False, True):
        backend = fake_cuda(built.file(), activations="int8", quick=quick)
        for leaf, value in built.states.values():
            backend.write_state(leaf, range(len(value)), value)
        found.append(backend.program(built.graph).run(built.inputs, built.live)[0].copy())
        backend.close()
    np.testing.assert_array_equal(*found)

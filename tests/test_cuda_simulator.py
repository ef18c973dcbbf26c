"""The simulator finds what a GPU hides: races, deadlocks, memory never written, bad accesses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("greenlet", reason="the CUDA simulator needs greenlet")

from runtime.backends.cuda import intrinsics as i
from runtime.backends.cuda.intrinsic import Declared
from runtime.backends.cuda.simulator import ORDERS, launch
from runtime.ops.errors import BackendError

# Kernels name intrinsics as globals or closures; the test's own are taken from the module.
entry, load, load4, store, thread_x, u32 = i.entry, i.load, i.load4, i.store, i.thread_x, i.u32
syncthreads, syncwarp, shuffle_xor, block_x = i.syncthreads, i.syncwarp, i.shuffle_xor, i.block_x
copy_async16, copy_commit, copy_wait0 = i.copy_async16, i.copy_commit, i.copy_wait0


def _reversal(threads: int, meet: bool) -> Declared:
    tile = i.shared("f32", threads)

    @entry("x:f32* out:f32*", threads=threads)
    def reversal(x, out):
        a, t = tile(), thread_x()
        a[t] = load(x, t)
        if meet:
            syncthreads()
        store(out, t, a[u32(threads - 1 - t)])

    return reversal


def _run(kernel: Declared, *arguments: np.ndarray | float, **options) -> None:
    launch(kernel, options.pop("grid", 1), *arguments, **options)


@pytest.mark.parametrize("order", ORDERS)
def test_every_order_gives_the_same_result(order: str):
    x, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    _run(_reversal(64, True), x, out, order=order, seed=3)
    np.testing.assert_array_equal(out, x[::-1])


@pytest.mark.parametrize("order", ORDERS)
def test_missing_barrier_is_found_in_any_order(order: str):
    x, out = np.arange(64, dtype=np.float32), np.zeros(64, np.float32)
    with pytest.raises(BackendError, match=r"nobody wrote|a barrier is missing"):
        _run(_reversal(64, False), x, out, order=order)


def test_race_is_found_where_the_values_happen_to_be_right():
    """Threads run forward, so each reads what the one before it wrote: right, and still a race."""
    tile = i.shared("f32", 64)

    @entry("out:f32*", threads=64)
    def race(out):
        a, t = tile(), thread_x()
        a[t] = 1.0
        if t > 0:
            store(out, t, a[u32(t - 1)])

    with pytest.raises(BackendError, match=r"reads shared memory .* a barrier is missing"):
        _run(race, np.zeros(64, np.float32), order="forward")


def test_overwriting_what_others_still_read_is_found():
    tile = i.shared("f32", 64)

    @entry("out:f32*", threads=64)
    def overwrite(out):
        a, t = tile(), thread_x()
        a[t] = 1.0
        syncthreads()
        if t == 0:
            store(out, t, a[40])
        else:
            a[t] = 2.0

    with pytest.raises(BackendError, match=r"writes shared memory .* a barrier is missing"):
        _run(overwrite, np.zeros(64, np.float32))


@pytest.mark.parametrize("threads", [32, 64])
def test_a_warp_synchronises_only_itself(threads: int):
    tile = i.shared("f32", threads)

    @entry("out:f32*", threads=threads)
    def neighbours(out):
        a, t = tile(), thread_x()
        a[t] = 1.0
        syncwarp()
        store(out, t, a[u32(threads - 1 - t)])

    if threads == 32:
        _run(neighbours, np.zeros(threads, np.float32), order="random")
    else:
        with pytest.raises(BackendError, match=r"nobody wrote|a barrier is missing"):
            _run(neighbours, np.zeros(threads, np.float32), order="random")


def test_repeated_reads_and_own_writes_are_no_race():
    """Two lanes read a word, the warp meets, one of them reads it again and writes it."""
    tile = i.shared("u32", 32)

    @entry("out:u32*", threads=32)
    def own(out):
        a, t = tile(), thread_x()
        a[t] = t
        syncwarp()
        store(out, t, a[0])
        syncwarp()
        a[t] = u32(a[t] + 1)

    _run(own, np.zeros(32, np.uint32))


@pytest.mark.parametrize("order", ORDERS)
def test_deadlock_says_who_waits_where(order: str):
    @entry("out:f32*", threads=32)
    def stuck(out):
        if thread_x() < 16:
            syncthreads()
        else:
            store(out, thread_x(), shuffle_xor(1.0, 1))

    with pytest.raises(BackendError, match=r"stuck: deadlock: thread \d+ .* waits at") as caught:
        _run(stuck, np.zeros(32, np.float32), order=order)
    assert "barrier" in str(caught.value) and "shuffle" in str(caught.value)


def test_a_thread_that_ended_never_comes():
    @entry("out:f32*", threads=32)
    def early(out):
        if thread_x() == 5:
            return
        syncthreads()

    with pytest.raises(BackendError, match="1 threads have ended"):
        _run(early, np.zeros(1, np.float32))


def test_shared_memory_is_poisoned_in_every_block():
    """What the block before left behind is not there."""
    tile = i.shared("f32", 32)

    @entry("out:f32*", threads=32)
    def leftovers(out):
        a, t = tile(), thread_x()
        if block_x() == 0:
            a[t] = 1.0
        store(out, t, a[t])

    with pytest.raises(BackendError, match=r"block \(1, 0, 0\) reads .* nobody wrote"):
        _run(leftovers, np.zeros(32, np.float32), grid=2)


def test_registers_are_poisoned():
    mine = i.registers("f32", 2)

    @entry("out:f32*", threads=1)
    def unset(out):
        a = mine()
        a[0] = 1.0
        store(out, 0, a[1])

    with pytest.raises(BackendError, match="register 1, which was never set"):
        _run(unset, np.zeros(1, np.float32))


@pytest.mark.parametrize("wait", [True, False])
def test_copies_arrive_only_when_waited_for(wait: bool):
    tile = i.shared("u32", 128)

    @entry("x:u32* out:u32*", threads=32)
    def copied(x, out):
        a, t = tile(), thread_x()
        copy_async16(a, t, x, t, 16)
        copy_commit()
        if wait:
            copy_wait0()
        syncthreads()
        store(out, t, a[t])

    x, out = np.arange(128, dtype=np.uint32), np.zeros(32, np.uint32)
    if wait:
        _run(copied, x, out, order="random")
        np.testing.assert_array_equal(out, x[:32])
    else:
        with pytest.raises(BackendError, match="nobody wrote"):
            _run(copied, x, out)


def test_out_of_bounds_names_the_array():
    @entry("x:f32* out:f32*", threads=32)
    def beyond(x, out):
        store(out, thread_x(), load(x, u32(thread_x() + 1)))

    with pytest.raises(BackendError, match=r"touches x\[32:33\] of 32 f32"):
        _run(beyond, np.zeros(32, np.float32), np.zeros(32, np.float32))


def test_vectors_are_whole():
    @entry("x:f32* out:f32*", threads=1)
    def half(x, out):
        store(out, 0, load4(x, 1)[0])

    with pytest.raises(BackendError, match=r"touches x\[4:8\] of 6 f32"):
        _run(half, np.zeros(6, np.float32), np.zeros(1, np.float32))


def test_wrong_arguments_are_named():
    kernel = _reversal(32, True)
    with pytest.raises(BackendError, match="takes 2 arguments, not 1"):
        _run(kernel, np.zeros(32, np.float32))
    with pytest.raises(BackendError, match="out is a pointer"):
        _run(kernel, np.zeros(32, np.float32), 5)
    with pytest.raises(BackendError, match="declared 'y:f32"):
        entry("y:f32*", threads=32)(lambda x: None)
    with pytest.raises(BackendError, match="unknown type f64"):
        entry("x:f64*", threads=32)(lambda x: None)


def test_kernels_need_no_numba_and_the_package_no_kernels():
    code = (
        "import sys, runtime; assert 'runtime.backends.cuda' not in sys.modules; "
        "from runtime.backends.cuda import catalogue as c, simulator; "
        "[c.declared(k) for k in c.KERNELS.every()]; "
        "assert not {'numba', 'numba_cuda', 'llvmlite', 'cuda'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1], check=True)


def test_intrinsics_need_a_launch():
    with pytest.raises(BackendError, match="only inside a launch"):
        thread_x()

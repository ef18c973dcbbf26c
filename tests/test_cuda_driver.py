"""Launches, memory and streams on a driver without a GPU; what a missing driver says."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_driver import H100, FakeDriver
from fake_gpu import NBYTES, NORM, NUMBERS, ROWS, Gpu, N, normed
from fake_nodes import FakeLibrary, unpacked

from runtime.backends.cuda.accesses import accesses, waits
from runtime.backends.cuda.bindings import BoundDriver
from runtime.backends.cuda.catalogue import KERNELS, Compiled, declared
from runtime.backends.cuda.driver import Driver
from runtime.backends.cuda.intrinsics import launch_next, launch_wait, thread_x
from runtime.backends.cuda.launcher import Device
from runtime.backends.cuda.opening import open_driver
from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import BackendError, Error, MemoryLimitError


class CUresult(IntEnum):
    CUDA_SUCCESS = 0
    CUDA_ERROR_OUT_OF_MEMORY = 2
    CUDA_ERROR_STUB_LIBRARY = 34
    CUDA_ERROR_NO_DEVICE = 100
    CUDA_ERROR_ILLEGAL_ADDRESS = 700


def _api(**answers: Any) -> Any:
    """cuda.bindings.driver as it answers on some machine."""

    def function(answer: Any) -> Any:
        def call(*_: Any) -> Any:
            if isinstance(answer, Exception):
                raise answer
            return answer

        return call

    plain = {"cuDriverGetVersion": (0, 13000), "cuInit": (0,), "cuDeviceGetCount": (0, 1)}
    functions = {name: function(answer) for name, answer in (plain | answers).items()}
    return SimpleNamespace(CUresult=CUresult, **functions)


def _one_line(error: pytest.ExceptionInfo) -> str:
    assert isinstance(error.value, Error) and "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"cuDriverGetVersion": RuntimeError("Failed to dlopen libcuda.so.1")}, "no usable NVIDIA"),
        ({"cuInit": (CUresult.CUDA_ERROR_STUB_LIBRARY,)}, "no usable NVIDIA driver .*580"),
        ({"cuDriverGetVersion": (0, 12040)}, "supports CUDA 12.4, and kernels need 13.0.*580"),
        ({"cuInit": (CUresult.CUDA_ERROR_NO_DEVICE,)}, "sees no GPU.*nvidia-smi"),
        ({"cuDeviceGetCount": (0, 0)}, "sees no GPU"),
    ],
)
def test_what_is_missing_is_said_in_one_line(answers: dict, words: str):
    with pytest.raises(BackendError, match=words) as error:
        open_driver(_api(**answers))
    assert "devices='cpu'" in _one_line(error)


def test_a_machine_that_has_all_opens():
    assert open_driver(_api()).device_count() == 1


def test_without_cuda_bindings_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    with pytest.raises(BackendError, match=r"graph-runtime\[cuda\]") as error:
        open_driver()
    _one_line(error)


def test_a_full_gpu_says_what_was_asked_and_what_is_free():
    full = (CUresult.CUDA_ERROR_OUT_OF_MEMORY, 0)
    driver = BoundDriver(_api(cuMemAlloc=full, cuMemGetInfo=(0, 3 << 29, 80 << 30)))
    with pytest.raises(MemoryLimitError, match=r"room for 2 GiB: 1\.5 GiB of 80 GiB") as error:
        driver.allocate(2 << 30)
    _one_line(error)
    api = _api(cuGraphInstantiate=full, cuMemGetInfo=(0, 512, 80 << 30))
    with pytest.raises(MemoryLimitError, match=r"no room \(cuGraphInstantiate\): 512 bytes of"):
        BoundDriver(api).instantiate(None)
    with pytest.raises(MemoryLimitError, match="room for 81 GiB: 80 GiB of 80 GiB"):
        Gpu().device.arena(81 << 30)


def test_a_failing_call_names_itself_and_the_error():
    text = (0, b"an illegal memory access was encountered")
    api = _api(cuStreamSynchronize=(CUresult.CUDA_ERROR_ILLEGAL_ADDRESS,), cuGetErrorString=text)
    with pytest.raises(BackendError, match=r"cuStreamSynchronize.*ILLEGAL_ADDRESS.*illegal memory"):
        BoundDriver(api).synchronize(None)


@pytest.mark.parametrize("capability", [(7, 5), (13, 0)])
def test_an_unsupported_capability_is_refused(capability: tuple[int, int]):
    old = dataclasses.replace(H100, capability=capability)
    with pytest.raises(BackendError, match=rf"capability {capability[0]}\.{capability[1]}, ") as e:
        Device(FakeDriver([old]), 0, FakeLibrary())
    _one_line(e)


def test_a_gpu_that_is_not_there():
    with pytest.raises(BackendError, match="no GPU cuda:1: the driver sees 1"):
        Device(FakeDriver(), 1, FakeLibrary())


def test_nothing_is_imported_before_a_device_is_opened():
    program = (
        "import sys, runtime, runtime.backends.cuda.launcher, runtime.backends.cuda.graphs;"
        "print([m for m in sys.modules if m.split('.')[0] in ('cuda', 'numba', 'llvmlite')])"
    )
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert found.stdout.strip() == "[]", found.stderr


@pytest.mark.parametrize("kernel", KERNELS.every(), ids=str)
def test_arguments_of_every_kernel_arrive(kernel: Kernel):
    gpu, values = Gpu(), []
    for i, (_, kind) in enumerate(declared(kernel).entry.arguments):
        values.append(
            gpu.arena.take(64) if kind.endswith("*") else {"f32": 0.25, "i32": -3}.get(kind, i + 7)
        )
    launch = gpu.device.launch(kernel, (3, 2), *values)
    expected = [v if isinstance(v, (int, float)) else v.address for v in values]
    assert list(unpacked(launch.function.entry, launch.address)) == expected
    launch.run(gpu.stream)
    launch.run(gpu.stream, programmatic=True)
    assert [call[0] for call in gpu.driver.calls[-2:]] == ["launch", "launch"]


def test_wrong_arguments_are_refused_by_name():
    gpu = Gpu()
    (x, out), w, rest = gpu.buffers(2), gpu.weight, NUMBERS[1:]
    for values, words in [
        ((x, w, out, N), r"takes 11 arguments \(x, w, out, n, x_stride, .*\), not 4"),
        ((x, 3, out, *NUMBERS), r"w is f32\*: give it a buffer, not 3"),
        ((x, w, out, out, *rest), "n is u32, not a buffer"),
        ((x, w, out, 1.5, *rest), "n is u32, which 1.5 is not"),
        ((x, w, out, -1, *rest), "n is u32, which -1 is not"),
        ((x, w, out, 1 << 32, *rest), "n is u32, which 4294967296 is not"),
        ((x, w, out, *NUMBERS[:6], "1", 1), "eps is f32, which '1' is not"),
        ((x, w, out.view(2), *NUMBERS), "out begins at .* not a multiple of 4"),
    ]:
        with pytest.raises(BackendError, match=words):
            gpu.device.launch(NORM, ROWS, *values)
    launch = gpu.norm(x, out)
    with pytest.raises(BackendError, match="no argument rows"):
        launch.set(rows=3)
    for grid in (0, (1, 65536), (1, 1, 1, 1)):
        with pytest.raises(BackendError, match="a grid of"):
            launch.set_grid(grid)


def test_sixteen_byte_accesses_need_aligned_pointers():
    gpu = Gpu()
    launch = gpu.norm(gpu.arena.take(NBYTES + 4).view(4), *gpu.buffers(1))
    with pytest.raises(BackendError, match="x is not at a multiple of 16 bytes"):
        launch.run(gpu.stream)


def test_a_launch_computes_and_follows_changes():
    gpu = Gpu(execute=True)
    x = np.arange(ROWS * N, dtype=np.float32).reshape(ROWS, N)
    source, out = gpu.upload(x), gpu.upload(np.zeros_like(x))
    launch = gpu.norm(source, out)
    launch.run(gpu.stream)
    np.testing.assert_allclose(gpu.values(out), normed(x), rtol=1e-6)
    launch.set(x=gpu.upload(x * x), eps=0.0)
    launch.set_grid(1)
    launch.run(gpu.stream)
    np.testing.assert_allclose(gpu.values(out)[0], normed(x * x)[0], rtol=1e-5)
    np.testing.assert_allclose(gpu.values(out)[1], normed(x)[1], rtol=1e-6)


def test_shared_memory_is_asked_for_before_it_is_used(monkeypatch):
    class Greedy(FakeLibrary):
        def get(self, kernel: Kernel) -> Compiled:
            found = super().get(kernel)
            entry = dataclasses.replace(found.entry, shared_nbytes=60 << 10)
            return dataclasses.replace(found, entry=entry)

    monkeypatch.setattr("fake_gpu.FakeLibrary", Greedy)

    def launch(gpu: Gpu) -> None:
        x, out = gpu.buffers(2)
        gpu.norm(x, out).run(gpu.stream)

    launch(Gpu())
    small = dataclasses.replace(H100, shared_nbytes=50 << 10)
    with pytest.raises(BackendError, match=r"needs .* KiB of shared memory in a block"):
        launch(Gpu(devices=[small]))
    monkeypatch.setattr(FakeDriver, "allow_shared", lambda *_: None)
    with pytest.raises(BackendError, match="is allowed 49152 of"):
        launch(Gpu())


def test_an_arena_overflows_with_numbers():
    gpu = Gpu()
    arena = gpu.device.arena(1024, "small")
    arena.take(1)
    assert arena.take(512).address % 256 == 0
    with pytest.raises(MemoryLimitError, match="arena small of 1 KiB has 256 bytes left, and 257"):
        arena.take(257)


def test_released_memory_is_refused_everywhere():
    gpu = Gpu()
    mark = gpu.arena.mark()
    x, out = gpu.buffers(2)
    launch, part = gpu.norm(x, out), x.view(16, 32)
    gpu.arena.release(mark)
    fresh = gpu.arena.take(NBYTES)
    assert gpu.weight.alive and fresh.alive and not x.alive
    with pytest.raises(BackendError, match="uses x after it was released"):
        launch.run(gpu.stream)
    for use in (lambda: part.address, lambda: gpu.norm(x, fresh), lambda: gpu.values(out)):
        with pytest.raises(BackendError, match="was released"):
            use()
    gpu.arena.close()
    gpu.arena.close()
    with pytest.raises(BackendError, match="was released"):
        _ = fresh.address
    with pytest.raises(BackendError, match="arena work is closed"):
        gpu.arena.take(1)
    assert not gpu.driver.leaks()


def test_frees_of_what_is_not_there():
    gpu = Gpu()
    with pytest.raises(BackendError, match="where no allocation begins"):
        gpu.driver.free(gpu.arena.address + 256)
    with pytest.raises(BackendError, match="is not allocated"):
        gpu.driver.fill(gpu.arena.address + (1 << 20) - 4, 0, 8, gpu.stream.handle)


def test_destroyed_handles_are_refused():
    gpu = Gpu()
    launch, stream, event = gpu.norm(*gpu.buffers(2)), gpu.device.stream(), gpu.device.event()
    stream.close()
    stream.close()
    event.close()
    for use in (lambda: launch.run(stream), stream.synchronize, lambda: gpu.stream.wait(event)):
        with pytest.raises(BackendError, match="was destroyed"):
            use()
    gpu.device.close()
    with pytest.raises(BackendError, match="context"):
        launch.run(gpu.stream)


def test_launches_stay_with_their_device():
    gpu = Gpu(devices=[H100, dataclasses.replace(H100, index=1)])
    launch = gpu.norm(*gpu.buffers(2))
    other = Device(gpu.driver, 1, FakeLibrary())
    with pytest.raises(BackendError, match="is of GPU 0, and GPU 1 is current"):
        launch.run(gpu.stream)
    stream = other.stream()
    gpu.device.activate()
    with pytest.raises(BackendError, match="is of GPU 1, and GPU 0 is current"):
        launch.run(stream)
    launch.run(gpu.stream)


@pytest.mark.parametrize("how", ["nothing", "event", "host"])
def test_streams_are_ordered_by_events_or_the_host(how: str):
    gpu = Gpu()
    (out, later), second = gpu.buffers(2), gpu.device.stream()
    gpu.norm(gpu.upload(np.ones((ROWS, N), np.float32)), out).run(gpu.stream)
    reader = gpu.norm(out, later)
    if how == "nothing":
        with pytest.raises(BackendError, match=r"not ordered behind norm.*wait for an event"):
            reader.run(second)
        return
    if how == "event":
        event = gpu.device.event()
        event.record(gpu.stream)
        second.wait(event)
    else:
        gpu.stream.synchronize()
    reader.run(second)
    with pytest.raises(BackendError, match="not ordered behind"):
        out.fill(0, gpu.stream)  # a writer behind a reader of the other stream


def test_later_work_of_a_stream_does_not_hide_earlier_work():
    gpu = Gpu()
    (a, b, c), second = gpu.buffers(3), gpu.device.stream()
    gpu.norm(a, b).run(gpu.stream)
    gpu.norm(b, c).run(gpu.stream)  # reads what the first wrote
    with pytest.raises(BackendError, match=r"not ordered behind norm"):
        gpu.norm(b, gpu.buffers(1)[0]).run(second)
    gpu.stream.synchronize()
    gpu.norm(b, gpu.buffers(1)[0]).run(second)
    gpu.norm(b, c).run(gpu.stream)  # reads beside the other stream's read
    with pytest.raises(BackendError, match=r"not ordered behind norm"):
        b.fill(0, gpu.stream)


def test_a_kernel_waits_when_every_thread_does():
    def always(x, out):
        launch_next()
        launch_wait()

    def sometimes(x, out):
        if thread_x() == 0:
            launch_wait()

    def some(x, out):
        if thread_x() == 0:
            return
        launch_wait()

    assert [waits(f) for f in (always, sometimes, some)] == [True, False, False]


def test_times_are_of_events_that_were_waited_for():
    gpu = Gpu()
    start, end = gpu.device.event(), gpu.device.event()
    start.record(gpu.stream)
    with pytest.raises(BackendError, match="never recorded"):
        end.since(start)
    gpu.norm(*gpu.buffers(2)).run(gpu.stream)
    end.record(gpu.stream)
    with pytest.raises(BackendError, match="not waited for"):
        end.since(start)
    end.synchronize()
    assert np.isnan(end.since(start))


def test_pinned_arrays_reach_the_device():
    gpu = Gpu(execute=True)
    pinned = gpu.device.pinned((ROWS, N), np.float32)
    pinned.array[:] = 3
    (buffer,) = gpu.buffers(1)
    buffer.write(pinned.array, gpu.stream)
    assert (gpu.values(buffer) == 3).all()
    pinned.close()
    pinned.close()


def test_accesses_are_read_from_the_source():
    found = accesses(Kernel.of("matvec", format="Q6_K", columns=2))
    each = [f"{name}{i}" for name in ("w", "b") for i in range(4)]
    outs = {f"out{i}" for i in range(4)} | {"packed"}
    assert found.writes == outs | {"normed", "norm_packed", "tickets"} and found.waits
    assert found.reads == {*each, "x", "residual", "live", "norm_x", "norm_w", "tickets"}
    assert found.widths["w3"] == 16 and found.widths["b3"] == 4
    for kernel in KERNELS.every():
        pointers = {n for n, kind in declared(kernel).entry.arguments if kind.endswith("*")}
        assert accesses(kernel).reads | accesses(kernel).writes == pointers, kernel


@pytest.mark.parametrize("driver", [BoundDriver, FakeDriver])
def test_drivers_have_every_call(driver: type):
    for name, call in vars(Driver).items():
        if inspect.isfunction(call) and not name.startswith("_"):
            found = inspect.signature(getattr(driver, name)).parameters
            assert list(found) == list(inspect.signature(call).parameters), name


def test_pinned_memory_is_left_alone_until_its_copy_was_waited_for():
    gpu = Gpu(execute=True)
    pinned, (buffer,) = gpu.device.pinned((ROWS, N), np.float32), gpu.buffers(1)
    pinned.array[:] = 3
    buffer.write(pinned.array, gpu.stream)
    pinned.array[:] = 4
    with pytest.raises(BackendError, match="pinned memory was changed"):
        gpu.stream.synchronize()
    done = gpu.device.event()
    buffer.write(pinned.array, gpu.stream)
    done.record(gpu.stream)
    done.synchronize()
    pinned.array[:] = 5
    address, nbytes = pinned.array.ctypes.data, pinned.array.nbytes
    gpu.driver.copy_to_host(address, buffer.address, nbytes, gpu.stream.handle)
    assert not (pinned.array == 4).any()
    gpu.stream.synchronize()
    assert (pinned.array == 4).all()
    buffer.write(pinned.array, gpu.stream)
    with pytest.raises(BackendError, match="freed pinned memory before"):
        pinned.close()

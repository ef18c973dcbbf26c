"""Devices, streams and launches: arguments packed once, then one driver call each time.

A launch allocates nothing, synchronises nothing and reads nothing of the device. What is common to
all devices is the driver's; what belongs to one is made by its `Device` and ends with it.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np

from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import BackendError

from .arena import Arena, sized
from .arguments import Arguments
from .catalogue import Compiled
from .driver import SHARED_NBYTES, Driver, Owned
from .library import library
from .targets import target_of

_MOST_BLOCKS = (1 << 31) - 1, 65535, 65535
_numbers = itertools.count()


class Device(Owned):
    """A GPU, its context and the kernels loaded into it."""

    def __init__(self, driver: Driver, index: int = 0, kernels: Any = None) -> None:
        """`kernels`: a Library; by default the user's one for this GPU.

        BackendError: no such GPU, or kernels do not exist for its compute capability.
        """
        if not 0 <= index < driver.device_count():
            raise BackendError(f"no GPU cuda:{index}: the driver sees {driver.device_count()}")
        self.driver, self.index = driver, index
        self.info = driver.device_info(index)
        self.target = target_of(*self.info.capability)
        self._kernels = kernels if kernels is not None else library(self.target)
        self._functions: dict[Kernel, Function] = {}
        self.context = driver.retain_context(index)
        self.activate()

    def activate(self) -> None:
        """Make this the calling thread's device. Launches act on the thread's device."""
        self.driver.use_context(self.context)

    def reach(self, other: Device) -> None:
        """Let kernels here use that device's memory. BackendError: there is no way."""
        if other.index == self.index:
            return
        if not self.driver.can_reach(self.index, other.index):
            raise BackendError(
                f"cuda:{self.index} cannot read the memory of cuda:{other.index} (no peer access): "
                f"split by layers, as layers(cuda:{self.index},cuda:{other.index})"
            )
        self.activate()
        self.driver.reach(other.context)

    def function(self, kernel: Kernel) -> Function:
        """A kernel, compiled if need be and loaded. BackendError: it cannot be."""
        if kernel not in self._functions:
            self._functions[kernel] = Function(self, kernel, self._kernels.get(kernel))
        return self._functions[kernel]

    def prepare(self, kernels: list[Kernel], progress: Any = None) -> None:
        """Compile at once what has yet to be. BackendError: it cannot be."""
        self._kernels.prepare(kernels, progress)

    def missing(self, kernels: list[Kernel]) -> int:
        """How many kernels have yet to be compiled."""
        return len(self._kernels.missing(kernels))

    def launch(self, kernel: Kernel, grid: int | tuple[int, ...], *values: Any) -> Launch:
        """A launch of a kernel, ready to run as often as wanted."""
        return Launch(self.function(kernel), grid, *values)

    def arena(self, nbytes: int, name: str = "") -> Arena:
        """Memory of this device. MemoryLimitError: there is no room."""
        return Arena(self, nbytes, name)

    def stream(self) -> Stream:
        """A new stream."""
        return Stream(self)

    def event(self) -> Event:
        """A new event."""
        return Event(self)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> Pinned:
        """A host array that copies use without staging."""
        return Pinned(self, shape, dtype)

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes."""
        self.activate()
        return self.driver.memory_info()

    def _free(self) -> None:
        try:
            self.activate()
            for function in self._functions.values():
                self.driver.unload(function.library)
            self._functions.clear()
        finally:  # the last one to release a context that failed makes room for a new one
            self.driver.release_context(self.index)


class Function:
    """A kernel loaded into a device."""

    def __init__(self, device: Device, kernel: Kernel, compiled: Compiled) -> None:
        """BackendError: the device has not the shared memory the kernel needs."""
        self.device, self.kernel, self.entry = device, kernel, compiled.entry
        nbytes, most = self.entry.shared_nbytes, device.info.shared_nbytes
        if nbytes > most:
            raise BackendError(
                f"kernel {kernel} needs {sized(nbytes)} of shared memory in a block, and "
                f"{device.info.name} has {sized(most)}"
            )
        device.activate()
        self.library, self.handle = device.driver.load(compiled)
        if nbytes > SHARED_NBYTES:
            device.driver.allow_shared(self.handle, nbytes)


class Launch:
    """A kernel with grid and arguments. `shape` and `address` are what the driver takes."""

    def __init__(self, function: Function, grid: int | tuple[int, ...], *values: Any) -> None:
        """`values` as in `Arguments`. BackendError: they or the grid are not the kernel's."""
        self.function, self.kernel = function, function.kernel
        self.number = next(_numbers)
        self._driver = function.device.driver
        self._arguments = Arguments(function.entry, str(function.kernel), values)
        self.address = self._arguments.address
        self.set_grid(grid)

    @property
    def buffers(self) -> dict[str, Any]:
        """Argument -> Buffer, of every pointer."""
        return self._arguments.buffers

    def set(self, **values: Any) -> None:
        """Change arguments by name: the next run uses them, a graph after its `update`."""
        self._arguments.set(**values)

    def set_grid(self, grid: int | tuple[int, ...]) -> None:
        """Change the number of blocks. BackendError: none, or more than there can be."""
        sizes = (grid,) if isinstance(grid, int) else tuple(grid)
        sizes += (1,) * (3 - len(sizes))
        within = all(1 <= n <= most for n, most in zip(sizes, _MOST_BLOCKS, strict=False))
        if len(sizes) != 3 or not within:
            raise BackendError(f"kernel {self.kernel}: a grid of {list(sizes)} blocks cannot be")
        entry = self.function.entry
        self.shape = self.function.handle, *sizes, entry.threads, 1, 1, entry.shared_nbytes

    def run(self, stream: Stream, programmatic: bool = False) -> None:
        """Give it to the stream; `programmatic`: it may start before the last launch ended."""
        if programmatic:
            self._driver.launch_programmatic(self, stream.handle)
        else:
            self._driver.launch(self, stream.handle)

    def __str__(self) -> str:
        return f"{self.kernel} {list(self.shape[1:4])}"


class Stream(Owned):
    """Work in order."""

    def __init__(self, device: Device) -> None:
        device.activate()
        self.device, self._driver = device, device.driver
        self.handle = self._driver.create_stream()

    def synchronize(self) -> None:
        """Wait until all of it is done."""
        self._driver.synchronize(self.handle)

    def wait(self, event: Event) -> None:
        """Later work of this stream waits for the event."""
        self._driver.wait(self.handle, event.handle)

    def _free(self) -> None:
        self._driver.destroy_stream(self.handle)


class Event(Owned):
    """A place in a stream's work, and when it was reached."""

    def __init__(self, device: Device) -> None:
        device.activate()
        self._driver = device.driver
        self.handle = self._driver.create_event()

    def record(self, stream: Stream) -> None:
        """It happens when the stream gets here."""
        self._driver.record(self.handle, stream.handle)

    def synchronize(self) -> None:
        """Wait for it."""
        self._driver.synchronize_event(self.handle)

    def since(self, start: Event) -> float:
        """Seconds from `start` to this event, both happened; NaN from a driver without a GPU."""
        return self._driver.elapsed(start.handle, self.handle) / 1e3

    def _free(self) -> None:
        self._driver.destroy_event(self.handle)


class Pinned(Owned):
    """A host array in pinned memory, `array`, not to be used once it is closed."""

    def __init__(self, device: Device, shape: tuple[int, ...], dtype: Any) -> None:
        import ctypes

        device.activate()
        self._driver = device.driver
        nbytes = int(np.prod(shape)) * np.dtype(dtype).itemsize
        self._address = self._driver.allocate_host(max(nbytes, 1))
        raw = (ctypes.c_uint8 * nbytes).from_address(self._address)
        self.array = np.frombuffer(raw, dtype).reshape(shape)

    def _free(self) -> None:
        self._driver.free_host(self._address)

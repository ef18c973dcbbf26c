"""What the launcher asks of a CUDA driver, and opening the real one.

`Driver` is the whole interface: `bindings.py` fills it with NVIDIA's driver, tests with one that
needs no GPU. Handles are opaque; addresses, sizes and times are numbers. Calls act
on the context made current in the calling thread.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, Self

from runtime.ops.errors import BackendError

if TYPE_CHECKING:
    from .catalogue import Compiled
    from .launcher import Launch

NEEDED_CUDA = 13000  # as cuDriverGetVersion counts: 13.0
NEEDED_DRIVER = 580  # the first that brings it
SHARED_NBYTES = 48 << 10  # of a block, without asking
ALIGNMENT = 256  # bytes, of what a driver allocates


class DeviceLostError(BackendError):
    """The GPU fails from now on, whatever it is asked: what lay in its memory is gone."""


class Owned:
    """What a driver has made for us, until `close` or the end of a `with`."""

    _open = True

    def close(self) -> None:
        """Give it back; a second call does nothing, and neither does one to a GPU that is lost."""
        if self._open:
            self._open = False
            with contextlib.suppress(DeviceLostError):
                self._free()

    def _free(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


@dataclass(frozen=True)
class DeviceInfo:
    """A GPU. `capability` (major, minor); sizes in bytes, `clock_khz` the highest of its cores.

    `shared_nbytes`: the most a block may have after asking.
    """

    index: int
    name: str
    capability: tuple[int, int]
    total_nbytes: int
    multiprocessors: int
    shared_nbytes: int
    l2_nbytes: int
    clock_khz: int


class Driver(Protocol):
    """A CUDA driver. BackendError: a call failed; MemoryLimitError: no room on the device;
    DeviceLostError: a kernel or the hardware failed, and every later call will."""

    fake: bool

    def version(self) -> int:
        """The newest CUDA it supports, 13000 for 13.0."""

    def device_count(self) -> int:
        """GPUs that this process sees."""

    def device_info(self, index: int) -> DeviceInfo:
        """What a GPU is."""

    def retain_context(self, index: int) -> Any:
        """The primary context of a GPU."""

    def release_context(self, index: int) -> None:
        """Give it back."""

    def use_context(self, context: Any) -> None:
        """Make it current in this thread."""

    def can_reach(self, index: int, other: int) -> bool:
        """Whether kernels on one GPU can be given memory of another."""

    def reach(self, context: Any) -> None:
        """Let kernels of the current context use memory of another GPU's; twice is once."""

    def nccl(self) -> Any:
        """NCCL's library, for the GPUs of this driver. BackendError: it is not installed."""

    def memory_info(self) -> tuple[int, int]:
        """(free, total) bytes of the current device."""

    def allocate(self, nbytes: int) -> int:
        """Address of new memory, a multiple of ALIGNMENT."""

    def free(self, address: int) -> None:
        """Waits for the device, then frees."""

    def allocate_host(self, nbytes: int) -> int:
        """Address of pinned host memory, which copies read and write while the host goes on."""

    def free_host(self, address: int) -> None:
        """The inverse of `allocate_host`."""

    def copy_to_device(self, address: int, host: int, nbytes: int, stream: Any) -> None:
        """In the stream's order; pageable host memory may be reused at once, pinned may not."""

    def copy_to_host(self, host: int, address: int, nbytes: int, stream: Any) -> None:
        """In the stream's order; the bytes are there once the stream was waited for."""

    def copy(self, target: int, source: int, nbytes: int, stream: Any) -> None:
        """From device memory to device memory."""

    def copy_between(
        self, target: int, to: Any, source: int, of: Any, nbytes: int, stream: Any
    ) -> None:
        """From memory of one GPU's context to that of another's, whether these reach it or not."""

    def fill(self, address: int, value: int, nbytes: int, stream: Any) -> None:
        """Every byte `value`."""

    def create_stream(self) -> Any:
        """A stream that does not wait for the default one."""

    def destroy_stream(self, stream: Any) -> None:
        """The inverse of `create_stream`."""

    def synchronize(self, stream: Any) -> None:
        """Wait until everything given to the stream is done."""

    def create_event(self) -> Any:
        """An event that keeps the time."""

    def destroy_event(self, event: Any) -> None:
        """The inverse of `create_event`."""

    def record(self, event: Any, stream: Any) -> None:
        """The event happens when the stream gets here."""

    def wait(self, stream: Any, event: Any) -> None:
        """What is given to the stream from now on waits for the event."""

    def synchronize_event(self, event: Any) -> None:
        """Wait for the event."""

    def elapsed(self, start: Any, end: Any) -> float:
        """Milliseconds between two events that have happened."""

    def load(self, compiled: Compiled) -> tuple[Any, Any]:
        """(library, function) of a cubin, loaded now and not at its first launch."""

    def unload(self, library: Any) -> None:
        """The inverse of `load`."""

    def allow_shared(self, function: Any, nbytes: int) -> None:
        """Let the function's blocks have more than SHARED_NBYTES."""

    def launch(self, launch: Launch, stream: Any) -> None:
        """Give a launch to the stream."""

    def launch_programmatic(self, launch: Launch, stream: Any) -> None:
        """The same; it may start while the launch before it ends, up to its `launch_wait`."""

    def create_graph(self) -> Any:
        """An empty graph."""

    def add_node(
        self, graph: Any, launch: Launch, before: Sequence[Any], programmatic: Sequence[bool]
    ) -> Any:
        """A launch that waits for the nodes `before`, or for their `launch_next` only."""

    def instantiate(self, graph: Any) -> Any:
        """What can be replayed."""

    def update_node(self, executable: Any, node: Any, launch: Launch) -> None:
        """Give a node the launch's arguments and grid as they are now."""

    def launch_graph(self, executable: Any, stream: Any) -> None:
        """Give all nodes to the stream."""

    def destroy_executable(self, executable: Any) -> None:
        """The inverse of `instantiate`."""

    def destroy_graph(self, graph: Any) -> None:
        """The inverse of `create_graph`."""

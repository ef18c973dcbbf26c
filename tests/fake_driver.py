"""A driver without a GPU, for tests: it checks every call, and runs kernels on the simulator.

It refuses, in one line, what a GPU would punish by wrong numbers, a dead context or a hang:

    arguments that are not the kernel's: pointers outside of memory, freed or misaligned; threads
    or shared memory that the kernel was not compiled or not allowed for
    handles that were destroyed, are of another kind or of another device's context
    frees of what was never allocated
    a reader not ordered behind its writer, or a writer behind its readers: between streams
    (`fake_order.py`), and between the nodes of a graph
    programmatic edges and launches to kernels that do not wait
    pinned memory that the host changes, or reads, before it waited for the copy (`fake_pinned.py`)

With `execute`, memory has contents and kernels run on the simulator, nodes of a graph in a random
order that its edges allow; with `quick` on numpy_grid.py instead, for whole models. Time
does not exist, `elapsed` is NaN, but for `microseconds`: what each launch is said to take.
"""

from __future__ import annotations

import ctypes
import math
import random
import threading
from collections.abc import Collection, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from fake_memory import Memory, Reached, Span
from fake_nodes import (
    Function,
    Handle,
    Node,
    check_order,
    check_pointers,
    perform,
    seen,
    shuffled,
    wrong,
)  # fmt: skip
from fake_order import Order
from fake_pinned import PinnedMemory

from runtime.backends.cuda.accesses import accesses
from runtime.backends.cuda.arena import sized
from runtime.backends.cuda.catalogue import Compiled
from runtime.backends.cuda.driver import (
    ALIGNMENT,
    NEEDED_CUDA,
    DeviceInfo,
    DeviceLostError,
    Driver,
)
from runtime.backends.cuda.launcher import Launch
from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import BackendError, MemoryLimitError

H100 = DeviceInfo(0, "fake H100", (9, 0), 80 << 30, 132, 227 << 10, 50 << 20, 1_980_000)


class FakeDriver(Driver):
    """`Driver` for GPUs that are not there; `calls` lists what was asked, oldest first.

    `lost`: an error from which on all calls fail, as they do after one of a kernel.
    """

    fake = True

    def __init__(
        self, devices: Sequence[DeviceInfo] = (H100,), execute: bool = False, seed: int = 0,
        version: int = NEEDED_CUDA, quick: bool = False,
        unreachable: Collection[tuple[int, int]] = (), microseconds: float = math.nan,
    ) -> None:  # fmt: skip
        """unreachable: (GPU, another whose memory its kernels cannot use)."""
        self.calls: list[tuple[Any, ...]] = []
        self._devices, self._version = list(devices), version
        self._execute, self._quick = execute or quick, quick
        self._random = random.Random(seed)
        self._memory = [Memory(d.total_nbytes, self._execute, n) for n, d in enumerate(devices)]
        self._unreachable, self._peers = set(unreachable), set[tuple[int, int]]()
        self._contexts: dict[int, Handle] = {}
        self._thread = threading.local()
        self.streams: dict[int, Handle] = {}  # by number
        self._count = 0
        self._order = Order()
        self._pinned = PinnedMemory(self._order)
        self.lost = ""
        self._microseconds, self._now = microseconds, 0.0
        self._times: dict[Handle, float] = {}
        self.library: Any = None  # of NCCL

    def version(self) -> int:
        return self._version

    def device_count(self) -> int:
        return len(self._devices)

    def device_info(self, index: int) -> DeviceInfo:
        return self._devices[index]

    def retain_context(self, index: int) -> Handle:
        if index not in self._contexts:
            self._contexts[index] = self._new("context", index, value=0)
        self._contexts[index].alive = True
        self._contexts[index].value += 1
        return self._contexts[index]

    def release_context(self, index: int) -> None:
        context = self._alive(self._contexts[index], "context")
        context.value -= 1
        context.alive = context.value > 0

    def use_context(self, context: Handle) -> None:
        self._check_lost()
        if context.kind != "context" or not context.alive:
            raise wrong(f"{context} cannot be made current")
        self._thread.current = context.of

    def can_reach(self, index: int, other: int) -> bool:
        return (index, other) not in self._unreachable

    def reach(self, context: Handle) -> None:
        here, other = self._current(), self._alive(context, "context").of
        if here == other or not self.can_reach(here, other):
            raise wrong(f"GPU {here} cannot reach the memory of GPU {other}")
        self._peers.add((here, other))

    def memory_info(self) -> tuple[int, int]:
        memory = self._here()
        return memory.total - memory.used, memory.total

    def allocate(self, nbytes: int) -> int:
        free, total = self.memory_info()
        if nbytes > free:
            raise MemoryLimitError(
                f"the GPU has no room for {sized(nbytes)}: {sized(free)} of {sized(total)} are "
                "free; use a shorter context, a smaller kv_type or more devices"
            )
        if nbytes <= 0:
            raise wrong(f"an allocation of {nbytes} bytes")
        self._note("allocate", nbytes)
        return self._here().allocate(nbytes, ALIGNMENT)

    def free(self, address: int) -> None:
        self._note("free", address)
        self._order.forget(*self._here().free(address))

    def allocate_host(self, nbytes: int) -> int:
        return self._pinned.allocate(nbytes)

    def free_host(self, address: int) -> None:
        self._check_lost()
        self._pinned.free(address)

    def copy_to_device(self, address: int, host: int, nbytes: int, stream: Handle) -> None:
        self._touch("copy to the device", stream, [Span(address, address + nbytes, True)])
        self._here().write(address, host, nbytes)
        if self._pinned.holds(host):
            self._pinned.sent(stream, host, nbytes)

    def copy_to_host(self, host: int, address: int, nbytes: int, stream: Handle) -> None:
        self._touch("copy to the host", stream, [Span(address, address + nbytes, False)])
        self._here().read(address, host, nbytes)
        if self._pinned.holds(host):
            self._pinned.fetched(stream, host, ctypes.string_at(host, nbytes))

    def copy(self, target: int, source: int, nbytes: int, stream: Handle) -> None:
        both = Span(target, target + nbytes, True), Span(source, source + nbytes, False)
        self._touch("copy", stream, list(both))
        self._here().move(target, source, nbytes)

    def copy_between(
        self, target: int, to: Handle, source: int, of: Handle, nbytes: int, stream: Handle
    ) -> None:
        self._mine(stream, "stream")
        ends = [self._memory[self._alive(context, "context").of] for context in (to, of)]
        spans = [Span(target, target + nbytes, True), Span(source, source + nbytes, False)]
        for memory, span in zip(ends, spans, strict=True):
            memory.check(span.start, span.end, "a copy between GPUs")
        self._note("copy between", stream)
        self._order.add(stream, spans, "a copy between GPUs")
        if self._execute:
            ends[0].contents(target, nbytes)[:] = ends[1].contents(source, nbytes)

    def fill(self, address: int, value: int, nbytes: int, stream: Handle) -> None:
        self._touch("fill", stream, [Span(address, address + nbytes, True)])
        self._here().fill(address, value, nbytes)

    def nccl(self) -> Any:
        if self.library is None:
            raise BackendError("NCCL is not installed: pip install nvidia-nccl-cu13")
        return self.library

    def create_stream(self) -> Handle:
        stream = self._new("stream")
        self.streams[stream.number] = stream
        return stream

    def summed(self, parts: Sequence[tuple[int, Handle, int, int]], nbytes: int) -> None:
        """NCCL's part in it: of each GPU (number, stream, source, target), float32 sums of all.

        No stream goes on before all have come so far. Ring by ring, each begins with another part.
        """
        meeting = [(self._alive(stream, "stream"), object()) for _, stream, _, _ in parts]
        for stream, event in meeting:
            self._order.record(event, stream)
        for _, stream, _, _ in parts:
            for _, event in meeting:
                self._order.wait(stream, event)
        given = []
        for gpu, stream, source, target in parts:
            ends = [Span(source, source + nbytes, False), Span(target, target + nbytes, True)]
            for span in ends:
                self._memory[gpu].check(span.start, span.end, "ncclAllReduce")
            self._order.add(stream, ends, "ncclAllReduce")
            if self._execute:
                given.append(self._memory[gpu].contents(source, nbytes).view(np.float32).copy())
        for gpu, _, _, target in parts if self._execute else ():
            found = self._memory[gpu].contents(target, nbytes).view(np.float32)
            cuts = [len(found) * n // len(given) for n in range(len(given) + 1)]
            for n, (start, end) in enumerate(pairwise(cuts)):
                found[start:end] = sum(part[start:end] for part in given[n:] + given[:n])

    def destroy_stream(self, stream: Handle) -> None:
        self._alive(stream, "stream").alive = False

    def synchronize(self, stream: Handle) -> None:
        self._note("synchronize", self._alive(stream, "stream"))
        self._order.synchronize(stream)
        self._pinned.settle()

    def create_event(self) -> Handle:
        return self._new("event")

    def destroy_event(self, event: Handle) -> None:
        self._alive(event, "event").alive = False

    def record(self, event: Handle, stream: Handle) -> None:
        self._order.record(self._alive(event, "event"), self._alive(stream, "stream"))
        self._times[event] = self._now
        self._now += self._microseconds / 10

    def wait(self, stream: Handle, event: Handle) -> None:
        self._order.wait(self._alive(stream, "stream"), self._alive(event, "event"))

    def synchronize_event(self, event: Handle) -> None:
        self._order.synchronize_event(self._alive(event, "event"))
        self._pinned.settle()

    def elapsed(self, start: Handle, end: Handle) -> float:
        self._order.happened(self._alive(start, "event"), self._alive(end, "event"))
        return (self._times[end] - self._times[start]) / 1e3

    def load(self, compiled: Compiled) -> tuple[Handle, Handle]:
        try:
            kernel = Kernel.parse(compiled.code.decode())
        except ValueError:
            raise wrong(f"kernel {compiled.name} is not of FakeLibrary") from None
        self._note("load", str(kernel))
        library = self._new("library")
        return library, self._new("function", value=Function(kernel, compiled, library))

    def unload(self, library: Handle) -> None:
        self._alive(library, "library").alive = False

    def allow_shared(self, function: Handle, nbytes: int) -> None:
        if nbytes > self._devices[function.of].shared_nbytes:
            raise wrong(f"{sized(nbytes)} of shared memory are more than a block can have")
        self._alive(function, "function").value.shared_nbytes = nbytes

    def launch(self, launch: Launch, stream: Handle) -> None:
        node = self._checked(launch)
        self._touch("launch", stream, node.spans, node.name)
        self._now += self._microseconds
        self._perform(node)

    def launch_programmatic(self, launch: Launch, stream: Handle) -> None:
        if not accesses(launch.kernel).waits:
            raise wrong(f"{launch} is launched early and has no launch_wait")
        self.launch(launch, stream)

    def create_graph(self) -> Handle:
        return self._new("graph", value=[])

    def add_node(
        self, graph: Handle, launch: Launch, before: Sequence[int], programmatic: Sequence[bool]
    ) -> int:
        nodes = self._alive(graph, "graph").value
        if len(before) != len(programmatic) or not all(0 <= n < len(nodes) for n in before):
            raise wrong(f"{launch} waits for nodes that are not of {graph}")
        if any(programmatic) and not all(programmatic):
            raise wrong(f"{launch} has edges of both kinds")
        if any(programmatic) and not accesses(launch.kernel).waits:
            raise wrong(f"{launch} has a programmatic edge and no launch_wait")
        node = self._checked(launch, of_thread=False)
        node.before, node.programmatic = tuple(before), any(programmatic)
        nodes.append(node)
        return len(nodes) - 1

    def instantiate(self, graph: Handle) -> Handle:
        nodes = list(self._alive(graph, "graph").value)
        check_order(nodes)
        self._note("instantiate", len(nodes))
        return self._new("executable", value=nodes)

    def update_node(self, executable: Handle, node: int, launch: Launch) -> None:
        nodes = self._alive(executable, "executable").value
        if not 0 <= node < len(nodes):
            raise wrong(f"node {node} is not of {executable}")
        changed = self._checked(launch, of_thread=False)
        if changed.shape[0] is not nodes[node].shape[0]:
            raise wrong(f"node {node} is {nodes[node].name}, not {changed.name}")
        changed.before = nodes[node].before
        changed.programmatic = nodes[node].programmatic
        after = [*nodes[:node], changed, *nodes[node + 1 :]]
        check_order(after)
        nodes[node] = changed

    def launch_graph(self, executable: Handle, stream: Handle) -> None:
        nodes = self._mine(executable, "executable").value
        for node in nodes:
            self._check_alive(node)
            self._check_reach(node.shape[0].of, node.spans, node.name)
        self._touch("graph", stream, [span for node in nodes for span in node.spans], check=False)
        self._now += self._microseconds * len(nodes)
        for node in shuffled(nodes, self._random) if self._execute else ():
            self._perform(node)

    def destroy_executable(self, executable: Handle) -> None:
        self._alive(executable, "executable").alive = False

    def destroy_graph(self, graph: Handle) -> None:
        self._alive(graph, "graph").alive = False

    def leaks(self) -> list[str]:
        """What is still allocated, oldest first."""
        return [sized(n) for memory in self._memory for n in memory.sizes()]

    def _note(self, *call: Any) -> None:
        self.calls.append(call)

    def _current(self) -> int:
        self._check_lost()
        current = getattr(self._thread, "current", None)
        if current is None or not self._contexts[current].alive:
            raise wrong("no context is current in this thread: activate the device first")
        return current

    def _check_lost(self) -> None:
        if self.lost:
            raise DeviceLostError(f"cuda:0 is lost: {self.lost}")

    def _here(self) -> Memory:
        return self._memory[self._current()]

    def _new(self, kind: str, of: int | None = None, value: Any = None) -> Handle:
        self._count += 1
        handle = Handle(kind, self._current() if of is None else of, self._count, value)
        self._note("create", handle)
        return handle

    def _alive(self, handle: Any, kind: str) -> Handle:
        if kind != "context":
            self._check_lost()
        if not isinstance(handle, Handle) or handle.kind != kind:
            raise wrong(f"{handle!r} is no {kind}")
        if not handle.alive:
            raise wrong(f"{handle} was destroyed")
        return handle

    def _mine(self, handle: Any, kind: str) -> Handle:
        """Alive, and of the thread's device."""
        if self._alive(handle, kind).of != self._current():
            raise wrong(f"{handle} is of GPU {handle.of}, and GPU {self._current()} is current")
        return handle

    def _touch(
        self, what: str, stream: Handle, touched: list[Span], name: str = "", check: bool = True
    ) -> None:
        self._mine(stream, "stream")
        if check:
            self._check_reach(self._current(), touched, name or what)
        self._note(what, *([name] if name else []), stream)
        self._order.add(stream, touched, name or what)

    def _checked(self, launch: Launch, of_thread: bool = True) -> Node:
        """The launch as the driver sees it: through its address and shape alone."""
        function = (self._mine if of_thread else self._alive)(launch.shape[0], "function")
        node = seen(launch)
        self._check_alive(node)
        check_pointers(node, self._reached(function.of))
        return node

    def _check_reach(self, device: int, touched: list[Span], what: str) -> None:
        memory = self._reached(device)
        for span in touched:
            memory.check(span.start, span.end, what)

    def _reached(self, device: int) -> Reached:
        return Reached(self._memory, device, self._peers)

    def _check_alive(self, node: Node) -> None:
        self._alive(self._alive(node.shape[0], "function").value.library, "library")
        for name, buffer in node.buffers.items():
            if not buffer.alive:
                raise wrong(f"{node.name} uses {name} after it was released")

    def _perform(self, node: Node) -> None:
        if self._execute:
            memory = self._reached(node.shape[0].of)
            perform(node, memory, self._random.randrange(1 << 30), self._quick)

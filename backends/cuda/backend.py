"""The CUDA backend: kernels that numba-cuda compiles, one graph of launches replayed per step."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from runtime.backends.base import Choice, Chosen, Progress
from runtime.backends.cuda import arena
from runtime.backends.cuda.driver import DeviceLostError, Driver
from runtime.backends.cuda.gaps import Gaps
from runtime.backends.cuda.held import Held
from runtime.backends.cuda.joint import Joint
from runtime.backends.cuda.launcher import Device
from runtime.backends.cuda.layouts import UNIT
from runtime.backends.cuda.peaks import peaks
from runtime.backends.cuda.planner import Planner, options
from runtime.backends.cuda.program import Program
from runtime.backends.cuda.stores import Store, made_nbytes, stored_nbytes
from runtime.backends.cuda.uploads import REPACK
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.plan import Plan, weight_buffers
from runtime.ops.errors import OptionError
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor

_KERNELS_AND_GRAPHS = 256 << 20  # bytes, of all programs of a model


class CudaBackend:
    """See backends/base.py: one GPU, or one of several virtual devices on it.

    driver, kernels: by default NVIDIA's, and the user's library for the GPU; tests give others.
    graphs: replay each step as one CUDA graph; False: launch by launch, the same bits.
    host_packing: weights are packed by numpy, for tests where the GPU is slower. `gaps`: how long
    the GPU waits between steps.
    """

    exact = False  # several sum parts: twice a layer, where gathers would be four times
    grain = UNIT
    chooses = ahead = True

    def __init__(
        self, file: Any = None, index: int = 0, activations: str = "int8",
        driver: Driver | None = None, kernels: Any = None, fuse: bool = True, graphs: bool = True,
        host_packing: bool = False,
    ) -> None:  # fmt: skip
        if activations not in ("int8", "f32"):
            raise OptionError(f"activations={activations!r} must be 'int8' or 'f32'")
        if driver is None:
            from runtime.backends.cuda.opening import open_driver

            driver = open_driver()
        self.device = Device(driver, index, kernels)
        self.name = f"cuda:{index} ({self.device.info.name})"
        self.bits = f"cuda {self.device.info.name} {self.device.target}, activations {activations}"
        self.threads = 1
        self.planner, self.graphs = Planner(options(activations, fuse)), graphs
        self.stream = self.device.stream()
        self.store = Store(self.device, self.stream, file, host_packing)
        self.gaps = Gaps(self.device)
        self._programs: dict[str, Program] = {}
        self._work: arena.Buffer | None = None
        self._rooms: list[arena.Arena] = []
        self._nothing = self._room(256, "nothing").take(256)
        self._nothing.fill(0, self.stream)

    def page_nbytes(self, leaf: Tensor) -> int:
        """Bytes of one page of all KV heads of a layer, or of one slot."""
        return self.planner.page_nbytes(leaf)

    def copy_pages(
        self, leaves: Sequence[Tensor], sources: Sequence[int], targets: Sequence[int]
    ) -> None:
        """See backends/base.py."""
        self.device.activate()
        for leaf in leaves:
            self.store.copy(leaf, sources, targets)

    def read_state(self, leaf: Tensor, rows: Sequence[int]) -> np.ndarray:
        """See backends/base.py."""
        self.device.activate()
        return self.store.read(leaf, rows)

    def write_state(self, leaf: Tensor, rows: Sequence[int], values: np.ndarray) -> None:
        """See backends/base.py."""
        self.device.activate()
        self.store.write(leaf, rows, values)

    def plan(self, graph: Graph) -> Plan:
        """The plan of a graph, not yet bound to memory; equal graphs give the same plan."""
        return self.planner.plan(graph)

    def program(self, graph: Graph) -> Program:
        """The program of a graph, from the cache where an equal graph was seen before."""
        key = graph.key()
        if key not in self._programs:
            self._programs[key] = self.bind(self.plan(graph))
        return self._programs[key]

    def bind(
        self, plan: Plan, peers: Callable[[str], arena.Buffer] | None = None
    ) -> Program:  # fmt: skip
        """A program for a plan; kernels and weights it needs are made ready.

        peers: of a plan of one of several devices, whose launches run together; see `Program`.
        """
        self.device.activate()
        self.device.prepare(plan.kernels())
        return Program(
            plan, self.device, self.stream, self.store, self.work(plan.arena_nbytes),
            self._nothing, self.gaps, self.graphs, peers,
        )  # fmt: skip

    def work(self, nbytes: int) -> arena.Buffer:
        """Memory for what programs compute, at least so much; older programs keep theirs."""
        if self._work is None or nbytes > self._work.nbytes:
            nbytes = max(nbytes, 256)
            self._work = self._room(nbytes, "activations").take(nbytes)
        return self._work

    @staticmethod
    def joined(devices: Sequence[CudaBackend]) -> Joint:
        """Several that work on every tensor together."""
        return Joint(devices)

    def begin(
        self, program: Program, inputs: Mapping[str, Any], live: Mapping[str, int]
    ) -> list[Held]:
        """See `Choosing` in backends/base.py."""
        return program.begin(inputs, live)

    def choose(
        self, program: Program, inputs: Mapping[str, Any], live: Mapping[str, int],
        choices: Sequence[Choice],
    ) -> Chosen:  # fmt: skip
        """See `Choosing` in backends/base.py."""
        return program.choose(inputs, live, choices)

    def load(self, graphs: Sequence[Graph], progress: Progress | None = None) -> None:
        """Compile or load all kernels of these graphs, then pack and upload the weights."""
        self.device.activate()
        plans = [self.plan(graph) for graph in graphs]
        self.device.prepare(self._kernels(plans), progress)
        buffers = weight_buffers(plans)
        total, done = sum(map(stored_nbytes, buffers)), 0
        for nbytes in self.store.load(buffers):
            done += nbytes
            if progress:
                progress(done, total, "loading weights")

    def memory(self, graph: Graph) -> tuple[int, int]:
        """See backends/base.py.

        Programs of several sizes keep their working memory; kernels and graphs take some, too.
        """
        plan = self.plan(graph)
        weights = sum(map(made_nbytes, weight_buffers([plan])))
        free, _ = self.device.memory_info()
        return free, weights + 2 * plan.arena_nbytes + _KERNELS_AND_GRAPHS

    def bandwidth(self) -> float | None:
        """See backends/base.py: a copy's, measured once on this machine."""
        found = peaks(self.device)
        return found.copy if found.known else None

    def operations(self) -> float | None:
        """See backends/base.py."""
        found = peaks(self.device)
        return found.int8 if found.known else None

    def idle(self) -> contextlib.AbstractContextManager[list[float]]:
        """See backends/base.py."""
        return self.gaps.watched(self.stream)

    def abort(self) -> None:
        """A step cannot be ended early: it takes milliseconds."""

    def missing(self, graphs: Sequence[Graph]) -> int:
        """How many kernels of these graphs have yet to be compiled."""
        return self.device.missing(self._kernels([self.plan(graph) for graph in graphs]))

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """See backends/base.py."""
        return self.planner.distinct_sizes(graph, sizes)

    def close(self) -> None:
        """Give everything back."""
        with contextlib.suppress(DeviceLostError):
            self.device.activate()
            self.stream.synchronize()
        for program in self._programs.values():
            program.close()
        self._programs.clear()
        self.planner.clear()
        self.store.close()
        for room in self._rooms:
            room.close()
        self.stream.close()
        self.device.close()

    def _kernels(self, plans: Sequence[Plan]) -> list[Kernel]:
        """Those of plans, and the one that packs their weights."""
        return [REPACK, *(kernel for plan in plans for kernel in plan.kernels())]

    def _room(self, nbytes: int, name: str) -> arena.Arena:
        self._rooms.append(self.device.arena(nbytes, name))
        return self._rooms[-1]

"""The CPU backend: Numba and LLVM kernels, one native call per step on all threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from typing import Any

import numpy as np

from runtime.backends.base import Joint, Progress
from runtime.backends.cpu.compile.library import Library, library
from runtime.backends.cpu.planner import Planner, options
from runtime.backends.cpu.run.cores import checked, physical_cores
from runtime.backends.cpu.run.executor import ThreadTeam
from runtime.backends.cpu.run.memory import FixedMemory
from runtime.backends.cpu.run.pack_cache import PackCache
from runtime.backends.cpu.run.program import Program
from runtime.backends.cpu.run.weights import WeightStore, aligned
from runtime.backends.cpu.tile.spec import AMX_COLUMNS
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.plan import Buffer, Plan, weight_buffers
from runtime.ops.errors import OptionError
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor

MAX_THREADS = 1024


class CpuBackend:
    """See backends/base.py. `threads` None means one per physical core.

    cores: the logical processors that its threads keep to, such as range(0, 2); None: any. Memory
    is first written by those, so that it lies on their NUMA node. packs: keeps packed weights.
    """

    exact = True  # several cut no sum: a meeting of threads costs next to nothing
    grain = 1

    def __init__(
        self, file: Any = None, threads: int | None = None, activations: str = "int8",
        kernels: Library | None = None, fuse: bool = True, cores: Iterable[int] | None = None,
        packs: PackCache | None = None,
    ) -> None:  # fmt: skip
        if activations not in ("int8", "f32"):
            raise OptionError(f"activations={activations!r} must be 'int8' or 'f32'")
        check_threads(threads)
        self.library = kernels or library()
        kept = None if cores is None else checked(cores)
        self.threads = threads or physical_cores(kept)
        self.name = f"cpu ({self.library.target}, {self.threads} threads)"
        self.bits = f"cpu {self.library.target}, activations {activations}"
        amx = self.library.target == "amx"
        self.planner = Planner(options(activations, AMX_COLUMNS if amx else 8, fuse, split=amx))
        self.team = ThreadTeam(self.threads, self.library.address, kept)
        self.weights = WeightStore(file, self.library, self.team, packs)
        self.memory = FixedMemory(self.weights)
        self._programs: dict[str, Program] = {}
        self._arena, self._scratch = aligned(0), aligned(0)

    def page_nbytes(self, leaf: Tensor) -> int:
        """Bytes of one page of all KV heads of a layer, or of one slot."""
        return self.planner.page_nbytes(leaf)

    def copy_pages(
        self, leaves: Sequence[Tensor], sources: Sequence[int], targets: Sequence[int]
    ) -> None:
        """See backends/base.py."""
        for leaf in leaves:
            self.memory.copy(leaf, sources, targets)

    def read_state(self, leaf: Tensor, rows: Sequence[int]) -> np.ndarray:
        """See backends/base.py."""
        return self.memory.read(leaf, rows)

    def write_state(self, leaf: Tensor, rows: Sequence[int], values: np.ndarray) -> None:
        """See backends/base.py."""
        self.memory.write(leaf, rows, values)

    def plan(self, graph: Graph, guarded: bool = False) -> Plan:
        """The plan of a graph, not yet bound to memory; equal graphs give the same plan."""
        return self.planner.plan(graph, guarded)

    def program(self, graph: Graph) -> Program:
        """The program of a graph, from the cache where an equal graph was seen before."""
        key = graph.key()
        if key not in self._programs:
            self._programs[key] = self.bind(self.plan(graph))
        return self._programs[key]

    def bind(self, plan: Plan, joint: Callable[[Buffer], np.ndarray] | None = None) -> Program:
        """A program for a plan; kernels and weights it needs are made ready. joint: see Program."""
        self.library.prepare(plan.kernels())
        if plan.arena_nbytes > self._arena.nbytes:
            # older programs keep theirs; its pages are given where threads first write them
            self._arena = aligned(plan.arena_nbytes, np.zeros)
        scratch = plan.scratch_nbytes * self.threads
        if scratch > self._scratch.nbytes:
            self._scratch = aligned(scratch)
        return Program(
            plan, self.team, self.library.get, self.memory, self._arena, self._scratch, joint
        )

    @staticmethod
    def joined(devices: Sequence[CpuBackend]) -> Joint:
        """See `Joinable`."""
        from runtime.backends.cpu.joint import Joint as CpuJoint

        return CpuJoint(devices)

    def load(self, graphs: Sequence[Graph], progress: Progress | None = None) -> None:
        """Compile or load all kernels of these graphs, then pack the weights."""
        plans = [self.plan(graph) for graph in graphs]
        buffers = weight_buffers(plans)
        self.library.prepare(self.kernels(plans), progress)
        total, done = self.weights.stored_nbytes(buffers), 0
        with closing(self.weights.load(buffers)) as work:
            for nbytes in work:
                done += nbytes
                if progress:
                    progress(done, total, "loading weights")

    def kernels(self, plans: Sequence[Plan]) -> list[Kernel]:
        """Everything these plans need compiled, packing and the executor included."""
        packing = [
            Kernel.of("pack_weights", format=dict(k.constants)["format"])
            for plan in plans
            for k in plan.kernels()
            if k.name in ("matmul", "matmul_id")
        ]
        found = [k for plan in plans for k in plan.kernels()]
        return list(dict.fromkeys([Kernel.of("executor"), *packing, *found]))

    def abort(self) -> None:
        """See backends/base.py."""
        self.team.abort()

    def missing(self, graphs: Sequence[Graph]) -> int:
        """How many kernels of these graphs have yet to be compiled."""
        return len(self.library.missing(self.kernels([self.plan(g) for g in graphs])))

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """See `Planner.distinct_sizes`."""
        return self.planner.distinct_sizes(graph, sizes)

    def close(self) -> None:
        """End the threads."""
        self.team.close()
        self._programs.clear()
        self.planner.clear()


def check_threads(threads: int | None) -> None:
    """OptionError for what no device can have."""
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise OptionError(f"threads={threads} must be from 1 to {MAX_THREADS}")

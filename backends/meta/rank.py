"""What each process of an MPI run does of what the first one asks: methods by name."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from runtime.backends.base import Progress
from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.run.apart import Apart, Meeting, memory_of
from runtime.backends.cpu.run.cores import physical_cores, processors
from runtime.backends.cpu.run.pack_cache import PackCache
from runtime.backends.cpu.run.program import Program
from runtime.backends.meta.parts import SplitGraphs, cut_of, inferred
from runtime.backends.meta.processes import Processes
from runtime.backends.plan.fingerprint import code, sampled
from runtime.backends.plan.plan import Plan
from runtime.ops.cuts import Parts, cut_array
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor


class Rank:
    """The device of this process, and its part of all graphs and states.

    threads: None: those of a machine are shared out among its processes. shares: of all processes.
    """

    def __init__(
        self, beside: Processes, file: Any, threads: int | None, activations: str,
        shares: Sequence[float], pack_cache: str = "",
    ) -> None:  # fmt: skip
        if threads is None:
            threads = max(1, physical_cores() // beside.beside)
        packs = PackCache(file, pack_cache) if pack_cache else None
        self.device = CpuBackend(file, threads, activations, packs=packs)
        self.shares = ",".join(f"{share:g}" for share in shares)
        self.split = SplitGraphs(shares, partial(inferred, told=beside.rank == 0))
        beside.crowded = threads * beside.beside > processors()
        self.programs: dict[str, tuple[Program, Apart]] = {}
        self._beside = beside
        self._meeting = Meeting(threads, self.device.team.abort)

    def plan(self, graph: Graph) -> Plan:
        """This device's."""
        return self.device.plan(self._mine(graph))

    def missing(self, graphs: Sequence[Graph]) -> int:
        """How many kernels have yet to be compiled here."""
        return self.device.missing([self._mine(graph) for graph in graphs])

    def load(self, graphs: Sequence[Graph], progress: Progress | None = None) -> None:
        """Kernels and weights of this device's parts."""
        self.device.load([self._mine(graph) for graph in graphs], progress)

    def program(self, graph: Graph) -> str:
        """Make this device's program; its key."""
        key = graph.key()
        if key not in self.programs:
            plan, beside = self.plan(graph), self._beside
            apart = Apart(
                plan, beside.rank, beside.size, self._meeting, self.device.threads, beside.exchange
            )
            self.programs[key] = self.device.bind(plan, memory_of(apart)), apart
        return key

    def run(
        self, key: str, inputs: Mapping[str, np.ndarray], live: Mapping[str, int],
        profile: bool = False,
    ) -> Any:  # fmt: skip
        """One step: its results, worth nothing if the first process has ended it early."""
        program, apart = self.programs[key]
        self._meeting.begin(apart.begin(live))
        found = program.profile(inputs, live) if profile else program.run(inputs, live)
        self._meeting.end()
        return found

    def copy_pages(self, leaves: Sequence[Tensor], sources: Any, targets: Any) -> None:
        """This device's parts of pages or slots."""
        parts = [part for leaf in leaves if (part := self._part(leaf)) is not None]
        self.device.copy_pages(parts, sources, targets)

    def read(self, leaf: Tensor, rows: Sequence[int]) -> tuple[Parts, np.ndarray] | None:
        """How this device's part of a state is cut, and what it holds."""
        part = self._part(leaf)
        return None if part is None else (cut_of(part), self.device.read_state(part, rows))

    def write(self, leaf: Tensor, rows: Sequence[int], values: np.ndarray) -> None:
        """What of these numbers this device has."""
        part = self._part(leaf)
        if part is not None:
            self.device.write_state(part, rows, cut_array(values, cut_of(part)))

    def close(self) -> None:
        """End the threads."""
        self.device.close()
        self.programs.clear()
        self.split.clear()

    def _mine(self, graph: Graph) -> Graph:
        return self.split.of(graph)[self._beside.rank]

    def _part(self, leaf: Tensor) -> Tensor | None:
        return self.split.states(leaf)[self._beside.rank]


def fingerprint(file: Any) -> dict[str, str]:
    """What must be the same in all processes: the version of the code, and the file."""
    version = sys.modules["runtime"].__version__
    return {
        "version": f"{version}, code {code()}",
        "file": f"{file.tensors_nbytes} bytes, {sampled(file)[:12]}",
    }

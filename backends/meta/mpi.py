"""Devices of other processes and machines: every process of an MPI run brings one.

    mpiexec -n 2 runtime run MODEL --devices "tensor(mpi)"

All processes begin alike. Process 0 goes on as with any other device; the others load their part of
the weights and do as they are told by it (see `_Part`), until it closes the model: then they end.
What is added up is sent to everybody and added in the order of the processes, so the bits do not
depend on the MPI library.
"""

from __future__ import annotations

import atexit
import hashlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from types import MappingProxyType
from typing import Any, NoReturn

import numpy as np

from runtime.backends.base import Progress
from runtime.backends.cpu import CpuBackend
from runtime.backends.cpu.run.apart import Apart, Meeting, memory_of
from runtime.backends.cpu.run.program import Program
from runtime.backends.meta.tensor import inferred
from runtime.backends.passes.fuse_collectives import fuse_residuals
from runtime.backends.passes.prepare import choose_rows
from runtime.backends.plan.plan import Plan
from runtime.ops.cuts import Parts, cut_array
from runtime.ops.dtypes import DTYPES
from runtime.ops.errors import BackendError, OptionError
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor

_SPIN = 0.02  # seconds that a process listens closely; then it looks up now and then
_NAP = 0.0005


@cache
def world() -> Any:
    """The processes of this run. OptionError: MPI is not there, or there is one process."""
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise OptionError(
            f"devices: mpi needs mpi4py and an MPI library ({error}): "
            "pip install 'graph-runtime[mpi]'"
        ) from None
    found = MPI.COMM_WORLD
    if found.size == 1:
        raise OptionError(
            "devices: mpi is for several processes; start them with "
            "mpiexec -n 2 runtime run MODEL --devices 'tensor(mpi)'"
        )
    return found


def open_mpi(
    file: Any, threads: int | None, activations: str, shares: Sequence[float]
) -> MpiBackend:
    """The backend of process 0; in every other one it never returns, and ends the process.

    threads: of each process; None: those of a machine are shared out among its processes.
    """
    comm = world()
    if threads is None:
        from runtime.backends.cpu.run.cores import physical_cores

        beside = comm.Split_type(_mpi().COMM_TYPE_SHARED).size
        threads = max(1, physical_cores() // beside)
    _check_alike(comm, file)
    part = _Part(comm, CpuBackend(file, threads, activations), shares)
    if comm.rank:
        _follow(comm, part)
    return MpiBackend(comm, part)


def _mpi() -> Any:
    from mpi4py import MPI

    return MPI


def _check_alike(comm: Any, file: Any) -> None:
    """OptionError unless all processes are of one version and have the same file."""
    from runtime import __version__

    metadata = repr(sorted(file.metadata, key=str)).encode()
    tensors = repr([(t.name, tuple(t.shape), t.dtype.name) for t in file.tensors.values()]).encode()
    digest = hashlib.sha256(metadata + tensors).hexdigest()[:12]
    own = {
        "version": f"{__version__}, numpy {np.__version__}",
        "file": f"{file.tensors_nbytes} bytes, {digest}",
    }
    for rank, other in enumerate(comm.allgather(own)):
        for what, value in own.items():
            if other[what] != value:
                raise OptionError(
                    f"devices: the {what} of MPI process {rank} is another one ({other[what]}) "
                    f"than that of process {comm.rank} ({value}); all must have the same"
                )


class _Part:
    """What each process does of what process 0 asks: methods by name, alike in all of them."""

    def __init__(self, comm: Any, device: CpuBackend, shares: Sequence[float]) -> None:
        self.device, self._comm, self._shares = device, comm, tuple(shares)
        self.graphs: dict[str, list[Graph]] = {}
        self.programs: dict[str, tuple[Program, Apart]] = {}
        self._meeting = Meeting(device.threads, self._failed)
        self._states: dict[str, list[Tensor | None]] = {}

    def split(self, graph: Graph) -> str:
        """Know of each device its part of a graph; the graph's key."""
        key = graph.key()
        if key not in self.graphs:
            made = fuse_residuals(inferred(choose_rows(graph), self._shares))
            self.graphs[key] = list(made)
            leaves = [{leaf.name: leaf for leaf in each.leaves("state")} for each in made]
            for name in dict.fromkeys(name for each in leaves for name in each):
                self._states.setdefault(name, [each.get(name) for each in leaves])
        return key

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
        key = self.split(graph)
        if key not in self.programs:
            plan, comm = self.plan(graph), self._comm
            apart = Apart(
                plan, comm.rank, comm.size, self._meeting, self.device.threads, self._all_to_all
            )
            self.programs[key] = self.device.bind(plan, memory_of(apart)), apart
        return key

    def run(
        self, key: str, inputs: Mapping[str, np.ndarray], live: Mapping[str, int],
        profile: bool = False,
    ) -> Any:  # fmt: skip
        """One step."""
        program, apart = self.programs[key]
        self._meeting.begin(apart.begin(live))
        return program.profile(inputs, live) if profile else program.run(inputs, live)

    def copy_pages(self, leaves: Sequence[Tensor], sources: Any, targets: Any) -> None:
        """This device's parts of pages or slots."""
        parts = [part for leaf in leaves if (part := self.part(leaf)) is not None]
        self.device.copy_pages(parts, sources, targets)

    def read(self, leaf: Tensor, rows: Sequence[int]) -> tuple[Parts, np.ndarray] | None:
        """How this device's part of a state is cut, and what it holds."""
        part = self.part(leaf)
        if part is None:
            return None
        return part.attrs.get("cut", ()), self.device.read_state(part, rows)

    def write(self, leaf: Tensor, rows: Sequence[int], values: np.ndarray) -> None:
        """What of these numbers this device has."""
        part = self.part(leaf)
        if part is not None:
            cut = part.attrs.get("cut", ())
            self.device.write_state(part, rows, cut_array(values, cut))

    def part(self, leaf: Tensor, rank: int | None = None) -> Tensor | None:
        """The part of a state leaf that a device has."""
        parts = self._states.get(leaf.name)
        found = parts and parts[self._comm.rank if rank is None else rank]
        if not found:
            return None
        attrs = dict(found.attrs)
        if "whole" in attrs:
            attrs["whole"] = (int(leaf.shape[0]), *attrs["whole"][1:])
        return found.with_(shape=(leaf.shape[0], *found.shape[1:]), attrs=attrs)

    def abort(self) -> None:
        """End early what is under way."""
        self._meeting.abort()
        self.device.abort()

    def close(self) -> None:
        """End the threads."""
        self.device.close()
        self.programs.clear()

    def _mine(self, graph: Graph) -> Graph:
        return self.graphs[self.split(graph)][self._comm.rank]

    def _all_to_all(
        self, mine: np.ndarray, counts: Sequence[int], found: np.ndarray, starts: Sequence[int]
    ) -> None:
        byte = _mpi().BYTE
        self._comm.Allgatherv([mine, byte], [found, (counts, starts), byte])

    def _failed(self, error: BaseException) -> NoReturn:
        print(f"runtime: MPI process {self._comm.rank}: {error}", file=sys.stderr, flush=True)
        self._comm.Abort(1)
        os._exit(1)


_TOLD = 7  # the tag of what process 0 says
_ANSWERED = 8


def _follow(comm: Any, part: _Part) -> NoReturn:
    """Do what process 0 says, and answer where it waits for that, until it says the end."""
    while True:
        heard = time.monotonic()
        while not comm.Iprobe(source=0, tag=_TOLD):
            if time.monotonic() - heard > _SPIN:
                time.sleep(_NAP)
        name, arguments, answer = unpacked(comm.recv(source=0, tag=_TOLD))
        if name == "close":
            part.close()
            sys.stdout.flush()
            raise SystemExit(0)
        result, error = None, ""
        try:
            result = getattr(part, name)(*arguments)
        except Exception as problem:
            error = f"{problem}" or type(problem).__name__
        if answer:
            comm.send((result, error), dest=0, tag=_ANSWERED)
        elif error:
            part._failed(BackendError(error))


class MpiBackend:
    """See backends/base.py: the devices of all processes, in process 0."""

    def __init__(self, comm: Any, part: _Part) -> None:
        self._comm, self._part, self._closed = comm, part, False
        self.threads = part.device.threads
        self.name = f"tensor (mpi, {comm.size} processes; of the first {part.device.name})"
        self._loaded: Progress | None = None
        atexit.register(self.close)

    def page_nbytes(self, leaf: Tensor) -> int:
        """Bytes of one page, or slot, on all devices together."""
        found = [self._part.part(leaf, rank) for rank in range(self._comm.size)]
        parts = [part for part in found if part is not None] or [leaf]
        return sum(map(self._part.device.page_nbytes, parts))

    def copy_pages(
        self, leaves: Sequence[Tensor], sources: Sequence[int], targets: Sequence[int]
    ) -> None:
        """See backends/base.py."""
        self._all("copy_pages", leaves, sources, targets)

    def read_state(self, leaf: Tensor, rows: Sequence[int]) -> np.ndarray:
        """See backends/base.py: as one device has it, however it is split."""
        out = np.zeros((len(rows), *map(int, leaf.shape[1:])), np.float32)
        places = np.arange(out.size).reshape(out.shape)
        for found in self._asked("read", leaf, rows):
            if found is not None:
                out.flat[cut_array(places, found[0])] = found[1]
        return out

    def write_state(self, leaf: Tensor, rows: Sequence[int], values: np.ndarray) -> None:
        """See backends/base.py."""
        self._all("write", leaf, rows, values)

    def plan(self, graph: Graph) -> Plan:
        """The first device's."""
        return self._part.plan(graph)

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """See `Planner.distinct_sizes`; of the first device."""
        found = self._part.graphs[self._part.split(graph)]
        return self._part.device.distinct_sizes(found[0], sizes)

    def abort(self) -> None:
        """See backends/base.py."""
        self._part.abort()

    def missing(self, graphs: Sequence[Graph]) -> int:
        """Whether kernels of these graphs have yet to be compiled anywhere."""
        return sum(self._asked("missing", list(graphs)))

    def program(self, graph: Graph) -> MpiProgram:
        """A program of every device."""
        key = self._asked("program", graph)[0]
        return MpiProgram(self._part.programs[key][0].plan, self._comm.size, key, self._all)

    def load(self, graphs: Sequence[Graph], progress: Progress | None = None) -> None:
        """Kernels and weights of all processes; the progress is the first one's."""
        self._loaded = progress
        self._asked("load", list(graphs))

    def close(self) -> None:
        """End the other processes, and the threads of this one."""
        if not self._closed:
            self._closed = True
            self._tell("close", (), False)
            self._part.close()
            atexit.unregister(self.close)

    def _tell(self, name: str, arguments: tuple[Any, ...], answer: bool) -> None:
        message = packed((name, arguments, answer))
        for rank in range(1, self._comm.size):
            self._comm.send(message, dest=rank, tag=_TOLD)

    def _all(self, name: str, *arguments: Any) -> Any:
        """Have it done by all devices at the same time; this one's result."""
        self._tell(name, arguments, False)
        return getattr(self._part, name)(*arguments)

    def _asked(self, name: str, *arguments: Any) -> list[Any]:
        """The results of all devices. BackendError, naming the process, for the first error."""
        self._tell(name, arguments, True)
        more = (self._loaded,) if name == "load" else ()
        try:
            found = [getattr(self._part, name)(*arguments, *more)]
        finally:
            answers = [
                self._comm.recv(source=rank, tag=_ANSWERED) for rank in range(1, self._comm.size)
            ]
        for rank, (_, error) in enumerate(answers, 1):
            if error:
                raise BackendError(f"MPI process {rank}: {error}")
        return found + [result for result, _ in answers]


class MpiProgram:
    """See backends/base.py. Its plan and the times of rows are the first device's."""

    observable = False

    def __init__(self, plan: Plan, devices: int, key: str, all_run: Callable[..., Any]) -> None:
        self.plan, self._key, self._all = plan, key, all_run
        self.devices = devices

    def run(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> list[np.ndarray]:
        """One step of all devices; results as the first one has them."""
        found: list[np.ndarray] = self._all("run", self._key, dict(inputs), dict(live))
        return found

    def profile(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """As `run`, with the nanoseconds of each row."""
        found: tuple[list[np.ndarray], np.ndarray] = self._all(
            "run", self._key, dict(inputs), dict(live), True
        )
        return found


def packed(message: tuple[str, tuple[Any, ...], bool]) -> bytes:
    """What one process says to another, as bytes; graphs and leaves among the arguments too."""
    name, arguments, answer = message
    return pickle.dumps((name, [_plain(a) for a in arguments], answer), pickle.HIGHEST_PROTOCOL)


def unpacked(content: bytes) -> tuple[str, list[Any], bool]:
    """The inverse of `packed`."""
    name, arguments, answer = pickle.loads(content)
    return name, [_rebuilt(a) for a in arguments], answer


class _Flat(tuple):  # type: ignore[type-arg]
    """(outputs, name) of a graph, or (None, None) of tensors alone; its nodes in order."""


def _plain(value: Any) -> Any:
    if isinstance(value, Graph):
        return _Flat(
            (_rows(value.nodes), [value.nodes.index(o) for o in value.outputs], value.name)
        )
    if isinstance(value, Tensor):
        return _Flat((_rows([value]), None, None))
    if isinstance(value, list | tuple) and value and isinstance(value[0], Graph | Tensor):
        return [_plain(v) for v in value]
    return value


def _rebuilt(value: Any) -> Any:
    if isinstance(value, list):
        return [_rebuilt(v) for v in value]
    if not isinstance(value, _Flat):
        return value
    rows, outputs, name = value
    nodes: list[Tensor] = []
    for op, inputs, shape, dtype, attrs, label in rows:
        given = tuple(nodes[i] for i in inputs)
        nodes.append(Tensor(op, given, shape, DTYPES[dtype], MappingProxyType(attrs), label))
    return nodes[0] if outputs is None else Graph(tuple(nodes[i] for i in outputs), name)


def _rows(nodes: Sequence[Tensor]) -> list[tuple[Any, ...]]:
    number = {node: n for n, node in enumerate(nodes)}
    return [
        (x.op, [number[i] for i in x.inputs], x.shape, x.dtype.name, dict(x.attrs), x.name)
        for x in nodes
    ]

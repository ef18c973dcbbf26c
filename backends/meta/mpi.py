"""Devices of other processes and machines: every process of an MPI run brings one.

    mpiexec -n 2 runtime run MODEL --devices "tensor(mpi)"

All processes begin alike. Process 0 goes on as with any other device; the others open the same
file, load their part of the weights and do as they are told (see `Rank`) until it ends: then they
end. What is added up is sent to everybody and added in the order of the processes, so the bits do
not depend on the MPI library.
"""

from __future__ import annotations

import atexit
import itertools
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any, NoReturn

import numpy as np

from runtime.backends.base import Progress
from runtime.backends.meta.parts import joined
from runtime.backends.meta.processes import Processes, follows, processes
from runtime.backends.meta.rank import Rank, fingerprint
from runtime.backends.plan.plan import Plan
from runtime.ops.errors import BackendError, OptionError
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor

_HEAR = 0.05  # seconds between two looks at signals

OpenFile = Callable[[str], Any]


def take_part(open_file: OpenFile) -> None:
    """Returns in process 0 alone; the others do as it says, and end when it does.

    open_file: opens a model by its path. OptionError, in process 0: see `processes`.
    """
    try:
        beside = processes()
    except OptionError:
        if follows():
            raise SystemExit(1) from None  # process 0 says it
        raise
    if beside.rank:
        _follow(beside, open_file)
    _end_with(beside)


def open_mpi(
    file: Any, threads: int | None, activations: str, shares: Sequence[float],
    pack_cache: str = "",
) -> MpiBackend:  # fmt: skip
    """The devices of all processes, in process 0, where `take_part` has returned.

    threads: of each process; None: those of a machine are shared out among its processes.
    """
    beside, number = processes(), next(_numbers)
    given = threads, activations, [float(share) for share in shares], pack_cache
    beside.tell([number, "open", [str(file.path), fingerprint(file), *given], True])
    with _answered(beside):
        rank = Rank(beside, file, *given)
    return MpiBackend(beside, rank, number)


_numbers = itertools.count()  # of the models that are opened


@cache
def _end_with(beside: Processes) -> None:
    """The other processes end with this one."""

    def end() -> None:
        if not beside.lost:
            beside.tell([-1, "end", [], False])
            return
        sys.stdout.flush()
        sys.stderr.flush()
        beside.leave()
        os._exit(beside.status)  # the end of MPI would wait for all

    atexit.register(end)


def _follow(beside: Processes, open_file: OpenFile) -> NoReturn:
    """Do what process 0 says until it says the end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # process 0 hears of it
    os.environ["DEBUG"] = ""  # process 0 tells of plans
    ranks: dict[int, Rank] = {}
    try:
        while _done(beside, ranks, open_file, *beside.hear()):
            pass
    except BackendError as error:
        if beside.speaks():
            print(f"runtime: {error}", file=sys.stderr, flush=True)
        os._exit(1)
    raise SystemExit(0)


def _done(
    beside: Processes, ranks: dict[int, Rank], open_file: OpenFile, number: int, name: str,
    arguments: list[Any], answer: bool,
) -> bool:  # fmt: skip
    """Do it, and answer where process 0 waits for that; False: it is the end."""
    result, error = None, ""
    try:
        if name in ("close", "end"):
            for rank in [ranks.pop(n) for n in [*ranks] if n == number or name == "end"]:
                rank.close()
        elif name == "open":
            ranks[number] = _opened(beside, open_file, *arguments)
        else:
            result = getattr(ranks[number], name)(*arguments)
    except Exception as problem:
        beside.check()
        error = " ".join(str(problem).split()) or type(problem).__name__
    if answer:
        beside.answer(result, error)
    elif error:
        beside.fail(error)
        while name != "end":  # it has not done what the others have
            name = beside.hear()[1]
    return name != "end"


def _opened(
    beside: Processes, open_file: OpenFile, path: str, first: Mapping[str, str], *given: Any
) -> Rank:
    """OptionError unless the code and the file are those of process 0."""
    file = open_file(path)
    for what, value in fingerprint(file).items():
        if value != first[what]:
            raise OptionError(f"its {what} ({value}) is not that of process 0 ({first[what]})")
    return Rank(beside, file, *given)


@contextmanager
def _answered(beside: Processes) -> Iterator[list[Any]]:
    """What all others answer to what they were told, once this one has done it as well.

    BackendError, naming the process, for the first error of any.
    """
    found: list[Any] = []
    try:
        yield found
    except Exception:
        beside.answers()
        raise
    for rank, (result, error) in enumerate(beside.answers(), 1):
        if error:
            raise BackendError(f"MPI process {rank}: {error}")
        found.append(result)


class MpiBackend:
    """See backends/base.py: the devices of all processes, in process 0."""

    def __init__(self, beside: Processes, rank: Rank, number: int) -> None:
        self._beside, self._rank, self._number = beside, rank, number
        self.threads = rank.device.threads
        self.name = f"tensor (mpi, {beside.size} processes; the first: {rank.device.name})"
        self.bits = f"tensor(mpi, {rank.shares}: {rank.device.bits})"
        # What all do at the same time is done by a thread that no signal interrupts.
        self._worker: ThreadPoolExecutor | None = ThreadPoolExecutor(1)

    def page_nbytes(self, leaf: Tensor) -> int:
        """Bytes of one page, or slot, on all devices together."""
        parts = [part for part in self._rank.split.states(leaf) if part is not None]
        return sum(map(self._rank.device.page_nbytes, parts))

    def copy_pages(
        self, leaves: Sequence[Tensor], sources: Sequence[int], targets: Sequence[int]
    ) -> None:
        """See backends/base.py."""
        self._all("copy_pages", leaves, sources, targets)

    def read_state(self, leaf: Tensor, rows: Sequence[int]) -> np.ndarray:
        """See backends/base.py: as one device has it, however it is split."""
        parts = self._asked("read", leaf, rows)
        return joined(leaf, len(rows), (part for part in parts if part is not None))

    def write_state(self, leaf: Tensor, rows: Sequence[int], values: np.ndarray) -> None:
        """See backends/base.py."""
        self._all("write", leaf, rows, values)

    def plan(self, graph: Graph) -> Plan:
        """The first device's."""
        return self._rank.plan(graph)

    def distinct_sizes(self, graph: Graph, sizes: Sequence[int]) -> list[int]:
        """See `Planner.distinct_sizes`; of any device."""
        alike = itertools.repeat(self._rank.device)
        return self._rank.split.distinct_sizes(graph, sizes, alike)

    def abort(self) -> None:
        """See backends/base.py: where the processes meet next."""
        self._beside.stop = True

    def missing(self, graphs: Sequence[Graph]) -> int:
        """How many kernels have yet to be compiled, in all processes together."""
        return sum(self._asked("missing", list(graphs)))

    def program(self, graph: Graph) -> MpiProgram:
        """A program of every device."""
        key = self._asked("program", graph)[0]
        return MpiProgram(self._rank.programs[key][0].plan, key, self._all)

    def load(self, graphs: Sequence[Graph], progress: Progress | None = None) -> None:
        """Kernels and weights of all processes; the progress is the first one's."""
        self._asked("load", list(graphs), progress=progress)

    def close(self) -> None:
        """End the threads of all devices."""
        worker, self._worker = self._worker, None
        if worker is not None:
            self.abort()
            worker.shutdown()
            if not self._beside.lost:
                self._beside.tell([self._number, "close", [], False])
            self._rank.close()

    def _all(self, name: str, *arguments: Any) -> Any:
        """Have it done by all devices at the same time, wholly; this one's result.

        What a signal's handler raises ends it early.
        """

        def work() -> Any:
            self._beside.stop = False
            self._beside.tell([self._number, name, arguments, False])
            try:
                return getattr(self._rank, name)(*arguments)
            except Exception as error:  # while others wait for this one
                raise self._beside.lose(str(error)) from None

        assert self._worker is not None, "closed"
        under_way = self._worker.submit(work)
        try:
            while True:
                with suppress(TimeoutError):
                    return under_way.result(_HEAR)
        except BaseException:
            while not under_way.done():
                self.abort()  # again, for the step may only now have begun
                wait([under_way], _HEAR)
            raise

    def _asked(self, name: str, *arguments: Any, **own: Any) -> list[Any]:
        """The results of all devices. BackendError, naming the process, for the first error."""
        try:
            self._beside.tell([self._number, name, arguments, True])
            with _answered(self._beside) as found:
                found.append(getattr(self._rank, name)(*arguments, **own))
        except KeyboardInterrupt:
            self._beside.lose("this MPI run was interrupted while its processes were loading")
            self._beside.status = 130
            raise
        return found


class MpiProgram:
    """See backends/base.py. Its plan and the times of rows are the first device's."""

    observable = False

    def __init__(self, plan: Plan, key: str, all_run: Callable[..., Any]) -> None:
        self.plan, self._key, self._all = plan, key, all_run

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

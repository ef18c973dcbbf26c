"""Several CPU devices that run their graphs at the same time and read of each other."""

from __future__ import annotations

import queue
import threading
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from runtime.backends.base import Progress
from runtime.backends.cpu.run.exchange import Exchange
from runtime.backends.cpu.run.group import TeamGroup
from runtime.backends.cpu.run.program import Pace, Program
from runtime.backends.cpu.run.weights import aligned
from runtime.backends.plan.kernel import Kernel
from runtime.backends.plan.plan import Buffer, Plan, weight_buffers

if TYPE_CHECKING:
    from runtime.backends.cpu import CpuBackend

_HEAR = 0.05  # seconds between two looks at signals
_LEADING = (Kernel.of("lead_teams"), Kernel.of("meet"))


class Joint:
    """Devices that each run their own graph of a step; their owner closes them."""

    def __init__(self, devices: Sequence[CpuBackend]) -> None:
        self._devices = first, *others = tuple(devices)
        for device in others:
            device.weights.share_rows(first.weights)
        self._group = TeamGroup([device.team for device in devices])
        self._rooms = [aligned(0)] * (len(devices) + 1)

    def bind(self, plans: Sequence[Plan]) -> JointProgram:
        """The program of a plan of each device."""
        threads = [device.threads for device in self._devices]
        self._devices[0].library.prepare(_LEADING)
        exchange = Exchange(plans, self._room, self._group.meeting, threads)
        programs = [
            device.bind(plan, partial(exchange.memory, n))
            for n, (device, plan) in enumerate(zip(self._devices, plans, strict=True))
        ]
        return JointProgram(programs, self._group)

    def missing(self, plans: Sequence[Sequence[Plan]]) -> int:
        """How many kernels of these plans, of each device some, have yet to be compiled."""
        return len(self._devices[0].library.missing(self._kernels(plans)))

    def load(self, plans: Sequence[Sequence[Plan]], progress: Progress | None = None) -> None:
        """Kernels of these plans, of each device some; then the weights, on all devices at once."""
        self._devices[0].library.prepare(self._kernels(plans), progress)
        buffers = once(weight_buffers(each) for each in plans)
        total = sum(
            device.weights.stored_nbytes(each)
            for device, each in zip(self._devices, buffers, strict=True)
        )
        done = 0
        for nbytes in at_once(
            device.weights.load(each) for device, each in zip(self._devices, buffers, strict=True)
        ):
            done += nbytes
            if progress:
                progress(done, total, "loading weights")

    def abort(self) -> None:
        """See backends/base.py."""
        self._group.abort()

    def close(self) -> None:
        """End the threads that lead."""
        self._group.close()

    def _kernels(self, plans: Sequence[Sequence[Plan]]) -> list[Kernel]:
        of_each = zip(self._devices, plans, strict=True)
        return [*_LEADING, *(k for device, each in of_each for k in device.kernels(each))]

    def _room(self, device: int, nbytes: int) -> np.ndarray:
        """Memory for what others read; older programs keep theirs."""
        if nbytes > self._rooms[device].nbytes:
            self._rooms[device] = aligned(nbytes)
        return self._rooms[device]


class JointProgram:
    """See backends/base.py. Its plan and the times of rows are the first device's."""

    observable = False  # of one device alone it would wait for the others

    def __init__(self, programs: Sequence[Program], group: TeamGroup) -> None:
        first = programs[0].plan
        self.plan = replace(first, name=f"{first.name}, the first of {len(programs)} devices")
        self._programs, self._group = tuple(programs), group
        self._tables = [program.table.records() for program in programs]
        self._pace = Pace()

    def run(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> list[np.ndarray]:
        """One step of all devices; results as the first one has them."""
        self._prepare(inputs, live)
        self._pace.run(live, lambda long: self._group.run(self._tables, long))
        return self._programs[0].results(live)

    def profile(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> tuple[list[np.ndarray], np.ndarray]:
        """As `run`, with the nanoseconds of each row as the first thread sees them."""
        self._prepare(inputs, live)
        table = self._programs[0].table
        times = np.zeros(self._tables[0][1] + 1, np.int64)
        self._group.run(self._tables, profile=times.ctypes.data)
        return self._programs[0].results(live), np.diff(times[table.starts])

    def _prepare(self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]) -> None:
        for program in self._programs:
            program.prepare(inputs, live)


def once(of_each: Iterable[list[Buffer]]) -> list[list[Buffer]]:
    """The weights of each device; of rows that several look up, which they share, the first's."""
    found: list[list[Buffer]] = []
    shared: set[Hashable] = set()
    for buffers in of_each:
        found.append([b for b in buffers if b.memory != "raw" or b.content not in shared])
        shared.update(b.content for b in buffers if b.memory == "raw")
    return found


def at_once(works: Iterable[Iterator[int]]) -> Iterator[int]:
    """What several iterators yield, each run by a thread of its own; the first error of any.

    Whoever stops listening waits until each has come to its next yield.
    """
    found: queue.SimpleQueue[int | BaseException | None] = queue.SimpleQueue()
    stop = threading.Event()

    def run(work: Iterator[int]) -> None:
        try:
            for item in work:
                found.put(item)
                if stop.is_set():
                    break
            found.put(None)
        except BaseException as error:  # whoever listens raises it
            found.put(error)

    threads = [threading.Thread(target=run, args=(work,), daemon=True) for work in works]
    going = len(threads)
    try:
        for thread in threads:
            thread.start()
        while going:
            try:
                item = found.get(timeout=_HEAR)
            except queue.Empty:
                continue  # Windows hears of signals in between
            if isinstance(item, BaseException):
                raise item
            if item is None:
                going -= 1
            else:
                yield item
    finally:
        stop.set()
        for thread in threads:
            if thread.ident is not None:
                thread.join()

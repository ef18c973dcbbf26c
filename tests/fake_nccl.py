"""NCCL for GPUs that are not there: what would hang, crash or give wrong numbers is refused.

communicators of GPUs that do not exist, or of one GPU twice; destroyed ones, or those destroyed
while a group is open
sums outside of a group, of which one thread would wait for the others forever; groups that are
not ended, or ended twice; ranks that are missing from a group, or there twice
counts, types and operations that differ between ranks; streams and memory of another GPU
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, NamedTuple

from fake_driver import FakeDriver

from runtime.ops.errors import BackendError


class _Part(NamedTuple):
    source: int
    target: int
    count: int
    kind: int
    operation: int
    stream: int


@dataclass
class _Rank:
    gpu: int
    clique: int
    alive: bool = True


class FakeNccl:
    """The library of some version. `calls`: names; `fails`: a function that returns an error."""

    def __init__(self, driver: FakeDriver, version: int = 23203, fails: str = "") -> None:
        self.driver, self.version, self.fails = driver, version, fails
        self.calls: list[str] = []
        self.sums: list[tuple[int, int]] = []  # (GPUs, elements) of each sum
        self.depth = 0
        self._ranks: dict[int, _Rank] = {}
        self._group: dict[int, _Part] = {}
        self._broken = False
        self.ncclGetErrorString = lambda code: b"as the test wants"

    def __getattr__(self, name: str) -> Any:
        if not name.startswith("nccl"):
            raise AttributeError(name)
        action = getattr(self, "_" + name[4:].lower())

        def call(*arguments: Any) -> int:
            self.calls.append(name)
            if name == self.fails:
                self._broken = True
                return 1
            action(*arguments)
            return 0

        return call

    def alive(self) -> int:
        """Communicators that were not destroyed."""
        return sum(rank.alive for rank in self._ranks.values())

    def _getversion(self, found: Any) -> None:
        ctypes.cast(found, ctypes.POINTER(ctypes.c_int))[0] = self.version

    def _comminitall(self, found: Any, count: int, gpus: Any) -> None:
        numbers = list(gpus)
        if len(found) != count or len(numbers) != count or self.depth:
            raise _wrong(f"{count} communicators for GPUs {numbers} in {self.depth} groups")
        if len(set(numbers)) < count or not set(numbers) <= set(range(self.driver.device_count())):
            raise _wrong(f"communicators of GPUs {numbers}")
        clique = len(self._ranks)
        for n, gpu in enumerate(numbers):
            handle = 4096 + len(self._ranks)
            self._ranks[handle] = _Rank(gpu, clique)
            found[n] = handle

    def _commdestroy(self, communicator: Any) -> None:
        rank = self._rank(communicator)
        if self.depth:
            raise _wrong(f"{rank} is destroyed inside of a group")
        rank.alive = False

    def _groupstart(self) -> None:
        self.depth += 1

    def _groupend(self) -> None:
        self.depth -= 1
        if self.depth < 0:
            raise _wrong("a group ends that never began")
        if self._broken:
            self._group, self._broken = {}, False
        if self.depth or not self._group:
            return
        group, self._group = self._group, {}
        (clique,) = {self._ranks[handle].clique for handle in group}
        missing = {h for h, rank in self._ranks.items() if rank.clique == clique} - group.keys()
        if missing:
            raise _wrong(f"ranks {missing} are not in the group, and the others wait for them")
        if len({part[2:5] for part in group.values()}) > 1:
            raise _wrong(f"ranks do not sum the same: {group}")
        self._perform(group)

    def _perform(self, group: dict[int, _Part]) -> None:
        parts = []
        for handle, part in group.items():
            gpu, stream = self._ranks[handle].gpu, self.driver.streams[part.stream]
            if stream.of != gpu:
                raise _wrong(f"{stream} is of GPU {stream.of}, and the communicator of GPU {gpu}")
            parts.append((gpu, stream, part.source, part.target))
        (count,) = {part.count for part in group.values()}
        self.driver.summed(parts, 4 * count)
        self.sums.append((len(parts), count))

    def _allreduce(
        self, source: Any, target: Any, count: Any, kind: int, operation: int, communicator: Any,
        stream: Any,
    ) -> None:  # fmt: skip
        self._rank(communicator)
        if not self.depth:
            raise _wrong("a sum outside of a group, whose other ranks are this thread's")
        if communicator.value in self._group:
            raise _wrong("two sums of one rank in a group")
        if (kind, operation) != (7, 0) or not count.value:
            raise _wrong(f"{count.value} elements of type {kind}, operation {operation}")
        self._group[communicator.value] = _Part(
            source.value, target.value, count.value, kind, operation, stream.value
        )

    def _rank(self, communicator: Any) -> _Rank:
        rank = self._ranks.get(communicator.value)
        if rank is None or not rank.alive:
            raise _wrong(f"communicator {communicator.value} is none, or was destroyed")
        return rank


def _wrong(text: str) -> BackendError:
    return BackendError(f"fake NCCL: {text}")

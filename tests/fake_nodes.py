"""Launches as a driver sees them, and what is wrong with them: the checks of `fake_driver.py`."""

from __future__ import annotations

import ctypes
import functools
import random
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
from fake_memory import Reached, Span, overlap

from runtime.backends.cuda import catalogue
from runtime.backends.cuda.accesses import accesses
from runtime.backends.cuda.arguments import CODES, WIDTHS
from runtime.backends.cuda.catalogue import Compiled
from runtime.backends.cuda.driver import SHARED_NBYTES
from runtime.backends.cuda.graphs import spans
from runtime.backends.cuda.intrinsic import Entry
from runtime.backends.cuda.launcher import Launch
from runtime.backends.plan.kernel import Kernel
from runtime.ops.errors import BackendError

# of a kernel one function, of which numpy_grid.py keeps what it makes
declared = functools.cache(catalogue.declared)


class FakeLibrary:
    """Kernels without code: `FakeDriver.load` knows them by name and constants."""

    def prepare(self, kernels: list[Kernel], progress: Any = None) -> None:
        """Nothing is compiled."""
        for kernel in kernels:
            declared(kernel)

    def missing(self, kernels: list[Kernel]) -> list[Kernel]:
        """None."""
        return []

    def get(self, kernel: Kernel) -> Compiled:
        """What compiling would give, as far as launching goes."""
        found = declared(kernel)
        return Compiled(found.name, kernel.dump().encode(), found.entry, 0, 0, 0, 0)


@dataclass(eq=False)
class Handle:
    """What the fake driver hands out. `of`: the device it belongs to."""

    kind: str
    of: int
    number: int
    value: Any = None
    alive: bool = True

    def __repr__(self) -> str:
        return f"{self.kind} {self.number}"

    def __int__(self) -> int:
        return self.number


@dataclass
class Function:
    """A loaded kernel, and how much shared memory its blocks are allowed."""

    kernel: Kernel
    compiled: Compiled
    library: Handle
    shared_nbytes: int = SHARED_NBYTES


@dataclass
class Node:
    """A launch as it was when it was given to the driver, and the nodes it waits for.

    `programmatic`: it begins when these begin, and waits for them in its `launch_wait`. `early`: of
    its `spans` those that must be done before it begins.
    """

    name: str
    shape: tuple[Any, ...]
    values: tuple[int | float, ...]
    buffers: dict[str, Any]
    spans: list[Span]
    early: list[Span]
    before: tuple[int, ...] = ()
    programmatic: bool = False

    def pointers(self) -> list[tuple[str, int, int]]:
        """(name, address, bytes of its buffer) of every pointer argument."""
        pairs = zip(self.shape[0].value.compiled.entry.arguments, self.values, strict=True)
        return [
            (name, int(value), self.buffers[name].nbytes)
            for (name, kind), value in pairs
            if kind.endswith("*")
        ]


def seen(launch: Launch) -> Node:
    """What the driver reads through the launch's address. BackendError: a shape not compiled for"""
    function = launch.shape[0].value
    entry, name = function.compiled.entry, str(launch)
    if launch.shape[4:7] != (entry.threads, 1, 1):
        raise wrong(f"{name} has {launch.shape[4:7]} threads, compiled for {entry.threads}")
    nbytes = launch.shape[7]
    if nbytes < entry.shared_nbytes:
        raise wrong(f"{name} has {nbytes} bytes of shared memory, needs {entry.shared_nbytes}")
    if nbytes > function.shared_nbytes:
        raise wrong(f"{name} is allowed {function.shared_nbytes} of {nbytes} bytes shared memory")
    touched, early = (
        [Span(*span) for span in spans(launch, early)] if _all_alive(launch) else []
        for early in (False, True)
    )
    values = unpacked(entry, launch.address)
    return Node(name, launch.shape, values, dict(launch.buffers), touched, early)


def unpacked(entry: Entry, address: int) -> tuple[int | float, ...]:
    """The values a driver finds in the block whose array of pointers is at `address`."""
    pointers = (ctypes.c_void_p * len(entry.arguments)).from_address(address)
    values = []
    for pointer, (_, kind) in zip(pointers, entry.arguments, strict=True):
        code = "Q" if kind.endswith("*") else CODES[kind]
        values.append(struct.unpack(code, ctypes.string_at(pointer, WIDTHS[kind]))[0])
    return tuple(values)


def _all_alive(launch: Launch) -> bool:
    return all(buffer.alive for buffer in launch.buffers.values())


def check_pointers(node: Node, memory: Reached) -> None:
    """BackendError: a pointer leads out of the device's memory or is misaligned."""
    widths = accesses(node.shape[0].value.kernel).widths
    for name, address, nbytes in node.pointers():
        memory.check(address, address + nbytes, f"{node.name}: {name}")
        if address % widths.get(name, 1):
            raise wrong(f"{node.name}: {name} is not at a multiple of {widths[name]} bytes")


def check_order(nodes: list[Node]) -> None:
    """BackendError: two nodes touch the same bytes, one writing, and no edges order them.

    A node that is launched early is behind the nodes before it only from its `launch_wait` on; what
    it touches earlier has to be done when these begin.
    """
    ended: list[int] = []  # of each node, the set of those before it, as bits
    begun: list[int] = []  # and of those that have ended when it begins
    for i, node in enumerate(nodes):
        bits = start = 0
        for before in node.before:
            bits |= ended[before] | 1 << before
            start |= begun[before] if node.programmatic else ended[before] | 1 << before
        ended.append(bits)
        begun.append(start)
        for j, other in enumerate(nodes[:i]):
            if not bits >> j & 1 and overlap(node.spans, other.spans):
                raise wrong(
                    f"no edges lead from {other.name} (node {j}) to {node.name} (node {i}), and "
                    "one writes what the other uses"
                )
            if not start >> j & 1 and overlap(node.early, other.spans):
                raise wrong(
                    f"{node.name} (node {i}) uses before its launch_wait, or as unchanging, what "
                    f"{other.name} (node {j}) writes, and may begin before that has ended"
                )


def shuffled(nodes: list[Node], generator: random.Random) -> list[Node]:
    """An order of execution that the edges allow."""
    missing = {i: set(node.before) for i, node in enumerate(nodes)}
    ordered = []
    while missing:
        chosen = generator.choice([i for i, before in missing.items() if not before])
        del missing[chosen]
        ordered.append(nodes[chosen])
        for before in missing.values():
            before.discard(chosen)
    return ordered


def perform(node: Node, memory: Reached, seed: int, quick: bool = False) -> None:
    """Run a launch on the simulator; what the kernel only reads is read-only there.

    quick: all threads at once, in numpy.
    """
    from numpy_grid import launch as at_once

    from runtime.backends.cuda.simulator import launch

    function = node.shape[0].value
    writes = accesses(function.kernel).writes
    arrays: dict[str, np.ndarray] = {}
    for name, address, nbytes in node.pointers():
        arrays[name] = memory.contents(address, nbytes)
        arrays[name].flags.writeable = name in writes
    names = [name for name, _ in function.compiled.entry.arguments]
    values = [arrays.get(name, value) for name, value in zip(names, node.values, strict=True)]
    kernel = declared(function.kernel)
    if quick:
        at_once(kernel, node.shape[1:4], *values)
    else:
        launch(kernel, node.shape[1:4], *values, order="random", seed=seed)


def wrong(text: str) -> BackendError:
    """What the fake driver says."""
    return BackendError(f"fake driver: {text}")

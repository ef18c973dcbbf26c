"""CUDA graphs built from a list of launches and the edges between them, replayed by one call.

A graph keeps the arguments its launches had when it was built; a launch changed afterwards takes
effect by `update`. Buffers must live as long as the graph.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from runtime.ops.errors import BackendError

from .accesses import accesses
from .driver import Owned
from .launcher import Device, Launch, Stream


@dataclass(frozen=True, order=True)
class Edge:
    """Launch `after` waits for launch `before` (places in the list, before < after).

    `programmatic`: it may start as soon as all blocks of `before` called `launch_next`, and waits
    for its end in its own `launch_wait`, so that it is also behind all that `before` waited for.
    """

    before: int
    after: int
    programmatic: bool = False


class Graph(Owned):
    """Launches with edges, instantiated."""

    def __init__(
        self, device: Device, launches: Sequence[Launch], edges: Iterable[Edge] | None = None
    ) -> None:
        """`edges`: those of `dependencies` by default.

        BackendError: an edge does not point forward in the list, or is programmatic to a kernel
        that does not wait.
        """
        self.device, self.launches = device, list(launches)
        self.edges = dependencies(launches) if edges is None else sorted(set(edges))
        _check(self.launches, self.edges)
        self._driver = device.driver
        device.activate()
        self._graph = self._driver.create_graph()
        self._nodes: list[Any] = []
        incoming: dict[int, list[Edge]] = {}
        for edge in self.edges:
            incoming.setdefault(edge.after, []).append(edge)
        for i, launch in enumerate(self.launches):
            edges_in = incoming.get(i, [])
            before = [self._nodes[e.before] for e in edges_in]
            early = [e.programmatic for e in edges_in]
            self._nodes.append(self._driver.add_node(self._graph, launch, before, early))
        self._executable = self._driver.instantiate(self._graph)

    def replay(self, stream: Stream) -> None:
        """Give all launches to the stream."""
        self._driver.launch_graph(self._executable, stream.handle)

    def update(self, index: int) -> None:
        """Take over the arguments and grid that launch `index` has now."""
        self._driver.update_node(self._executable, self._nodes[index], self.launches[index])

    def _free(self) -> None:
        self._driver.destroy_executable(self._executable)
        self._driver.destroy_graph(self._graph)


def chain(count: int, programmatic: bool = False) -> list[Edge]:
    """Edges that run `count` launches one after another."""
    return [Edge(i, i + 1, programmatic) for i in range(count - 1)]


Touched = list[tuple[int, int, bool]]  # first byte, end, whether it is written


def spans(launch: Launch, early: bool = False) -> Touched:
    """The memory a launch may touch, as large as its buffers; `early`: that of `Accesses.early`."""
    used = accesses(launch.kernel)
    found = []
    for name, buffer in launch.buffers.items():
        if name in (used.early if early else used.reads | used.writes):
            start = buffer.address
            found.append((start, start + buffer.nbytes, name in used.writes))
    return found


def conflict(a: Touched, b: Touched) -> bool:
    """Whether two launches touch the same bytes and one of them writes these."""
    return any(
        start < other_end and other < end and (writes or other_writes)
        for start, end, writes in a
        for other, other_end, other_writes in b
    )


def dependencies(launches: Sequence[Launch], programmatic: bool = False) -> list[Edge]:
    """The fewest edges that keep every launch behind those whose results or inputs it touches.

    `programmatic`: edges to kernels that have but one are programmatic where the kernel waits, and
    needs nothing earlier than that: it may begin before all that `before` is still waiting for.
    """
    touched = [spans(launch) for launch in launches]
    written = [(start, end) for each in touched for start, end, writes in each if writes]
    changed = _Ranges(written)
    ended: list[int] = []  # of each launch, the set of those that ended before it ends, as bits
    begun: list[int] = []  # and of those that ended before it begins
    edges = []
    for after, launch in enumerate(launches):
        mine, bits, before_me = touched[after], 0, []
        for before in range(after - 1, -1, -1):
            if not bits >> before & 1 and conflict(touched[before], mine):
                before_me.append(before)
                bits |= ended[before] | 1 << before
        early = programmatic and len(before_me) == 1 and _follows(before_me[0], after, launches)
        if early:
            settled = begun[before_me[0]]
            needed = [span for span in spans(launch, early=True) if changed.meets(*span[:2])]
            early = not needed or not any(
                conflict(touched[before], needed)
                for before in range(after)
                if not settled >> before & 1
            )
        ended.append(bits)
        begun.append(begun[before_me[0]] if early else bits)
        edges += [Edge(before, after, early) for before in before_me]
    return sorted(edges)


class _Ranges:
    """Bytes of many stretches, found again quickly."""

    def __init__(self, stretches: Iterable[tuple[int, int]]) -> None:
        self._starts, self._ends = list[int](), list[int]()
        for start, end in sorted(stretches):
            if self._ends and start <= self._ends[-1]:
                self._ends[-1] = max(end, self._ends[-1])
            else:
                self._starts.append(start)
                self._ends.append(end)

    def meets(self, start: int, end: int) -> bool:
        """Whether any of these bytes are among them."""
        at = bisect_right(self._ends, start)
        return at < len(self._starts) and self._starts[at] < end


def _follows(before: int, after: int, launches: Sequence[Launch]) -> bool:
    """Whether a launch may be begun before the other has ended: on the same GPU, where it waits."""
    one, other = (launches[n].function.device.index for n in (before, after))
    return one == other and accesses(launches[after].kernel).waits


def _check(launches: list[Launch], edges: list[Edge]) -> None:
    pairs = set()
    for edge in edges:
        if not 0 <= edge.before < edge.after < len(launches):
            raise BackendError(f"{edge} does not point forward among {len(launches)} launches")
        if (edge.before, edge.after) in pairs:
            raise BackendError(f"there are two edges from {edge.before} to {edge.after}")
        pairs.add((edge.before, edge.after))
        if edge.programmatic and not accesses(launches[edge.after].kernel).waits:
            raise BackendError(
                f"{launches[edge.after]} has no launch_wait for its programmatic {edge}"
            )

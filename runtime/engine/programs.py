"""Programs: one kind of graph at several capacities, each made ready when it is first needed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from runtime.backends.base import Backend, Program, Progress
from runtime.backends.environment import debug
from runtime.ops import Graph

Sizes = tuple[int, ...]


class Programs:
    """The programs of a language model's steps, of a vision tower, or of any other graph.

    graph: makes the graph of given capacities. capacity: those of the smallest program that holds
    so much (the same numbers of what is live). warm: the graphs whose kernels are compiled in one
    go with the first that is missing. progress: as for `runtime.load`.
    """

    def __init__(
        self, backend: Backend, graph: Callable[..., Graph], capacity: Callable[..., Sizes],
        warm: Callable[[Backend], Sequence[Graph]] = lambda backend: (),
        progress: bool | Progress | None = None,
    ) -> None:  # fmt: skip
        self.backend, self.graph, self._capacity, self._warm = backend, graph, capacity, warm
        self._progress = progress
        self._made: dict[Sizes, Program] = {}

    def of(self, *live: int) -> Program:
        """The program of the smallest capacities that hold so much."""
        if live in self._made:
            return self._made[live]
        sizes = self._capacity(*live)
        if sizes not in self._made:
            graph = self.graph(*sizes)
            self._prepare([graph])
            self._made[sizes] = self.backend.program(graph)
            _show_plan(sizes, self._made[sizes])
        return self._made[sizes]

    def made(self, *live: int) -> bool:
        """Whether the program that holds so much is there."""
        return self._capacity(*live) in self._made

    def __len__(self) -> int:
        """How many were made."""
        return len(self._made)

    def load(self, *sizes: int) -> None:
        """Weights and kernels of that graph, before it is first run."""
        graphs = [self.graph(*sizes)]
        if not self._prepare(graphs):
            with self._reporter() as report:
                self.backend.load(graphs, report)

    def warmup(self, progress: bool | Progress) -> None:
        """Compile every kernel of the warm graphs."""
        from runtime.progress import reporter

        with reporter(progress) as report:
            self.backend.load(self._warm(self.backend), report)

    def _prepare(self, graphs: list[Graph]) -> bool:
        """Where kernels of these graphs have to be compiled, compile all there are in one go.

        The kernels of a token alone are looked for when a model is loaded, which is quick; those
        of a prompt with the first prompt, and are not found only where compiling was interrupted
        or another model left its own. False: nothing was missing.
        """
        if not self.backend.missing(graphs):
            return False
        with self._reporter() as report:
            self.backend.load([*self._warm(self.backend), *graphs], report)
        return True

    def _reporter(self) -> AbstractContextManager[Progress | None]:
        from runtime.progress import reporter

        return reporter(self._progress)


def _show_plan(sizes: Sizes, program: Program) -> None:
    """DEBUG=1: a line per program."""
    if debug() >= 1 and program.plan.instructions:
        print(f"{sizes[0]} tokens: {str(program.plan).splitlines()[0]}", file=sys.stderr)

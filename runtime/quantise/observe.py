"""What the weights of a model are multiplied with, summed up while the model runs.

A pass over the graph of a step makes the inputs of its products outputs too; so they are seen on
every device, of every architecture, for the live rows of a step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from runtime.backends.base import Program
from runtime.engine.advance import Piece
from runtime.engine.batch import bucket_below
from runtime.engine.engine import Engine
from runtime.engine.graphs import capacity
from runtime.engine.programs import Programs
from runtime.errors import BackendError
from runtime.ops.graph import Graph
from runtime.ops.matmul import matmul, matmul_id
from runtime.ops.tensor import Tensor, stored_name

_KEPT_BYTES = 1 << 30  # the most that the inputs of one step take


class Product(NamedTuple):
    """An input and the weights it is multiplied with, by name; ids: which matrix of each."""

    x: Tensor
    ids: Tensor | None
    matrices: int
    names: tuple[str, ...]


def products(graph: Graph, output: bool = False) -> list[Product]:
    """The products with weights of a plain graph; output: with the one that makes the logits."""
    found: dict[tuple[Tensor, Tensor | None], tuple[int, dict[str, None]]] = {}
    for node in graph.nodes:
        if not (matmul.made(node) or matmul_id.made(node)):
            continue
        x, w, *ids = node.inputs
        makes_logits = getattr(x.shape[0], "name", "") == "outputs"
        if w.base.op != "weight" or (makes_logits and not output):
            continue
        matrices = int(w.shape[0]) if ids else 1
        _, names = found.setdefault((x, ids[0] if ids else None), (matrices, {}))
        names[stored_name(w.base)] = None
    return [Product(x, ids, n, tuple(names)) for (x, ids), (n, names) in found.items()]


class Sums:
    """Sums over the rows of one input, for each matrix that they are multiplied with, float64.

    counts [matrices], squares and sums [matrices, columns].
    """

    def __init__(self, matrices: int, columns: int) -> None:
        self.counts = np.zeros(matrices)
        self.squares, self.sums = np.zeros((2, matrices, columns))

    def add(self, x: np.ndarray, ids: np.ndarray | None = None) -> None:
        """Rows x [..., columns], each for its matrices of ids [rows, used], or for the only one."""
        rows = x.reshape(-1, x.shape[-1])
        chosen = np.zeros((len(self.counts), len(rows)), rows.dtype)  # how often each takes a row
        if ids is None:
            chosen[:] = 1
        else:
            each = ids.size // max(1, len(rows))
            np.add.at(chosen, (ids.reshape(-1), np.arange(ids.size) // max(1, each)), 1)
        self.counts += chosen.sum(1)
        self.sums += chosen @ rows
        self.squares += chosen @ (rows * rows)


def evaluate(
    engine: Engine, windows: Sequence[Sequence[int]], rows: str | Sequence[int]
) -> list[np.ndarray]:
    """Logits of windows, each a sequence of its own; rows: which, as of a `Piece`."""
    sequences = [engine.sequence(engine.empty(), "this window is closed") for _ in windows]
    try:
        return engine.run_all(
            [Piece(s, [*ids], rows) for s, ids in zip(sequences, windows, strict=True)]
        )
    finally:
        with engine.alone():
            for sequence in sequences:
                sequence.close()


class Observer:
    """While it is open, everything that an engine evaluates is summed up.

    output: the product that makes the logits too, for the rows whose logits are asked for.
    Otherwise there are no logits: `add` evaluates what is to be observed.
    """

    def __init__(self, engine: Engine, output: bool = False) -> None:
        self._engine, self._output = engine, output
        self._before = engine.programs, engine.most_tokens, engine.staged
        self._products = products(engine.graphs.graph(1, 1), output)
        self._sums = [Sums(p.matrices, int(p.x.shape[-1])) for p in self._products]
        row = sum(4 * p.x.size for p in self._products)  # of one token
        engine.most_tokens = min(engine.most_tokens, bucket_below(_KEPT_BYTES // row))
        engine.staged = None  # each step is looked at before the next
        engine.programs = _Programs(self._take, engine.backend, self._graph, capacity)

    def add(self, windows: Sequence[Sequence[int]]) -> None:
        """Evaluate each as a sequence of its own. BackendError: an input is not finite."""
        evaluate(self._engine, windows, "all" if self._output else "none")

    def sums(self) -> dict[str, Sums]:
        """What was seen so far of each weight, by its name in the file, sorted."""
        found: dict[str, Sums] = {}
        for product, seen in zip(self._products, self._sums, strict=True):
            for name in product.names:
                total = found.setdefault(name, Sums(*seen.sums.shape))
                total.counts += seen.counts
                total.squares += seen.squares
                total.sums += seen.sums
        return dict(sorted(found.items()))

    def close(self) -> None:
        """The model is as it was."""
        engine = self._engine
        engine.programs, engine.most_tokens, engine.staged = self._before

    def __enter__(self) -> Observer:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _graph(self, tokens: int, outputs: int, *kind: bool) -> Graph:
        """The graph of a step, with the inputs of its products as further outputs."""
        graph = self._engine.graphs.graph(tokens, outputs, *kind)
        found = products(graph, self._output)
        seen = [x for p in found for x in (p.x, p.ids) if x is not None]
        logits = graph.outputs if self._output else ()
        return Graph((*logits, *dict.fromkeys(seen)), f"{graph.name}, observed")

    def _take(self, results: Sequence[np.ndarray]) -> np.ndarray:
        """Add what a step leaves; its logits."""
        places: dict[Tensor, np.ndarray] = {}
        left = iter(results)
        logits = next(left) if self._output else np.zeros((0, self._engine.vocabulary), np.float32)
        for product, sums in zip(self._products, self._sums, strict=True):
            for x in (product.x, product.ids):
                if x is not None and x not in places:
                    places[x] = next(left)
            ids = None if product.ids is None else places[product.ids]
            sums.add(places[product.x], ids)
            if not np.isfinite(sums.squares).all():
                raise BackendError(
                    f"{self._engine.file.path}: what {product.names[0]} is multiplied with is not "
                    "finite: a weight of the file is damaged, or a kernel is broken"
                )
        return logits


class _Programs(Programs):
    """Programs whose results are taken by a function, which returns the logits among them."""

    def __init__(self, take: Any, *of: Any) -> None:
        super().__init__(*of)
        self._take = take

    def of(self, *live: int) -> Program:
        return _Observed(super().of(*live), self._take)


class _Observed:
    """See backends/base.py."""

    observable = False  # by VALIDATE: its graph is not the model's

    def __init__(self, program: Program, take: Any) -> None:
        self._program, self._take, self.plan = program, take, program.plan

    def run(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> Sequence[np.ndarray]:
        return [self._take(self._program.run(inputs, live))]

    def profile(
        self, inputs: Mapping[str, np.ndarray], live: Mapping[str, int]
    ) -> tuple[Sequence[np.ndarray], np.ndarray]:
        results, times = self._program.profile(inputs, live)
        return [self._take(results)], times

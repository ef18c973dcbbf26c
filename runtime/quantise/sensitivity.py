"""How much a model's predictions change when some of its weights are those of another file."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Self

import numpy as np

from runtime.backends.cpu import CpuBackend
from runtime.engine.engine import Engine
from runtime.engine.graphs import capacity
from runtime.engine.programs import Programs
from runtime.gguf.reader import GGUFFile
from runtime.models import registry
from runtime.ops.graph import Graph, rewrite
from runtime.ops.tensor import Tensor, stored_name, weight
from runtime.progress import Progress
from runtime.quality import rows
from runtime.quantise.observe import evaluate

_KEPT = 1 << 27  # numbers of predictions that are kept, at most


class Swapped:
    """A model on the CPU, activations in float, some of whose weights may come from other files.

    windows: tokens of one length; predictions are compared in their second halves, where each has
    context.
    """

    def __init__(
        self, file: GGUFFile, windows: Sequence[Sequence[int]], threads: int | None = None,
        progress: bool | Progress | None = None,
    ) -> None:  # fmt: skip
        self._files: dict[str, Any] = {"": file}
        self._windows, size = windows, len(windows[0])
        backend = CpuBackend(self._files, threads, "f32")
        model = registry.build(file)
        self.engine = Engine(file, backend, model, ("f16", "f16"), size, 1, progress)
        self.engine.files = self._files
        most = max(1, _KEPT // (self.engine.vocabulary * len(windows)))
        self._rows = range(size // 2, size, -(-size // (2 * most)))
        self._pool = ThreadPoolExecutor(backend.threads)
        self._base = [
            logits - rows.log_sums(logits)[:, None].astype(np.float32) for logits in self._logits()
        ]

    def divergence(self, other: GGUFFile, names: Collection[str]) -> float:
        """Mean Kullback-Leibler divergence, in nats, with these weights of another file."""
        engine, source = self.engine, str(other.path)
        self._files[source] = other

        def graph(tokens: int, outputs: int) -> Graph:
            return swapped(engine.graphs.graph(tokens, outputs), names, other, source)

        before, engine.programs = engine.programs, Programs(engine.backend, graph, capacity)
        try:
            found = [*map(self._compared, self._base, self._logits())]
        finally:
            engine.programs = before
        return float(np.concatenate(found).mean())

    def _compared(self, base: np.ndarray, logits: np.ndarray) -> np.ndarray:
        def of(part: slice) -> np.ndarray:
            return rows.scores(logits[part], np.zeros(len(logits[part]), int), base[part]).kld

        return np.concatenate([*self._pool.map(of, rows.parts(*logits.shape))])

    def _logits(self) -> Iterator[np.ndarray]:
        return (evaluate(self.engine, [window], self._rows)[0] for window in self._windows)

    def close(self) -> None:
        """Give memory back."""
        self._pool.shutdown()
        self.engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def swapped(graph: Graph, names: Collection[str], other: GGUFFile, source: str) -> Graph:
    """The graph with these weights as another file, which a device knows as `source`, has them."""

    def leaf(node: Tensor) -> Tensor:
        name = stored_name(node)
        if name not in names:
            return node
        whole, cut = node.attrs.get("whole", node.shape), dict(node.attrs.get("cut", ()))
        return weight(name, whole, other.tensors[name].dtype, cut, source=source)

    return rewrite(graph, {"weight": leaf})

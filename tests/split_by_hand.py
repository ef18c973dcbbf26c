"""A small network and its parts on several devices, cut by hand; and devices to run them."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from kernel_calls import ISAS, library
from stored_tensors import Stored, file_of

from runtime import ops
from runtime.backends.cpu import CpuBackend
from runtime.backends.meta.tensor import TensorBackend
from runtime.ops import Dim, Graph, Tensor
from runtime.ops.collective import all_gather, all_sum, with_all
from runtime.ops.dtypes import F32

EPS = 1e-6


@dataclass(frozen=True)
class Network:
    """Gated feed-forward layers with residuals, and rows of logits."""

    hidden: int = 96
    inner: int = 160
    layers: int = 3
    vocabulary: int = 75
    tensors: dict[str, Stored] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(5)
        shapes = {"embedding": (self.vocabulary, self.hidden), "norm": (self.hidden,)}
        for n in range(self.layers):
            shapes |= {f"{n}.{name}": (self.inner, self.hidden) for name in ("gate", "up")}
            shapes[f"{n}.down"] = self.hidden, self.inner
        for name, shape in shapes.items():
            values = rng.standard_normal(shape) / np.sqrt(shape[-1])
            self.tensors[name] = Stored(values.astype(np.float32))

    @property
    def file(self) -> Any:
        return file_of(self.tensors)

    def graph(self, tokens: int, cuts: Sequence[Sequence[int]] = (), device: int = 0) -> Graph:
        """Of one device, or of one of several.

        cuts: how many units of a layer, and rows of logits, each has.
        """
        hidden, inner, vocabulary = self.hidden, self.inner, self.vocabulary
        units, rows = ([_runs(lengths)[device] for lengths in cuts] or [None, None])[:2]
        count = len(cuts[0]) if cuts else 1
        made = []
        places: dict[str, Any] = {"device": device, "devices": count}
        room = Dim("tokens", tokens)
        norm = ops.weight("norm", (hidden,), F32)
        x = ops.get_rows(
            ops.weight("embedding", (vocabulary, hidden), F32), ops.step_input("ids", (room,))
        )
        for n in range(self.layers):
            h = ops.rms_norm(x, norm, eps=EPS)
            gate, up = (
                ops.weight(f"{n}.{name}", (inner, hidden), F32, {0: (units,)} if units else None)
                for name in ("gate", "up")
            )
            down = ops.weight(f"{n}.down", (hidden, inner), F32, {1: (units,)} if units else None)
            parts = []
            if not units or units[0] < units[1]:
                y = ops.mul(ops.silu(ops.matmul(h, gate)), ops.matmul(h, up))
                parts = [ops.matmul(y, down)]
            if cuts:
                holders = tuple(d for d, n_units in enumerate(cuts[0]) if n_units)
                shape = (room, hidden)
                parts = [all_sum(*parts, shape=shape, holders=holders, number=n, **places)]
                made += parts
            x = ops.add(x, parts[0])
        head = ops.weight("embedding", (vocabulary, hidden), F32, {0: (rows,)} if rows else None)
        h = ops.rms_norm(x, norm, eps=EPS)
        logits = [] if rows and rows[0] == rows[1] else [ops.matmul(h, head)]
        if cuts:
            logits = [
                all_gather(
                    *logits, shape=(room, vocabulary), axis=1, repeat=1, number=self.layers,
                    runs=tuple(((d,), n) for d, n in enumerate(cuts[1]) if n), **places,
                )
            ]  # fmt: skip
        return Graph(with_all(logits, made), "by hand")


def _runs(lengths: Sequence[int]) -> list[tuple[int, int]]:
    ends = np.cumsum([0, *lengths]).tolist()
    return list(itertools.pairwise(ends))


@contextmanager
def devices(threads: Sequence[int], file: Any, graphs: Any) -> Iterator[TensorBackend]:
    """A backend that splits by `graphs(graph)`, the graphs of all devices."""
    each = [CpuBackend(file, n, kernels=library(ISAS[0])) for n in threads]
    made = TensorBackend(each, [1.0] * len(each), lambda graph, shares: graphs(graph))
    yield made
    made.close()


def leaf(name: str, value: np.ndarray) -> Tensor:
    """A step input of any values."""
    kind = "i32" if value.dtype == np.int32 else "f32"
    return ops.step_input(name, value.shape, ops.DTYPES[kind])

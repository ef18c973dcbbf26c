"""Graphs and tensors as plain lists, for another process to build anew."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from types import MappingProxyType
from typing import Any

from runtime.ops.dtypes import DTYPES
from runtime.ops.graph import Graph
from runtime.ops.tensor import Tensor


def packed(message: Sequence[Any]) -> bytes:
    """What one process says to another of the same run: numbers, texts, arrays, graphs, leaves."""
    return pickle.dumps([_plain(part) for part in message], pickle.HIGHEST_PROTOCOL)


def unpacked(content: bytes) -> list[Any]:
    """The inverse of `packed`."""
    return [_rebuilt(part) for part in pickle.loads(content)]


class _Flat(tuple):  # type: ignore[type-arg]
    """Nodes in order, numbers of the outputs and name of a graph; of a leaf, itself and None."""


def _plain(value: Any) -> Any:
    if isinstance(value, Graph):
        outputs = [value.nodes.index(output) for output in value.outputs]
        return _Flat((_rows(value.nodes), outputs, value.name))
    if isinstance(value, Tensor):
        return _Flat((_rows([value]), None, None))
    return [_plain(one) for one in value] if isinstance(value, list | tuple) else value


def _rebuilt(value: Any) -> Any:
    if isinstance(value, list):
        return [_rebuilt(one) for one in value]
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

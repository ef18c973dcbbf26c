"""Lowering of ops/moe.py: choice of experts, and what comes behind their products."""

from __future__ import annotations

from typing import Any

from runtime.backends.cuda.kernels.expert_sums import THREADS
from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.plan.lowering import Lowering
from runtime.ops.tensor import Tensor


def _blocks(count: int) -> tuple[int]:
    """A grid with a thread for each of `count` elements."""
    return (max(1, -(-count // THREADS)),)


@lowers("top_k")
def top_k(lowering: Lowering, node: Tensor) -> None:
    """Indices of the largest."""
    (x,) = node.inputs
    address, n, _, stride = lowering.rows(x)
    lowering.emit(
        "top_k", node, x=address, out=lowering.write(node), n=n, k=node.attrs["k"],
        x_stride=stride, grid=(max(1, x.size // n),),
    )  # fmt: skip


@lowers("take")
def take(lowering: Lowering, node: Tensor) -> None:
    """Scores of the chosen."""
    x, ids = node.inputs
    address, _, _, stride = lowering.rows(x)
    lowering.emit(
        "take", node, x=address, ids=lowering.read(ids), out=lowering.write(node),
        k=int(ids.shape[-1]), count=ids.size, x_stride=stride, grid=_blocks(ids.size),
    )  # fmt: skip


@lowers("renumber")
def renumber(lowering: Lowering, node: Tensor) -> None:
    """Numbers of the chosen among a device's own."""
    ids, numbers = node.inputs
    lowering.emit(
        "renumber", node, ids=lowering.read(ids), numbers=lowering.read(numbers),
        out=lowering.write(node), count=ids.size, grid=_blocks(ids.size),
    )  # fmt: skip


@lowers("expert_bias")
def expert_bias(lowering: Lowering, node: Tensor) -> None:
    """Rows of y, each plus the bias of its expert."""
    y, bias, ids = node.inputs
    address, n, _, stride = lowering.rows(y)
    lowering.emit(
        "expert_bias", node, y=address, bias=lowering.weight(bias, "vector"),
        ids=lowering.read(ids), out=lowering.write(node), n=n, count=y.size, y_stride=stride,
        grid=_blocks(y.size),
    )  # fmt: skip


@lowers("expert_sum")
def expert_sum(lowering: Lowering, node: Tensor) -> None:
    """Weighted sum over ranks, plus a shared expert and a residual where there are."""
    y, weights, *rest = node.inputs
    names = node.attrs.get("terms", ())
    ids, n = rest[: len(rest) - len(names)], int(y.shape[2])
    terms = dict(zip(names, rest[len(ids) :], strict=True))
    places: dict[str, Any] = {}
    for name, term in (("shared", "shared"), ("gate", "gate"), ("add", "residual")):
        places |= {name: 0, f"{name}_stride": 0, f"has_{name}": int(term in terms)}
        if term in terms:
            places[name], _, _, places[f"{name}_stride"] = lowering.rows(terms[term])
    lowering.emit(
        "expert_sum", node, {"own": bool(ids)}, y=lowering.read(y), weights=lowering.read(weights),
        ids=lowering.read(ids[0]) if ids else 0, out=lowering.write(node), n=n,
        k=int(y.shape[1]), **places, grid=(-(-n // THREADS), int(node.shape[0])),
    )  # fmt: skip

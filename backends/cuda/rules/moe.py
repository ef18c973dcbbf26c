"""Lowering of ops/moe.py: choice of experts, and what comes behind their products."""

from __future__ import annotations

from typing import Any

from runtime.backends.cuda.kernels.expert_sums import THREADS
from runtime.backends.cuda.kernels.router import MOST_RANKS, PER_LANE, ROWS, SCORINGS
from runtime.backends.cuda.rules.norm_tail import NONE
from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.passes.packing import linear
from runtime.backends.plan.lowering import Declined, Lowering, Out
from runtime.backends.plan.plan import Buffer, Ref
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


@lowers("router")
def router(lowering: Lowering, node: Tensor) -> None:
    """Scores to the chosen experts and their weights; the product that makes scores in front."""
    scores, *numbers = node.inputs
    address, n, _, stride = lowering.rows(scores)
    per = next((per for per in PER_LANE if n <= 32 * per), 0)
    if not per or node.attrs["k"] > MOST_RANKS:
        raise Declined(f"{node.attrs['k']} of {n} experts: {MOST_RANKS} of {32 * PER_LANE[-1]}")
    ids = Buffer("arena", f"{node.name}.ids", node.nbytes)
    own = Buffer("arena", f"{node.name}.own", node.nbytes)
    arguments: dict[str, Any] = {
        "ids": Out(Ref(ids)), "weights": lowering.write(node), "own": Out(Ref(own)),
        "numbers": lowering.read(numbers[0]) if numbers else 0, "renumbers": int(bool(numbers)),
        "n": n, "k": node.attrs["k"], "scoring": SCORINGS.index(node.attrs["scoring"]),
        "normalize": int(node.attrs["normalize"]), "scale": node.attrs["scale"],
    }  # fmt: skip
    lowering.router_results[node] = {
        "router_ids": ids, "router_own": own, "router_tiles": own if numbers else ids,
    }  # fmt: skip
    if _is_product(scores) and lowering.take_back(scores):
        _router_linear(lowering, node, per, arguments)
        return
    lowering.emit(
        "router", node, {"per": per}, logits=address, logits_stride=stride, **arguments,
        grid=(max(1, scores.size // n),),
    )  # fmt: skip


def _is_product(scores: Tensor) -> bool:
    """Whether scores are a product with float weights, plus a bias perhaps, and nothing else."""
    if not linear.made(scores) or scores.inputs[0].attrs["coding"] != "f32":
        return False
    return int(scores.inputs[1].shape[1]) % 8 == 0 and all(y.ndim == 1 for y in scores.inputs[2:])


def _router_linear(
    lowering: Lowering, node: Tensor, per: int, arguments: dict[str, Any]
) -> None:  # fmt: skip
    scores = node.inputs[0]
    x, w, *bias = scores.inputs
    n, inner = map(int, w.shape)
    rows = scores.size // n
    columns = 1 if rows == 1 else 8
    blocks = -(-rows // columns)
    lowering.emit(
        "router_linear", node, {"per": per, "columns": columns}, w=lowering.weight(w, "vector"),
        x=Ref(lowering.result(x)), bias=lowering.weight(bias[0], "vector") if bias else 0,
        has_bias=int(bool(bias)), logits=Out(Ref(lowering.result(scores))),
        tickets=lowering.tickets(node, blocks), rows=rows, pieces=inner // 4, **arguments,
        grid=(-(-n // ROWS), blocks),
    )  # fmt: skip


@lowers("router_ids", "router_own", "router_tiles")
def router_result(lowering: Lowering, node: Tensor) -> None:
    """No call: the router wrote it; of tiles, which are choices one by one, the (own) ids."""
    lowering.alias(node, lowering.router_results[node.inputs[0]][node.op])


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
        "expert_sum", node, y=lowering.read(y), weights=lowering.read(weights), has_ids=bool(ids),
        ids=lowering.read(ids[0]) if ids else 0, out=lowering.write(node), n=n,
        k=int(y.shape[1]), **places, **NONE, grid=(-(-n // THREADS), int(node.shape[0])),
    )  # fmt: skip

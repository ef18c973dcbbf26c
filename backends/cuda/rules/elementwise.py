"""Lowering of elementwise ops by one rule, and of others that look alike."""

from __future__ import annotations

from typing import Any

from runtime.backends.cuda.kernels.elementwise import ATTRIBUTES, BINARY, THREADS, UNARY
from runtime.backends.cuda.rules.registry import RULES, lowers
from runtime.backends.plan.lowering import Declined, Lowering
from runtime.backends.plan.plan import Ref
from runtime.ops.registry import Kind
from runtime.ops.tensor import Tensor


@RULES.lowers_kind(Kind.ELEMENTWISE)
def by_element(lowering: Lowering, node: Tensor) -> None:
    """Rows of one or two operands; an op of this kind needs no rule, its function alone."""
    kernel = {1: "unary", 2: "binary"}.get(len(node.inputs), "")
    if node.op not in (UNARY if kernel == "unary" else BINARY):
        raise Declined(f"write its function in backends/cuda/kernels/elementwise.py ({node.op})")
    emit_by_element(lowering, node, node.op)


def emit_by_element(lowering: Lowering, node: Tensor, op: str) -> None:
    """The result of `op`, a function of one or two operands, of a node's inputs."""
    x, *others = node.inputs
    address, n, _, stride = lowering.rows(x)
    places: dict[str, Any] = {}
    for y in others:
        places["y"], places["y_stride"], places["y_step"] = _operand(lowering, y, n)
    values = [node.attrs[name] for name in ATTRIBUTES if name in node.attrs]
    lowering.emit(
        "binary" if others else "unary", node, {"op": op}, x=address,
        out=lowering.write(node, 4 * x.size), n=n, count=x.size, x_stride=stride,
        **dict(zip("ab", [*values, 0, 0], strict=False)), **places,
        grid=(max(1, -(-x.size // THREADS)),),
    )  # fmt: skip


def _operand(lowering: Lowering, y: Tensor, n: int) -> tuple[Ref, int, int]:
    """Another operand, its row stride and its step: 0 for a vector, and for one number a row."""
    if y.ndim == 1:
        return (lowering.weight(y, "vector") if y.op == "weight" else lowering.read(y)), 0, 1
    address, width, _, stride = lowering.rows(y)
    return address, stride, int(width == n)


@lowers("softmax", "normalize")
def by_rows(lowering: Lowering, node: Tensor) -> None:
    """Rows, each as a whole."""
    (x,) = node.inputs
    address, n, _, stride = lowering.rows(x)
    lowering.emit(
        node.op, node, x=address, out=lowering.write(node), n=n, x_stride=stride,
        grid=(max(1, x.size // n),),
    )  # fmt: skip

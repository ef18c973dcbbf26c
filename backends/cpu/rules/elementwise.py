"""Lowering of ops/elementwise.py and softmax-like row ops that were not fused."""

from __future__ import annotations

from runtime.backends.cpu.rules.registry import lowers
from runtime.backends.cpu.sizes import float_bits
from runtime.backends.plan.lowering import Lowering, Out
from runtime.backends.plan.plan import Ref
from runtime.ops.tensor import Tensor


def _second(lower: Lowering, y: Tensor) -> tuple[Ref, int]:
    """The second operand and its row stride; a vector has stride 0."""
    if y.ndim == 1:
        return (lower.weight(y, "vector") if y.op == "weight" else lower.read(y)), 0
    address, _, _, stride = lower.rows(y)
    return address, stride


@lowers("add", "mul")
def binary(lower: Lowering, node: Tensor) -> None:
    """Rows of x with rows of y, or with one vector."""
    x, y = node.inputs
    address, n, live, stride = lower.rows(x)
    second, second_stride = _second(lower, y)
    lower.emit(
        node.op, node, x=address, y=second, out=lower.write(node), live=live, n=n,
        x_stride=stride, y_stride=second_stride, out_stride=n,
    )  # fmt: skip


@lowers("swiglu_oai")
def swiglu_oai(lower: Lowering, node: Tensor) -> None:
    """Clamped SwiGLU of rows."""
    gate, up = node.inputs
    address, n, live, stride = lower.rows(gate)
    second, _, _, second_stride = lower.rows(up)
    lower.emit(
        node.op, node, x=address, y=second, out=lower.write(node), live=live, n=n,
        x_stride=stride, y_stride=second_stride, out_stride=n,
        alpha=float_bits(node.attrs["alpha"]), limit=float_bits(node.attrs["limit"]),
    )  # fmt: skip


@lowers("silu", "sigmoid", "softplus", "softmax", "normalize")
def unary(lower: Lowering, node: Tensor) -> None:
    """Rows of x."""
    address, n, live, stride = lower.rows(node.inputs[0])
    out: Out = lower.write(node)
    lower.emit(
        node.op, node, x=address, out=out, live=live, n=n, x_stride=stride, out_stride=n
    )  # fmt: skip


@lowers("scale")
def scale(lower: Lowering, node: Tensor) -> None:
    """Rows of x times a constant."""
    address, n, live, stride = lower.rows(node.inputs[0])
    lower.emit(
        "scale", node, x=address, out=lower.write(node), live=live, n=n, x_stride=stride,
        out_stride=n, factor=float_bits(node.attrs["factor"]),
    )  # fmt: skip


@lowers("row_scale")
def row_scale(lower: Lowering, node: Tensor) -> None:
    """Rows of x, each times a number of its own."""
    address, n, live, stride = lower.rows(node.inputs[0])
    factors, _, _, factors_stride = lower.rows(node.inputs[1])
    lower.emit(
        "row_scale", node, x=address, factors=factors, out=lower.write(node), live=live, n=n,
        x_stride=stride, factors_stride=factors_stride, out_stride=n,
    )  # fmt: skip

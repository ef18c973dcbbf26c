"""Lowering of elementwise ops, each to the kernel of its name, and of others that look alike."""

from __future__ import annotations

from typing import Any

from runtime.backends.cpu.rules.registry import RULES, lowers
from runtime.backends.cpu.sizes import float_bits
from runtime.backends.plan.lowering import Lowering
from runtime.backends.plan.plan import Ref
from runtime.ops.registry import Kind
from runtime.ops.tensor import Tensor


@RULES.lowers_kind(Kind.ELEMENTWISE)
@lowers("softmax", "normalize")
def by_rows(lowering: Lowering, node: Tensor) -> None:
    """Rows of the inputs x and y to rows of `out`; attributes are float arguments of their names.

    So an op of this kind needs no rule of its own: its kernel alone.
    """
    x, *others = node.inputs
    address, n, live, stride = lowering.rows(x)
    arguments: dict[str, Any] = {name: float_bits(value) for name, value in node.attrs.items()}
    for letter, y in zip("yz", others, strict=False):
        arguments[letter], arguments[f"{letter}_stride"] = _operand(lowering, y)
    lowering.emit(
        node.op, node, x=address, x_stride=stride, out=lowering.write(node), out_stride=n,
        live=live, n=n, **arguments,
    )  # fmt: skip


def _operand(lowering: Lowering, y: Tensor) -> tuple[Ref, int]:
    """Another operand and its row stride; a vector has stride 0."""
    if y.ndim == 1:
        return (lowering.weight(y, "vector") if y.op == "weight" else lowering.read(y)), 0
    address, _, _, stride = lowering.rows(y)
    return address, stride

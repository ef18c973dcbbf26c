"""Lowering of elementwise ops."""

from __future__ import annotations

from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.plan.lowering import Lowering
from runtime.ops.tensor import Tensor


@lowers("add")
def add(lowering: Lowering, node: Tensor) -> None:
    """x + y, rows of both."""
    x, y = node.inputs
    address, n, _, stride = lowering.rows(x)
    y_address, _, _, y_stride = lowering.rows(y)
    lowering.emit(
        "add_rows", node, x=address, y=y_address, out=lowering.write(node), n=n, x_stride=stride,
        y_stride=y_stride, grid=(-(-n // 256), node.size // n),
    )  # fmt: skip

"""Lowering of ops/rows.py."""

from __future__ import annotations

from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.plan.lowering import Lowering
from runtime.ops.tensor import Tensor


@lowers("get_rows")
def get_rows(lowering: Lowering, node: Tensor) -> None:
    """Rows of a matrix that was widened at load."""
    matrix, ids = node.inputs
    n = int(matrix.shape[1])
    lowering.emit(
        "gather_rows", node, x=lowering.weight(matrix, "vector"), ids=lowering.read(ids),
        out=lowering.write(node), n=n, x_stride=n, grid=(-(-n // 256), int(node.shape[0])),
    )  # fmt: skip


@lowers("select_rows")
def select_rows(lowering: Lowering, node: Tensor) -> None:
    """The wanted rows copied together."""
    x, ids = node.inputs
    address, n, _, stride = lowering.tokens(x)
    lowering.emit(
        "gather_rows", node, x=address, ids=lowering.read(ids), out=lowering.write(node),
        n=n, x_stride=stride, grid=(-(-n // 256), int(node.shape[0])),
    )  # fmt: skip

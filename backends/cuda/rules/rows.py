"""Lowering of ops/rows.py, and of copies of views."""

from __future__ import annotations

from typing import Any

from runtime.backends.cuda.kernels.blocks import book_words
from runtime.backends.cuda.kernels.copy import THREADS
from runtime.backends.cuda.kernels.get_rows import FORMATS
from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.plan.lowering import Lowering
from runtime.ops.blocks import BLOCK_FORMATS
from runtime.ops.dtypes import BF16, F16, F32, I32, nbytes_for
from runtime.ops.tensor import Tensor, constant


@lowers("get_rows")
def get_rows(lowering: Lowering, node: Tensor) -> None:
    """Rows decoded from the file's bytes; of types that no kernel knows, widened at load."""
    matrix, ids = node.inputs
    name, n = matrix.dtype.name, int(matrix.shape[1])
    format, form = (name, "raw") if name in FORMATS else ("f32", "vector")
    blocks = format in BLOCK_FORMATS
    lowering.emit(
        "get_rows", node, {"format": format}, matrix=lowering.weight(matrix, form),
        **_book(lowering, format), ids=lowering.read(ids), out=lowering.write(node), n=n,
        row_units=nbytes_for(matrix.dtype, (n,)) if blocks else n,
        grid=(-(-n // THREADS), int(node.shape[0])),
    )  # fmt: skip


def _book(lowering: Lowering, format: str) -> dict[str, Any]:
    """The code book of a format that has one."""
    row = BLOCK_FORMATS.get(format)
    if row is None or not row.book:
        return {}
    book = constant(f"book.{row.book}", book_words(row.book))
    return {"book": lowering.weight(book, "vector")}


@lowers("copy")
def copy(lowering: Lowering, node: Tensor) -> None:
    """A view with up to four axes, of f32, i32, f16 or bf16."""
    (x,) = node.inputs
    lowering.emit(
        "copy", node, {"item": x.dtype.nbytes}, x=lowering.place(x, (F32, I32, F16, BF16)),
        out=lowering.write(node), count=x.size, **lowering.axes(x),
        grid=(max(1, -(-x.size // THREADS)),),
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

"""Lowering of ops/matmul.py: activations to int8, then weights times columns."""

from __future__ import annotations

from runtime.backends.cuda.kernels.matvec import rows_of
from runtime.backends.cuda.layouts import (
    activations_nbytes,
    columns_of,
    meta_offset,
    packed_type,
    parts,
)
from runtime.backends.cuda.rules.elementwise import emit_by_element
from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.plan.lowering import Declined, Lowering, Out
from runtime.backends.plan.plan import Ref
from runtime.ops.tensor import Tensor


def packed(lowering: Lowering, node: Tensor, rows: int, n: int) -> tuple[Out, Out]:
    """Where rows of n go as int8, and their scales; both in the node's buffer."""
    out = lowering.write(node, activations_nbytes(rows, n))
    return out, Out(Ref(out.ref.buffer, meta_offset(rows, n)))


@lowers("pack")
def pack(lowering: Lowering, node: Tensor) -> None:
    """Rows of float32 to int8 blocks, or as they are for weights that are floats."""
    address, n, _, stride = lowering.rows(node.inputs[0])
    rows = node.inputs[0].size // n
    if node.attrs["coding"] == "f32":
        lowering.emit(
            "copy_rows", node, x=address, out=lowering.write(node, 4 * rows * n), n=n,
            x_stride=stride, grid=(-(-n // 256), rows),
        )  # fmt: skip
        return
    if stride != n and rows > 1:
        raise Declined("not yet")
    out, meta = packed(lowering, node, rows, n)
    lowering.emit(
        "quantize", node, x=address, packed=out, meta=meta, blocks=n // 32,
        grid=(-(-n // 1024), rows),
    )  # fmt: skip


@lowers("swiglu_pack")
def swiglu_pack(lowering: Lowering, node: Tensor) -> None:
    """silu(gate) * up, or its clamped form, to int8; to float32 for weights that are floats."""
    gate, up = node.inputs
    address, n, _, gate_stride = lowering.rows(gate)
    up_address, _, _, up_stride = lowering.rows(up)
    rows, clamp, plain = gate.size // n, "alpha" in node.attrs, node.attrs["coding"] == "f32"
    if n % 4 or gate_stride % 4 or up_stride % 4 or address.offset % 16 or up_address.offset % 16:
        if not plain:
            raise Declined("rows of gate or up are not multiples of 16 bytes")
        emit_by_element(lowering, node, "swiglu_oai" if clamp else "swiglu")
        return
    arguments = {
        "gate": address, "up": up_address, "pieces": n // 4, "gate_stride": gate_stride // 4,
        "up_stride": up_stride // 4, "alpha": node.attrs.get("alpha", 0),
        "limit": node.attrs.get("limit", 0),
    }  # fmt: skip
    if plain:
        arguments["out"] = lowering.write(node, 4 * gate.size)
    else:
        arguments["out"], arguments["meta"] = packed(lowering, node, rows, n)
    constants = {"packed": not plain, "clamp": clamp}
    lowering.emit("swiglu", node, constants, grid=(-(-n // 1024), rows), **arguments)


@lowers("linear")
def linear(lowering: Lowering, node: Tensor) -> None:
    """All columns times one weight, plus a bias and a residual where there are."""
    x, w, *extra = node.inputs
    rows, inner = (int(n) for n in w.shape)
    columns, format = node.size // rows, packed_type(w.dtype)
    source, weights = lowering.result(x), lowering.weight(w, "repacked").buffer
    out = lowering.write(node)
    if x.attrs["coding"] == "f32":
        if format != "F32":
            raise Declined("not yet")
        lowering.emit(
            "matvec_f32", node, weights=Ref(weights), x=Ref(source), out=out, n_rows=rows,
            n_inner=inner, grid=(-(-rows // 4), columns),
        )  # fmt: skip
    else:
        places = {n: Ref(weights, at) for n, at in parts(format, rows, inner).items() if n}
        meta = meta_offset(columns, inner)
        for first in range(0, columns, 8):
            width = columns_of(columns - first)
            lowering.emit(
                "matvec", node, {"format": format, "columns": width}, **places,
                x=Ref(source, first * inner), meta=Ref(source, meta + first * inner // 4),
                out=Out(Ref(out.ref.buffer, 4 * first * rows)), n_rows=rows, blocks=inner // 32,
                out_stride=rows, grid=(-(-rows // rows_of(format, width)),),
            )  # fmt: skip
    for y in extra:
        address, stride = (lowering.weight(y, "vector"), 0) if y.ndim == 1 else _row(lowering, y)
        lowering.emit(
            "add_rows", node, x=out.ref, y=address, out=Out(out.ref, True), n=rows, x_stride=rows,
            y_stride=stride, grid=(-(-rows // 256), columns),
        )  # fmt: skip


def _row(lowering: Lowering, y: Tensor) -> tuple[Ref, int]:
    address, _, _, stride = lowering.rows(y)
    return address, stride

"""Lowering of ops/matmul.py: activations to int8, then weights times columns."""

from __future__ import annotations

from typing import Any

from runtime.backends.cuda.kernels import matvec, matvec_float
from runtime.backends.cuda.layouts import (
    FLOATS,
    PIECE,
    column_nbytes,
    columns_of,
    cut,
    float_nbytes,
    packed_type,
    parts,
)
from runtime.backends.cuda.rules import norm_tail
from runtime.backends.cuda.rules.elementwise import emit_by_element
from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.plan.lowering import Declined, Lowering, Out
from runtime.backends.plan.plan import Ref
from runtime.ops.tensor import Tensor


def packed(lowering: Lowering, node: Tensor, rows: int, n: int) -> dict[str, Any]:
    """Arguments of a kernel that writes rows of n as packed int8 activations."""
    found = cut(n)
    out = lowering.write(node, rows * column_nbytes(n))
    return {"out": out, "stretches": found.stretches, "length": found.length}


def packed_grid(rows: int, n: int) -> tuple[int, int]:
    """Grid of a kernel whose blocks of 256 threads pack 4 values a thread."""
    return -(-cut(n).places // 32), rows


def floats(lowering: Lowering, node: Tensor, rows: int, n: int) -> Out:
    """Where rows of n go as float32 activations, which `n` fills. Declined: it does not."""
    if n % 8:
        raise Declined(f"rows of {n} floats are no multiple of 8")
    return lowering.write(node, rows * column_nbytes(n, "f32"))


@lowers("pack")
def pack(lowering: Lowering, node: Tensor) -> None:
    """Rows of float32 to int8 blocks, or as they are for weights that are floats."""
    address, n, _, stride = lowering.rows(node.inputs[0])
    rows = node.inputs[0].size // n
    if node.attrs["coding"] != "f32":
        how = packed(lowering, node, rows, n)
        lowering.emit(
            "quantize", node, x=address, packed=how.pop("out"), n=n, stride=stride, **how,
            grid=packed_grid(rows, n),
        )  # fmt: skip
        return
    width = float_nbytes(n) // 4
    if width == n and (stride == n or rows == 1) and address.offset == 0:
        lowering.alias(node, address.buffer)
        return
    lowering.emit(
        "pad_rows", node, x=address, out=lowering.write(node, 4 * rows * width), n=n,
        stride=stride, width=width, grid=(-(-width // 256), rows),
    )  # fmt: skip


@lowers("swiglu_pack")
def swiglu_pack(lowering: Lowering, node: Tensor) -> None:
    """silu(gate) * up, or its clamped form, to int8; to float32 for weights that are floats."""
    gate, up = node.inputs
    address, n, _, gate_stride = lowering.rows(gate)
    up_address, _, _, up_stride = lowering.rows(up)
    rows, clamp, plain = gate.size // n, "alpha" in node.attrs, node.attrs["coding"] == "f32"
    if (
        n % (8 if plain else 4)
        or gate_stride % 4
        or up_stride % 4
        or address.offset % 16
        or up_address.offset % 16
    ):
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
        arguments["out"] = floats(lowering, node, rows, n)
    else:
        arguments |= packed(lowering, node, rows, n)
    constants = {"packed": not plain, "clamp": clamp}
    grid = (-(-n // 1024), rows) if plain else packed_grid(rows, n)
    lowering.emit("swiglu", node, constants, grid=grid, **arguments)


@lowers("linear")
def linear(lowering: Lowering, node: Tensor) -> None:
    """All columns times one weight, plus a bias and a residual where there are."""
    x, w, *extra = node.inputs
    rows, inner = (int(n) for n in w.shape)
    columns, format = node.size // rows, packed_type(w.dtype)
    width, turns = columns_of(columns), -(-columns // 8)
    common = {
        "x": Ref(lowering.result(x)), "out": lowering.write(node), "n_rows": rows,
        "n_columns": columns, "out_stride": rows,
        "live": lowering.live(node, columns // int(node.shape[0]) if node.ndim > 1 else 1),
        **_sums(lowering, extra), **norm_tail.NONE,
    }  # fmt: skip
    if x.attrs["coding"] == "f32":
        form = "repacked" if format in FLOATS else "vector"
        format = format if form == "repacked" else "F32"
        lanes = matvec_float.float_lanes(inner)
        lowering.emit(
            "matvec_float", node, {"format": format, "columns": width},
            weights=lowering.weight(w, form), row_pieces=parts(format, inner)[""] // PIECE,
            shift=lanes.bit_length() - 1, units=-(-inner // 8),
            grid=(matvec_float.blocks_of(width, rows, lanes), turns), **common,
        )  # fmt: skip
        return
    found = cut(inner)
    lowering.emit(
        "matvec", node, {"format": format, "columns": width},
        weights=lowering.weight(w, "repacked"), **row_arguments(format, inner),
        shift=found.lanes.bit_length() - 1, stretches=found.stretches, pairs=found.length // 2,
        grid=(matvec.blocks_of(format, width, rows, found.lanes), turns), **common,
    )  # fmt: skip


def row_arguments(format: str, inner: int) -> dict[str, int]:
    """Where the parts of a packed row are, as kernels take it: pieces of a row, first words."""
    found = parts(format, inner)
    at = {name: found.get(name, 0) // 4 for name in ("high", "scales", "supers")}
    return {"row_pieces": found[""] // PIECE, **at}


def _sums(lowering: Lowering, extra: list[Tensor]) -> dict[str, Any]:
    """Arguments for a bias, a residual, or both in this order."""
    bias = next((y for y in extra if y.ndim == 1), None)
    residual = next((y for y in extra if y.ndim > 1), None)
    address, stride = _row(lowering, residual) if residual is not None else (0, 0)
    return {
        "bias": lowering.weight(bias, "vector") if bias is not None else 0,
        "residual": address, "residual_stride": stride,
        "sums": (bias is not None) + 2 * (residual is not None),
    }  # fmt: skip


def _row(lowering: Lowering, y: Tensor) -> tuple[Ref, int]:
    address, _, _, stride = lowering.rows(y)
    return address, stride

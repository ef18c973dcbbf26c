"""Lowering of ops/matmul.py: activations to int8, then weights times columns."""

from __future__ import annotations

from typing import Any

from runtime.backends.cuda.kernels.matvec_ends import RESIDUAL
from runtime.backends.cuda.layouts import (
    FLOATS,
    column_nbytes,
    cut,
    float_nbytes,
    packed_type,
)
from runtime.backends.cuda.products import arguments_of, grid_of, kernel_of
from runtime.backends.cuda.rules.elementwise import emit_by_element
from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.cuda.rules.tiles import emit_tile
from runtime.backends.cuda.widths import tile_width
from runtime.backends.plan.kernel import Kernel
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
        raise Declined(f"rows of {n} floats are no multiple of 8: use devices='cpu'")
    return lowering.write(node, rows * column_nbytes(n, "f32"))


def weight_form(x: Tensor, w: Tensor) -> tuple[str, str]:
    """The format of a weight that packed x is multiplied with, and in which form it is asked for.

    Of float32 activations all weights are floats.
    """
    format = packed_type(w.dtype)
    if x.attrs["coding"] == "f32" and format not in FLOATS:
        return "F32", "vector"
    return format, "repacked"


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
        "copy_rows", node, x=address, out=lowering.write(node, 4 * rows * width), n=n,
        stride=stride, width=width, grid=(-(-width // 256), rows),
    )  # fmt: skip


@lowers("swiglu_pack")
def swiglu_pack(lowering: Lowering, node: Tensor) -> None:
    """silu(gate) * up, or its clamped form, to int8; to float32 for weights that are floats."""
    gate, up = node.inputs
    address, n, _, gate_stride = lowering.rows(gate)
    up_address, _, _, up_stride = lowering.rows(up)
    rows, clamp, plain = gate.size // n, "alpha" in node.attrs, node.attrs["coding"] == "f32"
    unit = 8 if plain else 4
    if n % unit or (gate_stride | up_stride) % 4 or (address.offset | up_address.offset) % 16:
        if not plain or n % 8:
            raise Declined(
                f"rows of {n} values do not lie at multiples of 16 bytes: use devices='cpu'"
            )
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
    columns, (format, form) = node.size // rows, weight_form(x, w)
    sums = {"x": Ref(lowering.result(x)), **_sums(lowering, extra)}
    live = lowering.live(node, columns // int(node.shape[0]) if node.ndim > 1 else 1)
    width = tile_width(columns, rows)
    if width:
        bits = (sums["sums"] & 1) + 2 * bool(sums["sums"] & RESIDUAL)
        sums |= {"bias": sums.pop("b0", 0), "sums": bits, "out": lowering.write(node)}
        emit_tile(
            lowering, node, format, width, rows, inner, -(-columns // width), live=live,
            weights=lowering.weight(w, form), **sums,
        )  # fmt: skip
        return
    name, constants = kernel_of(format, columns)
    arguments = arguments_of(format, rows, inner, columns) | {
        "w0": lowering.weight(w, form), "out0": lowering.write(node), "live": live, **sums,
    }  # fmt: skip
    grid = grid_of(Kernel.of(name, **constants), arguments)
    lowering.emit(name, node, constants, grid=grid, **arguments)


def _sums(lowering: Lowering, extra: list[Tensor]) -> dict[str, Any]:
    """Arguments for what is added to a product: a bias, a residual, or both in this order."""
    found: dict[str, Any] = {"sums": 0}
    for y in extra:
        if y.ndim == 1:
            found |= {"b0": lowering.weight(y, "vector"), "sums": found["sums"] | 1}
        else:
            address, _, _, stride = lowering.rows(y)
            found |= {"residual": address, "residual_stride": stride}
            found["sums"] |= RESIDUAL
    return found

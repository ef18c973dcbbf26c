"""Lowering of ops/matmul.py: activations packed into tiles, then weights times tiles."""

from __future__ import annotations

from runtime.backends.cpu.lower import Lowering, lowers
from runtime.backends.cpu.rewrite import tile_format
from runtime.backends.cpu.signatures import packed_nbytes
from runtime.ops.tensor import Tensor


@lowers("pack")
def pack(lower: Lowering, node: Tensor) -> None:
    """Rows of float32 to tiles of C columns."""
    address, n, live, stride = lower.rows(node.inputs[0])
    tile = {"C": node.attrs["C"], "kind": node.attrs["kind"]}
    nbytes = packed_nbytes(node.inputs[0].size // n, n, **tile)
    lower.emit(
        "pack", node, tile, x=address, out=lower.write(node, nbytes), live=live, n=n,
        x_stride=stride,
    )  # fmt: skip


@lowers("swiglu_pack")
def swiglu_pack(lower: Lowering, node: Tensor) -> None:
    """silu(gate) * up straight into tiles."""
    gate, up = node.inputs
    address, n, live, gate_stride = lower.rows(gate)
    up_address, _, _, up_stride = lower.rows(up)
    tile = {"C": node.attrs["C"], "kind": node.attrs["kind"]}
    nbytes = packed_nbytes(gate.size // n, n, **tile)
    lower.emit(
        "swiglu_pack", node, tile, gate=address, up=up_address, out=lower.write(node, nbytes),
        live=live, n=n, gate_stride=gate_stride, up_stride=up_stride,
    )  # fmt: skip


@lowers("linear")
def linear(lower: Lowering, node: Tensor) -> None:
    """All tiles times one weight, plus a bias and a residual where there are."""
    packed, w, *extra = node.inputs
    bias = extra.pop(0) if node.attrs.get("bias") else None
    add = extra.pop(0) if node.attrs.get("add") else None
    constants = {
        "format": tile_format(w.dtype), "columns": packed.attrs["C"],
        "activations": packed.attrs["kind"]
    }  # fmt: skip
    rows, inner = (int(n) for n in w.shape)
    add_address, add_stride = (0, 0) if add is None else (lower.rows(add)[0], lower.rows(add)[3])
    # The count of live rows is that of the packed input's first axes.
    live = lower.live(node, node.size // rows // int(node.shape[0]) if node.ndim > 1 else 1)
    lower.emit(
        "matmul", node, constants, w=lower.weight(w, "packed"), x=lower.read(packed),
        out=lower.write(node), out_stride=rows,
        bias=0 if bias is None else lower.weight(bias, "vector"),
        add=add_address, add_stride=add_stride, live=live, n_rows=rows, n_inner=inner,
    )  # fmt: skip

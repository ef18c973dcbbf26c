"""Lowering of ops/matmul.py: activations packed into tiles, then weights times tiles."""

from __future__ import annotations

from typing import Any

from runtime.backends.cpu.rules.registry import lowers
from runtime.backends.cpu.sizes import float_bits
from runtime.backends.cpu.tile.formats import tile_format
from runtime.backends.cpu.tile.spec import activations_nbytes
from runtime.backends.plan.lowering import Lowering, Out
from runtime.backends.plan.plan import Ref, Share
from runtime.ops.tensor import Tensor


def packed(lowering: Lowering, node: Tensor, rows: int, n: int) -> tuple[dict[str, Any], Out]:
    """Constants of the kernel that packs `rows` rows of `n` for a node, and where to."""
    columns, coding = node.attrs["C"], node.attrs["coding"]
    out = lowering.write(node, activations_nbytes(rows, n, columns, coding))
    return {"C": columns, "coding": coding}, out


@lowers("pack")
def pack(lowering: Lowering, node: Tensor) -> None:
    """Rows of float32 to tiles of C columns."""
    address, n, live, stride = lowering.rows(node.inputs[0])
    tile, out = packed(lowering, node, node.inputs[0].size // n, n)
    lowering.emit("pack", node, tile, x=address, out=out, live=live, n=n, x_stride=stride)


def activation(node: Tensor) -> tuple[dict[str, str], dict[str, Any]]:
    """Which SwiGLU a node computes: the constant of its kernel, and two of its arguments."""
    alpha, limit = (float_bits(node.attrs.get(name, 0.0)) for name in ("alpha", "limit"))
    return {"act": "oai" if "alpha" in node.attrs else "silu"}, {"alpha": alpha, "limit": limit}


@lowers("swiglu_pack")
def swiglu_pack(lowering: Lowering, node: Tensor) -> None:
    """silu(gate) * up straight into tiles."""
    gate, up = node.inputs
    address, n, live, gate_stride = lowering.rows(gate)
    up_address, _, _, up_stride = lowering.rows(up)
    tile, out = packed(lowering, node, gate.size // n, n)
    act, bounds = activation(node)
    lowering.emit(
        "swiglu_pack", node, tile | act, gate=address, up=up_address,
        out=out, live=live, n=n, gate_stride=gate_stride, up_stride=up_stride, **bounds,
        share=Share(n, ("gate", "up", "out")),
    )  # fmt: skip


def _gated(lowering: Lowering, node: Tensor, x: Tensor, gate: Tensor, **more: Any) -> None:
    """A pack of [T, heads, d] as rows of heads * d; only the gate's heads may lie apart."""
    address, n, live, stride = lowering.tokens(x)
    gate_address, gate_stride, gate_head_stride = lowering.heads(gate)
    tile, out = packed(lowering, node, x.size // n, n)
    lowering.emit(
        node.op, node, tile, x=address, gate=gate_address, out=out, live=live, n=n,
        head_dim=int(x.shape[2]), x_stride=stride, gate_stride=gate_stride,
        gate_head_stride=gate_head_stride, **more,
    )  # fmt: skip


@lowers("sigmoid_gate_pack")
def sigmoid_gate_pack(lowering: Lowering, node: Tensor) -> None:
    """x * sigmoid(gate) straight into tiles."""
    _gated(lowering, node, *node.inputs)


@lowers("gated_norm_pack")
def gated_norm_pack(lowering: Lowering, node: Tensor) -> None:
    """rms_norm(x, w) of each head * silu(gate) straight into tiles."""
    x, w, gate = node.inputs
    eps = float_bits(node.attrs["eps"])
    _gated(lowering, node, x, gate, w=lowering.weight(w, "vector"), eps=eps)


@lowers("linear")
def linear(lowering: Lowering, node: Tensor) -> None:
    """All tiles times one weight, plus a bias and a residual where there are."""
    x, w, *extra = node.inputs
    bias = extra.pop(0) if node.attrs.get("bias") else None
    add = extra.pop(0) if node.attrs.get("residual") else None
    constants = {
        "format": tile_format(w.dtype), "columns": x.attrs["C"], "coding": x.attrs["coding"]
    }  # fmt: skip
    rows, inner = (int(n) for n in w.shape)
    add_address, add_stride = (
        (0, 0) if add is None else (lowering.rows(add)[0], lowering.rows(add)[3])
    )
    # The count of live rows is that of the packed input's first axes.
    live = lowering.live(node, node.size // rows // int(node.shape[0]) if node.ndim > 1 else 1)
    lowering.emit(
        "matmul", node, constants, w=lowering.weight(w, "repacked"), x=Ref(lowering.result(x)),
        out=lowering.write(node), out_stride=rows,
        bias=0 if bias is None else lowering.weight(bias, "vector"),
        add=add_address, add_stride=add_stride, live=live, n_rows=rows, n_inner=inner,
        share=Share(rows, ("out", "add")),
    )  # fmt: skip

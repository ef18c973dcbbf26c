"""Lowering of ops/norm.py, and of norms and gates fused with packing."""

from __future__ import annotations

from typing import Any

from runtime.backends.cuda.kernels import norm_gate
from runtime.backends.cuda.kernels.norm import WARPS, warps_of
from runtime.backends.cuda.rules.matmul import floats, packed
from runtime.backends.cuda.rules.norm_tail import norm_behind
from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.plan.lowering import Declined, Lowering, Out
from runtime.backends.plan.plan import Ref
from runtime.ops.tensor import Tensor


def in_fours(address: Ref, *lengths: int) -> bool:
    """Whether what begins there and has these lengths and strides is read 16 bytes at a time."""
    return address.offset % 16 == 0 and not any(n % 4 for n in lengths)


def emit_norm(
    lowering: Lowering, node: Tensor, x: Ref, out: Out, n: int, grid: tuple[int, int],
    strides: tuple[int, int], out_strides: tuple[int, int], divisor: int, w: Tensor | None = None,
    warps: int = 0,
) -> None:  # fmt: skip
    """Norms of rows of n; grid: (heads, tokens), and the strides of tokens and of heads."""
    strides = 0 if grid[1] == 1 else strides[0], 0 if grid[0] == 1 else strides[1]
    wide = in_fours(x, n, *strides) and in_fours(out.ref, *out_strides)
    lowering.emit(
        "norm", node, {"wide": wide, "warps": warps or warps_of(n)}, x=x, out=out, n=n,
        x_stride=strides[0], x_head_stride=strides[1], out_stride=out_strides[0],
        out_head_stride=out_strides[1], divisor=divisor, eps=node.attrs["eps"],
        weighted=w is not None,
        w=0 if w is None else lowering.weight(w, "vector"), grid=grid,
    )  # fmt: skip


@lowers("rms_norm")
def rms_norm(lowering: Lowering, node: Tensor) -> None:
    """One row per element of all axes but the last."""
    x, w = node.inputs
    address, n, _, stride = lowering.rows(x)
    grid, out = (max(1, x.size // n), 1), lowering.write(node)
    emit_norm(lowering, node, address, out, n, grid, (0, stride), (0, n), n, w)


@lowers("rms_norm_pack")
def rms_norm_pack(lowering: Lowering, node: Tensor) -> None:
    """Norm of a row, then int8 for products; for float weights the norm alone.

    Of one row the launch that makes it does it at its end, if it can.
    """
    x, w = node.inputs
    address, n, _, stride = lowering.rows(x)
    rows = x.size // n
    if norm_behind(lowering, node):
        return
    if node.attrs["coding"] == "f32":
        out, grid = floats(lowering, node, rows, n), (rows, 1)
        emit_norm(lowering, node, address, out, n, grid, (0, stride), (0, n), n, w, WARPS)
    elif in_fours(address, n, stride):
        lowering.emit(
            "rms_norm_packed", node, x=address, n=n, w=lowering.weight(w, "vector"),
            x_stride=stride, divisor=n, eps=node.attrs["eps"], grid=(rows,),
            **packed(lowering, node, rows, n),
        )  # fmt: skip
    else:
        raise Declined(f"rows of {x!r} are not multiples of 16 bytes")


@lowers("gated_norm_pack")
def gated_norm_pack(lowering: Lowering, node: Tensor) -> None:
    """rms_norm(y, w) of each head * silu(gate) straight to int8."""
    w, eps = lowering.weight(node.inputs[1], "vector"), node.attrs["eps"]
    _gate_heads(lowering, node, "norm_gate", w=w, eps=eps)


@lowers("sigmoid_gate_pack")
def sigmoid_gate_pack(lowering: Lowering, node: Tensor) -> None:
    """y * sigmoid(gate) straight to int8."""
    _gate_heads(lowering, node, "sigmoid_gate")


def _gate_heads(lowering: Lowering, node: Tensor, kernel: str, **arguments: Any) -> None:
    y, gate = node.inputs[0], node.inputs[-1]
    tokens, heads, dim = map(int, y.shape)
    plain, n = node.attrs["coding"] == "f32", heads * dim
    arguments |= (
        {"out": floats(lowering, node, tokens, n)} if plain else packed(lowering, node, tokens, n)
    )
    lowering.emit(
        kernel, node, {"packed": not plain}, y=lowering.read(y), heads=heads, dim=dim,
        grid=(-(-heads // norm_gate.WARPS), tokens), **gate_of(lowering, gate), **arguments,
    )  # fmt: skip


def gate_of(lowering: Lowering, gate: Tensor) -> dict[str, Any]:
    """The arguments that say where the gate of heads [T, heads, dim] lies."""
    address, *strides = lowering.heads(gate)
    stride, head_stride = (0 if n == 1 else s for n, s in zip(gate.shape, strides, strict=False))
    if not in_fours(address, stride, head_stride):
        raise Declined(f"heads of {gate!r} are not multiples of 16 bytes")
    return {"gate": address, "gate_stride": stride, "gate_head_stride": head_stride}

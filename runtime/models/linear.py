"""Products with the matrices of a file, and what files have beside a matrix. T: tokens."""

from __future__ import annotations

from runtime import ops
from runtime.models.weights import Weights
from runtime.ops.cuts import Runs
from runtime.ops.tensor import Tensor


def linear(
    w: Weights, name: str, x: Tensor, rows: int, label: str, of: int = 0, runs: Runs = ()
) -> Tensor:
    """x W^T, times the scale and plus the bias that the file has beside W: [T, rows].

    of, runs: W is a part of a stored matrix of `of` rows, these runs of them.
    """
    part, stored = label.rsplit(".", 1)[-1], of or rows
    matrix = w.rows(f"{name}.weight", part, runs, stored, x.shape[-1])
    y = scaled(w, name, ops.matmul(x, matrix, name=label))
    if f"{name}.bias" not in w:
        return y
    return ops.add(y, w.rows(f"{name}.bias", part, runs, stored, axis=-1), name=f"{label}+bias")


def scaled(w: Weights, name: str, y: Tensor) -> Tensor:
    """A product times the one scale of its matrix (NVFP4), where the file has one."""
    factor = w.number(f"{name}.scale")
    return y if factor is None else ops.scale(y, factor=factor, name=f"{y.name}*scale")


def scaled_by_expert(w: Weights, name: str, y: Tensor, ids: Tensor, count: int) -> Tensor:
    """Products times the scale of each expert's matrix, or one for all, where the file has any."""
    if f"{name}.scale" not in w:
        return y
    if tuple(w.tensors[f"{name}.scale"].shape) == (1,):
        return scaled(w, name, y)
    by_token = ops.broadcast(
        ops.reshape(w(f"{name}.scale", count), shape=(1, count)), shape=(ids.shape[0], count)
    )
    chosen = ops.reshape(ops.take(by_token, ids), shape=(*ids.shape, 1))  # [T, per_token, 1]
    return ops.row_scale(y, chosen, name=f"{y.name}*scale")


def projections(w: Weights, at: str, x: Tensor, rows: dict[str, int]) -> list[Tensor]:
    """Queries, keys and values of x, from three matrices or from one that holds their rows."""
    fused, total, start = f"{at}.attn_qkv", sum(rows.values()), 0
    if f"{fused}.weight" not in w:
        return [linear(w, f"{at}.attn_{part}", x, n, f"{at}.{part}") for part, n in rows.items()]
    found = []
    for part, n in rows.items():
        y = linear(w, fused, x, n, f"{at}.{part}", total, ((start, start + n),))
        bias = None if f"{fused}.bias" in w else w.optional(f"{at}.attn_{part}.bias", n)
        found.append(y if bias is None else ops.add(y, bias, name=f"{at}.{part}+bias"))
        start += n
    return found

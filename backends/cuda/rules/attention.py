"""Lowering of ops/attention.py: cache writes, fused or plain, and attention over pages."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from runtime.backends.cuda.kernels.attention import SPLIT_PAGES
from runtime.backends.cuda.kernels.attention_scores import ROWS
from runtime.backends.cuda.kernels.heads import GROUPS, STYLES
from runtime.backends.cuda.kernels.rotation import WARPS
from runtime.backends.cuda.kv_layout import TYPES, group_pieces
from runtime.backends.cuda.rules.matmul import packed
from runtime.backends.cuda.rules.norm import gate_of
from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.cuda.tiles import most_tiles, tiles_name
from runtime.backends.plan.lowering import Declined, Lowering, Out
from runtime.ops.kv_formats import GROUP
from runtime.ops.tensor import Tensor

MAX_HEAD_DIM = GROUP * GROUPS[-1]
_ENOUGH_BLOCKS = 512  # so many keep a GPU busy without a block for each split
_PARTS_NBYTES = 256 << 20  # of what splits leave, at most


def _groups(dim: int) -> int:
    """The constant of the kernels of heads."""
    if dim > MAX_HEAD_DIM:
        raise Declined(f"heads of {dim} dims: {MAX_HEAD_DIM} are the most")
    return next(n for n in GROUPS if GROUP * n >= dim)


def _pages(lowering: Lowering, pages: Tensor, prefix: str = "") -> dict[str, Any]:
    """A cache that is written: as bytes, halves and words, its type and the size of a group."""
    place = Out(lowering.state(pages), True)
    return {
        **{f"{prefix}pages{bits}": place for bits in (8, 16, 32)},
        f"{prefix}type": TYPES[pages.dtype.name],
        f"{prefix}pieces": group_pieces(pages.dtype.name),
    }


@lowers("kv_write")
def kv_write(lowering: Lowering, node: Tensor) -> None:
    """Rows of k or v into their pages."""
    x, pages, kv_slots = node.inputs
    address, _, live, stride = lowering.tokens(x)
    tokens, heads, dim = map(int, x.shape)
    lowering.emit(
        "kv_write", node, {"groups": _groups(dim)}, x=address, **_pages(lowering, pages),
        kv_slots=lowering.read(kv_slots), live=live, heads=heads, dim=dim, x_stride=stride,
        which=int(node.attrs["which"] == "v"), grid=(-(-heads // WARPS), tokens),
    )  # fmt: skip


@lowers("qkv_post")
def qkv_post(lowering: Lowering, node: Tensor) -> None:
    """Norm, rope and rotation of q and k, q to memory, k and v to their pages."""
    q, k, v, k_pages, v_pages, kv_slots, *rest = node.inputs
    if k.shape[2] != v.shape[2]:
        raise Declined("head sizes of k and v differ")
    optional = dict(zip(node.attrs["optional"], rest, strict=True))
    attrs, angles = node.attrs, optional.get("angles")
    norms: dict[str, Any] = {
        name: lowering.weight(optional[name], "vector") if name in optional else 0
        for name in ("q_norm", "k_norm")
    }
    qa, q_stride, q_head_stride = lowering.heads(q)
    (ka, _, live, ks), (va, _, _, vs) = (lowering.tokens(x) for x in (k, v))
    tokens, heads, dim = map(int, q.shape)
    kv_heads = int(k.shape[1])
    lowering.emit(
        "qkv_post", node, {"groups": _groups(dim)}, q=qa, k=ka, v=va, **norms,
        angles=lowering.read(angles) if angles else 0, q_out=lowering.write(node),
        **_pages(lowering, k_pages, "k_"), **_pages(lowering, v_pages, "v_"),
        kv_slots=lowering.read(kv_slots), live=live, q_stride=q_stride,
        q_head_stride=q_head_stride, k_stride=ks, v_stride=vs, heads=heads, kv_heads=kv_heads,
        dim=dim, half=int(angles.shape[1]) if angles else 0,
        style=STYLES[attrs["style"]] if angles else 0, has_norm="q_norm" in optional,
        eps=attrs["eps"], k_rotation=attrs["k_rotation"], v_rotation=attrs["v_rotation"],
        grid=(-(-(heads + 2 * kv_heads) // WARPS), tokens),
    )  # fmt: skip


@lowers("attention")
def attention(lowering: Lowering, node: Tensor) -> None:
    """Flash attention over the block table; the program cuts tokens into tiles."""
    _attention(lowering, node, node.inputs, out=lowering.write(node))


@lowers("attention_pack")
def attention_pack(lowering: Lowering, node: Tensor) -> None:
    """The same, gated and straight to int8."""
    heads, dim, tokens = int(node.inputs[0].shape[1]), int(node.inputs[2].shape[3]), node.shape[0]
    how = packed(lowering, node, int(tokens), heads * dim)
    how["packed"] = how.pop("out")
    if not node.attrs["gated"]:
        _attention(lowering, node, node.inputs, **how)
        return
    *inputs, gate = node.inputs
    _attention(lowering, node, inputs, has_gate=True, **how, **gate_of(lowering, gate))


_PLAIN = dict.fromkeys(
    ("gate", "out", "packed", "gate_stride", "gate_head_stride", "has_gate", "stretches", "length"),
    0,
)


def _attention(
    lowering: Lowering, node: Tensor, inputs: Sequence[Tensor], **how: Any
) -> None:  # fmt: skip
    """The cache split among blocks where these are few. how: where the result goes, and how."""
    q, k, v, block_table, _, places, *sinks = inputs
    address, stride, head_stride = lowering.heads(q)
    heads, kv_heads = int(q.shape[1]), int(k.shape[2])
    k_dim, v_dim = int(q.shape[2]), int(v.shape[3])
    if k_dim % 4 or max(k_dim, v_dim) > MAX_HEAD_DIM:
        raise Declined(f"heads of {k_dim} and {v_dim} dims: multiples of 4 up to {MAX_HEAD_DIM}")
    if stride % 4 or head_stride % 4 or address.offset % 16:
        raise Declined(f"heads of {q!r} do not begin at multiples of 16 bytes")
    group, pages, slots = heads // kv_heads, int(block_table.shape[1]), 1 + (v_dim > 128)
    rows = kv_heads * -(-group // ROWS)
    tiles = most_tiles(node)
    splits = -(-pages // SPLIT_PAGES)
    cells, size = tiles * rows * splits, ROWS * 128 * slots
    if rows * tiles >= _ENOUGH_BLOCKS or 4 * cells * size > _PARTS_NBYTES:
        splits = 1
    left: dict[str, Any] = {"partial": 0, "stats": 0, "tickets": 0}
    if splits > 1:
        left["partial"] = lowering.room(node, "partial", 4 * cells * size)
        left["stats"] = lowering.room(node, "stats", 8 * cells * ROWS)
        left["tickets"] = lowering.tickets(node, tiles * rows)
    attrs, per_bit = node.attrs, 1 / math.log(2)
    types = k.dtype.name, v.dtype.name
    lowering.emit(
        "attention", node, {"slots": slots, "f16": types == ("f16", "f16")}, q=address,
        k=lowering.state(k), v=lowering.state(v), block_table=lowering.read(block_table),
        tiles=lowering.step(tiles_name(node)), places=lowering.read(places),
        sinks=lowering.weight(sinks[0], "vector") if sinks else 0, **left, **(_PLAIN | how),
        q_stride=stride, q_head_stride=head_stride, out_stride=heads * v_dim,
        block_table_stride=pages, kv_heads=kv_heads, group=group, parts=rows // kv_heads,
        k_dim=k_dim, v_dim=v_dim, k_type=TYPES[types[0]], v_type=TYPES[types[1]],
        k_pieces=group_pieces(types[0]), v_pieces=group_pieces(types[1]), split_pages=SPLIT_PAGES,
        factor=attrs["scale"] * per_bit, softcap=attrs.get("softcap", 0.0) * per_bit,
        window=attrs.get("window", 0), has_sinks=bool(sinks), rotation=attrs.get("rotation", 0),
        grid=(splits, rows, tiles),
    )  # fmt: skip

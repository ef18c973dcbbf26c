"""Lowering of ops/attention.py: cache writes, and attention over pages."""

from __future__ import annotations

import math

from runtime.backends.cuda.kernels.attention import ROWS, SPLIT_PAGES
from runtime.backends.cuda.rules.registry import lowers
from runtime.backends.plan.lowering import Declined, Lowering, Out
from runtime.ops.kv_formats import PAGE
from runtime.ops.tensor import Tensor


@lowers("kv_write")
def kv_write(lowering: Lowering, node: Tensor) -> None:
    """Rows of k or v into their pages."""
    x, pages, kv_slots = node.inputs
    if pages.dtype.name != "f16":
        raise Declined("not yet")
    address, _, live, stride = lowering.tokens(x)
    tokens, heads, dim = map(int, x.shape)
    lowering.emit(
        "kv_write", node, {"which": node.attrs["which"], "dim": dim}, x=address,
        pages=Out(lowering.state(pages), True), kv_slots=lowering.read(kv_slots), live=live,
        x_stride=stride, grid=(heads, tokens),
    )  # fmt: skip


@lowers("attention")
def attention(lowering: Lowering, node: Tensor) -> None:
    """Flash attention over the block table, its cache split among blocks; then the splits joined.

    The program cuts tokens into tiles.
    """
    q, k, v, block_table, _, places, *sinks = node.inputs
    address, stride, head_stride = lowering.heads(q)
    tokens, heads, dim = map(int, q.shape)
    kv_heads, group = int(k.shape[2]), heads // int(k.shape[2])
    if head_stride != dim or node.attrs.get("softcap") or node.attrs.get("rotation"):
        raise Declined("not yet")
    pages = int(block_table.shape[1])
    splits = -(-pages // SPLIT_PAGES)
    tiles, n_tiles = lowering.step("attention_tiles"), tokens
    cells = n_tiles * kv_heads * splits * ROWS
    partial = lowering.room(node, "partial", 4 * cells * dim)
    stats = lowering.room(node, "stats", 8 * cells)
    lowering.emit(
        "attention", node, {"dim": dim}, q=address, k=lowering.state(k), v=lowering.state(v),
        block_table=lowering.read(block_table), tiles=tiles, places=lowering.read(places),
        partial=partial, stats=stats, q_stride=stride, block_table_stride=pages, group=group,
        split_pages=SPLIT_PAGES, factor=node.attrs["scale"] / math.log(2),
        window=node.attrs.get("window", 0), grid=(splits, kv_heads, n_tiles),
    )  # fmt: skip
    lowering.emit(
        "attention_merge", node, {"dim": dim}, partial=partial.ref, stats=stats.ref, tiles=tiles,
        places=lowering.read(places), sinks=lowering.weight(sinks[0], "vector") if sinks else 0,
        out=lowering.write(node), splits=splits, out_stride=heads * dim, group=group,
        split_pages=SPLIT_PAGES, has_sinks=bool(sinks), grid=(ROWS, kv_heads, n_tiles),
    )  # fmt: skip
    assert PAGE == 32, "the kernels' page"

"""Lowering of ops/attention.py: cache writes, fused or plain, and attention over pages."""

from __future__ import annotations

from runtime.backends.cpu.rules.registry import lowers
from runtime.backends.cpu.sizes import attention_scratch_nbytes, float_bits
from runtime.backends.plan.lowering import Declined, Lowering, Out
from runtime.ops.cost import page_nbytes
from runtime.ops.tensor import Tensor


@lowers("kv_write")
def kv_write(lowering: Lowering, node: Tensor) -> None:
    """Rows of k or v into their pages."""
    x, pages, kv_slots = node.inputs
    address, _, live, stride = lowering.tokens(x)
    constants = {"which": node.attrs["which"], "type": pages.dtype.name}
    lowering.emit(
        "kv_write", node, constants, x=address, pages=Out(lowering.state(pages), True),
        page_bytes=page_nbytes(pages), kv_slots=lowering.read(kv_slots), live=live,
        n_kv_heads=int(x.shape[1]), head_dim=int(x.shape[2]), x_stride=stride,
    )  # fmt: skip


@lowers("qkv_post")
def qkv_post(lowering: Lowering, node: Tensor) -> None:
    """Norm, rope and rotation of q and k, q to memory, k and v to their pages."""
    q, k, v, k_pages, v_pages, kv_slots, *rest = node.inputs
    if k.shape[2] != v.shape[2]:
        raise Declined("head sizes of k and v differ")
    optional = dict(zip(node.attrs["optional"], rest, strict=True))
    attrs, angles = node.attrs, optional.get("angles")
    q_norm, k_norm = (
        lowering.weight(optional[name], "vector") if name in optional else 0
        for name in ("q_norm", "k_norm")
    )
    qa, q_stride, q_head_stride = lowering.heads(q)
    (ka, _, live, ks), (va, _, _, vs) = (lowering.tokens(x) for x in (k, v))
    constants = {name: attrs[name] for name in ("style", "k_type", "v_type")}
    lowering.emit(
        "qkv_post", node, constants, q=qa, k=ka, v=va, q_stride=q_stride,
        q_head_stride=q_head_stride, k_stride=ks, v_stride=vs, q_norm=q_norm, k_norm=k_norm,
        eps=float_bits(attrs["eps"]), angles=lowering.read(angles) if angles else 0,
        half=int(angles.shape[1]) if angles else 0, q_out=lowering.write(node),
        q_out_stride=int(q.shape[1] * q.shape[2]), k_pages=Out(lowering.state(k_pages), True),
        v_pages=Out(lowering.state(v_pages), True), k_page_bytes=page_nbytes(k_pages),
        v_page_bytes=page_nbytes(v_pages), kv_slots=lowering.read(kv_slots), live=live,
        n_heads=int(q.shape[1]), n_kv_heads=int(k.shape[1]), head_dim=int(q.shape[2]),
        k_rotation=attrs["k_rotation"], v_rotation=attrs["v_rotation"],
    )  # fmt: skip


@lowers("attention")
def attention(lowering: Lowering, node: Tensor) -> None:
    """Flash attention over the block table; the program cuts tokens into tiles."""
    q, k, v, block_table, _, places, *sinks = node.inputs
    address, stride, head_stride = lowering.heads(q)
    heads, kv_heads, v_dim = int(q.shape[1]), int(k.shape[2]), int(v.shape[3])
    scratch = attention_scratch_nbytes(heads, kv_heads, int(q.shape[2]), v_dim)
    lowering.emit(
        "attention", node, {"k_type": k.dtype.name, "v_type": v.dtype.name}, q=address,
        q_stride=stride, q_head_stride=head_stride, k_pages=lowering.state(k),
        v_pages=lowering.state(v), k_page_bytes=page_nbytes(k), v_page_bytes=page_nbytes(v),
        block_table=lowering.read(block_table), block_table_stride=int(block_table.shape[1]),
        tiles=lowering.step("attention_tiles"), n_tiles=lowering.count("attention_tiles"),
        places=lowering.read(places), out=lowering.write(node), out_stride=heads * v_dim,
        n_heads=heads, n_kv_heads=kv_heads, k_dim=int(q.shape[2]), v_dim=v_dim,
        scale=float_bits(node.attrs["scale"]), window=node.attrs.get("window", 0),
        softcap=float_bits(node.attrs.get("softcap", 0.0)),
        sinks=lowering.weight(sinks[0], "vector") if sinks else 0,
        rotation=node.attrs.get("rotation", 0),
        scratch=Out(lowering.scratch(scratch)), scratch_bytes=scratch,
    )  # fmt: skip
